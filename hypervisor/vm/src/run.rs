//! A running vCPU: entry, exit, and what each exit means.
//!
//! The loop is the hot path of the whole hypervisor. Exits that guests make all day (CPUID, MSR,
//! ports, local APIC, EOI, HLT) are handled here in line and generic over the backend; anything
//! else goes through one cold function. Nothing here allocates, takes a lock that another VM
//! could hold, or knows what vendor runs the guest. What needs only the vCPU (CPUID, most MSRs,
//! its local APIC and timer, IPIs) takes no lock at all.

use crate::exits::Reason;
use crate::vm::{Attention, End, Host, Order, Over, Processor, Stop};
use alloc::format;
use arch::{
    Access, AccessRights, ControlRegister, Cr0, Cr4, CrAccess, CrOp, DebugRegister, Event,
    Exception, Exit, FrameSource, Gpr, GuestMemory, GuestPhysAddr, IoExit, Nanos, PAGE_SIZE,
    PhysMemory, RFlags, SegmentRegister, Vcpu, msr,
};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use machine::apic::{ApicEffect, ApicMode, LocalApic};
use machine::board::Board;
use machine::emulate::{self, Done, Expected, LengthError, MmioBus, PortBus};
use machine::map;
use machine::msr::{MsrContext, MsrEffect, MsrFault};
use machine::pvclock;
use memory::FaultOutcome;
use virtio::net::Ask;

/// The cause of a crash by the guest's shutdown.
const SHUTDOWN: &str = "triple fault";

/// What lies behind guest-physical addresses that are not RAM.
struct Bus<'a> {
    apic: &'a mut LocalApic,
    /// What writes to the local APIC have left to do.
    effect: ApicEffect,
    /// `None` while an access to the local APIC alone is under way.
    board: Option<&'a mut Board>,
    now: Nanos,
}

impl Bus<'_> {
    /// The register offset, if the address lies in the local APIC's page.
    fn local_apic(&self, addr: GuestPhysAddr) -> Option<u16> {
        let offset = addr.as_u64().wrapping_sub(self.apic.base_address());
        (offset < PAGE_SIZE && self.apic.mode() == ApicMode::XApic).then_some(offset as u16)
    }
}

impl MmioBus for Bus<'_> {
    #[inline(always)]
    fn read(&mut self, addr: GuestPhysAddr, size: u8) -> u64 {
        if let Some(offset) = self.local_apic(addr) {
            // Registers are 32 bits wide on 16-byte boundaries; narrower reads see their bytes.
            let value = self.apic.read_mmio(offset & !3, self.now);
            return u64::from(value) >> (8 * (offset & 3));
        }
        match &mut self.board {
            Some(board) => board.mmio_read(addr.as_u64(), size, self.now),
            None => u64::MAX,
        }
    }
    #[inline(always)]
    fn write(&mut self, addr: GuestPhysAddr, size: u8, value: u64) {
        if let Some(offset) = self.local_apic(addr) {
            let effect = self.apic.write_mmio(offset, value as u32, self.now);
            if effect != ApicEffect::None {
                self.effect = effect;
            }
            return;
        }
        if let Some(board) = &mut self.board {
            board.mmio_write(addr.as_u64(), size, value, self.now);
        }
    }
}

impl PortBus for Bus<'_> {
    fn read(&mut self, port: u16, size: u8) -> u32 {
        match &mut self.board {
            Some(board) => board.port_read(port, size, self.now),
            None => u32::MAX,
        }
    }
    fn write(&mut self, port: u16, size: u8, value: u32) {
        if let Some(board) = &mut self.board {
            board.port_write(port, size, value, self.now);
        }
    }
}

/// What is to be done before the next entry.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Nothing: the exit changed nothing that [`Processor::prepare`] looks at.
    Enter,
    /// [`Processor::prepare`].
    Prepare,
    /// The machine's interrupts get their turn, then [`Processor::prepare`].
    Serve,
    /// Another vCPU may have the core.
    Yield,
}

impl Next {
    /// What follows a rare exit.
    fn or_serve(self) -> Self {
        if self == Self::Yield {
            self
        } else {
            Self::Serve
        }
    }
}

/// How an exit was handled. All paths of the run loop give it in a register; how a VM ended
/// stands in [`Processor::end`].
type Handled = Result<Next, Over>;

impl<V: Vcpu, P: PhysMemory, F: FrameSource> Processor<V, P, F> {
    /// Runs the guest until something else wants the core or the guest wants nothing of it. The
    /// vCPU must be loaded.
    pub fn run(&mut self, host: &mut impl Host) -> Stop {
        if self.listens {
            // Nothing was added while the vCPU was away: see `leave_queues`.
            self.moved = host.tsc();
        }
        let stop = self.turn(host);
        self.exits.publish(&self.counts);
        if self.listens {
            return self.leave_queues(stop, host);
        }
        stop
    }

