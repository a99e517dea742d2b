//! Sees what other processes wrote, within a few milliseconds and only while somebody waits.

use std::sync::Arc;
use std::time::Duration;

use eventbus_core::Result;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{Row, SqliteConnection};
use tokio::time::sleep;
use tracing::warn;

use super::append::{LaneRow, SELECT_LANES};
use super::database::connect;
use super::error::into_error;
use super::outbox::last_appended;
use super::tables::Tables;
use crate::log::Wakes;

/// How often the file is looked at while somebody waits.
const POLL: Duration = Duration::from_millis(8);
/// How long a file that cannot be read is left alone.
const BROKEN_PAUSE: Duration = Duration::from_millis(500);

/// Looks whether another process wrote, while somebody waits for that.
pub(super) async fn watch(wakes: Arc<Wakes>, options: SqliteConnectOptions, tables: Tables) {
    loop {
        wakes.wanted().await;
        let watched = watch_on_one_connection(&wakes, &options, &tables).await;
        if let Err(error) = watched {
            warn!(%error, "cannot see what other processes write; trying again");
            sleep(BROKEN_PAUSE).await;
        }
    }
}

async fn watch_on_one_connection(
    wakes: &Wakes,
    options: &SqliteConnectOptions,
    tables: &Tables,
) -> Result<()> {
    let mut connection = connect(options).await?;
    let mut seen = None;
    loop {
        wakes.wanted().await;
        // Counts the commits of all other connections, those of this process included.
        let version = version(&mut connection).await?;
        if seen != Some(version) {
            look(wakes, tables, &mut connection).await?;
            seen = Some(version);
        }
        sleep(POLL).await;
    }
}

async fn version(connection: &mut SqliteConnection) -> Result<i64> {
    let row = sqlx::query("PRAGMA data_version")
        .fetch_one(connection)
        .await;
    row.and_then(|row| row.try_get(0))
        .map_err(|error| into_error("watch database", error))
}

/// Reads the ends, generations and versions that somebody waits for.
async fn look(wakes: &Wakes, tables: &Tables, connection: &mut SqliteConnection) -> Result<()> {
    let native = |error| into_error("watch database", error);
    let lanes = wakes.watched_lanes();
    if !lanes.is_empty() {
        let rows = sqlx::query(tables.sql(SELECT_LANES))
            .bind(format!("{lanes:?}"))
            .fetch_all(&mut *connection)
            .await
            .map_err(native)?;
        for row in &rows {
            let (lane, state) = LaneRow::read(row).map_err(native)?;
            wakes.appended(&[(lane, state.next)]);
        }
    }
    let groups = wakes.watched_groups();
    if !groups.is_empty() {
        let rows = sqlx::query(tables.sql(GENERATIONS))
            .bind(format!("{groups:?}"))
            .fetch_all(&mut *connection)
            .await
            .map_err(native)?;
        for row in &rows {
            let group = row.try_get(0).map_err(native)?;
            wakes.group_changed(group, row.try_get(1).map_err(native)?);
        }
    }
    if wakes.schedule_is_heard() {
        let query = sqlx::query(tables.sql("SELECT version FROM {p}schedule"));
        let row = query.fetch_one(&mut *connection).await.map_err(native)?;
        wakes.schedule_changed(row.try_get(0).map_err(native)?);
    }
    if wakes.outbox_is_heard() {
        let last = last_appended(tables, connection).await.map_err(native)?;
        wakes.outbox_reaches(last);
    }
    Ok(())
}

const GENERATIONS: &str = "
    SELECT id, generation FROM {p}consumer_groups
    WHERE id IN (SELECT value FROM json_each(?))";
