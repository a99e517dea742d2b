//! What is counted, under which names: OpenTelemetry's where it has one.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram};

use super::scope::Skip;
use crate::message::Group;

/// Time a handler ran, in seconds.
pub const PROCESS_DURATION: &str = "messaging.process.duration";
/// Messages delivered to a consumer.
pub const CONSUMED_MESSAGES: &str = "messaging.client.consumed.messages";
/// Messages a broker took.
pub const SENT_MESSAGES: &str = "messaging.client.sent.messages";
/// Time of a publish, in seconds.
pub const OPERATION_DURATION: &str = "messaging.client.operation.duration";
/// Messages settled because their handler succeeded.
pub const HANDLED: &str = "eventbus.handled";
/// Attempts that failed.
pub const FAILED_ATTEMPTS: &str = "eventbus.failed_attempts";
/// Dead letters stored.
pub const DEAD_LETTERS: &str = "eventbus.dead_letters";
/// Messages settled unhandled, by `reason`.
pub const SKIPPED: &str = "eventbus.skipped";
/// Messages recognised as handled before.
pub const DUPLICATES: &str = "eventbus.duplicates";
/// Gaps that a broker reported: each is one or more messages that vanished unread.
pub const GAPS: &str = "eventbus.gaps";
/// Keys that are blocked now.
pub const BLOCKED_KEYS: &str = "eventbus.blocked_keys";
/// Messages put aside into the store of held keys.
pub const HELD_MESSAGES: &str = "eventbus.held";
/// Messages that wait in the schedule of a bus.
pub const SCHEDULED_WAITING: &str = "eventbus.scheduled.waiting";
/// How late the schedule's oldest message is that is due, in seconds.
pub const SCHEDULE_LATENESS: &str = "eventbus.scheduled.lateness";

/// What a consumer has counted since it was spawned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Messages delivered.
    pub delivered: u64,
    /// Messages whose handler succeeded.
    pub handled: u64,
    /// Attempts that failed.
    pub failed_attempts: u64,
    /// Dead letters stored.
    pub dead_lettered: u64,
    /// Messages put aside into the store of held keys: parked, for a delayed attempt, or behind
    /// one of their key that was.
    pub held: u64,
    /// Messages recognised as handled before.
    pub duplicates: u64,
    /// Skipped: meant for another group.
    pub skipped_other_group: u64,
    /// Skipped: past their expiry.
    pub skipped_expired: u64,
    /// Skipped: of a type this consumer does not handle, where it says `skip_others`.
    pub skipped_other_type: u64,
    /// Skipped: of another key than a replay asked for.
    pub skipped_other_key: u64,
    /// Gaps reported by the broker.
    pub gaps: u64,
    /// Keys that are blocked now.
    pub blocked_keys: u64,
}

/// What one worker counted since it last passed it on.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) duplicates: u64,
    pub(crate) dead_lettered: u64,
    pub(crate) held: u64,
    pub(crate) failed_attempts: u64,
    /// A change, not a count.
    pub(crate) blocked: i64,
    handled: u64,
    skipped: [u64; 4],
    first_seen: u32,
    first_failed: u32,
    /// In nanoseconds, each with how many runs took it.
    durations: Vec<(u64, u64)>,
}

/// How many durations wait for being passed on: more are not measured in that turn.
const DURATIONS_MAX: usize = 64;

impl Tally {
    #[inline]
    pub(crate) fn handled(&mut self, first_attempt: bool) {
        self.handled += 1;
        if first_attempt {
            self.first_seen += 1;
        }
    }

    pub(crate) fn first_failed(&mut self) {
        self.first_seen += 1;
        self.first_failed += 1;
    }

    pub(crate) fn skipped(&mut self, skip: Skip) {
        self.skipped[skip as usize] += 1;
    }

    #[inline]
    pub(crate) fn ran(&mut self, nanos: u64, count: u64) {
        if self.durations.len() < DURATIONS_MAX {
            self.durations.push((nanos, count));
        }
    }

    /// First attempts seen and failed since the last call.
    pub(crate) fn take_first_attempts(&mut self) -> (u32, u32) {
        (
            std::mem::take(&mut self.first_seen),
            std::mem::take(&mut self.first_failed),
        )
    }
}

