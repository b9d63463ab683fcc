//! The fields that flows match and set: one table of what each is called, where it is in a
//! [`FlowKey`], how its value is written (ovs-fields(7)), and what a frame needs to have it.

use alloc::vec::Vec;
use core::fmt::{self, Write};
use core::mem::offset_of;
use core::net::{Ipv4Addr, Ipv6Addr};

use zerocopy::IntoBytes;

use crate::flow::Match;
use crate::key::{FRAG_ANY, FRAG_LATER, FlowKey, Vlan, ether, proto};
use crate::ofctl::{Names, Result, Why, decimal, form, number};
use crate::{MacAddr, PortId};

/// How a value is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Mac,
    V4,
    V6,
    /// These bits of a number, written without the zeroes below them.
    Number(u16),
    /// A byte in a field of two.
    Low,
    /// The upper six bits of the type of service, where they stand.
    Service,
    /// `0x` and four digits.
    Type,
    Port,
    Fragments,
    TcpFlags,
    /// The identifier, 0xffff for no tag.
    Vlan,
    /// The identifier with [`Vlan::PRESENT`].
    Vid,
    Priority,
    Tci,
}

/// Where a field may stand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Match,
    Set,
    Both,
}

/// A field.
pub(crate) struct Column {
    /// Its names: in a match, in `set_field`, another.
    names: [&'static str; 3],
    uses: Use,
    /// Where it is in a key.
    at: usize,
    pub form: Form,
    /// Whether it may be matched or set in part.
    masked: bool,
    pub needs: Needs,
}

/// What must be known of a frame that has a field: one of these EtherTypes and protocols (0 for
/// any), one of these messages, a tag.
#[derive(Clone, Copy)]
pub(crate) struct Needs {
    of: &'static [(u16, u8)],
    messages: &'static [u16],
    tag: bool,
    /// The same in words.
    what: &'static str,
}

const fn needs(what: &'static str, of: &'static [(u16, u8)]) -> Needs {
    Needs {
        of,
        messages: &[],
        tag: false,
        what,
    }
}

const fn neighbour(what: &'static str, messages: &'static [u16]) -> Needs {
    Needs {
        messages,
        ..needs(what, &[(ether::IPV6, proto::ICMPV6)])
    }
}

macro_rules! over_ip {
    ($($protocol:expr),*) => {
        &[$((ether::IPV4, $protocol), (ether::IPV6, $protocol)),*]
    };
}

const NOTHING: Needs = needs("", &[]);
const IPV4: Needs = needs("ip", &[(ether::IPV4, 0)]);
const IPV6: Needs = needs("ipv6", &[(ether::IPV6, 0)]);
pub(crate) const IP: Needs = needs("ip or ipv6", over_ip!(0));
const ARP: Needs = needs("arp or rarp", &[(ether::ARP, 0), (ether::RARP, 0)]);
const TCP: Needs = needs("tcp or tcp6", over_ip!(proto::TCP));
const UDP: Needs = needs("udp or udp6", over_ip!(proto::UDP));
const SCTP: Needs = needs("sctp or sctp6", over_ip!(proto::SCTP));
const PORTS: Needs = needs(
    "tcp, udp, sctp, tcp6, udp6 or sctp6",
    over_ip!(proto::TCP, proto::UDP, proto::SCTP),
);
/// TCP or UDP, whose ports can be changed.
pub(crate) const CHANGEABLE: Needs =
    needs("tcp, udp, tcp6 or udp6", over_ip!(proto::TCP, proto::UDP));
const ICMP: Needs = needs(
    "icmp or icmp6",
    &[(ether::IPV4, proto::ICMP), (ether::IPV6, proto::ICMPV6)],
);
const ICMP4: Needs = needs("icmp", &[(ether::IPV4, proto::ICMP)]);
const ICMP6: Needs = needs("icmp6", &[(ether::IPV6, proto::ICMPV6)]);
const NEIGHBOUR: Needs = neighbour(
    "icmp6,icmp_type=135,icmp_code=0 or icmp6,icmp_type=136,icmp_code=0",
    &[135, 136],
);
const SOLICITATION: Needs = neighbour("icmp6,icmp_type=135,icmp_code=0", &[135]);
const ADVERTISEMENT: Needs = neighbour("icmp6,icmp_type=136,icmp_code=0", &[136]);
const TAGGED: Needs = Needs {
    tag: true,
    ..needs("dl_vlan, or push_vlan before it", &[])
};

/// What is known of a frame.
#[derive(Clone, Copy)]
pub(crate) struct Facts {
    kind: Option<u16>,
    protocol: Option<u8>,
    /// It is a later fragment, so it has no transport header.
    later: bool,
    /// The type of an ICMP message whose code is zero.
    message: Option<u16>,
    tagged: bool,
}

impl Facts {
    /// Of the frames that a match is about, and that there is a tag.
    pub fn of_match(of: &Match, tagged: bool) -> Self {
        let (key, mask) = (of.key(), of.mask());
        let typed = mask.tp_src == 0xffff && mask.tp_dst == 0xffff && key.tp_dst == 0;
        Self {
            kind: of.dl_type(),
            protocol: of.ip_proto(),
            later: key.nw_frag & FRAG_LATER != 0,
            message: typed.then_some(key.tp_src),
            tagged,
        }
    }

