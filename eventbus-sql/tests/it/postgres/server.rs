//! The server that `dev/brokers up postgres` started, with a schema of one test's own on it.

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use eventbus_core::Result;
use eventbus_sql::{PostgresBroker, PostgresConfig};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::sync::{OwnedRwLockReadGuard, RwLock};

const URL: &str = "EVENTBUS_TEST_POSTGRES";

/// Held by every test that uses the server, and alone by one that restarts it.
static IN_USE: LazyLock<Arc<RwLock<()>>> = LazyLock::new(Arc::default);

pub(crate) struct Server {
    schema: String,
    in_use: Mutex<Option<OwnedRwLockReadGuard<()>>>,
}

impl Server {
    pub(crate) async fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let in_use = Arc::clone(&IN_USE).read_owned().await;
        Self {
            schema: format!("test_{}_{number}", std::process::id()),
            in_use: Mutex::new(Some(in_use)),
        }
    }

    /// The URL of the server, without options.
    pub(crate) fn base() -> String {
        std::env::var(URL).unwrap_or_else(|_| {
            panic!("{URL} is not set: run ./dev/test only brokers, or export $(dev/brokers up postgres)")
        })
    }

    pub(crate) fn schema(&self) -> &str {
        &self.schema
    }

    /// The URL of this test's schema, with short leases.
    pub(crate) fn url(&self) -> String {
        format!("{}?schema={}&lease=1s", Self::base(), self.schema)
    }

    /// As the suites are to be passed: with the defaults.
    pub(crate) fn config(&self) -> PostgresConfig {
        let config = PostgresConfig::from_url(&Self::base()).expect("a good url");
        config.with_schema(&self.schema).with_connections(6)
    }

    pub(crate) async fn connect(&self) -> Result<PostgresBroker> {
        PostgresBroker::connect(self.config()).await
    }

    /// Runs statements beside the broker; `{s}` is the schema.
    pub(crate) async fn run(&self, sql: &str) {
        let mut connection = self.connection().await;
        let sql = AssertSqlSafe(sql.replace("{s}", &self.schema));
        sqlx::raw_sql(sql)
            .execute(&mut connection)
            .await
            .expect("the statement is sound");
    }

    pub(crate) async fn connection(&self) -> PgConnection {
        PgConnection::connect(&Self::base())
            .await
            .expect("the server answers")
    }

    /// Stops the server as a crash would and starts it again, when no other test uses it.
    pub(crate) async fn restart(&self) {
        let mine = self.in_use.lock().expect("not poisoned").take();
        drop(mine);
        let alone = Arc::clone(&IN_USE).write_owned().await;
        restart().await;
        *self.in_use.lock().expect("not poisoned") = Some(alone.downgrade());
    }

    /// Waits until no other test uses the server; it may be restarted from then on.
    pub(crate) async fn alone() -> (Self, tokio::sync::OwnedRwLockWriteGuard<()>) {
        let server = Self::new().await;
        let mine = server.in_use.lock().expect("not poisoned").take();
        drop(mine);
        (server, Arc::clone(&IN_USE).write_owned().await)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // What a test leaves goes with the server's data; a failure to remove it earlier is none.
        let schema = self.schema.clone();
        let removed = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .ok()?;
            let remove = async {
                let mut connection = PgConnection::connect(&Server::base()).await.ok()?;
                let sql = format!("DROP SCHEMA IF EXISTS {schema} CASCADE");
                let dropped = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection);
                dropped.await.ok()
            };
            let limit = Duration::from_secs(5);
            runtime
                .block_on(async { tokio::time::timeout(limit, remove).await })
                .ok()?
        });
        // The thread ends by itself within its limit.
        let _ = removed.join();
    }
}

/// Stops the server as a crash would, and starts it again.
pub(crate) async fn restart() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../dev/brokers");
    let run = move || Command::new(script).args(["restart", "postgres"]).output();
    let output = tokio::task::spawn_blocking(run).await.expect("it ends");
    let output = output.expect("the script can be run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "the server did not restart: {said}"
    );
}
