//! Every emulator test, as data.

mod bad_input;
mod boot;
mod console;
mod guests;
mod hostile;
mod inject;
mod lifecycle;
mod linux;
mod network;
mod smp;
mod switch;
mod virtio;

use crate::dialogue::{Case, Heard, Step};

/// The groups of emulator tests, with what they show.
pub const GROUPS: [(&str, &str); 12] = [
    ("boot", "the disk image boots by UEFI and by BIOS"),
    ("hello", "a first guest prints and ends"),
    (
        "conformance",
        "the virtual PC seen from inside, and plain QEMU as the reference",
    ),
    (
        "linux",
        "Debian's kernel to a shell, and a dialogue with it",
    ),
    ("smp", "several CPUs in one guest"),
    ("hostile", "guests that try everything, and harm nobody"),
    (
        "inject",
        "the hypervisor fails at chosen places, and only one VM ends",
    ),
    (
        "lifecycle",
        "VMs start, pause, end and start again, and leave nothing behind",
    ),
    (
        "virtio",
        "rings and registers as no driver would write them, beside a heartbeat",
    ),
    (
        "network",
        "the machine's network cards, and guests on a switch: addresses, files, VLANs, two hosts",
    ),
    (
        "console",
        "one line for the log, the monitor and all guests: keys, past, lies",
    ),
    (
        "bad-input",
        "one clear error for each wrong input, and the rest goes on",
    ),
];

/// The monitor gets the keyboard: then no guest's line is broken by another's.
const TO_MONITOR: Step = Step::Send("\x140");
/// It has it.
const MONITOR: Step = Step::Expect(r"^tessera\| keyboard: monitor");

/// Whether these VMs left by their debug-exit port with the code that counts as a good end.
fn left_well(heard: &Heard, names: &[&str]) -> Result<(), String> {
    for name in names {
        let line = format!("tessera| vm {name}: ended: debug exit, code 1");
        if !heard.all.contains(&line) {
            return Err(format!("no line `{line}`"));
        }
    }
    Ok(())
}

/// All cases, the longest groups first, so that the last to finish is a short one.
pub fn all() -> Vec<&'static Case> {
    let groups = [
        linux::CASES,
        guests::CASES,
        boot::CASES,
        smp::CASES,
        hostile::CASES,
        inject::CASES,
        lifecycle::CASES,
        network::CASES,
        switch::CASES,
        virtio::CASES,
        console::CASES,
        bad_input::CASES,
    ];
    groups.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::dialogue::compile;

    #[test]
    fn every_case_has_a_known_group_a_name_of_its_own_and_patterns_that_compile() {
        let mut names = HashSet::new();
        for case in all() {
            assert!(
                GROUPS.iter().any(|(g, _)| *g == case.group),
                "{}",
                case.full_name()
            );
            assert!(
                names.insert(case.full_name()),
                "twice: {}",
                case.full_name()
            );
            assert!(!case.on.is_empty(), "{} runs nowhere", case.full_name());
            let beside = case.steps.iter().filter_map(|step| match step {
                Step::Beside(steps) => Some(*steps),
                _ => None,
            });
            for step in case.steps.iter().chain(beside.flatten()) {
                let patterns: &[&str] = match step {
                    Step::Expect(pattern)
                    | Step::Told(pattern)
                    | Step::Shown(pattern)
                    | Step::ExpectSecond(pattern) => &[pattern],
                    Step::Refuse(patterns) => patterns,
                    _ => &[],
                };
                for pattern in patterns {
                    compile(pattern, &Default::default()).expect("a pattern");
                }
            }
        }
    }
}
