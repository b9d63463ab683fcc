//! A virtio function as an operating system finds it: the PCI side of it (PCI 3.0 chapter 6), and
//! the transport (virtio 1.2 §4.1).

use crate::util::{PATIENCE, wait, wait_with_interrupts};
use guest_runtime::cpu::read32;
use guest_runtime::pc::{handle_eoi, set_redirection};
use guest_runtime::pci::{INTX_OFF, INTX_STATUS, MASTER, MEMORY, Msix, register};
use guest_runtime::virtio::{
    NO_VECTOR, Ring, Virtio, WRITE, common, feature, kind, ring, ring_bytes, status,
};
use guest_runtime::{Frame, PAGE, Page, count, guest_test, on_interrupt, skip};

const SIZE: u16 = 8;
const VECTOR: u8 = 0x61;
/// The first pin of PCI interrupts, and how they come: level, low.
const FIRST_PIN: u32 = 16;
const LEVEL_LOW: u32 = 1 << 15 | 1 << 13;
/// Where in the PCI window nothing is.
const ELSEWHERE: u32 = 0xd800_0000;

static RING: Page = Page::zero();
static DATA: Page = Page::zero();

const _: () = assert!(ring_bytes(SIZE) <= PAGE as usize);

/// The simplest device: a queue, whose buffers come back filled.
fn rng() -> Virtio {
    Virtio::first(kind::RNG).unwrap_or_else(|| skip("no virtio-rng"))
}

/// A device with a configuration.
fn console() -> Virtio {
    Virtio::first(kind::CONSOLE).unwrap_or_else(|| skip("no virtio-console"))
}

fn messages(device: &Virtio) -> Msix {
    device.msix.unwrap_or_else(|| panic!("no MSI-X"))
}

/// A device at work.
struct Rig {
    device: Virtio,
    ring: Ring,
}

impl Rig {
    /// With its interrupts off, but for this one of its messages.
    fn new(device: Virtio, vector: u16) -> Self {
        messages(&device).enable(vector != NO_VECTOR, false);
        assert!(
            device.negotiate(feature::VERSION_1).is_some(),
            "FEATURES_OK stays off"
        );
        // SAFETY: the page is for this.
        let ring = unsafe { Ring::new(RING.address(), SIZE) };
        device.write16(common::CONFIG_VECTOR, NO_VECTOR);
        // SAFETY: as above; the descriptors lead to the other page.
        unsafe { device.set_queue(0, SIZE, ring.parts, vector) };
        device.go();
        Self { device, ring }
    }

    /// Asks for bytes, without waiting for them.
    fn ask(&mut self) {
        self.ring.describe(0, DATA.address(), 64, WRITE, 0);
        self.ring.offer(0);
        ring(self.device.doorbell(0), 0);
    }

    #[track_caller]
    fn answered(&mut self) {
        let got = crate::util::wait_until(PATIENCE, || self.ring.used() != self.ring.seen);
        assert!(got, "the buffer does not come back");
        assert!(matches!(self.ring.take(), Some((0, 1..=64))));
    }

    #[track_caller]
    fn works(&mut self) {
        self.ask();
        self.answered();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        messages(&self.device).enable(false, false);
        self.device.reset();
    }
}

fn bar_size(device: &Virtio, index: u8) -> u64 {
    let (function, at) = (device.function, register::BAR0 + 4 * index);
    let [low, high] = [function.read(at), function.read(at + 4)];
    // SAFETY: decoding is off meanwhile, and everything is put back.
    unsafe {
        function.command(0, MEMORY);
        function.write(at, u32::MAX);
        function.write(at + 4, u32::MAX);
        let mask = u64::from(function.read(at + 4)) << 32 | u64::from(function.read(at) & !15);
        function.write(at, low);
        function.write(at + 4, high);
        function.command(MEMORY, 0);
        assert_eq!(function.read(at) & 7, 4, "64-bit memory");
        mask.wrapping_neg()
    }
}

#[guest_test]
fn virtio_capabilities_lead_into_its_memory() {
    for device in [rng(), console()] {
        let function = device.function;
        let mut kinds = 0;
        let mut count = 0;
        for (id, at) in function.capabilities() {
            count += 1;
            assert!(
                at >= 0x40 && at & 3 == 0 && count < 48,
                "capability at {at:x}"
            );
            if id != 9 {
                continue;
            }
            let what = function.read8(at + 3);
            kinds |= 1 << what;
            assert!(function.read8(at + 2) >= 16, "cap_len");
            let (offset, length) = (function.read(at + 8), function.read(at + 12));
            if what == 5 {
                continue;
            }
            let size = bar_size(&device, function.read8(at + 4));
            assert!(u64::from(offset) + u64::from(length) <= size, "{what}");
            let least = [0, 56, 2, 1, 1][usize::from(what)];
            assert!(length >= least, "structure {what} has {length} bytes");
        }
        // Common, doorbells, ISR and window; a device without a configuration has none.
        assert_eq!(kinds & 0b10_1110, 0b10_1110);
        assert_eq!(kinds & 1 << 4 != 0, device.device != 0);
    }
}

