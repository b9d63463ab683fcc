//! Computers to boot Tessera on: QEMU and Bochs, behind one [`Session`].
//!
//! QEMU's own emulation has AMD-V, Bochs has VT-x, so both halves of the hypervisor run on any
//! machine; QEMU with KVM is used where the host really nests. The settings are those known to
//! work; what differs between the two (how the serial line is reached, how time runs) stays in
//! [`bochs`] and [`qemu`].

pub mod bochs;
pub mod qemu;

use std::fmt;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process::Process;

/// What plays the hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Emulator {
    /// QEMU on a KVM that nests VT-x or AMD-V.
    QemuKvm,
    /// QEMU's own emulation, with AMD-V.
    QemuTcg,
    /// Bochs, with VT-x.
    Bochs,
}

impl Emulator {
    /// The name used on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::QemuKvm => "qemu-kvm",
            Self::QemuTcg => "qemu-tcg",
            Self::Bochs => "bochs",
        }
    }

    /// The virtualization extension a guest of this emulator sees.
    pub fn extension(self) -> &'static str {
        match self {
            Self::QemuKvm => "the host's",
            Self::QemuTcg => "AMD-V",
            Self::Bochs => "VT-x",
        }
    }
}

impl fmt::Display for Emulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The firmware that boots the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Firmware {
    /// SeaBIOS in QEMU, its own BIOS in Bochs.
    Bios,
    /// OVMF.
    Uefi,
}

impl Firmware {
    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bios => "bios",
            Self::Uefi => "uefi",
        }
    }
}

/// What the machine starts.
#[derive(Clone, Debug)]
pub enum Boot {
    /// A raw disk image, which is not written to.
    Disk(PathBuf),
    /// An ELF started by QEMU itself, with `isa-debug-exit` at port 0xf4: the reference for what
    /// a test kernel does without a hypervisor.
    Kernel {
        /// Multiboot1 (32-bit) or an ELF with a PVH note.
        file: PathBuf,
        /// Its command line.
        append: String,
    },
}

/// How the machine's time relates to ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// As fast as it goes; Bochs skips idle time at once.
    Free,
    /// Idle time is waited for, as a person at the terminal expects.
    WallClock,
    /// One instruction is one tick of the TSC, so that RDTSC counts instructions.
    Counted,
    /// Time goes by instructions as well, but at about the pace at which the emulator carries them
    /// out where many of them are exits: what a guest measures does not depend on the host's load.
    Even,
}

/// What the machine's firmware says of its virtualization extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    /// There and usable.
    On,
    /// A processor without it.
    Absent,
    /// There, and locked off by the firmware (Bochs only).
    LockedOff,
}

/// A network card, joined to the emulator's own network: 10.0.2.0/24, with a DHCP server and a
/// gateway at 10.0.2.2 that answers; or to a [`Wire`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Card {
    /// Intel 82540EM.
    E1000,
    /// Intel 82574L (QEMU only).
    E1000e,
    /// virtio-net (QEMU only).
    VirtioNet,
}

impl Card {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::E1000 => "e1000",
            Self::E1000e => "e1000e",
            Self::VirtioNet => "virtio-net-pci",
        }
    }

    /// The address of the card of this number.
    fn mac(number: usize) -> String {
        format!("52:54:00:12:34:{:02x}", number + 0x56)
    }
}

impl FromStr for Card {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cards = [Self::E1000, Self::E1000e, Self::VirtioNet];
        let found =
            (cards.into_iter()).find(|c| text == c.name() || c.name() == format!("{text}-pci"));
        found.ok_or_else(|| format!("`{text}` is none of e1000, e1000e, virtio-net"))
    }
}

/// A wire from the first card to that of another emulator: each frame is a UDP datagram from a
/// port of ours to one of a host's. Which end is plugged in first does not matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wire {
    /// Our port.
    pub local: u16,
    /// Where the other emulator is.
    pub host: String,
    /// Its port.
    pub remote: u16,
}

