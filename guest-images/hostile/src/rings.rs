//! virtio devices and their rings: descriptors, places, indices and registers that no driver would
//! write, and races with the device.
//!
//! Each attack is made on every device there is. After it the device asks for a reset or works, as
//! the attack says, and a driver that begins anew is served. What fails ends the guest by value 3.

use crate::Random;
use core::sync::atomic::{AtomicBool, Ordering};
use guest_runtime::cpu::{rdtsc, read32, write32};
use guest_runtime::pc::{IOAPIC, LAPIC, handle_eoi, reg, set_lapic};
use guest_runtime::pci::{MASTER, MEMORY, register};
use guest_runtime::smp::{self, beside};
use guest_runtime::virtio::{
    INDIRECT, NEXT, NO_VECTOR, Ring, Virtio, WRITE, common, feature, kind, ring, status,
};
use guest_runtime::{PAGE, Page, clock, count, exit, on_interrupt, println, with_interrupts};

/// Entries of a ring.
const SIZE: u16 = 64;
/// Most pieces of a frame in [`net_lengths`].
const PIECES: u16 = 4;
const ECAM: u64 = 0xe000_0000;
/// Where nothing is, below and above 4 GiB.
const NOWHERE: [u64; 4] = [0xd000_0000, 0x1_0000_0000, 1 << 52, u64::MAX - 15];
const RAM: u64 = 16 << 20;
const MESSAGE: u8 = 0x51;
/// How long a device may take.
const PATIENCE: u64 = 500_000;

/// Rings, and a table of indirect descriptors.
static RINGS: [Page; 4] = [const { Page::zero() }; 4];
/// What the devices read and write: 68 KiB.
static DATA: [Page; 17] = [const { Page::zero() }; 17];

fn rings() -> u64 {
    RINGS[0].address()
}

fn table() -> u64 {
    RINGS[3].address()
}

fn data() -> u64 {
    DATA[0].address()
}

fn random() -> Random {
    Random(0x2545_f491_4f6c_dd1d)
}

fn wait_for(mut condition: impl FnMut() -> bool) -> bool {
    let end = rdtsc() + clock::ticks(PATIENCE);
    while !condition() {
        if rdtsc() > end {
            return condition();
        }
    }
    true
}

/// A device, and the queue that does its work.
#[derive(Clone, Copy)]
struct Target {
    device: Virtio,
    kind: u16,
    queue: u16,
}

/// What is offered of a device's ring; with the flags that a good descriptor has.
type Way = fn(&mut Rig, u16);

/// A device at work.
struct Rig {
    target: Target,
    ring: Ring,
    bell: u64,
}

impl Target {
    fn all() -> impl Iterator<Item = Self> {
        [(kind::RNG, 0), (kind::NET, 1), (kind::CONSOLE, 1)]
            .into_iter()
            .filter_map(|(kind, queue)| {
                let device = Virtio::first(kind)?;
                Some(Self {
                    device,
                    kind,
                    queue,
                })
            })
    }

    fn fail(&self, what: &str) -> ! {
        let status = self.device.status();
        println!("hostile: device {}: {what}, status {status:#x}", self.kind);
        exit(3)
    }

    /// A good buffer of the device's kind: of a whole frame, a line to print, or to be filled.
    fn buffer(&self) -> (u32, u16) {
        match self.kind {
            kind::NET => {
                let frame = data() as *mut u8;
                // SAFETY: the memory is for this. A broadcast frame of no protocol.
                unsafe {
                    frame.write_bytes(0, 12 + 60);
                    frame.add(12).write_bytes(0xff, 6);
                    for at in 0..6 {
                        frame
                            .add(18 + at)
                            .write_volatile(self.device.config8(at as u64));
                    }
                    frame.add(24).write_volatile(0x88);
                    frame.add(25).write_volatile(0xb5);
                }
                (12 + 60, 0)
            }
            kind::CONSOLE => {
                // SAFETY: as above.
                unsafe { (data() as *mut u8).copy_from_nonoverlapping(b"here\n".as_ptr(), 5) };
                (5, 0)
            }
            _ => (64, WRITE),
        }
    }