#[guest_test]
fn virtio_registers_have_a_size_and_move_while_it_works() {
    let mut rig = Rig::new(rng(), NO_VECTOR);
    let function = rig.device.function;
    let size = bar_size(&rig.device, 0);
    assert!(size.is_power_of_two() && size >= PAGE);
    rig.works();
    let base = function.bar(0).unwrap_or(0);
    let old = rig.device.common;
    // SAFETY: nothing else is there; it is put back below.
    unsafe { function.write(register::BAR0, ELSEWHERE) };
    let shift = u64::from(ELSEWHERE).wrapping_sub(base);
    let moved = Virtio::open(function).unwrap_or_else(|| panic!("lost"));
    assert_eq!(moved.common, old.wrapping_add(shift));
    assert_eq!(moved.status(), 0xf, "it went on");
    // SAFETY: nothing answers there any more.
    assert_eq!(unsafe { read32(old + 0x14) }, u32::MAX);
    let before = core::mem::replace(&mut rig.device, moved);
    rig.works();
    // SAFETY: as above.
    unsafe { function.write(register::BAR0, base as u32) };
    rig.device = before;
    rig.works();
    // And without decoding nothing answers at all.
    // SAFETY: as above.
    unsafe { function.command(0, MEMORY) };
    // SAFETY: as above.
    assert_eq!(unsafe { read32(old + 0x14) }, u32::MAX);
    // SAFETY: as above.
    unsafe { function.command(MEMORY, 0) };
    rig.works();
}

#[guest_test]
fn virtio_works_as_bus_master_alone() {
    let mut rig = Rig::new(rng(), NO_VECTOR);
    // SAFETY: it comes back below.
    unsafe { rig.device.function.command(0, MASTER) };
    rig.ask();
    wait(1000);
    assert_eq!(rig.ring.used(), 0, "it reached memory");
    // SAFETY: as above.
    unsafe { rig.device.function.command(MASTER, 0) };
    rig.answered();
}

#[guest_test]
fn virtio_queues_have_doorbells_of_their_own() {
    let device = console();
    device.reset();
    assert!(device.multiplier.is_power_of_two() && device.multiplier >= 2);
    let queues = device.read16(common::QUEUES);
    for queue in 1..queues {
        assert_ne!(device.doorbell(queue), device.doorbell(queue - 1));
    }
    // A queue that is not there has no size.
    assert_eq!(device.queue_size(queues), 0);
    assert!(device.queue_size(0).is_power_of_two());
}

fn by_pin(frame: &mut Frame) {
    let _ = rng().take_isr();
    handle_eoi(frame);
}

#[guest_test]
fn virtio_interrupts_by_its_pin() {
    let mut rig = Rig::new(rng(), NO_VECTOR);
    let function = rig.device.function;
    assert_eq!(function.read(register::INTERRUPT) >> 8 & 0xff, 1, "INTA#");
    let pin = FIRST_PIN + u32::from(function.device) % 4;
    on_interrupt(VECTOR, by_pin);
    let pending = || function.read(register::COMMAND) & INTX_STATUS != 0;
    assert!(!pending());
    rig.works();
    assert!(pending(), "interrupt status");
    set_redirection(pin, LEVEL_LOW | u32::from(VECTOR), 0);
    let before = count(VECTOR);
    assert!(wait_with_interrupts(PATIENCE, || count(VECTOR) != before));
    assert!(!pending(), "reading the ISR lets it go");
    wait_with_interrupts(1000, || false);
    assert_eq!(count(VECTOR), before + 1, "once");
    // Switched off in the command register it is still told of.
    // SAFETY: it is put back below.
    unsafe { function.command(INTX_OFF, 0) };
    rig.works();
    assert!(pending());
    wait_with_interrupts(1000, || false);
    assert_eq!(count(VECTOR), before + 1, "off");
    // SAFETY: as above.
    unsafe { function.command(0, INTX_OFF) };
    assert!(wait_with_interrupts(PATIENCE, || count(VECTOR) == before + 2));
    assert_eq!(rig.device.take_isr(), 0);
}

#[guest_test]
fn virtio_messages_wait_while_they_are_masked() {
    let mut rig = Rig::new(rng(), 0);
    let msix = messages(&rig.device);
    on_interrupt(VECTOR, handle_eoi);
    // SAFETY: the pending bits are mapped.
    let pending = || unsafe { read32(msix.pending) } & 1 != 0;
    let silent = |before| {
        wait_with_interrupts(1000, || false);
        count(VECTOR) == before
    };
    let came = |before| wait_with_interrupts(PATIENCE, || count(VECTOR) == before + 1);
    let before = count(VECTOR);
    msix.set(0, 0, VECTOR, false);
    rig.works();
    assert!(came(before), "an open one comes");
    assert!(!pending());
    // Its own mask.
    msix.set(0, 0, VECTOR, true);
    rig.works();
    rig.works();
    assert!(silent(before + 1) && pending(), "masked");
    msix.set(0, 0, VECTOR, false);
    assert!(came(before + 1) && !pending(), "it comes, once");
    // Everybody's.
    msix.enable(true, true);
    rig.works();
    assert!(silent(before + 2) && pending(), "all masked");
    msix.enable(true, false);
    assert!(came(before + 2) && !pending());
    assert!(silent(before + 3));
    let function = rig.device.function;
    assert_eq!(function.read(register::COMMAND) & INTX_STATUS, 0, "no pin");
}

