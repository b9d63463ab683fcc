//! The run loop of a core: pick a VM, run it until something wants the core, repeat.

use crate::bring_up::{self, Host, STATUS_BOOT};
use crate::console::{self, Request};
use crate::frames::{self, Frames};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use arch::{HostPhysAddr, Nanos, Vcpu};
use core::sync::atomic::{AtomicBool, Ordering};
use cpu::virt::VirtUnavailable;
use hw::{CoreTimer, DirectMap, TIMER_VECTOR};
use log::{error, info, warn};
use memory::Format;
use sched::{Decision, Scheduler, VcpuId};
use vm::bundle::Bundle;
use vm::config::{Config, OnReboot, VmConfig};
use vm::{End, Stop, Vm, VmError, VmSetup};

/// Exit status for a VM that crashed.
const STATUS_CRASH: u32 = 101;
/// Exit status when a person ended the VMs.
const STATUS_LEFT: u32 = 0;
/// How often the serial port is polled where it has no interrupt, in nanoseconds.
const POLL: u64 = 10_000_000;

static TIMER_FIRED: AtomicBool = AtomicBool::new(false);
static POLL_SERIAL: AtomicBool = AtomicBool::new(false);

/// The serial port has no interrupt: look at it on every tick.
pub fn poll_serial() {
    POLL_SERIAL.store(true, Ordering::Relaxed);
}

/// An interrupt of the machine.
pub fn host_interrupt(vector: u8) {
    if vector == TIMER_VECTOR {
        TIMER_FIRED.store(true, Ordering::Relaxed);
    }
}

/// One vendor's way to make vCPUs.
pub trait Backend: Sized {
    /// Its vCPU.
    type Vcpu: Vcpu;
    /// The format of its nested tables.
    const FORMAT: Format;
    /// Turns the extension on, on this core.
    fn enable(host: &Host) -> Result<Self, VirtUnavailable>;
    /// A vCPU with these nested tables, and the local APIC's register page.
    fn create_vcpu(
        &mut self,
        host: &Host,
        number: u16,
        root: HostPhysAddr,
        apic_page: HostPhysAddr,
    ) -> Result<Self::Vcpu, String>;
    /// A page to map at the local APIC's address in every guest, if the hardware wants one.
    fn apic_access_page(&self) -> Option<HostPhysAddr>;
}

struct Guest<V: Vcpu> {
    config: VmConfig,
    /// Boxed: a VM is large, and is never moved.
    vm: Option<Box<Vm<V, DirectMap, Frames>>>,
    end: Option<End>,
}

/// What the guests' rooms need of the machine while one runs.
struct CoreHost<'a> {
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
    fn output(&mut self, bytes: &[u8]) {
        console::guest_output(self.guest, bytes);
    }
}

struct Clock {
    hz: u64,
    origin: u64,
}

impl Clock {
    fn now(&self) -> Nanos {
        Nanos::from_ticks(hw::rdtsc() - self.origin, self.hz)
    }
    fn tsc_at(&self, when: Nanos) -> u64 {
        if when == Nanos::NEVER { u64::MAX } else { self.origin + when.to_ticks(self.hz) }
    }
}

