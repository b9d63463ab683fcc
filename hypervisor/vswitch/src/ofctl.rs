//! Flow text, as `ovs-ofctl` reads and writes it (ovs-ofctl(8), "Flow Syntax").
//!
//! What is accepted means what it means to Open vSwitch 3.1, and is printed as `ovs-ofctl -O
//! OpenFlow13 parse-flows` prints it; actions that this protocol does not have (a tag changed where
//! it is not known that there is one) are printed in OpenFlow 1.0's words. Open vSwitch silently
//! ignores what it cannot match or cuts numbers to size. Here this is an error, because a flow that
//! matches more than it says is a hole in a wall: a field whose prerequisite is missing, a field
//! given twice, a number that is too large, bits outside a field.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::{self, Write};
use core::net::{Ipv4Addr, Ipv6Addr};

use crate::config::MeterConfig;
use crate::flow::{Action, Command, DEFAULT_PRIORITY, Flow, FlowMod, LAST_TABLE, Match};
use crate::key::{FRAG_ANY, FRAG_LATER, FlowKey, Vlan, ether, ipv4, proto};
use crate::translate::Field;
use crate::{MacAddr, PortId};

/// A port's number by its name.
pub type Names<'a> = &'a dyn Fn(&str) -> Option<PortId>;

/// Flow text that is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("column {column}: {word}: {why}")]
pub struct TextError {
    /// Where it is, counted in bytes from 1.
    pub column: usize,
    /// The field or action.
    pub word: String,
    /// What is wrong.
    pub why: Why,
}

/// What is wrong with a word of flow text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// No such field or action.
    #[error("not a field, action or port known here")]
    Unknown,
    /// Nothing after it.
    #[error("its value is missing")]
    Missing,
    /// Something after it.
    #[error("takes no value, found {0:?}")]
    Superfluous(String),
    /// Not a number, or out of range.
    #[error("{found:?} is no number from {low} to {high}")]
    Number {
        /// What was there.
        found: String,
        /// The lowest.
        low: u64,
        /// The highest.
        high: u64,
    },
    /// Not what the field is made of.
    #[error("{found:?} is not {wanted}")]
    Form {
        /// What was there.
        found: String,
        /// What would be right.
        wanted: &'static str,
    },
    /// Says something else than before.
    #[error("already matched otherwise before")]
    Twice,
    /// A prerequisite.
    #[error("needs a match of {0}")]
    Needs(&'static str),
    /// There is no mask for it.
    #[error("can not be masked")]
    Mask,
    /// Not allowed in this command.
    #[error("has no meaning in this command")]
    Misplaced,
    /// No `actions=`.
    #[error("actions=… is missing")]
    NoActions,
    /// Actions beside `drop`.
    #[error("goes with no other action")]
    Alone,
    /// An instruction that is not where OpenFlow 1.1 and later wants it.
    #[error("must be the {0} action")]
    Order(&'static str),
    /// Two tags are what keys hold.
    #[error("two tags are there already, and more are not read")]
    ThirdTag,
    /// To the same table or an earlier one.
    #[error(
        "leads from table {from} to table {to}; only later tables are allowed, so that no frame runs in circles"
    )]
    Backwards {
        /// The flow's table.
        from: u8,
        /// Where it leads.
        to: u8,
    },
}

/// The highest number of a meter (OpenFlow 1.3 §7.3.4.4).
const MAX_METER: u32 = 0xffff_0000;

type Result<T, E = Why> = core::result::Result<T, E>;

/// A word of flow text: `key`, `key=value`, `key:value` or `key(value)`.
#[derive(Clone, Copy)]
struct Word<'a> {
    key: &'a str,
    value: &'a str,
    /// Where the key begins, from 0.
    at: usize,
}

impl Word<'_> {
    fn fail(&self, why: Why) -> TextError {
        TextError {
            column: self.at + 1,
            word: self.key.chars().take(40).collect(),
            why,
        }
    }
}

/// Cuts text into words.
#[derive(Clone, Copy)]
struct Words<'a> {
    text: &'a str,
    at: usize,
}

const SEPARATORS: [char; 5] = [',', ' ', '\t', '\r', '\n'];

impl<'a> Words<'a> {
    /// What is left.
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn take(&mut self, length: usize) -> &'a str {
        let taken = self.rest().get(..length).unwrap_or_default();
        self.at += length;
        taken
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = Word<'a>;

    fn next(&mut self) -> Option<Word<'a>> {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches(SEPARATORS).len();
        let (rest, at) = (self.rest(), self.at);
        if rest.is_empty() {
            return None;
        }
        let ends = |c: char| SEPARATORS.contains(&c) || matches!(c, ':' | '=' | '(');
        let key = self.take(rest.find(ends).unwrap_or(rest.len()));
        let value = match self.rest().chars().next() {
            Some(':' | '=') => {
                self.at += 1;
                // Parentheses protect separators.
                let mut depth = 0u32;
                let value = self.rest();
                let end = value.find(|c: char| {
                    match c {
                        '(' => depth += 1,
                        ')' => depth = depth.saturating_sub(1),
                        _ => {}
                    }
                    depth == 0 && SEPARATORS.contains(&c)
                });
                self.take(end.unwrap_or(value.len()))
            }
            Some('(') => {
                self.at += 1;
                let value = self.rest();
                let inner = self.take(value.find(')').unwrap_or(value.len()));
                self.at += usize::from(!self.rest().is_empty());
                inner
            }
            _ => "",
        };
        Some(Word { key, value, at })
    }
}

fn form(found: &str, wanted: &'static str) -> Why {
    Why::Form {
        found: found.chars().take(60).collect(),
        wanted,
    }
}

/// A number as C writes it, without octal, which nobody means.
fn number(text: &str, low: u64, high: u64) -> Result<u64> {
    let parsed = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16).ok(),
        None if text == "0" || !text.starts_with(['0', '+']) => text.parse().ok(),
        _ => None,
    };
    parsed
        .filter(|n| (low..=high).contains(n))
        .ok_or_else(|| Why::Number {
            found: text.chars().take(40).collect(),
            low,
            high,
        })
}

fn small(text: &str, low: u8, high: u8) -> Result<u8> {
    // The range is that of the type.
    Ok(number(text, low.into(), high.into())? as u8)
}

/// The number of a table or a port, which `ovs-ofctl` takes in decimal alone.
fn decimal(text: &str, low: u16, high: u16) -> Result<u16> {
    match text.bytes().all(|b| b.is_ascii_digit()) {
        true => short(text, low, high),
        false => Err(form(text, "a decimal number")),
    }
}

fn short(text: &str, low: u16, high: u16) -> Result<u16> {
    Ok(number(text, low.into(), high.into())? as u16)
}

fn mac(text: &str) -> Result<MacAddr> {
    let wrong = || form(text, "a MAC address such as 52:54:00:00:00:01");
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next().filter(|p| matches!(p.len(), 1 | 2));
        let part = part.filter(|p| p.bytes().all(|b| b.is_ascii_hexdigit()));
        *byte = u8::from_str_radix(part.ok_or_else(wrong)?, 16).map_err(|_| wrong())?;
    }
    match parts.next() {
        None => Ok(MacAddr(bytes)),
        Some(_) => Err(wrong()),
    }
}

