//! One flush in flight; whatever arrives meanwhile joins the next. No timer.
//!
//! ```text
//!  add ─┐                       ┌─▶ flush 1 (in flight)
//!  add ─┼─▶ [ next flush ] ─────┘        │ done
//!  add ─┘        ▲  joins while in flight ▼
//!                └──────────────── flush 2 takes all of it at once
//! ```
//!
//! A lone item pays nothing, batches form from concurrency, and whoever waits learns of its own
//! flush. Settling uses it; stores use it for inserts and commits.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use tokio::sync::watch;

use crate::activity::Part;
use crate::error::{Error, ErrorKind, Result};

/// Many put in, one takes out everything there is.
#[derive(Debug)]
pub(crate) struct Mailbox<T> {
    items: Mutex<Items<T>>,
    waker: AtomicWaker,
    part: Option<Arc<Part>>,
}

#[derive(Debug)]
struct Items<T> {
    there: Vec<T>,
    /// Nobody takes anything out any more.
    closed: bool,
}

impl<T> Mailbox<T> {
    pub(crate) fn new(part: Option<Arc<Part>>) -> Self {
        Self {
            items: Mutex::new(Items {
                there: Vec::new(),
                closed: false,
            }),
            waker: AtomicWaker::new(),
            part,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Items<T>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts in under one lock; `fill` may read what is there.
    pub(crate) fn put<R>(&self, fill: impl FnOnce(&mut Vec<T>) -> R) -> R {
        let mut items = self.lock();
        let result = fill(&mut items.there);
        if items.closed {
            let unwanted = std::mem::take(&mut items.there);
            drop(items);
            drop(unwanted);
            return result;
        }
        // Under the lock, so that what is closed is no work.
        if let Some(part) = &self.part {
            part.raise();
        }
        drop(items);
        self.waker.wake();
        result
    }

    /// Drops what is there and what is put in from now on: nobody takes it out any more.
    pub(crate) fn close(&self) {
        let mut items = self.lock();
        items.closed = true;
        let unwanted = std::mem::take(&mut items.there);
        if let Some(part) = &self.part {
            part.lower();
        }
        drop(items);
        drop(unwanted);
    }

    /// Moves everything to `into`, or registers to be woken.
    pub(crate) fn poll_take(&self, cx: &mut Context<'_>, into: &mut Vec<T>) -> Poll<()> {
        self.poll_take_with(cx, into, || ())
    }

    /// As `poll_take`; `taken` runs before anybody can put in again.
    fn poll_take_with<R>(
        &self,
        cx: &mut Context<'_>,
        into: &mut Vec<T>,
        taken: impl Fn() -> R,
    ) -> Poll<R> {
        if let Some(result) = self.take(into, &taken) {
            return Poll::Ready(result);
        }
        self.waker.register(cx.waker());
        // Once more: an item may have come between the look and the registration.
        match self.take(into, &taken) {
            Some(result) => Poll::Ready(result),
            None => Poll::Pending,
        }
    }

    fn take<R>(&self, into: &mut Vec<T>, taken: &impl Fn() -> R) -> Option<R> {
        let mut items = self.lock();
        if items.there.is_empty() {
            return None;
        }
        move_all(&mut items.there, into);
        Some(taken())
    }
}

/// Moves all items, without copying them where nothing is there yet.
pub(crate) fn move_all<T>(from: &mut Vec<T>, to: &mut Vec<T>) {
    match to.is_empty() {
        true => std::mem::swap(from, to),
        false => to.append(from),
    }
}

/// Puts items into the next flush.
///
/// Bounded by its callers: each waits for its flush, or holds credit for what it put in. What is
/// put in when the flushing side is gone is dropped.
///
/// # Examples
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// use eventbus_core::Coalescer;
///
/// let (coalescer, mut flushes) = Coalescer::new();
/// let first = coalescer.add("first");
/// coalescer.add("second");
///
/// let mut batch = Vec::new();
/// let flush = flushes.next(&mut batch).await;
/// assert_eq!(batch, ["first", "second"]);
/// flush.done();
/// coalescer.flushed(first).await.unwrap();
/// # });
/// ```
#[derive(Debug)]
pub struct Coalescer<T> {
    shared: Arc<Shared<T>>,
}

#[derive(Debug)]
struct Shared<T> {
    mailbox: Mailbox<T>,
    /// The number of the flush that what is added now belongs to.
    next: Mutex<u64>,
    outcome: watch::Sender<Outcome>,
}

/// What became of the flushes so far.
#[derive(Debug, Default)]
struct Outcome {
    /// The number of the latest flush.
    latest: u64,
    /// Which of the last ones failed.
    failed: VecDeque<u64>,
    /// The latest failure that is not remembered by itself any more.
    forgotten: u64,
    /// The flushing side is gone.
    closed: bool,
}

/// Which flush an item belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// Takes what was put in, flush by flush; there is one per coalescer.
#[derive(Debug)]
pub struct Flushes<T> {
    shared: Arc<Shared<T>>,
}

/// A flush in flight: say what became of it. Dropped unsaid, it failed.
#[derive(Debug)]
pub struct Flush<'a, T> {
    shared: &'a Shared<T>,
    number: u64,
    succeeded: bool,
}

/// How many failed flushes are remembered for callers that ask late.
const FAILED_MAX: usize = 64;

impl<T> Clone for Coalescer<T> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<T> Coalescer<T> {
    /// Makes both ends.
    #[allow(clippy::new_ret_no_self, reason = "the two ends come together")]
    pub fn new() -> (Self, Flushes<T>) {
        Self::for_part(None)
    }

