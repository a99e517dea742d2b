//! What to do with a handler's error, decided by its value.

use std::error::Error as StdError;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crate::clock::FOREVER;
use crate::error::find_cause;

/// Decides after each failed attempt whether and when there is another one.
///
/// Attempts are made in place: a message waits in the consumer and holds its key until it is handled,
/// parked or dead-lettered. [`delayed`](Self::delayed) ones wait in the store of held keys, which takes the
/// later messages of the key along, so that order is kept through minutes and restarts. Times are
/// lower bounds: up to a tenth is added at random, never taken away. There is
/// always a first attempt: zero attempts are taken for one.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use eventbus_core::{OnError, RetryPolicy};
///
/// #[derive(Debug)]
/// enum PspError { Declined, Busy, Away }
/// # impl std::fmt::Display for PspError {
/// #     fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { write!(f, "{self:?}") }
/// # }
/// # impl std::error::Error for PspError {}
///
/// let policy = RetryPolicy::exponential(5, Duration::from_millis(100), Duration::from_secs(10))
///     .when(|error: &PspError| match error {
///         PspError::Declined => OnError::GiveUp,
///         PspError::Busy => OnError::After(Duration::from_secs(30)),
///         PspError::Away => OnError::Hold,
///     });
/// ```
#[derive(Clone)]
pub struct RetryPolicy {
    attempts_max: u32,
    first: Duration,
    longest: Duration,
    delays: Vec<Duration>,
    out_of_order: bool,
    rules: Vec<Rule>,
}

type Rule = Arc<dyn Fn(&(dyn StdError + 'static)) -> Option<OnError> + Send + Sync>;

/// What a rule says about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnError {
    /// Try again as the policy's schedule says, as long as attempts are left.
    Next,
    /// Try again after this time, as long as attempts are left.
    After(Duration),
    /// Try again after this time, as long as attempts are left, and hold the key in its store
    /// meanwhile, as [`RetryPolicy::delayed`] does.
    Delayed(Duration),
    /// Trying again does not help: dead-letter it now, also where what can't be handled parks its
    /// key; later messages of the key go on, unless the consumer says `BlockKey`.
    DeadLetter,
    /// Trying again does not help: what the consumer says of what it cannot handle
    /// ([`OnPoison`](crate::OnPoison)) becomes of it now, as after the last attempt. So it parks the key
    /// where there is a store of held keys.
    GiveUp,
    /// What the handler needs is away, whichever event it is given: the consumer holds, tries one at a
    /// time whether it is back, and counts no attempt.
    Hold,
}

impl OnError {
    /// Whether the error is about the event, and says nothing against what the consumer needs.
    pub(crate) fn rejects(self) -> bool {
        matches!(self, Self::DeadLetter | Self::GiveUp)
    }
}

/// When the next attempt is made, and where the message waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NextAttempt {
    /// In the consumer, holding its key.
    InPlace(Duration),
    /// In the store of held keys, with its key.
    Delayed(Duration),
}

impl RetryPolicy {
    /// One attempt: what [`OnPoison`](crate::OnPoison) says becomes of any error.
    #[must_use]
    pub fn none() -> Self {
        Self::immediate(1)
    }

    /// Up to `attempts` in all, one right after the other.
    #[must_use]
    pub fn immediate(attempts: u32) -> Self {
        Self::exponential(attempts, Duration::ZERO, Duration::ZERO)
    }

    /// Up to `attempts` in all, `delay` apart.
    #[must_use]
    pub fn fixed(attempts: u32, delay: Duration) -> Self {
        Self::exponential(attempts, delay, delay)
    }

    /// Up to `attempts` in all: the second after `first`, each later one after twice the time of
    /// the one before, never more than `longest`.
    #[must_use]
    pub fn exponential(attempts: u32, first: Duration, longest: Duration) -> Self {
        Self {
            attempts_max: attempts.max(1),
            first,
            longest: longest.max(first),
            delays: Vec::new(),
            out_of_order: false,
            rules: Vec::new(),
        }
    }

    /// Adds an attempt after each of these times, when those in place are used up: for what takes
    /// minutes or hours to come back. Meanwhile the key is held in the store of held keys, and
    /// later messages of it wait behind, in order, also through a restart.
    ///
    /// Needs a store: see [`EventBusBuilder::key_state`](crate::EventBusBuilder::key_state).
    /// Without one a consumer is refused, unless the policy is [`out_of_order`](Self::out_of_order).
    #[must_use]
    pub fn delayed(mut self, delays: impl IntoIterator<Item = Duration>) -> Self {
        self.delays.extend(delays);
        self
    }

    /// Lets later messages of a key go on while one of it waits for a delayed attempt: order is
    /// given up for it. Needs no store: the message waits in the consumer, unsettled, and counts
    /// towards its limits.
    #[must_use]
    pub fn out_of_order(mut self) -> Self {
        self.out_of_order = true;
        self
    }

