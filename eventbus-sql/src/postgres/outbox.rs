//! The outbox: messages that wait to be published, as rows, and back.
//!
//! There is no cursor: what was published is deleted, and what is next is what comes first by its
//! position among what can be seen. So a transaction that commits late is never passed over. Of two
//! transactions that wrote one key one after the other, the second took its positions when the
//! first had committed, or had it waited for a lock of the first's: whoever sees the second sees the
//! first, which has smaller positions. So nothing has to be held back for transactions that are open,
//! and one that is forgotten stops nobody but itself.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use eventbus_core::{
    Error, EventId, Headers, Key, Message, OUTBOX_LANES, OutboxDepth, OutboxMessage, OutboxStore,
    Result, Timestamp, Topic, header, outbox_lane,
};
use metrics::counter;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, ValueRef};
use tracing::error;

use super::error::into_error;
use super::store::PostgresStore;
use super::tables::Tables;

mod floor;

pub(super) use floor::Floor;

/// Most bytes that one read takes, beyond its first message.
const READ_BYTES_MAX: i64 = 16 * 1024 * 1024;
/// Most messages of a statement, and bytes after which no more are added.
const ROWS_MAX: usize = 1000;
const BYTES_MAX: usize = 8 * 1024 * 1024;

/// In their order: positions are given as rows come.
const INSERT: &str = "
    INSERT INTO {s}.outbox (lane, id, aggregatetype, aggregateid, key, type, payload, headers,
        tracingspancontext)
    SELECT lane, id, topic, text_key, key, type, payload, headers, trace
    FROM unnest($1::int[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[], $7::bytea[],
            $8::bytea[], $9::text[]) WITH ORDINALITY
        AS new(lane, id, topic, text_key, key, type, payload, headers, trace, number)
    WHERE $10 OR current_setting('eventbus.is_open', true) = 'yes'
    ORDER BY number";

/// The same for one message, as is mostly the case.
const INSERT_ONE: &str = "
    INSERT INTO {s}.outbox (lane, id, aggregatetype, aggregateid, key, type, payload, headers,
        tracingspancontext)
    SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9
    WHERE $10 OR current_setting('eventbus.is_open', true) = 'yes'";

/// The oldest of all lanes: rows that were written together are read together. No index of lanes is to
/// be thought of.
const SELECT_ALL: &str = "
    SELECT position, lane, id, aggregatetype, aggregateid, key, headers,
        CASE WHEN octet_length(headers) + octet_length(payload) <= $3 / $2 THEN payload END
    FROM {s}.outbox
    WHERE position >= $4 AND lane + 0 = ANY($1)
        AND (position > $6 OR position NOT IN (SELECT unnest($5::bigint[])))
    ORDER BY position LIMIT $2";

/// Of each lane that has messages an even share, by the index. What it looks at depends on how many are
/// asked for, not on how many wait. It has to be so whatever the planner believes of a table that is
/// empty one moment and large the next: were the lane named by `=`, it would know that the order is by
/// position alone, and might go through all lanes by the index of positions; without a limit for each
/// lane, it might join.
const SELECT_SHARES: &str = "
    WITH busy AS MATERIALIZED (
        SELECT wanted.lane FROM unnest($1::int[]) AS wanted(lane)
        CROSS JOIN LATERAL (
            SELECT 1 FROM {s}.outbox AS message
            WHERE (message.lane, message.position) >= (wanted.lane, $4) AND message.lane <= wanted.lane
            ORDER BY message.lane, message.position LIMIT 1
        ) AS first
    ), share AS MATERIALIZED (
        SELECT greatest($2 / greatest(count(*), 1), 1) AS messages, $3 / greatest(count(*), 1) AS bytes
        FROM busy
    )
    SELECT position, lane, id, aggregatetype, aggregateid, key, headers, payload
    FROM share CROSS JOIN busy CROSS JOIN LATERAL (";

/// Messages without those that are too large to be had so many at a time.
const SMALL: &str = "
        SELECT position, id, aggregatetype, aggregateid, key, headers,
            CASE WHEN octet_length(headers) + octet_length(payload) <= $3 / $2 THEN payload END AS payload
        FROM {s}.outbox AS message
        WHERE (message.lane, message.position) >= (busy.lane, $4) AND message.lane <= busy.lane
            AND (message.position > $6 OR message.position NOT IN (SELECT unnest($5::bigint[])))
        ORDER BY message.lane, position LIMIT share.messages
    ) AS message";

/// Messages up to an even share of the bytes: to add them up costs as much again as to read them.
const MEASURED: &str = "
        SELECT position, id, aggregatetype, aggregateid, key, headers, payload,
            sum(octet_length(headers) + octet_length(payload)) OVER (
                ORDER BY message.lane, position ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
            ) AS before
        FROM {s}.outbox AS message
        WHERE (message.lane, message.position) >= (busy.lane, $4) AND message.lane <= busy.lane
            AND (message.position > $6 OR message.position NOT IN (SELECT unnest($5::bigint[])))
        ORDER BY message.lane, position LIMIT share.messages
    ) AS message
    WHERE coalesce(before, 0) < share.bytes";

