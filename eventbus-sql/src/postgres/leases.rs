//! The leases of groups in the database, on its clock.

use std::collections::HashMap;
use std::future::pending;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    Error, ErrorKind, Group, Lease, LeaseMember, LeaseReply, LeaseRequest, LeaseStore, LeaseTopic,
    MemberId, Result, Topic, TopicPartition,
};
use sqlx::postgres::PgRow;
use tokio::sync::watch;
use tokio::time::sleep;

use super::config::PostgresConfig;
use super::database::{Database, Shared};
use super::session::Session;
use super::tables::Tables;

/// Keeps the leases of any groups in a PostgreSQL database, on its clock, beside a broker or alone.
///
/// That clock follows the date of the server: who sets it forward ends leases early, and the fencing
/// epoch refuses what their former owners still write.
#[derive(Clone, Debug)]
pub struct PostgresLeases {
    database: Shared,
    /// Raised when the member that uses it has left: nothing is renewed for it any more.
    ended: Arc<AtomicBool>,
    /// The groups it was used for. While one listens, what is known of it is kept.
    groups: Arc<Mutex<HashMap<Group, KnownGroup>>>,
}

#[derive(Debug)]
struct KnownGroup {
    id: i64,
    _generation: watch::Receiver<i64>,
}

impl PostgresLeases {
    /// Connects, and creates or updates the store's tables.
    ///
    /// # Errors
    ///
    /// As [`PostgresBroker::connect`](crate::PostgresBroker::connect).
    pub async fn connect(config: PostgresConfig) -> Result<Self> {
        let database = Shared::open(&config).await?;
        Ok(Self::new(database, Arc::default()))
    }

    pub(super) fn new(database: Shared, ended: Arc<AtomicBool>) -> Self {
        Self {
            database,
            ended,
            groups: Arc::default(),
        }
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<Group, KnownGroup>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, name: &Group, group: i64) {
        let mut groups = self.groups();
        if groups.len() >= GROUPS_MAX {
            groups.clear();
        }
        let known = groups.entry(name.clone());
        known.or_insert_with(|| KnownGroup {
            id: group,
            _generation: self.database.wakes.group(group),
        });
    }

    async fn find(&self, name: &Group) -> Result<Option<i64>> {
        let known = self.groups().get(name).map(|known| known.id);
        if known.is_some() {
            return Ok(known);
        }
        let found = self.database.find_group(EXCHANGE, name).await?;
        if let Some(group) = found {
            self.remember(name, group);
        }
        Ok(found)
    }
}

/// Most groups that are remembered.
const GROUPS_MAX: usize = 1024;

const EXCHANGE: &str = "renew leases";
const LEAVE: &str = "leave group";

#[async_trait]
impl LeaseStore for PostgresLeases {
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        if self.ended.load(Ordering::Acquire) {
            let message = "the member has left";
            return Err(Error::new(ErrorKind::Closed, EXCHANGE, message));
        }
        request.topics.iter().try_for_each(LeaseTopic::check)?;
        let tables = &self.database.tables;
        let mut session = self.database.begin(EXCHANGE).await?;
        let group = meet_group(tables, &request.group, &mut session).await?;
        let exchange = Exchange {
            tables,
            group,
            request,
        };
        let (reply, generation) = exchange.serve(&mut session).await?;
        session.commit().await?;
        self.remember(&request.group, group);
        if let Some(generation) = generation {
            self.database.group_changed(group, generation);
        }
        Ok(reply)
    }

    async fn leave(&self, group: &Group, member: MemberId) -> Result<()> {
        match self.find(group).await? {
            Some(group) => leave(&self.database, group, member).await,
            None => Ok(()),
        }
    }

    async fn changed(&self, group: &Group) {
        let _waiting = self.database.wakes.wait();
        let mut generation = match self.find(group).await {
            Ok(Some(group)) => self.database.wakes.group(group),
            // The first exchange makes it known, and whoever asked finds out when it renews.
            Ok(None) => return pending().await,
            // It is a hint: the next exchange hears what is wrong.
            Err(_) => return sleep(BROKEN_PAUSE).await,
        };
        if generation.changed().await.is_err() {
            // It is dropped with the database only; then nothing changes any more.
            pending().await
        }
    }
}