    /// Of a frame.
    pub fn of_key(key: &FlowKey) -> Self {
        Self {
            kind: Some(key.dl_type),
            protocol: Some(key.nw_proto),
            later: key.nw_frag & FRAG_LATER != 0,
            message: (key.tp_dst == 0).then_some(key.tp_src),
            tagged: key.vlans[0].present(),
        }
    }
}

impl Needs {
    /// What of it is missing.
    pub fn check(&self, facts: &Facts) -> Result<()> {
        if facts.later && self.of.iter().any(|(_, protocol)| *protocol != 0) {
            return Err(Why::Needs("other fragments than later ones"));
        }
        match self.fits(facts) {
            true => Ok(()),
            false => Err(Why::Needs(self.what)),
        }
    }

    /// Whether it is there, fragments aside.
    fn fits(&self, facts: &Facts) -> bool {
        let known = |(kind, protocol): &(u16, u8)| {
            facts.kind == Some(*kind) && (*protocol == 0 || facts.protocol == Some(*protocol))
        };
        let message = || facts.message.is_some_and(|m| self.messages.contains(&m));
        (self.of.is_empty() || self.of.iter().any(known))
            && (self.messages.is_empty() || message())
            && (!self.tag || facts.tagged)
    }

    /// The same for a frame that is described: its fields may be named that it has not, as zero.
    pub fn of_frame(self) -> Self {
        match self.messages {
            [] => self,
            _ => NEIGHBOUR,
        }
    }
}

const NW_SRC: usize = offset_of!(FlowKey, nw_src);
const NW_DST: usize = offset_of!(FlowKey, nw_dst);
const NW_TOS: usize = offset_of!(FlowKey, nw_tos);
const NW_PROTO: usize = offset_of!(FlowKey, nw_proto);
const TP_SRC: usize = offset_of!(FlowKey, tp_src);
const TP_DST: usize = offset_of!(FlowKey, tp_dst);
const ARP_SHA: usize = offset_of!(FlowKey, arp_sha);
const ARP_THA: usize = offset_of!(FlowKey, arp_tha);
const TAG: usize = offset_of!(FlowKey, vlans) + offset_of!(Vlan, tci);

/// A field that can be set and, if it can be matched in part, set in part.
const fn both(
    names: [&'static str; 3],
    at: usize,
    form: Form,
    masked: bool,
    needs: Needs,
) -> Column {
    Column {
        names,
        uses: Use::Both,
        at,
        form,
        masked,
        needs,
    }
}

const fn only(
    uses: Use,
    name: &'static str,
    other: &'static str,
    at: usize,
    form: Form,
    needs: Needs,
) -> Column {
    let masked = matches!(
        form,
        Form::TcpFlags | Form::Tci | Form::Vid | Form::Number(0xffff)
    );
    Column {
        uses,
        ..both([name, name, other], at, form, masked, needs)
    }
}

const WORD: Form = Form::Number(0xffff);
const BYTE: Form = Form::Number(0xff);

/// The fields, in the order in which matches are written; where two stand for the same, the first
/// that a match has is written.
static COLUMNS: &[Column] = &[
    only(
        Use::Match,
        "in_port",
        "",
        offset_of!(FlowKey, in_port),
        Form::Port,
        NOTHING,
    ),
    only(Use::Match, "dl_vlan", "", TAG, Form::Vlan, NOTHING),
    only(
        Use::Match,
        "dl_vlan_pcp",
        "vlan_pcp",
        TAG,
        Form::Priority,
        NOTHING,
    ),
    only(Use::Match, "vlan_tci", "", TAG, Form::Tci, NOTHING),
    only(Use::Set, "vlan_vid", "", TAG, Form::Vid, TAGGED),
    only(Use::Set, "vlan_pcp", "", TAG, Form::Number(0xe000), TAGGED),
    both(
        ["dl_src", "eth_src", ""],
        offset_of!(FlowKey, dl_src),
        Form::Mac,
        true,
        NOTHING,
    ),
    both(
        ["dl_dst", "eth_dst", ""],
        offset_of!(FlowKey, dl_dst),
        Form::Mac,
        true,
        NOTHING,
    ),
    only(
        Use::Match,
        "dl_type",
        "eth_type",
        offset_of!(FlowKey, dl_type),
        Form::Type,
        NOTHING,
    ),
    both(["nw_src", "ip_src", ""], NW_SRC, Form::V4, true, IPV4),
    both(["nw_dst", "ip_dst", ""], NW_DST, Form::V4, true, IPV4),
    both(["ipv6_src", "ipv6_src", ""], NW_SRC, Form::V6, true, IPV6),
    both(["ipv6_dst", "ipv6_dst", ""], NW_DST, Form::V6, true, IPV6),
    both(["arp_spa", "arp_spa", ""], NW_SRC, Form::V4, true, ARP),
    both(["arp_tpa", "arp_tpa", ""], NW_DST, Form::V4, true, ARP),
    only(Use::Match, "nw_proto", "ip_proto", NW_PROTO, BYTE, IP),
    both(["arp_op", "arp_op", ""], NW_PROTO, BYTE, false, ARP),
    both(["arp_sha", "arp_sha", ""], ARP_SHA, Form::Mac, true, ARP),
    both(["arp_tha", "arp_tha", ""], ARP_THA, Form::Mac, true, ARP),
    both(["nw_tos", "nw_tos", ""], NW_TOS, Form::Service, false, IP),
    both(
        ["ip_dscp", "ip_dscp", ""],
        NW_TOS,
        Form::Number(0xfc),
        false,
        IP,
    ),
    both(
        ["nw_ecn", "nw_ecn", "ip_ecn"],
        NW_TOS,
        Form::Number(3),
        false,
        IP,
    ),
    both(
        ["nw_ttl", "nw_ttl", ""],
        offset_of!(FlowKey, nw_ttl),
        BYTE,
        false,
        IP,
    ),
    only(
        Use::Match,
        "nw_frag",
        "ip_frag",
        offset_of!(FlowKey, nw_frag),
        Form::Fragments,
        IP,
    ),
    only(
        Use::Match,
        "icmp_type",
        "icmpv6_type",
        TP_SRC,
        Form::Low,
        ICMP,
    ),
    only(
        Use::Match,
        "icmp_code",
        "icmpv6_code",
        TP_DST,
        Form::Low,
        ICMP,
    ),
    only(Use::Set, "icmp_type", "", TP_SRC, Form::Low, ICMP4),
    only(Use::Set, "icmp_code", "", TP_DST, Form::Low, ICMP4),
    only(Use::Set, "icmpv6_type", "", TP_SRC, Form::Low, ICMP6),
    only(Use::Set, "icmpv6_code", "", TP_DST, Form::Low, ICMP6),
    only(Use::Match, "tp_src", "", TP_SRC, WORD, PORTS),
    only(Use::Match, "tp_dst", "", TP_DST, WORD, PORTS),
    both(["tcp_src", "tcp_src", ""], TP_SRC, WORD, true, TCP),
    both(["tcp_dst", "tcp_dst", ""], TP_DST, WORD, true, TCP),
    both(["udp_src", "udp_src", ""], TP_SRC, WORD, true, UDP),
    both(["udp_dst", "udp_dst", ""], TP_DST, WORD, true, UDP),
    only(Use::Match, "sctp_src", "", TP_SRC, WORD, SCTP),
    only(Use::Match, "sctp_dst", "", TP_DST, WORD, SCTP),
    both(
        ["nd_target", "nd_target", ""],
        offset_of!(FlowKey, nd_target),
        Form::V6,
        true,
        NEIGHBOUR,
    ),
    both(
        ["nd_sll", "nd_sll", ""],
        ARP_SHA,
        Form::Mac,
        true,
        SOLICITATION,
    ),
    both(
        ["nd_tll", "nd_tll", ""],
        ARP_THA,
        Form::Mac,
        true,
        ADVERTISEMENT,
    ),
    only(
        Use::Match,
        "tcp_flags",
        "",
        offset_of!(FlowKey, tcp_flags),
        Form::TcpFlags,
        TCP,
    ),
];

// Numbers in a key are of two bytes, then of one.
const _: () =
    assert!(NW_PROTO > offset_of!(FlowKey, tcp_flags) && NW_PROTO < NW_TOS && TAG < NW_PROTO);

/// A value and the bits of it that count.
pub(crate) type Masked = (u128, u128);

impl Column {
    /// The field of that name in a match.
    pub fn matched(name: &str) -> Option<&'static Self> {
        Self::find(name, Use::Set)
    }

    /// The field of that name in `set_field`, and its number.
    pub fn set(name: &str) -> Option<Rewrites> {
        let found = Self::find(name, Use::Match)?;
        let place = COLUMNS.iter().position(|c| core::ptr::eq(c, found))?;
        Some(Rewrites(place as u8))
    }

    fn find(name: &str, not: Use) -> Option<&'static Self> {
        let named = |c: &&Self| c.uses != not && !name.is_empty() && c.names.contains(&name);
        COLUMNS.iter().find(named)
    }

