//! QEMU: its own emulation with AMD-V, or KVM where that nests.

use std::fs::{self, File};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{
    Boot, Card, Emulator, Extension, Firmware, Machine, Pace, Session, accept, second_port,
};
use crate::process::{Process, limited};

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// OVMF's code and variable store, by the names that distributions give them.
const OVMF: [(&str, &str); 2] = [
    (
        "/usr/share/OVMF/OVMF_CODE.fd",
        "/usr/share/OVMF/OVMF_VARS.fd",
    ),
    (
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
        "/usr/share/OVMF/OVMF_VARS_4M.fd",
    ),
];

/// The files of OVMF on this machine.
pub fn ovmf() -> Option<(&'static str, &'static str)> {
    OVMF.into_iter()
        .find(|(code, vars)| Path::new(code).exists() && Path::new(vars).exists())
}

/// Switches `machine` on.
pub(super) fn start(machine: &Machine, dir: &Path, limit: Duration) -> Result<Session> {
    let mut command = limited(PROGRAM, limit);
    let mut arg = |name: &str, value: &str| {
        command.arg(name);
        if !value.is_empty() {
            command.arg(value);
        }
    };
    arg("-nodefaults", "");
    arg("-no-user-config", "");
    arg("-no-reboot", "");
    arg("-machine", "q35");
    arg("-vga", "std");
    arg("-display", "none");
    arg("-monitor", "none");
    arg("-serial", "stdio");
    let second = second_port(machine)?;
    if let Some((_, port)) = &second {
        let line = format!("socket,id=second,host=127.0.0.1,port={port}");
        arg("-chardev", &line);
        arg("-serial", "chardev:second");
    }
    arg("-m", &machine.memory.to_string());
    if machine.sparse {
        // Ids of the second package begin at 128.
        let near = machine.cpus.saturating_sub(1).max(1);
        arg("-smp", &format!("{near},maxcpus=254,sockets=2,cores=127"));
    } else {
        arg("-smp", &machine.cpus.to_string());
    }
    let far = |model: &str, options: &str| {
        format!("{model}-x86_64-cpu,socket-id=1,core-id=126,thread-id=0{options}")
    };
    match (machine.emulator, machine.extension) {
        (_, Extension::LockedOff) => bail!("QEMU cannot lock the extension off; Bochs can"),
        (Emulator::QemuKvm, Extension::On) => {
            arg("-accel", "kvm");
            arg("-cpu", "host");
            if machine.sparse {
                arg("-device", &far("host", ""));
            }
        }
        (Emulator::QemuKvm, Extension::Absent) => {
            arg("-accel", "kvm");
            arg("-cpu", "host,-svm,-vmx");
        }
        (_, extension) => {
            arg("-accel", "tcg");
            let svm = if extension == Extension::On {
                "max,+svm,+npt"
            } else {
                "max,-svm"
            };
            arg("-cpu", svm);
            if machine.sparse {
                arg("-device", &far("max", ",svm=on,npt=on"));
            }
        }
    }
    match machine.pace {
        Pace::Counted => arg("-icount", "shift=0,sleep=off"),
        // 32 ns an instruction: an exit costs this emulator as much.
        Pace::Even => arg("-icount", "shift=5,sleep=off"),
        Pace::Free | Pace::WallClock => {}
    }
    if matches!(machine.pace, Pace::Counted | Pace::Even) {
        // The RTC goes by the same time.
        arg("-rtc", "base=utc,clock=vm");
    }
    if machine.firmware == Firmware::Uefi {
        let (code, vars) = ovmf().context("OVMF is not installed: apt-get install ovmf")?;
        let own = dir.join("ovmf-vars.fd");
        fs::copy(vars, &own).with_context(|| format!("copying {vars}"))?;
        let flash = |file: &str| format!("if=pflash,format=raw,file={}", file.replace(',', ",,"));
        arg("-drive", &format!("{},readonly=on", flash(code)));
        arg("-drive", &flash(&own.to_string_lossy()));
    }
    match &machine.boot {
        Boot::Disk(image) => {
            let file = image.to_string_lossy().replace(',', ",,");
            // The disk is shared between cases that run side by side: writes go to a snapshot.
            arg(
                "-drive",
                &format!("if=none,id=disk,format=raw,snapshot=on,file={file}"),
            );
            arg("-device", "ide-hd,drive=disk,bootindex=0");
        }
        Boot::Kernel { file, append } => {
            arg("-kernel", &file.to_string_lossy());
            if !append.is_empty() {
                arg("-append", append);
            }
            arg("-device", "isa-debug-exit,iobase=0xf4,iosize=4");
        }
    }
    for (number, card) in machine.cards.iter().enumerate() {
        let (name, mac) = (card.name(), Card::mac(number));
        let network = match machine.wire.as_ref().filter(|_| number == 0) {
            None => "user".to_owned(),
            Some(wire) => {
                // To be reached from elsewhere only where the other end is.
                let ours = match wire.host.as_str() {
                    "localhost" | "127.0.0.1" => "127.0.0.1",
                    _ => "0.0.0.0",
                };
                let (host, remote, local) = (&wire.host, wire.remote, wire.local);
                format!("socket,udp={host}:{remote},localaddr={ours}:{local}")
            }
        };
        arg("-netdev", &format!("{network},id=net{number}"));
        // Without a ROM, so that firmware does not try to boot from it.
        let device = format!("{name},netdev=net{number},mac={mac},romfile=");
        arg("-device", &device);
    }
    let monitor = match machine.watched && machine.firmware == Firmware::Bios {
        true => Some(TcpListener::bind("127.0.0.1:0").context("a port for QEMU's monitor")?),
        false => None,
    };
    if let Some(monitor) = &monitor {
        let port = monitor.local_addr()?.port();
        arg(
            "-chardev",
            &format!("socket,id=monitor,host=127.0.0.1,port={port}"),
        );
        arg("-mon", "chardev=monitor,mode=readline");
        arg("-no-shutdown", "");
    }
    let log = dir.join("qemu.log");
    let errors = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(errors);
    let mut process = Process::spawn(command)?;
    let second = match second {
        None => None,
        Some((listener, _)) => Some(accept(&listener, &mut process, &log)?),
    };
    let monitor = match monitor {
        None => None,
        Some(m) => {
            let line = accept(&m, &mut process, &log)?;
            Some(Monitor {
                line,
                file: dir.join("screen"),
            })
        }
    };
    let child = process.child();
    let reader = child.stdout.take().context("QEMU's output")?;
    let writer = child.stdin.take().context("QEMU's input")?;
    let mut session = Session::new(process, reader, writer, log);
    (session.monitor, session.second) = (monitor, second);
    Ok(session)
}

/// QEMU's monitor, to look at the screen.
#[derive(Debug)]
pub(super) struct Monitor {
    line: TcpStream,
    file: PathBuf,
}

impl Monitor {
    /// The rows of the VGA text page: 80 columns, 25 rows, each with an attribute byte.
    pub(super) fn screen(&mut self) -> Result<Vec<String>> {
        const ROW: usize = 80 * 2;
        const PAGE: usize = ROW * 25;
        let _ = fs::remove_file(&self.file);
        writeln!(
            self.line,
            "pmemsave 0xb8000 {PAGE} \"{}\"",
            self.file.display()
        )?;
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let page = fs::read(&self.file).unwrap_or_default();
            if page.len() == PAGE {
                let row = |row: &[u8]| row.iter().step_by(2).map(|&c| char::from(c)).collect();
                return Ok(page.chunks(ROW).map(row).collect());
            }
            if Instant::now() > until {
                bail!("QEMU's monitor saved no screen to {}", self.file.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
