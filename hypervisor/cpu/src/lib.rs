//! Enter and leave guest mode: VMX and SVM behind [`arch::Vcpu`], and the host's own tables.
//! Knows nothing of VMs, devices or switches.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod guard;
pub mod host;
pub mod page;
pub mod paging;
pub mod percpu;
pub mod start;
pub mod svm;
pub mod virt;
pub mod vmx;
pub mod xstate;
