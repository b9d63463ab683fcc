//! Open vSwitch, unprivileged: a database, a daemon with dummy devices, and one connection to the
//! daemon's control socket.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Deserializer, StreamDeserializer, Value, json};
use vswitch::key::{FlowKey, Vlan, ether, ipv4};
use vswitch::mirror::MirrorOutput;
use vswitch::port::{PriorityTags, VlanMode};
use vswitch::translate::Field;
use vswitch::{MacAddr, PortId};

use super::world::{EDGES, VLANS, World, carries};
use super::{LOCAL, Output};
use crate::process::{Process, limited};

/// Where Debian has the database's schema.
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
/// Longer than a million cases take on a busy machine.
const LIMIT: Duration = Duration::from_secs(7200);

/// A bridge whose frames go through Open vSwitch's userspace datapath.
pub struct Userspace {
    _switch: Process,
    _database: Process,
}

impl Userspace {
    /// Starts the daemons, with all their files in a folder of `scratch`, and a bridge of these
    /// interfaces, which must be there. It needs the right to open packet sockets.
    pub fn start(scratch: &Path, interfaces: &[&str]) -> Result<Self> {
        let (dir, database) = database(scratch)?;
        let switch = switch_daemon(&dir, &[])?;
        vsctl(
            &dir,
            &[
                "add-br",
                "tsb-ovs",
                "--",
                "set",
                "bridge",
                "tsb-ovs",
                "datapath_type=netdev",
            ],
        )?;
        for interface in interfaces {
            vsctl(&dir, &["add-port", "tsb-ovs", interface])?;
        }
        Ok(Self {
            _switch: switch,
            _database: database,
        })
    }
}

/// Starts the database, empty; gives the folder with all files.
fn database(scratch: &Path) -> Result<(PathBuf, Process)> {
    // A socket's path must be short.
    let dir = scratch.join("ovs");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let at = |name: &str| dir.join(name).display().to_string();
    run(&dir, "ovsdb-tool", &["create", &at("conf.db"), SCHEMA])?;
    let database = daemon(
        &dir,
        "ovsdb-server",
        &[
            at("conf.db"),
            format!("--remote=punix:{}", at("db.sock")),
            format!("--unixctl={}", at("db.ctl")),
        ],
    )?;
    appears(&dir.join("db.sock"))?;
    vsctl(&dir, &["--no-wait", "init"])?;
    Ok((dir, database))
}

/// Starts the daemon that switches, without the kernel's datapath.
fn switch_daemon(dir: &Path, more: &[&str]) -> Result<Process> {
    let at = |name: &str| dir.join(name).display().to_string();
    let mut words = vec![
        format!("unix:{}", at("db.sock")),
        "--disable-system".to_owned(),
        format!("--unixctl={}", at("vs.ctl")),
    ];
    words.extend(more.iter().copied().map(str::to_owned));
    let switch = daemon(dir, "ovs-vswitchd", &words)?;
    appears(&dir.join("vs.ctl"))?;
    Ok(switch)
}

/// The two daemons.
pub struct Daemons {
    dir: PathBuf,
    control: UnixStream,
    answers: StreamDeserializer<'static, serde_json::de::IoRead<UnixStream>, Value>,
    /// Ended in this order when they are dropped.
    _switch: Process,
    _database: Process,
}

impl Daemons {
    /// Starts them with all their files in a folder of `scratch`.
    pub fn start(scratch: &Path) -> Result<Self> {
        let (dir, database) = database(scratch)?;
        let limit = "other_config:vlan-limit=2";
        vsctl(&dir, &["--no-wait", "set", "Open_vSwitch", ".", limit])?;
        let switch = switch_daemon(&dir, &["--enable-dummy=override"])?;
        let socket = dir.join("vs.ctl");
        let control = UnixStream::connect(&socket).context("ovs-vswitchd's control socket")?;
        control.set_read_timeout(Some(Duration::from_secs(20)))?;
        let answers = Deserializer::from_reader(control.try_clone()?).into_iter();
        Ok(Self {
            dir,
            control,
            answers,
            _switch: switch,
            _database: database,
        })
    }

