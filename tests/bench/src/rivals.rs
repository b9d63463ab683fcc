//! What else moves frames on this machine: the Linux bridge, and Open vSwitch's userspace
//! datapath, between two pairs of veth.
//!
//! All of it is in a network namespace of its own, which ends with this program. Frames go in by a packet socket with a system call for each batch, at the end of one pair, and
//! are counted by the interface at the end of the other: nobody reads them. What the sender costs
//! alone is seen where its pair leads nowhere; with one core for everything, the rest of the time
//! is the rival's.

use std::fs;
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use harness::oracle::ovs::Userspace;
use nix::ifaddrs::getifaddrs;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, MultiHeaders, SockFlag, SockProtocol, SockType, sendmmsg,
    socket,
};

/// How long each is measured.
const TIME: Duration = Duration::from_millis(1500);
const BATCH: usize = 32;
/// The ends of the two pairs that frames go into and come out of, and the ends in the switch.
const ENDS: [&str; 2] = ["tsb-a", "tsb-b"];
const INNER: [&str; 2] = ["tsb-pa", "tsb-pb"];
const BRIDGE: &str = "tsb-br";

fn ip(words: &str) -> Result<()> {
    let output = Command::new("ip").args(words.split(' ')).output();
    let output = output.context("running ip")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {words}: {}", said.trim());
    Ok(())
}

/// Keeps an interface up and silent.
fn up(name: &str) -> Result<()> {
    let quiet = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    let _ = fs::write(quiet, "1");
    ip(&format!("link set {name} up"))
}

/// Two pairs of veth in a network namespace of our own.
fn pairs() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace of our own")?;
    for (end, inner) in ENDS.into_iter().zip(INNER) {
        ip(&format!("link add {end} type veth peer name {inner}"))?;
        up(end)?;
        up(inner)?;
    }
    Ok(())
}

/// The second ends in a bridge.
fn bridge() -> Result<()> {
    ip(&format!("link add {BRIDGE} type bridge"))?;
    for inner in INNER {
        ip(&format!("link set {inner} master {BRIDGE}"))?;
    }
    up(BRIDGE)
}

fn address(name: &str) -> Result<LinkAddr> {
    let mut all = getifaddrs()?.filter(|found| found.interface_name == name);
    let found = all.find_map(|found| found.address?.as_link_addr().copied());
    found.with_context(|| format!("{name} has no link address"))
}

/// Frames that arrived at an interface.
fn received(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/net/dev").context("/proc/net/dev")?;
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let found = lines.find(|(found, _)| found.trim() == name);
    // Bytes, then packets.
    let count = found.and_then(|(_, counts)| counts.split_whitespace().nth(1)?.parse().ok());
    count.with_context(|| format!("{name} is not in /proc/net/dev"))
}

/// Sends frames of `length` bytes from the one end to the other for a while; how many a second
/// arrive at the interface named.
fn blast(length: usize, [from, to]: [&str; 2], counted: &str, time: Duration) -> Result<u64> {
    let [from, to] = [address(from)?, address(to)?];
    let mac = |of: &LinkAddr| of.addr().context("no address");
    let mut frame = [mac(&to)?, mac(&from)?].concat();
    frame.extend([0x88, 0xb5]);
    frame.resize(length, 0x5a);
    // Protocol 0: it is only sent by.
    let packets = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::empty(),
        None::<SockProtocol>,
    )
    .context("a packet socket")?;
    let slices = [[IoSlice::new(&frame)]; BATCH];
    let to = [Some(from); BATCH];
    let mut headers = MultiHeaders::preallocate(BATCH, None);
    let mut send = || {
        sendmmsg(
            packets.as_raw_fd(),
            &mut headers,
            &slices,
            to,
            [],
            MsgFlags::empty(),
        )
        .map(|sent| sent.count())
    };
    let begin = Instant::now();
    let before = received(counted)?;
    while begin.elapsed() < time {
        match send() {
            Ok(_) | Err(nix::Error::ENOBUFS | nix::Error::EAGAIN) => {}
            Err(error) => bail!("sending: {error}"),
        }
    }
    // The rest of what is under way counts for the time it takes.
    let mut last = received(counted)?;
    loop {
        std::thread::sleep(Duration::from_millis(2));
        let now = received(counted)?;
        if now == last {
            break;
        }
        last = now;
    }
    Ok(((last - before) as f64 / begin.elapsed().as_secs_f64()) as u64)
}

fn say(case: &str, found: Result<u64>) {
    match found {
        Ok(value) => println!("bench {case} {value} frames/s"),
        Err(error) => println!("note {case}: not measured here: {error:#}"),
    }
}

/// Measures what goes from the first end to the second.
fn rival(name: &str, set_up: Result<()>) {
    // The second end says where it is.
    let known = set_up.and_then(|()| {
        let [a, b] = ENDS;
        for _ in 0..20 {
            if blast(64, [b, a], a, Duration::from_millis(5))? > 0 {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("nothing arrives")
    });
    if let Err(error) = known {
        println!("note {name}: not measured here: {error:#}");
        return;
    }
    for length in [64, 1500] {
        say(
            &format!("{name}-{length}"),
            blast(length, ENDS, ENDS[1], TIME),
        );
    }
}

/// Measures what can be; `scratch` is for daemons' files.
pub fn measure(scratch: &Path) {
    if let Err(error) = pairs() {
        println!("note rivals: not measured here: {error:#}");
        return;
    }
    for length in [64, 1500] {
        let found = blast(length, ENDS, INNER[0], TIME);
        say(&format!("veth-alone-{length}"), found);
    }
    rival("linux-bridge", bridge());
    let _ = ip(&format!("link del {BRIDGE}"));
    let daemons = Userspace::start(scratch, &INNER);
    rival(
        "ovs-userspace",
        daemons.as_ref().map(drop).map_err(|e| anyhow!("{e:#}")),
    );
}
