//! The VMs' keeper: the one writer of their lives, on the boot core. It makes and unmakes them,
//! carries out what a person asks for, and knows when the machine's work is done.

mod answers;
mod network;
mod work;

use crate::bring_up::STATUS_BOOT;
use crate::console::{self, Request};
use crate::run::Machine;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use arch::Nanos;
use core::sync::atomic::Ordering;
use log::{error, info, warn};
use monitor::command::Command;
use sched::{CoreId, CoreSet, Policy, VmId};
use vm::bundle::{Bundle, CONFIGURATION};
use vm::config::{Class, Config, MAX_VMS, Placement, Scheduling, VmConfig, WhenDone};
use vm::life::{Do, Life, Request as Ask, State};
use vm::{End, Order};
use work::Work;

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
    /// How it is scheduled, from its next start on at the latest.
    policy: Policy,
    dump: Wanted,
    /// The CPU time of its vCPUs at the last `top`, in nanoseconds.
    seen: Vec<u64>,
}

/// Whether a person wants to see what a VM's vCPUs stand at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    No,
    /// Once they are off the cores.
    Soon,
    Now,
}

/// Why nothing is left to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// All VMs that ran have ended.
    Done,
    /// A person leaves, and says what becomes of the machine, or leaves it to the configuration.
    Left(Option<WhenDone>),
}

