//! A running VM: entry, exit, and what each exit means.
//!
//! The loop is the hot path of the whole hypervisor. Exits that guests make all day (CPUID, MSR,
//! ports, local APIC, EOI, HLT) are handled here in line and generic over the backend; anything
//! else goes through one cold function. Nothing here allocates, takes a lock, or knows what
//! vendor runs the guest.

use crate::vm::{End, Host, Stop, Vm};
use alloc::format;
use arch::{
    Access, ControlRegister, Cr0, Cr4, CrAccess, CrOp, DebugRegister, Event, Exception, Exit,
    FrameSource, Gpr, GuestMemory, GuestPhysAddr, IoExit, Nanos, PAGE_SIZE, PhysMemory, RFlags,
    SegmentRegister, Vcpu, msr,
};
use machine::apic::{ApicEffect, ApicMode, Then};
use machine::board::Board;
use machine::emulate::{self, Done, Expected, LengthError, MmioBus, PortBus};
use machine::map;
use machine::msr::{MsrContext, MsrEffect, MsrFault};
use machine::pvclock;
use memory::FaultOutcome;

/// The cause of a crash by the guest's shutdown.
const SHUTDOWN: &str = "triple fault";

/// What lies behind guest-physical addresses that are not RAM.
struct Bus<'a> {
    board: &'a mut Board,
    now: Nanos,
}

impl Bus<'_> {
    /// The register offset, if the address lies in the local APIC's page.
    fn local_apic(&self, addr: GuestPhysAddr) -> Option<u16> {
        let apic = &self.board.apic.local[0];
        let offset = addr.as_u64().wrapping_sub(apic.base_address());
        (offset < PAGE_SIZE && apic.mode() == ApicMode::XApic).then_some(offset as u16)
    }
}

impl MmioBus for Bus<'_> {
    #[inline(always)]
    fn read(&mut self, addr: GuestPhysAddr, size: u8) -> u64 {
        if let Some(offset) = self.local_apic(addr) {
            // Registers are 32 bits wide on 16-byte boundaries; narrower reads see their bytes.
            let value = self.board.apic.read_mmio(0, offset & !3, self.now);
            return u64::from(value) >> (8 * (offset & 3));
        }
        self.board.mmio_read(addr.as_u64(), size, self.now)
    }
    #[inline(always)]
    fn write(&mut self, addr: GuestPhysAddr, size: u8, value: u64) {
        if let Some(offset) = self.local_apic(addr) {
            // Whatever follows shows in what `prepare` looks at.
            let _: Then = self
                .board
                .apic
                .write_mmio(0, offset, value as u32, self.now);
            return;
        }
        self.board.mmio_write(addr.as_u64(), size, value, self.now);
    }
}

impl PortBus for Bus<'_> {
    fn read(&mut self, port: u16, size: u8) -> u32 {
        self.board.port_read(port, size, self.now)
    }
    fn write(&mut self, port: u16, size: u8, value: u32) {
        self.board.port_write(port, size, value, self.now);
    }
}

/// What is to be done before the next entry.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Nothing: the exit changed nothing that [`Vm::prepare`] looks at.
    Enter,
    /// [`Vm::prepare`].
    Prepare,
    /// The machine's interrupts get their turn, then [`Vm::prepare`].
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

/// The VM came to its end, which stands in [`Vm::end`]: too large to be passed on every path.
#[derive(Clone, Copy)]
struct Over;

/// How an exit was handled. All paths of the run loop give it in a register.
type Handled = Result<Next, Over>;

