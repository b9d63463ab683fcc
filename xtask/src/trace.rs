//! `cargo xtask switch-trace`: what a configuration's switch does with a frame, stage by stage.
//!
//! The switch is the hypervisor's own, built for this machine and assembled from the same
//! `tessera.toml`. All links are up but for those that are said to be down, nothing is learned yet,
//! and nothing is counted.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use vm::config::{Config, parse};
use vswitch::port::PortKind;
use vswitch::{PortId, Switch};

/// What is asked.
#[derive(Debug, Default)]
pub struct Question<'a> {
    /// The frame, in the words of `ovs-appctl ofproto/trace`.
    pub flow: &'a str,
    /// The switch, where `in_port` does not say it.
    pub switch: Option<&'a str>,
    /// Ports without a link.
    pub down: &'a [String],
}

/// Traces a frame through a switch of the configuration in `file`.
pub fn trace_file(file: &Path, question: &Question<'_>) -> Result<String> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    trace(&text, &file.display().to_string(), question)
}

/// The port that the frame comes in by, as it is written.
fn in_port(flow: &str) -> Option<&str> {
    let mut words = flow.split([',', ' ']);
    words.find_map(|word| {
        word.strip_prefix("in_port=")
            .or(word.strip_prefix("in_port:"))
    })
}

/// The number of the switch that is meant.
fn choose(config: &Config, question: &Question<'_>) -> Result<usize> {
    let names: Vec<&str> = config.switches.iter().map(|s| s.name.as_str()).collect();
    if let Some(wanted) = question.switch {
        let found = names.iter().position(|name| *name == wanted);
        return found.with_context(|| {
            format!(
                "no switch is named `{wanted}`; there are: {}",
                names.join(", ")
            )
        });
    }
    if names.len() == 1 {
        return Ok(0);
    }
    let port = in_port(question.flow).context("in_port=PORT is missing: where does it come in?")?;
    let nics = || config.vms.iter().flatten().flat_map(|vm| &vm.nics);
    let has = |number: &usize| {
        let uplinks = config.switches.get(*number).map(|switch| &switch.uplinks);
        let mut uplinks = uplinks.into_iter().flatten();
        uplinks.any(|uplink| uplink.port.name == port)
            || nics().any(|nic| nic.switch == *number && nic.port.name == port)
    };
    let found: Vec<usize> = (0..names.len()).filter(has).collect();
    match found.as_slice() {
        [one] => Ok(*one),
        [] if names.is_empty() => bail!("the configuration has no [[switch]]"),
        [] => bail!(
            "no switch has a port `{port}`; --switch says which is meant: {}",
            names.join(", ")
        ),
        _ => bail!(
            "more than one switch has a port `{port}`; --switch says which is meant: {}",
            names.join(", ")
        ),
    }
}

