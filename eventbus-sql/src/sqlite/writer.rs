//! The one that writes: whatever is to be written joins the next commit.
//!
//! ```text
//!  publish ─┐                  ┌ BEGIN IMMEDIATE · jobs · positions · rows · cursors · COMMIT (fsync)
//!  settle ──┼─▶ [ next flush ] ┤
//!  job ─────┤                  └ then: whoever waits hears of it, whoever reads is woken
//!  borrow ──┘
//! ```
//!
//! A job that fails is undone alone. When a commit of several fails for a reason that lies in one
//! of them, each is tried alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use eventbus_core::log::Advance;
use eventbus_core::{Clock, Coalescer, Error, ErrorKind, Flushes, Outcome, Result};
use futures_util::{FutureExt, future::BoxFuture};
use sqlx::SqliteConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteRow};
use tokio::sync::oneshot;
use tracing::{trace, warn};

use super::append::Appender;
use super::error::into_error;
use super::headers::Packed;
use super::lending::{Before, Borrower, First, Lender, Loan, WritingConnection, run};
use super::settle;
use super::tables::Tables;
use crate::wakes::Wakes;

/// Hands writes to the task that writes them.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    commands: Coalescer<Command>,
}

/// Why a publish was not acknowledged.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) error: Error,
    pub(super) outcome: Outcome,
}

/// One thing to write.
pub(super) enum Command {
    Publish {
        rows: Vec<Packed>,
        reply: oneshot::Sender<Result<(), Refused>>,
    },
    Settle {
        advances: Vec<Advance>,
        reply: oneshot::Sender<Result<()>>,
    },
    Job(Box<dyn Job>),
    /// A piece of work that has the connection for itself meanwhile.
    Lend(Borrower),
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Publish { .. } => "Publish",
            Self::Settle { .. } => "Settle",
            Self::Job(_) => "Job",
            Self::Lend(_) => "Lend",
        })
    }
}

/// What runs inside the commit.
pub(super) trait Job: Send + Sync {
    /// Runs; may be run again when the commit failed.
    fn run<'j>(&'j mut self, connection: &'j mut SqliteConnection) -> BoxFuture<'j, Ran>;

    /// Answers whoever waits.
    fn finish(self: Box<Self>, failure: Option<&Failure>);
}

/// How a job went.
pub(super) enum Ran {
    /// Its writes stay.
    Done,
    /// Its writes are undone; the commit goes on.
    Undone,
}

/// Why a commit failed.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    native: Arc<sqlx::Error>,
    stage: Stage,
}

/// Where a commit failed.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Writing,
    /// Somebody who had borrowed the connection ended the transaction, or SQLite did after an error.
    Lent,
    /// Somebody who had borrowed the connection did not give it back in this time.
    Overdue(Duration),
    /// What the only one, or one of several, that had borrowed the connection wrote must not be
    /// committed.
    Violated {
        is_shared: bool,
    },
    /// The commit itself failed, so that it may be found done after a crash.
    Committing,
}

impl From<sqlx::Error> for Failure {
    fn from(native: sqlx::Error) -> Self {
        Self::at(Stage::Writing, native)
    }
}

impl Failure {
    fn at(stage: Stage, native: sqlx::Error) -> Self {
        Self {
            native: Arc::new(native),
            stage,
        }
    }

    pub(super) fn ended(native: sqlx::Error) -> Self {
        Self::at(Stage::Lent, native)
    }

    pub(super) fn overdue(limit: Duration) -> Self {
        Self::at(Stage::Overdue(limit), sqlx::Error::WorkerCrashed)
    }

    pub(super) fn committing(native: sqlx::Error) -> Self {
        Self::at(Stage::Committing, native)
    }

    pub(super) fn violated(borrowers: usize, native: sqlx::Error) -> Self {
        let is_shared = borrowers > 1;
        Self::at(Stage::Violated { is_shared }, native)
    }

