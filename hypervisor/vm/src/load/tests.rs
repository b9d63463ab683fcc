//! Small worlds for the loaders: synthetic kernels, sparse guest memory, random damage.

extern crate std;

use alloc::{boxed::Box, collections::BTreeMap, string::ToString, vec, vec::Vec};

use arch::{GuestMemory, GuestPhysAddr, MemoryFault};

use super::*;

/// Guest memory that holds only the pages that were written.
struct Sparse {
    layout: MemoryLayout,
    pages: BTreeMap<u64, Box<[u8; 4096]>>,
}

impl Sparse {
    fn new(mib: u64) -> Self {
        Self {
            layout: MemoryLayout::new(mib << 20),
            pages: BTreeMap::new(),
        }
    }

    fn bytes(&mut self, at: u64, size: usize) -> Vec<u8> {
        let mut data = vec![0; size];
        self.read(GuestPhysAddr::new(at), &mut data).unwrap();
        data
    }

    fn u32(&mut self, at: u64) -> u64 {
        u64::from(self.read_u32(GuestPhysAddr::new(at)).unwrap())
    }

    fn u64(&mut self, at: u64) -> u64 {
        self.read_u64(GuestPhysAddr::new(at)).unwrap()
    }

    fn string(&mut self, at: u64) -> String {
        let bytes = (at..)
            .map(|at| self.bytes(at, 1)[0])
            .take_while(|byte| *byte != 0)
            .collect();
        String::from_utf8(bytes).unwrap()
    }

    fn each(
        &mut self,
        at: GuestPhysAddr,
        size: usize,
        mut f: impl FnMut(usize, &mut u8),
    ) -> Result<(), MemoryFault> {
        for i in 0..size {
            let at = at.as_u64() + i as u64;
            if !self.layout.ram().iter().any(|range| range.contains(&at)) {
                return Err(MemoryFault::NotRam(GuestPhysAddr::new(at)));
            }
            let page = self
                .pages
                .entry(at / 4096)
                .or_insert_with(|| Box::new([0; 4096]));
            f(i, &mut page[at as usize % 4096]);
        }
        Ok(())
    }
}

impl GuestMemory for Sparse {
    fn read(&mut self, at: GuestPhysAddr, buf: &mut [u8]) -> Result<(), MemoryFault> {
        self.each(at, buf.len(), |i, byte| buf[i] = *byte)
    }
    fn write(&mut self, at: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryFault> {
        self.each(at, data.len(), |i, byte| *byte = data[i])
    }
    fn compare_exchange(
        &mut self,
        _: GuestPhysAddr,
        _: u8,
        _: u64,
        _: u64,
    ) -> Result<u64, MemoryFault> {
        unimplemented!("no loader needs it")
    }
}

const RSDP: GuestPhysAddr = GuestPhysAddr::new(0xe_0000);

fn boot<'a>(kind: Kind, kernel: &'a [u8]) -> Boot<'a, 'a> {
    let kernel = Image {
        name: "kernel",
        data: kernel,
    };
    Boot {
        kind,
        kernel,
        initrd: None,
        modules: &[],
        cmdline: "console=ttyS0",
    }
}

fn run(boot: &Boot<'_, '_>, memory: &mut Sparse) -> Result<EntryState, LoadError> {
    let layout = memory.layout.clone();
    let (entry, mut copies) = load(boot, &layout, memory, RSDP)?;
    while !copies.step(memory)? {}
    Ok(entry)
}

/// Why `boot` does not load in 64 MiB, in words.
fn refusal(boot: &Boot<'_, '_>) -> String {
    run(boot, &mut Sparse::new(64)).unwrap_err().to_string()
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage of protocol 2.15 with one setup sector and 64 KiB of code that is all 0x90.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 2 * 512];
    image.resize(2 * 512 + (64 << 10), 0x90);
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1f4, &(64u32 << 6).to_le_bytes());
    put(&mut image, 0x1fe, b"\x55\xaa\xeb\x6aHdrS\x0f\x02");
    put(&mut image, 0x211, &[0x81]);
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x234, &[1]);
    put(&mut image, 0x236, &[1]);
    put(&mut image, 0x238, &255u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x200_0000u32.to_le_bytes());
    image
}

