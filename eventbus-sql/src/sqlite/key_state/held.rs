//! What is held under one claim, inside a commit.

use eventbus_core::{
    Claim, Error, ErrorKind, Group, HELD_KEYS_MAX, HeldMessage, HeldName, HoldEntry, Result,
    Timestamp, TopicPartition, Wait,
};
use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Row, Sqlite, SqliteConnection};

use super::native;
use super::read::{read_message, stored_name};
use super::statements::{
    ADD_MESSAGE, ADD_NAME, COUNT_NAMES, FIND_NAME, NOTE_ADDED, NOTE_ADVANCED, REMOVE_FIRST,
    REMOVE_NAME, SELECT_FENCE, SELECT_FIRST,
};
use crate::sqlite::headers::{POSITION_END, Packed, id_of};
use crate::sqlite::tables::Tables;

/// What is held under one claim, inside a commit.
pub(super) struct Held {
    pub(super) tables: Tables,
    pub(super) claim: Claim,
    pub(super) now: Timestamp,
}

/// The number of a held message, if it can be one.
fn read_number(number: i64) -> sqlx::Result<i64> {
    if (0..POSITION_END as i64).contains(&number) {
        return Ok(number);
    }
    Err(sqlx::Error::Decode(
        format!("the next message of a key has the number {number}").into(),
    ))
}

/// A statement about one name, with the name bound to its first five parameters.
pub(super) fn about<'q>(
    sql: sqlx::SqlStr,
    group: &Group,
    place: &TopicPartition,
    name: &HeldName,
) -> Query<'q, Sqlite, SqliteArguments> {
    let (kind, name) = stored_name(name);
    let query = sqlx::query(sql).bind(group.to_string());
    let query = query.bind(place.topic.to_string()).bind(place.partition);
    query.bind(kind).bind(name)
}

/// The name that one of several held names is found again by.
struct Found {
    id: i64,
    next_number: i64,
    last_position: Option<Vec<u8>>,
}

impl Held {
    pub(super) fn of_place<'q>(&self, sql: &str) -> Query<'q, Sqlite, SqliteArguments> {
        let place = &self.claim.place;
        let query = sqlx::query(self.tables.sql(sql)).bind(self.claim.group.to_string());
        query.bind(place.topic.to_string()).bind(place.partition)
    }

    pub(super) async fn check_claim(
        &self,
        operation: &'static str,
        connection: &mut SqliteConnection,
    ) -> Result<()> {
        let row = self.of_place(SELECT_FENCE).fetch_optional(connection);
        let row = row.await.map_err(native)?;
        let fence: Option<i64> = row.map(|row| row.try_get(0)).transpose().map_err(native)?;
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

    async fn find(
        &self,
        name: &HeldName,
        connection: &mut SqliteConnection,
    ) -> Result<Option<Found>> {
        let sql = self.tables.sql(FIND_NAME);
        let query = about(sql, &self.claim.group, &self.claim.place, name);
        let row = query.fetch_optional(connection).await.map_err(native)?;
        let found = |row: SqliteRow| {
            Ok(Found {
                id: row.try_get(0)?,
                next_number: read_number(row.try_get(1)?)?,
                last_position: row.try_get(2)?,
            })
        };
        row.map(found).transpose().map_err(native)
    }

    async fn add_name(
        &self,
        entry: &HoldEntry,
        connection: &mut SqliteConnection,
    ) -> Result<Found> {
        let count = self.of_place(COUNT_NAMES).fetch_one(&mut *connection);
        let count: i64 = count.await.and_then(|row| row.try_get(0)).map_err(native)?;
        if count >= HELD_KEYS_MAX as i64 {
            return Err(self.error(
                ErrorKind::RateLimited,
                "hold messages",
                "as many keys are held as may be: retry, release or discard what is parked",
            ));
        }
        let Wait {
            until,
            attempts,
            first_failed,
            cause,
            error,
            ..
        } = &entry.wait;
        let sql = self.tables.sql(ADD_NAME);
        let row = about(sql, &self.claim.group, &self.claim.place, &entry.name)
            .bind(self.now.as_micros())
            .bind(until.map(Timestamp::as_micros))
            .bind(attempts)
            .bind(first_failed.map(Timestamp::as_micros))
            .bind(cause.clone())
            .bind(error.clone())
            .fetch_one(connection)
            .await;
        Ok(Found {
            id: row.and_then(|row| row.try_get(0)).map_err(native)?,
            next_number: 1,
            last_position: None,
        })
    }

    pub(super) async fn hold_one(
        &self,
        entry: &HoldEntry,
        connection: &mut SqliteConnection,
    ) -> Result<()> {
        let found = match self.find(&entry.name, connection).await? {
            Some(found) => found,
            None => self.add_name(entry, connection).await?,
        };
        let position = entry
            .position
            .map(|position| position.0.to_be_bytes().to_vec());
        if position.is_some() && position <= found.last_position {
            return Ok(());
        }
        let (head, payload) =
            Packed::new(0, &entry.message).row(id_of(0, found.next_number as u64), &[], self.now);
        sqlx::query(self.tables.sql(ADD_MESSAGE))
            .bind(found.id)
            .bind(found.next_number)
            .bind(position.clone())
            .bind(head)
            .bind(payload)
            .execute(&mut *connection)
            .await
            .map_err(native)?;
        sqlx::query(self.tables.sql(NOTE_ADDED))
            .bind(found.id)
            .bind(found.next_number + 1)
            .bind(position)
            .execute(connection)
            .await
            .map_err(native)?;
        Ok(())
    }

    pub(super) async fn advance(
        &self,
        name: &HeldName,
        done: Option<u64>,
        connection: &mut SqliteConnection,
    ) -> Result<Option<HeldMessage>> {
        let Some(found) = self.find(name, connection).await? else {
            return Ok(None);
        };
        let by_id = |sql: &str| sqlx::query(self.tables.sql(sql)).bind(found.id);
        if let Some(done) = done {
            let removed = by_id(REMOVE_FIRST).bind(done as i64);
            let removed = removed.fetch_optional(&mut *connection).await;
            if removed.map_err(native)?.is_some() {
                let noted = by_id(NOTE_ADVANCED).execute(&mut *connection).await;
                noted.map_err(native)?;
            }
        }
        let first = by_id(SELECT_FIRST).fetch_optional(&mut *connection);
        match first.await.map_err(native)? {
            Some(row) => read_message(&self.claim.place.topic, &row, true).map(Some),
            None => {
                let removed = by_id(REMOVE_NAME).execute(connection).await;
                removed.map_err(native)?;
                Ok(None)
            }
        }
    }
}
