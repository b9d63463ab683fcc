//! What a guest does with its network.

use core::cell::UnsafeCell;
use core::fmt::Write;
use core::str::FromStr;
use core::sync::atomic::{AtomicUsize, Ordering};

use crc32fast::Hasher;
use guest_runtime::cpu::rdtsc;
use guest_runtime::{clock, cmdline, print, println};
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet, SocketStorage};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{dhcpv4, icmp, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, Ipv4Address, Ipv4Cidr,
};

use crate::Card;

/// Bytes of a TCP socket's buffers, each way.
const WINDOW: usize = 16 << 10;
const SERVERS: usize = 4;
/// Where the clients' own ports begin.
const FIRST_PORT: u16 = 49152;
/// What the source sends.
const FILE: u64 = 1 << 20;
const IDENT: u16 = 0x7e55;
const PINGS: usize = 4;
/// How often one is asked that never answered, once a second.
const TRIES: u16 = 30;
const SECOND: u64 = 1_000_000;
/// The time for a lease.
const DHCP: u64 = 10 * SECOND;
/// The time for a transfer's beginning and end, and for each silence in it.
const PATIENCE: u64 = 30 * SECOND;

/// Buffers for sockets, given away piece by piece and never given back.
struct Memory(UnsafeCell<[u8; 2 * WINDOW * (SERVERS + 1)]>, AtomicUsize);

// SAFETY: `take` gives no byte twice.
unsafe impl Sync for Memory {}

static MEMORY: Memory = Memory(UnsafeCell::new([0; _]), AtomicUsize::new(0));

fn take() -> &'static mut [u8] {
    let at = MEMORY.1.fetch_add(WINDOW, Ordering::Relaxed);
    assert!(at < 2 * WINDOW * (SERVERS + 1), "too many sockets");
    // SAFETY: these bytes are within the memory, and were not given away before.
    unsafe { core::slice::from_raw_parts_mut(MEMORY.0.get().cast::<u8>().add(at), WINDOW) }
}

/// Bytes that look like no others: the same for all who begin anew.
struct Pattern(u64);

impl Pattern {
    const fn new() -> Self {
        Self(0x7e55_e7a0_0000_0001)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *byte = self.0 as u8;
        }
    }
}

/// A stream's length and sum.
#[derive(Clone, Default)]
struct Sum {
    bytes: u64,
    crc: Hasher,
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.crc.update(bytes);
    }

    /// What a sink answers.
    fn told(&self) -> Line {
        let mut line = Line::default();
        let _ = writeln!(line, "{} {:08x}", self.bytes, self.crc.clone().finalize());
        line
    }
}

/// A short line of text.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Line {
    bytes: [u8; 32],
    length: usize,
}

impl Line {
    fn get(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if let Some(slot) = self.bytes.get_mut(self.length) {
                *slot = *byte;
                self.length += 1;
            }
        }
    }

    fn text(&self) -> &str {
        core::str::from_utf8(self.get()).unwrap_or("?").trim_end()
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        self.push(text.as_bytes());
        Ok(())
    }
}

/// What is served at a port.
enum Service {
    Echo,
    Discard,
    Sink(Sum),
    Source(Pattern, u64),
}

struct Server {
    port: u16,
    socket: SocketHandle,
    service: Service,
}

