//! The switch beside Open vSwitch: random switches, flows and frames, and both must do the same
//! with each frame.
//!
//! Open vSwitch runs unprivileged with dummy devices, and `ofproto/trace` says what it would do
//! with a frame: its view of the headers, and its actions. What Tessera's rules want otherwise is
//! written down in [`Rules`], each with the condition under which it holds; everything else must be
//! equal: which ports get the frame, in what form, and how each header was read. The rewritten
//! bytes are read again and their checksums summed the naive way.
//!
//! Flow text goes to `ovs-ofctl parse-flows`, too: what Tessera takes, Open vSwitch must take, and
//! print alike.

mod frames;
pub mod ovs;
mod random;
mod text;
mod world;

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use arch::Nanos;
use vswitch::Switch;
use vswitch::edit::{Checksum, Editor};
use vswitch::key::{FRAG_LATER, FlowKey, Vlan, ether, proto};
use vswitch::mirror::{MirrorConfig, MirrorOutput};
use vswitch::ofctl::parse_key;
use vswitch::port::{PortConfig, PortKind, VlanMode};
use vswitch::translate::Step;
use vswitch::{MacAddr, PortId};

use ovs::{Daemons, Traced};
use random::Random;
use world::World;

/// Frames for each random switch.
const FRAMES: u64 = 250;
/// The port that every bridge of Open vSwitch has beside those it was given.
const LOCAL: u32 = 100;

/// What was compared.
#[derive(Debug, Default)]
struct Tally {
    cases: u64,
    outputs: u64,
    rewritten: u64,
    ruled: u64,
    /// Not compared by their outputs: a rule wants something that cannot be told from the other's.
    left_out: u64,
    learned: u64,
}

/// Compares `cases` frames; how it went. Files go to `scratch`.
///
/// # Errors
/// Open vSwitch cannot be had, or the first difference, with all that is needed to repeat it.
pub fn run(scratch: &Path, cases: u64, seed: u64) -> Result<String> {
    let texts = text::compare(
        scratch,
        &mut Random::new(seed),
        cases.div_ceil(50).max(1000),
    )?;
    let mut daemons = Daemons::start(scratch)?;
    let mut tally = Tally::default();
    let mut number = 0;
    while tally.cases < cases {
        let seed = seed.wrapping_mul(1_000_003).wrapping_add(number);
        number += 1;
        let frames = FRAMES.min(cases - tally.cases);
        compare_world(&mut daemons, seed, frames, &mut tally)
            .with_context(|| format!("world {seed}"))?;
    }
    let Tally {
        cases,
        outputs,
        rewritten,
        ruled,
        left_out,
        learned,
    } = tally;
    Ok(format!(
        "{cases} frames through {number} switches: {outputs} outputs, {rewritten} rewritten, \
         {ruled} where a rule wants otherwise, {left_out} left out by a rule, {learned} because \
         Open vSwitch learned in the trace; {texts} flow texts"
    ))
}

fn compare_world(daemons: &mut Daemons, seed: u64, frames: u64, tally: &mut Tally) -> Result<()> {
    let mut random = Random::new(seed);
    let world = World::random(&mut random);
    let mut switch = Switch::new(world.config.clone(), [seed, !seed])
        .with_context(|| format!("{:#?}", world.config))?;
    daemons.build(&world)?;
    world.teach(&mut switch)?;
    for _ in 0..frames {
        let (in_port, frame) = frames::random(&mut random, &world);
        let said = daemons.trace(in_port, &frame)?;
        compare(&world, &mut switch, in_port, &frame, &said, tally).with_context(|| {
            let hex: String = frame.iter().map(|b| format!("{b:02x}")).collect();
            let flows = world.config.flows.join("\n");
            let ports = world.ports_text();
            format!(
                "{ports}\n{flows}\nin_port={} {hex}\n--- Open vSwitch\n{}\n---",
                in_port.0, said.text
            )
        })?;
    }
    Ok(())
}

/// A frame that leaves: where, and what it looks like.
type Output = (u32, FlowKey);