    /// Begins anew, with one queue at these places.
    fn begin_at(&self, features: u64, size: u16, parts: [u64; 3]) -> bool {
        // SAFETY: an attack may have turned it off.
        unsafe { self.device.function.command(MEMORY | MASTER, 0) };
        if let Some(msix) = self.device.msix {
            msix.enable(false, false);
        }
        if self
            .device
            .negotiate(feature::VERSION_1 | features)
            .is_none()
        {
            self.fail("does not agree on features")
        }
        self.device.write16(common::CONFIG_VECTOR, NO_VECTOR);
        // SAFETY: what is written outside of this module's memory is what an attack is about: the
        // hypervisor must not let it through, and devices' memory is no RAM.
        unsafe { self.device.set_queue(self.queue, size, parts, NO_VECTOR) };
        self.device.go();
        self.device.status() & status::NEEDS_RESET == 0
    }

    fn begin(&self, features: u64) -> Rig {
        // SAFETY: the memory is the rings'.
        let ring = unsafe { Ring::new(rings(), SIZE) };
        if !self.begin_at(features, SIZE, ring.parts) {
            self.fail("breaks at once")
        }
        Rig {
            target: *self,
            ring,
            bell: self.device.doorbell(self.queue),
        }
    }

    fn bell(&self) {
        ring(self.device.doorbell(self.queue), self.queue);
    }

    fn is_broken(&self) -> bool {
        self.device.status() & status::NEEDS_RESET != 0
    }

    fn breaks(&self, what: &str) {
        if !wait_for(|| self.is_broken()) {
            self.fail(what)
        }
    }

    /// A driver that begins anew is served.
    fn serves(&self) {
        let mut rig = self.begin(0);
        for _ in 0..3 {
            if !rig.request() {
                self.fail("does not serve a new driver")
            }
        }
        self.device.reset();
    }
}

impl Rig {
    fn kick(&self) {
        ring(self.bell, self.target.queue);
    }

    /// One good request; whether it came back.
    fn request(&mut self) -> bool {
        let (length, flags) = self.target.buffer();
        self.ring.describe(0, data(), length, flags, 0);
        self.ring.offer(0);
        self.kick();
        wait_for(|| self.ring.take().is_some())
    }

    /// Makes a chain available that begins at `head`.
    fn offer(&mut self, head: u16) {
        self.ring.offer(head);
        self.kick();
    }

    /// The device asks for a reset or goes on.
    fn either(&self) {
        let end = rdtsc() + clock::ticks(200);
        while rdtsc() < end && !self.target.is_broken() {}
    }
}

fn each(attack: impl Fn(&Target)) {
    let mut some = false;
    for target in Target::all() {
        some = true;
        target.serves();
        attack(&target);
        target.serves();
    }
    if !some {
        println!("hostile: no virtio device");
        exit(2)
    }
}

fn each_net(attack: impl Fn(&Target)) {
    each(|target| {
        if target.kind == kind::NET {
            attack(target)
        }
    });
}

/// Runs `there` on a second CPU, again and again, while `here` runs.
fn against(there: &(dyn Fn(u64) + Sync), here: impl FnOnce()) {
    let over = AtomicBool::new(false);
    if smp::count() < 2 {
        return here();
    }
    beside(
        [1],
        &|| {
            let mut turn = 0;
            while !over.load(Ordering::Relaxed) {
                there(turn);
                turn += 1;
            }
        },
        || {
            here();
            over.store(true, Ordering::Relaxed);
        },
    );
}

/// Chains without end, and descriptors that are none.
pub fn ring_loops() {
    each(|target| {
        let ways: &[(&str, Way)] = &[
            ("a descriptor that is its own next", |rig, flags| {
                rig.ring.describe(0, data(), 16, flags | NEXT, 0);
                rig.offer(0);
            }),
            ("two that are each other's", |rig, flags| {
                rig.ring.describe(0, data(), 16, flags | NEXT, 1);
                rig.ring.describe(1, data(), 16, flags | NEXT, 0);
                rig.offer(0);
            }),
            ("all in a circle", |rig, flags| {
                for index in 0..SIZE {
                    let next = (index + 1) % SIZE;
                    rig.ring.describe(index, data(), 16, flags | NEXT, next);
                }
                rig.offer(3);
            }),
            ("a next beyond the table", |rig, flags| {
                rig.ring.describe(0, data(), 16, flags | NEXT, SIZE);
                rig.offer(0);
            }),
            ("a head beyond the table", |rig, _| rig.offer(SIZE)),
            ("the last head there is", |rig, _| rig.offer(0xffff)),
            ("readable behind writable", |rig, _| {
                rig.ring.describe(0, data(), 16, WRITE | NEXT, 1);
                rig.ring.describe(1, data(), 16, 0, 0);
                rig.offer(0);
            }),
        ];
        for (what, way) in ways {
            let mut rig = target.begin(0);
            let flags = target.buffer().1;
            way(&mut rig, flags);
            target.breaks(what);
        }
    });
}

