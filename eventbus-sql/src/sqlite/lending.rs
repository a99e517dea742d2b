//! The writing connection, lent for pieces of work that share a commit.
//!
//! ```text
//!  BEGIN · what else is to be written ┬ SAVEPOINT · lent ─▶ [ piece of work ] ─▶ kept ───┐
//!                                     ├ SAVEPOINT · lent ─▶ [ piece of work ] ─▶ undone ─┤
//!                                     └ …                                                ▼
//!                            whose work was kept hears of it ◀──────────────────────── COMMIT
//! ```
//!
//! One piece of work at a time, as SQLite has it anyway. Each is undone alone when it fails or is
//! dropped. What is in the transaction is of several: when one of them ends it, all of it is undone,
//! and each is told to do its work again.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use eventbus_core::{Error, ErrorKind, Flushes, Result};
use futures_util::FutureExt;
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions, SqliteRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, SqliteConnection};
use tokio::sync::oneshot;
use tracing::warn;

use super::error::{into_error, is_constraint};
use super::timer::Timer;
use super::writer::{Command, Failure, gone};

/// After how long of lending a transaction is committed, so that nobody waits for ever.
const SHARE: Duration = Duration::from_millis(5);

/// After how many steps a statement looks whether it may go on: about a millisecond's.
const PROGRESS: i32 = 10_000;
/// For how long each piece of work has a commit of its own, after one broke the commit of several.
const APART: Duration = Duration::from_secs(10);

/// The connection that writes, and whether it is lent.
#[derive(Debug)]
pub(super) struct WritingConnection {
    pub(super) connection: SqliteConnection,
    marks: Arc<Marks>,
}

/// What SQLite and the writer tell each other of a connection.
#[derive(Debug, Default)]
struct Marks {
    /// While it is set, SQLite rolls back instead of committing.
    is_lent: AtomicBool,
    /// Set by SQLite when a whole transaction is rolled back.
    is_rolled_back: AtomicBool,
    /// Set when it was lent for too long: then SQLite interrupts whatever statement runs.
    is_overdue: AtomicBool,
}

impl Marks {
    fn is_overdue(&self) -> bool {
        self.is_overdue.load(Ordering::Acquire)
    }
}

impl WritingConnection {
    pub(super) async fn open(options: &SqliteConnectOptions) -> sqlx::Result<Self> {
        Self::guard(options.connect().await?).await
    }

    /// Sets a connection up so that whoever borrows it can't commit what is of others, and that it
    /// is noticed when it rolls that back.
    pub(super) async fn guard(mut connection: SqliteConnection) -> sqlx::Result<Self> {
        // The driver makes savepoints of transactions inside the one that it has begun. It goes on
        // believing in this one, while the writer begins and ends transactions around its back.
        std::mem::forget(connection.begin_with("BEGIN").await?);
        run(&mut connection, "ROLLBACK").await?;
        let marks = Arc::new(Marks::default());
        let [commits, rolls_back, goes_on] = std::array::from_fn(|_| Arc::clone(&marks));
        let mut handle = connection.lock_handle().await?;
        handle.set_commit_hook(move || !commits.is_lent.load(Ordering::Acquire));
        handle.set_rollback_hook(move || rolls_back.is_rolled_back.store(true, Ordering::Release));
        handle.set_progress_handler(PROGRESS, move || !goes_on.is_overdue());
        drop(handle);
        Ok(Self { connection, marks })
    }
}

pub(super) async fn run(connection: &mut SqliteConnection, sql: &'static str) -> sqlx::Result<()> {
    sqlx::query(sql).execute(connection).await?;
    Ok(())
}

/// The writing connection, inside a transaction, until the piece of work is kept. Dropped, the work
/// is undone.
#[derive(Debug)]
pub(crate) struct Loan {
    /// None once it is given back.
    lent: Option<(WritingConnection, oneshot::Sender<Returned>)>,
    marks: Arc<Marks>,
    limit: Duration,
}

/// Who waits for the connection.
#[derive(Debug)]
pub(super) struct Borrower {
    pub(super) reply: oneshot::Sender<Result<(Loan, Vec<SqliteRow>)>>,
    /// What the log calls it.
    pub(super) name: String,
    /// What it runs first: in one passage to SQLite's thread with the savepoint.
    pub(super) first: Option<First>,
}

/// A statement with what it is given.
#[derive(Debug)]
pub(super) struct First {
    pub(super) sql: String,
    pub(super) arguments: SqliteArguments,
}

/// A loan that is over.
#[derive(Debug)]
struct Returned {
    writing: WritingConnection,
    /// None: the work is undone.
    kept: Option<Kept>,
}

