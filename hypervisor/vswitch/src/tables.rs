//! The flow tables of a switch, and the classifier that finds a frame's flow in one.
//!
//! A table's flows are grouped by mask. A group is an array sorted by masked key, so a look-up
//! costs a binary search for each group that can still hold a higher priority: bounded by what is
//! configured, whatever frames come. Groups are made by flows alone; no traffic adds any (tuple
//! space search that learns from traffic is what CVE-2019-25076 overwhelms).
//!
//! Flows lead only to later tables, so no frame runs in circles; how many look-ups a frame can need
//! at most is known when flows are added, and what needs too many is refused.

use alloc::vec::Vec;
use core::cmp::Reverse;

use crate::flow::{Action, Command, Flow, FlowMod, LAST_TABLE};
use crate::key::{FRAG_ANY, FlowKey, KEY_WORDS};
use crate::order::sort_by;

/// How many flows a switch can have.
pub const MAX_FLOWS: usize = 1 << 20;
/// How many look-ups a frame may need (Open vSwitch's limit of resubmits).
pub const MAX_LOOKUPS: u32 = 4096;
/// How deep look-ups may nest (Open vSwitch's limit).
pub const MAX_DEPTH: u32 = 64;

/// Flows that cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TablesError {
    /// A flow leads to its own table or an earlier one.
    #[error(
        "a flow of table {from} leads to table {to}; only later tables are allowed, so that no \
         frame runs in circles"
    )]
    Backwards {
        /// The flow's.
        from: u8,
        /// Where it leads.
        to: u8,
    },
    /// Tables that lead to each other too often.
    #[error(
        "a frame could need {lookups} look-ups from table {table} on, nested {depth} deep; \
         {MAX_LOOKUPS} and {MAX_DEPTH} are allowed"
    )]
    TooLong {
        /// Where it begins.
        table: u8,
        /// How many.
        lookups: u32,
        /// How deep.
        depth: u32,
    },
    /// Too many flows.
    #[error("{0} flows; {MAX_FLOWS} are allowed")]
    TooMany(usize),
    /// A meter that is not there.
    #[error("a flow of table {table} uses meter {meter}, which is not there")]
    NoMeter {
        /// The flow's.
        table: u8,
        /// Its number.
        meter: u32,
    },
}