impl Server {
    /// Does what there is to do; whether there was something.
    fn serve(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        // Nobody else uses the peer's port so soon again.
        if socket.state() == tcp::State::TimeWait {
            socket.abort();
        }
        if !socket.is_open() {
            match &mut self.service {
                Service::Sink(sum) => *sum = Sum::default(),
                Service::Source(pattern, sent) => (*pattern, *sent) = (Pattern::new(), 0),
                Service::Echo | Service::Discard => {}
            }
            return socket.listen(self.port).is_ok();
        }
        // The other side has ended, and all it sent was taken.
        let ended = !socket.may_recv() && socket.may_send() && socket.recv_queue() == 0;
        let ended = ended && socket.state() == tcp::State::CloseWait;
        let mut worked = false;
        match &mut self.service {
            Service::Echo => {
                while socket.can_recv() && socket.can_send() {
                    let room = socket.send_capacity() - socket.send_queue();
                    let mut bytes = [0; 1024];
                    let most = room.min(bytes.len());
                    let Ok(count @ 1..) = socket.recv_slice(&mut bytes[..most]) else {
                        break;
                    };
                    let _ = socket.send_slice(&bytes[..count]);
                    worked = true;
                }
            }
            Service::Discard => worked |= drain(socket, |_| {}),
            Service::Sink(sum) => {
                worked |= drain(socket, |bytes| sum.add(bytes));
                if ended {
                    let told = sum.told();
                    let _ = socket.send_slice(told.get());
                    println!("hello: sink: {}", told.text());
                }
            }
            Service::Source(pattern, sent) => {
                worked |= drain(socket, |_| {});
                worked |= send(socket, pattern, sent, FILE, |_| {});
                if *sent == FILE {
                    socket.close();
                }
            }
        }
        if ended {
            socket.close();
        }
        worked || ended
    }
}

/// Takes what came; whether there was something.
fn drain(socket: &mut tcp::Socket<'_>, mut take: impl FnMut(&[u8])) -> bool {
    let mut some = false;
    while socket.can_recv() {
        let taken = socket.recv(|bytes| {
            take(bytes);
            (bytes.len(), bytes.len())
        });
        if !matches!(taken, Ok(1..)) {
            break;
        }
        some = true;
    }
    some
}

/// Sends of the pattern what there is room for, up to `total`; whether something went.
fn send(
    socket: &mut tcp::Socket<'_>,
    pattern: &mut Pattern,
    sent: &mut u64,
    total: u64,
    mut see: impl FnMut(&[u8]),
) -> bool {
    let before = *sent;
    while socket.can_send() && *sent < total {
        let filled = socket.send(|room| {
            let left = usize::try_from(total - *sent).unwrap_or(usize::MAX);
            let count = room.len().min(left);
            pattern.fill(&mut room[..count]);
            see(&room[..count]);
            (count, count)
        });
        match filled {
            Ok(count @ 1..) => *sent += count as u64,
            _ => break,
        }
    }
    *sent != before
}

struct Network<'a> {
    card: Card,
    interface: Interface,
    sockets: SocketSet<'a>,
    servers: [Server; SERVERS],
    dhcp: Option<SocketHandle>,
    icmp: SocketHandle,
    client: SocketHandle,
    next_port: u16,
}

fn now() -> u64 {
    clock::micros(rdtsc())
}

fn instant() -> Instant {
    Instant::from_micros(i64::try_from(now()).unwrap_or(i64::MAX))
}

/// What stands behind `key=` on the command line, word by word.
fn words(key: &str) -> impl Iterator<Item = &'static str> {
    cmdline()
        .split_whitespace()
        .filter_map(move |word| word.strip_prefix(key)?.strip_prefix('='))
}

fn address<T: FromStr>(text: &str, what: &str) -> Option<T> {
    let found = text.parse().ok();
    if found.is_none() {
        println!("hello: `{text}` is no {what}");
    }
    found
}

fn cidr(text: &str) -> Option<Ipv4Cidr> {
    let (place, length) = text.split_once('/').unwrap_or((text, "24"));
    let place = address(place, "address")?;
    let length = address(length, "prefix length").filter(|length| *length <= 32)?;
    Some(Ipv4Cidr::new(place, length))
}

fn endpoint(text: &str, otherwise: u16) -> Option<(Ipv4Address, u16)> {
    match text.split_once(':') {
        Some((place, port)) => Some((address(place, "address")?, address(port, "port")?)),
        None => Some((address(text, "address")?, otherwise)),
    }
}