/// Work that lasts when the transaction does.
#[derive(Debug)]
struct Kept {
    /// The last position it gave in the outbox.
    appended: Option<i64>,
    reply: oneshot::Sender<Result<()>>,
}

impl Loan {
    pub(super) fn connection(&self) -> &SqliteConnection {
        let lent = self.lent.as_ref();
        &lent.expect("a loan that is used is not over").0.connection
    }

    pub(super) fn connection_mut(&mut self) -> &mut SqliteConnection {
        let lent = self.lent.as_mut();
        let lent = lent.expect("a loan that is used is not over");
        &mut lent.0.connection
    }

    /// Keeps the work, and resolves when it is on disk. A dropped future leaves the outcome unknown.
    pub(super) async fn keep(
        mut self,
        operation: &'static str,
        appended: Option<i64>,
    ) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.give_back(Some(Kept { appended, reply }));
        let (marks, limit) = (Arc::clone(&self.marks), self.limit);
        drop(self);
        answer.await.unwrap_or_else(|_| match marks.is_overdue() {
            true => Err(overdue(operation, limit)),
            false => Err(gone(operation)),
        })
    }

    /// Undoes the work, and returns what the file answered last, if that was why it failed. It is
    /// not where the work took too long.
    pub(super) async fn undo(mut self, operation: &'static str) -> Result<()> {
        if self.marks.is_overdue() {
            return Ok(());
        }
        let handle = self.connection_mut().lock_handle().await;
        let last = handle.map(|mut handle| handle.last_error());
        match last {
            Ok(None) => Ok(()),
            Ok(Some(error)) => Err(into_error(operation, sqlx::Error::from(error))),
            Err(error) => Err(into_error(operation, error)),
        }
    }

    fn give_back(&mut self, kept: Option<Kept>) {
        if let Some((writing, back)) = self.lent.take() {
            // The writer has given it up: what was written is undone as it is closed, and whoever
            // waits for the reply hears why.
            let _ = back.send(Returned { writing, kept });
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.give_back(None);
    }
}

fn overdue(operation: &'static str, limit: Duration) -> Error {
    Error::new(
        ErrorKind::Unavailable,
        operation,
        format!(
            "the transaction was open for longer than {limit:?}, so it was given up and nothing is committed: open it later, wait for nobody meanwhile, or raise `transaction_limit`"
        ),
    )
}

/// Who is to have the connection, and whose work is in the transaction.
#[derive(Debug)]
pub(super) struct Lender {
    waiting: VecDeque<Borrower>,
    kept: Vec<Kept>,
    /// Until when each has a commit of its own.
    apart_until: Option<Instant>,
    /// How long one may have it.
    limit: Duration,
    timer: Timer,
    /// Who had one for too long; while the marks last it is not closed, and the file locked.
    late: Option<(Weak<Marks>, String)>,
}

impl Lender {
    pub(super) fn new(limit: Duration, timer: Timer) -> Self {
        Self {
            waiting: VecDeque::new(),
            kept: Vec::new(),
            apart_until: None,
            limit,
            timer,
            late: None,
        }
    }

