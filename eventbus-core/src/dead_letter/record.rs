//! What stands on a dead-letter topic, header by header: letters, and what was decided about them.

use std::borrow::Cow;

use bytes::Bytes;

use super::cause::Diagnosis;
use super::letter::{DeadLetter, DeadLetterStatus, Decision, DeskAction};
use super::log::Place;
use super::standing::Standing;
use super::topic_of;
use crate::clock::Timestamp;
use crate::consumer::scope::Scope;
use crate::delivery::Position;
use crate::envelope::EventId;
use crate::error::{Error, ErrorKind, Result};
use crate::header::{DEAD_LETTER_PREFIX, HEADERS_LEFT_OUT, KnownHeaders};
use crate::message::{Group, HEADER_BYTES_MAX, Headers, HeadersBuilder, Key, Message, Topic};

pub(super) const LETTER: &str = "eb-dlq-id";
const CAUSE: &str = "eb-dlq-cause";
const ERROR: &str = "eb-dlq-error";
const ATTEMPTS: &str = "eb-dlq-attempts";
const FIRST_FAILED_AT: &str = "eb-dlq-first-failed-at";
const FAILED_AT: &str = "eb-dlq-failed-at";
const TOPIC: &str = "eb-dlq-topic";
const GROUP: &str = "eb-dlq-group";
const PARTITION: &str = "eb-dlq-partition";
const POSITION: &str = "eb-dlq-position";
/// On a letter whose event has no key: it has its id as key, to be on one partition with its notes.
pub(super) const KEYLESS: &str = "eb-dlq-keyless";
/// On a letter whose bytes stand in parts before it: how many there are.
pub(super) const WHOLE: &str = "eb-dlq-whole";
/// On a part: where its bytes stand.
pub(super) const PART: &str = "eb-dlq-part";
/// On a note about a letter, not on a letter: what was done.
pub(super) const STATUS: &str = "eb-dlq-status";
const BY: &str = "eb-dlq-by";
const BECAUSE: &str = "eb-dlq-because";
const AT: &str = "eb-dlq-at";
/// On a note: under which claim it was done, or which one is made.
const CLAIM: &str = "eb-dlq-claim";
/// On a claim: when it ends.
const UNTIL: &str = "eb-dlq-until";
/// On a note that the event was edited: the new event's id.
const NEW_ID: &str = "eb-dlq-new-id";

/// Stands in the place of [`DEAD_LETTER_PREFIX`] before the name of a header that the event itself
/// has: somebody may have published a letter's record as an event.
const KEPT: &str = "eb-dlq-kept-";

const CLAIMED: &str = "claimed";
const REDRIVEN: &str = "redriven";
const EDITED: &str = "edited";
const DISCARDED: &str = "discarded";

/// Longest name of a header.
const NAME_BYTES_MAX: usize = 255;
/// Longest text of an error that is kept; the beginning says what happened.
const ERROR_BYTES_MAX: usize = HEADER_BYTES_MAX / 2;

/// The id of a delivery's dead letter, by which operators decide about it.
pub(crate) fn id_of(scope: &Scope) -> EventId {
    let redrives = redrives(&scope.message().headers);
    EventId::derived(scope.id(), scope.group(), "dead letter", None, redrives)
}

