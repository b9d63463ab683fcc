use super::*;
use crate::chain::Chain;
use crate::testing::{Driver, Ram, Random};

const T: Nanos = Nanos::ZERO;
const RING: u64 = 0x1_0000;
const DATA: u64 = 0x4_0000;
/// Where each structure is, found by the capabilities.
const CONFIG_CAPABILITY_BAR: u16 = 4;

/// A device that remembers what it was told, and answers each chain with one byte.
#[derive(Default)]
struct Toy {
    space: [u8; 6],
    queues: [Option<Queue>; 3],
    told: Vec<String>,
    signals: Signals,
    notified: u8,
    refuse: u64,
}

impl Toy {
    const OWN: u64 = 1 | 1 << 5 | 1 << 50;
}

impl Device for Toy {
    fn kind(&self) -> u16 {
        4
    }
    fn class(&self) -> u32 {
        0xff_0000
    }
    fn features(&self) -> u64 {
        Self::OWN
    }
    fn accepts(&self, features: u64) -> bool {
        features & self.refuse == 0
    }
    fn queues(&self) -> u16 {
        3
    }
    fn queue_size(&self, index: u16) -> u16 {
        [8, 16, 256].get(usize::from(index)).copied().unwrap_or(0)
    }
    fn config_size(&self) -> u32 {
        6
    }
    fn read_config(&mut self, offset: u32, buf: &mut [u8]) {
        let start = offset as usize;
        buf.copy_from_slice(&self.space[start..start + buf.len()]);
    }
    fn write_config(&mut self, offset: u32, data: &[u8]) {
        let start = offset as usize;
        self.space[start..start + data.len()].copy_from_slice(data);
    }
    fn start(&mut self, features: u64) {
        self.told.push(format!("start {features:#x}"));
    }
    fn attach(&mut self, index: u16, queue: Queue) {
        self.told.push(format!("attach {index}"));
        self.queues[usize::from(index)] = Some(queue);
    }
    fn detach(&mut self, index: u16) {
        self.told.push(format!("detach {index}"));
        self.queues[usize::from(index)] = None;
    }
    fn reset(&mut self) {
        *self = Self {
            space: self.space,
            refuse: self.refuse,
            ..Self::default()
        };
        self.told.push("reset".into());
    }
    fn notify(&mut self, index: u16) {
        self.notified |= 1 << index;
    }
    fn wants_service(&self) -> bool {
        self.notified != 0
    }
    fn serve(&mut self, mem: &mut dyn GuestMemory, _now: Nanos) {
        self.notified = 0;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            let mut chain = Chain::new();
            let mut work = || {
                while queue.pop(mem, &mut chain)? {
                    let written = chain.write(mem, 0, b"!")?;
                    queue.push(mem, chain.token(), written as u32)?;
                }
                queue.wants_interrupt(mem)
            };
            match work() {
                Ok(interrupt) => self.signals.queues |= u64::from(interrupt) << index,
                Err(_) => self.signals.broken = true,
            }
        }
    }
    fn take_signals(&mut self) -> Signals {
        core::mem::take(&mut self.signals)
    }
}

/// A driver of the transport.
struct World {
    pci: VirtioPci<Toy>,
    ram: Ram,
}