    /// Asks the daemon.
    fn ask(&mut self, method: &str, params: &[&str]) -> Result<String> {
        let request = json!({"id": 0, "method": method, "params": params});
        serde_json::to_writer(&mut self.control, &request)?;
        let answer = self.answers.next().context("ovs-vswitchd has gone")??;
        match (&answer["result"], &answer["error"]) {
            (Value::String(text), _) => Ok(text.clone()),
            (_, error) => bail!("{method} {params:?}: {error}"),
        }
    }

    /// Makes the bridge that is like the world's switch, instead of the one before.
    pub fn build(&mut self, world: &World) -> Result<()> {
        // On its own: a bridge that comes again at once keeps its flows and addresses.
        vsctl(&self.dir, &["--if-exists", "del-br", "br0"])?;
        let config = &world.config;
        let mut words: Vec<String> = Vec::new();
        let mut say = |line: &str| words.extend(line.split(' ').map(str::to_owned));
        say("add-br br0");
        say("-- set bridge br0 datapath_type=dummy fail-mode=secure");
        let list = |ids: &[u16]| {
            let ids: Vec<String> = ids.iter().map(u16::to_string).collect();
            ids.join(",")
        };
        for port in &config.ports {
            let (name, id) = (&port.name, port.id.0);
            say(&format!("-- add-port br0 {name}"));
            say(&format!(
                "-- set interface {name} type=dummy ofport_request={id}"
            ));
            if let Some(tag) = port.tag {
                say(&format!("-- set port {name} tag={tag}"));
            }
            if !port.trunks.is_empty() {
                say(&format!("-- set port {name} trunks={}", list(&port.trunks)));
            }
            if !port.cvlans.is_empty() {
                say(&format!("-- set port {name} cvlans={}", list(&port.cvlans)));
            }
            if let Some(mode) = port.vlan_mode {
                let mode = match mode {
                    VlanMode::Access => "access",
                    VlanMode::Trunk => "trunk",
                    VlanMode::NativeTagged => "native-tagged",
                    VlanMode::NativeUntagged => "native-untagged",
                    VlanMode::Dot1qTunnel => "dot1q-tunnel",
                };
                say(&format!("-- set port {name} vlan_mode={mode}"));
            }
            let kind = match port.qinq_ethtype {
                ether::VLAN => "802.1q",
                _ => "802.1ad",
            };
            say(&format!(
                "-- set port {name} other_config:qinq-ethtype={kind}"
            ));
            let tags = match port.priority_tags {
                PriorityTags::Never => "never",
                PriorityTags::IfNonzero => "if-nonzero",
                PriorityTags::Always => "always",
            };
            say(&format!(
                "-- set port {name} other_config:priority-tags={tags}"
            ));
            if port.protected {
                say(&format!("-- set port {name} protected=true"));
            }
        }
        let names = |ids: &[PortId]| -> Vec<&str> {
            let name = |id: &PortId| config.ports.iter().find(|p| p.id == *id);
            ids.iter()
                .filter_map(name)
                .map(|p| p.name.as_str())
                .collect()
        };
        for mirror in &config.mirrors {
            let (to, vlan) = match mirror.output {
                MirrorOutput::Port(to) => (vec![to], None),
                MirrorOutput::Vlan(vlan) => (vec![], Some(vlan.get())),
                MirrorOutput::Capture => bail!("a mirror into a capture was made"),
            };
            let (source, target) = (names(&mirror.select_src), names(&mirror.select_dst));
            let mut used: Vec<&str> = source.iter().chain(&target).copied().collect();
            let output = names(&to);
            used.extend(&output);
            used.sort_unstable();
            used.dedup();
            for name in used {
                say(&format!("-- --id=@{name} get port {name}"));
            }
            let refs = |names: &[&str]| {
                let refs: Vec<String> = names.iter().map(|n| format!("@{n}")).collect();
                refs.join(",")
            };
            let mut line = format!(
                "-- --id=@m_{0} create mirror name={0} select_all={1}",
                mirror.name, mirror.select_all,
            );
            if let Some(vlan) = vlan {
                line += &format!(" output_vlan={vlan}");
            }
            for (column, names) in [
                ("select_src_port", &source),
                ("select_dst_port", &target),
                ("output_port", &output),
            ] {
                if !names.is_empty() {
                    line += &format!(" {column}={}", refs(names));
                }
            }
            if !mirror.select_vlan.is_empty() {
                line += &format!(" select_vlan={}", list(&mirror.select_vlan));
            }
            say(&line);
            say(&format!("-- add bridge br0 mirrors @m_{}", mirror.name));
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        vsctl(&self.dir, &words)?;
        self.add_flows(world)?;
        for (mac, port) in world.homes() {
            let all = VLANS.iter().chain(&EDGES);
            let vlans = all.filter(|vlan| carries(port, **vlan));
            for vlan in vlans {
                let (vlan, mac) = (vlan.to_string(), mac.to_string());
                self.ask("fdb/add", &["br0", &port.name, &vlan, &mac])?;
            }
        }
        Ok(())
    }

    /// Gives the bridge the world's flows. Neither version of the protocol has all actions.
    fn add_flows(&self, world: &World) -> Result<()> {
        let normal = ["priority=0,actions=normal".to_owned()];
        let flows = match world.config.flows.as_slice() {
            [] => &normal,
            flows => flows,
        };
        let socket = format!("unix:{}", self.dir.join("br0.mgmt").display());
        for meter in &world.config.meters {
            let text = format!(
                "meter={},pktps,band=type=drop,rate={}",
                meter.id, meter.rate
            );
            let words = ["-O", "OpenFlow13", "add-meter", &socket, &text];
            run(&self.dir, "ovs-ofctl", &words)?;
        }
        let file = self.dir.join("flows");
        for (version, old) in [("OpenFlow10", true), ("OpenFlow13", false)] {
            let chosen = flows.iter().filter(|f| is_old(f) == old);
            let text: String = chosen.map(|f| format!("{f}\n")).collect();
            fs::write(&file, text)?;
            let file = file.display().to_string();
            run(
                &self.dir,
                "ovs-ofctl",
                &["-O", version, "add-flows", &socket, &file],
            )?;
        }
        Ok(())
    }

    /// What the bridge would do with a frame.
    pub fn trace(&mut self, in_port: PortId, frame: &[u8]) -> Result<Traced> {
        let hex: String = frame.iter().map(|b| format!("{b:02x}")).collect();
        let port = format!("in_port={}", in_port.0);
        let text = self.ask("ofproto/trace", &["br0", &port, &hex])?;
        if text.contains(LEARNED) {
            // Static entries stay.
            self.ask("fdb/flush", &["br0"])?;
        }
        Ok(Traced { text })
    }
}

/// What a trace says when it learns.
const LEARNED: &str = "learned that ";

/// Whether a flow changes tags that need not be there, or matches bits of them, as only OpenFlow
/// 1.0 can say.
pub fn is_old(flow: &str) -> bool {
    let odd = flow.split_once("vlan_tci=").is_some_and(|(_, tci)| {
        let plain = ["0x0000/0x1fff", "0x1000/0x1000", "0x0000/0x1000"];
        !plain.iter().any(|p| tci.starts_with(p))
    });
    odd || flow.contains("mod_vlan") || flow.contains("strip_vlan")
}

fn command(dir: &Path, program: &str, limit: Duration) -> Command {
    let mut command = limited(program, limit);
    for name in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"] {
        command.env(name, dir);
    }
    command.stdin(Stdio::null());
    command
}

