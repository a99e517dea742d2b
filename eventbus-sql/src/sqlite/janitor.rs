//! Removes what topics need not keep, in bounded pieces, and lets groups expire that nobody has
//! seen for long.

use std::sync::Weak;

use eventbus_core::log::TopicLanes;
use eventbus_core::{Result, Timestamp, Topic};
use futures_util::FutureExt;
use metrics::counter;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};
use tokio::sync::OnceCell;
use tokio::time::sleep;
use tracing::{debug, warn};

use super::append::{LaneRow, SELECT_LANES};
use super::database::{Database, Shared};
use super::error::into_error;
use super::headers::{HEAD_FIXED, id_of};
use super::tables::Tables;
use super::topics::saturated;
use super::writer::Writer;

/// Most messages removed by one commit, so that publishing waits for none that is long.
const PIECE: u64 = 1000;

/// Counts groups that retention may pass from now on, because nobody has seen a member of them for
/// long.
const GROUPS_EXPIRED: &str = "eventbus.sqlite.groups.expired";

/// Sweeps again and again while the database is open.
pub(super) async fn run(cell: Weak<OnceCell<Database>>, pause: std::time::Duration) {
    loop {
        sleep(pause).await;
        let Some(database) = Shared::upgrade(&cell) else {
            return;
        };
        if let Err(error) = database.sweep().await {
            warn!(%error, "retention was not enforced this time");
        }
    }
}

/// What a removal leaves, besides what lies behind its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spare {
    Nothing,
    /// What a group that is not expired has not settled.
    Unsettled,
}

/// How a removal went.
#[derive(Clone, Copy, Debug)]
struct Removed {
    bytes: u64,
    /// There is nothing left that it may remove.
    done: bool,
}

/// Removes everything of a lane before a position, read or not.
pub(super) async fn trim(writer: &Writer, tables: &Tables, lane: u32, before: u64) -> Result<()> {
    let removal = Removal {
        tables: tables.clone(),
        lane,
        before,
        bytes_max: u64::MAX,
        spare: Spare::Nothing,
    };
    while !removal.run(writer).await?.done {}
    Ok(())
}

/// A topic that does not keep everything.
struct Kept {
    topic: std::sync::Arc<TopicLanes>,
    retention: Option<i64>,
    bytes: Option<u64>,
}

const SELECT_KEPT: &str = "
    SELECT name, retention, retention_bytes FROM {p}topics
    WHERE retention IS NOT NULL OR retention_bytes IS NOT NULL";

const EXPIRE: &str = "
    UPDATE {p}consumer_groups SET expired = 1
    WHERE expired = 0 AND seen < ?1
        AND EXISTS (SELECT 1 FROM {p}cursors WHERE consumer_group = id)
    RETURNING name";

const SELECT_BYTES: &str = "
    SELECT id, bytes FROM {p}lanes WHERE id IN (SELECT value FROM json_each(?))";

impl Database {
    /// Lets groups expire and enforces the retention of every topic.
    async fn sweep(&self) -> Result<()> {
        self.expire_groups().await?;
        self.sweep_inbox().await?;
        for kept in self.kept().await? {
            if let Some(retention) = kept.retention {
                let before = self.now().as_micros().saturating_sub(retention);
                let before = Timestamp::from_micros(before);
                self.remove_older(&kept.topic, before).await?;
            }
            if let Some(bytes) = kept.bytes {
                self.remove_beyond(&kept.topic, bytes).await?;
            }
        }
        Ok(())
    }

    async fn expire_groups(&self) -> Result<()> {
        let expiry = saturated(self.config.group_expiry.as_micros());
        let unseen = self.now().as_micros().saturating_sub(expiry);
        let sql = "SELECT 1 FROM {p}consumer_groups WHERE expired = 0 AND seen < ? LIMIT 1";
        let query = sqlx::query(self.sql(sql)).bind(unseen);
        if self.read("expire groups", query).await?.is_empty() {
            return Ok(());
        }
        let tables = self.tables.clone();
        let expired = self.writer.run("expire groups", move |connection| {
            let sql = tables.sql(EXPIRE);
            async move {
                let rows = sqlx::query(sql).bind(unseen).fetch_all(connection).await;
                rows.map_err(|error| into_error("expire groups", error))
            }
            .boxed()
        });
        for row in expired.await? {
            let group: String = row.try_get(0).unwrap_or_default();
            warn!(
                group,
                expiry = ?self.config.group_expiry,
                "no member of the group was seen for long: retention may remove what it has not read"
            );
            counter!(GROUPS_EXPIRED).increment(1);
        }
        Ok(())
    }

