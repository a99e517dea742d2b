//! Reading the log: a page of messages at a time, what is missing of it, and the search for a time.

use bytes::Bytes;
use eventbus_core::log::{PAGE_ROWS, Page, TopicLanes, Unpacked, Wanted};
use eventbus_core::{Error, Result, Start, Timestamp};
use sqlx::Row;

use super::append::{LaneRow, SELECT_LANES};
use super::database::Database;
use super::headers::{damaged, id_of, time_of, unpack};

/// A row with as many bytes or more is read alone, so that a page is bounded.
const LARGE: i64 = 16 * 1024;

/// Messages as one value: each row that comes from SQLite's thread costs a passage and an allocation
/// per column, together more than all else that reading does. Text and bytes are the same to `||`
/// and `group_concat` in a database of UTF-8, which opening checks; the checksums prove it.
const SELECT_PAGE: &str = "
    SELECT count(*), min(id), max(id), CAST(group_concat(head || payload, '') AS BLOB)
    FROM (
        SELECT id, head, payload FROM {p}messages
        WHERE id >= ?1 AND id < ?2 AND length(head) + length(payload) < ?3
        ORDER BY id LIMIT ?4 + 0
    )";

const SELECT_ONE: &str = "
    SELECT CAST(head || payload AS BLOB) FROM {p}messages WHERE id = ?";

const SELECT_HEAD: &str = "SELECT head FROM {p}messages WHERE id = ?";

impl Database {
    /// Reads messages of a lane that has some at the place where they are wanted from.
    pub(super) async fn read_page(&self, wanted: &Wanted) -> Result<Page> {
        let (from, to) = (to_u64(wanted.from), to_u64(wanted.to));
        let (topic, lane) = (&*wanted.topic, wanted.row);
        let query = sqlx::query(self.sql(SELECT_PAGE))
            .bind(id_of(lane, from))
            .bind(id_of(lane, to))
            .bind(LARGE)
            .bind(PAGE_ROWS.min(to - from) as i64);
        let row = self.read_first(READ, query).await?;
        let row = row.ok_or_else(|| damaged(&topic.name, from))?;
        let native = |error| self.error(READ, error);
        let count: i64 = row.try_get(0).map_err(native)?;
        let first: Option<i64> = row.try_get(1).map_err(native)?;
        let last: Option<i64> = row.try_get(2).map_err(native)?;
        let starts_here = first == Some(id_of(lane, from));
        let dense = first
            .zip(last)
            .is_some_and(|(first, last)| last - first + 1 == count);
        if !starts_here || !dense {
            // A large message stands between, or rows are missing.
            return self.read_one(topic, lane, from).await;
        }
        let mut blob: Bytes = row.try_get::<Vec<u8>, _>(3).map_err(native)?.into();
        let mut messages = Vec::with_capacity(usize::try_from(count).unwrap_or(0));
        for position in (from..).take(messages.capacity()) {
            messages.push(self.unpack(topic, (lane, position), &mut blob)?);
        }
        Ok(Page::Messages(messages))
    }

    async fn read_one(&self, topic: &TopicLanes, lane: u32, from: u64) -> Result<Page> {
        let query = sqlx::query(self.sql(SELECT_ONE)).bind(id_of(lane, from));
        if let Some(row) = self.read_first(READ, query).await? {
            let row = row.try_get::<Vec<u8>, _>(0);
            let mut row = row.map_err(|error| self.error(READ, error))?.into();
            let message = self.unpack(topic, (lane, from), &mut row)?;
            return Ok(Page::Messages(vec![message]));
        }
        let base = self.lane(lane).await?.base;
        if base > from {
            return Ok(Page::Gone { base: base.into() });
        }
        Err(self.named(damaged(&topic.name, from), topic, lane))
    }

    fn unpack(&self, topic: &TopicLanes, place: (u32, u64), rows: &mut Bytes) -> Result<Unpacked> {
        unpack(&topic.name, place, &[], rows).map_err(|error| self.named(error, topic, place.0))
    }

    fn named(&self, error: Error, topic: &TopicLanes, lane: u32) -> Error {
        error
            .with("partition", lane - topic.first_lane)
            .with("path", self.config.path.display())
    }

    /// A lane as its row says.
    pub(super) async fn lane(&self, lane: u32) -> Result<LaneRow> {
        let query = sqlx::query(self.sql(SELECT_LANES)).bind(format!("[{lane}]"));
        let row = self.read_first(READ, query).await?;
        let missing = || sqlx::Error::Decode(format!("lane {lane} has no row").into());
        let row = row.ok_or_else(missing);
        let (_, row) = row
            .and_then(|row| LaneRow::read(&row))
            .map_err(|error| self.error(READ, error))?;
        Ok(row)
    }

    /// Where one begins that starts there.
    pub(super) async fn start_position(&self, lane: u32, start: Start) -> Result<u64> {
        match start {
            Start::Position(position) => Ok(to_u64(position)),
            Start::Time(time) => self.first_at_or_after(lane, time.into()).await,
            Start::Latest => Ok(self.lane(lane).await?.next),
            _ => Ok(self.lane(lane).await?.base),
        }
    }

    /// The first position taken at or after `time`; the end if there is none yet.
    pub(super) async fn first_at_or_after(&self, lane: u32, time: Timestamp) -> Result<u64> {
        let LaneRow { base, next, .. } = self.lane(lane).await?;
        let (mut low, mut high) = (base, next);
        while low < high {
            let middle = low + (high - low) / 2;
            // What was trimmed meanwhile was taken earlier.
            if self
                .taken_at(lane, middle)
                .await?
                .is_none_or(|taken| taken < time)
            {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// When the message there was taken; nothing when it is gone.
    pub(super) async fn taken_at(&self, lane: u32, position: u64) -> Result<Option<Timestamp>> {
        let query = sqlx::query(self.sql(SELECT_HEAD)).bind(id_of(lane, position));
        let Some(row) = self.read_first(READ, query).await? else {
            return Ok(None);
        };
        let head = row.try_get::<Vec<u8>, _>(0);
        Ok(time_of(&head.map_err(|error| self.error(READ, error))?))
    }
}

const READ: &str = "read messages";

/// Positions of this broker have 44 bits; a greater one lies behind all of them.
pub(super) fn to_u64(position: eventbus_core::Position) -> u64 {
    u64::try_from(position.0)
        .unwrap_or(u64::MAX)
        .min(super::headers::POSITION_END)
}
