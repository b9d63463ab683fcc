//! Which emulator to take, and what it needs installed.

use std::fs;

use anyhow::{Result, bail};
use clap::ValueEnum;
use harness::{Emulator, Firmware};

use crate::packages::{BOCHS, OVMF, Package, QEMU, SEABIOS, need};

/// `--on`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum On {
    /// QEMU with KVM where the host nests VT-x or AMD-V, else QEMU's own emulation
    #[default]
    Auto,
    /// QEMU on a KVM that nests
    QemuKvm,
    /// QEMU's own emulation, with AMD-V
    QemuTcg,
    /// Bochs, with VT-x
    Bochs,
}

/// Whether KVM here gives its guests an extension, or why not.
pub fn nested_kvm() -> Result<&'static str, String> {
    if fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return Err("/dev/kvm cannot be opened".into());
    }
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu
        .lines()
        .find(|l| l.starts_with("flags"))
        .unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|f| f == flag);
    for (flag, module, name) in [("vmx", "kvm_intel", "VT-x"), ("svm", "kvm_amd", "AMD-V")] {
        if !has(flag) {
            continue;
        }
        let file = format!("/sys/module/{module}/parameters/nested");
        return match fs::read_to_string(&file).as_deref().map(str::trim) {
            Ok("Y" | "1") => Ok(name),
            Ok(_) => Err(format!(
                "{file} is off: modprobe -r {module}; modprobe {module} nested=1"
            )),
            Err(_) => Err(format!(
                "/dev/kvm is not {module}'s, so it does not nest {name}"
            )),
        };
    }
    Err("the processor shows neither vmx nor svm, so this KVM cannot nest".into())
}

impl On {
    /// The emulator, with the reason when it was picked here.
    pub fn pick(self) -> Result<(Emulator, String)> {
        match (self, nested_kvm()) {
            (Self::QemuTcg, _) => Ok((Emulator::QemuTcg, "asked for".into())),
            (Self::Bochs, _) => Ok((Emulator::Bochs, "asked for".into())),
            (Self::QemuKvm, Ok(name)) => {
                Ok((Emulator::QemuKvm, format!("asked for; it nests {name}")))
            }
            (Self::QemuKvm, Err(why)) => bail!("qemu-kvm does not work here: {why}"),
            (Self::Auto, Ok(name)) => Ok((Emulator::QemuKvm, format!("KVM here nests {name}"))),
            (Self::Auto, Err(why)) => Ok((Emulator::QemuTcg, why)),
        }
    }
}

/// The packages for an emulator with a firmware.
pub fn packages(emulator: Emulator, firmware: Firmware) -> Vec<Package> {
    match (emulator, firmware) {
        (Emulator::Bochs, Firmware::Bios) => BOCHS.to_vec(),
        (Emulator::Bochs, Firmware::Uefi) => [&BOCHS[..], &[OVMF]].concat(),
        (_, Firmware::Bios) => vec![QEMU, SEABIOS],
        (_, Firmware::Uefi) => vec![QEMU, OVMF],
    }
}

/// Makes sure an emulator is installed.
pub fn need_emulator(emulator: Emulator, firmware: Firmware) -> Result<()> {
    need(&packages(emulator, firmware))
}
