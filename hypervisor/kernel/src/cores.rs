//! All cores of the machine: started together, compared, watched by one another, and stopped.
//!
//! A core that is started goes through [`arrive`] to [`Worker::work`]. Those that do not come in time,
//! or are unlike the boot core, are told of and left out; one that comes later halts for good.
//!
//! **The watchdog.** Interrupts are off while a core handles an exit, so each interrupt that it
//! takes, and each halt, shows that it gets on ([`Core::beat`]). Core n looks at core n + 1 from time to time
//! ([`watch`]). One without a beat for ten seconds gets an NMI: a guest that ran so long undisturbed
//! is thereby left, which is a beat. If there is none even so, a second NMI finds a handler that does
//! not return: its place is told, and its work given up if it holds no shared lock, else the host
//! stops. A core that waits for a lock watches on ([`watch_while_waiting`]): the one that is stuck
//! may hold it. A machine of one core has nobody to look after it, and no watchdog.

use crate::backend::Backend;
use crate::bring_up::{self, BOOT_CORE, Host, passed};
use crate::run::{Machine, Worker};
use crate::{console, panic};
use alloc::vec::Vec;
use arch::HostPhysAddr;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use cpu::host::InterruptFrame;
use cpu::percpu::{Core, this};
use cpu::start::{Control, PAGES, Plan};
use hw::acpi::AcpiInfo;
use hw::{CoreTimer, DirectMap, LocalApic, rdtsc_ordered};
use log::{error, info, warn};
use spin::Once;

/// From INIT to the first SIPI, and from there to the second (Intel SDM Vol. 3A §9.4.4.1), in
/// microseconds.
const INIT_WAIT: u64 = 10_000;
const STARTUP_WAIT: u64 = 200;
/// No more cores are waited for when none has come for this long, in microseconds.
const PATIENCE: u64 = 2_000_000;
/// How often each core compares its TSC with the boot core's, and for how long at the most in
/// microseconds.
const EXCHANGES: u32 = 500;
const EXCHANGE_LIMIT: u64 = 1_000_000;
/// How long a core may go without a sign of life, in seconds.
const SILENCE: u64 = 10;
/// How often a core looks after another, in seconds.
const WATCH_PERIOD: u64 = 4;

/// How far a core has come.
mod state {
    pub const ABSENT: u32 = 0;
    pub const HERE: u32 = 1;
    pub const READY: u32 = 2;
    /// It said why.
    pub const FAILED: u32 = 3;
    /// It took too long.
    pub const LATE: u32 = 4;
}

/// How far the machine has come: what cores that are ready wait for.
mod stage {
    pub const STARTING: u32 = 0;
    pub const COMPARING: u32 = 1;
    pub const RUNNING: u32 = 2;
}

/// A core that is started.
struct Seat {
    core: Core,
    state: AtomicU32,
    /// Its TSC, for the boot core to compare.
    clock: AtomicU64,
    /// How far its TSC was seen behind and ahead of the boot core's.
    behind: AtomicU64,
    ahead: AtomicU64,
    compared: AtomicBool,
    /// Its memory types are not the boot core's.
    unlike: AtomicBool,
}

/// What a core needs before there is a [`Host`].
struct Start {
    seats: &'static [Seat],
    control: Control,
    map: DirectMap,
    apic: LocalApic,
    timer: CoreTimer,
    backend: &'static dyn Backend,
}

static START: Once<Start> = Once::new();
static STAGE: AtomicU32 = AtomicU32::new(stage::STARTING);
/// The boot core's TSC, for the others to compare.
static BEACON: AtomicU64 = AtomicU64::new(0);
static MACHINE: Once<&'static Machine> = Once::new();
/// The core that stops all others, by the address of its [`Core`]; 0 while nobody does.
static STOPPER: AtomicU64 = AtomicU64::new(0);
static STOPPED: AtomicU32 = AtomicU32::new(0);

impl Seat {
    fn new(apic_id: u32) -> Self {
        Self {
            core: Core::new(0, apic_id),
            state: AtomicU32::new(state::ABSENT),
            clock: AtomicU64::new(0),
            behind: AtomicU64::new(0),
            ahead: AtomicU64::new(0),
            compared: AtomicBool::new(false),
            unlike: AtomicBool::new(false),
        }
    }

    fn is(&self, state: u32) -> bool {
        self.state.load(Ordering::Acquire) == state
    }

