//! `cargo xtask doctor`: what this machine offers, what is missing, and how to get it.

use std::env;
use std::process::Command;

use harness::emulator::bochs;

use crate::packages::{
    self, ACPICA, BOCHS, CPP, DISTRO_RUST, GRUB, OPEN_VSWITCH, OVMF, QEMU, Root, SEABIOS,
    find_program,
};
use crate::select::{On, nested_kvm};
use crate::toolchain::{NONE, UEFI, VARIABLE, has_target};

fn line(good: bool, what: &str, detail: &str) {
    println!(
        "{} {what:22} {detail}",
        if good { "  ok  " } else { "MISSES" }
    );
}

fn first_line(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    Some(
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .next()?
            .to_owned(),
    )
}

/// Prints it all. True when everything a full test needs is there or can be had.
pub fn doctor() -> bool {
    println!("Emulators");
    let qemu = first_line("qemu-system-x86_64");
    line(
        qemu.is_some(),
        "qemu-tcg (AMD-V)",
        qemu.as_deref().unwrap_or("apt-get install qemu-system-x86"),
    );
    match nested_kvm() {
        Ok(name) => line(true, "qemu-kvm", &format!("KVM here nests {name}")),
        Err(why) => println!("   -   {:22} not usable: {why}", "qemu-kvm"),
    }
    match bochs::version() {
        Some(v) => {
            let debugger = if v.debugger { "with" } else { "without" };
            line(
                true,
                "bochs (VT-x)",
                &format!("{}.{}, {debugger} debugger", v.number.0, v.number.1),
            );
        }
        None => line(
            false,
            "bochs (VT-x)",
            "apt-get install bochs bochs-term bochsbios vgabios",
        ),
    }
    if let Ok((emulator, why)) = On::Auto.pick() {
        println!("       --on auto takes {emulator}: {why}");
    }

    println!("Rust");
    let rustc = first_line("rustc");
    line(
        rustc.is_some(),
        "rustc",
        rustc
            .as_deref()
            .unwrap_or("https://rustup.rs, or apt-get install rustc-web"),
    );
    let rustup = find_program("rustup").is_some();
    let distro = DISTRO_RUST.iter().all(packages::Package::present);
    for target in [NONE, UEFI] {
        let there = has_target(target);
        let remedy = match (rustup, distro) {
            (true, _) => "will be added: rustup target add",
            (false, true) => "will be built from the distribution's sources",
            (false, false) => {
                "needs rustup, or apt-get install rustc-web cargo-web rust-web-src lld"
            }
        };
        line(
            there || rustup || distro,
            target,
            if there { "prebuilt" } else { remedy },
        );
    }
    if let Ok(forced) = env::var(VARIABLE) {
        println!("       {VARIABLE}={forced}");
    }

    println!("Packages");
    let mut missing = Vec::new();
    let needed = [
        &[QEMU, SEABIOS, OVMF],
        &BOCHS[..],
        &GRUB,
        &DISTRO_RUST,
        &[ACPICA, OPEN_VSWITCH, CPP],
    ]
    .concat();
    for package in needed {
        let there = package.present();
        line(there, package.name, package.purpose);
        if !there {
            missing.push(package.name);
        }
    }
    let apt = packages::has_apt();
    line(
        apt,
        "apt-get",
        if apt {
            "fetches the Linux guest"
        } else {
            "no Debian or Ubuntu: bring your own guests"
        },
    );
    if missing.is_empty() {
        println!("Everything is there.");
        return true;
    }
    let list = missing.join(" ");
    match (apt, packages::root()) {
        (true, Root::Yes | Root::Sudo) => {
            println!("What is missing is installed when a command needs it: {list}");
            true
        }
        (true, Root::No) => {
            println!(
                "As root: apt-get update && apt-get install -y --no-install-recommends {list}"
            );
            false
        }
        (false, _) => {
            println!("Install by this system's means (Debian's names): {list}");
            false
        }
    }
}
