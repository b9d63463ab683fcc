//! What can be asked of the switches, and what they answer.
//!
//! A change is made of what is there plus what was typed, checked whole by the switch, and in use
//! at once or not at all. Answers are lines of text; errors say where in the typed text something
//! is wrong, and what would be right.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use arch::Nanos;
use core::fmt::Write;
use vswitch::config::SwitchConfig;
use vswitch::counters::DropCause;
use vswitch::flow::{Command, FlowMod};
use vswitch::mirror::{Capture, MirrorConfig, MirrorOutput};
use vswitch::port::{PortConfig, PortKind, VlanMode};
use vswitch::{PortId, Switch, VlanId};

use crate::table::Table;

/// A port: which switch, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// The switch, from 0 in the order of the configuration.
    pub switch: usize,
    /// The port's number.
    pub port: u16,
}

/// What is asked of switches, whose numbers are those of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Net {
    /// All about one switch, or all of them.
    Switches(Option<usize>),
    /// What a port counted.
    Port(At),
    /// Known and learned addresses.
    Addresses(Option<usize>),
    /// The flows.
    Flows(Option<usize>),
    /// Add this flow.
    AddFlow(usize, String),
    /// Remove the flows of this match.
    DelFlow(usize, String),
    /// The mirrors.
    Mirrors(Option<usize>),
    /// Add a mirror of this name and these settings.
    AddMirror(usize, String),
    /// Remove the mirror of this name.
    DelMirror(usize, String),
    /// Write a port's frames out, or no more.
    Capture(At, bool),
    /// Plug a port's cable in, or pull it.
    Link(At, bool),
}

/// The settings of a mirror, as [`Net::AddMirror`] takes them behind its name.
pub const MIRROR_WORDS: [&str; 7] = [
    "select_all",
    "select_src_port=",
    "select_dst_port=",
    "select_vlan=",
    "output_port=",
    "output_vlan=",
    "capture",
];

/// The most flows or addresses in one answer.
const MOST: usize = 200;
/// What begins the names of mirrors that [`capture`] makes; no other has a colon.
const CAPTURES: &str = "capture:";
/// A mirror's name is not longer.
const NAME: usize = 32;

/// An answer, or why nothing has changed.
pub type Answer = Result<String, String>;

const fn kind(kind: PortKind) -> &'static str {
    match kind {
        PortKind::Vnic => "vnic",
        PortKind::Uplink => "uplink",
        PortKind::Management => "management",
        PortKind::Mirror => "mirror",
    }
}

/// A port's link; `lost` is an uplink whose link leads nowhere, as beacons say.
fn link(switch: &Switch, id: PortId, up: bool) -> &'static str {
    match up {
        true if switch.is_lost(id) => "lost",
        true => "up",
        false => "down",
    }
}

/// Numbers or names with commas between them.
fn commas<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    items.join(",")
}

/// The VLANs of a port, in the words of the configuration.
fn vlans(port: &PortConfig) -> String {
    let tag = port.tag.unwrap_or(0);
    let trunks = match port.trunks.as_slice() {
        [] => "all".into(),
        list => commas(list),
    };
    match port.mode() {
        VlanMode::Access => format!("access {tag}"),
        VlanMode::Trunk => format!("trunk {trunks}"),
        VlanMode::NativeTagged => format!("native-tagged {tag} trunk {trunks}"),
        VlanMode::NativeUntagged => format!("native-untagged {tag} trunk {trunks}"),
        VlanMode::Dot1qTunnel => format!("dot1q-tunnel {tag}"),
    }
}

fn lines(table: &Table, text: &mut String) {
    table.lines(&mut |line| {
        text.push_str(line);
        text.push('\n');
    });
}

fn name(config: &SwitchConfig, id: PortId) -> &str {
    let port = config.ports.iter().find(|port| port.id == id);
    port.map_or("?", |port| port.name.as_str())
}

