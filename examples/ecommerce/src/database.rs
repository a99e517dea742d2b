//! The database of a service: one SQLite file, opened and brought up to date here, with a journal of
//! what the service handled. What is written in it, besides, is the business of the services; that
//! it happens once is the business of the SDK's store.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use eventbus::SqliteStore;
use eventbus::prelude::{BoxError, Context, Event};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions as _, SqliteConnection};

/// What a service handled, in which order: for people who ask what happened, and for the crash
/// campaign, to which a second entry for one event says that its effects happened twice.
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

/// Opens `<data>/<service>.db` and brings it up to date: each migration runs once.
///
/// # Errors
///
/// When the file is no database, of a later version, or not to be written.
pub async fn open(
    data: &Path,
    service: &str,
    migrations: &'static [&'static str],
) -> anyhow::Result<SqliteStore> {
    let file = file_of(data, service);
    let opened = open_file(&file, migrations).await;
    opened.with_context(|| format!("open {}, the data of the {service} service", file.display()))
}

/// What a service handled, in the order in which it was committed.
///
/// # Errors
///
/// When its database cannot be read.
pub async fn journal(data: &Path, service: &str) -> anyhow::Result<Vec<Handled>> {
    let file = file_of(data, service);
    let opened = SqliteConnectOptions::new().filename(&file).connect().await;
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

/// Opens the transaction in which an event is handled, and notes it in the journal.
///
/// # Errors
///
/// Those of [`Context::transaction`], and of the file.
pub async fn handling<'c, E: Event + Sync, S: Send + Sync>(
    event: &E,
    cx: &'c mut Context<S, SqliteStore>,
) -> Result<&'c mut SqliteConnection, BoxError> {
    let (key, id) = (event.key(), cx.id().to_string());
    let connection = cx.transaction().await?;
    sqlx::query("INSERT INTO handled (key, event_type, event_id) VALUES (?, ?, ?)")
        .bind(key.map(|key| key.to_string()).unwrap_or_default())
        .bind(E::TYPE)
        .bind(id)
        .execute(&mut *connection)
        .await?;
    Ok(connection)
}

/// Where a service has its database.
pub fn file_of(data: &Path, service: &str) -> PathBuf {
    data.join(format!("{service}.db"))
}

async fn open_file(
    file: &Path,
    migrations: &'static [&'static str],
) -> anyhow::Result<SqliteStore> {
    let store = SqliteStore::open(file).await?;
    let mut connection = SqliteConnectOptions::new().filename(file).connect().await?;
    migrate(&mut connection, migrations).await?;
    Ok(store)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::sample::TestData;

    #[tokio::test]
    async fn a_file_of_a_later_program_is_refused() {
        let data = TestData::new();
        let migrations = &["CREATE TABLE notes (note TEXT) STRICT"];
        drop(open(data.path(), "test", migrations).await.unwrap());
        drop(open(data.path(), "test", migrations).await.unwrap());
        let error = open(data.path(), "test", &[]).await.unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("test.db") && text.contains("version 1"),
            "{text}"
        );
    }
}