    /// All its bits.
    pub const fn bits(&self) -> u128 {
        match self.form {
            Form::Mac => (1 << 48) - 1,
            Form::V4 => u32::MAX as u128,
            Form::V6 => u128::MAX,
            Form::Number(bits) => bits as u128,
            Form::Service => 0xfc,
            Form::Low | Form::Type | Form::Port | Form::Tci => 0xffff,
            Form::Fragments => 3,
            Form::TcpFlags => TCP_FLAGS_ALL as u128,
            Form::Vlan | Form::Vid => 0x1fff,
            Form::Priority => (0xe000 | Vlan::PRESENT) as u128,
        }
    }

    fn place(&self) -> core::ops::Range<usize> {
        let width = match self.form {
            Form::Mac => 6,
            Form::V4 | Form::V6 => 16,
            _ if self.at < NW_PROTO => 2,
            _ => 1,
        };
        self.at..self.at + width
    }

    /// What is in a key.
    fn get(&self, key: &FlowKey) -> u128 {
        let bytes = key.as_bytes().get(self.place()).unwrap_or_default();
        let number = |sum: u128, byte: &u8| sum << 8 | u128::from(*byte);
        match bytes.len() {
            // Numbers are as the machine has them.
            2 => bytes.iter().rev().fold(0, number),
            _ => bytes.iter().fold(0, number),
        }
    }