/// A flow with what it has seen.
#[derive(Clone, Debug)]
pub struct Counted {
    /// The flow.
    pub flow: Flow,
    /// Frames.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// A flow's place among the flows, good until they change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowIndex(u32);

/// Flows of one mask.
#[derive(Clone, Debug)]
struct Group {
    mask: FlowKey,
    /// The highest priority in it.
    top: u16,
    /// By key; of flows with the same match only the one that wins.
    rows: Vec<Row>,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    key: FlowKey,
    priority: u16,
    /// Which flow; lower ones were added first.
    flow: u32,
}

#[derive(Clone, Debug)]
struct Table {
    id: u8,
    /// By falling `top`.
    groups: Vec<Group>,
}

/// The flows of a switch, by table.
#[derive(Clone, Debug, Default)]
pub struct FlowTables {
    /// In the order in which they were added.
    flows: Vec<Counted>,
    tables: Vec<Table>,
    /// The numbers of the meters that there are.
    meters: Vec<u32>,
}

impl FlowTables {
    /// No flow: every frame is dropped.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            flows: Vec::new(),
            tables: Vec::new(),
            meters: Vec::new(),
        }
    }

    /// The one flow that a switch has whose configuration names none: `priority=0,actions=NORMAL`.
    #[must_use]
    pub fn normal() -> Self {
        let flow = Flow {
            table: 0,
            priority: 0,
            cookie: 0,
            matching: Default::default(),
            actions: Vec::from([Action::Normal]),
        };
        let mut out = Self::new();
        out.flows.push(Counted::new(flow));
        out.tables = sorted(&out.flows);
        out
    }

    /// The flows, in the order in which they were added.
    #[must_use]
    pub fn flows(&self) -> &[Counted] {
        &self.flows
    }

    /// A flow.
    #[must_use]
    pub fn flow(&self, index: FlowIndex) -> Option<&Flow> {
        self.flows.get(index.0 as usize).map(|c| &c.flow)
    }

    /// The flow of a table that a frame of `key` belongs to: of the highest priority; of equals,
    /// the one added first.
    ///
    /// As in Open vSwitch, a fragment has no ports, not even the first one: else a firewall that
    /// goes by ports would let the rest of a packet pass by its beginning alone.
    #[must_use]
    pub fn lookup(&self, table: u8, key: &FlowKey) -> Option<FlowIndex> {
        let table = self.tables.binary_search_by_key(&table, |t| t.id).ok()?;
        let mut key = *key;
        if key.nw_frag & FRAG_ANY != 0 {
            (key.tp_src, key.tp_dst) = (0, 0);
        }
        let mut best: Option<Row> = None;
        for group in &self.tables.get(table)?.groups {
            if best.is_some_and(|b| b.priority > group.top) {
                break;
            }
            let wanted = key.masked(&group.mask);
            let found = group
                .rows
                .binary_search_by(|row| row.key.words().cmp(wanted.words()));
            let Some(row) = found.ok().and_then(|at| group.rows.get(at)) else {
                continue;
            };
            let rank = |row: &Row| (Reverse(row.priority), row.flow);
            if best.is_none_or(|b| rank(row) < rank(&b)) {
                best = Some(*row);
            }
        }
        best.map(|row| FlowIndex(row.flow))
    }

    /// Counts a frame of `bytes` to the flows it went through.
    pub fn count(&mut self, hits: &[FlowIndex], bytes: usize) {
        for hit in hits {
            if let Some(counted) = self.flows.get_mut(hit.0 as usize) {
                counted.packets += 1;
                counted.bytes += bytes as u64;
            }
        }
    }

    /// Takes over what `older` counted for flows that are here, too.
    pub(crate) fn inherit(&mut self, older: &Self) {
        let mut order: Vec<&Counted> = older.flows.iter().collect();
        sort_by(&mut order, |a, b| place(&a.flow) < place(&b.flow));
        for own in &mut self.flows {
            let wanted = place(&own.flow);
            let found = order.binary_search_by(|counted| place(&counted.flow).cmp(&wanted));
            if let Some(old) = found.ok().and_then(|at| order.get(at))
                && old.flow == own.flow
            {
                (own.packets, own.bytes) = (old.packets, old.bytes);
            }
        }
    }

    /// Makes all changes, one after the other, or none; how many flows were added, changed or
    /// removed.
    ///
    /// # Errors
    /// The flows there would be cannot be had.
    pub fn apply(&mut self, changes: &[FlowMod]) -> Result<usize, TablesError> {
        let mut flows = self.flows.clone();
        let mut changed = 0;
        let mut changes = changes;
        while let Some((change, rest)) = changes.split_first() {
            if change.command == Command::Add {
                let adds = changes.iter().take_while(|c| c.command == Command::Add);
                let count = adds.clone().count();
                flows.extend(adds.map(|add| Counted::new(add.clone().into())));
                keep_last(&mut flows);
                changed += count;
                changes = changes.get(count..).unwrap_or_default();
            } else {
                changed += change.apply(&mut flows);
                changes = rest;
            }
        }
        self.check(&flows)?;
        self.tables = sorted(&flows);
        self.flows = flows;
        Ok(changed)
    }

    /// Says which meters there are.
    ///
    /// # Errors
    /// A flow's meter would be gone.
    pub fn set_meters(&mut self, meters: Vec<u32>) -> Result<(), TablesError> {
        let old = core::mem::replace(&mut self.meters, meters);
        let checked = self.check(&self.flows);
        if checked.is_err() {
            self.meters = old;
        }
        checked
    }

    /// Whether these flows can be had.
    fn check(&self, flows: &[Counted]) -> Result<(), TablesError> {
        if flows.len() > MAX_FLOWS {
            return Err(TablesError::TooMany(flows.len()));
        }
        let mut by_table: Vec<&Flow> = flows.iter().map(|c| &c.flow).collect();
        sort_by(&mut by_table, |a, b| a.table > b.table);
        // Of each table, how many look-ups it takes at most, and how deep they nest.
        let mut bounds = [(1u32, 1u32); LAST_TABLE as usize + 1];
        for flow in by_table {
            let (mut lookups, mut depth) = (1u32, 1u32);
            for action in &flow.actions {
                match *action {
                    Action::Goto(to) | Action::Resubmit { table: to, .. } => {
                        let from = flow.table;
                        let bound = bounds.get(usize::from(to)).filter(|_| to > from);
                        let &(more, deeper) = bound.ok_or(TablesError::Backwards { from, to })?;
                        lookups = lookups.saturating_add(more);
                        depth = depth.max(deeper + 1);
                    }
                    Action::Meter(meter) if !self.meters.contains(&meter) => {
                        let table = flow.table;
                        return Err(TablesError::NoMeter { table, meter });
                    }
                    _ => {}
                }
            }
            if lookups > MAX_LOOKUPS || depth > MAX_DEPTH {
                return Err(TablesError::TooLong {
                    table: flow.table,
                    lookups,
                    depth,
                });
            }
            if let Some(bound) = bounds.get_mut(usize::from(flow.table)) {
                *bound = (bound.0.max(lookups), bound.1.max(depth));
            }
        }
        Ok(())
    }
}