    async fn kept(&self) -> Result<Vec<Kept>> {
        let rows = self.read(READ, sqlx::query(self.sql(SELECT_KEPT))).await?;
        let mut kept = Vec::with_capacity(rows.len());
        for row in &rows {
            let name: String = self.column(row, 0)?;
            let bytes: Option<i64> = self.column(row, 2)?;
            kept.push(Kept {
                topic: self.find_topic(READ, &Topic::new(&name)?).await?,
                retention: self.column(row, 1)?,
                bytes: bytes.map(|bytes| u64::try_from(bytes).unwrap_or(0)),
            });
        }
        Ok(kept)
    }

    async fn remove_older(&self, topic: &TopicLanes, than: Timestamp) -> Result<()> {
        for (partition, lane) in topic.lanes() {
            let before = self.first_at_or_after(lane, than).await?;
            let removal = Removal::sparing(&self.tables, lane, before);
            let mut bytes = 0;
            loop {
                let removed = removal.run(&self.writer).await?;
                bytes += removed.bytes;
                if removed.done {
                    break;
                }
            }
            if bytes > 0 {
                debug!(topic = %topic.name, partition, bytes, "removed what was too old");
            }
        }
        Ok(())
    }

    /// Removes the oldest messages of all lanes until the rest is small enough.
    async fn remove_beyond(&self, topic: &TopicLanes, bytes_max: u64) -> Result<()> {
        let mut lanes: Vec<u32> = topic.lanes().map(|(_, lane)| lane).collect();
        let query = sqlx::query(self.sql(SELECT_BYTES)).bind(format!("{lanes:?}"));
        let mut bytes = 0u64;
        for row in &self.read(READ, query).await? {
            let lane: i64 = self.column(row, 1)?;
            bytes += u64::try_from(lane).unwrap_or(0);
        }
        while bytes > bytes_max {
            let Some(lane) = self.oldest(&lanes).await? else {
                return Ok(());
            };
            let removal = Removal {
                bytes_max: bytes - bytes_max,
                ..Removal::sparing(&self.tables, lane, u64::MAX)
            };
            let removed = removal.run(&self.writer).await?;
            bytes -= removed.bytes.min(bytes);
            if removed.done {
                lanes.retain(|known| *known != lane);
            }
        }
        Ok(())
    }

    /// The lane with the oldest message.
    async fn oldest(&self, lanes: &[u32]) -> Result<Option<u32>> {
        let mut oldest: Option<(Timestamp, u32)> = None;
        for lane in lanes {
            let base = self.lane(*lane).await?.base;
            let Some(time) = self.taken_at(*lane, base).await? else {
                continue;
            };
            if oldest.is_none_or(|(known, _)| time < known) {
                oldest = Some((time, *lane));
            }
        }
        Ok(oldest.map(|(_, lane)| lane))
    }

    fn column<'r, T>(&self, row: &'r SqliteRow, index: usize) -> Result<T>
    where
        T: sqlx::Decode<'r, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
    {
        row.try_get(index).map_err(|error| self.error(READ, error))
    }
}

const READ: &str = "enforce retention";

/// Removes a piece of a lane.
#[derive(Clone, Debug)]
struct Removal {
    tables: Tables,
    lane: u32,
    /// The first position kept in any case.
    before: u64,
    /// It stops with the message that reaches these bytes.
    bytes_max: u64,
    spare: Spare,
}

const SELECT_FLOOR: &str = "
    SELECT min(cursor.position) FROM {p}cursors AS cursor
    JOIN {p}consumer_groups AS consumer ON consumer.id = cursor.consumer_group
    WHERE cursor.lane = ? AND consumer.expired = 0";