    fn put(&self, key: &mut FlowKey, value: u128) {
        let value = value.to_le_bytes();
        let bytes = key.as_mut_bytes().get_mut(self.place());
        let bytes = bytes.unwrap_or_default();
        match bytes.len() {
            2 => bytes
                .iter_mut()
                .zip(value)
                .for_each(|(to, from)| *to = from),
            _ => bytes
                .iter_mut()
                .rev()
                .zip(value)
                .for_each(|(to, from)| *to = from),
        }
    }

    /// Reads a value, and the bits of it that count.
    pub fn read(&self, text: &str, names: Names<'_>) -> Result<Masked> {
        let (value, mask) = match text.split_once('/') {
            Some(_) if !self.masked => return Err(Why::Mask),
            Some((value, mask)) => (value, Some(mask)),
            None => (text, None),
        };
        let bits = self.bits();
        let shift = bits.trailing_zeros();
        let some = |text: &str| Ok(u128::from(number(text, 0, (bits >> shift) as u64)?) << shift);
        let word = |text: &str, high| Ok(u128::from(number(text, 0, high)?));
        // A mask as a number of bits, or written like the value.
        let length = |of: u8, sign: char, read: fn(&str) -> Result<u128>| match mask {
            None => Ok(bits),
            Some(mask) if mask.contains(sign) => read(mask),
            Some(mask) => {
                let length = number(mask, 0, of.into())? as u32;
                let all = u128::MAX.checked_shl(u32::from(of) - length).unwrap_or(0);
                Ok(bits & all)
            }
        };
        let (value, mask) = match self.form {
            Form::Mac => (mac(value)?, mask.map_or(Ok(bits), mac)?),
            Form::V4 => (v4(value)?, length(32, '.', v4)?),
            Form::V6 => (v6(value)?, length(128, ':', v6)?),
            Form::Number(_) => (some(value)?, mask.map_or(Ok(bits), some)?),
            Form::Low => (word(value, 0xff)?, bits),
            Form::Type => (word(value, 0xffff)?, bits),
            Form::Service => match word(value, 0xff)? {
                tos if tos & 3 == 0 => (tos, bits),
                _ => return Err(form(value, "a DSCP in the upper six bits")),
            },
            Form::Port => (port(value, names)?.0.into(), bits),
            Form::Fragments => {
                let known = FRAGMENTS.iter().find(|(name, ..)| *name == value);
                let wanted = "no, yes, first, later or not_later";
                let &(_, frag, mask) = known.ok_or_else(|| form(value, wanted))?;
                (frag.into(), mask.into())
            }
            Form::TcpFlags => tcp_flags(value, mask)?,
            Form::Vlan => match number(value, 0, 0xffff)? {
                0xffff => (0, bits),
                _ => (word(value, 0xfff)? | PRESENT, bits),
            },
            Form::Vid => {
                let (low, high) = (Vlan::PRESENT.into(), (Vlan::PRESENT | 4094).into());
                let value = number(value, low, high)?.into();
                let mask = mask.map_or(Ok(bits), |m| Ok(number(m, low, 0x1fff)?.into()))?;
                match mask & PRESENT {
                    0 => {
                        return Err(form(
                            text,
                            "an identifier with bit 12 set, and a mask with it",
                        ));
                    }
                    _ => (value, mask),
                }
            }
            Form::Priority => (word(value, 7)? << 13 | PRESENT, bits),
            Form::Tci => {
                let mask = mask.map_or(Ok(bits), some)?;
                match some(value)? & mask {
                    // Where there is no tag, all of it is zero.
                    0 if mask & PRESENT != 0 => (0, mask & 0x1fff),
                    tci if mask & PRESENT == 0 || tci & PRESENT != 0 => (tci, mask),
                    _ => return Err(form(text, "a TCI with bit 12, or zero for no tag")),
                }
            }
        };
        Ok((value, mask))
    }
}