impl Counted {
    const fn new(flow: Flow) -> Self {
        Self {
            flow,
            packets: 0,
            bytes: 0,
        }
    }

    fn same_place(&self, table: u8, other: &FlowMod) -> bool {
        let flow = &self.flow;
        (flow.table, flow.priority) == (table, other.priority) && flow.matching == other.matching
    }
}

/// What makes two flows the same: table, priority and match.
type Identity<'a> = (u8, u16, &'a [u64; KEY_WORDS], &'a [u64; KEY_WORDS]);

fn place(flow: &Flow) -> Identity<'_> {
    let matching = &flow.matching;
    let (mask, key) = (matching.mask().words(), matching.key().words());
    (flow.table, flow.priority, mask, key)
}

/// Of flows with the same table, priority and match keeps the last.
fn keep_last(flows: &mut Vec<Counted>) {
    let mut order: Vec<usize> = (0..flows.len()).collect();
    let at = |index: &usize| flows.get(*index).map(|c| place(&c.flow));
    sort_by(&mut order, |a, b| (at(a), a) < (at(b), b));
    let mut stale = alloc::vec![false; flows.len()];
    for (earlier, later) in order.iter().zip(order.iter().skip(1)) {
        if let Some(mark) = stale.get_mut(*earlier) {
            *mark = at(earlier) == at(later);
        }
    }
    let mut marks = stale.into_iter();
    flows.retain(|_| marks.next() == Some(false));
}

impl FlowMod {
    fn selects(&self, counted: &Counted) -> bool {
        let flow = &counted.flow;
        let (cookie, mask) = self.cookie_match;
        let outputs = |port| flow.actions.contains(&Action::Output(port));
        let placed = match self.command {
            Command::ModifyStrict | Command::DeleteStrict => {
                let table = self.table.unwrap_or(flow.table);
                counted.same_place(table, self)
            }
            _ => {
                self.table.is_none_or(|t| t == flow.table) && self.matching.includes(&flow.matching)
            }
        };
        placed && (flow.cookie ^ cookie) & mask == 0 && self.out_port.is_none_or(outputs)
    }

    /// Does what is asked; how many flows it touched.
    fn apply(&self, flows: &mut Vec<Counted>) -> usize {
        match self.command {
            Command::Delete | Command::DeleteStrict => {
                let before = flows.len();
                flows.retain(|flow| !self.selects(flow));
                before - flows.len()
            }
            Command::Modify | Command::ModifyStrict => {
                let mut touched = 0;
                for counted in flows.iter_mut().filter(|flow| self.selects(flow)) {
                    counted.flow.actions.clone_from(&self.actions);
                    counted.flow.cookie = self.cookie.unwrap_or(counted.flow.cookie);
                    touched += 1;
                }
                if touched == 0 && self.cookie_match.1 == 0 {
                    flows.push(Counted::new(self.clone().into()));
                    touched = 1;
                }
                touched
            }
            Command::Add => {
                flows.push(Counted::new(self.clone().into()));
                keep_last(flows);
                1
            }
        }
    }
}

/// The flows by table and mask.
fn sorted(flows: &[Counted]) -> Vec<Table> {
    let mut all: Vec<(u32, &Flow)> = (0..).zip(flows.iter().map(|c| &c.flow)).collect();
    sort_by(&mut all, |(i, a), (j, b)| {
        let words = |f: &Flow| (*f.matching.mask().words(), *f.matching.key().words());
        let order = a.table.cmp(&b.table).then_with(|| words(a).cmp(&words(b)));
        // The highest priority first; of equals, the one added first.
        order
            .then_with(|| (b.priority, i).cmp(&(a.priority, j)))
            .is_lt()
    });
    let mut tables = Vec::new();
    for of_table in all.chunk_by(|(_, a), (_, b)| a.table == b.table) {
        let mut groups = Vec::new();
        for of_mask in of_table.chunk_by(|(_, a), (_, b)| a.matching.mask() == b.matching.mask()) {
            let mut rows: Vec<Row> = of_mask
                .iter()
                .map(|&(flow, f)| Row {
                    key: *f.matching.key(),
                    priority: f.priority,
                    flow,
                })
                .collect();
            rows.dedup_by(|next, kept| next.key == kept.key);
            let mask = of_mask.first().map(|(_, f)| *f.matching.mask());
            groups.push(Group {
                mask: mask.unwrap_or_default(),
                top: rows.iter().map(|r| r.priority).max().unwrap_or(0),
                rows,
            });
        }
        sort_by(&mut groups, |a: &Group, b| a.top > b.top);
        let id = of_table.first().map_or(0, |(_, f)| f.table);
        tables.push(Table { id, groups });
    }
    tables
}
