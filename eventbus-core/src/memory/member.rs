//! One member or reader: its lanes, the signals that wait for it, and what it can be handed.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::Notify;

use super::group::Place;
use super::state::{Listener, Partition, TopicState};
use crate::clock::Timestamp;
use crate::delivery::{Assignment, Delivery, Lane, Limits, Position, Signal};
use crate::lane_table::LaneTable;
use crate::message::Topic;

/// What the server keeps for one member.
#[derive(Debug)]
pub(super) struct MemberState {
    id: usize,
    /// Ended with this client handle.
    pub(super) client: u64,
    pub(super) group: Option<usize>,
    topics: Vec<usize>,
    pub(super) limits: Limits,
    pub(super) lanes: LaneTable,
    /// By the lane's number.
    pub(super) slots: Vec<Slot>,
    /// Signals that go before deliveries.
    control: VecDeque<Signal>,
    /// Numbers of lanes that have something, each once, in the order of their turns.
    pub(super) ready: VecDeque<u32>,
    /// Where a reader ends when it ends at a time that was still to come.
    pub(super) until_time: Option<Timestamp>,
    /// Nothing was there for the last `next`: it, or the following one, is to be woken.
    waiting: bool,
    /// It left, or its client was closed.
    pub(super) ended: bool,
    notify: Arc<Notify>,
}

/// One lane: where it reads and how far it is.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) lane: Lane,
    pub(super) topic: usize,
    pub(super) partition: usize,
    /// The group's cursor; a reader has none.
    pub(super) cursor: Option<usize>,
    /// The next position to hand out.
    pub(super) next: u64,
    /// Where it ends, not included.
    until: u64,
    ended: bool,
    /// It stands in `ready`.
    queued: bool,
    /// Its owner was told to release it.
    revoking: bool,
}

/// How it went with one lane.
enum Handed {
    /// Nothing is left, or its window is full: a new message or a settlement brings it back.
    Drained,
    /// It has more.
    More,
    /// The next message does not fit the bytes left over all lanes.
    Full,
}

impl Slot {
    pub(super) fn new(topic: usize, partition: usize, next: u64) -> Self {
        Self {
            // The member gives it its lane.
            lane: Lane { id: 0, epoch: 0 },
            topic,
            partition,
            cursor: None,
            next,
            until: u64::MAX,
            ended: false,
            queued: false,
            revoking: false,
        }
    }

    pub(super) fn of_group(place: Place, next: u64) -> Self {
        Self {
            cursor: Some(place.cursor),
            ..Self::new(place.topic, place.partition, next)
        }
    }

    pub(super) fn with_until(mut self, until: u64) -> Self {
        self.until = until;
        self
    }

    fn has_more(&self, partition: &Partition) -> bool {
        if self.revoking {
            return false;
        }
        self.next < partition.log.end().min(self.until)
    }

    /// Hands out what credit, `room` and the end of the reading allow.
    fn hand_out(
        &mut self,
        lanes: &mut LaneTable,
        partition: &mut Partition,
        until_time: Option<Timestamp>,
        counted: bool,
        room: usize,
        batch: &mut Vec<Delivery>,
    ) -> Handed {
        if self.revoking {
            return Handed::Drained;
        }
        let mut credit = lanes.credit(self.lane).min(room);
        let exhausted = if credit == room {
            Handed::More
        } else {
            // The window is full, or the messages over all lanes; the caller looks at the latter.
            Handed::Drained
        };
        let Partition { log, cursors, .. } = partition;
        let mut cursor = self.cursor.map(|index| &mut cursors[index]);
        while credit > 0 {
            let position = self.next;
            if position >= self.until {
                return Handed::Drained;
            }
            let Some(stored) = log.get(position) else {
                return Handed::Drained;
            };
            if until_time.is_some_and(|time| log.is_at_or_after(position, time)) {
                self.until = position;
                return Handed::Drained;
            }
            if !lanes.fits(stored.size) {
                return Handed::Full;
            }
            self.next += 1;
            let times = cursor.as_deref_mut().map(|cursor| cursor.count(position));
            let position = Position(u128::from(position));
            // Written in place: a delivery is large to be passed from setter to setter.
            batch.push(Delivery {
                message: stored.message.clone(),
                receipt: lanes.hand_out(self.lane, position, stored.size),
                position: Some(position),
                handed_out: times.filter(|_| counted),
            });
            credit -= 1;
        }
        exhausted
    }

    /// The size of what would be handed out next.
    fn next_size(&self, partition: &Partition) -> Option<usize> {
        let stored = partition.log.get(self.next)?;
        (self.next < self.until).then_some(stored.size)
    }
}

