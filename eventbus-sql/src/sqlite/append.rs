//! Where messages go: positions are given inside the transaction, dense per lane.

use std::collections::HashMap;
use std::sync::Arc;

use eventbus_core::{Clock, Timestamp};
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Arguments, Row, SqliteConnection};

use super::headers::{POSITION_END, Packed, id_of, seal};
use super::tables::Tables;
use super::writer::Failure;

/// Most rows of one statement.
const ROWS_MAX: usize = 500;
/// Up to here each number of rows has a statement of its own.
const ROWS_EXACT: usize = 64;
/// Beyond, the numbers of rows are multiples of this, so that the statements stay few.
const ROWS_STEP: usize = 20;

/// A lane as its row says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LaneRow {
    pub(super) base: u64,
    pub(super) next: u64,
    pub(super) newest: Timestamp,
}

impl LaneRow {
    /// Reads `id, base, next, newest, seal`.
    pub(super) fn read(row: &SqliteRow) -> Result<(u32, Self), sqlx::Error> {
        let column = |index: usize| row.try_get::<i64, _>(index);
        let (id, base, next) = (column(0)?, column(1)?, column(2)?);
        let newest = column(3)?;
        if seal([id, base, next, newest]) != column(4)? {
            let reason = format!("the checksum of lane {id} is wrong");
            return Err(sqlx::Error::Decode(reason.into()));
        }
        let lane = Self {
            // Sealed, so they are what was written: none is negative.
            base: base as u64,
            next: next as u64,
            newest: Timestamp::from_micros(newest),
        };
        Ok((id as u32, lane))
    }

    /// The checksum that stands beside it.
    pub(super) fn seal(&self, lane: u32) -> i64 {
        seal([
            lane.into(),
            self.base as i64,
            self.next as i64,
            self.newest.as_micros(),
        ])
    }
}

pub(super) const SELECT_LANES: &str = "
    SELECT id, base, next, newest, seal FROM {p}lanes
    WHERE id IN (SELECT value FROM json_each(?))";

/// Takes the lanes on, if they still are as they were when they were last seen.
const ADVANCE: &str = "
    UPDATE {p}lanes AS lane
    SET next = new.next, newest = new.newest, bytes = lane.bytes + new.bytes, seal = new.seal
    FROM (
        SELECT value->>0 AS id, value->>1 AS old_next, value->>2 AS old_seal, value->>3 AS next,
            value->>4 AS newest, value->>5 AS bytes, value->>6 AS seal
        FROM json_each(?)
    ) AS new
    WHERE lane.id = new.id AND lane.next = new.old_next AND lane.seal = new.old_seal
    RETURNING id";

