//! Bochs: VT-x on any machine.
//!
//! Debian's build has the debugger and waits at its prompt unless told to go on (`-rc`); a build
//! without one does not know that option. Its exit status says nothing, so a run is judged by the
//! serial line, which Bochs connects to a socket of ours. Its log is kept: for a VM entry that
//! fails it names the exact check.

use std::fs::{self, File};
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use super::{Boot, Card, Extension, Firmware, Machine, Pace, Session, Wire, accept, second_port};
use crate::process::{Process, limited};

/// The program.
pub const PROGRAM: &str = "bochs";
/// Instructions per second of emulated time, and so the TSC's frequency.
pub const IPS: u64 = 100_000_000;

/// Where the clock starts in runs that must repeat exactly: 2024-01-01.
const COUNTED_START: u64 = 1_704_067_200;

const BIOS: &str = "/usr/share/bochs/BIOS-bochs-latest";
const OVMF: &str = "/usr/share/ovmf/OVMF.fd";
const VGA_BIOS: [&str; 2] = [
    "/usr/share/bochs/VGABIOS-lgpl-latest",
    "/usr/share/bochs/VGABIOS-lgpl-latest.bin",
];
/// The most memory that Bochs takes from the host; it swaps the rest of the guest's.
const HOST_MEMORY: u32 = 2048;

/// What the installed Bochs is.
#[derive(Clone, Debug)]
pub struct Version {
    /// Major and minor, for instance (2, 7).
    pub number: (u32, u32),
    /// Built with the debugger.
    pub debugger: bool,
}

/// Asks the installed Bochs what it is; `None` when there is none.
pub fn version() -> Option<&'static Version> {
    static VERSION: OnceLock<Option<Version>> = OnceLock::new();
    let ask = || {
        let mut help = Command::new("timeout");
        help.args(["-s", "KILL", "10", PROGRAM, "--help"])
            .stdin(Stdio::null());
        let output = help.output().ok()?;
        let text = [output.stdout, output.stderr].concat();
        parse_version(&String::from_utf8_lossy(&text))
    };
    VERSION.get_or_init(ask).as_ref()
}

fn parse_version(help: &str) -> Option<Version> {
    let (_, rest) = help.split_once("Bochs x86 Emulator ")?;
    let mut digits = rest.split(|c: char| !c.is_ascii_digit());
    let major = digits.next()?.parse().ok()?;
    let minor = digits.next().and_then(|d| d.parse().ok()).unwrap_or(0);
    Some(Version {
        number: (major, minor),
        debugger: help.contains("-rc filename"),
    })
}