impl MemberState {
    pub(super) fn new(
        id: usize,
        client: u64,
        group: Option<usize>,
        topics: Vec<usize>,
        limits: Limits,
    ) -> Self {
        Self {
            id,
            client,
            group,
            topics,
            limits,
            lanes: LaneTable::new(limits),
            slots: Vec::new(),
            control: VecDeque::new(),
            ready: VecDeque::new(),
            until_time: None,
            waiting: false,
            ended: false,
            notify: Arc::new(Notify::new()),
        }
    }

    pub(super) fn notify(&self) -> Arc<Notify> {
        Arc::clone(&self.notify)
    }

    pub(super) fn reads(&self, topic: usize) -> bool {
        self.topics.contains(&topic)
    }

    /// Lets the waiting `next` look again.
    pub(super) fn wake(&mut self) {
        if std::mem::take(&mut self.waiting) {
            self.notify.notify_one();
        }
    }

    /// Ends it: `next` and `settle` answer `Closed` from now on.
    pub(super) fn end(&mut self) {
        self.ended = true;
        self.control.clear();
        self.wake();
    }

    /// Adds a control signal; neighbours of a kind become one.
    pub(super) fn tell(&mut self, signal: Signal) {
        // A reader's lanes are all assigned by its first signal, before any of them ends.
        if self.group.is_none()
            && let Signal::Assigned(more) = &signal
            && let Some(Signal::Assigned(first)) = self.control.front_mut()
        {
            first.extend(more.iter().cloned());
            return;
        }
        match (self.control.back_mut(), signal) {
            (Some(Signal::Assigned(last)), Signal::Assigned(more)) => last.extend(more),
            (Some(Signal::Revoking(last)), Signal::Revoking(more))
            | (Some(Signal::Lost(last)), Signal::Lost(more))
            | (Some(Signal::Ended(last)), Signal::Ended(more)) => last.extend(more),
            (_, signal) => self.control.push_back(signal),
        }
        self.wake();
    }

    pub(super) fn next_control(&mut self) -> Option<Signal> {
        self.control.pop_front()
    }

    /// Opens a lane at `slot`, says so, and reports what of it is gone already.
    pub(super) fn open(
        &mut self,
        topic: &Topic,
        mut slot: Slot,
        partition: &mut Partition,
    ) -> Lane {
        let lane = self.lanes.open();
        slot.lane = lane;
        // The partition's index came from a u32.
        let assignment = Assignment::new(lane, topic.clone(), slot.partition as u32)
            .with_position(Position(u128::from(slot.next)));
        let index = lane.id as usize;
        if index == self.slots.len() {
            self.slots.push(slot);
        } else {
            self.slots[index] = slot;
        }
        self.tell(Signal::Assigned(vec![assignment]));
        partition.listeners.push(Listener {
            member: self.id,
            lane,
        });
        self.skip_to(lane, partition.log.base());
        self.check_end(lane.id);
        if self.slots[index].has_more(partition) {
            self.queue(lane.id);
        }
        lane
    }

    /// Forgets a lane and gives its credit back.
    pub(super) fn close_lane(&mut self, lane: Lane) {
        self.lanes.close(lane);
        self.ready.retain(|id| *id != lane.id);
        // Lanes may have had to wait for the credit.
        self.wake();
    }

    /// Removes a lane whose assignment was not heard yet from the waiting signals; false when it
    /// was heard.
    pub(super) fn forget_unseen(&mut self, lane: Lane) -> bool {
        let mut unseen = false;
        for signal in &mut self.control {
            if let Signal::Assigned(assignments) = signal {
                let before = assignments.len();
                assignments.retain(|assignment| assignment.lane != lane);
                unseen |= assignments.len() < before;
            }
        }
        if unseen {
            self.control.retain(|signal| match signal {
                Signal::Assigned(assignments) => !assignments.is_empty(),
                Signal::Gap { lane: gap, .. } => *gap != lane,
                _ => true,
            });
        }
        unseen
    }

    /// Announces that a lane is to be released; nothing of it is handed out any more.
    pub(super) fn revoke(&mut self, lane: Lane) {
        self.slots[lane.id as usize].revoking = true;
        self.tell(Signal::Revoking(vec![lane]));
    }

    /// Reports what was trimmed before `base` and not handed out, and goes on behind it.
    pub(super) fn skip_to(&mut self, lane: Lane, base: u64) {
        let slot = &mut self.slots[lane.id as usize];
        let from = slot.next;
        let to = base.min(slot.until);
        if slot.revoking || from >= to {
            return;
        }
        slot.next = to;
        self.tell_gap(lane, from, to);
        self.check_end(lane.id);
    }

