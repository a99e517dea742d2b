//! A service's own database: one SQLite file, opened and brought up to date here, and written in
//! transactions that share their commits. What is written is the business of the services.
//!
//! ```text
//!  handling ─▶ [ work: read, decide, write ] ─▶ commit ─┐
//!  handling ─▶ [ work ] ────────────────────▶ commit ───┼─▶ one COMMIT, one fsync, for all of them
//!  handling ─▶ [ work ] ────────────────────▶ commit ───┘
//! ```
//!
//! One piece of work at a time, as SQLite has it anyway; each is undone alone when it fails or is
//! dropped, and lasts only when its `commit` says so.

use std::fmt;
use std::mem;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use eventbus::prelude::{Context, Event};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions as _, SqliteConnection};
use tokio::sync::{Mutex, MutexGuard, OwnedMutexGuard};
use tracing::trace;

/// How long another process may hold the file's lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Every store remembers what it handled, in which order: for people who ask what happened.
const JOURNAL: &str = "
    CREATE TABLE IF NOT EXISTS handled (
        sequence   INTEGER PRIMARY KEY,
        at         REAL NOT NULL DEFAULT (unixepoch('subsec')),
        key        TEXT NOT NULL,
        event_type TEXT NOT NULL,
        event_id   TEXT NOT NULL
    ) STRICT;
    DELETE FROM handled WHERE at < unixepoch() - 30 * 24 * 60 * 60";

/// An event that a service handled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handled {
    /// The event's key.
    pub key: String,
    /// Its type.
    pub event_type: String,
    /// Its id.
    pub event_id: String,
}

/// What a service handled, in the order in which it was committed.
///
/// # Errors
///
/// When its database cannot be read.
pub async fn journal(data: &Path, service: &str) -> anyhow::Result<Vec<Handled>> {
    let file = data.join(format!("{service}.db"));
    let options = SqliteConnectOptions::new().filename(&file);
    let opened = options.connect().await;
    let mut connection = opened.with_context(|| format!("open {}", file.display()))?;
    let sql = "SELECT key, event_type, event_id FROM handled ORDER BY sequence";
    let rows: Vec<(String, String, String)> =
        sqlx::query_as(sql).fetch_all(&mut connection).await?;
    let rows = rows.into_iter();
    Ok(rows
        .map(|(key, event_type, event_id)| Handled {
            key,
            event_type,
            event_id,
        })
        .collect())
}

/// A service's own database; clones share it.
#[derive(Clone)]
pub struct Store {
    file: Arc<PathBuf>,
    writer: Arc<Mutex<Writer>>,
    /// Sees what is committed, and waits for no commit.
    reader: Arc<Mutex<SqliteConnection>>,
}

/// The one connection that writes.
struct Writer {
    connection: SqliteConnection,
    state: State,
}

/// What the writing connection is in the middle of.
enum State {
    /// No transaction.
    Closed,
    /// A transaction with finished work in it; the savepoint of the last is still there.
    Open(Arc<Transaction>),
    /// A transaction with unfinished work in it.
    Working(Arc<Transaction>),
    /// A statement failed or its future was dropped: nobody knows whether a transaction is open.
    Unsure,
}

/// A transaction that several pieces of work may share.
#[derive(Debug, Default)]
struct Transaction {
    committed: AtomicBool,
}

/// A piece of work in a transaction; a connection by `Deref`. Dropped, it is undone.
pub struct Work {
    store: Store,
    writer: OwnedMutexGuard<Writer>,
}

impl Store {
    /// Opens `<data>/<service>.db` and brings it up to date: each migration runs once.
    ///
    /// # Errors
    ///
    /// When the file is no database, of a later version, or not to be written.
    pub async fn open(
        data: &Path,
        service: &str,
        migrations: &'static [&'static str],
    ) -> anyhow::Result<Self> {
        let file = data.join(format!("{service}.db"));
        let opened = Self::open_file(&file, migrations).await;
        opened
            .with_context(|| format!("open {}, the data of the {service} service", file.display()))
    }

    async fn open_file(file: &Path, migrations: &'static [&'static str]) -> anyhow::Result<Self> {
        let options = SqliteConnectOptions::new()
            .filename(file)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY_TIMEOUT);
        let mut connection = options.connect().await?;
        migrate(&mut connection, migrations).await?;
        let writer = Writer {
            connection,
            state: State::Closed,
        };
        Ok(Self {
            file: Arc::new(file.to_owned()),
            writer: Arc::new(Mutex::new(writer)),
            reader: Arc::new(Mutex::new(options.connect().await?)),
        })
    }

    /// A connection that sees what is committed.
    pub async fn reader(&self) -> MutexGuard<'_, SqliteConnection> {
        self.reader.lock().await
    }

    /// Begins a piece of work.
    ///
    /// # Errors
    ///
    /// When another process holds the file for too long, or it cannot be written.
    pub async fn begin(&self) -> anyhow::Result<Work> {
        let mut writer = Arc::clone(&self.writer).lock_owned().await;
        let begun = writer.begin().await;
        begun.with_context(|| format!("begin a transaction in {}", self.file.display()))?;
        Ok(Work {
            store: self.clone(),
            writer,
        })
    }

    /// Begins the work of handling an event, which is noted in the journal.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    pub async fn handling<E: Event + Sync, S: Send + Sync>(
        &self,
        event: &E,
        cx: &Context<S>,
    ) -> anyhow::Result<Work> {
        let mut work = self.begin().await?;
        let key = event.key().map(|key| key.to_string());
        sqlx::query("INSERT INTO handled (key, event_type, event_id) VALUES (?, ?, ?)")
            .bind(key.unwrap_or_default())
            .bind(E::TYPE)
            .bind(cx.id().to_string())
            .execute(&mut *work)
            .await?;
        Ok(work)
    }
}