/// Ends a member and frees what it holds.
pub(super) async fn leave(database: &Database, group: i64, member: MemberId) -> Result<()> {
    let tables = &database.tables;
    let mut session = database.begin(LEAVE).await?;
    lock_group(tables, group, &mut session).await?;
    let gone = sqlx::query(tables.sql("DELETE FROM {s}.members WHERE id = $1 RETURNING id"));
    let gone = session.rows(gone.bind(member.to_string())).await?;
    if gone.is_empty() {
        return session.commit().await;
    }
    free_orphans(tables, group, &mut session).await?;
    let generation = touch(tables, group, &mut session).await?;
    session.commit().await?;
    database.group_changed(group, generation);
    Ok(())
}

/// One exchange, with what it names found in the tables.
struct Exchange<'e> {
    tables: &'e Tables,
    group: i64,
    request: &'e LeaseRequest,
}

impl Exchange<'_> {
    /// The group after the exchange, and its generation if it changed.
    async fn serve(&self, session: &mut Session) -> Result<(LeaseReply, Option<i64>)> {
        let Self { tables, group, .. } = *self;
        let ended = end_overdue(tables, group, &self.request.dead, session).await?;
        if ended {
            // Before it joins: a member that comes too late holds nothing.
            free_orphans(tables, group, session).await?;
        }
        let mut changed = ended | self.join(session).await?;
        if !self.request.released.is_empty() {
            changed |= self.release(session).await?;
        }
        if !self.request.wanted.is_empty() {
            changed |= self.grant(session).await?;
        }
        let generation = match changed {
            true => Some(touch(tables, group, session).await?),
            false => None,
        };
        let mut members = members(tables, group, session).await?;
        let held = sqlx::query(tables.sql(SELECT_HELD)).bind(group);
        for row in &session.rows(held).await? {
            let (holder, lease) = read_lease(session, row)?;
            if let Some(member) = members.iter_mut().find(|member| member.id == holder) {
                member.leases.push(lease);
            }
        }
        Ok((LeaseReply::new(members), generation))
    }

    /// Counts the member anew; true when it was none.
    async fn join(&self, session: &mut Session) -> Result<bool> {
        let LeaseRequest { member, ttl, .. } = self.request;
        let topics = self.request.topics.iter();
        let topics: Vec<String> = topics.map(ToString::to_string).collect();
        let join = sqlx::query(self.tables.sql(JOIN))
            .bind(member.to_string())
            .bind(self.group)
            .bind(self.request.process.to_string())
            .bind(topics.join("\n"))
            .bind(
                i64::try_from(ttl.as_micros())
                    .unwrap_or(TTL_MAX)
                    .min(TTL_MAX),
            );
        let joined = session.rows(join).await?;
        let renewals: Option<i64> = joined
            .first()
            .map(|row| session.column(row, 0))
            .transpose()?;
        Ok(renewals == Some(0))
    }

    async fn release(&self, session: &mut Session) -> Result<bool> {
        let released = &self.request.released;
        let (topics, partitions) = columns(released.iter().map(|lease| &lease.place));
        let epochs = released.iter().map(|lease| lease.epoch as i64);
        let release = sqlx::query(self.tables.sql(RELEASE))
            .bind(self.group)
            .bind(self.request.member.to_string())
            .bind(topics)
            .bind(partitions)
            .bind(epochs.collect::<Vec<_>>());
        Ok(!session.rows(release).await?.is_empty())
    }

    async fn grant(&self, session: &mut Session) -> Result<bool> {
        let (topics, partitions) = columns(self.request.wanted.iter());
        let grant = sqlx::query(self.tables.sql(GRANT))
            .bind(self.group)
            .bind(self.request.member.to_string())
            .bind(topics)
            .bind(partitions);
        Ok(!session.rows(grant).await?.is_empty())
    }
}