const PRESENT: u128 = Vlan::PRESENT as u128;

/// Which field is set: its number in the table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rewrites(u8);

/// A field, and the bits that it gets.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Rewrite {
    field: Rewrites,
    value: u128,
    mask: u128,
}

impl Rewrites {
    pub fn column(self) -> &'static Column {
        // It was found there.
        COLUMNS.get(usize::from(self.0)).unwrap_or(&COLUMNS[0])
    }

    /// Sets it to these bits.
    pub fn to(self, (value, mask): Masked) -> Rewrite {
        Rewrite {
            field: self,
            value,
            mask,
        }
    }
}

impl Rewrite {
    /// The same bits under another name.
    pub(crate) fn named(self, name: &str) -> Self {
        let field = Column::set(name).unwrap_or(self.field);
        Self { field, ..self }
    }

    /// Changes a key, if that has the field (as in Open vSwitch, earlier actions may have taken it).
    pub fn apply(&self, key: &mut FlowKey) {
        let column = self.field.column();
        if column.needs.check(&Facts::of_key(key)).is_ok() {
            let old = column.get(key);
            column.put(key, old & !self.mask | self.value);
        }
    }
}

/// `VALUE->FIELD`, as `set_field` has it.
impl fmt::Display for Rewrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let column = self.field.column();
        let [_, name, _] = column.names;
        let value = Value {
            column,
            value: self.value,
            mask: self.mask,
            set: true,
        };
        write!(f, "{value}->{name}")
    }
}

