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

use eventbus_core::{Error, ErrorKind, Result};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection, SqliteConnection};
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
pub(super) struct Loan {
    /// None once it is given back.
    lent: Option<(WritingConnection, oneshot::Sender<Returned>)>,
    marks: Arc<Marks>,
    limit: Duration,
}

/// Who waits for the connection.
#[derive(Debug)]
pub(super) struct Borrower {
    pub(super) reply: oneshot::Sender<Result<Loan>>,
    /// What the log calls it.
    pub(super) name: String,
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

    /// Lends the connection to one after the other, inside the transaction that is open.
    pub(super) async fn lend(
        &mut self,
        slot: &mut Option<WritingConnection>,
    ) -> Result<(), Failure> {
        let until = Instant::now() + SHARE;
        let mut before = Before::Nothing;
        while Instant::now() <= until
            && !self.is_full()
            && let Some(borrower) = self.waiting.pop_front()
            && let Some(mut writing) = slot.take()
        {
            if let Err(failure) = before.begin(&mut writing.connection).await {
                *slot = Some(writing);
                self.waiting.push_front(borrower);
                return Err(failure);
            }
            let (writing, ended) = self.lend_one(writing, borrower).await?;
            *slot = Some(writing);
            before = ended;
        }
        match slot {
            Some(writing) => before.end(&mut writing.connection).await,
            None => Ok(()),
        }
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
    ) -> Result<(WritingConnection, Before), Failure> {
        let (back, returned) = oneshot::channel();
        writing.marks.is_rolled_back.store(false, Ordering::Release);
        writing.marks.is_lent.store(true, Ordering::Release);
        let marks = Arc::clone(&writing.marks);
        let passed = self.timer.after(self.limit);
        // A borrower that is gone drops the loan, and so gives it back.
        let _ = borrower.reply.send(Ok(Loan {
            lent: Some((writing, back)),
            marks: Arc::clone(&marks),
            limit: self.limit,
        }));
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
            true => Before::RolledBack,
            false if is_kept => Before::Kept,
            false => Before::Undone,
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
            let _ = borrower.reply.send(Err(failure.error("open transaction")));
        }
    }
}

/// How the piece of work before ended.
#[derive(Clone, Copy)]
enum Before {
    /// There was none.
    Nothing,
    Kept,
    Undone,
    /// The whole transaction was, whatever is open now.
    RolledBack,
}

impl Before {
    /// Sets the savepoint to which the next piece of work is undone.
    async fn begin(self, connection: &mut SqliteConnection) -> Result<(), Failure> {
        let begun = match self {
            Self::Nothing => return Ok(run(connection, "SAVEPOINT lent").await?),
            Self::Kept => run(connection, "RELEASE lent; SAVEPOINT lent").await,
            Self::Undone => run(connection, "ROLLBACK TO lent").await,
            Self::RolledBack => Err(rolled_back()),
        };
        // The savepoint is gone only with the transaction.
        begun.map_err(Failure::ended)
    }

    async fn end(self, connection: &mut SqliteConnection) -> Result<(), Failure> {
        let ended = match self {
            Self::Nothing => Ok(()),
            Self::Kept => run(connection, "RELEASE lent").await,
            Self::Undone => run(connection, "ROLLBACK TO lent").await,
            Self::RolledBack => Err(rolled_back()),
        };
        ended.map_err(Failure::ended)
    }
}

fn rolled_back() -> sqlx::Error {
    sqlx::Error::Protocol("the transaction was rolled back while it was lent".to_owned())
}
