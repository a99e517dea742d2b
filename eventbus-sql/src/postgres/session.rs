//! A connection while something is done with it: every wait is bounded, and one that was left in the
//! middle of something is closed instead of used again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use eventbus_core::{Error, ErrorKind, Result};
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgArguments, PgConnectOptions, PgPoolOptions, PgRow};
use sqlx::query::Query;
use sqlx::{Connection, Executor, PgConnection, PgPool, Postgres, Row, SqlStr};
use tokio::time::{Instant, timeout};

use super::config::PostgresConfig;
use super::error::into_error;

/// A statement with its arguments.
pub(super) type PgQuery<'q> = Query<'q, Postgres, PgArguments>;

/// A connection that lay idle for longer is asked whether it still lives.
const IDLE_TRUSTED: Duration = Duration::from_secs(2);
/// As many things as are mostly done at the same time.
const WARM_CONNECTIONS: usize = 2;
/// A connection that the pool gave longer ago goes back to it.
const WARM_MAX: Duration = Duration::from_secs(60);
/// How much longer than the server is waited for before the connection is given up.
const GRACE: Duration = Duration::from_secs(1);

/// The connections of one client.
#[derive(Clone, Debug)]
pub(super) struct Sessions {
    pool: PgPool,
    limit: Duration,
    /// When a connection was last lost: none that is older is trusted.
    lost: Arc<Mutex<Option<Instant>>>,
    warm: Arc<Mutex<Warm>>,
}

/// Connections that were used last. A pool hands out the one that lay idle for longest, so that work that
/// comes one after the other meets another server process each time, with nothing prepared or cached.
#[derive(Debug, Default)]
struct Warm {
    /// The last one last.
    kept: Vec<Kept>,
    /// How many wait for the pool: they get the next one.
    waiting: usize,
}

#[derive(Debug)]
struct Kept {
    connection: PoolConnection<Postgres>,
    /// When the pool gave it.
    taken: Instant,
    since: Instant,
}

impl Sessions {
    /// Those that run the client's own statements.
    pub(super) fn new(config: &PostgresConfig) -> Self {
        Self::with_purpose(config, Purpose::Own)
    }

    /// Those that are lent, each inside a transaction.
    pub(super) fn lent(config: &PostgresConfig) -> Self {
        Self::with_purpose(config, Purpose::Lent)
    }

    fn with_purpose(config: &PostgresConfig, purpose: Purpose) -> Self {
        let setup = purpose.setup(config);
        let lost = Arc::new(Mutex::new(None));
        let known = Arc::clone(&lost);
        let pool = PgPoolOptions::new()
            .max_connections(config.connections)
            .acquire_timeout(config.timeout)
            .test_before_acquire(false)
            .after_connect(move |connection, _| {
                let setup = setup.clone();
                Box::pin(async move {
                    set_up(connection, &setup).await?;
                    match purpose {
                        Purpose::Own => Ok(()),
                        Purpose::Lent => begin_for_good(connection).await,
                    }
                })
            })
            .before_acquire(move |connection, seen| {
                let known = Arc::clone(&known);
                let lost: Option<Instant> = *known.lock().unwrap_or_else(PoisonError::into_inner);
                let outdated = lost.is_some_and(|lost| seen.age >= lost.elapsed());
                Box::pin(async move {
                    if outdated || seen.idle_for < IDLE_TRUSTED {
                        return Ok(!outdated);
                    }
                    let alive = connection.ping().await;
                    alive.inspect_err(|_| note_loss(&known)).map(|()| true)
                })
            })
            .connect_lazy_with(config.connect.clone());
        Self {
            pool,
            limit: config.timeout + GRACE,
            lost,
            warm: Arc::default(),
        }
    }

    /// Takes a connection.
    pub(super) async fn get(&self, operation: &'static str) -> Result<Session> {
        let (connection, taken) = match self.take_warm() {
            Ok(kept) => (kept.connection, kept.taken),
            Err(_waiting) => {
                let connection = self.pool.acquire().await;
                let connection = connection.map_err(|error| into_error(operation, error))?;
                (connection, Instant::now())
            }
        };
        Ok(Session {
            operation,
            connection: Some(connection),
            taken,
            sessions: self.clone(),
            ended: false,
        })
    }

    /// Takes the connection that was used last, if one is there and can be trusted as it is.
    fn take_warm(&self) -> Result<Kept, Waiting> {
        let mut warm = self.lock_warm();
        let lost = self.lost();
        let is_trusted = |kept: &Kept| {
            kept.since.elapsed() < IDLE_TRUSTED && lost.is_none_or(|lost| lost < kept.taken)
        };
        // The pool knows what to do with those that are not.
        warm.kept.retain(is_trusted);
        if let Some(kept) = warm.kept.pop() {
            return Ok(kept);
        }
        warm.waiting += 1;
        Err(Waiting(self.clone()))
    }