    /// Adds a rule for errors of one type, found anywhere in the chain of causes. The first rule
    /// that fits decides; what none fits is tried again as the schedule says.
    #[must_use]
    pub fn when<E: StdError + 'static>(
        mut self,
        rule: impl Fn(&E) -> OnError + Send + Sync + 'static,
    ) -> Self {
        self.rules
            .push(Arc::new(move |error| find_cause(error).map(&rule)));
        self
    }

    /// Most attempts, delayed ones included.
    pub fn attempts_max(&self) -> u32 {
        // A policy has far fewer than 2^32 delays.
        self.attempts_max.saturating_add(self.delays.len() as u32)
    }

    /// Whether a delayed attempt lets later messages of its key go on.
    pub(crate) fn is_out_of_order(&self) -> bool {
        self.out_of_order
    }

    /// Whether the schedule itself has delayed attempts; rules may ask for some all the same.
    pub(crate) fn has_delays(&self) -> bool {
        !self.delays.is_empty()
    }

    /// The longest time between two attempts of the schedule.
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// What the rules say of `error`, apart from how many attempts are left.
    pub(crate) fn classify(&self, error: &(dyn StdError + 'static)) -> OnError {
        let decide = || self.rules.iter().find_map(|rule| rule(error));
        match catch_unwind(AssertUnwindSafe(decide)) {
            Ok(decision) => decision.unwrap_or(OnError::Next),
            Err(_) => {
                tracing::error!("a rule of the retry policy panicked: the schedule decides");
                OnError::Next
            }
        }
    }

    /// When to try again after attempt number `attempt` (from 1), or `None` when it was the last.
    pub(crate) fn next(&self, attempt: u32, decision: OnError, jitter: u64) -> Option<NextAttempt> {
        if attempt >= self.attempts_max() {
            return None;
        }
        let next = match decision {
            OnError::DeadLetter | OnError::GiveUp | OnError::Hold => return None,
            OnError::After(delay) => NextAttempt::InPlace(with_jitter(delay, jitter)),
            OnError::Delayed(delay) => NextAttempt::Delayed(with_jitter(delay, jitter)),
            OnError::Next => match attempt.checked_sub(self.attempts_max) {
                None => NextAttempt::InPlace(with_jitter(self.scheduled(attempt), jitter)),
                Some(number) => {
                    let delay = *self.delays.get(number as usize)?;
                    NextAttempt::Delayed(with_jitter(delay, jitter))
                }
            },
        };
        Some(next)
    }

    fn scheduled(&self, attempt: u32) -> Duration {
        let doublings = attempt.saturating_sub(1).min(32);
        self.first
            .saturating_mul(1u32.checked_shl(doublings).unwrap_or(u32::MAX))
            .min(self.longest)
    }
}

/// Adds up to a tenth of `delay`, by a random number.
pub(crate) fn with_jitter(delay: Duration, random: u64) -> Duration {
    let delay = delay.min(FOREVER);
    let tenth = u64::try_from(delay.as_nanos() / 10).unwrap_or(u64::MAX);
    match tenth {
        0 => delay,
        tenth => delay + Duration::from_nanos(random % tenth),
    }
}

impl Default for RetryPolicy {
    /// Five attempts within about a second and a half: 100, 200, 400 and 800 milliseconds apart.
    fn default() -> Self {
        Self::exponential(5, Duration::from_millis(100), Duration::from_secs(10))
    }
}

impl fmt::Debug for RetryPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryPolicy")
            .field("attempts_max", &self.attempts_max)
            .field("first", &self.first)
            .field("longest", &self.longest)
            .field("delays", &self.delays)
            .field("out_of_order", &self.out_of_order)
            .field("rules", &self.rules.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};

    #[test]
    fn the_schedule_doubles_up_to_the_longest() {
        let policy = RetryPolicy::exponential(6, Duration::from_secs(1), Duration::from_secs(5));
        let delays: Vec<_> = (1..=6)
            .map(|attempt| policy.next(attempt, OnError::Next, 0))
            .collect();
        let seconds = |seconds| Some(NextAttempt::InPlace(Duration::from_secs(seconds)));
        assert_eq!(
            delays,
            [
                seconds(1),
                seconds(2),
                seconds(4),
                seconds(5),
                seconds(5),
                None
            ]
        );
    }

    #[test]
    fn zero_attempts_are_one() {
        for policy in [RetryPolicy::immediate(0), RetryPolicy::fixed(0, FOREVER)] {
            assert_eq!(policy.attempts_max(), 1);
            assert_eq!(policy.next(1, OnError::Next, 0), None);
        }
    }

    #[test]
    fn jitter_only_extends() {
        let policy = RetryPolicy::fixed(2, Duration::from_secs(10));
        for random in [0, 1, 999_999_999, u64::MAX] {
            let next = policy.next(1, OnError::Next, random);
            let Some(NextAttempt::InPlace(delay)) = next else {
                panic!("one is left");
            };
            assert!(delay >= Duration::from_secs(10) && delay < Duration::from_secs(11));
        }
    }

    #[test]
    fn delayed_attempts_come_after_those_in_place() {
        let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
        let policy = RetryPolicy::immediate(2).delayed([minutes(1), minutes(30)]);
        let next = |attempt| policy.next(attempt, OnError::Next, 0);
        assert_eq!(policy.attempts_max(), 4);
        assert_eq!(next(1), Some(NextAttempt::InPlace(Duration::ZERO)));
        assert_eq!(next(2), Some(NextAttempt::Delayed(minutes(1))));
        assert_eq!(next(3), Some(NextAttempt::Delayed(minutes(30))));
        assert_eq!(next(4), None);
        let asked = policy.next(1, OnError::Delayed(minutes(5)), 0);
        assert_eq!(asked, Some(NextAttempt::Delayed(minutes(5))));
    }

    #[test]
    fn a_rule_finds_its_error_below_others() {
        let policy = RetryPolicy::immediate(3).when(|error: &Error| match error.kind() {
            ErrorKind::Conflict => OnError::DeadLetter,
            _ => OnError::After(Duration::from_secs(1)),
        });
        let wrapped = std::io::Error::other(Error::new(ErrorKind::Conflict, "charge", "declined"));
        assert_eq!(policy.classify(&wrapped), OnError::DeadLetter);
        let other = std::fmt::Error;
        assert_eq!(policy.classify(&other), OnError::Next);
    }
}