    pub(super) fn error(&self, operation: &'static str) -> Error {
        let native = Arc::clone(&self.native);
        let message = match self.stage {
            Stage::Writing | Stage::Committing => return into_error(operation, native),
            Stage::Violated { is_shared: false } => {
                let message = "what was written breaks a constraint that is checked when it is committed, such as a deferred foreign key: nothing was committed";
                return Error::new(ErrorKind::InvalidInput, operation, message).with_source(native);
            }
            Stage::Violated { is_shared: true } => "what one of several pieces of work in the same transaction wrote breaks a constraint that is checked when it is committed, such as a deferred foreign key: do this one again, it will have a transaction of its own".to_owned(),
            Stage::Lent => "another piece of work in the same transaction ended it, or SQLite did after an error: do this one again, and run no COMMIT and no ROLLBACK in a handler".to_owned(),
            Stage::Overdue(limit) => format!("another piece of work in the same transaction did not end within {limit:?}, so all of it was given up: open transactions late in handlers and requests, and let nothing keep a context or a transaction; or raise `transaction_limit`"),
        };
        Error::new(ErrorKind::Unavailable, operation, message).with_source(native)
    }

    fn outcome(&self) -> Outcome {
        match self.stage {
            Stage::Committing => Outcome::Unknown,
            _ => Outcome::NotTaken,
        }
    }

    /// Whether one of several writes may be the reason.
    fn is_of_one(&self) -> bool {
        matches!(self.stage, Stage::Writing) && !self.error("write").is_retryable()
    }

    /// Whether a piece of work that had borrowed the connection is the reason.
    fn is_of_borrower(&self) -> bool {
        matches!(
            self.stage,
            Stage::Lent | Stage::Overdue(_) | Stage::Violated { .. }
        )
    }
}

pub(super) fn gone(operation: &'static str) -> Error {
    Error::new(
        ErrorKind::Closed,
        operation,
        "the database was closed: connect again",
    )
}

impl Writer {
    /// Takes messages durably.
    pub(super) async fn publish(&self, rows: Vec<Packed>) -> Result<(), Refused> {
        let (reply, answer) = oneshot::channel();
        self.commands.add(Command::Publish { rows, reply });
        answer.await.unwrap_or_else(|_| {
            Err(Refused {
                error: gone("publish"),
                outcome: Outcome::Unknown,
            })
        })
    }

    /// Records how far groups are.
    pub(super) async fn settle(&self, advances: Vec<Advance>) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.commands.add(Command::Settle { advances, reply });
        answer.await.unwrap_or_else(|_| Err(gone("settle")))
    }

    /// Waits for a turn to write in a transaction that commits soon afterwards.
    ///
    /// A dropped future gives the turn up.
    pub(super) async fn borrow(&self, operation: &'static str, name: String) -> Result<Loan> {
        let (loan, _) = self.borrow_for(operation, name, None).await?;
        Ok(loan)
    }

    /// As [`borrow`](Self::borrow), and runs a statement first; returns its rows, too.
    pub(super) async fn borrow_for(
        &self,
        operation: &'static str,
        name: String,
        first: Option<First>,
    ) -> Result<(Loan, Vec<SqliteRow>)> {
        let (reply, answer) = oneshot::channel();
        let borrower = Borrower { reply, name, first };
        self.commands.add(Command::Lend(borrower));
        answer.await.unwrap_or_else(|_| Err(gone(operation)))
    }

    /// Runs `work` inside the next commit and answers when that is on disk.
    ///
    /// An error of `work` undoes what it wrote, and nothing else.
    pub(super) async fn run<T, F>(&self, operation: &'static str, work: F) -> Result<T>
    where
        T: Send + Sync + 'static,
        F: for<'c> Fn(&'c mut SqliteConnection) -> BoxFuture<'c, Result<T>> + Send + Sync + 'static,
    {
        let (reply, answer) = oneshot::channel();
        self.commands.add(Command::Job(Box::new(Work {
            operation,
            work,
            result: None,
            reply,
        })));
        answer.await.unwrap_or_else(|_| Err(gone(operation)))
    }
}

struct Work<T, F> {
    operation: &'static str,
    work: F,
    result: Option<Result<T>>,
    reply: oneshot::Sender<Result<T>>,
}