fn v4(text: &str) -> Result<[u8; 4]> {
    let parsed: Option<Ipv4Addr> = text.parse().ok();
    Ok(parsed
        .ok_or_else(|| form(text, "an IPv4 address"))?
        .octets())
}

fn v6(text: &str) -> Result<[u8; 16]> {
    let parsed: Option<Ipv6Addr> = text.parse().ok();
    Ok(parsed
        .ok_or_else(|| form(text, "an IPv6 address"))?
        .octets())
}

/// `length` bits set from the left, in the last `bits` of sixteen bytes.
fn prefix(length: u8, bits: u8) -> [u8; 16] {
    let all = u128::MAX >> (128 - u32::from(bits));
    let low = u32::from(bits - length);
    (all & u128::MAX.checked_shl(low).unwrap_or(0)).to_be_bytes()
}

fn v4_masked(text: &str) -> Result<([u8; 16], [u8; 16])> {
    let (address, mask) = text.split_once('/').unwrap_or((text, "32"));
    let mask = match mask.contains('.') {
        true => ipv4(v4(mask)?),
        false => prefix(small(mask, 0, 32)?, 32),
    };
    Ok((ipv4(v4(address)?), mask))
}

fn v6_masked(text: &str) -> Result<([u8; 16], [u8; 16])> {
    let (address, mask) = text.split_once('/').unwrap_or((text, "128"));
    let mask = match mask.contains(':') {
        true => v6(mask)?,
        false => prefix(small(mask, 0, 128)?, 128),
    };
    Ok((v6(address)?, mask))
}

fn mac_masked(text: &str) -> Result<(MacAddr, MacAddr)> {
    match text.split_once('/') {
        Some((address, mask)) => Ok((mac(address)?, mac(mask)?)),
        None => Ok((mac(text)?, MacAddr::BROADCAST)),
    }
}

fn short_masked(text: &str, high: u16) -> Result<(u16, u16)> {
    match text.split_once('/') {
        Some((value, mask)) => Ok((short(value, 0, high)?, short(mask, 0, high)?)),
        None => Ok((short(text, 0, high)?, high)),
    }
}

fn port(text: &str, names: Names<'_>) -> Result<PortId> {
    let name = text.trim_matches('"');
    if name.eq_ignore_ascii_case("local") {
        return Ok(PortId::LOCAL);
    }
    let first_digit = name.starts_with(|c: char| c.is_ascii_digit());
    names(name).map_or_else(
        || match first_digit {
            true => decimal(name, 1, PortId::MAX.0).map(PortId),
            false => Err(form(text, "the name or number of a port")),
        },
        Ok,
    )
}

/// TCP's flags by name, from bit 0.
const TCP_FLAGS: [&str; 12] = [
    "fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr", "ns", "[200]", "[400]", "[800]",
];
const TCP_FLAGS_ALL: u16 = 0xfff;

fn tcp_flags(text: &str) -> Result<(u16, u16)> {
    let flag = |name: &str| {
        let known = (0..).zip(TCP_FLAGS).find(|(_, n)| *n == name);
        known
            .map(|(bit, _): (u32, _)| 1u16 << bit)
            .ok_or_else(|| form(name, "a flag of TCP"))
    };
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return short_masked(text, TCP_FLAGS_ALL);
    }
    if !text.starts_with(['+', '-']) {
        let flags = text
            .split('|')
            .try_fold(0, |all, name| Ok(all | flag(name)?))?;
        return Ok((flags, TCP_FLAGS_ALL));
    }
    let (mut value, mut mask) = (0, 0);
    let mut rest = text;
    while let Some(sign) = rest.chars().next() {
        rest = rest.get(1..).unwrap_or_default();
        let name = rest.get(..rest.find(['+', '-']).unwrap_or(rest.len()));
        let name = name.unwrap_or_default();
        rest = rest.get(name.len()..).unwrap_or_default();
        let bit = flag(name)?;
        if mask & bit != 0 {
            return Err(Why::Twice);
        }
        mask |= bit;
        if sign == '+' {
            value |= bit;
        }
    }
    Ok((value, mask))
}

/// What shorthands stand for.
const SHORTHANDS: [(&str, u16, Option<u8>); 15] = [
    ("ip", ether::IPV4, None),
    ("ip4", ether::IPV4, None),
    ("ipv4", ether::IPV4, None),
    ("ip6", ether::IPV6, None),
    ("ipv6", ether::IPV6, None),
    ("arp", ether::ARP, None),
    ("rarp", ether::RARP, None),
    ("icmp", ether::IPV4, Some(proto::ICMP)),
    ("tcp", ether::IPV4, Some(proto::TCP)),
    ("udp", ether::IPV4, Some(proto::UDP)),
    ("sctp", ether::IPV4, Some(proto::SCTP)),
    ("icmp6", ether::IPV6, Some(proto::ICMPV6)),
    ("tcp6", ether::IPV6, Some(proto::TCP)),
    ("udp6", ether::IPV6, Some(proto::UDP)),
    ("sctp6", ether::IPV6, Some(proto::SCTP)),
];

/// What must be matched beside a field or before an action.
#[derive(Clone, Copy)]
enum Needs {
    Nothing,
    Ipv4,
    Ipv6,
    Ip,
    Arp,
    /// Any of the protocols with ports, or that one.
    Ports(Option<u8>),
    /// TCP or UDP, whose ports can be changed.
    Changeable(Option<u8>),
    Icmp,
    /// A neighbour message: that type, or either.
    Neighbour(Option<u16>),
    Tagged,
}

impl Needs {
    /// What is missing, of a match and the knowledge that there is a tag.
    fn check(self, of: &Match, tagged: bool) -> Result<()> {
        let (kind, protocol) = (of.dl_type(), of.ip_proto());
        let icmp6 = kind == Some(ether::IPV6) && protocol == Some(proto::ICMPV6);
        let of_transport = match self {
            Self::Ports(_) | Self::Changeable(_) | Self::Icmp | Self::Neighbour(_) => true,
            Self::Nothing | Self::Ipv4 | Self::Ipv6 | Self::Ip | Self::Arp | Self::Tagged => false,
        };
        if of_transport && of.key().nw_frag & FRAG_LATER != 0 {
            return Err(Why::Needs("other fragments than later ones"));
        }
        let (met, what) = match self {
            Self::Nothing => (true, ""),
            Self::Ipv4 => (kind == Some(ether::IPV4), "ip"),
            Self::Ipv6 => (kind == Some(ether::IPV6), "ipv6"),
            Self::Ip => (of.is_ip(), "ip or ipv6"),
            Self::Arp => (
                matches!(kind, Some(ether::ARP | ether::RARP)),
                "arp or rarp",
            ),
            Self::Ports(Some(proto::TCP)) | Self::Changeable(Some(proto::TCP)) => {
                (protocol == Some(proto::TCP), "tcp or tcp6")
            }
            Self::Ports(Some(proto::UDP)) | Self::Changeable(Some(_)) => {
                (protocol == Some(proto::UDP), "udp or udp6")
            }
            Self::Ports(Some(_)) => (protocol == Some(proto::SCTP), "sctp or sctp6"),
            Self::Ports(None) => (
                matches!(protocol, Some(proto::TCP | proto::UDP | proto::SCTP)),
                "tcp, udp, sctp, tcp6, udp6 or sctp6",
            ),
            Self::Changeable(None) => (
                matches!(protocol, Some(proto::TCP | proto::UDP)),
                "tcp, udp, tcp6 or udp6",
            ),
            Self::Icmp => (
                icmp6 || (kind == Some(ether::IPV4) && protocol == Some(proto::ICMP)),
                "icmp or icmp6",
            ),
            Self::Neighbour(wanted) => {
                let (key, mask) = (of.key(), of.mask());
                let typed = mask.tp_src == 0xffff && mask.tp_dst == 0xffff && key.tp_dst == 0;
                let right = match wanted {
                    Some(wanted) => key.tp_src == wanted,
                    None => matches!(key.tp_src, 135 | 136),
                };
                let what = match wanted {
                    Some(135) => "icmp6,icmp_type=135,icmp_code=0",
                    Some(_) => "icmp6,icmp_type=136,icmp_code=0",
                    None => "icmp6,icmp_type=135,icmp_code=0 or icmp6,icmp_type=136,icmp_code=0",
                };
                (icmp6 && typed && right, what)
            }
            Self::Tagged => (tagged, "dl_vlan, or push_vlan before it"),
        };
        if met { Ok(()) } else { Err(Why::Needs(what)) }
    }
}

