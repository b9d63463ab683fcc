//! Priority queues in one table: leftist heaps whose nodes lie beside each other.
//!
//! A thing that is scheduled has one node for each kind of queue that it can be in, made when the
//! thing is. So to queue it allocates nothing and cannot fail, and it can be taken out of the
//! middle. Every operation takes O(log n) steps at the worst: along the right edge of a leftist
//! heap of n nodes there are at most log2(n + 1), and to take a node out repairs the distances
//! above it only as far as they change.

use alloc::vec::Vec;

/// The number of a node.
pub type Id = u32;

/// No node.
pub const NONE: Id = Id::MAX;

#[derive(Clone, Copy)]
struct Node {
    key: u128,
    left: Id,
    right: Id,
    parent: Id,
    /// Nodes along the right edge below and with this one; 0 when in no queue.
    rank: u32,
}

/// All nodes of all queues.
#[derive(Default)]
pub struct Forest {
    nodes: Vec<Node>,
    /// Nodes visited since it was made: what the operations cost.
    pub steps: u64,
}

/// A queue: its first node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Queue(Id);

impl Queue {
    /// An empty queue.
    pub const EMPTY: Self = Self(NONE);

    /// The node with the least key.
    pub fn first(self) -> Option<Id> {
        (self.0 != NONE).then_some(self.0)
    }
}

impl Forest {
    /// Makes room for nodes up to this number, each in no queue.
    pub fn grow(&mut self, nodes: usize) {
        const FREE: Node = Node {
            key: 0,
            left: NONE,
            right: NONE,
            parent: NONE,
            rank: 0,
        };
        if nodes > self.nodes.len() {
            self.nodes.resize(nodes, FREE);
        }
    }

    fn node(&mut self, id: Id) -> &mut Node {
        &mut self.nodes[id as usize]
    }

    /// The key of a node.
    pub fn key(&self, id: Id) -> u128 {
        self.nodes[id as usize].key
    }

    /// Whether a node is in a queue.
    pub fn queued(&self, id: Id) -> bool {
        self.nodes[id as usize].rank != 0
    }

    /// Puts a node into a queue, behind those with the same key.
    pub fn push(&mut self, queue: &mut Queue, id: Id, key: u128) {
        debug_assert!(!self.queued(id));
        *self.node(id) = Node {
            key,
            left: NONE,
            right: NONE,
            parent: NONE,
            rank: 1,
        };
        queue.0 = self.merge(queue.0, id);
    }

    /// Takes a node out of the queue that it is in; nothing if it is in none.
    pub fn remove(&mut self, queue: &mut Queue, id: Id) {
        if !self.queued(id) {
            return;
        }
        let Node {
            left,
            right,
            mut parent,
            ..
        } = *self.node(id);
        let merged = self.merge(left, right);
        if merged != NONE {
            self.node(merged).parent = parent;
        }
        self.node(id).rank = 0;
        if parent == NONE {
            queue.0 = merged;
            return;
        }
        let above = self.node(parent);
        if above.left == id {
            above.left = merged;
        } else {
            above.right = merged;
        }
        while parent != NONE && self.repair(parent) {
            parent = self.node(parent).parent;
        }
    }

    fn rank(&self, id: Id) -> u32 {
        if id == NONE {
            0
        } else {
            self.nodes[id as usize].rank
        }
    }

    /// Puts the shorter side to the right; true if the distance of the node changed.
    fn repair(&mut self, id: Id) -> bool {
        self.steps += 1;
        let Node {
            left, right, rank, ..
        } = *self.node(id);
        let (l, r) = (self.rank(left), self.rank(right));
        let node = self.node(id);
        if l < r {
            (node.left, node.right) = (right, left);
        }
        node.rank = l.min(r) + 1;
        node.rank != rank
    }

    fn merge(&mut self, a: Id, b: Id) -> Id {
        if a == NONE {
            return b;
        }
        if b == NONE {
            return a;
        }
        let (top, other) = if self.key(a) <= self.key(b) {
            (a, b)
        } else {
            (b, a)
        };
        let right = self.node(top).right;
        // As deep as the two right edges are long together: 2 log2 n.
        let merged = self.merge(right, other);
        self.node(top).right = merged;
        self.node(merged).parent = top;
        self.node(top).parent = NONE;
        self.repair(top);
        top
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_gives_back_in_order_whatever_was_taken_out_between() {
        let mut forest = Forest::default();
        let mut queue = Queue::EMPTY;
        let count = 5_000u32;
        forest.grow(count as usize);
        let mut seed = 1u64;
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed >> 33
        };
        let mut model = std::collections::BTreeSet::new();
        for id in 0..count {
            let key = u128::from(random() % 1000) << 16 | u128::from(id);
            forest.push(&mut queue, id, key);
            model.insert((key, id));
        }
        for _ in 0..20_000 {
            let id = (random() % u64::from(count)) as u32;
            if forest.queued(id) {
                model.remove(&(forest.key(id), id));
                forest.remove(&mut queue, id);
            } else {
                let key = u128::from(random() % 1000) << 16 | u128::from(id);
                forest.push(&mut queue, id, key);
                model.insert((key, id));
            }
            assert_eq!(queue.first(), model.first().map(|(_, id)| *id));
        }
        while let Some((_, id)) = model.pop_first() {
            assert_eq!(queue.first(), Some(id));
            let before = forest.steps;
            forest.remove(&mut queue, id);
            assert!(forest.steps - before <= 64);
        }
        assert_eq!(queue, Queue::EMPTY);
    }
}
