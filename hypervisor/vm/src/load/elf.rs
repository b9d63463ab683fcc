//! Just enough ELF to load a kernel: program headers and the Xen entry note, of both classes
//! (System V ABI, chapter 5).

use alloc::vec::Vec;

use super::{
    Image, Problem,
    ram::{Place, Ram},
};

pub(super) const MAGIC: &[u8] = b"\x7fELF";
/// More program headers than any kernel has.
const MAX_HEADERS: u64 = 128;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u64 = 3;
const MACHINE_X86_64: u64 = 62;
const LOAD: u64 = 1;
const NOTE: u64 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the 32-bit entry point of a PVH kernel (xen/include/public/elfnote.h).
const PHYS32_ENTRY: u64 = 18;

/// A parsed ELF file.
#[derive(Debug)]
pub(super) struct Elf<'a> {
    file: &'a [u8],
    /// 64-bit class.
    pub(super) wide: bool,
    entry: u64,
    headers: Vec<ProgramHeader>,
}

#[derive(Debug)]
struct ProgramHeader {
    kind: u64,
    offset: u64,
    virt: u64,
    phys: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

/// A little-endian number of `N` bytes.
fn number<const N: usize>(file: &[u8], at: u64) -> Option<u64> {
    let bytes = slice(file, at, N as u64)?;
    let mut value = [0; 8];
    value.get_mut(..N)?.copy_from_slice(bytes);
    Some(u64::from_le_bytes(value))
}

fn slice(file: &[u8], at: u64, size: u64) -> Option<&[u8]> {
    let start = usize::try_from(at).ok()?;
    let end = start.checked_add(usize::try_from(size).ok()?)?;
    file.get(start..end)
}

impl<'a> Elf<'a> {
    /// Parses the headers of a file that has the magic number.
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, Problem> {
        let wide = file.get(4) == Some(&CLASS_64);
        let (header_size, entry_size) = if wide { (64, 56) } else { (52, 32) };
        let truncated = |what, end: u64| Problem::Truncated {
            what,
            end,
            size: file.len() as u64,
        };
        if (file.len() as u64) < header_size {
            return Err(truncated("the ELF header", header_size));
        }
        // Within the header, and so within the file.
        let half = |at| number::<2>(file, at).unwrap_or(0);
        let long = |at| number::<4>(file, at).unwrap_or(0);
        let quad = |at| number::<8>(file, at).unwrap_or(0);
        let field = |field, found, right| {
            Err(Problem::Field {
                field,
                found,
                right,
            })
        };
        if file.get(5) != Some(&LITTLE_ENDIAN) {
            return field(
                "the ELF byte order",
                half(5) & 0xff,
                "1 (little endian) is needed",
            );
        }
        if !matches!(half(18), MACHINE_386 | MACHINE_X86_64) {
            return field(
                "the ELF machine",
                half(18),
                "3 (i386) or 62 (x86-64) is needed",
            );
        }
        if !matches!(half(16), 2 | 3) {
            let right = "2 (executable) or 3 (shared) is needed: link the kernel first";
            return field("the ELF type", half(16), right);
        }
        let (entry, offset, step, count) = if wide {
            (quad(24), quad(32), half(54), half(56))
        } else {
            (long(24), long(28), half(42), half(44))
        };
        if step < entry_size {
            return field(
                "the size of a program header",
                step,
                "it is too small for its class",
            );
        }
        if count > MAX_HEADERS {
            return field(
                "the number of program headers",
                count,
                "at most 0x80 are taken",
            );
        }
        let end = offset.saturating_add(step * count);
        if end > file.len() as u64 {
            return Err(truncated("the program header table", end));
        }
        let headers = (0..count).map(|index| {
            let at = offset + index * step;
            if wide {
                ProgramHeader {
                    kind: long(at),
                    offset: quad(at + 8),
                    virt: quad(at + 16),
                    phys: quad(at + 24),
                    file_size: quad(at + 32),
                    memory_size: quad(at + 40),
                    align: quad(at + 48),
                }
            } else {
                ProgramHeader {
                    kind: long(at),
                    offset: long(at + 4),
                    virt: long(at + 8),
                    phys: long(at + 12),
                    file_size: long(at + 16),
                    memory_size: long(at + 20),
                    align: long(at + 28),
                }
            }
        });
        Ok(Self {
            file,
            wide,
            entry,
            headers: headers.collect(),
        })
    }

