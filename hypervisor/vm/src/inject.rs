//! Failures of the hypervisor that a guest may ask for, to see that they end its VM and nothing else.
//! Only in builds with the feature `fault-injection`.

use crate::vm::{Attention, Host, Processor};
use abi::hypercall::{ERROR_ARGUMENT, fault};
use arch::{FrameSource, Gpr, PhysMemory, Vcpu};
use core::hint::{black_box, spin_loop};

impl<V: Vcpu, P: PhysMemory, F: FrameSource> Processor<V, P, F> {
    /// Fails at the place, now or later; comes back with the call's result if later or never.
    #[cold]
    pub(crate) fn fail(&mut self, place: u64) -> i64 {
        match place {
            fault::HANDLER => panic!("a guest asked for it: in a handler"),
            fault::BOARD => {
                let _held = self.vm.board();
                panic!("a guest asked for it: with the lock on the board");
            }
            fault::MEMORY => {
                let _held = self.vm.memory();
                panic!("a guest asked for it: with the lock on the memory");
            }
            fault::ENTRY | fault::ENDLESS_SHARED => {
                self.attention.insert(Attention::FAULT);
                0
            }
            fault::STACK => deeper(0),
            fault::ENDLESS => endless(),
            fault::ENDLESS_BOARD => {
                let _held = self.vm.board();
                endless()
            }
            _ => ERROR_ARGUMENT,
        }
    }

    /// The failure that was left for the preparation of an entry.
    pub(crate) fn fail_at_entry(&self, host: &mut impl Host) {
        if self.attention.contains(Attention::FAULT) {
            if self.vcpu.gprs()[Gpr::Rbx] == fault::ENDLESS_SHARED {
                host.with_shared_lock(endless)
            }
            panic!("a guest asked for it: before an entry");
        }
    }
}

/// Uses the stack up.
fn deeper(depth: i64) -> i64 {
    let mut used = [depth; 64];
    if black_box(&mut used).is_empty() {
        return 0;
    }
    deeper(depth + 1) + used[0]
}

fn endless() -> ! {
    loop {
        spin_loop();
    }
}
