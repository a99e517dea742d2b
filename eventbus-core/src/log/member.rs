//! What a member or reader holds: its lanes, what was read ahead, what it may be handed. The two
//! halves share it; nothing here waits.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Advance, LaneEnd, PAGE_ROWS, Page, TopicLanes, Unpacked};
use crate::{
    Assignment, Delivery, Lane, LaneTable, Limits, Position, Receipt, Settled, Signal, Timestamp,
    TopicPartition,
};

/// Bytes read ahead over all lanes, beyond which nothing more is.
const AHEAD_BYTES: usize = 8 * 1024 * 1024;

/// A lane before it is opened.
#[derive(Debug)]
pub struct Place {
    /// Its topic.
    pub topic: Arc<TopicLanes>,
    /// Which of its partitions.
    pub partition: u32,
    /// Where reading starts.
    pub position: Position,
    /// Where the group was, if it cannot go on there: that is told as a gap.
    pub left: Option<Position>,
    /// Where it ends, not included.
    pub until: Position,
    /// The end of the log there.
    pub end: Arc<LaneEnd>,
    /// The lease it is held by; a reader has none.
    pub epoch: Option<u64>,
}

impl Place {
    /// The lane's number in the log.
    pub fn row(&self) -> u32 {
        self.topic.first_lane + self.partition
    }
}

/// A lane that is open, or was.
#[derive(Debug)]
struct Slot {
    lane: Lane,
    place: Place,
    /// The next position to read.
    read_to: Position,
    ahead: VecDeque<Ahead>,
    /// `Ended` was said.
    ended: bool,
    /// The owner was told to release it.
    revoking: bool,
    /// Settled up to here, and recorded up to there.
    settled: Position,
    recorded: Position,
}

/// What was read and not handed out.
#[derive(Debug)]
enum Ahead {
    Message(Unpacked),
    Gap { from: Position, to: Position },
}

/// A page to read.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// For which lane of the member.
    pub lane: Lane,
    /// Of which topic.
    pub topic: Arc<TopicLanes>,
    /// The lane's number in the log.
    pub row: u32,
    /// The first position wanted.
    pub from: Position,
    /// Where the lane ends as far as it was seen, or the member's interest does; not included.
    pub to: Position,
}

/// The state of one member or reader.
#[derive(Debug)]
pub(super) struct MemberState {
    limits: Limits,
    lanes: LaneTable,
    /// By the lane's number.
    slots: Vec<Slot>,
    control: VecDeque<Signal>,
    ahead_bytes: usize,
    /// Whose turn it is to be handed out, and to be read.
    turn: usize,
    read_turn: usize,
    /// Where a reader ends when it ends at a time that was still to come.
    pub(super) until_time: Option<Timestamp>,
}

