//! The inbox: which events each group has handled.

use std::collections::HashSet;

use eventbus_core::{EventId, Group, Result};
use sqlx::{PgConnection, Row};
use tracing::error;

use super::database::Database;
use super::tables::Tables;

/// Most rows removed by one commit, so that handlers wait for none that is long.
const PIECE: i64 = 1000;

/// In the order of the ids, as everybody does, so that nobody waits in a circle.
const INSERT: &str = "
    INSERT INTO {s}.inbox (consumer_group, event_id, handled_at)
    SELECT $1, event.id, {now} FROM unnest($2::text[]) AS event(id) ORDER BY event.id COLLATE \"C\"
    ON CONFLICT DO NOTHING RETURNING event_id, xmin::text";

/// Only what that transaction recorded.
const FORGET: &str = "
    DELETE FROM {s}.inbox
    WHERE consumer_group = $1 AND event_id = ANY($2) AND xmin::text = $3 RETURNING event_id";

const SELECT: &str = "SELECT 1 FROM {s}.inbox WHERE consumer_group = $1 AND event_id = $2";

/// The time is read once, in a question of its own: compared with a clock that runs, the index of the
/// times would be of no use.
const REMOVE: &str = "
    DELETE FROM {s}.inbox WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM {s}.inbox WHERE handled_at < (SELECT {now} - $1)
        LIMIT $2 FOR UPDATE SKIP LOCKED
    ))
    RETURNING 1";

const LOOK: &str = "look into inbox";
const SWEEP: &str = "sweep inbox";

/// What a transaction recorded.
#[derive(Debug)]
pub(super) struct Recorded {
    group: String,
    ids: Vec<String>,
    /// The transaction.
    xid: String,
}

/// Records that a group handles these events, in the transaction that is open. Returns which of them
/// it has handled before, be it with an earlier one of these. Waits for whoever handles one of them
/// at the same time.
pub(super) async fn record(
    tables: &Tables,
    connection: &mut PgConnection,
    group: &Group,
    ids: &[EventId],
) -> sqlx::Result<(Option<Recorded>, Vec<bool>)> {
    let ids: Vec<String> = ids.iter().map(EventId::to_string).collect();
    let inserted = sqlx::query(tables.sql(INSERT))
        .bind(group.as_str())
        .bind(&ids)
        .fetch_all(connection)
        .await?;
    let mut new = HashSet::with_capacity(inserted.len());
    for row in &inserted {
        new.insert(row.try_get::<&str, _>(0)?);
    }
    let duplicates = ids.iter().map(|id| !new.remove(id.as_str())).collect();
    let xid = inserted.first().map(|row| row.try_get(1)).transpose()?;
    let recorded = xid.map(|xid| Recorded {
        group: group.to_string(),
        ids,
        xid,
    });
    Ok((recorded, duplicates))
}

/// Takes back what a transaction recorded that was committed by somebody else than the unit, so that
/// its events are handled again: nothing of what they publish was.
pub(super) async fn forget(
    tables: &Tables,
    connection: &mut PgConnection,
    recorded: &Recorded,
) -> sqlx::Result<()> {
    let forgotten = sqlx::query(tables.sql(FORGET))
        .bind(&recorded.group)
        .bind(&recorded.ids)
        .bind(&recorded.xid)
        .fetch_all(connection)
        .await?;
    for row in &forgotten {
        let id: &str = row.try_get(0)?;
        error!(
            group = recorded.group,
            id,
            "a handler committed its transaction by itself: what it wrote lasts, and the event is handled again"
        );
    }
    Ok(())
}

impl Database {
    /// Whether a group has handled an event, as far as that is committed.
    pub(super) async fn has_handled(&self, group: &Group, id: &EventId) -> Result<bool> {
        let (sql, id) = (self.tables.sql(SELECT), id.to_string());
        let rows = self.query(LOOK, || {
            sqlx::query(sql.clone()).bind(group.as_str()).bind(&id)
        });
        Ok(!rows.await?.is_empty())
    }

    /// Forgets what was handled long ago.
    pub(super) async fn sweep_inbox(&self) -> Result<()> {
        let retention = i64::try_from(self.config.inbox_retention.as_micros());
        let retention = retention.unwrap_or(i64::MAX / 2);
        let sql = self.tables.sql(REMOVE);
        loop {
            let rows = self.query(SWEEP, || {
                sqlx::query(sql.clone()).bind(retention).bind(PIECE)
            });
            if rows.await?.len() < PIECE as usize {
                return Ok(());
            }
        }
    }
}
