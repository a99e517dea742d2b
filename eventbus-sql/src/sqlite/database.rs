//! One file as this process has it open: its writer, its connections for reading, what is known of
//! its topics. All handles of a runtime on one file share it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use eventbus_core::log::{self, Advance, Log, Page, Place, TopicLanes, Topics, Wanted};
use eventbus_core::{Error, ErrorKind, Lease, MemberId, Position, Result, Timestamp, Topic};
use futures_util::FutureExt;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{ConnectOptions, SqlStr, SqliteConnection, SqlitePool};
use tokio::runtime::{Handle, Id};
use tokio::sync::{Notify, OnceCell};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use super::config::SqliteConfig;
use super::error::into_error;
use super::janitor;
use super::leases::{self, LANES};
use super::lending::{Lender, WritingConnection};
use super::readers::Readers;
use super::tables::Tables;
use super::timer::Timer;
use super::wake;
use super::writer::{Writer, WriterTask};

use crate::wakes::Wakes;

/// Connections that read at the same time: the SDK's own, and as many of a service.
const READERS_MAX: u32 = 4;
/// Rows that a connection reads ahead of who takes them, so that reading goes on meanwhile.
const ROWS_AHEAD: usize = 1024;
/// Of a file that is created: fewer writes for batches than 4096, and still little for a single row.
const PAGE_BYTES: u32 = 8192;
/// Pages of the write-ahead log after which it is written back.
const CHECKPOINT_PAGES: &str = "2000";
/// What is left of the write-ahead log when it was written back.
const LOG_BYTES_KEPT: &str = "67108864";
const RETRY_PAUSE: Duration = Duration::from_millis(5);

/// Which database two handles share.
type Key = (PathBuf, String, Id);
type Cell = OnceCell<Database>;

static OPEN: Mutex<Option<HashMap<Key, Weak<Cell>>>> = Mutex::new(None);

/// A share of an open database.
#[derive(Clone, Debug)]
pub(super) struct Shared(Arc<Cell>);

impl std::ops::Deref for Shared {
    type Target = Database;

    fn deref(&self) -> &Database {
        self.0.get().expect("a share is made of an open database")
    }
}

impl Shared {
    /// The database at the configured path, opened if this runtime has not done so yet.
    pub(super) async fn open(config: &SqliteConfig) -> Result<Self> {
        let path = config.canonical_path()?;
        let tables = Tables::new(&config.prefix)?;
        // Tasks of a runtime end with it, so another runtime opens the file for itself, as another
        // process would.
        let key = (path, config.prefix.clone(), Handle::current().id());
        let cell = cell(&key);
        let open = Database::open(&key.0, config, tables, Arc::downgrade(&cell)).boxed();
        let database = cell.get_or_try_init(|| open).await?;
        if !database.config.is_like(config) {
            return Err(Error::new(
                ErrorKind::Conflict,
                "open database",
                "this process has the file open with other options: use the same ones",
            )
            .with("path", config.path.display()));
        }
        Ok(Self(Arc::clone(&cell)))
    }

    /// The database, while somebody else holds it.
    pub(super) fn upgrade(cell: &Weak<Cell>) -> Option<Self> {
        cell.upgrade().filter(|cell| cell.initialized()).map(Self)
    }
}

impl Log for Shared {
    // SQLite's thread answers one after the other.
    const PAGES_MAX: usize = 1;

    fn wakes(&self) -> &log::Wakes {
        &self.wakes
    }

    async fn read_pages(&self, wanted: &[Wanted]) -> Result<Vec<Page>> {
        let mut pages = Vec::with_capacity(wanted.len());
        for wanted in wanted {
            pages.push(self.read_page(wanted).await?);
        }
        Ok(pages)
    }

    async fn ends_at(&self, lanes: &[u32], time: Timestamp) -> Result<Vec<Position>> {
        while self.now() < time {
            sleep(time.since(self.now())).await;
        }
        let mut ends = Vec::with_capacity(lanes.len());
        for lane in lanes {
            ends.push(self.first_at_or_after(*lane, time).await?.into());
        }
        Ok(ends)
    }

    async fn open_places(
        &self,
        group: i64,
        leases: &[Lease],
        notify: &Arc<Notify>,
    ) -> Result<Vec<Place>> {
        self.granted_places(group, leases, notify).await
    }

    async fn settle(&self, advances: Vec<Advance>) -> Result<()> {
        self.writer.settle(advances).await
    }

    fn count_stale(&self, settlements: u64) {
        self.stale.fetch_add(settlements, Ordering::Relaxed);
    }

    async fn leave(&self, group: i64, member: MemberId) -> Result<()> {
        leases::leave(self, &LANES, group, member).await
    }
}

fn cell(key: &Key) -> Arc<Cell> {
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let open = open.get_or_insert_default();
    open.retain(|_, cell| cell.strong_count() > 0);
    if let Some(cell) = open.get(key).and_then(Weak::upgrade) {
        return cell;
    }
    let cell = Arc::new(Cell::new());
    open.insert(key.clone(), Arc::downgrade(&cell));
    cell
}