impl Wire {
    /// Both ends of a wire within this machine, by ports that follow each other and that nobody
    /// has.
    pub fn pair() -> Result<(Self, Self)> {
        let end = |local, remote| Self {
            local,
            host: "127.0.0.1".to_owned(),
            remote,
        };
        for _ in 0..100 {
            let first = UdpSocket::bind("127.0.0.1:0").context("a port for a wire")?;
            let port = first.local_addr()?.port();
            let next = port.checked_add(1);
            if let Some(next) = next.filter(|&next| UdpSocket::bind(("127.0.0.1", next)).is_ok()) {
                return Ok((end(port, next), end(next, port)));
            }
        }
        bail!("no two free UDP ports that follow each other")
    }
}

impl FromStr for Wire {
    type Err = String;

    /// `PORT:HOST:PORT`, or `PORT:PORT` within this machine.
    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| text.parse().ok().filter(|&port: &u16| port > 0);
        let (local, rest) = text.split_once(':').unwrap_or((text, ""));
        let (host, remote) = rest.rsplit_once(':').unwrap_or(("127.0.0.1", rest));
        match (port(local), port(remote)) {
            (Some(local), Some(remote)) if !host.is_empty() => Ok(Self {
                local,
                host: host.to_owned(),
                remote,
            }),
            _ => Err(format!(
                "`{text}` is neither PORT:HOST:PORT, as 4000:localhost:4001 is, nor PORT:PORT"
            )),
        }
    }
}

/// A computer to emulate.
#[derive(Clone, Debug)]
pub struct Machine {
    /// What plays it.
    pub emulator: Emulator,
    /// What boots it.
    pub firmware: Firmware,
    /// What it starts.
    pub boot: Boot,
    /// RAM in MiB.
    pub memory: u32,
    /// Logical processors.
    pub cpus: u32,
    /// The last of them has the highest APIC id of xAPIC mode, far from the others' (QEMU only).
    pub sparse: bool,
    /// How its time runs.
    pub pace: Pace,
    /// Its virtualization extension.
    pub extension: Extension,
    /// Its network cards.
    pub cards: Vec<Card>,
    /// What the first of them is joined to, in place of the emulator's own network.
    pub wire: Option<Wire>,
    /// A second serial port, for [`Session::second`].
    pub second_port: bool,
    /// Keep the screen readable by [`Session::screen`], also after power-off.
    pub watched: bool,
}

impl Machine {
    /// A one-processor machine with a usable extension that boots the disk image.
    pub fn new(emulator: Emulator, firmware: Firmware, disk: &Path, memory: u32) -> Self {
        Self {
            emulator,
            firmware,
            boot: Boot::Disk(disk.to_owned()),
            memory,
            cpus: 1,
            sparse: false,
            pace: Pace::Free,
            extension: Extension::On,
            cards: Vec::new(),
            wire: None,
            second_port: false,
            watched: false,
        }
    }

    /// Switches it on. `dir` takes its files (settings, log); after `limit` it is killed.
    pub fn start(&self, dir: &Path, limit: Duration) -> Result<Session> {
        std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        match self.emulator {
            Emulator::QemuKvm | Emulator::QemuTcg => qemu::start(self, dir, limit),
            Emulator::Bochs => bochs::start(self, dir, limit),
        }
    }
}

/// What came in while waiting.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// Bytes from the serial line.
    Bytes(Vec<u8>),
    /// The emulator closed the line: it is ending.
    Closed,
    /// Nothing until the deadline.
    Nothing,
    /// Something put into [`Session::sender`] by its owner.
    Input(Vec<u8>),
}

/// A machine that is on.
#[derive(Debug)]
pub struct Session {
    process: Process,
    receiver: Receiver<Received>,
    sender: Sender<Received>,
    line: Line,
    second: Option<TcpStream>,
    log: PathBuf,
    monitor: Option<qemu::Monitor>,
}