    fn loads(&self) -> impl Iterator<Item = &ProgramHeader> {
        self.headers
            .iter()
            .filter(|header| header.kind == LOAD && header.memory_size != 0)
    }

    /// Puts all segments of `image`, which this is, where they belong; gives the address after the
    /// last.
    pub(super) fn load(&self, image: &Image<'a>, ram: &mut Ram<'_, 'a>) -> Result<u64, Problem> {
        let mut top = 0;
        for segment in self.loads() {
            let (at, size) = (segment.phys, segment.memory_size);
            if segment.file_size > size {
                return Err(Problem::Field {
                    field: "the file size of a segment",
                    found: segment.file_size,
                    right: "it must not be larger than the segment's memory",
                });
            }
            let data = slice(self.file, segment.offset, segment.file_size);
            let data = data.ok_or(Problem::Truncated {
                what: "a segment",
                end: segment.offset.saturating_add(segment.file_size),
                size: self.file.len() as u64,
            })?;
            ram.claim("a segment of the kernel", size, 1, Place::At(at))?;
            ram.copy(at, image, data);
            top = top.max(at + size);
        }
        if top == 0 {
            let (field, right) = (
                "the number of segments to load",
                "a kernel has at least one",
            );
            return Err(Problem::Field {
                field,
                found: 0,
                right,
            });
        }
        Ok(top)
    }

    /// Whether a physical address lies in a segment.
    pub(super) fn holds(&self, at: u64) -> bool {
        self.loads()
            .any(|segment| (at.wrapping_sub(segment.phys)) < segment.memory_size)
    }

    /// The physical address of the ELF entry point. Kernels linked high give a virtual one.
    pub(super) fn physical_entry(&self) -> Result<u64, Problem> {
        if self.holds(self.entry) {
            return Ok(self.entry);
        }
        let translate = |segment: &ProgramHeader| {
            let offset = self.entry.wrapping_sub(segment.virt);
            (offset < segment.memory_size).then(|| segment.phys.wrapping_add(offset))
        };
        self.loads().find_map(translate).ok_or(Problem::Field {
            field: "the entry point",
            found: self.entry,
            right: "it must lie in a segment",
        })
    }

    /// The PVH entry point, if a note gives one.
    pub(super) fn pvh_entry(&self) -> Option<u64> {
        self.headers
            .iter()
            .filter(|header| header.kind == NOTE)
            .find_map(|header| {
                let notes = slice(self.file, header.offset, header.file_size)?;
                let align = if header.align == 8 { 8 } else { 4 };
                find_note(notes, align)
            })
    }
}

/// Walks a note segment: name size, description size, type, name, description.
fn find_note(notes: &[u8], align: u64) -> Option<u64> {
    let mut at = 0u64;
    loop {
        let name_size = number::<4>(notes, at)?;
        let size = number::<4>(notes, at + 4)?;
        let kind = number::<4>(notes, at + 8)?;
        let name = slice(notes, at + 12, name_size)?;
        let description = (at + 12 + name_size).next_multiple_of(align);
        if kind == PHYS32_ENTRY && name.strip_suffix(b"\0").unwrap_or(name) == b"Xen" {
            return match size {
                4 => number::<4>(notes, description),
                8 => number::<8>(notes, description),
                _ => None,
            };
        }
        at = (description + size).next_multiple_of(align);
    }
}
