//! A database as one client has it open: its connections, its writers, what is known of its topics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use eventbus_core::log::{self, Advance, Log, Page, Place, TopicLanes, Topics, Wanted};
use eventbus_core::{Error, ErrorKind, Lease, MemberId, Position, Result, Timestamp, Topic};
use sqlx::Row;
use sqlx::postgres::PgRow;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::config::PostgresConfig;
use super::error::into_error;
use super::janitor;
use super::leases;
use super::lending::Lending;
use super::session::{PgQuery, Session, Sessions, column, try_connect};
use super::settle::Settler;
use super::tables::Tables;
use super::wake::{self, Bell};
use super::writer::Writer;

use crate::wakes::Wakes;

/// The oldest version that has what the broker asks for.
const VERSION_MIN: i32 = 130_000;

/// A share of an open database.
#[derive(Clone, Debug)]
pub(super) struct Shared(Arc<Database>);

impl std::ops::Deref for Shared {
    type Target = Database;

    fn deref(&self) -> &Database {
        &self.0
    }
}

/// An open database.
#[derive(Debug)]
pub(super) struct Database {
    pub(super) config: PostgresConfig,
    pub(super) tables: Tables,
    pub(super) writer: Writer,
    settler: Settler,
    pub(super) wakes: Arc<Wakes>,
    pub(super) bell: Arc<Bell>,
    sessions: Sessions,
    /// The connections that are lent; so those who hold them keep none of the client's own waiting.
    pub(super) lending: Lending,
    topics: Mutex<Topics>,
    /// Settlements that were ignored because their epoch was over.
    stale: Arc<AtomicU64>,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Drop for Database {
    fn drop(&mut self) {
        let tasks = self.tasks.get_mut().unwrap_or_else(PoisonError::into_inner);
        for task in tasks {
            task.abort();
        }
    }
}

impl Shared {
    /// Connects, and creates the tables or brings them up to date.
    pub(super) async fn open(config: &PostgresConfig) -> Result<Self> {
        let tables = Tables::new(&config.schema)?;
        check_server(config)
            .await
            .map_err(|error| config.named(error))?;
        let sessions = Sessions::new(config);
        let wakes = Arc::new(Wakes::default());
        let stale = Arc::new(AtomicU64::new(0));
        let (bell, ringing) = Bell::new(sessions.clone(), &tables);
        let (writer, publishing) = Writer::new(&sessions, &tables, &wakes, &bell);
        let (settler, settling) = Settler::new(&sessions, &tables, &stale);
        let database = Self(Arc::new(Database {
            config: config.clone(),
            tables,
            writer,
            settler,
            wakes,
            bell,
            sessions,
            lending: Lending::new(config),
            topics: Mutex::new(Topics::default()),
            stale,
            tasks: Mutex::new(Vec::new()),
        }));
        database
            .migrate()
            .await
            .map_err(|error| config.named(error))?;
        let weak = Arc::downgrade(&database.0);
        let watching = wake::watch(database.watched());
        let sweeping = janitor::run(weak, config.retention_interval);
        let tasks = vec![
            tokio::spawn(ringing).abort_handle(),
            tokio::spawn(publishing).abort_handle(),
            tokio::spawn(settling).abort_handle(),
            tokio::spawn(watching).abort_handle(),
            tokio::spawn(sweeping).abort_handle(),
        ];
        *database
            .tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = tasks;
        Ok(database)
    }

    /// The database, while somebody else holds it.
    pub(super) fn upgrade(database: &Weak<Database>) -> Option<Self> {
        database.upgrade().map(Self)
    }
}

/// Connects once, so that what is in the way is said at once, and looks at the server.
async fn check_server(config: &PostgresConfig) -> Result<()> {
    let mut connection = try_connect(config).await?;
    let row = sqlx::query(
        "SELECT current_setting('server_version_num')::int, pg_is_in_recovery(),
            current_setting('fsync') = 'on'",
    )
    .fetch_one(&mut connection)
    .await
    .and_then(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?)));
    let (version, standby, fsync): (i32, bool, bool) =
        row.map_err(|error| into_error(CONNECT, error))?;
    if version < VERSION_MIN {
        let message = "the server is older than PostgreSQL 13: use a newer one";
        return Err(Error::new(ErrorKind::Unsupported, CONNECT, message).with("version", version));
    }
    if standby {
        return Err(Error::new(
            ErrorKind::Unavailable,
            CONNECT,
            "the server is a standby and takes no writes: name the primary",
        ));
    }
    if !fsync {
        warn!("the server runs with fsync off: what it acknowledges does not survive a power cut");
    }
    Ok(())
}

