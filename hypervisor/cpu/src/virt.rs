//! Which virtualization extension the machine has, and why it cannot be used.

use core::arch::x86_64::__cpuid;
use core::fmt;

/// A virtualization extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
}

impl fmt::Display for Extension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vmx => "Intel VT-x",
            Self::Svm => "AMD-V",
        })
    }
}

/// Why no guest can run on this machine. Each text names the place and the remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VirtUnavailable {
    /// The processor has neither extension.
    #[error(
        "this processor offers neither Intel VT-x (CPUID 1: ECX bit 5) nor AMD-V (CPUID \
         8000_0001h: ECX bit 2): use one that does; in a virtual machine, turn nested \
         virtualization on; in an emulator, choose a CPU model with vmx or svm"
    )]
    NotSupported,
    /// The firmware turned the extension off and locked the switch.
    #[error("firmware turned {extension} off: {name} (MSR {msr:#x}) reads {value:#x}; {remedy}")]
    DisabledByFirmware {
        /// Which extension.
        extension: Extension,
        /// Name of the MSR that says so.
        name: &'static str,
        /// Its number.
        msr: u32,
        /// What it reads.
        value: u64,
        /// What a person can do about it.
        remedy: &'static str,
    },
    /// The extension is there, but lacks a part that this hypervisor cannot do without.
    #[error(
        "{extension} of this processor lacks {feature}, which Tessera needs: use a newer processor \
         or, in an emulator or a virtual machine, a CPU model that has it"
    )]
    MissingFeature {
        /// Which extension.
        extension: Extension,
        /// What is missing, and where the processor would say that it has it.
        feature: &'static str,
    },
    /// A step of turning the extension on failed on this core.
    #[error("{extension} could not be turned on: {step}")]
    EnableFailed {
        /// Which extension.
        extension: Extension,
        /// Which step, and what it means.
        step: &'static str,
    },
}

/// Which extension the processor says it has.
///
/// # Errors
/// [`VirtUnavailable::NotSupported`] where it has none; whether firmware left it usable is asked
/// by the backend's own detection.
pub fn extension() -> Result<Extension, VirtUnavailable> {
    let highest_extended = __cpuid(0x8000_0000).eax;
    if __cpuid(1).ecx & 1 << 5 != 0 {
        Ok(Extension::Vmx)
    } else if highest_extended >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & 1 << 2 != 0 {
        Ok(Extension::Svm)
    } else {
        Err(VirtUnavailable::NotSupported)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn a_locked_switch_names_place_and_remedy() {
        let text = VirtUnavailable::DisabledByFirmware {
            extension: Extension::Vmx,
            name: "IA32_FEATURE_CONTROL",
            msr: 0x3a,
            value: 1,
            remedy: "enable virtualization in the firmware setup and power-cycle the machine",
        }
        .to_string();
        for part in [
            "Intel VT-x",
            "IA32_FEATURE_CONTROL",
            "0x3a",
            "firmware setup",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