/// An open database.
#[derive(Debug)]
pub(super) struct Database {
    pub(super) config: SqliteConfig,
    pub(super) tables: Tables,
    pub(super) writer: Writer,
    pub(super) wakes: Arc<Wakes>,
    /// Of the SDK's own: duplicate checks, the relay and the schedule never wait for a service's.
    own_readers: Readers,
    pub(super) readers: SqlitePool,
    topics: Mutex<Topics>,
    /// Settlements that were ignored because their epoch was over.
    stale: Arc<AtomicU64>,
    tasks: Vec<AbortHandle>,
}

impl Drop for Database {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Database {
    async fn open(
        path: &Path,
        config: &SqliteConfig,
        tables: Tables,
        cell: Weak<Cell>,
    ) -> Result<Self> {
        let limit = config.checked_transaction_limit()?;
        let options = options(path, config);
        let connection = open_patiently(&options, &tables, config.busy_timeout)
            .await
            .map_err(|error| error.with("path", path.display()))?;
        let reading = options.clone().pragma("query_only", "ON");
        let own_readers = Readers::new(reading.clone(), READERS_MAX as usize);
        let readers = readers(reading);
        let wakes = Arc::new(Wakes::default());
        let stale = Arc::new(AtomicU64::new(0));
        let timer = Timer::start().map_err(|error| thread_failed(path, error))?;
        let guarded = WritingConnection::guard(connection).await;
        let (writer, task) = WriterTask::new(
            guarded.map_err(|error| into_error("open database", error))?,
            Lender::new(limit, timer),
            options.clone(),
            tables.clone(),
            Arc::clone(&config.clock),
            Arc::clone(&wakes),
            Arc::clone(&stale),
        );
        let tasks = vec![
            tokio::spawn(task.run()).abort_handle(),
            tokio::spawn(wake::watch(Arc::clone(&wakes), options, tables.clone())).abort_handle(),
            tokio::spawn(janitor::run(cell, config.retention_interval)).abort_handle(),
        ];
        Ok(Self {
            config: config.clone(),
            tables,
            writer,
            wakes,
            own_readers,
            readers,
            topics: Mutex::new(Topics::default()),
            stale,
            tasks,
        })
    }

    /// Runs one statement that only reads.
    pub(super) async fn read<'q>(
        &self,
        operation: &'static str,
        query: sqlx::query::Query<'q, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>,
    ) -> Result<Vec<SqliteRow>> {
        let rows = self.own_readers.fetch_all(query).await;
        rows.map_err(|error| self.error(operation, error))
    }

    /// Runs one statement that only reads, for its first row.
    pub(super) async fn read_first<'q>(
        &self,
        operation: &'static str,
        query: sqlx::query::Query<'q, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>,
    ) -> Result<Option<SqliteRow>> {
        let row = self.own_readers.fetch_first(query).await;
        row.map_err(|error| self.error(operation, error))
    }

    pub(super) fn sql(&self, text: &str) -> SqlStr {
        self.tables.sql(text)
    }

    pub(super) fn error(&self, operation: &'static str, native: sqlx::Error) -> Error {
        into_error(operation, native).with("path", self.config.path.display())
    }

    pub(super) fn topics(&self) -> MutexGuard<'_, Topics> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn now(&self) -> Timestamp {
        self.config.clock.now()
    }

    pub(super) fn stale(&self) -> u64 {
        self.stale.load(Ordering::Relaxed)
    }

    /// Where a name stands that was looked up before.
    pub(super) fn known_topic(&self, name: &Topic) -> Option<Arc<TopicLanes>> {
        self.topics().get(name)
    }
}

fn thread_failed(path: &Path, error: std::io::Error) -> Error {
    let message = "the system starts no more threads for this process: raise its limit";
    Error::new(ErrorKind::Unavailable, "open database", message)
        .with("path", path.display())
        .with_source(error)
}

fn options(path: &Path, config: &SqliteConfig) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .page_size(PAGE_BYTES)
        .busy_timeout(config.busy_timeout)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("wal_autocheckpoint", CHECKPOINT_PAGES)
        .pragma("journal_size_limit", LOG_BYTES_KEPT)
        .statement_cache_capacity(256)
        .row_buffer_size(ROWS_AHEAD)
        .disable_statement_logging()
}

/// Connections that are opened when they are needed.
fn readers(options: SqliteConnectOptions) -> SqlitePool {
    SqlitePoolOptions::new()
        .max_connections(READERS_MAX)
        .test_before_acquire(false)
        .connect_lazy_with(options)
}

pub(super) async fn connect(options: &SqliteConnectOptions) -> Result<SqliteConnection> {
    let connected = options.connect().await;
    connected.map_err(|error| into_error("open database", error))
}

/// Opens again while another process holds the file: changing the journal mode does not wait.
async fn open_patiently(
    options: &SqliteConnectOptions,
    tables: &Tables,
    limit: Duration,
) -> Result<SqliteConnection> {
    let deadline = Instant::now() + limit;
    loop {
        match open_once(options, tables).await {
            Err(error) if error.is_retryable() && Instant::now() < deadline => {
                sleep(RETRY_PAUSE).await;
            }
            opened => return opened,
        }
    }
}

async fn open_once(options: &SqliteConnectOptions, tables: &Tables) -> Result<SqliteConnection> {
    let mut connection = connect(options).await?;
    tables.migrate(&mut connection).await?;
    Ok(connection)
}
