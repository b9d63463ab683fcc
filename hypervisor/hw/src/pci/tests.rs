//! A machine of configuration spaces as plain bytes, whose base address registers know their size.

use super::*;
use std::cell::RefCell;
use std::collections::BTreeMap;

struct Space {
    bytes: [u8; 256],
    /// Bits of the base address registers that can be written.
    bars: [u32; 6],
}

#[derive(Default)]
struct Fake {
    functions: RefCell<BTreeMap<Address, Space>>,
    /// Decoding was on while a base address register was written.
    disturbed: RefCell<bool>,
}

const fn at(bus: u8, device: u8, function: u8) -> Address {
    Address {
        segment: 0,
        bus,
        device,
        function,
    }
}

impl Fake {
    fn add(&mut self, at: Address, id: u32, header: u8) {
        let mut bytes = [0; 256];
        bytes[..4].copy_from_slice(&id.to_le_bytes());
        bytes[0x0e] = header;
        let space = Space {
            bytes,
            bars: [0; 6],
        };
        self.functions.get_mut().insert(at, space);
    }

    fn put(&mut self, at: Address, offset: usize, data: &[u8]) {
        let space = self.functions.get_mut().get_mut(&at).expect("a function");
        space.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    /// A base address register with this content and mask.
    fn bar(&mut self, at: Address, index: usize, value: u32, mask: u32) {
        self.put(at, 0x10 + 4 * index, &value.to_le_bytes());
        let space = self.functions.get_mut().get_mut(&at).expect("a function");
        space.bars[index] = mask;
    }

    fn word(&self, at: Address, offset: u16) -> u32 {
        self.read(at, offset, Width::Word)
    }

    fn double(&self, at: Address, offset: u16) -> u32 {
        self.read(at, offset, Width::Double)
    }
}

impl Access for Fake {
    fn read(&self, at: Address, offset: u16, width: Width) -> u32 {
        let functions = self.functions.borrow();
        let Some(space) = functions.get(&at) else {
            return u32::MAX >> (32 - [8, 16, 32][width as usize]);
        };
        let bytes = 1 << width as usize;
        let from = usize::from(offset);
        assert_eq!(from % bytes, 0, "aligned");
        let bytes = &space.bytes[from..from + bytes];
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u32::from(*byte))
    }

    fn write(&self, at: Address, offset: u16, width: Width, value: u32) {
        let mut functions = self.functions.borrow_mut();
        let Some(space) = functions.get_mut(&at) else {
            return;
        };
        let from = usize::from(offset);
        let mut data = value.to_le_bytes();
        if (0x10..0x28).contains(&from) {
            *self.disturbed.borrow_mut() |= space.bytes[4] & 3 != 0;
            let mask = space.bars[(from - 0x10) / 4];
            let old = u32::from_le_bytes(space.bytes[from..from + 4].try_into().expect("4 bytes"));
            data = (value & mask | old & !mask).to_le_bytes();
        }
        space.bytes[from..from + (1 << width as usize)]
            .copy_from_slice(&data[..1 << width as usize]);
    }

    fn buses(&self) -> Vec<(u16, u8, u8)> {
        vec![(0, 0, 255)]
    }
}

#[test]
fn functions_are_found_on_all_buses() {
    let mut fake = Fake::default();
    // Functions 1 to 7 count only where function 0 says that there are several.
    let there = [
        (at(0, 0, 0), 0x1237_8086, 0x00),
        (at(0, 1, 0), 0x7000_8086, 0x80),
        (at(0, 1, 3), 0x7113_8086, 0x00),
        (at(0, 3, 0), 0x1234_1b36, 0x01),
        (at(7, 31, 0), 0x100e_8086, 0x00),
        (at(255, 0, 0), 0x1041_1af4, 0x00),
    ];
    for (at, id, header) in there {
        fake.add(at, id, header);
    }
    fake.put(at(7, 31, 0), 8, &[3, 0, 0, 2]);
    fake.add(at(0, 0, 1), 0x9999_8086, 0);
    fake.add(at(0, 5, 1), 0x9999_8086, 0);
    fake.add(at(0, 6, 0), 0x9999_0000, 0x80);
    let found = functions(&fake);
    let seen: Vec<_> = found
        .iter()
        .map(|f| (f.address, f.vendor, f.device))
        .collect();
    let want = there.map(|(at, id, _)| (at, id as u16, (id >> 16) as u16));
    assert_eq!(seen, want);
    assert_eq!(found[4].class, 0x02_0000);
    assert_eq!(found[4].address.to_string(), "07:1f.0");
    let far = Address {
        segment: 2,
        ..at(16, 1, 7)
    };
    assert_eq!(far.to_string(), "0002:10:01.7");
}

