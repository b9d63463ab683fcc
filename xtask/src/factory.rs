//! Makes everything that goes onto the disk image: the hypervisor, its loaders, the guests.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result};
use vm::bundle::CONFIGURATION;

use crate::bundle::build_bundle;
use crate::config::Packed;
use crate::image::{ImageInputs, build_image};
use crate::linux::{self, Linux};
use crate::packages::{GRUB, need};
use crate::progress::step;
use crate::toolchain::{NONE, Toolchain, UEFI, Workspace};

/// The hypervisor's package and program.
const TESSERA: &str = "tessera";
/// [`TESSERA`] with its feature `count-vmcs`.
const COUNTING: &str = "tessera/count-vmcs";
/// [`TESSERA`] with its feature `fault-injection`.
pub const FAILING: &str = "tessera/fault-injection";
/// The loader for UEFI: package and program, with `.efi` after it.
pub const UEFI_LOADER: &str = "boot-uefi";
/// The entry for multiboot2.
const MULTIBOOT2_STUB: &str = "boot-multiboot2";
/// Stands in for the hypervisor in the tests of the loaders.
const PROBE: &str = "boot-probe";
/// The Rust guests: package and program have the same name.
const GUESTS: [&str; 5] = [
    "guest-heartbeat",
    "guest-hello",
    "guest-conformance",
    "guest-bench",
    "guest-hostile",
];

/// What an image boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The hypervisor.
    Tessera,
    /// The hypervisor, counting its VMREADs and VMWRITEs.
    Counting,
    /// The hypervisor, failing where a guest asks for it.
    Failing,
    /// The loaders' probe, which checks what they hand over.
    Probe,
}

/// Builds on demand, each thing once.
pub struct Factory {
    workspace: Workspace,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    toolchain: Option<Toolchain>,
    linux: Option<Linux>,
    programs: HashMap<String, Arc<[u8]>>,
}

impl Factory {
    /// The files that a configuration may name without having them.
    pub const MADE: [&str; 7] = [
        "vmlinuz",
        "initrd.cpio",
        "guest-heartbeat",
        "guest-hello",
        "guest-conformance",
        "guest-bench",
        "guest-hostile",
    ];

    /// A factory that has made nothing yet.
    pub fn new(workspace: Workspace) -> Self {
        Self {
            workspace,
            state: Mutex::default(),
        }
    }

    /// A factory with a toolchain chosen by the caller.
    pub fn with(workspace: Workspace, toolchain: Toolchain) -> Self {
        let state = State {
            toolchain: Some(toolchain),
            ..State::default()
        };
        Self {
            workspace,
            state: Mutex::new(state),
        }
    }

    /// Where it works.
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The Linux guest's parts.
    pub fn linux(&self) -> Result<Linux> {
        let mut state = self.state();
        if let Some(linux) = &state.linux {
            return Ok(linux.clone());
        }
        let linux = linux::prepare(&self.workspace)?;
        state.linux = Some(linux.clone());
        Ok(linux)
    }

    /// One of the files in [`Self::MADE`]; `None` for a name that is none of them.
    pub fn file(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let read = |p: &Path| fs::read(p).with_context(|| format!("reading {}", p.display()));
        match name {
            "vmlinuz" => return read(&self.linux()?.kernel).map(Some),
            "initrd.cpio" => return read(&self.linux()?.initrd).map(Some),
            _ => {}
        }
        if !GUESTS.contains(&name) {
            return Ok(None);
        }
        self.program(NONE, name)
            .map(|program| Some(program.to_vec()))
    }

    fn program(&self, target: &str, name: &str) -> Result<Arc<[u8]>> {
        self.state().program(&self.workspace, target, name)
    }

    /// Makes the disk image for a configuration.
    pub fn image(&self, packed: &Packed, out: &Path) -> Result<()> {
        self.image_of(
            Kernel::Tessera,
            &bundle_of(&packed.text, &packed.files),
            out,
        )
    }

    /// Makes the disk image around a bundle.
    pub fn image_of(&self, kernel: Kernel, bundle: &[u8], out: &Path) -> Result<()> {
        need(&GRUB)?;
        let kernel = match kernel {
            Kernel::Tessera => TESSERA,
            Kernel::Counting => COUNTING,
            Kernel::Failing => FAILING,
            Kernel::Probe => PROBE,
        };
        let kernel = self.program(NONE, kernel)?;
        let uefi_loader = self.program(UEFI, UEFI_LOADER)?;
        let multiboot2_stub = self.program(NONE, MULTIBOOT2_STUB)?;
        let inputs = ImageInputs {
            kernel: &kernel,
            bundle,
            uefi_loader: &uefi_loader,
            multiboot2_stub: &multiboot2_stub,
        };
        step(&format!("writing {}", out.display()), |_| {
            build_image(inputs, out)
        })
    }

