//! What happens with a frame, stage by stage, for people: flows that match, actions, what NORMAL
//! says, and at last a line `Datapath actions: …` in the words of Open vSwitch's `ofproto/trace`.

use alloc::string::String;
use core::fmt::{self, Write as _};
use core::net::{Ipv4Addr, Ipv6Addr};

use arch::Nanos;

use crate::flow::Match;
use crate::key::{FlowKey, Vlan, ether, proto};
use crate::switch::Switch;
use crate::translate::{Field, Step};

impl Switch {
    /// Traces a frame of `key`, as `ofproto/trace` does.
    pub fn trace(&mut self, key: &FlowKey, now: Nanos) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = writeln!(text, "Flow: {}\n", KeyText(key));
        let decision = self.explain(key, now, &mut text);
        let steps = decision.steps;
        if let Some(cause) = decision.drop {
            let _ = writeln!(text, "\nDrop: {}", cause.word());
        }
        let _ = writeln!(text, "\nDatapath actions: {}", Datapath { key, steps });
        text
    }
}

/// A key as the match of all that is in it.
struct KeyText<'a>(&'a FlowKey);

impl fmt::Display for KeyText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.0;
        let ones = FlowKey {
            in_port: crate::PortId::NONE,
            dl_src: crate::MacAddr::BROADCAST,
            dl_dst: crate::MacAddr::BROADCAST,
            dl_type: 0xffff,
            ..FlowKey::default()
        };
        let ip = matches!(key.dl_type, ether::IPV4 | ether::IPV6);
        let arp = matches!(key.dl_type, ether::ARP | ether::RARP);
        let short = |there: bool| if there { 0xffff } else { 0 };
        let low = |there: bool| if there { 0xff } else { 0 };
        let wide = |there: bool| [low(there); 16];
        let mac = |there: bool| crate::MacAddr([low(there); 6]);
        let message = ip && key.nw_proto == proto::ICMPV6 && matches!(key.tp_src, 135 | 136);
        let [outer, _] = key.vlans;
        let ports = matches!(
            key.nw_proto,
            proto::TCP | proto::UDP | proto::SCTP | proto::ICMP | proto::ICMPV6
        );
        let mask = FlowKey {
            vlans: [
                Vlan {
                    tpid: 0,
                    tci: if outer.present() { 0xffff } else { 0 },
                },
                Vlan::NONE,
            ],
            nw_src: wide(ip || arp),
            nw_dst: wide(ip || arp),
            nw_proto: low(ip || arp),
            nw_tos: low(ip),
            nw_ttl: low(ip),
            nw_frag: if key.nw_frag != 0 { 3 } else { 0 },
            tp_src: short(ip && ports),
            tp_dst: short(ip && ports),
            tcp_flags: if ip && key.nw_proto == proto::TCP {
                0xfff
            } else {
                0
            },
            arp_sha: mac(arp || (message && key.tp_src == 135)),
            arp_tha: mac(arp || (message && key.tp_src == 136)),
            nd_target: wide(message),
            ..ones
        };
        fmt::Display::fmt(&Match::new(key, &mask), f)
    }
}

/// Steps in Open vSwitch's words.
pub struct Datapath<'a> {
    /// The frame's key, which tells which headers it has.
    pub key: &'a FlowKey,
    /// The steps.
    pub steps: &'a [Step],
}

