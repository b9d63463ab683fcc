//! The VMs' keeper: the one writer of their lives, on the boot core. It makes and unmakes them,
//! carries out what a person asks for, and knows when the machine's work is done.

use crate::backend::{Guest, Setup};
use crate::bring_up::STATUS_BOOT;
use crate::console::{self, Request};
use crate::frames::{self, Frames};
use crate::run::{Live, Machine};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::Nanos;
use core::sync::atomic::Ordering;
use log::{error, info, warn};
use monitor::command::Command;
use sched::{CoreId, CoreSet, Policy, VcpuId, VmId};
use vm::bundle::Bundle;
use vm::config::{Class, Config, MAX_VMS, Placement, Scheduling, VmConfig};
use vm::life::{Do, Life, Request as Ask, State};
use vm::{End, Order, VmError};

/// Exit status for a VM that crashed.
const STATUS_CRASH: u32 = 101;
/// The machine's most vCPUs: their numbers are their tags in the TLBs.
const MAX_NUMBERS: usize = MAX_VMS * vm::config::MAX_VCPUS as usize;

struct Kept {
    config: VmConfig,
    life: Life,
    end: Option<End>,
    /// The numbers of its vCPUs in the machine.
    numbers: Vec<u16>,
}

/// The VMs of a machine.
pub struct Manager {
    machine: &'static Machine,
    bundle: &'static Bundle<'static>,
    vms: Vec<Kept>,
    /// The numbers that vCPUs have.
    numbers: [u64; MAX_NUMBERS / 64],
    /// The first bad end: exit status and reason.
    failure: Option<(u32, String)>,
}

impl Manager {
    /// Makes the VMs of the configuration.
    pub fn new(
        machine: &'static Machine,
        bundle: &'static Bundle<'static>,
        config: &Config,
    ) -> Self {
        let mut this = Self {
            machine,
            bundle,
            vms: Vec::new(),
            numbers: [0; MAX_NUMBERS / 64],
            failure: None,
        };
        for entry in &config.vms {
            match entry {
                Ok(config) => this.add(config),
                Err(error) => {
                    error!("{error}");
                    this.fail(STATUS_BOOT, error.to_string());
                }
            }
        }
        let focus = config.host.focus.as_deref();
        let focus = this
            .vms
            .iter()
            .position(|vm| Some(vm.config.name.as_str()) == focus);
        console::focus(focus.unwrap_or(0));
        this
    }

    /// How it went: exit status and reason.
    pub fn verdict(self) -> (u32, String) {
        self.failure
            .unwrap_or_else(|| (0, "every VM ended well".to_string()))
    }

    fn fail(&mut self, status: u32, reason: String) {
        self.failure.get_or_insert((status, reason));
    }

    /// Adds a VM and starts it.
    fn add(&mut self, config: &VmConfig) {
        let number = console::add_guest(&config.name, config.console_port);
        let cores = self.machine.host.cores.len() as u32;
        let mut life = Life::new(config.into());
        let fits = config.check_cores("tessera.toml", cores);
        if let Err(error) = &fits {
            error!("{error}");
            self.fail(STATUS_BOOT, error.to_string());
        } else if config.autostart {
            let _ = life.request(Ask::Start, self.machine.clock.now());
        }
        self.vms.push(Kept {
            config: config.clone(),
            life,
            end: None,
            numbers: Vec::new(),
        });
        self.start_due(number);
    }

    /// When something is to be done by itself.
    pub fn due(&self) -> Nanos {
        let due = self.vms.iter().map(|vm| vm.life.due());
        due.min().unwrap_or(Nanos::NEVER)
    }

