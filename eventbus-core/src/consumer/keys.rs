//! Deliveries of one worker, queued by key: strictly one after another within a key, any order
//! between keys. Nothing is allocated per delivery once the tables have grown.

use std::collections::VecDeque;
use std::sync::Arc;

use super::held::Held;
use super::scope::Scope;
use crate::clock::Timestamp;
use crate::dead_letter::Diagnosis;
use crate::key_state::{HeldName, HoldEntry, Wait};
use crate::message::Message;

/// A place in [`Keys`].
pub(crate) type NodeId = u32;

/// One delivery and where it stands.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) scope: Arc<Scope>,
    pub(crate) state: NodeState,
    pub(crate) stage: Stage,
    /// Failed attempts so far.
    pub(crate) failures: u32,
    pub(crate) first_failed: Option<Timestamp>,
    /// It was part of a group that failed, and is handled by itself.
    pub(crate) alone: bool,
    /// The run that is under way decides whether a held consumer goes on.
    pub(crate) probe: bool,
    /// It can't be handled and holds its key.
    pub(crate) blocked: bool,
    /// What is known of it where it came from the store of held keys.
    pub(crate) held: Option<Box<Held>>,
    /// Tells one use of this place from the next, for timers.
    pub(crate) sequence: u64,
    key: Option<u64>,
    next: Option<NodeId>,
    /// Of the last delivery of a key: the next one in its bucket.
    chain: Option<NodeId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeState {
    /// Behind an older delivery of its key.
    Behind,
    /// To be started.
    Ready,
    /// In this slot.
    Running(usize),
    /// Until a timer fires.
    Waiting,
    /// Its lane is gone; it only keeps its place in the queue of its key.
    Dropped,
}

/// What is to be done with a delivery next.
#[derive(Debug)]
pub(crate) enum Stage {
    Handle,
    Publish(Vec<Message>),
    DeadLetter(Arc<Diagnosis>),
    Keep(Arc<Keep>),
}

/// What is to be done in the store of held keys.
#[derive(Debug)]
pub(crate) enum Keep {
    /// Put the message aside; then it is settled.
    Hold(HoldEntry),
    /// Leave it where it is, until later.
    Wait {
        name: HeldName,
        wait: Wait,
        carried_out: bool,
    },
    /// Take it out, because it is done, and go on with the next.
    Advance { name: HeldName, number: u64 },
}

/// The deliveries of one worker.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    nodes: Vec<Option<Node>>,
    free: Vec<NodeId>,
    /// The last delivery of every key that has one, by the low bits of the key's hash; those of a
    /// bucket are chained through their nodes. A hash map would take three times as long to say
    /// that a key is new, which is what it is mostly asked.
    buckets: Vec<Option<NodeId>>,
    ready: VecDeque<NodeId>,
    sequence: u64,
    /// Places taken.
    count: usize,
}

impl Keys {
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    #[inline]
    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Takes in a delivery: ready at once, or behind the last of its key.
    pub(crate) fn push(&mut self, scope: Arc<Scope>, key: Option<u64>) -> NodeId {
        let id = self.insert(scope, key);
        if self.get(id).state == NodeState::Ready {
            self.ready.push_back(id);
        }
        id
    }

    /// As [`push`](Self::push), for what the caller starts when nothing is before it.
    pub(crate) fn insert(&mut self, scope: Arc<Scope>, key: Option<u64>) -> NodeId {
        self.sequence += 1;
        let node = Node {
            scope,
            state: NodeState::Ready,
            stage: Stage::Handle,
            failures: 0,
            first_failed: None,
            alone: false,
            probe: false,
            blocked: false,
            held: None,
            sequence: self.sequence,
            key,
            next: None,
            chain: None,
        };
        let id = match self.free.pop() {
            Some(id) => {
                self.nodes[id as usize] = Some(node);
                id
            }
            None => self.push_node(node),
        };
        self.count += 1;
        let mut behind = None;
        if let Some(key) = key {
            behind = self.unlink(key);
            self.link(id, key);
        }
        if let Some(tail) = behind {
            self.get_mut(tail).next = Some(id);
            self.get_mut(id).state = NodeState::Behind;
        }
        id
    }

    #[cold]
    fn push_node(&mut self, node: Node) -> NodeId {
        if self.nodes.len() * 2 >= self.buckets.len() {
            self.grow();
        }
        self.nodes.push(Some(node));
        // Bounded by the credit of the member.
        (self.nodes.len() - 1) as NodeId
    }

    /// Makes more buckets, so that there are always twice as many as nodes.
    fn grow(&mut self) {
        let count = (self.buckets.len() * 2).max(128);
        self.buckets.clear();
        self.buckets.resize(count, None);
        for index in 0..self.nodes.len() {
            if let Some(node) = &self.nodes[index]
                && let (Some(key), None) = (node.key, node.next)
            {
                self.link(index as NodeId, key);
            }
        }
    }

    #[inline]
    fn bucket(&self, key: u64) -> usize {
        // Their number is a power of two.
        key as usize & (self.buckets.len() - 1)
    }

    /// Whether any of the deliveries there are is of this key; asked only when there are some.
    pub(crate) fn has_key(&self, key: u64) -> bool {
        let mut place = self.buckets[self.bucket(key)];
        while let Some(id) = place {
            let node = self.get(id);
            if node.key == Some(key) {
                return true;
            }
            place = node.chain;
        }
        false
    }

