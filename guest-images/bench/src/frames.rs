//! Frames from one guest to another at saturation: what they cost both in exits, and how many
//! instructions one takes.
//!
//! The taker leads by frames of its own: [`GO`] with a length has the sender send such frames
//! without end, [`BEGIN`] and [`END`] bound what is counted, [`QUIT`] ends it. Both behave as a
//! usual driver does: the sender rings for each frame if the device wants to hear of it, and halts
//! when its ring is full; the taker's interrupts are off while it takes, and it halts when there is
//! nothing more.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};
use guest_runtime::cpu::{self, rdtsc};
use guest_runtime::pc::{has_x2apic, is_intel, reg, set_lapic, set_x2apic, x2apic};
use guest_runtime::virtio::{NO_VECTOR, Ring, Virtio, WRITE, common, feature, kind, ring};
use guest_runtime::{Frame, clock, on_interrupt, println};

/// The interrupt of the card.
const VECTOR: u8 = 0x50;
/// virtio_net_hdr in front of each frame (virtio 1.2 §5.1.6).
const HEADER: usize = 12;
const LARGEST: u16 = 512;
const BUFFER: usize = 1536;
const RING: usize = guest_runtime::virtio::ring_bytes(LARGEST);
/// Local experimental Ethertype (IEEE 802).
const TYPE: [u8; 2] = [0x88, 0xb5];
/// Where a frame says what it is; behind that is a number of eight bytes.
const WHAT: usize = 14;
const NUMBER: usize = 16;
/// What a frame is.
const DATA: u8 = 0;
const GO: u8 = 1;
const BEGIN: u8 = 2;
const END: u8 = 3;
const QUIT: u8 = 4;
/// Frames of these lengths are sent.
const LENGTHS: [usize; 2] = [64, 1500];
/// Frames before those that count.
const WARM_UP: u64 = 2_000;
/// How often the taker asks for frames until some come, in microseconds.
const PATIENCE: u64 = 2_000;
/// Tessera's hypercall for the exits of this vCPU (`abi::hypercall::EXITS`), and its reasons.
const EXITS: u64 = 0x5465_0004;
const REASONS: [&str; 11] = [
    "cpuid",
    "hypercall",
    "rdmsr",
    "wrmsr",
    "port",
    "apic",
    "memory",
    "hlt",
    "interrupt",
    "window",
    "other",
];

#[repr(C, align(4096))]
struct Memory(UnsafeCell<[[u8; RING + BUFFER * LARGEST as usize]; 2]>);

// SAFETY: `Card::open` gives it away, and is called once.
unsafe impl Sync for Memory {}

static MEMORY: Memory = Memory(UnsafeCell::new([[0; _]; 2]));
/// An interrupt came since the rings were looked at.
static CAME: AtomicBool = AtomicBool::new(false);

fn message(_: &mut Frame) {
    CAME.store(true, Ordering::Relaxed);
    // Straight to the register: to ask for the mode first would be an exit of its own.
    // SAFETY: the guest is in x2APIC mode.
    unsafe { cpu::wrmsr(x2apic(reg::EOI), 0) };
}

/// Exits of this vCPU by reason.
fn exits() -> [u64; REASONS.len()] {
    core::array::from_fn(|reason| {
        let count: u64;
        // SAFETY: the call changes RAX alone; RBX is put back.
        unsafe {
            if is_intel() {
                core::arch::asm!("xchg rbx, {r}", "vmcall", "xchg rbx, {r}",
                    r = inout(reg) reason as u64 => _, inout("rax") EXITS => count);
            } else {
                core::arch::asm!("xchg rbx, {r}", "vmmcall", "xchg rbx, {r}",
                    r = inout(reg) reason as u64 => _, inout("rax") EXITS => count);
            }
        }
        count
    })
}

/// Prints what was counted between two looks, less what the second look takes itself.
fn print_exits(role: &str, length: usize, [before, after]: [[u64; REASONS.len()]; 2]) {
    for ((reason, before), after) in REASONS.iter().zip(before).zip(after) {
        let own = if *reason == "hypercall" {
            REASONS.len() as u64
        } else {
            0
        };
        let count = (after - before).saturating_sub(own);
        if count != 0 {
            println!("bench {role}-{length}-{reason} {count} exits");
        }
    }
}

