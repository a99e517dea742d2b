//! What a member or a reader holds: its lanes, the channel of each, and what may be handed out. Nothing
//! here waits.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll};

use eventbus_core::{
    Assignment, Delivery, Error, Lane, LaneTable, Limits, Message, Position, Receipt, Result,
    Settled, Signal, TopicPartition,
};
use futures_util::StreamExt as _;
use lapin::types::ShortString;
use lapin::{Channel, Consumer};
use tokio::sync::Notify;

use crate::adopted::RabbitMqQueue;
use crate::link::within;
use crate::properties;

/// What brings the messages of a lane. Its channel has no other consumer.
#[derive(Debug)]
pub(crate) struct Source {
    channel: Channel,
    /// Gone when it is dropped only.
    consumer: Option<Consumer>,
    queue: ShortString,
    /// What is known of the queue, where it is somebody else's.
    adopted: Option<RabbitMqQueue>,
}

impl Source {
    pub(crate) fn new(channel: Channel, consumer: Consumer, queue: ShortString) -> Self {
        Self {
            channel,
            consumer: Some(consumer),
            queue,
            adopted: None,
        }
    }

    /// Of a queue that is somebody else's.
    pub(crate) fn adopted(mut self, queue: RabbitMqQueue) -> Self {
        self.adopted = Some(queue);
        self
    }

    /// Ends it; what was not acknowledged is handed to the next one, first and in its order.
    pub(crate) async fn close(mut self) {
        let consumer = self.consumer.take();
        close(&self.channel, consumer).await;
    }
}

/// Closes a channel and only then drops its consumer, which would cancel itself otherwise: the server
/// then hands later messages to the next one before those that are not acknowledged.
async fn close(channel: &Channel, consumer: Option<Consumer>) {
    if let Err(error) = within("close", channel.close(200, "given away".into())).await {
        tracing::debug!(%error, "a channel was closed before");
    }
    drop(consumer);
}

impl Drop for Source {
    fn drop(&mut self) {
        let Some(consumer) = self.consumer.take() else {
            return;
        };
        if !self.channel.status().connected() {
            return;
        }
        let channel = self.channel.clone();
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                drop(runtime.spawn(async move { close(&channel, Some(consumer)).await }))
            }
            // Nothing is sent any more: the connection ends with its thread.
            Err(_) => std::mem::forget(consumer),
        }
    }
}

/// Where a reader ends on a lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Before this place.
    Offset(u64),
    /// At the mark of this name.
    Mark(String),
}

/// A lane that is open, or was.
struct Slot {
    lane: Lane,
    place: TopicPartition,
    /// None while a reader has lost it, and when the lane is closed.
    source: Option<Source>,
    /// What the server has sent and did not fit yet.
    ahead: VecDeque<Ahead>,
    /// The owner was told to release it.
    revoking: bool,
    /// What stands before the tags of the channel: positions of a lane rise, tags begin anew with each.
    base: u64,
    /// The last position that was sent by the server.
    last: u64,
    /// Settled up to here, acknowledged up to there, and known by the server up to there.
    settled: u64,
    acked: u64,
    known: u64,
    /// Of a stream: the next place to be read.
    next: u64,
    end: Option<End>,
    ended: bool,
}

struct Ahead {
    message: Message,
    position: u64,
    handed_out: Option<u32>,
    offset: Option<u64>,
    /// What the mark is called that it is.
    mark: Option<String>,
    size: usize,
}

/// Messages that are to be acknowledged.
#[derive(Debug)]
pub(crate) struct Acknowledgement {
    pub(crate) lane: Lane,
    pub(crate) channel: Channel,
    pub(crate) queue: ShortString,
    pub(crate) tag: u64,
    /// Whether it was acknowledged before, and only the answer is missing: nothing is acknowledged twice.
    pub(crate) is_sent: bool,
    position: u64,
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
    /// What `next` is to fail with.
    failure: Option<Error>,
    /// Whether a lane goes on when it gets another channel, which that of a reader does.
    goes_on: bool,
    /// Whether streams are read.
    is_log: bool,
    /// Told when a channel has ended by itself, or something is to be acknowledged that nobody settles.
    attention: Arc<Notify>,
}