fn compare(
    world: &World,
    switch: &mut Switch,
    in_port: PortId,
    frame: &[u8],
    said: &Traced,
    tally: &mut Tally,
) -> Result<()> {
    tally.cases += 1;
    let key = FlowKey::extract(frame, in_port).context("a short frame was made")?;
    same_key(&key, said)?;
    let mut trace = String::new();
    let decision = switch.explain(&key, Nanos::ZERO, &mut trace);
    let (steps, drop) = (decision.steps.to_vec(), decision.drop);
    let rules = Rules {
        world,
        key: &key,
        in_port,
    };
    if said.learned_itself(&key) {
        // A trace learns nothing here; there, `normal` learned an address and then sent to it.
        tally.learned += 1;
        return Ok(());
    }
    if rules.leave_out(said) {
        tally.left_out += 1;
        return Ok(());
    }
    let mut ours = outputs_of(&key, &steps);
    let theirs = said.outputs(&key)?;
    let mut wanted: Vec<Output> = rules.of(theirs.clone());
    tally.ruled += u64::from(wanted.len() != theirs.iter().filter(|(p, _)| *p != LOCAL).count());
    tally.outputs += ours.len() as u64;
    rules.forget_copied_tags(&mut ours);
    rules.forget_copied_tags(&mut wanted);
    let order =
        |outputs: &mut Vec<Output>| outputs.sort_by_key(|(port, key)| (*port, *key.words()));
    order(&mut ours);
    order(&mut wanted);
    if ours != wanted {
        let alone = |some: &[Output], others: &[Output]| -> String {
            let alone = some.iter().filter(|output| !others.contains(output));
            let line = |(port, key): &Output| format!("  {port}: {:x?} {key:x?}\n", key.vlans);
            alone.map(line).collect()
        };
        bail!(
            "outputs differ (drop: {drop:?})\nof Tessera alone:\n{}of Open vSwitch alone:\n{}\
             trace:\n{trace}",
            alone(&ours, &wanted),
            alone(&wanted, &ours)
        );
    }
    check_bytes(&key, frame, &steps, tally)
}

/// What the steps do to the frame of `key`, output by output.
fn outputs_of(key: &FlowKey, steps: &[Step]) -> Vec<Output> {
    let mut key = *key;
    let mut outputs = Vec::new();
    for step in steps {
        match *step {
            Step::Output(port) => outputs.push((port.0.into(), key)),
            Step::PushVlan(tag) => key.vlans = [tag, key.vlans[0]],
            Step::PopVlan => key.vlans = [key.vlans[1], Vlan::NONE],
            Step::Set(field) => key.set(field),
            // Kept where keys have nothing: the meters that an output is behind.
            Step::Meter(id) => key.reserved[0] |= 1 << id,
        }
    }
    outputs
}

/// Whether Open vSwitch read the same in the frame's headers.
fn same_key(key: &FlowKey, said: &Traced) -> Result<()> {
    let flow = said.flow()?;
    // It names the second tag's fields with a 1 behind, which flows here have not.
    let (mut words, mut inner, mut ports) = (Vec::new(), Vec::new(), (0, 0));
    for word in flow.split(',') {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        match name {
            "dl_vlan1" | "dl_vlan_pcp1" | "vlan_tci1" => {
                inner.push(format!("{}={value}", name.trim_end_matches('1')));
            }
            // Told for protocols, too, by whose ports no flow goes.
            "tp_src" => ports.0 = value.parse()?,
            "tp_dst" => ports.1 = value.parse()?,
            "mpls" => words.push("dl_type=0x8847".to_owned()),
            "mplsm" => words.push("dl_type=0x8848".to_owned()),
            name if name.starts_with("mpls_") => {}
            // Not kept here: nothing matches on them.
            "ipv6_label" | "nd_reserved" | "nd_options_type" | "igmp_type" | "eth" => {}
            _ => words.push(word.to_owned()),
        }
    }
    let none = |_: &str| None;
    let read = |words: &[String]| parse_key(&words.join(","), &none).context(flow.to_owned());
    let mut theirs = read(&words)?;
    theirs.vlans[1] = read(&inner)?.vlans[0];
    theirs.tp_src |= ports.0;
    theirs.tp_dst |= ports.1;
    let mut ours = *key;
    if (ours.dl_type, ours.nw_proto) == (ether::IPV4, proto::ICMPV6) {
        // It reads such a message in IPv4, too, where no flow can match it.
        (theirs.tp_src, theirs.tp_dst) = (ours.tp_src, ours.tp_dst);
    }
    for vlan in ours.vlans.iter_mut().chain(&mut theirs.vlans) {
        // It does not say which kind of tag.
        vlan.tpid = 0;
    }
    ensure!(
        ours == theirs,
        "the headers are read differently\nTessera:      {ours:x?}\nOpen vSwitch: {theirs:x?}"
    );
    Ok(())
}

