//! The inbox: which events each group has handled.

use std::collections::HashSet;

use eventbus_core::{EventId, Group, Result, Timestamp};
use futures_util::FutureExt;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{AssertSqlSafe, Row, SqliteConnection};

use super::append::{add, statement_rows};
use super::database::Database;
use super::error::into_error;
use super::lending::First;
use super::tables::Tables;

/// Most rows removed by one commit, so that handlers wait for none that is long.
const PIECE: i64 = 1000;

const INSERT: &str = "
    INSERT INTO {p}inbox (consumer_group, event_id, handled_at) VALUES ";

const SELECT: &str = "SELECT 1 FROM {p}inbox WHERE consumer_group = ?1 AND event_id = ?2";

const REMOVE: &str = "
    DELETE FROM {p}inbox
    WHERE handled_at < ?1 AND rowid IN (SELECT rowid FROM {p}inbox ORDER BY rowid LIMIT ?2 + 0)";

/// The statement that records that a group handles the first of these events, and how many it does;
/// its rows are the ids that are new.
pub(super) fn recording(
    tables: &Tables,
    group: &Group,
    ids: &[EventId],
    now: Timestamp,
) -> sqlx::Result<(Option<First>, usize)> {
    let count = statement_rows(ids.len());
    if count == 0 {
        return Ok((None, 0));
    }
    let mut arguments = SqliteArguments::default();
    for id in &ids[..count] {
        add(&mut arguments, group.to_string())?;
        add(&mut arguments, id.to_string())?;
        add(&mut arguments, now.as_micros())?;
    }
    let rows = vec!["(?,?,?)"; count].join(",");
    let insert = format!("{INSERT}{rows} ON CONFLICT DO NOTHING RETURNING event_id");
    let sql = tables.sql(&insert).as_str().to_owned();
    Ok((Some(First { sql, arguments }), count))
}

/// Records the events after the first ones, of which `inserted` tells, in the transaction that is
/// open. Returns which of all it has handled before, be it with an earlier one of these.
pub(super) async fn record_rest(
    tables: &Tables,
    connection: &mut SqliteConnection,
    group: &Group,
    ids: &[EventId],
    (mut inserted, mut done): (Vec<SqliteRow>, usize),
    now: Timestamp,
) -> sqlx::Result<Vec<bool>> {
    let mut new = HashSet::with_capacity(ids.len());
    loop {
        for row in &inserted {
            new.insert(row.try_get::<String, _>(0)?);
        }
        let (next, count) = recording(tables, group, &ids[done..], now)?;
        let Some(First { sql, arguments }) = next else {
            return Ok(ids.iter().map(|id| !new.remove(&id.to_string())).collect());
        };
        // Safe: it is this crate's own.
        let query = sqlx::query_with(AssertSqlSafe(sql), arguments);
        inserted = query.fetch_all(&mut *connection).await?;
        done += count;
    }
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
