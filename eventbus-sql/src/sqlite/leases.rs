//! The leases of groups in the database, on the clock of the machine since its start.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use eventbus_core::{
    Error, ErrorKind, Group, Lease, LeaseMember, LeaseReply, LeaseRequest, LeaseStore, LeaseTopic,
    MemberId, Result, Topic, TopicPartition,
};
use futures_util::FutureExt;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};
use tokio::sync::watch;

use super::database::{Database, Shared};
use super::error::into_error;
use super::groups::GroupRow;
use super::tables::Tables;

/// The leases of one group, for one member.
#[derive(Debug)]
pub(super) struct SqliteLeases {
    database: Shared,
    group: GroupRow,
    /// The member's: nothing is renewed for one that left.
    ended: Arc<AtomicBool>,
    /// Keeps what is known of the group between two waits.
    _generation: watch::Receiver<i64>,
}

impl SqliteLeases {
    pub(super) fn new(database: Shared, group: GroupRow, ended: Arc<AtomicBool>) -> Self {
        Self {
            _generation: database.wakes.group(group.id),
            database,
            group,
            ended,
        }
    }

    /// The lanes of places; one of an unknown topic is left out.
    async fn rows(&self, places: impl Iterator<Item = &TopicPartition>) -> Result<Vec<u32>> {
        let mut rows = Vec::new();
        for place in places {
            let topic = self.database.find_topic(EXCHANGE, &place.topic).await?;
            if place.partition < topic.partitions {
                rows.push(topic.first_lane + place.partition);
            }
        }
        Ok(rows)
    }
}

pub(super) const EXCHANGE: &str = "renew leases";

#[async_trait]
impl LeaseStore for SqliteLeases {
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        if self.ended.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Closed,
                EXCHANGE,
                "the member has left",
            ));
        }
        let released = self.rows(request.released.iter().map(|lease| &lease.place));
        let released = released.await?;
        let epochs = request.released.iter().map(|lease| lease.epoch);
        let pairs = released.iter().zip(epochs);
        let exchange = Arc::new(Exchange {
            tables: self.database.tables.clone(),
            table: &LANES,
            group: self.group.id,
            now: self.database.now().as_micros(),
            wanted: format!("{:?}", self.rows(request.wanted.iter()).await?),
            released: listed(pairs.map(|(lane, epoch)| format!("[{lane},{epoch}]"))),
            dead: listed(request.dead.iter().map(|id| format!("\"{id}\""))),
            request: request.clone(),
        });
        exchange.run(&self.database).await
    }

    async fn leave(&self, _: &Group, member: MemberId) -> Result<()> {
        leave(&self.database, &LANES, self.group.id, member).await
    }

    async fn changed(&self, _: &Group) {
        let _waiting = self.database.wakes.wait();
        let mut generation = self.database.wakes.group(self.group.id);
        if generation.changed().await.is_err() {
            // It is dropped with the database only; then nothing changes any more.
            std::future::pending().await
        }
    }
}

/// Ends a member and frees what it holds.
pub(super) async fn leave(
    database: &Database,
    table: &'static LeaseTable,
    group: i64,
    member: MemberId,
) -> Result<()> {
    let tables = database.tables.clone();
    let left = database.writer.run("leave group", move |connection| {
        let tables = tables.clone();
        async move {
            let query = sqlx::query(tables.sql(END_MEMBER)).bind(group);
            let query = query.bind(member.to_string());
            let gone = query.fetch_all(&mut *connection).await.map_err(native)?;
            table.free_orphans(&tables, group, connection).await?;
            touch(&tables, group, 0, !gone.is_empty(), connection).await
        }
        .boxed()
    });
    let generation = left.await?;
    database.wakes.group_changed(group, generation);
    Ok(())
}

/// Ends members whose time is over, frees their leases, and returns whether any did.
pub(super) async fn end_overdue(
    tables: &Tables,
    table: &LeaseTable,
    group: i64,
    dead: &str,
    connection: &mut SqliteConnection,
) -> Result<bool> {
    let (boot, now) = machine_clock();
    let ended = sqlx::query(tables.sql(END_OVERDUE))
        .bind(group)
        .bind(boot)
        .bind(now)
        .bind(dead)
        .fetch_all(&mut *connection)
        .await
        .map_err(native)?;
    table.free_orphans(tables, group, connection).await?;
    Ok(!ended.is_empty())
}

/// The members of a group, whoever they are.
pub(super) async fn members(
    tables: &Tables,
    group: i64,
    connection: &mut SqliteConnection,
) -> Result<Vec<LeaseMember>> {
    let rows = sqlx::query(tables.sql(SELECT_MEMBERS))
        .bind(group)
        .fetch_all(connection)
        .await
        .map_err(native)?;
    rows.iter().map(read_member).collect()
}

