//! The scheduler of the machine.

use crate::forest::{Forest, Queue};
use crate::policy::bandwidth;
use crate::vm::Vm;
use crate::{
    CREDIT, Class, CoreId, CoreSet, Decision, GUARANTEE_LIMIT, LIMIT, MAX_CORES, MIN_TURN,
    PATIENCE, Policy, PolicyError, REAL_TIME_LIMIT, SLICE, State, VcpuId, View, VmId,
};
use alloc::vec::Vec;
use arch::Nanos;

/// No slot, no pool.
const NONE: u32 = u32::MAX;
/// The index of a slot that is a VM's timer.
const TIMER: u16 = u16::MAX;
/// Sleepers whose deadline is over that one decision wakes; others wait for the next.
const BATCH: usize = 32;
/// Cores that a vCPU looks at to take one from another that should wait.
const PROBES: usize = 8;

/// What goes first: the upper part of a key in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Tier {
    RealTime,
    Reserved,
    Fair,
}

/// A key's lower part is a deadline or a virtual time.
const TIER_SHIFT: u32 = 120;

/// A vCPU, or a VM's timer.
struct Slot {
    vm: u32,
    index: u16,
    state: State,
    /// Where it waits, ran last, and has its deadline.
    home: u16,
    /// Its affinity mask; [`NONE`] when it is bound to its home.
    pool: u32,
    tier: Tier,
    /// Virtual time paid.
    paid: u128,
    /// Its VM's integral when it last paid.
    mark: u128,
    /// Since when it runs or waits, as far as that is accounted.
    since: Nanos,
    used: u64,
    stolen: u64,
    migrations: u64,
    ran_on: u16,
    /// It slept and did not run since.
    fresh: bool,
    /// What it had not had when it went to sleep, in virtual time.
    lag: u128,
    /// End of the turn granted by the cap.
    grant: Nanos,
    /// Real time: the deadline, and what is left of the budget until then.
    deadline: Nanos,
    budget: u64,
}

struct Core {
    current: Option<u32>,
    yielded: bool,
    /// When the current slice began.
    turn: Nanos,
    /// When it ends if others wait.
    slice_end: Nanos,
    /// Until when it will not look again; zero while it is about to.
    until: Nanos,
    virtual_time: u128,
    queue: Queue,
    timers: Queue,
    pools: Vec<u32>,
    /// The dedicated vCPU.
    owner: Option<u32>,
    /// Real time promised, in millionths.
    real_time: u32,
    /// How many vCPUs call it home.
    homes: u32,
    busy: u64,
}

/// All that have the same affinity mask.
struct Pool {
    mask: CoreSet,
    /// The cores of the mask that are there and are nobody's own.
    cores: CoreSet,
    members: u32,
    queue: Queue,
}

/// The vCPUs and cores of the machine.
#[derive(Default)]
pub struct Scheduler {
    cores: Vec<Option<Core>>,
    present: CoreSet,
    idle: CoreSet,
    /// Cores that run a vCPU without an end to its slice.
    open: CoreSet,
    kicks: CoreSet,
    vms: Vec<Option<Vm>>,
    /// Sorted.
    index: Vec<(VmId, u32)>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    pools: Vec<Pool>,
    forest: Forest,
}

impl Default for CoreSet {
    fn default() -> Self {
        Self::EMPTY
    }
}

/// A slot's node in the queue of its core, or of its throttled VM.
const fn in_queue(slot: u32) -> u32 {
    slot * 3
}
/// In the queue of its affinity mask.
const fn in_pool(slot: u32) -> u32 {
    slot * 3 + 1
}
/// Among the deadlines of a core.
const fn in_timers(slot: u32) -> u32 {
    slot * 3 + 2
}
const fn slot_of(node: u32) -> u32 {
    node / 3
}

impl Scheduler {
    /// A machine without cores.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    // Numbers of slots, pools and cores below are made here and checked where they come in.

    fn slot(&mut self, slot: u32) -> &mut Slot {
        &mut self.slots[slot as usize]
    }

    fn core(&mut self, core: u16) -> &mut Core {
        match &mut self.cores[usize::from(core)] {
            Some(core) => core,
            None => unreachable!(),
        }
    }

    fn core_ref(&self, core: u16) -> &Core {
        match &self.cores[usize::from(core)] {
            Some(core) => core,
            None => unreachable!(),
        }
    }

    fn vm(&mut self, vm: u32) -> &mut Vm {
        match &mut self.vms[vm as usize] {
            Some(vm) => vm,
            None => unreachable!(),
        }
    }

    fn vm_ref(&self, vm: u32) -> &Vm {
        match &self.vms[vm as usize] {
            Some(vm) => vm,
            None => unreachable!(),
        }
    }

    fn vm_of(&mut self, slot: u32) -> &mut Vm {
        let vm = self.slots[slot as usize].vm;
        self.vm(vm)
    }

    fn find_vm(&self, vm: VmId) -> Option<u32> {
        let at = self.index.binary_search_by_key(&vm, |(id, _)| *id).ok()?;
        Some(self.index[at].1)
    }

    fn find(&self, vcpu: VcpuId) -> Option<u32> {
        let vm = self.find_vm(vcpu.vm)?;
        self.vm_ref(vm).vcpus.get(usize::from(vcpu.index)).copied()
    }

    /// Adds a core, which then calls [`Self::next`]. Numbers from [`MAX_CORES`] on and those that
    /// are there already change nothing.
    pub fn add_core(&mut self, core: CoreId, now: Nanos) {
        if core.0 >= MAX_CORES || self.present.contains(core) {
            return;
        }
        let count = usize::from(core.0) + 1;
        if self.cores.len() < count {
            self.cores.resize_with(count, || None);
        }
        self.cores[usize::from(core.0)] = Some(Core {
            current: None,
            yielded: false,
            turn: now,
            slice_end: now,
            until: Nanos::ZERO,
            virtual_time: 0,
            queue: Queue::EMPTY,
            timers: Queue::EMPTY,
            pools: Vec::new(),
            owner: None,
            real_time: 0,
            homes: 0,
            busy: 0,
        });
        self.present.insert(core);
        self.arrange(now);
    }

