//! The kernel's ELF file (System V gABI, chapters 4 and 5; x86-64 psABI §4.1):
//! static, for x86-64, page-aligned `PT_LOAD` segments at [`KERNEL_BASE`] and
//! up, none both writable and executable.
//!
//! Every field is checked before it is used, although the file is our own: a
//! stick with a bad block or a half-written image must end in a sentence, not
//! in a triple fault.

use crate::paging::{Access, Tables};
use crate::{Error, Frames, KERNEL_BASE, PAGE};
use elf::abi::{
    EM_X86_64, ET_EXEC, EV_CURRENT, PF_W, PF_X, PT_DYNAMIC, PT_INTERP, PT_LOAD, PT_TLS,
};
use elf::segment::ProgramHeader;
use elf::{ElfBytes, ParseError, endian::AnyEndian, file::Class};

/// No kernel is larger in memory.
const MAX_IMAGE: u64 = 64 << 20;

/// Where the kernel was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    /// The ELF entry.
    pub entry: u64,
    /// Lowest virtual address.
    pub virt: u64,
    /// Physical address of the same byte.
    pub phys: u64,
    /// Bytes from there to the end of the last segment.
    pub len: u64,
}

/// Copies the segments of `file` into fresh frames and maps them.
pub(crate) fn load(
    file: &[u8],
    tables: &mut Tables,
    frames: &mut dyn Frames,
) -> Result<Image, Error> {
    let damaged = |cause| Error::KernelDamaged {
        len: file.len() as u64,
        cause,
    };
    let elf = ElfBytes::<AnyEndian>::minimal_parse(file).map_err(|e| damaged(cause(&e)))?;
    check_header(&elf)?;
    let headers = elf.segments().ok_or(damaged("it has no program headers"))?;

    let mut span: Option<(u64, u64)> = None;
    let mut entry_ok = false;
    for (index, header) in (0u64..).zip(headers) {
        let wrong = |problem| Error::Segment {
            index,
            address: header.p_vaddr,
            problem,
        };
        match header.p_type {
            PT_LOAD if header.p_memsz > 0 => {
                let (start, end) = check_segment(&header).map_err(wrong)?;
                elf.segment_data(&header)
                    .map_err(|_| damaged("a segment lies beyond the end of the file"))?;
                entry_ok |= header.p_flags & PF_X != 0
                    && (header.p_vaddr..header.p_vaddr + header.p_filesz)
                        .contains(&elf.ehdr.e_entry);
                let (low, high) = span.unwrap_or((start, end));
                span = Some((low.min(start), high.max(end)));
            }
            PT_INTERP | PT_DYNAMIC => return Err(wrong("asks for a dynamic linker")),
            PT_TLS => return Err(wrong("holds thread-local variables, which have no place")),
            _ => {}
        }
    }
    let (low, high) = span.ok_or(damaged("it has no segment to load"))?;
    if !entry_ok {
        return Err(Error::KernelKind {
            field: "e_entry",
            found: elf.ehdr.e_entry,
            want: "an address in an executable segment",
        });
    }
    let len = high - low;
    if len > MAX_IMAGE {
        return Err(Error::KernelKind {
            field: "size in memory",
            found: len,
            want: "at most 64 MiB",
        });
    }

    let phys = frames.allocate(len / PAGE, "the kernel")?;
    for (index, header) in (0u64..).zip(headers) {
        if header.p_type != PT_LOAD || header.p_memsz == 0 {
            continue;
        }
        let data = elf
            .segment_data(&header)
            .map_err(|_| damaged("a segment lies beyond the end of the file"))?;
        let at = phys + (header.p_vaddr - low);
        frames.bytes(at, data.len()).copy_from_slice(data);
        let access = if header.p_flags & PF_X != 0 {
            Access::Execute
        } else if header.p_flags & PF_W != 0 {
            Access::Write
        } else {
            Access::Read
        };
        let bytes = header.p_memsz.next_multiple_of(PAGE);
        tables
            .map(frames, header.p_vaddr, at, bytes, PAGE, access)
            .map_err(|error| match error {
                Error::Mapping { .. } => Error::Segment {
                    index,
                    address: header.p_vaddr,
                    problem: "overlaps another one",
                },
                error => error,
            })?;
    }
    Ok(Image {
        entry: elf.ehdr.e_entry,
        virt: low,
        phys,
        len,
    })
}

fn check_header(elf: &ElfBytes<'_, AnyEndian>) -> Result<(), Error> {
    let header = &elf.ehdr;
    let class = match header.class {
        Class::ELF32 => 1,
        Class::ELF64 => 2,
    };
    let big_endian = u64::from(header.endianness == AnyEndian::Big);
    let abi = u64::from(header.osabi);
    for (field, found, good, want) in [
        ("class", class, class == 2, "2 (64-bit)"),
        ("byte order", big_endian, big_endian == 0, "little endian"),
        (
            "e_version",
            header.version.into(),
            header.version == u32::from(EV_CURRENT),
            "1",
        ),
        ("OS ABI", abi, abi == 0 || abi == 3, "0 (System V)"),
        (
            "e_type",
            header.e_type.into(),
            header.e_type == ET_EXEC,
            "2 (a static executable)",
        ),
        (
            "e_machine",
            header.e_machine.into(),
            header.e_machine == EM_X86_64,
            "62 (x86-64)",
        ),
        (
            "e_ehsize",
            header.e_ehsize.into(),
            header.e_ehsize == 64,
            "64",
        ),
        (
            "e_phentsize",
            header.e_phentsize.into(),
            header.e_phentsize == 56,
            "56",
        ),
    ] {
        if !good {
            return Err(Error::KernelKind { field, found, want });
        }
    }
    Ok(())
}

/// The pages a segment takes, or what is wrong with it.
fn check_segment(header: &ProgramHeader) -> Result<(u64, u64), &'static str> {
    let end = header
        .p_vaddr
        .checked_add(header.p_memsz)
        .and_then(|end| end.checked_next_multiple_of(PAGE))
        .ok_or("wraps around the address space")?;
    if header.p_vaddr < KERNEL_BASE {
        return Err("lies below 0xffffffff80000000");
    }
    if !header.p_vaddr.is_multiple_of(PAGE) {
        return Err("does not begin on a page");
    }
    if header.p_align > 1
        && (!header.p_align.is_power_of_two()
            || header.p_vaddr % header.p_align != header.p_offset % header.p_align)
    {
        return Err("has an alignment that its offset and address do not keep");
    }
    if header.p_filesz > header.p_memsz {
        return Err("is larger in the file than in memory");
    }
    if header.p_flags & (PF_W | PF_X) == PF_W | PF_X {
        return Err("is both writable and executable");
    }
    Ok((header.p_vaddr, end))
}

fn cause(error: &ParseError) -> &'static str {
    match error {
        ParseError::BadMagic(_) => "it is no ELF file",
        ParseError::UnsupportedElfClass(_) | ParseError::UnsupportedElfEndianness(_) => {
            "its ELF class or byte order does not exist"
        }
        ParseError::UnsupportedVersion(_) => "its ELF version is unknown",
        ParseError::SliceReadError(_) | ParseError::BadOffset(_) | ParseError::IntegerOverflow => {
            "its headers point beyond its end"
        }
        _ => "its headers make no sense",
    }
}