/// One exchange, with what it names found in the tables.
pub(super) struct Exchange {
    pub(super) tables: Tables,
    pub(super) table: &'static LeaseTable,
    pub(super) group: i64,
    pub(super) now: i64,
    pub(super) wanted: String,
    pub(super) released: String,
    pub(super) dead: String,
    pub(super) request: LeaseRequest,
}

impl Exchange {
    /// Serves it inside the next commit.
    pub(super) async fn run(self: Arc<Self>, database: &Database) -> Result<LeaseReply> {
        self.request.topics.iter().try_for_each(LeaseTopic::check)?;
        let group = self.group;
        let answer = database.writer.run(EXCHANGE, move |connection| {
            let exchange = Arc::clone(&self);
            async move { exchange.serve(connection).await }.boxed()
        });
        let (reply, generation) = answer.await?;
        database.wakes.group_changed(group, generation);
        Ok(reply)
    }

    async fn serve(&self, connection: &mut SqliteConnection) -> Result<(LeaseReply, i64)> {
        let Self {
            tables,
            table,
            group,
            ..
        } = self;
        let mut changed = end_overdue(tables, table, *group, &self.dead, connection).await?;
        changed |= self.join(connection).await?;
        changed |= self.release(connection).await?;
        changed |= self.grant(connection).await?;
        let generation = touch(tables, *group, self.now, changed, connection).await?;
        let mut members = members(tables, *group, connection).await?;
        let held = sqlx::query(tables.sql(table.select_held))
            .bind(group)
            .fetch_all(connection)
            .await
            .map_err(native)?;
        for row in &held {
            let (holder, lease) = read_lease(row)?;
            if let Some(member) = members.iter_mut().find(|member| member.id == holder) {
                member.leases.push(lease);
            }
        }
        Ok((LeaseReply::new(members), generation))
    }

    /// Counts the member anew; true when it was none.
    async fn join(&self, connection: &mut SqliteConnection) -> Result<bool> {
        let (boot, now) = machine_clock();
        let LeaseRequest { member, ttl, .. } = &self.request;
        let ttl = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX);
        let topics = self.request.topics.iter();
        let topics: Vec<String> = topics.map(ToString::to_string).collect();
        let joined = sqlx::query(self.tables.sql(JOIN))
            .bind(member.to_string())
            .bind(self.group)
            .bind(self.request.process.to_string())
            .bind(topics.join("\n"))
            .bind(boot)
            .bind(now.saturating_add(ttl).saturating_add(STEP_MILLIS))
            .fetch_one(connection)
            .await
            .map_err(native)?;
        let renewals: i64 = joined.try_get(0).map_err(native)?;
        Ok(renewals == 0)
    }

    async fn release(&self, connection: &mut SqliteConnection) -> Result<bool> {
        if self.request.released.is_empty() {
            return Ok(false);
        }
        let released = sqlx::query(self.tables.sql(self.table.release))
            .bind(self.group)
            .bind(self.request.member.to_string())
            .bind(&self.released)
            .fetch_all(connection)
            .await
            .map_err(native)?;
        Ok(!released.is_empty())
    }

    async fn grant(&self, connection: &mut SqliteConnection) -> Result<bool> {
        if self.request.wanted.is_empty() {
            return Ok(false);
        }
        let granted = sqlx::query(self.tables.sql(self.table.grant))
            .bind(self.group)
            .bind(self.request.member.to_string())
            .bind(&self.wanted)
            .fetch_all(connection)
            .await
            .map_err(native)?;
        Ok(!granted.is_empty())
    }
}

const END_MEMBER: &str = "
    DELETE FROM {p}members WHERE consumer_group = ?1 AND id = ?2 RETURNING id";

const END_OVERDUE: &str = "
    DELETE FROM {p}members
    WHERE consumer_group = ?1
        AND (boot <> ?2 OR deadline <= ?3 OR id IN (SELECT value FROM json_each(?4)))
    RETURNING id";

const JOIN: &str = "
    INSERT INTO {p}members (id, consumer_group, process, topics, boot, deadline)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6)
    ON CONFLICT (consumer_group, id) DO UPDATE
    SET process = excluded.process, topics = excluded.topics, boot = excluded.boot,
        deadline = excluded.deadline, renewals = renewals + 1
    RETURNING renewals";

const TOUCH: &str = "
    UPDATE {p}consumer_groups
    SET seen = max(seen, ?2), expired = 0, generation = generation + ?3
    WHERE id = ?1 RETURNING generation";