const CONNECT: &str = "connect";

impl Log for Shared {
    const PAGES_MAX: usize = 16;

    fn wakes(&self) -> &log::Wakes {
        &self.wakes
    }

    async fn read_pages(&self, wanted: &[Wanted]) -> Result<Vec<Page>> {
        self.pages(wanted).await
    }

    async fn ends_at(&self, lanes: &[u32], time: Timestamp) -> Result<Vec<Position>> {
        // The clock of the database says when a message was taken, so it says when the end is.
        loop {
            let now = self.now().await?;
            if now >= time {
                break;
            }
            sleep(time.since(now)).await;
        }
        self.settle_lanes(lanes).await?;
        let ends = self.first_at_or_after(lanes, time).await?;
        Ok(lanes
            .iter()
            .map(|lane| ends.get(lane).copied().unwrap_or(u64::MAX).into())
            .collect())
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
        self.settler.settle(advances).await
    }

    fn count_stale(&self, settlements: u64) {
        self.stale.fetch_add(settlements, Ordering::Relaxed);
    }

    async fn leave(&self, group: i64, member: MemberId) -> Result<()> {
        leases::leave(self, group, member).await
    }
}

impl Database {
    /// Takes a connection.
    pub(super) async fn session(&self, operation: &'static str) -> Result<Session> {
        self.sessions.get(operation).await
    }

    /// When a connection was last lost.
    pub(super) fn lost(&self) -> Option<Instant> {
        self.sessions.lost()
    }

    /// Takes a connection and begins a transaction on it.
    pub(super) async fn begin(&self, operation: &'static str) -> Result<Session> {
        let mut session = self.session(operation).await?;
        match session.begin().await {
            Ok(()) => return Ok(session),
            Err(failure) if !failure.is_loss() => return Err(failure.into_error(operation)),
            // The connection died while it lay idle; nothing was asked of the server yet.
            Err(_) => drop(session),
        }
        let mut session = self.session(operation).await?;
        let begun = session.begin().await;
        begun.map_err(|failure| failure.into_error(operation))?;
        Ok(session)
    }

    /// Runs one statement that may as well run twice: once more where the connection was lost.
    pub(super) async fn query<'q>(
        &self,
        operation: &'static str,
        query: impl Fn() -> PgQuery<'q>,
    ) -> Result<Vec<PgRow>> {
        let mut session = self.session(operation).await?;
        let answer = match session.ask(query()).await {
            Err(failure) if failure.is_loss() => {
                drop(session);
                session = self.session(operation).await?;
                session.ask(query()).await
            }
            answer => answer,
        };
        let rows = answer.map_err(|failure| failure.into_error(operation))?;
        session.end();
        Ok(rows)
    }

    /// The clock of the database.
    pub(super) async fn now(&self) -> Result<Timestamp> {
        const NOW: &str = "read clock";
        let sql = self.tables.sql("SELECT {now}");
        let rows = self.query(NOW, || sqlx::query(sql.clone())).await?;
        let now = rows.first().map(|row| self.column(NOW, row, 0)).transpose();
        Ok(Timestamp::from_micros(now?.unwrap_or(0)))
    }

    pub(super) fn error(&self, operation: &'static str, native: sqlx::Error) -> Error {
        into_error(operation, native)
    }

    /// Reads a column.
    pub(super) fn column<'r, T>(
        &self,
        operation: &'static str,
        row: &'r PgRow,
        index: usize,
    ) -> Result<T>
    where
        T: sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
    {
        column(operation, row, index)
    }

    pub(super) fn topics(&self) -> MutexGuard<'_, Topics> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a name stands that was looked up before.
    pub(super) fn known_topic(&self, name: &Topic) -> Option<Arc<TopicLanes>> {
        self.topics().get(name)
    }

    pub(super) fn stale(&self) -> u64 {
        self.stale.load(Ordering::Relaxed)
    }

    /// Tells everybody that members, leases or decisions of a group changed.
    pub(super) fn group_changed(&self, group: i64, generation: i64) {
        self.wakes.group_changed(group, generation);
        self.bell.group(group, generation);
    }

    fn watched(&self) -> wake::Watched {
        wake::Watched {
            wakes: Arc::clone(&self.wakes),
            sessions: self.sessions.clone(),
            tables: self.tables.clone(),
            connect: self.config.connect.clone(),
            bell: Arc::clone(&self.bell),
        }
    }
}
