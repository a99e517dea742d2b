//! The inbox: which events each group has handled.

use std::collections::HashSet;

use eventbus_core::{EventId, Group, Result, Timestamp};
use futures_util::FutureExt;
use sqlx::sqlite::SqliteArguments;
use sqlx::{Row, SqliteConnection};

use super::append::{add, statement_rows};
use super::database::Database;
use super::error::into_error;
use super::tables::Tables;

/// Most rows removed by one commit, so that handlers wait for none that is long.
const PIECE: i64 = 1000;

const INSERT: &str = "
    INSERT INTO {p}inbox (consumer_group, event_id, handled_at) VALUES ";

const SELECT: &str = "SELECT 1 FROM {p}inbox WHERE consumer_group = ?1 AND event_id = ?2";

const REMOVE: &str = "
    DELETE FROM {p}inbox
    WHERE handled_at < ?1 AND rowid IN (SELECT rowid FROM {p}inbox ORDER BY rowid LIMIT ?2 + 0)";

/// Records that a group handles these events, in the transaction that is open. Returns which of
/// them it has handled before, be it with an earlier one of these.
pub(super) async fn record(
    tables: &Tables,
    connection: &mut SqliteConnection,
    group: &Group,
    ids: &[EventId],
    now: Timestamp,
) -> sqlx::Result<Vec<bool>> {
    let mut left = ids;
    let mut new = HashSet::with_capacity(ids.len());
    while !left.is_empty() {
        let (chunk, rest) = left.split_at(statement_rows(left.len()));
        let mut arguments = SqliteArguments::default();
        for id in chunk {
            add(&mut arguments, group.to_string())?;
            add(&mut arguments, id.to_string())?;
            add(&mut arguments, now.as_micros())?;
        }
        let rows = vec!["(?,?,?)"; chunk.len()].join(",");
        let insert = format!("{INSERT}{rows} ON CONFLICT DO NOTHING RETURNING event_id");
        let inserted = sqlx::query_with(tables.sql(&insert), arguments)
            .fetch_all(&mut *connection)
            .await?;
        for row in &inserted {
            new.insert(row.try_get::<String, _>(0)?);
        }
        left = rest;
    }
    Ok(ids.iter().map(|id| !new.remove(&id.to_string())).collect())
}

impl Database {
    /// Whether a group has handled an event, as far as that is committed.
    pub(super) async fn has_handled(&self, group: &Group, id: &EventId) -> Result<bool> {
        let query = sqlx::query(self.sql(SELECT))
            .bind(group.to_string())
            .bind(id.to_string());
        Ok(self.read_first("look into inbox", query).await?.is_some())
    }

    /// Forgets what was handled long ago.
    pub(super) async fn sweep_inbox(&self) -> Result<()> {
        let retention = i64::try_from(self.config.inbox_retention.as_micros());
        let now = self.now().as_micros();
        let before = now.saturating_sub(retention.unwrap_or(i64::MAX));
        let query = sqlx::query(self.sql(SELECT_OLD)).bind(before);
        if self.read_first("sweep inbox", query).await?.is_none() {
            return Ok(());
        }
        loop {
            let tables = self.tables.clone();
            let removed = self.writer.run("sweep inbox", move |connection| {
                let query = sqlx::query(tables.sql(REMOVE)).bind(before).bind(PIECE);
                let removed = query.execute(connection).map(|removed| match removed {
                    Ok(removed) => Ok(removed.rows_affected()),
                    Err(error) => Err(into_error("sweep inbox", error)),
                });
                removed.boxed()
            });
            if removed.await? < PIECE as u64 {
                return Ok(());
            }
        }
    }
}

const SELECT_OLD: &str = "
    SELECT 1 FROM (SELECT handled_at FROM {p}inbox ORDER BY rowid LIMIT 1) WHERE handled_at < ?";
