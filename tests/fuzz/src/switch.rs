//! Frames through a switch, and flows in words.

use std::sync::OnceLock;

use arch::Nanos;
use vswitch::cache::Cache;
use vswitch::config::{MeterConfig, SwitchConfig};
use vswitch::edit::{Checksum, Editor, HEADER};
use vswitch::flow::{Flow, FlowMod};
use vswitch::key::{FlowKey, Vlan};
use vswitch::mirror::{MirrorConfig, MirrorOutput};
use vswitch::port::{Learning, PortConfig, PortKind};
use vswitch::tables::FlowTables;
use vswitch::translate::Step;
use vswitch::{MacAddr, PortId, Switch};

use crate::Bytes;

/// The uplinks' numbers begin here.
const UPLINK: u16 = 8;
/// What frames do in the switch beside `normal`.
const FLOWS: [&str; 12] = [
    "priority=50,udp,tp_dst=53,actions=set_field:10.0.0.9->nw_dst,mod_tp_dst:5353,NORMAL",
    "priority=50,tcp,tcp_flags=+syn-ack,actions=meter:1,NORMAL",
    "priority=50,ip,nw_dst=10.9.0.0/16,actions=push_vlan:0x8100,set_field:4105->vlan_vid,output:1",
    "priority=40,arp,arp_op=2,actions=mod_dl_src:02:00:00:00:00:07,resubmit(,2)",
    "priority=40,icmp6,icmp_type=135,actions=resubmit(,1),resubmit(,2)",
    "priority=60,icmp6,icmp_type=135,icmp_code=0,actions=set_field:fe80::/16->nd_target,set_field:02:00:00:00:00:07->nd_sll,NORMAL",
    "priority=50,icmp,actions=set_field:3->icmp_type,set_field:1->icmp_code,resubmit(,2)",
    "priority=20,dl_vlan=10,actions=set_field:0x1009/0x100f->vlan_vid,set_field:02:00:00:00:00:00/0f:00:00:00:00:00->eth_dst,NORMAL",
    "priority=30,dl_vlan=9,actions=strip_vlan,output:2,NORMAL",
    "table=1,priority=1,ip,actions=mod_nw_tos:184,NORMAL",
    "table=2,actions=output:3,output:8,output:9",
    "priority=0,actions=NORMAL",
];

fn switch(strange: bool) -> Switch {
    let port = |id: u16| {
        let kind = if id >= UPLINK {
            PortKind::Uplink
        } else {
            PortKind::Vnic
        };
        let mut port = PortConfig::new(id, &format!("p{id}"), kind);
        if kind == PortKind::Vnic {
            port.macs = vec![MacAddr([2, 0, 0, 0, 0, id as u8])];
            port.forged_source = strange || id == 4;
            port.dhcp_guard = true;
            port.ra_guard = true;
        }
        match id {
            2 => port.tag = Some(9),
            3 => port.trunks = vec![9, 10],
            4 => {
                port.learning = Some(Learning {
                    limit: 4,
                    ageing: 300,
                    flood: true,
                });
                port.storm_limit = Some(3);
            }
            _ => {}
        }
        port
    };
    let config = SwitchConfig {
        name: "s".into(),
        ports: [1, 2, 3, 4, UPLINK, UPLINK + 1, UPLINK + 2]
            .map(port)
            .into(),
        mirrors: vec![MirrorConfig {
            name: "m".into(),
            select_all: true,
            select_src: Vec::new(),
            select_dst: Vec::new(),
            select_vlan: Vec::new(),
            output: MirrorOutput::Capture,
        }],
        capture_bytes: 4096,
        meters: vec![MeterConfig {
            id: 1,
            frames: true,
            rate: 10,
            burst: 5,
        }],
        flows: match strange {
            true => FLOWS.map(String::from).into(),
            false => Vec::new(),
        },
        ..SwitchConfig::default()
    };
    Switch::new(config, [1, 2]).expect("the configuration is right")
}