/// A card with one pair of rings.
struct Card {
    size: u16,
    /// Received, and to be sent.
    rings: [Ring; 2],
    doorbells: [u64; 2],
    buffers: [u64; 2],
    mac: [u8; 6],
    /// Frames that are with the device.
    flying: u16,
    /// The next buffer to be sent.
    next: u16,
}

impl Card {
    fn open(size: u16) -> Option<Self> {
        let device = Virtio::first(kind::NET).filter(|_| has_x2apic())?;
        device.negotiate(feature::VERSION_1 | 1 << 5)?;
        on_interrupt(VECTOR, message);
        let msix = device.msix?;
        msix.enable(true, false);
        msix.set_here(0, VECTOR);
        set_x2apic(true);
        set_lapic(reg::SVR, 0x1ff);
        let parts = MEMORY.0.get() as u64;
        let bases = [parts, parts + (RING + BUFFER * usize::from(LARGEST)) as u64];
        device.write16(common::CONFIG_VECTOR, NO_VECTOR);
        let mut card = Self {
            size,
            // SAFETY: the memory is the card's alone.
            rings: bases.map(|base| unsafe { Ring::new(base, size) }),
            doorbells: [0, 1].map(|queue| device.doorbell(queue)),
            buffers: bases.map(|base| base + RING as u64),
            mac: [0, 1, 2, 3, 4, 5].map(|at| device.config8(at)),
            flying: 0,
            next: 0,
        };
        for queue in 0..2 {
            let parts = card.rings[usize::from(queue)].parts;
            // SAFETY: as above; the descriptors lead to the card's buffers.
            unsafe { device.set_queue(queue, size, parts, 0) };
        }
        card.rings[1].hush(true);
        for index in 0..size {
            card.give(index);
        }
        device.go();
        ring(card.doorbells[0], 0);
        Some(card)
    }

    /// Gives the device a buffer to fill.
    fn give(&mut self, index: u16) {
        let at = self.buffers[0] + BUFFER as u64 * u64::from(index % self.size);
        self.rings[0].describe(index, at, BUFFER as u32, WRITE, 0);
        self.rings[0].offer(index);
    }

    /// Halts until `news`, with interrupts of this ring on.
    fn wait(&mut self, which: usize, mut news: impl FnMut(&mut Self) -> bool) {
        CAME.store(false, Ordering::Relaxed);
        self.rings[which].hush(false);
        // One that came in between is not told.
        if !news(self) {
            while !CAME.load(Ordering::Relaxed) {
                cpu::wait_for_interrupt();
            }
        }
        self.rings[which].hush(true);
    }

    /// The next frame that came: what it is, its number, and the sender.
    fn take(&mut self) -> Option<(u8, u64, [u8; 6])> {
        let (head, _) = self.rings[0].take()?;
        let at = self.buffers[0] + BUFFER as u64 * u64::from(head % self.size) + HEADER as u64;
        // SAFETY: the device has given the buffer back, which is longer than this.
        let head_bytes = unsafe { (at as *const [u8; NUMBER + 8]).read_volatile() };
        self.give(head);
        let number = head_bytes[NUMBER..].first_chunk().copied();
        let from = head_bytes[6..].first_chunk().copied();
        Some((
            head_bytes[WHAT],
            u64::from_le_bytes(number.unwrap_or_default()),
            from.unwrap_or_default(),
        ))
    }

    fn take_back(&mut self) {
        while self.rings[1].take().is_some() {
            self.flying -= 1;
        }
    }

    /// Sends a frame; rings if the device wants to hear of it.
    fn send(&mut self, to: [u8; 6], what: u8, number: u64, length: usize) {
        if self.flying == self.size {
            self.take_back();
        }
        while self.flying == self.size {
            self.wait(1, |card| {
                card.take_back();
                card.flying < card.size
            });
            self.take_back();
        }
        let index = self.next % self.size;
        self.next = (index + 1) % self.size;
        self.flying += 1;
        let at = self.buffers[1] + BUFFER as u64 * u64::from(index);
        let mut head = [0; NUMBER + 8];
        head[..6].copy_from_slice(&to);
        head[6..12].copy_from_slice(&self.mac);
        head[12..14].copy_from_slice(&TYPE);
        head[WHAT] = what;
        head[NUMBER..].copy_from_slice(&number.to_le_bytes());
        // SAFETY: the buffer is not with the device. Its header is and stays zero.
        unsafe { ((at + HEADER as u64) as *mut [u8; NUMBER + 8]).write_volatile(head) };
        self.rings[1].describe(index, at, (HEADER + length) as u32, 0, 0);
        self.rings[1].offer(index);
        if self.rings[1].wants_notice() {
            ring(self.doorbells[1], 1);
        }
    }
}