/// Runs a program of Open vSwitch; what it printed.
pub fn run(dir: &Path, program: &str, args: &[&str]) -> Result<String> {
    let output = command(dir, program, Duration::from_secs(60))
        .args(args)
        .output()
        .with_context(|| format!("running {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}\n{}",
        args.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn vsctl(dir: &Path, args: &[&str]) -> Result<()> {
    let database = format!("--db=unix:{}", dir.join("db.sock").display());
    let mut all = vec![database.as_str(), "--timeout=30"];
    all.extend(args);
    run(dir, "ovs-vsctl", &all).map(drop)
}

fn daemon(dir: &Path, program: &str, args: &[String]) -> Result<Process> {
    let mut command = command(dir, program, LIMIT);
    let log = fs::File::create(dir.join(format!("{program}.log")))?;
    command
        .args(args)
        .args(["-vconsole:off", "-vsyslog:off"])
        .stdout(log.try_clone()?)
        .stderr(log);
    Process::spawn(command)
}

fn appears(file: &Path) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(10);
    while !file.exists() {
        ensure!(Instant::now() < until, "{} does not appear", file.display());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// What `ofproto/trace` said.
pub struct Traced {
    /// All of it.
    pub text: String,
}

impl Traced {
    fn line(&self, name: &str) -> Result<&str> {
        let found = self.text.lines().rev().find_map(|l| l.strip_prefix(name));
        found.with_context(|| format!("no line {name:?} in\n{}", self.text))
    }

    /// Whether what was learned in this trace may have mattered in it: the frame is for its own
    /// source, or there was more than one `normal`, or addresses were changed.
    pub fn learned_itself(&self, key: &FlowKey) -> bool {
        let normals = self.text.matches("    NORMAL\n").count();
        let changes = ["->eth_", "mod_dl_", "->NXM_OF_ETH_"];
        let changed = changes.iter().any(|word| self.text.contains(word));
        let mattered = key.dl_src == key.dl_dst || normals > 1 || changed;
        mattered && self.text.contains(LEARNED)
    }

    /// How the frame's headers were read.
    pub fn flow(&self) -> Result<&str> {
        self.line("Flow: ")
    }

    /// Where the frame of `key` goes, and in what form.
    pub fn outputs(&self, key: &FlowKey) -> Result<Vec<Output>> {
        let mut key = *key;
        let mut outputs = Vec::new();
        for action in parts(self.line("Datapath actions: ")?) {
            apply(action, &mut key, &mut outputs).with_context(|| format!("action {action}"))?;
        }
        Ok(outputs)
    }
}

/// Cuts at commas that are in no parentheses.
fn parts(text: &str) -> Vec<&str> {
    let mut depth = 0;
    let cut = |c: char| {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        c == ',' && depth == 0
    };
    text.split(cut).collect()
}

fn number(text: &str) -> Result<u16> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.with_context(|| format!("number {text}"))
}

fn mac(text: &str) -> Result<MacAddr> {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|b| u8::from_str_radix(b, 16))
        .collect::<Result<_, _>>()?;
    Ok(MacAddr(bytes.try_into().ok().context("six bytes")?))
}

fn address(text: &str) -> Result<[u8; 16]> {
    Ok(match text.parse()? {
        std::net::IpAddr::V4(address) => ipv4(address.octets()),
        std::net::IpAddr::V6(address) => address.octets(),
    })
}

/// Does one action of the datapath.
fn apply(action: &str, key: &mut FlowKey, outputs: &mut Vec<Output>) -> Result<()> {
    if let Ok(port) = action.parse::<u32>() {
        if port != LOCAL {
            outputs.push((port, *key));
        }
        return Ok(());
    }
    if action == "drop" {
        return Ok(());
    }
    if action == "pop_vlan" {
        key.vlans = [key.vlans[1], Vlan::NONE];
        return Ok(());
    }
    let (name, inner) = action.split_once('(').context("no parenthesis")?;
    let inner = inner.strip_suffix(')').context("no parenthesis")?;
    if name == "push_vlan" {
        let mut tag = Vlan::new(0, 0);
        for word in inner.split(',') {
            let (name, value) = word.split_once('=').context("no value")?;
            let value = number(value)?;
            match name {
                "tpid" => tag.tpid = value,
                "vid" => tag.tci |= value,
                "pcp" => tag.tci |= value << 13,
                // 0 where there was none.
                "cfi" => {}
                _ => bail!("unknown {name}"),
            }
        }
        key.vlans = [tag, key.vlans[0]];
        return Ok(());
    }
    if name == "meter" {
        // The datapath counts them from 0, in the order in which they were made.
        key.reserved[0] |= 1 << (inner.parse::<u8>()? + 1);
        return Ok(());
    }
    if name == "userspace" {
        // Tells a controller that a time to live is over.
        return Ok(());
    }
    ensure!(name == "set", "unknown");
    let (header, fields) = inner.split_once('(').context("no parenthesis")?;
    for word in fields.trim_end_matches(')').split(',') {
        let (name, value) = word.split_once('=').context("no value")?;
        let (value, mask) = value.split_once('/').unwrap_or((value, ""));
        let low = |old: u8| -> Result<u8> {
            let mask = if mask.is_empty() { 0xff } else { number(mask)? };
            Ok((old & !(mask as u8)) | (number(value)? & mask) as u8)
        };
        let word = |old: u16| -> Result<u16> {
            let mask = if mask.is_empty() {
                0xffff
            } else {
                number(mask)?
            };
            Ok((old & !mask) | (number(value)? & mask))
        };
        let link = |MacAddr(mut old): MacAddr| -> Result<MacAddr> {
            let all = MacAddr::BROADCAST;
            let mask = if mask.is_empty() { all } else { mac(mask)? };
            merge(&mut old, mac(value)?.0, mask.0);
            Ok(MacAddr(old))
        };
        let ip = |mut old: [u8; 16]| -> Result<[u8; 16]> {
            let mask = match mask {
                "" => [0xff; 16],
                mask => address(mask)?,
            };
            merge(&mut old, address(value)?, mask);
            Ok(old)
        };
        let v4 = |old: [u8; 16]| -> Result<[u8; 4]> {
            let [.., a, b, c, d] = ip(old)?;
            Ok([a, b, c, d])
        };
        key.set(match (header, name) {
            ("eth", "src") => Field::DlSrc(link(key.dl_src)?),
            ("eth", "dst") => Field::DlDst(link(key.dl_dst)?),
            ("ipv4" | "ipv6", "src") => Field::NwSrc(ip(key.nw_src)?),
            ("ipv4" | "ipv6", "dst") => Field::NwDst(ip(key.nw_dst)?),
            ("ipv4", "tos") | ("ipv6", "tclass") => Field::NwTos(low(key.nw_tos)?),
            ("ipv4", "ttl") | ("ipv6", "hlimit") => Field::NwTtl(low(key.nw_ttl)?),
            // Repeated as they are.
            ("ipv4" | "ipv6", "proto" | "frag" | "label") => continue,
            ("tcp" | "udp", "src") | ("icmp" | "icmpv6", "type") => Field::TpSrc(word(key.tp_src)?),
            ("tcp" | "udp", "dst") | ("icmp" | "icmpv6", "code") => Field::TpDst(word(key.tp_dst)?),
            ("arp", "op") => Field::ArpOp(low(key.nw_proto)?),
            ("arp", "sip") => Field::ArpSpa(v4(key.nw_src)?),
            ("arp", "tip") => Field::ArpTpa(v4(key.nw_dst)?),
            ("arp", "sha") => Field::ArpSha(link(key.arp_sha)?),
            ("arp", "tha") => Field::ArpTha(link(key.arp_tha)?),
            ("nd", "target") => Field::NdTarget(ip(key.nd_target)?),
            ("nd", "sll") => Field::NdSll(link(key.arp_sha)?),
            ("nd", "tll") => Field::NdTll(link(key.arp_tha)?),
            _ => bail!("unknown {header} {name}"),
        });
    }
    Ok(())
}

/// Puts those bits of `value` into `old` that are in `mask`.
fn merge<const N: usize>(old: &mut [u8; N], value: [u8; N], mask: [u8; N]) {
    for ((old, value), mask) in old.iter_mut().zip(value).zip(mask) {
        *old = (*old & !mask) | (value & mask);
    }
}