#[test]
fn linux_gets_a_zero_page_an_initrd_and_the_64_bit_entry() {
    let kernel = bzimage();
    let initrd = Image {
        name: "initrd",
        data: &[7; 5000],
    };
    let mut memory = Sparse::new(64);
    let state = run(
        &Boot {
            initrd: Some(initrd),
            ..boot(Kind::Linux, &kernel)
        },
        &mut memory,
    )
    .unwrap();

    assert_eq!(state.rip, 0x100_0200);
    assert_eq!(memory.bytes(0x100_0000, 64 << 10), [0x90; 64 << 10]);
    let page = state.rsi;
    assert_eq!(memory.bytes(page + 0x202, 4), b"HdrS");
    assert_eq!(memory.bytes(page + 0x210, 2), [0xff, 0x01]);
    assert_eq!(memory.u64(page + 0x70), RSDP.as_u64());
    assert_eq!(
        (memory.u32(page + 0x218), memory.u32(page + 0x21c)),
        ((64 << 20) - 8192, 5000)
    );
    let cmdline = memory.u32(page + 0x228);
    assert_eq!(memory.string(cmdline), "console=ttyS0");
    let count = memory.bytes(page + 0x1e8, 1)[0];
    let last = page + 0x2d0 + 20 * (u64::from(count) - 2);
    assert_eq!(
        (memory.u64(last), memory.u64(last + 8)),
        (1 << 20, 63 << 20)
    );
    assert_eq!(memory.u32(last + 16), 1);

    // The page tables map what RIP and RSI need, one to one.
    let Mode::Long { cr3 } = state.mode else {
        panic!("{:?}", state.mode)
    };
    for at in [state.rip, page, cmdline, 0xffff_f000] {
        let mut entry = cr3 | 3;
        for shift in [39, 30, 21] {
            assert_eq!(entry & 3, 3, "present and writable");
            entry = memory.u64((entry & !0xfff) + (at >> shift & 0x1ff) * 8);
        }
        assert_eq!(entry, at & !0x1f_ffff | 0x83);
    }
}

#[test]
fn linux_without_a_64_bit_entry_starts_in_protected_mode() {
    let mut kernel = bzimage();
    put(&mut kernel, 0x236, &[0]);
    let state = run(&boot(Kind::Linux, &kernel), &mut Sparse::new(64)).unwrap();
    assert_eq!((state.mode, state.rip), (Mode::Protected, 0x100_0000));
}

#[test]
fn linux_goes_where_it_fits() {
    let mut kernel = bzimage();
    let mut at = |memory, init_size: u32| {
        put(&mut kernel, 0x260, &init_size.to_le_bytes());
        run(&boot(Kind::Linux, &kernel), &mut Sparse::new(memory)).map(|state| state.rip - 0x200)
    };
    assert_eq!(
        at(48, 32 << 20).unwrap(),
        16 << 20,
        "the preferred place, filled to the end"
    );
    assert_eq!(
        at(40, 32 << 20).unwrap(),
        2 << 20,
        "the lowest aligned place"
    );
    assert_eq!(
        at(33, 32 << 20).unwrap_err().to_string(),
        "`kernel`: the kernel with its working space of 33554432 bytes finds no room: \
         the VM has 33407 KiB of RAM; raise `memory`"
    );
}

#[test]
fn linux_refusals_name_field_and_remedy() {
    let change = |at, bytes: &[u8]| {
        let mut kernel = bzimage();
        put(&mut kernel, at, bytes);
        refusal(&boot(Kind::Linux, &kernel))
    };
    for (error, right) in [
        (
            change(0x206, &[5, 2]),
            "the boot protocol version is 0x205; boot protocol 2.06 or",
        ),
        (
            change(0x211, &[0]),
            "loadflags is 0x0; LOADED_HIGH must be set",
        ),
        (
            change(0x230, &[1]),
            "kernel_alignment is 0x200001; a power of two is needed",
        ),
        (
            change(0x238, &[4, 0]),
            "takes a command line of at most 4 bytes, but `cmdline` has 13",
        ),
        (
            change(0x1f4, &[1, 16, 0]),
            "is truncated: the protected-mode kernel ends at byte 0x10410",
        ),
        (
            change(0x202, b"No"),
            "is all zeroes at its start, not a Linux bzImage",
        ),
    ] {
        assert!(error.contains(right), "{error}\nlacks {right}");
    }
    let short = &bzimage()[..0x280];
    let error = refusal(&boot(Kind::Linux, short));
    assert!(
        error.contains("the setup header ends at byte 0x290, the file at 0x280"),
        "{error}"
    );
}

