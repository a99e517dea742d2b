//! What is held under one claim, inside a transaction.

use eventbus_core::{
    Claim, Error, ErrorKind, Group, HELD_KEYS_MAX, HeldMessage, HeldName, HoldEntry, Key, Result,
    Timestamp, TopicPartition, Wait,
};
use sqlx::SqlStr;

use super::read::{read_message, stored_name};
use super::statements::{
    ADD_MESSAGE, ADD_NAME, COUNT_NAMES, FIND_NAME, LOCK_FENCE, NOTE_ADDED, NOTE_ADVANCED,
    REMOVE_FIRST, REMOVE_NAME, SELECT_FIRST,
};
use crate::postgres::session::{PgQuery, Session};
use crate::postgres::tables::Tables;

/// What is held under one claim, inside a transaction.
pub(super) struct Held<'h> {
    pub(super) tables: &'h Tables,
    pub(super) claim: &'h Claim,
    pub(super) session: Session,
}

/// A statement about one name, with the name bound to its first five parameters.
pub(super) fn about<'q>(
    sql: SqlStr,
    group: &Group,
    place: &TopicPartition,
    name: &HeldName,
) -> PgQuery<'q> {
    let (kind, name) = stored_name(name);
    of_place(sql, group, place).bind(kind).bind(name)
}

/// A statement about a partition, bound to its first three parameters.
pub(super) fn of_place<'q>(sql: SqlStr, group: &Group, place: &TopicPartition) -> PgQuery<'q> {
    let query = sqlx::query(sql).bind(group.to_string());
    let query = query.bind(place.topic.to_string());
    query.bind(place.partition as i32)
}

/// The name that one of several held names is found again by.
struct Found {
    id: i64,
    next_number: i64,
    last_position: Option<Vec<u8>>,
}

impl Held<'_> {
    fn of_place<'q>(&self, sql: &str) -> PgQuery<'q> {
        of_place(self.tables.sql(sql), &self.claim.group, &self.claim.place)
    }

    /// Makes sure that no later claim was made, and that none is until the commit.
    pub(super) async fn check_claim(&mut self, operation: &'static str) -> Result<()> {
        let fence = self.of_place(LOCK_FENCE);
        let rows = self.session.rows(fence).await?;
        let fence = rows.first().map(|row| self.session.column(row, 0));
        let fence: Option<i64> = fence.transpose()?;
        if fence == Some(self.claim.fence as i64) {
            return Ok(());
        }
        Err(self.error(
            ErrorKind::Conflict,
            operation,
            "another member has taken this partition over",
        ))
    }

    fn error(&self, kind: ErrorKind, operation: &'static str, message: &str) -> Error {
        Error::new(kind, operation, message)
            .with("group", &self.claim.group)
            .with("topic", &self.claim.place.topic)
            .with("partition", self.claim.place.partition)
    }

    async fn find(&mut self, name: &HeldName) -> Result<Option<Found>> {
        let sql = self.tables.sql(FIND_NAME);
        let query = about(sql, &self.claim.group, &self.claim.place, name);
        let rows = self.session.rows(query).await?;
        let Some(row) = rows.first() else {
            return Ok(None);
        };
        Ok(Some(Found {
            id: self.session.column(row, 0)?,
            next_number: self.session.column(row, 1)?,
            last_position: self.session.column(row, 2)?,
        }))
    }

    async fn add_name(&mut self, entry: &HoldEntry) -> Result<Found> {
        let count = self.of_place(COUNT_NAMES);
        let rows = self.session.rows(count).await?;
        let count = rows.first().map(|row| self.session.column(row, 0));
        let count: i64 = count.transpose()?.unwrap_or(0);
        if count >= HELD_KEYS_MAX as i64 {
            return Err(self.error(
                ErrorKind::RateLimited,
                "hold messages",
                "as many keys are held as may be: retry, release or discard what is parked",
            ));
        }
        let sql = self.tables.sql(ADD_NAME);
        let query = about(sql, &self.claim.group, &self.claim.place, &entry.name);
        let rows = self.session.rows(with_wait(query, &entry.wait)).await?;
        let id = rows.first().map(|row| self.session.column(row, 0));
        Ok(Found {
            // An insert that is no error returns its row.
            id: id.transpose()?.unwrap_or(0),
            next_number: 1,
            last_position: None,
        })
    }

    pub(super) async fn hold_one(&mut self, entry: &HoldEntry) -> Result<()> {
        let found = match self.find(&entry.name).await? {
            Some(found) => found,
            None => self.add_name(entry).await?,
        };
        let position = entry
            .position
            .map(|position| position.0.to_be_bytes().to_vec());
        if position.is_some() && position <= found.last_position {
            return Ok(());
        }
        let message = &entry.message;
        let add = sqlx::query(self.tables.sql(ADD_MESSAGE))
            .bind(found.id)
            .bind(found.next_number)
            .bind(position.clone())
            .bind(message.key.as_ref().map(Key::as_bytes))
            .bind(&message.headers.packed()[..])
            .bind(&message.payload[..]);
        self.session.rows(add).await?;
        let note = sqlx::query(self.tables.sql(NOTE_ADDED))
            .bind(found.id)
            .bind(found.next_number + 1)
            .bind(position);
        self.session.rows(note).await.map(|_| ())
    }

    pub(super) async fn advance(
        &mut self,
        name: &HeldName,
        done: Option<u64>,
    ) -> Result<Option<HeldMessage>> {
        let Some(found) = self.find(name).await? else {
            return Ok(None);
        };
        let tables = self.tables;
        let by_id = |sql: &str| sqlx::query(tables.sql(sql)).bind(found.id);
        if let Some(done) = done {
            let remove = by_id(REMOVE_FIRST).bind(done as i64);
            if !self.session.rows(remove).await?.is_empty() {
                self.session.rows(by_id(NOTE_ADVANCED)).await?;
            }
        }
        let first = self.session.rows(by_id(SELECT_FIRST)).await?;
        match first.first() {
            Some(row) => read_message(&self.claim.place.topic, row, true).map(Some),
            None => {
                self.session.rows(by_id(REMOVE_NAME)).await?;
                Ok(None)
            }
        }
    }
}

/// Binds what a name waits for.
pub(super) fn with_wait<'q>(query: PgQuery<'q>, wait: &Wait) -> PgQuery<'q> {
    query
        .bind(wait.until.map(Timestamp::as_micros))
        .bind(i32::try_from(wait.attempts).unwrap_or(i32::MAX))
        .bind(wait.first_failed.map(Timestamp::as_micros))
        .bind(wait.cause.clone())
        .bind(wait.error.clone())
}