const SELECT_MEMBERS: &str = "
    SELECT id, process, topics FROM {p}members WHERE consumer_group = ?";

/// What is asked of a table of leases. Its places are JSON, as the table names them.
pub(super) struct LeaseTable {
    /// Of the group, frees what members that are gone held.
    pub(super) free_orphans: &'static str,
    /// Of the group, frees what the member holds in these epochs.
    pub(super) release: &'static str,
    /// Of the group, gives the member the places that are free.
    pub(super) grant: &'static str,
    /// Of the group: holder, topic, partition and epoch of each lease.
    pub(super) select_held: &'static str,
}

/// The leases of partitions of the log, beside how far the group is on them.
pub(super) const LANES: LeaseTable = LeaseTable {
    free_orphans: "
        UPDATE {p}cursors SET holder = NULL
        WHERE consumer_group = ?1 AND holder IS NOT NULL
            AND holder NOT IN (SELECT id FROM {p}members WHERE consumer_group = ?1)",
    release: "
        UPDATE {p}cursors AS mine SET holder = NULL
        FROM (SELECT value->>0 AS lane, value->>1 AS epoch FROM json_each(?3)) AS released
        WHERE mine.consumer_group = ?1 AND mine.holder = ?2
            AND mine.lane = released.lane AND mine.epoch = released.epoch
        RETURNING lane",
    grant: "
        UPDATE {p}cursors SET holder = ?2, epoch = epoch + 1
        WHERE consumer_group = ?1 AND holder IS NULL
            AND lane IN (SELECT value FROM json_each(?3))
        RETURNING lane",
    select_held: "
        SELECT cursor.holder, topic.name, cursor.lane - topic.first_lane, cursor.epoch
        FROM {p}cursors AS cursor JOIN {p}topics AS topic ON topic.first_lane = (
            SELECT max(first_lane) FROM {p}topics WHERE first_lane <= cursor.lane
        )
        WHERE cursor.consumer_group = ? AND cursor.holder IS NOT NULL",
};

impl LeaseTable {
    async fn free_orphans(
        &self,
        tables: &Tables,
        group: i64,
        connection: &mut SqliteConnection,
    ) -> Result<()> {
        let freed = sqlx::query(tables.sql(self.free_orphans)).bind(group);
        freed.execute(connection).await.map_err(native)?;
        Ok(())
    }
}

/// Takes note that the group lives, and that it changed; returns its generation.
async fn touch(
    tables: &Tables,
    group: i64,
    now: i64,
    changed: bool,
    connection: &mut SqliteConnection,
) -> Result<i64> {
    let row = sqlx::query(tables.sql(TOUCH))
        .bind(group)
        .bind(now)
        .bind(i64::from(changed))
        .fetch_one(connection)
        .await;
    row.and_then(|row| row.try_get(0)).map_err(native)
}

fn read_member(row: &SqliteRow) -> Result<LeaseMember> {
    let text = |index: usize| row.try_get::<String, _>(index).map_err(native);
    let topics = text(2)?;
    let topics = topics.lines().map(str::parse).collect::<Result<_>>()?;
    Ok(LeaseMember::new(
        text(0)?.parse()?,
        text(1)?.parse()?,
        topics,
    ))
}

fn read_lease(row: &SqliteRow) -> Result<(MemberId, Lease)> {
    let holder: String = row.try_get(0).map_err(native)?;
    let topic: String = row.try_get(1).map_err(native)?;
    let lease = Lease {
        place: TopicPartition::new(Topic::new(&topic)?, row.try_get(2).map_err(native)?),
        epoch: row.try_get::<i64, _>(3).map_err(native)? as u64,
    };
    Ok((holder.parse()?, lease))
}

fn native(error: sqlx::Error) -> Error {
    into_error(EXCHANGE, error)
}

pub(super) fn listed(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(","))
}

/// The machine's clock moves by it, so a deadline is that much later to be none too early.
const STEP_MILLIS: i64 = 10;

/// Which start of the machine this is, and the milliseconds since then. All processes of the file
/// are on one machine, and its date may be set. Where the system does not tell, the date serves.
pub(super) fn machine_clock() -> (String, i64) {
    let since_start = || {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let uptime = fs::read_to_string("/proc/uptime").ok()?;
        let seconds: f64 = uptime.split_whitespace().next()?.parse().ok()?;
        Some((boot.trim().to_owned(), (seconds * 1000.0) as i64))
    };
    since_start().unwrap_or_else(|| {
        let date = SystemTime::now().duration_since(UNIX_EPOCH);
        let millis = date.map_or(0, |date| {
            i64::try_from(date.as_millis()).unwrap_or(i64::MAX)
        });
        (String::new(), millis)
    })
}