    pub(crate) fn for_part(part: Option<Arc<Part>>) -> (Self, Flushes<T>) {
        let shared = Arc::new(Shared {
            mailbox: Mailbox::new(part),
            next: Mutex::new(1),
            outcome: watch::Sender::default(),
        });
        let flushes = Flushes {
            shared: Arc::clone(&shared),
        };
        (Self { shared }, flushes)
    }

    /// Puts in one item.
    pub fn add(&self, item: T) -> Ticket {
        self.put(|there| there.push(item))
    }

    /// Moves all of `items` in, leaving it empty with its capacity.
    pub fn append(&self, items: &mut Vec<T>) -> Ticket {
        self.put(|there| move_all(items, there))
    }

    fn put(&self, fill: impl FnOnce(&mut Vec<T>)) -> Ticket {
        self.shared.mailbox.put(|items| {
            fill(items);
            // Read under the mailbox's lock, where the flusher raises it.
            Ticket(
                *self
                    .shared
                    .next
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner),
            )
        })
    }

    /// Waits for the flush of `ticket`.
    ///
    /// # Errors
    ///
    /// `Unavailable` when that flush failed, or was so long ago that this is not known any more;
    /// `Closed` when the flushing side is gone and did not get to it.
    pub async fn flushed(&self, ticket: Ticket) -> Result<()> {
        let Ticket(number) = ticket;
        let gone = || Error::new(ErrorKind::Closed, "flush", "the flushing side is gone");
        let mut outcome = self.shared.outcome.subscribe();
        let seen = outcome
            .wait_for(|outcome| outcome.latest >= number || outcome.closed)
            .await
            .map_err(|_| gone())?;
        if seen.latest < number {
            return Err(gone());
        }
        if number <= seen.forgotten || seen.failed.contains(&number) {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "flush",
                "the flush this was part of failed",
            ));
        }
        Ok(())
    }
}

impl<T> Flushes<T> {
    /// Waits until something is there and takes all of it.
    ///
    /// # Cancellation
    ///
    /// Safe: a dropped future has taken nothing.
    pub async fn next(&mut self, into: &mut Vec<T>) -> Flush<'_, T> {
        let shared = &self.shared;
        // Under the mailbox's lock, so that no item gets the number of a flush that left without it.
        let raise = || {
            let mut next = shared.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next += 1;
            *next - 1
        };
        let number =
            std::future::poll_fn(|cx| shared.mailbox.poll_take_with(cx, into, raise)).await;
        Flush {
            shared: &self.shared,
            number,
            succeeded: false,
        }
    }
}

impl<T> Flush<'_, T> {
    /// Says that it succeeded.
    pub fn done(mut self) {
        self.succeeded = true;
    }
}

impl<T> Drop for Flush<'_, T> {
    fn drop(&mut self) {
        self.shared.outcome.send_modify(|outcome| {
            outcome.latest = self.number;
            if self.succeeded {
                return;
            }
            if outcome.failed.len() == FAILED_MAX
                && let Some(oldest) = outcome.failed.pop_front()
            {
                outcome.forgotten = oldest;
            }
            outcome.failed.push_back(self.number);
        });
    }
}

impl<T> Drop for Flushes<T> {
    fn drop(&mut self) {
        self.shared
            .outcome
            .send_modify(|outcome| outcome.closed = true);
        self.shared.mailbox.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activity::Activity;

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_learns_that_the_flushing_side_is_gone() {
        let (coalescer, mut flushes) = Coalescer::new();
        let flushed = coalescer.add(1);
        let mut batch = Vec::new();
        flushes.next(&mut batch).await.done();
        let waiting = coalescer.add(2);
        drop(flushes);
        let late = coalescer.add(3);
        coalescer.flushed(flushed).await.expect("it was flushed");
        for ticket in [waiting, late] {
            let limit = std::time::Duration::from_secs(1);
            let answer = tokio::time::timeout(limit, coalescer.flushed(ticket)).await;
            let error = answer.expect("an answer").expect_err("nobody flushes");
            assert_eq!(error.kind(), ErrorKind::Closed);
        }
    }

    #[tokio::test]
    async fn what_nobody_will_flush_is_dropped_and_is_no_work() {
        let activity = Activity::new();
        let (coalescer, flushes) = Coalescer::for_part(Some(activity.part()));
        let item = Arc::new(());
        coalescer.add(Arc::clone(&item));
        assert!(!activity.is_quiet());
        drop(flushes);
        coalescer.add(Arc::clone(&item));
        assert!(activity.is_quiet());
        assert_eq!(Arc::strong_count(&item), 1);
    }

    #[tokio::test]
    async fn a_failed_flush_is_never_taken_for_a_good_one_however_late_one_asks() {
        let (coalescer, mut flushes) = Coalescer::new();
        let mut batch = Vec::new();
        let first = coalescer.add(0);
        drop(flushes.next(&mut batch).await);
        for number in 0..FAILED_MAX * 2 {
            coalescer.add(number);
            drop(flushes.next(&mut batch).await);
        }
        let last = coalescer.add(0);
        flushes.next(&mut batch).await.done();
        assert!(coalescer.flushed(first).await.is_err());
        coalescer.flushed(last).await.expect("it was flushed");
    }
}
