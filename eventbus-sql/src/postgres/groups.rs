//! Groups: where a new one begins on each lane, and where its next owner goes on.

use std::sync::Arc;

use eventbus_core::log::{Place, TopicLanes};
use eventbus_core::{Group, Lease, Position, Result, Start};
use tokio::sync::Notify;

use super::database::Database;
use super::page::{ids, stored};

const SUBSCRIBE: &str = "subscribe";
const OPEN: &str = "open partitions";

const INSERT_GROUP: &str = "
    INSERT INTO {s}.consumer_groups (name, seen) VALUES ($1, {now})
    ON CONFLICT (name) DO UPDATE
    SET seen = greatest(consumer_groups.seen, excluded.seen), expired = false
    RETURNING id";

/// Holds the lanes, so that retention does not pass a new place before it is seen.
const INSERT_CURSORS: &str = "
    WITH begun AS MATERIALIZED (
        SELECT lane.id, lane.base, lane.next FROM {s}.lanes AS lane
        WHERE lane.id = ANY($2::int[]) AND NOT EXISTS (
            SELECT 1 FROM {s}.cursors WHERE consumer_group = $1 AND lane = lane.id
        )
        ORDER BY lane.id FOR SHARE OF lane
    )
    INSERT INTO {s}.cursors (consumer_group, lane, position)
    SELECT $1, begun.id,
        coalesce(start.position, CASE WHEN $4 THEN begun.next ELSE begun.base END)
    FROM begun JOIN unnest($2::int[], $3::bigint[]) AS start(lane, position)
        ON start.lane = begun.id
    ON CONFLICT (consumer_group, lane) DO NOTHING";

const SELECT_PLACES: &str = "
    SELECT mine.lane, mine.position, lane.next
    FROM unnest($2::int[], $3::bigint[]) AS granted(lane, epoch)
    JOIN {s}.leases AS lease ON lease.consumer_group = $1 AND lease.lane = granted.lane
        AND lease.epoch = granted.epoch
    JOIN {s}.cursors AS mine ON mine.consumer_group = $1 AND mine.lane = granted.lane
    JOIN {s}.lanes AS lane ON lane.id = mine.lane";

impl Database {
    /// Finds a group or creates it, and gives it a place on each lane where it has none.
    pub(super) async fn join_group(
        &self,
        name: &Group,
        topics: &[Arc<TopicLanes>],
        start: Start,
    ) -> Result<i64> {
        let lanes: Vec<u32> = lanes_of(topics);
        let positions: Vec<Option<i64>> = match start {
            Start::Earliest | Start::Latest => vec![None; lanes.len()],
            start => {
                let found = self.start_positions(SUBSCRIBE, &lanes, start).await?;
                let position = |lane| found.get(lane).copied().map(stored);
                lanes.iter().map(position).collect()
            }
        };
        let mut session = self.begin(SUBSCRIBE).await?;
        let insert = sqlx::query(self.tables.sql(INSERT_GROUP)).bind(name.as_str());
        let rows = session.rows(insert).await?;
        let id = rows.first().map(|row| session.column(row, 0)).transpose()?;
        // An insert that finds the name taken updates it, so there is a row.
        let id: i64 = id.unwrap_or_default();
        let cursors = sqlx::query(self.tables.sql(INSERT_CURSORS))
            .bind(id)
            .bind(ids(&lanes))
            .bind(positions)
            .bind(start == Start::Latest);
        session.rows(cursors).await?;
        session.commit().await?;
        Ok(id)
    }

    /// Finds a group that is known already.
    pub(super) async fn find_group(
        &self,
        operation: &'static str,
        name: &Group,
    ) -> Result<Option<i64>> {
        let sql = self
            .tables
            .sql("SELECT id FROM {s}.consumer_groups WHERE name = $1");
        let rows = self
            .query(operation, || sqlx::query(sql.clone()).bind(name.as_str()))
            .await?;
        let id = rows.first().map(|row| self.column(operation, row, 0));
        id.transpose()
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
            let topic = self.find_topic(OPEN, &lease.place.topic).await?;
            let lane = topic.first_lane + lease.place.partition;
            granted.push((topic, lease, lane));
        }
        let lanes: Vec<u32> = granted.iter().map(|(_, _, lane)| *lane).collect();
        let epochs: Vec<i64> = leases.iter().map(|lease| lease.epoch as i64).collect();
        let sql = self.tables.sql(SELECT_PLACES);
        let rows = self.query(OPEN, || {
            let query = sqlx::query(sql.clone()).bind(group);
            query.bind(ids(&lanes)).bind(&epochs)
        });
        let mut places = Vec::with_capacity(granted.len());
        for row in &rows.await? {
            let lane: i32 = self.column(OPEN, row, 0)?;
            let position: i64 = self.column(OPEN, row, 1)?;
            let next: i64 = self.column(OPEN, row, 2)?;
            let lane = lane as u32;
            let Some((topic, lease, _)) = granted.iter().find(|(_, _, known)| *known == lane)
            else {
                continue;
            };
            let end = self.wakes.lane(lane, (next as u64).into());
            end.listen(notify);
            places.push(Place {
                topic: Arc::clone(topic),
                partition: lease.place.partition,
                position: (position as u64).into(),
                until: Position(u128::MAX),
                left: None,
                end,
                epoch: Some(lease.epoch),
            });
        }
        Ok(places)
    }
}

/// All lanes of these topics.
pub(super) fn lanes_of(topics: &[Arc<TopicLanes>]) -> Vec<u32> {
    let lanes = topics.iter().flat_map(|topic| topic.lanes());
    lanes.map(|(_, lane)| lane).collect()
}