/// A field's share of a match.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Part {
    key: FlowKey,
    mask: FlowKey,
}

impl Part {
    /// Sets one field of the key and of the mask.
    fn of<T>(field: fn(&mut FlowKey) -> &mut T, (value, mask): (T, T)) -> Self {
        let mut part = Self::default();
        *field(&mut part.key) = value;
        *field(&mut part.mask) = mask;
        part
    }

    fn tci((value, mask): (u16, u16)) -> Self {
        Self::of(
            |k| &mut k.vlans,
            (
                [
                    Vlan {
                        tpid: 0,
                        tci: value,
                    },
                    Vlan::NONE,
                ],
                [Vlan { tpid: 0, tci: mask }, Vlan::NONE],
            ),
        )
    }

    fn dl_type(kind: u16) -> Self {
        Self::of(|k| &mut k.dl_type, (kind, 0xffff))
    }

    fn nw_proto(protocol: u8) -> Self {
        Self::of(|k| &mut k.nw_proto, (protocol, 0xff))
    }

    /// Whether both look at the same bits; that there is a tag may be said often, if not denied.
    fn meets(&self, other: &Self) -> bool {
        let mut mine = self.mask;
        let ([outer, _], [own, _], [its, _]) = (&mut mine.vlans, self.key.vlans, other.key.vlans);
        if own.present() == its.present() {
            outer.tci &= !Vlan::PRESENT;
        }
        mine.masked(&other.mask) != FlowKey::default()
    }
}

/// A match while its text is read.
#[derive(Default)]
struct Draft<'a> {
    parts: Vec<Part>,
    needs: Vec<(Word<'a>, Needs)>,
}

impl<'a> Draft<'a> {
    fn put(&mut self, part: Part) -> Result<()> {
        if self.parts.contains(&part) {
            return Ok(());
        }
        if self.parts.iter().any(|p| p.meets(&part)) {
            return Err(Why::Twice);
        }
        self.parts.push(part);
        Ok(())
    }

    /// Takes a word that is a field or a shorthand; false if it is neither.
    fn take(&mut self, word: Word<'a>, names: Names<'_>) -> Result<bool> {
        let shorthand = SHORTHANDS.iter().find(|(name, ..)| *name == word.key);
        if let Some(&(_, kind, protocol)) = shorthand {
            if !word.value.is_empty() {
                return Err(Why::Superfluous(word.value.chars().take(40).collect()));
            }
            self.put(Part::dl_type(kind))?;
            if let Some(protocol) = protocol {
                self.put(Part::nw_proto(protocol))?;
            }
            return Ok(true);
        }
        let Some((part, needs)) = field(word.key, word.value, names)? else {
            return Ok(false);
        };
        let tag = |p: &Part| p.mask.vlans != [Vlan::NONE; 2];
        if word.key == "vlan_tci" && self.parts.iter().any(|p| tag(p) && *p != part) {
            return Err(Why::Twice);
        }
        self.put(part)?;
        self.needs.push((word, needs));
        Ok(true)
    }

    /// The match; of a `frame`, where the fields of headers that it has not are told as zero.
    fn finish(self, frame: bool) -> Result<Match, TextError> {
        let (mut key, mut mask) = (FlowKey::default(), FlowKey::default());
        for part in &self.parts {
            key = key.joined(&part.key);
            mask = mask.joined(&part.mask);
        }
        let matching = Match::new(&key, &mask);
        let mut asked = matching;
        if frame {
            asked.forget_fragments();
        }
        for (word, needs) in self.needs {
            let needs = match needs {
                Needs::Neighbour(_) if frame => Needs::Neighbour(None),
                needs => needs,
            };
            needs
                .check(&asked, asked.is_tagged())
                .map_err(|why| word.fail(why))?;
        }
        Ok(matching)
    }
}