/// A switch and its ports; `behind` says who is plugged in there.
#[must_use]
pub fn show(switch: &Switch, behind: &dyn Fn(PortId) -> String) -> String {
    let config = switch.config();
    let mut text = format!(
        "switch {}: {} ports, {} flows, {} mirrors",
        config.name,
        config.ports.len(),
        switch.flows().flows().len(),
        config.mirrors.len()
    );
    if let Some(uplink) = switch.active_uplink(0) {
        let _ = write!(text, ", active uplink {}", name(config, uplink));
    }
    if switch.strays() != 0 {
        let _ = write!(text, ", {} frames of no port", switch.strays());
    }
    text.push('\n');
    let heading = [">port", "name", "kind", "vlans", "link", "behind"];
    let mut table = Table::new(&heading);
    for (port, up, _) in switch.ports() {
        table.number(port.id.0.into()).cell(port.name.as_str());
        table.cell(kind(port.kind)).cell(vlans(port));
        let link = link(switch, port.id, up);
        table.cell(link).cell(behind(port.id));
    }
    lines(&table, &mut text);
    text
}

/// What a port is and counted.
#[must_use]
pub fn port(switch: &Switch, id: PortId) -> String {
    let mut ports = switch.ports();
    let Some((port, up, counters)) = ports.find(|(port, ..)| port.id == id) else {
        return String::new();
    };
    let mut text = format!(
        "port {}/{}: number {}, {}, {}, link {}\n",
        switch.config().name,
        port.name,
        id.0,
        kind(port.kind),
        vlans(port),
        link(switch, id, up)
    );
    let allowed = [
        ("protected", port.protected),
        ("forged_source", port.forged_source),
        ("mac_change", port.mac_change),
        ("promiscuous", port.promiscuous),
        ("bpdu", port.bpdu),
        ("dhcp_guard", port.dhcp_guard),
        ("ra_guard", port.ra_guard),
        ("storm_limit", port.storm_limit.is_some()),
        ("ingress", port.ingress.is_some()),
        ("egress", port.egress.is_some()),
        ("learning", port.learning.is_some()),
    ];
    let policy = allowed.iter().filter(|(_, on)| *on).map(|(word, _)| *word);
    let policy = policy.collect::<Vec<_>>().join(" ");
    if !policy.is_empty() {
        let _ = writeln!(text, "policy: {policy}");
    }
    let _ = writeln!(
        text,
        "in: {} frames, {} bytes; {} forwarded, {} dropped",
        counters.rx_frames,
        counters.rx_bytes,
        counters.forwarded,
        counters.dropped_in_all()
    );
    for (cause, word) in DropCause::ALL {
        let count = counters.dropped(cause);
        if count != 0 {
            let _ = writeln!(text, "dropped: {word} {count}");
        }
    }
    let _ = writeln!(
        text,
        "out: {} frames, {} bytes; {} more than it may receive",
        counters.tx_frames, counters.tx_bytes, counters.tx_limited
    );
    if counters.refused != 0 || counters.not_learned != 0 {
        let _ = writeln!(
            text,
            "refused: {} requests of the guest; {} addresses not learned",
            counters.refused, counters.not_learned
        );
    }
    text
}

/// The addresses that a switch knows, by configuration or because it learned them.
#[must_use]
pub fn addresses(switch: &Switch, now: Nanos) -> String {
    let config = switch.config();
    let known = switch.addresses().count();
    let learned = switch.learned().count();
    let mut text = format!(
        "switch {}: {known} addresses known, {learned} learned\n",
        config.name
    );
    let mut table = Table::new(&["address", "port", ">vlan", "from"]);
    for (mac, id) in switch.addresses().take(MOST) {
        table.cell(mac.to_string()).cell(name(config, id));
        table.cell("any").cell("configuration");
    }
    for entry in switch.learned().take(MOST) {
        table.cell(entry.mac.to_string());
        table.cell(name(config, entry.port));
        table.number(entry.vlan.into());
        table.cell(format!(
            "learned, silent {} s",
            now.since(entry.seen) / 1_000_000_000
        ));
    }
    if known + learned > 0 {
        lines(&table, &mut text);
    }
    text
}

/// The flows and what they counted, each so that it can be typed again.
#[must_use]
pub fn flows(switch: &Switch) -> String {
    let flows = switch.flows().flows();
    let mut text = format!("switch {}: {} flows\n", switch.config().name, flows.len());
    for counted in flows.iter().take(MOST) {
        let _ = writeln!(
            text,
            "n_packets={}, n_bytes={}, {}",
            counted.packets, counted.bytes, counted.flow
        );
    }
    if flows.len() > MOST {
        let _ = writeln!(text, "and {} more", flows.len() - MOST);
    }
    text
}

