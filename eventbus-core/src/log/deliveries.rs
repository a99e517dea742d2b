//! The two halves of a member: what is heard, and what is answered.
//!
//! ```text
//!  leases ──▶ granted: read the group's place ─▶ open ┐
//!             revoking, lost ─────────────────────────┤
//!  log ─────▶ one page in flight ─▶ read ahead ───────┴─▶ next
//! ```

use std::future::{pending, ready};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::Notify;

use super::member::{MemberState, Place, Wanted};
use super::{Log, Page};
use crate::{
    Deliveries, Error, ErrorKind, HeldLeases, Lane, Lease, LeaseSignal, Leaseholder, Limits,
    MemberId, Position, Receipt, Result, Settlement, Signal, Timestamp,
};

/// What the two halves share; the last one to be dropped makes the member leave.
#[derive(Debug)]
pub struct MemberHandle<L: Log> {
    log: L,
    state: Mutex<MemberState>,
    /// Wakes `next`.
    pub notify: Arc<Notify>,
    /// It left, or its broker handle was closed.
    ended: Arc<AtomicBool>,
    seat: Option<Seat>,
}

/// A member's place in its group.
#[derive(Debug)]
pub(super) struct Seat {
    /// The group, as the adapter numbers it.
    pub(super) group: i64,
    pub(super) member: MemberId,
    pub(super) held: HeldLeases,
}

impl<L: Log> MemberHandle<L> {
    /// A reader that holds nothing yet.
    pub fn reader(log: L, limits: Limits) -> Arc<Self> {
        Arc::new(Self::new(log, limits, Arc::default(), None))
    }

    /// A member, or a reader when it has no seat. `ended` is raised when it leaves.
    pub(super) fn new(log: L, limits: Limits, ended: Arc<AtomicBool>, seat: Option<Seat>) -> Self {
        Self {
            log,
            state: Mutex::new(MemberState::new(limits)),
            notify: Arc::new(Notify::new()),
            ended,
            seat,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, MemberState> {
        // Nothing is left half done by a panic that a later call could not read.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens lanes and announces them, all in one signal.
    pub fn open(&self, places: Vec<Place>) {
        self.lock().open(places);
    }

    /// Has a reader end at a time, when the broker's clock is there, which may be now.
    pub fn end_at(&self, time: Timestamp) {
        self.lock().until_time = Some(time);
    }

    fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Ends it, and frees what it holds the first time.
    pub(super) async fn leave(&self) -> Result<()> {
        match self.end() {
            Some(seat) => self.log.leave(seat.group, seat.member).await,
            None => Ok(()),
        }
    }

    /// Ends it: `next` and `settle` answer `Closed` from now on. Returns its seat the first time.
    fn end(&self) -> Option<&Seat> {
        if self.ended.swap(true, Ordering::AcqRel) {
            return None;
        }
        self.notify.notify_one();
        self.seat.as_ref()
    }

    fn check_open(&self, operation: &'static str) -> Result<()> {
        if self.is_ended() {
            return Err(Error::new(
                ErrorKind::Closed,
                operation,
                "the member has left or its broker handle was closed: subscribe again",
            ));
        }
        Ok(())
    }
}

impl<L: Log> Drop for MemberHandle<L> {
    /// A crash inside this process need not be waited for.
    fn drop(&mut self) {
        let Some(Seat { group, member, .. }) = self.end() else {
            return;
        };
        let (group, member) = (*group, *member);
        let log = self.log.clone();
        // Without a runtime the leases end with their time.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = log.leave(group, member).await {
                    tracing::warn!(%error, "a dropped member's leases end only with their time");
                }
            });
        }
    }
}

/// What `next` is in the middle of; kept when its future is dropped.
enum Work {
    Opening(BoxFuture<'static, Result<Vec<Place>>>),
    Pages(Vec<Wanted>, BoxFuture<'static, Result<Vec<Page>>>),
}

/// What a finished work found.
enum Found {
    Opened(Vec<Place>),
    Pages(Vec<Wanted>, Vec<Page>),
}

/// The receiving half.
pub(super) struct LogDeliveries<L: Log> {
    handle: Arc<MemberHandle<L>>,
    leaseholder: Option<Leaseholder>,
    /// Granted, and not opened yet.
    granted: Vec<Lease>,
    work: Option<Work>,
    /// Where a reader ends that ends at a time still to come.
    ending: Option<BoxFuture<'static, Result<Vec<Position>>>>,
}

impl<L: Log> std::fmt::Debug for LogDeliveries<L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogDeliveries")
            .field("handle", &self.handle)
            .finish_non_exhaustive()
    }
}

impl<L: Log> LogDeliveries<L> {
    /// Of this member; a reader has no leases.
    pub(super) fn new(handle: Arc<MemberHandle<L>>, leaseholder: Option<Leaseholder>) -> Self {
        let ending = find_ends(&handle);
        Self {
            handle,
            leaseholder,
            granted: Vec::new(),
            work: None,
            ending,
        }
    }

    /// Begins the next read, if one is worth it, so that it goes on while a batch is handled.
    fn begin_reading(&mut self) {
        if self.work.is_some() {
            return;
        }
        if !self.granted.is_empty() {
            self.begin_opening();
            return;
        }
        let wanted = self.handle.lock().wanted(L::PAGES_MAX);
        if wanted.is_empty() {
            return;
        }
        let (log, pages) = (self.handle.log.clone(), wanted.clone());
        let pages = async move { log.read_pages(&pages).await };
        self.work = Some(Work::Pages(wanted, pages.boxed()));
        self.poke();
    }

    /// Lets the question reach the database; what comes of it is heard by the next wait.
    fn poke(&mut self) {
        if let Some(Work::Pages(_, pages)) = &mut self.work
            && let Some(found) = pages.now_or_never()
        {
            *pages = ready(found).boxed();
        }
    }

