//! An unmodified Debian kernel: to a shell, and a dialogue with it.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::Emulator;
use crate::dialogue::{BOCHS_BIOS, Case, Ending, Heard, Load, QEMU_BIOS, QEMU_UEFI, Source, Step};
use crate::emulator::{Card, bochs};

use super::TO_MONITOR;
use super::network::{KEYBOARD, TWO_LEASES};

use Step::{Check, Expect, Refuse, Send};

pub(super) const FILES: &[(&str, Source)] = &[
    ("vmlinuz", Source::Made("vmlinuz")),
    ("initrd.cpio", Source::Made("initrd.cpio")),
];

/// To be followed by what else it is to have.
pub(super) const VM: &str = r#"
[[vm]]
name = "linux"
kind = "linux"
kernel = "vmlinuz"
initrd = "initrd.cpio"
cmdline = "console=ttyS0"
memory = "256MiB"
"#;

pub(super) const LINUX: Case = Case {
    group: "linux",
    load: Load::Bundle {
        config: &[VM],
        files: FILES,
        spoil: None,
    },
    deadline: 240,
    ..Case::BASE
};

/// The line that our init prints, and the shell's prompt after it.
pub(super) const UP: Step = Expect(r"^Linux {release} is up after");
pub(super) const PROMPT: Step = Expect("linux# ");

/// What Linux says only of a machine that is wrong. (What it says of an emulated processor's
/// errata is not our fault and is not here.)
pub(super) const FAULTS: &[&str] = &[
    r"\[Firmware (Bug|Warn)\]",
    r"ACPI (BIOS )?(Error|Warning|Exception)",
    r"ACPI.*(?i:invalid|(bad|incorrect) checksum|failed|unable|truncated)",
    r"\] (WARNING|BUG):",
    r"segfault at|trap invalid opcode",
    r"Call Trace|Oops|general protection|Kernel panic",
    r"unchecked MSR access error",
    r"MP-BIOS bug|IO-APIC.*(?i:fail|bug)",
    r"(?i)spurious|nobody cared|Disabling IRQ|No irq handler",
    r"APIC.*(?i:error|fail|mismatch|bogus)",
    r"soft lockup|hard LOCKUP|rcu.*stall|hung_task|blocked for more than",
    r"Marking clocksource|clocksource.*(?i:unstable|skew)|TSC.*(?i:unstable|warp|fail)",
    r"(?i)fast TSC calibration failed|unable to calibrate|could not calculate TSC",
    r"hpet.*(?i:bug|fail)",
    r"i8042.*(?i:no controller|can't|fail|timeout|error)",
    r"serial8250: too much work|ttyS0: LSR safety",
    r"rtc_cmos.*(?i:fail|error|alarm rollover)|hctosys: unable",
    r"pci.*(?i:can't claim|failed to assign|no compatible bridge|invalid BAR|conflicts with)",
    r"PCI: (Fatal|MMCONFIG.*not reserved|.*using legacy)",
    r"x86/fpu:.*(?i:mismatch|inconsistent|error)|XSAVE.*(?i:inconsist|bogus)",
    r"mce: .*(?i:hardware error|failed)",
    r"(?i)timed out|lost interrupt|irq .*: nobody",
];

/// The local timer and the serial line must have interrupted, the latter by the I/O APIC.
fn interrupts(heard: &Heard) -> Result<(), String> {
    let count = |name: &str| -> Option<u64> {
        let line = heard.since.lines().find(|l| l.contains(name))?;
        line.split_whitespace()
            .skip(1)
            .map_while(|w| w.parse::<u64>().ok())
            .reduce(|a, b| a + b)
    };
    for name in ["ttyS0", "Local timer interrupts"] {
        match count(name) {
            None => return Err(format!("/proc/interrupts has no line with {name}")),
            Some(0) => return Err(format!("no interrupt was counted for {name}")),
            Some(_) => {}
        }
    }
    let serial = heard
        .since
        .lines()
        .find(|l| l.contains("ttyS0"))
        .unwrap_or_default();
    if !serial.contains("IO-APIC") {
        return Err(format!("the serial line is not on the I/O APIC: {serial}"));
    }
    Ok(())
}

/// The number after `mark` at the beginning of a line.
fn number(text: &str, mark: &str) -> Result<f64, String> {
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(mark)?.trim().parse().ok());
    line.ok_or_else(|| format!("no line `{mark}<number>`"))
}