    /// Does what is to be done. `Some`: it is over, because a person leaves (`true`) or no VM is
    /// left to run.
    pub fn step(&mut self) -> Option<bool> {
        for core in self.machine.host.cores {
            match core.nmis.swap(0, Ordering::Relaxed) {
                0 => {}
                count => warn!("{count} NMI: the machine reports a fault that it does not name"),
            }
        }
        let mut gone = self.machine.take_gone();
        while gone != 0 {
            self.left(gone.trailing_zeros() as usize);
            gone &= gone - 1;
        }
        if self.console() {
            return Some(true);
        }
        for number in 0..self.vms.len() {
            self.start_due(number);
        }
        let active = self.vms.iter().any(|vm| vm.life.is_active());
        (!active).then_some(false)
    }

    fn start_due(&mut self, number: usize) {
        let now = self.machine.clock.now();
        if self
            .vms
            .get(number)
            .is_some_and(|vm| vm.life.state() != State::Defined && vm.life.due() <= now)
        {
            self.start(number);
        }
    }

    /// Makes a VM and lets it run.
    fn start(&mut self, number: usize) {
        let Some(config) = self.vms.get(number).map(|vm| vm.config.clone()) else {
            return;
        };
        let now = self.machine.clock.now();
        // Images are copied and summed up for seconds: no case for the watchdog.
        cpu::percpu::this().rest();
        let result = self.make(number, &config);
        let Some(vm) = self.vms.get_mut(number) else {
            return;
        };
        match result {
            Ok(live) => {
                vm.life.started(now);
                vm.end = None;
                self.machine.set_live(number, Some(Arc::new(live)));
                let first = VcpuId {
                    vm: VmId(number as u16),
                    index: 0,
                };
                self.machine.schedule(|s, now| s.wake(first, now));
            }
            Err(error) => {
                vm.life.failed();
                error!("vm {}: {error}", config.name);
                self.fail(STATUS_BOOT, format!("vm {}: {error}", config.name));
            }
        }
    }