    /// One step; false if the other side decided otherwise.
    fn goes(&self, from: u32, to: u32) -> bool {
        self.state
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
}

/// Starts all cores that the firmware lists, as many at once as there are, and sets `host.cores`.
/// They wait for [`release`]. No more than `most` are used.
pub fn start(
    host: &mut Host,
    acpi: &AcpiInfo,
    backend: &'static dyn Backend,
    timer: &CoreTimer,
    low: Option<HostPhysAddr>,
    most: u32,
) {
    let boot_id = host.apic.id();
    BOOT_CORE.set_apic_id(boot_id);
    let found = hw::acpi::processors(host.map, acpi, boot_id);
    let listed = 1 + found.ids.len();
    if found.left_out > 0 {
        warn!(
            "cores: {} beyond the {listed} that are supported",
            found.left_out
        );
    }
    if found.spare > 0 {
        info!(
            "cores: {} more could be added; they are not used",
            found.spare
        );
    }
    let others = (most as usize).saturating_sub(1).min(found.ids.len());
    let ids = found.ids.get(..others).unwrap_or_default();
    let from = hw::rdtsc();
    let seats = match low {
        Some(low) => invite(host, ids, backend, timer, low),
        None => {
            if listed > 1 {
                warn!("cores: no free memory below 1 MiB, so only the boot core is used");
            }
            &[]
        }
    };
    let took = hw::rdtsc() - from;
    let ready = || seats.iter().filter(|seat| seat.is(state::READY));
    for (number, seat) in (1..).zip(ready()) {
        seat.core.set_number(number);
    }
    let others = ready().map(|seat| &seat.core);
    let all: Vec<&'static Core> = core::iter::once(&BOOT_CORE).chain(others).collect();
    host.cores = all.leak();
    info!(
        "cores: {} of {listed} started in {} µs",
        host.cores.len(),
        took * 1000 / (host.tsc_hz / 1000)
    );
    console::say(format_args!("bench cores-up {took} tsc"));
    let unlike = ready().filter(|seat| seat.unlike.load(Ordering::Relaxed));
    match unlike.count() {
        0 => {}
        count => warn!(
            "cores: on {count} the firmware set other memory types (MTRRs) than on the boot core"
        ),
    }
    if !hw::tsc_is_invariant() {
        warn!("TSC: not invariant (CPUID 8000_0007h: EDX bit 8): time may drift when cores sleep");
    }
    if host.cores.len() > 1 {
        compare_clocks(seats, host);
    }
}

/// Has the cores come, and says which do not. When it returns, none is on its way any more.
fn invite(
    host: &Host,
    ids: &[u32],
    backend: &'static dyn Backend,
    timer: &CoreTimer,
    low: HostPhysAddr,
) -> &'static [Seat] {
    let (map, apic) = (host.map, host.apic);
    let mut seats = Vec::new();
    for id in ids {
        if !apic.reaches(*id) {
            warn!("cores: APIC id {id} cannot be reached without x2APIC mode; left out");
        } else if bring_up::map_stacks(map, seats.len() as u64 + 1).is_none() {
            warn!(
                "cores: no memory for the stacks of more than {}",
                seats.len()
            );
            break;
        } else {
            seats.push(Seat::new(*id));
        }
    }
    let seats: &'static [Seat] = seats.leak();
    let pointer = map.pointer(low, PAGES * arch::PAGE_SIZE);
    let (false, Some(pointer)) = (seats.is_empty(), pointer) else {
        return seats;
    };
    // SAFETY: this core's own timer, only to be copied from.
    let timer = unsafe { timer.like() };
    START.call_once(|| Start {
        seats,
        control: Control::read(),
        map,
        apic,
        timer,
        backend,
    });
    let plan = Plan {
        at: low,
        cores: seats.len() as u32,
        stack: bring_up::stacks(1)[0],
        stride: bring_up::STACKS_STRIDE,
        main: arrive,
    };
    // SAFETY: the pages are free by the loader's map, kept out of the frame store, and mapped; the
    // stacks were mapped just now.
    let gate = unsafe { cpu::start::open(&map, pointer, cpu::paging::root(), &plan) };
    let page = (low.as_u64() >> 12) as u8;
    for seat in seats {
        apic.send_init(seat.core.apic_id());
    }
    wait(INIT_WAIT);
    for seat in seats {
        apic.send_startup(seat.core.apic_id(), page);
    }
    wait(STARTUP_WAIT);
    // A core that runs already does not take it.
    if gate.taken() < plan.cores {
        for seat in seats.iter().filter(|seat| seat.is(state::ABSENT)) {
            apic.send_startup(seat.core.apic_id(), page);
        }
    }
    let arrived = || {
        let open = |seat: &&Seat| seat.is(state::ABSENT) || seat.is(state::HERE);
        seats.len() - seats.iter().filter(open).count()
    };
    let (mut last, mut since) = (0, hw::rdtsc());
    while last < seats.len() && !passed(since, PATIENCE) {
        core::hint::spin_loop();
        let now = arrived();
        if now != last {
            (last, since) = (now, hw::rdtsc());
        }
    }
    gate.close();
    for seat in seats {
        let id = seat.core.apic_id();
        if seat.goes(state::ABSENT, state::LATE) {
            error!("core with APIC id {id}: does not start; left out");
        } else if seat.goes(state::HERE, state::LATE) {
            error!("core with APIC id {id}: started, but does not get ready; left out");
        }
    }
    seats
}

