//! Many seeds on several threads, and what they come to together.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::case::Case;
use crate::plant::Plant;
use crate::world::Verdict;

/// What many runs came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Survey {
    /// How many seeds were run.
    pub seeds: u64,
    /// Messages that were published.
    pub messages: u64,
    /// Effects of handlers.
    pub effects: u64,
    /// Faults of the broker that happened.
    pub faults: u64,
    /// What else happened: members and relays that came, went and died, stores that were away.
    pub happenings: u64,
}

impl Survey {
    /// Runs `seeds` seeds from `from` on, on so many threads, or on all processors; each is shown to
    /// `see`, one at a time, which says whether to go on.
    #[must_use]
    pub fn run(
        from: u64,
        seeds: u64,
        threads: Option<usize>,
        see: impl FnMut(&Case, &Verdict) -> bool + Send,
    ) -> Self {
        let state = Mutex::new((Self::default(), see));
        let (next, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= seeds || is_over.load(Ordering::Relaxed) {
                    return;
                }
                let case = Case::of_seed(from + index);
                let verdict = unlogged(|| case.run(None));
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                let (survey, see) = &mut *state;
                survey.add(&case, &verdict);
                if !see(&case, &verdict) {
                    is_over.store(true, Ordering::Relaxed);
                }
            }
        };
        let processors = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        std::thread::scope(|scope| {
            for _ in 0..threads.unwrap_or_else(processors) {
                scope.spawn(work);
            }
        });
        let (survey, _) = state.into_inner().unwrap_or_else(PoisonError::into_inner);
        survey
    }

    fn add(&mut self, case: &Case, verdict: &Verdict) {
        self.seeds += 1;
        self.messages += verdict.messages;
        self.effects += verdict.effects;
        self.faults += verdict.faults;
        self.happenings += case.happenings.len() as u64;
    }
}

impl Plant {
    /// The first of these seeds whose run breaks a promise with this bug.
    #[must_use]
    pub fn found_by(self, seeds: impl IntoIterator<Item = u64>) -> Option<u64> {
        let mut seeds = seeds.into_iter();
        unlogged(|| seeds.find(|seed| !Case::of_seed(*seed).run(Some(self)).is_sound()))
    }
}

/// What the SDK says of a run is its plan, and of many a flood.
fn unlogged<T>(run: impl FnOnce() -> T) -> T {
    tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::default(), run)
}
