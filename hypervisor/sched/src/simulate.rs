//! A machine of virtual time to try the scheduler on: cores that do what it says, vCPUs that
//! compute, sleep, are woken, yield and cheat. It checks at every step what must always hold: a
//! vCPU is on one core at a time, where it may be, and no core idles while one waits that it
//! could run.

use crate::{Class, CoreId, CoreSet, Decision, Policy, Scheduler, State, VcpuId, VmId};
use alloc::collections::{BTreeMap, BinaryHeap};
use alloc::vec::Vec;
use arch::Nanos;
use core::cmp::Reverse;

/// What a vCPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Computes for ever.
    Busy,
    /// Computes for about this long, then sleeps until a deadline about that far away.
    Sleeps(u64, u64),
    /// Computes for about this long, then waits for a device, which wakes it about so long after.
    Woken(u64, u64),
    /// Computes until just before its core looks, then sleeps for a moment.
    Dodges,
    /// Yields every so often.
    Yields(u64),
    /// Sleeps for ever.
    Still,
}

struct Task {
    vcpu: VcpuId,
    load: Load,
    cores: CoreSet,
    bound: bool,
    /// What is left to compute before it does something else.
    left: u64,
    on: Option<u16>,
    woken: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A core looks, if this is still the last that was planned for it.
    Look(u16, u64),
    /// A device wakes a vCPU.
    Wake(usize),
}

#[derive(Clone, Copy, Default)]
struct Core {
    plan: u64,
    /// It was interrupted and did not look yet.
    kicked: bool,
    since: u64,
    task: Option<usize>,
    idle: bool,
}

/// The machine.
pub struct World {
    /// What is tried.
    pub scheduler: Scheduler,
    /// Nanoseconds since the start.
    pub now: u64,
    /// How often a core asked what to do.
    pub decisions: u64,
    /// Nanoseconds from a vCPU's wake-up until it ran.
    pub latencies: Vec<u64>,
    /// How many decisions apart everything is checked; that takes long with many vCPUs.
    pub check_every: u64,
    /// How late a core looks after it was interrupted or its time was over, in nanoseconds.
    pub lateness: u64,
    cores: Vec<Core>,
    tasks: Vec<Task>,
    /// The first task of each VM.
    first: BTreeMap<VmId, usize>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    count: u64,
    seed: u64,
}

impl World {
    /// A machine with that many cores, from 0.
    #[must_use]
    pub fn new(cores: u16) -> Self {
        let mut world = Self {
            scheduler: Scheduler::new(),
            now: 0,
            decisions: 0,
            latencies: Vec::new(),
            check_every: 16,
            lateness: 0,
            cores: alloc::vec![Core::default(); usize::from(cores)],
            tasks: Vec::new(),
            first: BTreeMap::new(),
            events: BinaryHeap::new(),
            count: 0,
            seed: 7,
        };
        for core in 0..cores {
            world.scheduler.add_core(CoreId(core), Nanos::ZERO);
            world.plan(core, 0);
        }
        world
    }

    /// About `mean`, the same in every run.
    fn about(&mut self, mean: u64) -> u64 {
        self.seed = self
            .seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (mean / 2 + (self.seed >> 33) % mean.max(1)).max(1)
    }

    fn push(&mut self, at: u64, event: Event) {
        self.count += 1;
        self.events.push(Reverse((at, self.count, event)));
    }

    fn plan(&mut self, core: u16, at: u64) {
        let entry = &mut self.cores[usize::from(core)];
        entry.plan += 1;
        let plan = entry.plan;
        if at != u64::MAX {
            self.push(at, Event::Look(core, plan));
        }
    }

    /// Adds a VM with a vCPU for each load, and wakes them.
    ///
    /// # Panics
    /// When its policy is refused.
    pub fn add(&mut self, vm: u16, policy: &Policy, loads: &[Load]) {
        let vm = VmId(vm);
        let added = self
            .scheduler
            .add_vm(vm, loads.len() as u16, policy.clone());
        assert_eq!(added, Ok(()));
        self.first.insert(vm, self.tasks.len());
        for (index, &load) in (0u16..).zip(loads) {
            let vcpu = VcpuId { vm, index };
            let mut task = Task {
                vcpu,
                load,
                cores: policy.cores_of(index),
                bound: policy.class != Class::Fair,
                left: 0,
                on: None,
                woken: None,
            };
            task.left = self.burst(load);
            self.tasks.push(task);
            if load != Load::Still {
                self.push(self.now, Event::Wake(self.tasks.len() - 1));
            }
        }
    }

