//! What is done with the schedule inside a commit.

use std::time::Duration;

use bytes::Bytes;
use eventbus_core::{
    BusyTaker, Error, ErrorKind, EventId, Refused, Result, SCHEDULED_MAX, Scheduled, TakeScheduled,
    Taken, Timestamp, Topic,
};
use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Row, Sqlite, SqliteConnection};
use tracing::error;

use super::native;
use super::statements::{
    ADD, CANCEL, CLAIM, COUNT, END_CLAIM, MARK_TAKEN, POSTPONE, REMOVE, SELECT_DUE,
    SELECT_EARLIEST, SELECT_SIZES, SELECT_STATE,
};
use crate::sqlite::headers::{HEAD_FIXED, POSITION_END, Packed, id_of, unpack};
use crate::sqlite::leases::machine_clock;
use crate::sqlite::tables::Tables;

/// When a message that is damaged is looked at again, and complained of.
const DAMAGED_PAUSE: Duration = Duration::from_secs(3600);

/// The tables, as one commit sees them.
pub(super) struct Writing<'c> {
    pub(super) tables: &'c Tables,
    pub(super) connection: &'c mut SqliteConnection,
}

type Statement = Query<'static, Sqlite, SqliteArguments>;

impl Writing<'_> {
    fn sql(&self, text: &str) -> Statement {
        sqlx::query(self.tables.sql(text))
    }

    async fn rows(&mut self, query: Statement) -> Result<Vec<SqliteRow>> {
        query.fetch_all(&mut *self.connection).await.map_err(native)
    }

    async fn row(&mut self, query: Statement) -> Result<SqliteRow> {
        query.fetch_one(&mut *self.connection).await.map_err(native)
    }

    /// Adds those whose ids do not wait, and returns the version if one of them is the earliest now.
    pub(super) async fn add(&mut self, messages: &[Scheduled]) -> Result<Option<i64>> {
        let row = self.row(self.sql(SELECT_EARLIEST)).await?;
        let before: Option<i64> = row.try_get(0).map_err(native)?;
        let last: i64 = row.try_get(1).map_err(native)?;
        check_number(last.saturating_add(messages.len() as i64))?;
        let (mut added, mut earliest) = (0, before.unwrap_or(i64::MAX));
        for scheduled in messages {
            if self.add_one(last + added + 1, scheduled).await? {
                added += 1;
                earliest = earliest.min(scheduled.not_before.as_micros());
            }
        }
        let is_earlier = added > 0 && before.is_none_or(|before| earliest < before);
        let (waiting, version) = self.count(added, is_earlier).await?;
        if waiting > SCHEDULED_MAX {
            return Err(Error::new(
                ErrorKind::RateLimited,
                "schedule event",
                "as many messages wait as may be: schedule again when some were published, or cancel some",
            )
            .with("waiting", SCHEDULED_MAX));
        }
        Ok(is_earlier.then_some(version))
    }

    async fn add_one(&mut self, number: i64, scheduled: &Scheduled) -> Result<bool> {
        let message = &scheduled.message;
        let place = id_of(0, number as u64);
        let id = scheduled.id.to_string();
        let names = [id.as_str(), message.topic.as_str()];
        let (head, payload) = Packed::new(0, message).row(place, &names, scheduled.not_before);
        let query = self
            .sql(ADD)
            .bind(number)
            .bind(id)
            .bind(message.topic.to_string())
            .bind(scheduled.not_before.as_micros())
            .bind(head)
            .bind(payload);
        Ok(!self.rows(query).await?.is_empty())
    }

    /// Counts rows that came, or went, and returns how many wait, and the version.
    async fn count(&mut self, added: i64, is_earlier: bool) -> Result<(u64, i64)> {
        let query = self.sql(COUNT).bind(added).bind(is_earlier);
        let row = self.row(query).await?;
        let waiting: i64 = row.try_get(0).map_err(native)?;
        Ok((waiting as u64, row.try_get(1).map_err(native)?))
    }

    pub(super) async fn cancel(&mut self, id: &EventId) -> Result<bool> {
        let query = self.sql(CANCEL).bind(id.to_string());
        let cancelled = !self.rows(query).await?.is_empty();
        if cancelled {
            self.count(-1, false).await?;
        }
        Ok(cancelled)
    }

    pub(super) async fn take(&mut self, request: &TakeScheduled) -> Result<Taken> {
        let now = request.now.as_micros();
        let row = self.row(self.sql(SELECT_STATE).bind(now)).await?;
        let (mut taken, is_free) = read_state(&row, request)?;
        if !is_free {
            return Ok(taken);
        }
        let numbers = self.choose(request).await?;
        let query = self.sql(SELECT_DUE).bind(format!("{numbers:?}"));
        let mut sound: Vec<i64> = Vec::new();
        for row in self.rows(query).await? {
            let number: i64 = row.try_get(0).map_err(native)?;
            match read_scheduled(number, &row) {
                Ok(scheduled) => {
                    sound.push(number);
                    taken.messages.push(scheduled);
                }
                Err(error) => self.postpone_damaged(&row, request.now, &error).await?,
            }
        }
        if !sound.is_empty() {
            let marked = self.sql(MARK_TAKEN).bind(format!("{sound:?}"));
            self.rows(marked).await?;
            taken.claim = self.claim(request).await?;
        }
        Ok(taken)
    }

    /// What fits into the batch.
    async fn choose(&mut self, request: &TakeScheduled) -> Result<Vec<i64>> {
        let query = self.sql(SELECT_SIZES).bind(request.now.as_micros());
        let limit = i64::try_from(request.messages_max).unwrap_or(i64::MAX);
        let mut numbers = Vec::new();
        let mut bytes = 0;
        for row in self.rows(query.bind(limit)).await? {
            let size: i64 = row.try_get(1).map_err(native)?;
            bytes += usize::try_from(size)
                .unwrap_or(0)
                .saturating_sub(HEAD_FIXED);
            if bytes > request.bytes_max && !numbers.is_empty() {
                break;
            }
            numbers.push(row.try_get(0).map_err(native)?);
        }
        Ok(numbers)
    }

    async fn claim(&mut self, request: &TakeScheduled) -> Result<u64> {
        let (boot, now) = machine_clock();
        let ttl = i64::try_from(request.ttl.as_millis()).unwrap_or(i64::MAX);
        let query = self
            .sql(CLAIM)
            .bind(request.taker.to_string())
            .bind(request.process.to_string())
            .bind(boot)
            .bind(now.saturating_add(ttl));
        let claim: i64 = self.row(query).await?.try_get(0).map_err(native)?;
        Ok(claim as u64)
    }

    /// Lets a damaged message hold up nothing, and come back to be complained of.
    async fn postpone_damaged(
        &mut self,
        row: &SqliteRow,
        now: Timestamp,
        damage: &Error,
    ) -> Result<()> {
        let id: String = row.try_get(1).map_err(native)?;
        error!(id, error = %damage, "a scheduled message is damaged, and looked at again in an hour: restore the file from a copy, or cancel the message");
        let again = now.plus(DAMAGED_PAUSE).as_micros();
        let query = self.sql(POSTPONE).bind(id).bind(again).bind(false);
        self.rows(query).await?;
        Ok(())
    }

    pub(super) async fn done(
        &mut self,
        claim: u64,
        published: &[EventId],
        refused: &Refused,
    ) -> Result<()> {
        let ended = self.rows(self.sql(END_CLAIM).bind(claim as i64)).await?;
        if ended.is_empty() {
            return Err(Error::new(
                ErrorKind::Conflict,
                "report published messages",
                "another scheduler has taken over",
            ));
        }
        let mut removed = 0;
        for id in published {
            let query = self.sql(REMOVE).bind(id.to_string());
            removed += self.rows(query).await?.len() as i64;
        }
        for (micros, id) in (0..).zip(&refused.ids) {
            let again = refused.again.plus(Duration::from_micros(micros));
            let query = self.sql(POSTPONE).bind(id.to_string());
            let query = query.bind(again.as_micros());
            self.rows(query.bind(refused.unknown.contains(id))).await?;
        }
        self.count(-removed, false).await?;
        Ok(())
    }
}

