//! Flows: their text, the tables, and what becomes of frames.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use arch::Nanos;
use proptest::prelude::*;

use crate::PortId;
use crate::flow::{Action, Flow, FlowMod};
use crate::key::{FRAG_ANY, FRAG_LATER, FlowKey, Vlan, ether, proto};
use crate::ofctl::{Why, parse_key};
use crate::tables::{FlowTables, TablesError};
use crate::trace::Datapath;
use crate::translate::{Emit, Normal, Translation};

fn names(name: &str) -> Option<PortId> {
    let number = name.strip_prefix("vm")?.parse().ok()?;
    Some(PortId(number))
}

/// A switch of ports 1 to 4 without any rules, where `normal` is port 9.
struct Hub;

impl Normal for Hub {
    fn begin(&mut self, _key: &FlowKey, _now: Nanos, _out: &mut Emit<'_>) {}

    fn normal(&mut self, key: &FlowKey, _now: Nanos, out: &mut Emit<'_>) {
        out.output(PortId(9), key.vlans);
    }

    fn output(&mut self, port: PortId, key: &FlowKey, out: &mut Emit<'_>) {
        out.output(port, key.vlans);
    }

    fn flood(&self) -> Vec<PortId> {
        (1..=4).map(PortId).collect()
    }
}

fn tables(lines: &[&str]) -> Result<FlowTables, TablesError> {
    let parse =
        |line: &&str| FlowMod::parse(line, &names).unwrap_or_else(|e| panic!("{line}: {e}"));
    let mods: Vec<FlowMod> = lines.iter().map(parse).collect();
    let mut tables = FlowTables::new();
    tables.set_meters(Vec::from([3]))?;
    tables.apply(&mods)?;
    Ok(tables)
}

/// The datapath actions for a frame.
fn actions(lines: &[&str], frame: &str) -> String {
    let tables = tables(lines).expect("good flows");
    let key = parse_key(frame, &names).unwrap_or_else(|e| panic!("{frame}: {e}"));
    let mut translation = Translation::default();
    let mut out = Emit::new(key, &mut translation, None);
    tables.run(&mut Hub, &key, Nanos::ZERO, &mut out);
    let steps = &translation.steps;
    Datapath { key: &key, steps }.to_string()
}

#[test]
fn actions_are_open_vswitchs() {
    for (flow, frame, want) in [
        ("actions=drop", "in_port=1", "drop"),
        ("actions=", "in_port=1", "drop"),
        ("actions=2,vm3,LOCAL", "in_port=1", "2,3,65534"),
        ("actions=1,2", "in_port=1", "2"),
        ("actions=in_port", "in_port=1", "1"),
        ("actions=flood", "in_port=2", "1,3,4"),
        ("actions=normal", "in_port=2", "9"),
        (
            "actions=push_vlan:0x8100,set_field:4105->vlan_vid,2",
            "in_port=1",
            "push_vlan(vid=9,pcp=0),2",
        ),
        (
            "actions=push_vlan:0x88a8,2",
            "in_port=1",
            "push_vlan(tpid=0x88a8,vid=0,pcp=0),2",
        ),
        (
            "actions=mod_vlan_vid:9,2",
            "in_port=1,dl_vlan=5,dl_vlan_pcp=3",
            "pop_vlan,push_vlan(vid=9,pcp=3),2",
        ),
        (
            "actions=strip_vlan,2,3",
            "in_port=1,dl_vlan=5",
            "pop_vlan,2,3",
        ),
        ("actions=strip_vlan,2", "in_port=1", "2"),
        (
            "actions=2,strip_vlan,3,mod_vlan_vid:5,4",
            "in_port=1,dl_vlan=5",
            "2,pop_vlan,3,push_vlan(vid=5,pcp=0),4",
        ),
        ("actions=mod_dl_src:02:00:00:00:00:09", "in_port=1", "drop"),
        (
            "ip,actions=mod_dl_src:02:00:00:00:00:09,mod_nw_dst:1.2.3.4,mod_nw_tos:8,dec_ttl,2",
            "in_port=1,icmp,nw_ttl=9",
            "set(eth(src=02:00:00:00:00:09)),set(ipv4(dst=1.2.3.4,tos=0x8,ttl=8)),2",
        ),
        ("ip,actions=2,dec_ttl,3", "in_port=1,ip,nw_ttl=1", "2"),
        (
            "udp6,actions=mod_tp_dst:53,2",
            "in_port=1,udp6,tp_src=1",
            "set(udp(dst=53)),2",
        ),
        (
            "arp,actions=set_field:2->arp_op,set_field:1.2.3.4->arp_spa,2",
            "in_port=1,arp,arp_op=1",
            "set(arp(op=2,sip=1.2.3.4)),2",
        ),
        ("actions=meter:3,2", "in_port=1", "meter(3),2"),
        (
            "ip,actions=set_field:10.1.0.0/16->ip_dst,2",
            "in_port=1,udp,nw_dst=192.168.3.4",
            "set(ipv4(dst=10.1.3.4)),2",
        ),
        (
            "actions=set_field:02:00:00:00:00:05/ff:00:00:00:00:0f->eth_src,2",
            "in_port=1,dl_src=04:aa:bb:cc:dd:e1",
            "set(eth(src=02:aa:bb:cc:dd:e5)),2",
        ),
        (
            "udp,actions=set_field:0x50/0xf0->udp_dst,2",
            "in_port=1,udp,tp_src=1,tp_dst=0x1234",
            "set(udp(dst=4692)),2",
        ),
        (
            "dl_vlan=5,actions=set_field:0x1002/0x1003->vlan_vid,2",
            "in_port=1,dl_vlan=5",
            "pop_vlan,push_vlan(vid=6,pcp=0),2",
        ),
        (
            "icmp,actions=set_field:0->icmp_type,set_field:3->icmp_code,2",
            "in_port=1,icmp,icmp_type=8",
            "set(icmp(type=0,code=3)),2",
        ),
        (
            "icmp6,icmp_type=135,icmp_code=0,actions=set_field:fe80::9->nd_target,set_field:02:00:00:00:00:09->nd_sll,2",
            "in_port=1,icmp6,icmp_type=135,icmp_code=0,nd_target=fe80::1,nd_sll=02:00:00:00:00:01",
            "set(nd(target=fe80::9,sll=02:00:00:00:00:09)),2",
        ),
        // What is no neighbour message any more has no such fields.
        (
            "icmp6,icmp_type=135,icmp_code=0,actions=set_field:128->icmpv6_type,set_field:fe80::9->nd_target,2",
            "in_port=1,icmp6,icmp_type=135,icmp_code=0,nd_target=fe80::1",
            "set(icmpv6(type=128)),2",
        ),
        // Nor is there a tag to change when it went.
        (
            "dl_vlan=5,actions=mod_dl_src:02:00:00:00:00:07,set_field:0x1009->vlan_vid,strip_vlan,mod_vlan_pcp:1,2",
            "in_port=1,dl_vlan=5",
            "set(eth(src=02:00:00:00:00:07)),pop_vlan,push_vlan(vid=0,pcp=1),2",
        ),
    ] {
        assert_eq!(actions(&[flow], frame), want, "{flow} {frame}");
    }
}

#[test]
fn the_highest_priority_wins_and_later_tables_are_reached() {
    let flows = [
        "priority=1,actions=1",
        "priority=7,ip,actions=2",
        "priority=7,ip,nw_dst=10.0.0.0/8,actions=4",
        "priority=8,ip,nw_dst=10.1.0.0/16,actions=mod_nw_dst:10.9.9.9,resubmit(,3),3",
        "priority=9,in_port=2,dl_vlan=5,actions=resubmit(4,3),goto_table:4",
        "table=3,priority=5,in_port=4,actions=normal",
        "table=3,priority=4,ip,nw_dst=10.9.0.0/16,actions=strip_vlan,4",
        "table=4,actions=in_port",
    ];
    for (frame, want) in [
        ("in_port=9", "1"),
        ("in_port=9,ip", "2"),
        // Of equal priority, the one that was there first.
        ("in_port=9,ip,nw_dst=10.2.0.1", "2"),
        (
            "in_port=9,udp,nw_dst=10.1.0.1",
            "set(ipv4(dst=10.9.9.9)),4,3",
        ),
        ("in_port=2,dl_vlan=5", "9,2"),
    ] {
        assert_eq!(actions(&flows, frame), want, "{frame}");
    }
}

#[test]
fn fragments_have_no_ports() {
    let flows = [
        "priority=9,tcp,tp_dst=80,actions=1",
        "priority=8,tcp,tp_dst=0,actions=2",
        "priority=1,actions=3",
    ];
    let tables = tables(&flows).expect("good flows");
    let of = |frag: u8, tp_dst: u16| {
        let key = FlowKey {
            dl_type: ether::IPV4,
            nw_proto: proto::TCP,
            nw_frag: frag,
            tp_dst,
            ..FlowKey::default()
        };
        let found = tables.lookup(0, &key).and_then(|i| tables.flow(i));
        found.map(|flow| flow.actions_text()).expect("a flow")
    };
    assert_eq!(of(0, 80), "output:1");
    assert_eq!(of(FRAG_ANY, 80), "output:2");
    assert_eq!(of(FRAG_ANY | FRAG_LATER, 0), "output:2");
    assert_eq!(of(0, 81), "output:3");
}

#[test]
fn text_comes_back_as_open_vswitch_prints_it() {
    for (text, want) in [
        ("actions=drop", "actions=drop"),
        (
            " , tcp , , actions= output:2 , 3",
            "tcp actions=output:2,output:3",
        ),
        (
            "in_port=LOCAL dl_vlan=9 dl_src=00:0A:E4:25:6B:B0 actions=flood",
            "in_port=LOCAL,dl_vlan=9,dl_src=00:0a:e4:25:6b:b0 actions=FLOOD",
        ),
        (
            "table=1,cookie=5,priority=0x10,eth_type=0x800,ip_proto=6,tcp_dst=80,actions=in_port",
            "cookie=0x5, table=1, priority=16,tcp,tp_dst=80 actions=IN_PORT",
        ),
        (
            "tcp6,ipv6_src=fe80::1/16,tp_dst=0x57/0xfff0,tcp_flags=0x2/0x12,actions=dec_ttl",
            "tcp6,ipv6_src=fe80::/16,tp_dst=0x50/0xfff0,tcp_flags=+syn-ack actions=dec_ttl",
        ),
        (
            "vlan_tci=0x7005,actions=normal",
            "dl_vlan=5,dl_vlan_pcp=3 actions=NORMAL",
        ),
        (
            "dl_vlan=0xffff,actions=mod_vlan_vid:3,mod_vlan_pcp:1",
            "vlan_tci=0x0000/0x1fff actions=mod_vlan_vid:3,mod_vlan_pcp:1",
        ),
        (
            "dl_vlan=3,actions=mod_vlan_vid:5,strip_vlan,strip_vlan",
            "dl_vlan=3 actions=mod_vlan_vid:5,pop_vlan,strip_vlan",
        ),
        (
            "ip,nw_src=1.2.3.4/255.0.255.0,nw_tos=184,ip_frag=first,actions=mod_nw_tos:8",
            "ip,nw_src=1.0.3.0/255.0.255.0,nw_tos=184,nw_frag=first actions=set_field:2->ip_dscp",
        ),
        (
            "icmp6,icmp_type=135,icmp_code=0,nd_target=::1.2.3.4,actions=2",
            "icmp6,icmp_type=135,icmp_code=0,nd_target=::1.2.3.4 actions=output:2",
        ),
        (
            "arp,arp_op=1,arp_tpa=1.2.3.0/24,actions=resubmit(vm3,5),resubmit(,7),goto_table:9",
            "arp,arp_tpa=1.2.3.0/24,arp_op=1 actions=resubmit(3,5),resubmit(,7),goto_table:9",
        ),
        (
            "ip,actions=set_field:10.0.0.0/255.0.0.0->nw_src,set_field:0.0.0.1/0.0.0.3->ip_dst,set_field:4->nw_tos",
            "ip actions=set_field:10.0.0.0/8->ip_src,set_field:0.0.0.1/0.0.0.3->ip_dst,set_field:4->nw_tos",
        ),
        (
            "tcp6,actions=set_field:fe80::/16->ipv6_src,set_field:0x50/0xf0->tcp_dst,mod_tp_src:9",
            "tcp6 actions=set_field:fe80::/16->ipv6_src,set_field:80/0xf0->tcp_dst,set_field:9->tcp_src",
        ),
        (
            "icmp6,icmpv6_type=136,icmp_code=0,actions=set_field:::1->nd_target,set_field:2:0:0:0:0:0/f:0:0:0:0:0->nd_tll",
            "icmp6,icmp_type=136,icmp_code=0 actions=set_field:::1->nd_target,set_field:02:00:00:00:00:00/0f:00:00:00:00:00->nd_tll",
        ),
        (
            "dl_vlan=3,actions=set_field:0x1005/0x100f->vlan_vid,set_field:3->vlan_pcp",
            "dl_vlan=3 actions=set_field:4101/0x100f->vlan_vid,set_field:3->vlan_pcp",
        ),
        (
            "add dl_type=0x1234,actions=meter:3,all",
            "dl_type=0x1234 actions=meter:3,ALL",
        ),
    ] {
        let flow: Flow = FlowMod::parse(text, &names)
            .unwrap_or_else(|e| panic!("{text}: {e}"))
            .into();
        assert_eq!(flow.to_string(), want);
        assert_eq!(Flow::parse(want, &names), Ok(flow));
    }
}

#[test]
fn an_error_names_field_and_place() {
    for (text, column, word, said) in [
        ("in_port=1", 10, "", "actions=… is missing"),
        (
            "bogus=3,actions=1",
            1,
            "bogus",
            "not a field, action or port known here",
        ),
        (
            "in_port=1,nw_src=1.2.3.4,actions=1",
            11,
            "nw_src",
            "needs a match of ip",
        ),
        (
            "tcp,udp,actions=1",
            5,
            "udp",
            "already matched otherwise before",
        ),
        (
            "tcp,tp_src=1,tp_src=2,actions=1",
            14,
            "tp_src",
            "already matched otherwise before",
        ),
        (
            "dl_vlan=4096,actions=1",
            1,
            "dl_vlan",
            "\"4096\" is no number from 0 to 4095",
        ),
        (
            "dl_vlan=0xffff,dl_vlan_pcp=3,actions=1",
            16,
            "dl_vlan_pcp",
            "already matched otherwise before",
        ),
        (
            "vlan_tci=5,actions=1",
            1,
            "vlan_tci",
            "\"5\" is not a TCI with bit 12, or zero for no tag",
        ),
        (
            "ip,nw_src=1.2.3.4/33,actions=1",
            4,
            "nw_src",
            "\"33\" is no number from 0 to 32",
        ),
        (
            "in_port=vm,actions=1",
            1,
            "in_port",
            "\"vm\" is not the name or number of a port",
        ),
        ("in_port=1/1,actions=1", 1, "in_port", "can not be masked"),
        (
            "udp,ip_frag=later,tp_src=5,actions=1",
            19,
            "tp_src",
            "needs a match of other fragments than later ones",
        ),
        ("actions=drop,1", 9, "drop", "goes with no other action"),
        ("actions=1,meter:3", 11, "meter", "must be the first action"),
        (
            "actions=goto_table:3,1",
            22,
            "1",
            "has no meaning in this command",
        ),
        (
            "actions=set_field:4101->vlan_vid",
            9,
            "set_field",
            "needs a match of dl_vlan, or push_vlan before it",
        ),
        (
            "actions=mod_vlan_vid:4095",
            9,
            "mod_vlan_vid",
            "\"4095\" is no number from 0 to 4094",
        ),
        (
            "dl_vlan=1,actions=push_vlan:0x8100,push_vlan:0x8100",
            36,
            "push_vlan",
            "two tags are there already, and more are not read",
        ),
        (
            "delete actions=1",
            8,
            "actions",
            "has no meaning in this command",
        ),
        (
            "ip,actions=set_field:7/7->nw_ttl",
            12,
            "set_field",
            "can not be masked",
        ),
        (
            "ip,actions=set_field:10.0.0.1/8->ip_src",
            12,
            "set_field",
            "its value has bits outside its mask",
        ),
        (
            "ip,actions=set_field:0.0.0.0/0->ip_src",
            12,
            "set_field",
            "a mask without bits changes nothing",
        ),
        (
            "icmp6,icmp_type=136,icmp_code=0,actions=set_field:02:00:00:00:00:01->nd_sll",
            41,
            "set_field",
            "needs a match of icmp6,icmp_type=135,icmp_code=0",
        ),
        (
            "tcp,actions=set_field:2->tcp_flags",
            13,
            "set_field",
            "\"tcp_flags\" is not a field that can be set",
        ),
        (
            "modify priority=3,actions=1",
            8,
            "priority",
            "has no meaning in this command",
        ),
    ] {
        let error = FlowMod::parse(text, &names).expect_err(text);
        let found = (error.column, error.word.as_str(), error.why.to_string());
        assert_eq!(found, (column, word, said.to_string()), "{text}");
    }
    let error = Flow::parse("table=3,actions=resubmit(,3)", &names).expect_err("a circle");
    assert_eq!(error.why, Why::Backwards { from: 3, to: 3 });
    let error = Flow::parse("table=3,actions=goto_table:2", &names).expect_err("a way back");
    assert_eq!(error.why, Why::Backwards { from: 3, to: 2 });
}

#[test]
fn what_a_frame_can_cost_is_bounded_when_flows_are_added() {
    // Each table looks the next up twice: 2^n look-ups.
    let doubling: Vec<String> = (0..20)
        .map(|t| alloc::format!("table={t},actions=resubmit(,{0}),resubmit(,{0})", t + 1))
        .collect();
    let lines: Vec<&str> = doubling.iter().map(String::as_str).collect();
    assert!(matches!(tables(&lines), Err(TablesError::TooLong { .. })));
    assert!(tables(lines.get(10..).expect("20 lines")).is_ok());
    let chain: Vec<String> = (0..64)
        .map(|t| alloc::format!("table={t},actions=goto_table:{}", t + 1))
        .collect();
    let lines: Vec<&str> = chain.iter().map(String::as_str).collect();
    assert!(matches!(
        tables(&lines),
        Err(TablesError::TooLong { depth: 65, .. })
    ));
    assert!(tables(lines.get(1..).expect("64 lines")).is_ok());
    let none = tables(&["actions=meter:4,1"]).map(|_| ());
    assert_eq!(none, Err(TablesError::NoMeter { table: 0, meter: 4 }));
}

#[test]
fn flows_are_added_changed_and_removed_by_match() {
    let start = [
        "priority=5,ip,nw_dst=10.0.0.0/8,cookie=0x10,actions=1",
        "priority=5,ip,nw_dst=10.1.0.0/16,cookie=0x20,actions=2",
        "priority=6,arp,cookie=0x30,actions=3",
        "table=2,ip,actions=4",
    ];
    for (change, touched, left) in [
        ("add priority=6,arp,actions=4", 1, 4),
        ("add priority=7,arp,actions=4", 1, 5),
        ("delete", 4, 0),
        ("delete table=0", 3, 1),
        ("delete ip", 3, 1),
        ("delete ip,nw_dst=10.0.0.0/8", 2, 2),
        ("delete ip,nw_dst=10.1.0.0/16", 1, 3),
        ("delete_strict ip,nw_dst=10.0.0.0/8,priority=5", 1, 3),
        ("delete_strict ip,nw_dst=10.0.0.0/8", 0, 4),
        ("delete cookie=0x10/0x10", 2, 2),
        ("delete cookie=0x20/-1", 1, 3),
        ("delete out_port=3", 1, 3),
        ("modify ip,actions=normal", 3, 4),
        ("modify udp,actions=normal", 1, 5),
        ("modify udp,cookie=1/1,actions=normal", 0, 4),
        ("modify_strict arp,priority=6,actions=normal", 1, 4),
    ] {
        let mut tables = tables(&start).expect("good flows");
        let change_of = FlowMod::parse(change, &names).unwrap_or_else(|e| panic!("{change}: {e}"));
        assert_eq!(tables.apply(&[change_of]), Ok(touched), "{change}");
        assert_eq!(tables.flows().len(), left, "{change}");
    }
}

#[test]
fn of_several_changes_all_are_made_or_none() {
    let mut tables = tables(&["priority=1,actions=1"]).expect("good flows");
    let parse = |line| FlowMod::parse(line, &names).expect(line);
    let changes = [
        parse("delete"),
        parse("actions=2"),
        parse("actions=meter:77,2"),
    ];
    assert!(tables.apply(&changes).is_err());
    let left: Vec<String> = tables.flows().iter().map(|c| c.flow.to_string()).collect();
    assert_eq!(left, ["priority=1 actions=output:1"]);
    assert_eq!(tables.apply(&changes[..2]), Ok(2));
}

/// Words that flows are made of.
const WORDS: [&str; 34] = [
    "table=1",
    "priority=7",
    "cookie=0x5",
    "in_port=1",
    "dl_src=02:00:00:00:00:01",
    "dl_vlan=5",
    "dl_vlan_pcp=3",
    "vlan_tci=0x1005/0x1fff",
    "ip",
    "ipv6",
    "arp",
    "tcp",
    "udp6",
    "icmp6",
    "nw_src=10.0.0.0/8",
    "ipv6_dst=fe80::/64",
    "nw_ttl=3",
    "ip_frag=no",
    "tp_src=80",
    "tp_dst=0x50/0xf0",
    "tcp_flags=+syn-ack",
    "icmp_type=135",
    "icmp_code=0",
    "nd_target=fe80::1",
    "arp_op=1",
    "actions=",
    "output:2",
    "normal",
    "push_vlan:0x8100",
    "mod_vlan_vid:5",
    "set_field:02:00:00:00:00:09->eth_dst",
    "resubmit(,9)",
    "drop",
    "0x",
];

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in ".{0,80}") {
        let _ = FlowMod::parse(&text, &names);
        let _ = parse_key(&text, &names);
        let _ = crate::config::MeterConfig::parse(&text);
    }

    #[test]
    fn what_is_read_comes_back(
        words in prop::collection::vec(prop::sample::select(&WORDS[..]), 0..8),
        behind in prop::collection::vec(prop::sample::select(&WORDS[..]), 0..5),
        cut in 0..200usize,
    ) {
        let mut text = words.join(",") + ",actions=" + &behind.join(",");
        if cut < text.len() {
            text.remove(cut);
        }
        if let Ok(flow) = Flow::parse(&text, &names) {
            prop_assert_eq!(Flow::parse(&flow.to_string(), &names), Ok(flow), "{}", text);
        }
    }

    /// The classifier against a walk over all flows.
    #[test]
    fn the_classifier_finds_what_a_walk_finds(
        flows in prop::collection::vec((0..4u16, 0..3u16, 0..3u8, 0..4u8, any::<bool>()), 1..40),
        frames in prop::collection::vec((0..3u16, 0..3u8, 0..4u8), 1..20),
    ) {
        let lines: Vec<String> = flows.iter().map(|(priority, port, vlan, host, masked)| {
            let mut line = alloc::format!("priority={priority},");
            if *port != 0 { line += &alloc::format!("in_port={port},"); }
            if *vlan != 0 { line += &alloc::format!("dl_vlan={vlan},"); }
            if *host != 0 { line += &alloc::format!("ip,nw_src=10.0.0.{host}/{},", if *masked { 31 } else { 32 }); }
            line + "actions=normal"
        }).collect();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let tables = tables(&lines).expect("good flows");
        for (port, vlan, host) in frames {
            let key = FlowKey {
                in_port: PortId(port),
                dl_type: ether::IPV4,
                vlans: [if vlan != 0 { Vlan::new(vlan.into(), 0) } else { Vlan::NONE }, Vlan::NONE],
                nw_src: crate::key::ipv4([10, 0, 0, host]),
                ..FlowKey::default()
            };
            let matching = tables.flows().iter().map(|c| &c.flow).filter(|f| f.matching.covers(&key));
            // The last of the highest is the first of them, counted from the end.
            let best = matching.rev().max_by_key(|f| f.priority);
            let found = tables.lookup(0, &key).and_then(|index| tables.flow(index));
            prop_assert_eq!(found, best);
        }
    }
}

#[test]
fn actions_know_what_they_need() {
    for action in [
        "mod_nw_src:1.2.3.4",
        "dec_ttl",
        "mod_tp_src:5",
        "set_field:1->arp_op",
        "set_field:5->tcp_src",
    ] {
        let text = alloc::format!("dl_type=0x1234,actions={action}");
        let error = Flow::parse(&text, &names).expect_err(&text);
        assert!(matches!(error.why, Why::Needs(_)), "{text}: {error}");
    }
    let flow = Flow::parse("actions=controller", &names);
    assert!(flow.is_err_and(|e| e.why == Why::Unknown));
    let flow = Flow::parse("actions=2", &names).expect("a flow");
    assert_eq!(flow.actions, [Action::Output(PortId(2))]);
}
