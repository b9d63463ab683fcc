//! What can be delivered to a virtual CPU.

use serde::{Deserialize, Serialize};

/// An interrupt vector, 0 to 255.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Vector(pub u8);

/// The architectural exceptions (Intel SDM Vol. 3A §6.3.1, table 6-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
#[repr(u8)]
pub enum Exception {
    DivideError = 0,
    Debug = 1,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    FloatingPoint = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    SimdFloatingPoint = 19,
    Virtualization = 20,
    ControlProtection = 21,
}

impl Exception {
    /// Whether delivery pushes an error code (outside real mode).
    #[must_use]
    pub const fn has_error_code(self) -> bool {
        matches!(
            self,
            Self::DoubleFault
                | Self::InvalidTss
                | Self::SegmentNotPresent
                | Self::StackFault
                | Self::GeneralProtection
                | Self::PageFault
                | Self::AlignmentCheck
                | Self::ControlProtection
        )
    }

    /// The exception with this vector, if there is one.
    #[must_use]
    pub const fn from_vector(vector: u8) -> Option<Self> {
        Some(match vector {
            0 => Self::DivideError,
            1 => Self::Debug,
            3 => Self::Breakpoint,
            4 => Self::Overflow,
            5 => Self::BoundRange,
            6 => Self::InvalidOpcode,
            7 => Self::DeviceNotAvailable,
            8 => Self::DoubleFault,
            10 => Self::InvalidTss,
            11 => Self::SegmentNotPresent,
            12 => Self::StackFault,
            13 => Self::GeneralProtection,
            14 => Self::PageFault,
            16 => Self::FloatingPoint,
            17 => Self::AlignmentCheck,
            18 => Self::MachineCheck,
            19 => Self::SimdFloatingPoint,
            20 => Self::Virtualization,
            21 => Self::ControlProtection,
            _ => return None,
        })
    }
}

/// An event to deliver at the next entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A maskable external interrupt.
    Interrupt(Vector),
    /// A non-maskable interrupt.
    Nmi,
    /// A hardware exception; the code is given exactly when the exception has one. For a page
    /// fault, CR2 must have been written before (see [`crate::Vcpu::set_cr2`]).
    Exception {
        /// Which exception.
        exception: Exception,
        /// The error code to push.
        error_code: Option<u32>,
    },
    /// A software interrupt (`INT n`), `INT3`/`INTO` or `INT1` whose delivery was cut short by an
    /// exit and starts again. `length` is that of the instruction, in bytes.
    Software {
        /// Vector number.
        vector: Vector,
        /// Instruction length in bytes, 1 to 15.
        length: u8,
        /// `INT3` and `INTO` are software exceptions; `INT n` is a software interrupt;
        /// `INT1` is a privileged software exception.
        kind: SoftwareKind,
    },
}

/// Which instruction a [`Event::Software`] came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SoftwareKind {
    /// `INT n`
    Interrupt,
    /// `INT1`
    PrivilegedException,
    /// `INT3`, `INTO`
    Exception,
}

impl Event {
    /// A #GP(0).
    pub const GP0: Self = Self::Exception {
        exception: Exception::GeneralProtection,
        error_code: Some(0),
    };
    /// A #UD.
    pub const UD: Self = Self::Exception {
        exception: Exception::InvalidOpcode,
        error_code: None,
    };

    /// A page fault with this error code.
    #[must_use]
    pub const fn page_fault(error_code: u32) -> Self {
        Self::Exception {
            exception: Exception::PageFault,
            error_code: Some(error_code),
        }
    }
}