impl World {
    /// The function with its memory decoded and as bus master.
    fn new() -> Self {
        let mut world = Self {
            pci: VirtioPci::new(Toy::default()).unwrap(),
            ram: Ram::new(0x8_0000),
        };
        world.config(4, 2, 6);
        world
    }
    fn config(&mut self, offset: u16, size: u8, value: u32) {
        self.pci.config_mut().write(offset, size, value);
        self.pci.config_written(offset, size);
    }
    fn config_get(&mut self, offset: u16, size: u8) -> u32 {
        self.pci.config_reading(offset, size);
        self.pci.config().get(offset, size)
    }
    fn put(&mut self, offset: u32, size: u8, value: u64) {
        self.pci.write(BAR, offset.into(), size, value, T);
    }
    fn get(&mut self, offset: u32, size: u8) -> u64 {
        self.pci.read(BAR, offset.into(), size, T)
    }
    fn status(&mut self) -> u8 {
        self.get(0x14, 1) as u8
    }
    fn accept(&mut self, features: u64) {
        for (select, word) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.put(0x08, 4, select);
            self.put(0x0c, 4, word);
        }
    }
    /// Up to FEATURES_OK; `false` if it was refused.
    fn agree(&mut self, features: u64) -> bool {
        self.put(0x14, 1, 0);
        assert_eq!(self.status(), 0);
        self.put(0x14, 1, 1);
        self.put(0x14, 1, 3);
        self.accept(features);
        self.put(0x14, 1, 0xb);
        self.status() & FEATURES_OK != 0
    }
    fn enable(&mut self, index: u16, driver: &Driver) {
        self.put(0x16, 2, index.into());
        self.put(0x18, 2, driver.layout.size.into());
        let layout = driver.layout;
        for (at, part) in [
            (0x20, layout.descriptors),
            (0x28, layout.driver),
            (0x30, layout.device),
        ] {
            self.put(at, 8, part.as_u64());
        }
        self.put(0x1c, 2, 1);
    }
    /// A device at work, with one queue.
    fn live(&mut self, index: u16, features: u64) -> Driver {
        let features = features | features::VERSION_1;
        assert!(self.agree(features));
        let driver = Driver::new(RING, 8, features);
        self.enable(index, &driver);
        self.put(0x14, 1, 0xf);
        assert_eq!(self.status(), 0xf);
        driver
    }
    fn ring(&mut self, index: u32) {
        self.put(NOTIFY + 4 * index, 2, index.into());
    }
    /// What the run loop does after an access; gives the messages that were sent.
    fn serve(&mut self) -> Vec<u32> {
        if self.pci.wants_service() {
            self.pci.serve(&mut self.ram, T);
        }
        let mut sent = Vec::new();
        while let Some(message) = self.pci.take_message() {
            sent.push(message.data);
        }
        sent
    }
    /// Turns MSI-X on, with data 0x40 and up.
    fn use_msix(&mut self) {
        for vector in 0..4 {
            let at = MSIX_TABLE + 16 * vector;
            self.put(at, 8, 0xfee0_0000);
            self.put(at + 8, 8, 0x40 + u64::from(vector));
        }
        let at = self.capability(0x11, None);
        self.config(at + 2, 2, 0x8000);
    }
    /// Where a capability is: by identifier, and kind for virtio's.
    fn capability(&mut self, id: u32, kind: Option<u32>) -> u16 {
        let mut at = self.config_get(0x34, 1) as u16;
        while at != 0 {
            let found = self.config_get(at, 1) == id;
            if found && kind.is_none_or(|kind| self.config_get(at + 3, 1) == kind) {
                return at;
            }
            at = self.config_get(at + 1, 1) as u16;
        }
        panic!("no capability {id:#x} {kind:?}");
    }
}

#[test]
fn the_function_says_what_it_is_and_where_everything_is() {
    let mut world = World::new();
    assert_eq!(world.config_get(0, 4), 0x1044_1af4);
    assert_eq!(world.config_get(8, 4), 0xff00_0001);
    assert_eq!(world.config_get(0x2c, 4), 0x1100_1af4);
    assert_eq!(world.config_get(0x3d, 1), 1);
    assert_eq!(world.config_get(0x10, 4), 4, "64 bits wide, memory");
    for (kind, offset, length) in [
        (1, COMMON, 0x3c),
        (2, NOTIFY, 12),
        (3, ISR, 1),
        (4, DEVICE, 6),
        (5, 0, 0),
    ] {
        let at = world.capability(9, Some(kind));
        let extra = if matches!(kind, 2 | 5) { 20 } else { 16 };
        assert_eq!(world.config_get(at + 2, 1), extra, "cap_len");
        assert_eq!(world.config_get(at + CONFIG_CAPABILITY_BAR, 1), 0);
        assert_eq!(world.config_get(at + 8, 4), offset);
        assert_eq!(world.config_get(at + 12, 4), length);
        assert!(offset.is_multiple_of(4) && offset + length <= BAR_LENGTH);
    }
    let notify = world.capability(9, Some(2));
    let multiplier = world.config_get(notify + 16, 4);
    assert_eq!(multiplier, 4, "an even power of two");
    for queue in 0..3 {
        world.put(0x16, 2, queue);
        let offset = world.get(0x1e, 2) as u32;
        assert!(world.config_get(notify + 12, 4) >= offset * multiplier + 2);
    }
    let msix = world.capability(0x11, None);
    assert_eq!(
        world.config_get(msix + 2, 2),
        3,
        "a vector each and one more"
    );
    assert_eq!(world.config_get(msix + 4, 4), MSIX_TABLE);
    assert_eq!(world.config_get(msix + 8, 4), MSIX_PENDING);
}