impl fmt::Debug for Rewrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A field's share of a match.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Part {
    at: usize,
    value: u128,
    mask: u128,
}

/// A match while its text is read.
#[derive(Default)]
pub(crate) struct Draft {
    parts: Vec<Part>,
    key: FlowKey,
    mask: FlowKey,
}

impl Draft {
    /// Adds what a field must be.
    pub fn put(&mut self, column: &Column, (value, mask): Masked) -> Result<()> {
        let value = value & mask;
        let part = Part {
            at: column.at,
            value,
            mask,
        };
        if self.parts.contains(&part) {
            return Ok(());
        }
        // That there is a tag may be said often, if not denied.
        let meets = |other: &Part| {
            let tag = column.at == TAG && (other.value ^ value) & PRESENT == 0;
            let mine = if tag { mask & !PRESENT } else { mask };
            other.at == part.at && (mine & other.mask != 0 || column.form == Form::Tci)
        };
        if self.parts.iter().any(meets) {
            return Err(Why::Twice);
        }
        for (to, bits) in [(&mut self.key, value), (&mut self.mask, mask)] {
            let old = column.get(to);
            column.put(to, old | bits);
        }
        self.parts.push(part);
        Ok(())
    }

    pub fn matching(&self) -> Match {
        Match::new(&self.key, &self.mask)
    }
}

/// A value with its mask, if that leaves some out.
struct Value<'a> {
    column: &'a Column,
    value: u128,
    mask: u128,
    /// As `set_field` has it; else as a match.
    set: bool,
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let &Self {
            column,
            value,
            mask,
            set,
        } = self;
        let bits = column.bits();
        let whole = mask == bits;
        // A prefix is told by its length.
        let (ones, shift) = (mask.count_ones(), bits.count_ones());
        let is_prefix = bits & !(bits >> ones.min(127)) == mask || whole;
        let masked = |f: &mut fmt::Formatter<'_>, mask: fmt::Arguments<'_>| match is_prefix {
            _ if whole => Ok(()),
            true if ones != 0 && shift >= 32 && column.form != Form::Mac => write!(f, "/{ones}"),
            _ => write!(f, "/{mask}"),
        };
        match column.form {
            Form::Mac => {
                write!(f, "{}", to_mac(value))?;
                masked(f, format_args!("{}", to_mac(mask)))
            }
            Form::V4 => {
                write!(f, "{}", Ipv4Addr::from_bits(value as u32))?;
                masked(f, format_args!("{}", Ipv4Addr::from_bits(mask as u32)))
            }
            Form::V6 => {
                write!(f, "{}", V6(value))?;
                masked(f, format_args!("{}", V6(mask)))
            }
            Form::Type => write!(f, "{:#06x}", value as u16),
            Form::Port => write!(f, "{}", PortName(PortId(value as u16))),
            Form::Fragments => {
                let same =
                    |of: &&(&str, u8, u8)| (u128::from(of.1), u128::from(of.2)) == (value, mask);
                f.write_str(FRAGMENTS.iter().find(same).map_or("no", |of| of.0))
            }
            Form::TcpFlags => write_tcp_flags(f, value, mask),
            Form::Number(_)
            | Form::Low
            | Form::Service
            | Form::Vlan
            | Form::Vid
            | Form::Priority
            | Form::Tci => {
                let shift = match column.form {
                    Form::Number(bits) => bits.trailing_zeros(),
                    _ => 0,
                };
                // Of two bytes at most.
                let (value, mask) = ((value >> shift) as u16, (mask >> shift) as u16);
                match (whole, set) {
                    (true, _) => write!(f, "{value}"),
                    (false, true) => write!(f, "{value}/{mask:#x}"),
                    (false, false) => write!(f, "{value:#x}/{mask:#x}"),
                }
            }
        }
    }
}

