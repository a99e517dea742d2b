//! The outbox: messages that wait to be published, as rows, and back.

use async_trait::async_trait;
use bytes::Bytes;
use eventbus_core::{
    Error, EventId, Key, Message, OutboxDepth, OutboxMessage, OutboxStore, Result, Timestamp,
    Topic, header, outbox_lane,
};
use futures_util::FutureExt;
use metrics::counter;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Arguments, Row, SqliteConnection};
use tracing::error;

use super::append::{add, statement_rows};
use super::error::into_error;
use super::headers::{Packed, id_of, unpack};
use super::store::SqliteStore;
use super::tables::Tables;

/// Most bytes that one read takes, beyond its first message.
const READ_BYTES_MAX: i64 = 16 * 1024 * 1024;

const COLUMNS: usize = 9;

const INSERT: &str = "
    INSERT INTO {p}outbox (lane, id, aggregatetype, aggregateid, type, payload, headers,
        created_at, tracingspancontext) VALUES ";

/// Of each lane that has messages an even share by the index, then a turn for each lane after the
/// other. What it looks at depends on how many are asked for, not on how many wait.
const SELECT_NEXT: &str = "
    WITH busy AS MATERIALIZED (
        SELECT value AS lane FROM json_each(?1)
        WHERE EXISTS (SELECT 1 FROM {p}outbox AS message WHERE message.lane = value)
    ),
    first AS MATERIALIZED (
        SELECT message.lane, message.position, length(payload) AS bytes
        FROM busy JOIN {p}outbox AS message ON message.position IN (
            SELECT position FROM {p}outbox
            WHERE lane = busy.lane AND position NOT IN (SELECT value FROM json_each(?4))
            ORDER BY position LIMIT (SELECT max(1, ?2 / count(*)) FROM busy)
        )
    ),
    turns AS (
        SELECT position, bytes, row_number() OVER (PARTITION BY lane ORDER BY position) AS turn
        FROM first
    ),
    chosen AS (
        SELECT position, sum(bytes) OVER (ORDER BY turn, position) - bytes AS before
        FROM turns ORDER BY turn, position LIMIT ?2 + 0
    )
    SELECT position, lane, id, aggregatetype, headers, payload
    FROM chosen JOIN {p}outbox USING (position)
    WHERE before < ?3 ORDER BY position";

const REMOVE: &str = "
    DELETE FROM {p}outbox WHERE position IN (SELECT value FROM json_each(?))";

/// Puts damaged messages on lanes below zero, which nobody asks for; the same again brings them back.
const QUARANTINE: &str = "
    UPDATE {p}outbox SET lane = -1 - lane
    WHERE position IN (SELECT value FROM json_each(?)) AND lane >= 0";

const SELECT_DEPTH: &str = "
    SELECT lane, count(*) FROM {p}outbox WHERE lane >= 0 GROUP BY lane ORDER BY lane";

const SELECT_OLDEST: &str = "
    SELECT created_at FROM {p}outbox WHERE lane >= 0 ORDER BY position LIMIT 1";

/// Counts messages that were put aside because they are not what was written.
const DAMAGED: &str = "eventbus.sqlite.outbox.damaged";

/// Appends messages in order, inside the transaction that is open; returns the last position.
pub(super) async fn append(
    tables: &Tables,
    connection: &mut SqliteConnection,
    messages: &[(EventId, Message)],
    now: Timestamp,
) -> sqlx::Result<Option<i64>> {
    let mut left = messages;
    let mut last = None;
    while !left.is_empty() {
        let (chunk, rest) = left.split_at(statement_rows(left.len()));
        let mut arguments = SqliteArguments::default();
        arguments.reserve(chunk.len() * COLUMNS, 0);
        for (id, message) in chunk {
            bind(&mut arguments, id, message, now)?;
        }
        let row = format!("(?{})", ",?".repeat(COLUMNS - 1));
        let rows = vec![row.as_str(); chunk.len()].join(",");
        let insert = tables.sql(&format!("{INSERT}{rows}"));
        let inserted = sqlx::query_with(insert, arguments).execute(&mut *connection);
        last = Some(inserted.await?.last_insert_rowid());
        left = rest;
    }
    Ok(last)
}