    fn make(&mut self, number: usize, config: &VmConfig) -> Result<Live, String> {
        let id = VmId(number as u16);
        let numbers = self.take_numbers(config.vcpus);
        let admitted = self
            .machine
            .schedule(|s, _| s.add_vm(id, config.vcpus as u16, policy(&config.scheduling)));
        let result = match admitted {
            Ok(()) => {
                let mut made = None;
                let sound = cpu::guard::run(|| made = Some(self.create(number, config, &numbers)));
                let failed =
                    || VmError::Vcpu("the hypervisor failed while it made this VM".to_string());
                let result = made
                    .filter(|_| sound.is_ok())
                    .unwrap_or_else(|| Err(failed()));
                if result.is_err() {
                    self.machine.schedule(|s, _| s.remove_vm(id));
                }
                result.map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        match &result {
            Ok(_) => {
                if let Some(vm) = self.vms.get_mut(number) {
                    vm.numbers = numbers;
                }
            }
            Err(_) => self.give_numbers(&numbers),
        }
        result
    }

    /// The lowest free numbers: hardware has few tags on some machines.
    fn take_numbers(&mut self, count: u32) -> Vec<u16> {
        let mut taken = Vec::new();
        for (number, word) in (0..MAX_NUMBERS).map(|number| (number, number / 64)) {
            if taken.len() >= count as usize {
                break;
            }
            if let Some(word) = self.numbers.get_mut(word)
                && *word >> (number % 64) & 1 == 0
            {
                *word |= 1 << (number % 64);
                taken.push(number as u16);
            }
        }
        taken
    }

    fn give_numbers(&mut self, numbers: &[u16]) {
        for number in numbers {
            if let Some(word) = self.numbers.get_mut(usize::from(*number) / 64) {
                *word &= !(1 << (number % 64));
            }
        }
    }

    fn create(&self, number: usize, config: &VmConfig, numbers: &[u16]) -> Result<Live, VmError> {
        let (before_heap, before_frames) = (frames::heap_used(), frames::free_bytes());
        let promised: u64 = (0..self.vms.len())
            .filter_map(|number| self.machine.live(number))
            .map(|live| live.vm.outstanding_bytes())
            .sum();
        let (host, backend) = (self.machine.host, self.machine.backend);
        let now = hw::rdtsc();
        let setup = Setup {
            config,
            bundle: self.bundle,
            format: backend.format(),
            phys: host.map,
            frames: Frames,
            free_bytes: before_frames.saturating_sub(promised),
            tsc: now,
            tsc_hz: host.tsc_hz,
            wall_clock: host.wall_clock + Nanos::from_ticks(now - host.wall_tsc, host.tsc_hz).0,
            enabled: backend.enabled(),
            host_cpuid: &|leaf, subleaf| {
                let result = core::arch::x86_64::__cpuid_count(leaf, subleaf);
                [result.eax, result.ebx, result.ecx, result.edx]
            },
            apic_access_page: backend.apic_access_page(),
        };
        let (vm, vcpus) = backend.create(host, numbers, setup)?;
        info!(
            "vm {}: {} MiB, {} vCPU{}, kernel {}",
            config.name,
            config.memory >> 20,
            config.vcpus,
            if config.vcpus == 1 { "" } else { "s" },
            config.kernel.name
        );
        let heap = frames::heap_used().saturating_sub(before_heap) as u64;
        let taken = before_frames.saturating_sub(frames::free_bytes());
        console::say(format_args!(
            "bench vm-memory {} bytes",
            heap + taken.saturating_sub(vm.backed_bytes())
        ));
        Ok(Live::new(number, vm, vcpus))
    }

    /// All vCPUs of a VM have left the cores.
    fn left(&mut self, number: usize) {
        let (Some(live), Some(vm)) = (self.machine.live(number), self.vms.get_mut(number)) else {
            return;
        };
        // What was told before it was let go again.
        if !live.is_out() {
            return;
        }
        if live.vm.order() == Order::Pause {
            vm.life.parked();
            return;
        }
        vm.life.ending();
        let (end, sound) = live.take_end().unwrap_or((End::Stopped, true));
        console::flush(number);
        let name = &vm.config.name;
        match &end {
            End::Crashed(cause) => console::say(format_args!("vm {name}: crashed: {cause}")),
            _ => console::say(format_args!("vm {name}: ended: {end}")),
        }
        let bad = verdict(&vm.config, &end);
        let after = vm.life.ended(&end, sound, self.machine.clock.now());
        vm.end = Some(end);
        drop(live);
        match after {
            Do::Start => self.release(number, sound),
            Do::Release => {
                self.release(number, sound);
                if let Some((status, reason)) = bad {
                    self.fail(status, reason);
                }
            }
            _ => {
                if let Some((status, reason)) = bad {
                    self.fail(status, reason);
                }
            }
        }
    }

    /// Takes back all that a VM holds. One whose work was abandoned is `sound` no more: its
    /// structures are given up, not walked.
    fn release(&mut self, number: usize, sound: bool) {
        let Some(live) = self.machine.set_live(number, None) else {
            return;
        };
        self.machine
            .schedule(|s, _| s.remove_vm(VmId(number as u16)));
        let Some(vm) = self.vms.get_mut(number) else {
            return;
        };
        let numbers = core::mem::take(&mut vm.numbers);
        let name = vm.config.name.clone();
        if sound {
            let (shared, vcpus) = live.take_apart();
            let released = cpu::guard::run(|| {
                vcpus.into_iter().for_each(Guest::destroy);
                drop(shared);
            });
            if released.is_err() {
                error!("vm {name}: its memory is lost until the machine starts again");
            }
            self.give_numbers(&numbers);
        } else {
            error!("vm {name}: its memory is lost until the machine starts again");
            core::mem::forget(live);
        }
    }

    /// Carries out what a person asks of a VM.
    fn ask(&mut self, number: usize, request: Ask) {
        let Some(vm) = self.vms.get_mut(number) else {
            return;
        };
        let now = self.machine.clock.now();
        let action = match vm.life.request(request, now) {
            Ok(action) => action,
            Err(refused) => {
                warn!("vm {}: {refused}", vm.config.name);
                return;
            }
        };
        let live = self.machine.live(number);
        match (action, live) {
            (Do::Start | Do::Release, Some(live)) => {
                drop(live);
                self.release(number, true);
            }
            (Do::Park, Some(live)) => self.machine.order(&live, Order::Pause),
            (Do::Resume, Some(live)) => self.machine.order(&live, Order::Run),
            (Do::PressButton, Some(live)) => {
                live.vm.power_button();
                self.machine.kick_touched(&live);
            }
            (Do::End, Some(live)) => {
                self.machine.order(&live, Order::Stop);
                // Those that were paused are off the cores already.
                if live.is_out() {
                    drop(live);
                    self.left(number);
                }
            }
            _ => {}
        }
    }

    /// Takes what was typed; `true` means leave.
    fn console(&mut self) -> bool {
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
        for number in 0..self.vms.len() {
            self.pass_input(number);
        }
        false
    }

    /// Types on a guest's console what waits for it.
    fn pass_input(&self, number: usize) {
        let Some(live) = self
            .machine
            .live(number)
            .filter(|_| console::has_input(number))
        else {
            return;
        };
        let mut keys = [0; 64];
        loop {
            // Not with the console locked: the guest's own output comes from its board to there.
            let waiting = console::peek_input(number, &mut keys);
            let Some(typed) = keys.get(..waiting).filter(|typed| !typed.is_empty()) else {
                break;
            };
            let mut used = 0;
            let sound = cpu::guard::run(|| used = live.vm.input(typed, hw::rdtsc()));
            if sound.is_err() {
                self.machine.give_up(&live);
                return;
            }
            console::consume_input(number, used);
            if used == 0 {
                break;
            }
        }
        self.machine.kick_touched(&live);
    }

    /// Carries out what was typed at the monitor; `true` means leave.
    fn monitor(&mut self, command: Command) -> bool {
        let (number, request) = match command {
            Command::Quit | Command::PowerOff => return true,
            Command::List => {
                self.list();
                return false;
            }
            Command::Start(number) => (number, Ask::Start),
            Command::Pause(number) => (number, Ask::Pause),
            Command::Resume(number) => (number, Ask::Resume),
            Command::Shutdown(number) => (number, Ask::Shutdown),
            Command::Reset(number) => (number, Ask::Reset),
            Command::Stop(number) => (number, Ask::Stop),
            _ => {
                console::reply(format_args!("this command has no effect yet"));
                return false;
            }
        };
        self.ask(number, request);
        false
    }

    fn list(&self) {
        for (number, vm) in self.vms.iter().enumerate() {
            let state = vm.life.state();
            let about = match (self.machine.live(number), &vm.end) {
                (Some(live), _) => format!(
                    "{state}, {} KiB of {} in use",
                    live.vm.backed_bytes() >> 10,
                    live.vm.promised_bytes() >> 10
                ),
                (None, Some(end)) => format!("{state}: {end}"),
                (None, None) => state.to_string(),
            };
            console::say(format_args!("{} {}: {about}", number + 1, vm.config.name));
        }
        console::say(format_args!(
            "{} KiB of memory free",
            frames::free_bytes() >> 10
        ));
    }
}

/// What the scheduler makes of a configuration.
fn policy(config: &Scheduling) -> Policy {
    let only = |core: &u16| CoreSet::only(CoreId(*core));
    let mut policy = Policy {
        weight: config.weight,
        cap: config.cap,
        reservation: config.reservation.unwrap_or(0),
        class: match config.class {
            Class::Fair => sched::Class::Fair,
            Class::Realtime { budget, period } => sched::Class::RealTime {
                budget: budget.0,
                period: period.0,
            },
            Class::Dedicated => sched::Class::Dedicated,
        },
        ..Policy::default()
    };
    match &config.placement {
        Placement::Anywhere => {}
        Placement::Among(set) => {
            policy.affinity = CoreSet::EMPTY;
            for core in set.iter() {
                policy.affinity.insert(CoreId(core));
            }
        }
        Placement::Pinned(list) => policy.pins = list.iter().map(only).collect(),
    }
    policy
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
