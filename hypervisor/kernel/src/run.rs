//! The run loop of each core: ask the scheduler for a vCPU, run it until something wants the core,
//! repeat.
//!
//! A core owns the vCPU that it runs: it takes it out of its seat, and puts it back when it turns
//! to another. Nothing is locked while a guest runs. What a core leaves for another (an order to a
//! VM, an interrupt for a vCPU, a better vCPU for the core) is written down first, then the core is
//! kicked.

use crate::backend::{AnyVm, Backend, Guest};
use crate::bring_up::Host;
use crate::console;
use crate::cores::watch;
use crate::lock::Lock;
use crate::manager::{Manager, Over};
use crate::network::Network;
use crate::uplinks;
use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::Nanos;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use cpu::percpu::{Core, this};
use hw::CoreTimer;
use sched::{CoreId, CoreSet, Decision, Scheduler, VcpuId, VmId};
use virtio::net::Ask;
use vm::config::{Config, MAX_VMS};
use vm::dump::Dump;
use vm::exits::Exits;
use vm::{End, Order, Seats, Stop};

/// How often the serial port is polled where it has no interrupt, in nanoseconds.
const POLL: u64 = 10_000_000;

/// Every core that is started can be given work.
const _: () = assert!(hw::acpi::MAX_PROCESSORS <= sched::MAX_CORES as usize);

/// How often switches without a card of the machine are looked after, in nanoseconds.
const AGEING: u64 = 1_000_000_000;

static SERIAL_FIRED: AtomicBool = AtomicBool::new(false);
static POLL_SERIAL: AtomicBool = AtomicBool::new(false);

/// The serial port has no interrupt: look at it on every tick.
pub fn poll_serial() {
    POLL_SERIAL.store(true, Ordering::Relaxed);
}

/// A non-maskable interrupt of the machine. It may hit anywhere, so it takes no lock.
pub fn host_nmi() {
    this().nmis.fetch_add(1, Ordering::Relaxed);
}

/// An interrupt of the machine's devices.
pub fn host_interrupt() {
    SERIAL_FIRED.store(true, Ordering::Relaxed);
}

/// What all cores share.
pub struct Machine {
    /// The physical machine.
    pub host: &'static Host,
    /// The vendor's way to make VMs.
    pub backend: &'static dyn Backend,
    /// The cores' time.
    pub clock: Clock,
    /// The switches.
    pub network: Network,
    /// Who runs where.
    pub scheduler: Lock<Scheduler>,
    /// The VMs that have memory and vCPUs, by number.
    slots: [Lock<Option<Arc<Live>>>; MAX_VMS],
    /// The vCPUs of all of them.
    vcpus: AtomicU32,
    /// VMs, by bit number, all of whose vCPUs left the cores by order.
    gone: AtomicU32,
}

/// A VM that has memory and vCPUs.
pub struct Live {
    /// What its vCPUs share.
    pub vm: Arc<AnyVm>,
    id: VmId,
    seats: Seats<Box<dyn Guest>>,
    exits: Box<[Arc<Exits>]>,
    /// How it ended, and whether its structures are whole.
    end: Lock<Option<(End, bool)>>,
}

impl Live {
    /// A VM whose vCPUs sit in their places.
    pub fn new(number: usize, vm: Arc<AnyVm>, vcpus: Vec<Box<dyn Guest>>) -> Self {
        Self {
            vm,
            id: VmId(number as u16),
            exits: vcpus.iter().map(|vcpu| vcpu.exits()).collect(),
            seats: Seats::new(vcpus),
            end: Lock::new(None),
        }
    }

    /// How it ended, if by itself, and whether its structures are whole.
    pub fn take_end(&self) -> Option<(End, bool)> {
        self.end.lock().take()
    }

    /// Whether all vCPUs have left the cores by order.
    pub fn is_out(&self) -> bool {
        self.seats.are_out()
    }

    /// Takes a VM that [`Live::is_out`] apart: what its vCPUs share, and those. The cores that ran it
    /// last may have yet to let go of it, and are waited for: what it holds is free when this is.
    pub fn take_apart(mut self: Arc<Self>) -> (Arc<AnyVm>, Vec<Box<dyn Guest>>) {
        loop {
            match Arc::try_unwrap(self) {
                Ok(Self { vm, seats, .. }) => return (vm, seats.empty().collect()),
                Err(shared) => self = shared,
            }
            core::hint::spin_loop();
        }
    }

