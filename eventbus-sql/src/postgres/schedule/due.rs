//! What is done with the schedule inside a transaction, and how its rows are read.

use std::time::Duration;

use bytes::Bytes;
use eventbus_core::{
    BusyTaker, Error, ErrorKind, EventId, Headers, Key, Message, Refused, Result, SCHEDULED_MAX,
    Scheduled, TakeScheduled, Taken, Timestamp, Topic,
};
use sqlx::Row;
use sqlx::postgres::PgRow;
use tracing::error;

use super::native;
use super::statements::{
    ADD, CANCEL, CLAIM, END_CLAIM, LOCK, MARK_TAKEN, POSTPONE, REMOVE, SELECT_DUE, SELECT_STATE,
};
use crate::postgres::database::Database;
use crate::postgres::session::{PgQuery, Session};
use crate::postgres::tables::Tables;

/// When a message that is damaged is looked at again, and complained of.
const DAMAGED_PAUSE: Duration = Duration::from_secs(3600);

/// The schedule, locked until it is committed.
pub(super) struct Writing<'d> {
    tables: &'d Tables,
    pub(super) session: Session,
}

impl<'d> Writing<'d> {
    pub(super) async fn begin(database: &'d Database, operation: &'static str) -> Result<Self> {
        let mut session = database.begin(operation).await?;
        session.rows(sqlx::query(database.tables.sql(LOCK))).await?;
        Ok(Self {
            tables: &database.tables,
            session,
        })
    }

    fn sql(&self, text: &str) -> PgQuery<'static> {
        sqlx::query(self.tables.sql(text))
    }

    /// Adds those whose ids do not wait, and returns the version if one of them is the earliest now.
    pub(super) async fn add(&mut self, messages: &[Scheduled]) -> Result<Option<i64>> {
        let parts = || messages.iter().map(|scheduled| &scheduled.message);
        let ids: Vec<_> = messages.iter().map(|it| it.id.to_string()).collect();
        let due: Vec<_> = messages
            .iter()
            .map(|it| it.not_before.as_micros())
            .collect();
        let topics: Vec<_> = parts().map(|it| it.topic.to_string()).collect();
        let keys: Vec<_> = parts()
            .map(|it| it.key.as_ref().map(|key| key.as_bytes().to_vec()))
            .collect();
        let headers: Vec<_> = parts().map(|it| it.headers.packed().to_vec()).collect();
        let payloads: Vec<_> = parts().map(|it| it.payload.to_vec()).collect();
        let query = self
            .sql(ADD)
            .bind(ids)
            .bind(topics)
            .bind(due)
            .bind(keys)
            .bind(headers)
            .bind(payloads);
        let rows = self.session.rows(query).await?;
        let Some(row) = rows.first() else {
            return Ok(None);
        };
        let waiting: i64 = row.try_get(0).map_err(native)?;
        if waiting as u64 > SCHEDULED_MAX {
            return Err(Error::new(
                ErrorKind::RateLimited,
                "schedule event",
                "as many messages wait as may be: schedule again when some were published, or cancel some",
            )
            .with("waiting", SCHEDULED_MAX));
        }
        let (version, is_earlier): (i64, bool) = (
            row.try_get(1).map_err(native)?,
            row.try_get(2).map_err(native)?,
        );
        Ok(is_earlier.then_some(version))
    }

    pub(super) async fn cancel(&mut self, id: &EventId) -> Result<bool> {
        let query = self.sql(CANCEL).bind(id.to_string());
        Ok(!self.session.rows(query).await?.is_empty())
    }

    pub(super) async fn take(&mut self, request: &TakeScheduled) -> Result<Taken> {
        let now = request.now.as_micros();
        let query = self.sql(SELECT_STATE).bind(now);
        let rows = self.session.rows(query).await?;
        let state = rows.first().map(|row| read_state(row, request));
        let (mut taken, is_free) = state.transpose()?.unwrap_or_default();
        if !is_free {
            return Ok(taken);
        }
        let limit = |limit: usize| i64::try_from(limit).unwrap_or(i64::MAX);
        let query = self
            .sql(SELECT_DUE)
            .bind(now)
            .bind(limit(request.messages_max))
            .bind(limit(request.bytes_max));
        let mut sound: Vec<i64> = Vec::new();
        for row in self.session.rows(query).await? {
            match read_scheduled(&row) {
                Ok(scheduled) => {
                    sound.push(row.try_get(0).map_err(native)?);
                    taken.messages.push(scheduled);
                }
                Err(error) => self.postpone_damaged(&row, request.now, &error).await?,
            }
        }
        if !sound.is_empty() {
            let marked = self.sql(MARK_TAKEN).bind(sound);
            self.session.rows(marked).await?;
            taken.claim = self.claim(request).await?;
        }
        Ok(taken)
    }

    async fn claim(&mut self, request: &TakeScheduled) -> Result<u64> {
        let ttl = i64::try_from(request.ttl.as_micros()).unwrap_or(i64::MAX / 2);
        let query = self
            .sql(CLAIM)
            .bind(request.taker.to_string())
            .bind(request.process.to_string())
            .bind(ttl);
        let rows = self.session.rows(query).await?;
        let claim = rows.first().map(|row| row.try_get::<i64, _>(0));
        let claim = claim.transpose().map_err(native)?;
        Ok(claim.unwrap_or_default() as u64)
    }

    /// Lets a damaged message hold up nothing, and come back to be complained of.
    async fn postpone_damaged(
        &mut self,
        row: &PgRow,
        now: Timestamp,
        damage: &Error,
    ) -> Result<()> {
        let id: String = row.try_get(1).map_err(native)?;
        error!(id, error = %damage, "a scheduled message is damaged, and looked at again in an hour: restore the table from a copy, or cancel the message");
        let again = now.plus(DAMAGED_PAUSE).as_micros();
        self.postpone(vec![id], vec![again], vec![false]).await
    }

    async fn postpone(&mut self, ids: Vec<String>, due: Vec<i64>, taken: Vec<bool>) -> Result<()> {
        let query = self.sql(POSTPONE).bind(ids).bind(due).bind(taken);
        self.session.rows(query).await.map(|_| ())
    }

    pub(super) async fn done(
        &mut self,
        claim: u64,
        published: &[EventId],
        refused: &Refused,
    ) -> Result<()> {
        let query = self.sql(END_CLAIM).bind(claim as i64);
        if self.session.rows(query).await?.is_empty() {
            return Err(Error::new(
                ErrorKind::Conflict,
                "report published messages",
                "another scheduler has taken over",
            ));
        }
        let published: Vec<_> = published.iter().map(EventId::to_string).collect();
        let query = self.sql(REMOVE).bind(published);
        self.session.rows(query).await?;
        if refused.ids.is_empty() {
            return Ok(());
        }
        let ids = refused.ids.iter().map(EventId::to_string).collect();
        let later = |micros| {
            refused
                .again
                .plus(Duration::from_micros(micros))
                .as_micros()
        };
        let due = (0..refused.ids.len() as u64).map(later).collect();
        let is_unknown = |id| refused.unknown.contains(id);
        let taken = refused.ids.iter().map(is_unknown).collect();
        self.postpone(ids, due, taken).await
    }
}