/// Makes the dead letter of a delivery: its key, headers and payload as they are, and the diagnosis
/// in more headers.
pub(crate) fn into_message(scope: &Scope, diagnosis: &Diagnosis) -> Result<Message> {
    let original = scope.message();
    let id = id_of(scope);
    let now = scope.runtime().bus.clock().now();
    let mut error = diagnosis.cause.to_string();
    // The text leaves room for the rest of a letter on brokers of small messages, too.
    let room = scope.runtime().bus.capabilities().message_bytes_max / 8;
    error.truncate(error.floor_char_boundary(ERROR_BYTES_MAX.min(room)));
    let headers = kept(&original.headers)?
        .push(LETTER, id.to_string())?
        .push(CAUSE, diagnosis.cause.name())?
        .push(ERROR, error)?
        .push(ATTEMPTS, diagnosis.attempts.to_string())?
        .push(
            FIRST_FAILED_AT,
            diagnosis.first_failed.unwrap_or(now).to_string(),
        )?
        .push(FAILED_AT, now.to_string())?
        .push(TOPIC, original.topic.as_str())?
        .push(GROUP, scope.group().as_str())?
        .push(PARTITION, scope.partition().to_string())?
        .push_some(
            POSITION,
            scope.position().map(|position| position.to_string()),
        )?
        .push_some(KEYLESS, original.key.is_none().then_some("true"))?
        .build();
    let mut letter = Message::new(
        topic_of(&original.topic, scope.group())?,
        original.payload.clone(),
    )
    .with_headers(headers);
    letter.key = Some(original.key.clone().unwrap_or_else(|| Key::display(&id)));
    // It stays where others go, also in memory.
    Ok(letter.detached())
}

/// The headers of an event as its letter has them.
fn kept(headers: &Headers) -> Result<HeadersBuilder> {
    let is_like_ours = |(name, _): (&str, &[u8])| name.starts_with(DEAD_LETTER_PREFIX);
    if !headers.iter().any(is_like_ours) {
        return Ok(headers.to_builder().unlimited());
    }
    let mut kept = Headers::builder().unlimited();
    let mut left_out = 0;
    for (name, value) in headers.iter() {
        kept = match name.strip_prefix(DEAD_LETTER_PREFIX) {
            None => kept.push(name, value)?,
            Some(rest) if KEPT.len() + rest.len() <= NAME_BYTES_MAX => {
                kept.push(&format!("{KEPT}{rest}"), value)?
            }
            Some(_) => {
                left_out += 1;
                kept
            }
        };
    }
    let left_out = (left_out > 0).then(|| left_out.to_string());
    kept.push_some(HEADERS_LEFT_OUT, left_out)
}

/// The name of a letter's header as the event has it; nothing where it is the letter's own.
pub(super) fn original_name(name: &str) -> Option<Cow<'_, str>> {
    match name.strip_prefix(KEPT) {
        Some(rest) => Some(Cow::Owned(format!("{DEAD_LETTER_PREFIX}{rest}"))),
        None if name.starts_with(DEAD_LETTER_PREFIX) => None,
        None => Some(Cow::Borrowed(name)),
    }
}

pub(super) fn redrives(headers: &Headers) -> u32 {
    KnownHeaders::of(headers)
        .redrives()
        .and_then(|count| count.parse().ok())
        .unwrap_or(0)
}

/// What stands on a dead-letter topic.
pub(super) enum Entry {
    Letter(Box<DeadLetter>),
    /// Some bytes of a letter and their place.
    Part(usize, Bytes),
    Note(Note),
}

/// What somebody did with a letter, as it is written beside it.
#[derive(Clone, Debug)]
pub(super) struct Note {
    pub(super) action: DeskAction,
    pub(super) decision: Decision,
    /// Which run of which desk did it.
    pub(super) claim: String,
}

impl Note {
    /// The record of this note, on the partition of the letter's other notes.
    pub(super) fn about(&self, letter: &DeadLetter) -> Result<Message> {
        let (status, until, new_id) = match &self.action {
            DeskAction::Stored => return Err(no_note()),
            DeskAction::Claimed { until } => (CLAIMED, Some(until.to_string()), None),
            DeskAction::Redriven => (REDRIVEN, None, None),
            DeskAction::Edited { new_id } => (EDITED, None, Some(new_id.to_string())),
            DeskAction::Discarded => (DISCARDED, None, None),
        };
        let headers = Headers::builder()
            .push(LETTER, letter.id.to_string())?
            .push(GROUP, letter.group.as_str())?
            .push(STATUS, status)?
            .push(BY, &self.decision.by)?
            .push(BECAUSE, &self.decision.because)?
            .push(AT, self.decision.at.to_string())?
            .push(CLAIM, &self.claim)?
            .push_some(UNTIL, until)?
            .push_some(NEW_ID, new_id)?
            .build();
        let topic = topic_of(&letter.message.topic, &letter.group)?;
        let mut record = Message::new(topic, Vec::new()).with_headers(headers);
        record.key = Some(letter.record_key());
        Ok(record)
    }
}

