//! INS and OUTS (Intel SDM Vol. 2A/2B; Vol. 3C table 28-5, AMD APM Vol. 2 §15.10.2).
//!
//! Both vendors checked IOPL and the TSS's permission bitmap before the exit, and neither tells
//! in all its versions what string instruction it was: it is decoded.

use arch::{GuestMemory, IoExit, Vcpu};
use iced_x86::DecoderOptions;

use super::fetch::{Code, Fetched};
use super::operand::Core;
use super::string::{Kind, StringOp};
use super::{Done, EmulateError, PortBus, finish};

/// Executes the string port access at RIP, which `exit` describes: a share of it, if it is
/// repeated ([`Done::Again`]).
///
/// # Errors
/// The VM cannot go on: see [`EmulateError`].
pub fn string_io(
    vcpu: &mut dyn Vcpu,
    mem: &mut dyn GuestMemory,
    ports: &mut dyn PortBus,
    exit: &IoExit,
) -> Result<Done, EmulateError> {
    let rip = vcpu.rip();
    let mut code = Code::default();
    let outcome = Fetched::at_rip(vcpu, mem, &mut code, DecoderOptions::NONE).and_then(|fetched| {
        code = fetched.code;
        let kind = if exit.input { Kind::Ins } else { Kind::Outs };
        match StringOp::of(&fetched.instruction) {
            Some(op) if op.kind == kind && op.size == exit.size => {
                Core::new(&fetched, vcpu, mem, None).repeat(&op, &fetched, Some(ports))
            }
            // The guest rewrote its code after the exit.
            _ => Ok(Done::Again),
        }
    });
    finish(rip, &code, outcome)
}