/// The counters of one consumer, for its status and for the metrics recorder there is.
pub(crate) struct Telemetry {
    delivered: Counted,
    handled: Counted,
    failed_attempts: Counted,
    dead_lettered: Counted,
    held: Counted,
    duplicates: Counted,
    skipped: [Counted; 4],
    gaps: Counted,
    blocked: AtomicI64,
    blocked_gauge: Gauge,
    duration: Histogram,
}

struct Counted {
    total: AtomicU64,
    counter: Counter,
}

impl Counted {
    fn new(counter: Counter) -> Self {
        Self {
            total: AtomicU64::new(0),
            counter,
        }
    }

    fn add(&self, count: u64) {
        if count > 0 {
            self.total.fetch_add(count, Ordering::Relaxed);
            self.counter.increment(count);
        }
    }

    fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.counts().fmt(f)
    }
}

impl Telemetry {
    pub(crate) fn new(system: &'static str, group: &Group) -> Self {
        let labels = [
            ("messaging.system", system.to_owned()),
            ("messaging.consumer.group.name", group.to_string()),
        ];
        let counter = |name: &'static str| Counted::new(metrics::counter!(name, &labels));
        let skipped = |reason: &'static str| {
            let mut labels = labels.to_vec();
            labels.push(("reason", reason.to_owned()));
            Counted::new(metrics::counter!(SKIPPED, &labels))
        };
        Self {
            delivered: counter(CONSUMED_MESSAGES),
            handled: counter(HANDLED),
            failed_attempts: counter(FAILED_ATTEMPTS),
            dead_lettered: counter(DEAD_LETTERS),
            held: counter(HELD_MESSAGES),
            duplicates: counter(DUPLICATES),
            skipped: [
                skipped("other_group"),
                skipped("expired"),
                skipped("other_type"),
                skipped("other_key"),
            ],
            gaps: counter(GAPS),
            blocked: AtomicI64::new(0),
            blocked_gauge: metrics::gauge!(BLOCKED_KEYS, &labels),
            duration: metrics::histogram!(PROCESS_DURATION, &labels),
        }
    }

    pub(crate) fn delivered(&self, count: usize) {
        self.delivered.add(count as u64);
    }

    pub(crate) fn gap(&self) {
        self.gaps.add(1);
    }

    pub(crate) fn skipped(&self, skip: Skip, count: usize) {
        self.skipped[skip as usize].add(count as u64);
    }

    /// Takes over what a worker counted.
    pub(crate) fn add(&self, tally: &mut Tally) {
        self.handled.add(std::mem::take(&mut tally.handled));
        self.failed_attempts
            .add(std::mem::take(&mut tally.failed_attempts));
        self.dead_lettered
            .add(std::mem::take(&mut tally.dead_lettered));
        self.held.add(std::mem::take(&mut tally.held));
        self.duplicates.add(std::mem::take(&mut tally.duplicates));
        for (total, count) in self.skipped.iter().zip(&mut tally.skipped) {
            total.add(std::mem::take(count));
        }
        let blocked = std::mem::take(&mut tally.blocked);
        if blocked != 0 {
            let now = self.blocked.fetch_add(blocked, Ordering::Relaxed) + blocked;
            self.blocked_gauge.set(now as f64);
        }
        for (nanos, count) in tally.durations.drain(..) {
            let seconds = Duration::from_nanos(nanos).as_secs_f64();
            // Far fewer than a machine word counts.
            self.duration.record_many(seconds, count as usize);
        }
    }

    pub(crate) fn counts(&self) -> Counts {
        let [other_group, expired, other_type, other_key] = &self.skipped;
        Counts {
            delivered: self.delivered.total(),
            handled: self.handled.total(),
            failed_attempts: self.failed_attempts.total(),
            dead_lettered: self.dead_lettered.total(),
            held: self.held.total(),
            duplicates: self.duplicates.total(),
            skipped_other_group: other_group.total(),
            skipped_expired: expired.total(),
            skipped_other_type: other_type.total(),
            skipped_other_key: other_key.total(),
            gaps: self.gaps.total(),
            blocked_keys: u64::try_from(self.blocked.load(Ordering::Relaxed)).unwrap_or(0),
        }
    }
}
