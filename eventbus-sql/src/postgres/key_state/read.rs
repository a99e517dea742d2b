//! Held names and messages as rows, and back. Pure: no database is touched here.

use bytes::Bytes;
use eventbus_core::{
    EventId, Headers, HeldMessage, HeldName, HeldPlace, Key, KeyAction, KeyDecision, Message,
    Position, Result, Timestamp, Topic, TopicPartition, Wait,
};
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::native;

pub(super) fn stored_name(name: &HeldName) -> (i32, Vec<u8>) {
    match name {
        HeldName::Message(id) => (1, id.to_string().into_bytes()),
        name => (
            0,
            name.key().map_or(Vec::new(), |key| key.as_bytes().to_vec()),
        ),
    }
}

pub(super) fn read_name(kind: i32, name: Vec<u8>) -> Result<HeldName> {
    match kind {
        0 => Ok(HeldName::Key(Key::new(name))),
        1 => {
            let name = String::from_utf8(name);
            let name = name.map_err(|error| native(sqlx::Error::Decode(error.into())))?;
            Ok(HeldName::Message(EventId::parse(&name)?))
        }
        kind => Err(native(sqlx::Error::Decode(
            format!("a held name is of no kind {kind}").into(),
        ))),
    }
}

/// Reads what stands at the beginning of the rows of `SELECT_DUE` and `LIST`.
pub(super) fn read_held(row: &PgRow) -> Result<(HeldPlace, Wait, Option<KeyDecision>)> {
    let topic: String = row.try_get(0).map_err(native)?;
    let partition: i32 = row.try_get(1).map_err(native)?;
    let place = TopicPartition::new(Topic::new(&topic)?, partition as u32);
    let kind = row.try_get(2).map_err(native)?;
    let name = read_name(kind, row.try_get(3).map_err(native)?)?;
    let wait = read_wait(row).map_err(native)?;
    let decision = read_decision(row).map_err(native)?;
    Ok((HeldPlace::new(place, name), wait, decision))
}

fn read_wait(row: &PgRow) -> Result<Wait, sqlx::Error> {
    let time = |index| -> Result<Option<Timestamp>, sqlx::Error> {
        Ok(row
            .try_get::<Option<i64>, _>(index)?
            .map(Timestamp::from_micros))
    };
    let mut wait = Wait::nothing();
    wait.until = time(4)?;
    wait.attempts = row.try_get::<i32, _>(5)? as u32;
    wait.first_failed = time(6)?;
    wait.cause = row.try_get(7)?;
    wait.error = row.try_get(8)?;
    Ok(wait)
}

fn read_decision(row: &PgRow) -> Result<Option<KeyDecision>, sqlx::Error> {
    let Some(action) = row.try_get::<Option<String>, _>(9)? else {
        return Ok(None);
    };
    let action = KeyAction::from_name(&action)
        .ok_or_else(|| sqlx::Error::Decode(format!("unknown action {action:?}").into()))?;
    let (by, because): (String, String) = (row.try_get(10)?, row.try_get(11)?);
    let at = Timestamp::from_micros(row.try_get(12)?);
    Ok(Some(KeyDecision::new(action, by, because, at)))
}

fn read_position(position: Vec<u8>) -> Result<Position, sqlx::Error> {
    let bytes = position.try_into().map_err(|position: Vec<u8>| {
        let reason = format!("a held message's position has {} bytes", position.len());
        sqlx::Error::Decode(reason.into())
    })?;
    Ok(Position(u128::from_be_bytes(bytes)))
}

/// Reads a message; how it fared is known of the first of a name.
pub(super) fn read_message(topic: &Topic, row: &PgRow, is_first: bool) -> Result<HeldMessage> {
    let read = || -> Result<HeldMessage, sqlx::Error> {
        let key: Option<Vec<u8>> = row.try_get(2)?;
        let headers: Vec<u8> = row.try_get(3)?;
        let payload: Vec<u8> = row.try_get(4)?;
        let headers = Headers::from_packed(Bytes::from(headers));
        let headers = headers.map_err(|error| sqlx::Error::Decode(error.into()))?;
        let mut message = Message::new(topic.clone(), payload).with_headers(headers);
        message.key = key.map(Key::new);
        let position: Option<Vec<u8>> = row.try_get(1)?;
        let position = position.map(read_position).transpose()?;
        let number: i64 = row.try_get(0)?;
        let mut held = HeldMessage::new(number as u64, message, position);
        if is_first {
            held.attempts = row.try_get::<i32, _>(5)? as u32;
            let first_failed: Option<i64> = row.try_get(6)?;
            held.first_failed = first_failed.map(Timestamp::from_micros);
        }
        Ok(held)
    };
    read().map_err(native)
}