/// Adds a flow.
///
/// # Errors
/// The text is wrong, or the switch cannot have the flow.
pub fn add_flow(switch: &mut Switch, text: &str) -> Answer {
    change_flows(switch, Command::Add, text).map(|_| "flow added".into())
}

/// Removes the flows that a match includes; behind `strict` the one that has just this match and
/// priority.
///
/// # Errors
/// The text is wrong.
pub fn del_flow(switch: &mut Switch, text: &str) -> Answer {
    let strict = text.strip_prefix("strict").filter(|rest| {
        let next = rest.chars().next();
        next.is_none_or(|next| next == ' ')
    });
    let (command, text) = match strict {
        Some(rest) => (Command::DeleteStrict, rest.trim_start()),
        None => (Command::Delete, text),
    };
    match change_flows(switch, command, text)? {
        0 => Err("no flow matches".into()),
        1 => Ok("1 flow removed".into()),
        count => Ok(format!("{count} flows removed")),
    }
}

fn change_flows(switch: &mut Switch, command: Command, text: &str) -> Result<usize, String> {
    let config = switch.config();
    let change = FlowMod::parse_command(command, text, &|name| config.port_named(name));
    let change = change.map_err(|error| format!("flow: {error}"))?;
    let done = switch.change_flows(&[change]);
    done.map_err(|error| format!("flow: {error}"))
}

/// The mirrors.
#[must_use]
pub fn mirrors(switch: &Switch) -> String {
    let config = switch.config();
    let count = config.mirrors.len();
    let mut text = format!("switch {}: {count} mirrors\n", config.name);
    for mirror in &config.mirrors {
        let _ = write!(text, "{}", mirror.name);
        if mirror.select_all {
            text.push_str(" select_all");
        }
        let names = |ids: &[PortId]| commas(ids.iter().map(|id| name(config, *id)));
        for (word, list) in [
            ("select_src_port", names(&mirror.select_src)),
            ("select_dst_port", names(&mirror.select_dst)),
            ("select_vlan", commas(&mirror.select_vlan)),
        ] {
            if !list.is_empty() {
                let _ = write!(text, " {word}={list}");
            }
        }
        let _ = match mirror.output {
            MirrorOutput::Port(id) => writeln!(text, " output_port={}", name(config, id)),
            MirrorOutput::Vlan(vlan) => writeln!(text, " output_vlan={}", vlan.get()),
            MirrorOutput::Capture => writeln!(text, " capture"),
        };
    }
    text
}

/// Adds a mirror: its name, then [`MIRROR_WORDS`].
///
/// # Errors
/// The text is wrong, or the switch cannot have the mirror.
pub fn add_mirror(switch: &mut Switch, text: &str) -> Answer {
    let mirror = read_mirror(switch.config(), text)?;
    let answer = format!("mirror {} added", mirror.name);
    let mut config = switch.config().clone();
    config.mirrors.push(mirror);
    switch.replace(config).map_err(|error| error.to_string())?;
    Ok(answer)
}

/// Removes a mirror.
///
/// # Errors
/// There is none of that name.
pub fn del_mirror(switch: &mut Switch, name: &str) -> Answer {
    let mut config = switch.config().clone();
    config.mirrors.retain(|mirror| mirror.name != name);
    if config.mirrors.len() == switch.config().mirrors.len() {
        let names = config.mirrors.iter().map(|mirror| mirror.name.as_str());
        let names = names.collect::<Vec<_>>().join(" ");
        let names = if names.is_empty() { "none" } else { &names };
        return Err(format!(
            "switch {} has no mirror `{}`; there are: {names}",
            config.name,
            shown(name)
        ));
    }
    switch.replace(config).map_err(|error| error.to_string())?;
    Ok(format!("mirror {name} removed"))
}

/// As much of a typed word as an error repeats.
fn shown(word: &str) -> &str {
    let end = word.char_indices().nth(40).map_or(word.len(), |(at, _)| at);
    word.get(..end).unwrap_or_default()
}