/// Writes the fields of a match, each behind what `item` puts there.
pub(crate) fn write_match(
    of: &Match,
    item: &mut dyn FnMut(fmt::Arguments<'_>) -> fmt::Result,
) -> fmt::Result {
    let (key, mut left) = (of.key(), *of.mask());
    let facts = Facts::of_match(of, of.is_tagged());
    let mut exact = SHORTHANDS.iter().filter(|(name, kind, _)| {
        // Of several names the shortest for IPv4, the longest for IPv6.
        Some(*kind) == facts.kind && !matches!(*name, "ip4" | "ipv4" | "ip6")
    });
    let protocol = (left.nw_proto != 0).then_some(key.nw_proto);
    let plain = exact.clone().find(|(_, _, p)| p.is_none());
    let exact = exact.find(|(_, _, p)| p.is_some() && *p == protocol);
    if let Some((name, ..)) = exact.or(plain) {
        item(format_args!("{name}"))?;
        left.dl_type = 0;
    }
    if exact.is_some() {
        left.nw_proto = 0;
    }
    for column in COLUMNS.iter().filter(|c| c.uses != Use::Set) {
        let (name, bits) = (column.names[0], column.bits());
        let mask = column.get(&left) & bits;
        if mask == 0 || !column.needs.of_frame().fits(&facts) {
            continue;
        }
        let rest = column.get(&left) & !bits;
        column.put(&mut left, rest);
        match column.at {
            TAG => {
                left.vlans[0].tci = 0;
                write_tci(item, key.vlans[0], of.mask().vlans[0])?;
            }
            _ => {
                let value = column.get(key) & mask;
                let set = false;
                let value = Value {
                    column,
                    value,
                    mask,
                    set,
                };
                item(format_args!("{name}={value}"))?;
            }
        }
    }
    Ok(())
}

fn write_tci(
    item: &mut dyn FnMut(fmt::Arguments<'_>) -> fmt::Result,
    key: Vlan,
    mask: Vlan,
) -> fmt::Result {
    let (vid, pcp) = (mask.tci & 0xfff, mask.tci & 0xe000);
    let whole = (vid == 0 || vid == 0xfff) && (pcp == 0 || pcp == 0xe000) && (vid | pcp) != 0;
    if mask.tci & Vlan::PRESENT != 0 && key.present() && whole {
        if vid != 0 {
            item(format_args!("dl_vlan={}", key.id()))?;
        }
        if pcp != 0 {
            item(format_args!("dl_vlan_pcp={}", key.priority()))?;
        }
        return Ok(());
    }
    match mask.tci {
        0xffff => item(format_args!("vlan_tci={:#06x}", key.tci)),
        mask => item(format_args!("vlan_tci={:#06x}/{mask:#06x}", key.tci)),
    }
}

fn write_tcp_flags(f: &mut fmt::Formatter<'_>, value: u128, mask: u128) -> fmt::Result {
    let whole = mask == TCP_FLAGS_ALL.into();
    if whole && value == 0 {
        return f.write_char('0');
    }
    let mut first = true;
    for (bit, name) in (0u32..).zip(TCP_FLAGS) {
        let (here, set) = (mask >> bit & 1 != 0, value >> bit & 1 != 0);
        match whole {
            true if !set => continue,
            true if first => {}
            true => f.write_char('|')?,
            false if !here => continue,
            false => f.write_char(if set { '+' } else { '-' })?,
        }
        first = false;
        f.write_str(name)?;
    }
    Ok(())
}

/// An IPv6 address as C's libraries write it: those of `::/96` end like IPv4 ones.
struct V6(u128);

impl fmt::Display for V6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            low @ 0x1_0000..=0xffff_ffff => write!(f, "::{}", Ipv4Addr::from_bits(low as u32)),
            bits => fmt::Display::fmt(&Ipv6Addr::from_bits(bits), f),
        }
    }
}