/// Whether the bytes become what the steps say, with the rest untouched and right checksums.
fn check_bytes(key: &FlowKey, frame: &[u8], steps: &[Step], tally: &mut Tally) -> Result<()> {
    if !steps.iter().any(|s| !matches!(s, Step::Output(_))) {
        return Ok(());
    }
    tally.rewritten += 1;
    let sound = frames::checksums(frame);
    let prefix = frame.get(..128).unwrap_or(frame);
    let mut editor = Editor::new(prefix, frame.len(), Checksum::Full);
    let mut want = *key;
    for step in steps {
        editor.apply(step);
        match *step {
            Step::PushVlan(tag) => want.vlans = [tag, want.vlans[0]],
            Step::PopVlan => want.vlans = [want.vlans[1], Vlan::NONE],
            Step::Set(field) => want.set(field),
            Step::Output(_) | Step::Meter(_) => {
                let mut bytes = editor.header().to_vec();
                bytes.extend(frame.get(editor.taken()..).unwrap_or_default());
                let length = bytes.len();
                bytes.resize(length + editor.padding(frame.len()), 0);
                let mut got = FlowKey::extract(&bytes, key.in_port)?;
                // A neighbour message's fields appear, or disappear, with its type; one without an
                // option does not get it; with an option twice, none is read.
                if key.is_neighbour() || want.is_neighbour() {
                    let same = key.is_neighbour() == want.is_neighbour();
                    if !same || key.nd_target == [0; 16] {
                        got.nd_target = want.nd_target;
                    }
                    if !same || key.arp_sha == MacAddr::default() {
                        got.arp_sha = want.arp_sha;
                    }
                    if !same || key.arp_tha == MacAddr::default() {
                        got.arp_tha = want.arp_tha;
                    }
                }
                // Behind two tags there may be a third, which shows when one goes.
                let third = matches!(want.dl_type, ether::VLAN | ether::SERVICE_VLAN);
                let shows = |key: &FlowKey| match sound.whole && !third {
                    true => *key,
                    // Fields of headers that are cut off are nowhere.
                    false => FlowKey {
                        vlans: if third { Default::default() } else { key.vlans },
                        dl_src: key.dl_src,
                        dl_dst: key.dl_dst,
                        ..FlowKey::default()
                    },
                };
                ensure!(
                    shows(&got) == shows(&want),
                    "bytes and steps differ after {steps:?}\n{got:x?}\n{want:x?}"
                );
                ensure!(
                    !sound.right || frames::checksums(&bytes).right,
                    "wrong checksums after {steps:?}: {bytes:02x?}"
                );
            }
        }
    }
    Ok(())
}

/// What Tessera's rules take away from what Open vSwitch does, and when.
struct Rules<'a> {
    world: &'a World,
    key: &'a FlowKey,
    in_port: PortId,
}