/// Reads a match field: its share of the match, and what else must be matched.
fn field(name: &str, value: &str, names: Names<'_>) -> Result<Option<(Part, Needs)>> {
    let unmasked = || match value.contains('/') {
        true => Err(Why::Mask),
        false => Ok(value),
    };
    let low = |text: &str| small(text, 0, 0xff);
    let of_transport = |protocol: u8| match name.rsplit_once('_') {
        Some((_, "src")) => (port_field(true, value), Needs::Ports(Some(protocol))),
        _ => (port_field(false, value), Needs::Ports(Some(protocol))),
    };
    let (part, needs) = match name {
        "in_port" => {
            let port = port(unmasked()?, names)?;
            (
                Part::of(|k| &mut k.in_port, (port, PortId::NONE)),
                Needs::Nothing,
            )
        }
        "dl_src" | "eth_src" => (
            Part::of(|k| &mut k.dl_src, mac_masked(value)?),
            Needs::Nothing,
        ),
        "dl_dst" | "eth_dst" => (
            Part::of(|k| &mut k.dl_dst, mac_masked(value)?),
            Needs::Nothing,
        ),
        "dl_type" | "eth_type" => (
            Part::dl_type(short(unmasked()?, 0, 0xffff)?),
            Needs::Nothing,
        ),
        "dl_vlan" => {
            let tci = match number(unmasked()?, 0, 0xffff)? {
                0xffff => (0, 0x1fff),
                _ => (short(value, 0, 0xfff)? | Vlan::PRESENT, 0x1fff),
            };
            (Part::tci(tci), Needs::Nothing)
        }
        "dl_vlan_pcp" | "vlan_pcp" => {
            let tci = u16::from(small(unmasked()?, 0, 7)?) << 13 | Vlan::PRESENT;
            (Part::tci((tci, 0xe000 | Vlan::PRESENT)), Needs::Nothing)
        }
        "vlan_tci" => {
            let (tci, mask) = short_masked(value, 0xffff)?;
            let tci = tci & mask;
            if mask & Vlan::PRESENT == 0 || tci & Vlan::PRESENT != 0 {
                (Part::tci((tci, mask)), Needs::Nothing)
            } else if tci == 0 {
                // Where there is no tag, all of it is zero.
                (Part::tci((0, mask & 0x1fff)), Needs::Nothing)
            } else {
                return Err(form(value, "a TCI with bit 12, or zero for no tag"));
            }
        }
        "nw_src" | "ip_src" => (Part::of(|k| &mut k.nw_src, v4_masked(value)?), Needs::Ipv4),
        "nw_dst" | "ip_dst" => (Part::of(|k| &mut k.nw_dst, v4_masked(value)?), Needs::Ipv4),
        "ipv6_src" => (Part::of(|k| &mut k.nw_src, v6_masked(value)?), Needs::Ipv6),
        "ipv6_dst" => (Part::of(|k| &mut k.nw_dst, v6_masked(value)?), Needs::Ipv6),
        "nw_proto" | "ip_proto" => (Part::nw_proto(low(unmasked()?)?), Needs::Ip),
        "nw_tos" => {
            let tos = low(unmasked()?)?;
            if tos & 3 != 0 {
                return Err(form(value, "a DSCP in the upper six bits"));
            }
            (Part::of(|k| &mut k.nw_tos, (tos, 0xfc)), Needs::Ip)
        }
        "ip_dscp" => {
            let dscp = small(unmasked()?, 0, 63)?;
            (Part::of(|k| &mut k.nw_tos, (dscp << 2, 0xfc)), Needs::Ip)
        }
        "nw_ecn" | "ip_ecn" => {
            let ecn = small(unmasked()?, 0, 3)?;
            (Part::of(|k| &mut k.nw_tos, (ecn, 3)), Needs::Ip)
        }
        "nw_ttl" => (
            Part::of(|k| &mut k.nw_ttl, (low(unmasked()?)?, 0xff)),
            Needs::Ip,
        ),
        "ip_frag" | "nw_frag" => {
            let known = FRAGMENTS.iter().find(|(name, ..)| *name == value);
            let wanted = "no, yes, first, later or not_later";
            let &(_, frag, mask) = known.ok_or_else(|| form(value, wanted))?;
            (Part::of(|k| &mut k.nw_frag, (frag, mask)), Needs::Ip)
        }
        "arp_op" => (Part::nw_proto(low(unmasked()?)?), Needs::Arp),
        "arp_spa" => (Part::of(|k| &mut k.nw_src, v4_masked(value)?), Needs::Arp),
        "arp_tpa" => (Part::of(|k| &mut k.nw_dst, v4_masked(value)?), Needs::Arp),
        "arp_sha" => (Part::of(|k| &mut k.arp_sha, mac_masked(value)?), Needs::Arp),
        "arp_tha" => (Part::of(|k| &mut k.arp_tha, mac_masked(value)?), Needs::Arp),
        "tp_src" => (port_field(true, value)?, Needs::Ports(None)),
        "tp_dst" => (port_field(false, value)?, Needs::Ports(None)),
        "tcp_src" | "tcp_dst" => {
            let (part, needs) = of_transport(proto::TCP);
            (part?, needs)
        }
        "udp_src" | "udp_dst" => {
            let (part, needs) = of_transport(proto::UDP);
            (part?, needs)
        }
        "sctp_src" | "sctp_dst" => {
            let (part, needs) = of_transport(proto::SCTP);
            (part?, needs)
        }
        "tcp_flags" => {
            let flags = tcp_flags(value)?;
            (
                Part::of(|k| &mut k.tcp_flags, flags),
                Needs::Ports(Some(proto::TCP)),
            )
        }
        "icmp_type" => {
            let kind = low(unmasked()?)?.into();
            (Part::of(|k| &mut k.tp_src, (kind, 0xffff)), Needs::Icmp)
        }
        "icmp_code" => {
            let code = low(unmasked()?)?.into();
            (Part::of(|k| &mut k.tp_dst, (code, 0xffff)), Needs::Icmp)
        }
        "nd_target" => {
            let target = v6_masked(value)?;
            (
                Part::of(|k| &mut k.nd_target, target),
                Needs::Neighbour(None),
            )
        }
        "nd_sll" => {
            let needs = Needs::Neighbour(Some(135));
            (Part::of(|k| &mut k.arp_sha, mac_masked(value)?), needs)
        }
        "nd_tll" => {
            let needs = Needs::Neighbour(Some(136));
            (Part::of(|k| &mut k.arp_tha, mac_masked(value)?), needs)
        }
        _ => return Ok(None),
    };
    let part = Part {
        key: part.key.masked(&part.mask),
        ..part
    };
    if value.is_empty() {
        Err(Why::Missing)
    } else {
        Ok(Some((part, needs)))
    }
}

/// Which fragments: name, value, mask.
const FRAGMENTS: [(&str, u8, u8); 5] = [
    ("no", 0, FRAG_ANY | FRAG_LATER),
    ("yes", FRAG_ANY, FRAG_ANY),
    ("first", FRAG_ANY, FRAG_ANY | FRAG_LATER),
    ("later", FRAG_ANY | FRAG_LATER, FRAG_ANY | FRAG_LATER),
    ("not_later", 0, FRAG_LATER),
];

fn port_field(source: bool, value: &str) -> Result<Part> {
    let value = short_masked(value, 0xffff)?;
    Ok(match source {
        true => Part::of(|k| &mut k.tp_src, value),
        false => Part::of(|k| &mut k.tp_dst, value),
    })
}

/// How many tags are known to be there after some actions.
#[derive(Clone, Copy)]
struct Tags(u8);

impl Tags {
    fn at_first(matching: &Match) -> Self {
        Self(matching.is_tagged().into())
    }

    fn after(self, action: &Action) -> Self {
        Self(match action {
            Action::PushVlan(_) => self.0.saturating_add(1),
            Action::PopVlan => self.0.saturating_sub(1),
            Action::VlanVid(_) | Action::VlanPcp(_) => self.0.max(1),
            _ => self.0,
        })
    }
}

/// Reads actions; `table` is the flow's, for the rule that flows lead to later ones.
fn actions(
    words: Words<'_>,
    matching: &Match,
    table: u8,
    names: Names<'_>,
) -> Result<Vec<Action>, TextError> {
    let mut found: Vec<Action> = Vec::new();
    let mut tags = Tags::at_first(matching);
    let mut dropped: Option<Word<'_>> = None;
    let mut count = 0usize;
    for word in words {
        let fail = |why| word.fail(why);
        count += 1;
        if let Some(drop) = dropped {
            return Err(drop.fail(Why::Alone));
        }
        if matches!(found.last(), Some(Action::Goto(_))) {
            return Err(fail(Why::Misplaced));
        }
        if word.key == "drop" {
            if count > 1 {
                return Err(fail(Why::Alone));
            }
            dropped = Some(word);
            continue;
        }
        let action = action(word, matching, tags, table, names).map_err(fail)?;
        if matches!(action, Action::Meter(_)) && !found.is_empty() {
            return Err(fail(Why::Order("first")));
        }
        tags = tags.after(&action);
        found.push(action);
    }
    Ok(found)
}

