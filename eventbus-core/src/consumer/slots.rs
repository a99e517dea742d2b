//! What a worker runs at once: a fixed number of places, each used again without allocating,
//! woken one by one, and cleared by number when a lane is taken away.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

use super::dispatch::Layers;
use super::run::{Ended, Run, Runner};

thread_local! {
    static IN_HANDLER: Cell<bool> = const { Cell::new(false) };
}

/// Whether the code that asks runs inside a handler on this thread.
pub(crate) fn is_in_handler() -> bool {
    IN_HANDLER.get()
}

/// Sets the mark while it lives, also when a handler panics.
struct InHandler(bool);

impl InHandler {
    #[inline]
    fn enter() -> Self {
        Self(IN_HANDLER.replace(true))
    }
}

impl Drop for InHandler {
    #[inline]
    fn drop(&mut self) {
        IN_HANDLER.set(self.0);
    }
}

/// How a run ended: `Err` holds a panic.
pub(crate) type Caught<T> = Result<T, Box<dyn Any + Send>>;

/// Places for runs.
#[derive(Debug)]
pub(crate) struct SlotSet<V: Layers> {
    slots: Vec<Slot<V>>,
    free: Vec<usize>,
    wakes: Arc<Wakes>,
}

#[derive(Debug)]
struct Slot<V: Layers> {
    runner: Runner<V>,
    waker: Waker,
}

/// Which slots were woken, one bit each.
#[derive(Debug)]
struct Wakes {
    bits: Box<[AtomicU64]>,
    parent: AtomicWaker,
}

struct SlotWaker {
    wakes: Arc<Wakes>,
    index: usize,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wakes.mark(self.index);
        self.wakes.parent.wake();
    }
}

impl Wakes {
    #[inline]
    fn mark(&self, index: usize) {
        self.bits[index / 64].fetch_or(1 << (index % 64), Ordering::AcqRel);
    }
}

impl<V: Layers> SlotSet<V> {
    /// So many places, each with a clone of `service`.
    pub(crate) fn new(count: usize, service: &V) -> Self {
        let wakes = Arc::new(Wakes {
            bits: (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            parent: AtomicWaker::new(),
        });
        let slots = (0..count)
            .map(|index| Slot {
                runner: Runner::new(service.clone()),
                waker: Waker::from(Arc::new(SlotWaker {
                    wakes: Arc::clone(&wakes),
                    index,
                })),
            })
            .collect();
        Self {
            slots,
            free: (0..count).rev().collect(),
            wakes,
        }
    }

    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Wakes `cx` from now on when any slot is woken.
    pub(crate) fn register(&self, cx: &Context<'_>) {
        self.wakes.parent.register(cx.waker());
    }

    /// Starts a run in a free slot and polls it. One that ends at once leaves the slot free again,
    /// so that the next one finds its memory in the processor's cache.
    #[inline(always)]
    pub(crate) fn start(&mut self, run: Run) -> (usize, Poll<Caught<Ended>>) {
        let index = self.free.pop().expect("the caller saw that there is room");
        let slot = &mut self.slots[index];
        slot.runner.start(run);
        let polled = slot.poll();
        if polled.is_ready() {
            self.free.push(index);
        }
        (index, polled)
    }

    /// Drops the run in a slot.
    pub(crate) fn cancel(&mut self, index: usize) {
        if self.slots[index].clear().is_err() {
            // A panic while a handler is dropped ends that handler and nothing else.
            tracing::warn!("a handler panicked while it was dropped");
        }
        self.free.push(index);
    }

    /// Polls every woken slot once and adds those that ended; `Err` holds a panic. Returns whether
    /// any slot was polled.
    pub(crate) fn poll(&mut self, ended: &mut Vec<(usize, Caught<Ended>)>) -> bool {
        let mut polled = false;
        for word in 0..self.wakes.bits.len() {
            let mut bits = self.wakes.bits[word].swap(0, Ordering::AcqRel);
            while bits != 0 {
                let index = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                polled = true;
                if let Poll::Ready(output) = self.slots[index].poll() {
                    self.free.push(index);
                    ended.push((index, output));
                }
            }
        }
        polled
    }
}

impl<V: Layers> Slot<V> {
    #[inline(always)]
    fn poll(&mut self) -> Poll<Caught<Ended>> {
        let mut cx = Context::from_waker(&self.waker);
        let _in_handler = InHandler::enter();
        let polled = catch_unwind(AssertUnwindSafe(|| self.runner.poll(&mut cx)));
        polled.map_or_else(|panic| self.panicked(panic), |polled| polled.map(Ok))
    }

    #[cold]
    fn panicked(&mut self, panic: Box<dyn Any + Send>) -> Poll<Caught<Ended>> {
        // The first panic is the one that is told.
        let _ = self.clear();
        Poll::Ready(Err(panic))
    }

    fn clear(&mut self) -> Caught<()> {
        let _in_handler = InHandler::enter();
        catch_unwind(AssertUnwindSafe(|| self.runner.clear()))
    }
}

/// The text of a panic, as far as it has one.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a text")
}
