//! Making VMs, and taking back what ended ones held, piece by piece.
//!
//! Images have megabytes to be summed up and copied, and memory of gigabytes has many frames to be
//! given back. The boot core runs guests too, so it does that in pieces: it works for [`WORK`] and
//! one piece at most, and then guests have it for [`REST`] if any wants it.

use super::{Manager, STATUS_BOOT};
use crate::backend::{AnyVm, Guest, Setup};
use crate::console;
use crate::cores;
use crate::frames::{self, Frames};
use crate::run::Live;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::Nanos;
use hw::DirectMap;
use log::{debug, error, info};
use sched::{VcpuId, VmId};
use vm::config::VmConfig;
use vm::life::State;
use vm::load::EntryState;
use vm::{Making, VmError};

/// How long the boot core works before it looks at its guests, in nanoseconds.
const WORK: u64 = 500_000;
/// How long it leaves itself to its guests then.
const REST: u64 = sched::SLICE;

/// A VM that is being made.
pub(super) struct Half {
    pub(super) number: usize,
    /// The numbers of its vCPUs in the machine.
    numbers: Vec<u16>,
    stage: Stage,
    /// Bytes of heap and frames that it took so far.
    taken: i64,
    /// When it was begun with.
    begun: Nanos,
}

/// What has been made of it.
enum Stage {
    /// Nothing: its images are being checked.
    Images,
    /// Its memory, which is being filled.
    Memory(Box<Making<'static, DirectMap, Frames>>),
    /// All but the vCPUs that are missing here.
    Vcpus(Arc<AnyVm>, EntryState, Vec<Box<dyn Guest>>),
}

/// What there is to do for VMs, and when.
pub(super) struct Work {
    /// The one that is being made; others wait until it is.
    pub(super) half: Option<Half>,
    /// Those that ended, and still hold memory.
    leaving: Vec<Arc<AnyVm>>,
    /// Guests have the core until then.
    next: Nanos,
    /// The longest time without them while the last VM was made, in nanoseconds.
    away: u64,
}

impl Work {
    pub(super) const fn new() -> Self {
        Self {
            half: None,
            leaving: Vec::new(),
            next: Nanos::ZERO,
            away: 0,
        }
    }
}

/// Bytes of the heap and of frames that someone has.
fn taken() -> i64 {
    let all = frames::total_bytes().saturating_sub(frames::free_bytes());
    (frames::heap_used() as u64).saturating_add(all) as i64
}

impl Manager {
    /// When something is to be done by itself.
    pub fn due(&self) -> Nanos {
        self.work_due().min(self.drain)
    }

    fn work_due(&self) -> Nanos {
        if self.has_work() {
            return self.work.next;
        }
        let due = self.vms.iter().map(|vm| vm.life.due()).min();
        due.unwrap_or(Nanos::NEVER).max(self.work.next)
    }

    /// Whether a VM is being made, or taken back.
    pub const fn has_work(&self) -> bool {
        self.work.half.is_some() || !self.work.leaving.is_empty()
    }

    /// No guest wants the core: work goes on at once.
    pub const fn go_on(&mut self) {
        self.work.next = Nanos::ZERO;
    }

    /// Works for so many nanoseconds, and a piece more.
    pub(super) fn work(&mut self, most: u64) {
        let start = self.machine.clock.now();
        loop {
            let more = self.piece(start);
            let now = self.machine.clock.now();
            self.work.away = self.work.away.max(now.since(start));
            self.work.next = now + REST;
            if !more || now.since(start) >= most {
                return;
            }
        }
    }

    /// Works if it is time to.
    pub(super) fn work_if_due(&mut self) {
        if self.work_due() <= self.machine.clock.now() {
            self.work(WORK);
        }
    }