impl std::fmt::Debug for Lanes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lanes")
            .field("table", &self.table)
            .field("control", &self.control)
            .field("failure", &self.failure)
            .finish_non_exhaustive()
    }
}

impl Lanes {
    /// Of a member of a group.
    pub(crate) fn of_member(limits: Limits, attention: Arc<Notify>) -> Self {
        Self {
            limits,
            table: LaneTable::new(limits),
            slots: Vec::new(),
            control: VecDeque::new(),
            turn: 0,
            failure: None,
            goes_on: false,
            is_log: false,
            attention,
        }
    }

    /// Of a reader, of streams or of what comes from now on.
    pub(crate) fn of_reader(limits: Limits, attention: Arc<Notify>, is_log: bool) -> Self {
        Self {
            goes_on: true,
            is_log,
            ..Self::of_member(limits, attention)
        }
    }

    /// Lets `next` fail. What ends the member is not forgotten for what passes.
    pub(crate) fn fail(&mut self, error: Error) {
        if self.failure.as_ref().is_none_or(Error::is_retryable) {
            self.failure = Some(error);
        }
    }

    /// Opens lanes and announces them, all in one signal.
    pub(crate) fn open(&mut self, openings: Vec<(TopicPartition, Option<Source>)>) -> Vec<Lane> {
        let mut assignments = Vec::with_capacity(openings.len());
        for (place, source) in openings {
            let lane = self.table.open();
            assignments.push(Assignment::new(lane, place.topic.clone(), place.partition));
            let slot = Slot {
                lane,
                place,
                source,
                ahead: VecDeque::new(),
                revoking: false,
                base: 0,
                last: 0,
                settled: 0,
                acked: 0,
                known: 0,
                next: 0,
                end: None,
                ended: false,
            };
            match self.slots.get_mut(lane.id as usize) {
                Some(free) => *free = slot,
                None => self.slots.push(slot),
            }
        }
        let lanes = assignments.iter().map(|it| it.lane).collect();
        if !assignments.is_empty() {
            self.control.push_back(Signal::Assigned(assignments));
        }
        lanes
    }

    /// Says where a reader begins and ends on a lane.
    pub(crate) fn bound(&mut self, lane: Lane, next: u64, end: Option<End>) {
        let slot = &mut self.slots[lane.id as usize];
        (slot.next, slot.end) = (next, end);
        self.check_end(lane.id as usize);
    }

    /// Gives a lane another channel; its tags begin anew.
    pub(crate) fn go_on(&mut self, lane: Lane, source: Source) {
        let slot = &mut self.slots[lane.id as usize];
        slot.base = slot.last;
        slot.source = Some(source);
    }

    /// The lanes of a reader that have no channel and need one, with the next place to be read.
    pub(crate) fn cut_off(&self) -> Vec<(Lane, TopicPartition, u64)> {
        let open = self.open_slots().filter(|slot| !slot.ended);
        let cut_off = open.filter(|slot| slot.source.is_none());
        cut_off
            .map(|slot| (slot.lane, slot.place.clone(), slot.next))
            .collect()
    }