    fn begin_opening(&mut self) {
        let Some(seat) = &self.handle.seat else {
            return;
        };
        let (log, group) = (self.handle.log.clone(), seat.group);
        let leases = self.granted.clone();
        let notify = Arc::clone(&self.handle.notify);
        let opening = async move { log.open_places(group, &leases, &notify).await };
        // A page that was being read is read again: it is of a lane that stays.
        self.work = Some(Work::Opening(opening.boxed()));
    }

    fn hear(&mut self, signal: LeaseSignal) {
        match signal {
            LeaseSignal::Granted(leases) => {
                self.granted.extend(leases);
                self.begin_opening();
            }
            LeaseSignal::Revoking(places) => self.handle.lock().revoke(&places),
            LeaseSignal::Lost(places) => self.handle.lock().lose(&places),
        }
    }

    fn take(&mut self, found: Found) {
        let mut state = self.handle.lock();
        match found {
            Found::Opened(places) => {
                self.granted.clear();
                state.open(places);
            }
            Found::Pages(wanted, pages) => {
                let pages = wanted.iter().zip(pages);
                let leaving: Vec<_> = pages
                    .filter_map(|(wanted, page)| state.take_page(wanted, page))
                    .collect();
                drop(state);
                if let Some(seat) = &self.handle.seat {
                    // With a later grant nobody settles by what was read before.
                    seat.held.release(&leaving);
                }
            }
        }
    }

    /// Waits for whatever comes first and takes it in.
    async fn wait(&mut self) -> Result<()> {
        let handle = Arc::clone(&self.handle);
        let opening = !self.granted.is_empty();
        let _waiting = self.work.is_none().then(|| handle.log.wakes().wait());
        let Self {
            leaseholder,
            work,
            ending,
            ..
        } = self;
        tokio::select! {
            biased;
            // What was granted is opened before anything later of the leases is heard.
            signal = next_lease_signal(leaseholder), if !opening => {
                let signal = signal?;
                self.hear(signal);
            }
            found = finish(work) => {
                let found = found?;
                self.take(found);
            }
            () = handle.notify.notified() => {}
            ends = reach(ending) => {
                // Asked for anew where the answer was an error.
                self.ending = None;
                match ends {
                    Ok(ends) => handle.lock().end_at(&ends),
                    Err(error) => {
                        self.ending = find_ends(&handle);
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

fn find_ends<L: Log>(
    handle: &MemberHandle<L>,
) -> Option<BoxFuture<'static, Result<Vec<Position>>>> {
    let state = handle.lock();
    let time = state.until_time?;
    let (log, rows) = (handle.log.clone(), state.rows());
    Some(async move { log.ends_at(&rows, time).await }.boxed())
}

async fn reach(
    ending: &mut Option<BoxFuture<'static, Result<Vec<Position>>>>,
) -> Result<Vec<Position>> {
    match ending {
        Some(ending) => ending.await,
        None => pending().await,
    }
}

async fn next_lease_signal(leaseholder: &mut Option<Leaseholder>) -> Result<LeaseSignal> {
    match leaseholder {
        Some(leaseholder) => leaseholder.next().await,
        None => pending().await,
    }
}

/// Brings the work to its end; it is kept until then.
async fn finish(work: &mut Option<Work>) -> Result<Found> {
    let found = match work {
        None => pending().await,
        Some(Work::Opening(opening)) => opening.await.map(Found::Opened),
        Some(Work::Pages(_, pages)) => {
            let pages = pages.await;
            let Some(Work::Pages(wanted, _)) = work.take() else {
                return pending().await;
            };
            return pages.map(|pages| Found::Pages(wanted, pages));
        }
    };
    *work = None;
    found
}

#[async_trait]
impl<L: Log> Deliveries for LogDeliveries<L> {
    async fn next(&mut self) -> Result<Signal> {
        loop {
            self.handle.check_open("next")?;
            self.begin_reading();
            let signal = self.handle.lock().next_signal();
            if let Some(signal) = signal {
                // The next page is read while this batch is handled.
                self.begin_reading();
                return Ok(signal);
            }
            self.wait().await?;
        }
    }

    async fn close(self: Box<Self>) -> Result<()> {
        let first = self.handle.end().is_some();
        match self.leaseholder {
            Some(leaseholder) if first => leaseholder.close().await,
            _ => Ok(()),
        }
    }
}

/// The answering half.
#[derive(Debug)]
pub(super) struct LogSettlement<L: Log>(Arc<MemberHandle<L>>);

impl<L: Log> LogSettlement<L> {
    pub(super) fn new(handle: Arc<MemberHandle<L>>) -> Self {
        Self(handle)
    }
}

#[async_trait]
impl<L: Log> Settlement for LogSettlement<L> {
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()> {
        let handle = &self.0;
        handle.check_open("settle")?;
        let group = handle.seat.as_ref().map(|seat| seat.group);
        let (stale, advances) = {
            let mut state = handle.lock();
            let stale = state.settle(settled.iter().copied());
            // What an earlier call could not record is recorded with this one.
            (stale, group.map(|group| state.advances(group)))
        };
        // There is credit again.
        handle.notify.notify_one();
        handle.log.count_stale(stale);
        let Some(advances) = advances.filter(|advances| !advances.is_empty()) else {
            return Ok(());
        };
        handle.log.settle(advances.clone()).await?;
        handle.lock().recorded(&advances);
        Ok(())
    }

    async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        let places = self.0.lock().release(lanes);
        self.0.notify.notify_one();
        if let Some(seat) = &self.0.seat {
            seat.held.release(&places);
        }
        Ok(())
    }
}