/// The oldest, where there are more lanes than messages to be had.
const OLDEST: &str = " ORDER BY position LIMIT $2";

const REMOVE: &str = "DELETE FROM {s}.outbox WHERE position = ANY($1)";

/// Puts damaged messages on lanes below zero, which nobody asks for; the same again brings them back.
const QUARANTINE: &str = "
    UPDATE {s}.outbox SET lane = -1 - lane WHERE position = ANY($1) AND lane >= 0";

/// Each lane up to a hundred thousand: who has more knows enough, and counting is not what a relay is for.
const SELECT_DEPTH: &str = "
    SELECT wanted.lane, count(*)
    FROM unnest($1::int[]) AS wanted(lane)
    CROSS JOIN LATERAL (
        SELECT 1 FROM {s}.outbox AS message
        WHERE message.lane BETWEEN wanted.lane AND wanted.lane
        ORDER BY message.lane, message.position LIMIT 100000
    ) AS waiting
    GROUP BY wanted.lane ORDER BY wanted.lane";

/// The oldest message, and since when the oldest transaction is open that has added some, as far as
/// this role may see those of others.
const SELECT_OLDEST: &str = "
    SELECT
        oldest.position, (extract(epoch FROM oldest.created_at) * 1000000)::bigint,
        (SELECT (extract(epoch FROM max(clock_timestamp() - activity.xact_start)) * 1000000)::bigint
            FROM pg_locks JOIN pg_stat_activity AS activity USING (pid)
            WHERE locktype = 'relation' AND mode = 'RowExclusiveLock'
                AND relation = '{s}.outbox'::regclass AND pg_locks.pid <> pg_backend_pid()
                AND pg_locks.database = (
                    SELECT oid FROM pg_database WHERE datname = current_database()))
    FROM (SELECT) AS one LEFT JOIN LATERAL (
        SELECT position, created_at FROM {s}.outbox WHERE lane >= 0 ORDER BY position LIMIT 1
    ) AS oldest ON true";

/// Counts messages that were put aside because they are not what was written.
const DAMAGED: &str = "eventbus.postgres.outbox.damaged";

const READ: &str = "read outbox";

/// Whether it has to be the transaction that was lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Append {
    /// Only if it is.
    WhereOpen,
    /// Whatever transaction it is.
    Anywhere,
}

