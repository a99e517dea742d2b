//! Pause, never burn: when most handlers fail, or what they need is away, nothing is started but
//! single probes, and no attempt is counted.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::worker::Inbox;

/// When a consumer stops handling because it would only fail.
///
/// While it holds it tries one message at a time, another one each time, and goes on when one
/// succeeds. With nothing but failing messages left it holds on, and its status says why: nothing
/// is dead-lettered because a whole deployment was wrong. [`with_failure_rate`](Self::with_failure_rate)
/// above 1 switches it off for failures. The broker and stores being away hold a consumer always, and so
/// does a handler's error that a rule says [`OnError::Hold`](crate::OnError::Hold) of.
///
/// # Examples
///
/// ```
/// use eventbus_core::Breaker;
///
/// // Hold when 95 of 100 first attempts fail.
/// let breaker = Breaker::default().with_failure_rate(0.95);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Breaker {
    /// Share of failed first attempts, from 0 to 1, at which the consumer holds.
    pub failure_rate: f64,
    /// How many first attempts have to be seen before the share counts.
    pub samples_min: u32,
    /// How long to wait before the first probe; doubled after each that fails.
    pub probe_after: Duration,
    /// The longest wait before a probe; where something that attempts need is away, two seconds, or
    /// `probe_after` if that is longer.
    pub probe_after_max: Duration,
}

impl Default for Breaker {
    /// 90 % of at least 50; probes after 1 to 30 seconds.
    fn default() -> Self {
        Self {
            failure_rate: 0.9,
            samples_min: 50,
            probe_after: Duration::from_secs(1),
            probe_after_max: Duration::from_secs(30),
        }
    }
}

impl Breaker {
    /// Sets the share of failed first attempts at which the consumer holds; above 1 never.
    #[must_use]
    pub fn with_failure_rate(mut self, rate: f64) -> Self {
        self.failure_rate = rate;
        self
    }

    /// Sets how many first attempts have to be seen.
    #[must_use]
    pub fn with_samples_min(mut self, samples: u32) -> Self {
        self.samples_min = samples.max(1);
        self
    }

    /// Sets how long to wait before probes.
    #[must_use]
    pub fn with_probe_after(mut self, first: Duration, longest: Duration) -> Self {
        self.probe_after = first;
        self.probe_after_max = longest.max(first);
        self
    }
}

/// Whether a run may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    Yes,
    /// One run, whose outcome decides; [`Gate::probed`] has to follow.
    Probe,
    /// Not now; look again at this time, or when woken.
    Wait(Option<Instant>),
}

/// What a probe showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probed {
    /// A handler succeeded.
    Handled,
    /// What a run needs was there, and the handler failed: it got as far as it can by itself.
    HandlerFailed,
    /// What a run needs was there; no handler ran.
    Reached,
    /// What a run needs is away.
    Away,
    /// Nothing: the message needed neither, or left with its lane.
    Nothing,
}

#[derive(Debug)]
pub(crate) struct Gate {
    breaker: Breaker,
    /// Copy of "neither paused nor held", read without the lock.
    open: AtomicBool,
    state: Mutex<State>,
    /// First attempts seen and failed of late: two 32-bit counts.
    window: AtomicU64,
    workers: Mutex<Vec<Arc<Inbox>>>,
}

#[derive(Debug, Default)]
struct State {
    paused: bool,
    held: Option<Held>,
    /// For each worker, the number of its latest probe; zero before the first.
    probes: Vec<u64>,
}

#[derive(Clone, Debug)]
struct Held {
    reason: String,
    /// Too many attempts failed, as opposed to: something that attempts need is away.
    is_for_failures: bool,
    probe_at: Instant,
    interval: Duration,
    probing: bool,
}

const WINDOW_MAX: u64 = 200;

/// The longest wait before what is away is asked for again, as everywhere else in the SDK.
const AWAY_MAX: Duration = Duration::from_secs(2);

/// How much later than another a worker may probe that has probed more recently: otherwise one
/// whose messages all fail would take every probe, and nobody would learn that others' do not.
const PROBE_LATER: Duration = Duration::from_millis(10);

impl Gate {
    pub(crate) fn new(breaker: Breaker) -> Self {
        Self {
            breaker,
            open: AtomicBool::new(true),
            state: Mutex::new(State::default()),
            window: AtomicU64::new(0),
            workers: Mutex::new(Vec::new()),
        }
    }

