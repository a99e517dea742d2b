//! Groups: where a new one begins on each lane, and where its next owner goes on.

use std::collections::HashMap;
use std::sync::Arc;

use eventbus_core::log::{Place, TopicLanes};
use eventbus_core::{Error, ErrorKind, Group, Lease, Position, Result, Start};
use futures_util::FutureExt;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};
use tokio::sync::Notify;

use super::append::{LaneRow, SELECT_LANES};
use super::database::Database;
use super::error::into_error;
use super::settle::cursor_seal;
use super::tables::Tables;

/// A group as the database has it.
#[derive(Clone, Debug)]
pub(super) struct GroupRow {
    pub(super) id: i64,
    pub(super) name: Group,
}

/// A group's place on a lane.
#[derive(Clone, Copy, Debug)]
pub(super) struct CursorRow {
    pub(super) position: u64,
    pub(super) epoch: u64,
}

impl CursorRow {
    /// Reads `lane, position, seal, epoch`.
    pub(super) fn read(group: i64, row: &SqliteRow) -> Result<(u32, Self), sqlx::Error> {
        let column = |index: usize| row.try_get::<i64, _>(index);
        let (lane, position, seal) = (column(0)?, column(1)?, column(2)?);
        // Whatever does not fit is refused by its checksum.
        let (lane, position) = (lane as u32, position as u64);
        if seal != cursor_seal(group, lane, position) {
            let reason =
                format!("the checksum of the place of group {group} on lane {lane} is wrong");
            return Err(sqlx::Error::Decode(reason.into()));
        }
        let epoch = column(3)? as u64;
        Ok((lane, Self { position, epoch }))
    }
}

/// Where a new group begins on a lane.
#[derive(Clone, Copy, Debug)]
struct Beginning {
    lane: u32,
    at: At,
}

#[derive(Clone, Copy, Debug)]
enum At {
    Base,
    Next,
    Position(u64),
}

pub(super) const SELECT_CURSORS: &str = "
    SELECT lane, position, seal, epoch FROM {p}cursors
    WHERE consumer_group = ?1 AND lane IN (SELECT value FROM json_each(?2))";

const INSERT_CURSORS: &str = "
    INSERT INTO {p}cursors (consumer_group, lane, position, seal)
    SELECT ?1, value->>0, value->>1, value->>2 FROM json_each(?2)";

pub(super) const INSERT_GROUP: &str = "
    INSERT INTO {p}consumer_groups (name, seen) VALUES (?1, ?2)
    ON CONFLICT (name) DO UPDATE SET seen = max(seen, excluded.seen), expired = 0
    RETURNING id";

impl Database {
    /// Finds a group or creates it, and gives it a place on each lane where it has none.
    pub(super) async fn join_group(
        &self,
        name: &Group,
        topics: &[Arc<TopicLanes>],
        start: Start,
    ) -> Result<GroupRow> {
        let beginnings = self.beginnings(topics, start).await?;
        let (tables, group) = (self.tables.clone(), name.clone());
        let now = self.now().as_micros();
        let id = self
            .writer
            .run("subscribe", move |connection| {
                let (tables, group) = (tables.clone(), group.clone());
                let beginnings = beginnings.clone();
                async move { join(&tables, &group, now, &beginnings, connection).await }.boxed()
            })
            .await?;
        Ok(GroupRow {
            id,
            name: name.clone(),
        })
    }

    async fn beginnings(&self, topics: &[Arc<TopicLanes>], start: Start) -> Result<Vec<Beginning>> {
        let mut beginnings = Vec::new();
        for (_, lane) in topics.iter().flat_map(|topic| topic.lanes()) {
            let at = match start {
                Start::Earliest => At::Base,
                Start::Latest => At::Next,
                start => At::Position(self.start_position(lane, start).await?),
            };
            beginnings.push(Beginning { lane, at });
        }
        Ok(beginnings)
    }

    /// Finds a group that subscribed before.
    pub(super) async fn find_group(
        &self,
        operation: &'static str,
        name: &Group,
    ) -> Result<Option<i64>> {
        let sql = self.sql("SELECT id FROM {p}consumer_groups WHERE name = ?");
        let rows = self
            .read(operation, sqlx::query(sql).bind(name.as_str()))
            .await?;
        let id = rows.first().map(|row| row.try_get(0)).transpose();
        id.map_err(|error| self.error(operation, error))
    }

    /// All groups, by name.
    pub(super) async fn groups(&self, operation: &'static str) -> Result<Vec<(Group, i64)>> {
        let query = sqlx::query(self.sql("SELECT name, id FROM {p}consumer_groups ORDER BY name"));
        let rows = self.read(operation, query).await?;
        let groups = rows.iter().map(|row| {
            let native = |error| self.error(operation, error);
            let name: String = row.try_get(0).map_err(native)?;
            Ok((Group::new(&name)?, row.try_get(1).map_err(native)?))
        });
        groups.collect()
    }

