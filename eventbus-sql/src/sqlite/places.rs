//! The leases of places that are no partitions of the log, such as the lanes of an outbox.

use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::{
    Group, LeaseReply, LeaseRequest, LeaseStore, MemberId, Result, TopicPartition,
};
use futures_util::FutureExt;
use sqlx::Row;

use super::error::into_error;
use super::groups::INSERT_GROUP;
use super::leases::{EXCHANGE, Exchange, LeaseTable, leave, listed};
use super::store::SqliteStore;

const PLACES: LeaseTable = LeaseTable {
    free_orphans: "
        UPDATE {p}leases SET holder = NULL
        WHERE consumer_group = ?1 AND holder IS NOT NULL
            AND holder NOT IN (SELECT id FROM {p}members WHERE consumer_group = ?1)",
    release: "
        UPDATE {p}leases AS mine SET holder = NULL
        FROM (
            SELECT value->>0 AS topic, value->>1 AS partition, value->>2 AS epoch FROM json_each(?3)
        ) AS released
        WHERE mine.consumer_group = ?1 AND mine.holder = ?2 AND mine.topic = released.topic
            AND mine.partition = released.partition AND mine.epoch = released.epoch
        RETURNING partition",
    grant: "
        INSERT INTO {p}leases (consumer_group, topic, partition, epoch, holder)
        SELECT ?1, value->>0, value->>1, 1, ?2 FROM json_each(?3) WHERE true
        ON CONFLICT DO UPDATE SET holder = excluded.holder, epoch = epoch + 1
        WHERE holder IS NULL
        RETURNING partition",
    select_held: "
        SELECT holder, topic, partition, epoch FROM {p}leases
        WHERE consumer_group = ? AND holder IS NOT NULL",
};

impl SqliteStore {
    /// The group's number; it is made known if it is not.
    async fn group_id(&self, group: &Group) -> Result<i64> {
        if let Some(id) = self.database.find_group(EXCHANGE, group).await? {
            return Ok(id);
        }
        let (tables, group) = (self.database.tables.clone(), group.clone());
        let now = self.database.now().as_micros();
        let added = self.database.writer.run(EXCHANGE, move |connection| {
            let query = sqlx::query(tables.sql(INSERT_GROUP))
                .bind(group.to_string())
                .bind(now);
            async move {
                let row = query.fetch_one(connection).await;
                let id = row.and_then(|row| row.try_get(0));
                id.map_err(|error| into_error(EXCHANGE, error))
            }
            .boxed()
        });
        added.await
    }
}

/// A place as JSON: a topic's name has no character that JSON escapes.
fn listed_place(place: &TopicPartition) -> String {
    format!("[\"{}\",{}]", place.topic, place.partition)
}

#[async_trait]
impl LeaseStore for SqliteStore {
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        let group = self.group_id(&request.group).await?;
        let released = request.released.iter().map(|lease| {
            let (place, epoch) = (&lease.place, lease.epoch);
            format!("[\"{}\",{},{epoch}]", place.topic, place.partition)
        });
        let exchange = Arc::new(Exchange {
            tables: self.database.tables.clone(),
            table: &PLACES,
            group,
            now: self.database.now().as_micros(),
            wanted: listed(request.wanted.iter().map(listed_place)),
            released: listed(released),
            dead: listed(request.dead.iter().map(|id| format!("\"{id}\""))),
            request: request.clone(),
        });
        exchange.run(&self.database).await
    }

    async fn leave(&self, group: &Group, member: MemberId) -> Result<()> {
        match self.database.find_group(EXCHANGE, group).await? {
            Some(group) => leave(&self.database, &PLACES, group, member).await,
            None => Ok(()),
        }
    }

    async fn changed(&self, group: &Group) {
        let _waiting = self.database.wakes.wait();
        // As it stands in the file: what this process knows of a group nobody waited for is old, and
        // would be a change as soon as the file is looked at.
        let Ok(Some((group, seen))) = self.version(group).await else {
            // It is a hint: members find out when they renew.
            return std::future::pending().await;
        };
        let mut generation = self.database.wakes.group(group);
        let newer = generation.wait_for(|generation| *generation > seen);
        if newer.await.is_err() {
            // It is dropped with the database only; then nothing changes any more.
            std::future::pending().await
        }
    }
}