    /// What the vCPUs stand at, of a VM that [`Live::is_out`]. None may be loaded on this core.
    pub fn dump(&self) -> Vec<Dump> {
        let vcpus = 0..self.vm.vcpus();
        vcpus
            .filter_map(|index| self.seats.look(index, |vcpu| vcpu.dump()))
            .collect()
    }

    /// The exits of each vCPU.
    pub fn exits(&self) -> impl Iterator<Item = &Exits> {
        self.exits.iter().map(|exits| &**exits)
    }

    /// A vCPU's name for the scheduler.
    pub fn vcpu_id(&self, index: usize) -> VcpuId {
        VcpuId {
            vm: self.id,
            index: index as u16,
        }
    }
}

/// The cores' time: nanoseconds since the guests were made.
pub struct Clock {
    hz: u64,
    origin: u64,
}

impl Clock {
    /// Nanoseconds from here on.
    pub fn new(hz: u64) -> Self {
        Self {
            hz,
            origin: hw::rdtsc(),
        }
    }
    /// Now.
    pub fn now(&self) -> Nanos {
        self.at(hw::rdtsc())
    }
    /// When the TSC reads this; `u64::MAX` is never.
    pub fn at(&self, tsc: u64) -> Nanos {
        if tsc == u64::MAX {
            return Nanos::NEVER;
        }
        Nanos::from_ticks(tsc.saturating_sub(self.origin), self.hz)
    }
    /// What the TSC reads then.
    pub fn tsc_at(&self, when: Nanos) -> u64 {
        if when == Nanos::NEVER {
            u64::MAX
        } else {
            self.origin + when.to_ticks(self.hz) + 1
        }
    }
}

impl Machine {
    /// A machine without VMs, all of whose cores may run some.
    pub fn new(host: &'static Host, backend: &'static dyn Backend, config: &Config) -> Self {
        let clock = Clock::new(host.tsc_hz);
        let mut scheduler = Scheduler::new();
        for core in host.cores {
            scheduler.add_core(CoreId(core.number() as u16), clock.now());
        }
        Self {
            host,
            backend,
            clock,
            network: Network::new(config, host.cores.len()),
            scheduler: Lock::new(scheduler),
            slots: [const { Lock::new(None) }; MAX_VMS],
            vcpus: AtomicU32::new(0),
            gone: AtomicU32::new(0),
        }
    }

    /// The VM of this number, if it has memory and vCPUs.
    pub fn live(&self, number: usize) -> Option<Arc<Live>> {
        self.slots.get(number)?.lock().clone()
    }

    /// Puts a VM in its slot, or takes it out.
    pub fn set_live(&self, number: usize, live: Option<Arc<Live>>) -> Option<Arc<Live>> {
        let count = |live: &Option<Arc<Live>>| live.as_ref().map_or(0, |live| live.vm.vcpus());
        let added = count(&live) as u32;
        if let Some(live) = &live {
            self.network.set_links(self, live, true);
        }
        let old = core::mem::replace(&mut *self.slots.get(number)?.lock(), live);
        if let Some(old) = old.as_ref().filter(|_| added == 0) {
            self.network.set_links(self, old, false);
        }
        self.vcpus.fetch_add(added, Ordering::Relaxed);
        self.vcpus.fetch_sub(count(&old) as u32, Ordering::Relaxed);
        old
    }

    /// Whether there are more vCPUs than cores.
    fn is_crowded(&self) -> bool {
        self.vcpus.load(Ordering::Relaxed) as usize > self.host.cores.len()
    }

    /// VMs, by bit number, all of whose vCPUs have left the cores since the last call.
    pub fn take_gone(&self) -> u32 {
        self.gone.swap(0, Ordering::SeqCst)
    }

    /// Works on the schedule, and calls the cores that are to look at it again.
    pub fn schedule<T>(&self, work: impl FnOnce(&mut Scheduler, Nanos) -> T) -> T {
        let mut scheduler = self.scheduler.lock();
        let result = work(&mut scheduler, self.clock.now());
        let kicks = scheduler.kicks();
        drop(scheduler);
        if !kicks.is_empty() {
            self.reschedule(kicks);
        }
        result
    }

