//! What is not let in, whatever flows say: rules R2, R7 and R9, which need the frame and its port
//! alone.

use crate::MacAddr;
use crate::counters::DropCause;
use crate::key::{FRAG_LATER, FlowKey, ether, proto};
use crate::port::{Port, PortKind};

/// Bridge protocols' groups that bridges relay: Cisco's (CDP, VTP, UDLD; PVST+; VLAN bridge) and
/// Provider STP of others tunnelled.
const BRIDGE_GROUPS: [MacAddr; 4] = [
    MacAddr([0x01, 0x00, 0x0c, 0xcc, 0xcc, 0xcc]),
    MacAddr([0x01, 0x00, 0x0c, 0xcc, 0xcc, 0xcd]),
    MacAddr([0x01, 0x00, 0x0c, 0xcd, 0xcd, 0xcd]),
    MacAddr([0x01, 0x00, 0x0c, 0xcd, 0xcd, 0xd0]),
];

/// LLDP's type (IEEE 802.1AB-2016 §7.4).
pub(crate) const LLDP: u16 = 0x88cc;

/// Checks a frame that comes in by `port`.
///
/// # Errors
/// Why it is dropped.
pub(crate) fn admit(port: &Port, key: &FlowKey) -> Result<(), DropCause> {
    if port.is(PortKind::Mirror) {
        return Err(DropCause::MirrorPort);
    }
    if matches!(key.dl_type, ether::VLAN | ether::SERVICE_VLAN) {
        // A tag that the key has no place for, or that is cut off. Behind tags that are taken off
        // it would become the frame's own.
        let [_, inner] = key.vlans;
        return Err(match inner.present() {
            true => DropCause::Tags,
            false => DropCause::PartialTag,
        });
    }
    if key
        .vlans
        .iter()
        .any(|tag| tag.present() && tag.id() == 4095)
    {
        return Err(DropCause::Vlan4095);
    }
    if key.dl_dst.is_reserved() {
        return Err(DropCause::Reserved);
    }
    if port.is_local() {
        guest(port, key)?;
    }
    Ok(())
}

/// What a guest may not send.
fn guest(port: &Port, key: &FlowKey) -> Result<(), DropCause> {
    let config = &port.config;
    if !config.forged_source && !config.macs.contains(&key.dl_src) {
        return Err(DropCause::ForgedSource);
    }
    if !config.bpdu && BRIDGE_GROUPS.contains(&key.dl_dst) {
        return Err(DropCause::Bpdu);
    }
    if config.dhcp_guard && is_dhcp_answer(key) {
        return Err(DropCause::DhcpServer);
    }
    if config.ra_guard && may_be_router_advertisement(key) {
        return Err(DropCause::RouterAdvertisement);
    }
    Ok(())
}

/// From a DHCP server's port to a client's or a relay's (RFC 2131 §4.1, RFC 8415 §7.2).
fn is_dhcp_answer(key: &FlowKey) -> bool {
    key.nw_proto == proto::UDP
        && match key.dl_type {
            ether::IPV4 => key.tp_src == 67 && matches!(key.tp_dst, 67 | 68),
            ether::IPV6 => key.tp_src == 547 && matches!(key.tp_dst, 546 | 547),
            _ => false,
        }
}

/// A router advertisement (RFC 4861 §4.2), or a first fragment or a chain of extension headers
/// that hides what it is (RFC 7113 §2).
fn may_be_router_advertisement(key: &FlowKey) -> bool {
    if key.dl_type != ether::IPV6 || key.nw_frag & FRAG_LATER != 0 {
        return false;
    }
    match key.nw_proto {
        proto::ICMPV6 => matches!(key.tp_src, 134 | 0),
        // Where an extension header is cut off, the key has no protocol.
        0 => true,
        _ => false,
    }
}
