//! `cargo xtask kernel FILE`: what a test kernel is, and the configuration that runs it alone.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use vm::load::sniff;

use crate::config::{Packed, memory_for};

/// The name of the only VM.
pub const VM: &str = "kernel";
/// The names of its files in the bundle.
const IMAGE: &str = "kernel";
const MODULE: &str = "module";

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
    let looks = sniff(&image);
    let Some(kind) = looks.kind else {
        bail!(
            "{} is {looks}, and no kernel known here: a bzImage (`HdrS` at 0x202), a multiboot1 header \
             in the first 8 KiB, or an ELF with a PVH note",
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
