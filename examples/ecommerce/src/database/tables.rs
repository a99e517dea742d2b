//! The tables of a service: each step that changes them runs once.

use std::path::Path;

use anyhow::Context as _;
use sqlx::postgres::PgConnectOptions;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};

/// What makes a service's tables and changes them later, step by step, in the words of each database.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    /// In a file.
    pub sqlite: &'static [&'static str],
    /// In a schema.
    pub postgres: &'static [&'static str],
}

/// What a service handled, in which order: for people who ask what happened, and for the crash
/// campaign, to which a second entry for one event says that its effects happened twice.
const SQLITE_JOURNAL: &str = "
    CREATE TABLE IF NOT EXISTS handled (
        sequence   INTEGER PRIMARY KEY,
        at         REAL NOT NULL DEFAULT (unixepoch('subsec')),
        key        TEXT NOT NULL,
        event_type TEXT NOT NULL,
        event_id   TEXT NOT NULL
    ) STRICT;
    DELETE FROM handled WHERE at < unixepoch() - 30 * 24 * 60 * 60";
const POSTGRES_JOURNAL: &str = "
    CREATE TABLE handled (
        sequence   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        at         timestamptz NOT NULL DEFAULT now(),
        key        text NOT NULL,
        event_type text NOT NULL,
        event_id   text NOT NULL
    );
    CREATE TABLE shop_version (version bigint NOT NULL);
    INSERT INTO shop_version VALUES (0)";
const POSTGRES_FORGET: &str = "DELETE FROM handled WHERE at < now() - interval '30 days'";

/// Several processes of a service may start at once: one does it.
const POSTGRES_LOCK: &str = "SELECT pg_advisory_xact_lock(hashtext('shop ' || current_schema()))";
const POSTGRES_IS_NEW: &str = "
    SELECT NOT EXISTS (SELECT FROM pg_tables
                       WHERE schemaname = current_schema() AND tablename = 'shop_version')";

impl Tables {
    /// Brings the tables in a file up to date; the file itself says of which version they are.
    pub async fn update_file(&self, file: &Path) -> anyhow::Result<()> {
        let file = SqliteConnectOptions::new().filename(file);
        let mut connection = file.connect().await?;
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        let version: i64 = sqlx::query_scalar("PRAGMA user_version")
            .fetch_one(&mut *tx)
            .await?;
        let steps = after(version, self.sqlite)?;
        sqlx::raw_sql(SQLITE_JOURNAL).execute(&mut *tx).await?;
        for step in steps {
            sqlx::raw_sql(*step).execute(&mut *tx).await?;
        }
        // A pragma takes no parameters; a number is safe to write out.
        let version = AssertSqlSafe(format!("PRAGMA user_version = {}", self.sqlite.len()));
        sqlx::raw_sql(version).execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    }

    /// Brings the tables in the schema of a search path up to date.
    pub async fn update_schema(&self, schema: &PgConnectOptions) -> anyhow::Result<()> {
        let mut connection = schema.connect().await?;
        let mut tx = connection.begin().await?;
        sqlx::raw_sql(POSTGRES_LOCK).execute(&mut *tx).await?;
        let is_new = sqlx::query_scalar(POSTGRES_IS_NEW);
        if is_new.fetch_one(&mut *tx).await? {
            sqlx::raw_sql(POSTGRES_JOURNAL).execute(&mut *tx).await?;
        }
        let version: i64 = sqlx::query_scalar("SELECT version FROM shop_version")
            .fetch_one(&mut *tx)
            .await?;
        for step in after(version, self.postgres)? {
            sqlx::raw_sql(*step).execute(&mut *tx).await?;
        }
        sqlx::query("UPDATE shop_version SET version = $1")
            .bind(self.postgres.len() as i64)
            .execute(&mut *tx)
            .await?;
        sqlx::raw_sql(POSTGRES_FORGET).execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    }
}

/// The steps that have not run yet.
fn after(version: i64, steps: &'static [&'static str]) -> anyhow::Result<&'static [&'static str]> {
    let rest = usize::try_from(version)
        .ok()
        .and_then(|done| steps.get(done..));
    rest.with_context(|| {
        format!(
            "it is of version {version}, which this program does not know: run the program that wrote it"
        )
    })
}