impl Work {
    /// Makes it last, together with whatever else was finished meanwhile.
    ///
    /// # Errors
    ///
    /// When it may not have lasted: to do it again must be harmless.
    pub async fn commit(mut self) -> anyhow::Result<()> {
        let finished = self.writer.finish()?;
        // The lock is fair: whoever waits for it works first, and one commit serves all of them.
        drop(self.writer);
        let mut writer = self.store.writer.lock().await;
        let committed = writer.commit(&finished).await;
        committed.with_context(|| format!("commit to {}", self.store.file.display()))
    }
}

impl Writer {
    /// Opens a transaction, or joins the one that is open.
    async fn begin(&mut self) -> anyhow::Result<()> {
        let (begin, transaction) = match mem::replace(&mut self.state, State::Unsure) {
            State::Closed => ("BEGIN IMMEDIATE; SAVEPOINT work", Arc::default()),
            State::Open(transaction) => ("RELEASE work; SAVEPOINT work", transaction),
            // Its work was dropped: undone, the savepoint is there to be used again.
            State::Working(transaction) => ("ROLLBACK TO work", transaction),
            State::Unsure => {
                // An error means that no transaction was open, which is as good.
                let _ = self.run("ROLLBACK").await;
                ("BEGIN IMMEDIATE; SAVEPOINT work", Arc::default())
            }
        };
        self.run(begin).await?;
        self.state = State::Working(transaction);
        Ok(())
    }

    /// Ends a piece of work; it does not last yet.
    fn finish(&mut self) -> anyhow::Result<Arc<Transaction>> {
        let State::Working(transaction) = mem::replace(&mut self.state, State::Unsure) else {
            anyhow::bail!("the transaction is not open any more");
        };
        self.state = State::Open(Arc::clone(&transaction));
        Ok(transaction)
    }

    /// Commits the transaction, unless somebody did.
    async fn commit(&mut self, transaction: &Arc<Transaction>) -> anyhow::Result<()> {
        let commit = match &self.state {
            State::Open(open) if Arc::ptr_eq(open, transaction) => "COMMIT",
            State::Working(open) if Arc::ptr_eq(open, transaction) => "ROLLBACK TO work; COMMIT",
            _ => {
                let committed = transaction.committed.load(Ordering::Acquire);
                ensure!(committed, "the transaction that it shared was given up");
                return Ok(());
            }
        };
        self.state = State::Unsure;
        trace!(target: "eventbus::step", step = "store.commit.before");
        self.run(commit).await?;
        trace!(target: "eventbus::step", step = "store.commit.after");
        transaction.committed.store(true, Ordering::Release);
        self.state = State::Closed;
        Ok(())
    }

    async fn run(&mut self, sql: &'static str) -> sqlx::Result<()> {
        sqlx::raw_sql(sql).execute(&mut self.connection).await?;
        Ok(())
    }
}

/// Runs the migrations that have not run yet; the file itself says how many have.
async fn migrate(
    connection: &mut SqliteConnection,
    migrations: &'static [&'static str],
) -> anyhow::Result<()> {
    sqlx::raw_sql("BEGIN IMMEDIATE")
        .execute(&mut *connection)
        .await?;
    let version: u32 = sqlx::query_scalar("PRAGMA user_version")
        .fetch_one(&mut *connection)
        .await?;
    let version = version as usize;
    ensure!(
        version <= migrations.len(),
        "it is of version {version}, which this program does not know: run the program that wrote it"
    );
    sqlx::raw_sql(JOURNAL).execute(&mut *connection).await?;
    for migration in &migrations[version..] {
        sqlx::raw_sql(*migration).execute(&mut *connection).await?;
    }
    // A pragma takes no parameters; a number is safe to write out.
    let version = AssertSqlSafe(format!("PRAGMA user_version = {}", migrations.len()));
    sqlx::raw_sql(version).execute(&mut *connection).await?;
    sqlx::raw_sql("COMMIT").execute(connection).await?;
    Ok(())
}

impl Deref for Work {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.writer.connection
    }
}

impl DerefMut for Work {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.writer.connection
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.file).finish()
    }
}

#[cfg(test)]
mod tests;
