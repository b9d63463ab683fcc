//! The machine's first serial port, 115200 8N1.

use uart_16550::backend::PioBackend;
use uart_16550::spec::registers::{FifoTriggerLevel, IER, LSR};
use uart_16550::{BaudRate, Config, Uart16550};

/// A PC's serial ports and their I/O bases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum ComPort {
    /// The first: the machine's console.
    Com1 = 0x3f8,
    /// The second.
    Com2 = 0x2f8,
    /// The third.
    Com3 = 0x3e8,
    /// The fourth.
    Com4 = 0x2e8,
}

/// 115200 baud, eight data bits, no parity, one stop bit, FIFOs on, and an interrupt for each
/// byte that comes in.
const CONFIG: Config = Config {
    baud_rate: BaudRate::Baud115200,
    interrupts: IER::DATA_READY,
    fifo_trigger_level: Some(FifoTriggerLevel::One),
    ..Config::DEFAULT
};

/// How often the transmitter is asked before it counts as stuck: some 100 ms of port reads, where
/// sixteen characters take 1.4 ms.
const PATIENCE: u32 = 100_000;

/// A serial port, or the silence where none answers.
pub struct Serial {
    port: Option<Uart16550<PioBackend>>,
    /// The transmitter took nothing for long.
    stuck: bool,
}

impl Serial {
    /// Sets up COM1. A port that is not there is silent, not an error: the log goes to the
    /// screen as well.
    ///
    /// # Safety
    /// Nothing else drives the port from now on.
    #[must_use]
    pub unsafe fn com1() -> Self {
        // SAFETY: promised by the caller.
        let port = unsafe { Uart16550::new_port(ComPort::Com1 as u16) };
        let port = port.ok();
        Self {
            port: port.and_then(|mut uart| uart.init(CONFIG).ok().map(|()| uart)),
            stuck: false,
        }
    }

    /// Whether a port answered.
    #[must_use]
    pub const fn is_present(&self) -> bool {
        self.port.is_some()
    }

    /// Sends all bytes, waiting for the transmitter where needed. While it is stuck, what should
    /// go out is lost: a broken line must not stop the machine.
    pub fn send(&mut self, bytes: &[u8]) {
        let Some(uart) = &mut self.port else { return };
        let mut rest = bytes;
        let mut patience = if self.stuck { 0 } else { PATIENCE };
        while !rest.is_empty() {
            let sent = uart.send_bytes(rest);
            self.stuck = sent == 0 && patience == 0;
            if self.stuck {
                return;
            }
            if sent == 0 {
                patience -= 1;
                core::hint::spin_loop();
            } else {
                patience = PATIENCE;
                rest = rest.get(sent..).unwrap_or(&[]);
            }
        }
    }

    /// Waits until everything has left the wire, as far as the port can tell.
    pub fn drain(&mut self) {
        if let Some(uart) = &mut self.port {
            for _ in 0..PATIENCE {
                if uart.lsr().contains(LSR::TRANSMITTER_EMPTY) {
                    break;
                }
                core::hint::spin_loop();
            }
        }
    }

    /// Takes the next byte that has come in, if any.
    pub fn receive(&mut self) -> Option<u8> {
        self.port.as_mut()?.try_receive_byte().ok()
    }
}
