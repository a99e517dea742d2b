//! Removes what topics need not keep, in bounded pieces, and lets groups expire that nobody has
//! seen for long.

use std::sync::{Arc, Weak};
use std::time::Duration;

use eventbus_core::log::TopicLanes;
use eventbus_core::{Result, Topic};
use metrics::counter;
use tokio::time::sleep;
use tracing::{debug, warn};

use super::database::{Database, Shared};
use super::page::stored;
use super::session::Session;
use super::topics::saturated;

/// Most messages removed by one commit, so that publishing waits for none that is long.
const PIECE: u64 = 1000;

/// Counts groups that retention may pass from now on, because nobody has seen a member of them for
/// long.
const GROUPS_EXPIRED: &str = "eventbus.postgres.groups.expired";

const REMOVE: &str = "remove messages";
const READ: &str = "enforce retention";
const EXPIRE_GROUPS: &str = "expire groups";

/// Sweeps again and again while the database is open.
pub(super) async fn run(database: Weak<Database>, pause: Duration) {
    loop {
        sleep(pause).await;
        let Some(database) = Shared::upgrade(&database) else {
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

/// A piece of a lane to be removed.
#[derive(Clone, Copy, Debug)]
struct Removal {
    lane: u32,
    /// The first position kept in any case.
    before: u64,
    /// It stops with the message that reaches these bytes.
    bytes_max: u64,
    spare: Spare,
}

/// How a removal went.
#[derive(Clone, Copy, Debug)]
struct Removed {
    bytes: u64,
    /// There is nothing left that it may remove.
    done: bool,
}

/// A topic that does not keep everything.
struct Kept {
    topic: Arc<TopicLanes>,
    retention: Option<i64>,
    bytes: Option<u64>,
}

const SELECT_KEPT: &str = "
    SELECT name, retention, retention_bytes FROM {s}.topics
    WHERE retention IS NOT NULL OR retention_bytes IS NOT NULL";

const EXPIRE: &str = "
    UPDATE {s}.consumer_groups AS consumer SET expired = true
    WHERE expired = false AND seen < {now} - $1
        AND EXISTS (SELECT 1 FROM {s}.cursors WHERE consumer_group = consumer.id)
    RETURNING name";

const SELECT_BYTES: &str = "
    SELECT sum(bytes)::bigint FROM {s}.lanes WHERE id >= $1 AND id < $1 + $2";

const SELECT_OLDEST: &str = "
    SELECT lane.id FROM {s}.lanes AS lane
    JOIN {s}.messages AS message ON message.lane = lane.id AND message.position = lane.base
    WHERE lane.id = ANY($1) ORDER BY message.taken LIMIT 1";

const LOCK_LANE: &str = "SELECT base, next FROM {s}.lanes WHERE id = $1 FOR UPDATE";

const SELECT_FLOOR: &str = "
    SELECT min(mine.position) FROM {s}.cursors AS mine
    JOIN {s}.consumer_groups AS consumer ON consumer.id = mine.consumer_group
    WHERE mine.lane = $1 AND consumer.expired = false";

const SELECT_SIZES: &str = "
    SELECT (coalesce(octet_length(key), 0) + octet_length(headers) + octet_length(payload))::bigint
    FROM {s}.messages WHERE lane = $1 AND position >= $2 AND position < $3 ORDER BY position";

const DELETE: &str = "
    DELETE FROM {s}.messages WHERE lane = $1 AND position >= $2 AND position < $3";

const RAISE: &str = "
    UPDATE {s}.lanes SET base = $2, bytes = greatest(bytes - $3, 0) WHERE id = $1";

impl Database {
    /// Removes everything of a lane before a position, read or not.
    pub(super) async fn trim(&self, lane: u32, before: u64) -> Result<()> {
        let removal = Removal {
            lane,
            before,
            bytes_max: u64::MAX,
            spare: Spare::Nothing,
        };
        while !self.remove(removal).await?.done {}
        Ok(())
    }

    /// Lets groups expire and enforces the retention of every topic.
    async fn sweep(&self) -> Result<()> {
        self.expire_groups().await?;
        if let Err(error) = self.sweep_inbox().await {
            // It keeps no topic from being swept.
            warn!(%error, "what was handled long ago is not forgotten this time");
        }
        for kept in self.kept().await? {
            if let Some(retention) = kept.retention {
                self.remove_older(&kept.topic, retention).await?;
            }
            if let Some(bytes) = kept.bytes {
                self.remove_beyond(&kept.topic, bytes).await?;
            }
        }
        Ok(())
    }

    async fn expire_groups(&self) -> Result<()> {
        let expiry = saturated(self.config.group_expiry.as_micros());
        let mut session = self.session(EXPIRE_GROUPS).await?;
        let expire = sqlx::query(self.tables.sql(EXPIRE)).bind(expiry);
        let expired = session.rows(expire).await?;
        session.end();
        for row in &expired {
            let group: String = self.column(EXPIRE_GROUPS, row, 0)?;
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
        let sql = self.tables.sql(SELECT_KEPT);
        let rows = self.query(READ, || sqlx::query(sql.clone())).await?;
        let mut kept = Vec::with_capacity(rows.len());
        for row in &rows {
            let name: String = self.column(READ, row, 0)?;
            let bytes: Option<i64> = self.column(READ, row, 2)?;
            kept.push(Kept {
                topic: self.find_topic(READ, &Topic::new(&name)?).await?,
                retention: self.column(READ, row, 1)?,
                bytes: bytes.map(|bytes| u64::try_from(bytes).unwrap_or(0)),
            });
        }
        Ok(kept)
    }

    async fn remove_older(&self, topic: &TopicLanes, retention: i64) -> Result<()> {
        let now = self.now().await?.as_micros();
        let time = eventbus_core::Timestamp::from_micros(now.saturating_sub(retention));
        let lanes: Vec<u32> = topic.lanes().map(|(_, lane)| lane).collect();
        let ends = self.first_at_or_after(&lanes, time).await?;
        for (partition, lane) in topic.lanes() {
            let before = ends.get(&lane).copied().unwrap_or(0);
            let removal = Removal::sparing(lane, before);
            let mut bytes = 0;
            loop {
                let removed = self.remove(removal).await?;
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
        let mut lanes: Vec<i32> = topic.lanes().map(|(_, lane)| lane as i32).collect();
        let sql = self.tables.sql(SELECT_BYTES);
        let rows = self.query(READ, || {
            let query = sqlx::query(sql.clone()).bind(topic.first_lane as i32);
            query.bind(topic.partitions as i32)
        });
        let bytes = rows.await?.first().map(|row| self.column(READ, row, 0));
        let bytes: Option<i64> = bytes.transpose()?.flatten();
        let mut bytes = u64::try_from(bytes.unwrap_or(0)).unwrap_or(0);
        while bytes > bytes_max {
            let Some(lane) = self.oldest(&lanes).await? else {
                return Ok(());
            };
            let removal = Removal {
                bytes_max: bytes - bytes_max,
                ..Removal::sparing(lane as u32, u64::MAX)
            };
            let removed = self.remove(removal).await?;
            bytes -= removed.bytes.min(bytes);
            if removed.done {
                lanes.retain(|known| *known != lane);
            }
        }
        Ok(())
    }

    /// The lane with the oldest message.
    async fn oldest(&self, lanes: &[i32]) -> Result<Option<i32>> {
        let sql = self.tables.sql(SELECT_OLDEST);
        let rows = self
            .query(READ, || sqlx::query(sql.clone()).bind(lanes))
            .await?;
        rows.first()
            .map(|row| self.column(READ, row, 0))
            .transpose()
    }

    async fn remove(&self, removal: Removal) -> Result<Removed> {
        let mut session = self.begin(REMOVE).await?;
        let lane = removal.lane as i32;
        let row = session.rows(sqlx::query(self.tables.sql(LOCK_LANE)).bind(lane));
        let row = row.await?;
        let Some(row) = row.first() else {
            session.commit().await?;
            return Ok(Removed {
                bytes: 0,
                done: true,
            });
        };
        let (base, next): (i64, i64) = (session.column(row, 0)?, session.column(row, 1)?);
        let base = base as u64;
        let to = self.limit(removal, next as u64, &mut session).await?;
        let piece = to.min(base + PIECE).max(base);
        let (kept, bytes) = self.measure(removal, base, piece, &mut session).await?;
        if kept > base {
            let delete = sqlx::query(self.tables.sql(DELETE)).bind(lane);
            let delete = delete.bind(stored(base)).bind(stored(kept));
            session.rows(delete).await?;
            let raise = sqlx::query(self.tables.sql(RAISE)).bind(lane);
            let raise = raise.bind(stored(kept)).bind(stored(bytes));
            session.rows(raise).await?;
        }
        session.commit().await?;
        Ok(Removed {
            bytes,
            done: kept >= to,
        })
    }

    /// Up to where may be removed: looked up while the lane is held, so that no group slips in
    /// between.
    async fn limit(&self, removal: Removal, next: u64, session: &mut Session) -> Result<u64> {
        let before = removal.before.min(next);
        if removal.spare == Spare::Nothing {
            return Ok(before);
        }
        let floor = sqlx::query(self.tables.sql(SELECT_FLOOR)).bind(removal.lane as i32);
        let rows = session.rows(floor).await?;
        let floor = rows.first().map(|row| session.column(row, 0)).transpose()?;
        let floor: Option<i64> = floor.flatten();
        Ok(before.min(floor.map_or(u64::MAX, |floor| floor as u64)))
    }

    /// The first position that a piece keeps, and the bytes before it.
    async fn measure(
        &self,
        removal: Removal,
        base: u64,
        piece: u64,
        session: &mut Session,
    ) -> Result<(u64, u64)> {
        let sizes = sqlx::query(self.tables.sql(SELECT_SIZES)).bind(removal.lane as i32);
        let sizes = session.rows(sizes.bind(stored(base)).bind(stored(piece)));
        let (mut kept, mut bytes) = (base, 0);
        for row in &sizes.await? {
            if bytes >= removal.bytes_max {
                return Ok((kept, bytes));
            }
            let size: i64 = session.column(row, 0)?;
            bytes += size as u64;
            kept += 1;
        }
        // Rows that are missing are passed over as well: they are gone already.
        match bytes < removal.bytes_max {
            true => Ok((piece, bytes)),
            false => Ok((kept, bytes)),
        }
    }
}

impl Removal {
    fn sparing(lane: u32, before: u64) -> Self {
        Self {
            lane,
            before,
            bytes_max: u64::MAX,
            spare: Spare::Unsettled,
        }
    }
}
