//! What a member or a reader holds: its lanes, the queue of each, and what may be handed out. Nothing
//! here waits.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use eventbus_core::{
    Assignment, Delivery, Error, Lane, LaneTable, Limits, Message, Position, Receipt, Retry,
    Settled, Signal, Topic,
};
use rdkafka::Message as _;
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};

use crate::error::of_code;
use crate::record::Reader;
use crate::subscriber::MemberContext;

/// A partition as Kafka's client names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) topic: Topic,
    pub(crate) partition: i32,
}

/// Where a reader ends on a lane.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    /// Before this offset.
    pub(crate) offset: i64,
    /// The partition has reached it: there is no need to see a message behind it.
    pub(crate) is_reached: bool,
}

/// What a lane is opened with.
pub(crate) struct Opening {
    pub(crate) place: Place,
    pub(crate) queue: PartitionQueue<MemberContext>,
    /// Where reading starts, where that is known.
    pub(crate) start: Option<i64>,
    pub(crate) end: Option<End>,
}

/// A lane that is open, or was.
struct Slot {
    lane: Lane,
    place: Place,
    /// None when nothing more is read.
    queue: Option<PartitionQueue<MemberContext>>,
    /// What was read and did not fit.
    ahead: VecDeque<Ahead>,
    /// The next offset, where one is known.
    next: Option<i64>,
    /// All there was has been read, and nothing since.
    at_end: bool,
    /// Where it starts is being found out.
    resolving: bool,
    /// The owner was told to release it.
    revoking: bool,
    end: Option<End>,
    ended: bool,
    /// Settled up to here, and committed up to there.
    settled: Option<i64>,
    committed: Option<i64>,
    /// When something was read last, for the watchdog.
    heard: Instant,
    /// Where it stood, and where the partition ended, when the watchdog has sought it last.
    sought: Option<(i64, i64)>,
}

struct Ahead {
    message: Message,
    offset: i64,
    size: usize,
}

/// Lanes that are to be given up, all at once when each is released.
#[derive(Debug)]
struct Revocation {
    places: Vec<Place>,
    lanes: Vec<Lane>,
    until: Instant,
}

/// What one read of a queue brought.
enum Read {
    Message(Ahead),
    Nothing,
    /// All there is was read.
    End,
    /// Where it stands is not there any more, or was never said.
    Astray,
    Failed(Error),
}

/// The lanes of one member or reader.
pub(crate) struct Lanes {
    limits: Limits,
    table: LaneTable,
    /// By the lane's number.
    slots: Vec<Slot>,
    control: VecDeque<Signal>,
    /// Whose turn it is.
    turn: usize,
    reader: Reader,
    revocation: Option<Revocation>,
    /// Lanes whose start is to be found out, and not yet is.
    astray: Vec<Lane>,
    /// What `next` is to fail with.
    failure: Option<Error>,
    /// In milliseconds: where a reader ends that ends at a time still to come.
    pub(crate) end_time: Option<i64>,
}

impl std::fmt::Debug for Lanes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lanes")
            .field("table", &self.table)
            .field("control", &self.control)
            .field("revocation", &self.revocation)
            .field("failure", &self.failure)
            .finish_non_exhaustive()
    }
}

