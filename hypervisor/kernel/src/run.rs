//! The run loop of a core: pick a VM, run it until something wants the core, repeat.

use crate::backend::{self, Backend, Setup};
use crate::bring_up::{Host, STATUS_BOOT};
use crate::console::{self, Request};
use crate::frames::{self, Frames};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use arch::Nanos;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use hw::{CoreTimer, TIMER_VECTOR};
use log::{error, info, warn};
use monitor::command::Command;
use sched::{Decision, Scheduler, VcpuId};
use vm::bundle::Bundle;
use vm::config::{Config, OnReboot, VmConfig};
use vm::{End, Stop, VmError};

/// Exit status for a VM that crashed.
const STATUS_CRASH: u32 = 101;
/// Exit status when a person ended the VMs.
const STATUS_LEFT: u32 = 0;
/// A VM that resets itself sooner than this after its start waits before it starts again: twice
/// as long each time, up to [`LONGEST_WAIT`]. Else it could flood the log and the core.
const SHORT_LIFE: u64 = 1_000_000_000;
/// In nanoseconds.
const FIRST_WAIT: u64 = 50_000_000;
/// In nanoseconds.
const LONGEST_WAIT: u64 = 5_000_000_000;
/// How often the serial port is polled where it has no interrupt, in nanoseconds.
const POLL: u64 = 10_000_000;

static TIMER_FIRED: AtomicBool = AtomicBool::new(false);
static SERIAL_FIRED: AtomicBool = AtomicBool::new(false);
static POLL_SERIAL: AtomicBool = AtomicBool::new(false);
/// NMIs that came and were not told of yet.
static NMIS: AtomicU32 = AtomicU32::new(0);

/// The serial port has no interrupt: look at it on every tick.
pub fn poll_serial() {
    POLL_SERIAL.store(true, Ordering::Relaxed);
}

/// A non-maskable interrupt of the machine. It may hit anywhere, so it takes no lock.
pub fn host_nmi() {
    NMIS.fetch_add(1, Ordering::Relaxed);
}

/// An interrupt of the machine.
pub fn host_interrupt(vector: u8) {
    if vector == TIMER_VECTOR {
        TIMER_FIRED.store(true, Ordering::Relaxed);
    } else {
        SERIAL_FIRED.store(true, Ordering::Relaxed);
    }
}

struct Guest {
    config: VmConfig,
    vm: Option<Box<dyn backend::Guest>>,
    end: Option<End>,
    started: Nanos,
    /// How long it waits before it starts again, in nanoseconds.
    wait: u64,
}

impl Guest {
    /// Whether it has reset itself and will start again.
    const fn waits(&self) -> bool {
        self.vm.is_none() && self.end.is_none() && self.wait > 0
    }
}

/// What the guests' rooms need of the machine while one runs.
pub struct CoreHost<'a> {
    guest: usize,
    timer: &'a mut CoreTimer,
    /// TSC at which the core is wanted for something else.
    slice_end: u64,
}

impl vm::Host for CoreHost<'_> {
    fn tsc(&self) -> u64 {
        hw::rdtsc()
    }
    fn arm(&mut self, deadline: u64) {
        self.timer.arm(deadline.min(self.slice_end));
    }
    fn interrupted(&mut self) -> bool {
        cpu::host::serve_interrupts();
        if TIMER_FIRED.swap(false, Ordering::Relaxed) {
            self.timer.fired();
        }
        SERIAL_FIRED.load(Ordering::Relaxed) || hw::rdtsc() >= self.slice_end
    }
    fn output(&mut self, bytes: &[u8]) {
        console::guest_output(self.guest, bytes);
    }
}

/// The core's time: nanoseconds since the guests were made.
struct Clock {
    hz: u64,
    origin: u64,
}

impl Clock {
    fn now(&self) -> Nanos {
        self.at(hw::rdtsc())
    }
    fn at(&self, tsc: u64) -> Nanos {
        if tsc == u64::MAX {
            return Nanos::NEVER;
        }
        Nanos::from_ticks(tsc.saturating_sub(self.origin), self.hz)
    }
    fn tsc_at(&self, when: Nanos) -> u64 {
        if when == Nanos::NEVER {
            u64::MAX
        } else {
            self.origin + when.to_ticks(self.hz) + 1
        }
    }
}

