//! What the monitor answers: where VMs stand, who used the cores, who has the memory, and how a VM
//! is scheduled.

use super::{Kept, Manager};
use crate::console;
use crate::frames;
use crate::run::Live;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use monitor::command::Share;
use monitor::table::Table;
use sched::{CoreId, CoreSet, Policy, View, VmId};
use vm::End;
use vm::config::OnEnd;
use vm::exits::{Exits, Reason};
use vm::life::State;

impl Manager {
    /// Where a VM stands, in words.
    fn about(&self, number: usize, vm: &Kept) -> String {
        let state = vm.life.state();
        let over = matches!(state, State::Stopped { .. } | State::Crashed { .. });
        match (self.machine.live(number), &vm.end) {
            (_, Some(End::Crashed(cause))) if over => format!("{state}: {cause}"),
            (_, Some(end)) if over => format!("{state}: {end}"),
            (Some(live), _) => format!(
                "{state}, {} KiB of {} in use",
                live.vm.backed_bytes() >> 10,
                live.vm.promised_bytes() >> 10
            ),
            (None, _) => state.to_string(),
        }
    }

    pub(super) fn list(&self) {
        for (number, vm) in self.vms.iter().enumerate() {
            let about = self.about(number, vm);
            console::reply(format_args!("{} {}: {about}", number + 1, vm.config.name));
        }
        console::reply(format_args!(
            "{} KiB of memory free",
            frames::free_bytes() >> 10
        ));
    }

    /// What the scheduler knows of a VM's vCPUs.
    fn views(&self, live: &Live) -> Vec<View> {
        let count = live.vm.vcpus();
        self.machine.schedule(|s, now| {
            let views = (0..count).filter_map(|index| s.view(live.vcpu_id(index), now));
            views.collect()
        })
    }

    pub(super) fn info(&self, number: usize) {
        let Some(vm) = self.vms.get(number) else {
            return;
        };
        let name = &vm.config.name;
        let about = self.about(number, vm);
        console::reply(format_args!("{name}: {about}"));
        console::reply(format_args!(
            "started {} times; last end: {}",
            vm.life.starts(),
            vm.end.as_ref().map_or("none".to_string(), End::to_string)
        ));
        console::reply(format_args!(
            "then: after power-off {}, after a reset {}, after a crash {}",
            then(vm.config.on_poweroff),
            then(vm.config.on_reboot),
            then(vm.config.on_crash)
        ));
        vm.show_policy();
        let Some(live) = self.machine.live(number) else {
            return;
        };
        console::reply(format_args!(
            "memory: {} bytes promised, {} in use, {} of tables",
            live.vm.promised_bytes(),
            live.vm.backed_bytes(),
            live.vm.table_bytes()
        ));
        let heading = [
            ">vcpu", "state", ">core", ">ms", ">stolen", ">moves", ">exits",
        ];
        let mut table = Table::new(&heading);
        let views = self.views(&live);
        for ((index, view), exits) in views.iter().enumerate().zip(live.exits()) {
            table.number(index as u64).cell(doing(view.state));
            table.number(view.core.0.into()).number(view.used / MS);
            table.number(view.stolen / MS).number(view.migrations);
            table.number(exits.total());
        }
        show(&table);
    }

    /// CPU time in all and, as a share of a core, since the last time; exits by reason.
    pub(super) fn top(&mut self) {
        let now = self.machine.clock.now();
        let passed = now.since(self.topped).max(1);
        self.topped = now;
        let heading = [
            "vm", ">vcpu", "state", ">core", ">ms", ">share", ">stolen", ">exits",
        ];
        let mut table = Table::new(&heading);
        let names = Reason::ALL.map(|(_, name)| format!(">{name}"));
        let names = names.each_ref().map(String::as_str);
        let mut heading = alloc::vec!["vm"];
        heading.extend(names);
        let mut reasons = Table::new(&heading);
        for number in 0..self.vms.len() {
            let Some(live) = self.machine.live(number) else {
                continue;
            };
            let views = self.views(&live);
            let Some(vm) = self.vms.get_mut(number) else {
                return;
            };
            let since: Vec<u64> = views
                .iter()
                .zip(&mut vm.seen)
                .map(|(view, seen)| {
                    // One that was started afresh counts from 0.
                    let before = core::mem::replace(seen, view.used);
                    view.used.checked_sub(before).unwrap_or(view.used)
                })
                .collect();
            let share = |since: u64| {
                // In microseconds, so that no product is too large for centuries.
                let tenths = (since / 1000).saturating_mul(1000) / (passed / 1000).max(1);
                format!("{}.{} %", tenths / 10, tenths % 10)
            };
            let sum = |of: fn(&View) -> u64| views.iter().map(of).sum::<u64>();
            table.cell(vm.config.name.as_str()).cell("all");
            table.cell(vm.life.state().to_string()).cell("");
            table.number(sum(|view| view.used) / MS);
            table.cell(share(since.iter().sum()));
            table.number(sum(|view| view.stolen) / MS);
            table.number(live.exits().map(Exits::total).sum());
            for (index, (view, exits)) in views.iter().zip(live.exits()).enumerate() {
                table.cell("").number(index as u64);
                table.cell(doing(view.state)).number(view.core.0.into());
                table.number(view.used / MS);
                table.cell(share(since.get(index).copied().unwrap_or(0)));
                table.number(view.stolen / MS).number(exits.total());
            }
            reasons.cell(vm.config.name.as_str());
            for (reason, _) in Reason::ALL {
                reasons.number(live.exits().map(|exits| exits.of(reason)).sum());
            }
        }
        show(&table);
        show(&reasons);
    }