/// Sends what the taker asks for.
fn send(card: &mut Card) {
    let (mut to, mut length, mut number) = ([0; 6], 0, 0);
    let (mut before, mut first) = ([0; REASONS.len()], 0);
    loop {
        match card.take() {
            Some((GO, wanted, from)) => (length, to) = (wanted as usize, from),
            Some((BEGIN, ..)) => (before, first) = (exits(), number),
            Some((END, ..)) => {
                let after = exits();
                print_exits("send", length, [before, after]);
                println!("bench send-{length} {} frames", number - first);
                length = 0;
            }
            Some((QUIT, ..)) => return,
            Some(_) => {}
            None if length == 0 => {
                card.wait(0, |card| card.rings[0].used() != card.rings[0].seen);
            }
            None => {
                card.send(to, DATA, number, length);
                number += 1;
            }
        }
    }
}

const ALL: [u8; 6] = [0xff; 6];

/// Takes until `count` frames came beyond the first; how many instructions that took, how many
/// frames were lost meanwhile, and the exits before and after.
fn take_frames(card: &mut Card, count: u64, length: usize) {
    let mut got = 0;
    let (mut start, mut lost, mut next) = (0, 0, 0);
    let mut before = [0; REASONS.len()];
    let mut asked = None;
    loop {
        match card.take() {
            Some((DATA, number, _)) => {
                lost += number.wrapping_sub(next);
                next = number + 1;
                got += 1;
                if got == WARM_UP {
                    before = exits();
                    card.send(ALL, BEGIN, 0, 64);
                    (start, lost) = (rdtsc(), 0);
                }
                if got == WARM_UP + count {
                    break;
                }
            }
            Some(_) => {}
            None if got == 0 && asked.is_none_or(|at| rdtsc() > at) => {
                card.send(ALL, GO, length as u64, 64);
                asked = Some(rdtsc() + clock::ticks(PATIENCE));
            }
            None if got == 0 => core::hint::spin_loop(),
            None => card.wait(0, |card| card.rings[0].used() != card.rings[0].seen),
        }
    }
    let took = rdtsc() - start;
    let after = exits();
    card.send(ALL, END, 0, 64);
    print_exits("take", length, [before, after]);
    println!("bench take-{length} {count} frames");
    println!("bench lost-{length} {lost} frames");
    println!("bench took-{length} {took} instructions");
    // What is on its way yet.
    let quiet = rdtsc() + clock::ticks(5 * PATIENCE);
    while rdtsc() < quiet {
        let _ = card.take();
    }
}

/// One of the two, by a command line's numbers: the ring's entries; the taker's frames come first.
pub fn measure(sends: bool, numbers: &str) {
    let mut numbers = numbers.split(',').map(str::parse);
    let frames = if sends { Some(Ok(0)) } else { numbers.next() };
    let (Some(Ok(frames)), Some(Ok(size))) = (frames, numbers.next()) else {
        println!("# frames: take=<frames>,<ring> or send=<ring>");
        return;
    };
    let size = (size as u16).clamp(16, LARGEST);
    if !size.is_power_of_two() {
        println!("# frames: a ring of {size} is no power of two");
        return;
    }
    let Some(mut card) = Card::open(size) else {
        println!("# frames: needs a network card and x2APIC");
        return;
    };
    if sends {
        send(&mut card);
        return;
    }
    for length in LENGTHS {
        take_frames(&mut card, frames, length);
    }
    card.send(ALL, QUIT, 0, 64);
    // The frame leaves while the guest still runs.
    let quiet = rdtsc() + clock::ticks(PATIENCE);
    while rdtsc() < quiet {
        core::hint::spin_loop();
    }
}