/// Tables of indirect descriptors that are empty, odd, nested, too long, elsewhere.
pub fn ring_indirect() {
    each(|target| {
        let (length, flags) = target.buffer();
        let entry = |index: u64, second: u64| {
            // SAFETY: the page is for this.
            unsafe {
                let at = (table() + 16 * index) as *mut u64;
                at.write_volatile(data());
                at.add(1).write_volatile(second);
            }
        };
        let good = u64::from(length) | u64::from(flags) << 32;
        let nested = 16 | u64::from(INDIRECT) << 32;
        let circle = u64::from(length) | u64::from(flags | NEXT) << 32;
        let beyond = circle | 9 << 48;
        let ways = [
            ("an empty table", good, table(), 0, INDIRECT),
            ("an odd table", good, table(), 17, INDIRECT),
            ("a short table", good, table(), 15, INDIRECT),
            ("a table with a next", good, table(), 16, INDIRECT | NEXT),
            ("a table in a table", nested, table(), 16, INDIRECT),
            ("a circle in a table", circle, table(), 16, INDIRECT),
            ("a next beyond the table", beyond, table(), 32, INDIRECT),
            ("a table of 4 GiB", good, table(), 0xffff_fff0, INDIRECT),
            ("a table nowhere", good, NOWHERE[0], 16, INDIRECT),
            ("a table far above", good, NOWHERE[2], 16, INDIRECT),
            ("a table at the very end", good, NOWHERE[3], 32, INDIRECT),
            ("a table in the local APIC", good, LAPIC, 32, INDIRECT),
        ];
        for (what, second, at, bytes, how) in ways {
            entry(0, second);
            entry(1, second);
            let mut rig = target.begin(feature::INDIRECT);
            rig.ring.describe(0, at, bytes, how, 1);
            rig.offer(0);
            target.breaks(what);
        }
        // Not agreed on.
        entry(0, good);
        let mut rig = target.begin(0);
        rig.ring.describe(0, table(), 16, INDIRECT, 0);
        rig.offer(0);
        target.breaks("a table that was not agreed on");
        // And one that is right.
        let mut rig = target.begin(feature::INDIRECT);
        target.buffer();
        rig.ring.describe(0, table(), 16, INDIRECT, 0);
        rig.offer(0);
        if !wait_for(|| rig.ring.take().is_some()) {
            target.fail("does not take a good table")
        }
    });
}

/// Buffers that are not in RAM, or only partly, or nothing at all.
pub fn ring_buffers() {
    each(|target| {
        let bar = target.device.common;
        let places = [
            LAPIC,
            IOAPIC,
            ECAM,
            bar,
            NOWHERE[0],
            NOWHERE[1],
            NOWHERE[2],
            NOWHERE[3],
            RAM,
            RAM - 8,
            0xa_0000,
            u64::MAX,
        ];
        for flags in [0, WRITE] {
            for at in places {
                for length in [0, 1, 12, 64, 4096, 1 << 20, u32::MAX] {
                    // To print all of its own RAM is no attack.
                    if target.kind == kind::CONSOLE && at == RAM - 8 {
                        continue;
                    }
                    let mut rig = target.begin(0);
                    rig.ring.describe(0, at, length, flags, 0);
                    rig.offer(0);
                    rig.either();
                }
            }
        }
        // A chain of the longest buffers.
        let mut rig = target.begin(0);
        for index in 0..SIZE {
            let next = if index + 1 < SIZE { NEXT } else { 0 };
            let (at, flags) = (NOWHERE[0], target.buffer().1);
            rig.ring
                .describe(index, at, u32::MAX, flags | next, index + 1);
        }
        rig.offer(0);
        rig.either();
    });
}