/// A port as flows name it.
pub(crate) struct PortName(pub PortId);

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            PortId::LOCAL => f.write_str("LOCAL"),
            PortId(number) => write!(f, "{number}"),
        }
    }
}

fn to_mac(bits: u128) -> MacAddr {
    let [a, b, c, d, e, g, ..] = (bits << 80).to_be_bytes();
    MacAddr([a, b, c, d, e, g])
}

fn mac(text: &str) -> Result<u128> {
    let wrong = || form(text, "a MAC address such as 52:54:00:00:00:01");
    let (mut value, mut count) = (0, 0);
    for part in text.split(':') {
        let digits = matches!(part.len(), 1 | 2) && part.bytes().all(|b| b.is_ascii_hexdigit());
        let byte = u8::from_str_radix(part, 16).ok().filter(|_| digits);
        value = value << 8 | u128::from(byte.ok_or_else(wrong)?);
        count += 1;
    }
    match count {
        6 => Ok(value & ((1 << 48) - 1)),
        _ => Err(wrong()),
    }
}

fn v4(text: &str) -> Result<u128> {
    let parsed: Option<Ipv4Addr> = text.parse().ok();
    let address = parsed.ok_or_else(|| form(text, "an IPv4 address"))?;
    Ok(address.to_bits().into())
}

fn v6(text: &str) -> Result<u128> {
    let parsed: Option<Ipv6Addr> = text.parse().ok();
    let address = parsed.ok_or_else(|| form(text, "an IPv6 address"))?;
    Ok(address.to_bits())
}

/// A port, by its name or number.
pub(crate) fn port(text: &str, names: Names<'_>) -> Result<PortId> {
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

fn tcp_flags(text: &str, mask: Option<&str>) -> Result<Masked> {
    let all = u128::from(TCP_FLAGS_ALL);
    let flag = |name: &str| {
        let known = TCP_FLAGS.iter().position(|n| *n == name);
        known
            .map(|bit| 1u128 << bit)
            .ok_or_else(|| form(name, "a flag of TCP"))
    };
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        let figure = |text| Ok(u128::from(number(text, 0, TCP_FLAGS_ALL.into())?));
        return Ok((figure(text)?, mask.map_or(Ok(all), figure)?));
    }
    if let Some(mask) = mask {
        return Err(form(mask, "a flag of TCP"));
    }
    if !text.starts_with(['+', '-']) {
        let flags = text
            .split('|')
            .try_fold(0, |all, name| Ok(all | flag(name)?))?;
        return Ok((flags, all));
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
pub(crate) const SHORTHANDS: [(&str, u16, Option<u8>); 15] = [
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

/// Which fragments: name, value, mask.
const FRAGMENTS: [(&str, u8, u8); 5] = [
    ("no", 0, FRAG_ANY | FRAG_LATER),
    ("yes", FRAG_ANY, FRAG_ANY),
    ("first", FRAG_ANY, FRAG_ANY | FRAG_LATER),
    ("later", FRAG_ANY | FRAG_LATER, FRAG_ANY | FRAG_LATER),
    ("not_later", 0, FRAG_LATER),
];