/// Makes the guests of the configuration, runs them until all have ended, and says how it went.
pub fn run<B: Backend>(
    mut backend: B,
    host: &Host,
    mut timer: CoreTimer,
    bundle: &Bundle<'_>,
    config: &Config,
    started: u64,
) -> (u32, String) {
    let mut failure: Option<(u32, String)> = None;
    let mut guests: Vec<Guest<B::Vcpu>> = Vec::new();
    let mut core = Scheduler::default();
    let clock = Clock { hz: host.tsc_hz, origin: hw::rdtsc() };
    for entry in &config.vms {
        let vm_config = match entry {
            Ok(vm_config) => vm_config.clone(),
            Err(error) => {
                error!("{error}");
                failure.get_or_insert((STATUS_BOOT, "a VM's configuration is wrong".to_string()));
                continue;
            }
        };
        let number = console::add_guest(&vm_config.name);
        let mut guest = Guest { config: vm_config, vm: None, end: None };
        match create(&mut backend, host, number, &guest.config, bundle) {
            Ok(vm) => {
                guest.vm = Some(vm);
                core.wake(VcpuId(number));
            }
            Err(error) => {
                error!("vm {}: {error}", guest.config.name);
                failure.get_or_insert((STATUS_BOOT, format!("vm {}: {error}", guest.config.name)));
            }
        }
        guests.push(guest);
    }
    let focus = config.host.focus.as_deref();
    let focus = guests.iter().position(|guest| Some(guest.config.name.as_str()) == focus);
    console::focus(focus.unwrap_or(0));
    console::say(format_args!("bench boot-to-guest {} tsc", hw::rdtsc() - started));

    let mut loaded: Option<usize> = None;
    loop {
        if POLL_SERIAL.load(Ordering::Relaxed) || TIMER_FIRED.swap(false, Ordering::Relaxed) {
            timer.fired();
        }
        while let Some(request) = console::poll() {
            match request {
                Request::Leave => return (STATUS_LEFT, "left at the console".to_string()),
                Request::Command(line) => {
                    if monitor(&line, &mut guests) {
                        return (STATUS_LEFT, "left at the console".to_string());
                    }
                }
            }
        }
        for (number, guest) in guests.iter_mut().enumerate() {
            if let Some(vm) = &mut guest.vm
                && console::has_input(number)
            {
                let now = hw::rdtsc();
                console::guest_input(number, &mut |bytes| vm.input(bytes, now));
                core.wake(VcpuId(number));
            }
        }
        let now = clock.now();
        let poll = if POLL_SERIAL.load(Ordering::Relaxed) { now + POLL } else { Nanos::NEVER };
        let (number, until) = match core.next(now) {
            Decision::Run(VcpuId(number), until) => (number, until.min(poll)),
            Decision::Idle(until) => {
                timer.arm(clock.tsc_at(until.min(poll)));
                cpu::host::wait_for_interrupt();
                continue;
            }
            Decision::Nothing => break,
        };
        let Some(guest) = guests.get_mut(number) else { break };
        let Some(vm) = &mut guest.vm else {
            core.remove(VcpuId(number));
            continue;
        };
        if loaded != Some(number) {
            vm.load();
            loaded = Some(number);
        }
        let slice_end = clock.tsc_at(until);
        let mut stop = Stop::HostInterrupt;
        let mut core_host = CoreHost { guest: number, timer: &mut timer, slice_end };
        let result = cpu::guard::run(|| stop = vm.run(&mut core_host));
        if result.is_err() {
            stop = Stop::Ended(End::Crashed("the hypervisor failed while it worked for this VM".into()));
        }
        match stop {
            Stop::HostInterrupt => {
                cpu::host::serve_interrupts();
                if clock.now() >= until {
                    core.yield_now(VcpuId(number));
                }
            }
            Stop::Yield => core.yield_now(VcpuId(number)),
            Stop::Halted { until } => {
                let tsc = vm.host_tsc_at(until);
                let wake = if tsc == u64::MAX {
                    Nanos::NEVER
                } else {
                    Nanos::from_ticks(tsc.saturating_sub(clock.origin), clock.hz)
                };
                vm.unload();
                loaded = None;
                core.sleep(VcpuId(number), wake);
            }
            Stop::Ended(end) => {
                vm.unload();
                loaded = None;
                core.remove(VcpuId(number));
                console::flush(number);
                let restart = matches!(end, End::Reset) && guest.config.on_reboot == OnReboot::Restart;
                let name = guest.config.name.clone();
                report(&name, &end);
                // Whatever the VM held goes back before anything new is made.
                if result.is_ok() {
                    guest.vm = None;
                } else {
                    // Its structures may be half changed: they are given up, not walked.
                    core::mem::forget(guest.vm.take());
                }
                if restart {
                    match create(&mut backend, host, number, &guest.config, bundle) {
                        Ok(vm) => {
                            guest.vm = Some(vm);
                            core.wake(VcpuId(number));
                            continue;
                        }
                        Err(error) => {
                            error!("vm {name}: {error}");
                            failure.get_or_insert((STATUS_BOOT, format!("vm {name}: {error}")));
                        }
                    }
                }
                if let Some(bad) = verdict(&guest.config, &end) {
                    failure.get_or_insert(bad);
                }
                guest.end = Some(end);
            }
        }
    }
    failure.unwrap_or_else(|| (0, "every VM ended well".to_string()))
}

