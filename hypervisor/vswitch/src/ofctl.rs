//! Flow text, as `ovs-ofctl` reads and writes it (ovs-ofctl(8), "Flow Syntax").
//!
//! What is accepted means what it means to Open vSwitch 3.1, and is printed as `ovs-ofctl -O
//! OpenFlow13 parse-flows` prints it, or `OpenFlow15` where bits of a field are set; what these
//! protocols do not have (`mod_vlan_vid` and `mod_vlan_pcp`, which put a tag on where there is none)
//! is printed in OpenFlow 1.0's words. Open vSwitch silently
//! ignores what it cannot match or cuts numbers to size. Here this is an error, because a flow that
//! matches more than it says is a hole in a wall: a field whose prerequisite is missing, a field
//! given twice, a number that is too large, bits outside a field.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use crate::PortId;
use crate::config::MeterConfig;
use crate::fields::{self, Column, Facts, Needs, PortName, port};
use crate::flow::{Action, Command, DEFAULT_PRIORITY, Flow, FlowMod, LAST_TABLE, Match};
use crate::key::{FlowKey, Vlan, ether, proto};

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
    /// A mask of nothing.
    #[error("a mask without bits changes nothing")]
    NoBits,
    /// A value with bits that its mask leaves out.
    #[error("its value has bits outside its mask")]
    Outside,
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

pub(crate) type Result<T, E = Why> = core::result::Result<T, E>;

/// A word of flow text: `key`, `key=value`, `key:value` or `key(value)`.
#[derive(Clone, Copy)]
struct Word<'a> {
    key: &'a str,
    value: &'a str,
    /// Where the key begins, from 0.
    at: usize,
}

impl Word<'_> {
    #[cold]
    #[inline(never)]
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

#[cold]
#[inline(never)]
pub(crate) fn form(found: &str, wanted: &'static str) -> Why {
    Why::Form {
        found: found.chars().take(60).collect(),
        wanted,
    }
}

#[cold]
#[inline(never)]
fn superfluous(found: &str) -> Why {
    Why::Superfluous(found.chars().take(40).collect())
}

