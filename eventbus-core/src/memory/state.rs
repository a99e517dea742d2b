//! What one server holds behind its lock: topics, groups, members, and the bytes they may take.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::admin::to_u64;
use super::config::MemoryConfig;
use super::group::{Cursor, GroupState};
use super::log::Log;
use super::member::{MemberState, Slot};
use super::room::Reserve;
use crate::broker::Capabilities;
use crate::clock::Timestamp;
use crate::delivery::{Lane, Signal, Start, Subscription, Until};
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Group, Message, Topic};
use crate::topic::partition_of;

/// The messages of a batch that are still to be taken.
#[derive(Debug)]
pub(super) struct Rest {
    messages: std::vec::IntoIter<Message>,
    /// The places in the batch, where it is not the whole batch.
    indices: Option<Vec<usize>>,
    taken: usize,
}

impl Rest {
    pub(super) fn all_of(batch: Vec<Message>) -> Self {
        Self {
            messages: batch.into_iter(),
            indices: None,
            taken: 0,
        }
    }

    pub(super) fn some_of(messages: Vec<Message>, indices: Vec<usize>) -> Self {
        Self {
            indices: Some(indices),
            ..Self::all_of(messages)
        }
    }

    /// What was not taken, with the places in the batch.
    pub(super) fn into_left(self) -> impl Iterator<Item = (usize, Message)> {
        let Self {
            messages,
            indices,
            taken,
        } = self;
        messages.enumerate().map(move |(index, message)| {
            let index = taken + index;
            let place = indices.as_ref().map_or(index, |indices| indices[index]);
            (place, message)
        })
    }
}

/// Everything a server holds.
#[derive(Debug)]
pub(super) struct State {
    pub(super) config: MemoryConfig,
    pub(super) capabilities: Capabilities,
    pub(super) topics: Vec<TopicState>,
    names: HashMap<Topic, usize, RandomState>,
    pub(super) groups: Vec<GroupState>,
    /// A place is used again when both halves of its member are dropped.
    pub(super) members: Vec<Option<MemberState>>,
    free: Vec<usize>,
    /// Bytes of all messages, each with its overhead.
    pub(super) stored: usize,
    pub(super) sequence: u64,
    pub(super) stale: u64,
    /// A publish waits for room.
    pub(super) is_full: bool,
    /// Wakes publishes that wait for room.
    pub(super) space: Arc<Notify>,
}

/// A topic and its partitions.
#[derive(Debug)]
pub(super) struct TopicState {
    pub(super) name: Topic,
    pub(super) partitions: Vec<Partition>,
    /// The groups that read it; a group's place is its cursor's place in every partition.
    pub(super) groups: Vec<usize>,
    /// Where the next message without key goes.
    turn: usize,
}

/// One partition: its messages, who is how far, and whom to wake.
#[derive(Debug)]
pub(super) struct Partition {
    pub(super) log: Log,
    pub(super) cursors: Vec<Cursor>,
    pub(super) listeners: Vec<Listener>,
}

/// A lane that reads a partition, of a group's member or of a reader.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listener {
    pub(super) member: usize,
    pub(super) lane: Lane,
}

/// What a call of `next` finds.
#[derive(Debug)]
pub(super) enum Turn {
    Signal(Signal),
    /// Nothing, and nothing will change by time alone before this instant.
    Wait(Option<Instant>),
}

impl TopicState {
    pub(super) fn cursor_of(&self, group: usize) -> Option<usize> {
        self.groups.iter().position(|found| *found == group)
    }
}

impl Partition {
    pub(super) fn forget_listener(&mut self, member: usize, lane: Lane) {
        self.listeners
            .retain(|listener| listener.member != member || listener.lane != lane);
    }
}

impl State {
    pub(super) fn new(config: MemoryConfig) -> Self {
        Self {
            capabilities: config.capabilities(),
            config,
            topics: Vec::new(),
            names: HashMap::default(),
            groups: Vec::new(),
            members: Vec::new(),
            free: Vec::new(),
            stored: 0,
            sequence: 0,
            stale: 0,
            is_full: false,
            space: Arc::new(Notify::new()),
        }
    }

    pub(super) fn find_topic(&self, name: &Topic) -> Option<usize> {
        self.names.get(name).copied()
    }

    /// Finds a topic, or creates it with the default number of partitions.
    pub(super) fn topic(&mut self, name: &Topic) -> usize {
        if let Some(topic) = self.find_topic(name) {
            return topic;
        }
        let partitions = self.default_partitions(name);
        self.create_topic(name, partitions)
    }