/// Frames, one behind the other, into a switch: what it decides is the same from its cache, never
/// goes back or from uplink to uplink, and can be done to the frame.
pub fn frame(data: &[u8]) {
    let mut bytes = Bytes(data);
    let settings = bytes.u8();
    static SWITCHES: OnceLock<[Switch; 2]> = OnceLock::new();
    let switches = SWITCHES.get_or_init(|| [switch(false), switch(true)]);
    let mut switch = switches[usize::from(settings & 1)].clone();
    let mut cache = Cache::new(16, [3, 4]);
    let mut now = 0;
    for _ in 0..16 {
        if bytes.is_empty() {
            break;
        }
        let [port, more] = bytes.take();
        let port = PortId([1, 2, 3, 4, UPLINK, UPLINK + 1, 77, UPLINK + 2][usize::from(port) % 8]);
        now += u64::from(more) << 20;
        if more & 8 != 0 {
            // Beacons and announcements, of which one comes back in place of a frame's beginning.
            switch.tick(Nanos(now));
            let mut own = [0; 64];
            while let Some((from, length)) = switch.announcement(&mut own) {
                assert!(from.0 >= UPLINK, "{from:?} is no uplink");
                let decision = switch.decide(&mut cache, port, &own[..length], length, Nanos(now));
                let outside = |step: &Step| matches!(step, Step::Output(to) if to.0 >= UPLINK);
                let back = decision.steps.iter().any(outside);
                assert!(port.0 < UPLINK || !back, "R1: {port:?}");
            }
        }
        let frame = bytes.some(200);
        let head = frame.get(..HEADER).unwrap_or(frame);
        let length = match more & 3 {
            0 => frame.len() + 1000 * usize::from(more),
            _ => frame.len(),
        };
        let steps = {
            let decision = switch.decide(&mut cache, port, head, length, Nanos(now));
            decision.steps.to_vec()
        };
        let mut editor = Editor::new(head, length, Checksum::Full);
        let mut left = 0;
        for step in &steps {
            editor.apply(step);
            let Step::Output(to) = *step else { continue };
            left += 1;
            let uplink = |id: PortId| (UPLINK..UPLINK + 3).contains(&id.0);
            assert!(!(uplink(port) && uplink(to)), "R1: {port:?} to {to:?}");
            assert_ne!(to, PortId(77), "nobody is there");
            let out = editor.header();
            let key = FlowKey::extract_prefix(out, editor.length(length), to);
            let key = key.expect("what leaves is a frame");
            assert!(!key.dl_dst.is_reserved(), "R2");
            let ids = key.vlans.map(Vlan::id);
            assert!(ids.iter().all(|id| *id != 4095), "R9");
        }
        assert!(left <= 64, "{left} outputs");
    }
}

/// Lines of flows: what is understood says in its own words the same again, and can be put into
/// tables or not, which look up any key.
pub fn flow(data: &[u8]) {
    let Ok(text) = core::str::from_utf8(data) else {
        return;
    };
    let mut tables = FlowTables::new();
    let _ = tables.set_meters(vec![1, 2, 3]);
    for line in text.lines().take(8) {
        let _ = vswitch::ofctl::parse_key(line, &|_| None);
        let _ = MeterConfig::parse(line);
        let Ok(change) = FlowMod::parse(line, &|_| None) else {
            continue;
        };
        let _ = tables.apply(core::slice::from_ref(&change));
        let Ok(flow) = Flow::parse(line, &|_| None) else {
            continue;
        };
        let said = flow.to_string();
        let again = Flow::parse(&said, &|_| None);
        let again = again.unwrap_or_else(|e| panic!("{line:?} became {said:?}: {e}"));
        assert_eq!(again, flow, "{line:?} became {said:?}");
    }
    let key = FlowKey::default();
    for table in 0..4 {
        let _ = tables.lookup(table, &key);
    }
}
