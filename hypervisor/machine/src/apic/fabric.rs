//! The way between the APICs of a VM: from a pin, an MSI or an IPI to the vCPUs it is for.
//!
//! Each vCPU owns its local APIC and touches it alone. What others have for it goes into its
//! mailbox, which is made of atomics, so that nobody waits for anybody: vectors in a set like
//! that of VT-x's posted interrupts (Intel SDM Vol. 3C §30.6), signals as flags. To know whom a
//! message is for, and who would refuse it, senders look at the [`Address`] that each vCPU keeps
//! up to date there.

use super::io::PINS;
use super::{
    Address, ApicEffect, ApicMode, DeliveryMode, IoApic, Ipi, LocalApic, Message, Shorthand,
    Signals,
};
use alloc::{boxed::Box, sync::Arc};
use arch::Vector;
use core::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
};

/// The most vCPUs a VM can have.
pub const MAX_VCPUS: u32 = 64;

const NMI: u32 = 1 << 0;
const INIT: u32 = 1 << 1;
const START_UP: u32 = 1 << 2;
/// An illegal vector came.
const ERROR: u32 = 1 << 3;
/// The 8259's output changed.
const LINT0: u32 = 1 << 4;
/// A halt is to end.
const UNHALT: u32 = 1 << 5;
/// The page of a start-up.
const PAGE_SHIFT: u32 = 8;

/// A vCPU's mailbox, in cache lines of its own.
#[derive(Default)]
#[repr(align(64))]
struct Mailbox {
    /// There is something in it, and its vCPU knows or is being told.
    signalled: AtomicBool,
    signals: AtomicU32,
    /// Set by the owner.
    address: AtomicU64,
    requested: [AtomicU64; 4],
    /// Which of the requested vectors are level-triggered.
    level: [AtomicU64; 4],
}

/// Carries messages between the APICs of a VM. APIC ids are vCPU numbers.
pub struct ApicFabric {
    mailboxes: Box<[Mailbox]>,
    /// vCPUs that got something since [`ApicFabric::take_kicks`].
    kicks: AtomicU64,
    /// The output of the 8259A pair, which is wired to LINT0 of every local APIC.
    extint: AtomicBool,
    /// Whom pin 0 of the I/O APIC passes the 8259's output to: 0, or a message with bit 63 set.
    extint_route: AtomicU64,
    /// Whose turn it is among equals.
    turn: AtomicU32,
}

impl ApicFabric {
    /// The ways between `vcpus` (1 to [`MAX_VCPUS`]) vCPUs, none of which has told its address.
    #[must_use]
    pub fn new(vcpus: u32) -> Self {
        Self {
            mailboxes: (0..vcpus.clamp(1, MAX_VCPUS))
                .map(|_| Mailbox::default())
                .collect(),
            kicks: AtomicU64::new(0),
            extint: AtomicBool::new(false),
            extint_route: AtomicU64::new(0),
            turn: AtomicU32::new(0),
        }
    }

    /// How many vCPUs there are.
    #[must_use]
    pub fn vcpus(&self) -> usize {
        self.mailboxes.len()
    }

    // ---- the owner's side ----

    /// Tells the others how `apic` is addressed now: after each effect
    /// [`Reachable`](super::ApicEffect::Reachable), and after any change of mode.
    pub fn publish(&self, apic: &mut LocalApic) {
        if let Some(mailbox) = self.mailboxes.get(apic.id() as usize) {
            mailbox.address.store(apic.address().0, Release);
        }
        apic.set_lint(0, self.extint.load(Acquire));
    }

    /// Tells the others that `apic` had an INIT, which also takes away what came for it before.
    pub fn publish_init(&self, apic: &mut LocalApic) {
        self.publish(apic);
        if let Some(mailbox) = self.mailboxes.get(apic.id() as usize) {
            mailbox
                .requested
                .iter()
                .for_each(|word| word.store(0, SeqCst));
        }
    }

