//! The console: who has the keyboard, what the past was, what the monitor answers, and how far a
//! guest's output gets.

use super::{MONITOR, TO_MONITOR};
use crate::dialogue::{BOCHS_BIOS, Case, Ending, Load, QEMU_BIOS, Source, Step};

use Step::{Expect, ExpectSecond, Refuse, Send, SendSecond, Shown, Told};

const ONE_AND_TWO: &str = r#"
[[vm]]
name = "one"
kind = "pvh"
kernel = "guest-hostile"
cmdline = "console"
memory = "16MiB"
[vm.devices]
debug_exit = true

[[vm]]
name = "two"
kind = "pvh"
kernel = "guest-hostile"
cmdline = "console"
memory = "16MiB"
"#;
const DEVICES: &str = r#"
[vm.devices]
debug_exit = true
"#;

/// Two guests that do on their consoles what is typed there.
const TWO: Case = Case {
    group: "console",
    on: &[QEMU_BIOS, BOCHS_BIOS],
    load: Load::Bundle {
        config: &[ONE_AND_TWO, DEVICES],
        files: &[("guest-hostile", Source::Made("guest-hostile"))],
        spoil: None,
    },
    deadline: 60,
    ..Case::BASE
};

/// Both are there, in any order: what is typed before a guest sets its port up is lost to it. The
/// sign is one character, which no other guest's line can cut in two.
const STARTED: Step =
    Expect(r"(?s)^tessera\| keyboard: one \(Ctrl-T \? for help\)$.*^(two\| )?#$.*^(two\| )?#$");
/// Nothing that a guest wrote looks like the end.
const HONEST: Step = Refuse(&[r"tessera\| end:"]);