    /// Keeps a connection for the next one, unless somebody waits for the pool, which looks after its
    /// connections' age, too.
    fn give_back(&self, connection: PoolConnection<Postgres>, taken: Instant) {
        let mut warm = self.lock_warm();
        let is_full = warm.kept.len() >= WARM_CONNECTIONS;
        if warm.waiting == 0 && !is_full && taken.elapsed() < WARM_MAX {
            let since = Instant::now();
            warm.kept.push(Kept {
                connection,
                taken,
                since,
            });
        }
    }

    fn lock_warm(&self) -> MutexGuard<'_, Warm> {
        // Each change is of one value.
        self.warm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a connection was last lost.
    pub(super) fn lost(&self) -> Option<Instant> {
        *self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_loss(&self) {
        note_loss(&self.lost);
    }
}

impl Drop for Warm {
    /// A connection that goes back to its pool needs a runtime, which may be gone with the client.
    fn drop(&mut self) {
        for kept in self.kept.drain(..) {
            drop(kept.connection.detach());
        }
    }
}

/// Somebody who waits for the pool.
struct Waiting(Sessions);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.lock_warm().waiting -= 1;
    }
}

fn note_loss(lost: &Mutex<Option<Instant>>) {
    *lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
}

/// Tries to connect once, and says what is in the way: a pool would go on trying.
pub(super) async fn try_connect(config: &PostgresConfig) -> Result<PgConnection> {
    const CONNECT: &str = "connect";
    let connecting = async {
        let mut connection = PgConnection::connect_with(&config.connect).await?;
        set_up(&mut connection, &Purpose::Own.setup(config)).await?;
        Ok(connection)
    };
    match timeout(config.timeout, connecting).await {
        Ok(connected) => connected.map_err(|error| into_error(CONNECT, error)),
        Err(_) => Err(no_answer(CONNECT)),
    }
}

async fn set_up(connection: &mut PgConnection, setup: &str) -> Result<(), sqlx::Error> {
    // Safe: it is the crate's own text with a number in it.
    let sql = sqlx::AssertSqlSafe(setup);
    connection.execute(sqlx::raw_sql(sql)).await.map(|_| ())
}

/// What connections are for.
#[derive(Clone, Copy, Debug)]
enum Purpose {
    Own,
    Lent,
}

impl Purpose {
    fn setup(self, config: &PostgresConfig) -> String {
        let setup = setup(config.timeout);
        match self {
            Self::Own => format!("{setup};{PLANS};{ISOLATION}"),
            Self::Lent => format!("{setup};{CHECK_CLIENT}"),
        }
    }
}

/// Has the driver believe that it has begun a transaction, so that those begun inside the one that is
/// lent are savepoints. It goes on believing so, while transactions begin and end around its back.
async fn begin_for_good(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    std::mem::forget(connection.begin().await?);
    connection.execute("ROLLBACK").await.map(|_| ())
}

/// Tables here are small one moment and large the next, while plans are kept: an index is never bad, and
/// to plan anew for each value costs more than it brings.
const PLANS: &str =
    "SET enable_seqscan TO off; SET plan_cache_mode TO force_generic_plan; SET jit TO off";
/// Has the server end a statement, and undo its transaction, soon after whoever asked for it is gone. Not
/// every version and system can.
const CHECK_CLIENT: &str = "
    DO $$ BEGIN
        PERFORM set_config('client_connection_check_interval', '500ms', false);
    EXCEPTION WHEN OTHERS THEN NULL;
    END $$";
/// What the client's own statements are written for.
const ISOLATION: &str = "SET default_transaction_isolation TO 'read committed'";

/// What every connection is told: waits are bounded, and an acknowledgement means the disk.
fn setup(limit: Duration) -> String {
    let millis = limit.as_millis();
    format!(
        "SET statement_timeout TO {millis};
         SET idle_in_transaction_session_timeout TO {millis};
         SET client_min_messages TO warning;
         SELECT set_config('synchronous_commit', 'on', false)
         WHERE current_setting('synchronous_commit') = 'off'"
    )
}

/// A connection in use. Dropped before it came to its end, it is closed: the server undoes what was
/// not committed.
#[derive(Debug)]
pub(super) struct Session {
    operation: &'static str,
    /// None when it is dropped.
    connection: Option<PoolConnection<Postgres>>,
    taken: Instant,
    sessions: Sessions,
    ended: bool,
}

/// Why a statement failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server or the driver said so.
    Native(sqlx::Error),
    /// Nobody answered in time.
    NoAnswer,
}

impl Failure {
    pub(super) fn into_error(self, operation: &'static str) -> Error {
        match self {
            Self::Native(error) => into_error(operation, error),
            Self::NoAnswer => no_answer(operation),
        }
    }