    /// Whether there is something to [`ApicFabric::collect`].
    #[inline(always)]
    #[must_use]
    pub fn is_signalled(&self, vcpu: usize) -> bool {
        self.mailboxes
            .get(vcpu)
            .is_some_and(|mailbox| mailbox.signalled.load(Relaxed))
    }

    /// Has a vCPU look at everything again.
    pub fn signal(&self, vcpu: usize) {
        if let Some(mailbox) = self.mailboxes.get(vcpu)
            && !mailbox.signalled.swap(true, SeqCst)
        {
            self.kicks.fetch_or(1 << (vcpu & 63), SeqCst);
        }
    }

    /// Moves what came for `apic` into it. `true`: its vCPU was asked to leave its halt.
    pub fn collect(&self, apic: &mut LocalApic) -> bool {
        let Some(mailbox) = self.mailboxes.get(apic.id() as usize) else {
            return false;
        };
        // First the flag: what comes later sets it again.
        if !mailbox.signalled.swap(false, SeqCst) {
            return false;
        }
        for (word, (requested, level)) in (0..).zip(mailbox.requested.iter().zip(&mailbox.level)) {
            if requested.load(Relaxed) == 0 {
                continue;
            }
            let mut bits = requested.swap(0, SeqCst);
            let level = level.load(Relaxed);
            while bits != 0 {
                let bit = bits.trailing_zeros();
                apic.request(Vector((word * 64 + bit) as u8), level >> bit & 1 != 0);
                bits &= bits - 1;
            }
        }
        if mailbox.signals.load(Relaxed) == 0 {
            return false;
        }
        let signals = mailbox.signals.swap(0, SeqCst);
        if signals & LINT0 != 0 {
            apic.set_lint(0, self.extint.load(Acquire));
        }
        if signals & ERROR != 0 {
            apic.receive_error();
        }
        apic.add_signals(Signals {
            init: signals & INIT != 0,
            startup: (signals & START_UP != 0).then_some((signals >> PAGE_SHIFT) as u8),
            nmi: signals & NMI != 0,
        });
        signals & UNHALT != 0
    }

    /// Whether the 8259's output is up and would be taken by this vCPU: through LINT0, or through
    /// pin 0 of the I/O APIC programmed as ExtINT.
    #[must_use]
    pub fn extint_for(&self, apic: &LocalApic) -> bool {
        self.extint.load(Acquire) && (apic.accepts_extint() || self.is_routed(apic.address()))
    }

    fn is_routed(&self, address: Address) -> bool {
        let route = self.extint_route.load(Acquire);
        route != 0
            && address.is_destination(&Message {
                vector: Vector(0),
                mode: DeliveryMode::ExtInt,
                logical: route >> 32 & 1 != 0,
                dest: route as u32,
                level: false,
            })
    }

    /// Does what a write to `apic` has left to do; `true`: and the rest of it is for
    /// [`Router::finish`].
    #[inline]
    #[must_use]
    pub fn apply(&self, apic: &mut LocalApic, effect: ApicEffect) -> bool {
        match effect {
            ApicEffect::None | ApicEffect::Timer => false,
            ApicEffect::Ipi => {
                self.send(apic.id() as usize, &apic.outgoing());
                false
            }
            ApicEffect::Reachable => {
                self.publish(apic);
                true
            }
            ApicEffect::Eoi(_) => true,
        }
    }

    // ---- the senders' side ----

    /// Whether [`ApicFabric::take_kicks`] has something to give.
    #[inline(always)]
    #[must_use]
    pub fn has_kicks(&self) -> bool {
        self.kicks.load(Relaxed) != 0
    }

    /// A set of the vCPUs that got something since the last call, by bit number: wake them, or
    /// have them leave guest mode. Whoever delivers something calls this afterwards.
    pub fn take_kicks(&self) -> u64 {
        if self.has_kicks() {
            self.kicks.swap(0, SeqCst)
        } else {
            0
        }
    }

    fn address(&self, vcpu: usize) -> Address {
        let mailbox = self.mailboxes.get(vcpu);
        Address(mailbox.map_or(0, |mailbox| mailbox.address.load(Acquire)))
    }