impl<V: Vcpu, P: PhysMemory, F: FrameSource> Vm<V, P, F> {
    /// Runs the guest until something else wants the core or the guest wants nothing of it. The
    /// vCPU must be loaded.
    pub fn run(&mut self, host: &mut impl Host) -> Stop {
        if self.stop {
            return Stop::Ended(End::Stopped);
        }
        self.tick(host);
        'prepare: loop {
            self.take_tpr();
            if let Some(stop) = self.prepare(host) {
                return stop;
            }
            loop {
                // The compiler joins this match with the backend's on the raw reason.
                let handled = match self.vcpu.enter() {
                    Exit::Cpuid => self.cpuid(),
                    Exit::Hypercall => self.hypercall(),
                    Exit::Rdmsr => self.rdmsr(host),
                    Exit::Wrmsr => self.wrmsr(host),
                    Exit::Io(io) => self.port(io, host),
                    Exit::ApicWrite { offset } => self.apic_write(offset, host),
                    Exit::NestedFault { addr, access, walk } => {
                        self.fault(addr, access, walk, host)
                    }
                    Exit::Hlt => self.halt(),
                    // The only ways in which a deadline shows.
                    Exit::ExternalInterrupt(_) | Exit::PreemptionTimer => Ok(Next::Serve),
                    // These only ask for a new look at what is pending.
                    Exit::InterruptWindow | Exit::TprBelowThreshold => Ok(Next::Prepare),
                    // Windows, and exceptions that arise in their own delivery (CVE-2015-5307,
                    // CVE-2015-8104), come before interrupts of the machine: a guest that brings
                    // them about without end would keep those out for ever.
                    _ => self.rare(host).map(Next::or_serve),
                };
                match handled {
                    Ok(Next::Enter) => {}
                    Ok(Next::Prepare) => continue 'prepare,
                    Ok(Next::Serve) => {
                        if host.interrupted() {
                            return Stop::Preempted;
                        }
                        self.tick(host);
                        continue 'prepare;
                    }
                    Ok(Next::Yield) => return Stop::Yield,
                    Err(Over) => return self.ended(host),
                }
            }
        }
    }

    #[cold]
    fn ended(&mut self, host: &mut impl Host) -> Stop {
        self.drain(host);
        Stop::Ended(self.end.take().unwrap_or(End::Stopped))
    }

    /// Lets devices and timers come up to the present. While the guest runs, that is only needed
    /// when the deadline that [`Vm::arm`] set has passed: the guest leaves then.
    fn tick(&mut self, host: &mut impl Host) {
        let now = self.time_at(host.tsc());
        self.board.tick(now);
        self.board.apic.local[0].tick(now);
        // A timer may go off a little early, and rings once.
        self.armed = None;
    }

    /// Takes over TPR where the guest changes it in the hardware's own copy, which has the
    /// priority class alone.
    #[inline(always)]
    fn take_tpr(&mut self) {
        if let Some(tpr) = self.vcpu.virtual_tpr()
            && tpr >> 4 != self.shown_tpr.0 >> 4
        {
            self.shown_tpr.0 = tpr;
            self.board.apic.local[0].set_tpr(tpr);
        }
    }

    /// Brings interrupts and deadlines up to date before an entry.
    #[inline(always)]
    fn prepare(&mut self, host: &mut impl Host) -> Option<Stop> {
        let board = &self.board;
        let apic = &board.apic.local[0];
        let shown = (apic.tpr(), 0);
        let next = board.next_event().min(apic.next_event());
        let work = apic.has_work() | board.wants_attention() | self.window | self.halted;
        if work || shown != self.shown_tpr {
            return self.prepare_in_full(host);
        }
        if self.armed != Some(next) {
            self.arm(next, host);
        }
        None
    }

    #[inline(never)]
    fn prepare_in_full(&mut self, host: &mut impl Host) -> Option<Stop> {
        if let Some(stop) = self.deliver(host) {
            return Some(stop);
        }
        let apic = &self.board.apic.local[0];
        let shown = (apic.tpr(), apic.tpr_threshold());
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

    /// Delivers what is pending, or asks for the window in which it can be.
    fn deliver(&mut self, host: &mut impl Host) -> Option<Stop> {
        let apic = &self.board.apic.local[0];
        if apic.has_signals() || self.board.wants_attention() || self.halted {
            return self.attend(host);
        }
        if apic.pending().is_none() {
            self.want_window(false);
        } else if self.vcpu.interruptibility().interrupts_open {
            let vector = self.board.apic.local[0].acknowledge();
            if !self.vcpu.inject(Event::Interrupt(vector)) {
                return Some(Stop::Ended(self.report(SHUTDOWN)));
            }
            // Another may wait behind it.
            self.want_window(self.board.apic.local[0].pending().is_some());
        } else {
            self.want_window(true);
        }
        None
    }

    /// When a device or the local APIC's timer next has something to do.
    #[inline]
    fn next_event(&self) -> Nanos {
        self.board
            .next_event()
            .min(self.board.apic.local[0].next_event())
    }

    #[inline]
    fn want_window(&mut self, on: bool) {
        if on != self.window {
            self.window = on;
            self.vcpu.request_interrupt_window(on);
        }
    }

    #[inline(always)]
    fn arm(&mut self, next: Nanos, host: &mut impl Host) {
        self.armed = Some(next);
        let deadline = self.tsc_at(next);
        // Where the vCPU has a timer of its own, the core's timer only ends the slice.
        let own = self.vcpu.set_deadline(deadline);
        host.arm(if own { u64::MAX } else { deadline });
    }

    /// What is not the common case of an entry: signals, the 8259A, HLT, and what the devices
    /// want of the host.
    #[cold]
    fn attend(&mut self, host: &mut impl Host) -> Option<Stop> {
        if self.board.has_actions() {
            self.drain(host);
            let actions = self.board.take_actions();
            if let Some(code) = actions.exit_code {
                return Some(Stop::Ended(End::DebugExit(code)));
            }
            if actions.watchdog {
                return Some(Stop::Ended(self.report("its watchdog ran out")));
            }
            if actions.power_off {
                return Some(Stop::Ended(End::PoweredOff));
            }
            if actions.reset.is_some() {
                return Some(Stop::Ended(End::Reset));
            }
        }
        let apic = &mut self.board.apic;
        let signals = apic.local[0].signals();
        let open = self.vcpu.interruptibility();
        if signals.init || signals.startup.is_some() {
            // The boot CPU of a machine with one CPU: INIT to itself restarts it in wait for a
            // start-up that nobody can send.
            let _ = apic.take_signals(0);
            if signals.init {
                return Some(Stop::Ended(self.report("INIT sent to the only vCPU")));
            }
        } else if signals.nmi {
            if open.nmi_open {
                let _ = apic.take_signals(0);
                self.halted = false;
                if !self.vcpu.inject(Event::Nmi) {
                    return Some(Stop::Ended(self.report(SHUTDOWN)));
                }
                return None;
            }
            self.vcpu.request_nmi_window(true);
        }
        let vector = apic.local[0].pending();
        let extint = self.board.pic_interrupt() && self.board.apic.accepts_extint(0);
        if vector.is_some() || extint {
            if open.interrupts_open {
                let vector = match vector {
                    Some(_) => self.board.apic.local[0].acknowledge(),
                    None => self.board.pic_acknowledge(),
                };
                self.halted = false;
                if !self.vcpu.inject(Event::Interrupt(vector)) {
                    return Some(Stop::Ended(self.report(SHUTDOWN)));
                }
                let more = self.board.apic.local[0].pending().is_some()
                    || (self.board.pic_interrupt() && self.board.apic.accepts_extint(0));
                self.want_window(more);
            } else if !self.halted {
                self.want_window(true);
            }
        } else {
            self.want_window(false);
        }
        if self.halted {
            if !self.vcpu.rflags().contains(RFlags::IF) {
                return Some(Stop::Ended(End::Halted));
            }
            let until = self.tsc_at(self.next_event());
            return Some(Stop::Halted { until });
        }
        None
    }

    /// Shows what the guest wrote.
    fn drain(&mut self, host: &mut impl Host) {
        self.board.console_output(&mut |bytes| host.output(bytes));
    }

    /// Where the instruction that exited ends. `Ok(None)`: enter the guest again.
    #[inline(always)]
    fn next_rip(&mut self, expected: Expected) -> Result<Option<u64>, Over> {
        if let Some(next) = self.vcpu.next_rip() {
            return Ok(Some(next));
        }
        let page = &mut self.code_page;
        match emulate::plain_next_rip(&self.vcpu, &mut self.memory, page, expected) {
            Some(next) => Ok(Some(next)),
            None => self.decode_next_rip(expected),
        }
    }

    #[cold]
    fn decode_next_rip(&mut self, expected: Expected) -> Result<Option<u64>, Over> {
        match emulate::decode_next_rip(&self.vcpu, &mut self.memory, expected) {
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

    /// [`Vm::retire`] after an instruction that changed something outside of the vCPU.
    #[inline(always)]
    fn retire_and_prepare(&mut self, next: u64) -> Handled {
        self.retire(next).map(|_| Next::Prepare)
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
        match emulate::next_rip(&self.vcpu, &mut self.memory, first) {
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
        let Some(&[eax, ebx, ecx, edx]) = self.cpuid.constant(leaf, subleaf) else {
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
        let apic = &self.board.apic.local[0];
        let [eax, ebx, ecx, edx] = self.cpuid.answer(leaf, subleaf, &self.vcpu, apic);
        let gprs = self.vcpu.gprs_mut();
        gprs[Gpr::Rax] = eax.into();
        gprs[Gpr::Rbx] = ebx.into();
        gprs[Gpr::Rcx] = ecx.into();
        gprs[Gpr::Rdx] = edx.into();
        self.retire(next)
    }

    #[inline(always)]
    fn apic_write(&mut self, offset: u16, host: &mut impl Host) -> Handled {
        let now = self.time_at(host.tsc());
        let effect = self.board.apic.local[0].apic_write_done(offset, now);
        let _: Then = self.board.apic.apply(0, effect);
        Ok(Next::Prepare)
    }

    #[inline(always)]
    fn port(&mut self, io: IoExit, host: &mut impl Host) -> Handled {
        let rax = self.vcpu.gprs()[Gpr::Rax];
        let byte = io.size == 1;
        // Both vendors tell where a port access ends; only a broken one would not.
        let Some(next) = self.vcpu.next_rip() else {
            return Err(self.crash("the hardware gave no length for a port access"));
        };
        if io.input {
            let pic = if byte {
                self.board.pic_read(io.port)
            } else {
                None
            };
            let value = match pic {
                Some(value) => value.into(),
                None => {
                    let now = self.time_at(host.tsc());
                    u64::from(self.board.port_read(io.port, io.size, now))
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
            if !(byte && self.board.pic_write(io.port, value as u8)) {
                let now = self.time_at(host.tsc());
                self.board.port_write(io.port, io.size, value, now);
            }
        }
        self.retire_and_prepare(next)
    }

    fn string_port(&mut self, io: IoExit, host: &mut impl Host) -> Handled {
        let mut bus = Bus {
            now: self.time_at(host.tsc()),
            board: &mut self.board,
        };
        match emulate::string_io(&mut self.vcpu, &mut self.memory, &mut bus, &io) {
            Ok(done) => self.done(done),
            Err(error) => Err(self.crash(&format!("port {:#x}: {error}", io.port))),
        }
    }

    fn halt(&mut self) -> Handled {
        if let Some(next) = self.next_rip(Expected::Hlt)? {
            self.retire(next)?;
            // A single-step trap ends the halt as it begins (SDM Vol. 2A, HLT).
            self.halted = self.vcpu.pending_event().is_none();
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
        let apic = addr.align_down(PAGE_SIZE).as_u64() == map::LOCAL_APIC;
        let outcome = if apic {
            FaultOutcome::NotRam
        } else {
            self.memory.fault(addr, access)
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
        let mut bus = Bus {
            now: self.time_at(host.tsc()),
            board: &mut self.board,
        };
        let (vcpu, memory) = (&mut self.vcpu, &mut self.memory);
        match emulate::fast_mov(vcpu, memory, &mut bus, addr, access) {
            Some(Done::Next) => return Ok(Next::Prepare),
            Some(done) => return self.done(done),
            None => {}
        }
        match emulate::emulate(vcpu, memory, &mut bus) {
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
        let now = self.time_at(host.tsc());
        let mut context = MsrContext {
            vcpu: &mut self.vcpu,
            apic: &mut self.board.apic.local[0],
            features: self.cpuid.features(),
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
            let now = self.time_at(host.tsc());
            let _: ApicEffect = self.board.apic.local[0].set_tsc_deadline(value, now);
            return self.retire_and_prepare(next);
        }
        if index == msr::IA32_PAT && machine::msr::is_pat(value) {
            self.vcpu.set_msr(index, value);
            return self.retire(next);
        }
        let apic = &mut self.board.apic.local[0];
        // The end of an interrupt needs no time either, and uncovers only what waits.
        if apic.is_x2_eoi(index, value) {
            let effect = apic.eoi();
            if effect == ApicEffect::None && !apic.has_work() {
                return self.retire(next);
            }
            let _: Then = self.board.apic.apply(0, effect);
            return self.retire_and_prepare(next);
        }
        let now = self.time_at(host.tsc());
        self.take_tpr();
        let mut context = MsrContext {
            vcpu: &mut self.vcpu,
            apic: &mut self.board.apic.local[0],
            features: self.cpuid.features(),
            now,
        };
        match self.msrs.write(index, value, &mut context) {
            Ok(MsrEffect::None | MsrEffect::Apic(ApicEffect::None | ApicEffect::Timer)) => {}
            Ok(effect) => self.msr_effect(effect, now),
            Err(fault) => return self.no_msr(fault, "WRMSR", index),
        }
        self.retire_and_prepare(next)
    }

    /// What a write to an MSR leaves to do.
    #[inline(never)]
    fn msr_effect(&mut self, effect: MsrEffect, now: Nanos) {
        match effect {
            MsrEffect::None => {}
            MsrEffect::Apic(effect) => {
                let _: Then = self.board.apic.apply(0, effect);
            }
            MsrEffect::ApicBase => self.apic_moved(),
            MsrEffect::Tsc => {
                let base = self.board.apic.local[0].clock().base();
                self.vcpu.set_tsc_offset(base.wrapping_sub(self.origin));
                self.write_time(now);
            }
            MsrEffect::SystemTime => self.write_time(now),
            MsrEffect::WallClock => {
                let at = self.msrs.wall_clock();
                // A guest that names an address without memory gets no clock.
                let _ = pvclock::write_wall_clock(&mut self.memory, at, self.epoch);
            }
            MsrEffect::StealTime => {
                if let Some(at) = pvclock::record_address(self.msrs.steal_time()) {
                    let _ = pvclock::write_steal_time(&mut self.memory, at, 0, false);
                }
            }
            MsrEffect::PredictionBarrier => {
                self.vcpu.set_msr(msr::IA32_PRED_CMD, 1);
            }
        }
    }

    /// Writes the paravirtual clock's record where the guest wants it.
    fn write_time(&mut self, now: Nanos) {
        if let Some(at) = pvclock::record_address(self.msrs.system_time()) {
            let clock = *self.board.apic.local[0].clock();
            // As above: an address without memory means no clock.
            let _ = pvclock::write_time(&mut self.memory, at, &clock, now);
        }
    }

    /// The local APIC's mode or place changed.
    fn apic_moved(&mut self) {
        let apic = &self.board.apic.local[0];
        let home = map::LOCAL_APIC;
        let mode = match apic.mode() {
            ApicMode::XApic if apic.base_address() == home => arch::ApicMode::XApic,
            ApicMode::X2Apic => arch::ApicMode::X2Apic,
            // Elsewhere its registers are reached by emulation.
            _ => arch::ApicMode::Disabled,
        };
        if let Some(page) = self.apic_access_page {
            let home = GuestPhysAddr::new(home);
            self.memory.unmap_device_page(home);
            if mode == arch::ApicMode::XApic {
                let _ = self.memory.map_device_page(home, page);
            }
            self.vcpu.flush_nested(self.memory.root());
        }
        self.vcpu.set_apic_mode(mode);
    }

    #[cold]
    fn no_msr(&mut self, fault: MsrFault, what: &str, index: u32) -> Handled {
        if fault == MsrFault::Unknown {
            self.unknown_msrs = self.unknown_msrs.saturating_add(1);
            // The first few, then at powers of two: a guest cannot flood the log.
            if self.unknown_msrs <= 8 || self.unknown_msrs.is_power_of_two() {
                log::warn!(
                    "vm {}: {what} of unknown MSR {index:#x} gets #GP ({} so far)",
                    self.name,
                    self.unknown_msrs
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
        } else if self.vcpu.gprs()[Gpr::Rax] == abi::hypercall::VERSION {
            abi::VERSION.into()
        } else {
            self.other_hypercall()
        };
        self.vcpu.gprs_mut()[Gpr::Rax] = result as u64;
        self.retire(next)
    }

    #[inline]
    fn other_hypercall(&self) -> i64 {
        match (self.vcpu.gprs()[Gpr::Rax], self.vcpu.control_accesses()) {
            (abi::hypercall::VMCS_ACCESSES, Some([reads, writes])) => {
                ((writes & 0x7fff_ffff) << 32 | reads & 0xffff_ffff) as i64
            }
            _ => abi::hypercall::ERROR_UNKNOWN,
        }
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
            Exit::Invlpg => match emulate::decode_invlpg(&self.vcpu, &mut self.memory) {
                // With nested paging the guest's own INVLPG does the work; it exits only where
                // a backend asks for that.
                Ok((_, next)) => self.retire(next),
                Err(error) => self.no_length(error),
            },
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
                let now = self.time_at(host.tsc());
                let tsc = self.board.apic.local[0].clock().tsc(now);
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
                match emulate::decode_cr(&mut self.vcpu, &mut self.memory, access.register, write) {
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
                    ControlRegister::Cr8 => u64::from(self.board.apic.local[0].tpr() >> 4),
                    register => self.vcpu.cr(register),
                };
                self.vcpu.set_gpr(gpr, value);
                true
            }
            CrOp::Write(gpr) => {
                let value = self.wide_gpr(gpr);
                self.write_control(access.register, value)
            }
            CrOp::Clts => self.write_control(ControlRegister::Cr0, cr0 & !Cr0::TS.bits()),
            // LMSW sets PE, MP, EM and TS, and cannot clear PE (SDM Vol. 2A, LMSW).
            CrOp::Lmsw(source) => {
                let value = cr0 & !0xe | u64::from(source) & 0xf;
                self.write_control(ControlRegister::Cr0, value)
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
    fn page_directory_pointers(&mut self, cr3: u64) -> Option<[u64; 4]> {
        let width = self.cpuid.features().phys_bits.into();
        let reserved = 0x1e6 | u64::MAX.checked_shl(width).unwrap_or(0);
        let mut entries = [0; 4];
        for (at, entry) in (cr3 & 0xffff_ffe0..).step_by(8).zip(&mut entries) {
            *entry = self.memory.read_u64(GuestPhysAddr::new(at)).ok()?;
            if *entry & 1 != 0 && *entry & reserved != 0 {
                return None;
            }
        }
        Some(entries)
    }

    /// Writes a control register by the rules of SDM Vol. 3A §2.5; `false` means #GP(0).
    fn write_control(&mut self, register: ControlRegister, mut value: u64) -> bool {
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
                value & !self.cpuid.features().cr4 == 0
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
                value >> self.cpuid.features().phys_bits == 0
            }
            ControlRegister::Cr2 => true,
        };
        if !legal {
            return false;
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
            pointers = self.page_directory_pointers(cr3);
            if pointers.is_none() {
                return false;
            }
        }
        if register == ControlRegister::Cr8 {
            self.board.apic.local[0].set_tpr((value as u8) << 4);
        } else {
            self.vcpu.set_cr(register, value);
        }
        if let Some(pointers) = pointers {
            self.vcpu.set_pdptes(pointers);
        }
        true
    }

    fn debug_register(&mut self) -> Handled {
        let (access, next) = match emulate::decode_dr(&self.vcpu, &mut self.memory) {
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
        if index != 0 || self.vcpu.cpl() != 0 || !xcr0_is_legal(value, self.cpuid.features().xcr0) {
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
