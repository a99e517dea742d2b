//! The one that writes: whatever is to be written joins the next commit.
//!
//! ```text
//!  publish ─┐                  ┌ BEGIN IMMEDIATE · jobs · positions · rows · cursors · COMMIT (fsync)
//!  settle ──┼─▶ [ next flush ] ┤
//!  job ─────┘                  └ then: whoever waits hears of it, whoever reads is woken
//! ```
//!
//! A job that fails is undone alone. When a commit of several fails for a reason that lies in one
//! of them, each is tried alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use eventbus_core::{Clock, Coalescer, Error, ErrorKind, Flushes, Outcome, Result};
use futures_util::future::BoxFuture;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{SqlSafeStr, SqliteConnection};
use tokio::sync::oneshot;
use tracing::trace;

use super::append::Appender;
use super::error::into_error;
use super::headers::Packed;
use super::settle::{self, Advance};
use super::tables::{Tables, execute};
use super::wake::Wakes;

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
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Publish { .. } => "Publish",
            Self::Settle { .. } => "Settle",
            Self::Job(_) => "Job",
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
    pub(super) native: Arc<sqlx::Error>,
    /// The commit itself failed, so that it may be found done after a crash.
    pub(super) committing: bool,
}

impl From<sqlx::Error> for Failure {
    fn from(native: sqlx::Error) -> Self {
        Self {
            native: Arc::new(native),
            committing: false,
        }
    }
}

impl Failure {
    pub(super) fn error(&self, operation: &'static str) -> Error {
        into_error(operation, Arc::clone(&self.native))
    }

    fn outcome(&self) -> Outcome {
        match self.committing {
            true => Outcome::Unknown,
            false => Outcome::NotTaken,
        }
    }

    /// Whether one of several writes may be the reason.
    fn is_of_one(&self) -> bool {
        !self.committing && !self.error("write").is_retryable()
    }
}

fn gone(operation: &'static str) -> Error {
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
    /// None after it broke; the next flush opens another.
    connection: Option<SqliteConnection>,
    options: SqliteConnectOptions,
    tables: Tables,
    appender: Appender,
    wakes: Arc<Wakes>,
    stale: Arc<AtomicU64>,
}

impl WriterTask {
    pub(super) fn new(
        connection: SqliteConnection,
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
        let mut batch = Vec::new();
        loop {
            // The outcome is told to each caller, so the ticket's is not asked for.
            self.flushes.next(&mut batch).await.done();
            let several = batch.len() > 1;
            self.write(std::mem::take(&mut batch)).await;
            if several {
                // Those who were just answered put in what they have next, and it is one commit
                // instead of two.
                tokio::task::yield_now().await;
                tokio::task::yield_now().await;
            }
        }
    }

    /// Commits a batch and answers everybody in it.
    async fn write(&mut self, mut batch: Vec<Command>) {
        match self.commit(&mut batch).await {
            Err(failure) if batch.len() > 1 && failure.is_of_one() => {
                for command in batch {
                    let mut alone = vec![command];
                    let committed = self.commit(&mut alone).await;
                    answer(alone, committed.as_ref().err());
                }
            }
            committed => answer(batch, committed.as_ref().err()),
        }
    }

    async fn commit(&mut self, batch: &mut [Command]) -> Result<(), Failure> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => sqlx::ConnectOptions::connect(&self.options).await?,
        };
        let committed = self.commit_on(&mut connection, batch).await;
        let Err(failure) = committed else {
            self.connection = Some(connection);
            return Ok(());
        };
        self.appender.forget();
        // A connection that cannot roll back, be it because SQLite did so by itself, is given up: the
        // next commit begins with a clean one.
        let rolled_back = execute("write", &mut connection, "ROLLBACK".into_sql_str()).await;
        self.connection = rolled_back.is_ok().then_some(connection);
        Err(failure)
    }

    async fn commit_on(
        &mut self,
        connection: &mut SqliteConnection,
        batch: &mut [Command],
    ) -> Result<(), Failure> {
        let rows = batch.iter().flat_map(Command::rows).collect();
        self.appender.begin(connection, rows).await?;
        for command in &mut *batch {
            if let Command::Job(job) = command {
                run_job(job.as_mut(), connection).await?;
            }
        }
        let advances = batch.iter().flat_map(Command::advances);
        let stale = settle::record(&self.tables, connection, advances).await?;
        self.appender.insert(connection).await?;
        trace!(target: "eventbus::step", step = "sql.commit.before");
        sqlx::query("COMMIT")
            .execute(connection)
            .await
            .map_err(|native| Failure {
                native: Arc::new(native),
                committing: true,
            })?;
        trace!(target: "eventbus::step", step = "sql.commit.after");
        self.stale.fetch_add(stale, Ordering::Relaxed);
        self.wakes.appended(self.appender.committed());
        Ok(())
    }
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
        }
    }
}