/// A number as C writes it, without octal, which nobody means.
pub(crate) fn number(text: &str, low: u64, high: u64) -> Result<u64> {
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
pub(crate) fn decimal(text: &str, low: u16, high: u16) -> Result<u16> {
    match text.bytes().all(|b| b.is_ascii_digit()) {
        true => short(text, low, high),
        false => Err(form(text, "a decimal number")),
    }
}

fn short(text: &str, low: u16, high: u16) -> Result<u16> {
    Ok(number(text, low.into(), high.into())? as u16)
}

/// A match while its text is read.
#[derive(Default)]
struct Draft<'a> {
    fields: fields::Draft,
    needs: Vec<(Word<'a>, Needs)>,
}

impl<'a> Draft<'a> {
    /// Takes a word that is a field or a shorthand; false if it is neither.
    fn take(&mut self, word: Word<'a>, names: Names<'_>) -> Result<bool> {
        let mut put = |name: &str, value: u16| {
            let column = Column::matched(name).ok_or(Why::Unknown)?;
            self.fields.put(column, (value.into(), column.bits()))
        };
        let mut shorthands = fields::SHORTHANDS.iter();
        if let Some(&(_, kind, protocol)) = shorthands.find(|(name, ..)| *name == word.key) {
            if !word.value.is_empty() {
                return Err(superfluous(word.value));
            }
            put("dl_type", kind)?;
            if let Some(protocol) = protocol {
                put("nw_proto", protocol.into())?;
            }
            return Ok(true);
        }
        let Some(column) = Column::matched(word.key) else {
            return Ok(false);
        };
        let value = column.read(word.value, names)?;
        if word.value.is_empty() {
            return Err(Why::Missing);
        }
        self.fields.put(column, value)?;
        self.needs.push((word, column.needs));
        Ok(true)
    }

    /// The match; of a `frame`, where the fields of headers that it has not are told as zero.
    fn finish(self, frame: bool) -> Result<Match, TextError> {
        let matching = self.fields.matching();
        let mut asked = matching;
        if frame {
            asked.forget_fragments();
        }
        let facts = Facts::of_match(&asked, asked.is_tagged());
        for (word, needs) in self.needs {
            let needs = if frame { needs.of_frame() } else { needs };
            needs.check(&facts).map_err(|why| word.fail(why))?;
        }
        Ok(matching)
    }
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
    let facts = Facts::of_match(matching, tags.0 > 0);
    let plain = |action: Action| match value {
        "" => Ok(action),
        _ => Err(superfluous(value)),
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
        "set_field" => {
            let wanted = "VALUE->FIELD";
            let (value, field) = value.split_once("->").ok_or_else(|| form(value, wanted))?;
            set(field, value, &facts)?
        }
        "dec_ttl" => {
            fields::IP.check(&facts)?;
            plain(Action::DecTtl)?
        }
        "meter" => Action::Meter(number(value, 1, MAX_METER.into())? as u32),
        "goto_table" => Action::Goto(later(value)?),
        key if key.starts_with("mod_") => {
            let known = MODS.iter().find(|(name, ..)| *name == key);
            let &(_, field, of_udp) = known.ok_or(Why::Unknown)?;
            if value.contains('/') {
                return Err(Why::Mask);
            }
            if of_udp.is_some() {
                fields::CHANGEABLE.check(&facts)?;
            }
            let udp = matching.ip_proto() == Some(proto::UDP);
            match set(of_udp.filter(|_| udp).unwrap_or(field), value, &facts)? {
                // Open vSwitch's own name for it.
                Action::Set(tos) if key == "mod_nw_tos" => Action::Set(tos.named("ip_dscp")),
                action => action,
            }
        }
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

/// What the other words for `set_field` set: in TCP or at all; in UDP.
const MODS: [(&str, &str, Option<&str>); 9] = [
    ("mod_dl_src", "eth_src", None),
    ("mod_dl_dst", "eth_dst", None),
    ("mod_nw_src", "ip_src", None),
    ("mod_nw_dst", "ip_dst", None),
    ("mod_nw_tos", "nw_tos", None),
    ("mod_nw_ecn", "nw_ecn", None),
    ("mod_nw_ttl", "nw_ttl", None),
    ("mod_tp_src", "tcp_src", Some("udp_src")),
    ("mod_tp_dst", "tcp_dst", Some("udp_dst")),
];

/// `set_field` of what is known of the frame.
fn set(name: &str, value: &str, facts: &Facts) -> Result<Action> {
    let unknown = || form(name, "a field that can be set");
    let field = Column::set(name).ok_or_else(unknown)?;
    let (value, mask) = field.column().read(value, &|_| None)?;
    field.column().needs.check(facts)?;
    match (mask, value & !mask) {
        (0, _) => Err(Why::NoBits),
        (_, 0) => Ok(Action::Set(field.to((value, mask)))),
        _ => Err(Why::Outside),
    }
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

/// A match with the priority in front of it, where that is not the default.
struct Prefixed<'a>(u16, &'a Match);

impl fmt::Display for Prefixed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        let mut item = |what: fmt::Arguments<'_>| {
            f.write_str(core::mem::replace(&mut comma, ","))?;
            f.write_fmt(what)
        };
        if self.0 != DEFAULT_PRIORITY {
            item(format_args!("priority={}", self.0))?;
        }
        fields::write_match(self.1, &mut item)
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
            Shown { action, tagged }.to_string()
        })
    }
}

/// An action of a flow, where it is known or not that there is a tag.
struct Shown<'a> {
    action: &'a Action,
    tagged: bool,
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tagged = self.tagged;
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
            Action::VlanVid(id) => write!(to, "mod_vlan_vid:{id}"),
            Action::VlanPcp(pcp) => write!(to, "mod_vlan_pcp:{pcp}"),
            Action::DecTtl => write!(to, "dec_ttl"),
            Action::Meter(meter) => write!(to, "meter:{meter}"),
            Action::Resubmit { port: None, table } => write!(to, "resubmit(,{table})"),
            Action::Resubmit {
                port: Some(port),
                table,
            } => write!(to, "resubmit({},{table})", PortName(port)),
            Action::Goto(table) => write!(to, "goto_table:{table}"),
            Action::Set(rewrite) => write!(to, "set_field:{rewrite}"),
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