    /// Adds a VM whose vCPUs sleep until they are woken.
    pub fn add_vm(&mut self, vm: VmId, vcpus: u16, policy: Policy) -> Result<(), PolicyError> {
        let Err(at) = self.index.binary_search_by_key(&vm, |(id, _)| *id) else {
            return Err(PolicyError::Exists(vm));
        };
        let homes = self.plan(None, vcpus, &policy)?;
        let number = match self.vms.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                self.vms.push(None);
                self.vms.len() - 1
            }
        } as u32;
        let timer = self.new_slot(number, TIMER);
        let mut new = Vm::new(vm, policy, timer);
        new.vcpus = (0..vcpus)
            .map(|index| self.new_slot(number, index))
            .collect();
        self.vms[number as usize] = Some(new);
        self.index.insert(at, (vm, number));
        self.bind(number, &homes);
        self.arrange(Nanos::ZERO);
        Ok(())
    }

    fn new_slot(&mut self, vm: u32, index: u16) -> u32 {
        let slot = Slot {
            vm,
            index,
            state: State::Asleep,
            home: 0,
            pool: NONE,
            tier: Tier::Fair,
            paid: 0,
            mark: 0,
            since: Nanos::ZERO,
            used: 0,
            stolen: 0,
            migrations: 0,
            ran_on: u16::MAX,
            fresh: false,
            lag: 0,
            grant: Nanos::NEVER,
            deadline: Nanos::ZERO,
            budget: 0,
        };
        let number = match self.free.pop() {
            Some(free) => {
                self.slots[free as usize] = slot;
                free
            }
            None => {
                self.slots.push(slot);
                self.slots.len() as u32 - 1
            }
        };
        self.forest.grow(self.slots.len() * 3);
        number
    }

    /// Forgets a VM. None of its vCPUs may be on a core any more.
    pub fn remove_vm(&mut self, vm: VmId) {
        let Ok(at) = self.index.binary_search_by_key(&vm, |(id, _)| *id) else {
            return;
        };
        let number = self.index.remove(at).1;
        let now = Nanos::ZERO;
        for index in 0..self.vm(number).vcpus.len() {
            let slot = self.vm(number).vcpus[index];
            if let State::Running(core) = self.slot(slot).state {
                self.core(core.0).current = None;
                self.kick(core.0);
            }
            self.dequeue(slot);
            self.disarm(slot);
            self.unbind(slot);
            self.free.push(slot);
        }
        let timer = self.vm(number).slot;
        self.disarm(timer);
        self.free.push(timer);
        self.vms[number as usize] = None;
        self.arrange(now);
    }

    /// Changes how a VM is scheduled.
    pub fn set_policy(&mut self, vm: VmId, policy: Policy, now: Nanos) -> Result<(), PolicyError> {
        let number = self.find_vm(vm).ok_or(PolicyError::NoSuchVm(vm))?;
        let count = self.vm(number).vcpus.len() as u16;
        let homes = self.plan(Some(number), count, &policy)?;
        let slots = self.vm(number).vcpus.clone();
        let mut deadlines = Vec::with_capacity(slots.len());
        self.vm(number).advance(now);
        for &slot in &slots {
            deadlines.push(self.disarm(slot));
            match self.slots[slot as usize].state {
                State::Running(core) => {
                    self.charge(slot, now);
                    let end = core::mem::replace(&mut self.slot(slot).grant, Nanos::NEVER);
                    self.vm(number).settle(end, now);
                    self.kick(core.0);
                }
                _ if self.lingers(slot) => self.forget(slot, now),
                _ => self.dequeue(slot),
            }
            self.unbind(slot);
        }
        let timer = self.vm(number).slot;
        self.disarm(timer);
        self.vm(number).set_policy(policy);
        self.bind(number, &homes);
        self.arrange(now);
        for (&slot, until) in slots.iter().zip(deadlines) {
            self.refill(slot, now);
            match self.slot(slot).state {
                State::Running(_) => self.slot(slot).grant = self.vm(number).grant(now),
                State::Asleep if until != Nanos::NEVER => self.arm(slot, until),
                State::Asleep => {}
                _ => self.enqueue(slot, now),
            }
        }
        Ok(())
    }

    /// Where the vCPUs of a VM would be at home, or why its policy cannot be kept.
    fn plan(&self, vm: Option<u32>, vcpus: u16, policy: &Policy) -> Result<Vec<u16>, PolicyError> {
        policy.check(vcpus, &self.present)?;
        let mine = |slot: u32| vm.is_some() && vm == Some(self.slots[slot as usize].vm);
        let mut owned = CoreSet::EMPTY;
        let mut real_time: Vec<u32> = Vec::new();
        let mut homes: Vec<u32> = Vec::new();
        for (number, core) in (0u16..).zip(&self.cores) {
            let core = core.as_ref();
            if core
                .and_then(|core| core.owner)
                .is_some_and(|owner| !mine(owner))
            {
                owned.insert(CoreId(number));
            }
            real_time.push(core.map_or(0, |core| core.real_time));
            homes.push(core.map_or(0, |core| core.homes));
        }
        let bound = vm.map_or(0, |vm| self.vm_ref(vm).bandwidth());
        if let Some(vm) = vm.filter(|_| bound != 0) {
            for slot in &self.vm_ref(vm).vcpus {
                real_time[usize::from(self.slots[*slot as usize].home)] -= bound;
            }
        }
        // Those with the fewest cores to choose from choose first.
        let allowed =
            |index: u16, owned: &CoreSet| policy.cores_of(index).and(&self.present).minus(owned);
        let choices: Vec<u32> = (0..vcpus)
            .map(|index| allowed(index, &owned).len())
            .collect();
        let mut planned = alloc::vec![u16::MAX; usize::from(vcpus)];
        for _ in 0..vcpus {
            let open = (0u16..)
                .zip(planned.iter().zip(&choices))
                .filter(|(_, (home, _))| **home == u16::MAX);
            let Some((index, _)) = open.min_by_key(|(_, (_, choices))| **choices) else {
                break;
            };
            let cores = allowed(index, &owned);
            if cores.is_empty() {
                return Err(PolicyError::NoCore { index });
            }
            let load = |core: &CoreId| homes[usize::from(core.0)];
            let chosen = match policy.class {
                Class::Fair => cores.iter().min_by_key(load),
                Class::RealTime { budget, period } => {
                    let part = bandwidth(budget, period);
                    let chosen = cores
                        .iter()
                        .min_by_key(|core| real_time[usize::from(core.0)])
                        .filter(|core| real_time[usize::from(core.0)] + part <= REAL_TIME_LIMIT)
                        .ok_or(PolicyError::NoBudget { index })?;
                    real_time[usize::from(chosen.0)] += part;
                    Some(chosen)
                }
                Class::Dedicated => {
                    let mut error = PolicyError::NotFree { index };
                    let mut found = None;
                    for core in cores.iter() {
                        if real_time[usize::from(core.0)] != 0 {
                            continue;
                        }
                        let mut taken = owned;
                        taken.insert(core);
                        if self.strands(vm, &taken) {
                            error = PolicyError::Needed(core);
                        } else {
                            // The last: the first cores stay for those that care less.
                            found = Some(core);
                            owned = taken;
                            owned.remove(core);
                        }
                    }
                    let core = found.ok_or(error)?;
                    owned.insert(core);
                    Some(core)
                }
            };
            let chosen = chosen.ok_or(PolicyError::NoCore { index })?;
            homes[usize::from(chosen.0)] += 1;
            planned[usize::from(index)] = chosen.0;
        }
        self.guarantees(vm, vcpus, policy, &owned)?;
        Ok(planned)
    }

    /// Whether a vCPU of another VM had no core if these were owned.
    fn strands(&self, vm: Option<u32>, owned: &CoreSet) -> bool {
        self.slots.iter().any(|slot| {
            slot.pool != NONE
                && Some(slot.vm) != vm
                && self.pools[slot.pool as usize]
                    .mask
                    .and(&self.present)
                    .minus(owned)
                    .is_empty()
        })
    }

    /// Whether reservations and real time fit on the cores that nobody owns: of all VMs, and of
    /// those that may run only where one of them may.
    fn guarantees(
        &self,
        vm: Option<u32>,
        vcpus: u16,
        policy: &Policy,
        owned: &CoreSet,
    ) -> Result<(), PolicyError> {
        let usable = |vcpus: u16, policy: &Policy| {
            let sets = (0..vcpus).map(|index| policy.cores_of(index).and(&self.present));
            sets.fold(CoreSet::EMPTY, |all, set| {
                let more = set.minus(owned);
                CoreSet::ALL.minus(&CoreSet::ALL.minus(&all).minus(&more))
            })
        };
        let asks = |vcpus: u16, policy: &Policy| match policy.class {
            Class::Fair => u64::from(policy.reservation) * 10_000,
            Class::RealTime { budget, period } => {
                u64::from(bandwidth(budget, period)) * u64::from(vcpus)
            }
            Class::Dedicated => 0,
        };
        let others = self
            .index
            .iter()
            .filter(|(_, other)| Some(*other) != vm)
            .map(|(_, other)| {
                let other = self.vm_ref(*other);
                (other.vcpus.len() as u16, &other.policy)
            });
        let claims: Vec<(CoreSet, u64)> = core::iter::once((vcpus, policy))
            .chain(others)
            .map(|(vcpus, policy)| (usable(vcpus, policy), asks(vcpus, policy)))
            .filter(|(_, asked)| *asked != 0)
            .collect();
        let everywhere = self.present.minus(owned);
        for set in claims.iter().map(|(set, _)| *set).chain([everywhere]) {
            let within = claims
                .iter()
                .filter(|(other, _)| other.minus(&set).is_empty());
            let asked: u64 = within.map(|(_, asked)| asked).sum();
            let most = u64::from(set.len()) * GUARANTEE_LIMIT;
            if asked > most * 10_000 {
                let asked = asked.div_ceil(10_000);
                return Err(PolicyError::Guarantees { asked, most });
            }
        }
        Ok(())
    }

    /// Ties the vCPUs of a VM to cores and masks as its policy says.
    fn bind(&mut self, vm: u32, homes: &[u16]) {
        for (index, &home) in (0u16..).zip(homes) {
            let entry = self.vm_ref(vm);
            let slot = entry.vcpus[usize::from(index)];
            let (class, part) = (entry.policy.class, entry.bandwidth());
            let mask = entry.policy.cores_of(index);
            self.slot(slot).home = home;
            self.core(home).homes += 1;
            match class {
                Class::Fair => {
                    let pool = self.pool(&mask);
                    self.pools[pool as usize].members += 1;
                    self.slot(slot).pool = pool;
                    self.slot(slot).tier = Tier::Fair;
                    self.settle_in(slot);
                }
                Class::RealTime { .. } => {
                    self.core(home).real_time += part;
                    self.slot(slot).tier = Tier::RealTime;
                    self.slot(slot).deadline = Nanos::ZERO;
                }
                Class::Dedicated => self.core(home).owner = Some(slot),
            }
        }
    }

    /// Undoes [`Self::bind`] for one vCPU that is in no queue.
    fn unbind(&mut self, slot: u32) {
        let part = self.vm_of(slot).bandwidth();
        let pool = core::mem::replace(&mut self.slot(slot).pool, NONE);
        if let Some(pool) = self.pools.get_mut(pool as usize) {
            pool.members -= 1;
        }
        let home = self.slot(slot).home;
        let core = self.core(home);
        core.homes -= 1;
        core.real_time -= part;
        core.owner = core.owner.filter(|owner| *owner != slot);
    }

    fn pool(&mut self, mask: &CoreSet) -> u32 {
        let found = self
            .pools
            .iter()
            .position(|pool| pool.members != 0 && pool.mask == *mask);
        let free = || self.pools.iter().position(|pool| pool.members == 0);
        let number = found.or_else(free).unwrap_or(self.pools.len());
        if found.is_none() {
            let pool = Pool {
                mask: *mask,
                cores: CoreSet::EMPTY,
                members: 0,
                queue: Queue::EMPTY,
            };
            if number == self.pools.len() {
                self.pools.push(pool);
            } else {
                self.pools[number] = pool;
            }
        }
        number as u32
    }

    /// After cores came, or were given away or back, or masks changed: says anew which masks a
    /// core serves, and moves what is where it may not be.
    fn arrange(&mut self, now: Nanos) {
        let owned: CoreSet = (0u16..)
            .zip(&self.cores)
            .filter(|(_, core)| core.as_ref().is_some_and(|core| core.owner.is_some()))
            .map(|(number, _)| CoreId(number))
            .collect();
        for pool in &mut self.pools {
            pool.cores = if pool.members == 0 {
                CoreSet::EMPTY
            } else {
                pool.mask.and(&self.present).minus(&owned)
            };
        }
        for (number, core) in (0u16..).zip(&mut self.cores) {
            if let Some(core) = core {
                core.pools.clear();
                let pools = (0u32..).zip(&self.pools);
                let serves = pools.filter(|(_, pool)| pool.cores.contains(CoreId(number)));
                core.pools.extend(serves.map(|(pool, _)| pool));
            }
        }
        for slot in 0..self.slots.len() as u32 {
            let Slot {
                pool,
                home,
                index,
                state,
                ..
            } = self.slots[slot as usize];
            let timed = self.forest.queued(in_timers(slot));
            if pool != NONE && !self.pools[pool as usize].cores.contains(CoreId(home)) {
                if self.lingers(slot) {
                    self.forget(slot, now);
                }
                let waits = self.forest.queued(in_pool(slot));
                let until = if timed { Some(self.disarm(slot)) } else { None };
                if waits {
                    self.dequeue(slot);
                }
                if !matches!(state, State::Running(_)) {
                    self.move_home(slot);
                }
                if let Some(until) = until {
                    self.arm(slot, until);
                }
                if waits {
                    self.enqueue(slot, now);
                }
            } else if index == TIMER && timed && owned.contains(CoreId(home)) {
                let until = self.disarm(slot);
                self.arm_vm(slot, until);
            }
        }
        for core in self.present.iter() {
            let work = self.idle.contains(core) && self.contested(core.0);
            let Core { owner, current, .. } = *self.core(core.0);
            if work || (owner.is_some() && current.is_some() && owner != current) {
                self.kick(core.0);
            }
        }
    }

    /// Gives a fair vCPU another home among its cores.
    fn move_home(&mut self, slot: u32) {
        let Slot { pool, home, .. } = self.slots[slot as usize];
        let cores = &self.pools[pool as usize].cores;
        let Some(new) = cores.iter().min_by_key(|core| self.core_ref(core.0).homes) else {
            return;
        };
        self.core(home).homes -= 1;
        self.core(new.0).homes += 1;
        self.slot(slot).home = new.0;
        self.settle_in(slot);
    }

    /// One that comes to a core may have run far ahead of those that are there.
    fn settle_in(&mut self, slot: u32) {
        let home = self.slot(slot).home;
        let most = self.core(home).virtual_time + self.vm_of(slot).rate() * u128::from(LIMIT);
        let slot = self.slot(slot);
        slot.paid = slot.paid.min(most);
    }

    /// Lets a sleeping vCPU run again.
    pub fn wake(&mut self, vcpu: VcpuId, now: Nanos) {
        if let Some(slot) = self.find(vcpu)
            && self.slot(slot).state == State::Asleep
        {
            self.wake_slot(slot, now);
        }
    }

    fn wake_slot(&mut self, slot: u32, now: Nanos) {
        self.disarm(slot);
        let home = self.slot(slot).home;
        let time = self.virtual_now(home, now);
        if self.lingers(slot) {
            self.dequeue(slot);
        } else {
            let vm = self.vm_of(slot);
            vm.advance(now);
            vm.runnable += 1;
        }
        let entry = self.slot(slot);
        entry.paid = entry.paid.max(time.saturating_sub(entry.lag));
        entry.state = State::Waiting;
        entry.since = now;
        entry.fresh = true;
        self.refill(slot, now);
        self.enqueue(slot, now);
    }

    /// Whether a vCPU sleeps and is still in the queue of its core, since it had more than its
    /// part: its VM's weight is split with it until the others have had theirs.
    fn lingers(&self, slot: u32) -> bool {
        self.slots[slot as usize].state == State::Asleep && self.forest.queued(in_queue(slot))
    }

    /// Lets a vCPU linger no more.
    fn forget(&mut self, slot: u32, now: Nanos) {
        self.dequeue(slot);
        let vm = self.vm_of(slot);
        vm.advance(now);
        vm.runnable -= 1;
    }

    /// Gives a real-time vCPU that begins a new budget, unless what it has left is within its
    /// bandwidth until its deadline.
    fn refill(&mut self, slot: u32, now: Nanos) {
        let Class::RealTime { budget, period } = self.vm_of(slot).policy.class else {
            return;
        };
        let slot = self.slot(slot);
        let rest = u128::from(slot.deadline.since(now)) * u128::from(budget);
        if slot.deadline <= now || u128::from(slot.budget) * u128::from(period) > rest {
            slot.deadline = now + period;
            slot.budget = budget;
        }
    }

    /// Puts a vCPU to sleep until `until` or until it is woken: the one that runs, by its core,
    /// or any other that is on no core. One that sleeps gets this deadline.
    pub fn sleep(&mut self, vcpu: VcpuId, until: Nanos, now: Nanos) {
        let Some(slot) = self.find(vcpu) else { return };
        match self.slot(slot).state {
            State::Asleep => {}
            State::Running(core) => {
                self.charge(slot, now);
                self.stop(slot, core.0, now);
                let core = self.core(core.0);
                core.current = None;
                core.yielded = false;
                core.until = Nanos::ZERO;
            }
            State::Waiting | State::Throttled => {
                self.dequeue(slot);
                let slot = self.slot(slot);
                slot.stolen += now.since(slot.since);
            }
        }
        self.disarm(slot);
        if self.slot(slot).state != State::Asleep {
            self.fall_asleep(slot, now);
        }
        if until != Nanos::NEVER {
            self.arm(slot, until);
        }
    }

    fn fall_asleep(&mut self, slot: u32, now: Nanos) {
        self.slot(slot).state = State::Asleep;
        let Slot {
            pool, home, paid, ..
        } = self.slots[slot as usize];
        let vm = self.vm_of(slot);
        vm.advance(now);
        let most = vm.rate() * u128::from(CREDIT);
        let time = self.virtual_now(home, now);
        self.slot(slot).lag = time.saturating_sub(paid).min(most);
        let here = self
            .pools
            .get(pool as usize)
            .is_some_and(|p| p.cores.contains(CoreId(home)));
        if here && paid > time {
            self.push_queues(slot, (Tier::Fair as u128) << TIER_SHIFT | paid);
        } else {
            self.vm_of(slot).runnable -= 1;
        }
    }

    /// Takes what a core runs off it, before the core does something else: it waits for that one or
    /// another.
    pub fn put_off(&mut self, core: CoreId, now: Nanos) {
        if !self.present.contains(core) {
            return;
        }
        if let Some(slot) = self.core(core.0).current {
            self.charge(slot, now);
            self.open.remove(core);
            let entry = self.core(core.0);
            entry.yielded = false;
            entry.until = Nanos::ZERO;
            self.release(slot, core.0, now);
        }
    }

    /// Lets the others of its core go first, once, at the next decision.
    pub fn yield_now(&mut self, vcpu: VcpuId, _now: Nanos) {
        if let Some(slot) = self.find(vcpu)
            && let State::Running(core) = self.slot(slot).state
        {
            self.core(core.0).yielded = true;
        }
    }

    /// Decides what a core does. What ran there and was not put to sleep can still run.
    pub fn next(&mut self, core: CoreId, now: Nanos) -> Decision {
        if !self.present.contains(core) {
            return Decision::Idle {
                until: Nanos::NEVER,
            };
        }
        let id = core.0;
        self.core(id).until = Nanos::ZERO;
        self.idle.remove(core);
        self.open.remove(core);
        self.kicks.remove(core);
        let mut current = self.core(id).current;
        if let Some(slot) = current {
            self.charge(slot, now);
        }
        self.fire(id, now);
        let yielded = core::mem::take(&mut self.core(id).yielded);
        if let Some(slot) = current
            && !self.may_stay(slot, id, now)
        {
            self.release(slot, id, now);
            current = None;
        }
        let decision = if let Some(owner) = self.core(id).owner {
            self.serve_owner(owner, id, now)
        } else {
            self.choose(id, current, yielded, now)
        };
        let until = match decision {
            Decision::Run { until, .. } => until,
            Decision::Idle { until } => {
                self.idle.insert(core);
                until
            }
        };
        self.core(id).until = until.max(Nanos(1));
        decision
    }

    /// Takes what was on a core off it, and lets it wait.
    fn release(&mut self, slot: u32, core: u16, now: Nanos) {
        self.stop(slot, core, now);
        self.core(core).current = None;
        self.slot(slot).state = State::Waiting;
        self.enqueue(slot, now);
    }

    fn serve_owner(&mut self, owner: u32, core: u16, now: Nanos) -> Decision {
        match self.slot(owner).state {
            State::Running(on) if on.0 == core => {}
            State::Waiting | State::Throttled => self.dispatch(owner, core, now),
            // It sleeps, or is on its way here from where it ran.
            _ => {
                let until = self.first_timer(core);
                return Decision::Idle { until };
            }
        }
        Decision::Run {
            vcpu: self.name(owner),
            until: Nanos::NEVER,
        }
    }

    /// Whether what a core ran may go on there.
    fn may_stay(&mut self, slot: u32, core: u16, now: Nanos) -> bool {
        let Slot {
            pool,
            home,
            grant,
            budget,
            ..
        } = self.slots[slot as usize];
        let vm = self.vm_of(slot);
        match vm.policy.class {
            Class::Fair if grant <= now => {
                vm.settle(grant, now);
                let stays = vm.may_run();
                let grant = if stays { vm.grant(now) } else { Nanos::NEVER };
                self.slot(slot).grant = grant;
                stays && self.pools[pool as usize].cores.contains(CoreId(core))
            }
            Class::Fair => self.pools[pool as usize].cores.contains(CoreId(core)),
            Class::RealTime { .. } => home == core && budget != 0,
            Class::Dedicated => home == core,
        }
    }

    fn choose(&mut self, core: u16, current: Option<u32>, yielded: bool, now: Nanos) -> Decision {
        let stays = current.map(|slot| (slot, self.key(slot, now)));
        let rival = self.best(core, stays.filter(|_| !yielded).map(|(_, key)| key), now);
        let mut look_again = Nanos::NEVER;
        let chosen = match (stays, rival) {
            (None, None) => {
                let until = self.first_timer(core);
                return Decision::Idle { until };
            }
            (Some((slot, _)), None) => slot,
            (None, Some(rival)) => rival,
            (Some(_), Some(rival)) if yielded => rival,
            (Some((slot, key)), Some(rival)) => {
                let Core {
                    turn, slice_end, ..
                } = *self.core(core);
                let better = self.beats(rival, key, now >= slice_end);
                if !better {
                    slot
                } else if now >= turn + MIN_TURN || self.slot(rival).tier == Tier::RealTime {
                    rival
                } else {
                    look_again = turn + MIN_TURN;
                    slot
                }
            }
        };
        if current == Some(chosen) {
            let core = self.core(core);
            if now >= core.slice_end {
                core.turn = now;
                core.slice_end = now + SLICE;
            }
        } else {
            self.dequeue(chosen);
            // The new one first, so that the old one is not thought to find the core free.
            if let Some(old) = current {
                self.stop(old, core, now);
                self.dispatch(chosen, core, now);
                self.slot(old).state = State::Waiting;
                self.enqueue(old, now);
            } else {
                self.dispatch(chosen, core, now);
            }
        }
        if !self.idle.is_empty() {
            self.pass_on(core, now);
        }
        let Slot {
            tier,
            grant,
            budget,
            ..
        } = self.slots[chosen as usize];
        let turn = self.core(core).turn;
        let mut until = look_again.min(grant);
        if tier == Tier::RealTime {
            until = until.min(now + budget);
        } else if self.contested(core) {
            until = until.min(self.core(core).slice_end);
        } else {
            self.open.insert(CoreId(core));
        }
        let timer = self.first_timer(core);
        if timer != Nanos::NEVER {
            until = until.min(timer.max(turn + MIN_TURN));
        }
        Decision::Run {
            vcpu: self.name(chosen),
            until,
        }
    }

    /// Finds a core that idles for who still waits where this one chose another: it may have been
    /// this one that was interrupted for it.
    fn pass_on(&mut self, core: u16, now: Nanos) {
        for at in 0..self.core(core).pools.len() {
            let pool = self.core(core).pools[at] as usize;
            let Some(idle) = self.idle.first_common(&self.pools[pool].cores) else {
                continue;
            };
            while let Some(slot) = self.pools[pool].queue.first().map(slot_of) {
                if !self.lingers(slot) {
                    self.kick(idle.0);
                    break;
                }
                self.forget(slot, now);
            }
        }
    }

    /// Whether anyone waits whom a core could run.
    fn contested(&self, core: u16) -> bool {
        let core = self.core_ref(core);
        core.queue.first().is_some()
            || core
                .pools
                .iter()
                .any(|pool| self.pools[*pool as usize].queue.first().is_some())
    }

    /// Whether a vCPU that waits should have the core of one with that key.
    fn beats(&self, rival: u32, key: u128, slice_over: bool) -> bool {
        let entry = &self.slots[rival as usize];
        let own = self.forest.key(in_queue(rival));
        let margin =
            if slice_over || entry.tier == Tier::RealTime || own >> TIER_SHIFT != key >> TIER_SHIFT
            {
                0
            } else {
                self.vm_ref(entry.vm).rate() * u128::from(PATIENCE)
            };
        own + margin < key
    }

    /// The first that waits for a core: of its own queue, or of a mask's if that is behind the
    /// first of its own and the one that runs by more than a slice.
    fn best(&mut self, core: u16, stays: Option<u128>, now: Nanos) -> Option<u32> {
        loop {
            let own = self.core(core).queue.first().map(slot_of);
            let mut best = own;
            let mut least = own.map(|slot| self.forest.key(in_queue(slot)));
            for &pool in &self.core_ref(core).pools {
                let Some(slot) = self.pools[pool as usize].queue.first().map(slot_of) else {
                    continue;
                };
                let key = self.forest.key(in_pool(slot));
                let local = least.into_iter().chain(stays).min();
                let further = local.is_none_or(|local| {
                    let margin = if key >> TIER_SHIFT == local >> TIER_SHIFT {
                        self.vm_ref(self.slots[slot as usize].vm).rate() * u128::from(SLICE / 2)
                    } else {
                        0
                    };
                    key + margin < local
                });
                if further {
                    best = Some(slot);
                    least = Some(key);
                }
            }
            let slot = best?;
            if self.lingers(slot) {
                if stays.zip(least).is_some_and(|(stays, least)| stays < least) {
                    return None;
                }
                self.forget(slot, now);
                continue;
            }
            if !self.outdated(slot, now) {
                return Some(slot);
            }
            // It goes where it belongs by now; at most once for each filling of a bucket.
            self.dequeue(slot);
            self.insert(slot, now);
        }
    }

    /// Whether one that waits does so where it should no more: its reservation or cap is used up.
    fn outdated(&mut self, slot: u32, now: Nanos) -> bool {
        let tier = self.slot(slot).tier;
        let vm = self.vm_of(slot);
        vm.advance(now);
        tier != Tier::RealTime
            && (!vm.may_run() || (tier == Tier::Reserved && !vm.goes_ahead(true)))
    }

    /// The key of one that runs or is about to wait.
    fn key(&mut self, slot: u32, now: Nanos) -> u128 {
        let vm = self.vm_of(slot);
        vm.advance(now);
        let real_time = vm.bandwidth() != 0;
        let credit = vm.rate() * u128::from(CREDIT);
        let entry = &self.slots[slot as usize];
        let ahead = self
            .vm_ref(entry.vm)
            .goes_ahead(entry.tier == Tier::Reserved);
        let entry = self.slot(slot);
        entry.tier = match (real_time, ahead) {
            (true, _) => Tier::RealTime,
            (_, true) => Tier::Reserved,
            _ => Tier::Fair,
        };
        let value = if real_time {
            u128::from(entry.deadline.0)
        } else if entry.fresh {
            entry.paid.saturating_sub(credit)
        } else {
            entry.paid
        };
        (entry.tier as u128) << TIER_SHIFT | value
    }

    /// Puts one that waits where it belongs, and interrupts a core for it if one should run it.
    fn enqueue(&mut self, slot: u32, now: Nanos) {
        if self.insert(slot, now) {
            self.alert(slot, now);
        }
    }

    /// Puts one that waits where it belongs; true if that is a queue for a core.
    fn insert(&mut self, slot: u32, now: Nanos) -> bool {
        let Slot { pool, home, vm, .. } = self.slots[slot as usize];
        let class = self.vm(vm).policy.class;
        self.slot(slot).state = State::Waiting;
        match class {
            Class::Dedicated => return true,
            Class::RealTime { .. } => {
                if self.slot(slot).budget == 0 {
                    let deadline = self.slot(slot).deadline;
                    self.slot(slot).state = State::Throttled;
                    self.arm(slot, deadline);
                    return false;
                }
            }
            Class::Fair => {
                if !self.pools[pool as usize].cores.contains(CoreId(home)) {
                    self.move_home(slot);
                }
            }
        }
        let key = self.key(slot, now);
        if class == Class::Fair {
            let vm = self.vm(vm);
            let (timer, fits) = (vm.slot, vm.may_run());
            if !fits {
                let mut parked = vm.parked;
                let ready = vm.next_change(now, true);
                self.forest.push(&mut parked, in_queue(slot), key);
                self.vm_of(slot).parked = parked;
                self.slot(slot).state = State::Throttled;
                self.arm_vm(timer, ready);
                return false;
            }
            if vm.policy.reservation != 0 && key >> TIER_SHIFT == Tier::Fair as u128 {
                let ready = vm.next_change(now, false);
                self.arm_vm(timer, ready);
            }
        }
        self.push_queues(slot, key);
        true
    }

    fn push_queues(&mut self, slot: u32, key: u128) {
        let Slot { pool, home, .. } = self.slots[slot as usize];
        if let Some(pool) = self.pools.get_mut(pool as usize) {
            self.forest.push(&mut pool.queue, in_pool(slot), key);
        }
        let mut queue = self.core(home).queue;
        self.forest.push(&mut queue, in_queue(slot), key);
        self.core(home).queue = queue;
    }

    /// Takes a vCPU out of the queues.
    fn dequeue(&mut self, slot: u32) {
        let Slot { pool, home, vm, .. } = self.slots[slot as usize];
        if self.forest.queued(in_pool(slot)) {
            let queue = &mut self.pools[pool as usize].queue;
            self.forest.remove(queue, in_pool(slot));
        } else if pool != NONE {
            let mut parked = self.vm(vm).parked;
            self.forest.remove(&mut parked, in_queue(slot));
            self.vm(vm).parked = parked;
            return;
        }
        let mut queue = self.core(home).queue;
        self.forest.remove(&mut queue, in_queue(slot));
        self.core(home).queue = queue;
    }

    /// Interrupts a core that should run one that now waits: its home if that idles, another that
    /// idles, one whose vCPU has had more; else one that would not look again by itself.
    fn alert(&mut self, slot: u32, now: Nanos) {
        let Slot { pool, home, .. } = self.slots[slot as usize];
        let Some(cores) = self.pools.get(pool as usize).map(|pool| pool.cores) else {
            let dedicated = self.core(home).owner == Some(slot);
            if dedicated || self.idle.contains(CoreId(home)) || self.would_win(slot, home, now) {
                self.kick(home);
            }
            return;
        };
        if self.idle.contains(CoreId(home)) {
            return self.kick(home);
        }
        if let Some(core) = self.idle.first_common(&cores) {
            return self.kick(core.0);
        }
        // Its home, then those behind it, in a circle.
        let mut probe = home;
        for _ in 0..PROBES {
            if self.would_win(slot, probe, now) {
                return self.kick(probe);
            }
            let next = cores.first_from(probe + 1).or(cores.first_from(0));
            match next {
                Some(CoreId(next)) if next != home => probe = next,
                _ => break,
            }
        }
        if self.open.contains(CoreId(home)) && cores.contains(CoreId(home)) {
            self.kick(home);
        } else if let Some(core) = self.open.first_common(&cores) {
            self.kick(core.0);
        }
    }

    /// Whether one that waits would have the core at once if that looked.
    fn would_win(&mut self, slot: u32, core: u16, now: Nanos) -> bool {
        let Core { current, until, .. } = *self.core_ref(core);
        let Some(current) = current.filter(|_| until != Nanos::ZERO) else {
            return false;
        };
        self.charge(current, now);
        let key = self.key(current, now);
        self.beats(slot, key, false)
    }

    fn kick(&mut self, core: u16) {
        if self.core(core).until != Nanos::ZERO {
            self.core(core).until = Nanos::ZERO;
            self.idle.remove(CoreId(core));
            self.open.remove(CoreId(core));
            self.kicks.insert(CoreId(core));
        }
    }

    /// Takes the set of cores that must be interrupted so that they ask for the next decision.
    pub fn kicks(&mut self) -> CoreSet {
        core::mem::take(&mut self.kicks)
    }

    /// Gives one that waited a core.
    fn dispatch(&mut self, slot: u32, core: u16, now: Nanos) {
        let vm = self.vm_of(slot);
        vm.advance(now);
        vm.running += 1;
        let (grant, mark) = (vm.grant(now), vm.virtual_time);
        let slack = vm.rate() * u128::from(LIMIT);
        let credit = vm.rate() * u128::from(CREDIT);
        let Slot {
            home,
            tier,
            fresh,
            index,
            ..
        } = self.slots[slot as usize];
        // The first slice after a sleep is a part of one, so that siblings woken together do not
        // go in step.
        let part = if fresh { u64::from(index) % 16 + 1 } else { 16 };
        self.core(home).homes -= 1;
        let entry = self.core(core);
        entry.homes += 1;
        entry.current = Some(slot);
        entry.turn = now;
        entry.slice_end = now + SLICE / 16 * part;
        let time = entry.virtual_time;
        let entry = self.slot(slot);
        entry.grant = grant;
        entry.mark = mark;
        entry.stolen += now.since(entry.since);
        entry.since = now;
        entry.state = State::Running(CoreId(core));
        entry.home = core;
        entry.fresh = false;
        entry.lag = 0;
        if entry.ran_on != core {
            entry.migrations += u64::from(entry.ran_on != u16::MAX);
            entry.ran_on = core;
        }
        entry.paid = entry.paid.max(time.saturating_sub(slack));
        if tier == Tier::Fair {
            let begin = entry.paid.saturating_sub(if fresh { credit } else { 0 });
            self.core(core).virtual_time = time.max(begin);
        }
    }

    /// Accounts what ran until now.
    fn charge(&mut self, slot: u32, now: Nanos) {
        let vm = self.vm_of(slot);
        vm.advance(now);
        let total = vm.virtual_time;
        let entry = self.slot(slot);
        let ran = now.since(entry.since);
        entry.since = entry.since.max(now);
        entry.paid += total - entry.mark;
        entry.mark = total;
        entry.used += ran;
        entry.budget = entry.budget.saturating_sub(ran);
        if let State::Running(core) = entry.state {
            self.core(core.0).busy += ran;
        }
    }

    /// Ends the turn of one that was charged.
    fn stop(&mut self, slot: u32, core: u16, now: Nanos) {
        let time = self.core(core).virtual_time;
        let end = core::mem::replace(&mut self.slot(slot).grant, Nanos::NEVER);
        let vm = self.vm_of(slot);
        vm.advance(now);
        vm.settle(end, now);
        vm.running -= 1;
        let most = time + vm.rate() * u128::from(LIMIT);
        let reserved = vm.policy.reservation != 0;
        let entry = self.slot(slot);
        if reserved {
            // What it had by its reservation is not held against it for ever.
            entry.paid = entry.paid.min(most);
        }
    }

    /// The virtual time of a core: what the one that runs there began with, or has by now while
    /// nobody before it waits.
    fn virtual_now(&mut self, core: u16, now: Nanos) -> u128 {
        if let Some(current) = self.core(core).current
            && self.slot(current).tier == Tier::Fair
        {
            self.charge(current, now);
            let mut paid = self.slot(current).paid;
            if let Some(first) = self.core(core).queue.first() {
                paid = paid.min(self.slot(slot_of(first)).paid);
            }
            let core = self.core(core);
            core.virtual_time = core.virtual_time.max(paid);
        }
        self.core(core).virtual_time
    }

    fn first_timer(&self, core: u16) -> Nanos {
        let first = self.core_ref(core).timers.first();
        first.map_or(Nanos::NEVER, |node| Nanos(self.forest.key(node) as u64))
    }

    /// Sets a deadline of a slot at its home.
    fn arm(&mut self, slot: u32, when: Nanos) {
        let home = self.slot(slot).home;
        let mut timers = self.core(home).timers;
        self.forest
            .push(&mut timers, in_timers(slot), u128::from(when.0));
        let core = self.core(home);
        core.timers = timers;
        let least = core.turn + if core.current.is_some() { MIN_TURN } else { 0 };
        if when.max(least) < core.until {
            self.kick(home);
        }
    }

    /// Takes the deadline of a slot away; [`Nanos::NEVER`] if there was none.
    fn disarm(&mut self, slot: u32) -> Nanos {
        let node = in_timers(slot);
        if !self.forest.queued(node) {
            return Nanos::NEVER;
        }
        let home = self.slot(slot).home;
        let mut timers = self.core(home).timers;
        self.forest.remove(&mut timers, node);
        self.core(home).timers = timers;
        Nanos(self.forest.key(node) as u64)
    }

    /// Sets a VM's timer if it is not due before, on a core that is nobody's own.
    fn arm_vm(&mut self, slot: u32, when: Nanos) {
        if when == Nanos::NEVER {
            return;
        }
        let before = self.disarm(slot);
        let vm = self.slot(slot).vm;
        let vcpu = self.vm_ref(vm).vcpus.iter().copied().find(|vcpu| {
            let Slot { pool, home, .. } = self.slots[*vcpu as usize];
            self.pools
                .get(pool as usize)
                .is_some_and(|pool| pool.cores.contains(CoreId(home)))
        });
        if let Some(vcpu) = vcpu {
            self.slot(slot).home = self.slots[vcpu as usize].home;
            self.arm(slot, when.min(before));
        }
    }

    /// Does what is due on a core.
    fn fire(&mut self, core: u16, now: Nanos) {
        for _ in 0..BATCH {
            if self.first_timer(core) > now {
                return;
            }
            let Some(slot) = self.core(core).timers.first().map(slot_of) else {
                return;
            };
            self.disarm(slot);
            let Slot {
                vm, index, state, ..
            } = self.slots[slot as usize];
            if index == TIMER {
                self.fire_vm(vm, now);
            } else if state == State::Asleep {
                self.wake_slot(slot, now);
            } else {
                self.replenish(slot, now);
            }
        }
    }

    /// A real-time vCPU's budget is full again.
    fn replenish(&mut self, slot: u32, now: Nanos) {
        let Class::RealTime { budget, period } = self.vm_of(slot).policy.class else {
            return;
        };
        let entry = self.slot(slot);
        entry.budget = budget;
        entry.deadline = (entry.deadline + period).max(now);
        self.enqueue(slot, now);
    }

    /// A VM's cap has room again, or its reservation goes ahead.
    fn fire_vm(&mut self, vm: u32, now: Nanos) {
        self.vm(vm).advance(now);
        for _ in 0..self.vm(vm).turns() {
            let Some(slot) = self.vm(vm).parked.first().map(slot_of) else {
                break;
            };
            self.dequeue(slot);
            self.enqueue(slot, now);
        }
        let timer = self.vm(vm).slot;
        if self.vm(vm).parked.first().is_some() {
            let ready = self.vm(vm).next_change(now, true);
            self.arm_vm(timer, ready.max(now + MIN_TURN));
        }
        if self.vm(vm).policy.reservation == 0 {
            return;
        }
        let ahead = self.vm(vm).goes_ahead(false);
        for at in 0..self.vm(vm).vcpus.len() {
            let slot = self.vm(vm).vcpus[at];
            if self.slot(slot).tier != Tier::Fair || self.slot(slot).state != State::Waiting {
                continue;
            }
            if !ahead {
                let ready = self.vm(vm).next_change(now, false);
                return self.arm_vm(timer, ready);
            }
            self.dequeue(slot);
            self.enqueue(slot, now);
        }
    }

    fn name(&self, slot: u32) -> VcpuId {
        let Slot { vm, index, .. } = self.slots[slot as usize];
        VcpuId {
            vm: self.vm_ref(vm).id,
            index,
        }
    }

    /// What there is to know about a vCPU; none if it is not there.
    #[must_use]
    pub fn view(&self, vcpu: VcpuId, now: Nanos) -> Option<View> {
        let slot = self.slots.get(self.find(vcpu)? as usize)?;
        let more = now.since(slot.since);
        let (used, stolen) = match slot.state {
            State::Asleep => (0, 0),
            State::Waiting | State::Throttled => (0, more),
            State::Running(_) => (more, 0),
        };
        Some(View {
            state: slot.state,
            core: CoreId(slot.home),
            used: slot.used + used,
            stolen: slot.stolen + stolen,
            migrations: slot.migrations,
        })
    }

    /// Nanoseconds for which a vCPU wanted a core and had none; 0 if it is not there.
    #[must_use]
    pub fn stolen(&self, vcpu: VcpuId, now: Nanos) -> u64 {
        self.view(vcpu, now).map_or(0, |view| view.stolen)
    }

    /// Nanoseconds that a vCPU had a core; 0 if it is not there.
    #[must_use]
    pub fn used(&self, vcpu: VcpuId, now: Nanos) -> u64 {
        self.view(vcpu, now).map_or(0, |view| view.used)
    }

    /// Nanoseconds for which a core ran vCPUs; 0 if it is not there.
    #[must_use]
    pub fn busy(&self, core: CoreId, now: Nanos) -> u64 {
        let Some(Some(core)) = self.cores.get(usize::from(core.0)) else {
            return 0;
        };
        let since = core.current.and_then(|slot| self.slots.get(slot as usize));
        core.busy + since.map_or(0, |slot| now.since(slot.since))
    }

    /// The vCPU on a core.
    #[must_use]
    pub fn running(&self, core: CoreId) -> Option<VcpuId> {
        let core = self.cores.get(usize::from(core.0))?.as_ref()?;
        core.current.map(|slot| self.name(slot))
    }

    /// The dedicated vCPU that owns a core.
    #[must_use]
    pub fn owner(&self, core: CoreId) -> Option<VcpuId> {
        let core = self.cores.get(usize::from(core.0))?.as_ref()?;
        core.owner.map(|slot| self.name(slot))
    }

    /// Nodes of queues that were visited since the start: the cost of decisions, in steps.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.forest.steps
    }
}