/// The VMs of a machine.
pub struct Manager {
    machine: &'static Machine,
    bundle: &'static Bundle<'static>,
    vms: Vec<Kept>,
    work: Work,
    /// The numbers that vCPUs have.
    numbers: [u64; MAX_NUMBERS / 64],
    /// The first bad end: exit status and reason.
    failure: Option<(u32, String)>,
    /// When `top` was last asked for.
    topped: Nanos,
    /// When captured frames are to be written out.
    drain: Nanos,
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
            work: Work::new(),
            numbers: [0; MAX_NUMBERS / 64],
            failure: None,
            topped: Nanos::ZERO,
            drain: Nanos::NEVER,
        };
        console::set_switches(machine.network.names());
        if let Some(fault) = machine.network.fault() {
            this.fail(STATUS_BOOT, fault.to_string());
        }
        for entry in &config.vms {
            match entry {
                Ok(config) => this.add(config),
                Err(error) => {
                    error!("{error}");
                    this.fail(STATUS_BOOT, error.to_string());
                }
            }
        }
        console::focus(this.focus(config));
        this
    }

    /// Who has the keyboard at first: the VM that the configuration names, else the first on the
    /// shared line, else the monitor. The monitor too where somebody must start a VM.
    fn focus(&self, config: &Config) -> Option<usize> {
        if self.waits() {
            return None;
        }
        let mut vms = self.vms.iter();
        match config.host.focus.as_deref() {
            Some(name) => vms.position(|vm| vm.config.name == name),
            None => vms.position(|vm| vm.config.console_port.is_none()),
        }
    }

    /// No VM was ever to run, and all that are there wait for somebody to start them.
    fn waits(&self) -> bool {
        let defined = |vm: &Kept| vm.life.state() == State::Defined;
        self.failure.is_none() && self.vms.iter().all(defined)
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
        console::add_guest(&config.name, config.console_port);
        let cores = self.machine.host.cores.len() as u32;
        let mut life = Life::new(config.into());
        let fits = config.check_cores(CONFIGURATION, cores);
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
            policy: policy(&config.scheduling),
            dump: Wanted::No,
            seen: alloc::vec![0; config.vcpus as usize],
        });
        // No guest runs yet, and images are summed up for seconds: no case for the watchdog.
        cpu::percpu::this().rest();
        self.work(u64::MAX);
    }

    /// Does what is to be done, and says when it is all over: once a VM ran, the machine goes on
    /// for as long as one does that is not in the background. Where no VM is to start by itself it
    /// waits for a person.
    pub fn step(&mut self) -> Option<Over> {
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
        if let Some(over) = self.console() {
            return Some(over);
        }
        self.work_if_due();
        self.drain_captures();
        let keeps_on = |vm: &Kept| vm.life.is_active() && !vm.config.background;
        if self.vms.iter().any(keeps_on) || self.waits() {
            return None;
        }
        self.end_background();
        let active = self.vms.iter().any(|vm| vm.life.is_active());
        (!active).then_some(Over::Done)
    }

    /// Stops those in the background, of the others one having run and none being left.
    fn end_background(&mut self) {
        let ran = |vm: &Kept| !vm.config.background && vm.life.state() != State::Defined;
        if !self.vms.iter().any(ran) {
            return;
        }
        for number in 0..self.vms.len() {
            let ends = |vm: &Kept| vm.life.is_active() && vm.life.state() != State::Stopping;
            if self.vms.get(number).is_some_and(ends) {
                self.ask(number, Ask::Stop);
            }
        }
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
            if vm.dump == Wanted::Soon {
                vm.dump = Wanted::Now;
            } else {
                vm.life.parked();
                info!("vm {}: {}", vm.config.name, vm.life.state());
            }
            return;
        }
        vm.dump = Wanted::No;
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
        if matches!(after, Do::Start | Do::Release) {
            self.release(number, sound);
        }
        // An end that is made good by a new start is none of the whole.
        if let Some((status, reason)) = bad.filter(|_| after != Do::Start) {
            self.fail(status, reason);
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
            self.leave(shared, vcpus);
            self.give_numbers(&numbers);
        } else {
            self.lost(&name);
            core::mem::forget(live);
        }
    }

    /// Carries out what a person asks of a VM.
    fn ask(&mut self, number: usize, request: Ask) {
        let Some(vm) = self.vms.get_mut(number) else {
            return;
        };
        let now = self.machine.clock.now();
        let name = &vm.config.name;
        let action = match vm.life.request(request, now) {
            Ok(action) => action,
            Err(refused) => {
                console::reply(format_args!("vm {name}: {refused}"));
                return;
            }
        };
        let live = self.machine.live(number);
        match (action, live) {
            (Do::Start | Do::Release, Some(live)) => {
                // Its memory goes with the last who knows it.
                drop(live);
                info!("vm {name}: what was held of it is given back");
                self.release(number, true);
            }
            (Do::Park, Some(live)) if vm.dump == Wanted::No => {
                self.machine.order(&live, Order::Pause);
            }
            (Do::Resume, Some(live)) => {
                info!("vm {name}: resumed");
                if vm.dump == Wanted::No {
                    self.machine.order(&live, Order::Run);
                }
            }
            (Do::PressButton, Some(live)) => {
                info!("vm {name}: power button pressed");
                live.vm.power_button();
                self.machine.kick_touched(&live);
            }
            // It was starting.
            (Do::Nothing, None) => self.give_up(number),
            (Do::InjectNmi, Some(live)) => {
                info!("vm {name}: NMI raised");
                live.vm.inject_nmi();
                self.machine.kick_touched(&live);
            }
            (Do::Dump, Some(_)) => vm.dump = Wanted::Now,
            (Do::ParkAndDump, Some(live)) if vm.dump == Wanted::No => {
                vm.dump = Wanted::Soon;
                if vm.life.state() == State::Running {
                    self.machine.order(&live, Order::Pause);
                }
            }
            (Do::End, Some(live)) => {
                // Those of a paused VM have left already, and are not to be woken.
                if live.is_out() && live.vm.order() == Order::Pause {
                    live.vm.set_order(Order::Stop);
                    drop(live);
                    self.left(number);
                } else {
                    self.machine.order(&live, Order::Stop);
                }
            }
            _ => {}
        }
    }

    /// Whether VMs are to be dumped now.
    pub fn has_dumps(&self) -> bool {
        self.vms.iter().any(|vm| vm.dump == Wanted::Now)
    }

    /// Shows what vCPUs stand at. None may be loaded on this core.
    pub fn dump(&mut self) {
        cpu::percpu::this().rest();
        for number in 0..self.vms.len() {
            let Some(vm) = self.vms.get_mut(number) else {
                return;
            };
            if core::mem::replace(&mut vm.dump, Wanted::No) != Wanted::Now {
                continue;
            }
            let Some(live) = self.machine.live(number) else {
                continue;
            };
            let mut dumps = Vec::new();
            let sound = cpu::guard::run(|| dumps = live.dump());
            vm.life.parked();
            if sound.is_err() {
                self.machine.give_up(&live);
                continue;
            }
            if vm.life.state() == State::Running {
                self.machine.order(&live, Order::Run);
            }
            for (index, dump) in dumps.iter().enumerate() {
                console::reply(format_args!("vm {}: vCPU {index}", vm.config.name));
                dump.lines(&mut |line| console::reply(line));
            }
        }
    }

    /// Takes what was typed; `Some` means leave.
    fn console(&mut self) -> Option<Over> {
        while let Some(request) = console::poll() {
            let over = match request {
                Request::Leave => Some(Over::Left(None)),
                Request::Command(command) => self.monitor(command),
            };
            if over.is_some() {
                return over;
            }
        }
        for number in 0..self.vms.len() {
            self.pass_input(number);
        }
        None
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

    /// Carries out what was typed at the monitor; `Some` means leave.
    fn monitor(&mut self, command: Command) -> Option<Over> {
        // A long answer takes its time on the line: no case for the watchdog.
        cpu::percpu::this().rest();
        match command {
            Command::Quit => return Some(Over::Left(None)),
            Command::PowerOff => return Some(Over::Left(Some(WhenDone::PowerOff))),
            Command::Reboot => return Some(Over::Left(Some(WhenDone::Reboot))),
            Command::List => self.list(),
            Command::Top => self.top(),
            Command::Mem => self.mem(),
            Command::Info(number) => self.info(number),
            Command::Sched(number, share) => self.share(number, &share),
            Command::Net(net) => self.net(&net),
            Command::Start(number) => self.ask(number, Ask::Start),
            Command::Pause(number) => self.ask(number, Ask::Pause),
            Command::Resume(number) => self.ask(number, Ask::Resume),
            Command::Shutdown(number) => self.ask(number, Ask::Shutdown),
            Command::Reset(number) => self.ask(number, Ask::Reset),
            Command::Stop(number) => self.ask(number, Ask::Stop),
            Command::InjectNmi(number) => self.ask(number, Ask::Nmi),
            Command::Dump(number) => self.ask(number, Ask::Dump),
            // The console's own.
            Command::Help(_) | Command::Console(_) | Command::Log(_) => {}
        }
        None
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
        Placement::Among(set) => policy.affinity = *set,
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
