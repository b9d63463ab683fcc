//! The programs and files that commands need, the Debian packages that hold them, and how to get
//! those: installed at once as root (or with sudo) on Debian and Ubuntu, else named with the exact
//! command to type.

use std::io::{IsTerminal, stderr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::progress::{note, step};

/// A Debian package, and what shows that it is there: one of these files or programs.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    /// Its name for `apt-get`.
    pub name: &'static str,
    /// Absolute paths, or names looked up in `PATH`; one suffices.
    pub shown_by: &'static [&'static str],
    /// What it is for.
    pub purpose: &'static str,
}

const fn package(
    name: &'static str,
    shown_by: &'static [&'static str],
    purpose: &'static str,
) -> Package {
    Package {
        name,
        shown_by,
        purpose,
    }
}

/// QEMU, with AMD-V in its own emulation.
pub const QEMU: Package = package(
    "qemu-system-x86",
    &["qemu-system-x86_64"],
    "AMD-V emulation; KVM where nested",
);
/// QEMU's BIOS.
pub const SEABIOS: Package = package(
    "seabios",
    &["/usr/share/seabios/bios.bin", "/usr/share/qemu/bios.bin"],
    "BIOS boot in QEMU",
);
/// UEFI for QEMU.
pub const OVMF: Package = package(
    "ovmf",
    &[
        "/usr/share/OVMF/OVMF_CODE.fd",
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
    ],
    "UEFI boot in QEMU",
);
/// Bochs and what it needs to run without a window.
pub const BOCHS: [Package; 4] = [
    package("bochs", &["bochs"], "VT-x emulation"),
    package(
        "bochs-term",
        &[
            "/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so",
            "/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so.0.0.0",
            "/usr/lib/bochs/plugins/libbx_term_gui.so",
        ],
        "Bochs without a window",
    ),
    package(
        "bochsbios",
        &["/usr/share/bochs/BIOS-bochs-latest"],
        "BIOS boot in Bochs",
    ),
    package(
        "vgabios",
        &["/usr/share/vgabios/vgabios.bin"],
        "the screen in Bochs",
    ),
];
/// GRUB, for the image's BIOS boot.
pub const GRUB: [Package; 2] = [
    package("grub-common", &["grub-mkimage"], "the image's BIOS boot"),
    package(
        "grub-pc-bin",
        &["/usr/lib/grub/i386-pc/kernel.img"],
        "the image's BIOS boot",
    ),
];
/// The ACPI compiler, for tests of the guests' tables.
pub const ACPICA: Package = package(
    "acpica-tools",
    &["iasl"],
    "checks of the guests' ACPI tables",
);
/// Open vSwitch, to compare the switch with.
pub const OPEN_VSWITCH: Package = package(
    "openvswitch-switch",
    &["/usr/sbin/ovs-vswitchd"],
    "comparison of the switch with Open vSwitch",
);
/// A C++ compiler, for libFuzzer.
pub const CPP: Package = package("g++", &["g++", "c++", "clang++"], "the fuzz targets");
/// The distribution's Rust, where rustup cannot add a target.
pub const DISTRO_RUST: [Package; 4] = [
    package("rustc-web", &["/usr/bin/rustc"], "toolchain fall-back"),
    package("cargo-web", &["/usr/bin/cargo"], "toolchain fall-back"),
    package(
        "rust-web-src",
        &[
            "/usr/lib/rustlib/src/rust/library/core/Cargo.toml",
            "/usr/src/rustc-web",
        ],
        "toolchain fall-back",
    ),
    package("lld", &["/usr/bin/ld.lld"], "toolchain fall-back"),
];

impl Package {
    /// Whether it is there.
    pub fn present(&self) -> bool {
        self.shown_by.iter().any(|what| {
            if what.starts_with('/') {
                Path::new(what).exists()
            } else {
                find_program(what).is_some()
            }
        })
    }
}

/// A program in `PATH`.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Whether `apt-get` is how this machine gets packages.
pub fn has_apt() -> bool {
    find_program("apt-get").is_some() && find_program("dpkg-deb").is_some()
}

/// How root's rights can be had here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// We have them.
    Yes,
    /// By `sudo`, perhaps after asking for a password.
    Sudo,
    /// Not at all.
    No,
}

/// Finds out how root's rights can be had.
pub fn root() -> Root {
    if nix::unistd::geteuid().is_root() {
        return Root::Yes;
    }
    let quiet = |mut command: Command| {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
    };
    let mut sudo = Command::new("sudo");
    sudo.args(["-n", "true"]);
    let free = quiet(sudo).is_ok_and(|s| s.success());
    let can_ask = find_program("sudo").is_some() && stderr().is_terminal();
    if free || can_ask {
        Root::Sudo
    } else {
        Root::No
    }
}

fn apt(root: Root, args: &[&str]) -> Command {
    let mut command = match root {
        Root::Sudo => {
            let mut sudo = Command::new("sudo");
            sudo.args(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
            sudo
        }
        _ => Command::new("apt-get"),
    };
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(args)
        .stdin(Stdio::null());
    command
}

/// Makes sure that all of `packages` are there, installing what is missing where that is possible.
pub fn need(packages: &[Package]) -> Result<()> {
    let missing: Vec<&Package> = packages.iter().filter(|p| !p.present()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|p| p.name).collect();
    let list = names.join(" ");
    if !has_apt() {
        bail!(
            "missing: {list}, by the names of their Debian packages; this is not Debian or Ubuntu, \
             so install them by its own means (`cargo xtask doctor` says what each is for)"
        );
    }
    let root = root();
    if root == Root::No {
        bail!(
            "missing packages: {list}; neither root nor sudo here, so type as root:\n    \
             apt-get update && apt-get install -y --no-install-recommends {list}"
        );
    }
    note(&format!(
        "installing {list} (apt-get install --no-install-recommends)"
    ));
    step("apt-get update", |_| run(apt(root, &["update", "-q"])))?;
    step("apt-get install", |_| {
        let mut args = vec!["install", "-q", "-y", "--no-install-recommends"];
        args.extend(&names);
        run(apt(root, &args))
    })?;
    match missing.iter().find(|p| !p.present()) {
        None => Ok(()),
        Some(p) => bail!(
            "{} is installed, but holds none of {}",
            p.name,
            p.shown_by.join(", ")
        ),
    }
}

/// Brings apt's lists up to date if that is allowed here, for a download that failed.
pub fn refresh() -> Result<()> {
    match root() {
        Root::No => bail!("apt's lists are not up to date; type as root:\n    apt-get update"),
        root => step("apt-get update", |_| run(apt(root, &["update", "-q"]))),
    }
}

/// Runs a command, keeping what it says for the case that it fails.
pub fn run(mut command: Command) -> Result<()> {
    let output = command.output();
    let words = [command.get_program()]
        .into_iter()
        .chain(command.get_args());
    let words: Vec<_> = words.map(|w| w.to_string_lossy()).collect();
    let shown = words.join(" ");
    match output {
        Err(error) => bail!("{shown}: {error}"),
        Ok(output) if !output.status.success() => bail!(
            "{shown}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
        Ok(_) => Ok(()),
    }
}