/// Rings that are not in RAM, or where the device is itself.
pub fn ring_places() {
    each(|target| {
        let bar = target.device.common;
        for place in [LAPIC, IOAPIC, ECAM, bar, NOWHERE[0], NOWHERE[2], u64::MAX] {
            for part in 0..3 {
                // SAFETY: the memory is the rings'.
                let mut ring = unsafe { Ring::new(rings(), SIZE) };
                let mut parts = ring.parts;
                parts[part] = place;
                let (length, flags) = target.buffer();
                ring.describe(0, data(), length, flags, 0);
                ring.offer(0);
                target.begin_at(0, SIZE, parts);
                target.bell();
                target.breaks("a ring that is not in RAM");
            }
        }
        // At the end of RAM with the index within and the entries beyond, misaligned, one upon
        // another.
        let base = rings();
        for parts in [
            [base, RAM - 4, base + 8192],
            [base, base + 1, base + 8192],
            [base + 8, base + 4096, base + 8192],
            [base, base + 4096, base + 8194],
            [base, base, base],
            [base, base + 4096, base + 4096],
        ] {
            // SAFETY: as above.
            unsafe { Ring::new(base, SIZE) };
            target.begin_at(0, SIZE, parts);
            for _ in 0..4 {
                target.bell();
            }
        }
    });
}

/// Available indices that cannot be.
pub fn ring_ahead() {
    each(|target| {
        for ahead in [SIZE + 1, 0x7fff, 0x8000, 0xffff] {
            let rig = target.begin(0);
            rig.ring.write(1, 2, ahead);
            rig.kick();
            target.breaks("an index too far ahead");
        }
        // A whole ring at once, many times over, of nothing but the same.
        let mut rig = target.begin(0);
        let (length, flags) = target.buffer();
        for _ in 0..if target.kind == kind::NET { 32 } else { 2 } {
            for index in 0..SIZE {
                rig.ring.describe(index, data(), length, flags, 0);
                rig.ring.offer(index);
            }
            rig.kick();
            let mut back = 0;
            if !wait_for(|| {
                back += u16::from(rig.ring.take().is_some());
                back == SIZE
            }) {
                target.fail("a full ring does not come back")
            }
        }
    });
}

/// Descriptors, rings and frames that a second CPU rewrites while the device reads them.
pub fn ring_races() {
    each(|target| {
        // What is printed would be the neighbours' to bear.
        if target.kind == kind::CONSOLE {
            return;
        }
        for _ in 0..20 {
            let mut rig = target.begin(feature::INDIRECT);
            let (length, flags) = target.buffer();
            let copy = rig.ring;
            let flip = move |turn: u64| {
                let wild = [NOWHERE[0], LAPIC, data(), u64::MAX];
                let at = wild[turn as usize % 4];
                let index = (turn % 8) as u16;
                match turn / 8 % 4 {
                    0 => copy.describe(index, data(), length, flags, 0),
                    1 => copy.describe(index, at, turn as u32, flags | NEXT, index + 1),
                    2 => copy.describe(index, table(), 16 * (turn as u32 % 9), INDIRECT, 0),
                    _ => copy.write(1, 4 + 2 * (turn % 64), turn as u16),
                }
                // SAFETY: the header of the frame, in the attack's own memory.
                unsafe { (data() as *mut u64).write_volatile(turn) };
            };
            against(&flip, || {
                for turn in 0..50 {
                    if smp::count() < 2 {
                        flip(turn);
                    }
                    rig.offer((turn % 8) as u16);
                }
            });
            rig.either();
        }
    });
}

/// Every register with everything, in all sizes.
pub fn ring_registers() {
    let poke = |random: &mut Random, base: u64, length: u64, count: u32| {
        for _ in 0..count {
            let (wild, value) = (random.next(), random.next());
            let at = base + (wild >> 8) % length;
            // Small numbers lead further.
            let value = if wild & 16 == 0 { value & 3 } else { value };
            // SAFETY: registers of the attack's own device; it reaches RAM by rings alone, and
            // where they lie is random: above all of it, but for the tiny rest that is this
            // guest's to lose.
            unsafe {
                match wild & 7 {
                    0 | 1 => (at as *mut u8).write_volatile(value as u8),
                    2 | 3 => ((at & !1) as *mut u16).write_volatile(value as u16),
                    4 | 5 => ((at & !3) as *mut u32).write_volatile(value as u32),
                    6 => ((at & !7) as *mut u64).write_volatile(value),
                    _ => _ = ((at & !7) as *const u64).read_volatile(),
                }
            }
        }
    };
    each(|target| {
        let mut random = random();
        let device = target.device;
        // The emergency register of the console prints, which is not what this is about.
        let own = if target.kind == kind::CONSOLE { 8 } else { 64 };
        for turn in 0..10 {
            target.begin(0);
            poke(&mut random, device.common, 0x40, 300);
            poke(&mut random, device.isr, 4, 8);
            poke(&mut random, device.device, own, 50);
            poke(&mut random, device.notify, 256, 50);
            if let Some(msix) = device.msix {
                msix.enable(turn % 2 == 0, true);
                poke(&mut random, msix.table + 12, 1, 4);
                poke(&mut random, msix.pending, 16, 8);
            }
            device.reset();
        }
    });
}