    /// Takes over those who want to borrow.
    pub(super) fn take_from(&mut self, batch: &mut Vec<Command>) {
        let lends = batch.extract_if(.., |command| matches!(command, Command::Lend(_)));
        self.waiting
            .extend(lends.filter_map(|command| match command {
                Command::Lend(borrower) => Some(borrower),
                _ => None,
            }));
        self.waiting.retain(|borrower| !borrower.reply.is_closed());
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Lends the connection to one after the other, inside the transaction that `before` says, and
    /// to those who come meanwhile; what else comes is put in `others`. False when there is nothing to
    /// commit.
    pub(super) async fn lend(
        &mut self,
        slot: &mut Option<WritingConnection>,
        mut before: Before,
        flushes: &mut Flushes<Command>,
        others: &mut Vec<Command>,
    ) -> Result<bool, Failure> {
        let until = Instant::now() + SHARE;
        while Instant::now() <= until
            && !self.is_full()
            && let Some(mut borrower) = self.next(flushes, others).await
            && let Some(mut writing) = slot.take()
        {
            if matches!(before, Before::RolledBack) {
                *slot = Some(writing);
                self.waiting.push_front(borrower);
                return Err(Failure::ended(rolled_back()));
            }
            let first = borrower.first.take();
            let has_first = first.is_some();
            let begun = before.begin(&mut writing.connection, first).await;
            before = match begun {
                Ok(rows) => {
                    let (writing, ended) = self.lend_one(writing, borrower, rows).await?;
                    *slot = Some(writing);
                    before.after(ended)
                }
                Err(Refusal::OfBorrower(native)) => {
                    *slot = Some(writing);
                    // The borrower is gone, so nobody waits for the answer.
                    let _ = borrower.reply.send(Err(into_error(OPEN, native)));
                    match before {
                        Before::Closed | Before::Spoilt => Before::Closed,
                        _ => Before::Undone,
                    }
                }
                Err(Refusal::OfAll(failure)) if has_first => {
                    *slot = Some(writing);
                    // As above.
                    let _ = borrower.reply.send(Err(failure.error(OPEN)));
                    return Err(failure);
                }
                Err(Refusal::OfAll(failure)) => {
                    *slot = Some(writing);
                    self.waiting.push_front(borrower);
                    return Err(failure);
                }
            };
        }
        match slot {
            Some(writing) => before.end(&mut writing.connection).await,
            None => Ok(true),
        }
    }

    /// Who is next, if anybody is: those whose turn it is to run may be about to ask.
    async fn next(
        &mut self,
        flushes: &mut Flushes<Command>,
        others: &mut Vec<Command>,
    ) -> Option<Borrower> {
        if self.waiting.is_empty() {
            tokio::task::yield_now().await;
            if let Some(flush) = flushes.next(others).now_or_never() {
                flush.done();
                self.take_from(others);
            }
        }
        self.waiting.pop_front()
    }

    /// Whether the next piece of work is to have a commit of its own.
    fn is_full(&self) -> bool {
        let is_apart = self.apart_until.is_some_and(|until| Instant::now() < until);
        is_apart && !self.kept.is_empty()
    }

    /// Why the commit failed. What only a commit checks, such as deferred foreign keys, is broken by
    /// the work that is in it: this crate's own tables have nothing of the kind.
    pub(super) fn commit_failed(&mut self, native: sqlx::Error) -> Failure {
        if self.kept.is_empty() || !is_constraint(&native) {
            return Failure::committing(native);
        }
        self.apart_until = Some(Instant::now() + APART);
        Failure::violated(self.kept.len(), native)
    }

    /// An error has lost the connection.
    async fn lend_one(
        &mut self,
        writing: WritingConnection,
        borrower: Borrower,
        rows: Vec<SqliteRow>,
    ) -> Result<(WritingConnection, Ended), Failure> {
        let (back, returned) = oneshot::channel();
        writing.marks.is_rolled_back.store(false, Ordering::Release);
        writing.marks.is_lent.store(true, Ordering::Release);
        let marks = Arc::clone(&writing.marks);
        let passed = self.timer.after(self.limit);
        // A borrower that is gone drops the loan, and so gives it back.
        let loan = Loan {
            lent: Some((writing, back)),
            marks: Arc::clone(&marks),
            limit: self.limit,
        };
        let _ = borrower.reply.send(Ok((loan, rows)));
        let returned = tokio::select! {
            biased;
            returned = returned => returned.ok(),
            _ = passed => None,
        };
        let Some(Returned { writing, kept }) = returned else {
            marks.is_overdue.store(true, Ordering::Release);
            self.late = Some((Arc::downgrade(&marks), borrower.name));
            self.warn_of_late();
            return Err(Failure::overdue(self.limit));
        };
        writing.marks.is_lent.store(false, Ordering::Release);
        let is_kept = kept.is_some();
        self.kept.extend(kept);
        let ended = match writing.marks.is_rolled_back.load(Ordering::Acquire) {
            true => Ended::RolledBack,
            false if is_kept => Ended::Kept,
            false => Ended::Undone,
        };
        Ok((writing, ended))
    }

    /// How far the outbox goes with what is in the transaction, if that adds to it.
    pub(super) fn appended(&self) -> Option<i64> {
        self.kept.iter().filter_map(|kept| kept.appended).max()
    }

    /// Answers those whose work was in the transaction.
    pub(super) fn answer(&mut self, failure: Option<&Failure>) {
        for kept in self.kept.drain(..) {
            let answer = failure.map_or(Ok(()), |failure| Err(failure.error("commit")));
            // Whoever did the work is gone, so nobody waits for the answer.
            let _ = kept.reply.send(answer);
        }
    }

    /// Says who keeps the file locked, if somebody does who was to have given the connection back.
    pub(super) fn warn_of_late(&self) {
        if let Some((marks, holder)) = &self.late
            && marks.strong_count() > 0
        {
            warn!(%holder, limit = ?self.limit, "a transaction is open for too long: nobody writes to the file until its holder ends or drops it");
        }
    }

    /// Tells those who wait that there is no transaction to be had.
    pub(super) fn refuse(&mut self, failure: &Failure) {
        for borrower in self.waiting.drain(..) {
            // The borrower is gone, so nobody waits for the answer.
            let _ = borrower.reply.send(Err(failure.error(OPEN)));
        }
    }
}

const OPEN: &str = "open transaction";

/// How a piece of work ended.
#[derive(Clone, Copy)]
enum Ended {
    Kept,
    Undone,
    /// The whole transaction is undone, whatever is open now.
    RolledBack,
}

/// What there is before a piece of work. The first of a transaction is undone with it; only those
/// that follow need a savepoint, for which SQLite copies each page that they change.
#[derive(Clone, Copy)]
pub(super) enum Before {
    /// No transaction.
    Closed,
    /// A transaction in which nothing is but work that is to be undone.
    Spoilt,
    /// A transaction with something in it that is kept.
    Open,
    /// Kept work behind a savepoint.
    Kept,
    /// Work behind a savepoint that is to be undone.
    Undone,
    /// The whole transaction is undone, whatever is open now.
    RolledBack,
}

/// Why a piece of work does not begin.
enum Refusal {
    /// What it was to run first failed, and is undone.
    OfBorrower(sqlx::Error),
    /// There is no transaction.
    OfAll(Failure),
}

impl Before {
    /// Begins what the next piece of work is undone with, and runs what is first of it.
    async fn begin(
        self,
        connection: &mut SqliteConnection,
        first: Option<First>,
    ) -> Result<Vec<SqliteRow>, Refusal> {
        let begin = match self {
            Self::Closed => "BEGIN IMMEDIATE",
            Self::Spoilt => "ROLLBACK; BEGIN IMMEDIATE",
            Self::Open => "SAVEPOINT lent",
            Self::Kept => "RELEASE lent; SAVEPOINT lent",
            Self::Undone => "ROLLBACK TO lent",
            Self::RolledBack => return Err(Refusal::OfAll(Failure::ended(rolled_back()))),
        };
        let Some(First { sql, arguments }) = first else {
            let begun = run(connection, begin).await;
            return begun
                .map(|()| Vec::new())
                .map_err(|native| Refusal::OfAll(self.failed(native)));
        };
        // Safe: both are this crate's own.
        let both = AssertSqlSafe(format!("{begin}; {sql}"));
        let query = sqlx::query_with(both, arguments);
        let native = match query.fetch_all(&mut *connection).await {
            Ok(rows) => return Ok(rows),
            Err(native) => native,
        };
        // Where there is nothing to undo, the beginning is what failed.
        match run(connection, self.undone().undo()).await {
            Ok(()) => Err(Refusal::OfBorrower(native)),
            Err(_) => Err(Refusal::OfAll(self.failed(native))),
        }
    }