fn read_mirror(config: &SwitchConfig, text: &str) -> Result<MirrorConfig, String> {
    let mut words = text.split_ascii_whitespace();
    let name = words.next().unwrap_or_default();
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.len() > NAME || !name.chars().all(good) {
        return Err(format!(
            "`{}` is no name for a mirror: up to {NAME} of a-z, 0-9 and -, before its settings",
            shown(name)
        ));
    }
    let find = |name: &str| {
        config.port_named(name).ok_or_else(|| {
            let names = commas(config.ports.iter().map(|port| port.name.as_str()));
            format!("no port `{}`; there are {names}", shown(name))
        })
    };
    let ports = |value: &str| value.split(',').map(find).collect::<Result<Vec<_>, _>>();
    let number = |value: &str, least: u16| {
        let parsed = value.parse().ok();
        let parsed = parsed.filter(|id| (least..=4094).contains(id));
        parsed.ok_or_else(|| format!("`{}` is no VLAN: {least} to 4094 are", shown(value)))
    };
    let (mut source, mut destination) = (Vec::new(), Vec::new());
    let (mut all, mut vlans, mut output) = (false, Vec::new(), None);
    for word in words {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let taken = match (key, value.is_empty()) {
            ("select_all", true) => {
                all = true;
                Ok(None)
            }
            ("select_src_port", false) => ports(value).map(|ports| {
                source = ports;
                None
            }),
            ("select_dst_port", false) => ports(value).map(|ports| {
                destination = ports;
                None
            }),
            ("select_vlan", false) => {
                let ids = value.split(',').map(|id| number(id, 0));
                ids.collect::<Result<Vec<_>, _>>().map(|ids| {
                    vlans = ids;
                    None
                })
            }
            ("output_port", false) => find(value).map(|id| Some(MirrorOutput::Port(id))),
            ("output_vlan", false) => number(value, 1).and_then(|id| {
                let vlan = VlanId::new(id).map_err(|error| error.to_string())?;
                Ok(Some(MirrorOutput::Vlan(vlan)))
            }),
            ("capture", true) => Ok(Some(MirrorOutput::Capture)),
            _ => Err(format!(
                "not known here; settings are {}",
                MIRROR_WORDS.join(" ")
            )),
        };
        let taken = taken.map_err(|why| format!("{}: {why}", shown(word)))?;
        if taken.is_some() && output.is_some() {
            return Err(format!("{}: one output is there already", shown(word)));
        }
        output = output.or(taken);
    }
    if !all && source.is_empty() && destination.is_empty() {
        return Err("which frames? select_all, select_src_port= or select_dst_port= says".into());
    }
    let output = output.ok_or("where to? output_port=, output_vlan= or capture says")?;
    if let MirrorOutput::Port(id) = output
        && let Some(port) = config.ports.iter().find(|port| port.id == id)
        && port.kind != PortKind::Mirror
    {
        return Err(format!(
            "output_port={}: copies go only to a port of kind mirror, and this is of kind {}",
            port.name,
            kind(port.kind)
        ));
    }
    Ok(MirrorConfig {
        name: name.into(),
        select_all: all,
        select_src: source,
        select_dst: destination,
        select_vlan: vlans,
        output,
    })
}

/// Puts a port's frames, as they come in and leave, into the switch's ring, or no more.
///
/// # Errors
/// It is so already, or the switch cannot have one mirror more.
pub fn capture(switch: &mut Switch, id: PortId, on: bool) -> Answer {
    let mut config = switch.config().clone();
    let port = name(&config, id).to_string();
    let mirror = format!("{CAPTURES}{port}");
    let before = config.mirrors.len();
    config.mirrors.retain(|other| other.name != mirror);
    let place = format!("{}/{port}", config.name);
    match (on, before == config.mirrors.len()) {
        (true, false) => return Err(format!("frames of {place} are captured already")),
        (false, true) => return Err(format!("frames of {place} are not captured")),
        (true, true) => config.mirrors.push(MirrorConfig {
            name: mirror,
            select_all: false,
            select_src: Vec::from([id]),
            select_dst: Vec::from([id]),
            select_vlan: Vec::new(),
            output: MirrorOutput::Capture,
        }),
        (false, false) => {}
    }
    let answer = match on {
        true => format!(
            "capture of {place}: each frame's beginning goes out on this line as \
             `tessera| {PCAP}{} BASE64`, a pcap file in pieces",
            config.name
        ),
        false => format!("capture of {place} ends"),
    };
    switch.replace(config).map_err(|error| error.to_string())?;
    Ok(answer)
}

/// What begins a line with a piece of a pcap file, before the switch's name.
pub const PCAP: &str = "pcap ";

