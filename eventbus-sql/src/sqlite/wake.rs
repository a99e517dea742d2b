//! Sees what other processes wrote, within a few milliseconds and only while somebody waits.

use std::sync::Arc;
use std::time::Duration;

use eventbus_core::Result;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{Row, SqliteConnection};
use tokio::time::sleep;
use tracing::warn;

use super::append::LaneRow;
use super::database::connect;
use super::error::into_error;
use super::tables::Tables;
use crate::wakes::Wakes;

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

/// Reads the ends, generations and versions that somebody waits for, all in one statement: each
/// costs a passage to SQLite's thread and back.
async fn look(wakes: &Wakes, tables: &Tables, connection: &mut SqliteConnection) -> Result<()> {
    let native = |error| into_error("watch database", error);
    let (lanes, groups) = (wakes.watched_lanes(), wakes.watched_groups());
    let parts = [
        (!lanes.is_empty()).then_some(ENDS),
        (!groups.is_empty()).then_some(GENERATIONS),
        wakes.schedule_is_heard().then_some(SCHEDULE),
        wakes.outbox_is_heard().then_some(OUTBOX),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    if parts.is_empty() {
        return Ok(());
    }
    let query = sqlx::query(tables.sql(&parts.join(" UNION ALL ")))
        .bind(format!("{lanes:?}"))
        .bind(format!("{groups:?}"));
    let rows = query.fetch_all(connection).await.map_err(native)?;
    for row in &rows {
        let column = |index: usize| row.try_get::<i64, _>(index).map_err(native);
        match column(5)? {
            OF_LANE => {
                let (lane, state) = LaneRow::read(row).map_err(native)?;
                wakes.appended(&[(lane, state.next)]);
            }
            OF_GROUP => wakes.group_changed(column(0)?, column(1)?),
            OF_SCHEDULE => wakes.schedule_changed(column(1)?),
            _ => wakes.outbox_reaches(column(1)?),
        }
    }
    Ok(())
}

/// What a row tells of, in its last column; of the outbox is the rest.
const OF_LANE: i64 = 0;
const OF_GROUP: i64 = 1;
const OF_SCHEDULE: i64 = 2;

const ENDS: &str = "
    SELECT id, base, next, newest, seal, 0 FROM {p}lanes
    WHERE id IN (SELECT value FROM json_each(?1))";

const GENERATIONS: &str = "
    SELECT id, generation, 0, 0, 0, 1 FROM {p}consumer_groups
    WHERE id IN (SELECT value FROM json_each(?2))";

const SCHEDULE: &str = "SELECT 0, version, 0, 0, 0, 2 FROM {p}schedule";

const OUTBOX: &str = "
    SELECT 0, seq, 0, 0, 0, 3 FROM sqlite_sequence WHERE name = '{p}outbox'";