impl Network<'_> {
    fn set_address(&mut self, own: Option<Ipv4Cidr>, gateway: Option<Ipv4Address>) {
        self.interface.update_ip_addrs(|list| {
            list.clear();
            if let Some(own) = own {
                let _ = list.push(IpCidr::Ipv4(own));
            }
        });
        let routes = self.interface.routes_mut();
        routes.remove_default_ipv4_route();
        if let Some(gateway) = gateway {
            let _ = routes.add_default_ipv4_route(gateway);
        }
    }

    /// Takes an address of the command line.
    fn take_address(&mut self, own: Ipv4Cidr) {
        println!("hello: address {own}");
        let gateway = words("gw").next().and_then(|text| text.parse().ok());
        if let Some(dhcp) = self.dhcp.take() {
            self.sockets.remove(dhcp);
        }
        self.set_address(Some(own), gateway);
    }

    fn lease(&mut self) {
        let Some(event) = self
            .dhcp
            .and_then(|dhcp| self.sockets.get_mut::<dhcpv4::Socket<'_>>(dhcp).poll())
        else {
            return;
        };
        match event {
            dhcpv4::Event::Configured(lease) => {
                let (own, gateway) = (lease.address, lease.router);
                println!("hello: address {own} by DHCP");
                self.set_address(Some(own), gateway);
            }
            dhcpv4::Event::Deconfigured => self.set_address(None, None),
        }
    }

    /// Moves everything on, and halts until there is news or the time is `until`.
    fn step(&mut self, until: u64) {
        self.card.look();
        let polled = self
            .interface
            .poll(instant(), &mut self.card, &mut self.sockets);
        self.lease();
        // Sockets with news are for the caller to look at.
        let mut worked = polled == PollResult::SocketStateChanged;
        for server in &mut self.servers {
            worked |= server.serve(self.sockets.get_mut(server.socket));
        }
        self.card.tell();
        if worked {
            return;
        }
        let now = now();
        let delay = self.interface.poll_delay(instant(), &self.sockets);
        let delay = delay.map_or(SECOND, |delay| delay.total_micros().min(SECOND));
        let until = until.min(now.saturating_add(delay));
        self.card
            .wait(rdtsc() + clock::ticks(until.saturating_sub(now)));
    }

    /// Moves everything on until `done` gives something, but no longer than `micros` after the last
    /// sign of life that it tells of.
    fn until<T>(
        &mut self,
        micros: u64,
        mut done: impl FnMut(&mut Self, &mut bool) -> Option<T>,
    ) -> Option<T> {
        let mut end = now() + micros;
        loop {
            let mut alive = false;
            if let Some(result) = done(self, &mut alive) {
                return Some(result);
            }
            if alive {
                end = now() + micros;
            }
            if now() >= end {
                return None;
            }
            self.step(if alive { 0 } else { end });
        }
    }

    /// The time to the answer, in microseconds.
    fn ask(&mut self, whom: Ipv4Address, number: u16) -> Option<u64> {
        let handle = self.icmp;
        let socket: &mut icmp::Socket<'_> = self.sockets.get_mut(handle);
        let question = Icmpv4Repr::EchoRequest {
            ident: IDENT,
            seq_no: number,
            data: &[0x5a; 56],
        };
        let start = now();
        if let Ok(room) = socket.send(question.buffer_len(), IpAddress::Ipv4(whom)) {
            question.emit(
                &mut Icmpv4Packet::new_unchecked(room),
                &ChecksumCapabilities::default(),
            );
        }
        self.until(SECOND, |this, _| {
            let socket: &mut icmp::Socket<'_> = this.sockets.get_mut(handle);
            while let Ok((bytes, from)) = socket.recv() {
                let Ok(packet) = Icmpv4Packet::new_checked(bytes) else {
                    continue;
                };
                let answer = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default());
                if let Ok(Icmpv4Repr::EchoReply { seq_no, .. }) = answer
                    && seq_no == number
                    && from == IpAddress::Ipv4(whom)
                {
                    return Some(now() - start);
                }
            }
            None
        })
    }

    fn ping(&mut self, whom: Ipv4Address) -> bool {
        let (mut number, mut asked, mut answers) = (0, 0, 0);
        let mut trips = [None; PINGS];
        while asked < PINGS && number < TRIES {
            number += 1;
            let answer = self.ask(whom, number);
            answers += usize::from(answer.is_some());
            if answers != 0 {
                trips[asked] = answer;
                asked += 1;
            }
        }
        if answers == 0 {
            println!("hello: ping {whom}: no answer to {number}");
            return false;
        }
        print!("hello: ping {whom}: {answers} of {asked},");
        for trip in trips.iter().flatten() {
            print!(" {trip}");
        }
        println!(" us");
        true
    }

    fn connect(&mut self, to: (Ipv4Address, u16)) -> bool {
        // A server may not be there yet.
        let end = now() + PATIENCE;
        while now() < end {
            self.next_port += 1;
            let port = self.next_port;
            self.sockets.get_mut::<tcp::Socket<'_>>(self.client).abort();
            let client = self.client;
            let socket: &mut tcp::Socket<'_> = self.sockets.get_mut(client);
            if socket
                .connect(
                    self.interface.context(),
                    (IpAddress::Ipv4(to.0), to.1),
                    port,
                )
                .is_err()
            {
                return false;
            }
            let state = self.until(4 * SECOND, |this, _| {
                let socket: &mut tcp::Socket<'_> = this.sockets.get_mut(client);
                (socket.may_send() || !socket.is_open()).then(|| socket.may_send())
            });
            if state == Some(true) {
                return true;
            }
            self.until(SECOND / 2, |_, _| None::<()>);
        }
        false
    }

    fn send(&mut self, to: (Ipv4Address, u16), total: u64) -> bool {
        let (whom, port) = to;
        if !self.connect(to) {
            println!("hello: send {whom}:{port}: no connection");
            return false;
        }
        let (mut pattern, mut sent, mut sum) = (Pattern::new(), 0, Sum::default());
        let mut answer = Line::default();
        let client = self.client;
        let start = now();
        let done = self.until(PATIENCE, |this, alive| {
            let socket: &mut tcp::Socket<'_> = this.sockets.get_mut(client);
            *alive |= send(socket, &mut pattern, &mut sent, total, |bytes| {
                sum.add(bytes)
            });
            if sent == total && socket.state() == tcp::State::Established {
                socket.close();
                *alive = true;
            }
            *alive |= drain(socket, |bytes| answer.push(bytes));
            (sent == total && !socket.may_recv() || !socket.is_open()).then_some(())
        });
        let micros = (now() - start).max(1);
        let told = sum.told();
        let right = done.is_some() && answer == told;
        let text = told.text();
        if right {
            println!(
                "hello: send {whom}:{port}: {text}, {} kB/s",
                total * 1000 / micros
            );
        } else {
            println!(
                "hello: send {whom}:{port}: {text}, but it says `{}`",
                answer.text()
            );
        }
        right
    }

    fn fetch(&mut self, from: (Ipv4Address, u16)) -> bool {
        let (whom, port) = from;
        if !self.connect(from) {
            println!("hello: fetch {whom}:{port}: no connection");
            return false;
        }
        let mut sum = Sum::default();
        let client = self.client;
        let start = now();
        let done = self.until(PATIENCE, |this, alive| {
            let socket: &mut tcp::Socket<'_> = this.sockets.get_mut(client);
            *alive |= drain(socket, |bytes| sum.add(bytes));
            (!socket.may_recv() && !socket.can_recv()).then(|| {
                let well = socket.state() == tcp::State::CloseWait;
                socket.close();
                well
            })
        });
        let micros = (now() - start).max(1);
        let told = sum.told();
        let right = done == Some(true);
        let how = if right { "" } else { ", broken off" };
        let rate = sum.bytes * 1000 / micros;
        println!(
            "hello: fetch {whom}:{port}: {}{how}, {rate} kB/s",
            told.text()
        );
        right
    }

    /// What the command line names; whether all of it went well.
    fn work(&mut self) -> bool {
        if self.interface.ipv4_addr().is_none() {
            let leased = self.until(DHCP, |this, _| this.interface.ipv4_addr());
            if leased.is_none() {
                if let Some(own) = words("tessera.ip").next().and_then(cidr) {
                    self.take_address(own);
                } else {
                    println!("hello: no address by DHCP");
                    return ["ping", "send", "fetch"]
                        .iter()
                        .all(|key| words(key).next().is_none());
                }
            }
        }
        let mut well = true;
        for whom in words("ping").flat_map(|list| list.split(',')) {
            well &= address(whom, "address").is_some_and(|whom| self.ping(whom));
        }
        for word in words("send") {
            let (to, total) = word.split_once(',').unwrap_or((word, "1000000"));
            well &= endpoint(to, 9000)
                .zip(address(total, "number of bytes"))
                .is_some_and(|(to, total)| self.send(to, total));
        }
        for word in words("fetch") {
            well &= endpoint(word, 9001).is_some_and(|from| self.fetch(from));
        }
        well
    }

    fn stay(&mut self) {
        let seconds = words("stay").next().and_then(|text| text.parse().ok());
        let forever = cmdline().split_whitespace().any(|word| word == "stay");
        let end = match seconds {
            Some(seconds) => now().saturating_add(SECOND.saturating_mul(seconds)),
            None if forever => u64::MAX,
            // What was answered last must have gone out.
            None => now() + SECOND / 4,
        };
        while now() < end {
            self.step(end);
        }
    }
}