impl fmt::Display for Datapath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outputs = |step: &Step| matches!(step, Step::Output(_));
        if !self.steps.iter().any(outputs) {
            return f.write_str("drop");
        }
        let (mut comma, mut header) = ("", None);
        for step in self.steps {
            let part = match step {
                Step::Set(field) => Some(self.header_of(*field)),
                _ => None,
            };
            // Fields of one header are set together.
            if header.is_some() && part != header {
                f.write_str("))")?;
            }
            if part.is_none() || part != header {
                f.write_str(comma)?;
            }
            match (*step, part) {
                (Step::Output(port), _) => write!(f, "{}", port.0)?,
                (Step::PopVlan, _) => f.write_str("pop_vlan")?,
                (Step::PushVlan(tag), _) => {
                    f.write_str("push_vlan(")?;
                    if tag.tpid != ether::VLAN {
                        write!(f, "tpid={:#06x},", tag.tpid)?;
                    }
                    write!(f, "vid={},pcp={})", tag.id(), tag.priority())?;
                }
                (Step::Meter(meter), _) => write!(f, "meter({meter})")?,
                (Step::Set(field), Some(name)) => {
                    match header == part {
                        true => f.write_str(",")?,
                        false => write!(f, "set({name}(")?,
                    }
                    self.write_field(f, field)?;
                }
                (Step::Set(_), None) => {}
            }
            (comma, header) = (",", part);
        }
        if header.is_some() {
            f.write_str("))")?;
        }
        Ok(())
    }
}

impl Datapath<'_> {
    const fn is_v6(&self) -> bool {
        self.key.dl_type == ether::IPV6
    }

    fn header_of(&self, field: Field) -> &'static str {
        match field {
            Field::DlSrc(_) | Field::DlDst(_) => "eth",
            Field::NwSrc(_) | Field::NwDst(_) | Field::NwTos(_) | Field::NwTtl(_) => {
                if self.is_v6() { "ipv6" } else { "ipv4" }
            }
            Field::TpSrc(_) | Field::TpDst(_) => match self.key.nw_proto {
                proto::UDP => "udp",
                proto::ICMP => "icmp",
                proto::ICMPV6 => "icmpv6",
                _ => "tcp",
            },
            Field::NdTarget(_) | Field::NdSll(_) | Field::NdTll(_) => "nd",
            _ => "arp",
        }
    }

    fn write_field(&self, f: &mut fmt::Formatter<'_>, field: Field) -> fmt::Result {
        let v6 = self.is_v6();
        let address = |f: &mut fmt::Formatter<'_>, name: &str, bytes: [u8; 16]| {
            let [.., a, b, c, d] = bytes;
            match v6 {
                true => write!(f, "{name}={}", Ipv6Addr::from(bytes)),
                false => write!(f, "{name}={}", Ipv4Addr::new(a, b, c, d)),
            }
        };
        match field {
            Field::DlSrc(mac) => write!(f, "src={mac}"),
            Field::DlDst(mac) => write!(f, "dst={mac}"),
            Field::NwSrc(bytes) => address(f, "src", bytes),
            Field::NwDst(bytes) => address(f, "dst", bytes),
            Field::NwTos(tos) if v6 => write!(f, "tclass={tos:#x}"),
            Field::NwTos(tos) => write!(f, "tos={tos:#x}"),
            Field::NwTtl(ttl) if v6 => write!(f, "hlimit={ttl}"),
            Field::NwTtl(ttl) => write!(f, "ttl={ttl}"),
            Field::TpSrc(kind) if self.key.is_message() => write!(f, "type={kind}"),
            Field::TpDst(code) if self.key.is_message() => write!(f, "code={code}"),
            Field::TpSrc(port) => write!(f, "src={port}"),
            Field::TpDst(port) => write!(f, "dst={port}"),
            Field::ArpOp(op) => write!(f, "op={op}"),
            Field::ArpSpa(bytes) => write!(f, "sip={}", Ipv4Addr::from(bytes)),
            Field::ArpTpa(bytes) => write!(f, "tip={}", Ipv4Addr::from(bytes)),
            Field::ArpSha(mac) => write!(f, "sha={mac}"),
            Field::ArpTha(mac) => write!(f, "tha={mac}"),
            Field::NdTarget(bytes) => write!(f, "target={}", Ipv6Addr::from(bytes)),
            Field::NdSll(mac) => write!(f, "sll={mac}"),
            Field::NdTll(mac) => write!(f, "tll={mac}"),
        }
    }
}