/// Reads one action.
fn action(
    word: Word<'_>,
    matching: &Match,
    tags: Tags,
    table: u8,
    names: Names<'_>,
) -> Result<Action> {
    let Word { key, value, .. } = word;
    let needs = |needs: Needs| needs.check(matching, tags.0 > 0);
    let plain = |action: Action| match value {
        "" => Ok(action),
        _ => Err(Why::Superfluous(value.chars().take(40).collect())),
    };
    let later = |text: &str| {
        let to = decimal(text, 0, LAST_TABLE.into())? as u8;
        if to > table {
            Ok(to)
        } else {
            Err(Why::Backwards { from: table, to })
        }
    };
    let output = |text: &str| -> Result<Action> {
        let same = |name: &str| text.eq_ignore_ascii_case(name);
        Ok(match () {
            () if same("normal") => Action::Normal,
            () if same("flood") => Action::Flood,
            () if same("all") => Action::All,
            () if same("in_port") => Action::InPort,
            () => Action::Output(port(text, names)?),
        })
    };
    let missing = value.is_empty()
        && (key.starts_with("mod_")
            || matches!(
                key,
                "output" | "push_vlan" | "set_field" | "meter" | "goto_table"
            ));
    if missing {
        return Err(Why::Missing);
    }
    Ok(match key {
        "output" => output(value)?,
        "strip_vlan" | "pop_vlan" => plain(Action::PopVlan)?,
        "push_vlan" if tags.0 >= 2 => return Err(Why::ThirdTag),
        "push_vlan" => match short(value, 0, 0xffff)? {
            tpid @ (ether::VLAN | ether::SERVICE_VLAN) => Action::PushVlan(tpid),
            _ => return Err(form(value, "0x8100 or 0x88a8")),
        },
        "mod_vlan_vid" => Action::VlanVid(short(value, 0, 4094)?),
        "mod_vlan_pcp" => Action::VlanPcp(small(value, 0, 7)?),
        "mod_dl_src" => Action::Set(Field::DlSrc(mac(value)?)),
        "mod_dl_dst" => Action::Set(Field::DlDst(mac(value)?)),
        "mod_nw_src" | "mod_nw_dst" => {
            needs(Needs::Ipv4)?;
            let address = ipv4(v4(value)?);
            Action::Set(match key {
                "mod_nw_src" => Field::NwSrc(address),
                _ => Field::NwDst(address),
            })
        }
        "mod_nw_tos" => {
            needs(Needs::Ip)?;
            match small(value, 0, 0xff)? {
                tos if tos & 3 == 0 => Action::Dscp(tos >> 2),
                _ => return Err(form(value, "a DSCP in the upper six bits")),
            }
        }
        "mod_nw_ecn" => {
            needs(Needs::Ip)?;
            Action::Ecn(small(value, 0, 3)?)
        }
        "mod_nw_ttl" => {
            needs(Needs::Ip)?;
            Action::Set(Field::NwTtl(small(value, 0, 0xff)?))
        }
        "mod_tp_src" | "mod_tp_dst" => {
            needs(Needs::Changeable(None))?;
            let port = short(value, 0, 0xffff)?;
            Action::Set(match key {
                "mod_tp_src" => Field::TpSrc(port),
                _ => Field::TpDst(port),
            })
        }
        "set_field" => {
            let wanted = "VALUE->FIELD";
            let (value, field) = value.split_once("->").ok_or_else(|| form(value, wanted))?;
            let (action, what) = set_field(field, value)?;
            needs(what)?;
            action
        }
        "dec_ttl" => {
            needs(Needs::Ip)?;
            plain(Action::DecTtl)?
        }
        "meter" => Action::Meter(number(value, 1, MAX_METER.into())? as u32),
        "goto_table" => Action::Goto(later(value)?),
        "resubmit" => {
            let (from, to) = value.split_once(',').unwrap_or((value, ""));
            let port = match from.trim() {
                "" => None,
                from if from.eq_ignore_ascii_case("in_port") => None,
                from => Some(port(from, names)?),
            };
            let table = match to.trim() {
                "" => {
                    return Err(Why::Backwards {
                        from: table,
                        to: table,
                    });
                }
                to => later(to)?,
            };
            Action::Resubmit { port, table }
        }
        _ if value.is_empty() => output(key).map_err(|_| Why::Unknown)?,
        _ => return Err(Why::Unknown),
    })
}

/// `set_field`: the action, and what it needs.
fn set_field(name: &str, value: &str) -> Result<(Action, Needs)> {
    let low = || small(value, 0, 0xff);
    let port = || short(value, 0, 0xffff);
    let tcp = Needs::Changeable(Some(proto::TCP));
    let udp = Needs::Changeable(Some(proto::UDP));
    if value.contains('/') {
        return Err(Why::Mask);
    }
    Ok(match name {
        "eth_src" | "dl_src" => (Action::Set(Field::DlSrc(mac(value)?)), Needs::Nothing),
        "eth_dst" | "dl_dst" => (Action::Set(Field::DlDst(mac(value)?)), Needs::Nothing),
        "vlan_vid" => {
            let tci = short(value, Vlan::PRESENT, Vlan::PRESENT | 4094)?;
            (Action::VlanVid(tci & 0xfff), Needs::Tagged)
        }
        "vlan_pcp" | "dl_vlan_pcp" => (Action::VlanPcp(small(value, 0, 7)?), Needs::Tagged),
        "ip_src" | "nw_src" => (Action::Set(Field::NwSrc(ipv4(v4(value)?))), Needs::Ipv4),
        "ip_dst" | "nw_dst" => (Action::Set(Field::NwDst(ipv4(v4(value)?))), Needs::Ipv4),
        "ipv6_src" => (Action::Set(Field::NwSrc(v6(value)?)), Needs::Ipv6),
        "ipv6_dst" => (Action::Set(Field::NwDst(v6(value)?)), Needs::Ipv6),
        "ip_dscp" => (Action::Dscp(small(value, 0, 63)?), Needs::Ip),
        "nw_tos" => match low()? {
            tos if tos & 3 == 0 => (Action::Dscp(tos >> 2), Needs::Ip),
            _ => return Err(form(value, "a DSCP in the upper six bits")),
        },
        "nw_ecn" | "ip_ecn" => (Action::Ecn(small(value, 0, 3)?), Needs::Ip),
        "nw_ttl" => (Action::Set(Field::NwTtl(low()?)), Needs::Ip),
        "tcp_src" => (Action::Set(Field::TpSrc(port()?)), tcp),
        "tcp_dst" => (Action::Set(Field::TpDst(port()?)), tcp),
        "udp_src" => (Action::Set(Field::TpSrc(port()?)), udp),
        "udp_dst" => (Action::Set(Field::TpDst(port()?)), udp),
        "arp_op" => (Action::Set(Field::ArpOp(low()?)), Needs::Arp),
        "arp_spa" => (Action::Set(Field::ArpSpa(v4(value)?)), Needs::Arp),
        "arp_tpa" => (Action::Set(Field::ArpTpa(v4(value)?)), Needs::Arp),
        "arp_sha" => (Action::Set(Field::ArpSha(mac(value)?)), Needs::Arp),
        "arp_tha" => (Action::Set(Field::ArpTha(mac(value)?)), Needs::Arp),
        _ => return Err(form(name, "a field that can be set")),
    })
}