#[test]
fn a_full_machine_is_cut_to_the_bound() {
    let mut fake = Fake::default();
    for bus in 0..8 {
        for device in 0..32 {
            (0..8).for_each(|function| fake.add(at(bus, device, function), 1, 0x80));
        }
    }
    assert_eq!(functions(&fake).len(), MAX_FUNCTIONS);
}

#[test]
fn bars_are_sized_and_stay_as_they_were() {
    let it = at(0, 3, 0);
    let memory = |start, bytes| {
        Some(Bar {
            start: HostPhysAddr::new(start),
            bytes,
        })
    };
    for (low, low_mask, high, high_mask, want, name) in [
        (
            0xfebc_0000u32,
            0xfffe_0000u32,
            0u32,
            0u32,
            memory(0xfebc_0000, 0x2_0000),
            "32 bits",
        ),
        (
            0xfebc_0008,
            0xffff_f000,
            0,
            0,
            memory(0xfebc_0000, 0x1000),
            "prefetchable",
        ),
        (
            0x0000_000c,
            0xffff_c000,
            8,
            0xffff_ffff,
            memory(8 << 32, 0x4000),
            "64 bits",
        ),
        (
            0x0000_000c,
            0,
            0x80,
            0xffff_fff0,
            memory(0x80 << 32, 16 << 32),
            "larger than 4 GiB",
        ),
        (0x0000_c001, 0xffff_ffe0, 0, 0, None, "ports"),
        (0, 0xffff_f000, 0, 0, None, "no place"),
        (0, 0, 0, 0, None, "not used"),
        (0xfebc_0000, 0xff0f_f000, 0, 0, None, "a size that is none"),
        (
            0xfffe_0004,
            0xfffe_0000,
            0xffff_ffff,
            0xffff_ffff,
            None,
            "beyond the end",
        ),
    ] {
        let mut fake = Fake::default();
        fake.add(it, 0x100e_8086, 0);
        fake.put(it, 4, &[7, 0]);
        fake.bar(it, 2, low, low_mask);
        fake.bar(it, 3, high, high_mask);
        assert_eq!(bar(&fake, it, 2), want, "{name}");
        assert_eq!(
            (fake.double(it, 0x18), fake.double(it, 0x1c)),
            (low, high),
            "{name}"
        );
        assert_eq!(fake.word(it, 4), 7, "{name}");
        assert!(!*fake.disturbed.borrow(), "{name}");
    }
    let mut fake = Fake::default();
    fake.add(it, 0x100e_8086, 0);
    // A register of 64 bits where there is none after it, and registers that are none.
    fake.bar(it, 5, 0xfebc_0004, 0xfffe_0000);
    assert_eq!([5, 6, 255].map(|index| bar(&fake, it, index)), [None; 3]);
    assert_eq!(bar(&fake, at(1, 0, 0), 0), None, "nothing there");
    fake.put(it, 0x0e, &[1]);
    fake.bar(it, 2, 0xfebc_0000, 0xfffe_0000);
    assert_eq!(bar(&fake, it, 2), None, "a bridge's bus numbers");
}

#[test]
fn the_bridges_before_a_function_are_opened() {
    let mut fake = Fake::default();
    // Primary, secondary and last bus of each.
    let bridges = [
        (at(0, 1, 0), [0, 1, 3], 6),
        (at(0, 2, 0), [0, 4, 9], 0),
        (at(1, 0, 0), [1, 2, 2], 6),
        (at(0, 3, 0), [0, 0, 255], 0),
        (at(0, 4, 0), [0, 3, 2], 0),
    ];
    for (bridge, buses, _) in bridges {
        fake.add(bridge, 0x0001_1b36, 1);
        fake.put(bridge, 8, &[0, 0, 4, 6]);
        fake.put(bridge, 0x18, &buses);
    }
    fake.add(at(2, 0, 0), 0x10d3_8086, 0);
    let functions = functions(&fake);
    open_bridges(&fake, at(2, 0, 0), &functions);
    for (bridge, _, command) in bridges {
        assert_eq!(fake.word(bridge, 4), command, "{bridge}");
    }
    assert_eq!(fake.word(at(2, 0, 0), 4), 0);
}

#[test]
fn taking_wakes_and_lets_no_access_begin() {
    let it = at(0, 3, 0);
    let mut fake = Fake::default();
    fake.add(it, 0x10d3_8086, 0);
    fake.put(it, 4, &[0x01, 0x01, 0x10, 0]);
    fake.put(it, 0x34, &[0xc8]);
    fake.put(it, 0xc8, &[1, 0, 0x22, 0, 0x03, 0x81]);
    take(&fake, it);
    assert_eq!(
        fake.word(it, 0xcc),
        0x0100,
        "D0, without clearing the wake-up's mark"
    );
    assert_eq!(fake.word(it, 4), 0x0503);
    // Without capabilities.
    fake.put(it, 4, &[0, 0, 0, 0]);
    fake.put(it, 0xcc, &[3, 0]);
    take(&fake, it);
    assert_eq!((fake.word(it, 0xcc), fake.word(it, 4)), (3, 0x0402));
}