    fn failed(self, native: sqlx::Error) -> Failure {
        match self {
            Self::Closed | Self::Spoilt | Self::Open => native.into(),
            // The savepoint is gone only with the transaction.
            _ => Failure::ended(native),
        }
    }

    /// What there is when the work that began here has ended.
    fn after(self, ended: Ended) -> Self {
        match (ended, self) {
            (Ended::Kept, Self::Closed | Self::Spoilt) => Self::Open,
            (Ended::Kept, _) => Self::Kept,
            (Ended::Undone, _) => self.undone(),
            (Ended::RolledBack, _) => Self::RolledBack,
        }
    }

    fn undone(self) -> Self {
        match self {
            Self::Closed | Self::Spoilt => Self::Spoilt,
            _ => Self::Undone,
        }
    }

    fn undo(self) -> &'static str {
        match self {
            Self::Spoilt => "ROLLBACK",
            _ => "ROLLBACK TO lent",
        }
    }

    /// Undoes what is to be undone; what is kept needs no more than the commit. False when nothing
    /// is left to commit.
    async fn end(self, connection: &mut SqliteConnection) -> Result<bool, Failure> {
        let ended = match self {
            Self::Closed | Self::Open | Self::Kept => Ok(()),
            Self::Spoilt | Self::Undone => run(connection, self.undo()).await,
            Self::RolledBack => Err(rolled_back()),
        };
        ended.map_err(Failure::ended)?;
        Ok(!matches!(self, Self::Closed | Self::Spoilt))
    }
}

fn rolled_back() -> sqlx::Error {
    sqlx::Error::Protocol("the transaction was rolled back while it was lent".to_owned())
}