    /// PostgreSQL's code of what the server answered.
    pub(super) fn code(&self) -> Option<String> {
        match self {
            Self::Native(error) => super::error::code_of(error),
            Self::NoAnswer => None,
        }
    }

    /// Whether the connection is gone without a word of the server's.
    pub(super) fn is_closed(&self) -> bool {
        self.is_loss() && matches!(self, Self::Native(error) if error.as_database_error().is_none())
    }

    /// Whether the connection is gone, and what became of the statement is not known.
    pub(super) fn is_loss(&self) -> bool {
        match self {
            Self::Native(error) => super::error::is_loss(error),
            Self::NoAnswer => true,
        }
    }
}

fn no_answer(operation: &'static str) -> Error {
    Error::new(
        ErrorKind::Unavailable,
        operation,
        "the database did not answer in time: look at its host, port and load, or raise `timeout`",
    )
}

impl Session {
    /// Runs one statement and returns its rows.
    pub(super) async fn rows(&mut self, query: PgQuery<'_>) -> Result<Vec<PgRow>> {
        let answer = self.ask(query).await;
        answer.map_err(|failure| failure.into_error(self.operation))
    }

    /// As [`rows`](Self::rows), where the caller has to know how it failed.
    pub(super) async fn ask(&mut self, query: PgQuery<'_>) -> Result<Vec<PgRow>, Failure> {
        // To its end, also where one row is expected: the commit is behind it.
        self.limited(async |connection| query.fetch_all(connection).await)
            .await
    }

    /// Has something done with the connection, for as long as an answer is waited for.
    pub(super) async fn limited<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Failure> {
        let limit = self.sessions.limit;
        let answer = match timeout(limit, work(self.connection_mut())).await {
            Ok(answer) => answer.map_err(Failure::Native),
            Err(_) => Err(Failure::NoAnswer),
        };
        let lost = answer.as_ref().err().filter(|failure| failure.is_loss());
        // One that idled in its transaction says nothing of the others.
        if lost.is_some_and(|failure| failure.code().as_deref() != Some("25P03")) {
            self.sessions.note_loss();
        }
        answer
    }

    /// Runs statements that answer nothing.
    pub(super) async fn run(&mut self, sql: SqlStr) -> Result<()> {
        let ran = self.execute(sql).await;
        ran.map_err(|failure| failure.into_error(self.operation))
    }

    /// As [`run`](Self::run), where the caller has to know how it failed.
    pub(super) async fn execute(&mut self, sql: SqlStr) -> Result<(), Failure> {
        self.limited(async |connection| connection.execute(sqlx::raw_sql(sql)).await.map(|_| ()))
            .await
    }

    /// How long the server lets a statement, or a transaction in which nothing happens, take.
    pub(super) fn timeout(&self) -> Duration {
        self.sessions.limit - GRACE
    }

    pub(super) fn connection(&self) -> &PgConnection {
        self.connection.as_ref().expect("it is not dropped")
    }

    pub(super) fn connection_mut(&mut self) -> &mut PgConnection {
        self.connection.as_mut().expect("it is not dropped")
    }

    /// Begins a transaction.
    pub(super) async fn begin(&mut self) -> Result<(), Failure> {
        self.ask(sqlx::query("BEGIN")).await.map(|_| ())
    }

    /// Commits it and gives the connection back.
    pub(super) async fn commit(mut self) -> Result<()> {
        self.rows(sqlx::query("COMMIT")).await?;
        self.end();
        Ok(())
    }

    /// Gives the connection back.
    pub(super) fn end(mut self) {
        self.ended = true;
    }

    /// Asks whether it lives.
    pub(super) async fn is_alive(&mut self) -> bool {
        let limit = self.sessions.limit;
        let ping = self.connection_mut().ping();
        matches!(timeout(limit, ping).await, Ok(Ok(())))
    }

    /// Reads a column.
    pub(super) fn column<'r, T>(&self, row: &'r PgRow, index: usize) -> Result<T>
    where
        T: sqlx::Decode<'r, Postgres> + sqlx::Type<Postgres>,
    {
        column(self.operation, row, index)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else {
            return;
        };
        match self.ended {
            true => self.sessions.give_back(connection, self.taken),
            false => connection.close_on_drop(),
        }
    }
}

/// Reads a column.
pub(super) fn column<'r, T>(operation: &'static str, row: &'r PgRow, index: usize) -> Result<T>
where
    T: sqlx::Decode<'r, Postgres> + sqlx::Type<Postgres>,
{
    row.try_get(index)
        .map_err(|error| into_error(operation, error))
}

/// The options with which notifications are listened for, on a connection of their own.
pub(super) fn listening(connect: &PgConnectOptions) -> PgPool {
    PgPoolOptions::new()
        .max_connections(1)
        .max_lifetime(None)
        .idle_timeout(None)
        .connect_lazy_with(connect.clone())
}
