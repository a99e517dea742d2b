//! Topics as the database has them: created once, with a partition count that never changes.

use std::sync::Arc;

use eventbus_core::log::TopicLanes;
use eventbus_core::{Error, ErrorKind, Result, Topic, TopicSpec};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use super::config::PARTITIONS_MAX;
use super::database::Database;
use super::error::into_error;
use super::headers::{LANE_END, seal};
use super::tables::Tables;

fn read_topic(name: Topic, row: &SqliteRow) -> Result<TopicLanes> {
    let column = |index| -> Result<u32> {
        let number: i64 = row
            .try_get(index)
            .map_err(|error| into_error("read topics", error))?;
        u32::try_from(number).map_err(|_| odd_topic(&name))
    };
    let (partitions, first_lane) = (column(0)?, column(1)?);
    let sound = (1..=PARTITIONS_MAX).contains(&partitions) && first_lane < LANE_END - partitions;
    if !sound {
        return Err(odd_topic(&name));
    }
    Ok(TopicLanes::new(name, partitions, first_lane))
}

fn odd_topic(name: &Topic) -> Error {
    Error::new(
        ErrorKind::Codec,
        "read topics",
        "the topic's row is damaged: restore the file from a copy",
    )
    .with("topic", name)
}

/// A topic after it was applied.
#[derive(Clone, Debug)]
pub(super) struct Applied {
    pub(super) topic: Arc<TopicLanes>,
    pub(super) created: bool,
    /// As the database has them.
    pub(super) retention: Option<i64>,
    pub(super) retention_bytes: Option<i64>,
}

impl Database {
    /// Finds topics and creates the missing ones with the defaults.
    pub(super) async fn topics_of(&self, names: &[Topic]) -> Result<Vec<Arc<TopicLanes>>> {
        let known = |name| self.known_topic(name);
        if let Some(all) = names.iter().map(known).collect::<Option<Vec<_>>>() {
            return Ok(all);
        }
        let specs = names.iter().cloned().map(TopicSpec::new).collect();
        let applied = self.apply_topics(specs).await?;
        Ok(applied.into_iter().map(|applied| applied.topic).collect())
    }

    /// Finds topics and creates the missing ones as declared.
    pub(super) async fn apply_topics(&self, specs: Vec<TopicSpec>) -> Result<Vec<Applied>> {
        let tables = self.tables.clone();
        let default = self.config.partitions;
        let applied = self.writer.run("create topics", move |connection| {
            apply(tables.clone(), specs.clone(), default, connection)
        });
        let applied = applied.await?;
        for applied in &applied {
            self.remember(&applied.topic);
        }
        Ok(applied)
    }

    /// Finds a topic that exists already.
    pub(super) async fn find_topic(
        &self,
        operation: &'static str,
        name: &Topic,
    ) -> Result<Arc<TopicLanes>> {
        if let Some(topic) = self.known_topic(name) {
            return Ok(topic);
        }
        let query = sqlx::query(self.sql(FIND)).bind(name.as_str());
        let rows = self.read(operation, query).await?;
        let row = rows.first().ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                operation,
                "the topic does not exist: create it with `apply_topics`",
            )
            .with("topic", name)
        })?;
        let topic = Arc::new(read_topic(name.clone(), row)?);
        Ok(self.remember(&topic))
    }

    /// The names of all topics, in their order.
    pub(super) async fn topic_names(&self, operation: &'static str) -> Result<Vec<Topic>> {
        let query = sqlx::query(self.sql("SELECT name FROM {p}topics ORDER BY name"));
        let rows = self.read(operation, query).await?;
        let names = rows.iter().map(|row| {
            let name: String = row
                .try_get(0)
                .map_err(|error| self.error(operation, error))?;
            Topic::new(&name)
        });
        names.collect()
    }

    fn remember(&self, topic: &Arc<TopicLanes>) -> Arc<TopicLanes> {
        self.topics().remember(topic)
    }
}

/// By the table itself: a topic that a damaged index hides would be created again, empty.
const FIND: &str = "SELECT partitions, first_lane, retention, retention_bytes FROM {p}topics NOT INDEXED WHERE name = ?";

fn apply(
    tables: Tables,
    specs: Vec<TopicSpec>,
    default: u32,
    connection: &mut SqliteConnection,
) -> BoxFuture<'_, Result<Vec<Applied>>> {
    async move {
        let mut all = Vec::with_capacity(specs.len());
        for spec in &specs {
            let partitions = spec
                .partitions
                .unwrap_or(match spec.name.is_dead_letters() {
                    true => 1,
                    false => default,
                });
            all.push(apply_one(&tables, spec, partitions, connection).await?);
        }
        Ok(all)
    }
    .boxed()
}

async fn apply_one(
    tables: &Tables,
    spec: &TopicSpec,
    partitions: u32,
    connection: &mut SqliteConnection,
) -> Result<Applied> {
    let native = |error| into_error("create topics", error);
    let created = sqlx::query(tables.sql(CREATE))
        .bind(spec.name.as_str())
        .bind(partitions)
        .bind(spec.retention.map(|time| saturated(time.as_micros())))
        .bind(spec.retention_bytes.map(|bytes| saturated(bytes.into())))
        .fetch_all(&mut *connection)
        .await
        .map_err(native)?;
    let rows = sqlx::query(tables.sql(FIND))
        .bind(spec.name.as_str())
        .fetch_all(&mut *connection)
        .await
        .map_err(native)?;
    let row = rows.first().ok_or_else(|| odd_topic(&spec.name))?;
    let topic = read_topic(spec.name.clone(), row)?;
    if !created.is_empty() {
        create_lanes(tables, &topic, connection).await?;
    }
    Ok(Applied {
        created: !created.is_empty(),
        retention: row.try_get(2).map_err(native)?,
        retention_bytes: row.try_get(3).map_err(native)?,
        topic: Arc::new(topic),
    })
}

const CREATE: &str = "
    INSERT INTO {p}topics (name, partitions, first_lane, retention, retention_bytes)
    VALUES (?1, ?2, (SELECT coalesce(max(first_lane + partitions), 1) FROM {p}topics), ?3, ?4)
    ON CONFLICT (name) DO NOTHING RETURNING id";

async fn create_lanes(
    tables: &Tables,
    topic: &TopicLanes,
    connection: &mut SqliteConnection,
) -> Result<()> {
    let rows: Vec<String> = topic
        .lanes()
        .map(|(_, lane)| format!("[{lane},{}]", seal([lane.into(), 0, 0, i64::MIN])))
        .collect();
    sqlx::query(tables.sql(CREATE_LANES))
        .bind(i64::MIN)
        .bind(format!("[{}]", rows.join(",")))
        .execute(connection)
        .await
        .map_err(|error| into_error("create topics", error))?;
    Ok(())
}

const CREATE_LANES: &str = "
    INSERT INTO {p}lanes (id, base, next, newest, bytes, seal)
    SELECT value->>0, 0, 0, ?1, 0, value->>1 FROM json_each(?2)";

/// As SQLite keeps numbers.
pub(super) fn saturated(number: u128) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
