//! A time limit that passes in real time: SQLite's threads know no other, also where a test lets
//! its runtime's time stand still or jump.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, Thread, park, park_timeout};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

/// One limit at a time, watched by a thread that ends with it.
#[derive(Debug)]
pub(super) struct Timer {
    slot: Arc<Slot>,
    thread: Thread,
}

#[derive(Debug, Default)]
struct Slot(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    limit: Option<(Instant, oneshot::Sender<()>)>,
    /// The thread waits to be woken.
    is_idle: bool,
    is_over: bool,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Timer {
    pub(super) fn start() -> io::Result<Self> {
        let slot = Arc::new(Slot::default());
        let watched = Arc::clone(&slot);
        let thread = Builder::new().name("eventbus-sqlite-limit".to_owned());
        let thread = thread.spawn(move || watch(&watched))?.thread().clone();
        Ok(Self { slot, thread })
    }

    /// Resolves when so much time has passed, unless it is asked for another time or dropped.
    pub(super) fn after(&self, limit: Duration) -> oneshot::Receiver<()> {
        let (passed, receiver) = oneshot::channel();
        let mut state = self.slot.lock();
        state.limit = Some((Instant::now() + limit, passed));
        // The thread that sleeps until an earlier one passes finds this one by itself: all are of
        // one length.
        if std::mem::take(&mut state.is_idle) {
            self.thread.unpark();
        }
        receiver
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.slot.lock().is_over = true;
        self.thread.unpark();
    }
}

fn watch(slot: &Slot) {
    loop {
        let mut state = slot.lock();
        if state.is_over {
            return;
        }
        let limit = state.limit.take();
        let Some((at, passed)) = limit.filter(|(_, passed)| !passed.is_closed()) else {
            state.is_idle = true;
            drop(state);
            park();
            continue;
        };
        let left = at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // Nobody waits for it any more.
            let _ = passed.send(());
            continue;
        }
        state.limit = Some((at, passed));
        drop(state);
        park_timeout(left);
    }
}
