//! From frames that came in to frames that leave: what a core does with a batch, whatever is
//! behind the ports.
//!
//! The switch is asked about all frames of a batch under one lock; then what leaves is handed over
//! port by port, so that what is behind a port is locked, told, and interrupted once for a batch.
//! Frames that leave by the same port keep their order (R10). Bytes are not copied here, and of
//! frames that leave as they came nothing is looked at again.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::vec::Vec;
use core::ops::DerefMut;

use arch::Nanos;
use virtio::net::{Frame, NetHeader, Whole};
use vswitch::cache::Cache;
use vswitch::edit::{Checksum, Editor, HEADER, MIN_FRAME};
use vswitch::translate::Step;
use vswitch::{PortId, Switch};

/// Frames of a batch, at most.
pub const BATCH: usize = 64;
/// Outputs after which a part of a batch is handed over before more is asked: a flood of a whole
/// batch to thousands of ports needs no room for all of that.
const ENOUGH: usize = 256;
/// What frames that lost a tag are filled up with.
const PADDING: [u8; MIN_FRAME] = [0; MIN_FRAME];

/// A frame that came in.
pub type Inbound<'a> = (NetHeader, Whole<'a>);

/// What a core needs to move frames.
#[derive(Debug)]
pub struct Relay {
    cache: Cache,
    outputs: Vec<Output>,
    /// What is done to the frames of `outputs` before they leave.
    edits: Vec<Step>,
    /// They leave by more than one port.
    mixed: bool,
}

/// A frame that leaves. They are ordered by port, then as they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Output {
    port: PortId,
    /// Which of the batch.
    frame: u16,
    /// How far its edits go in [`Relay::edits`], which puts copies of it in order, too.
    end: u32,
    /// Where they begin.
    begin: u32,
}

/// What is behind ports.
pub trait Far {
    /// Takes the frames that leave by `port`.
    fn take(&mut self, port: PortId, frames: Leaving<'_>);
}

/// The frames of a batch that leave by one port.
#[derive(Clone, Copy, Debug)]
pub struct Leaving<'a> {
    frames: &'a [Inbound<'a>],
    outputs: &'a [Output],
    edits: &'a [Step],
}

impl Relay {
    /// With a cache of so many decisions, hidden by a secret.
    #[must_use]
    pub fn new(decisions: usize, secret: [u64; 2]) -> Self {
        Self {
            cache: Cache::new(decisions, secret),
            outputs: Vec::new(),
            edits: Vec::new(),
            mixed: false,
        }
    }

    /// How many decisions were remembered, and how many were made.
    #[must_use]
    pub fn statistics(&self) -> (u64, u64) {
        self.cache.statistics()
    }

    /// Asks the switch about frames that came in by `port`, and hands over what leaves.
    pub fn forward<G: DerefMut<Target = Switch>>(
        &mut self,
        switch: impl Fn() -> G,
        port: PortId,
        mut frames: &[Inbound<'_>],
        now: Nanos,
        far: &mut impl Far,
    ) {
        while !frames.is_empty() {
            let done = self.ask(&mut switch(), port, frames, now);
            let Some((these, rest)) = frames.split_at_checked(done) else {
                return;
            };
            // One port takes everything, most of the time.
            if self.mixed {
                self.outputs.sort_unstable();
                for outputs in self.outputs.chunk_by(|a, b| a.port == b.port) {
                    self.hand_over(these, outputs, far);
                }
            } else {
                self.hand_over(these, &self.outputs, far);
            }
            frames = rest;
        }
    }

    /// Hands over what leaves by one port.
    fn hand_over(&self, frames: &[Inbound<'_>], outputs: &[Output], far: &mut impl Far) {
        if let Some(first) = outputs.first() {
            let edits = &self.edits;
            let leaving = Leaving {
                frames,
                outputs,
                edits,
            };
            far.take(first.port, leaving);
        }
    }

    /// Asks about frames until there is enough to do; how many that were, at least one.
    fn ask(
        &mut self,
        switch: &mut Switch,
        port: PortId,
        frames: &[Inbound<'_>],
        now: Nanos,
    ) -> usize {
        self.outputs.clear();
        self.edits.clear();
        let mut done = 0;
        let mut first = None;
        self.mixed = false;
        for (_, frame) in frames {
            if self.outputs.len() >= ENOUGH {
                break;
            }
            let bytes = frame.bytes();
            let head = bytes.get(..HEADER).unwrap_or(bytes);
            let decision = switch.decide(&mut self.cache, port, head, bytes.len(), now);
            let begin = self.edits.len() as u32;
            for step in decision.steps {
                match *step {
                    Step::Output(port) => {
                        self.mixed |= *first.get_or_insert(port) != port;
                        self.outputs.push(Output {
                            port,
                            frame: done as u16,
                            end: self.edits.len() as u32,
                            begin,
                        });
                    }
                    edit => self.edits.push(edit),
                }
            }
            done += 1;
        }
        done
    }
}

impl Leaving<'_> {
    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.outputs.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.outputs.is_empty()
    }

    /// Hands over each, in order, with what is to be done to it yet.
    pub fn each(self, mut give: impl FnMut(&NetHeader, &Frame<'_>)) {
        for output in self.outputs {
            let Some((header, frame)) = self.frames.get(usize::from(output.frame)) else {
                continue;
            };
            let range = output.begin as usize..output.end as usize;
            match self.edits.get(range).unwrap_or_default() {
                [] => give(header, &frame.frame()),
                edits => edited(header, frame.bytes(), edits, &mut give),
            }
        }
    }
}

/// Hands over a frame after what the switch wants done to it.
fn edited(
    header: &NetHeader,
    bytes: &[u8],
    edits: &[Step],
    give: &mut impl FnMut(&NetHeader, &Frame<'_>),
) {
    let checksum = match header.checksum {
        virtio::net::Checksum::Unknown => Checksum::Full,
        _ => Checksum::Partial,
    };
    let mut editor = Editor::new(bytes, bytes.len(), checksum);
    edits.iter().for_each(|step| editor.apply(step));
    let rest = bytes.get(editor.taken()..).unwrap_or_default();
    let padding = editor.padding(bytes.len());
    let padding = PADDING.get(..padding).unwrap_or_default();
    // Two tags more or less.
    let grown = editor.length(bytes.len()) as i32 - bytes.len() as i32;
    if let Some(header) = i16::try_from(grown).ok().and_then(|by| header.moved(by)) {
        give(&header, &Frame::new([editor.header(), rest, padding]));
    }
}

#[cfg(test)]
mod tests;
