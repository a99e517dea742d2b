//! What a consumer knows about its lanes: where they come from, how much is in flight, how old.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::delivery::{Assignment, Delivery, Lane, Receipt};
use crate::message::Topic;

/// One lane of a consumer, as [`Consumer::status`](crate::Consumer::status) shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaneStatus {
    /// Its topic.
    pub topic: Topic,
    /// Its partition.
    pub partition: u32,
    /// Messages delivered and not settled.
    pub in_flight: usize,
    /// How long ago the oldest of them was delivered.
    pub oldest_age: Option<Duration>,
}

#[derive(Debug, Default)]
pub(crate) struct Lanes(Mutex<Vec<Option<LaneEntry>>>);

#[derive(Debug)]
struct LaneEntry {
    lane: Lane,
    topic: Topic,
    partition: u32,
    in_flight: usize,
    /// Behind the last tag that was delivered.
    delivered: u64,
    /// Deliveries by when they came, oldest first.
    arrivals: VecDeque<Arrival>,
}

#[derive(Debug)]
struct Arrival {
    /// The tag behind the last of them.
    end: u64,
    unsettled: usize,
    at: Instant,
}

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, Vec<Option<LaneEntry>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn open(&self, assignments: Vec<Assignment>) {
        let mut lanes = self.lock();
        for assignment in assignments {
            let index = assignment.lane.id as usize;
            if lanes.len() <= index {
                lanes.resize_with(index + 1, || None);
            }
            lanes[index] = Some(LaneEntry {
                lane: assignment.lane,
                topic: assignment.topic,
                partition: assignment.partition,
                in_flight: 0,
                delivered: 0,
                arrivals: VecDeque::new(),
            });
        }
    }

    pub(crate) fn close(&self, closed: &[Lane]) {
        let mut lanes = self.lock();
        for lane in closed {
            if let Some(place) = lanes.get_mut(lane.id as usize)
                && place.as_ref().is_some_and(|entry| entry.lane == *lane)
            {
                *place = None;
            }
        }
    }

    /// Notes deliveries.
    pub(crate) fn delivered(&self, deliveries: &[Delivery]) {
        let now = Instant::now();
        let mut lanes = self.lock();
        // A batch is a few stretches of one lane each: what is noted is noted per stretch.
        for stretch in deliveries.chunk_by(|one, next| one.receipt.lane == next.receipt.lane) {
            let last = stretch[stretch.len() - 1].receipt;
            if let Some(entry) = find(&mut lanes, last.lane) {
                entry.in_flight += stretch.len();
                entry.delivered = last.tag + 1;
                entry.arrivals.push_back(Arrival {
                    end: entry.delivered,
                    unsettled: stretch.len(),
                    at: now,
                });
            }
        }
    }

    /// All lanes that are open.
    pub(crate) fn open_lanes(&self) -> Vec<Lane> {
        self.lock()
            .iter()
            .flatten()
            .map(|entry| entry.lane)
            .collect()
    }

    /// Of these lanes those that are open, each with the tag behind the last that was delivered.
    pub(crate) fn delivered_ends(&self, lanes: &[Lane]) -> Vec<(Lane, u64)> {
        let mut entries = self.lock();
        let delivered = |lane: &Lane| Some((*lane, find(&mut entries, *lane)?.delivered));
        lanes.iter().filter_map(delivered).collect()
    }

    /// The partition of a lane, `None` when it is closed.
    pub(crate) fn partition(&self, lane: Lane) -> Option<u32> {
        find(&mut self.lock(), lane).map(|entry| entry.partition)
    }

    pub(crate) fn settled(&self, settled: &[Receipt]) {
        let mut lanes = self.lock();
        let mut rest = settled;
        while let [receipt, ..] = rest {
            let count = match find(&mut lanes, receipt.lane) {
                Some(entry) => entry.settle(receipt.tag, rest),
                None => 1,
            };
            rest = &rest[count..];
        }
    }

    pub(crate) fn status(&self) -> Vec<LaneStatus> {
        let now = Instant::now();
        let mut status: Vec<_> = self
            .lock()
            .iter()
            .flatten()
            .map(|entry| LaneStatus {
                topic: entry.topic.clone(),
                partition: entry.partition,
                in_flight: entry.in_flight,
                oldest_age: entry
                    .arrivals
                    .front()
                    .map(|arrival| now.saturating_duration_since(arrival.at)),
            })
            .collect();
        status.sort_by(|a, b| (&a.topic, a.partition).cmp(&(&b.topic, b.partition)));
        status
    }
}

fn find(lanes: &mut [Option<LaneEntry>], lane: Lane) -> Option<&mut LaneEntry> {
    lanes
        .get_mut(lane.id as usize)?
        .as_mut()
        .filter(|entry| entry.lane == lane)
}

impl LaneEntry {
    /// Notes at once the first of `settled`, which has this tag, and those behind it that came with
    /// it. Returns how many they are, at least one.
    fn settle(&mut self, tag: u64, settled: &[Receipt]) -> usize {
        // Mostly the oldest: then nothing has to be searched.
        let index = match self.arrivals.front() {
            Some(oldest) if tag < oldest.end => 0,
            _ => self.arrivals.partition_point(|arrival| arrival.end <= tag),
        };
        let begin = match index {
            0 => 0,
            _ => self.arrivals[index - 1].end,
        };
        let Some(arrival) = self.arrivals.get_mut(index) else {
            return 1;
        };
        let (lane, tags) = (self.lane, begin..arrival.end);
        let count = settled
            .iter()
            .take_while(|receipt| receipt.lane == lane && tags.contains(&receipt.tag))
            .count();
        // A lane is settled once for each delivery; more than came is a mistake to live with.
        let noted = count.min(arrival.unsettled);
        arrival.unsettled -= noted;
        self.in_flight -= noted;
        let is_empty = |arrival: &Arrival| arrival.unsettled == 0;
        while self.arrivals.front().is_some_and(is_empty) {
            self.arrivals.pop_front();
        }
        count.max(1)
    }
}