    /// Takes in a worker and returns its number.
    pub(crate) fn add_worker(&self, inbox: Arc<Inbox>) -> usize {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers.push(inbox);
        self.lock().probes.push(0);
        workers.len() - 1
    }

    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Whether `worker` may start a run now.
    #[inline]
    pub(crate) fn admit(&self, worker: usize) -> Admission {
        if self.is_open() {
            return Admission::Yes;
        }
        self.admit_held(worker)
    }

    /// Apart from `admit`, which is asked for every run and mostly answers at once.
    #[cold]
    fn admit_held(&self, worker: usize) -> Admission {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.paused {
            return Admission::Wait(None);
        }
        let Some(held) = &mut state.held else {
            return Admission::Yes;
        };
        if held.probing {
            return Admission::Wait(None);
        }
        let mine = state.probes[worker];
        let first = state.probes.iter().filter(|other| **other < mine).count();
        // There are far fewer than 2^32 workers.
        let probe_at = held.probe_at + PROBE_LATER * first as u32;
        if probe_at > Instant::now() {
            return Admission::Wait(Some(probe_at));
        }
        held.probing = true;
        state.probes[worker] = state.probes.iter().max().map_or(1, |latest| latest + 1);
        Admission::Probe
    }

    /// Holds because something that attempts need is away, as `reason` says.
    pub(crate) fn hold(&self, reason: impl FnOnce() -> String) {
        self.hold_with(reason, false);
    }

    /// Whether it holds by itself, as opposed to being paused.
    pub(crate) fn is_held(&self) -> bool {
        !self.is_open() && self.lock().held.is_some()
    }

    /// Whether it holds because too many attempts failed.
    #[inline]
    pub(crate) fn holds_for_failures(&self) -> bool {
        if self.is_open() {
            return false;
        }
        let state = self.lock();
        state.held.as_ref().is_some_and(|held| held.is_for_failures)
    }

    fn hold_with(&self, reason: impl FnOnce() -> String, is_for_failures: bool) {
        let mut state = self.lock();
        if state.held.is_some() {
            return;
        }
        let reason = reason();
        tracing::warn!(reason, "consumer holds");
        let interval = self.breaker.probe_after;
        state.held = Some(Held {
            reason,
            is_for_failures,
            probe_at: Instant::now() + interval,
            interval,
            probing: false,
        });
        self.window.store(0, Ordering::Relaxed);
        self.open.store(false, Ordering::Release);
    }

    /// The probe ended: opens the gate, holds on for twice as long, or lets another one probe.
    pub(crate) fn probed(&self, probed: Probed) {
        let mut state = self.lock();
        if let Some(held) = &mut state.held {
            match (probed, held.is_for_failures) {
                (Probed::Handled, _) | (Probed::HandlerFailed | Probed::Reached, false) => {
                    tracing::info!(reason = held.reason, "consumer goes on");
                    let window = self.window_after(held.is_for_failures);
                    self.window.store(window, Ordering::Relaxed);
                    state.held = None;
                    self.open.store(!state.paused, Ordering::Release);
                }
                (Probed::Away, _) | (Probed::HandlerFailed, true) => {
                    held.probing = false;
                    held.interval = (held.interval * 2).min(self.longest(held.is_for_failures));
                    held.probe_at = Instant::now() + held.interval;
                }
                (Probed::Reached, true) | (Probed::Nothing, _) => held.probing = false,
            }
        }
        drop(state);
        self.wake();
    }

    /// The longest wait between two probes. To ask for something that is away costs little, and how soon
    /// a consumer goes on afterwards depends on it.
    fn longest(&self, is_for_failures: bool) -> Duration {
        let Breaker {
            probe_after,
            probe_after_max,
            ..
        } = self.breaker;
        match is_for_failures {
            true => probe_after_max,
            false => probe_after_max.min(AWAY_MAX.max(probe_after)),
        }
    }

    /// What counts as seen when the gate opens. One good probe may have been luck: after a hold for
    /// failures, a few more are enough for the next one.
    fn window_after(&self, failures: bool) -> u64 {
        if !failures {
            return 0;
        }
        let all = u64::from(self.breaker.samples_min) * 9 / 10;
        let bad = (all as f64 * self.breaker.failure_rate).ceil() as u64;
        all << 32 | bad.min(all)
    }