    fn reschedule(&self, cores: CoreSet) {
        for CoreId(number) in cores.iter() {
            if let Some(core) = self.host.cores.get(usize::from(number)) {
                core.reschedule.store(true, Ordering::SeqCst);
                if core.number() != this().number() {
                    self.host.kick(core.number());
                }
            }
        }
    }

    /// Has the boot core look at what was left for the manager.
    fn call_manager(&self) {
        self.reschedule(CoreSet::only(CoreId(0)));
    }

    /// Has vCPUs look at what came for them.
    pub fn kick(&self, live: &Live, mut vcpus: u64) {
        while vcpus != 0 {
            let index = vcpus.trailing_zeros() as usize;
            vcpus &= vcpus - 1;
            match live.seats.core(index) {
                None => self.wake(live, index),
                Some(core) if core == this().number() => {}
                Some(core) => self.host.kick(core),
            }
        }
    }

    /// Wakes a vCPU, unless it left the cores by order.
    fn wake(&self, live: &Live, index: usize) {
        self.schedule(|scheduler, now| {
            if live.seats.may_wake(index) {
                scheduler.wake(live.vcpu_id(index), now);
            }
        });
    }

    /// Kicks whom an action on the VM from outside was for.
    pub fn kick_touched(&self, live: &Live) {
        self.kick(live, live.vm.take_kicks());
    }

    /// Gives all vCPUs of a VM an order. They carry it out on their cores; who sleeps is woken for
    /// it.
    pub fn order(&self, live: &Live, order: Order) {
        live.vm.set_order(order);
        if order == Order::Run {
            self.schedule(|_, _| live.seats.let_in());
        }
        let _ = live.vm.take_kicks();
        self.kick(live, live.seats.all());
    }

    /// Ends a VM; unless `sound`, its structures may be half done.
    fn end(&self, live: &Live, end: End, sound: bool) {
        // The first end counts, but an unsound one is the end of all.
        let mut first = live.end.lock();
        match &mut *first {
            Some((_, whole)) => *whole &= sound,
            None => *first = Some((end, sound)),
        }
        drop(first);
        let order = if sound { Order::Stop } else { Order::Abandon };
        self.order(live, order);
    }

    /// Work for a VM was given up: it ends, and its structures are not to be trusted.
    pub fn give_up(&self, live: &Live) {
        let cause = "the hypervisor failed while it worked for this VM".to_string();
        self.end(live, End::Crashed(cause), false);
        // Those that were paused are off the cores already.
        if live.is_out() {
            self.announce(live.id);
        }
    }

    /// All vCPUs of a VM are off the cores: a case for the manager.
    fn announce(&self, vm: VmId) {
        self.gone.fetch_or(1 << (vm.0 & 31), Ordering::SeqCst);
        self.call_manager();
    }
}

/// What the guests' rooms need of the machine while one runs.
pub struct CoreHost<'a> {
    machine: &'static Machine,
    live: &'a Live,
    core: &'static Core,
    timer: &'a mut CoreTimer,
    /// TSC at which the core is wanted for something else.
    slice_end: u64,
}

impl vm::Host for CoreHost<'_> {
    fn tsc(&self) -> u64 {
        hw::rdtsc()
    }
    fn kick(&mut self, vcpus: u64) -> bool {
        self.machine.kick(self.live, vcpus);
        self.core.reschedule.load(Ordering::Relaxed)
    }
    fn turn_end(&self) -> u64 {
        self.slice_end
    }
    fn arm(&mut self, deadline: u64) {
        self.timer.arm(deadline);
    }
    fn interrupted(&mut self) -> bool {
        cpu::host::serve_interrupts();
        if self.core.timer_fired.swap(false, Ordering::Relaxed) {
            self.timer.fired();
        }
        self.core.take_kick();
        self.core.reschedule.load(Ordering::Relaxed)
            || (SERIAL_FIRED.load(Ordering::Relaxed) || uplinks::has_fired())
                && self.core.number() == 0
            || hw::rdtsc() >= self.slice_end
    }
    fn output(&mut self, bytes: &[u8]) {
        console::guest_output(usize::from(self.live.id.0), bytes);
    }
    fn frames(&mut self, ask: Ask) -> bool {
        self.machine.network.transmit(self.machine, self.live, ask)
    }
    #[cfg(feature = "fault-injection")]
    fn with_shared_lock(&mut self, work: fn() -> !) -> ! {
        self.machine.schedule(|_, _| work())
    }
}

