//! The life of a VM, as a person at the monitor leads it, and what follows each end.

use super::{MONITOR, TO_MONITOR, linux};
use crate::dialogue::{BOCHS_BIOS, Case, Ending, Heard, Load, QEMU_BIOS, Source, Step};

use Step::{Check, Expect, Refuse, Send};

const FILES: &[(&str, Source)] = &[
    ("guest-hostile", Source::Made("guest-hostile")),
    ("guest-heartbeat", Source::Made("guest-heartbeat")),
    ("guest-hello", Source::Made("guest-hello")),
];

const BASE: Case = Case {
    group: "lifecycle",
    on: &[QEMU_BIOS, BOCHS_BIOS],
    deadline: 90,
    ..Case::BASE
};

const fn bundle(config: &'static [&'static str]) -> Load {
    Load::Bundle {
        config,
        files: FILES,
        spoil: None,
    }
}

/// A guest that counts time beside the others: its beats say how much has passed.
const CLOCK: &str = r#"
[[vm]]
name = "clock"
kind = "pvh"
kernel = "guest-heartbeat"
cmdline = "beats=1000000 late=1000000000"
memory = "16MiB"
"#;

/// Another, to be paused and stopped.
const PULSE: &str = r#"
[[vm]]
name = "pulse"
kind = "pvh"
kernel = "guest-heartbeat"
cmdline = "beats=1000000 late=1000000000"
memory = "16MiB"
"#;

/// Does what is typed on its console.
const TALK: &str = r#"
[[vm]]
name = "talk"
kind = "pvh"
kernel = "guest-hostile"
cmdline = "console"
memory = "16MiB"
"#;

const TICK: Step = Expect(r"^clock\| beat \d+ late");
const QUIT: Step = Send("quit\r");

/// The text between the first `from` and the first `to` after it.
fn between<'a>(text: &'a str, from: &str, to: &str) -> Result<&'a str, String> {
    let (_, rest) = text.split_once(from).ok_or(format!("no `{from}`"))?;
    let (part, _) = rest.split_once(to).ok_or(format!("no `{to}` after it"))?;
    Ok(part)
}

/// A column of `top` in the row for all of a VM, each time that it was shown.
fn top(heard: &Heard, vm: &str, column: usize) -> Vec<u64> {
    let head = format!("tessera| {vm} ");
    let rows = heard.all.lines().filter(|line| line.starts_with(&head));
    let rows = rows.filter(|line| line.split_whitespace().nth(2) == Some("all"));
    rows.filter_map(|line| line.split_whitespace().nth(column)?.parse().ok())
        .collect()
}

/// Neither did it say anything nor did it run.
fn stood_still(heard: &Heard) -> Result<(), String> {
    let pause = between(
        heard.all,
        "tessera| vm pulse: paused",
        "tessera| vm pulse: resumed",
    )?;
    if pause.contains("pulse| ") {
        return Err("it wrote while it was paused".into());
    }
    match (
        top(heard, "pulse", 4).as_slice(),
        top(heard, "clock", 4).as_slice(),
    ) {
        ([a, b, ..], [c, d, ..]) if a == b && c < d => Ok(()),
        times => Err(format!("CPU times in ms: {times:?}")),
    }
}

/// Waits grow from crash to crash.
fn backed_off(heard: &Heard) -> Result<(), String> {
    let waits: Vec<usize> = heard
        .all
        .split("tessera| vm again: crashed")
        .skip(1)
        .map(|part| part.matches("clock| beat").count())
        .collect();
    match waits.as_slice() {
        // 50, 100, 200, 400, 800 ms, on a machine that may be slow; the last one is still open.
        [_, _, _, fourth, fifth, ..] if *fourth >= 3 && *fifth >= 6 => Ok(()),
        _ => Err(format!("beats after each crash: {waits:?}")),
    }
}

/// Free frames and the heap are the same each time.
fn nothing_is_left(heard: &Heard) -> Result<(), String> {
    for what in ["tessera| frames: ", "tessera| heap: "] {
        let mut lines = heard.all.lines().filter(|line| line.starts_with(what));
        match (lines.next(), lines.next()) {
            (Some(before), Some(after)) if before == after => {}
            other => return Err(format!("{other:?}")),
        }
    }
    Ok(())
}