impl MemberState {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            lanes: LaneTable::new(limits),
            slots: Vec::new(),
            control: VecDeque::new(),
            ahead_bytes: 0,
            turn: 0,
            read_turn: 0,
            until_time: None,
        }
    }

    /// Opens lanes and announces them, all in one signal.
    pub(super) fn open(&mut self, places: Vec<Place>) {
        if places.is_empty() {
            return;
        }
        let mut assignments = Vec::with_capacity(places.len());
        let mut opened = Vec::with_capacity(places.len());
        let mut gaps = Vec::new();
        for place in places {
            let lane = self.lanes.open();
            let assignment = Assignment::new(lane, place.topic.name.clone(), place.partition);
            assignments.push(assignment.with_position(place.position));
            opened.push(lane.id as usize);
            gaps.extend(place.left.map(|from| Signal::Gap {
                lane,
                from,
                to: place.position,
            }));
            let slot = Slot {
                lane,
                read_to: place.position,
                settled: place.position,
                recorded: place.position,
                place,
                ahead: VecDeque::new(),
                ended: false,
                revoking: false,
            };
            match self.slots.get_mut(lane.id as usize) {
                Some(free) => *free = slot,
                None => self.slots.push(slot),
            }
        }
        self.control.push_back(Signal::Assigned(assignments));
        self.control.extend(gaps);
        for index in opened {
            self.check_end(index);
        }
    }

    /// The open lanes at these places.
    fn lanes_at(&self, places: &[TopicPartition]) -> Vec<Lane> {
        let is_at = |slot: &&Slot| {
            places.iter().any(|place| {
                place.topic == slot.place.topic.name && place.partition == slot.place.partition
            })
        };
        let open = |slot: &&Slot| self.lanes.is_open(slot.lane);
        let slots = self.slots.iter().filter(open).filter(is_at);
        slots.map(|slot| slot.lane).collect()
    }

    /// Announces that lanes are to be released; nothing of them is handed out any more.
    pub(super) fn revoke(&mut self, places: &[TopicPartition]) {
        let lanes = self.lanes_at(places);
        for lane in &lanes {
            self.slots[lane.id as usize].revoking = true;
            self.drop_ahead(*lane);
        }
        if !lanes.is_empty() {
            self.control.push_back(Signal::Revoking(lanes));
        }
    }

    /// Closes lanes that are gone already, and says so.
    pub(super) fn lose(&mut self, places: &[TopicPartition]) {
        let lanes = self.lanes_at(places);
        for lane in &lanes {
            self.close(*lane);
        }
        if !lanes.is_empty() {
            self.control.push_back(Signal::Lost(lanes));
        }
    }

    /// Closes lanes that their owner gives away, and returns where they are.
    pub(super) fn release(&mut self, lanes: &[Lane]) -> Vec<TopicPartition> {
        let mut places = Vec::new();
        for lane in lanes {
            let Some(slot) = self.slot(*lane) else {
                continue;
            };
            let place = TopicPartition::new(slot.place.topic.name.clone(), slot.place.partition);
            places.push(place);
            self.close(*lane);
        }
        places
    }

    fn close(&mut self, lane: Lane) {
        self.drop_ahead(lane);
        self.lanes.close(lane);
    }

    fn drop_ahead(&mut self, lane: Lane) {
        let ahead = std::mem::take(&mut self.slots[lane.id as usize].ahead);
        self.ahead_bytes -= ahead.iter().map(Ahead::size).sum::<usize>();
    }

    fn slot(&self, lane: Lane) -> Option<&Slot> {
        let open = self.lanes.is_open(lane);
        self.slots.get(lane.id as usize).filter(|_| open)
    }

    /// The next signal there is: control first, then messages.
    pub(super) fn next_signal(&mut self) -> Option<Signal> {
        if let Some(signal) = self.control.pop_front() {
            return Some(signal);
        }
        let batch = self.hand_out();
        if !batch.is_empty() {
            return Some(Signal::Delivered(batch));
        }
        // A gap or an end may have been reached without a message.
        self.control.pop_front()
    }

    /// Collects one batch, lane after lane, each in its turn.
    fn hand_out(&mut self) -> Vec<Delivery> {
        let mut batch = Vec::new();
        for _ in 0..self.slots.len() {
            if batch.len() >= self.limits.batch || self.lanes.is_full() {
                break;
            }
            let index = self.turn % self.slots.len();
            let served = self.hand_out_lane(index, &mut batch);
            self.check_end(index);
            if !served {
                // It has more than there was room for: its turn goes on.
                break;
            }
            self.turn = index + 1;
        }
        batch
    }

    /// Hands out what credit allows on one lane; false when it did not fit the bytes left.
    fn hand_out_lane(&mut self, index: usize, batch: &mut Vec<Delivery>) -> bool {
        let slot = &mut self.slots[index];
        if slot.revoking {
            return true;
        }
        let room = self.limits.batch - batch.len();
        let mut credit = self.lanes.credit(slot.lane).min(room);
        loop {
            match slot.ahead.front() {
                Some(Ahead::Gap { from, to }) => {
                    let (lane, from, to) = (slot.lane, *from, *to);
                    slot.ahead.pop_front();
                    self.control.push_back(Signal::Gap { lane, from, to });
                    // What stands before it in this batch goes first.
                    return true;
                }
                Some(Ahead::Message(message)) if credit > 0 => {
                    if self.until_time.is_some_and(|time| message.time >= time) {
                        slot.place.until = message.position;
                        self.ahead_bytes -= slot.ahead.drain(..).map(|it| it.size()).sum::<usize>();
                        return true;
                    }
                    if !self.lanes.fits(message.size) {
                        return false;
                    }
                }
                _ => return true,
            }
            let Some(Ahead::Message(unpacked)) = slot.ahead.pop_front() else {
                return true;
            };
            credit -= 1;
            self.ahead_bytes -= unpacked.size;
            let position = unpacked.position;
            let receipt = self.lanes.hand_out(slot.lane, position, unpacked.size);
            batch.push(Delivery::new(unpacked.message, receipt).with_position(position));
        }
    }

    /// Says `Ended` once when a lane is at its end.
    fn check_end(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        let at_end = slot.read_to >= slot.place.until && slot.ahead.is_empty();
        if at_end && !slot.ended && self.lanes.is_open(slot.lane) {
            slot.ended = true;
            self.control.push_back(Signal::Ended(vec![slot.lane]));
        }
    }

    /// The pages worth reading next, each of another lane.
    pub(super) fn wanted(&mut self, pages_max: usize) -> Vec<Wanted> {
        let mut pages = Vec::new();
        if self.ahead_bytes >= AHEAD_BYTES {
            return pages;
        }
        let count = self.slots.len();
        let first = self.read_turn;
        for index in (0..count).map(|offset| (first + offset) % count) {
            if pages.len() >= pages_max {
                break;
            }
            let slot = &self.slots[index];
            let to = slot.place.end.next().min(slot.place.until);
            let enough = slot.ahead.len() as u64 >= PAGE_ROWS / 2;
            // Nothing is read for a lane that can take nothing.
            if slot.revoking || enough || slot.read_to >= to || self.lanes.credit(slot.lane) == 0 {
                continue;
            }
            pages.push(Wanted {
                lane: slot.lane,
                topic: Arc::clone(&slot.place.topic),
                row: slot.place.row(),
                from: slot.read_to,
                to,
            });
            if pages.len() == 1 {
                // Whoever is first is surely read, so each lane is first in its turn.
                self.read_turn = index + 1;
            }
        }
        pages
    }

    /// Takes in a page, unless its lane is another one by now. Returns the place of a member that has to
    /// be opened anew, and whose lane is lost.
    pub(super) fn take_page(&mut self, wanted: &Wanted, page: Page) -> Option<TopicPartition> {
        if !self.lanes.is_open(wanted.lane) {
            return None;
        }
        let index = wanted.lane.id as usize;
        let slot = &mut self.slots[index];
        if slot.revoking || slot.read_to != wanted.from {
            return None;
        }
        match page {
            Page::Messages(messages) => {
                if let Some(last) = messages.last() {
                    slot.read_to = behind(last.position);
                }
                self.ahead_bytes += messages.iter().map(|message| message.size).sum::<usize>();
                slot.ahead.extend(messages.into_iter().map(Ahead::Message));
            }
            Page::Nothing { next } => slot.read_to = next.max(slot.read_to),
            Page::Gone { base } => {
                let to = base.min(slot.place.until);
                let from = slot.read_to;
                slot.ahead.push_back(Ahead::Gap { from, to });
                slot.read_to = to;
            }
            Page::Restarted { at, end } => return self.restart(wanted.lane, at, end),
        }
        None
    }

    /// Goes back, and says what of: a reader here, a member by losing the lane.
    fn restart(&mut self, lane: Lane, at: Position, end: Position) -> Option<TopicPartition> {
        // What was read ahead is read again.
        self.drop_ahead(lane);
        let slot = &mut self.slots[lane.id as usize];
        let (from, to) = (slot.read_to, at);
        self.control.push_back(Signal::Gap { lane, from, to });
        if slot.place.epoch.is_some() {
            let place = TopicPartition::new(slot.place.topic.name.clone(), slot.place.partition);
            self.close(lane);
            self.control.push_back(Signal::Lost(vec![lane]));
            return Some(place);
        }
        slot.read_to = at;
        if slot.place.until != Position(u128::MAX) {
            // Who reads to the end that there was would wait for what nobody publishes any more.
            slot.place.until = slot.place.until.min(end);
        }
        self.check_end(lane.id as usize);
        None
    }

    /// Ends every lane before the position it is given here.
    pub(super) fn end_at(&mut self, ends: &[Position]) {
        self.until_time = None;
        for (index, end) in ends.iter().enumerate() {
            if let Some(slot) = self.slots.get_mut(index) {
                slot.place.until = slot.place.until.min(*end);
                // What was published behind the end may have been read before the end was known.
                while slot.ahead.back().is_some_and(|it| it.position() >= *end) {
                    let beyond = slot.ahead.pop_back();
                    self.ahead_bytes -= beyond.map_or(0, |beyond| beyond.size());
                }
                self.check_end(index);
            }
        }
    }

    /// The rows of all lanes, in the order of their numbers.
    pub(super) fn rows(&self) -> Vec<u32> {
        self.slots.iter().map(|slot| slot.place.row()).collect()
    }

    /// Marks messages done; returns how many were of an older epoch or done before.
    pub(super) fn settle(&mut self, receipts: impl Iterator<Item = Receipt>) -> u64 {
        let stale = self.lanes.stale();
        for receipt in receipts {
            if let Settled::LowWater(position) = self.lanes.settle(receipt) {
                self.slots[receipt.lane.id as usize].settled = behind(position);
            }
        }
        self.lanes.stale() - stale
    }

    /// What is settled and not recorded yet.
    pub(super) fn advances(&self, group: i64) -> Vec<Advance> {
        let open = self
            .slots
            .iter()
            .filter(|slot| self.lanes.is_open(slot.lane));
        let unrecorded = open.filter(|slot| slot.settled > slot.recorded);
        unrecorded
            .filter_map(|slot| {
                Some(Advance {
                    group,
                    lane: slot.place.row(),
                    epoch: slot.place.epoch?,
                    position: slot.settled,
                })
            })
            .collect()
    }

    /// Takes note that advances are on disk.
    pub(super) fn recorded(&mut self, advances: &[Advance]) {
        for advance in advances {
            let mine = self.slots.iter_mut().find(|slot| {
                slot.place.row() == advance.lane && slot.place.epoch == Some(advance.epoch)
            });
            if let Some(slot) = mine {
                slot.recorded = slot.recorded.max(advance.position);
            }
        }
    }
}