fn wait(microseconds: u64) {
    let from = hw::rdtsc();
    while !passed(from, microseconds) {
        core::hint::spin_loop();
    }
}

/// The first code of a core that was started, on the stack of its ticket.
extern "C" fn arrive(ticket: u64) -> ! {
    let Some(start) = START.get() else {
        cpu::host::stop()
    };
    // SAFETY: the boot core's tables are this core's.
    let alike = unsafe { start.control.apply() };
    // SAFETY: this core, interrupts off, and its APIC is nobody else's.
    let joined = unsafe { start.apic.join(start.map) };
    if joined.is_err() {
        // Which core it is cannot be told either: it is missed, and reported as such.
        cpu::host::stop();
    }
    let id = start.apic.id();
    let seat = start.seats.iter().find(|seat| seat.core.apic_id() == id);
    let Some(seat) = seat.filter(|seat| seat.goes(state::ABSENT, state::HERE)) else {
        cpu::host::stop()
    };
    // SAFETY: this core's, found by its own id, and taken once.
    unsafe { seat.core.adopt() };
    bring_up::install_tables(ticket + 1);
    // SAFETY: this core's timer is ours.
    let timer = unsafe { start.timer.like() };
    seat.unlike.store(!alike, Ordering::Relaxed);
    if let Err(error) = start.backend.enable_core(start.map) {
        error!("core with APIC id {id}: {error}; left out");
        seat.goes(state::HERE, state::FAILED);
        cpu::host::stop();
    }
    if !seat.goes(state::HERE, state::READY) {
        cpu::host::stop();
    }
    wait_for(stage::COMPARING);
    compare_clock(seat);
    wait_for(stage::RUNNING);
    match MACHINE.get() {
        Some(machine) => Worker::new(machine, timer).work(),
        None => cpu::host::stop(),
    }
}

fn wait_for(stage: u32) {
    loop {
        this().take_kick();
        if STAGE.load(Ordering::Acquire) >= stage {
            return;
        }
        cpu::host::wait_for_interrupt();
    }
}

/// Goes on to a stage, and wakes who waits for it.
fn announce(stage: u32, host: &Host) {
    STAGE.store(stage, Ordering::Release);
    for number in 1..host.cores.len() {
        host.kick(number);
    }
}

/// Lets the cores go to work.
pub fn release(machine: &'static Machine) {
    MACHINE.call_once(|| machine);
    announce(stage::RUNNING, machine.host);
}

/// The part of the comparison on a core beside the boot core: a value that the boot core read
/// before must not be ahead of what this core reads now.
fn compare_clock(seat: &Seat) {
    let mut behind = 0;
    for _ in 0..EXCHANGES {
        let theirs = BEACON.load(Ordering::Acquire);
        let mine = rdtsc_ordered();
        behind = theirs.saturating_sub(mine).max(behind);
        seat.clock.store(mine, Ordering::Release);
    }
    seat.behind.store(behind, Ordering::Relaxed);
    seat.compared.store(true, Ordering::Release);
}

/// The boot core's part, with all others at once: time must not go backwards from one core to
/// another. Says by how much it does.
fn compare_clocks(seats: &[Seat], host: &Host) {
    let ready = || seats.iter().filter(|seat| seat.is(state::READY));
    announce(stage::COMPARING, host);
    let from = hw::rdtsc();
    loop {
        BEACON.store(rdtsc_ordered(), Ordering::Release);
        for seat in ready() {
            let theirs = seat.clock.load(Ordering::Acquire);
            let ahead = theirs.saturating_sub(rdtsc_ordered());
            if ahead > seat.ahead.load(Ordering::Relaxed) {
                seat.ahead.store(ahead, Ordering::Relaxed);
            }
        }
        let done = ready().all(|seat| seat.compared.load(Ordering::Acquire));
        if done || passed(from, EXCHANGE_LIMIT) {
            break;
        }
    }
    let offset = |seat: &Seat| {
        let behind = seat.behind.load(Ordering::Relaxed);
        let ahead = seat.ahead.load(Ordering::Relaxed);
        behind.max(ahead)
    };
    let missed = ready().filter(|seat| !seat.compared.load(Ordering::Acquire));
    match missed.count() {
        0 => {}
        count => warn!("TSC: {count} cores took too long to be compared"),
    }
    let worst = ready().max_by_key(|seat| offset(seat));
    let Some((seat, ticks)) = worst.map(|seat| (seat, offset(seat))) else {
        return;
    };
    // What a guest cannot notice: less than it takes to go from one core to another.
    if ticks <= host.tsc_hz / 1_000_000 {
        info!("TSC: cores agree within {ticks} ticks");
    } else {
        let ahead = seat.ahead.load(Ordering::Relaxed) == ticks;
        warn!(
            "TSC: core {} (APIC id {}) is {ticks} ticks {} the boot core: time will jump in VMs that \
             move between cores",
            seat.core.number(),
            seat.core.apic_id(),
            if ahead { "ahead of" } else { "behind" }
        );
    }
}