#[test]
fn features_are_offered_by_words_and_held_to_what_was_offered() {
    let mut world = World::new();
    let offered = features::ALL | Toy::OWN;
    for (select, want) in [
        (0, offered as u32),
        (1, (offered >> 32) as u32),
        (2, 0),
        (u32::MAX, 0),
    ] {
        world.put(0, 4, select.into());
        assert_eq!(world.get(0, 4), u64::from(select));
        assert_eq!(world.get(4, 4), u64::from(want));
    }
    assert_eq!(offered & (1 << 33 | 1 << 37 | 1 << 38), 0);
    for (features, good) in [
        (features::VERSION_1, true),
        (offered, true),
        (features::VERSION_1 | features::RING_PACKED | 1, true),
        (0, false),
        (features::RING_PACKED, false),
        (features::VERSION_1 | 1 << 37, false),
        (features::VERSION_1 | 2, false),
        (features::VERSION_1 | 1 << 63, false),
    ] {
        assert_eq!(world.agree(features), good, "{features:#x}");
        if !good {
            world.put(0x14, 1, 0xf);
            assert_eq!(world.status(), 3, "nor is it ready then");
        }
        // What was written is there, valid or not.
        for (select, word) in [(0, features & 0xffff_ffff), (1, features >> 32), (2, 0)] {
            world.put(8, 4, select);
            assert_eq!(world.get(0xc, 4), word);
        }
    }
    assert!(world.agree(features::VERSION_1));
    world.accept(0);
    world.put(8, 4, 1);
    assert_eq!(world.get(0xc, 4), 1, "agreed is agreed");
    world.put(0x14, 1, 0);
    world.put(0x14, 1, 3);
    world.accept(features::VERSION_1);
    world.put(8, 4, 2);
    world.put(0xc, 4, 1);
    world.put(0x14, 1, 0xb);
    assert_eq!(world.status(), 3, "beyond what there is");
    world.pci.device_mut().refuse = 1 << 5;
    assert!(
        !world.agree(features::VERSION_1 | 1 << 5),
        "the device's say"
    );
    assert!(world.agree(features::VERSION_1));
    assert!(world.agree(features::VERSION_1), "and again");
}

#[test]
fn nothing_is_taken_before_the_driver_is_ready() {
    let mut world = World::new();
    assert!(world.agree(features::VERSION_1));
    let mut driver = Driver::new(RING, 8, features::VERSION_1);
    world.enable(1, &driver);
    let parts = [(DATA, 1, true)];
    driver.offer(&mut world.ram, &parts, false).unwrap();
    world.ring(1);
    world.pci.device_mut().signals.queues = 2;
    assert!(world.serve().is_empty() && !world.pci.interrupt());
    assert!(driver.take(&mut world.ram).is_none());
    assert!(!world.pci.device().told.iter().any(|told| told != "reset"));
    world.put(0x14, 1, 0xf);
    assert_eq!(
        world.pci.device().told[1..],
        ["start 0x100000000", "attach 1"]
    );
    world.ring(1);
    world.serve();
    assert!(driver.take(&mut world.ram).is_some());
    assert_eq!(world.ram.get(DATA), *b"!");
    // Doorbells of queues that are not there, or not enabled, or for nothing.
    for index in [0, 1, 2, 3, 63, 1023] {
        world.ring(index);
        world.serve();
    }
    assert_eq!(world.status(), 0xf);
    // Without leave to reach memory it waits.
    world.config(4, 2, 2);
    driver.offer(&mut world.ram, &parts, false).unwrap();
    world.ring(1);
    assert!(!world.pci.wants_service());
    world.config(4, 2, 6);
    world.serve();
    assert!(driver.take(&mut world.ram).is_some());
}