fn no_note() -> Error {
    Error::new(
        ErrorKind::Internal,
        "write note",
        "a letter is stored by a consumer, not by a desk",
    )
}

/// Reads a record, or `None` when it is nothing of this group's.
pub(super) fn entry(group: &Group, record: &Message) -> Result<Option<(EventId, Entry)>> {
    let headers = &record.headers;
    // Two topics and groups, such as `a.b` of `c` and `a` of `b.c`, can share a topic of letters.
    let other_group = headers
        .get_str(GROUP)
        .is_some_and(|other| other != group.as_str());
    let Some(id) = headers.get_str(LETTER).filter(|_| !other_group) else {
        return Ok(None);
    };
    let id = EventId::parse(id)?;
    let entry = match (headers.get_str(STATUS), headers.get_str(PART)) {
        (Some(status), _) => Entry::Note(note(status, headers)?),
        (None, Some(place)) => Entry::Part(count(place)?, record.payload.clone()),
        (None, None) => Entry::Letter(Box::new(parse(id.clone(), group, record)?)),
    };
    Ok(Some((id, entry)))
}

fn note(status: &str, headers: &Headers) -> Result<Note> {
    let action = match status {
        CLAIMED => DeskAction::Claimed {
            until: time(headers, UNTIL)?,
        },
        REDRIVEN => DeskAction::Redriven,
        EDITED => DeskAction::Edited {
            new_id: EventId::parse(headers.get_str(NEW_ID).unwrap_or_default())?,
        },
        DISCARDED => DeskAction::Discarded,
        // What a later version decides is not for this one to guess: the letter stays open.
        _ => {
            return Err(Error::new(
                ErrorKind::Codec,
                "read dead letter",
                "a note says what this version does not know",
            )
            .with("status", format_args!("{status:?}")));
        }
    };
    Ok(Note {
        action,
        decision: Decision {
            by: headers.get_str(BY).unwrap_or_default().to_owned(),
            because: headers.get_str(BECAUSE).unwrap_or_default().to_owned(),
            at: time(headers, AT)?,
        },
        claim: headers.get_str(CLAIM).unwrap_or_default().to_owned(),
    })
}

/// The key of the event that a letter holds.
pub(super) fn original_key(letter: &Message) -> Option<&Key> {
    let is_keyless = letter.headers.get(KEYLESS).is_some();
    letter.key.as_ref().filter(|_| !is_keyless)
}

fn count(text: &str) -> Result<usize> {
    text.parse().map_err(|error| {
        Error::new(ErrorKind::Codec, "read dead letter", "not a number").with_source(error)
    })
}

fn time(headers: &Headers, name: &str) -> Result<Timestamp> {
    headers.get_str(name).unwrap_or_default().parse()
}

fn parse(id: EventId, group: &Group, letter: &Message) -> Result<DeadLetter> {
    let headers = &letter.headers;
    let text = |name: &str| headers.get_str(name).unwrap_or_default().to_owned();
    let mut original = Headers::builder().unlimited();
    for (name, value) in headers.iter() {
        if let Some(name) = original_name(name) {
            original = original.push(&name, value)?;
        }
    }
    let mut message = Message::new(Topic::new(&text(TOPIC))?, letter.payload.clone())
        .with_headers(original.build());
    message.key = original_key(letter).cloned();
    Ok(DeadLetter {
        id,
        message,
        group: group.clone(),
        partition: text(PARTITION).parse().unwrap_or(0),
        position: text(POSITION).parse().ok().map(Position),
        cause: text(CAUSE),
        error: text(ERROR),
        attempts: text(ATTEMPTS).parse().unwrap_or(0),
        first_failed_at: time(headers, FIRST_FAILED_AT)?,
        failed_at: time(headers, FAILED_AT)?,
        status: DeadLetterStatus::Open,
        whole: headers.get_str(WHOLE).map(count).transpose()?,
        place: Place::default(),
        standing: Standing::open(),
    })
}