/// Steps, `count` times over, between others.
const fn repeat<const N: usize>(first: &[Step], round: &[Step], last: &[Step]) -> [Step; N] {
    let mut all = [MONITOR; N];
    let mut at = 0;
    while at < N {
        all[at] = if at < first.len() {
            first[at]
        } else if at < N - last.len() {
            round[(at - first.len()) % round.len()]
        } else {
            last[at + last.len() - N]
        };
        at += 1;
    }
    all
}

/// Two VMs of one and three vCPUs, started and stopped.
const ROUND: &[Step] = &[
    Send("start one\r"),
    Expect(r"^tessera\| vm one: 16 MiB, 1 vCPU, "),
    Send("start three\r"),
    Expect(r"^three\| #$"),
    Send("stop one\r"),
    Expect(r"^tessera\| vm one: ended: stopped$"),
    Send("stop three\r"),
    Expect(r"^tessera\| vm three: ended: stopped$"),
];
const MEM: &[Step] = &[
    Send("mem\r"),
    Expect(r"^tessera\| frames: \d+ of \d+ bytes free"),
    Expect(r"^tessera\| heap: \d+ of \d+ bytes in use$"),
    Expect(r"^tessera\| talk +16646144 +\d+ +\d+$"),
];
/// A VM that is paused keeps the machine on, and leaves the core to the others.
const KEEPER: &[Step] = &[
    Expect("^#$"),
    TO_MONITOR,
    MONITOR,
    Send("pause talk\r"),
    Expect(r"^tessera\| vm talk: paused$"),
];
/// The history of lines and the guests' past are full before the first look.
const WARM: usize = 5;
const ROUNDS: usize = 32;
const WARM_UP: [Step; KEEPER.len() + WARM * ROUND.len() + MEM.len()] = repeat(KEEPER, ROUND, MEM);
const LOOK: [Step; MEM.len() + 2] = repeat(MEM, &[QUIT], &[Check(nothing_is_left), QUIT]);
const START_STOP: [Step; WARM_UP.len() + ROUNDS * ROUND.len() + LOOK.len()] =
    repeat(&WARM_UP, ROUND, &LOOK);

/// Two that are started by hand, with one vCPU and with three.
const ONE_AND_THREE: &str = r#"
[[vm]]
name = "one"
kind = "pvh"
kernel = "guest-hostile"
cmdline = "console"
memory = "16MiB"
autostart = false