/// Appends messages in order, inside the transaction that is open; returns how many.
pub(super) async fn append(
    tables: &Tables,
    connection: &mut PgConnection,
    messages: &[(EventId, Message)],
    append: Append,
) -> sqlx::Result<u64> {
    let anywhere = append == Append::Anywhere;
    if let [(id, message)] = messages {
        let row = OutboxRow::new(id, message);
        let query = sqlx::query(tables.sql(INSERT_ONE))
            .bind(row.lane)
            .bind(row.id)
            .bind(row.topic)
            .bind(row.text_key)
            .bind(row.key)
            .bind(row.event_type)
            .bind(row.payload)
            .bind(row.headers)
            .bind(row.trace)
            .bind(anywhere);
        return Ok(query.execute(connection).await?.rows_affected());
    }
    let mut appended = 0;
    let mut left = messages;
    while !left.is_empty() {
        let (piece, rest) = left.split_at(piece_of(left));
        let rows = Rows::new(piece);
        let query = sqlx::query(tables.sql(INSERT))
            .bind(rows.lanes)
            .bind(rows.ids)
            .bind(rows.topics)
            .bind(rows.text_keys)
            .bind(rows.keys)
            .bind(rows.types)
            .bind(rows.payloads)
            .bind(rows.headers)
            .bind(rows.traces)
            .bind(anywhere);
        appended += query.execute(&mut *connection).await?.rows_affected();
        left = rest;
    }
    Ok(appended)
}

/// How many of these messages one statement takes.
fn piece_of(messages: &[(EventId, Message)]) -> usize {
    let mut bytes = 0;
    let fits = |(_, message): &&(EventId, Message)| {
        let fits = bytes < BYTES_MAX;
        bytes += message.size();
        fits
    };
    messages.iter().take(ROWS_MAX).take_while(fits).count()
}

/// A message as values of a row.
struct OutboxRow<'m> {
    lane: i32,
    id: String,
    topic: &'m str,
    text_key: Option<&'m str>,
    key: Option<&'m [u8]>,
    event_type: &'m str,
    payload: &'m [u8],
    headers: &'m [u8],
    trace: Option<String>,
}

impl<'m> OutboxRow<'m> {
    fn new(id: &EventId, message: &'m Message) -> Self {
        let key = message.key.as_ref().map(Key::as_bytes);
        let text_key = key.and_then(|key| std::str::from_utf8(key).ok());
        let text_key = text_key.filter(|key| is_text(key));
        let event_type = message.headers.get_str(header::TYPE);
        let trace = message.headers.get_str(header::TRACEPARENT);
        let trace = trace.filter(|trace| is_text(trace));
        Self {
            lane: outbox_lane(message.key.as_ref(), id) as i32,
            id: id.to_string(),
            topic: message.topic.as_str(),
            text_key,
            key: key.filter(|_| text_key.is_none()),
            event_type: event_type.filter(|name| is_text(name)).unwrap_or_default(),
            payload: &message.payload,
            headers: message.headers.packed(),
            trace: trace.map(|trace| format!("traceparent={trace}\n")),
        }
    }
}

/// Whether PostgreSQL takes it as text.
fn is_text(text: &str) -> bool {
    !text.contains('\0')
}

/// Messages of a statement, as arrays with a value for each row.
#[derive(Default)]
struct Rows<'m> {
    lanes: Vec<i32>,
    ids: Vec<String>,
    topics: Vec<&'m str>,
    text_keys: Vec<Option<&'m str>>,
    keys: Vec<Option<&'m [u8]>>,
    types: Vec<&'m str>,
    payloads: Vec<&'m [u8]>,
    headers: Vec<&'m [u8]>,
    traces: Vec<Option<String>>,
}

impl<'m> Rows<'m> {
    fn new(messages: &'m [(EventId, Message)]) -> Self {
        let mut rows = Self::default();
        for (id, message) in messages {
            let row = OutboxRow::new(id, message);
            rows.lanes.push(row.lane);
            rows.ids.push(row.id);
            rows.topics.push(row.topic);
            rows.text_keys.push(row.text_key);
            rows.keys.push(row.key);
            rows.types.push(row.event_type);
            rows.payloads.push(row.payload);
            rows.headers.push(row.headers);
            rows.traces.push(row.trace);
        }
        rows
    }
}

