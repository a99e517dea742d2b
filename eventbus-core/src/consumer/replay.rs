//! A bounded read through a consumer's own handlers: for read models, recovery and debugging.

use crate::consumer::Consumer;
use crate::delivery::{Limits, Start, Subscription, Until};
use crate::error::Result;
use crate::message::{Key, Topic};

/// What to replay, how fast, and what it may do.
///
/// # Examples
///
/// ```
/// use eventbus_core::{Replay, Start};
///
/// let replay = Replay::from(Start::Earliest).key("order-42").rate(1_000);
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Replay {
    start: Start,
    until: Until,
    pub(crate) key: Option<Key>,
    pub(crate) rate: Option<u32>,
    pub(crate) publishes: bool,
}

impl Replay {
    /// From `start` to the last message there is when it begins.
    pub fn from(start: Start) -> Self {
        Self {
            start,
            until: Until::Now,
            key: None,
            rate: None,
            publishes: false,
        }
    }

    /// Sets where it ends. A position counts on every partition of its own; a position or a time
    /// that is not reached yet is waited for.
    pub fn until(mut self, until: Until) -> Self {
        self.until = until;
        self
    }

    /// Replays the messages of one key only; the others are read, too, and passed over.
    pub fn key(mut self, key: impl Into<Key>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Replays at most about so many messages a second.
    pub fn rate(mut self, per_second: u32) -> Self {
        self.rate = Some(per_second.max(1));
        self
    }

    /// Lets handlers publish. The ids are derived as in the live run, so that downstream duplicates
    /// can be recognised.
    pub fn allow_publish(mut self) -> Self {
        self.publishes = true;
        self
    }

    pub(crate) fn subscription(&self, topics: Vec<Topic>, limits: Limits) -> Subscription {
        // The reader pauses after every batch: small ones keep to the rate within a second, too.
        let limits = match self.rate {
            Some(rate) => limits.with_batch(limits.batch.min(rate.div_ceil(10) as usize)),
            None => limits,
        };
        Subscription::reader(topics)
            .with_start(self.start)
            .with_until(self.until)
            .with_limits(limits)
    }
}

/// What a replay did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplayReport {
    /// Events handled.
    pub handled: u64,
    /// Messages passed over: of another key or type, directed to one group by a re-drive, expired.
    pub skipped: u64,
    /// Gaps reported by the broker: what was there once and is gone.
    pub gaps: u64,
}

/// Waits for the end of a replay.
pub(crate) async fn run(consumer: Consumer) -> Result<ReplayReport> {
    let counts = consumer.finish().await?;
    Ok(ReplayReport {
        handled: counts.handled,
        skipped: counts.skipped_other_group
            + counts.skipped_expired
            + counts.skipped_other_type
            + counts.skipped_other_key,
        gaps: counts.gaps,
    })
}