impl Command {
    const NAMES: [(&'static str, Self); 5] = [
        ("add", Self::Add),
        ("modify", Self::Modify),
        ("modify_strict", Self::ModifyStrict),
        ("delete", Self::Delete),
        ("delete_strict", Self::DeleteStrict),
    ];

    const fn has_actions(self) -> bool {
        !matches!(self, Self::Delete | Self::DeleteStrict)
    }
}

impl FlowMod {
    /// Reads a line that begins with the name of a command (`add`, `modify`, `modify_strict`,
    /// `delete`, `delete_strict`), or else adds a flow.
    ///
    /// # Errors
    /// The text is not understood, or would not be obeyed as it stands.
    pub fn parse(line: &str, names: Names<'_>) -> Result<Self, TextError> {
        let mut words = Words { text: line, at: 0 };
        let command = words.next().and_then(|first| {
            let bare = first.value.is_empty();
            let known = Command::NAMES.iter().find(|(name, _)| *name == first.key);
            known.filter(|_| bare).map(|(_, command)| *command)
        });
        let at = if command.is_some() { words.at } else { 0 };
        Self::parse_as(
            command.unwrap_or(Command::Add),
            Words { text: line, at },
            names,
        )
    }

    /// Reads what stands behind the name of a command.
    ///
    /// # Errors
    /// As [`FlowMod::parse`].
    pub fn parse_command(
        command: Command,
        text: &str,
        names: Names<'_>,
    ) -> Result<Self, TextError> {
        Self::parse_as(command, Words { text, at: 0 }, names)
    }

    fn parse_as(
        command: Command,
        mut words: Words<'_>,
        names: Names<'_>,
    ) -> Result<Self, TextError> {
        let mut draft = Draft::default();
        let mut out = Self {
            command,
            table: None,
            priority: DEFAULT_PRIORITY,
            cookie: None,
            cookie_match: (0, 0),
            out_port: None,
            matching: Match::default(),
            actions: Vec::new(),
        };
        let mut behind = None;
        while let Some(word) = words.next() {
            if matches!(word.key, "actions" | "action") {
                if !command.has_actions() {
                    return Err(word.fail(Why::Misplaced));
                }
                // The value, with separators and all, up to the end.
                behind = Some(Words {
                    text: words.text,
                    at: (word.at + word.key.len() + 1).min(words.text.len()),
                });
                break;
            }
            let taken = out.word(word, names);
            let taken = taken.and_then(|taken| Ok(taken || draft.take(word, names)?));
            match taken {
                Ok(true) => {}
                Ok(false) => return Err(word.fail(Why::Unknown)),
                Err(why) => return Err(word.fail(why)),
            }
        }
        out.matching = draft.finish(false)?;
        if let Some(behind) = behind {
            out.actions = actions(behind, &out.matching, out.table.unwrap_or(0), names)?;
        } else if command.has_actions() {
            let end = Word {
                key: "",
                value: "",
                at: words.at,
            };
            return Err(end.fail(Why::NoActions));
        }
        Ok(out)
    }

    /// Takes a word that is no match field; false if it is not one of those.
    fn word(&mut self, word: Word<'_>, names: Names<'_>) -> Result<bool> {
        let value = word.value;
        let all = u64::MAX;
        match word.key {
            "table" => {
                let table = decimal(value, 0, 255)? as u8;
                self.table = (table <= LAST_TABLE).then_some(table);
            }
            "priority" if matches!(self.command, Command::Modify | Command::Delete) => {
                return Err(Why::Misplaced);
            }
            "priority" => self.priority = short(value, 0, 0xffff)?,
            "cookie" => match (value.split_once('/'), self.command) {
                (Some((cookie, mask)), command) if command != Command::Add => {
                    let mask = if mask == "-1" {
                        all
                    } else {
                        number(mask, 0, all)?
                    };
                    self.cookie_match = (number(cookie, 0, all)?, mask);
                }
                (None, command) if command.has_actions() => {
                    self.cookie = Some(number(value, 0, all - 1)?);
                }
                _ => return Err(form(value, "COOKIE to set, COOKIE/MASK to select by")),
            },
            "out_port" if !self.command.has_actions() => self.out_port = Some(port(value, names)?),
            _ => return Ok(false),
        }
        if value.is_empty() {
            Err(Why::Missing)
        } else {
            Ok(true)
        }
    }
}

impl Flow {
    /// Reads a flow, as `ovs-ofctl add-flow` does.
    ///
    /// # Errors
    /// See [`FlowMod::parse`].
    pub fn parse(text: &str, names: Names<'_>) -> Result<Self, TextError> {
        FlowMod::parse_command(Command::Add, text, names).map(Self::from)
    }
}

impl From<FlowMod> for Flow {
    fn from(add: FlowMod) -> Self {
        Self {
            table: add.table.unwrap_or(0),
            priority: add.priority,
            cookie: add.cookie.unwrap_or(0),
            matching: add.matching,
            actions: add.actions,
        }
    }
}

impl MeterConfig {
    /// Reads the text of a meter, as `ovs-ofctl add-meter` has it:
    /// `meter=1,kbps,band=type=drop,rate=1000,burst_size=200`.
    ///
    /// # Errors
    /// A word that is not understood, a number out of range, or no number or rate.
    pub fn parse(text: &str) -> Result<Self, TextError> {
        let (mut id, mut rate, mut burst, mut frames) = (None, None, None, false);
        for word in (Words { text, at: 0 }) {
            let figure = |high: u32| number(word.value, 1, high.into());
            // `band=type=drop` begins the band; what follows is the band's.
            let taken = match (word.key, word.value) {
                ("meter", _) => figure(MAX_METER).map(|n| id = Some(n as u32)),
                ("rate", _) => figure(u32::MAX).map(|n| rate = Some(n)),
                ("burst_size", _) => figure(u32::MAX).map(|n| burst = Some(n)),
                ("kbps" | "pktps", "") => {
                    frames = word.key == "pktps";
                    Ok(())
                }
                ("burst" | "stats", "") => Ok(()),
                ("band" | "bands", "type=drop") | ("type", "drop") => Ok(()),
                ("band" | "bands" | "type", value) => Err(form(value, "type=drop")),
                _ => Err(Why::Unknown),
            };
            taken.map_err(|why| word.fail(why))?;
        }
        let missing = |key| {
            let at = text.len();
            Word { key, value: "", at }.fail(Why::Missing)
        };
        let rate = rate.ok_or_else(|| missing("rate"))?;
        let scale = if frames { 1 } else { 1000 };
        Ok(Self {
            id: id.ok_or_else(|| missing("meter"))?,
            frames,
            rate: rate * scale,
            // Without a size, a second's worth.
            burst: burst.unwrap_or(rate) * scale,
        })
    }
}

/// Reads a frame given as a flow, for a trace: every field that is named has that value, every
/// other is zero.
///
/// # Errors
/// As for a match; and no field may be masked.
pub fn parse_key(text: &str, names: Names<'_>) -> Result<FlowKey, TextError> {
    let mut draft = Draft::default();
    for word in (Words { text, at: 0 }) {
        if word.value.contains('/') && word.key != "vlan_tci" {
            return Err(word.fail(Why::Mask));
        }
        match draft.take(word, names) {
            Ok(true) => {}
            Ok(false) => return Err(word.fail(Why::Unknown)),
            Err(why) => return Err(word.fail(why)),
        }
    }
    let mut key = *draft.finish(true)?.key();
    let [outer, _] = &mut key.vlans;
    if outer.present() {
        outer.tpid = ether::VLAN;
    } else {
        *outer = Vlan::NONE;
    }
    Ok(key)
}

/// Joins parts with commas.
struct List<'a, 'b> {
    to: &'a mut fmt::Formatter<'b>,
    first: bool,
}

impl List<'_, '_> {
    fn item(&mut self, what: fmt::Arguments<'_>) -> fmt::Result {
        if !core::mem::take(&mut self.first) {
            self.to.write_char(',')?;
        }
        self.to.write_fmt(what)
    }