/// The first position behind this one.
fn behind(position: Position) -> Position {
    Position(position.0 + 1)
}

impl Ahead {
    fn position(&self) -> Position {
        match self {
            Self::Message(message) => message.position,
            Self::Gap { from, .. } => *from,
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::Message(message) => message.size,
            Self::Gap { .. } => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{Message, Topic};

    use super::*;
    use crate::log::Wakes;

    const TOPIC: Topic = Topic::from_static("orders");

    /// A reader of one lane that has read so many messages ahead.
    fn reader(messages: u64, until_time: Timestamp) -> MemberState {
        let mut state = MemberState::new(Limits::default());
        state.until_time = Some(until_time);
        state.open(vec![Place {
            topic: Arc::new(TopicLanes::new(TOPIC, 1, 1)),
            partition: 0,
            position: Position(0),
            until: Position(u128::MAX),
            left: None,
            end: Wakes::new().lane(1, Position(messages.into())),
            epoch: None,
        }]);
        let wanted = state.wanted(1);
        let message = |position: u64| Unpacked {
            position: Position(position.into()),
            time: Timestamp::from_micros(position as i64),
            size: 1,
            message: Message::new(TOPIC, "x"),
        };
        state.take_page(
            &wanted[0],
            Page::Messages((0..messages).map(message).collect()),
        );
        state
    }

    #[test]
    fn a_log_that_lost_its_end_is_read_from_an_earlier_place() {
        let mut state = reader(4, Timestamp::from_micros(i64::MAX));
        let Some(Signal::Assigned(_)) = state.next_signal() else {
            panic!("it is told first");
        };
        state.slots[0].place.until = Position(8);
        state.slots[0].place.end.reaches(Position(5));
        let wanted = state.wanted(1);
        let (at, end) = (Position(1), Position(2));
        let leaves = state.take_page(&wanted[0], Page::Restarted { at, end });
        assert_eq!(leaves, None, "a reader has no lease");
        let Some(Signal::Gap { from, to, .. }) = state.next_signal() else {
            panic!("it is told");
        };
        assert_eq!((from, to), (wanted[0].from, at));
        let wanted = state.wanted(1);
        assert_eq!((wanted[0].from, wanted[0].to), (at, end));
        // A member gives its lease back.
        state.slots[0].place.epoch = Some(7);
        let leaves = state.take_page(&wanted[0], Page::Restarted { at, end });
        assert_eq!(leaves, Some(TopicPartition::new(TOPIC, 0)));
        assert!(matches!(state.next_signal(), Some(Signal::Gap { .. })));
        assert!(matches!(state.next_signal(), Some(Signal::Lost(_))));
        assert!(state.wanted(1).is_empty());
    }

    #[test]
    fn what_was_read_ahead_behind_the_end_is_not_handed_out() {
        let mut state = reader(4, Timestamp::from_micros(2));
        assert!(matches!(state.next_signal(), Some(Signal::Assigned(_))));
        state.end_at(&[Position(2)]);
        let Some(Signal::Delivered(batch)) = state.next_signal() else {
            panic!("two messages are before the end");
        };
        assert_eq!(batch.len(), 2);
        assert!(matches!(state.next_signal(), Some(Signal::Ended(_))));
        assert!(state.next_signal().is_none());
        assert_eq!(state.ahead_bytes, 0);
    }
}