fn trace(text: &str, file: &str, question: &Question<'_>) -> Result<String> {
    let config = parse(text, file).map_err(|error| anyhow!("{error}"))?;
    let mut out = String::new();
    for error in config.vms.iter().filter_map(|vm| vm.as_ref().err()) {
        writeln!(out, "left out: {error}\n")?;
    }
    let number = choose(&config, question)?;
    let section = config
        .switches
        .get(number)
        .context("the configuration has no [[switch]]")?;
    let nics = config.vms.iter().flatten().flat_map(|vm| &vm.nics);
    let made = section
        .assemble(number, file, nics)
        .map_err(|error| anyhow!("{error}"))?;
    writeln!(out, "Switch {}; ports by number:", made.name)?;
    for port in &made.ports {
        let kind = match port.kind {
            PortKind::Vnic => "vnic",
            PortKind::Uplink => "uplink",
            PortKind::Management => "management",
            PortKind::Mirror => "mirror",
        };
        let macs: String = port.macs.iter().map(|mac| format!(" {mac}")).collect();
        writeln!(out, "{:4} {} ({kind}{macs})", port.id.0, port.name)?;
    }
    out.push('\n');
    let find = |name: &str| {
        made.port_named(name).with_context(|| {
            let names: Vec<&str> = made.ports.iter().map(|port| port.name.as_str()).collect();
            format!(
                "switch {} has no port `{name}`; it has {}",
                made.name,
                names.join(", ")
            )
        })
    };
    let down = question.down.iter().map(|name| find(name));
    let down = down.collect::<Result<Vec<PortId>>>()?;
    let key = vswitch::ofctl::parse_key(question.flow, &|name| made.port_named(name))
        .map_err(|error| anyhow!("the frame: {error}"))?;
    if !made.ports.iter().any(|port| port.id == key.in_port) {
        match in_port(question.flow) {
            None => bail!("in_port=PORT is missing: where does it come in?"),
            Some(port) => {
                find(port)?;
            }
        }
    }
    let name = made.name.clone();
    let mut switch =
        Switch::new(made, [0; 2]).map_err(|error| anyhow!("switch {name}: {error}"))?;
    for port in down {
        switch
            .set_link(port, false)
            .map_err(|error| anyhow!("{error}"))?;
    }
    out.push_str(&switch.trace(&key, arch::Nanos::ZERO));
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOML: &str = r#"
[[switch]]
name = "lan"
flows = [
    "priority=0,actions=NORMAL",
    "priority=9,in_port=vm2,udp,actions=resubmit(,1),resubmit(,2)",
    "table=1,priority=1,actions=mod_vlan_vid:9,output:up0",
    "priority=8,in_port=vm1,tcp,tp_dst=25,actions=drop",
]
[[switch.uplink]]
name = "up0"
[[switch.uplink]]
name = "up1"
[[switch]]
name = "wan"
[[vm]]
name = "vm1"
kind = "linux"
kernel = "k"
memory = "64MiB"
[[vm.nic]]
switch = "lan"
tag = 9
mac = "02:00:00:00:00:01"
[[vm]]
name = "vm2"
kind = "linux"
kernel = "k"
memory = "64MiB"
[[vm.nic]]
switch = "lan"
trunks = [5, 9]
mac = "02:00:00:00:00:02"
[[vm]]
name = "vm3"
kind = "linux"
kernel = "k"
memory = "64MiB"
[[vm.nic]]
switch = "wan"
mac = "02:00:00:00:00:03"
"#;

    const ONE: &str = "02:00:00:00:00:01";
    const TWO: &str = "02:00:00:00:00:02";

    fn ask(flow: &str) -> Result<String, String> {
        let flow = flow.replace("ONE", ONE).replace("TWO", TWO);
        let question = Question {
            flow: &flow,
            ..Question::default()
        };
        trace(TOML, "t.toml", &question).map_err(|error| error.to_string())
    }

    /// The last line.
    fn actions(flow: &str) -> String {
        let text = ask(flow).expect(flow);
        let last = text.lines().last().expect("a line");
        last.strip_prefix("Datapath actions: ")
            .expect("the actions")
            .to_owned()
    }

    #[test]
    fn the_last_line_is_what_open_vswitch_would_say() {
        for (flow, want) in [
            // From an access port to a trunk: the tag is put on.
            (
                "in_port=vm1,dl_src=ONE,dl_dst=TWO",
                "push_vlan(vid=9,pcp=0),4",
            ),
            // And taken off on the way back.
            ("in_port=vm2,dl_vlan=9,dl_src=TWO,dl_dst=ONE", "pop_vlan,3"),
            // A VLAN that the trunk has not.
            ("in_port=vm2,dl_vlan=7,dl_src=TWO,dl_dst=ONE", "drop"),
            // To an address that nobody here has: the active uplink.
            (
                "in_port=vm1,dl_src=ONE,dl_dst=02:00:00:00:00:77",
                "push_vlan(vid=9,pcp=0),1",
            ),
            // From an uplink never to an uplink; and unknown ones nowhere.
            (
                "in_port=up0,dl_vlan=9,dl_src=02:00:00:00:00:77,dl_dst=ONE",
                "pop_vlan,3",
            ),
            (
                "in_port=up0,dl_vlan=9,dl_src=02:00:00:00:00:77,dl_dst=02:00:00:00:00:78",
                "drop",
            ),
            // A flow through a later table.
            (
                "in_port=vm2,udp,dl_src=TWO,dl_dst=ONE",
                "push_vlan(vid=9,pcp=0),1",
            ),
            // A flow that drops.
            ("in_port=vm1,tcp,tp_dst=25,dl_src=ONE,dl_dst=TWO", "drop"),
            // A forged source.
            ("in_port=vm1,dl_src=TWO,dl_dst=ONE", "drop"),
        ] {
            assert_eq!(actions(flow), want, "{flow}");
        }
    }

    #[test]
    fn stages_ports_and_causes_are_said() {
        let text = ask("in_port=vm2,udp,dl_src=TWO,dl_dst=ONE").expect("a trace");
        for want in [
            "Switch lan; ports by number:\n",
            "   1 up0 (uplink)\n",
            "     1. priority 1\n",
        ] {
            assert!(text.contains(want), "{want}: {text}");
        }
        let text = ask("in_port=vm1,dl_src=TWO,dl_dst=ONE").expect("a trace");
        assert!(text.contains("\nDrop: forged-source\n"), "{text}");
    }

    #[test]
    fn a_link_that_is_down_moves_guests_to_another_uplink() {
        let question = Question {
            flow: "in_port=3,dl_src=02:00:00:00:00:01,dl_dst=02:00:00:00:00:77",
            switch: Some("lan"),
            down: &["up0".to_owned()],
        };
        let text = trace(TOML, "t.toml", &question).expect("a trace");
        assert!(
            text.ends_with("Datapath actions: push_vlan(vid=9,pcp=0),2\n"),
            "{text}"
        );
    }

    #[test]
    fn mistakes_have_place_and_remedy() {
        for (flow, want) in [
            ("dl_src=ONE", "in_port=PORT is missing"),
            (
                "in_port=vm4",
                "no switch has a port `vm4`; --switch says which is meant: lan, wan",
            ),
            ("in_port=vm1,arq", "the frame: column 13: arq: not a field"),
            (
                "in_port=vm1,dl_vlan=9/1",
                "the frame: column 13: dl_vlan: can not be masked",
            ),
        ] {
            let error = ask(flow).expect_err(flow);
            assert!(error.contains(want), "{flow}: {error}");
        }
        let question = |switch| Question {
            flow: "in_port=vm1",
            switch: Some(switch),
            down: &[],
        };
        let error = trace(TOML, "t.toml", &question("man")).expect_err("no such switch");
        assert!(
            error
                .to_string()
                .contains("no switch is named `man`; there are: lan, wan")
        );
        let error = trace(TOML, "t.toml", &question("wan")).expect_err("not its port");
        assert!(error.to_string().contains("in_port"), "{error}");
        let cyclic = TOML.replace(
            "table=1,priority=1,actions=",
            "table=1,actions=resubmit(,1),",
        );
        let error = trace(&cyclic, "t.toml", &question("lan")).expect_err("a circle");
        let text = error.to_string();
        assert!(
            text.contains("t.toml:7:5") && text.contains("only later tables"),
            "{text}"
        );
    }
}