/// Refuses a number that no message can have, and that a row has that somebody else wrote.
fn check_number(number: i64) -> Result<()> {
    if (0..POSITION_END as i64).contains(&number) {
        return Ok(());
    }
    let reason = format!("a scheduled message has the number {number}");
    Err(native(sqlx::Error::Decode(reason.into())))
}

/// Reads the row of `SELECT_STATE`, and whether there is something to take.
pub(super) fn read_state(row: &SqliteRow, request: &TakeScheduled) -> Result<(Taken, bool)> {
    let waiting: i64 = row.try_get(4).map_err(native)?;
    let version: i64 = row.try_get(5).map_err(native)?;
    let next: Option<i64> = row.try_get(6).map_err(native)?;
    let is_due: bool = row.try_get(7).map_err(native)?;
    let mut taken = Taken::default();
    taken.waiting = waiting as u64;
    taken.version = version as u64;
    taken.next = next.map(Timestamp::from_micros);
    if is_due {
        taken.busy = read_busy(row)?
            .filter(|busy| busy.taker != request.taker && Some(busy.taker) != request.dead);
    }
    let is_free = is_due && taken.busy.is_none();
    Ok((taken, is_free))
}

/// Who is at what is due, while its time is not over.
fn read_busy(row: &SqliteRow) -> Result<Option<BusyTaker>> {
    let Some(taker) = row.try_get::<Option<String>, _>(0).map_err(native)? else {
        return Ok(None);
    };
    let (process, boot): (String, String) = (
        row.try_get(1).map_err(native)?,
        row.try_get(2).map_err(native)?,
    );
    let deadline: i64 = row.try_get(3).map_err(native)?;
    let (this_boot, now) = machine_clock();
    let left = u64::try_from(deadline.saturating_sub(now)).unwrap_or(0);
    if boot != this_boot || left == 0 {
        return Ok(None);
    }
    Ok(Some(BusyTaker {
        taker: taker.parse()?,
        process: process.parse()?,
        free_in: Duration::from_millis(left),
    }))
}

/// Reads a row of `SELECT_DUE`, if it is as it was written.
fn read_scheduled(number: i64, row: &SqliteRow) -> Result<Scheduled> {
    let (id, topic): (String, String) = (
        row.try_get(1).map_err(native)?,
        row.try_get(2).map_err(native)?,
    );
    let (head, payload): (Vec<u8>, Vec<u8>) = (
        row.try_get(3).map_err(native)?,
        row.try_get(4).map_err(native)?,
    );
    let names = [id.as_str(), topic.as_str()];
    let mut stored = Bytes::from([head, payload].concat());
    let unpacked = unpack(
        &Topic::new(&topic)?,
        (0, number as u64),
        &names,
        &mut stored,
    )?;
    Ok(Scheduled::new(
        EventId::parse(&id)?,
        unpacked.time,
        unpacked.message,
    ))
}
