//! Entering and leaving guest mode: Intel VT-x and AMD-V behind [`arch::Vcpu`],
//! and the state that both switch.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod page;
pub mod virt;
pub mod vmx;
pub mod xstate;