/// The way of captured frames out of a switch: lines of `pcap SWITCH BASE64`, which put together
/// are a pcap file, at a bounded rate. What is too much for it falls out of the ring, and is
/// counted.
#[derive(Debug, Default)]
pub struct Drain {
    open: bool,
    /// Frames that went out.
    written: u64,
    /// Frames that the ring had lost before.
    lost: u64,
    record: Vec<u8>,
}

impl Drain {
    /// Whether there is something to do.
    #[must_use]
    pub fn is_busy(&self, switch: &Switch) -> bool {
        self.open || captures(switch)
    }

    /// Gives lines of about `budget` characters.
    pub fn step(&mut self, switch: &mut Switch, budget: usize, say: &mut dyn FnMut(&str)) {
        let wanted = captures(switch);
        if !self.open && !wanted {
            return;
        }
        let config = switch.config();
        let (prefix, title) = (
            format!("{PCAP}{} ", config.name),
            format!("capture of switch {}", config.name),
        );
        let Some(ring) = switch.capture() else { return };
        let mut line = |bytes: &[u8]| {
            let mut text = prefix.clone();
            base64(bytes, &mut text);
            say(&text);
            text.len()
        };
        let mut spent = 0;
        if !self.open {
            let (_, lost) = ring.counts();
            (self.open, self.written, self.lost) = (true, 0, lost);
            spent += line(&Capture::file_header());
        }
        let mut empty = false;
        while spent < budget && !empty {
            empty = !ring.read(&mut self.record);
            if !empty {
                self.written += 1;
                spent += line(&self.record);
            }
        }
        if empty && !wanted {
            self.open = false;
            let (_, lost) = ring.counts();
            let (written, lost) = (self.written, lost.saturating_sub(self.lost));
            say(&format!("{title}: over; {written} frames, {lost} lost"));
        }
    }
}

fn captures(switch: &Switch) -> bool {
    let mut mirrors = switch.config().mirrors.iter();
    mirrors.any(|mirror| mirror.name.starts_with(CAPTURES))
}