/// A century, so that a deadline stays a number.
const TTL_MAX: i64 = 100 * 366 * 24 * 60 * 60 * 1_000_000;

/// How long a database that cannot be asked is left alone.
const BROKEN_PAUSE: Duration = Duration::from_millis(500);

const MEET_GROUP: &str = "
    INSERT INTO {s}.consumer_groups AS mine (name, seen) VALUES ($1, {now})
    ON CONFLICT (name) DO UPDATE
    SET seen = greatest(mine.seen, excluded.seen), expired = false
    RETURNING id";

const LOCK_GROUP: &str = "
    UPDATE {s}.consumer_groups SET seen = greatest(seen, {now}), expired = false WHERE id = $1";

const END_OVERDUE: &str = "
    DELETE FROM {s}.members
    WHERE consumer_group = $1 AND (deadline <= {now} OR id = ANY($2))
    RETURNING id";

/// Rows are locked in the order of their lanes first, as those who settle lock them.
const FREE_ORPHANS: &str = "
    WITH locked AS MATERIALIZED (
        SELECT topic, partition FROM {s}.leases
        WHERE consumer_group = $1 AND holder IS NOT NULL
            AND NOT EXISTS (SELECT 1 FROM {s}.members WHERE id = holder)
        ORDER BY lane FOR UPDATE
    )
    UPDATE {s}.leases AS mine SET holder = NULL FROM locked
    WHERE mine.consumer_group = $1
        AND mine.topic = locked.topic AND mine.partition = locked.partition";

const JOIN: &str = "
    INSERT INTO {s}.members AS mine (id, consumer_group, process, topics, deadline)
    VALUES ($1, $2, $3, $4, {now} + $5)
    ON CONFLICT (id) DO UPDATE
    SET process = excluded.process, topics = excluded.topics, deadline = excluded.deadline,
        renewals = mine.renewals + 1
    RETURNING renewals";

const RELEASE: &str = "
    WITH locked AS MATERIALIZED (
        SELECT mine.topic, mine.partition
        FROM {s}.leases AS mine
        JOIN unnest($3::text[], $4::int[], $5::bigint[]) AS released(topic, partition, epoch)
            ON mine.topic = released.topic AND mine.partition = released.partition
            AND mine.epoch = released.epoch
        WHERE mine.consumer_group = $1 AND mine.holder = $2
        ORDER BY mine.lane FOR UPDATE OF mine
    )
    UPDATE {s}.leases AS mine SET holder = NULL FROM locked
    WHERE mine.consumer_group = $1
        AND mine.topic = locked.topic AND mine.partition = locked.partition
    RETURNING mine.epoch";

const GRANT: &str = "
    INSERT INTO {s}.leases AS mine (consumer_group, topic, partition, lane, epoch, holder)
    SELECT $1, wanted.topic, wanted.partition, topic.first_lane + wanted.partition, 1, $2
    FROM (SELECT DISTINCT * FROM unnest($3::text[], $4::int[])) AS wanted(topic, partition)
    LEFT JOIN {s}.topics AS topic
        ON topic.name = wanted.topic AND wanted.partition < topic.partitions
    ORDER BY topic.first_lane + wanted.partition
    ON CONFLICT (consumer_group, topic, partition) DO UPDATE
    SET holder = excluded.holder, lane = excluded.lane, epoch = mine.epoch + 1
    WHERE mine.holder IS NULL
    RETURNING epoch";

const TOUCH: &str = "
    UPDATE {s}.consumer_groups SET generation = generation + 1 WHERE id = $1 RETURNING generation";