impl Rules<'_> {
    fn kind(&self, port: u32) -> Option<PortKind> {
        let ports = &self.world.config.ports;
        let port = ports.iter().find(|p| u32::from(p.id.0) == port)?;
        Some(port.kind)
    }

    /// The outputs that are left.
    fn of(&self, outputs: Vec<Output>) -> Vec<Output> {
        if self.keeps_out() {
            return Vec::new();
        }
        let config = &self.world.config;
        let from = config.ports.iter().find(|p| p.id == self.in_port);
        let from_uplink = from.is_some_and(|p| p.kind == PortKind::Uplink);
        let first_uplink = outputs
            .iter()
            .filter(|(port, _)| self.kind(*port) == Some(PortKind::Uplink))
            .map(|(port, _)| *port)
            .min();
        let stays = |(port, key): &Output| {
            let to = config.ports.iter().find(|p| u32::from(p.id.0) == *port);
            let Some(to) = to else {
                // Open vSwitch's own port.
                return false;
            };
            if self.is_behind_native(to) {
                return false;
            }
            // Copies into a VLAN do not go back. Where there are such, flows are not.
            let copies = |m: &MirrorConfig| matches!(m.output, MirrorOutput::Vlan(_));
            if to.id == self.in_port && config.mirrors.iter().any(copies) {
                return false;
            }
            if to.kind == PortKind::Uplink {
                // R1; and R3, R4, R10: a guest's frames leave by its own uplink alone.
                return !from_uplink && first_uplink == Some(*port) && self.leaves(key);
            }
            // Two protected ports do not talk, by flows neither.
            let apart = to.protected && from.is_some_and(|p| p.protected);
            // R3: unknown unicast goes to guests only where they learn by floods.
            let unknown = self.world.plain && self.is_unknown();
            let floods = to.learning.is_some_and(|l| l.flood);
            let mirror = to.kind == PortKind::Mirror;
            !apart && (mirror || !unknown || floods) && self.leaves(key)
        };
        outputs.into_iter().filter(stays).collect()
    }

    /// A mirror that selects ports by what leaves there copies the first of a frame's outputs. Here
    /// that is the one of the lowest number, there any: the copies' tags differ.
    fn forget_copied_tags(&self, outputs: &mut [Output]) {
        let of_inputs =
            |mirror: &MirrorConfig| mirror.select_all || mirror.select_src.contains(&self.in_port);
        if self.world.config.mirrors.iter().all(of_inputs) {
            return;
        }
        for (port, key) in outputs {
            if self.kind(*port) == Some(PortKind::Mirror) {
                key.vlans = Default::default();
            }
        }
    }

    /// R2, R9: what must not be sent at all.
    fn leaves(&self, key: &FlowKey) -> bool {
        !key.dl_dst.is_reserved() && !key.vlans.iter().any(|v| v.present() && v.id() == 4095)
    }

    fn is_unknown(&self) -> bool {
        let known = |mac: &MacAddr| {
            let vlan = self.vlan();
            let place = self.world.homes().find(|(home, _)| home == mac);
            place.is_some_and(|(_, port)| world::carries(port, vlan))
        };
        !self.key.dl_dst.is_group() && !known(&self.key.dl_dst)
    }

    /// The VLAN that the frame is in where it comes in.
    fn vlan(&self) -> u16 {
        self.within().0
    }

    /// The same; 0 where its port does not admit it, as flows may send it all the same.
    fn entry_vlan(&self) -> u16 {
        let ports = &self.world.config.ports;
        let entry = ports.iter().find(|p| p.id == self.in_port);
        let admitted = entry.is_some_and(|p| world::admits(p, self.key.vlans[0].id()));
        if admitted { self.vlan() } else { 0 }
    }

    /// Its VLAN, and that of the tag behind, 0 for none.
    fn within(&self) -> (u16, u16) {
        let ports = &self.world.config.ports;
        let Some(port) = ports.iter().find(|p| p.id == self.in_port) else {
            return (0, 0);
        };
        let [outer, inner] = self.key.vlans;
        let inner = match port.mode() {
            VlanMode::Access => 0,
            VlanMode::Dot1qTunnel => outer.id(),
            _ => inner.id(),
        };
        (world::vlan_of(port, outer.id()), inner)
    }

    /// Whether the port would take the native tag off, and the one behind would stand for its VLAN:
    /// then it does not leave. Flows' switches have no such ports.
    fn is_behind_native(&self, to: &PortConfig) -> bool {
        let (vlan, inner) = self.within();
        to.mode() == VlanMode::NativeUntagged && vlan == to.tag.unwrap_or(0) && inner != 0
    }

    /// Whether `normal` sent a frame to an address known behind a port that takes no frames with
    /// such a second tag: an access port none at all, a tunnel only those of its `cvlans`. There it
    /// is sent all the same, and an access port takes the tag off; here the address is one that is
    /// not known in this VLAN. With flows, the frame may have had that tag by then.
    fn is_known_behind_other_tags(&self, said: &Traced) -> bool {
        let config = &self.world.config;
        if !self.world.plain {
            let second = self.key.vlans[1].present() || said.text.contains("push_vlan:");
            let access = config.ports.iter().any(|p| p.mode() == VlanMode::Access);
            return second && access && said.text.contains("forwarding to learned port");
        }
        let (vlan, inner) = self.within();
        let excludes = |port: &PortConfig| match port.mode() {
            VlanMode::Access => inner != 0,
            VlanMode::Dot1qTunnel => !port.cvlans.is_empty() && !port.cvlans.contains(&inner),
            _ => false,
        };
        let mut homes = self.world.homes();
        homes.any(|(mac, port)| {
            mac == self.key.dl_dst && world::carries(port, vlan) && excludes(port)
        })
    }

    /// Whether what is wanted cannot be told from what Open vSwitch did.
    fn leave_out(&self, said: &Traced) -> bool {
        self.is_known_behind_other_tags(said)
            || self.floods_to_other_vlan(said)
            || self.pushes_third_tag(said)
            // A later fragment has no ICMP header here; there its payload is changed.
            || (self.key.nw_frag & FRAG_LATER != 0 && said.text.contains("->icmp"))
            // Flows change reverse ARP as they say; there this is taken and not done.
            || (self.key.dl_type == ether::RARP && ["->arp_", "_ARP_"].iter().any(|of| said.text.contains(of)))
    }

    /// Whether flows may push a third tag: there the innermost gets lost, here the frame stops.
    fn pushes_third_tag(&self, said: &Traced) -> bool {
        let tags = self.key.vlans.iter().filter(|v| v.present()).count();
        tags + said.text.matches(" push_vlan:").count() > 2
    }

    /// Whether a flow floods, and the uplink is not in the frame's VLAN: here it gets nothing by
    /// that (R3, R10: a frame goes to the outside by its own uplink alone, and has none).
    fn floods_to_other_vlan(&self, said: &Traced) -> bool {
        let ports = &self.world.config.ports;
        let vlan = self.entry_vlan();
        let mut uplinks = ports.iter().filter(|p| p.kind == PortKind::Uplink);
        let other = uplinks.any(|p| !world::carries(p, vlan));
        let floods = ["    FLOOD\n", "    ALL\n"];
        other && floods.iter().any(|word| said.text.contains(word))
    }

    /// Whether the frame does not enter at all.
    fn keeps_out(&self) -> bool {
        let (key, config) = (self.key, &self.world.config);
        let Some(port) = config.ports.iter().find(|p| p.id == self.in_port) else {
            return true;
        };
        let local = matches!(port.kind, PortKind::Vnic | PortKind::Management);
        let uplink = port.kind == PortKind::Uplink;
        // Mirrors' ports send only.
        port.kind == PortKind::Mirror
            // R9; a tag that is cut off, or a third one.
            || key.vlans.iter().any(|v| v.present() && v.id() == 4095)
            || matches!(key.dl_type, ether::VLAN | ether::SERVICE_VLAN)
            // R2.
            || key.dl_dst.is_reserved()
            // R7.
            || (local && !port.forged_source && !port.macs.contains(&key.dl_src))
            // R5.
            || (uplink && self.is_echo())
            // R4.
            || (uplink && key.dl_dst.is_group() && self.is_passive())
            // A third tag would be needed; only `normal` needs it, and the others have none here.
            || (self.world.plain
                && port.mode() == VlanMode::Dot1qTunnel
                && key.vlans[1].present())
    }

    /// Whether its source is a guest's own address, or one learned from a guest in its VLAN.
    fn is_echo(&self) -> bool {
        let vlan = self.entry_vlan();
        let mut homes = self.world.homes();
        homes.any(|(mac, port)| {
            let own = port.macs.contains(&mac);
            mac == self.key.dl_src && (own || world::carries(port, vlan))
        })
    }

    /// Whether another uplink of the frame's VLAN is preferred to the one it came by.
    fn is_passive(&self) -> bool {
        let vlan = self.entry_vlan();
        let mut uplinks = self
            .world
            .config
            .ports
            .iter()
            .filter(|p| p.kind == PortKind::Uplink && world::carries(p, vlan));
        uplinks.next().is_some_and(|p| p.id != self.in_port)
            || !uplinks.any(|_| true) && {
                let own = self
                    .world
                    .config
                    .ports
                    .iter()
                    .find(|p| p.id == self.in_port);
                !own.is_some_and(|p| world::carries(p, vlan))
            }
    }
}