impl<T, F> Job for Work<T, F>
where
    T: Send + Sync,
    F: for<'c> Fn(&'c mut SqliteConnection) -> BoxFuture<'c, Result<T>> + Send + Sync,
{
    fn run<'j>(&'j mut self, connection: &'j mut SqliteConnection) -> BoxFuture<'j, Ran> {
        Box::pin(async move {
            let result = (self.work)(connection).await;
            let ran = match result {
                Ok(_) => Ran::Done,
                Err(_) => Ran::Undone,
            };
            self.result = Some(result);
            ran
        })
    }

    fn finish(self: Box<Self>, failure: Option<&Failure>) {
        let answer = match (failure, self.result) {
            // Undone before the commit failed: its own reason says more.
            (_, Some(Err(error))) => Err(error),
            (None, Some(done)) => done,
            (Some(failure), _) => Err(failure.error(self.operation)),
            (None, None) => Err(gone(self.operation)),
        };
        // Whoever asked is gone, so nobody waits for the answer.
        let _ = self.reply.send(answer);
    }
}

/// The task behind [`Writer`].
#[derive(Debug)]
pub(super) struct WriterTask {
    flushes: Flushes<Command>,
    /// None after it broke or was not given back; the next flush opens another.
    connection: Option<WritingConnection>,
    lender: Lender,
    /// What came while the connection was lent: for the next commit.
    came: Vec<Command>,
    options: SqliteConnectOptions,
    tables: Tables,
    appender: Appender,
    wakes: Arc<Wakes>,
    stale: Arc<AtomicU64>,
}

impl WriterTask {
    pub(super) fn new(
        connection: WritingConnection,
        lender: Lender,
        options: SqliteConnectOptions,
        tables: Tables,
        clock: Arc<dyn Clock>,
        wakes: Arc<Wakes>,
        stale: Arc<AtomicU64>,
    ) -> (Writer, Self) {
        let (commands, flushes) = Coalescer::new();
        let task = Self {
            flushes,
            connection: Some(connection),
            lender,
            came: Vec::new(),
            options,
            appender: Appender::new(tables.clone(), clock),
            tables,
            wakes,
            stale,
        };
        (Writer { commands }, task)
    }

    /// Writes until it is aborted with its database.
    pub(super) async fn run(mut self) {
        loop {
            let mut batch = std::mem::take(&mut self.came);
            self.next(&mut batch).await;
            self.lender.take_from(&mut batch);
            let waiting = batch.len() + self.lender.waiting();
            if waiting == 0 {
                continue;
            }
            self.write(batch).await;
            if waiting > 1 {
                // Those who were just answered put in what they have next, and it is one commit
                // instead of two.
                tokio::task::yield_now().await;
                tokio::task::yield_now().await;
            }
        }
    }

    /// Waits for something to write; what has come joins what waits already.
    async fn next(&mut self, batch: &mut Vec<Command>) {
        // The outcome is told to each caller, so the ticket's is not asked for.
        if batch.is_empty() && self.lender.waiting() == 0 {
            self.flushes.next(batch).await.done();
        } else if let Some(flush) = self.flushes.next(batch).now_or_never() {
            flush.done();
        }
    }

    /// Commits a batch and answers everybody in it.
    async fn write(&mut self, mut batch: Vec<Command>) {
        match self.commit(&mut batch, Borrowers::Served).await {
            Ok(()) => answer(batch, None),
            Err(failure) if failure.is_of_borrower() => {
                warn!(error = %failure.error("commit"), "a transaction was given up");
                if !batch.is_empty() {
                    let committed = self.commit(&mut batch, Borrowers::Waiting).await;
                    answer(batch, committed.as_ref().err());
                }
            }
            Err(failure) if !batch.is_empty() && failure.is_of_one() => {
                for command in batch {
                    let mut alone = vec![command];
                    let committed = self.commit(&mut alone, Borrowers::Waiting).await;
                    answer(alone, committed.as_ref().err());
                }
            }
            Err(failure) => {
                self.lender.warn_of_late();
                self.lender.refuse(&failure);
                answer(batch, Some(&failure));
            }
        }
    }