/// The guests of one machine and the core that runs them.
struct Core<'a> {
    backend: &'a dyn Backend,
    host: &'a Host,
    bundle: &'a Bundle<'a>,
    timer: CoreTimer,
    clock: Clock,
    scheduler: Scheduler,
    guests: Vec<Guest>,
    /// Whose vCPU is on the core.
    loaded: Option<usize>,
    /// The first bad end: exit status and reason.
    failure: Option<(u32, String)>,
}

/// Makes the guests of the configuration, runs them until all have ended, and says how it went.
pub fn run(
    backend: &dyn Backend,
    host: &Host,
    timer: CoreTimer,
    bundle: &Bundle<'_>,
    config: &Config,
    started: u64,
) -> (u32, String) {
    let mut core = Core {
        backend,
        host,
        bundle,
        timer,
        clock: Clock {
            hz: host.tsc_hz,
            origin: hw::rdtsc(),
        },
        scheduler: Scheduler::default(),
        guests: Vec::new(),
        loaded: None,
        failure: None,
    };
    for entry in &config.vms {
        match entry {
            Ok(config) => core.add(config),
            Err(error) => {
                error!("{error}");
                core.fail(STATUS_BOOT, error.to_string());
            }
        }
    }
    let focus = config.host.focus.as_deref();
    let focus = core
        .guests
        .iter()
        .position(|guest| Some(guest.config.name.as_str()) == focus);
    console::focus(focus.unwrap_or(0));
    console::say(format_args!(
        "bench boot-to-guest {} tsc",
        hw::rdtsc() - started
    ));
    if core.serve() {
        return (STATUS_LEFT, "left at the console".to_string());
    }
    core.failure
        .unwrap_or_else(|| (0, "every VM ended well".to_string()))
}

