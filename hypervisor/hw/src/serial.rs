//! The machine's serial ports, 115200 8N1.

use core::fmt;
use uart_16550::backend::PioBackend;
use uart_16550::spec::registers::{FifoTriggerLevel, IER, ISR, LSR};
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

impl ComPort {
    /// The port of this number, from 1.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Com1,
            2 => Self::Com2,
            3 => Self::Com3,
            4 => Self::Com4,
            _ => return None,
        })
    }

    /// Its name, as in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Com1 => "com1",
            Self::Com2 => "com2",
            Self::Com3 => "com3",
            Self::Com4 => "com4",
        }
    }
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

/// No serial port works there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SerialError {
    /// Nothing holds what is written to its scratch register.
    Absent(ComPort),
    /// It does not hear itself in loopback mode.
    Deaf(ComPort),
}

impl fmt::Display for SerialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (port, what) = match self {
            Self::Absent(port) => (port, "no serial port answers"),
            Self::Deaf(port) => (port, "a serial port answers and fails its loopback test"),
        };
        write!(f, "{}: {what} at {:#x}", port.name(), *port as u16)
    }
}

/// A serial port, or the silence where none answers.
pub struct Serial {
    port: Option<Uart16550<PioBackend>>,
    /// How often in a row the transmitter took nothing; at [`PATIENCE`] it is stuck.
    refused: u32,
    /// An interrupt was asked for when there is room.
    wants_room: bool,
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
        let port = unsafe { Self::set_up(ComPort::Com1) };
        Self::of(port)
    }

    /// Sets up a port and tests it.
    ///
    /// # Errors
    /// When none is there or it does not work.
    ///
    /// # Safety
    /// Nothing else drives the port from now on.
    pub unsafe fn open(port: ComPort) -> Result<Self, SerialError> {
        // SAFETY: promised by the caller.
        let uart = unsafe { Self::set_up(port) };
        let mut uart = uart.ok_or(SerialError::Absent(port))?;
        match uart.test_loopback() {
            Ok(()) => Ok(Self::of(Some(uart))),
            Err(_) => Err(SerialError::Deaf(port)),
        }
    }

    /// Programs a port; `None` when none answers.
    ///
    /// # Safety
    /// As for [`Serial::open`].
    unsafe fn set_up(port: ComPort) -> Option<Uart16550<PioBackend>> {
        // SAFETY: promised by the caller.
        let mut uart = unsafe { Uart16550::new_port(port as u16) }.ok()?;
        uart.init(CONFIG).ok().map(|()| uart)
    }

    const fn of(port: Option<Uart16550<PioBackend>>) -> Self {
        Self {
            port,
            refused: 0,
            wants_room: false,
        }
    }

    /// Sends as much as the transmitter takes now, and says how much. While it is stuck or not
    /// there, all counts as sent and is lost: a broken line must not stop the machine.
    pub fn try_send(&mut self, bytes: &[u8]) -> usize {
        let Some(uart) = &mut self.port else {
            return bytes.len();
        };
        match uart.send_bytes(bytes) {
            0 if self.refused >= PATIENCE => bytes.len(),
            0 => {
                self.refused += 1;
                0
            }
            sent => {
                self.refused = 0;
                sent
            }
        }
    }

    /// Asks for an interrupt as soon as the transmitter takes more, or no longer.
    pub fn want_room(&mut self, wanted: bool) {
        if let Some(uart) = &mut self.port
            && self.wants_room != wanted
        {
            self.wants_room = wanted;
            if wanted {
                uart.enable_interrupts(IER::THR_EMPTY);
            } else {
                uart.disable_interrupts(IER::THR_EMPTY);
            }
        }
    }

    /// Whether the port wants something still. Its interrupt is an edge: another comes only
    /// after this has once been false.
    pub fn interrupts(&mut self) -> bool {
        let port = self.port.as_mut();
        port.is_some_and(|uart| !uart.isr().contains(ISR::INTERRUPT_STATUS))
    }

    /// Makes a new edge of what is pending still, for whoever cannot stay to serve it.
    pub fn interrupt_again(&mut self) {
        if let Some(uart) = &mut self.port {
            let enabled = uart.ier();
            uart.disable_interrupts(enabled);
            uart.enable_interrupts(enabled);
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
