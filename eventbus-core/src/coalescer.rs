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

use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use tokio::sync::watch;

use crate::activity::Part;
use crate::error::{Error, ErrorKind, Result};

/// Many put in, one takes out everything there is.
#[derive(Debug)]
pub(crate) struct Mailbox<T> {
    items: Mutex<Vec<T>>,
    waker: AtomicWaker,
    part: Option<Arc<Part>>,
}

impl<T> Mailbox<T> {
    pub(crate) fn new(part: Option<Arc<Part>>) -> Self {
        Self {
            items: Mutex::new(Vec::new()),
            waker: AtomicWaker::new(),
            part,
        }
    }

    /// Puts in under one lock; `fill` may read what is there.
    pub(crate) fn put<R>(&self, fill: impl FnOnce(&mut Vec<T>) -> R) -> R {
        let result = {
            let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
            fill(&mut items)
        };
        if let Some(part) = &self.part {
            part.raise();
        }
        self.waker.wake();
        result
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
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        if items.is_empty() {
            return None;
        }
        move_all(&mut items, into);
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
/// Bounded by its callers: each waits for its flush, or holds credit for what it put in.
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
    /// The number of the latest flush, and which of the last ones failed.
    outcome: watch::Sender<(u64, Vec<u64>)>,
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
            outcome: watch::Sender::new((0, Vec::new())),
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
    /// `Unavailable` when that flush failed, `Closed` when the flushing side is gone.
    pub async fn flushed(&self, ticket: Ticket) -> Result<()> {
        let mut outcome = self.shared.outcome.subscribe();
        let seen = outcome
            .wait_for(|(number, _)| *number >= ticket.0)
            .await
            .map_err(|_| Error::new(ErrorKind::Closed, "flush", "the flushing side is gone"))?;
        match seen.1.contains(&ticket.0) {
            false => Ok(()),
            true => Err(Error::new(
                ErrorKind::Unavailable,
                "flush",
                "the flush this was part of failed",
            )),
        }
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
        self.shared.outcome.send_modify(|(number, failed)| {
            *number = self.number;
            if !self.succeeded {
                if failed.len() == FAILED_MAX {
                    failed.remove(0);
                }
                failed.push(self.number);
            }
        });
    }
}