/// Does what the command line says, over this card. Whether all of it went well.
pub fn talk(mut card: Card) -> bool {
    let mac = card.mac();
    let mut config = Config::new(EthernetAddress(mac).into());
    config.random_seed = rdtsc() ^ u64::from(mac[5]) << 56;
    let interface = Interface::new(config, &mut card, instant());
    let mut storage = [const { SocketStorage::EMPTY }; SERVERS + 3];
    let mut sockets = SocketSet::new(&mut storage[..]);
    let mut stream = || {
        let buffers = [take(), take()].map(tcp::SocketBuffer::new);
        let [receive, send] = buffers;
        let mut socket = tcp::Socket::new(receive, send);
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        sockets.add(socket)
    };
    let services = [
        (7, Service::Echo),
        (9, Service::Discard),
        (9000, Service::Sink(Sum::default())),
        (9001, Service::Source(Pattern::new(), 0)),
    ];
    let servers = services.map(|(port, service)| Server {
        port,
        socket: stream(),
        service,
    });
    let client = stream();
    let (mut asked, mut answered) = (
        [icmp::PacketMetadata::EMPTY; 4],
        [icmp::PacketMetadata::EMPTY; 4],
    );
    let (mut asked_bytes, mut answered_bytes) = ([0; 512], [0; 512]);
    let mut socket = icmp::Socket::new(
        icmp::PacketBuffer::new(&mut answered[..], &mut answered_bytes[..]),
        icmp::PacketBuffer::new(&mut asked[..], &mut asked_bytes[..]),
    );
    let _ = socket.bind(icmp::Endpoint::Ident(IDENT));
    let icmp = sockets.add(socket);
    let fixed = words("ip").next().and_then(cidr);
    let dhcp = fixed.is_none().then(|| sockets.add(dhcpv4::Socket::new()));
    let mut network = Network {
        card,
        interface,
        sockets,
        servers,
        dhcp,
        icmp,
        client,
        next_port: FIRST_PORT,
    };
    if let Some(own) = fixed {
        network.take_address(own);
    }
    let well = network.work();
    network.stay();
    well
}