    /// The places of a group on these lanes.
    pub(super) async fn cursors(
        &self,
        operation: &'static str,
        group: i64,
        lanes: &[u32],
    ) -> Result<HashMap<u32, CursorRow>> {
        let query = sqlx::query(self.sql(SELECT_CURSORS))
            .bind(group)
            .bind(format!("{lanes:?}"));
        let rows = self.read(operation, query).await?;
        let rows = rows.iter().map(|row| CursorRow::read(group, row));
        rows.collect::<Result<_, _>>()
            .map_err(|error| self.error(operation, error))
    }

    /// These lanes as their rows say.
    pub(super) async fn lanes(
        &self,
        operation: &'static str,
        lanes: &[u32],
    ) -> Result<HashMap<u32, LaneRow>> {
        let query = sqlx::query(self.sql(SELECT_LANES)).bind(format!("{lanes:?}"));
        let rows = self.read(operation, query).await?;
        rows.iter()
            .map(LaneRow::read)
            .collect::<Result<_, _>>()
            .map_err(|error| self.error(operation, error))
    }

    /// Where the group goes on at the places that were granted; one that was granted to somebody
    /// else since is left out.
    pub(super) async fn granted_places(
        &self,
        group: i64,
        leases: &[Lease],
        notify: &Arc<Notify>,
    ) -> Result<Vec<Place>> {
        let mut granted = Vec::with_capacity(leases.len());
        for lease in leases {
            let topic = self
                .find_topic("open partitions", &lease.place.topic)
                .await?;
            granted.push((topic, lease));
        }
        let row =
            |(topic, lease): &(Arc<TopicLanes>, &Lease)| topic.first_lane + lease.place.partition;
        let rows: Vec<u32> = granted.iter().map(row).collect();
        let cursors = self.cursors("open partitions", group, &rows).await?;
        let lanes = self.lanes("open partitions", &rows).await?;
        let mut places = Vec::with_capacity(granted.len());
        for ((topic, lease), row) in granted.into_iter().zip(rows) {
            let (Some(cursor), Some(lane)) = (cursors.get(&row), lanes.get(&row)) else {
                continue;
            };
            if cursor.epoch != lease.epoch {
                continue;
            }
            let end = self.wakes.lane(row, lane.next.into());
            end.listen(notify);
            places.push(Place {
                topic,
                partition: lease.place.partition,
                position: cursor.position.into(),
                until: Position(u128::MAX),
                left: None,
                end,
                epoch: Some(lease.epoch),
            });
        }
        Ok(places)
    }
}

async fn join(
    tables: &Tables,
    name: &Group,
    now: i64,
    beginnings: &[Beginning],
    connection: &mut SqliteConnection,
) -> Result<i64> {
    let native = |error| into_error("subscribe", error);
    let row = sqlx::query(tables.sql(INSERT_GROUP))
        .bind(name.as_str())
        .bind(now)
        .fetch_one(&mut *connection)
        .await
        .map_err(native)?;
    let group: i64 = row.try_get(0).map_err(native)?;
    let lanes: Vec<u32> = beginnings.iter().map(|beginning| beginning.lane).collect();
    let lanes = format!("{lanes:?}");
    let known = sqlx::query(tables.sql(SELECT_CURSORS))
        .bind(group)
        .bind(&lanes)
        .fetch_all(&mut *connection)
        .await
        .map_err(native)?;
    let known: HashMap<u32, CursorRow> = known
        .iter()
        .map(|row| CursorRow::read(group, row))
        .collect::<Result<_, _>>()
        .map_err(native)?;
    let rows = sqlx::query(tables.sql(SELECT_LANES))
        .bind(&lanes)
        .fetch_all(&mut *connection)
        .await
        .map_err(native)?;
    let rows: HashMap<u32, LaneRow> = rows
        .iter()
        .map(LaneRow::read)
        .collect::<Result<_, _>>()
        .map_err(native)?;
    let mut new = Vec::new();
    for Beginning { lane, at } in beginnings {
        if known.contains_key(lane) {
            continue;
        }
        let row = rows.get(lane).ok_or_else(|| missing_lane(*lane))?;
        let position = match at {
            At::Base => row.base,
            At::Next => row.next,
            At::Position(position) => *position,
        };
        let seal = cursor_seal(group, *lane, position);
        new.push(format!("[{lane},{position},{seal}]"));
    }
    if !new.is_empty() {
        sqlx::query(tables.sql(INSERT_CURSORS))
            .bind(group)
            .bind(format!("[{}]", new.join(",")))
            .execute(connection)
            .await
            .map_err(native)?;
    }
    Ok(group)
}

fn missing_lane(lane: u32) -> Error {
    Error::new(
        ErrorKind::Codec,
        "subscribe",
        "a partition's row is missing: the file is damaged, restore it from a copy",
    )
    .with("lane", lane)
}