/// The window into the registers that is in configuration space (virtio 1.2 §4.1.4.9).
pub fn ring_window() {
    each(|target| {
        let function = target.device.function;
        let mut random = random();
        let found = function
            .capabilities()
            .find(|&(id, at)| id == 9 && function.read8(at + 3) == 5);
        let Some((_, window)) = found else {
            target.fail("has no window")
        };
        for _ in 0..500 {
            let wild = random.next();
            let at = if wild & 1 == 0 {
                wild >> 8 & 0x3f
            } else {
                wild >> 8
            };
            // SAFETY: as for the registers themselves.
            unsafe {
                function.write8(window + 4, if wild & 6 == 0 { wild as u8 } else { 0 });
                function.write(window + 8, at as u32);
                function.write(window + 12, [1, 2, 4, 3, 0, u32::MAX][wild as usize % 6]);
                let _ = function.read(window + 16);
                if at < 0x2000 {
                    function.write(window + 16, (wild >> 40) as u32 & 0xff);
                }
            }
        }
        target.device.reset();
    });
}

/// Doorbells without end, of all queues and of none.
pub fn ring_storm() {
    each(|target| {
        let rig = target.begin(0);
        for turn in 0..3_000u64 {
            match turn % 3 {
                0 => rig.kick(),
                1 => ring(target.device.notify + turn % 64 * 4, turn as u16),
                // SAFETY: a doorbell, or nothing.
                _ => unsafe { write32(target.device.notify + turn % 128 * 4, u32::MAX) },
            }
        }
        rig.either();
        if target.is_broken() {
            target.fail("breaks by doorbells")
        }
    });
}

/// The queue or the whole device is reset with chains under way, while another CPU rings.
pub fn ring_resets() {
    each(|target| {
        let device = target.device;
        for turn in 0..40 {
            let mut rig = target.begin(feature::RING_RESET);
            let (length, flags) = target.buffer();
            let (bell, queue) = (rig.bell, target.queue);
            against(&|_| ring(bell, queue), || {
                for index in 0..8 {
                    rig.ring.describe(index, data(), length, flags, 0);
                    rig.ring.offer(index);
                }
                if target.kind != kind::CONSOLE {
                    rig.kick();
                }
                if turn % 2 == 0 {
                    device.reset();
                } else {
                    device.write16(common::QUEUE_SELECT, queue);
                    device.write16(common::QUEUE_RESET, 1);
                    if !wait_for(|| device.read16(common::QUEUE_RESET) == 0) {
                        target.fail("does not reset its queue")
                    }
                    // SAFETY: the memory is the rings'.
                    rig.ring = unsafe { Ring::new(rings(), SIZE) };
                    // SAFETY: as above.
                    unsafe { device.set_queue(queue, SIZE, rig.ring.parts, NO_VECTOR) };
                    if !rig.request() {
                        target.fail("does not serve a queue that was reset")
                    }
                }
            });
        }
    });
}

