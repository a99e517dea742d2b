//! Held keys as the server has them, and back. Nothing is asked here.

use bytes::{Buf, BufMut, Bytes};
use eventbus_core::{
    DueName, Error, ErrorKind, EventId, Headers, HeldMessage, HeldName, HeldPlace, HeldReport, Key,
    KeyAction, KeyDecision, Message, Position, Result, Timestamp, Topic, TopicPartition, Wait,
};
use redis::{Cmd, Value};

const READ: &str = "read held keys";

/// Digits of a message's number, which the server writes before the message.
const NUMBER_DIGITS: usize = 20;
/// What stands for no position and no key.
const NONE: u32 = u32::MAX;

pub(super) fn unreadable(operation: &'static str) -> Error {
    Error::new(
        ErrorKind::Codec,
        operation,
        "what is stored of held keys cannot be read: somebody else wrote to `eventbus:held:*`",
    )
}

/// A name in the order of names.
pub(super) fn stored_name(name: &HeldName) -> Vec<u8> {
    match name {
        HeldName::Key(key) => [b"k", key.as_bytes()].concat(),
        HeldName::Message(id) => format!("m{id}").into_bytes(),
        _ => Vec::new(),
    }
}

pub(super) fn read_name(name: &[u8]) -> Result<HeldName> {
    match name.split_first() {
        Some((b'k', key)) => Ok(HeldName::Key(Key::new(Bytes::copy_from_slice(key)))),
        Some((b'm', id)) => {
            let id = std::str::from_utf8(id).map_err(|_| unreadable(READ))?;
            Ok(HeldName::Message(EventId::parse(id)?))
        }
        _ => Err(unreadable(READ)),
    }
}

pub(super) fn read_names(names: Vec<Value>) -> Result<Vec<HeldName>> {
    let name = |name: &Value| read_name(bytes(name).ok_or_else(|| unreadable(READ))?);
    names.iter().map(name).collect()
}

pub(super) fn number(number: u64) -> String {
    format!("{number:0NUMBER_DIGITS$}")
}

/// A number that is none yet before the first.
pub(super) fn count(operation: &'static str, answer: Option<Value>) -> Result<u64> {
    match answer {
        Some(Value::Nil) => Ok(0),
        Some(answer) => parse(&answer).ok_or_else(|| unreadable(operation)),
        None => Err(unreadable(operation)),
    }
}

/// What a name waits for, as five arguments; a time that is none is empty.
pub(super) fn wait_arguments(ask: &mut Cmd, wait: &Wait) {
    let time = |time: Option<Timestamp>| {
        time.map_or_else(String::new, |time| time.as_micros().to_string())
    };
    ask.arg(time(wait.until)).arg(wait.attempts);
    ask.arg(time(wait.first_failed));
    ask.arg(&wait.cause).arg(&wait.error);
}

/// A message with its position; the position is written apart, too, for the server to compare.
pub(super) fn packed(message: &Message, position: Option<Position>) -> Vec<u8> {
    let mut packed = Vec::with_capacity(message.size() + 32);
    packed.put_u8(u8::from(position.is_some()));
    packed.put_u128(position.map_or(0, |position| position.0));
    match &message.key {
        None => packed.put_u32(NONE),
        Some(key) => {
            // A message is far smaller than 4 GiB.
            packed.put_u32(key.as_bytes().len() as u32);
            packed.put_slice(key.as_bytes());
        }
    }
    packed.put_u32(message.headers.packed_len() as u32);
    packed.put_slice(message.headers.packed());
    packed.put_slice(&message.payload);
    packed
}

fn read_message(topic: &Topic, stored: Value) -> Result<HeldMessage> {
    let Value::BulkString(stored) = stored else {
        return Err(unreadable(READ));
    };
    let mut stored = Bytes::from(stored);
    let read = || {
        let number = take(&mut stored, NUMBER_DIGITS)?;
        let number = std::str::from_utf8(&number).ok()?.parse().ok()?;
        let mut position = take(&mut stored, 17)?;
        let has_position = position.get_u8() == 1;
        let position = has_position.then(|| Position(position.get_u128()));
        let key = match take(&mut stored, 4)?.get_u32() {
            NONE => None,
            length => Some(Key::new(take(&mut stored, length as usize)?)),
        };
        let headers = take(&mut stored, 4)?.get_u32() as usize;
        let headers = Headers::from_packed(take(&mut stored, headers)?).ok()?;
        let mut message = Message::new(topic.clone(), stored).with_headers(headers);
        message.key = key;
        Some(HeldMessage::new(number, message, position))
    };
    read().ok_or_else(|| unreadable(READ))
}

fn take(from: &mut Bytes, length: usize) -> Option<Bytes> {
    (from.len() >= length).then(|| from.split_to(length))
}

/// The first message with how it fared; none where none is held.
pub(super) fn read_first(
    operation: &'static str,
    topic: &Topic,
    answer: Value,
) -> Result<Option<HeldMessage>> {
    let Value::Array(answer) = answer else {
        return Err(unreadable(operation));
    };
    if answer.is_empty() {
        return Ok(None);
    }
    let Ok([first, attempts, first_failed]) = <[Value; 3]>::try_from(answer) else {
        return Err(unreadable(operation));
    };
    let mut first = read_message(topic, first)?;
    fared(&mut first, &attempts, &first_failed).ok_or_else(|| unreadable(operation))?;
    Ok(Some(first))
}

fn fared(first: &mut HeldMessage, attempts: &Value, first_failed: &Value) -> Option<()> {
    first.attempts = parse(attempts)?;
    first.first_failed = time(first_failed)?;
    Some(())
}

