//! I2: nothing is seen that nobody tried, that failed, or that was changed.

use super::{Breach, Violation, Violations};
use crate::history::{Fate, History, Message, Outcome};
use crate::record::{Operation, Phase, Record};
use crate::stamp::Stamp;

/// Finds what was handed out, handled, found in the broker, or had an effect, and should not.
///
/// Of a message with several tries it is enough that one may have been done. What is seen must not
/// be older than the first of those, and of an append not older than the attempt to commit.
///
/// Linear; takes no memory to speak of.
#[must_use]
pub fn no_phantom(history: &History<'_>) -> Violations {
    let mut violations = Violations::default();
    for (index, record) in history.records() {
        if record.entry.operation == Operation::Deliver && record.phase == Phase::Fail {
            let group = record.entry.group;
            violations.add(|| Violation {
                stamp: record.entry.stamp,
                ..Violation::new(history, Breach::Unreadable, group, &[index])
            });
        }
    }
    for effect in history.foreign() {
        violations.add(|| Violation {
            effects: vec![*effect],
            ..Violation::new(history, Breach::ForeignEffect, effect.group, &[])
        });
    }
    for message in history.messages() {
        if let Some((breach, group)) = find(message) {
            violations.add(|| Violation::of(history, breach, message.stamp, group));
        }
    }
    violations
}

/// The worst that is wrong with what was seen of a message.
fn find(message: Message<'_>) -> Option<(Breach, u16)> {
    let seen = || message.records().filter(|(_, record)| is_seen(record));
    let fate = message.fate();
    let first_seen = seen().next().map(|(_, record)| record.entry.group);
    let effect = message.effects.first().map(|effect| effect.group);
    if let Some(group) = effect.or(first_seen) {
        match fate.outcome {
            None => return Some((Breach::NeverPublished, group)),
            Some(Outcome::Fail) => return Some((Breach::Failed, group)),
            Some(_) => {}
        }
    }
    let is_mixed_up = |stamp: Stamp| {
        let mut effects = message.effects.iter();
        effects.find(|effect| (effect.key, effect.key_seq) != (stamp.key, stamp.key_seq))
    };
    if let Some(effect) = is_mixed_up(message.stamp) {
        return Some((Breach::MixedUp, effect.group));
    }
    seen().find_map(|(index, record)| {
        let breach = if fate.visible_from.is_some_and(|from| index < from) {
            Breach::BeforePublished
        } else if is_changed(record, fate) {
            Breach::Changed
        } else {
            return None;
        };
        Some((breach, record.entry.group))
    })
}

/// Whether this shows that the message is in the system.
fn is_seen(record: &Record) -> bool {
    match record.entry.operation {
        Operation::Deliver | Operation::Stored | Operation::DeadLetter | Operation::Park => {
            record.phase == Phase::Ok
        }
        Operation::Handle => record.phase == Phase::Invoke,
        _ => false,
    }
}

fn is_changed(record: &Record, fate: Fate) -> bool {
    let checksum = record.entry.checksum;
    checksum != 0 && fate.checksum != 0 && checksum != fate.checksum
}