    #[inline(always)]
    fn turn(&mut self, host: &mut impl Host) -> Stop {
        if self.vm.order() != Order::Run {
            return Stop::Ordered;
        }
        // From here on it hears what it is told: see `fall_deaf`.
        let asleep = Attention::HALTED | Attention::WAITS;
        if self.attention.intersects(asleep) {
            self.vm.deaf.fetch_and(!(1 << (self.id() & 63)), SeqCst);
        }
        self.attention.insert(Attention::KICKS);
        let extint = self.vm.fabric.extint_for(&self.apic);
        self.attention.set(Attention::EXTINT, extint);
        if self.tick(host).is_err() {
            return Stop::Ordered;
        }
        'prepare: loop {
            self.take_tpr();
            if let Some(stop) = self.prepare(host) {
                return stop;
            }
            loop {
                // The compiler joins this match with the backend's on the raw reason.
                // Each arm counts itself: the reason's place is known there, and costs no look-up.
                let handled = match self.vcpu.enter() {
                    Exit::Cpuid => self.count(Reason::Cpuid).cpuid(),
                    Exit::Hypercall => self.count(Reason::Hypercall).hypercall(),
                    Exit::Rdmsr => self.count(Reason::Rdmsr).rdmsr(host),
                    Exit::Wrmsr => self.count(Reason::Wrmsr).wrmsr(host),
                    Exit::Io(io) => self.count(Reason::Port).port(io, host),
                    Exit::ApicWrite { offset } => self.count(Reason::Apic).apic_write(offset, host),
                    Exit::NestedFault { addr, access, walk } => {
                        self.count(Reason::Memory).fault(addr, access, walk, host)
                    }
                    Exit::Hlt => self.count(Reason::Halt).halt(),
                    // The only ways in which a deadline shows.
                    Exit::ExternalInterrupt(_) | Exit::PreemptionTimer => {
                        self.count(Reason::Interrupt);
                        Ok(Next::Serve)
                    }
                    // These only ask for a new look at what is pending.
                    Exit::InterruptWindow | Exit::TprBelowThreshold => {
                        self.count(Reason::Window);
                        Ok(Next::Prepare)
                    }
                    // Windows, and exceptions that arise in their own delivery (CVE-2015-5307,
                    // CVE-2015-8104), come before interrupts of the machine: a guest that brings
                    // them about without end would keep those out for ever.
                    _ => self.count(Reason::Other).rare(host).map(Next::or_serve),
                };
                match handled {
                    Ok(Next::Enter) => {}
                    Ok(Next::Prepare) => continue 'prepare,
                    Ok(Next::Serve) => {
                        if host.interrupted() {
                            // The exit may have left something for others.
                            self.kick_others(host);
                            return Stop::Preempted;
                        }
                        if self.tick(host).is_err() {
                            return Stop::Ordered;
                        }
                        let listens = self.listens;
                        self.attention.set(Attention::FRAMES, listens);
                        continue 'prepare;
                    }
                    Ok(Next::Yield) => {
                        self.kick_others(host);
                        return Stop::Yield;
                    }
                    Err(Over) => return self.ended(host),
                }
            }
        }
    }

    /// Counts an exit.
    #[inline(always)]
    fn count(&mut self, reason: Reason) -> &mut Self {
        self.counts.count(reason);
        self
    }

    #[cold]
    fn ended(&mut self, host: &mut impl Host) -> Stop {
        // Without an end of its own, it was another vCPU's.
        let Some(end) = self.end.take() else {
            return Stop::Ordered;
        };
        if let Ok(mut board) = self.vm.board() {
            board.console_output(&mut |bytes| host.output(bytes));
        }
        Stop::Ended(end)
    }

    /// Lets devices and timers come up to the present. While the guest runs, that is only needed
    /// when the deadline that [`Processor::arm`] set has passed: the guest leaves then. The
    /// board's time is kept by vCPU 0.
    fn tick(&mut self, host: &mut impl Host) -> Result<(), Over> {
        let now = self.vm.time_at(host.tsc());
        if self.apic.id() == 0 && now.0 >= self.vm.board_next.load(Relaxed) {
            let mut board = self.vm.board()?;
            board.tick(now);
            let _ = Self::left(&mut self.attention, &self.vm, &board);
        }
        self.apic.tick(now);
        // A timer may go off a little early, and rings once.
        self.armed = None;
        Ok(())
    }

    /// What an access to the board leaves to do before the next entry: nothing, if it told nobody
    /// anything and the board is due when it was before.
    #[inline(always)]
    fn left(attention: &mut Attention, vm: &crate::vm::Vm<P, F>, board: &Board) -> Next {
        let moved = vm.board_done(board);
        if vm.fabric.has_kicks() | board.has_actions() | vm.has_frames() {
            attention.insert(Attention::KICKS | Attention::ACTIONS);
            return Next::Prepare;
        }
        if moved { Next::Prepare } else { Next::Enter }
    }

    /// Takes over TPR where the guest changes it in the hardware's own copy, which has the
    /// priority class alone.
    #[inline(always)]
    fn take_tpr(&mut self) {
        if let Some(tpr) = self.vcpu.virtual_tpr()
            && tpr >> 4 != self.shown_tpr.0 >> 4
        {
            self.shown_tpr.0 = tpr;
            self.apic.set_tpr(tpr);
        }
    }

    /// Brings interrupts and deadlines up to date before an entry.
    #[inline(always)]
    fn prepare(&mut self, host: &mut impl Host) -> Option<Stop> {
        let shown = (self.apic.tpr(), 0);
        let next = self.next_event();
        let work = self.apic.has_work() | self.vm.fabric.is_signalled(self.id());
        if work || !self.attention.is_empty() || shown != self.shown_tpr {
            return self.prepare_in_full(host);
        }
        if self.armed != Some(next) {
            self.arm(next, host);
        }
        None
    }

    #[inline(never)]
    fn prepare_in_full(&mut self, host: &mut impl Host) -> Option<Stop> {
        #[cfg(feature = "fault-injection")]
        self.fail_at_entry(host);
        let look = Attention::KICKS | Attention::ACTIONS | Attention::FRAMES;
        let mut wanted = false;
        if self.vm.fabric.is_signalled(self.id()) || self.attention.intersects(look) {
            match self.look_around(host) {
                Ok(wants) => wanted = wants,
                Err(stop) => return Some(stop),
            }
        }
        if let Some(stop) = self.deliver() {
            self.kick_others(host);
            return Some(stop);
        }
        // The 8259's acknowledge cycle may have left something for others.
        wanted |= self.attention.contains(Attention::KICKS) && self.kick_others(host);
        if wanted {
            return Some(Stop::Preempted);
        }
        let shown = (self.apic.tpr(), self.apic.tpr_threshold());
        if shown != self.shown_tpr {
            self.shown_tpr = shown;
            self.vcpu.set_virtual_tpr(shown.0, shown.1);
        }
        let next = self.next_event();
        if self.armed != Some(next) {
            self.arm(next, host);
        }
        None
    }

    /// Tells others what came for them, and takes what came for this vCPU. In this order: a kick
    /// of its own among those that are told is seen right after. `true`: the core is wanted.
    fn look_around(&mut self, host: &mut impl Host) -> Result<bool, Stop> {
        let mut moved = false;
        if self.attention.contains(Attention::ACTIONS) || self.apic.id() == 0 {
            self.attention.remove(Attention::ACTIONS);
            if let Some(end) = self.carry_out(host) {
                self.kick_others(host);
                return Err(end);
            }
            moved = self.vm.has_frames();
        }
        if moved || self.attention.contains(Attention::FRAMES) {
            self.attention.remove(Attention::FRAMES);
            moved = true;
            self.move_frames(host)?;
        }
        let wanted = self.kick_others(host);
        if self.vm.fabric.is_signalled(self.id()) {
            if self.vm.fabric.collect(&mut self.apic) {
                // A kick ends the halt, or else the next one.
                self.kicked = !self.attention.contains(Attention::HALTED);
                self.attention.remove(Attention::HALTED);
            }
            let extint = self.vm.fabric.extint_for(&self.apic);
            self.attention.set(Attention::EXTINT, extint);
            if self.vm.order() != Order::Run {
                return Err(Stop::Ordered);
            }
        }
        // Who got frames may want this very core.
        Ok(wanted || moved && host.kick(0))
    }

    /// Moves the frames of the VM's network cards. A driver that rings again soon after that is
    /// not asked to, as long as each look finds frames: the queues are silent, and this comes again
    /// within [`crate::SILENCE`].
    #[inline(never)]
    fn move_frames(&mut self, host: &mut impl Host) -> Result<(), Stop> {
        let busy = host.tsc().wrapping_sub(self.moved) <= self.vm.silence || self.listens;
        let mut ask = if busy { Ask::Idle } else { Ask::Now };
        self.listens = false;
        // The deadline is another one.
        self.armed = None;
        loop {
            self.listens |= host.frames(ask);
            self.moved = host.tsc();
            if !self.vm.has_frames() {
                return Ok(());
            }
            if host.interrupted() {
                // The rest comes as the vCPU leaves, or before its next entry.
                self.listens = true;
                self.attention.insert(Attention::ACTIONS);
                self.kick_others(host);
                return Err(Stop::Preempted);
            }
            if busy {
                ask = Ask::Never;
            }
        }
    }

    /// Looks at silent queues as the vCPU leaves the core, and asks for notifications again,
    /// unless it will go on and has no sibling: then nobody adds to a queue meanwhile.
    #[cold]
    fn leave_queues(&mut self, stop: Stop, host: &mut impl Host) -> Stop {
        let ask = match stop {
            Stop::Ended(_) => return stop,
            Stop::Preempted | Stop::Yield if self.vm.vcpus() == 1 => Ask::Never,
            _ => Ask::Now,
        };
        self.listens = host.frames(ask);
        // What came of it for this vCPU is seen once it is back in its seat.
        self.kick_others(host);
        if !self.vm.has_frames() {
            return stop;
        }
        // The rest comes before the next entry, or the next halt.
        self.attention.insert(Attention::ACTIONS);
        match stop {
            Stop::Halted { .. } => Stop::Preempted,
            stop => stop,
        }
    }

    /// Tells others what came for them; `true`: the core is wanted.
    fn kick_others(&mut self, host: &mut impl Host) -> bool {
        self.attention.remove(Attention::KICKS);
        let kicks = self.vm.fabric.take_kicks();
        kicks != 0 && host.kick(kicks)
    }

    /// Does what the board wants of the host.
    fn carry_out(&mut self, host: &mut impl Host) -> Option<Stop> {
        let Ok(mut board) = self.vm.board() else {
            return Some(Stop::Ordered);
        };
        if !board.has_actions() {
            return None;
        }
        board.console_output(&mut |bytes| host.output(bytes));
        let mut wanted = false;
        while board.wants_service() && !wanted {
            let now = self.vm.time_at(host.tsc());
            let Ok(mut memory) = self.vm.memory() else {
                return Some(Stop::Ordered);
            };
            board.serve(&mut *memory, now);
            drop(memory);
            board.console_output(&mut |bytes| host.output(bytes));
            // A guest that feeds its rings from another core could go on for ever.
            wanted = board.wants_service() && (host.interrupted() || host.tsc() >= host.turn_end());
        }
        let actions = board.take_actions();
        // Where the core is wanted, the rest comes before the next entry.
        let rest = board.wants_service();
        self.attention.set(Attention::ACTIONS, rest);
        self.vm.board_done(&board);
        drop(board);
        let end = if let Some(code) = actions.exit_code {
            End::DebugExit(code)
        } else if actions.watchdog {
            self.report("its watchdog ran out")
        } else if actions.power_off {
            End::PoweredOff
        } else if actions.reset.is_some() {
            End::Reset
        } else {
            return rest.then_some(Stop::Preempted);
        };
        Some(Stop::Ended(end))
    }

    /// Delivers what is pending, or asks for the window in which it can be.
    fn deliver(&mut self) -> Option<Stop> {
        let special = Attention::HALTED | Attention::WAITS | Attention::EXTINT;
        if self.apic.has_signals() || self.attention.intersects(special) {
            return self.attend();
        }
        if self.apic.pending().is_none() {
            self.want_window(false);
        } else if self.vcpu.interruptibility().interrupts_open {
            let vector = self.apic.acknowledge();
            if !self.vcpu.inject(Event::Interrupt(vector)) {
                return Some(Stop::Ended(self.report(SHUTDOWN)));
            }
            // Another may wait behind it.
            self.want_window(self.apic.pending().is_some());
        } else {
            self.want_window(true);
        }
        None
    }

    /// When a device or the local APIC's timer next has something for this vCPU to do.
    #[inline(always)]
    fn next_event(&self) -> Nanos {
        let own = self.apic.next_event();
        if self.apic.id() == 0 {
            own.min(Nanos(self.vm.board_next.load(Relaxed)))
        } else {
            own
        }
    }

    #[inline]
    fn want_window(&mut self, on: bool) {
        if on != self.attention.contains(Attention::WINDOW) {
            self.attention.set(Attention::WINDOW, on);
            self.vcpu.request_interrupt_window(on);
        }
    }

    #[inline(always)]
    fn arm(&mut self, next: Nanos, host: &mut impl Host) {
        self.armed = Some(next);
        // Where the vCPU has a timer of its own, it ends the turn as well: it leaves the guest
        // whatever state that is in.
        let mut deadline = self.vm.tsc_at(next).min(host.turn_end());
        if self.listens {
            deadline = deadline.min(self.moved.saturating_add(self.vm.silence));
        }
        let own = self.vcpu.set_deadline(deadline);
        host.arm(if own { u64::MAX } else { deadline });
    }

    /// What is not the common case of an entry: signals, the 8259A, HLT, and the wait for a
    /// start-up.
    #[cold]
    fn attend(&mut self) -> Option<Stop> {
        let signals = self.apic.signals();
        if signals.init
            && let Some(stop) = self.init()
        {
            return Some(stop);
        }
        if self.attention.contains(Attention::WAITS) {
            // NMIs and interrupts wait with it (SDM Vol. 3A §9.4.1, Vol. 3C §26.2).
            let Some(page) = self.apic.take_startup() else {
                if self.fall_deaf() {
                    return Some(Stop::Ended(End::Halted));
                }
                return Some(Stop::Halted { until: u64::MAX });
            };
            self.start_up(page);
        } else {
            // A start-up is for those that wait for one.
            let _ = self.apic.take_startup();
        }
        let open = self.vcpu.interruptibility();
        if signals.nmi {
            if open.nmi_open {
                self.apic.take_nmi();
                self.wake();
                if !self.vcpu.inject(Event::Nmi) {
                    return Some(Stop::Ended(self.report(SHUTDOWN)));
                }
                return None;
            }
            self.vcpu.request_nmi_window(true);
        }
        let vector = self.apic.pending();
        let extint = self.vm.fabric.extint_for(&self.apic);
        self.attention.set(Attention::EXTINT, extint);
        if vector.is_some() || extint {
            if open.interrupts_open {
                let vector = match vector {
                    Some(_) => Some(self.apic.acknowledge()),
                    None => match self.take_extint() {
                        Ok(vector) => vector,
                        Err(Over) => return Some(Stop::Ordered),
                    },
                };
                if let Some(vector) = vector {
                    self.wake();
                    if !self.vcpu.inject(Event::Interrupt(vector)) {
                        return Some(Stop::Ended(self.report(SHUTDOWN)));
                    }
                }
                let more = self.apic.pending().is_some() || self.vm.fabric.extint_for(&self.apic);
                self.want_window(more);
            } else if !self.attention.contains(Attention::HALTED) {
                self.want_window(true);
            }
        } else {
            self.want_window(false);
        }
        if self.attention.contains(Attention::HALTED) {
            if !self.vcpu.rflags().contains(RFlags::IF) && self.fall_deaf() {
                return Some(Stop::Ended(End::Halted));
            }
            let until = self.vm.tsc_at(self.next_event());
            return Some(Stop::Halted { until });
        }
        None
    }

    /// The acknowledge cycle with the 8259A; `None`: another vCPU was faster.
    fn take_extint(&mut self) -> Result<Option<arch::Vector>, Over> {
        let mut board = self.vm.board()?;
        let vector = board.pic_interrupt().then(|| board.pic_acknowledge());
        let _ = Self::left(&mut self.attention, &self.vm, &board);
        self.attention.set(Attention::EXTINT, board.pic_interrupt());
        Ok(vector)
    }

    /// The vCPU has something to execute again.
    fn wake(&mut self) {
        self.attention.remove(Attention::HALTED | Attention::WAITS);
    }

    /// The vCPU hears nothing but NMI, INIT and start-up. `true`: and neither does any other, so
    /// that nobody is left to send them.
    fn fall_deaf(&self) -> bool {
        let own = 1 << (self.id() & 63);
        self.vm.deaf.fetch_or(own, SeqCst);
        // One that was told something and does not know it yet is deaf on paper alone. It takes
        // itself off the paper before it looks.
        let all = || self.vm.deaf.load(SeqCst).count_ones() as usize == self.vm.vcpus();
        all() && !(0..self.vm.vcpus()).any(|vcpu| self.vm.fabric.is_signalled(vcpu)) && all()
    }

    /// INIT (SDM Vol. 3A §9.1, table 9-1).
    fn init(&mut self) -> Option<Stop> {
        let id = self.id();
        self.apic.take_init();
        if id == 0 {
            // The boot CPU goes on at the reset vector, where firmware starts the machine afresh.
            return Some(Stop::Ended(End::Reset));
        }
        self.vcpu.init();
        self.apic.init();
        self.vm.fabric.publish_init(&mut self.apic);
        self.shown_tpr = (0, 0);
        self.vcpu.set_virtual_tpr(0, 0);
        self.want_window(false);
        self.code_page = emulate::CodePage::NONE;
        self.attention.remove(Attention::HALTED);
        self.attention.insert(Attention::WAITS);
        None
    }

    /// A start-up: real mode at a page of the first megabyte (SDM Vol. 3A §9.4.4.1).
    fn start_up(&mut self, page: u8) {
        self.wake();
        self.vcpu.set_segment(
            SegmentRegister::Cs,
            arch::Segment {
                selector: u16::from(page) << 8,
                base: u64::from(page) << 12,
                limit: 0xffff,
                rights: AccessRights(0x9b),
            },
        );
        self.vcpu.set_rip(0);
    }

    /// Where the instruction that exited ends. `Ok(None)`: enter the guest again.
    #[inline(always)]
    fn next_rip(&mut self, expected: Expected) -> Result<Option<u64>, Over> {
        if let Some(next) = self.vcpu.next_rip() {
            return Ok(Some(next));
        }
        let page = &mut self.code_page;
        let mut memory = self.vm.memory()?;
        let plain = emulate::plain_next_rip(&self.vcpu, &mut *memory, page, expected);
        drop(memory);
        match plain {
            Some(next) => Ok(Some(next)),
            None => self.decode_next_rip(expected),
        }
    }

    #[cold]
    fn decode_next_rip(&mut self, expected: Expected) -> Result<Option<u64>, Over> {
        let decoded = emulate::decode_next_rip(&self.vcpu, &mut *self.vm.memory()?, expected);
        match decoded {
            Ok(next) => Ok(Some(next)),
            Err(error) => self.no_length(error).map(|_| None),
        }
    }

    #[cold]
    fn no_length(&mut self, error: LengthError) -> Handled {
        match error {
            LengthError::Changed => Ok(Next::Enter),
            LengthError::Fault(fault) => {
                if fault.deliver(&mut self.vcpu) {
                    Ok(Next::Enter)
                } else {
                    Err(self.shut_down())
                }
            }
            LengthError::Failed(error) => Err(self.crash(&format!("{error}"))),
        }
    }

    /// Ends the instruction that exited.
    #[inline(always)]
    fn retire(&mut self, next: u64) -> Handled {
        match emulate::retire(&mut self.vcpu, next) {
            Done::Next => Ok(Next::Enter),
            done => self.done(done),
        }
    }

    /// [`Self::retire`] after an instruction that changed something outside of the vCPU.
    #[inline(always)]
    fn retire_and_prepare(&mut self, next: u64) -> Handled {
        self.retire(next).map(|_| Next::Prepare)
    }

    /// [`Self::retire`] after an instruction that leaves this to do.
    #[inline(always)]
    fn retire_and(&mut self, next: u64, then: Next) -> Handled {
        match self.retire(next)? {
            Next::Enter => Ok(then),
            more => Ok(more),
        }
    }

    /// What follows an emulated instruction.
    #[cold]
    fn done(&mut self, done: Done) -> Handled {
        if done.deliver(&mut self.vcpu) {
            Ok(Next::Prepare)
        } else {
            Err(self.shut_down())
        }
    }

    /// An instruction without effect.
    fn skip(&mut self, expected: Expected) -> Handled {
        match self.next_rip(expected)? {
            Some(next) => self.retire_and_prepare(next),
            None => Ok(Next::Enter),
        }
    }

    /// An instruction without effect that is one of two.
    fn skip_either(&mut self, first: Expected, second: Expected) -> Handled {
        let decoded = emulate::next_rip(&self.vcpu, &mut *self.vm.memory()?, first);
        match decoded {
            Ok(next) => self.retire(next),
            Err(LengthError::Changed) => self.skip(second),
            Err(error) => self.no_length(error),
        }
    }

    #[inline]
    fn inject(&mut self, event: Event) -> Handled {
        if self.vcpu.inject(event) {
            Ok(Next::Prepare)
        } else {
            Err(self.shut_down())
        }
    }

    #[inline(always)]
    fn cpuid(&mut self) -> Handled {
        let Some(next) = self.next_rip(Expected::Cpuid)? else {
            return Ok(Next::Enter);
        };
        let gprs = self.vcpu.gprs();
        let (leaf, subleaf) = (gprs[Gpr::Rax] as u32, gprs[Gpr::Rcx] as u32);
        let Some(&[eax, ebx, ecx, edx]) = self.vm.cpuid.constant(leaf, subleaf) else {
            return self.cpuid_of_vcpu(leaf, subleaf, next);
        };
        let gprs = self.vcpu.gprs_mut();
        gprs[Gpr::Rax] = eax.into();
        gprs[Gpr::Rbx] = ebx.into();
        gprs[Gpr::Rcx] = ecx.into();
        gprs[Gpr::Rdx] = edx.into();
        self.retire(next)
    }

    /// CPUID where the answer depends on the vCPU's state, or has to be looked for.
    #[inline(never)]
    fn cpuid_of_vcpu(&mut self, leaf: u32, subleaf: u32, next: u64) -> Handled {
        let answer = self.vm.cpuid.answer(leaf, subleaf, &self.vcpu, &self.apic);
        let [eax, ebx, ecx, edx] = answer;
        let gprs = self.vcpu.gprs_mut();
        gprs[Gpr::Rax] = eax.into();
        gprs[Gpr::Rbx] = ebx.into();
        gprs[Gpr::Rcx] = ecx.into();
        gprs[Gpr::Rdx] = edx.into();
        self.retire(next)
    }

    #[inline(always)]
    fn apic_write(&mut self, offset: u16, host: &mut impl Host) -> Handled {
        let now = self.vm.time_at(host.tsc());
        let effect = self.apic.apic_write_done(offset, now);
        self.apply(effect)?;
        Ok(Next::Prepare)
    }

    /// Does what a write to the local APIC has left to do.
    #[inline(always)]
    fn apply(&mut self, effect: ApicEffect) -> Result<(), Over> {
        match effect {
            ApicEffect::None | ApicEffect::Timer => Ok(()),
            effect => self.apply_outside(effect),
        }
    }

    #[inline(never)]
    fn apply_outside(&mut self, effect: ApicEffect) -> Result<(), Over> {
        if self.vm.fabric.apply(&mut self.apic, effect) {
            let mut board = self.vm.board()?;
            board.apic.finish(effect);
            let extint = self.vm.fabric.extint_for(&self.apic);
            self.attention.set(Attention::EXTINT, extint);
        }
        self.attention.insert(Attention::KICKS);
        Ok(())
    }

    #[inline(always)]
    fn port(&mut self, io: IoExit, host: &mut impl Host) -> Handled {
        let rax = self.vcpu.gprs()[Gpr::Rax];
        let byte = io.size == 1;
        // Both vendors tell where a port access ends; only a broken one would not.
        let Some(next) = self.vcpu.next_rip() else {
            return Err(self.crash("the hardware gave no length for a port access"));
        };
        let mut board = self.vm.board()?;
        if io.input {
            let pic = if byte { board.pic_read(io.port) } else { None };
            let value = match pic {
                Some(value) => value.into(),
                None => {
                    let now = self.vm.time_at(host.tsc());
                    u64::from(board.port_read(io.port, io.size, now))
                }
            };
            let merged = match io.size {
                1 => rax & !0xff | value & 0xff,
                2 => rax & !0xffff | value & 0xffff,
                _ => value,
            };
            self.vcpu.gprs_mut()[Gpr::Rax] = merged;
        } else {
            let value = match io.size {
                1 => rax as u32 & 0xff,
                2 => rax as u32 & 0xffff,
                _ => rax as u32,
            };
            if !(byte && board.pic_write(io.port, value as u8)) {
                let now = self.vm.time_at(host.tsc());
                board.port_write(io.port, io.size, value, now);
            }
        }
        let then = Self::left(&mut self.attention, &self.vm, &board);
        drop(board);
        self.retire_and(next, then)
    }

    fn string_port(&mut self, io: IoExit, host: &mut impl Host) -> Handled {
        let mut board = self.vm.board()?;
        let mut bus = Bus {
            now: self.vm.time_at(host.tsc()),
            apic: &mut self.apic,
            effect: ApicEffect::None,
            board: Some(&mut board),
        };
        let mut memory = self.vm.memory()?;
        let done = emulate::string_io(&mut self.vcpu, &mut *memory, &mut bus, &io);
        drop(memory);
        let _ = Self::left(&mut self.attention, &self.vm, &board);
        drop(board);
        match done {
            Ok(done) => self.done(done),
            Err(error) => Err(self.crash(&format!("port {:#x}: {error}", io.port))),
        }
    }

    fn halt(&mut self) -> Handled {
        if let Some(next) = self.next_rip(Expected::Hlt)? {
            self.retire(next)?;
            // A single-step trap ends the halt as it begins (SDM Vol. 2A, HLT).
            let kicked = core::mem::take(&mut self.kicked);
            let halts = !kicked && self.vcpu.pending_event().is_none();
            self.attention.set(Attention::HALTED, halts);
            // What it sent before it halts leaves first.
            let listens = self.listens;
            self.attention.set(Attention::FRAMES, listens);
        }
        Ok(Next::Prepare)
    }

    fn fault(
        &mut self,
        addr: GuestPhysAddr,
        access: Access,
        walk: bool,
        host: &mut impl Host,
    ) -> Handled {
        self.take_tpr();
        // Nothing is RAM at the local APIC's usual place, which is where guests go all the time.
        let at_apic = addr.align_down(PAGE_SIZE).as_u64() == map::LOCAL_APIC;
        let outcome = if at_apic {
            FaultOutcome::NotRam
        } else {
            self.vm.memory()?.fault(addr, access)
        };
        match outcome {
            FaultOutcome::Backed => return Ok(Next::Enter),
            FaultOutcome::OutOfMemory => {
                return Err(self.crash(&format!("no host memory is left for its page {addr}")));
            }
            FaultOutcome::NotRam | FaultOutcome::ReadOnly => {}
        }
        if walk || access.execute {
            let what = if walk { "page tables" } else { "instructions" };
            return Err(self.crash(&format!("{what} at {addr}, where there is no memory")));
        }
        if self.vcpu.pending_event().is_some() {
            return Err(self.crash(&format!(
                "a stack or table at {addr}, where there is no memory"
            )));
        }
        let now = self.vm.time_at(host.tsc());
        if at_apic && self.apic.mode() == ApicMode::XApic {
            let mut bus = Bus {
                now,
                apic: &mut self.apic,
                effect: ApicEffect::None,
                board: None,
            };
            let mut memory = self.vm.memory()?;
            let done = emulate::fast_mov(&mut self.vcpu, &mut *memory, &mut bus, addr, access);
            let effect = bus.effect;
            drop(memory);
            if let Some(done) = done {
                self.apply(effect)?;
                return match done {
                    // A register that was read is as it was.
                    Done::Next if !access.write => Ok(Next::Enter),
                    Done::Next => Ok(Next::Prepare),
                    done => self.done(done),
                };
            }
        }
        self.device(addr, access, now)
    }

    /// An access to device memory.
    #[inline(never)]
    fn device(&mut self, addr: GuestPhysAddr, access: Access, now: Nanos) -> Handled {
        let mut board = self.vm.board()?;
        let mut bus = Bus {
            now,
            apic: &mut self.apic,
            effect: ApicEffect::None,
            board: Some(&mut board),
        };
        let (vcpu, mut memory) = (&mut self.vcpu, self.vm.memory()?);
        let fast = emulate::fast_mov(vcpu, &mut *memory, &mut bus, addr, access);
        let (load, done) = match fast {
            Some(done) => (!access.write, Ok(done)),
            None => (false, emulate::emulate(vcpu, &mut *memory, &mut bus)),
        };
        drop(memory);
        let effect = bus.effect;
        let then = Self::left(&mut self.attention, &self.vm, &board);
        drop(board);
        self.apply(effect)?;
        match done {
            // Of one register, which may even be the local APIC's at an unusual place.
            Ok(Done::Next) if load => Ok(then),
            Ok(Done::Next | Done::Again) => Ok(Next::Prepare),
            Ok(done) => self.done(done),
            Err(error) => Err(self.crash(&format!("access to {addr}: {error}"))),
        }
    }

    #[inline(always)]
    fn rdmsr(&mut self, host: &mut impl Host) -> Handled {
        let Some(next) = self.next_rip(Expected::Rdmsr)? else {
            return Ok(Next::Enter);
        };
        let index = self.vcpu.gprs()[Gpr::Rcx] as u32;
        if index == msr::IA32_PAT {
            let value = self.vcpu.msr(index).unwrap_or(0);
            return self.retire_with(next, value);
        }
        // On SVM the guest may have moved TPR.
        self.take_tpr();
        let now = self.vm.time_at(host.tsc());
        let mut context = MsrContext {
            vcpu: &mut self.vcpu,
            apic: &mut self.apic,
            features: self.vm.cpuid.features(),
            now,
        };
        match self.msrs.read(index, &mut context) {
            Ok(value) => self.retire_with(next, value),
            Err(fault) => self.no_msr(fault, "RDMSR", index),
        }
    }

    /// Ends an instruction that gives `value` in EDX:EAX.
    #[inline(always)]
    fn retire_with(&mut self, next: u64, value: u64) -> Handled {
        let gprs = self.vcpu.gprs_mut();
        gprs[Gpr::Rax] = value & 0xffff_ffff;
        gprs[Gpr::Rdx] = value >> 32;
        self.retire(next)
    }

    #[inline(always)]
    fn wrmsr(&mut self, host: &mut impl Host) -> Handled {
        let Some(next) = self.next_rip(Expected::Wrmsr)? else {
            return Ok(Next::Enter);
        };
        let gprs = self.vcpu.gprs();
        let index = gprs[Gpr::Rcx] as u32;
        let value = gprs[Gpr::Rdx] << 32 | gprs[Gpr::Rax] & 0xffff_ffff;
        if index == msr::IA32_TSC_DEADLINE {
            let now = self.vm.time_at(host.tsc());
            let _: ApicEffect = self.apic.set_tsc_deadline(value, now);
            return self.retire_and_prepare(next);
        }
        if index == msr::IA32_PAT && machine::msr::is_pat(value) {
            self.vcpu.set_msr(index, value);
            return self.retire(next);
        }
        // The end of an interrupt needs no time either, and uncovers only what waits.
        if self.apic.is_x2_eoi(index, value) {
            let effect = self.apic.eoi();
            if effect == ApicEffect::None && !self.apic.has_work() {
                return self.retire(next);
            }
            self.apply(effect)?;
            return self.retire_and_prepare(next);
        }
        let now = self.vm.time_at(host.tsc());
        self.take_tpr();
        let mut context = MsrContext {
            vcpu: &mut self.vcpu,
            apic: &mut self.apic,
            features: self.vm.cpuid.features(),
            now,
        };
        match self.msrs.write(index, value, &mut context) {
            Ok(MsrEffect::None | MsrEffect::Apic(ApicEffect::None | ApicEffect::Timer)) => {}
            Ok(effect) => self.msr_effect(effect, now)?,
            Err(fault) => return self.no_msr(fault, "WRMSR", index),
        }
        self.retire_and_prepare(next)
    }

    /// What a write to an MSR leaves to do.
    #[inline(never)]
    fn msr_effect(&mut self, effect: MsrEffect, now: Nanos) -> Result<(), Over> {
        match effect {
            MsrEffect::None => {}
            MsrEffect::Apic(effect) => self.apply(effect)?,
            MsrEffect::ApicBase => self.apic_moved()?,
            MsrEffect::Tsc => {
                let base = self.apic.clock().base();
                self.vcpu.set_tsc_offset(base.wrapping_sub(self.vm.origin));
                self.write_time(now)?;
            }
            MsrEffect::SystemTime => self.write_time(now)?,
            MsrEffect::WallClock => {
                let at = self.msrs.wall_clock();
                // A guest that names an address without memory gets no clock.
                let _ = pvclock::write_wall_clock(&mut *self.vm.memory()?, at, self.vm.epoch);
            }
            MsrEffect::StealTime => {
                self.stolen_shown = None;
                self.show_stolen(false)?;
            }
            MsrEffect::PredictionBarrier => {
                self.vcpu.set_msr(msr::IA32_PRED_CMD, 1);
            }
        }
        Ok(())
    }

    /// Writes how much time was taken from the vCPU where the guest wants it.
    pub(crate) fn show_stolen(&mut self, preempted: bool) -> Result<(), Over> {
        // The memory of a VM that is given up may be half changed.
        if self.vm.order() == Order::Abandon {
            return Err(Over);
        }
        if self.stolen_shown != Some((self.stolen, preempted))
            && let Some(at) = pvclock::record_address(self.msrs.steal_time())
        {
            self.stolen_shown = Some((self.stolen, preempted));
            let memory = &mut *self.vm.memory()?;
            let _ = pvclock::write_steal_time(memory, at, self.stolen, preempted);
        }
        Ok(())
    }

    /// Writes the paravirtual clock's record where the guest wants it.
    fn write_time(&mut self, now: Nanos) -> Result<(), Over> {
        if let Some(at) = pvclock::record_address(self.msrs.system_time()) {
            // As above: an address without memory means no clock.
            let _ = pvclock::write_time(&mut *self.vm.memory()?, at, self.apic.clock(), now);
        }
        Ok(())
    }

    /// The local APIC's mode or place changed.
    fn apic_moved(&mut self) -> Result<(), Over> {
        let home = map::LOCAL_APIC;
        let mode = match self.apic.mode() {
            ApicMode::XApic if self.apic.base_address() == home => arch::ApicMode::XApic,
            ApicMode::X2Apic => arch::ApicMode::X2Apic,
            // Elsewhere its registers are reached by emulation.
            _ => arch::ApicMode::Disabled,
        };
        if let Some(page) = self.vm.apic_access_page {
            let mut memory = self.vm.memory()?;
            let own = 1 << (self.id() & 63);
            // The tables are those of all vCPUs: the page that hardware watches is there while
            // all of them have their registers at home. Else those that do are emulated.
            let before = if mode == arch::ApicMode::XApic {
                self.vm.elsewhere.fetch_and(!own, SeqCst)
            } else {
                self.vm.elsewhere.fetch_or(own, SeqCst)
            };
            let home = GuestPhysAddr::new(home);
            match (before == 0, self.vm.elsewhere.load(SeqCst) == 0) {
                (true, false) => memory.unmap_device_page(home),
                (false, true) => _ = memory.map_device_page(home, page),
                _ => {}
            }
            // What other vCPUs still have cached of it is what they may use.
            self.vcpu.flush_nested(memory.root());
        }
        self.vcpu.set_apic_mode(mode);
        self.apply(ApicEffect::Reachable)
    }

    #[cold]
    fn no_msr(&mut self, fault: MsrFault, what: &str, index: u32) -> Handled {
        if fault == MsrFault::Unknown {
            let count = &self.vm.unknown_msrs;
            let count = count.fetch_update(Relaxed, Relaxed, |count| count.checked_add(1));
            let count = count.map_or(u32::MAX, |before| before + 1);
            // The first few, then at powers of two: a guest cannot flood the log.
            if count <= 8 || count.is_power_of_two() {
                log::warn!(
                    "vm {}: {what} of unknown MSR {index:#x} gets #GP ({count} so far)",
                    self.vm.name,
                );
            }
        }
        self.inject(Event::GP0)
    }

    #[inline(always)]
    fn hypercall(&mut self) -> Handled {
        let Some(next) = self.next_rip(Expected::Hypercall)? else {
            return Ok(Next::Enter);
        };
        let result = if self.vcpu.cpl() != 0 {
            abi::hypercall::ERROR_PRIVILEGE
        } else {
            match self.vcpu.gprs()[Gpr::Rax] {
                abi::hypercall::VERSION => abi::VERSION.into(),
                abi::hypercall::YIELD
                | abi::hypercall::KICK_CPU
                | abi::hypercall::EXITS
                | abi::hypercall::VMCS_ACCESSES => return self.other_hypercall(next),
                #[cfg(feature = "fault-injection")]
                abi::hypercall::FAULT => return self.other_hypercall(next),
                _ => abi::hypercall::ERROR_UNKNOWN,
            }
        };
        self.vcpu.gprs_mut()[Gpr::Rax] = result as u64;
        self.retire(next)
    }

    #[inline(never)]
    fn other_hypercall(&mut self, next: u64) -> Handled {
        let gprs = self.vcpu.gprs();
        let (number, argument, target) = (gprs[Gpr::Rax], gprs[Gpr::Rbx], gprs[Gpr::Rcx]);
        let mut then = Next::Enter;
        let result = match (number, self.vcpu.control_accesses()) {
            (abi::hypercall::YIELD, _) => {
                then = Next::Yield;
                0
            }
            (abi::hypercall::KICK_CPU, _) => {
                self.vm.fabric.unhalt(target as usize);
                self.attention.insert(Attention::KICKS);
                then = Next::Prepare;
                0
            }
            (abi::hypercall::EXITS, _) => match self.counts.of(argument) {
                Some(count) => count as i64 & i64::MAX,
                None => abi::hypercall::ERROR_ARGUMENT,
            },
            (abi::hypercall::VMCS_ACCESSES, Some([reads, writes])) => {
                ((writes & 0x7fff_ffff) << 32 | reads & 0xffff_ffff) as i64
            }
            #[cfg(feature = "fault-injection")]
            (abi::hypercall::FAULT, _) => {
                then = Next::Prepare;
                self.fail(self.vcpu.gprs()[Gpr::Rbx])
            }
            _ => abi::hypercall::ERROR_UNKNOWN,
        };
        self.vcpu.gprs_mut()[Gpr::Rax] = result as u64;
        let retired = self.retire(next)?;
        Ok(if then == Next::Enter { retired } else { then })
    }

    /// The guest shut down.
    #[cold]
    fn shut_down(&mut self) -> Over {
        self.crash(SHUTDOWN)
    }

    /// The VM cannot go on.
    #[cold]
    fn crash(&mut self, cause: &str) -> Over {
        self.end = Some(self.report(cause));
        Over
    }

    /// The report of a crash: what happened and where.
    #[cold]
    fn report(&self, cause: &str) -> End {
        let vcpu = &self.vcpu;
        let cs = vcpu.segment(SegmentRegister::Cs);
        End::Crashed(format!(
            "{cause} (rip {:#x}, cs {:#x} base {:#x}, rsp {:#x}, rflags {:#x}, cr0 {:#x}, \
             cr2 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x})",
            vcpu.rip(),
            cs.selector,
            cs.base,
            vcpu.rsp(),
            vcpu.rflags().bits(),
            vcpu.cr(ControlRegister::Cr0),
            vcpu.cr(ControlRegister::Cr2),
            vcpu.cr(ControlRegister::Cr3),
            vcpu.cr(ControlRegister::Cr4),
            vcpu.efer(),
        ))
    }

    /// Exits that are not on any hot path.
    #[cold]
    fn rare(&mut self, host: &mut impl Host) -> Handled {
        let exit = self.vcpu.rare_exit();
        self.take_tpr();
        match exit {
            Exit::Io(io) => self.string_port(io, host),
            Exit::Pause => self.skip(Expected::Pause).map(|_| Next::Yield),
            Exit::NmiWindow => {
                self.vcpu.request_nmi_window(false);
                Ok(Next::Prepare)
            }
            Exit::TprBelowThreshold | Exit::Benign | Exit::InitOrSipi | Exit::Nmi => {
                Ok(Next::Prepare)
            }
            Exit::Cr(access) => self.control_register(access),
            Exit::Dr { .. } => self.debug_register(),
            Exit::Exception {
                exception,
                error_code,
                info,
            } => self.reflect(exception, error_code, info),
            Exit::Invlpg => {
                let decoded = emulate::decode_invlpg(&self.vcpu, &mut *self.vm.memory()?);
                match decoded {
                    // With nested paging the guest's own INVLPG does the work; it exits only
                    // where a backend asks for that.
                    Ok((_, next)) => self.retire(next),
                    Err(error) => self.no_length(error),
                }
            }
            // QEMU's emulation reports INVD as WBINVD.
            Exit::Invd | Exit::Wbinvd => match self.vcpu.next_rip() {
                Some(next) => self.retire(next),
                None => self.skip_either(Expected::Wbinvd, Expected::Invd),
            },
            Exit::Xsetbv => self.xsetbv(),
            Exit::Rdpmc => self.inject(Event::GP0),
            Exit::Rdtsc | Exit::Rdtscp => {
                let expected = if exit == Exit::Rdtsc {
                    Expected::Rdtsc
                } else {
                    Expected::Rdtscp
                };
                let Some(next) = self.next_rip(expected)? else {
                    return Ok(Next::Enter);
                };
                let now = self.vm.time_at(host.tsc());
                let tsc = self.apic.clock().tsc(now);
                let aux = self.vcpu.msr(msr::IA32_TSC_AUX).unwrap_or(0);
                let gprs = self.vcpu.gprs_mut();
                gprs[Gpr::Rax] = tsc & 0xffff_ffff;
                gprs[Gpr::Rdx] = tsc >> 32;
                if exit == Exit::Rdtscp {
                    gprs[Gpr::Rcx] = aux & 0xffff_ffff;
                }
                self.retire(next)
            }
            // Hidden by CPUID, so they do not exist for the guest.
            Exit::Monitor | Exit::Mwait | Exit::UndefinedInstruction => self.inject(Event::UD),
            Exit::TripleFault => Err(self.shut_down()),
            Exit::TaskSwitch => Err(self.crash("a hardware task switch, which is not supported")),
            Exit::NestedMisconfig { addr } => {
                Err(self.crash(&format!("nested page table entry for {addr} is malformed")))
            }
            Exit::EntryFailed(failure) => Err(self.crash(&format!(
                "the processor refused to enter the guest: code {:#x}, detail {:#x}",
                failure.code, failure.detail
            ))),
            Exit::Unknown { code, detail } => {
                Err(self.crash(&format!("unknown exit {code:#x}, detail {detail:#x}")))
            }
            other => Err(self.crash(&format!("unexpected exit {other:?}"))),
        }
    }

    /// An intercepted exception is the guest's own: it gets it.
    fn reflect(&mut self, exception: Exception, error_code: Option<u32>, info: u64) -> Handled {
        match exception {
            // A machine check belongs to the machine; the guest's CPU has no banks to read.
            Exception::MachineCheck => return Err(self.crash("machine check while it ran")),
            Exception::PageFault => self.vcpu.set_cr2(info),
            Exception::Debug => {
                // DR6 collects the causes; DR7.GD is cleared on delivery (SDM Vol. 3B §17.2).
                let dr6 = self.vcpu.dr(DebugRegister::Dr6);
                self.vcpu.set_dr(DebugRegister::Dr6, dr6 & !0xf | info);
                let dr7 = self.vcpu.dr(DebugRegister::Dr7);
                self.vcpu.set_dr(DebugRegister::Dr7, dr7 & !(1 << 13));
            }
            _ => {}
        }
        self.inject(Event::Exception {
            exception,
            error_code,
        })
    }

    fn control_register(&mut self, access: CrAccess) -> Handled {
        let (op, next) = match access.op {
            CrOp::Undecoded { write } => {
                let mut memory = self.vm.memory()?;
                let (vcpu, register) = (&mut self.vcpu, access.register);
                let decoded = emulate::decode_cr(vcpu, &mut *memory, register, write);
                drop(memory);
                match decoded {
                    Ok(decoded) => decoded,
                    Err(error) => return self.no_length(error),
                }
            }
            op => match self.next_rip(Expected::MovCr)? {
                Some(next) => (op, next),
                None => return Ok(Next::Enter),
            },
        };
        let cr0 = self.vcpu.cr(ControlRegister::Cr0);
        let fine = match op {
            CrOp::Read(gpr) => {
                let value = match access.register {
                    ControlRegister::Cr8 => u64::from(self.apic.tpr() >> 4),
                    register => self.vcpu.cr(register),
                };
                self.vcpu.set_gpr(gpr, value);
                true
            }
            CrOp::Write(gpr) => {
                let value = self.wide_gpr(gpr);
                self.write_control(access.register, value)?
            }
            CrOp::Clts => self.write_control(ControlRegister::Cr0, cr0 & !Cr0::TS.bits())?,
            // LMSW sets PE, MP, EM and TS, and cannot clear PE (SDM Vol. 2A, LMSW).
            CrOp::Lmsw(source) => {
                let value = cr0 & !0xe | u64::from(source) & 0xf;
                self.write_control(ControlRegister::Cr0, value)?
            }
            CrOp::Undecoded { .. } => false,
        };
        if fine {
            self.retire(next)
        } else {
            self.inject(Event::GP0)
        }
    }

    /// A register as MOV to a control or debug register takes it: 64 bits wide in 64-bit code.
    fn wide_gpr(&self, gpr: Gpr) -> u64 {
        let long = self.vcpu.efer() & arch::Efer::LMA.bits() != 0
            && self.vcpu.segment(SegmentRegister::Cs).rights.long();
        self.vcpu.gpr(gpr) & if long { u64::MAX } else { u32::MAX.into() }
    }

    /// The page-directory pointers of PAE paging, which the processor reads at some writes of
    /// control registers and then keeps (SDM Vol. 3A §4.4.1); `None` means #GP(0).
    fn page_directory_pointers(&self, cr3: u64) -> Result<Option<[u64; 4]>, Over> {
        let width = self.vm.cpuid.features().phys_bits.into();
        // Not the accessed bit, which some CPUs set in them.
        let reserved = 0x1c6 | u64::MAX.checked_shl(width).unwrap_or(0);
        let mut entries = [0; 4];
        let mut memory = self.vm.memory()?;
        for (at, entry) in (cr3 & 0xffff_ffe0..).step_by(8).zip(&mut entries) {
            let Ok(value) = memory.read_u64(GuestPhysAddr::new(at)) else {
                return Ok(None);
            };
            if value & 1 != 0 && value & reserved != 0 {
                return Ok(None);
            }
            *entry = value;
        }
        Ok(Some(entries))
    }

    /// Writes a control register by the rules of SDM Vol. 3A §2.5; `false` means #GP(0).
    fn write_control(&mut self, register: ControlRegister, mut value: u64) -> Result<bool, Over> {
        let vcpu = &self.vcpu;
        let efer = arch::Efer::from_bits_retain(vcpu.efer());
        let cr4 = Cr4::from_bits_retain(vcpu.cr(ControlRegister::Cr4));
        let old = Cr0::from_bits_retain(vcpu.cr(ControlRegister::Cr0));
        let legal = match register {
            ControlRegister::Cr0 => {
                let new = Cr0::from_bits_retain(value);
                let long = vcpu.segment(SegmentRegister::Cs).rights.long();
                let turns_on = new.contains(Cr0::PG) && !old.contains(Cr0::PG);
                let turns_off = !new.contains(Cr0::PG) && old.contains(Cr0::PG);
                value >> 32 == 0
                    && (!new.contains(Cr0::PG) || new.contains(Cr0::PE))
                    && (!new.contains(Cr0::NW) || new.contains(Cr0::CD))
                    && !(turns_on && efer.contains(arch::Efer::LME) && !cr4.contains(Cr4::PAE))
                    && !(turns_on && efer.contains(arch::Efer::LME) && long)
                    && !(turns_off && (long || cr4.contains(Cr4::PCIDE)))
                    && (new.contains(Cr0::WP) || !cr4.contains(Cr4::CET))
            }
            ControlRegister::Cr4 => {
                let new = Cr4::from_bits_retain(value);
                let long = efer.contains(arch::Efer::LMA);
                value & !self.vm.cpuid.features().cr4 == 0
                    && (!long || new.contains(Cr4::PAE))
                    && !(long && (new ^ cr4).contains(Cr4::LA57))
                    && (!new.contains(Cr4::PCIDE)
                        || cr4.contains(Cr4::PCIDE)
                        || long && vcpu.cr(ControlRegister::Cr3) & 0xfff == 0)
                    && (!new.contains(Cr4::CET) || old.contains(Cr0::WP))
            }
            ControlRegister::Cr8 => value < 16,
            ControlRegister::Cr3 => {
                // With PCIDs, bit 63 only asks not to flush (SDM Vol. 3A §4.10.4.1).
                if cr4.contains(Cr4::PCIDE) {
                    value &= !(1 << 63);
                }
                value >> self.vm.cpuid.features().phys_bits == 0
            }
            ControlRegister::Cr2 => true,
        };
        if !legal {
            return Ok(false);
        }
        // What of each register makes the processor read the pointers of PAE paging again.
        let mut cr3 = vcpu.cr(ControlRegister::Cr3);
        let (paging, pae, reads) = match register {
            ControlRegister::Cr0 => {
                // ET is hardwired to one.
                value |= Cr0::ET.bits();
                let new = Cr0::from_bits_retain(value);
                let reads = (new ^ old).intersects(Cr0::PG | Cr0::CD | Cr0::NW);
                (new.contains(Cr0::PG), cr4.contains(Cr4::PAE), reads)
            }
            ControlRegister::Cr3 => {
                cr3 = value;
                (old.contains(Cr0::PG), cr4.contains(Cr4::PAE), true)
            }
            ControlRegister::Cr4 => {
                let new = Cr4::from_bits_retain(value);
                let reads = (new ^ cr4).intersects(Cr4::PAE | Cr4::PGE | Cr4::PSE | Cr4::SMEP);
                (old.contains(Cr0::PG), new.contains(Cr4::PAE), reads)
            }
            ControlRegister::Cr2 | ControlRegister::Cr8 => (false, false, false),
        };
        let mut pointers = None;
        if paging && pae && reads && !efer.contains(arch::Efer::LME) {
            pointers = self.page_directory_pointers(cr3)?;
            if pointers.is_none() {
                return Ok(false);
            }
        }
        if register == ControlRegister::Cr8 {
            self.apic.set_tpr((value as u8) << 4);
        } else {
            self.vcpu.set_cr(register, value);
        }
        if let Some(pointers) = pointers {
            self.vcpu.set_pdptes(pointers);
        }
        Ok(true)
    }

    fn debug_register(&mut self) -> Handled {
        let decoded = emulate::decode_dr(&self.vcpu, &mut *self.vm.memory()?);
        let (access, next) = match decoded {
            Ok(decoded) => decoded,
            Err(error) => return self.no_length(error),
        };
        // DR4 and DR5 are names of DR6 and DR7 unless CR4.DE is set (SDM Vol. 3B §17.2.2).
        let extended = self.vcpu.cr(ControlRegister::Cr4) & Cr4::DE.bits() != 0;
        if extended && matches!(access.register, DebugRegister::Dr4 | DebugRegister::Dr5) {
            return self.inject(Event::UD);
        }
        if access.write {
            let value = self.wide_gpr(access.gpr);
            let wide = matches!(
                access.register,
                DebugRegister::Dr4 | DebugRegister::Dr5 | DebugRegister::Dr6 | DebugRegister::Dr7
            ) && value >> 32 != 0;
            if wide {
                return self.inject(Event::GP0);
            }
            self.vcpu.set_dr(access.register, value);
        } else {
            let value = self.vcpu.dr(access.register);
            self.vcpu.set_gpr(access.gpr, value);
        }
        self.retire(next)
    }

    fn xsetbv(&mut self) -> Handled {
        let Some(next) = self.next_rip(Expected::Xsetbv)? else {
            return Ok(Next::Enter);
        };
        let gprs = self.vcpu.gprs();
        let index = gprs[Gpr::Rcx] as u32;
        let value = gprs[Gpr::Rdx] << 32 | gprs[Gpr::Rax] & 0xffff_ffff;
        if index != 0
            || self.vcpu.cpl() != 0
            || !xcr0_is_legal(value, self.vm.cpuid.features().xcr0)
        {
            return self.inject(Event::GP0);
        }
        self.vcpu.set_xcr0(value);
        self.retire(next)
    }
}

/// Whether XCR0 may be set so, with `allowed` bits (Intel SDM Vol. 1 §13.3).
fn xcr0_is_legal(value: u64, allowed: u64) -> bool {
    const X87: u64 = 1;
    const SSE: u64 = 1 << 1;
    const AVX: u64 = 1 << 2;
    const MPX: u64 = 3 << 3;
    const AVX512: u64 = 7 << 5;
    const AMX: u64 = 3 << 17;
    let whole = |set: u64| value & set == 0 || value & set == set;
    value & !allowed == 0
        && value & X87 != 0
        && (value & AVX == 0 || value & SSE != 0)
        && whole(MPX)
        && whole(AVX512)
        && (value & AVX512 == 0 || value & AVX != 0)
        && whole(AMX)
}

#[cfg(test)]
mod tests;