/// What is to be read next.
struct Next {
    lanes: Vec<i32>,
    messages_max: i64,
    from: i64,
    except: Vec<i64>,
}

impl PostgresStore {
    async fn select_next(&self, next: &Next, sql: &str) -> Result<Vec<PgRow>> {
        let sql = self.database.tables.sql(sql);
        let rows = self.database.query(READ, || {
            sqlx::query(sql.clone())
                .bind(&next.lanes)
                .bind(next.messages_max)
                .bind(READ_BYTES_MAX)
                .bind(next.from)
                .bind(&next.except)
                .bind(next.except.iter().max().copied().unwrap_or(0))
        });
        rows.await
    }

    /// Rows of messages, or where some are large, of fewer of them.
    async fn rows_of_next(&self, next: &Next) -> Result<Vec<PgRow>> {
        let few = next.messages_max < next.lanes.len() as i64;
        let shares = |messages| {
            let oldest = if few { OLDEST } else { "" };
            format!("{SELECT_SHARES}{messages}{oldest}")
        };
        let all = next.lanes.len() == OUTBOX_LANES as usize;
        let mut rows = match all {
            true => self.select_next(next, SELECT_ALL).await?,
            false => self.select_next(next, &shares(SMALL)).await?,
        };
        if all && is_lopsided(&rows)? {
            rows = self.select_next(next, &shares(SMALL)).await?;
        }
        if rows.iter().any(is_large) {
            rows = self.select_next(next, &shares(MEASURED)).await?;
        }
        Ok(rows)
    }

    /// Puts damaged messages where they hold up no other.
    async fn quarantine(&self, damaged: &[(i64, Error)]) -> Result<()> {
        if damaged.is_empty() {
            return Ok(());
        }
        let positions: Vec<i64> = damaged.iter().map(|(position, _)| *position).collect();
        let sql = self.database.tables.sql(QUARANTINE);
        let aside = self.database.query("put damaged messages aside", || {
            sqlx::query(sql.clone()).bind(&positions)
        });
        aside.await?;
        for (position, error) in damaged {
            error!(position, %error, "a message in the outbox is damaged, and put aside unpublished: look at the rows of the outbox whose lane is below zero");
        }
        counter!(DAMAGED).increment(damaged.len() as u64);
        Ok(())
    }
}

#[async_trait]
impl OutboxStore for PostgresStore {
    async fn next(
        &self,
        lanes: &[u32],
        messages_max: usize,
        except: &[u64],
    ) -> Result<Vec<OutboxMessage>> {
        let floor = self.floor.position(&self.database).await?;
        let next = Next {
            lanes: lanes.iter().map(|lane| *lane as i32).collect(),
            messages_max: i64::try_from(messages_max.max(1)).unwrap_or(i64::MAX),
            from: floor,
            except: except.iter().map(|position| *position as i64).collect(),
        };
        loop {
            let rows = self.rows_of_next(&next).await?;
            let (mut sound, mut damaged) = (Vec::with_capacity(rows.len()), Vec::new());
            for row in &rows {
                let position: i64 = row.try_get(0).map_err(native)?;
                match read(position, row) {
                    Ok(message) => sound.push(message),
                    Err(error) => damaged.push((position, error)),
                }
            }
            self.quarantine(&damaged).await?;
            // Nothing at all would say that nothing waits.
            if !sound.is_empty() || damaged.is_empty() {
                sound.sort_unstable_by_key(|message| message.position);
                return Ok(sound);
            }
        }
    }

    async fn remove(&self, positions: &[u64]) -> Result<()> {
        let sql = self.database.tables.sql(REMOVE);
        let positions: Vec<i64> = positions.iter().map(|position| *position as i64).collect();
        let removed = self.database.query("remove from outbox", || {
            sqlx::query(sql.clone()).bind(&positions)
        });
        removed.await?;
        self.floor.removed(positions.len());
        Ok(())
    }

    async fn appended(&self) {
        self.appending.wait(&self.database.wakes).await;
    }