/// The vCPU that is loaded on a core.
struct Loaded {
    live: Arc<Live>,
    index: usize,
    vcpu: Box<dyn Guest>,
    /// It could go on.
    runnable: bool,
}

/// A core at work.
pub struct Worker {
    machine: &'static Machine,
    core: &'static Core,
    timer: CoreTimer,
    loaded: Option<Loaded>,
    /// A dedicated vCPU owns the core.
    owned: bool,
}

impl Worker {
    /// The calling core, with its timer.
    pub fn new(machine: &'static Machine, timer: CoreTimer) -> Self {
        Self {
            machine,
            core: this(),
            timer,
            loaded: None,
            owned: false,
        }
    }

    /// The life of a core beside the boot core.
    pub fn work(mut self) -> ! {
        loop {
            self.answer();
            self.turn(Nanos::NEVER, Nanos::NEVER);
        }
    }

    /// The life of the boot core, which also keeps the VMs, until it is over.
    pub fn manage(mut self, manager: &mut Manager) -> Over {
        loop {
            self.answer();
            SERIAL_FIRED.store(false, Ordering::Relaxed);
            if manager.due() <= self.machine.clock.now() {
                self.hand_over();
            }
            if let Some(over) = manager.step() {
                self.put_back();
                return over;
            }
            if manager.has_dumps() {
                // To look at another vCPU, the core must have none.
                self.put_back();
                manager.dump();
            }
            let (work, mut due) = (manager.has_work(), manager.due());
            if POLL_SERIAL.load(Ordering::Relaxed) {
                due = due.min(self.machine.clock.now() + POLL);
            }
            due = due.min(self.network());
            if console::is_undrawn() {
                due = due.min(self.machine.clock.now() + 1_000_000_000 / console::FRAMES);
            }
            // Where no guest wants the core, work goes on.
            let idle = if work { Nanos::ZERO } else { due };
            if self.turn(due, idle) {
                manager.go_on();
            }
        }
    }

    /// Looks after the machine's network cards and the switches. Gives the time of the next look.
    fn network(&mut self) -> Nanos {
        let (machine, now) = (self.machine, self.machine.clock.now());
        let cards = uplinks::poll(now);
        if machine.network.rooms().is_empty() {
            return cards.unwrap_or(Nanos::NEVER);
        }
        machine.network.tick(now);
        if cards.is_some() && machine.network.receive(machine) {
            return now;
        }
        cards.unwrap_or(now + AGEING)
    }

    /// Looks at all that was left for the core from here on; what comes later calls it again. So
    /// this comes before the manager's look as well.
    fn answer(&self) {
        self.core.beat();
        self.core.take_kick();
        self.core.reschedule.store(false, Ordering::SeqCst);
    }

    /// Does what the scheduler says, until `due` at the latest. Where that is nothing, until `idle`,
    /// and says so.
    fn turn(&mut self, due: Nanos, idle: Nanos) -> bool {
        self.core.beat();
        let number = CoreId(self.core.number() as u16);
        let (decision, stolen, owned) = self.machine.schedule(|scheduler, now| {
            let decision = scheduler.next(number, now);
            let stolen = match decision {
                Decision::Run { vcpu, .. } => scheduler.stolen(vcpu, now),
                Decision::Idle { .. } => 0,
            };
            (decision, stolen, scheduler.owner(number).is_some())
        });
        self.owned = owned;
        match decision {
            Decision::Run { vcpu, until } => {
                self.run(vcpu, until.min(due), stolen);
                false
            }
            Decision::Idle { until } => {
                self.idle(until.min(idle));
                true
            }
        }
    }

    fn idle(&mut self, until: Nanos) {
        self.put_back();
        let until = self
            .machine
            .clock
            .tsc_at(until)
            .min(watch(self.machine.host));
        self.timer.arm(until);
        self.core.rest();
        // What was left for the core since it looked ends the halt at once.
        if !self.core.reschedule.load(Ordering::SeqCst) {
            cpu::host::wait_for_interrupt();
        }
        if self.core.timer_fired.swap(false, Ordering::Relaxed) {
            self.timer.fired();
        }
    }

