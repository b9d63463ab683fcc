//! A `tessera.toml` on its way into the bundle.
//!
//! The hypervisor checks the configuration; here it is read only far enough to know which files
//! belong into the bundle and how much memory the emulated machine needs. A file is looked for
//! relative to the configuration; a name that is no file there but that `xtask` can make
//! (`vmlinuz`, `initrd.cpio`, `guest-hello`, …) is made.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::factory::Factory;

/// Two of Linux with a shell and a Rust guest, on one switch.
pub const DEFAULT: &str = include_str!("../default.toml");

/// The longest file name a ustar archive holds without tricks.
const NAME_LIMIT: usize = 100;
/// What the emulated machine has beyond its guests' memory, in MiB.
const SLACK: u64 = 192;
/// The smallest machine, in MiB.
const SMALLEST: u64 = 512;

/// A configuration with the contents of its files.
#[derive(Debug)]
pub struct Packed {
    /// `tessera.toml` as written.
    pub text: String,
    /// The images by the names that the text uses.
    pub files: Vec<(String, Vec<u8>)>,
    /// The emulated machine's memory in MiB.
    pub memory: u32,
    /// The cards of the machine that its switches ask for.
    pub uplinks: usize,
}

impl Packed {
    /// Packs the configuration in `file`, or the default one.
    pub fn load(file: Option<&Path>, factory: &Factory) -> Result<Self> {
        let Some(path) = file else {
            return Self::pack(DEFAULT, "the default configuration", None, factory);
        };
        let text =
            fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Self::pack(&text, &path.display().to_string(), path.parent(), factory)
    }

    fn pack(text: &str, origin: &str, folder: Option<&Path>, factory: &Factory) -> Result<Self> {
        let table: toml::Table = text
            .parse()
            .map_err(|e| anyhow::anyhow!("{origin}: {}", toml_error(text, &e)))?;
        let mut files: Vec<(String, Vec<u8>)> = Vec::new();
        for name in names(&table) {
            if files.iter().any(|(n, _)| *n == name) {
                continue;
            }
            if name.len() > NAME_LIMIT {
                bail!("{origin}: the file name `{name}` is longer than {NAME_LIMIT} bytes");
            }
            let path = folder.map(|f| f.join(&name)).filter(|p| p.is_file());
            let bytes = match path {
                Some(path) => fs::read(&path).with_context(|| format!("reading {}", path.display()))?,
                None => factory.file(&name)?.with_context(|| {
                    let place = folder.map_or("here".into(), |f| f.join(&name).display().to_string());
                    format!(
                        "{origin}: `{name}` is no file at {place}, and none of those that xtask makes \
                         ({})",
                        Factory::MADE.join(", ")
                    )
                })?,
            };
            files.push((name, bytes));
        }
        Ok(Self {
            text: text.to_owned(),
            files,
            memory: machine_memory(&table),
            uplinks: uplinks(&table),
        })
    }
}

/// The memory in MiB of a machine that is to run the VMs of the configuration `text`, of which as
/// much as can be read counts.
pub fn memory_for(text: &str) -> u32 {
    machine_memory(&text.parse().unwrap_or_default())
}

fn toml_error(text: &str, error: &toml::de::Error) -> String {
    let before = error
        .span()
        .and_then(|s| text.get(..s.start))
        .unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let column = before
        .rsplit('\n')
        .next()
        .unwrap_or_default()
        .chars()
        .count()
        + 1;
    format!("line {line}, column {column}: {}", error.message())
}

fn tables<'a>(table: &'a toml::Table, key: &str) -> impl Iterator<Item = &'a toml::Table> {
    let list = table.get(key).and_then(toml::Value::as_array);
    list.into_iter().flatten().filter_map(toml::Value::as_table)
}

fn vms(table: &toml::Table) -> impl Iterator<Item = &toml::Table> {
    tables(table, "vm")
}

fn uplinks(table: &toml::Table) -> usize {
    let of_each = tables(table, "switch").map(|switch| tables(switch, "uplink").count());
    of_each.sum()
}

/// Every file that the VMs name.
fn names(table: &toml::Table) -> Vec<String> {
    let mut names = Vec::new();
    for vm in vms(table) {
        let single = ["kernel", "initrd"]
            .into_iter()
            .filter_map(|key| vm.get(key));
        let modules = vm
            .get("modules")
            .and_then(toml::Value::as_array)
            .into_iter()
            .flatten();
        names.extend(
            single
                .chain(modules)
                .filter_map(toml::Value::as_str)
                .map(str::to_owned),
        );
    }
    names
}

fn machine_memory(table: &toml::Table) -> u32 {
    let asked: u64 = vms(table)
        .filter_map(|vm| mebibytes(vm.get("memory")?.as_str()?))
        .sum();
    let total = (asked + SLACK).max(SMALLEST).next_multiple_of(64);
    u32::try_from(total).unwrap_or(u32::MAX)
}

/// Reads `256MiB`, `1GiB` or `65536KiB`.
fn mebibytes(text: &str) -> Option<u64> {
    let digits = text
        .trim_end_matches(|c: char| c.is_ascii_alphabetic())
        .trim_end();
    let number: u64 = digits.trim().parse().ok()?;
    match text.get(digits.len()..)?.trim() {
        "KiB" => Some(number.div_ceil(1024)),
        "MiB" => Some(number),
        "GiB" => number.checked_mul(1024),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_holds_its_guests_and_some_more() {
        assert_eq!(memory_for("[[vm]]\nmemory = \"64MiB\""), 512);
        assert_eq!(
            memory_for("[[vm]]\nmemory = \"1GiB\"\n[[vm]]\nmemory = \"3MiB\""),
            1280
        );
        assert_eq!(memory_for("a typo ="), 512);
    }

    #[test]
    fn every_image_named_is_packed() {
        let table = DEFAULT.parse().expect("the default configuration is TOML");
        let linux = ["vmlinuz", "initrd.cpio"];
        let all = [&linux[..], &linux[..], &["guest-hello"]].concat();
        assert_eq!(names(&table), all);
        assert_eq!(uplinks(&table), 1);
    }

    #[test]
    fn a_typo_is_told_with_its_place() {
        let text = "[host]\nfocus = \"a\n";
        let error = text.parse::<toml::Table>().expect_err("a typo");
        assert!(
            toml_error(text, &error).starts_with("line 2, column "),
            "{error}"
        );
    }
}
