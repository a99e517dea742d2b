//! From where the outbox is read: rows that were removed stay in the index until no snapshot can see
//! them, and reading passes over each, so reading begins behind them.
//!
//! ```text
//!  L: the last position given ─▶ who writes to the table now ─▶ … all of them have ended
//!                                          ─▶ of what is up to L, all is visible that ever will be
//! ```
//!
//! A transaction that took a position holds the table's lock until it ends, and took the lock before the
//! position. So whoever can still add something up to L is among those who held it after L was read.
//! Rows may get there by other ways: by hand, or after a failover to a server that knows less. Then the
//! floor is given up: where a connection was lost, and where the oldest row lies below it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use eventbus_core::Result;
use sqlx::Row;
use tokio::time::Instant;

use super::{READ, native};
use crate::postgres::database::Database;

/// So many removed messages are worth three questions.
const REMOVED_MIN: usize = 5_000;
/// How long it takes until it is asked whether transactions have ended.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// The last position given, unless sessions may have some in store that they give later.
const SELECT_LAST: &str = "
    SELECT CASE WHEN is_called THEN last_value ELSE 0 END
    FROM {s}.outbox_position_seq CROSS JOIN pg_sequence
    WHERE seqrelid = '{s}.outbox_position_seq'::regclass AND seqcache = 1";

const SELECT_WRITERS: &str = "
    SELECT virtualtransaction FROM pg_locks
    WHERE locktype = 'relation' AND mode = 'RowExclusiveLock'
        AND relation = '{s}.outbox'::regclass
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

const SELECT_FIRST: &str = "
    SELECT position FROM {s}.outbox WHERE position >= $1 AND lane >= 0 ORDER BY position LIMIT 1";

/// Where reading begins.
#[derive(Debug, Default)]
pub(in crate::postgres) struct Floor {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    position: i64,
    /// When a connection was last lost, as far as it was known then.
    lost: Option<Instant>,
    /// Messages removed since a higher one was looked for.
    removed: usize,
    looking: Option<Looking>,
}

/// Looking for a higher floor.
#[derive(Debug)]
struct Looking {
    last: i64,
    /// Who may still add something up to there.
    writers: Vec<String>,
    asked: Instant,
}

impl Floor {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A state that is not whole is given up when it is read.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of messages that were removed.
    pub(super) fn removed(&self, messages: usize) {
        let mut state = self.lock();
        state.removed = state.removed.saturating_add(messages);
    }

    /// Takes note of the oldest message: it may be where none should be.
    pub(super) fn oldest(&self, position: i64) {
        let mut state = self.lock();
        if position < state.position {
            *state = State::default();
        }
    }

    /// From where on all is found that waits.
    pub(super) async fn position(&self, database: &Database) -> Result<i64> {
        let lost = database.lost();
        let (looking, floor) = {
            let mut state = self.lock();
            if state.lost != lost {
                *state = State {
                    lost,
                    ..State::default()
                };
            }
            let is_due = |looking: &mut Looking| looking.asked.elapsed() >= CHECK_INTERVAL;
            let looking = state.looking.take_if(is_due);
            let is_worth = state.looking.is_none() && state.removed >= REMOVED_MIN;
            if looking.is_none() && !is_worth {
                return Ok(state.position);
            }
            // Who asks at the same time goes on without.
            state.removed = 0;
            (looking, state.position)
        };
        let (higher, looking) = match looking {
            Some(looking) => check(database, looking, floor).await?,
            None => (None, look(database).await?),
        };
        let mut state = self.lock();
        if state.lost == lost {
            state.position = higher.unwrap_or(state.position).max(state.position);
            state.looking = looking;
        }
        Ok(state.position)
    }
}

/// Reads the last position, and only then who is writing.
async fn look(database: &Database) -> Result<Option<Looking>> {
    let sql = database.tables.sql(SELECT_LAST);
    let rows = database.query(READ, || sqlx::query(sql.clone())).await?;
    let Some(row) = rows.first() else {
        return Ok(None);
    };
    Ok(Some(Looking {
        last: row.try_get(0).map_err(native)?,
        writers: writers(database).await?,
        asked: Instant::now(),
    }))
}

/// The higher floor, or what is to be looked at again.
async fn check(
    database: &Database,
    mut looking: Looking,
    floor: i64,
) -> Result<(Option<i64>, Option<Looking>)> {
    let writers = writers(database).await?;
    looking.writers.retain(|writer| writers.contains(writer));
    if !looking.writers.is_empty() {
        looking.asked = Instant::now();
        return Ok((None, Some(looking)));
    }
    let sql = database.tables.sql(SELECT_FIRST);
    let rows = database.query(READ, || sqlx::query(sql.clone()).bind(floor));
    let rows = rows.await?;
    let first = rows.first().map(|row| row.try_get(0).map_err(native));
    let behind = looking.last.saturating_add(1);
    let higher = first
        .transpose()?
        .map_or(behind, |first: i64| first.min(behind));
    Ok((Some(higher), None))
}

async fn writers(database: &Database) -> Result<Vec<String>> {
    let sql = database.tables.sql(SELECT_WRITERS);
    let rows = database.query(READ, || sqlx::query(sql.clone())).await?;
    rows.iter()
        .map(|row| row.try_get(0).map_err(native))
        .collect()
}