/// Where the emulator is to connect a second serial port, if the machine has one.
fn second_port(machine: &Machine) -> Result<Option<(TcpListener, u16)>> {
    if !machine.second_port {
        return Ok(None);
    }
    let listener = TcpListener::bind("127.0.0.1:0").context("a port for the second serial line")?;
    let port = listener.local_addr()?.port();
    Ok(Some((listener, port)))
}

/// Waits for an emulator that was just started to connect to us.
fn accept(listener: &TcpListener, process: &mut Process, log: &Path) -> Result<TcpStream> {
    // A machine with several GiB takes a while before it connects.
    let until = Instant::now() + Duration::from_secs(120);
    listener.set_nonblocking(true)?;
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e).context("waiting for the emulator to connect"),
        }
        let ended = process.wait(Duration::from_millis(20));
        if ended.is_some() || Instant::now() > until {
            let said = std::fs::read_to_string(log).unwrap_or_default();
            let last: Vec<&str> = said.lines().rev().take(8).collect();
            let log = log.display();
            bail!(
                "the emulator did not start; {log} says (last line first):\n{}",
                last.join("\n")
            );
        }
    };
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The writing half of the serial line.
struct Line(Box<dyn Write + Send>);

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Line")
    }
}

impl Session {
    fn new(
        process: Process,
        mut reader: impl Read + Send + 'static,
        writer: impl Write + Send + 'static,
        log: PathBuf,
    ) -> Self {
        let (sender, receiver) = channel();
        let from_line = sender.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let event = match reader.read(&mut buffer) {
                    Ok(n) if n > 0 => Received::Bytes(buffer.get(..n).unwrap_or(&[]).to_vec()),
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                    _ => Received::Closed,
                };
                let last = event == Received::Closed;
                if from_line.send(event).is_err() || last {
                    return;
                }
            }
        });
        Self {
            process,
            receiver,
            sender,
            line: Line(Box::new(writer)),
            second: None,
            log,
            monitor: None,
        }
    }

    /// The second serial port, of a machine that has one.
    pub fn second(&mut self) -> Option<&mut TcpStream> {
        self.second.as_mut()
    }

    /// Waits for the next event until `deadline`.
    pub fn receive(&mut self, deadline: Instant) -> Received {
        match self
            .receiver
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => Received::Nothing,
            Err(RecvTimeoutError::Disconnected) => Received::Closed,
        }
    }

    /// Where a keyboard thread puts [`Received::Input`], to be returned by [`Session::receive`].
    pub fn sender(&self) -> Sender<Received> {
        self.sender.clone()
    }

    /// Sends bytes to the serial line. A machine that has just ended takes none, which its
    /// [`Received::Closed`] tells better than an error here.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self
            .line
            .0
            .write_all(bytes)
            .and_then(|()| self.line.0.flush());
    }

    /// The rows of text on the screen, as wide as it is; `None` where it cannot be read: outside
    /// QEMU's BIOS machines, and in those that are not [`Machine::watched`].
    pub fn screen(&mut self) -> Option<Result<Vec<String>>> {
        self.monitor.as_mut().map(qemu::Monitor::screen)
    }

    /// The emulator's own log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Waits up to `grace` for the machine to switch itself off, then kills it. The exit code is
    /// the emulator's, `None` when it had to be killed.
    pub fn finish(&mut self, grace: Duration) -> Option<i32> {
        let status = self.process.wait(grace);
        self.process.kill();
        status.and_then(|s| s.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wire_has_two_ports() {
        let wire = |text: &str| text.parse::<Wire>().map(|w| (w.local, w.host, w.remote));
        let there = |local, host: &str, remote| Ok((local, host.to_owned(), remote));
        assert_eq!(wire("4000:box:4001"), there(4000, "box", 4001));
        assert_eq!(wire("4000:4001"), there(4000, "127.0.0.1", 4001));
        for wrong in [
            "",
            "4000",
            "4000:",
            "0:4001",
            "4000:box:",
            "4000::4001",
            "a:b:c",
        ] {
            assert!(wire(wrong).is_err_and(|e| e.contains(wrong)), "{wrong}");
        }
    }
}
