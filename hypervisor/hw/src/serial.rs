//! The machine's first serial port, 115200 8N1.

use uart_16550::backend::PioBackend;
use uart_16550::spec::registers::{FifoTriggerLevel, IER, LSR};
use uart_16550::{BaudRate, Config, Uart16550};

/// COM1's I/O base.
const COM1: u16 = 0x3f8;

/// 115200 baud, eight data bits, no parity, one stop bit, FIFOs on, and an interrupt for each
/// byte that comes in.
const CONFIG: Config = Config {
    baud_rate: BaudRate::Baud115200,
    interrupts: IER::DATA_READY,
    fifo_trigger_level: Some(FifoTriggerLevel::One),
    ..Config::DEFAULT
};

/// A serial port, or the silence where none answers.
pub struct Serial(Option<Uart16550<PioBackend>>);

impl Serial {
    /// Sets up COM1. A port that is not there is silent, not an error: the log goes to the
    /// screen as well.
    ///
    /// # Safety
    /// Nothing else drives the port from now on.
    #[must_use]
    pub unsafe fn com1() -> Self {
        // SAFETY: promised by the caller.
        let port = unsafe { Uart16550::new_port(COM1) };
        Self(
            port.ok()
                .and_then(|mut uart| uart.init(CONFIG).ok().map(|()| uart)),
        )
    }

    /// Whether a port answered.
    #[must_use]
    pub const fn is_present(&self) -> bool {
        self.0.is_some()
    }

    /// Sends all bytes, waiting for the transmitter where needed.
    pub fn send(&mut self, bytes: &[u8]) {
        if let Some(uart) = &mut self.0 {
            uart.send_bytes_exact(bytes);
        }
    }

    /// Waits until everything has left the wire, as far as the port can tell.
    pub fn drain(&mut self) {
        if let Some(uart) = &mut self.0 {
            while !uart.lsr().contains(LSR::TRANSMITTER_EMPTY) {
                core::hint::spin_loop();
            }
        }
    }

    /// Takes the next byte that has come in, if any.
    pub fn receive(&mut self) -> Option<u8> {
        self.0.as_mut()?.try_receive_byte().ok()
    }
}
