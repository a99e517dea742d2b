//! Held names and messages as rows, and back. Pure: no database is touched here.

use bytes::Bytes;
use eventbus_core::{
    EventId, HeldMessage, HeldName, HeldPlace, Key, KeyAction, KeyDecision, Position, Result,
    Timestamp, Topic, TopicPartition, Wait,
};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::native;
use crate::sqlite::headers::unpack;

pub(super) fn stored_name(name: &HeldName) -> (i64, Vec<u8>) {
    match name {
        HeldName::Message(id) => (1, id.to_string().into_bytes()),
        name => (
            0,
            name.key().map_or(Vec::new(), |key| key.as_bytes().to_vec()),
        ),
    }
}

pub(super) fn read_name(kind: i64, name: Vec<u8>) -> Result<HeldName> {
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
pub(super) fn read_held(row: &SqliteRow) -> Result<(HeldPlace, Wait, Option<KeyDecision>)> {
    let topic: String = row.try_get(0).map_err(native)?;
    let place = TopicPartition::new(Topic::new(&topic)?, row.try_get(1).map_err(native)?);
    let kind = row.try_get(2).map_err(native)?;
    let name = read_name(kind, row.try_get(3).map_err(native)?)?;
    let wait = read_wait(row).map_err(native)?;
    let decision = read_decision(row).map_err(native)?;
    Ok((HeldPlace::new(place, name), wait, decision))
}

pub(super) fn read_wait(row: &SqliteRow) -> Result<Wait, sqlx::Error> {
    let mut wait = Wait::nothing();
    wait.until = row
        .try_get::<Option<i64>, _>(4)?
        .map(Timestamp::from_micros);
    wait.attempts = row.try_get(5)?;
    wait.first_failed = row
        .try_get::<Option<i64>, _>(6)?
        .map(Timestamp::from_micros);
    wait.cause = row.try_get(7)?;
    wait.error = row.try_get(8)?;
    Ok(wait)
}

pub(super) fn read_decision(row: &SqliteRow) -> Result<Option<KeyDecision>, sqlx::Error> {
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
pub(super) fn read_message(topic: &Topic, row: &SqliteRow, is_first: bool) -> Result<HeldMessage> {
    let number: i64 = row.try_get(0).map_err(native)?;
    let position: Option<Vec<u8>> = row.try_get(1).map_err(native)?;
    let (head, payload): (Vec<u8>, Vec<u8>) = (
        row.try_get(2).map_err(native)?,
        row.try_get(3).map_err(native)?,
    );
    let mut stored = Bytes::from([head, payload].concat());
    let message = unpack(topic, (0, number as u64), &[], &mut stored)?.message;
    let position = position.map(read_position).transpose().map_err(native)?;
    let mut held = HeldMessage::new(number as u64, message, position);
    if is_first {
        held.attempts = row.try_get(4).map_err(native)?;
        let first_failed: Option<i64> = row.try_get(5).map_err(native)?;
        held.first_failed = first_failed.map(Timestamp::from_micros);
    }
    Ok(held)
}