    async fn depth(&self) -> Result<OutboxDepth> {
        let tables = &self.database.tables;
        let (depth, oldest) = (tables.sql(SELECT_DEPTH), tables.sql(SELECT_OLDEST));
        let all: Vec<i32> = (0..OUTBOX_LANES as i32).collect();
        let lanes = self
            .database
            .query(READ, || sqlx::query(depth.clone()).bind(&all));
        let lanes = lanes.await?;
        let oldest = self.database.query(READ, || sqlx::query(oldest.clone()));
        let oldest = oldest.await?;
        let mut depth = OutboxDepth::new();
        for row in &lanes {
            let (lane, messages): (i32, i64) = (
                row.try_get(0).map_err(native)?,
                row.try_get(1).map_err(native)?,
            );
            depth.lanes.push((lane as u32, messages as u64));
        }
        if let Some(row) = oldest.first() {
            let position: Option<i64> = row.try_get(0).map_err(native)?;
            let created: Option<i64> = row.try_get(1).map_err(native)?;
            let open: Option<i64> = row.try_get(2).map_err(native)?;
            self.floor.oldest(position.unwrap_or(i64::MAX));
            depth.oldest = created.map(Timestamp::from_micros);
            let open = open.and_then(|micros| u64::try_from(micros).ok());
            depth.held_back = open.map(Duration::from_micros);
        }
        Ok(depth)
    }
}

/// Whether one lane has much more than its share, so that others wait for it.
fn is_lopsided(rows: &[PgRow]) -> Result<bool> {
    let mut messages = [0; OUTBOX_LANES as usize];
    for row in rows {
        let lane: i32 = row.try_get(1).map_err(native)?;
        let lane = usize::try_from(lane)
            .ok()
            .and_then(|lane| messages.get_mut(lane));
        *lane.unwrap_or(&mut 0) += 1;
    }
    let most = messages.into_iter().max().unwrap_or(0);
    Ok(most > 8 + 4 * rows.len() / messages.len())
}

/// Whether a message was left out of its row because it is large.
fn is_large(row: &PgRow) -> bool {
    matches!(row.try_get_raw(7), Ok(payload) if payload.is_null())
}

/// Reads a row, if it is as it was written. The driver's conversions, with their checks of types, cost as
/// much as all else of reading.
fn read(position: i64, row: &PgRow) -> Result<OutboxMessage> {
    let bytes = |index| column(row, index);
    let text = |index| {
        let bytes: Option<&[u8]> = bytes(index)?;
        let text = bytes.map(std::str::from_utf8).transpose();
        text.map_err(|error| native(sqlx::Error::Decode(error.into())))
    };
    let lane: i32 = row.try_get(1).map_err(native)?;
    let id = EventId::parse(text(2)?.unwrap_or_default())?;
    let topic = Topic::new(text(3)?.unwrap_or_default())?;
    let key = bytes(4)?.map_or_else(|| bytes(5), |key| Ok(Some(key)))?;
    let key = key.map(|key| Key::new(Bytes::copy_from_slice(key)));
    let headers = Headers::from_packed(Bytes::copy_from_slice(bytes(6)?.unwrap_or_default()))?;
    let payload = Bytes::copy_from_slice(bytes(7)?.unwrap_or_default());
    let mut message = Message::new(topic, payload).with_headers(headers);
    message.key = key;
    Ok(OutboxMessage::new(
        position as u64,
        lane as u32,
        id,
        message,
    ))
}

/// A column as the server sent it.
fn column(row: &PgRow, index: usize) -> Result<Option<&[u8]>> {
    let value = row.try_get_raw(index).map_err(native)?;
    if value.is_null() {
        return Ok(None);
    }
    let bytes = value.as_bytes();
    bytes
        .map(Some)
        .map_err(|error| native(sqlx::Error::Decode(error)))
}

fn native(error: sqlx::Error) -> Error {
    into_error(READ, error)
}