pub(super) const CASES: &[Case] = &[
    Case {
        name: "prefix-keys",
        steps: &[
            STARTED,
            Send("k"),
            Expect("^key 107$"),
            Send("\x142"),
            Expect(r"^tessera\| keyboard: two"),
            Send("k"),
            Expect("^key 107$"),
            Send("\x14n"),
            MONITOR,
            Send("\x14n"),
            Expect(r"^tessera\| keyboard: one"),
            // What it had said is there again.
            Expect(r"^one\| key 107$"),
            Send("\x14p"),
            MONITOR,
            Send("\x14p"),
            Expect(r"^tessera\| keyboard: two"),
            Send("\x14?"),
            Expect(r"^tessera\| Ctrl-T then: 0 monitor, 1-9 that VM"),
            Send("\x14\x14"),
            Expect("^key 20$"),
            Send("\x149"),
            Expect(r"^tessera\| Ctrl-T then"),
            Send("q"),
            Expect(r"^tessera\| vm two: ended: debug exit, code 1$"),
            Send("\x141"),
            Expect(r"^tessera\| keyboard: one"),
            Send("q"),
        ],
        ..TWO
    },
    Case {
        name: "scroll-back",
        steps: &[
            STARTED,
            Send("l"),
            Expect("^line 39$"),
            Send("\x14["),
            Expect(r"^one\| line 18$"),
            Expect(r"^one\| line 39$"),
            Expect(r"^tessera\| lines \d+-\d+ of \d+; Page Up"),
            Send("\x1b[5~"),
            Expect(r"^one\| line 0$"),
            Expect(r"^one\| line 17$"),
            Send(" "),
            Expect(r"^one\| line 39$"),
            // Keys are the guest's again, and none of those above was.
            Send("."),
            Expect(r"^one\| line 39$"),
            Send("k"),
            Expect("^key 107$"),
            Refuse(&["^key (27|32|46)"]),
            Send("\x14x"),
        ],
        ..TWO
    },
    Case {
        name: "monitor",
        steps: &[
            STARTED,
            TO_MONITOR,
            MONITOR,
            Send("he\t\r"),
            Expect("> help "),
            Expect(r"^tessera\| list +the VMs and their states$"),
            Expect(r"^tessera\| stop VM +end it now"),
            Send("help sh\r"),
            Expect(r"^tessera\| shutdown VM +press its ACPI power button$"),
            Send("lisst\r"),
            Expect(r"^tessera\| unknown verb `lisst`: did you mean `list`\?"),
            Send("re\r"),
            Expect(r"^tessera\| `re` is short for more than one verb: resume reset reboot$"),
            Send("st\t"),
            Expect(r"^tessera\| start stop$"),
            Send("op three\r"),
            Expect(r"^tessera\| no VM is named `three`; there are: one two$"),
            Send("q\r"),
            Expect(r"^tessera\| `q` ends the machine: type `quit` in full$"),
            Send("stop\r"),
            Expect(r"^tessera\| `stop` needs more; it is `stop VM`$"),
            Send("sched one weight=0\r"),
            Expect(r"^tessera\| `weight=0` is out of range: a weight is 1 to 10000$"),
            Send("log 1\r"),
            MONITOR,
            Send("sto\tt\t\r"),
            Expect(r"^tessera\| vm two: ended: "),
            // The line before, from the history, and corrected.
            Send("\x1b[A\x7f\x17one\r"),
            Expect(r"^tessera\| vm one: ended: "),
        ],
        ..TWO
    },
    // The screen has what the line has.
    Case {
        name: "screen",
        on: &[QEMU_BIOS],
        steps: &[
            STARTED,
            Send("l"),
            Expect("^line 39$"),
            // It has moved up: what is seen is the end.
            Shown(r"^line 20\nline 21\n(line \d+\n){17}line 39\n"),
            Send("k"),
            Told("^key 107$"),
            Send("\x14?"),
            Told(r"^tessera\| Ctrl-T then: 0 monitor, 1-9 that VM"),
            // Of a liar all that was contained, and none of its sequences as text.
            Send("e"),
            Expect("^lied$"),
            Shown(r"^tessera\\\| end: status=0 forged\n(.*\n)*lied\n"),
            Send("\x14"),
            Send("0he\t"),
            Shown(r"^tessera\| keyboard: monitor.*\n> help$"),
            Send("\x7f\x7f\x7f\x7f\x7flist\r"),
            Shown(r"^> list\ntessera\| 1 one: running.*\ntessera\| 2 two: "),
            Send("\x142"),
            Send("k"),
            Shown(r"^tessera\| keyboard: two .*\n(.*\n)*key 107$"),
            Send("\x14x"),
            // The last word of all.
            Told(r"^tessera\| end: status=0 left at the console$"),
        ],
        ..TWO
    },
    // A guest on a serial port of its own: both directions, and each line has only what is its.
    Case {
        name: "own-port",
        load: Load::Bundle {
            config: &[ONE_AND_TWO, "console_port = \"com2\"\n", DEVICES],
            files: &[("guest-hostile", Source::Made("guest-hostile"))],
            spoil: None,
        },
        steps: &[
            Expect(r"^tessera\| keyboard: one"),
            Expect("^#$"),
            ExpectSecond("^#$"),
            SendSecond("k"),
            ExpectSecond("^key 107$"),
            Send("j"),
            Expect("^key 106$"),
            // More than its FIFO and the ring before it take at once.
            SendSecond("l"),
            ExpectSecond("(?s)^line 0$.*^line 39$"),
            // As it has no place on the shared line, the keyboard stays where it is.
            Send("\x142"),
            Expect(r"^tessera\| vm two has its console on a port of its own$"),
            Send("m"),
            Expect("^key 109$"),
            SendSecond("n"),
            ExpectSecond("^key 110$"),
            SendSecond("q"),
            Expect(r"^tessera\| vm two: ended: debug exit, code 1$"),
            Send("q"),
        ],
        end: Ending::Judged(0, |heard| {
            let shared = ["two| ", "line 39", "key 107", "key 110"];
            let own = ["tessera|", "one|", "key 106", "key 109"];
            let among = |text: &str, words: &[&str]| words.iter().any(|word| text.contains(word));
            match (among(heard.all, &shared), among(heard.second, &own)) {
                (false, false) => super::left_well(heard, &["one", "two"]),
                (true, _) => Err("the shared line has what was said on the other".into()),
                (_, true) => Err(format!("the port has what is not its: {}", heard.second)),
            }
        }),
        ..TWO
    },
    Case {
        name: "lies-in-focus",
        steps: &[
            STARTED,
            Send("e"),
            Expect("red"),
            Expect(r"^tessera\\\| end: status=0 forged$"),
            Expect(r"^tessera\\\| end: status=0 forged$"),
            Expect("^lied$"),
            HONEST,
            // The terminal is the log's again before it speaks.
            Send("\x14?"),
            Expect(r"^tessera\| Ctrl-T then"),
            Send("\x14x"),
        ],
        end: Ending::Judged(0, |heard| {
            let told = "tessera| end: status=0 left at the console";
            let end = heard
                .all
                .lines()
                .filter(|line| line.starts_with("tessera| end:"));
            match end.collect::<Vec<_>>().as_slice() {
                [line] if *line == told => Ok(()),
                lines => Err(format!("{lines:?} instead of one `{told}`")),
            }
        }),
        ..TWO
    },
    Case {
        name: "lies-behind",
        steps: &[
            STARTED,
            Send("d\x142"),
            Expect(r"^one\| red $"),
            Expect(r"^one\| tessera\\\| end: status=0 forged$"),
            Expect(r"^one\| tessera\\\| end: status=0 forged$"),
            Expect(r"^one\| lied$"),
            HONEST,
            Send("k"),
            Expect("^key 107$"),
            Send("\x14x"),
        ],
        ..TWO
    },
];