    /// Commits what there is, and answers those who borrowed the connection.
    async fn commit(&mut self, batch: &mut [Command], borrowers: Borrowers) -> Result<(), Failure> {
        let committed = self.commit_all(batch, borrowers).await;
        let failure = committed.as_ref().err();
        // The relay hears of it before those who committed go on, so that tests which wait until
        // these are done find it at work.
        if let Some(appended) = self.lender.appended()
            && failure.is_none()
        {
            self.wakes.outbox_reaches(appended);
        }
        self.lender.answer(failure);
        if failure.is_some() {
            self.appender.forget();
            self.roll_back().await;
        }
        committed
    }

    async fn roll_back(&mut self) {
        // A connection that cannot roll back, be it because SQLite did so by itself, is given up: the
        // next commit begins with a clean one.
        if let Some(writing) = &mut self.connection
            && run(&mut writing.connection, "ROLLBACK").await.is_err()
        {
            self.connection = None;
        }
    }

    async fn commit_all(
        &mut self,
        batch: &mut [Command],
        borrowers: Borrowers,
    ) -> Result<(), Failure> {
        let slot = &mut self.connection;
        let writing = match slot {
            Some(writing) => writing,
            None => slot.insert(WritingConnection::open(&self.options).await?),
        };
        let connection = &mut writing.connection;
        let is_served = borrowers == Borrowers::Served;
        let (mut before, mut stale) = (Before::Closed, 0);
        if !batch.is_empty() || !is_served {
            let rows = batch.iter().flat_map(Command::rows).collect();
            self.appender.begin(connection, rows).await?;
            for command in &mut *batch {
                if let Command::Job(job) = command {
                    run_job(job.as_mut(), connection).await?;
                }
            }
            let advances = batch.iter().flat_map(Command::advances);
            stale = settle::record(&self.tables, connection, advances).await?;
            self.appender.insert(connection).await?;
            before = Before::Open;
        }
        if is_served {
            let Self {
                lender,
                came,
                flushes,
                ..
            } = self;
            if !lender.lend(slot, before, flushes, came).await? {
                return Ok(());
            }
        }
        trace!(target: "eventbus::step", step = "sql.commit.before");
        let Some(writing) = slot else {
            return Err(sqlx::Error::WorkerCrashed.into());
        };
        let committed = run(&mut writing.connection, "COMMIT").await;
        committed.map_err(|native| self.lender.commit_failed(native))?;
        trace!(target: "eventbus::step", step = "sql.commit.after");
        self.stale.fetch_add(stale, Ordering::Relaxed);
        self.wakes.appended(self.appender.committed());
        Ok(())
    }
}

/// What becomes of those who wait for the connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Borrowers {
    /// They get it, one after the other.
    Served,
    /// They wait for the next commit.
    Waiting,
}

impl Command {
    fn rows(&self) -> &[Packed] {
        match self {
            Self::Publish { rows, .. } => rows,
            _ => &[],
        }
    }

    fn advances(&self) -> &[Advance] {
        match self {
            Self::Settle { advances, .. } => advances,
            _ => &[],
        }
    }
}

/// Runs a job so that its failure leaves no trace.
async fn run_job(job: &mut dyn Job, connection: &mut SqliteConnection) -> Result<(), Failure> {
    sqlx::query("SAVEPOINT job")
        .execute(&mut *connection)
        .await?;
    let end = match job.run(connection).await {
        Ran::Done => "RELEASE job",
        Ran::Undone => "ROLLBACK TO job; RELEASE job",
    };
    // Fails when SQLite has rolled back the whole transaction, and then so does the commit.
    sqlx::raw_sql(end).execute(connection).await?;
    Ok(())
}

fn answer(batch: Vec<Command>, failure: Option<&Failure>) {
    for command in batch {
        match command {
            Command::Publish { reply, .. } => {
                let answer = failure.map_or(Ok(()), |failure| {
                    Err(Refused {
                        error: failure.error("publish"),
                        outcome: failure.outcome(),
                    })
                });
                // The publisher is gone, so nobody waits for the answer.
                let _ = reply.send(answer);
            }
            Command::Settle { reply, .. } => {
                let answer = failure.map_or(Ok(()), |failure| Err(failure.error("settle")));
                // The member is gone, so nobody waits for the answer.
                let _ = reply.send(answer);
            }
            Command::Job(job) => job.finish(failure),
            // Their turn has not come; the lender answers them.
            Command::Lend(_) => {}
        }
    }
}