/// Interrupts of the RTC that come too late for Linux are our fault where time is the emulator's
/// own; QEMU's goes on while a busy machine does not let it run.
fn rtc_interrupts(heard: &Heard) -> Result<(), String> {
    let lost = heard.since.lines().find(|l| l.contains("hpet: Lost"));
    match lost.filter(|_| heard.emulator == Emulator::Bochs) {
        Some(line) => Err(line.to_owned()),
        None => Ok(()),
    }
}

/// QEMU's clock is ours: right now it must be the guest's.
fn date_is_ours(heard: &Heard) -> Result<(), String> {
    if heard.emulator == Emulator::Bochs {
        return Ok(());
    }
    let guest = number(heard.since, "now=")?;
    let seconds = |time: SystemTime| {
        let since = time.duration_since(UNIX_EPOCH);
        since.map(|d| d.as_secs_f64()).map_err(|e| e.to_string())
    };
    // The guest read its clock between our asking and now, and `date` cuts the fraction off.
    // QEMU's RTC starts at our second without its fraction, Tessera takes the second it reads to
    // be half over, and so does Linux with the one it reads: up to 2 s late, up to 1 s early.
    let (asked, now) = (seconds(heard.sent_at)?, seconds(SystemTime::now())?);
    if guest + 1.0 < asked - 2.0 || guest > now + 1.0 {
        return Err(format!(
            "the guest's clock says {guest}, ours went from {asked:.1} to {now:.1}"
        ));
    }
    Ok(())
}

/// Bochs's clock is its own, and its log tells it at the end, which follows the guest's last
/// `date` closely.
fn date_is_bochs(heard: &Heard) -> Result<(), String> {
    if heard.emulator != Emulator::Bochs {
        return Ok(());
    }
    let guest = number(heard.all, "off=")?;
    let machine = bochs::last_time(heard.dir).map_err(|e| format!("{e:#}"))?;
    let behind = machine - guest;
    if !(-1.0..=3.0).contains(&behind) {
        return Err(format!(
            "the guest said {guest} s and was switched off at {machine:.1} s"
        ));
    }
    Ok(())
}