    /// Delivers a message from a pin or a device; `false` if nobody took it.
    pub fn deliver(&self, message: &Message) -> bool {
        self.deliver_but(message, usize::MAX)
    }

    fn deliver_but(&self, message: &Message, except: usize) -> bool {
        // By far the most: one CPU by its id.
        if !message.logical && message.dest != Message::ALL {
            let target = message.dest as usize;
            return target != except && self.take(target, message);
        }
        let all = 0..self.mailboxes.len();
        if message.mode == DeliveryMode::LowestPriority {
            // Priorities change without a word in the guests' own pages; who is enabled and
            // addressed takes turns, as on chipsets that are not told priorities either.
            let turn = self.turn.fetch_add(1, Relaxed) as usize % all.len();
            let mut targets = (turn..all.len()).chain(0..turn).filter(|&target| {
                let address = self.address(target);
                target != except && address.is_enabled() && address.is_destination(message)
            });
            return targets
                .next()
                .is_some_and(|target| self.take(target, message));
        }
        let mut taken = false;
        for target in all {
            taken |= target != except && self.take(target, message);
        }
        taken
    }

    /// Gives `message` to a vCPU if it is for that one and not lost there.
    fn take(&self, target: usize, message: &Message) -> bool {
        let Some(mailbox) = self.mailboxes.get(target) else {
            return false;
        };
        let address = Address(mailbox.address.load(Acquire));
        if address.mode() == ApicMode::Disabled || !address.is_destination(message) {
            return false;
        }
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if !address.is_enabled() {
                    return false;
                }
                let vector = message.vector.0;
                if vector < 16 {
                    mailbox.signals.fetch_or(ERROR, SeqCst);
                    self.signal(target);
                    return false;
                }
                let (word, bit) = (usize::from(vector >> 6), 1 << (vector & 63));
                if message.level {
                    mailbox.level[word].fetch_or(bit, SeqCst);
                } else if mailbox.level[word].load(Relaxed) & bit != 0 {
                    mailbox.level[word].fetch_and(!bit, SeqCst);
                }
                mailbox.requested[word].fetch_or(bit, SeqCst);
            }
            DeliveryMode::Nmi => _ = mailbox.signals.fetch_or(NMI, SeqCst),
            // An INIT takes a start-up that came before it out of the way.
            DeliveryMode::Init => {
                mailbox.change(|signals| signals & !START_UP | INIT);
            }
            DeliveryMode::StartUp => {
                let page = u32::from(message.vector.0) << PAGE_SHIFT;
                mailbox.change(|signals| signals & !(0xff << PAGE_SHIFT) | page | START_UP);
            }
            // There is no SMM here; ExtINT is a line to the 8259, not a message.
            DeliveryMode::Smi | DeliveryMode::ExtInt | DeliveryMode::Reserved => return false,
        }
        self.signal(target);
        true
    }

    /// Routes an IPI from vCPU `from`.
    pub fn send(&self, from: usize, ipi: &Ipi) {
        let all = Message {
            dest: Message::ALL,
            logical: false,
            ..ipi.message
        };
        match ipi.shorthand {
            Shorthand::None => self.deliver(&ipi.message),
            Shorthand::SelfOnly => self.take(from, &all),
            Shorthand::All => self.deliver(&all),
            Shorthand::Others => self.deliver_but(&all, from),
        };
    }

    /// A message-signalled interrupt: a device's write of `data` to `address`. `false` if it is
    /// none or nobody took it.
    pub fn msi(&self, address: u64, data: u32) -> bool {
        Message::from_msi(address, data).is_some_and(|message| self.deliver(&message))
    }

    /// Raises an NMI at a vCPU.
    pub fn inject_nmi(&self, vcpu: usize) {
        self.post(vcpu, NMI);
    }

    /// Asks a vCPU to leave its halt, whatever its interrupt flag says.
    pub fn unhalt(&self, vcpu: usize) {
        self.post(vcpu, UNHALT);
    }

    fn post(&self, vcpu: usize, signal: u32) {
        if let Some(mailbox) = self.mailboxes.get(vcpu) {
            mailbox.signals.fetch_or(signal, SeqCst);
            self.signal(vcpu);
        }
    }

    /// Sets the level of the 8259's output.
    fn set_extint(&self, asserted: bool) {
        self.extint.store(asserted, SeqCst);
        for (vcpu, mailbox) in self.mailboxes.iter().enumerate() {
            let address = Address(mailbox.address.load(Acquire));
            if address.hears_lint0() || self.is_routed(address) {
                mailbox.signals.fetch_or(LINT0, SeqCst);
                // Only a rise asks for something; a fall is seen with the next thing.
                if asserted {
                    self.signal(vcpu);
                }
            }
        }
    }
}