    /// The machine's memory to the byte, and who has it.
    pub(super) fn mem(&self) {
        // Before the answer itself takes some.
        let (heap, free) = (frames::heap_used(), frames::free_bytes());
        let lives = || (0..self.vms.len()).filter_map(|number| self.machine.live(number));
        let owed: u64 = lives().map(|live| live.vm.outstanding_bytes()).sum();
        console::reply(format_args!(
            "frames: {free} of {} bytes free, {owed} of them promised to VMs",
            frames::total_bytes()
        ));
        console::reply(format_args!(
            "heap: {heap} of {} bytes in use",
            frames::heap_size()
        ));
        let mut table = Table::new(&["vm", ">promised", ">in use", ">tables"]);
        for live in lives() {
            table.cell(live.vm.name());
            table.number(live.vm.promised_bytes());
            table.number(live.vm.backed_bytes());
            table.number(live.vm.table_bytes());
        }
        show(&table);
    }

    /// Changes how a VM is scheduled, at once or from its next start on, and shows it.
    pub(super) fn share(&mut self, number: usize, share: &Share) {
        let known = self.machine.live(number).is_some()
            || self.work.half.as_ref().is_some_and(|h| h.number == number);
        let Some(vm) = self.vms.get_mut(number) else {
            return;
        };
        let mut policy = vm.policy.clone();
        if let Some(weight) = share.weight {
            policy.weight = weight;
        }
        match share.cap {
            Some(0) => policy.cap = None,
            Some(cap) => policy.cap = Some(cap),
            None => {}
        }
        if let Some(cores) = share.pin {
            policy.pins = Vec::new();
            policy.affinity = cores;
        }
        if policy != vm.policy {
            let (id, new) = (VmId(number as u16), policy.clone());
            let count = vm.config.vcpus as u16;
            let result = self.machine.schedule(|s, now| match known {
                true => s.set_policy(id, new, now),
                // Whether it could start so.
                false => s.add_vm(id, count, new).map(|()| s.remove_vm(id)),
            });
            if let Err(error) = result {
                console::reply(format_args!("vm {}: {error}", vm.config.name));
                return;
            }
            vm.policy = policy;
        }
        vm.show_policy();
    }
}

impl Kept {
    fn show_policy(&self) {
        let policy = &self.policy;
        let mut text = format!("scheduled: {}, weight {}", class(policy), policy.weight);
        if let Some(cap) = policy.cap {
            text.push_str(&format!(", cap {cap} %"));
        }
        if policy.reservation != 0 {
            text.push_str(&format!(", reservation {} %", policy.reservation));
        }
        text.push_str(", on ");
        if !policy.pins.is_empty() {
            let pins = policy.pins.iter().flat_map(CoreSet::iter);
            cores(&mut text, pins);
            text.push_str(" in order");
        } else if policy.affinity == CoreSet::ALL {
            text.push_str("all cores");
        } else {
            cores(&mut text, policy.affinity.iter());
        }
        console::reply(format_args!("{text}"));
    }
}

/// Nanoseconds of a millisecond.
const MS: u64 = 1_000_000;

fn show(table: &Table) {
    table.lines(&mut |line| console::reply(format_args!("{line}")));
}

/// Core numbers.
fn cores(text: &mut String, cores: impl Iterator<Item = CoreId>) {
    text.push_str("cores");
    for CoreId(core) in cores {
        text.push_str(&format!(" {core}"));
    }
}

const fn class(policy: &Policy) -> &'static str {
    match policy.class {
        sched::Class::Fair => "fair",
        sched::Class::RealTime { .. } => "real-time",
        sched::Class::Dedicated => "dedicated",
    }
}

const fn then(what: OnEnd) -> &'static str {
    match what {
        OnEnd::Restart => "restart",
        OnEnd::Stop => "stop",
        OnEnd::Hold => "hold",
    }
}

const fn doing(state: sched::State) -> &'static str {
    match state {
        sched::State::Asleep => "asleep",
        sched::State::Waiting => "waiting",
        sched::State::Throttled => "throttled",
        sched::State::Running(_) => "running",
    }
}
