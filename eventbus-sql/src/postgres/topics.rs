//! Topics as the database has them: created once, with a partition count that never changes.

use std::sync::Arc;

use eventbus_core::log::TopicLanes;
use eventbus_core::{Error, ErrorKind, Result, Topic, TopicSpec};
use sqlx::postgres::PgRow;

use super::config::PARTITIONS_MAX;
use super::database::Database;
use super::session::{Session, column};

/// A topic after it was applied.
#[derive(Clone, Debug)]
pub(super) struct Applied {
    pub(super) topic: Arc<TopicLanes>,
    pub(super) created: bool,
    /// As the database has them.
    pub(super) retention: Option<i64>,
    pub(super) retention_bytes: Option<i64>,
}

const CREATE_TOPICS: &str = "create topics";
const READ_TOPICS: &str = "read topics";

/// One at a time creates topics, so that their lanes follow each other; reading goes on.
const LOCK: &str = "LOCK TABLE {s}.topics IN SHARE ROW EXCLUSIVE MODE";

const CREATE: &str = "
    INSERT INTO {s}.topics (name, partitions, first_lane, retention, retention_bytes)
    VALUES ($1, $2, (SELECT coalesce(max(first_lane + partitions), 1) FROM {s}.topics), $3, $4)
    ON CONFLICT (name) DO NOTHING RETURNING id";

const CREATE_LANES: &str = "
    INSERT INTO {s}.lanes (id, base, next, newest, bytes)
    SELECT id, 0, 0, 0, 0 FROM generate_series($1::int, $1::int + $2::int - 1) AS id";

const FIND: &str = "
    SELECT partitions, first_lane, retention, retention_bytes FROM {s}.topics WHERE name = $1";

impl Database {
    /// Finds topics and creates the missing ones with the defaults.
    pub(super) async fn topics_of(&self, names: &[Topic]) -> Result<Vec<Arc<TopicLanes>>> {
        let known = |name| self.known_topic(name);
        if let Some(all) = names.iter().map(known).collect::<Option<Vec<_>>>() {
            return Ok(all);
        }
        let specs: Vec<_> = names.iter().cloned().map(TopicSpec::new).collect();
        let applied = self.apply_topics(&specs).await?;
        Ok(applied.into_iter().map(|applied| applied.topic).collect())
    }

    /// Finds topics and creates the missing ones as declared.
    pub(super) async fn apply_topics(&self, specs: &[TopicSpec]) -> Result<Vec<Applied>> {
        let mut session = self.begin(CREATE_TOPICS).await?;
        session.run(self.tables.sql(LOCK)).await?;
        let mut all = Vec::with_capacity(specs.len());
        for spec in specs {
            all.push(self.apply_one(spec, &mut session).await?);
        }
        session.commit().await?;
        for applied in &mut all {
            applied.topic = self.topics().remember(&applied.topic);
        }
        Ok(all)
    }

    async fn apply_one(&self, spec: &TopicSpec, session: &mut Session) -> Result<Applied> {
        let default = match spec.name.is_dead_letters() {
            true => 1,
            false => self.config.partitions,
        };
        let partitions = spec.partitions.unwrap_or(default);
        let query = sqlx::query(self.tables.sql(CREATE))
            .bind(spec.name.as_str())
            .bind(partitions as i32)
            .bind(spec.retention.map(|time| saturated(time.as_micros())))
            .bind(spec.retention_bytes.map(|bytes| saturated(bytes.into())));
        let created = !session.rows(query).await?.is_empty();
        let find = sqlx::query(self.tables.sql(FIND)).bind(spec.name.as_str());
        let rows = session.rows(find).await?;
        let row = rows.first().ok_or_else(|| odd_topic(&spec.name))?;
        let topic = read_topic(spec.name.clone(), row)?;
        if created {
            let lanes = sqlx::query(self.tables.sql(CREATE_LANES))
                .bind(topic.first_lane as i32)
                .bind(topic.partitions as i32);
            session.rows(lanes).await?;
        }
        Ok(Applied {
            created,
            retention: session.column(row, 2)?,
            retention_bytes: session.column(row, 3)?,
            topic: Arc::new(topic),
        })
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
        let sql = self.tables.sql(FIND);
        let rows = self
            .query(operation, || sqlx::query(sql.clone()).bind(name.as_str()))
            .await?;
        let row = rows.first().ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                operation,
                "the topic does not exist: create it with `apply_topics`",
            )
            .with("topic", name)
        })?;
        let topic = Arc::new(read_topic(name.clone(), row)?);
        Ok(self.topics().remember(&topic))
    }

    /// The names of all topics, in their order.
    pub(super) async fn topic_names(&self, operation: &'static str) -> Result<Vec<Topic>> {
        let sql = "SELECT name FROM {s}.topics ORDER BY name COLLATE \"C\"";
        let sql = self.tables.sql(sql);
        let rows = self.query(operation, || sqlx::query(sql.clone())).await?;
        let names = rows.iter().map(|row| {
            let name: String = self.column(operation, row, 0)?;
            Topic::new(&name)
        });
        names.collect()
    }
}

fn read_topic(name: Topic, row: &PgRow) -> Result<TopicLanes> {
    let number = |index| -> Result<u32> {
        let number: i32 = column(READ_TOPICS, row, index)?;
        u32::try_from(number).map_err(|_| odd_topic(&name))
    };
    let (partitions, first_lane) = (number(0)?, number(1)?);
    if !(1..=PARTITIONS_MAX).contains(&partitions) {
        return Err(odd_topic(&name));
    }
    Ok(TopicLanes::new(name, partitions, first_lane))
}

fn odd_topic(name: &Topic) -> Error {
    Error::new(
        ErrorKind::Codec,
        READ_TOPICS,
        "the topic's row is not what the broker wrote: restore the tables from a copy",
    )
    .with("topic", name)
}

/// As PostgreSQL keeps numbers.
pub(super) fn saturated(number: u128) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