impl Lanes {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            table: LaneTable::new(limits),
            slots: Vec::new(),
            control: VecDeque::new(),
            turn: 0,
            reader: Reader::default(),
            revocation: None,
            astray: Vec::new(),
            failure: None,
            end_time: None,
        }
    }

    /// Lets `next` fail. What ends the member is not forgotten for what passes.
    pub(crate) fn fail(&mut self, error: Error) {
        if self.failure.as_ref().is_none_or(Error::is_retryable) {
            self.failure = Some(error);
        }
    }

    pub(crate) fn take_failure(&mut self) -> Option<Error> {
        self.failure.take()
    }

    /// Opens lanes and announces them, all in one signal.
    pub(crate) fn open(&mut self, openings: Vec<Opening>) {
        if openings.is_empty() {
            return;
        }
        let opened = openings.into_iter().map(|opening| self.take_in(opening));
        let assignments: Vec<_> = opened.collect();
        let lanes: Vec<_> = assignments.iter().map(|it| it.lane).collect();
        self.control.push_back(Signal::Assigned(assignments));
        for lane in lanes {
            self.check_end(lane.id as usize);
        }
    }

    fn take_in(&mut self, opening: Opening) -> Assignment {
        let lane = self.table.open();
        let place = &opening.place;
        let mut assignment = Assignment::new(lane, place.topic.clone(), place.partition as u32);
        if let Some(start) = opening.start {
            assignment = assignment.with_position(position(start));
        }
        let slot = Slot {
            lane,
            place: opening.place,
            queue: Some(opening.queue),
            ahead: VecDeque::new(),
            next: opening.start,
            at_end: false,
            resolving: false,
            revoking: false,
            end: opening.end,
            ended: false,
            settled: None,
            committed: None,
            heard: Instant::now(),
            sought: None,
        };
        match self.slots.get_mut(lane.id as usize) {
            Some(free) => *free = slot,
            None => self.slots.push(slot),
        }
        assignment
    }

    /// Opens one lane, and announces it.
    fn open_one(&mut self, opening: Opening) -> Lane {
        let assignment = self.take_in(opening);
        let lane = assignment.lane;
        self.control.push_back(Signal::Assigned(vec![assignment]));
        self.check_end(lane.id as usize);
        lane
    }

    fn is_open(&self, slot: &Slot) -> bool {
        self.table.is_open(slot.lane)
    }

    fn lanes_at(&self, places: &[Place]) -> Vec<Lane> {
        let open = self.slots.iter().filter(|slot| self.is_open(slot));
        let found = open.filter(|slot| places.contains(&slot.place));
        found.map(|slot| slot.lane).collect()
    }

    /// Announces that lanes are to be released; nothing of them is handed out any more. Says whether
    /// that has to be waited for.
    pub(crate) fn revoke(&mut self, places: Vec<Place>) -> bool {
        let lanes = self.lanes_at(&places);
        if lanes.is_empty() {
            return false;
        }
        for lane in &lanes {
            let slot = &mut self.slots[lane.id as usize];
            slot.revoking = true;
            slot.ahead.clear();
        }
        self.control.push_back(Signal::Revoking(lanes.clone()));
        let until = Instant::now() + self.limits.revoke_timeout;
        let revocation = self.revocation.get_or_insert(Revocation {
            places: Vec::new(),
            lanes: Vec::new(),
            until,
        });
        // Librdkafka waits for the answer to one before it says the next; were it not so, they would
        // be answered together.
        revocation.places.extend(places);
        revocation.lanes.extend(lanes);
        true
    }

    /// Closes lanes that are gone already, and says so.
    pub(crate) fn lose(&mut self, places: &[Place]) {
        let lanes = self.lanes_at(places);
        if lanes.is_empty() {
            return;
        }
        for lane in &lanes {
            self.close(*lane);
        }
        self.control.push_back(Signal::Lost(lanes));
    }

    /// Loses all there are, and forgets what a revocation was waiting for.
    pub(crate) fn lose_all(&mut self) {
        let places = self.places();
        self.lose(&places);
        self.revocation = None;
    }

    /// Closes lanes that their owner gives away. Says what is to be given up when these were the last.
    pub(crate) fn release(&mut self, lanes: &[Lane]) -> Option<Vec<Place>> {
        for lane in lanes {
            match self.slots.get(lane.id as usize) {
                Some(slot) if slot.lane == *lane && !slot.revoking && self.is_open(slot) => {
                    // Nobody else asks for it: it comes back, from what is committed on.
                    self.reopen(*lane);
                }
                _ => self.close(*lane),
            }
        }
        let revocation = self.revocation.as_ref()?;
        let left = revocation
            .lanes
            .iter()
            .any(|lane| self.table.is_open(*lane));
        (!left).then(|| self.revocation.take().map(|done| done.places))?
    }

    /// What is to be given up though its owner has not released it: the time is over, or it is lost.
    pub(crate) fn overdue(&mut self, lost: bool) -> Option<Vec<Place>> {
        let revocation = self.revocation.as_ref()?;
        if !lost && Instant::now() < revocation.until {
            return None;
        }
        let places = self.revocation.take()?.places;
        self.lose(&places);
        Some(places)
    }

    /// Gives everything up, and says what a revocation was still waiting for.
    pub(crate) fn end(&mut self) -> Option<Vec<Place>> {
        let lanes: Vec<_> = self.slots.iter().map(|slot| slot.lane).collect();
        for lane in lanes {
            self.close(lane);
        }
        self.revocation.take().map(|revocation| revocation.places)
    }

    fn reopen(&mut self, lane: Lane) {
        let slot = &mut self.slots[lane.id as usize];
        let Some(queue) = slot.queue.take() else {
            return;
        };
        let opening = Opening {
            place: slot.place.clone(),
            queue,
            start: None,
            end: slot.end,
        };
        self.close(lane);
        let lane = self.open_one(opening);
        self.lead_astray(lane);
    }

    fn close(&mut self, lane: Lane) {
        if !self.table.is_open(lane) {
            return;
        }
        self.table.close(lane);
        let slot = &mut self.slots[lane.id as usize];
        slot.queue = None;
        slot.ahead.clear();
    }

    /// The next signal there is: control first, then messages.
    pub(crate) fn next_signal(&mut self) -> Option<Signal> {
        if let Some(signal) = self.control.pop_front() {
            return Some(signal);
        }
        let batch = self.hand_out();
        if !batch.is_empty() {
            return Some(Signal::Delivered(batch));
        }
        // An end may have been reached without a message.
        self.control.pop_front()
    }

    /// Collects one batch, lane after lane, each in its turn.
    fn hand_out(&mut self) -> Vec<Delivery> {
        let mut batch = Vec::new();
        let now = Instant::now();
        for _ in 0..self.slots.len() {
            if batch.len() >= self.limits.batch || self.table.is_full() {
                break;
            }
            let index = self.turn % self.slots.len();
            let served = self.hand_out_lane(index, &mut batch, now);
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
    fn hand_out_lane(&mut self, index: usize, batch: &mut Vec<Delivery>, now: Instant) -> bool {
        let slot = &mut self.slots[index];
        if slot.revoking || slot.resolving || slot.ended || !self.table.is_open(slot.lane) {
            return true;
        }
        let room = self.limits.batch - batch.len();
        let credit = self.table.credit(slot.lane).min(room);
        if batch.capacity() == 0 {
            batch.reserve(credit);
        }
        for _ in 0..credit {
            let ahead = match slot.ahead.pop_front() {
                Some(ahead) => ahead,
                None => match slot.read(&mut self.reader, self.end_time, now) {
                    Read::Message(ahead) => ahead,
                    Read::Nothing => return true,
                    Read::End => {
                        slot.at_end = true;
                        return true;
                    }
                    Read::Astray => {
                        slot.resolving = true;
                        self.astray.push(slot.lane);
                        return true;
                    }
                    Read::Failed(error) => {
                        // What comes behind it would be settled over it: it is read again from here.
                        slot.resolving = true;
                        self.astray.push(slot.lane);
                        self.fail(error);
                        return true;
                    }
                },
            };
            if !self.table.fits(ahead.size) {
                slot.ahead.push_front(ahead);
                return false;
            }
            slot.next = Some(ahead.offset + 1);
            let position = position(ahead.offset);
            let receipt = self.table.hand_out(slot.lane, position, ahead.size);
            batch.push(Delivery::new(ahead.message, receipt).with_position(position));
        }
        true
    }

    /// Says `Ended` once when a lane is at its end.
    fn check_end(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        let Some(end) = slot.end else { return };
        let is_behind = slot.next.is_some_and(|next| next >= end.offset);
        // What is not handed out between here and the end is no message: a mark of a transaction, or
        // one that was compacted.
        let has_all = slot.at_end && end.is_reached && slot.ahead.is_empty();
        if (is_behind || has_all) && !slot.ended && self.table.is_open(slot.lane) {
            slot.ended = true;
            self.control.push_back(Signal::Ended(vec![slot.lane]));
        }
    }

    /// Ends lanes where that is known only now.
    pub(crate) fn end_at(&mut self, ends: &[(Place, End)]) {
        self.end_time = None;
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            let end = ends.iter().find(|(place, _)| *place == slot.place);
            if let Some((_, end)) = end {
                slot.end = Some(*end);
                slot.ahead.retain(|ahead| ahead.offset < end.offset);
                // That all was read was said before the end was known; it is asked again.
                slot.at_end = false;
                let (lane, is_before) = (slot.lane, slot.next.is_none_or(|at| at < end.offset));
                self.check_end(index);
                if is_before {
                    self.lead_astray(lane);
                }
            }
        }
    }

    /// The places of all open lanes.
    pub(crate) fn places(&self) -> Vec<Place> {
        let open = self.slots.iter().filter(|slot| self.is_open(slot));
        open.map(|slot| slot.place.clone()).collect()
    }

    /// Takes in a message that came beside its queue; one of no lane here is somebody else's.
    pub(crate) fn take_stray(&mut self, record: &rdkafka::message::BorrowedMessage<'_>) {
        let (topic, partition) = (record.topic(), record.partition());
        let table = &self.table;
        let slot = self.slots.iter_mut().find(|slot| {
            slot.place.topic.as_str() == topic
                && slot.place.partition == partition
                && table.is_open(slot.lane)
        });
        let Some(slot) = slot.filter(|slot| !slot.revoking) else {
            return;
        };
        match self.reader.read(&slot.place.topic, record) {
            Ok(message) => slot.ahead.push_back(Ahead {
                size: message.size(),
                offset: record.offset(),
                message,
            }),
            Err(error) => self.fail(error),
        }
    }

    /// Marks messages done; returns how many were of an older epoch or done before.
    pub(crate) fn settle(&mut self, receipts: impl Iterator<Item = Receipt>) -> u64 {
        let stale = self.table.stale();
        for receipt in receipts {
            if let Settled::LowWater(position) = self.table.settle(receipt) {
                // It was handed out here, so it fits.
                let settled = position.0 as i64 + 1;
                self.slots[receipt.lane.id as usize].settled = Some(settled);
            }
        }
        self.table.stale() - stale
    }

    /// What is settled and not committed yet.
    pub(crate) fn uncommitted(&self) -> Vec<(Place, i64)> {
        let open = self.slots.iter().filter(|slot| self.is_open(slot));
        open.filter(|slot| slot.settled > slot.committed)
            .filter_map(|slot| Some((slot.place.clone(), slot.settled?)))
            .collect()
    }

    /// Takes note of what was committed.
    pub(crate) fn committed(&mut self, committed: &[(Place, i64)]) {
        for (place, offset) in committed {
            let table = &self.table;
            let slot = self.slots.iter_mut();
            let mut slot = slot.filter(|slot| slot.place == *place && table.is_open(slot.lane));
            if let Some(slot) = slot.next() {
                slot.committed = slot.committed.max(Some(*offset));
            }
        }
    }

    /// Lanes whose start is to be found out, with the place and the next offset of each.
    pub(crate) fn take_astray(&mut self) -> Vec<(Lane, Place, Option<i64>)> {
        let lanes = std::mem::take(&mut self.astray);
        let open = lanes.into_iter().filter(|lane| self.table.is_open(*lane));
        let slots = open.map(|lane| &self.slots[lane.id as usize]);
        slots
            .map(|slot| (slot.lane, slot.place.clone(), slot.next))
            .collect()
    }

    /// Whether a lane is still waiting to hear where it starts.
    pub(crate) fn is_astray(&self, lane: Lane) -> bool {
        self.table.is_open(lane) && self.slots[lane.id as usize].resolving
    }

    /// A lane goes on at `start`. Where it would have gone on `from` elsewhere, what is between was
    /// lost, and is reported.
    pub(crate) fn found(&mut self, lane: Lane, start: i64, from: Option<i64>) {
        if !self.is_astray(lane) {
            return;
        }
        let mut lane = lane;
        let slot = &mut self.slots[lane.id as usize];
        slot.resolving = false;
        slot.next = Some(start);
        slot.heard = Instant::now();
        if from.is_some_and(|from| from > start)
            && let Some(queue) = slot.queue.take()
        {
            // Positions of a lane only rise: from here on it is another one.
            let opening = Opening {
                place: slot.place.clone(),
                queue,
                start: Some(start),
                end: slot.end,
            };
            self.lose(std::slice::from_ref(&opening.place));
            lane = self.open_one(opening);
        }
        if let Some(from) = from.filter(|from| *from != start) {
            self.control.push_back(Signal::Gap {
                lane,
                from: position(from),
                to: position(start),
            });
        }
        self.check_end(lane.id as usize);
    }

    /// Whether there is none.
    pub(crate) fn are_none(&self) -> bool {
        !self.slots.iter().any(|slot| self.is_open(slot))
    }

    /// Whether lanes are to be released and are not yet.
    pub(crate) fn is_revoking(&self) -> bool {
        self.revocation.is_some()
    }

    /// Some of the lanes that could be handed out and brought nothing for this long, with where they
    /// stand, where that is known.
    pub(crate) fn silent(&mut self, longer_than: Duration) -> Vec<(Lane, Place, Option<i64>)> {
        // Each may take a while to look after.
        const AT_ONCE: usize = 4;

        let now = Instant::now();
        let mut silent = Vec::new();
        for slot in &mut self.slots {
            let is_idle = !slot.revoking && !slot.resolving && !slot.ended && slot.ahead.is_empty();
            let may_read = self.table.is_open(slot.lane) && self.table.credit(slot.lane) > 0;
            if !is_idle || !may_read {
                slot.heard = now;
            } else if now.duration_since(slot.heard) > longer_than && silent.len() < AT_ONCE {
                slot.heard = now;
                silent.push((slot.lane, slot.place.clone(), slot.next));
            }
        }
        silent
    }

    /// Notes that a lane is sought anew where it stands, before this end; false when it was already,
    /// so that what is left there is no message: a mark of a transaction.
    pub(crate) fn seek_once(&mut self, lane: Lane, next: i64, high: i64) -> bool {
        let slot = &mut self.slots[lane.id as usize];
        slot.lane == lane && slot.sought.replace((next, high)) != Some((next, high))
    }

    /// Has a lane look again for where it stands.
    pub(crate) fn lead_astray(&mut self, lane: Lane) {
        if self.table.is_open(lane) && !self.slots[lane.id as usize].resolving {
            self.slots[lane.id as usize].resolving = true;
            self.astray.push(lane);
        }
    }
}