    /// Makes a delivery the last one of its key.
    #[inline]
    fn link(&mut self, id: NodeId, key: u64) {
        let bucket = self.bucket(key);
        let chain = self.buckets[bucket].replace(id);
        self.get_mut(id).chain = chain;
    }

    /// Takes the last delivery of a key out of its bucket.
    #[inline]
    fn unlink(&mut self, key: u64) -> Option<NodeId> {
        let bucket = self.bucket(key);
        let mut before = None;
        let mut place = self.buckets[bucket];
        while let Some(id) = place {
            let (found, chain) = (self.get(id).key, self.get(id).chain);
            if found == Some(key) {
                match before {
                    None => self.buckets[bucket] = chain,
                    Some(before) => self.get_mut(before).chain = chain,
                }
                return place;
            }
            before = place;
            place = chain;
        }
        None
    }

    #[inline]
    pub(crate) fn get(&self, id: NodeId) -> &Node {
        self.nodes[id as usize]
            .as_ref()
            .expect("a node is used only until it is removed")
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id as usize]
            .as_mut()
            .expect("a node is used only until it is removed")
    }

    /// Whether `id` still means the delivery that had this sequence number.
    #[inline]
    pub(crate) fn is_current(&self, id: NodeId, sequence: u64) -> bool {
        matches!(&self.nodes[id as usize], Some(node) if node.sequence == sequence)
    }

    #[inline]
    pub(crate) fn pop_ready(&mut self) -> Option<NodeId> {
        self.ready.pop_front()
    }

    #[inline]
    pub(crate) fn peek_ready(&self) -> Option<NodeId> {
        self.ready.front().copied()
    }

    /// Puts a delivery last among the ready ones.
    #[inline]
    pub(crate) fn push_ready(&mut self, id: NodeId) {
        self.get_mut(id).state = NodeState::Ready;
        self.ready.push_back(id);
    }

    /// Puts a delivery first among the ready ones.
    #[inline]
    pub(crate) fn push_ready_first(&mut self, id: NodeId) {
        self.get_mut(id).state = NodeState::Ready;
        self.ready.push_front(id);
    }

    /// Puts the first ready delivery that waits for its handler first of all; whether there is one.
    pub(crate) fn bring_handler_forward(&mut self) -> bool {
        let place = self.ready.iter().position(|id| {
            let node = self.get(*id);
            node.state == NodeState::Ready && matches!(node.stage, Stage::Handle)
        });
        let Some(id) = place.and_then(|place| self.ready.remove(place)) else {
            return false;
        };
        self.ready.push_front(id);
        true
    }

    /// The next delivery of the same key.
    #[inline]
    pub(crate) fn successor(&self, id: NodeId) -> Option<NodeId> {
        self.get(id).next
    }

    /// Removes the first delivery of a key; the next one is ready now, unless it was started with it.
    #[inline]
    pub(crate) fn remove(&mut self, id: NodeId) -> Arc<Scope> {
        self.let_next(id);
        self.vacate(id)
    }

    /// Lets the first delivery of a key go on without its key: the next one of the key is ready now.
    pub(crate) fn detach(&mut self, id: NodeId) {
        self.let_next(id);
        let node = self.get_mut(id);
        (node.key, node.next, node.chain) = (None, None, None);
    }

    /// Makes what stands behind the first delivery of a key the first.
    #[inline]
    fn let_next(&mut self, id: NodeId) {
        match self.get(id).next {
            Some(next) => match self.get(next).state {
                NodeState::Behind => self.push_ready(next),
                NodeState::Dropped => self.ready.push_back(next),
                _ => {}
            },
            None => {
                if let Some(key) = self.get(id).key {
                    self.unlink(key);
                }
            }
        }
    }

    /// Frees the place of a delivery that is in no queue any more.
    #[inline]
    fn vacate(&mut self, id: NodeId) -> Arc<Scope> {
        let node = self.nodes[id as usize]
            .take()
            .expect("a node is removed once");
        self.free.push(id);
        self.count -= 1;
        node.scope
    }

    /// Removes every dropped delivery, wherever it stands.
    pub(crate) fn sweep(&mut self) -> Vec<Arc<Scope>> {
        let mut swept = Vec::new();
        let mut kept = VecDeque::with_capacity(self.ready.len());
        while let Some(id) = self.ready.pop_front() {
            match self.get(id).state {
                // What stood behind it is ready now.
                NodeState::Dropped => swept.push(self.remove(id)),
                _ => kept.push_back(id),
            }
        }
        self.ready = kept;
        for index in 0..self.nodes.len() {
            // At most the credit of the member.
            let id = index as NodeId;
            while let Some(behind) = self.nodes[index].as_ref().and_then(|node| node.next)
                && self.get(behind).state == NodeState::Dropped
            {
                swept.push(self.remove_behind(id, behind));
            }
        }
        swept
    }

    /// Removes a delivery that stands right behind `older`.
    fn remove_behind(&mut self, older: NodeId, id: NodeId) -> Arc<Scope> {
        let (next, key) = (self.get(id).next, self.get(id).key);
        if let (None, Some(key)) = (next, key) {
            // It was the last of its key; now the one before it is.
            self.unlink(key);
            self.link(older, key);
        }
        self.get_mut(older).next = next;
        self.vacate(id)
    }

    /// All deliveries there are.
    pub(crate) fn ids(&self) -> impl Iterator<Item = NodeId> + '_ {
        (0..self.nodes.len())
            .filter(|index| self.nodes[*index].is_some())
            .map(|index| index as NodeId)
    }
}