    pub(super) fn default_partitions(&self, name: &Topic) -> u32 {
        if name.is_dead_letters() {
            return 1;
        }
        self.config.partitions
    }

    pub(super) fn create_topic(&mut self, name: &Topic, partitions: u32) -> usize {
        let partition = || Partition {
            log: Log::new(),
            cursors: Vec::new(),
            listeners: Vec::new(),
        };
        self.topics.push(TopicState {
            name: name.clone(),
            partitions: (0..partitions).map(|_| partition()).collect(),
            groups: Vec::new(),
            turn: 0,
        });
        let topic = self.topics.len() - 1;
        self.names.insert(name.clone(), topic);
        topic
    }

    pub(super) fn find_group(&self, name: &Group) -> Option<usize> {
        self.groups.iter().position(|group| group.name == *name)
    }

    pub(super) fn group(&mut self, name: &Group) -> usize {
        self.find_group(name).unwrap_or_else(|| {
            self.groups.push(GroupState::new(name.clone()));
            self.groups.len() - 1
        })
    }

    pub(super) fn member(&self, id: usize) -> &MemberState {
        self.members[id]
            .as_ref()
            .expect("a member is kept until both its halves are dropped")
    }

    pub(super) fn member_mut(&mut self, id: usize) -> &mut MemberState {
        self.members[id]
            .as_mut()
            .expect("a member is kept until both its halves are dropped")
    }

    /// Lets a member of `client` join its group, or opens a reader; the subscription was checked.
    pub(super) fn subscribe(
        &mut self,
        client: u64,
        subscription: &Subscription,
        now: Timestamp,
    ) -> usize {
        let mut topics = Vec::with_capacity(subscription.topics.len());
        for name in &subscription.topics {
            let topic = self.topic(name);
            if !topics.contains(&topic) {
                topics.push(topic);
            }
        }
        let id = self.free.pop().unwrap_or_else(|| {
            self.members.push(None);
            self.members.len() - 1
        });
        let group = subscription.group.as_ref().map(|name| self.group(name));
        let limits = subscription.limits;
        let member = MemberState::new(id, client, group, topics.clone(), limits);
        self.members[id] = Some(member);
        match group {
            Some(group) => self.join(group, id, &topics, subscription.start),
            None => self.read(id, &topics, subscription, now),
        }
        id
    }

    fn join(&mut self, group: usize, id: usize, topics: &[usize], start: Start) {
        for topic in topics {
            if self.topics[*topic].cursor_of(group).is_some() {
                continue;
            }
            for index in 0..self.topics[*topic].partitions.len() {
                let position = self.start_position(*topic, index, start);
                self.topics[*topic].partitions[index]
                    .cursors
                    .push(Cursor::new(position));
            }
            self.topics[*topic].groups.push(group);
            self.groups[group].topics.push(*topic);
        }
        self.groups[group].members.push(id);
        self.rebalance(group);
    }

    fn read(&mut self, id: usize, topics: &[usize], subscription: &Subscription, now: Timestamp) {
        for topic in topics {
            for index in 0..self.topics[*topic].partitions.len() {
                let position = self.start_position(*topic, index, subscription.start);
                let log = &self.topics[*topic].partitions[index].log;
                let until = match subscription.until {
                    None => u64::MAX,
                    Some(Until::Now) => log.end(),
                    Some(Until::Position(position)) => to_u64(position),
                    Some(Until::Time(time)) if now >= time.into() => {
                        log.first_at_or_after(time.into())
                    }
                    Some(Until::Time(time)) => {
                        self.member_mut(id).until_time = Some(time.into());
                        u64::MAX
                    }
                };
                let slot = Slot::new(*topic, index, position).with_until(until);
                let Self {
                    members, topics, ..
                } = self;
                let topic = &mut topics[*topic];
                if let Some(member) = &mut members[id] {
                    member.open(&topic.name, slot, &mut topic.partitions[index]);
                }
            }
        }
    }

    /// Ends a member: its lanes go to the others, what was unsettled first. Idempotent.
    pub(super) fn leave(&mut self, id: usize) {
        if self.member(id).ended {
            return;
        }
        match self.member(id).group {
            Some(group) => self.leave_group(group, id),
            None => {
                for topic in &mut self.topics {
                    for partition in &mut topic.partitions {
                        partition.listeners.retain(|listener| listener.member != id);
                    }
                }
            }
        }
        self.member_mut(id).end();
    }