/// Switches `machine` on.
pub(super) fn start(machine: &Machine, dir: &Path, limit: Duration) -> Result<Session> {
    let Boot::Disk(disk) = &machine.boot else {
        bail!("Bochs starts disks, not kernels: use QEMU for the reference");
    };
    if machine.sparse {
        bail!("Bochs numbers its processors without gaps: use QEMU");
    }
    let version = version().context("Bochs does not run: apt-get install bochs bochs-term")?;
    let listener = TcpListener::bind("127.0.0.1:0").context("a port for Bochs's serial line")?;
    let port = listener.local_addr()?.port();

    let second = second_port(machine)?;
    let com2 = second.as_ref().map_or(String::new(), |(_, port)| {
        format!("com2: enabled=1, mode=socket-client, dev=127.0.0.1:{port}\n")
    });

    let rom = match (machine.firmware, machine.extension) {
        (Firmware::Uefi, _) => OVMF.to_owned(),
        (Firmware::Bios, Extension::LockedOff) => {
            let patched = dir.join("bios-locked-off.bin");
            let bios = fs::read(BIOS).with_context(|| format!("reading {BIOS}"))?;
            fs::write(&patched, lock_off(bios)?).context("writing the patched BIOS")?;
            patched.to_string_lossy().into_owned()
        }
        (Firmware::Bios, _) => BIOS.to_owned(),
    };
    let vga = VGA_BIOS.into_iter().find(|p| Path::new(p).exists());
    let vga = vga.context("no VGA BIOS for Bochs: apt-get install vgabios")?;
    let model = match machine.extension {
        Extension::Absent => "p4_prescott_celeron_336",
        _ => "corei7_skylake_x",
    };
    let sync = if machine.pace == Pace::WallClock {
        "slowdown"
    } else {
        "none"
    };
    let started = match machine.pace {
        Pace::Counted => COUNTED_START,
        _ => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(COUNTED_START, |d| d.as_secs()),
    };
    let log = dir.join("bochs.log");
    // Bochs 3.0 knows no dummy sound drivers and needs none.
    let sound = if version.number < (3, 0) {
        "sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy\n"
    } else {
        ""
    };
    let (slot, card) = match machine.cards.as_slice() {
        [] => ("", String::new()),
        [Card::E1000] => {
            let mac = Card::mac(0);
            let network = match &machine.wire {
                None => "slirp".to_owned(),
                // It sends to the port after its own, whatever that is.
                Some(wire) if wire.local.checked_add(1) == Some(wire.remote) => {
                    format!("socket, ethdev={}:{}", wire.host, wire.local)
                }
                Some(Wire { local, .. }) => {
                    bail!("on Bochs a wire's other end has the port after its own, {local}")
                }
            };
            let card = format!("e1000: enabled=1, mac={mac}, ethmod={network}\n");
            (", slot1=e1000", card)
        }
        other => bail!("Bochs has one e1000 at most, not {other:?}"),
    };
    let settings = format!(
        "config_interface: textconfig\n\
         display_library: term\n\
         plugin_ctrl: iodebug=1\n\
         romimage: file={rom}\n\
         vgaromimage: file={vga}\n\
         memory: guest={memory}, host={host}\n\
         cpu: model={model}, count={cpus}, ips={IPS}, quantum=16, reset_on_triple_fault=0\n\
         clock: sync={sync}, time0={started}\n\
         pci: enabled=1, chipset=i440fx{slot}\n\
         {card}\
         ata0-master: type=disk, path={disk}, mode=volatile, journal={journal}, cylinders=0, \
         heads=16, spt=63\n\
         boot: disk\n\
         com1: enabled=1, mode=socket-client, dev=127.0.0.1:{port}\n\
         {com2}\
         {sound}\
         speaker: enabled=1, mode=none\n\
         log: {log}\n\
         panic: action=fatal\n\
         error: action=report\n",
        memory = machine.memory,
        host = machine.memory.min(HOST_MEMORY),
        cpus = machine.cpus,
        disk = disk.display(),
        journal = dir.join("disk-writes").display(),
        log = log.display(),
    );
    let rc = dir.join("bochsrc");
    fs::write(&rc, settings).with_context(|| format!("writing {}", rc.display()))?;
    let mut command = limited(PROGRAM, limit);
    command.arg("-q").arg("-f").arg(&rc);
    if version.debugger {
        let go = dir.join("go");
        fs::write(&go, "c\n").with_context(|| format!("writing {}", go.display()))?;
        command.arg("-rc").arg(&go);
    }
    let said = dir.join("bochs.out");
    let screen = File::create(&said).context("creating bochs.out")?;
    // A start time given as a number is local time to Bochs.
    command
        .env("TERM", "vt100")
        .env("TZ", "UTC")
        .stdin(Stdio::null());
    command.stderr(screen.try_clone()?).stdout(screen);
    let mut process = Process::spawn(command)?;

    let stream = accept(&listener, &mut process, &log)?;
    std::thread::spawn(move || watch_screen(&said));
    let second = match second {
        None => None,
        Some((listener, _)) => Some(accept(&listener, &mut process, &log)?),
    };
    let writer = stream.try_clone()?;
    let mut session = Session::new(process, stream, writer, log);
    session.second = second;
    Ok(session)
}