    /// Does the next piece of work; `false` when there was none. The core is away from its guests
    /// since `start`.
    fn piece(&mut self, start: Nanos) -> bool {
        if self.take_back() {
            return true;
        }
        let Some(half) = self.work.half.take().or_else(|| self.begin()) else {
            return false;
        };
        let Half {
            number,
            numbers,
            stage,
            taken: so_far,
            begun,
        } = half;
        let (mut made, before) = (None, taken());
        let sound = cpu::guard::run(|| made = Some(self.advance(number, &numbers, stage)));
        let taken = so_far + taken() - before;
        let failed = || VmError::Vcpu("the hypervisor failed while it made this VM".to_string());
        let made = made.filter(|_| sound.is_ok());
        match made.unwrap_or_else(|| Err(failed())) {
            Ok(Stage::Vcpus(vm, _, vcpus)) if vcpus.len() == vm.vcpus() => {
                let away = self.work.away.max(self.machine.clock.now().since(start));
                let took = self.machine.clock.now().since(begun);
                let overhead = taken.saturating_sub_unsigned(vm.backed_bytes());
                let name = vm.name().to_string();
                self.finish(number, numbers, Live::new(number, vm, vcpus));
                console::say(format_args!("bench vm-memory {overhead} bytes"));
                let (took, away) = (took / 1000, away / 1000);
                debug!("vm {name}: made in {took} µs, at most {away} of them at once");
            }
            Ok(stage) => {
                self.work.half = Some(Half {
                    number,
                    numbers,
                    stage,
                    taken,
                    begun,
                });
            }
            Err(error) => {
                self.machine
                    .schedule(|s, _| s.remove_vm(VmId(number as u16)));
                self.fail_to_start(number, &numbers, &error.to_string());
            }
        }
        true
    }

    /// Begins with the next VM that is to start.
    fn begin(&mut self) -> Option<Half> {
        let now = self.machine.clock.now();
        let is_due = |life: &vm::life::Life| life.state() != State::Defined && life.due() <= now;
        let number = self.vms.iter().position(|vm| is_due(&vm.life))?;
        let vm = self.vms.get(number)?;
        let (count, policy) = (vm.config.vcpus, vm.policy.clone());
        let numbers = self.take_numbers(count);
        let admitted = self
            .machine
            .schedule(|s, _| s.add_vm(VmId(number as u16), count as u16, policy));
        if let Err(error) = admitted {
            self.fail_to_start(number, &numbers, &error.to_string());
            return None;
        }
        self.work.away = 0;
        Some(Half {
            number,
            numbers,
            stage: Stage::Images,
            taken: 0,
            begun: now,
        })
    }

    /// The next piece of a VM. After an error nothing of it is left.
    fn advance(&self, number: usize, numbers: &[u16], stage: Stage) -> Result<Stage, VmError> {
        let config = self.vms.get(number).map(|vm| &vm.config);
        let config = config.ok_or(VmError::Vcpu(String::new()))?;
        Ok(match stage {
            Stage::Images if vm::check_images(config, self.bundle)? => {
                Stage::Memory(Box::new(self.lay_out(config)?))
            }
            Stage::Memory(mut making) => {
                if making.step()? {
                    let (vm, entry) = making.finish();
                    Stage::Vcpus(vm, entry, Vec::new())
                } else {
                    Stage::Memory(making)
                }
            }
            Stage::Vcpus(vm, entry, mut vcpus) => {
                let (host, id) = (self.machine.host, vcpus.len());
                let number = numbers.get(id).copied().unwrap_or(0);
                match (self.machine.backend).vcpu(host, number, &vm, id as u32, &entry) {
                    Ok(vcpu) => vcpus.push(vcpu),
                    Err(error) => {
                        vcpus.into_iter().for_each(Guest::destroy);
                        return Err(error);
                    }
                }
                Stage::Vcpus(vm, entry, vcpus)
            }
            stage => stage,
        })
    }