impl Slot {
    /// Reads one message.
    fn read(&mut self, reader: &mut Reader, end_time: Option<i64>, now: Instant) -> Read {
        let Some(queue) = &self.queue else {
            return Read::Nothing;
        };
        loop {
            let record = match queue.poll(Duration::ZERO) {
                None => return Read::Nothing,
                Some(Ok(record)) => record,
                Some(Err(KafkaError::PartitionEOF(_))) => return Read::End,
                Some(Err(error)) => return astray(&self.place, &error),
            };
            self.at_end = false;
            self.heard = now;
            let offset = record.offset();
            // What was on its way when the lane was led elsewhere.
            if self.next.is_some_and(|next| offset < next) {
                continue;
            }
            if let Some(time) = end_time
                && record.timestamp().to_millis().is_some_and(|at| at >= time)
            {
                self.end = Some(End {
                    offset,
                    is_reached: true,
                });
            }
            if self.end.is_some_and(|end| offset >= end.offset) {
                self.next = Some(offset);
                return Read::Nothing;
            }
            return match reader.read(&self.place.topic, &record) {
                Ok(message) => Read::Message(Ahead {
                    size: message.size(),
                    message,
                    offset,
                }),
                Err(error) => Read::Failed(error),
            };
        }
    }
}

/// What an error of one partition means.
fn astray(place: &Place, error: &KafkaError) -> Read {
    let code = error.rdkafka_error_code().unwrap_or(Code::Unknown);
    match code {
        Code::AutoOffsetReset | Code::NoOffset | Code::OffsetOutOfRange | Code::LogTruncation => {
            Read::Astray
        }
        code => {
            // One answer that does not know the topic, or was damaged on its way, ends no group.
            let error = of_code("read", code)
                .with_retry(Retry::Later)
                .with("topic", &place.topic)
                .with("partition", place.partition);
            Read::Failed(error)
        }
    }
}

/// Offsets are not negative where they are those of messages.
pub(crate) fn position(offset: i64) -> Position {
    Position(offset.max(0) as u128)
}