/// Bochs draws its screen on a terminal that it makes and names, for somebody to look at; it stands
/// still when nobody does and the terminal is full. So it is read, for as long as it is there.
fn watch_screen(said: &Path) {
    const NAME: &str = "connected to screen \"";
    let terminal = (0..100).find_map(|_| {
        let text = fs::read_to_string(said).unwrap_or_default();
        let name = text
            .split_once(NAME)
            .and_then(|(_, rest)| rest.split_once('"'));
        if name.is_none() {
            std::thread::sleep(Duration::from_millis(100));
        }
        name.map(|(name, _)| name.to_owned())
    });
    // Not as the terminal that controls us.
    const NO_CONTROL: i32 = 0o400;
    let mut options = File::options();
    options.read(true).custom_flags(NO_CONTROL);
    let Some(mut screen) = terminal.and_then(|name| options.open(name).ok()) else {
        return;
    };
    // It must not answer, and lines mean nothing.
    if let Ok(input) = screen.try_clone() {
        let _ = Command::new("stty")
            .args(["raw", "-echo"])
            .stdin(input)
            .status();
    }
    let mut buffer = [0; 4096];
    while screen.read(&mut buffer).is_ok_and(|count| count > 0) {}
}

/// The emulated time in seconds since 1970 at which Bochs wrote the last line of its log: where a
/// machine was switched off.
pub fn last_time(dir: &Path) -> Result<f64> {
    let settings = fs::read_to_string(dir.join("bochsrc")).context("reading bochsrc")?;
    let start = settings
        .split_once("time0=")
        .and_then(|(_, t)| t.lines().next()?.parse::<f64>().ok());
    let log = fs::read_to_string(dir.join("bochs.log")).context("reading bochs.log")?;
    // `02412345678i[SIM   ] …`: ticks since power-on, a level, a device.
    let stamp = |line: &str| {
        let digits: String = line.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<f64>().ok()
    };
    let ticks = log
        .lines()
        .rev()
        .find_map(stamp)
        .context("no time stamp in bochs.log")?;
    Ok(start.context("no time0 in bochsrc")? + ticks / IPS as f64)
}

/// A BIOS that locks IA32_FEATURE_CONTROL with VMX off (Intel SDM Vol. 3C §24.7), as firmware
/// with virtualization disabled in its setup does. Bochs's own sets 5: locked, VMX on.
fn lock_off(mut bios: Vec<u8>) -> Result<Vec<u8>> {
    /// `or eax, 5; wrmsr`, which follows `mov ecx, 0x3a; rdmsr`.
    const OR_EAX_5_WRMSR: [u8; 5] = [0x83, 0xc8, 5, 0x0f, 0x30];
    const FEATURE_CONTROL: [u8; 6] = [0x3a, 0, 0, 0, 0x0f, 0x32];
    let places: Vec<usize> = bios
        .windows(16)
        .enumerate()
        .filter(|(_, w)| w.starts_with(&FEATURE_CONTROL))
        .filter_map(|(at, w)| Some(at + w.windows(5).position(|w| w == OR_EAX_5_WRMSR)? + 2))
        .collect();
    if places.is_empty() {
        bail!("{BIOS} does not set IA32_FEATURE_CONTROL in the way known here");
    }
    for place in places {
        if let Some(byte) = bios.get_mut(place) {
            *byte = 1;
        }
    }
    Ok(bios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_the_help_text() {
        let help = "====\n   Bochs x86 Emulator 2.7\n  -rc filename     execute";
        let version = parse_version(help).expect("a version");
        assert_eq!((version.number, version.debugger), ((2, 7), true));
        let version = parse_version("Bochs x86 Emulator 3.0.devel\n -q").expect("a version");
        assert_eq!((version.number, version.debugger), ((3, 0), false));
        assert!(parse_version("not found").is_none());
    }
}