#[test]
fn a_reset_puts_everything_back() {
    for by_bus in [false, true] {
        let mut world = World::new();
        let mut driver = world.live(1, 0);
        world.use_msix();
        world.put(0x10, 2, 1);
        world.put(0x16, 2, 1);
        world.put(0x1a, 2, 2);
        world.pci.device_mut().signals = Signals {
            queues: 2,
            config: true,
            broken: false,
        };
        driver.offer(&mut world.ram, &[(DATA, 1, true)], false);
        world.ring(1);
        if by_bus {
            world.pci.reset();
        } else {
            world.put(0x14, 1, 0);
        }
        assert_eq!(world.status(), 0);
        assert!(world.serve().is_empty() && !world.pci.interrupt());
        assert!(driver.take(&mut world.ram).is_none());
        assert_eq!(world.pci.device().told, ["reset"]);
        assert_eq!(world.get(0x10, 2), 0xffff);
        world.put(0x16, 2, 1);
        assert_eq!(world.get(0x18, 2), 16);
        assert_eq!(world.get(0x1a, 2), 0xffff);
        assert_eq!(world.get(0x1c, 2), 0);
        assert_eq!(world.get(0x3a, 2), 0);
        assert_eq!(world.get(0x20, 8), 0);
        assert_eq!(world.get(ISR, 1), 0);
        let mut driver = world.live(1, 0);
        driver.offer(&mut world.ram, &[(DATA, 1, true)], false);
        world.ring(1);
        world.serve();
        assert!(driver.take(&mut world.ram).is_some(), "and it works again");
    }
}

#[test]
fn bits_of_the_status_are_set_one_by_one_and_cleared_together() {
    let mut world = World::new();
    world.put(0x14, 1, 1);
    world.put(0x14, 1, 2);
    assert_eq!(world.status(), 3, "none is taken back");
    world.put(0x14, 1, 0x43);
    assert_eq!(world.status(), 3, "this one is the device's");
    world.put(0x14, 1, 4);
    assert_eq!(world.status(), 3, "nothing was agreed on");
    world.live(0, 0);
    world.put(0x14, 1, 0x80);
    assert_eq!(world.status(), 0x8f);
    world.ring(0);
    assert!(!world.pci.wants_service(), "given up");
}

#[test]
fn wide_fields_are_reached_by_halves() {
    let mut world = World::new();
    for field in [0x20, 0x28, 0x30] {
        world.put(field, 4, 0x1122_3344);
        world.put(field + 4, 4, 0x5566_7788);
        assert_eq!(world.get(field, 8), 0x5566_7788_1122_3344);
        assert_eq!(world.get(field + 4, 4), 0x5566_7788);
        world.put(field, 8, 0x1_0000_0000);
        assert_eq!((world.get(field, 4), world.get(field + 4, 4)), (0, 1));
    }
    world.put(0x16, 2, 2);
    assert_eq!(world.get(0x20, 8), 0, "each queue has its own");
    assert_eq!(world.get(0x17, 1), 0);
    assert_eq!(world.get(0x16, 1), 2, "narrower reads see their bytes");
}

#[test]
fn the_device_configuration_is_readable_at_any_time_and_only_as_far_as_it_goes() {
    let mut world = World::new();
    world.pci.device_mut().space = *b"abcdef";
    assert_eq!(
        world.get(DEVICE, 4),
        u64::from(u32::from_le_bytes(*b"abcd"))
    );
    assert_eq!(
        world.get(DEVICE + 4, 4),
        u64::from(u16::from_le_bytes(*b"ef"))
    );
    assert_eq!(world.get(DEVICE + 5, 8), u64::from(b'f'));
    assert_eq!(world.get(DEVICE + 6, 1), 0);
    world.put(DEVICE + 4, 8, u64::from_le_bytes(*b"EFGHIJKL"));
    world.put(DEVICE + 0xfff, 8, u64::MAX);
    assert_eq!(&world.pci.device().space, b"abcdEF");
}

