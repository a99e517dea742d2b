//! Reading the log: pages of several lanes in one question, what is missing of them, and the search
//! for a time.

use std::collections::HashMap;

use bytes::Bytes;
use eventbus_core::log::{PAGE_ROWS, Page, Unpacked, Wanted};
use eventbus_core::{Error, ErrorKind, Position, Result, Start, Timestamp};

use super::database::Database;
use super::headers::{Packed, Packer};

/// Bytes of all pages of a question, after which nothing is added; the first page has at least one
/// message.
const PAGES_BYTES: i64 = 8 * 1024 * 1024;
/// Most messages of all pages of a question, shared by its lanes.
const PAGES_ROWS: usize = 2048;
const PAGE_ROWS_MIN: usize = 64;

/// A lane as its row says.
#[derive(Clone, Copy, Debug)]
pub(super) struct LaneRow {
    pub(super) base: u64,
    pub(super) next: u64,
}

const SELECT_PAGES: &str = "
    SELECT lane, position, taken, key, headers, payload
    FROM (
        SELECT page.*, wanted.number,
            sum(page.size) OVER (ORDER BY wanted.number, page.position) AS bytes
        FROM unnest($1::int[], $2::bigint[], $3::bigint[]) WITH ORDINALITY
            AS wanted(lane, first, behind, number)
        CROSS JOIN LATERAL (
            SELECT message.*, coalesce(octet_length(key), 0) + octet_length(headers)
                + octet_length(payload) AS size
            FROM {s}.messages AS message
            WHERE message.lane = wanted.lane AND message.position >= wanted.first
                AND message.position < wanted.behind
            ORDER BY message.position LIMIT $4
        ) AS page
    ) AS pages
    WHERE bytes - size < $5
    ORDER BY number, position";

pub(super) const SELECT_LANES: &str = "SELECT id, base, next FROM {s}.lanes WHERE id = ANY($1)";

/// All of it as it was at one moment.
const SELECT_MISSING: &str = "
    SELECT base, next,
        EXISTS (SELECT 1 FROM {s}.messages WHERE lane = id AND position = $2)
    FROM {s}.lanes WHERE id = $1";

/// Halves what is left of each lane until nothing is. What was removed meanwhile was taken earlier.
const SEARCH: &str = "
    WITH RECURSIVE search AS (
        SELECT id, base AS low, next AS high FROM {s}.lanes WHERE id = ANY($1)
        UNION ALL
        SELECT id, CASE WHEN earlier THEN middle + 1 ELSE low END,
            CASE WHEN earlier THEN high ELSE middle END
        FROM search
        CROSS JOIN LATERAL (SELECT (low + high) / 2 AS middle) AS halved
        CROSS JOIN LATERAL (
            SELECT coalesce((
                SELECT taken < $2 FROM {s}.messages WHERE lane = search.id AND position = middle
            ), true) AS earlier
        ) AS looked
        WHERE low < high
    )
    SELECT id, low FROM search WHERE low >= high";

/// Waits for those who publish just now: what they publish may be taken before the time already.
const LOCK_LANES: &str = "
    SELECT id FROM {s}.lanes WHERE id = ANY($1) ORDER BY id FOR SHARE";

const READ: &str = "read messages";

impl Database {
    /// Reads messages of lanes that have some at the places where they are wanted from.
    pub(super) async fn pages(&self, wanted: &[Wanted]) -> Result<Vec<Page>> {
        let lanes: Vec<i32> = wanted.iter().map(|wanted| wanted.row as i32).collect();
        let first: Vec<i64> = wanted
            .iter()
            .map(|wanted| stored(to_u64(wanted.from)))
            .collect();
        let behind = wanted.iter().map(|wanted| stored(to_u64(wanted.to)));
        let behind: Vec<i64> = behind.collect();
        let rows_max = (PAGES_ROWS / wanted.len().max(1)).max(PAGE_ROWS_MIN) as u64;
        let sql = self.tables.sql(SELECT_PAGES);
        let rows = self
            .query(READ, || {
                sqlx::query(sql.clone())
                    .bind(&lanes)
                    .bind(&first)
                    .bind(&behind)
                    .bind(PAGE_ROWS.min(rows_max) as i64)
                    .bind(PAGES_BYTES)
            })
            .await?;
        let mut packer = Packer::default();
        for row in &rows {
            let pushed = packer.push(row);
            pushed.map_err(|error| self.error(READ, error))?;
        }
        let (bytes, rows) = packer.finish();
        let full = bytes.len() as i64 >= PAGES_BYTES;
        let mut rows = &rows[..];
        let mut pages = Vec::with_capacity(wanted.len());
        for wanted in wanted {
            let (mine, others) = rows.split_at(dense(rows, wanted));
            // What stands behind a hole of the lane is read again when the hole has been looked at.
            let behind = others.iter().take_while(|row| row.lane() == wanted.row);
            rows = &others[behind.count()..];
            pages.push(match mine {
                // There was no room for it: its turn comes.
                [] if full => Page::Messages(Vec::new()),
                [] => self.missing(wanted).await?,
                mine => Page::Messages(sound(mine, wanted, &bytes)?),
            });
        }
        Ok(pages)
    }