/// Looks after the next core, and gives the TSC at which to do so again: each core does it whenever
/// it comes by, and sets its timer for it before it halts.
pub fn watch(host: &Host) -> u64 {
    let number = cpu::percpu::core_number();
    let next = host.cores.get(number + 1).or(host.cores.first());
    let Some(next) = next.filter(|next| next.number() != number) else {
        return u64::MAX;
    };
    let (now, beat, watch) = (hw::rdtsc(), next.heartbeat(), &next.watch);
    let again = now + WATCH_PERIOD * host.tsc_hz;
    if beat % 2 == 1 || beat != watch.seen.load(Ordering::Relaxed) {
        watch.strikes.store(0, Ordering::Relaxed);
        watch.seen.store(beat, Ordering::Relaxed);
        watch.since.store(now, Ordering::Relaxed);
        return again;
    }
    let silent = now.saturating_sub(watch.since.load(Ordering::Relaxed)) / host.tsc_hz;
    let strikes = watch.strikes.load(Ordering::Relaxed);
    if silent >= SILENCE + u64::from(strikes) {
        if strikes > 2 {
            // The console may be what it holds.
            stop_others();
            error!(
                "core {}: no sign of life for {silent} s, and no answer to NMIs",
                next.number()
            );
            panic::stop_host();
        }
        watch.strikes.store(strikes + 1, Ordering::Release);
        host.apic.send_nmi(next.apic_id());
    }
    again
}

/// The same for a core that waits long for another one: it is alive, and may be the only one left to
/// find that who it waits for is not.
pub fn watch_while_waiting() {
    this().beat();
    if let Some(machine) = MACHINE.get() {
        watch(machine.host);
    }
}

/// An NMI: true if another core sent it.
pub fn nmi(frame: &mut InterruptFrame) -> bool {
    let core = this();
    if STOPPER.load(Ordering::Acquire) != 0 {
        STOPPED.fetch_add(1, Ordering::Release);
        cpu::host::stop();
    }
    let strikes = core.watch.strikes.load(Ordering::Acquire);
    if strikes > 1 && core.heartbeat() == core.watch.seen.load(Ordering::Relaxed) {
        stuck(core, frame);
    }
    strikes > 0
}

/// This core was found in a handler that does not return.
#[cold]
fn stuck(core: &Core, frame: &mut InterruptFrame) {
    let held = core.held.load(Ordering::Relaxed);
    if held > 0 {
        // SAFETY: the host stops; what holds the console does not go on.
        unsafe { console::release() };
    }
    let vm = core.vm.load(Ordering::Relaxed);
    console::say(format_args!(
        "error: core {} got nowhere for {SILENCE} s: at {:#x}, rsp {:#x}, working for VM {} (0: none)",
        core.number(),
        frame.rip,
        frame.rsp,
        vm
    ));
    // SAFETY: the work holds no shared lock.
    if held == 0 && unsafe { cpu::guard::abandon_after(frame) } {
        core.beat();
        return;
    }
    panic::stop_host()
}

/// Stops all other cores for good and makes the console free. Where another core is about to do
/// that, this one stops.
pub fn stop_others() {
    let me = core::ptr::from_ref(this()) as u64;
    match STOPPER.compare_exchange(0, me, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        Err(stopper) if stopper == me => return,
        Err(_) => cpu::host::stop(),
    }
    if let Some(host) = MACHINE.get().map(|machine| machine.host) {
        let others = || {
            host.cores
                .iter()
                .filter(|core| core.number() != this().number())
        };
        for core in others() {
            host.apic.send_nmi(core.apic_id());
        }
        let from = hw::rdtsc();
        let stopped = || STOPPED.load(Ordering::Acquire) as usize >= others().count();
        while !stopped() && !passed(from, 100_000) {
            core::hint::spin_loop();
        }
    }
    // SAFETY: only this core still runs.
    unsafe { console::break_open() };
}