impl Mailbox {
    fn change(&self, with: impl Fn(u32) -> u32) {
        let _ = self
            .signals
            .fetch_update(SeqCst, Relaxed, |signals| Some(with(signals)));
    }
}

/// From the pins to the local APICs: the I/O APIC, and the 8259's output.
pub struct Router {
    /// The I/O APIC.
    pub io: IoApic,
    fabric: Arc<ApicFabric>,
}

impl Router {
    /// An I/O APIC after power-on.
    #[must_use]
    pub fn new(vcpus: u32) -> Self {
        Self {
            io: IoApic::default(),
            fabric: Arc::new(ApicFabric::new(vcpus)),
        }
    }

    /// What carries the messages.
    #[must_use]
    pub const fn fabric(&self) -> &Arc<ApicFabric> {
        &self.fabric
    }

    /// RESET of the machine.
    pub fn reset(&mut self) {
        self.io.reset();
        self.route_extint();
    }

    /// Puts a saved I/O APIC in place.
    pub fn restore(&mut self, io: IoApic) {
        self.io = io;
        self.route_extint();
    }

    /// Sets the level of a global system interrupt, a pin of the I/O APIC. Pin 0 is that of the
    /// 8259: see [`Router::set_extint`].
    #[inline]
    pub fn set_gsi(&mut self, gsi: u32, asserted: bool) {
        let pin = gsi as usize;
        if let Some(edge) = self.io.set_pin(pin, asserted) {
            self.fabric.deliver(&edge);
        } else if asserted {
            self.service(pin);
        }
    }

    /// Sets the level of the 8259's output.
    pub fn set_extint(&self, asserted: bool) {
        self.fabric.set_extint(asserted);
    }

    /// A message-signalled interrupt, as [`ApicFabric::msi`].
    pub fn msi(&self, address: u64, data: u32) -> bool {
        self.fabric.msi(address, data)
    }

    fn service(&mut self, pin: usize) {
        if let Some(message) = self.io.level_message(pin)
            && self.fabric.deliver(&message)
        {
            self.io.level_taken(pin);
        }
    }

    fn service_all(&mut self, mut pins: u32) {
        while pins != 0 {
            self.service(pins.trailing_zeros() as usize);
            pins &= pins - 1;
        }
    }

    /// Does what [`ApicFabric::apply`] left: the end of a level-triggered interrupt; and level-
    /// triggered pins that nobody would take are tried again.
    pub fn finish(&mut self, effect: ApicEffect) {
        let pins = match effect {
            ApicEffect::Eoi(vector) => self.io.eoi(vector),
            ApicEffect::Reachable => (1 << PINS) - 1,
            ApicEffect::None | ApicEffect::Timer | ApicEffect::Ipi => 0,
        };
        self.service_all(pins);
    }

    /// Writes in the I/O APIC's MMIO window.
    pub fn write_io(&mut self, offset: u16, value: u32) {
        let pins = self.io.write(offset, value);
        if pins & 1 != 0 {
            self.route_extint();
        }
        self.service_all(pins);
    }

    fn route_extint(&self) {
        let route = self.io.extint().map_or(0, |message| {
            1 << 63 | u64::from(message.logical) << 32 | u64::from(message.dest)
        });
        self.fabric.extint_route.store(route, Release);
        // Who hears the 8259 has changed.
        self.fabric.set_extint(self.fabric.extint.load(Acquire));
    }
}