#[test]
fn a_pin_ends_where_the_firmware_joined_it() {
    let it = at(0, 3, 0);
    for (line, pin, want) in [
        (11, 1, Some(11)),
        (5, 4, Some(5)),
        (0, 1, None),
        (2, 1, None),
        (16, 1, None),
        (0xff, 1, None),
        (11, 0, None),
        (11, 5, None),
    ] {
        let mut fake = Fake::default();
        fake.add(it, 0x100e_8086, 0);
        fake.put(it, 0x3c, &[line, pin]);
        assert_eq!(super::pin(&fake, it), want, "{line} {pin}");
    }
}

#[test]
fn messages_are_programmed() {
    let it = at(0, 3, 0);
    let mut fake = Fake::default();
    fake.add(it, 0x10d3_8086, 0);
    fake.put(it, 6, &[0x10]);
    fake.put(it, 0x34, &[0x40]);
    assert_eq!(messages(&fake, it), None);

    fake.put(it, 0x40, &[0x11, 0x60, 0x04, 0xc0, 0x03, 0x20, 0, 0]);
    let table = Messages::MsiX {
        capability: 0x40,
        bar: 3,
        offset: 0x2000,
    };
    assert_eq!(messages(&fake, it), Some(table));
    let mut entries = [0xffu8; 32];
    // SAFETY: ordinary memory stands for the table.
    let mut window = unsafe { mmio::Window::new(entries.as_mut_ptr(), 32) };
    assert!(use_msix(&fake, it, 0x40, &mut window, 5, 0x41));
    assert_eq!(fake.word(it, 0x42), 0x8004, "on, not masked");
    assert_eq!(
        entries[..16],
        [0, 0x50, 0xe0, 0xfe, 0, 0, 0, 0, 0x41, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(entries[16..], [0xff; 16]);

    // MSI goes before it, with and without 64 bits; several messages become one.
    for (control, data) in [(0x0086u16, 0x6cu16), (0x0026, 0x68)] {
        fake.put(it, 0x60, &[5, 0x40]);
        fake.put(it, 0x62, &control.to_le_bytes());
        fake.put(it, 0x64, &[0xff; 12]);
        fake.put(it, 0x34, &[0x60]);
        assert_eq!(messages(&fake, it), Some(Messages::Msi(0x60)));
        assert!(use_msi(&fake, it, 0x60, 5, 0x41));
        assert_eq!(fake.double(it, 0x64), 0xfee0_5000);
        assert_eq!(fake.word(it, data), 0x41);
        assert_eq!(fake.word(it, 0x62), u32::from(control & !0x70 | 1));
        let high = fake.double(it, 0x68);
        assert_eq!(high == 0, control & 0x80 != 0);
    }
    assert!(
        !use_msi(&fake, it, 0x60, 255, 0x41),
        "no message reaches it"
    );
    assert!(!use_msix(&fake, it, 0x40, &mut window, 256, 0x41));
}

#[test]
fn capabilities_that_lead_in_circles_end() {
    let it = at(0, 3, 0);
    let mut fake = Fake::default();
    fake.add(it, 0x1041_1af4, 0);
    fake.put(it, 6, &[0x10]);
    fake.put(it, 0x34, &[0x43]);
    fake.put(it, 0x40, &[9, 0x50, 16, 1, 4]);
    fake.put(it, 0x50, &[7, 0x40]);
    assert_eq!(capabilities(&fake, it).count(), MAX_CAPABILITIES);
    assert_eq!(capabilities(&fake, it).nth(1), Some((7, 0x50)));
    assert_eq!(messages(&fake, it), None);
    // One that leads into the header is the last.
    fake.put(it, 0x51, &[0x3c]);
    assert_eq!(capabilities(&fake, it).count(), 2);
    assert_eq!(
        capabilities(&fake, at(9, 9, 0)).count(),
        MAX_CAPABILITIES,
        "all ones"
    );
}

#[test]
fn the_parts_of_a_virtio_device_are_read() {
    let it = at(0, 3, 0);
    let mut fake = Fake::default();
    fake.add(it, 0x1041_1af4, 0);
    fake.put(it, 6, &[0x10]);
    fake.put(it, 0x34, &[0x40]);
    fake.put(
        it,
        0x40,
        &[
            9, 0x54, 20, 2, 4, 0, 0, 0, 0, 0x30, 0, 0, 0, 0x10, 0, 0, 4, 0, 0, 0,
        ],
    );
    fake.put(it, 0x54, &[9, 0, 16, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0]);
    let part = |kind, offset, bytes, multiplier| VirtioPart {
        kind,
        bar: 4,
        offset,
        bytes,
        multiplier,
    };
    let want = [part(2, 0x3000, 0x1000, 4), part(1, 0, 0x800, 0)];
    assert_eq!(virtio_parts(&fake, it), want);
}