#[test]
fn a_changed_configuration_shows_in_its_generation() {
    let mut world = World::new();
    world.live(0, 0);
    let before = world.get(0x15, 1);
    world.get(DEVICE, 4);
    // As often as the counter has values.
    for _ in 0..256 {
        world.pci.device_mut().signals.config = true;
        world.serve();
    }
    world.get(DEVICE + 4, 2);
    assert_ne!(world.get(0x15, 1), before);
    let after = world.get(0x15, 1);
    world.get(DEVICE, 4);
    assert_eq!(world.get(0x15, 1), after);
    // A change that nobody has told of yet.
    world.pci.device_mut().signals.config = true;
    world.get(DEVICE, 4);
    assert_ne!(world.get(0x15, 1), after);
}

#[test]
fn queues_that_are_not_there_have_no_size_and_sizes_are_powers_of_two() {
    let mut world = World::new();
    assert_eq!(world.get(0x12, 2), 3);
    for (index, size) in [(0, 8), (1, 16), (2, 256), (3, 0), (0xffff, 0)] {
        world.put(0x16, 2, index);
        assert_eq!(world.get(0x18, 2), size);
        assert_eq!(world.get(0x1e, 2), if size == 0 { 0 } else { index });
        assert_eq!(world.get(0x1a, 2), 0xffff);
    }
    assert!(world.agree(features::VERSION_1));
    world.put(0x16, 2, 1);
    for (asked, got) in [(4, 4), (6, 4), (0, 4), (32, 4), (16, 16), (1, 1)] {
        world.put(0x18, 2, asked);
        assert_eq!(world.get(0x18, 2), got);
    }
    assert!(world.agree(features::VERSION_1 | features::RING_PACKED));
    world.put(0x16, 2, 1);
    for (asked, got) in [(6, 6), (0, 6), (17, 6)] {
        world.put(0x18, 2, asked);
        assert_eq!(world.get(0x18, 2), got);
    }
    world.put(0x1c, 2, 1);
    world.put(0x18, 2, 2);
    world.put(0x20, 4, 0x1000);
    assert_eq!(
        (world.get(0x18, 2), world.get(0x20, 4)),
        (6, 0),
        "not while it is in use"
    );
}

#[test]
fn a_queue_can_be_reset_and_used_anew() {
    for negotiated in [0, features::RING_RESET] {
        let mut world = World::new();
        let mut driver = world.live(1, negotiated);
        driver.offer(&mut world.ram, &[(DATA, 1, true)], false);
        world.ring(1);
        world.pci.device_mut().signals.queues = 2;
        world.put(0x16, 2, 1);
        world.put(0x3a, 2, 1);
        assert_eq!(world.get(0x3a, 2), 0, "done");
        if negotiated == 0 {
            assert_eq!(world.get(0x1c, 2), 1, "not negotiated");
            continue;
        }
        assert_eq!(world.get(0x1c, 2), 0);
        assert_eq!(world.get(0x18, 2), 16, "as it was at first");
        assert_eq!(world.get(0x20, 8), 0);
        world.serve();
        assert!(!world.pci.interrupt());
        assert!(driver.take(&mut world.ram).is_none());
        world.ring(1);
        assert_eq!(world.pci.device().told.last().unwrap(), "detach 1");
        let mut driver = Driver::new(RING + 0x1_0000, 4, driver.negotiated);
        world.enable(1, &driver);
        assert_eq!(world.pci.device().told.last().unwrap(), "attach 1");
        assert_eq!(world.get(0x3a, 2), 0);
        for _ in 0..9 {
            driver.offer(&mut world.ram, &[(DATA, 1, true)], false);
            world.ring(1);
            world.serve();
            assert!(driver.take(&mut world.ram).is_some());
        }
    }
}