impl Core<'_> {
    fn fail(&mut self, status: u32, reason: String) {
        self.failure.get_or_insert((status, reason));
    }

    /// Adds a guest and starts it.
    fn add(&mut self, config: &VmConfig) {
        let number = console::add_guest(&config.name, None);
        self.guests.push(Guest {
            config: config.clone(),
            vm: None,
            end: None,
            started: Nanos::ZERO,
            wait: 0,
        });
        self.start(number);
    }

    /// Makes a guest's VM and lets it run.
    fn start(&mut self, number: usize) {
        let Some(config) = self.guests.get(number).map(|guest| guest.config.clone()) else {
            return;
        };
        let now = self.clock.now();
        let mut made = None;
        let sound = cpu::guard::run(|| made = Some(self.create(number, &config)));
        let failed = || VmError::Vcpu("the hypervisor failed while it made this VM".to_string());
        match made
            .filter(|_| sound.is_ok())
            .unwrap_or_else(|| Err(failed()))
        {
            Ok(vm) => {
                if let Some(guest) = self.guests.get_mut(number) {
                    guest.vm = Some(vm);
                    guest.started = now;
                    self.scheduler.wake(VcpuId(number));
                }
            }
            Err(error) => {
                error!("vm {}: {error}", config.name);
                if let Some(guest) = self.guests.get_mut(number) {
                    guest.wait = 0;
                }
                self.fail(STATUS_BOOT, format!("vm {}: {error}", config.name));
            }
        }
    }

    fn create(
        &mut self,
        number: usize,
        config: &VmConfig,
    ) -> Result<Box<dyn backend::Guest>, VmError> {
        let (before_heap, before_frames) = (frames::heap_used(), frames::free_bytes());
        let promised: u64 = self
            .guests
            .iter()
            .filter_map(|guest| guest.vm.as_ref())
            .map(|vm| vm.vm().outstanding_bytes())
            .sum();
        let host = self.host;
        let now = hw::rdtsc();
        let setup = Setup {
            config,
            bundle: self.bundle,
            format: self.backend.format(),
            phys: host.map,
            frames: Frames,
            free_bytes: before_frames.saturating_sub(promised),
            tsc: now,
            tsc_hz: host.tsc_hz,
            wall_clock: host.wall_clock + Nanos::from_ticks(now - host.wall_tsc, host.tsc_hz).0,
            enabled: self.backend.enabled(),
            host_cpuid: &|leaf, subleaf| {
                let result = core::arch::x86_64::__cpuid_count(leaf, subleaf);
                [result.eax, result.ebx, result.ecx, result.edx]
            },
            apic_access_page: self.backend.apic_access_page(),
        };
        let vm = self.backend.create(host, number as u16, setup)?;
        info!(
            "vm {}: {} MiB, {} vCPU, kernel {}",
            config.name,
            config.memory >> 20,
            config.vcpus,
            config.kernel.name
        );
        let heap = frames::heap_used().saturating_sub(before_heap) as u64;
        let taken = before_frames.saturating_sub(frames::free_bytes());
        console::say(format_args!(
            "bench vm-memory {} bytes",
            heap + taken.saturating_sub(vm.vm().backed_bytes())
        ));
        Ok(vm)
    }

    /// Runs until every guest has ended (`false`) or a person leaves (`true`).
    fn serve(&mut self) -> bool {
        loop {
            if self.console() {
                return true;
            }
            match NMIS.swap(0, Ordering::Relaxed) {
                0 => {}
                count => warn!("{count} NMI: the machine reports a fault that it does not name"),
            }
            let now = self.clock.now();
            let polling = POLL_SERIAL.load(Ordering::Relaxed);
            let poll = if polling { now + POLL } else { Nanos::NEVER };
            match self.scheduler.next(now) {
                Decision::Run(VcpuId(number), until) => self.turn(number, until.min(poll)),
                Decision::Idle(until) => {
                    self.unload();
                    self.timer.arm(self.clock.tsc_at(until.min(poll)));
                    // What came since the console was looked at ends the halt at once.
                    cpu::host::wait_for_interrupt();
                    TIMER_FIRED.store(false, Ordering::Relaxed);
                    self.timer.fired();
                }
                Decision::Nothing => return false,
            }
        }
    }

    /// Takes what was typed; `true` means leave.
    fn console(&mut self) -> bool {
        SERIAL_FIRED.store(false, Ordering::Relaxed);
        while let Some(request) = console::poll() {
            match request {
                Request::Leave => return true,
                Request::Command(command) => {
                    if self.monitor(command) {
                        return true;
                    }
                }
            }
        }
        for (number, guest) in self.guests.iter_mut().enumerate() {
            if let Some(vm) = &mut guest.vm
                && console::has_input(number)
            {
                let mut taken = 0;
                let sound = cpu::guard::run(|| {
                    console::guest_input(number, &mut |bytes| {
                        let used = vm.vm_mut().input(bytes, hw::rdtsc());
                        taken += used;
                        used
                    });
                });
                if sound.is_err() {
                    vm.vm_mut().stop();
                }
                if taken > 0 || sound.is_err() {
                    self.scheduler.wake(VcpuId(number));
                }
            }
        }
        false
    }

    fn unload(&mut self) {
        if let Some(guest) = self
            .loaded
            .take()
            .and_then(|number| self.guests.get_mut(number))
            && let Some(vm) = &mut guest.vm
        {
            vm.vm_mut().unload();
        }
    }

    /// Gives a guest the core until then at the latest.
    fn turn(&mut self, number: usize, until: Nanos) {
        if self.loaded != Some(number) {
            self.unload();
        }
        let Some(vm) = self
            .guests
            .get_mut(number)
            .and_then(|guest| guest.vm.as_mut())
        else {
            // Either it is over, or its wait before the next start is.
            self.scheduler.remove(VcpuId(number));
            if self.guests.get(number).is_some_and(Guest::waits) {
                self.start(number);
            }
            return;
        };
        if self.loaded != Some(number) {
            vm.vm_mut().load();
            self.loaded = Some(number);
        }
        let slice_end = self.clock.tsc_at(until);
        let mut stop = None;
        let mut host = CoreHost {
            guest: number,
            timer: &mut self.timer,
            slice_end,
        };
        let result = cpu::guard::run(|| stop = Some(vm.run(&mut host)));
        let vcpu = VcpuId(number);
        match stop {
            Some(Stop::Preempted) => {
                if self.clock.now() >= until {
                    self.scheduler.yield_now(vcpu);
                }
            }
            Some(Stop::Yield) => self.scheduler.yield_now(vcpu),
            Some(Stop::Halted { until }) => self.scheduler.sleep(vcpu, self.clock.at(until)),
            Some(Stop::Ended(end)) => self.finish(number, end, result.is_ok()),
            None => {
                let cause = "the hypervisor failed while it worked for this VM".to_string();
                self.finish(number, End::Crashed(cause), false);
            }
        }
    }

    /// A guest is over: everything it held goes back, and it starts again if it should. A VM whose
    /// work was abandoned is `sound` no more: its structures are given up, not walked.
    fn finish(&mut self, number: usize, end: End, sound: bool) {
        self.unload();
        self.scheduler.remove(VcpuId(number));
        console::flush(number);
        let Some(guest) = self.guests.get_mut(number) else {
            return;
        };
        let (name, config) = (guest.config.name.clone(), guest.config.clone());
        match &end {
            End::Crashed(cause) => console::say(format_args!("vm {name}: crashed: {cause}")),
            _ => console::say(format_args!("vm {name}: ended: {end}")),
        }
        let now = self.clock.now();
        let restarts = end == End::Reset && config.on_reboot == OnReboot::Restart;
        guest.wait = if restarts && now.since(guest.started) < SHORT_LIFE {
            (guest.wait * 2).clamp(FIRST_WAIT, LONGEST_WAIT)
        } else {
            0
        };
        let wait = guest.wait;
        match guest.vm.take() {
            Some(vm) if sound => {
                if cpu::guard::run(|| vm.destroy()).is_err() {
                    error!("vm {name}: its memory is lost until the machine starts again");
                }
            }
            lost => core::mem::forget(lost),
        }
        if restarts && wait > 0 {
            self.scheduler.sleep(VcpuId(number), now + wait);
            return;
        }
        if restarts {
            self.start(number);
            return;
        }
        if let Some((status, reason)) = verdict(&config, &end) {
            self.fail(status, reason);
        }
        if let Some(guest) = self.guests.get_mut(number) {
            guest.end = Some(end);
        }
    }

    /// Carries out what was typed at the monitor; `true` means leave.
    fn monitor(&mut self, command: Command) -> bool {
        let (Command::Shutdown(number) | Command::Stop(number)) = command else {
            match command {
                Command::Quit | Command::PowerOff => return true,
                Command::List => self.list(),
                _ => console::reply(format_args!("not there yet")),
            }
            return false;
        };
        let Some(guest) = self.guests.get_mut(number) else {
            return false;
        };
        if command == Command::Stop(number) && guest.waits() {
            guest.end = Some(End::Stopped);
            self.scheduler.remove(VcpuId(number));
            return false;
        }
        match (command, &mut guest.vm) {
            (Command::Stop(_), Some(vm)) => vm.vm_mut().stop(),
            (_, Some(vm)) => vm.vm_mut().power_button(),
            (_, None) => {
                console::reply(format_args!("vm {}: is not running", guest.config.name));
                return false;
            }
        }
        self.scheduler.wake(VcpuId(number));
        false
    }

    fn list(&self) {
        for (number, guest) in self.guests.iter().enumerate() {
            let state = match (&guest.vm, &guest.end) {
                (Some(vm), _) => format!(
                    "running, {} KiB of {} in use",
                    vm.vm().backed_bytes() >> 10,
                    vm.vm().promised_bytes() >> 10
                ),
                (None, Some(end)) => format!("ended: {end}"),
                (None, None) if guest.waits() => "waits to start again".to_string(),
                (None, None) => "not started".to_string(),
            };
            console::say(format_args!(
                "{} {}: {state}",
                number + 1,
                guest.config.name
            ));
        }
        console::say(format_args!(
            "{} KiB of memory free",
            frames::free_bytes() >> 10
        ));
    }
}

/// The status that a VM's bad end gives the whole run; `None` for a good end.
fn verdict(config: &VmConfig, end: &End) -> Option<(u32, String)> {
    let name = &config.name;
    match end {
        End::PoweredOff | End::Halted | End::Reset | End::Stopped => None,
        End::DebugExit(code) if *code == config.devices.success_code => None,
        End::DebugExit(code) => Some((*code, format!("vm {name}: debug exit with code {code}"))),
        End::Crashed(cause) => Some((STATUS_CRASH, format!("vm {name}: crashed: {cause}"))),
    }
}