    fn mac(&mut self, name: &str, value: MacAddr, mask: MacAddr) -> fmt::Result {
        match mask {
            MacAddr([0, 0, 0, 0, 0, 0]) => Ok(()),
            MacAddr::BROADCAST => self.item(format_args!("{name}={value}")),
            _ => self.item(format_args!("{name}={value}/{mask}")),
        }
    }

    fn v4(&mut self, name: &str, value: [u8; 16], mask: [u8; 16]) -> fmt::Result {
        let part = |[.., a, b, c, d]: [u8; 16]| Ipv4Addr::new(a, b, c, d);
        let (value, mask) = (part(value), part(mask));
        let bits = mask.to_bits();
        match (bits, bits.leading_ones() + bits.trailing_zeros()) {
            (0, _) => Ok(()),
            (u32::MAX, _) => self.item(format_args!("{name}={value}")),
            (_, 32) => self.item(format_args!("{name}={value}/{}", bits.leading_ones())),
            _ => self.item(format_args!("{name}={value}/{mask}")),
        }
    }

    fn v6(&mut self, name: &str, value: [u8; 16], mask: [u8; 16]) -> fmt::Result {
        let bits = u128::from_be_bytes(mask);
        let value = V6(value);
        match (bits, bits.leading_ones() + bits.trailing_zeros()) {
            (0, _) => Ok(()),
            (u128::MAX, _) => self.item(format_args!("{name}={value}")),
            (_, 128) => self.item(format_args!("{name}={value}/{}", bits.leading_ones())),
            _ => self.item(format_args!("{name}={value}/{}", V6(mask))),
        }
    }

    fn short(&mut self, name: &str, value: u16, mask: u16) -> fmt::Result {
        match mask {
            0 => Ok(()),
            0xffff => self.item(format_args!("{name}={value}")),
            _ => self.item(format_args!("{name}={value:#x}/{mask:#x}")),
        }
    }
}

/// An IPv6 address as C's libraries write it: those of `::/96` end like IPv4 ones.
struct V6([u8; 16]);

impl fmt::Display for V6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d] if (a, b) != (0, 0) => {
                write!(f, "::{}", Ipv4Addr::new(a, b, c, d))
            }
            bytes => fmt::Display::fmt(&Ipv6Addr::from(bytes), f),
        }
    }
}

/// A port as flows name it.
struct Port(PortId);

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            PortId::LOCAL => f.write_str("LOCAL"),
            PortId(number) => write!(f, "{number}"),
        }
    }
}

fn write_tci(list: &mut List<'_, '_>, key: Vlan, mask: Vlan) -> fmt::Result {
    let (vid, pcp) = (mask.tci & 0xfff, mask.tci & 0xe000);
    let whole = (vid == 0 || vid == 0xfff) && (pcp == 0 || pcp == 0xe000) && (vid | pcp) != 0;
    if mask.tci & Vlan::PRESENT != 0 && key.present() && whole {
        if vid != 0 {
            list.item(format_args!("dl_vlan={}", key.id()))?;
        }
        if pcp != 0 {
            list.item(format_args!("dl_vlan_pcp={}", key.priority()))?;
        }
        return Ok(());
    }
    match mask.tci {
        0 => Ok(()),
        0xffff => list.item(format_args!("vlan_tci=0x{:04x}", key.tci)),
        mask => list.item(format_args!("vlan_tci=0x{:04x}/0x{mask:04x}", key.tci)),
    }
}

fn write_tcp_flags(list: &mut List<'_, '_>, value: u16, mask: u16) -> fmt::Result {
    let named = || {
        (0u32..)
            .zip(TCP_FLAGS)
            .map(|(bit, name)| (1u16 << bit, name))
    };
    let mut text = String::new();
    match mask {
        0 => return Ok(()),
        TCP_FLAGS_ALL if value == 0 => text.push('0'),
        TCP_FLAGS_ALL => {
            for (_, name) in named().filter(|(bit, _)| value & bit != 0) {
                if !text.is_empty() {
                    text.push('|');
                }
                text.push_str(name);
            }
        }
        _ => {
            for (bit, name) in named().filter(|(bit, _)| mask & bit != 0) {
                text.push(if value & bit != 0 { '+' } else { '-' });
                text.push_str(name);
            }
        }
    }
    list.item(format_args!("tcp_flags={text}"))
}

/// A match with the priority in front of it, where that is not the default.
struct Prefixed<'a>(u16, &'a Match);