    /// The hypervisor's program, as it is on the disk.
    pub fn tessera(&self) -> Result<Arc<[u8]>> {
        self.program(NONE, TESSERA)
    }
}

impl State {
    /// Builds one program; its package has the same name. `package/feature` is one with a feature.
    fn program(&mut self, workspace: &Workspace, target: &str, name: &str) -> Result<Arc<[u8]>> {
        if let Some(program) = self.programs.get(name) {
            return Ok(program.clone());
        }
        let (package, features) = match name.split_once('/') {
            Some((package, _)) => (package, vec![name]),
            None => (name, Vec::new()),
        };
        let dir = self
            .toolchain()?
            .build(workspace, target, &[package], &features)?;
        let file = dir.join(if target == UEFI {
            format!("{package}.efi")
        } else {
            package.to_owned()
        });
        let bytes = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        let bytes: Arc<[u8]> = without_sections(bytes).into();
        self.programs.insert(name.to_owned(), bytes.clone());
        Ok(bytes)
    }

    fn toolchain(&mut self) -> Result<Toolchain> {
        if let Some(toolchain) = &self.toolchain {
            return Ok(toolchain.clone());
        }
        let toolchain = Toolchain::ready()?;
        self.toolchain = Some(toolchain.clone());
        Ok(toolchain)
    }
}

/// The bundle of a configuration and its images.
pub fn bundle_of(text: &str, files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut entries = vec![(CONFIGURATION.to_owned(), text.as_bytes().to_vec())];
    entries.extend(files.iter().cloned());
    build_bundle(&entries)
}

/// An ELF without what only debuggers read: sections and symbols behind the last segment. The
/// program headers, and so what is loaded, stay as they are.
fn without_sections(mut elf: Vec<u8>) -> Vec<u8> {
    match loaded_size(&elf) {
        Some((size, wide)) => {
            elf.truncate(size);
            // e_shoff, then e_shnum and e_shstrndx (ELF-64 object file format, figure 2).
            let fields = if wide {
                [(0x28, 8), (0x3c, 4)]
            } else {
                [(0x20, 4), (0x30, 4)]
            };
            for (at, len) in fields {
                if let Some(field) = elf.get_mut(at..at + len) {
                    field.fill(0);
                }
            }
            elf
        }
        None => elf,
    }
}

/// Where the last segment of an ELF ends in the file, and whether it is a 64-bit one.
fn loaded_size(elf: &[u8]) -> Option<(usize, bool)> {
    let number = |at: usize, len: usize| -> Option<usize> {
        let bytes = elf.get(at..at.checked_add(len)?)?;
        let value = bytes
            .iter()
            .rev()
            .fold(0_u64, |v, b| (v << 8) | u64::from(*b));
        usize::try_from(value).ok()
    };
    if elf.get(..4)? != b"\x7fELF" {
        return None;
    }
    let wide = number(4, 1)? == 2;
    let (table, size, count) = if wide {
        (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?)
    } else {
        (number(0x1c, 4)?, number(0x2a, 2)?, number(0x2c, 2)?)
    };
    let mut end = table.checked_add(size.checked_mul(count)?)?;
    for i in 0..count {
        let header = table + i * size;
        let (offset, length) = if wide {
            (number(header + 8, 8)?, number(header + 0x20, 8)?)
        } else {
            (number(header + 4, 4)?, number(header + 0x10, 4)?)
        };
        end = end.max(offset.checked_add(length)?);
    }
    (end <= elf.len()).then_some((end, wide))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_loaded_survives_and_nothing_else() {
        let own = fs::read("/proc/self/exe").expect("our own program");
        let (size, wide) = loaded_size(&own).expect("an ELF");
        assert!(wide && size < own.len());
        let short = without_sections(own.clone());
        assert_eq!(short.len(), size);
        assert_eq!(short.get(0x40..), own.get(0x40..size));
        assert_eq!(without_sections(short.clone()), short);
        assert_eq!(without_sections(b"MZ".to_vec()), b"MZ");
    }
}