#[test]
fn without_msix_the_line_tells_and_reading_the_status_lowers_it() {
    let mut world = World::new();
    let mut driver = world.live(1, 0);
    driver.offer(&mut world.ram, &[(DATA, 1, true)], false);
    world.ring(1);
    assert!(world.serve().is_empty());
    assert!(world.pci.interrupt());
    assert_eq!(world.config_get(6, 2) & 8, 8);
    assert_eq!(world.get(ISR, 1), 1);
    assert!(!world.pci.interrupt());
    assert_eq!(world.config_get(6, 2) & 8, 0);
    assert_eq!(world.get(ISR, 1), 0);
    world.pci.device_mut().signals.config = true;
    world.serve();
    world.pci.device_mut().signals.queues = 2;
    world.serve();
    assert_eq!(world.get(ISR, 1), 3);
    world.pci.device_mut().signals.queues = 2;
    world.serve();
    world.use_msix();
    assert!(!world.pci.interrupt(), "messages take over");
    assert_eq!(world.config_get(6, 2) & 8, 0);
}

#[test]
fn messages_go_where_vectors_say() {
    let mut world = World::new();
    world.live(1, 0);
    world.use_msix();
    let signal = |world: &mut World, queues, config| {
        world.pci.device_mut().signals = Signals {
            queues,
            config,
            broken: false,
        };
        world.serve()
    };
    assert!(signal(&mut world, 7, true).is_empty(), "none is mapped");
    assert_eq!(world.get(ISR, 1), 2, "a change shows there in any case");
    for (vector, got) in [
        (0, 0),
        (3, 3),
        (4, 0xffff),
        (2, 2),
        (0xffff, 0xffff),
        (1, 1),
    ] {
        world.put(0x10, 2, vector);
        assert_eq!(world.get(0x10, 2), got);
        world.put(0x16, 2, 1);
        world.put(0x1a, 2, vector);
        assert_eq!(world.get(0x1a, 2), got);
        let sent = signal(&mut world, 2, false);
        let message = (got != 0xffff).then_some(0x40 + got as u32);
        assert_eq!(sent, Vec::from_iter(message));
    }
    world.put(0x16, 2, 0);
    world.put(0x1a, 2, 3);
    assert_eq!(signal(&mut world, 3, true), [0x41, 0x43, 0x41]);
    // A masked vector waits.
    world.put(MSIX_TABLE + 16 + 12, 4, 1);
    assert_eq!(signal(&mut world, 3, false), [0x43]);
    assert_eq!(world.get(MSIX_PENDING, 8), 2);
    world.put(MSIX_TABLE + 16 + 12, 4, 0);
    assert_eq!(world.serve(), [0x41]);
    // So does all when the function is no bus master.
    world.config(4, 2, 2);
    assert!(signal(&mut world, 2, false).is_empty());
    world.config(4, 2, 6);
    assert_eq!(world.serve(), [0x41]);
    assert!(!world.pci.interrupt());
}

#[test]
fn the_access_capability_reaches_the_registers() {
    let mut world = World::new();
    let at = world.capability(9, Some(5));
    let select = |world: &mut World, bar, offset, length| {
        world.config(at + 4, 1, bar);
        world.config(at + 8, 4, offset);
        world.config(at + 12, 4, length);
    };
    select(&mut world, 0, 0x14, 1);
    world.config(at + 16, 1, 3);
    assert_eq!(world.status(), 3);
    world.config(at + 16, 4, 0xffff_ff01);
    assert_eq!(world.config_get(at + 16, 4), 3);
    select(&mut world, 0, 0x12, 2);
    assert_eq!(world.config_get(at + 16, 2), 3);
    select(&mut world, 0, 0, 4);
    world.config(at + 16, 4, 1);
    assert_eq!(world.get(0, 4), 1);
    select(&mut world, 0, 4, 4);
    let offered = world.get(4, 4) as u32;
    assert_eq!(world.config_get(at + 16, 4), offered);
    // What is no access does nothing.
    for (bar, offset, length) in [
        (1, 0, 4),
        (0, 1, 4),
        (0, 0, 3),
        (0, 0, 8),
        (0, 0, 0),
        (0, BAR_LENGTH, 4),
        (0, u32::MAX, 1),
    ] {
        select(&mut world, bar, offset, length);
        world.config(at + 16, 4, 0x5a5a_5a5a);
        assert_eq!(world.config_get(at + 16, 4), 0x5a5a_5a5a);
    }
    assert_eq!(world.get(0, 4), 1);
}