    /// Takes the vCPU off the core and puts it back in its seat.
    fn put_back(&mut self) {
        let Some(mut loaded) = self.loaded.take() else {
            return;
        };
        loaded.vcpu.unload(loaded.runnable);
        let Loaded {
            live, index, vcpu, ..
        } = loaded;
        live.seats.put_back(index, vcpu);
        // Whoever left something for it before this found it on a core, and did not wake it.
        if live.vm.is_signalled(index) {
            self.machine.wake(&live, index);
        }
    }

    /// Leaves the vCPU to the other cores, before work that may last.
    fn hand_over(&mut self) {
        self.put_back();
        let number = CoreId(self.core.number() as u16);
        self.machine
            .schedule(|scheduler, now| scheduler.put_off(number, now));
    }

    /// Takes a vCPU out of its seat and loads it; `None` if it is not to be had any more.
    fn take(&mut self, vcpu: VcpuId, stolen: u64) -> Option<()> {
        let live = self.machine.live(usize::from(vcpu.vm.0))?;
        let index = usize::from(vcpu.index);
        let mut taken = live.seats.take(index, self.core.number())?;
        taken.load(stolen, self.machine.is_crowded());
        self.loaded = Some(Loaded {
            live,
            index,
            vcpu: taken,
            runnable: true,
        });
        Some(())
    }

    /// Runs a vCPU.
    fn run(&mut self, vcpu: VcpuId, until: Nanos, stolen: u64) {
        let same = |loaded: &Loaded| loaded.live.vcpu_id(loaded.index) == vcpu;
        if !self.loaded.as_ref().is_some_and(same) {
            if self.loaded.is_some() {
                self.put_back();
                if self.core.reschedule.load(Ordering::SeqCst) {
                    // That woke one which should perhaps have the core.
                    return;
                }
            }
            if self.take(vcpu, stolen).is_none() {
                self.machine
                    .schedule(|s, now| s.sleep(vcpu, Nanos::NEVER, now));
                return;
            }
        }
        let Some(loaded) = &mut self.loaded else {
            return;
        };
        let mut slice_end = self.machine.clock.tsc_at(until);
        if self.owned {
            // No tick for who owns its core: the watchdog leaves it alone, and it watches nobody.
            self.core.rest();
        } else {
            slice_end = slice_end.min(watch(self.machine.host));
        }
        let mut stop = None;
        let mut host = CoreHost {
            machine: self.machine,
            live: &loaded.live,
            core: self.core,
            timer: &mut self.timer,
            slice_end,
        };
        self.core
            .vm
            .store(u32::from(vcpu.vm.0) + 1, Ordering::Relaxed);
        let sound = cpu::guard::run(|| stop = Some(loaded.vcpu.run(&mut host))).is_ok();
        self.core.vm.store(0, Ordering::Relaxed);
        loaded.runnable = matches!(stop, Some(Stop::Preempted | Stop::Yield));
        match stop {
            Some(Stop::Preempted) => {}
            Some(Stop::Yield) => self.machine.schedule(|s, now| s.yield_now(vcpu, now)),
            Some(Stop::Halted { until }) => {
                let until = self.machine.clock.at(until);
                self.machine.schedule(|s, now| s.sleep(vcpu, until, now));
                // Whoever wakes it may have it run on another core at once.
                self.put_back();
            }
            Some(Stop::Ordered) => self.leave(None),
            Some(Stop::Ended(end)) => self.leave(Some((end, sound))),
            None => {
                self.machine.give_up(&loaded.live);
                self.leave(None);
            }
        }
    }

    /// The vCPU leaves the core by order, or with the end of its VM.
    fn leave(&mut self, end: Option<(End, bool)>) {
        let Some(loaded) = &mut self.loaded else {
            return;
        };
        let (live, index) = (loaded.live.clone(), loaded.index);
        if let Some((end, sound)) = end {
            self.machine.end(&live, end, sound);
        }
        let leaves = self.machine.schedule(|scheduler, now| {
            // Let go again in the meantime?
            let leaves = live.vm.order() != Order::Run;
            if leaves {
                scheduler.sleep(live.vcpu_id(index), Nanos::NEVER, now);
                live.seats.leave(index);
            }
            leaves
        });
        if !leaves {
            loaded.runnable = true;
            return;
        }
        self.put_back();
        if live.is_out() {
            let vm = live.id;
            // The manager waits until nobody has it any more.
            drop(live);
            self.machine.announce(vm);
        }
    }
}