    /// Changes what a VM's vCPUs do from their next stop on.
    pub fn change(&mut self, vm: u16, load: Load) {
        for task in self
            .tasks
            .iter_mut()
            .filter(|task| task.vcpu.vm == VmId(vm))
        {
            task.load = load;
            task.left = task.left.min(1);
        }
    }

    /// Changes a VM's policy; false if that is refused.
    pub fn set_policy(&mut self, vm: u16, policy: &Policy) -> bool {
        let set = self
            .scheduler
            .set_policy(VmId(vm), policy.clone(), Nanos(self.now));
        if set.is_ok() {
            for task in self
                .tasks
                .iter_mut()
                .filter(|task| task.vcpu.vm == VmId(vm))
            {
                task.cores = policy.cores_of(task.vcpu.index);
                task.bound = policy.class != Class::Fair;
            }
        }
        self.interrupt();
        set.is_ok()
    }

    /// Does as the scheduler wants: interrupted cores look.
    fn interrupt(&mut self) {
        for core in self.scheduler.kicks().iter() {
            self.plan(core.0, self.now + self.lateness);
            self.cores[usize::from(core.0)].kicked = true;
        }
    }

    /// Ends a VM as a kernel does: its vCPUs leave their cores, then it is forgotten.
    pub fn remove(&mut self, vm: u16) {
        let now = Nanos(self.now);
        for at in 0..self.tasks.len() {
            let task = &mut self.tasks[at];
            if task.vcpu.vm == VmId(vm) {
                let (vcpu, on) = (task.vcpu, task.on.take());
                self.scheduler.sleep(vcpu, Nanos::NEVER, now);
                if let Some(core) = on {
                    self.cores[usize::from(core)].task = None;
                    self.plan(core, self.now);
                    self.cores[usize::from(core)].kicked = true;
                }
            }
        }
        self.scheduler.remove_vm(VmId(vm));
        self.interrupt();
    }

    /// Wakes a vCPU from outside.
    pub fn wake(&mut self, vm: u16, index: u16) {
        let vcpu = VcpuId {
            vm: VmId(vm),
            index,
        };
        self.scheduler.wake(vcpu, Nanos(self.now));
        self.interrupt();
    }

    fn burst(&mut self, load: Load) -> u64 {
        match load {
            Load::Busy | Load::Dodges | Load::Still => u64::MAX,
            Load::Sleeps(run, _) | Load::Woken(run, _) => self.about(run),
            Load::Yields(run) => run,
        }
    }

    /// Nanoseconds that a VM used so far.
    #[must_use]
    pub fn used(&self, vm: u16) -> u64 {
        let of = self.tasks.iter().filter(|task| task.vcpu.vm == VmId(vm));
        of.map(|task| self.scheduler.used(task.vcpu, Nanos(self.now)))
            .sum()
    }

    /// All vCPUs.
    pub fn vcpus(&self) -> impl Iterator<Item = VcpuId> {
        self.tasks.iter().map(|task| task.vcpu)
    }

    /// How often vCPUs changed cores.
    #[must_use]
    pub fn migrations(&self) -> u64 {
        let views = self
            .vcpus()
            .filter_map(|vcpu| self.scheduler.view(vcpu, Nanos(self.now)));
        views.map(|view| view.migrations).sum()
    }

    /// Nanoseconds that all cores were busy.
    #[must_use]
    pub fn busy(&self) -> u64 {
        let cores = 0..self.cores.len() as u16;
        cores
            .map(|core| self.scheduler.busy(CoreId(core), Nanos(self.now)))
            .sum()
    }

    /// The latency that this many of a thousand wake-ups kept below.
    pub fn latency(&mut self, per_mille: usize) -> u64 {
        self.latencies.sort_unstable();
        let at = self.latencies.len() * per_mille / 1000;
        self.latencies
            .get(at)
            .or(self.latencies.last())
            .copied()
            .unwrap_or(0)
    }

    /// Lets time pass.
    pub fn run(&mut self, nanos: u64) {
        let end = self.now + nanos;
        while let Some(&Reverse((at, ..))) = self.events.peek()
            && at <= end
        {
            self.step();
        }
        self.now = end;
    }

    /// Lets time pass until so many decisions were taken.
    pub fn decide(&mut self, decisions: u64) {
        let end = self.decisions + decisions;
        while self.decisions < end && self.step() {}
    }