/// Reads the row of `SELECT_STATE`, and whether there is something to take.
pub(super) fn read_state(row: &PgRow, request: &TakeScheduled) -> Result<(Taken, bool)> {
    let waiting: i64 = row.try_get(3).map_err(native)?;
    let version: i64 = row.try_get(4).map_err(native)?;
    let next: Option<i64> = row.try_get(5).map_err(native)?;
    let is_due: bool = row.try_get(6).map_err(native)?;
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
fn read_busy(row: &PgRow) -> Result<Option<BusyTaker>> {
    let text = |index: usize| row.try_get::<Option<String>, _>(index).map_err(native);
    let left: Option<i64> = row.try_get(2).map_err(native)?;
    let left = left.and_then(|left| u64::try_from(left).ok());
    let (Some(taker), Some(process), Some(left @ 1..)) = (text(0)?, text(1)?, left) else {
        return Ok(None);
    };
    Ok(Some(BusyTaker {
        taker: taker.parse()?,
        process: process.parse()?,
        free_in: Duration::from_micros(left),
    }))
}

/// Reads a row of `SELECT_DUE`, if it is as it was written.
fn read_scheduled(row: &PgRow) -> Result<Scheduled> {
    let (id, topic): (String, String) = (
        row.try_get(1).map_err(native)?,
        row.try_get(2).map_err(native)?,
    );
    let not_before = Timestamp::from_micros(row.try_get(3).map_err(native)?);
    let (headers, payload): (&[u8], &[u8]) = (
        row.try_get(5).map_err(native)?,
        row.try_get(6).map_err(native)?,
    );
    let mut message = message_head(&topic, row.try_get(4).map_err(native)?, headers)?;
    message.payload = Bytes::copy_from_slice(payload);
    Ok(Scheduled::new(EventId::parse(&id)?, not_before, message))
}

/// A message without its payload.
pub(super) fn message_head(topic: &str, key: Option<&[u8]>, headers: &[u8]) -> Result<Message> {
    let headers = Headers::from_packed(Bytes::copy_from_slice(headers))?;
    let mut message = Message::new(Topic::new(topic)?, Bytes::new()).with_headers(headers);
    message.key = key.map(|key| Key::new(Bytes::copy_from_slice(key)));
    Ok(message)
}