/// Bytes as text (RFC 4648, section 4).
fn base64(bytes: &[u8], text: &mut String) {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for chunk in bytes.chunks(3) {
        let mut three = [0; 4];
        three
            .iter_mut()
            .skip(1)
            .zip(chunk)
            .for_each(|(to, from)| *to = *from);
        let bits = u32::from_be_bytes(three);
        for place in 0..4 {
            let digit = DIGITS.get((bits >> (18 - 6 * place) & 63) as usize);
            let digit = digit.filter(|_| place <= chunk.len());
            text.push(digit.map_or('=', |digit| char::from(*digit)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use vswitch::MacAddr;
    use vswitch::cache::Cache;
    use vswitch::port::Learning;

    const A: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xa]);
    const B: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xb]);

    /// An uplink, two guests and a port for copies.
    fn lan() -> Switch {
        let mut up = PortConfig::new(1, "up", PortKind::Uplink);
        up.protected = true;
        let guest = |id, name: &str, mac| PortConfig {
            macs: vec![mac],
            ..PortConfig::new(id, name, PortKind::Vnic)
        };
        let mut b = guest(3, "b", B);
        b.forged_source = true;
        b.learning = Some(Learning::default());
        let ports = vec![
            up,
            guest(2, "a", A),
            b,
            PortConfig::new(4, "probe", PortKind::Mirror),
        ];
        let config = SwitchConfig {
            name: "lan".into(),
            ports,
            capture_bytes: 4096,
            ..SwitchConfig::default()
        };
        Switch::new(config, [1, 2]).expect("it is sound")
    }

    /// A frame from `from` to `to` comes in.
    fn send(switch: &mut Switch, port: u16, from: MacAddr, to: MacAddr) -> usize {
        let mut frame = [0; 60];
        frame[..6].copy_from_slice(&to.0);
        frame[6..12].copy_from_slice(&from.0);
        frame[12..14].copy_from_slice(&[0x88, 0xb5]);
        let mut cache = Cache::new(16, [3, 4]);
        let decided = switch.decide(&mut cache, PortId(port), &frame, 60, Nanos(5_000_000_000));
        decided.steps.len()
    }

    #[test]
    fn a_switch_shows_its_ports_and_what_they_counted() {
        let mut lan = lan();
        assert_eq!(send(&mut lan, 2, A, B), 1);
        send(&mut lan, 2, B, A);
        let text = show(&lan, &|id| format!("thing {}", id.0));
        let want = [
            "switch lan: 4 ports, 1 flows, 0 mirrors, active uplink up",
            "port  name   kind    vlans      link  behind",
            "   1  up     uplink  trunk all  up    thing 1",
            "   2  a      vnic    trunk all  up    thing 2",
            "   3  b      vnic    trunk all  up    thing 3",
            "   4  probe  mirror  trunk all  up    thing 4",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), want);
        let text = port(&lan, PortId(2));
        let want = [
            "port lan/a: number 2, vnic, trunk all, link up",
            "in: 2 frames, 120 bytes; 1 forwarded, 1 dropped",
            "dropped: forged-source 1",
            "out: 0 frames, 0 bytes; 0 more than it may receive",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), want);
        assert!(port(&lan, PortId(3)).contains("policy: forged_source learning\n"));
    }

    #[test]
    fn known_and_learned_addresses_are_listed() {
        let mut lan = lan();
        send(&mut lan, 3, MacAddr([2, 0, 0, 0, 0, 9]), A);
        let text = addresses(&lan, Nanos(8_000_000_000));
        let want = [
            "switch lan: 2 addresses known, 1 learned",
            "address            port  vlan  from",
            "02:00:00:00:00:0a  a      any  configuration",
            "02:00:00:00:00:0b  b      any  configuration",
            "02:00:00:00:00:09  b        0  learned, silent 3 s",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), want);
    }

    #[test]
    fn flows_come_count_and_go() {
        let mut lan = lan();
        add_flow(&mut lan, "priority=9,in_port=a,actions=output:up").unwrap();
        send(&mut lan, 2, A, B);
        let text = flows(&lan);
        let want = [
            "switch lan: 2 flows",
            "n_packets=0, n_bytes=0, priority=0 actions=NORMAL",
            "n_packets=1, n_bytes=60, priority=9,in_port=2 actions=output:1",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), want);
        assert_eq!(
            del_flow(&mut lan, "in_port=b"),
            Err("no flow matches".into())
        );
        // A looser match does not go with one that is strict.
        assert!(del_flow(&mut lan, "strict in_port=a").is_err());
        assert_eq!(del_flow(&mut lan, "in_port=a"), Ok("1 flow removed".into()));
        assert_eq!(
            del_flow(&mut lan, "strict priority=0"),
            Ok("1 flow removed".into())
        );
        assert_eq!(send(&mut lan, 2, A, B), 0);
    }

    #[test]
    fn wrong_changes_name_their_place_and_change_nothing() {
        let mut lan = lan();
        let before = (lan.config().clone(), flows(&lan));
        for (text, error) in [
            (
                "priority=5,arq,actions=drop",
                "flow: column 12: arq: not a field, action or port known here",
            ),
            (
                "dl_vlan=4096,actions=drop",
                "flow: column 1: dl_vlan: \"4096\" is no number from 0 to 4095",
            ),
            (
                "in_port=c,actions=drop",
                "flow: column 1: in_port: \"c\" is not the name or number of a port",
            ),
            (
                "table=3,actions=resubmit(,2)",
                "flow: column 17: resubmit: leads from table 3 to table 2; only later tables are \
                 allowed, so that no frame runs in circles",
            ),
            ("arp", "flow: column 4: : actions=… is missing"),
            (
                "actions=meter:7",
                "flow: a flow of table 0 uses meter 7, which is not there",
            ),
        ] {
            assert_eq!(add_flow(&mut lan, text), Err(error.to_string()), "{text}");
        }
        for (text, error) in [
            (
                "m capture",
                "which frames? select_all, select_src_port= or select_dst_port= says",
            ),
            (
                "m select_all",
                "where to? output_port=, output_vlan= or capture says",
            ),
            (
                "m select_src_port=a,c capture",
                "select_src_port=a,c: no port `c`; there are up,a,b,probe",
            ),
            (
                "m select_all output_port=b",
                "output_port=b: copies go only to a port of kind mirror, and this is of kind vnic",
            ),
            (
                "m select_all output_vlan=4095",
                "output_vlan=4095: `4095` is no VLAN: 1 to 4094 are",
            ),
            (
                "m select_all output_port=probe capture",
                "capture: one output is there already",
            ),
            (
                "m all capture",
                "all: not known here; settings are select_all select_src_port= select_dst_port= \
                 select_vlan= output_port= output_vlan= capture",
            ),
            (
                "select_all=1",
                "`select_all=1` is no name for a mirror: up to 32 of a-z, 0-9 and -, before its \
                 settings",
            ),
        ] {
            assert_eq!(add_mirror(&mut lan, text), Err(error.to_string()), "{text}");
        }
        assert_eq!(
            del_mirror(&mut lan, "m"),
            Err("switch lan has no mirror `m`; there are: none".into())
        );
        assert_eq!((lan.config().clone(), flows(&lan)), before);
    }

    #[test]
    fn mirrors_come_and_go() {
        let mut lan = lan();
        add_mirror(
            &mut lan,
            "m select_src_port=a select_vlan=0,5 output_port=probe",
        )
        .unwrap();
        let twice = add_mirror(&mut lan, "m select_all capture");
        assert_eq!(twice, Err("switch: mirrors: m is there twice".into()));
        let want = "switch lan: 1 mirrors\nm select_src_port=a select_vlan=0,5 output_port=probe\n";
        assert_eq!(mirrors(&lan), want);
        assert_eq!(send(&mut lan, 2, A, B), 2);
        assert_eq!(del_mirror(&mut lan, "m"), Ok("mirror m removed".into()));
        assert_eq!(send(&mut lan, 2, A, B), 1);
    }

    /// The bytes of a text in base64.
    fn bytes(text: &str) -> Vec<u8> {
        let value = |c: u8| match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            _ => 63,
        };
        let digits: Vec<u8> = text.bytes().filter(|c| *c != b'=').map(value).collect();
        let mut out = Vec::new();
        for four in digits.chunks(4) {
            let bits = four
                .iter()
                .fold(0u32, |bits, digit| bits << 6 | u32::from(*digit));
            let bits = bits << (6 * (4 - four.len()));
            out.extend_from_slice(&bits.to_be_bytes()[1..four.len()]);
        }
        out
    }

    #[test]
    fn captured_frames_leave_as_a_pcap_file_in_pieces() {
        let mut lan = lan();
        let mut drain = Drain::default();
        assert!(!drain.is_busy(&lan));
        assert!(capture(&mut lan, PortId(2), false).is_err());
        capture(&mut lan, PortId(2), true).unwrap();
        assert!(capture(&mut lan, PortId(2), true).is_err(), "once");
        for _ in 0..3 {
            send(&mut lan, 2, A, B);
        }
        let mut said = Vec::new();
        // A small budget: one line at a time.
        drain.step(&mut lan, 1, &mut |line| said.push(line.to_string()));
        assert_eq!(said.len(), 1);
        drain.step(&mut lan, 4096, &mut |line| said.push(line.to_string()));
        assert!(drain.is_busy(&lan));
        send(&mut lan, 3, B, A);
        capture(&mut lan, PortId(2), false).unwrap();
        send(&mut lan, 3, B, A);
        drain.step(&mut lan, 4096, &mut |line| said.push(line.to_string()));
        assert!(!drain.is_busy(&lan));
        let over = "capture of switch lan: over; 4 frames, 0 lost";
        assert_eq!(said.pop().as_deref(), Some(over));
        let pieces = said
            .iter()
            .map(|line| line.strip_prefix("pcap lan ").unwrap());
        let file: Vec<u8> = pieces.flat_map(bytes).collect();
        assert_eq!(file.len(), 24 + 4 * (16 + 60));
        assert_eq!(file[..4], [0x4d, 0x3c, 0xb2, 0xa1]);
        assert_eq!(file[24 + 16..24 + 22], B.0);
    }

    proptest::proptest! {
        #[test]
        fn base64_is_undone(data in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..40)) {
            let mut text = String::new();
            base64(&data, &mut text);
            proptest::prop_assert_eq!(text.len(), data.len().div_ceil(3) * 4);
            proptest::prop_assert_eq!(bytes(&text), data);
        }

        #[test]
        fn no_text_is_too_odd(text in "[ -~]{0,60}") {
            let mut lan = lan();
            let _ = add_flow(&mut lan, &text);
            let _ = del_flow(&mut lan, &text);
            let _ = add_mirror(&mut lan, &text);
            let _ = del_mirror(&mut lan, &text);
        }
    }
}