pub(super) fn read_messages(
    operation: &'static str,
    topic: &Topic,
    answer: Value,
) -> Result<Vec<HeldMessage>> {
    let Value::Array(answer) = answer else {
        return Err(unreadable(operation));
    };
    if answer.is_empty() {
        return Ok(Vec::new());
    }
    let Ok([attempts, first_failed, from, Value::Array(stored)]) = <[Value; 4]>::try_from(answer)
    else {
        return Err(unreadable(operation));
    };
    let read = stored.into_iter().map(|stored| read_message(topic, stored));
    let mut messages = read.collect::<Result<Vec<_>>>()?;
    if from == Value::Int(0)
        && let Some(first) = messages.first_mut()
    {
        fared(first, &attempts, &first_failed).ok_or_else(|| unreadable(operation))?;
    }
    Ok(messages)
}

/// What is told of a name.
struct Told {
    wait: Wait,
    decision: Option<KeyDecision>,
    since: Timestamp,
}

fn read_told(told: &Value) -> Option<Told> {
    let Value::Array(told) = told else {
        return None;
    };
    let [
        until,
        attempts,
        first_failed,
        cause,
        error,
        action,
        by,
        because,
        at,
        since,
    ] = told.as_slice()
    else {
        return None;
    };
    let mut wait = Wait::nothing();
    wait.until = time(until)?;
    wait.attempts = parse(attempts)?;
    wait.first_failed = time(first_failed)?;
    wait.cause = text(cause)?;
    wait.error = text(error)?;
    let decision = match action {
        Value::Nil => None,
        action => {
            let action = KeyAction::from_name(&text(action)?)?;
            Some(KeyDecision::new(
                action,
                text(by)?,
                text(because)?,
                time(at)??,
            ))
        }
    };
    Some(Told {
        wait,
        decision,
        since: time(since)??,
    })
}

type DueSince = (Timestamp, DueName);

/// Names that are due, since when, and when the next one is.
pub(super) fn read_due(
    operation: &'static str,
    place: &TopicPartition,
    answer: Value,
) -> Result<(Vec<DueSince>, Option<Timestamp>)> {
    let read = || {
        let Value::Array(answer) = answer else {
            return None;
        };
        let [Value::Array(found), next] = answer.as_slice() else {
            return None;
        };
        let due = found.chunks_exact(2).map(|pair| {
            let told = read_told(&pair[1])?;
            let name = read_name(bytes(&pair[0])?).ok()?;
            let since = match &told.decision {
                Some(decision) => decision.at,
                None => told.wait.until?,
            };
            let held = HeldPlace::new(place.clone(), name);
            Some((since, DueName::new(held, told.wait, told.decision)))
        });
        Some((due.collect::<Option<Vec<_>>>()?, time(next)?))
    };
    read().ok_or_else(|| unreadable(operation))
}

pub(super) fn read_reports(
    operation: &'static str,
    place: &TopicPartition,
    answer: Value,
) -> Result<Vec<HeldReport>> {
    let Value::Array(answer) = answer else {
        return Err(unreadable(operation));
    };
    let report = |three: &[Value]| {
        let told = read_told(&three[1])?;
        let held = HeldPlace::new(place.clone(), read_name(bytes(&three[0])?).ok()?);
        let messages = parse(&three[2])?;
        let Told {
            wait,
            decision,
            since,
        } = told;
        Some(HeldReport::new(held, wait, since, messages, decision))
    };
    let reports = answer.chunks_exact(3).map(report);
    let reports: Option<Vec<_>> = reports.collect();
    reports.ok_or_else(|| unreadable(operation))
}

fn bytes(value: &Value) -> Option<&[u8]> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        _ => None,
    }
}

fn text(value: &Value) -> Option<String> {
    String::from_utf8(bytes(value)?.to_vec()).ok()
}

fn parse<N: std::str::FromStr + TryFrom<i64>>(value: &Value) -> Option<N> {
    match value {
        Value::Int(number) => N::try_from(*number).ok(),
        value => std::str::from_utf8(bytes(value)?).ok()?.parse().ok(),
    }
}

/// A time that may be none, which is empty.
fn time(value: &Value) -> Option<Option<Timestamp>> {
    match bytes(value)? {
        b"" => Some(None),
        _ => parse(value).map(|micros| Some(Timestamp::from_micros(micros))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_as_it_was() {
        let topic = Topic::from_static("orders");
        let headers = Headers::builder()
            .push("eb-id", "17")
            .expect("a good header");
        let plain = Message::new(topic.clone(), "payload").with_headers(headers.build());
        let keyed = Message::new(topic.clone(), "").with_key("");
        for (message, position) in [(plain, None), (keyed, Some(Position(u128::MAX)))] {
            let mut stored = number(7).into_bytes();
            stored.extend(packed(&message, position));
            for length in 0..stored.len() - message.payload.len() {
                let cut = Value::BulkString(stored[..length].to_vec());
                assert!(read_message(&topic, cut).is_err(), "{length}");
            }
            let read = read_message(&topic, Value::BulkString(stored)).expect("whole");
            assert_eq!((read.number, read.position), (7, position));
            assert_eq!(read.message, message);
        }
    }

    #[test]
    fn names_sort_as_they_do_here() {
        let key = |bytes: &'static [u8]| HeldName::Key(Key::new(bytes));
        let id = EventId::parse("x").expect("an id");
        let names = [
            key(b""),
            key(b"\x00"),
            key(b"b"),
            key(b"\xff"),
            HeldName::Message(id),
        ];
        assert!(names.is_sorted());
        assert!(names.iter().map(stored_name).is_sorted());
        for name in &names {
            assert_eq!(&read_name(&stored_name(name)).expect("a name"), name);
        }
    }
}
