//! Makes everything that goes onto the disk image: the hypervisor, its loaders, the guests.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result};

use crate::bundle::build_bundle;
use crate::config::Packed;
use crate::image::{ImageInputs, build_image};
use crate::linux::{self, Linux};
use crate::packages::{GRUB, need};
use crate::progress::step;
use crate::toolchain::{NONE, Toolchain, UEFI, Workspace};

/// The hypervisor's package and program.
const KERNEL: &str = "tessera";
/// The loaders' packages.
const UEFI_LOADER: &str = "boot-uefi";
const MULTIBOOT2_STUB: &str = "boot-multiboot2";
/// The Rust guests: package and program have the same name.
const GUESTS: [&str; 4] = [
    "guest-hello",
    "guest-conformance",
    "guest-bench",
    "guest-hostile",
];

/// What does not change between images.
struct System {
    kernel: Vec<u8>,
    uefi_loader: Vec<u8>,
    multiboot2_stub: Vec<u8>,
}

/// Builds on demand, each thing once.
pub struct Factory {
    workspace: Workspace,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    toolchain: Option<Toolchain>,
    system: Option<Arc<System>>,
    linux: Option<Linux>,
    guests: HashMap<&'static str, Vec<u8>>,
}

impl Factory {
    /// The files that a configuration may name without having them.
    pub const MADE: [&str; 6] = [
        "vmlinuz",
        "initrd.cpio",
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
        let mut state = self.state();
        if state.guests.is_empty() {
            let dir = state.toolchain()?.build(&self.workspace, NONE, &GUESTS)?;
            for guest in GUESTS {
                state
                    .guests
                    .insert(guest, without_sections(read(&dir.join(guest))?));
            }
        }
        Ok(state.guests.get(name).cloned())
    }

    fn system(&self) -> Result<Arc<System>> {
        let mut state = self.state();
        if let Some(system) = &state.system {
            return Ok(system.clone());
        }
        need(&GRUB)?;
        let toolchain = state.toolchain()?;
        let read = |p: &Path| fs::read(p).with_context(|| format!("reading {}", p.display()));
        let none = toolchain.build(&self.workspace, NONE, &[KERNEL])?;
        let kernel = without_sections(read(&none.join(KERNEL))?);
        let none = toolchain.build(&self.workspace, NONE, &[MULTIBOOT2_STUB])?;
        let multiboot2_stub = without_sections(read(&none.join(MULTIBOOT2_STUB))?);
        let uefi = toolchain.build(&self.workspace, UEFI, &[UEFI_LOADER])?;
        let uefi_loader = read(&uefi.join(format!("{UEFI_LOADER}.efi")))?;
        let system = Arc::new(System {
            kernel,
            uefi_loader,
            multiboot2_stub,
        });
        state.system = Some(system.clone());
        Ok(system)
    }

    /// Makes the disk image for a configuration.
    pub fn image(&self, packed: &Packed, out: &Path) -> Result<()> {
        self.image_of(&bundle_of(&packed.text, &packed.files), out)
    }

    /// Makes the disk image around a bundle.
    pub fn image_of(&self, bundle: &[u8], out: &Path) -> Result<()> {
        let system = self.system()?;
        step(&format!("writing {}", out.display()), |_| {
            let inputs = ImageInputs {
                kernel: &system.kernel,
                bundle,
                uefi_loader: &system.uefi_loader,
                multiboot2_stub: &system.multiboot2_stub,
            };
            build_image(inputs, out)
        })
    }

    /// Builds the hypervisor and its loaders, so that later images are quick.
    pub fn warm_up(&self) -> Result<()> {
        self.system().map(drop)
    }
}

impl State {
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
    let mut entries = vec![("tessera.toml".to_owned(), text.as_bytes().to_vec())];
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