const SELECT_SIZES: &str = "
    SELECT length(head) + length(payload) FROM {p}messages
    WHERE id >= ?1 AND id < ?2 ORDER BY id";

const DELETE: &str = "DELETE FROM {p}messages WHERE id >= ?1 AND id < ?2";

const RAISE: &str = "
    UPDATE {p}lanes SET base = ?2, bytes = max(bytes - ?3, 0), seal = ?4 WHERE id = ?1";

impl Removal {
    fn sparing(tables: &Tables, lane: u32, before: u64) -> Self {
        Self {
            tables: tables.clone(),
            lane,
            before,
            bytes_max: u64::MAX,
            spare: Spare::Unsettled,
        }
    }

    async fn run(&self, writer: &Writer) -> Result<Removed> {
        let removal = self.clone();
        let removed = writer.run("remove messages", move |connection| {
            let removal = removal.clone();
            async move { removal.remove(connection).await.map_err(native) }.boxed()
        });
        removed.await
    }

    async fn remove(&self, connection: &mut SqliteConnection) -> Result<Removed, sqlx::Error> {
        let row = self.row(connection).await?;
        let to = self.limit(&row, connection).await?;
        let piece = to.min(row.base + PIECE);
        let (from, end) = (
            id_of(self.lane, row.base),
            id_of(self.lane, piece.max(row.base)),
        );
        let sizes = sqlx::query(self.tables.sql(SELECT_SIZES))
            .bind(from)
            .bind(end)
            .fetch_all(&mut *connection)
            .await?;
        let (mut base, mut bytes) = (row.base, 0);
        for size in &sizes {
            if bytes >= self.bytes_max {
                break;
            }
            let size: i64 = size.try_get(0)?;
            bytes += u64::try_from(size)
                .unwrap_or(0)
                .saturating_sub(HEAD_FIXED as u64);
            base += 1;
        }
        // Rows that are missing are passed over as well: they are gone already.
        if bytes < self.bytes_max {
            base = piece.max(row.base);
        }
        self.cut(row, base, bytes, connection).await?;
        Ok(Removed {
            bytes,
            done: base >= to,
        })
    }

    async fn row(&self, connection: &mut SqliteConnection) -> Result<LaneRow, sqlx::Error> {
        let row = sqlx::query(self.tables.sql(SELECT_LANES))
            .bind(format!("[{}]", self.lane))
            .fetch_one(connection)
            .await?;
        Ok(LaneRow::read(&row)?.1)
    }

    /// Up to where may be removed: looked up with the removal, so that no group slips in between.
    async fn limit(
        &self,
        row: &LaneRow,
        connection: &mut SqliteConnection,
    ) -> Result<u64, sqlx::Error> {
        let before = self.before.min(row.next);
        if self.spare == Spare::Nothing {
            return Ok(before);
        }
        let floor = sqlx::query(self.tables.sql(SELECT_FLOOR))
            .bind(self.lane)
            .fetch_one(connection)
            .await?;
        let floor: Option<i64> = floor.try_get(0)?;
        let floor = floor.map_or(u64::MAX, |floor| u64::try_from(floor).unwrap_or(0));
        Ok(before.min(floor))
    }

    async fn cut(
        &self,
        row: LaneRow,
        base: u64,
        bytes: u64,
        connection: &mut SqliteConnection,
    ) -> Result<(), sqlx::Error> {
        if base == row.base {
            return Ok(());
        }
        sqlx::query(self.tables.sql(DELETE))
            .bind(id_of(self.lane, row.base))
            .bind(id_of(self.lane, base))
            .execute(&mut *connection)
            .await?;
        let cut = LaneRow { base, ..row };
        sqlx::query(self.tables.sql(RAISE))
            .bind(self.lane)
            .bind(base as i64)
            .bind(saturated(bytes.into()))
            .bind(cut.seal(self.lane))
            .execute(connection)
            .await?;
        Ok(())
    }
}

fn native(error: sqlx::Error) -> eventbus_core::Error {
    into_error("remove messages", error)
}