fn bind(
    arguments: &mut SqliteArguments,
    id: &EventId,
    message: &Message,
    now: Timestamp,
) -> sqlx::Result<()> {
    let headers = &message.headers;
    let lane = outbox_lane(message.key.as_ref(), id);
    let id = id.to_string();
    let names = [id.as_str(), message.topic.as_str()];
    let (head, payload) = Packed::new(lane, message).row(id_of(lane, 0), &names, now);
    add(arguments, lane)?;
    add(arguments, id)?;
    add(arguments, message.topic.to_string())?;
    match message.key.as_ref().map(Key::as_bytes) {
        None => add(arguments, None::<String>)?,
        Some(key) => match std::str::from_utf8(key) {
            Ok(text) => add(arguments, text.to_owned())?,
            Err(_) => add(arguments, key.to_vec())?,
        },
    }
    let event_type = headers.get_str(header::TYPE).unwrap_or_default();
    add(arguments, event_type.to_owned())?;
    add(arguments, payload)?;
    add(arguments, head)?;
    add(arguments, now.as_micros())?;
    let traceparent = headers.get_str(header::TRACEPARENT);
    add(
        arguments,
        traceparent.map(|traceparent| format!("traceparent={traceparent}\n")),
    )
}

impl SqliteStore {
    /// Runs a statement on the messages at these positions, in the next commit.
    async fn change(
        &self,
        operation: &'static str,
        statement: &'static str,
        positions: String,
    ) -> Result<()> {
        let tables = self.database.tables.clone();
        let changed = self.database.writer.run(operation, move |connection| {
            let query = sqlx::query(tables.sql(statement)).bind(positions.clone());
            let changed = query.execute(connection).map(move |changed| match changed {
                Ok(_) => Ok(()),
                Err(error) => Err(into_error(operation, error)),
            });
            changed.boxed()
        });
        changed.await
    }

    /// Puts damaged messages where they hold up no other.
    async fn quarantine(&self, damaged: &[(i64, Error)]) -> Result<()> {
        if damaged.is_empty() {
            return Ok(());
        }
        let positions: Vec<_> = damaged.iter().map(|(position, _)| *position).collect();
        self.change(
            "put damaged messages aside",
            QUARANTINE,
            format!("{positions:?}"),
        )
        .await?;
        for (position, error) in damaged {
            error!(position, %error, "a message in the outbox is damaged, and put aside unpublished: look at the rows of the outbox whose lane is below zero");
        }
        counter!(DAMAGED).increment(damaged.len() as u64);
        Ok(())
    }
}

#[async_trait]
impl OutboxStore for SqliteStore {
    async fn next(
        &self,
        lanes: &[u32],
        messages_max: usize,
        except: &[u64],
    ) -> Result<Vec<OutboxMessage>> {
        loop {
            let query = sqlx::query(self.database.sql(SELECT_NEXT))
                .bind(format!("{lanes:?}"))
                .bind(i64::try_from(messages_max).unwrap_or(i64::MAX))
                .bind(READ_BYTES_MAX)
                .bind(format!("{except:?}"));
            let rows = self.database.read(READ, query).await?;
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
                return Ok(sound);
            }
        }
    }

    async fn remove(&self, positions: &[u64]) -> Result<()> {
        self.change("remove from outbox", REMOVE, format!("{positions:?}"))
            .await
    }

    async fn appended(&self) {
        let _waiting = self.database.wakes.wait();
        let mut end = self.database.wakes.outbox();
        if end.changed().await.is_err() {
            // It is dropped with the database only; then nothing is appended any more.
            std::future::pending().await
        }
    }

    async fn depth(&self) -> Result<OutboxDepth> {
        let depth = |sql| {
            self.database
                .read(READ, sqlx::query(self.database.sql(sql)))
        };
        let (lanes, oldest) = (depth(SELECT_DEPTH).await?, depth(SELECT_OLDEST).await?);
        let mut depth = OutboxDepth::new();
        for row in &lanes {
            let messages: i64 = row.try_get(1).map_err(native)?;
            let lane = row.try_get(0).map_err(native)?;
            depth.lanes.push((lane, messages as u64));
        }
        let oldest = oldest.first().map(|row| row.try_get(0));
        let oldest = oldest.transpose().map_err(native)?;
        depth.oldest = oldest.map(Timestamp::from_micros);
        Ok(depth)
    }
}

const READ: &str = "read outbox";

/// Reads a row, if it is as it was written.
fn read(position: i64, row: &SqliteRow) -> Result<OutboxMessage> {
    let text = |index: usize| row.try_get::<String, _>(index).map_err(native);
    let bytes = |index: usize| row.try_get::<&[u8], _>(index).map_err(native);
    let lane: u32 = row.try_get(1).map_err(native)?;
    let (id, topic) = (text(2)?, text(3)?);
    let mut stored = Bytes::from([bytes(4)?, bytes(5)?].concat());
    let names = [id.as_str(), topic.as_str()];
    let message = unpack(&Topic::new(&topic)?, (lane, 0), &names, &mut stored)?.message;
    let id = EventId::parse(&id)?;
    Ok(OutboxMessage::new(position as u64, lane, id, message))
}

fn native(error: sqlx::Error) -> Error {
    into_error(READ, error)
}
