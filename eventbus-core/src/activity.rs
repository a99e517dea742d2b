//! Counts who has work, so that a test can wait until nothing can go on without time passing.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// Who has work on one bus. Costs a flag per batch, nothing per message.
#[derive(Debug)]
pub struct Activity {
    /// Parts that have work now.
    busy: AtomicUsize,
    changed: Notify,
    /// What the due times of `parts` count from.
    base: Instant,
    parts: Mutex<Vec<Weak<Part>>>,
}

/// One part that may have work: a worker, a settler.
#[derive(Debug)]
pub(crate) struct Part {
    activity: Arc<Activity>,
    busy: AtomicBool,
    /// Nanoseconds after `Activity::base` at which time alone gives it work again.
    due: AtomicU64,
}

const NEVER: u64 = u64::MAX;

impl Activity {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            busy: AtomicUsize::new(0),
            changed: Notify::new(),
            base: Instant::now(),
            parts: Mutex::new(Vec::new()),
        })
    }

    pub(crate) fn part(self: &Arc<Self>) -> Arc<Part> {
        let part = Arc::new(Part {
            activity: Arc::clone(self),
            busy: AtomicBool::new(false),
            due: AtomicU64::new(NEVER),
        });
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.retain(|part| part.strong_count() > 0);
        parts.push(Arc::downgrade(&part));
        part
    }

    /// Whether no part has work and none is due.
    pub fn is_quiet(&self) -> bool {
        self.busy.load(Ordering::SeqCst) == 0
            && self.next_due().is_none_or(|due| due > Instant::now())
    }

    /// When time alone gives work again: the earliest retry or probe.
    pub fn next_due(&self) -> Option<Instant> {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let due = parts
            .iter()
            .filter_map(Weak::upgrade)
            .map(|part| part.due.load(Ordering::SeqCst))
            .min()?;
        (due != NEVER).then(|| self.base + Duration::from_nanos(due))
    }

    /// Resolves at the next change after this call; call it before looking at
    /// [`is_quiet`](Self::is_quiet).
    pub fn changed(&self) -> impl Future<Output = ()> + '_ {
        self.changed.notified()
    }

    /// Tells waiters to look again.
    pub(crate) fn touch(&self) {
        self.changed.notify_waiters();
    }
}

impl Part {
    /// Says that this part has work; whoever gives it work calls this.
    pub(crate) fn raise(&self) {
        if !self.busy.swap(true, Ordering::SeqCst) {
            self.activity.busy.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Says that this part has none; its owner calls this, which is woken by whatever comes
    /// meanwhile. With several threads there is a moment in which that is not seen: tests that wait
    /// for quiet run on one.
    pub(crate) fn lower(&self) {
        if self.busy.swap(false, Ordering::SeqCst) {
            self.activity.busy.fetch_sub(1, Ordering::SeqCst);
            self.activity.touch();
        }
    }

    /// Says when time alone gives it work.
    pub(crate) fn set_due(&self, due: Option<Instant>) {
        let nanos = due.map_or(NEVER, |due| {
            let since = due.saturating_duration_since(self.activity.base);
            u64::try_from(since.as_nanos()).unwrap_or(NEVER - 1)
        });
        if self.due.swap(nanos, Ordering::SeqCst) != nanos {
            self.activity.touch();
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.lower();
        self.activity.touch();
    }
}