fn create<B: Backend>(
    backend: &mut B,
    host: &Host,
    number: usize,
    config: &VmConfig,
    bundle: &Bundle<'_>,
) -> Result<Box<Vm<B::Vcpu, DirectMap, Frames>>, VmError> {
    let (before_heap, before_frames) = (frames::heap_used(), frames::free_bytes());
    let now = hw::rdtsc();
    let setup = VmSetup {
        config,
        bundle,
        format: B::FORMAT,
        phys: host.map,
        frames: Frames,
        free_bytes: before_frames,
        tsc: now,
        tsc_hz: host.tsc_hz,
        wall_seconds: host.wall_seconds + (now - host.wall_tsc) / host.tsc_hz,
        host_cpuid: &|leaf, subleaf| {
            let result = core::arch::x86_64::__cpuid_count(leaf, subleaf);
            [result.eax, result.ebx, result.ecx, result.edx]
        },
        apic_access_page: backend.apic_access_page(),
    };
    let vm = Vm::new(setup, &mut |root, apic_page| {
        let apic_page = host.map.physical(apic_page);
        backend.create_vcpu(host, number as u16, root, apic_page)
    })?;
    let heap = frames::heap_used().saturating_sub(before_heap);
    let taken = before_frames.saturating_sub(frames::free_bytes());
    info!(
        "vm {}: {} MiB, {} vCPU, kernel {}",
        config.name,
        config.memory >> 20,
        config.vcpus,
        config.kernel.name
    );
    console::say(format_args!(
        "bench vm-memory {} bytes",
        heap as u64 + taken.saturating_sub(vm.backed_bytes())
    ));
    Ok(vm)
}

fn report(name: &str, end: &End) {
    match end {
        End::Crashed(cause) => error!("vm {name}: crashed: {cause}"),
        _ => console::say(format_args!("vm {name}: ended: {end}")),
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

/// Carries out a line typed at the monitor; `true` means leave.
fn monitor<V: Vcpu>(line: &str, guests: &mut [Guest<V>]) -> bool {
    let mut words = line.split_whitespace();
    let (verb, name) = (words.next().unwrap_or(""), words.next());
    let found = guests.iter_mut().find(|guest| Some(guest.config.name.as_str()) == name);
    match (verb, name, found) {
        ("", ..) => {}
        ("quit" | "exit", None, _) => return true,
        ("list", None, _) => {
            for (number, guest) in guests.iter().enumerate() {
                let state = match (&guest.vm, &guest.end) {
                    (Some(vm), _) => format!("running, {} KiB backed", vm.backed_bytes() >> 10),
                    (None, Some(end)) => format!("ended: {end}"),
                    (None, None) => "not started".to_string(),
                };
                console::say(format_args!("{} {}: {state}", number + 1, guest.config.name));
            }
            console::say(format_args!("{} KiB of memory free", frames::free_bytes() >> 10));
        }
        ("button", Some(_), Some(Guest { vm: Some(vm), .. })) => vm.power_button(hw::rdtsc()),
        ("stop", Some(_), Some(Guest { vm: Some(vm), .. })) => vm.stop(),
        ("button" | "stop", Some(name), _) => warn!("no VM `{name}` is running"),
        _ => console::say(format_args!(
            "list | button VM (press its power button) | stop VM (end it now) | quit"
        )),
    }
    false
}
