//! `cargo xtask kernel FILE`: what a test kernel is, and the configuration that runs it alone.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::config::{Packed, memory_for};

/// The name of the only VM.
pub const VM: &str = "kernel";
/// The names of its files in the bundle.
const IMAGE: &str = "kernel";
const MODULE: &str = "module";

/// How a kernel wants to be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A bzImage (Linux, Documentation/arch/x86/boot.rst).
    Linux,
    /// An ELF with a Multiboot 0.6.96 header.
    Multiboot,
    /// An ELF with the Xen note that holds a 32-bit entry (Xen, docs/misc/pvh.pandoc).
    Pvh,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Linux => "linux",
            Self::Multiboot => "multiboot",
            Self::Pvh => "pvh",
        }
    }

    /// Looks at the image.
    pub fn of(image: &[u8]) -> Option<Self> {
        if image.get(0x202..0x206) == Some(b"HdrS") {
            return Some(Self::Linux);
        }
        if has_multiboot_header(image) {
            return Some(Self::Multiboot);
        }
        // The note's name, and its type 18 (XEN_ELFNOTE_PHYS32_ENTRY) before it.
        const NOTE: &[u8] = b"\x12\0\0\0Xen\0";
        let elf = image.starts_with(b"\x7fELF");
        (elf && image.windows(NOTE.len()).any(|w| w == NOTE)).then_some(Self::Pvh)
    }
}

/// Whether a Multiboot header stands in the first 8 KiB, at a multiple of four, with the sum of
/// its first three words zero (Multiboot Specification 0.6.96 §3.1).
fn has_multiboot_header(image: &[u8]) -> bool {
    const MAGIC: u32 = 0x1bad_b002;
    let word = |b: &[u8]| b.try_into().ok().map(u32::from_le_bytes);
    let start = image.get(..8192.min(image.len())).unwrap_or_default();
    let mut places = start.chunks_exact(4).enumerate();
    places.any(|(i, chunk)| {
        let header = start
            .get(i * 4..i * 4 + 12)
            .map(|h| h.chunks_exact(4).filter_map(word));
        word(chunk) == Some(MAGIC) && header.is_some_and(|h| h.fold(0, u32::wrapping_add) == 0)
    })
}

/// What the command line says about the VM.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// The image.
    pub file: &'a Path,
    /// Its command line.
    pub append: &'a str,
    /// Its initrd, or first module.
    pub initrd: Option<&'a Path>,
    /// Its vCPUs.
    pub vcpus: u32,
    /// Its memory, as in `256MiB`.
    pub memory: &'a str,
    /// The hypervisor's log level.
    pub log: &'a str,
}

/// The configuration with that kernel as the only VM, and the test devices on.
pub fn configuration(options: &Options) -> Result<Packed> {
    let read = |p: &Path| fs::read(p).with_context(|| format!("reading {}", p.display()));
    let image = read(options.file)?;
    let Some(kind) = Kind::of(&image) else {
        bail!(
            "{} is no kernel known here: a bzImage (`HdrS` at 0x202), an ELF with a multiboot1 header \
             in its first 8 KiB, or an ELF with a PVH note",
            options.file.display()
        );
    };
    let mut files = vec![(IMAGE.to_owned(), image)];
    if let Some(initrd) = options.initrd {
        files.push((MODULE.to_owned(), read(initrd)?));
    }
    let initrd = options
        .initrd
        .map_or(String::new(), |_| format!("initrd = \"{MODULE}\"\n"));
    let text = format!(
        "[host]\nwhen_done = \"poweroff\"\nlog = {log}\n\n\
         [[vm]]\nname = \"{VM}\"\nkind = \"{kind}\"\nkernel = \"{IMAGE}\"\n{initrd}\
         cmdline = {append}\nmemory = {memory}\nvcpus = {vcpus}\non_reboot = \"stop\"\n\n\
         [vm.devices]\ndebug_exit = true\ndebug_console = true\n",
        log = quoted(options.log),
        kind = kind.name(),
        append = quoted(options.append),
        memory = quoted(&memory(options.memory)),
        vcpus = options.vcpus,
    );
    let memory = memory_for(&text);
    Ok(Packed {
        text,
        files,
        memory,
        uplinks: 0,
    })
}

/// A bare number means MiB, and the short forms of QEMU (`1G`, `512M`) are understood.
fn memory(text: &str) -> String {
    match text
        .strip_suffix(['M', 'm'])
        .map(|n| (n, "MiB"))
        .or(text.strip_suffix(['G', 'g']).map(|n| (n, "GiB")))
    {
        Some((number, unit)) => format!("{number}{unit}"),
        None if text.bytes().all(|b| b.is_ascii_digit()) => format!("{text}MiB"),
        None => text.to_owned(),
    }
}

/// A TOML basic string.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => out.push(c),
        }
    }
    out + "\""
}

/// The VM's code from the hypervisor's line about its end: the debug-exit code as is, 0 when it
/// powered off; `None` when it ended in another way.
pub fn code(console: &str) -> Option<u8> {
    let mark = format!("tessera| vm {VM}: ");
    let line = console
        .lines()
        .rev()
        .find_map(|l| l.trim_end().strip_prefix(&mark)?.strip_prefix("ended: "))?;
    match line.strip_prefix("debug exit, code ") {
        Some(code) => code.parse().ok(),
        None => line.starts_with("powered off").then_some(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_is_seen_in_the_image() {
        let mut bzimage = vec![0; 0x400];
        bzimage.splice(0x202..0x206, *b"HdrS");
        assert_eq!(Kind::of(&bzimage), Some(Kind::Linux));

        let mut multiboot = b"\x7fELF".to_vec();
        multiboot.resize(0x1000, 0);
        let header = [0x1bad_b002_u32, 3, 0_u32.wrapping_sub(0x1bad_b002 + 3)];
        multiboot.extend(header.iter().flat_map(|w| w.to_le_bytes()));
        assert_eq!(Kind::of(&multiboot), Some(Kind::Multiboot));
        multiboot[0x1004] = 4;
        assert_eq!(Kind::of(&multiboot), None, "a wrong checksum");

        let pvh = [
            b"\x7fELF".as_slice(),
            &[0; 60],
            b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0",
        ]
        .concat();
        assert_eq!(Kind::of(&pvh), Some(Kind::Pvh));
        assert_eq!(Kind::of(b"#!/bin/sh"), None);
    }

    #[test]
    fn the_code_is_the_last_end_of_the_vm() {
        let said =
            "tessera| vm kernel: ended: reset\nx\ntessera| vm kernel: ended: debug exit, code 33\n";
        assert_eq!(code(said), Some(33));
        assert_eq!(code("tessera| vm kernel: ended: powered off\n"), Some(0));
        assert_eq!(code("tessera| vm kernel: crashed: triple fault\n"), None);
    }

    #[test]
    fn any_command_line_survives_the_configuration() {
        let append = "a=\"b c\" \\n\tä";
        let table: toml::Table = format!("x = {}", quoted(append)).parse().expect("TOML");
        assert_eq!(table["x"].as_str(), Some(append));
    }

    #[test]
    fn memory_has_short_forms() {
        assert_eq!(
            ["64", "1G", "512M", "3GiB"].map(memory),
            ["64MiB", "1GiB", "512MiB", "3GiB"]
        );
    }
}