    /// Ends a member of which nothing is left and forgets it.
    pub(super) fn forget_member(&mut self, id: usize) {
        self.leave(id);
        self.members[id] = None;
        self.free.push(id);
    }

    /// Ends all members of a client.
    pub(super) fn close_client(&mut self, client: u64) {
        for id in 0..self.members.len() {
            let theirs = self.members[id]
                .as_ref()
                .is_some_and(|member| member.client == client);
            if theirs {
                self.leave(id);
            }
        }
        self.space.notify_waiters();
    }

    /// Takes messages until one does not fit; true when all were taken.
    pub(super) fn take(&mut self, rest: &mut Rest, now: Timestamp) -> bool {
        let mut topic = usize::MAX;
        while let Some(message) = rest.messages.as_slice().first() {
            let size = message.size();
            let needed = size + MemoryConfig::MESSAGE_OVERHEAD;
            // What a message may have beyond the room is looked up only where there is no more room.
            if !self.make_room(needed, Reserve::None)
                && !self.make_room(needed, Reserve::of(message))
            {
                self.is_full = true;
                return false;
            }
            let Some(message) = rest.messages.next() else {
                break;
            };
            rest.taken += 1;
            if self
                .topics
                .get(topic)
                .is_none_or(|found| found.name != message.topic)
            {
                topic = self.topic(&message.topic);
            }
            self.append(topic, message, size, now);
        }
        true
    }

    fn append(&mut self, topic: usize, message: Message, size: usize, now: Timestamp) {
        let topic = &mut self.topics[topic];
        let count = topic.partitions.len();
        let partition = match &message.key {
            // A topic has at most 4096 partitions.
            Some(key) => partition_of(key, count as u32) as usize,
            None => {
                topic.turn = (topic.turn + 1) % count;
                topic.turn
            }
        };
        let partition = &mut topic.partitions[partition];
        partition.log.append(message, size, now, self.sequence);
        self.sequence += 1;
        self.stored += size + MemoryConfig::MESSAGE_OVERHEAD;
        for listener in &partition.listeners {
            if let Some(member) = &mut self.members[listener.member] {
                member.queue(listener.lane.id);
            }
        }
    }

    /// What `next` of this member answers now.
    pub(super) fn turn(&mut self, id: usize) -> Result<Turn> {
        if self.member(id).ended {
            return Err(ended("next"));
        }
        let mut deadline = None;
        if let Some(group) = self.member(id).group {
            self.take_overdue(group);
            deadline = self.groups[group]
                .revocations
                .iter()
                .map(|revocation| revocation.deadline)
                .min();
        }
        if let Some(signal) = self.member_mut(id).next_control() {
            return Ok(Turn::Signal(signal));
        }
        if let Some(time) = self.member(id).until_time {
            let end = self.end_reading(id, time);
            deadline = deadline.into_iter().chain(end).min();
        }
        let Self {
            members, topics, ..
        } = self;
        let member = members[id]
            .as_mut()
            .expect("a member is kept until both its halves are dropped");
        let batch = member.hand_out(topics, self.capabilities.hand_out_count);
        if !batch.is_empty() {
            return Ok(Turn::Signal(Signal::Delivered(batch)));
        }
        // An end may have been reached without a message.
        if let Some(signal) = member.next_control() {
            return Ok(Turn::Signal(signal));
        }
        member.wait();
        Ok(Turn::Wait(deadline))
    }

    /// Ends a reader whose time has come; otherwise returns when it comes.
    fn end_reading(&mut self, id: usize, time: Timestamp) -> Option<Instant> {
        let now = self.config.clock.now();
        if now < time {
            return Some(Instant::now() + time.since(now));
        }
        let Self {
            members, topics, ..
        } = self;
        if let Some(member) = &mut members[id] {
            member.end_at(time, topics);
        }
        None
    }

    /// Whether some member would be given something at once.
    pub(super) fn is_deliverable(&self) -> bool {
        let now = Instant::now();
        let overdue = self.groups.iter().any(|group| {
            group
                .revocations
                .iter()
                .any(|revocation| revocation.deadline <= now)
        });
        overdue
            || self
                .members
                .iter()
                .flatten()
                .any(|member| member.is_deliverable(&self.topics))
    }
}

/// The answer to calls on a member that left or whose client was closed.
pub(super) fn ended(operation: &'static str) -> Error {
    Error::new(
        ErrorKind::Closed,
        operation,
        "the member has left or its broker handle was closed: subscribe again",
    )
}