impl fmt::Display for Prefixed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (key, mask) = (self.1.key(), self.1.mask());
        let mut list = List { to: f, first: true };
        let list = &mut list;
        if self.0 != DEFAULT_PRIORITY {
            list.item(format_args!("priority={}", self.0))?;
        }
        let kind = self.1.dl_type();
        let protocol = (mask.nw_proto != 0).then_some(key.nw_proto);
        let mut known = SHORTHANDS.iter().filter(|(name, of, _)| {
            // Of several names the shortest for IPv4, the longest for IPv6.
            Some(*of) == kind && !matches!(*name, "ip4" | "ipv4" | "ip6")
        });
        let exact = known
            .clone()
            .find(|(_, _, p)| p.is_some() && *p == protocol);
        let said = exact.or(known.find(|(_, _, p)| p.is_none()));
        if let Some((name, ..)) = said {
            list.item(format_args!("{name}"))?;
        }
        if mask.in_port != PortId::default() {
            list.item(format_args!("in_port={}", Port(key.in_port)))?;
        }
        let ([tag, _], [tag_mask, _]) = (key.vlans, mask.vlans);
        write_tci(list, tag, tag_mask)?;
        list.mac("dl_src", key.dl_src, mask.dl_src)?;
        list.mac("dl_dst", key.dl_dst, mask.dl_dst)?;
        if said.is_none() && mask.dl_type != 0 {
            list.item(format_args!("dl_type=0x{:04x}", key.dl_type))?;
        }
        let arp = matches!(kind, Some(ether::ARP | ether::RARP));
        match kind {
            Some(ether::IPV6) => {
                list.v6("ipv6_src", key.nw_src, mask.nw_src)?;
                list.v6("ipv6_dst", key.nw_dst, mask.nw_dst)?;
            }
            _ => {
                let (source, target) = match arp {
                    true => ("arp_spa", "arp_tpa"),
                    false => ("nw_src", "nw_dst"),
                };
                list.v4(source, key.nw_src, mask.nw_src)?;
                list.v4(target, key.nw_dst, mask.nw_dst)?;
            }
        }
        if let Some(protocol) = protocol
            && exact.is_none()
        {
            let name = if arp { "arp_op" } else { "nw_proto" };
            list.item(format_args!("{name}={protocol}"))?;
        }
        if arp {
            list.mac("arp_sha", key.arp_sha, mask.arp_sha)?;
            list.mac("arp_tha", key.arp_tha, mask.arp_tha)?;
        }
        if mask.nw_tos & 0xfc != 0 {
            list.item(format_args!("nw_tos={}", key.nw_tos & 0xfc))?;
        }
        if mask.nw_tos & 3 != 0 {
            list.item(format_args!("nw_ecn={}", key.nw_tos & 3))?;
        }
        if mask.nw_ttl != 0 {
            list.item(format_args!("nw_ttl={}", key.nw_ttl))?;
        }
        let mut fragments = FRAGMENTS.iter();
        if let Some((name, ..)) = fragments.find(|f| (f.1, f.2) == (key.nw_frag, mask.nw_frag)) {
            list.item(format_args!("nw_frag={name}"))?;
        }
        let icmp6 = (kind, protocol) == (Some(ether::IPV6), Some(proto::ICMPV6));
        if icmp6 || (kind, protocol) == (Some(ether::IPV4), Some(proto::ICMP)) {
            list.short("icmp_type", key.tp_src, mask.tp_src)?;
            list.short("icmp_code", key.tp_dst, mask.tp_dst)?;
        } else {
            list.short("tp_src", key.tp_src, mask.tp_src)?;
            list.short("tp_dst", key.tp_dst, mask.tp_dst)?;
        }
        if icmp6 {
            list.v6("nd_target", key.nd_target, mask.nd_target)?;
            list.mac("nd_sll", key.arp_sha, mask.arp_sha)?;
            list.mac("nd_tll", key.arp_tha, mask.arp_tha)?;
        }
        write_tcp_flags(list, key.tcp_flags, mask.tcp_flags)
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Prefixed(DEFAULT_PRIORITY, self).fmt(f)
    }
}

impl Flow {
    /// The priority, where it is not the default, and the match.
    #[must_use]
    pub fn match_text(&self) -> String {
        Prefixed(self.priority, &self.matching).to_string()
    }

    /// The actions.
    #[must_use]
    pub fn actions_text(&self) -> String {
        let parts: Vec<String> = self.actions_text_parts(true).collect();
        if parts.is_empty() {
            return String::from("drop");
        }
        parts.join(",")
    }

    /// Each action, or nothing if nobody listens.
    pub(crate) fn actions_text_parts(&self, wanted: bool) -> impl Iterator<Item = String> {
        let mut tags = Tags::at_first(&self.matching);
        let actions = self.actions.iter().take_while(move |_| wanted);
        actions.map(move |action| {
            let tagged = tags.0 > 0;
            tags = tags.after(action);
            let flow = self;
            Shown {
                flow,
                action,
                tagged,
            }
            .to_string()
        })
    }
}

/// An action of a flow, where it is known or not that there is a tag.
struct Shown<'a> {
    flow: &'a Flow,
    action: &'a Action,
    tagged: bool,
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tagged = self.tagged;
        let v6 = self.flow.matching.dl_type() == Some(ether::IPV6);
        let protocol = match self.flow.matching.ip_proto() {
            Some(proto::UDP) => "udp",
            _ => "tcp",
        };
        let address = |bytes: [u8; 16]| {
            let [.., a, b, c, d] = bytes;
            match v6 {
                true => V6(bytes).to_string(),
                false => Ipv4Addr::new(a, b, c, d).to_string(),
            }
        };
        let ip = if v6 { "ipv6" } else { "ip" };
        match *self.action {
            Action::Output(PortId::LOCAL) => write!(to, "LOCAL"),
            Action::Output(port) => write!(to, "output:{}", port.0),
            Action::InPort => write!(to, "IN_PORT"),
            Action::Normal => write!(to, "NORMAL"),
            Action::Flood => write!(to, "FLOOD"),
            Action::All => write!(to, "ALL"),
            Action::PushVlan(tpid) => write!(to, "push_vlan:{tpid:#06x}"),
            Action::PopVlan if tagged => write!(to, "pop_vlan"),
            Action::PopVlan => write!(to, "strip_vlan"),
            Action::VlanVid(id) if tagged => {
                write!(to, "set_field:{}->vlan_vid", id | Vlan::PRESENT)
            }
            Action::VlanVid(id) => write!(to, "mod_vlan_vid:{id}"),
            Action::VlanPcp(pcp) if tagged => write!(to, "set_field:{pcp}->vlan_pcp"),
            Action::VlanPcp(pcp) => write!(to, "mod_vlan_pcp:{pcp}"),
            Action::Dscp(dscp) => write!(to, "set_field:{dscp}->ip_dscp"),
            Action::Ecn(ecn) => write!(to, "set_field:{ecn}->nw_ecn"),
            Action::DecTtl => write!(to, "dec_ttl"),
            Action::Meter(meter) => write!(to, "meter:{meter}"),
            Action::Resubmit { port: None, table } => write!(to, "resubmit(,{table})"),
            Action::Resubmit {
                port: Some(port),
                table,
            } => write!(to, "resubmit({},{table})", Port(port)),
            Action::Goto(table) => write!(to, "goto_table:{table}"),
            Action::Set(field) => match field {
                Field::DlSrc(mac) => write!(to, "set_field:{mac}->eth_src"),
                Field::DlDst(mac) => write!(to, "set_field:{mac}->eth_dst"),
                Field::NwSrc(a) => write!(to, "set_field:{}->{ip}_src", address(a)),
                Field::NwDst(a) => write!(to, "set_field:{}->{ip}_dst", address(a)),
                Field::NwTos(tos) => write!(to, "set_field:{tos}->nw_tos"),
                Field::NwTtl(ttl) => write!(to, "set_field:{ttl}->nw_ttl"),
                Field::TpSrc(port) => write!(to, "set_field:{port}->{protocol}_src"),
                Field::TpDst(port) => write!(to, "set_field:{port}->{protocol}_dst"),
                Field::ArpOp(op) => write!(to, "set_field:{op}->arp_op"),
                Field::ArpSpa(a) => {
                    write!(to, "set_field:{}->arp_spa", Ipv4Addr::from(a))
                }
                Field::ArpTpa(a) => {
                    write!(to, "set_field:{}->arp_tpa", Ipv4Addr::from(a))
                }
                Field::ArpSha(mac) => write!(to, "set_field:{mac}->arp_sha"),
                Field::ArpTha(mac) => write!(to, "set_field:{mac}->arp_tha"),
            },
        }
    }
}

/// `table=1, cookie=0x5, priority=7,ip actions=NORMAL`, as `ovs-ofctl dump-flows` has it, without
/// what is zero.
impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.cookie != 0 {
            write!(f, "cookie={:#x}, ", self.cookie)?;
        }
        if self.table != 0 {
            write!(f, "table={}, ", self.table)?;
        }
        let matching = self.match_text();
        let gap = if matching.is_empty() { "" } else { " " };
        write!(f, "{matching}{gap}actions={}", self.actions_text())
    }
}