#[guest_test]
fn virtio_takes_only_vectors_that_are_there() {
    let device = rng();
    let msix = messages(&device);
    device.reset();
    device.write16(common::QUEUE_SELECT, 0);
    for offset in [common::CONFIG_VECTOR, common::QUEUE_VECTOR] {
        assert_eq!(device.read16(offset), NO_VECTOR, "at reset");
        for (vector, found) in [
            (msix.vectors - 1, msix.vectors - 1),
            (msix.vectors, NO_VECTOR),
            (0, 0),
            (0x7ff, NO_VECTOR),
        ] {
            device.write16(offset, vector);
            assert_eq!(device.read16(offset), found);
        }
    }
    device.reset();
    assert_eq!(device.read16(common::CONFIG_VECTOR), NO_VECTOR);
}

#[guest_test]
fn virtio_generation_stands_while_nothing_changes() {
    let device = console();
    device.reset();
    let size = || [0, 1, 2, 3].map(|at| device.config8(at));
    let (first, generation) = (size(), device.read8(common::GENERATION));
    for _ in 0..5 {
        assert_eq!(size(), first);
        assert_eq!(device.read8(common::GENERATION), generation);
    }
    device.reset();
    assert_eq!(
        device.read8(common::GENERATION),
        generation,
        "a reset is no change"
    );
}

#[guest_test]
fn virtio_refuses_what_it_did_not_offer() {
    let device = rng();
    let offered = device.offered();
    assert!(offered & feature::VERSION_1 != 0);
    // A legacy driver, and one that takes what is not there.
    assert_eq!(device.negotiate(0), None);
    let absent = (0..24).find(|bit| offered >> bit & 1 == 0);
    let absent = absent.unwrap_or_else(|| panic!("offers all of 0 to 23"));
    device.reset();
    let begun = status::ACKNOWLEDGE | status::DRIVER;
    device.write8(common::STATUS, begun);
    for (select, half) in [(0, 1 << absent), (1, (feature::VERSION_1 >> 32) as u32)] {
        device.write32(common::ACCEPTED_SELECT, select);
        device.write32(common::ACCEPTED, half);
    }
    device.write8(common::STATUS, begun | status::FEATURES_OK);
    assert_eq!(device.status() & status::FEATURES_OK, 0);
    // Selectors beyond show nothing.
    device.write32(common::OFFERED_SELECT, 7);
    assert_eq!(device.read32(common::OFFERED), 0);
    device.reset();
}

#[guest_test]
fn virtio_reset_forgets_its_queues() {
    let mut rig = Rig::new(rng(), NO_VECTOR);
    rig.works();
    let device = rig.device;
    device.write16(common::QUEUE_SELECT, 0);
    assert_eq!(device.read16(common::QUEUE_ENABLE), 1);
    device.reset();
    device.write16(common::QUEUE_SELECT, 0);
    assert_eq!(device.read16(common::QUEUE_ENABLE), 0);
    assert_eq!(device.read32(common::QUEUE_PARTS), 0);
    // Its ring is nobody's any more.
    let used = rig.ring.used();
    rig.ask();
    wait(1000);
    assert_eq!(rig.ring.used(), used);
}

#[guest_test]
fn virtio_window_shows_the_registers() {
    let rig = Rig::new(rng(), NO_VECTOR);
    let function = rig.device.function;
    let found = function
        .capabilities()
        .find(|&(id, at)| id == 9 && function.read8(at + 3) == 5);
    let (_, at) = found.unwrap_or_else(|| panic!("no window"));
    let base = (rig.device.common - function.bar(0).unwrap_or(0)) as u32;
    for (offset, length) in [
        (common::STATUS, 1),
        (common::QUEUES, 2),
        (common::QUEUE_PARTS, 4),
    ] {
        // SAFETY: a window into registers that are read.
        unsafe {
            function.write8(at + 4, 0);
            function.write(at + 8, base + offset as u32);
            function.write(at + 12, length);
        }
        let mask = u32::MAX >> (32 - 8 * length);
        let direct = match length {
            1 => rig.device.read8(offset).into(),
            2 => rig.device.read16(offset).into(),
            _ => rig.device.read32(offset),
        };
        assert_eq!(function.read(at + 16) & mask, direct, "{offset:x}");
    }
    // And takes writes: a reset.
    // SAFETY: the device's own registers.
    unsafe {
        function.write(at + 8, base + common::STATUS as u32);
        function.write(at + 12, 1);
        function.write8(at + 16, 0);
    }
    assert_eq!(rig.device.status(), 0);
}