[[vm]]
name = "three"
kind = "pvh"
kernel = "guest-hostile"
cmdline = "console"
memory = "16MiB"
vcpus = 3
autostart = false
"#;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "at-the-monitor",
        load: bundle(&[CLOCK, PULSE]),
        steps: &[
            Expect(r"^pulse\| beat 2 late"),
            TO_MONITOR,
            MONITOR,
            Send("pause pulse\r"),
            Expect(r"^tessera\| vm pulse: paused$"),
            Send("top\r"),
            Expect(r"^tessera\| pulse +all +paused +\d+ +\d+\.\d % +\d+ +\d+$"),
            Expect(r"^tessera\| vm +cpuid +hypercall .* other$"),
            TICK,
            TICK,
            TICK,
            TICK,
            TICK,
            TICK,
            Send("top\r"),
            Expect(r"^tessera\| pulse +all +paused +\d+ +0\.0 % +\d+ +\d+$"),
            Send("list\r"),
            Expect(r"^tessera\| 1 clock: running, \d+ KiB of 16256 in use$"),
            Expect(r"^tessera\| 2 pulse: paused, \d+ KiB of 16256 in use$"),
            // Still with its registers, and paused after the look as well.
            Send("dump pulse\r"),
            Expect(r"^tessera\| vm pulse: vCPU 0$"),
            Expect(r"^tessera\| rip [0-9a-f]{16}  rflags [0-9a-f]{8}  64-bit mode, level 0$"),
            Expect(r"^tessera\| at   [0-9a-f]{16}$"),
            TICK,
            TICK,
            Send("resume pulse\r"),
            Expect(r"^tessera\| vm pulse: resumed$"),
            Expect(r"^pulse\| beat \d+ late"),
            Check(stood_still),
            // One that runs goes on after the look.
            Send("dump pulse\r"),
            Expect(r"^tessera\| at   [0-9a-f]{16}$"),
            Expect(r"^pulse\| beat \d+ late"),
            Send("reset pulse\r"),
            Expect(r"^tessera\| vm pulse: ended: stopped$"),
            Expect(r"^tessera\| vm pulse: 16 MiB, 1 vCPU, "),
            Expect(r"^pulse\| beat 1 late"),
            Send("stop pulse\r"),
            Expect(r"^tessera\| vm pulse: ended: stopped$"),
            Send("info pulse\r"),
            Expect(r"^tessera\| pulse: stopped: stopped$"),
            Expect(r"^tessera\| started 2 times; last end: stopped$"),
            TICK,
            TICK,
            Refuse(&[r"^pulse\| "]),
            Send("start pulse\r"),
            Expect(r"^pulse\| beat 1 late"),
            Send("info pulse\r"),
            Expect(r"^tessera\| pulse: running, "),
            Expect(r"^tessera\| started 3 times"),
            Expect(
                r"^tessera\| then: after power-off stop, after a reset restart, after a crash stop$",
            ),
            Expect(r"^tessera\| scheduled: fair, weight 256, on all cores$"),
            Send("sched pulse weight=100 cap=50 pin=0\r"),
            Expect(r"^tessera\| scheduled: fair, weight 100, cap 50 %, on cores 0$"),
            Send("sched pulse cap=0 pin=all\r"),
            Expect(r"^tessera\| scheduled: fair, weight 100, on all cores$"),
            Expect(r"^pulse\| beat \d+ late"),
            QUIT,
        ],
        ..BASE
    },
    Case {
        name: "power-button",
        load: bundle(&[CLOCK, TALK]),
        steps: &[
            Expect(r"^talk\| #$"),
            Send("\x142"),
            Expect(r"^tessera\| keyboard: talk"),
            Send("b"),
            Expect("^waiting for the button$"),
            TO_MONITOR,
            MONITOR,
            TICK,
            Refuse(&["button$"]),
            Send("shutdown talk\r"),
            Expect(r"^tessera\| vm talk: power button pressed$"),
            // The rest is the guest's own doing.
            Expect(r"^talk\| button$"),
            Expect(r"^tessera\| vm talk: ended: powered off$"),
            QUIT,
        ],
        ..BASE
    },
    Case {
        name: "after-an-end",
        load: bundle(&[
            CLOCK,
            r#"
[[vm]]
name = "again"
kind = "pvh"
kernel = "guest-hostile"
cmdline = "triple-fault"
memory = "16MiB"
on_crash = "restart"

[[vm]]
name = "kept"
kind = "pvh"
kernel = "guest-hostile"
cmdline = "after=300 triple-fault"
memory = "16MiB"
vcpus = 2
on_crash = "hold"

[[vm]]
name = "once"
kind = "pvh"
kernel = "guest-hostile"
cmdline = "after=600 reset"
memory = "16MiB"
on_reboot = "stop"

[[vm]]
name = "off"
kind = "pvh"
kernel = "guest-hostile"
cmdline = "after=900 poweroff"
memory = "16MiB"
on_poweroff = "restart"
"#,
        ]),
        steps: &[
            Expect(r"^tessera\| bench boot-to-guest"),
            TO_MONITOR,
            Expect(r"(?s)(tessera\| vm again: crashed: triple fault.*?){6}"),
            Check(backed_off),
            Send("info off\r"),
            Expect(r"^tessera\| started [2-9] times; last end: powered off$"),
            Send("stop off\r"),
            Send("stop again\rlist\r"),
            Expect(r"^tessera\| 2 again: stopped: triple fault"),
            Expect(r"^tessera\| 3 kept: crashed, held: triple fault"),
            Expect(r"^tessera\| 4 once: stopped: reset$"),
            Send("dump kept\r"),
            Expect(r"^tessera\| vm kept: vCPU 0$"),
            Expect(r"^tessera\| rip [0-9a-f]{16}  rflags [0-9a-f]{8}  64-bit mode, level 0$"),
            Expect(r"^tessera\| vm kept: vCPU 1$"),
            Expect(r"real mode"),
            Send("resume kept\r"),
            Expect(r"^tessera\| vm kept: it is crashed, held: it cannot be resumed$"),
            Send("stop kept\r"),
            Expect(r"^tessera\| vm kept: what was held of it is given back$"),
            Send("dump kept\r"),
            Expect(r"^tessera\| vm kept: it is crashed: it cannot be dumped$"),
            // From the beginning, into the same end.
            Send("start kept\r"),
            Expect(r"^tessera\| vm kept: crashed: triple fault"),
            Send("start kept\r"),
            Expect(r"^tessera\| vm kept: what was held of it is given back$"),
            Expect(r"^tessera\| vm kept: 16 MiB, 2 vCPUs, "),
            QUIT,
        ],
        ..BASE
    },
    Case {
        name: "start-and-stop",
        load: bundle(&[TALK, ONE_AND_THREE]),
        steps: &START_STOP,
        deadline: 200,
        ..BASE
    },
    Case {
        name: "start-and-stop-on-three-cores",
        on: &[QEMU_BIOS],
        cpus: 3,
        load: bundle(&[TALK, ONE_AND_THREE]),
        steps: &START_STOP,
        deadline: 200,
        ..BASE
    },
    Case {
        name: "by-hand-alone",
        load: bundle(&[r#"
[[vm]]
name = "late"
kind = "pvh"
kernel = "guest-hello"
memory = "16MiB"
autostart = false
[vm.devices]
debug_exit = true
"#]),
        steps: &[
            // No VM, no end, and the keyboard is where a VM can be started.
            MONITOR,
            Send("list\r"),
            Expect(r"^tessera\| 1 late: defined$"),
            Send("start late\r"),
            Expect("(?i)hello"),
            Expect(r"^tessera\| vm late: ended: debug exit, code 1$"),
        ],
        ..BASE
    },
    Case {
        name: "fewer-cores",
        on: &[QEMU_BIOS],
        cpus: 3,
        load: bundle(&["[host]\ncores = 2\n", CLOCK]),
        steps: &[
            Expect(r"^tessera\| cores: 2 of 3 started"),
            TICK_IN_FOCUS,
            TO_MONITOR,
            MONITOR,
            Send("sched clock pin=1\r"),
            Expect(r"^tessera\| scheduled: fair, weight 256, on cores 1$"),
            Send("sched clock pin=2\r"),
            Expect(r"^tessera\| vm clock: core 2 is not there$"),
            QUIT,
        ],
        ..BASE
    },
    Case {
        // Whatever the configuration says.
        name: "poweroff",
        on: &[QEMU_BIOS],
        load: bundle(&["[host]\nwhen_done = \"halt\"\n", CLOCK]),
        steps: &[TICK_IN_FOCUS, TO_MONITOR, MONITOR, Send("poweroff\r")],
        end: Ending::Exit(0),
        ..BASE
    },
    Case {
        name: "reboot",
        on: &[QEMU_BIOS],
        load: bundle(&["[host]\nwhen_done = \"halt\"\n", CLOCK]),
        steps: &[TICK_IN_FOCUS, TO_MONITOR, MONITOR, Send("reboot\r")],
        end: Ending::Exit(0),
        ..BASE
    },
    Case {
        name: "linux",
        load: Load::Bundle {
            config: &[linux::VM, "vcpus = 2\n"],
            files: linux::FILES,
            spoil: None,
        },
        steps: &[
            linux::UP,
            linux::PROMPT,
            TO_MONITOR,
            MONITOR,
            Send("dump linux\r"),
            Expect(r"^tessera\| vm linux: vCPU 0$"),
            Expect(
                r"^tessera\| rip ffffffff[0-9a-f]{8}  rflags [0-9a-f]{8}  64-bit mode, level 0$",
            ),
            Expect(r"^tessera\| stack [0-9a-f]{16} "),
            Expect(r"^tessera\| vm linux: vCPU 1$"),
            Expect(r"^tessera\| at   ffffffff[0-9a-f]{8}$"),
            Send("pause linux\r"),
            Expect(r"^tessera\| vm linux: paused$"),
            Send("resume linux\r"),
            Expect(r"^tessera\| vm linux: resumed$"),
            Send("inject nmi linux\r"),
            Expect(r"^tessera\| vm linux: NMI raised$"),
            Send("\x141"),
            Send("dmesg | grep NMI; echo is-$?\n"),
            Expect("NMI received for unknown reason"),
            Expect("^is-0$"),
            linux::PROMPT,
            Send("dmesg; echo all-$?\n"),
            Expect("^all-0$"),
            // A pause is no fault of the machine's.
            Refuse(&["soft lockup|rcu.*stall|Oops|Kernel panic|BUG:"]),
            linux::PROMPT,
            Send("poweroff\n"),
            Expect(r"^tessera\| vm linux: ended: powered off$"),
        ],
        deadline: 300,
        ..BASE
    },
];

/// A beat of the guest that has the keyboard.
const TICK_IN_FOCUS: Step = Expect(r"^beat \d+ late");