#[test]
fn a_driver_that_breaks_a_rule_sees_a_device_that_needs_a_reset() {
    // A ring outside of memory, an endless chain, a queue in no place.
    type Break = fn(&mut World, &mut Driver);
    let cases: [Break; 4] = [
        |world, driver| {
            world.ram.bytes.truncate(0x100);
            let _ = driver;
        },
        |world, _| {
            Driver::descriptor(&mut world.ram, RING, DATA, 1, 1, 0);
            world.ram.put16(RING + 0x2002, 1);
        },
        |world, driver| {
            driver.offer(&mut world.ram, &[(1 << 40, 1, true)], false);
        },
        |world, _| world.ram.put16(RING + 0x2002, 100),
    ];
    for break_it in cases {
        for msix in [false, true] {
            let mut world = World::new();
            let mut driver = world.live(1, 0);
            if msix {
                world.use_msix();
                world.put(0x10, 2, 2);
            }
            break_it(&mut world, &mut driver);
            world.ring(1);
            let sent = world.serve();
            assert_eq!(world.status(), 0x4f);
            if msix {
                assert_eq!(sent, [0x42]);
            } else {
                assert_eq!(world.get(ISR, 1), 2);
            }
            world.ring(1);
            assert!(!world.pci.wants_service(), "it stands");
            world.put(0x14, 1, 0xf);
            assert_eq!(world.status(), 0x4f);
            world.ram = Ram::new(0x8_0000);
            let mut driver = world.live(1, 0);
            driver.offer(&mut world.ram, &[(DATA, 1, true)], false);
            world.ring(1);
            world.serve();
            assert!(driver.take(&mut world.ram).is_some(), "until then");
        }
    }
    let mut world = World::new();
    assert!(world.agree(features::VERSION_1));
    world.put(0x20, 8, 0x1001);
    world.put(0x1c, 2, 1);
    world.put(0x14, 1, 0xf);
    assert_eq!(world.status(), 0x4f, "a misaligned ring");
    world.serve();
    assert_eq!(world.get(ISR, 1), 2);
}

#[test]
fn saved_state_goes_on_where_it_was() {
    let mut world = World::new();
    let mut driver = world.live(1, 0);
    world.use_msix();
    world.put(0x16, 2, 1);
    world.put(0x1a, 2, 3);
    let saved = world.pci.save();
    let mut other = World::new();
    other.pci.restore(saved);
    // The device's own state is its own matter.
    let queue = world.pci.device_mut().queues[1].take().unwrap();
    other.pci.device_mut().queues[1] = Some(queue);
    driver.offer(&mut other.ram, &[(DATA, 1, true)], false);
    other.ring(1);
    assert_eq!(other.serve(), [0x43]);
    assert!(driver.take(&mut other.ram).is_some());
}

#[test]
fn no_access_does_harm() {
    let mut random = Random(23);
    for round in 0..300 {
        let mut world = World::new();
        if round % 2 == 0 {
            let mut driver = world.live(round % 3, random.next() & features::ALL);
            for _ in 0..4 {
                driver.offer(&mut world.ram, &[(DATA, 9, true)], true);
            }
        }
        for _ in 0..1_000 {
            let size = 1 << random.below(4);
            let value = random.next() >> random.below(64);
            let offset = match random.below(4) {
                0 => random.below(0x40) as u32,
                1 => NOTIFY + 4 * random.below(4) as u32,
                2 => DEVICE + random.below(16) as u32,
                _ => random.below(u64::from(BAR_LENGTH)) as u32,
            };
            match random.below(8) {
                0..=2 => world.put(offset, size, value),
                3 | 4 => _ = world.get(offset, size),
                5 => world.config(random.below(0x100) as u16, size.min(4), value as u32),
                6 => _ = world.config_get(random.below(0x100) as u16, size.min(4)),
                _ => {
                    let at = RING + random.below(0x3100);
                    world.ram.put(at, &[value as u8]);
                }
            }
            world.ram.accesses = 0;
            world.serve();
            assert!(world.ram.accesses < 3 * 300 * 300);
        }
    }
}