    /// Reports a gap, as one with a gap of the lane that was not heard yet.
    fn tell_gap(&mut self, lane: Lane, from: u64, to: u64) {
        let gap_to = Position(u128::from(to));
        for signal in &mut self.control {
            if let Signal::Gap { lane: gap, to, .. } = signal
                && *gap == lane
            {
                *to = gap_to;
                return;
            }
        }
        self.tell(Signal::Gap {
            lane,
            from: Position(u128::from(from)),
            to: gap_to,
        });
    }

    /// Says `Ended` once when a lane is at its end.
    fn check_end(&mut self, id: u32) {
        let slot = &mut self.slots[id as usize];
        if slot.next >= slot.until && !slot.ended {
            slot.ended = true;
            let lane = slot.lane;
            self.tell(Signal::Ended(vec![lane]));
        }
    }

    /// Ends every lane at the first message at or after the time that has come now.
    pub(super) fn end_at(&mut self, time: Timestamp, topics: &[TopicState]) {
        debug_assert_eq!(self.until_time, Some(time));
        self.until_time = None;
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            let log = &topics[slot.topic].partitions[slot.partition].log;
            slot.until = slot.until.min(log.first_at_or_after(time));
            // Lane numbers are small.
            self.check_end(index as u32);
        }
    }

    /// Puts a lane in line when a message arrived on it.
    pub(super) fn queue(&mut self, id: u32) {
        let slot = &mut self.slots[id as usize];
        if slot.queued || slot.revoking {
            return;
        }
        slot.queued = true;
        self.ready.push_back(id);
        self.wake();
    }

    /// Puts a lane in line if there is something on it.
    pub(super) fn queue_if_more(&mut self, id: u32, topics: &[TopicState]) {
        let slot = &self.slots[id as usize];
        if !slot.queued && slot.has_more(&topics[slot.topic].partitions[slot.partition]) {
            self.queue(id);
        }
    }

    /// The lane's place, if it is held for a group and of the present epoch.
    pub(super) fn place(&self, lane: Lane) -> Option<Place> {
        if !self.lanes.is_open(lane) {
            return None;
        }
        let slot = self.slots.get(lane.id as usize)?;
        Some(Place {
            topic: slot.topic,
            partition: slot.partition,
            cursor: slot.cursor?,
        })
    }

    /// Collects one batch, lane after lane, each in its turn.
    pub(super) fn hand_out(&mut self, topics: &mut [TopicState], counted: bool) -> Vec<Delivery> {
        let mut batch = Vec::new();
        for _ in 0..self.ready.len() {
            let room = self.limits.batch - batch.len();
            if room == 0 || self.lanes.is_full() {
                break;
            }
            let Some(id) = self.ready.pop_front() else {
                break;
            };
            let slot = &mut self.slots[id as usize];
            let partition = &mut topics[slot.topic].partitions[slot.partition];
            if batch.capacity() == 0 {
                let there = partition.log.end().saturating_sub(slot.next);
                let there = usize::try_from(there).unwrap_or(usize::MAX);
                batch.reserve(there.saturating_mul(self.ready.len() + 1).min(room));
            }
            let before = batch.len();
            let handed = slot.hand_out(
                &mut self.lanes,
                partition,
                self.until_time,
                counted,
                room,
                &mut batch,
            );
            match handed {
                Handed::Full => {
                    // A lane that got nothing keeps its turn until something is settled, so that
                    // small messages of other lanes cannot hold a large one up for ever.
                    if batch.len() == before {
                        self.ready.push_front(id);
                    } else {
                        self.ready.push_back(id);
                    }
                    break;
                }
                // Everybody waits for the same credit, so it keeps its place in line.
                Handed::Drained if self.lanes.is_full() => self.ready.push_back(id),
                Handed::More => self.ready.push_back(id),
                Handed::Drained => slot.queued = false,
            }
            self.check_end(id);
        }
        batch
    }

    /// Says that `next` found nothing and has to be woken.
    pub(super) fn wait(&mut self) {
        self.waiting = true;
    }

    /// Whether `next` would answer at once.
    pub(super) fn is_deliverable(&self, topics: &[TopicState]) -> bool {
        if self.ended {
            return false;
        }
        if !self.control.is_empty() {
            return true;
        }
        self.slots.iter().any(|slot| {
            if slot.revoking || self.lanes.credit(slot.lane) == 0 {
                return false;
            }
            slot.next_size(&topics[slot.topic].partitions[slot.partition])
                .is_some_and(|size| self.lanes.fits(size))
        })
    }
}