    /// Counts first attempts; holds when too many failed, and says why the last one did.
    pub(crate) fn count(&self, seen: u32, failed: u32, last: Option<&dyn fmt::Display>) {
        let counted = self
            .window
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |window| {
                let mut all = (window >> 32) + u64::from(seen);
                let mut bad = (window & 0xffff_ffff) + u64::from(failed);
                // Old attempts fade by halves.
                while all > WINDOW_MAX {
                    all /= 2;
                    bad /= 2;
                }
                Some(all << 32 | bad)
            });
        if failed == 0 || counted.is_err() {
            return;
        }
        let window = self.window.load(Ordering::Relaxed);
        let (all, bad) = ((window >> 32) as f64, (window & 0xffff_ffff) as f64);
        if all >= f64::from(self.breaker.samples_min) && bad >= all * self.breaker.failure_rate {
            let reason = || match last {
                Some(last) => format!("{bad} of the last {all} first attempts failed, now: {last}"),
                None => format!("{bad} of the last {all} first attempts failed"),
            };
            self.hold_with(reason, true);
        }
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        let mut state = self.lock();
        state.paused = paused;
        self.open
            .store(!paused && state.held.is_none(), Ordering::Release);
        drop(state);
        self.wake();
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.lock().paused
    }

    /// Why the consumer holds, if it does.
    pub(crate) fn held_because(&self) -> Option<String> {
        self.lock().held.as_ref().map(|held| held.reason.clone())
    }

    /// Lets all workers look again.
    pub(crate) fn wake(&self) {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        for worker in workers.iter() {
            worker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A gate of so many workers.
    fn gate(workers: usize) -> Gate {
        let gate = Gate::new(Breaker::default());
        gate.lock().probes.resize(workers, 0);
        gate
    }

    #[tokio::test(start_paused = true)]
    async fn workers_probe_in_turn() {
        let gate = gate(2);
        gate.hold(|| "away".to_owned());
        assert!(!gate.holds_for_failures());
        let mut probes = [0; 2];
        for _ in 0..4 {
            let dues = (0..2).filter_map(|worker| match gate.admit(worker) {
                Admission::Wait(due) => due,
                _ => None,
            });
            let due = dues.min().expect("both wait");
            tokio::time::advance(due - Instant::now()).await;
            // The first one always asks first.
            let prober = (0..2).find(|worker| gate.admit(*worker) == Admission::Probe);
            probes[prober.expect("it is time")] += 1;
            gate.probed(Probed::Away);
        }
        assert_eq!(probes, [2, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn it_holds_at_the_failure_rate_and_opens_after_a_good_probe() {
        let gate = gate(1);
        gate.count(40, 40, None);
        assert_eq!(gate.admit(0), Admission::Yes, "too few were seen");
        gate.count(10, 8, Some(&"no such table"));
        assert!(matches!(gate.admit(0), Admission::Wait(Some(_))));
        let reason = gate.held_because().expect("it holds");
        assert!(reason.ends_with("no such table"), "{reason}");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(gate.admit(0), Admission::Probe);
        assert_eq!(gate.admit(0), Admission::Wait(None), "one probe at a time");
        gate.probed(Probed::Away);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(
            matches!(gate.admit(0), Admission::Wait(Some(_))),
            "twice as long after a bad probe"
        );
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(gate.admit(0), Admission::Probe);
        gate.probed(Probed::Handled);
        assert_eq!(gate.admit(0), Admission::Yes);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_away_is_asked_for_every_two_seconds() {
        let gate = gate(1);
        gate.hold(|| "away".to_owned());
        let mut waits = Vec::new();
        for _ in 0..4 {
            let Admission::Wait(Some(due)) = gate.admit(0) else {
                panic!("it probes too early");
            };
            let wait = due - Instant::now();
            waits.push(wait.as_secs());
            tokio::time::advance(wait).await;
            assert_eq!(gate.admit(0), Admission::Probe);
            gate.probed(Probed::Away);
        }
        assert_eq!(waits, [1, 2, 2, 2]);
    }

    #[test]
    fn a_pause_outlasts_everything_until_it_is_ended() {
        let gate = gate(1);
        gate.set_paused(true);
        assert_eq!(gate.admit(0), Admission::Wait(None));
        gate.probed(Probed::Handled);
        assert_eq!(gate.admit(0), Admission::Wait(None));
        gate.set_paused(false);
        assert_eq!(gate.admit(0), Admission::Yes);
    }
}