/// One program header: kind, physical address, memory size, contents.
pub(crate) type Segment<'a> = (u32, u64, u64, &'a [u8]);

/// An ELF with these segments, linked at `physical + virt`.
pub(crate) fn elf(wide: bool, virt: u64, entry: u64, segments: &[Segment<'_>]) -> Vec<u8> {
    let (header, step) = if wide { (64, 56) } else { (52, 32) };
    let mut image = vec![0; 4096];
    put(&mut image, 0, b"\x7fELF");
    put(&mut image, 4, &[1 + u8::from(wide), 1, 1]);
    put(&mut image, 16, &[2, 0, if wide { 62 } else { 3 }, 0]);
    let word = |image: &mut Vec<u8>, at, value: u64| {
        let bytes = value.to_le_bytes();
        put(image, at, if wide { &bytes } else { &bytes[..4] });
    };
    word(&mut image, 24, entry);
    word(&mut image, if wide { 32 } else { 28 }, header as u64);
    put(
        &mut image,
        if wide { 54 } else { 42 },
        &[step as u8, 0, segments.len() as u8, 0],
    );
    for (i, (kind, phys, size, data)) in segments.iter().enumerate() {
        let at = header + i * step;
        put(&mut image, at, &kind.to_le_bytes());
        let (first, width) = if wide { (8, 8) } else { (4, 4) };
        let offset = image.len() as u64;
        let values = [offset, phys + virt, *phys, data.len() as u64, *size];
        for (n, value) in values.into_iter().enumerate() {
            word(&mut image, at + first + n * width, value);
        }
        image.extend_from_slice(data);
    }
    image
}

fn multiboot_header(flags: u32) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    [magic, flags, checksum]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

#[test]
fn multiboot_elf_gets_its_information() {
    let mut text = vec![0xf4; 64];
    text.extend(multiboot_header(0b111));
    let kernel = elf(
        false,
        0xc000_0000,
        0xc010_0004,
        &[(1, 0x10_0000, 0x5000, &text)],
    );
    let modules = [Image {
        name: "b",
        data: &[2; 10],
    }];
    let first = Image {
        name: "a",
        data: &[1; 5000],
    };
    let mut memory = Sparse::new(64);
    let boot = Boot {
        initrd: Some(first),
        modules: &modules,
        ..boot(Kind::Multiboot, &kernel)
    };
    let state = run(&boot, &mut memory).unwrap();

    assert_eq!(state.mode, Mode::Protected);
    assert_eq!(
        (state.rax, state.rip),
        (0x2bad_b002, 0x10_0004),
        "a virtual entry is translated"
    );
    let info = state.rbx;
    assert_eq!(memory.u32(info), 0x24d);
    assert_eq!(
        (memory.u32(info + 4), memory.u32(info + 8)),
        (639, 63 << 10)
    );
    let (cmdline, name) = (memory.u32(info + 16), memory.u32(info + 64));
    assert_eq!(memory.string(cmdline), "kernel console=ttyS0");
    assert_eq!(memory.string(name), LOADER_NAME);
    let (count, list) = (memory.u32(info + 20), memory.u32(info + 24));
    assert_eq!(count, 2);
    for (i, (at, size, name)) in [(0x10_5000, 5000, "a"), (0x10_7000, 10, "b")]
        .iter()
        .enumerate()
    {
        let entry = list + 16 * i as u64;
        assert_eq!((memory.u32(entry), memory.u32(entry + 4)), (*at, at + size));
        let string = memory.u32(entry + 8);
        assert_eq!(memory.string(string), *name);
        assert_eq!(memory.bytes(*at, 1), [i as u8 + 1]);
    }
    let (length, map) = (memory.u32(info + 44), memory.u32(info + 48));
    assert_eq!(length % 24, 0);
    assert_eq!(
        (memory.u32(map), memory.u64(map + 4), memory.u64(map + 12)),
        (20, 0, 0x9_fc00)
    );
}

/// A flat image: 8 bytes, the header, `fields`, then 16 bytes of code.
fn flat(fields: [u32; 5]) -> Vec<u8> {
    let mut image = vec![0xaa; 8];
    image.extend(multiboot_header(1 << 16));
    image.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
    image.extend([0x90; 16]);
    image
}

#[test]
fn multiboot_flat_image_goes_by_its_address_fields() {
    let kernel = flat([0x20_0008, 0x20_0000, 0, 0x20_1000, 0x20_0028]);
    let mut memory = Sparse::new(64);
    let state = run(&boot(Kind::Multiboot, &kernel), &mut memory).unwrap();
    assert_eq!(state.rip, 0x20_0028);
    assert_eq!(memory.bytes(0x20_0000, kernel.len()), kernel);

    for (fields, right) in [
        (
            [0x20_0000, 0x20_0008, 0, 0, 0x20_0008],
            "load_addr is 0x200008; it must be at most",
        ),
        (
            [0x20_0018, 0x20_0000, 0, 0, 0x20_0008],
            "load_addr is 0x200000; it must be at most",
        ),
        (
            [0x20_0008, 0x20_0000, 0x10, 0, 0x20_0008],
            "load_end_addr is 0x10; it must be zero or",
        ),
        (
            [0x20_0008, 0x20_0000, 0x30_0000, 0, 0x20_0008],
            "the load image ends at byte 0x100000",
        ),
        (
            [0x20_0008, 0x20_0000, 0, 0x20_0001, 0x20_0008],
            "bss_end_addr is 0x200001; it must be",
        ),
        (
            [0x20_0008, 0x20_0000, 0, 0, 0x30_0000],
            "entry_addr is 0x300000; it must lie in",
        ),
        (
            [0xa_0008, 0xa_0000, 0, 0, 0xa_0008],
            "the kernel belongs at 0xa0000..0xa0038, where",
        ),
        (
            [0x8, 0, 0, 0xffff_ffff, 0x8],
            "the kernel belongs at 0x0..0xffffffff, where the VM has",
        ),
    ] {
        let error = refusal(&boot(Kind::Multiboot, &flat(fields)));
        assert!(error.contains(right), "{error}\nlacks {right}");
    }
}

/// A PVH note segment behind a note of someone else.
pub(crate) fn notes(entry: u64, wide: bool) -> Vec<u8> {
    let mut notes = Vec::new();
    let size = if wide { 8 } else { 4 };
    for (name, kind, description) in [
        (&b"Linux\0\0\0"[..], 257u32, &[9u8; 12][..]),
        (b"Xen\0", 18, &entry.to_le_bytes()[..size]),
    ] {
        let name_size = name.len() as u32 - if name.len() == 8 { 2 } else { 0 };
        notes.extend(name_size.to_le_bytes());
        notes.extend((description.len() as u32).to_le_bytes());
        notes.extend(kind.to_le_bytes());
        notes.extend_from_slice(name);
        notes.extend_from_slice(description);
    }
    notes
}

#[test]
fn pvh_elf_of_either_class_gets_its_start_information() {
    for wide in [false, true] {
        let note = notes(0x100_0010, wide);
        let segments = [
            (1, 0x100_0000, 0x20_0000, &[0xf4; 100][..]),
            (4, 0, 0, &note),
        ];
        let kernel = elf(
            wide,
            if wide { 0xffff_ffff_8000_0000 } else { 0 },
            0,
            &segments,
        );
        let initrd = Image {
            name: "initrd",
            data: &[7; 5000],
        };
        let mut memory = Sparse::new(64);
        let state = run(
            &Boot {
                initrd: Some(initrd),
                ..boot(Kind::Pvh, &kernel)
            },
            &mut memory,
        )
        .unwrap();
        assert_eq!((state.mode, state.rip), (Mode::Protected, 0x100_0010));
        let info = state.rbx;
        assert_eq!((memory.u32(info), memory.u32(info + 4)), (0x336e_c578, 1));
        assert_eq!(memory.u32(info + 12), 1);
        let (list, cmdline) = (memory.u64(info + 16), memory.u64(info + 24));
        assert_eq!(
            (memory.u64(list), memory.u64(list + 8)),
            ((64 << 20) - 8192, 5000)
        );
        assert_eq!(memory.string(cmdline), "console=ttyS0");
        assert_eq!(memory.u64(info + 32), RSDP.as_u64());
        let map = memory.u64(info + 40);
        assert_eq!(
            (memory.u64(map), memory.u64(map + 8), memory.u32(map + 16)),
            (0, 0x9_fc00, 1)
        );
    }
}

#[test]
fn elf_refusals_name_place_and_remedy() {
    let note = notes(0x10_0000, false);
    let pvh = |segments: &[Segment<'_>]| {
        let all: Vec<_> = segments
            .iter()
            .copied()
            .chain([(4, 0, 0, &note[..])])
            .collect();
        refusal(&boot(Kind::Pvh, &elf(false, 0, 0, &all)))
    };
    let code = &[0xf4; 16][..];
    for (error, right) in [
        (
            pvh(&[(1, 0x10_0000, 64, code), (1, 0x10_003f, 16, code)]),
            "a segment of the kernel at 0x10003f..0x10004f overlaps a segment of the kernel",
        ),
        (
            pvh(&[(1, 0x9_f000, 0x1000, code)]),
            "belongs at 0x9f000..0xa0000, where the VM has no usable RAM (it has 65151 KiB",
        ),
        (
            pvh(&[(1, 0xe_0000, 16, code)]),
            "belongs at 0xe0000..0xe0010, where",
        ),
        (
            pvh(&[(1, 64 << 20, 16, code)]),
            "belongs at 0x4000000..0x4000010, where",
        ),
        (
            pvh(&[(1, 0x10_0000, 0xffff_fff0, code)]),
            "belongs at 0x100000..0x1000ffff0, where",
        ),
        (
            pvh(&[(1, 0x10_0000, 8, code)]),
            "the file size of a segment is 0x10; it must not be",
        ),
        (
            pvh(&[(1, 0x20_0000, 16, code)]),
            "the PVH entry point is 0x100000; it must lie in",
        ),
        (
            pvh(&[]),
            "the number of segments to load is 0x0; a kernel has at least one",
        ),
    ] {
        assert!(error.contains(right), "{error}\nlacks {right}");
    }

    let mut text = multiboot_header(0);
    text.extend(code);
    let segments = [(1, 0x10_0000, 64, &text[..])];
    let narrow = elf(false, 0, 0x10_000c, &segments);
    let wide = elf(true, 0, 0x10_000c, &segments);
    let noted = elf(true, 0, 0, &[segments[0], (4, 0, 0, &note)]);
    for (kind, kernel, right) in [
        (
            Kind::Linux,
            &narrow[..],
            "`kernel`: is an ELF with a multiboot header, not a Linux bzImage; use kind = \"multiboot\"",
        ),
        (
            Kind::Linux,
            &noted,
            "an ELF with a PVH entry note, not a Linux bzImage; use kind = \"pvh\"",
        ),
        (
            Kind::Pvh,
            &narrow,
            "an ELF with a multiboot header, not an ELF with a PVH entry note; use",
        ),
        (
            Kind::Multiboot,
            &bzimage(),
            "is a Linux bzImage, not a multiboot (version 1) kernel; use kind = \"linux\"",
        ),
        (
            Kind::Multiboot,
            &wide,
            "the ELF class is 0x2; multiboot loads 32-bit ELF (1) only",
        ),
        (
            Kind::Pvh,
            b"",
            "is an empty file, not an ELF with a PVH entry note",
        ),
        (Kind::Pvh, b"\x1f\x8b\x08\0", "is gzip-compressed data, not"),
        (Kind::Pvh, b"hello, world\n", "is a text file, not"),
        (
            Kind::Pvh,
            &narrow[..40],
            "is truncated: the ELF header ends at byte 0x34, the file at 0x28",
        ),
        (
            Kind::Multiboot,
            &narrow[..4100],
            "not a multiboot (version 1) kernel",
        ),
        (
            Kind::Multiboot,
            &narrow[..4110],
            "is truncated: a segment ends at byte 0x101c",
        ),
    ] {
        let error = refusal(&boot(kind, kernel));
        assert!(error.contains(right), "{error}\nlacks {right}");
    }
}

/// Whatever is in a file, loading ends, and writes only into RAM that is the guest's to use.
#[test]
fn damaged_images_never_panic_or_leave_usable_ram() {
    let mut text = vec![0xf4; 64];
    text.extend(multiboot_header(0b11));
    let note = notes(0x10_0010, true);
    let segments = [
        (1, 0x10_0000, 0x5000, &text[..]),
        (1, 0x20_0000, 64, &text),
        (4, 0, 0, &note),
    ];
    let mut small = bzimage();
    put(&mut small, 0x1f4, &16u32.to_le_bytes());
    small.truncate(1024 + 256);
    let seeds = [
        (Kind::Linux, small),
        (Kind::Multiboot, elf(false, 0, 0x10_0000, &segments)),
        (
            Kind::Multiboot,
            flat([0x20_0008, 0x20_0000, 0x20_0038, 0x20_1000, 0x20_0028]),
        ),
        (Kind::Pvh, elf(true, 0, 0, &segments)),
        (Kind::Pvh, elf(false, 0, 0, &segments)),
    ];
    let mut random = crate::testing::Random::new(1);
    let mut loaded = 0;
    for round in 0..20_000 {
        let (kind, image) = &seeds[round % seeds.len()];
        let mut image = image.clone();
        // Most of a kernel is code, which nobody looks at: damage the headers.
        let headers = [(0x1f0, 0xa0), (0, 0xd0), (0, 0x40), (0, 0xf0), (0, 0x90)];
        let (start, length) = headers[round % seeds.len()];
        random.damage(&mut image, start, length);
        let mut memory = Sparse::new(1 + random.below(40));
        let module = [Image {
            name: "m",
            data: &[1; 100],
        }];
        let modules = if *kind == Kind::Linux {
            &[][..]
        } else {
            &module
        };
        if run(
            &Boot {
                modules,
                ..boot(*kind, &image)
            },
            &mut memory,
        )
        .is_ok()
        {
            loaded += 1;
        }
        let layout = &memory.layout;
        for page in memory.pages.keys() {
            let at = page * 4096;
            assert!(
                layout.usable().any(|r| r.start <= at && at < r.end),
                "wrote at {at:#x}"
            );
        }
    }
    assert!(
        (100..19_900).contains(&loaded),
        "{loaded} of the damaged images still load"
    );
}

/// Kernels of the real world load, where the environment names some (`TESSERA_TEST_KERNELS`,
/// paths joined by colons); their kind is found by looking.
#[test]
fn real_kernels_load() {
    let Ok(paths) = std::env::var("TESSERA_TEST_KERNELS") else {
        std::println!("TESSERA_TEST_KERNELS names no kernels: nothing to load");
        return;
    };
    for path in paths.split(':') {
        let kernel = std::fs::read(path).unwrap();
        let looks = sniff(&kernel);
        let kind = looks.kind.unwrap_or_else(|| panic!("{path} is {looks}"));
        let state = run(&boot(kind, &kernel), &mut Sparse::new(256)).unwrap();
        std::println!("{path}: {looks}, {:?} at {:#x}", state.mode, state.rip);
    }
}

mod entry {
    use arch::{Gpr, RFlags, SegmentRegister, Vcpu};
    use machine::mock::MockVcpu;

    use super::*;

    #[test]
    fn segments_are_what_the_descriptor_table_says() {
        for long in [false, true] {
            let mut memory = Sparse::new(16);
            let layout = memory.layout.clone();
            let mut ram = Ram::new(&layout, &mut memory);
            let state = EntryState::new(&mut ram, long, 0x1234).unwrap();
            let mut vcpu = MockVcpu::real();
            EntryState { rbx: 5, ..state }.apply(&mut vcpu);

            assert_eq!((vcpu.rip, vcpu.gpr(Gpr::Rbx)), (0x1234, 5));
            assert_eq!(vcpu.rflags, RFlags::FIXED);
            assert_eq!(vcpu.cr0, if long { 0x8000_0011 } else { 0x11 });
            assert_eq!(vcpu.efer, if long { 0x500 } else { 0 });
            for register in [
                SegmentRegister::Cs,
                SegmentRegister::Ss,
                SegmentRegister::Tr,
            ] {
                let segment = vcpu.segment(register);
                let at = vcpu.gdtr.base + u64::from(segment.selector);
                assert!(u64::from(segment.selector) + 7 <= u64::from(vcpu.gdtr.limit));
                let raw = memory.u64(at);
                assert_eq!(
                    (raw >> 40) as u32 & 0xf0ff,
                    segment.rights.0,
                    "{register:?}"
                );
                let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
                let granular = segment.rights.0 & 0x8000 != 0;
                assert_eq!(
                    if granular { limit << 12 | 0xfff } else { limit },
                    segment.limit
                );
            }
            assert_eq!(vcpu.segment(SegmentRegister::Cs).rights.long(), long);
        }
    }
}