    /// Does what is next; false if nothing is.
    pub fn step(&mut self) -> bool {
        let Some(Reverse((at, _, event))) = self.events.pop() else {
            return false;
        };
        self.now = self.now.max(at);
        match event {
            Event::Look(core, plan) if self.cores[usize::from(core)].plan == plan => {
                self.look(core)
            }
            Event::Look(..) => return true,
            Event::Wake(task) => {
                let vcpu = self.tasks[task].vcpu;
                if self.tasks[task].on.is_none() {
                    self.tasks[task].woken.get_or_insert(self.now);
                }
                self.scheduler.wake(vcpu, Nanos(self.now));
            }
        }
        self.interrupt();
        if self.count.is_multiple_of(self.check_every) && self.cores.iter().all(|core| !core.kicked)
        {
            self.check();
        }
        true
    }

    /// A core stops what it does and asks.
    fn look(&mut self, core: u16) {
        let now = Nanos(self.now);
        let id = usize::from(core);
        self.cores[id].kicked = false;
        if let Some(task) = self.cores[id].task.take() {
            let ran = self.now - self.cores[id].since;
            let entry = &mut self.tasks[task];
            entry.on = None;
            entry.left = entry.left.saturating_sub(ran);
            let (vcpu, load, left) = (entry.vcpu, entry.load, entry.left);
            if left == 0 {
                match load {
                    Load::Busy => {}
                    Load::Still => self.scheduler.sleep(vcpu, Nanos::NEVER, now),
                    Load::Dodges => self.rest(task, 10_000),
                    Load::Sleeps(_, sleep) => {
                        let sleep = self.about(sleep);
                        self.rest(task, sleep);
                    }
                    Load::Woken(_, every) => {
                        let every = self.about(every);
                        self.scheduler.sleep(vcpu, Nanos::NEVER, now);
                        self.push(self.now + every, Event::Wake(task));
                    }
                    Load::Yields(_) => self.scheduler.yield_now(vcpu, now),
                }
                self.tasks[task].left = self.burst(load);
            }
        }
        self.decisions += 1;
        let (until, idle) = match self.scheduler.next(CoreId(core), now) {
            Decision::Idle { until } => (until.0, true),
            Decision::Run { vcpu, until } => {
                assert!(
                    until > now,
                    "no time for {vcpu:?} at {now:?} until {until:?}"
                );
                (self.start(core, vcpu, until.0), false)
            }
        };
        self.cores[id].idle = idle;
        self.plan(core, until.max(self.now + 1).saturating_add(self.lateness));
    }

    /// A vCPU comes to a core; tells when the core looks again.
    fn start(&mut self, core: u16, vcpu: VcpuId, until: u64) -> u64 {
        let first = self.first.get(&vcpu.vm);
        let first = first.unwrap_or_else(|| panic!("{vcpu:?} is not there"));
        let task = first + usize::from(vcpu.index);
        let entry = &mut self.tasks[task];
        assert_eq!(entry.on, None, "{vcpu:?} is on two cores");
        assert!(
            entry.cores.contains(CoreId(core)),
            "{vcpu:?} may not be on {core}"
        );
        entry.on = Some(core);
        if let Some(woken) = entry.woken.take_if(|woken| *woken <= self.now) {
            self.latencies.push(self.now - woken);
        }
        if entry.load == Load::Dodges {
            let before = until.saturating_sub(self.now).saturating_sub(1_000);
            entry.left = before.clamp(1, 1_000_000_000);
        }
        self.cores[usize::from(core)].task = Some(task);
        self.cores[usize::from(core)].since = self.now;
        until.min(self.now.saturating_add(entry.left))
    }

    fn rest(&mut self, task: usize, nanos: u64) {
        let until = self.now + nanos;
        let entry = &mut self.tasks[task];
        entry.woken = Some(until);
        let vcpu = entry.vcpu;
        self.scheduler.sleep(vcpu, Nanos(until), Nanos(self.now));
    }

    /// No core idles while one waits that it could run, and all agree who is where.
    pub fn check(&self) {
        let idle: CoreSet = (0u16..)
            .zip(&self.cores)
            .filter(|(_, core)| core.idle)
            .map(|(core, _)| CoreId(core))
            .filter(|core| self.scheduler.owner(*core).is_none())
            .collect();
        for task in &self.tasks {
            let Some(view) = self.scheduler.view(task.vcpu, Nanos(self.now)) else {
                continue;
            };
            match view.state {
                State::Waiting if !task.bound => {
                    let able = task.cores.and(&idle);
                    assert!(able.is_empty(), "{:?} waits while {able:?} idle", task.vcpu);
                }
                State::Running(core) => assert_eq!(task.on, Some(core.0)),
                _ => assert_eq!(task.on, None),
            }
        }
    }
}
