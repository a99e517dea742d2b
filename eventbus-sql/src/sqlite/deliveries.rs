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
use eventbus_core::{
    Deliveries, Error, ErrorKind, HeldLeases, Lane, Lease, LeaseSignal, Leaseholder, MemberId,
    Receipt, Result, Settlement, Signal, Timestamp, Verdict,
};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::database::Shared;
use super::groups::GroupRow;
use super::leases;
use super::member::{MemberState, Place, Wanted};
use super::page::Page;

/// What the two halves share; the last one to be dropped makes the member leave.
#[derive(Debug)]
pub(super) struct MemberHandle {
    pub(super) database: Shared,
    pub(super) state: Mutex<MemberState>,
    /// Wakes `next`.
    pub(super) notify: Arc<Notify>,
    /// It left, or its broker handle was closed.
    pub(super) ended: Arc<AtomicBool>,
    pub(super) seat: Option<Seat>,
}

/// A member's place in its group.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) group: GroupRow,
    pub(super) member: MemberId,
    pub(super) held: HeldLeases,
}

impl MemberHandle {
    pub(super) fn lock(&self) -> MutexGuard<'_, MemberState> {
        // Nothing is left half done by a panic that a later call could not read.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Ends it: `next` and `settle` answer `Closed` from now on. Returns its seat the first time.
    pub(super) fn end(&self) -> Option<&Seat> {
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

impl Drop for MemberHandle {
    /// A crash inside this process need not be waited for.
    fn drop(&mut self) {
        let Some(Seat { group, member, .. }) = self.end() else {
            return;
        };
        let (group, member) = (group.id, *member);
        let database = self.database.clone();
        // Without a runtime the leases end with their time.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = leases::leave(&database, &leases::LANES, group, member).await {
                    tracing::warn!(%error, "a dropped member's leases end only with their time");
                }
            });
        }
    }
}

/// What `next` is in the middle of; kept when its future is dropped.
enum Work {
    Opening(BoxFuture<'static, Result<Vec<Place>>>),
    Page(Wanted, BoxFuture<'static, Result<Page>>),
    Ending(BoxFuture<'static, Result<Vec<u64>>>),
}

/// What a finished work found.
enum Found {
    Opened(Vec<Place>),
    Page(Wanted, Page),
    Ends(Vec<u64>),
}

/// The receiving half.
pub(super) struct SqliteDeliveries {
    handle: Arc<MemberHandle>,
    leaseholder: Option<Leaseholder>,
    /// Granted, and not opened yet.
    granted: Vec<Lease>,
    work: Option<Work>,
}

impl std::fmt::Debug for SqliteDeliveries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqliteDeliveries")
            .field("handle", &self.handle)
            .finish_non_exhaustive()
    }
}

impl SqliteDeliveries {
    pub(super) fn new(handle: Arc<MemberHandle>, leaseholder: Option<Leaseholder>) -> Self {
        Self {
            handle,
            leaseholder,
            granted: Vec::new(),
            work: None,
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
        let mut state = self.handle.lock();
        if let Some(time) = state.until_time
            && self.handle.database.now() >= time
        {
            let rows = state.rows();
            drop(state);
            self.work = Some(Work::Ending(self.find_ends(rows, time)));
            return;
        }
        let Some(wanted) = state.wanted() else {
            return;
        };
        drop(state);
        let database = self.handle.database.clone();
        let topic = Arc::clone(&wanted.topic);
        let (row, from, to) = (wanted.row, wanted.from, wanted.to);
        let page = async move { database.read_page(&topic, row, from, to).await };
        self.work = Some(Work::Page(wanted, page.boxed()));
        self.poke();
    }

    /// Lets the read reach SQLite's thread; what comes of it is heard by the next wait.
    fn poke(&mut self) {
        if let Some(Work::Page(_, page)) = &mut self.work
            && let Some(found) = page.now_or_never()
        {
            *page = ready(found).boxed();
        }
    }

    fn find_ends(&self, rows: Vec<u32>, time: Timestamp) -> BoxFuture<'static, Result<Vec<u64>>> {
        let database = self.handle.database.clone();
        async move {
            let mut ends = Vec::with_capacity(rows.len());
            for row in rows {
                ends.push(database.first_at_or_after(row, time).await?);
            }
            Ok(ends)
        }
        .boxed()
    }

    fn begin_opening(&mut self) {
        let Some(seat) = &self.handle.seat else {
            return;
        };
        let (database, group) = (self.handle.database.clone(), seat.group.clone());
        let leases = self.granted.clone();
        let notify = Arc::clone(&self.handle.notify);
        let opening = async move { database.open_places(&group, &leases, &notify).await };
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
            // A signal of a later version.
            _ => {}
        }
    }

    fn take(&mut self, found: Found) {
        let mut state = self.handle.lock();
        match found {
            Found::Opened(places) => {
                self.granted.clear();
                state.open(places);
            }
            Found::Page(wanted, page) => state.take_page(&wanted, page),
            Found::Ends(ends) => state.end_at(&ends),
        }
    }

    /// Waits for whatever comes first and takes it in.
    async fn wait(&mut self) -> Result<()> {
        let handle = Arc::clone(&self.handle);
        let opening = !self.granted.is_empty();
        let idle = self.work.is_none();
        let until_time = idle.then(|| handle.lock().until_time).flatten();
        let _waiting = idle.then(|| handle.database.wakes.wait());
        let Self {
            leaseholder, work, ..
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
            () = reach(&handle, until_time) => {}
        }
        Ok(())
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
        Some(Work::Ending(ending)) => ending.await.map(Found::Ends),
        Some(Work::Page(_, page)) => {
            let page = page.await;
            let Some(Work::Page(wanted, _)) = work.take() else {
                return pending().await;
            };
            return page.map(|page| Found::Page(wanted, page));
        }
    };
    *work = None;
    found
}

/// Waits until it is later than `time` by the broker's clock.
async fn reach(handle: &MemberHandle, time: Option<Timestamp>) {
    let Some(time) = time else {
        return pending().await;
    };
    sleep(time.since(handle.database.now())).await;
}

#[async_trait]
impl Deliveries for SqliteDeliveries {
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
pub(super) struct SqliteSettlement(pub(super) Arc<MemberHandle>);

#[async_trait]
impl Settlement for SqliteSettlement {
    async fn settle(&mut self, settled: &[(Receipt, Verdict)]) -> Result<()> {
        let handle = &self.0;
        handle.check_open("settle")?;
        if settled.iter().any(|(_, verdict)| *verdict != Verdict::Done) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "settle",
                "this broker does not declare `redelivery`: retry in place and settle `Done`",
            ));
        }
        let group = handle.seat.as_ref().map(|seat| seat.group.id);
        let (stale, advances) = {
            let mut state = handle.lock();
            let stale = state.settle(settled.iter().map(|(receipt, _)| *receipt));
            // What an earlier call could not record is recorded with this one.
            (stale, group.map(|group| state.advances(group)))
        };
        // There is credit again.
        handle.notify.notify_one();
        handle.database.count_stale(stale);
        let Some(advances) = advances.filter(|advances| !advances.is_empty()) else {
            return Ok(());
        };
        handle.database.writer.settle(advances.clone()).await?;
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