    fn open_slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots
            .iter()
            .filter(|slot| self.table.is_open(slot.lane))
    }

    /// The places of all open lanes, with whether their owner was told to release them.
    pub(crate) fn places(&self) -> Vec<(TopicPartition, bool)> {
        self.open_slots()
            .map(|slot| (slot.place.clone(), slot.revoking))
            .collect()
    }

    /// Announces that lanes are to be released; nothing of them is handed out any more.
    pub(crate) fn revoke(&mut self, is_theirs: impl Fn(&TopicPartition) -> bool) -> Vec<Lane> {
        let mut lanes = Vec::new();
        for slot in &mut self.slots {
            if self.table.is_open(slot.lane) && !slot.revoking && is_theirs(&slot.place) {
                slot.revoking = true;
                slot.ahead.clear();
                lanes.push(slot.lane);
            }
        }
        if !lanes.is_empty() {
            self.control.push_back(Signal::Revoking(lanes.clone()));
        }
        lanes
    }

    /// Closes lanes that are gone already, and says so. Answers what brought their messages.
    pub(crate) fn lose(&mut self, lanes: &[Lane]) -> Vec<Source> {
        let is_open = |lane: &&Lane| self.table.is_open(**lane);
        let lost: Vec<_> = lanes.iter().filter(is_open).copied().collect();
        let sources = self.close(&lost);
        if !lost.is_empty() {
            self.control.push_back(Signal::Lost(lost));
        }
        sources
    }

    /// All lanes that are open.
    pub(crate) fn all(&self) -> Vec<Lane> {
        self.open_slots().map(|slot| slot.lane).collect()
    }

    /// Closes lanes. Answers what brought their messages, which has to be closed before it is dropped.
    pub(crate) fn close(&mut self, lanes: &[Lane]) -> Vec<Source> {
        let mut sources = Vec::new();
        for lane in lanes {
            if !self.table.is_open(*lane) {
                continue;
            }
            self.table.close(*lane);
            let slot = &mut self.slots[lane.id as usize];
            slot.ahead.clear();
            sources.extend(slot.source.take());
        }
        sources
    }

    /// Marks deliveries done. Answers how many receipts were passed over.
    pub(crate) fn settle(&mut self, receipts: impl Iterator<Item = Receipt>) -> usize {
        let mut stale = 0;
        for receipt in receipts {
            match self.table.settle(receipt) {
                Settled::LowWater(position) => {
                    self.slots[receipt.lane.id as usize].settled = number(position);
                }
                Settled::Stale => stale += 1,
                _ => {}
            }
        }
        stale
    }

    /// What is settled and not known by the server.
    pub(crate) fn unacked(&self) -> Vec<Acknowledgement> {
        let open = self.open_slots();
        let unacked = open.filter_map(|slot| {
            let source = slot.source.as_ref()?;
            let position = slot.settled;
            // What came through an earlier channel is the server's again.
            let tag = position.checked_sub(slot.base).filter(|tag| *tag > 0)?;
            (position > slot.known).then(|| Acknowledgement {
                is_sent: position <= slot.acked,
                lane: slot.lane,
                channel: source.channel.clone(),
                queue: source.queue.clone(),
                tag,
                position,
            })
        });
        unacked.collect()
    }

    /// Notes what is acknowledged now.
    pub(crate) fn acked(&mut self, done: &Acknowledgement) {
        if self.table.is_open(done.lane) {
            let slot = &mut self.slots[done.lane.id as usize];
            slot.acked = slot.acked.max(done.position);
        }
    }

    /// Notes what the server knows.
    pub(crate) fn known(&mut self, done: &Acknowledgement) {
        if self.table.is_open(done.lane) {
            let slot = &mut self.slots[done.lane.id as usize];
            slot.known = slot.known.max(done.position);
        }
    }

    /// The next signal there is: control first, then messages, then what went wrong.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Signal>> {
        for index in 0..self.slots.len() {
            self.pull(index, cx);
        }
        if let Some(signal) = self.control.pop_front() {
            return Poll::Ready(Ok(signal));
        }
        let batch = self.hand_out();
        if !batch.is_empty() {
            return Poll::Ready(Ok(Signal::Delivered(batch)));
        }
        // An end may have been reached without a message.
        if let Some(signal) = self.control.pop_front() {
            return Poll::Ready(Ok(signal));
        }
        match self.failure.take() {
            Some(error) => Poll::Ready(Err(error)),
            None => Poll::Pending,
        }
    }

    /// Takes what the server has sent, which is at most what it may send ahead.
    fn pull(&mut self, index: usize, cx: &mut Context<'_>) {
        loop {
            let slot = &mut self.slots[index];
            let consumer = slot.source.as_mut().and_then(|it| it.consumer.as_mut());
            let Some(consumer) = consumer else { return };
            match consumer.poll_next_unpin(cx) {
                Poll::Pending => return,
                Poll::Ready(Some(Ok(delivery))) => {
                    let position = slot.base + delivery.delivery_tag;
                    slot.last = position;
                    // It is the server's again when the channel closes.
                    if !slot.revoking {
                        slot.take(delivery, position, self.is_log);
                    }
                }
                Poll::Ready(ended) => {
                    if let Some(Err(error)) = ended {
                        tracing::debug!(%error, place = %slot.place, "a channel has ended");
                    }
                    let lane = slot.lane;
                    match self.goes_on {
                        true => drop(slot.source.take()),
                        false => drop(self.lose(&[lane])),
                    }
                    self.attention.notify_one();
                    return;
                }
            }
        }
    }

    /// Collects one batch, lane after lane, each in its turn.
    fn hand_out(&mut self) -> Vec<Delivery> {
        let mut batch = Vec::new();
        for _ in 0..self.slots.len() {
            if batch.len() >= self.limits.batch || self.table.is_full() {
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
        if slot.revoking || !self.table.is_open(slot.lane) {
            return true;
        }
        let mut room = self.limits.batch - batch.len();
        while room > 0 && !slot.ended && self.table.credit(slot.lane) > 0 {
            let Some(ahead) = slot.ahead.pop_front() else {
                return true;
            };
            if !self.table.fits(ahead.size) {
                slot.ahead.push_front(ahead);
                return false;
            }
            let is_behind = matches!((&slot.end, ahead.offset), (Some(End::Offset(end)), Some(offset)) if offset >= *end);
            if is_behind {
                slot.ended = true;
                continue;
            }
            if let Some(offset) = ahead
                .offset
                .filter(|offset| *offset > slot.next && slot.next > 0)
            {
                let from = slot.next;
                let is_behind_others = !batch.is_empty();
                slot.ahead.push_front(ahead);
                if !is_behind_others {
                    slot.next = offset;
                    self.control.push_back(Signal::Gap {
                        lane: slot.lane,
                        from: Position(from.into()),
                        to: Position(offset.into()),
                    });
                }
                // Told before what comes behind it.
                return false;
            }
            let position = Position(ahead.position.into());
            let mark = ahead.mark.as_ref();
            // A chunk of a stream may begin before the place that was asked for.
            let is_before = ahead.offset.is_some_and(|offset| offset < slot.next);
            if let Some(offset) = ahead.offset {
                slot.next = slot.next.max(offset + 1);
            }
            if mark.is_some() || is_before {
                let ended = mark.is_some_and(|mark| slot.end == Some(End::Mark(mark.clone())));
                slot.ended |= ended;
                let receipt = self.table.hand_out(slot.lane, position, 0);
                if let Settled::LowWater(position) = self.table.settle(receipt) {
                    slot.settled = number(position);
                    self.attention.notify_one();
                }
                if ended {
                    self.control.push_back(Signal::Ended(vec![slot.lane]));
                }
                continue;
            }
            room -= 1;
            let receipt = self.table.hand_out(slot.lane, position, ahead.size);
            let mut delivery = Delivery::new(ahead.message, receipt);
            if let Some(offset) = ahead.offset {
                delivery = delivery.with_position(Position(offset.into()));
            }
            if let Some(times) = ahead.handed_out {
                delivery = delivery.with_handed_out(times);
            }
            batch.push(delivery);
        }
        true
    }

    /// Says `Ended` once when a lane has reached its place.
    fn check_end(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        let Some(End::Offset(end)) = slot.end else {
            return;
        };
        if (slot.next >= end || slot.ended) && self.table.is_open(slot.lane) {
            // There is no second time.
            (slot.end, slot.ended) = (None, true);
            self.control.push_back(Signal::Ended(vec![slot.lane]));
        }
    }
}

impl Slot {
    fn take(&mut self, delivery: lapin::message::Delivery, position: u64, is_log: bool) {
        let mut read = properties::read(&self.place.topic, delivery, is_log);
        let adopted = self.source.as_ref().and_then(|it| it.adopted.as_ref());
        if let Some(key) = adopted.and_then(|queue| queue.key_of(&read.message.payload)) {
            read.message.key = Some(key);
        }
        // A queue of another kind than ours may not count.
        let handed_out = match (adopted, read.returned) {
            (Some(_), None) => None,
            (_, returned) => Some(returned.unwrap_or(0).saturating_add(1)),
        };
        self.ahead.push_back(Ahead {
            size: read.message.size(),
            message: read.message,
            position,
            handed_out: match read.offset {
                Some(_) => None,
                None => handed_out,
            },
            offset: read.offset,
            mark: read.mark,
        });
    }
}

fn number(position: Position) -> u64 {
    // It was made of one.
    u64::try_from(position.0).unwrap_or(u64::MAX)
}