    fn lay_out(&self, config: &VmConfig) -> Result<Making<'static, DirectMap, Frames>, VmError> {
        let promised: u64 = (0..self.vms.len())
            .filter_map(|number| self.machine.live(number))
            .map(|live| live.vm.outstanding_bytes())
            .sum();
        let (host, backend) = (self.machine.host, self.machine.backend);
        let now = hw::rdtsc();
        Making::new(Setup {
            config,
            bundle: self.bundle,
            format: backend.format(),
            phys: host.map,
            frames: Frames,
            free_bytes: frames::free_bytes().saturating_sub(promised),
            tsc: now,
            tsc_hz: host.tsc_hz,
            wall_clock: host.wall_clock + Nanos::from_ticks(now - host.wall_tsc, host.tsc_hz).0,
            enabled: backend.enabled(),
            host_cpuid: &|leaf, subleaf| {
                let result = core::arch::x86_64::__cpuid_count(leaf, subleaf);
                [result.eax, result.ebx, result.ecx, result.edx]
            },
            random_seed: hw::random_seed(),
            apic_access_page: backend.apic_access_page(),
            still_waiting: cores::watch_while_waiting,
        })
    }

    /// Lets a VM run that is made.
    fn finish(&mut self, number: usize, numbers: Vec<u16>, live: Live) {
        let now = self.machine.clock.now();
        let Some(vm) = self.vms.get_mut(number) else {
            return;
        };
        vm.numbers = numbers;
        vm.life.started(now);
        let config = &vm.config;
        info!(
            "vm {}: {} MiB, {} vCPU{}, kernel {}",
            config.name,
            config.memory >> 20,
            config.vcpus,
            if config.vcpus == 1 { "" } else { "s" },
            config.kernel.name
        );
        self.machine.set_live(number, Some(Arc::new(live)));
        let first = VcpuId {
            vm: VmId(number as u16),
            index: 0,
        };
        self.machine.schedule(|s, now| s.wake(first, now));
    }

    fn fail_to_start(&mut self, number: usize, numbers: &[u16], error: &str) {
        self.give_numbers(numbers);
        let Some(vm) = self.vms.get_mut(number) else {
            return;
        };
        vm.life.failed();
        vm.end = None;
        let reason = format!("vm {}: {error}", vm.config.name);
        error!("{reason}");
        self.fail(STATUS_BOOT, reason);
    }

    /// A VM that is being made is not wanted any more.
    pub(super) fn give_up(&mut self, number: usize) {
        let Some(half) = self.work.half.take_if(|half| half.number == number) else {
            return;
        };
        self.machine
            .schedule(|s, _| s.remove_vm(VmId(number as u16)));
        self.give_numbers(&half.numbers);
        if let Some(vm) = self.vms.get(number) {
            info!("vm {}: its start is given up", vm.config.name);
        }
        match half.stage {
            Stage::Images => {}
            Stage::Memory(making) => self.leave(making.finish().0, Vec::new()),
            Stage::Vcpus(vm, _, vcpus) => self.leave(vm, vcpus),
        }
    }

    /// Takes back what a VM holds: at once what does not take long.
    pub(super) fn leave(&mut self, vm: Arc<AnyVm>, vcpus: Vec<Box<dyn Guest>>) {
        if cpu::guard::run(|| vcpus.into_iter().for_each(Guest::destroy)).is_err() {
            self.lost(vm.name());
            core::mem::forget(vm);
            return;
        }
        self.work.leaving.push(vm);
        let start = self.machine.clock.now();
        while self.take_back() && self.machine.clock.now().since(start) < WORK {}
    }

    /// Takes back a part of what is held by VMs that ended; `false` if there are none.
    fn take_back(&mut self) -> bool {
        let Some(vm) = self.work.leaving.pop() else {
            return false;
        };
        let (name, mut rest) = (vm.name().to_string(), None);
        let sound = cpu::guard::run(|| {
            if !vm.give_back() {
                rest = Some(vm);
            }
        });
        match sound {
            Ok(()) => self.work.leaving.extend(rest),
            Err(_) => self.lost(&name),
        }
        true
    }

    pub(super) fn lost(&self, name: &str) {
        error!("vm {name}: its memory is lost until the machine starts again");
    }
}