    /// Finds out why there was no message at a place before the end of its lane.
    async fn missing(&self, wanted: &Wanted) -> Result<Page> {
        let sql = self.tables.sql(SELECT_MISSING);
        let rows = self.query(READ, || {
            let query = sqlx::query(sql.clone()).bind(wanted.row as i32);
            query.bind(stored(to_u64(wanted.from)))
        });
        let rows = rows.await?;
        let lane = rows.first().map(|row| -> Result<(i64, i64, bool)> {
            let (base, next) = (self.column(READ, row, 0)?, self.column(READ, row, 1)?);
            Ok((base, next, self.column(READ, row, 2)?))
        });
        let from = stored(to_u64(wanted.from));
        match lane.transpose()? {
            Some((base, _, _)) if base > from => Ok(Page::Gone { base: (base as u64).into() }),
            // It came between the two questions, and is read with the next.
            Some((_, _, true)) => Ok(Page::Messages(Vec::new())),
            Some((_, next, _)) if next == from => {
                // Anybody can send a notification; this one said what is not true.
                self.wakes.corrects(wanted.row, wanted.to, wanted.from);
                Ok(Page::Messages(Vec::new()))
            }
            _ => Err(Error::new(
                ErrorKind::Codec,
                READ,
                "a message is missing: restore the tables from a copy, or stop the group and reset it to the next position",
            )
            .with("topic", &wanted.topic.name)
            .with("partition", wanted.row - wanted.topic.first_lane)
            .with("position", wanted.from)),
        }
    }

    /// These lanes as their rows say.
    pub(super) async fn lanes(
        &self,
        operation: &'static str,
        lanes: &[u32],
    ) -> Result<HashMap<u32, LaneRow>> {
        let ids = ids(lanes);
        let sql = self.tables.sql(SELECT_LANES);
        let rows = self
            .query(operation, || sqlx::query(sql.clone()).bind(&ids))
            .await?;
        let mut lanes = HashMap::with_capacity(rows.len());
        for row in &rows {
            let lane: i32 = self.column(operation, row, 0)?;
            let base: i64 = self.column(operation, row, 1)?;
            let next: i64 = self.column(operation, row, 2)?;
            let row = LaneRow {
                base: base as u64,
                next: next as u64,
            };
            lanes.insert(lane as u32, row);
        }
        Ok(lanes)
    }

    /// Where one begins on each lane that starts there.
    pub(super) async fn start_positions(
        &self,
        operation: &'static str,
        lanes: &[u32],
        start: Start,
    ) -> Result<HashMap<u32, u64>> {
        let of_rows = |position: fn(&LaneRow) -> u64| async move {
            let rows = self.lanes(operation, lanes).await?;
            Ok(rows
                .iter()
                .map(|(lane, row)| (*lane, position(row)))
                .collect())
        };
        match start {
            Start::Position(position) => {
                let position = to_u64(position);
                Ok(lanes.iter().map(|lane| (*lane, position)).collect())
            }
            Start::Time(time) => self.first_at_or_after(lanes, time.into()).await,
            Start::Latest => of_rows(|row| row.next).await,
            _ => of_rows(|row| row.base).await,
        }
    }

    /// The first position of each lane taken at or after `time`; the end if there is none yet.
    pub(super) async fn first_at_or_after(
        &self,
        lanes: &[u32],
        time: Timestamp,
    ) -> Result<HashMap<u32, u64>> {
        let ids = ids(lanes);
        let sql = self.tables.sql(SEARCH);
        let rows = self
            .query(READ, || {
                sqlx::query(sql.clone()).bind(&ids).bind(time.as_micros())
            })
            .await?;
        let mut found = HashMap::with_capacity(rows.len());
        for row in &rows {
            let lane: i32 = self.column(READ, row, 0)?;
            let position: i64 = self.column(READ, row, 1)?;
            found.insert(lane as u32, position as u64);
        }
        Ok(found)
    }

    /// Waits until nobody publishes to these lanes who began before.
    pub(super) async fn settle_lanes(&self, lanes: &[u32]) -> Result<()> {
        let ids = ids(lanes);
        let sql = self.tables.sql(LOCK_LANES);
        let locked = self.query(READ, || sqlx::query(sql.clone()).bind(&ids));
        locked.await.map(|_| ())
    }
}

/// The messages of these rows up to one that is damaged, which is an error where it is the first.
fn sound(rows: &[Packed], wanted: &Wanted, bytes: &Bytes) -> Result<Vec<Unpacked>> {
    let mut messages = Vec::with_capacity(rows.len());
    for row in rows {
        match row.unpack(&wanted.topic.name, bytes) {
            Ok(message) => messages.push(message),
            Err(error) if messages.is_empty() => {
                return Err(error.with("partition", wanted.row - wanted.topic.first_lane));
            }
            Err(_) => break,
        }
    }
    Ok(messages)
}

/// How many of the first rows are the page: of its lane, from where it is wanted, without a hole.
fn dense(rows: &[Packed], wanted: &Wanted) -> usize {
    let places = rows.iter().zip(to_u64(wanted.from)..);
    let is_next =
        |(row, position): &(&Packed, u64)| row.lane() == wanted.row && row.position() == *position;
    places.take_while(is_next).count()
}

/// Lanes as PostgreSQL numbers them.
pub(super) fn ids(lanes: &[u32]) -> Vec<i32> {
    lanes.iter().map(|lane| *lane as i32).collect()
}

/// A position as PostgreSQL keeps it; one that is greater lies behind all there are.
pub(super) fn stored(position: u64) -> i64 {
    i64::try_from(position).unwrap_or(i64::MAX)
}

/// Positions of this broker have 63 bits; a greater one lies behind all of them.
pub(super) fn to_u64(position: Position) -> u64 {
    u64::try_from(position.0)
        .unwrap_or(u64::MAX)
        .min(i64::MAX as u64)
}