/// Bus mastering and decoding go off and on in the midst of work.
pub fn ring_master() {
    each(|target| {
        let function = target.device.function;
        let mut rig = target.begin(0);
        for _ in 0..20 {
            // SAFETY: the attack's own device.
            unsafe { function.command(0, MASTER) };
            let (length, flags) = target.buffer();
            rig.ring.describe(0, data(), length, flags, 0);
            rig.offer(0);
            let end = rdtsc() + clock::ticks(100);
            while rdtsc() < end {}
            if rig.ring.used() != rig.ring.seen {
                target.fail("reaches memory without being allowed to")
            }
            // SAFETY: as above. Nobody answers the doorbell in between.
            unsafe {
                function.command(MASTER, MEMORY);
                ring(rig.bell, target.queue);
                let _ = read32(target.device.common);
                function.command(MEMORY, 0);
            }
            rig.kick();
            if !wait_for(|| rig.ring.take().is_some()) {
                target.fail("does not go on when it may")
            }
        }
        // The registers in the midst of all RAM, and back.
        let bar = function.read(register::BAR0);
        for place in [0, 0x10_0000, 0xfee0_0000, 0xe000_0000, 0xffff_8000] {
            // SAFETY: as above; the code of this guest lies elsewhere.
            unsafe {
                function.write(register::BAR0, place | 4);
                ring(rig.bell, target.queue);
                function.write(register::BAR0, bar);
            }
        }
        if !rig.request() {
            target.fail("does not come back to its place")
        }
    });
}

/// Messages whose table changes while they fly.
pub fn ring_messages() {
    on_interrupt(MESSAGE, handle_eoi);
    on_interrupt(MESSAGE + 1, handle_eoi);
    each(|target| {
        let Some(msix) = target.device.msix else {
            target.fail("has no messages")
        };
        let mut rig = target.begin(0);
        target.device.write16(common::QUEUE_SELECT, target.queue);
        target.device.write16(common::QUEUE_VECTOR, 1);
        target.device.write16(common::CONFIG_VECTOR, 1);
        msix.enable(true, false);
        let change = |turn: u64| match turn % 5 {
            0 => msix.set(1, 0, MESSAGE, turn & 8 != 0),
            1 => msix.set(1, 0, MESSAGE + 1, false),
            2 => msix.set(1, (turn >> 3) as u32 & 0xff, MESSAGE, false),
            // Exceptions' numbers, and messages to nowhere.
            3 => msix.set(1, 0, (turn >> 3) as u8 & 15, true),
            // SAFETY: a masked entry.
            _ => unsafe { write32(msix.table + 16, (turn as u32).wrapping_mul(0x9e37_79b9)) },
        };
        let turns = if target.kind == kind::CONSOLE { 5 } else { 200 };
        against(&change, || {
            for turn in 0..turns {
                if smp::count() < 2 {
                    change(turn);
                }
                if !with_interrupts(|| rig.request()) {
                    target.fail("stops")
                }
            }
        });
        msix.set_here(1, MESSAGE);
        let before = count(MESSAGE);
        with_interrupts(|| {
            rig.request();
            if !wait_for(|| count(MESSAGE) != before) {
                target.fail("sends no message")
            }
        });
        msix.enable(false, false);
        set_lapic(reg::TPR, 0);
    });
}

/// Frames of every length, in one piece and in several.
pub fn net_lengths() {
    each_net(|target| {
        let mut rig = target.begin(0);
        let mut send = |length: u32, pieces: u16| {
            target.buffer();
            let part = (length / u32::from(pieces)).max(1);
            for index in 0..pieces {
                let from = part * u32::from(index);
                let last = index + 1 == pieces;
                let bytes = if last {
                    length.saturating_sub(from)
                } else {
                    part
                };
                let next = if last { 0 } else { NEXT };
                let at = data() + u64::from(from);
                rig.ring.describe(index, at, bytes, next, index + 1);
            }
            rig.offer(0);
            if !wait_for(|| rig.ring.take().is_some() || target.is_broken()) {
                target.fail("holds a frame back")
            }
            if target.is_broken() {
                target.fail("breaks by a frame's length")
            }
        };
        for length in (1..200).chain((1500..1550).chain((1600..=65_535 + 12).step_by(1021))) {
            send(length, 1);
            send(length, PIECES);
        }
        for length in 65_500..=65_535 + 64 {
            send(length, 1);
        }
    });
}

