//! How far groups are: one statement a commit, fenced by the epoch of each lease.

use eventbus_core::log::{Advance, furthest};
use sqlx::SqliteConnection;

use super::headers::seal;
use super::page::to_u64;
use super::tables::Tables;
use super::writer::Failure;

/// A place goes on only for the holder of its epoch, and never back.
const ADVANCE: &str = "
    UPDATE {p}cursors AS mine
    SET position = new.position, seal = new.seal
    FROM (
        SELECT value->>0 AS consumer_group, value->>1 AS lane, value->>2 AS epoch,
            value->>3 AS position, value->>4 AS seal
        FROM json_each(?)
    ) AS new
    WHERE mine.consumer_group = new.consumer_group AND mine.lane = new.lane
        AND mine.epoch = new.epoch AND mine.position <= new.position
    RETURNING lane";

/// Records advances and returns how many of them came too late.
pub(super) async fn record<'a>(
    tables: &Tables,
    connection: &mut SqliteConnection,
    advances: impl Iterator<Item = &'a Advance>,
) -> Result<u64, Failure> {
    let furthest = furthest(advances);
    if furthest.is_empty() {
        return Ok(0);
    }
    let rows: Vec<String> = furthest
        .iter()
        .map(|advance| {
            let Advance {
                group,
                lane,
                epoch,
                position,
            } = advance;
            let position = to_u64(*position);
            let seal = cursor_seal(*group, *lane, position);
            format!("[{group},{lane},{epoch},{position},{seal}]")
        })
        .collect();
    let advanced = sqlx::query(tables.sql(ADVANCE))
        .bind(format!("[{}]", rows.join(",")))
        .fetch_all(connection)
        .await?;
    Ok((furthest.len() - advanced.len()) as u64)
}

/// The checksum that stands beside a group's place.
pub(super) fn cursor_seal(group: i64, lane: u32, position: u64) -> i64 {
    seal([group, lane.into(), position as i64])
}