/// Gives positions and writes rows.
#[derive(Debug)]
pub(super) struct Appender {
    tables: Tables,
    clock: Arc<dyn Clock>,
    /// Lanes as this process left them; another one may have written since.
    lanes: HashMap<u32, LaneRow>,
    /// What the transaction makes of them.
    plan: Vec<(u32, Change)>,
    /// The rows of the transaction, in order.
    rows: Vec<(i64, Vec<u8>, Vec<u8>)>,
    /// The ends that the last commit moved.
    committed: Vec<(u32, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Change {
    old: LaneRow,
    new: LaneRow,
    bytes: u64,
}

impl Appender {
    pub(super) fn new(tables: Tables, clock: Arc<dyn Clock>) -> Self {
        Self {
            tables,
            clock,
            lanes: HashMap::new(),
            plan: Vec::new(),
            rows: Vec::new(),
            committed: Vec::new(),
        }
    }

    /// Opens the transaction and gives each message its place, in the order given per lane.
    pub(super) async fn begin(
        &mut self,
        connection: &mut SqliteConnection,
        mut packed: Vec<&Packed>,
    ) -> Result<(), Failure> {
        // Lane after lane the rows are in the order of the table, so that each lies next to the one
        // before.
        packed.sort_by_key(|message| message.lane);
        self.plan.clear();
        self.rows.clear();
        self.committed.clear();
        if packed.is_empty() {
            sqlx::query("BEGIN IMMEDIATE").execute(connection).await?;
            return Ok(());
        }
        if self.plan(&packed)? {
            // In one go with the beginning: each statement costs a passage to SQLite's thread.
            let sql = self.tables.sql(&format!("BEGIN IMMEDIATE;{ADVANCE}"));
            if self.advance(connection, sql).await? {
                return Ok(());
            }
            sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await?;
        }
        // Unknown lanes, or another process wrote: inside the transaction it cannot.
        sqlx::query("BEGIN IMMEDIATE")
            .execute(&mut *connection)
            .await?;
        self.look_up(connection, &packed).await?;
        let known = self.plan(&packed)?;
        let sql = self.tables.sql(ADVANCE);
        if known && self.advance(connection, sql).await? {
            return Ok(());
        }
        Err(sqlx::Error::Decode("a lane has no row".into()).into())
    }

    /// Places messages on the lanes as they are known; false when one is not.
    fn plan(&mut self, packed: &[&Packed]) -> Result<bool, Failure> {
        self.plan.clear();
        self.rows.clear();
        let now = self.clock.now();
        for messages in packed.chunk_by(|one, next| one.lane == next.lane) {
            let lane = messages[0].lane;
            let Some(old) = self.lanes.get(&lane).copied() else {
                return Ok(false);
            };
            let mut new = LaneRow {
                newest: old.newest.max(now),
                ..old
            };
            if new.next + messages.len() as u64 > POSITION_END {
                return Err(sqlx::Error::Protocol("a lane is full".into()).into());
            }
            let mut bytes = 0;
            for message in messages {
                let id = id_of(lane, new.next);
                let (head, payload) = message.row(id, &[], new.newest);
                self.rows.push((id, head, payload));
                new.next += 1;
                bytes += message.size;
            }
            self.plan.push((lane, Change { old, new, bytes }));
        }
        Ok(true)
    }

    /// Writes the lanes; false when one is not as it was seen.
    async fn advance(
        &self,
        connection: &mut SqliteConnection,
        sql: sqlx::SqlStr,
    ) -> Result<bool, Failure> {
        let changes: Vec<String> = self
            .plan
            .iter()
            .map(|(lane, Change { old, new, bytes })| {
                format!(
                    "[{lane},{},{},{},{},{bytes},{}]",
                    old.next,
                    old.seal(*lane),
                    new.next,
                    new.newest.as_micros(),
                    new.seal(*lane)
                )
            })
            .collect();
        let advanced = sqlx::query(sql)
            .bind(format!("[{}]", changes.join(",")))
            .fetch_all(connection)
            .await?;
        Ok(advanced.len() == self.plan.len())
    }

    async fn look_up(
        &mut self,
        connection: &mut SqliteConnection,
        packed: &[&Packed],
    ) -> Result<(), Failure> {
        let mut lanes: Vec<u32> = packed.iter().map(|message| message.lane).collect();
        lanes.dedup();
        let rows = sqlx::query(self.tables.sql(SELECT_LANES))
            .bind(format!("{lanes:?}"))
            .fetch_all(connection)
            .await?;
        for row in &rows {
            let (lane, state) = LaneRow::read(row)?;
            self.lanes.insert(lane, state);
        }
        Ok(())
    }

    /// Writes the rows.
    pub(super) async fn insert(
        &mut self,
        connection: &mut SqliteConnection,
    ) -> Result<(), Failure> {
        let mut left = std::mem::take(&mut self.rows);
        let mut rows = left.drain(..);
        while rows.len() > 0 {
            let count = statement_rows(rows.len());
            let mut arguments = SqliteArguments::default();
            arguments.reserve(count * 3, 0);
            for (id, head, payload) in rows.by_ref().take(count) {
                add(&mut arguments, id)?;
                add(&mut arguments, head)?;
                add(&mut arguments, payload)?;
            }
            sqlx::query_with(self.tables.insert_messages(count), arguments)
                .execute(&mut *connection)
                .await?;
        }
        drop(rows);
        self.rows = left;
        Ok(())
    }

    /// Keeps what the commit made of the lanes and returns their ends.
    pub(super) fn committed(&mut self) -> &[(u32, u64)] {
        for (lane, change) in self.plan.drain(..) {
            self.lanes.insert(lane, change.new);
            self.committed.push((lane, change.new.next));
        }
        &self.committed
    }

    /// Looks lanes up again: a commit failed.
    pub(super) fn forget(&mut self) {
        self.lanes.clear();
    }
}

pub(super) fn add<'t, T>(arguments: &mut SqliteArguments, value: T) -> sqlx::Result<()>
where
    T: sqlx::Encode<'t, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
{
    let added = Arguments::add(arguments, value);
    added.map_err(sqlx::Error::Encode)
}

/// How many of so many rows the next statement takes.
pub(super) fn statement_rows(left: usize) -> usize {
    match left {
        ROWS_MAX.. => ROWS_MAX,
        0..=ROWS_EXACT => left,
        _ => left - left % ROWS_STEP,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_rows_is_a_few_statements_of_few_kinds() {
        let mut kinds = std::collections::BTreeSet::new();
        for total in 0..2000 {
            let (mut left, mut statements) = (total, 0);
            while left > 0 {
                let rows = statement_rows(left);
                kinds.insert(rows);
                left -= rows;
                statements += 1;
            }
            assert!(statements <= total / ROWS_MAX + 2);
        }
        assert!(kinds.len() < 100, "they fit the cache of statements");
    }
}