/// What a virtio_net_hdr can say (virtio 1.2 §5.1.6), whether it was agreed on or not.
pub fn net_headers() {
    const OFFLOADS: u64 = 1 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 56;
    each_net(|target| {
        let mut random = random();
        for features in [0, OFFLOADS] {
            let mut rig = target.begin(features);
            for turn in 0..1_500u64 {
                target.buffer();
                let wild = [random.next(), random.next()];
                let length =
                    12 + 14 + (wild[1] >> 48) as u32 % if turn % 8 == 0 { 60_000 } else { 200 };
                let header = data() as *mut u8;
                // SAFETY: the attack's own memory.
                unsafe {
                    // Flags and kind are mostly ones that mean something.
                    header.write_volatile([0, 1, 1, 3, wild[0] as u8][turn as usize % 5]);
                    let kinds = [0, 1, 3, 4, 5, 0x81, 0x84, wild[0] as u8];
                    header.add(1).write_volatile(kinds[turn as usize % 8]);
                    for at in 1..6 {
                        let value = (wild[0] >> (8 * at)) as u16;
                        let value = if wild[1] >> at & 1 != 0 {
                            value % 64
                        } else {
                            value
                        };
                        header.cast::<u16>().add(at).write_volatile(value);
                    }
                    // An IPv4 or IPv6 packet of TCP or UDP, or what looks like one.
                    let frame = header.add(12);
                    let (ether, version) = [(0x08u8, 0x45), (0x86, 0x60)][turn as usize & 1];
                    frame.add(12).write_volatile(ether);
                    frame
                        .add(13)
                        .write_volatile(if ether == 8 { 0 } else { 0xdd });
                    frame.add(14).write_volatile(version);
                    frame
                        .add(23)
                        .write_volatile([6, 17][turn as usize >> 1 & 1]);
                    frame
                        .add(20)
                        .write_volatile([6, 17][turn as usize >> 1 & 1]);
                    frame.add(46).write_volatile((wild[1] >> 8) as u8);
                    frame.add(66).write_volatile((wild[1] >> 16) as u8);
                }
                rig.ring.describe(0, data(), length, 0, 0);
                rig.offer(0);
                if !wait_for(|| rig.ring.take().is_some() || target.is_broken()) {
                    target.fail("holds a frame back")
                }
                if target.is_broken() {
                    target.fail("breaks by a header")
                }
            }
        }
    });
}

/// Commands that are none, too long, too short, in odd pieces (virtio 1.2 §5.1.6.5).
pub fn net_control() {
    const CONTROL: u64 = 1 << 2 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23;
    each_net(|target| {
        let target = &Target {
            queue: 2,
            ..*target
        };
        let mut random = random();
        let mut rig = target.begin(CONTROL);
        let bytes = data() as *mut u8;
        for turn in 0..2_000u32 {
            let wild = random.next();
            // SAFETY: the attack's own memory.
            unsafe {
                for at in 0..64 {
                    bytes.add(at).write_volatile(random.next() as u8);
                }
                bytes.write_volatile((wild % 7) as u8);
                bytes.add(1).write_volatile((wild >> 8) as u8 % 7);
            }
            let length = [2, 3, 8, 6, 64, 1, 4096, 60_000][turn as usize % 8];
            let answer = [1, 1, 1, 2, 0, 64][turn as usize % 6];
            let first = if turn & 64 == 0 { 1 } else { 2 };
            rig.ring.describe(0, data(), first, NEXT, 1);
            let at = data() + u64::from(first);
            rig.ring.describe(1, at, length, NEXT, 2);
            rig.ring.describe(2, table(), answer, WRITE, 0);
            let head = [0, 0, 0, 0, 0, 1, 2][turn as usize % 7];
            rig.offer(head);
            if !wait_for(|| rig.ring.take().is_some() || target.is_broken()) {
                target.fail("holds a command back")
            }
            if target.is_broken() {
                rig = target.begin(CONTROL);
            }
        }
    });
}

/// Sends to everybody for ever, a full ring at a time.
pub fn net_flood() {
    let Some(target) = Target::all().find(|target| target.kind == kind::NET) else {
        println!("hostile: no virtio device");
        exit(2)
    };
    let mut rig = target.begin(0);
    let (length, flags) = target.buffer();
    let mut busy = 0u16;
    loop {
        while busy < SIZE {
            rig.ring
                .describe(rig.ring.next % SIZE, data(), length, flags, 0);
            rig.ring.offer(rig.ring.next % SIZE);
            busy += 1;
        }
        rig.kick();
        while rig.ring.take().is_some() {
            busy -= 1;
        }
    }
}

const _: () = assert!(guest_runtime::virtio::ring_bytes(SIZE) < 3 * PAGE as usize);
