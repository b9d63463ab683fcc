//! Flow text beside `ovs-ofctl parse-flows`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use vswitch::flow::Flow;

use super::ovs::{is_old, run};
use super::random::Random;
use super::world::flow;

/// How many lines are given to `ovs-ofctl` at once.
const BATCH: usize = 1000;

/// Compares about `count` flows; how many.
pub fn compare(scratch: &Path, random: &mut Random, count: u64) -> Result<u64> {
    fs::create_dir_all(scratch)?;
    let mut compared = 0;
    while compared < count {
        let (mut old, mut new, mut masked) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..BATCH {
            let (line, wanted) = line(random);
            let parsed = match Flow::parse(&line, &|_| None) {
                Ok(parsed) => parsed,
                Err(error) => {
                    ensure!(!wanted, "{line}\nis refused: {error}");
                    continue;
                }
            };
            let text = parsed.to_string();
            let again = Flow::parse(&text, &|_| None).with_context(|| text.clone())?;
            ensure!(
                again == parsed,
                "{line}\nis printed as\n{text}\nwhich is another flow"
            );
            let only_old = is_old(&text);
            let only_new = ["push_vlan", "meter"].iter().any(|a| text.contains(a));
            // Before 1.5, bits of a field are set in other words.
            let sets = text.split_once("actions=").map_or("", |(_, a)| a);
            let in_part = sets.split(",set_field:").any(|set| {
                set.split_once("->")
                    .is_some_and(|(value, _)| value.contains('/'))
            });
            match (only_old, only_new, in_part) {
                (true, true, _) | (true, _, true) => {}
                (true, false, false) => old.push((line, parsed)),
                (false, _, false) => new.push((line, parsed)),
                (false, _, true) => masked.push((line, parsed)),
            }
        }
        compared += (old.len() + new.len() + masked.len()) as u64;
        let given = |flows: &[(String, Flow)]| -> Vec<String> {
            flows.iter().map(|(line, _)| line.clone()).collect()
        };
        // OpenFlow 1.3 prints as we do, and 1.5 where bits of a field are set.
        for (version, flows) in [("OpenFlow13", &new), ("OpenFlow15", &masked)] {
            let printed = printed(scratch, version, &given(flows))?;
            for ((line, flow), theirs) in flows.iter().zip(&printed) {
                let ours = as_parse_flows(flow, &flow.match_text(), &flow.actions_text());
                ensure!(
                    ours == *theirs,
                    "{line}\nTessera:      {ours}\nOpen vSwitch: {theirs}"
                );
            }
        }
        // OpenFlow 1.0 has other words for actions: what we print must mean the same to it.
        let ours: Vec<String> = old.iter().map(|(_, flow)| flow.to_string()).collect();
        let meant = printed(scratch, "OpenFlow10", &given(&old))?;
        let said = printed(scratch, "OpenFlow10", &ours)?;
        for (((line, flow), meant), said) in old.iter().zip(&meant).zip(&said) {
            // "No tag" looks different in the two forms of match that this protocol has.
            let plain = |text: &str| text.replace("vlan_tci=0x0000/0x1fff", "vlan_tci=0x0000");
            let (meant, said) = (plain(meant), plain(said));
            let text = flow.to_string();
            ensure!(
                meant == said,
                "{line}\nwhich is   {meant}\nis printed {text}\nwhich is   {said}"
            );
            let (_, actions) = meant.split_once("actions=").context("no actions")?;
            let matched = plain(&flow.match_text());
            let ours = as_parse_flows(flow, &matched, actions);
            ensure!(
                ours == meant,
                "{line}\nTessera:      {ours}\nOpen vSwitch: {meant}"
            );
        }
    }
    Ok(compared)
}

/// A line, and whether it must be taken: flows as they are made, and some of them with a change.
fn line(random: &mut Random) -> (String, bool) {
    let (table, priority) = (random.below(4) as u8, random.number() as u16);
    let mut line = flow(random, table, priority, &[1, 2, 3], true, 3);
    if random.once_in(2) {
        return (line, true);
    }
    let words = [
        "drop",
        "7",
        "65536",
        "dl_vlan=0xffff",
        "nw_src",
        "tp_src=5",
        "ip",
        "/",
        "->",
        "0x",
        "00",
        "-",
        "actions=",
        "pop_vlan",
        "meter:3",
        "+",
        ":",
        "=",
        "set_field:1->ip_dscp",
        "4095",
    ];
    for _ in 0..1 + random.below(2) {
        let at = random.below(line.len());
        match random.below(3) {
            0 => line.insert_str(at, random.pick(&words)),
            1 => {
                line.remove(at);
            }
            _ => {
                let cuts: Vec<usize> = line.match_indices(',').map(|(at, _)| at).collect();
                if !cuts.is_empty() {
                    line.insert_str(random.pick(&cuts), &format!(",{}", random.pick(&words)));
                }
            }
        }
    }
    (line, false)
}

/// A flow as `parse-flows` shows it.
fn as_parse_flows(flow: &Flow, matched: &str, actions: &str) -> String {
    let mut out = String::new();
    if flow.table != 0 {
        out += &format!("table:{} ", flow.table);
    }
    if !matched.is_empty() {
        out += &format!("{matched} ");
    }
    if flow.cookie != 0 {
        out += &format!("cookie:{:#x} ", flow.cookie);
    }
    out + "actions=" + actions
}

/// What `parse-flows` makes of lines, without what table 0 and the like look like.
fn printed(scratch: &Path, version: &str, lines: &[String]) -> Result<Vec<String>> {
    let file = scratch.join("texts");
    fs::write(&file, lines.join("\n") + "\n")?;
    let name = file.display().to_string();
    let said = run(scratch, "ovs-ofctl", &["-O", version, "parse-flows", &name]);
    let said =
        said.with_context(|| format!("Open vSwitch refuses a line of {name} that Tessera takes"))?;
    let shown = said.lines().filter(|l| l.contains("_FLOW_MOD "));
    let mut flows = Vec::new();
    for (shown, given) in shown.zip(lines) {
        let (_, flow) = shown
            .split_once(": ADD ")
            .with_context(|| format!("{given}\nis shown as\n{shown}"))?;
        // A flow without a table goes to table 0.
        let flow = flow.strip_prefix("table:0 ").unwrap_or(flow);
        flows.push(flow.strip_prefix("table:255 ").unwrap_or(flow).to_owned());
    }
    ensure!(
        flows.len() == lines.len(),
        "{} of {} lines came back",
        flows.len(),
        lines.len()
    );
    Ok(flows)
}
