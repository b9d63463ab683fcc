//! Intel VT-x (Intel SDM Vol. 3C ch. 24–31).
//!
//! - [`caps`]: what the processor offers, which controls we need and want, and turning VMX
//!   operation on and off on a core.
//! - [`vmcs`]: the instructions that reach the VMCS and the translation caches.
//! - `entry`: the few instructions between host and guest.
//! - `exit`: exit reasons and qualifications as [`arch::Exit`].
//! - [`vcpu`]: one virtual CPU.
//!
//! Decisions that shape all of it: unrestricted guest and EPT are required, so that every guest
//! mode runs natively; what a guest may touch without us (most of CR0 and CR4, CR3, debug
//! registers, SYSCALL's MSRs, extended state) is passed through and changes hands only when a vCPU
//! is loaded or unloaded; interrupts of the machine are not acknowledged by the exit but stay
//! pending, as on AMD-V, and are taken by the host's own IDT.

pub mod caps;
mod entry;
mod exit;
pub mod vcpu;
pub mod vmcs;

pub use caps::{Features, Vmx, VmxCaps};
pub use vcpu::{ApicMode, VmxConfig, VmxPages, VmxVcpu};

/// A vCPU that is not loaded goes from core to core: `unload` leaves nothing of it behind, and `load`
/// writes what is the core's own and drops stale translations when it came to another one.
const _: () = {
    const fn moves_between_cores<T: Send>() {}
    moves_between_cores::<VmxVcpu>();
    moves_between_cores::<crate::svm::SvmVcpu>();
};