pub(super) const CASES: &[Case] = &[
    Case {
        name: "dialogue",
        on: &[QEMU_UEFI, QEMU_BIOS, BOCHS_BIOS],
        steps: &[
            UP,
            PROMPT,
            Send("uname -r\n"),
            Expect("^{release}$"),
            PROMPT,
            Send("cat /proc/cmdline; echo is-$?\n"),
            Expect("^console=ttyS0$"),
            Expect("^is-0$"),
            PROMPT,
            Send("cat /proc/interrupts; echo is-$?\n"),
            Expect("^is-0$"),
            Check(interrupts),
            PROMPT,
            // Programs that take turns in the midst of their first steps keep their registers.
            Send(
                "t() { i=0; while [ $i -lt 60 ]; do busybox true || echo broken; i=$((i + 1)); \
                 done; }; t & t & t; wait; echo ran-$?\n",
            ),
            Expect("^ran-0$"),
            Refuse(&["^broken$"]),
            PROMPT,
            Send("dmesg; echo is-$?\n"),
            Expect("^is-0$"),
            Refuse(FAULTS),
            Check(rtc_interrupts),
            PROMPT,
            Send("date +now=%s\n"),
            Expect(r"^now=\d+$"),
            Check(date_is_ours),
            PROMPT,
            Send("date +off=%s; poweroff\n"),
            Expect(r"^tessera\| vm linux: ended: powered off$"),
        ],
        end: Ending::Judged(0, date_is_bochs),
        ..LINUX
    },
    Case {
        name: "beside-hello",
        load: Load::Bundle {
            config: &[include_str!("../../../xtask/default.toml")],
            files: &[
                ("vmlinuz", Source::Made("vmlinuz")),
                ("initrd.cpio", Source::Made("initrd.cpio")),
                ("guest-hello", Source::Made("guest-hello")),
            ],
            spoil: None,
        },
        cards: &[Card::E1000],
        steps: &[
            KEYBOARD,
            TO_MONITOR,
            TWO_LEASES,
            Send("\x141"),
            Expect(r"Linux {release} is up after"),
            // The three of them have three of the first addresses that the DHCP server gives.
            Send(
                "n=0; for a in 15 16 17 18 19; do ping -c 1 -w 3 10.0.2.$a && n=$((n + 1)); done; \
                 echo reached-$n\n",
            ),
            Expect("^reached-3$"),
            Send("poweroff\n"),
            Expect(r"^tessera\| vm linux: ended: powered off$"),
            Send("\x142"),
            Send("poweroff\n"),
            Expect(r"^tessera\| vm linux2: ended: powered off$"),
            Expect(r"^tessera\| vm hello: ended: stopped$"),
        ],
        ..LINUX
    },
    Case {
        name: "reboot",
        steps: &[
            UP,
            PROMPT,
            Send("reboot\n"),
            Expect(r"^tessera\| vm linux: ended: reset"),
            UP,
            PROMPT,
            Send("poweroff\n"),
            Expect(r"^tessera\| vm linux: ended: powered off$"),
        ],
        ..LINUX
    },
    // A panic with a time-out reboots the VM, as on a PC.
    Case {
        name: "panic-and-reboot",
        steps: &[
            UP,
            PROMPT,
            Send("echo 1 >/proc/sys/kernel/panic; echo c >/proc/sysrq-trigger\n"),
            Expect("Kernel panic - not syncing: sysrq triggered crash"),
            Expect(r"^tessera\| vm linux: ended: reset"),
            UP,
            PROMPT,
            Send("poweroff\n"),
            Expect(r"^tessera\| vm linux: ended: powered off$"),
        ],
        ..LINUX
    },
    // Without one it stands still, and the keys still leave.
    Case {
        name: "panic-and-leave",
        steps: &[
            UP,
            PROMPT,
            Send("echo c >/proc/sysrq-trigger\n"),
            Expect(r"end Kernel panic - not syncing: sysrq triggered crash"),
            Send("\x14x"),
            Expect(r"^tessera\| end: status="),
        ],
        end: Ending::Dialogue,
        ..LINUX
    },
    // The kernel's own drivers find the devices on the bus: random bytes come, with messages and,
    // in the case after it, by the interrupt line; what goes to the second console is shown, and
    // what is typed while that one spoke last comes out of it.
    Case {
        name: "virtio",
        load: Load::Bundle {
            config: &[VM, "devices.rng = true\ndevices.virtio_console = true\n"],
            files: FILES,
            spoil: None,
        },
        steps: &[
            UP,
            PROMPT,
            Send("cat /sys/class/misc/hw_random/rng_current\n"),
            Expect(r"^virtio_rng\.0"),
            PROMPT,
            Send("head -c 5000 /dev/hwrng | wc -c\n"),
            Expect("^5000$"),
            PROMPT,
            Send("grep virtio /proc/interrupts; echo is-$?\n"),
            Expect("PCI-MSI.* virtio[0-9]-input"),
            Expect("^is-0$"),
            PROMPT,
            Send("exec 3<>/dev/hvc0; echo by-the-other >&3; head -n 1 <&3\n"),
            Expect("^by-the-other"),
            Send("typed-there\n"),
            Expect("^typed-there"),
            PROMPT,
            Send("dmesg; echo is-$?\n"),
            Expect("^is-0$"),
            Refuse(FAULTS),
            PROMPT,
            Send("poweroff\n"),
        ],
        ..LINUX
    },
    Case {
        name: "virtio-by-line",
        load: Load::Bundle {
            config: &[r#"
[[vm]]
name = "linux"
kind = "linux"
kernel = "vmlinuz"
initrd = "initrd.cpio"
cmdline = "console=ttyS0 pci=nomsi"
memory = "256MiB"
devices.rng = true
"#],
            files: FILES,
            spoil: None,
        },
        steps: &[
            UP,
            PROMPT,
            Send("head -c 5000 /dev/hwrng | wc -c\n"),
            Expect("^5000$"),
            PROMPT,
            Send("grep virtio /proc/interrupts; echo is-$?\n"),
            Expect("IO-APIC +18-fasteoi +virtio0"),
            Expect("^is-0$"),
            Refuse(FAULTS),
            PROMPT,
            Send("poweroff\n"),
        ],
        ..LINUX
    },
    // The kernel's own driver for ACPI's watchdog table drives ours: nothing happens while somebody
    // strokes it, and the VM has crashed when nobody does.
    Case {
        name: "watchdog",
        load: Load::Bundle {
            config: &[VM, "devices.watchdog = true\n"],
            files: FILES,
            spoil: None,
        },
        steps: &[
            UP,
            PROMPT,
            Send("for m in watchdog wdat_wdt; do insmod /lib/modules/$m.ko; done; echo is-$?\n"),
            Expect("^is-0$"),
            PROMPT,
            Send("watchdog -T 2 -t 1 /dev/watchdog0; sleep 6; echo still-$?\n"),
            Expect("^still-0$"),
            Send("dmesg; echo is-$?\n"),
            Expect("^is-0$"),
            Refuse(FAULTS),
            PROMPT,
            Send("killall -9 watchdog\n"),
            Expect(r"^tessera\| vm linux: crashed: its watchdog ran out"),
        ],
        end: Ending::Closing(101),
        ..LINUX
    },
];