const SELECT_MEMBERS: &str = "
    SELECT id, process, topics FROM {s}.members WHERE consumer_group = $1";

const SELECT_HELD: &str = "
    SELECT holder, topic, partition, epoch FROM {s}.leases
    WHERE consumer_group = $1 AND holder IS NOT NULL";

/// Finds a group or creates it; otherwise as [`lock_group`].
async fn meet_group(tables: &Tables, name: &Group, session: &mut Session) -> Result<i64> {
    let meet = sqlx::query(tables.sql(MEET_GROUP)).bind(name.as_str());
    let rows = session.rows(meet).await?;
    let id = rows.first().map(|row| session.column(row, 0)).transpose()?;
    id.ok_or_else(lost_group)
}

/// Takes note that the group lives, and lets others of it wait, so that each sees what the one
/// before it did.
pub(super) async fn lock_group(tables: &Tables, group: i64, session: &mut Session) -> Result<()> {
    let lock = sqlx::query(tables.sql(LOCK_GROUP)).bind(group);
    session.rows(lock).await.map(|_| ())
}

/// Ends members whose time is over or who are named; returns whether any did.
pub(super) async fn end_overdue(
    tables: &Tables,
    group: i64,
    dead: &[MemberId],
    session: &mut Session,
) -> Result<bool> {
    let dead: Vec<String> = dead.iter().map(MemberId::to_string).collect();
    let end = sqlx::query(tables.sql(END_OVERDUE)).bind(group).bind(dead);
    Ok(!session.rows(end).await?.is_empty())
}

async fn free_orphans(tables: &Tables, group: i64, session: &mut Session) -> Result<()> {
    let free = sqlx::query(tables.sql(FREE_ORPHANS)).bind(group);
    session.rows(free).await.map(|_| ())
}

/// Takes note that the group changed; returns its generation.
async fn touch(tables: &Tables, group: i64, session: &mut Session) -> Result<i64> {
    let touch = sqlx::query(tables.sql(TOUCH)).bind(group);
    let rows = session.rows(touch).await?;
    let generation = rows.first().map(|row| session.column(row, 0)).transpose()?;
    generation.ok_or_else(lost_group)
}

fn lost_group() -> Error {
    let message = "the group's row is gone: restore the tables from a copy";
    Error::new(ErrorKind::Codec, EXCHANGE, message)
}

/// Places as arrays.
fn columns<'p>(places: impl Iterator<Item = &'p TopicPartition>) -> (Vec<&'p str>, Vec<i32>) {
    let pair = |place: &'p TopicPartition| (place.topic.as_str(), place.partition as i32);
    places.map(pair).unzip()
}

/// The members of a group, whoever they are.
pub(super) async fn members(
    tables: &Tables,
    group: i64,
    session: &mut Session,
) -> Result<Vec<LeaseMember>> {
    let members = sqlx::query(tables.sql(SELECT_MEMBERS)).bind(group);
    let rows = session.rows(members).await?;
    rows.iter().map(|row| read_member(session, row)).collect()
}

fn read_member(session: &Session, row: &PgRow) -> Result<LeaseMember> {
    let text = |index| session.column::<String>(row, index);
    let topics = text(2)?;
    let topics = topics.lines().map(str::parse).collect::<Result<_>>()?;
    Ok(LeaseMember::new(
        text(0)?.parse()?,
        text(1)?.parse()?,
        topics,
    ))
}

fn read_lease(session: &Session, row: &PgRow) -> Result<(MemberId, Lease)> {
    let holder: String = session.column(row, 0)?;
    let topic: String = session.column(row, 1)?;
    let partition: i32 = session.column(row, 2)?;
    let epoch: i64 = session.column(row, 3)?;
    let lease = Lease {
        place: TopicPartition::new(Topic::new(&topic)?, partition as u32),
        epoch: epoch as u64,
    };
    Ok((holder.parse()?, lease))
}
