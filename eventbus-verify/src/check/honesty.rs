//! I9: a caller is never told more than is so.

use super::{Breach, Violation, Violations};
use crate::history::{History, Message, Outcome, Try, place_of};
use crate::record::{Operation, Phase};

/// Finds callers who were told something that the layer below had not said, messages that the broker
/// does not have in the end, and positions that two messages are said to have.
///
/// - If the ledger has what adapters answered ([`Operation::Send`]), every publish that was ok needs
///   an ok of these within the call, and one that surely failed must have only such.
/// - If the ledger has a final reading that was ok ([`Operation::Reread`]), it must have found every
///   message that was published with ok before it began, unless somebody was told that it vanished.
///
/// Without either it can tell only of positions. What was told to have failed and is seen all the
/// same, [`no_phantom`](super::no_phantom()) finds.
///
/// n log n; takes 32 bytes for each record that has a position.
#[must_use]
pub fn honesty(history: &History<'_>) -> Violations {
    let mut violations = Violations::default();
    let mut records = history.records();
    let has_sends = records.any(|(_, record)| record.entry.operation == Operation::Send);
    let reread = reread(history);
    let mut places = Vec::new();
    for message in history.messages() {
        if let Some(breach) = has_sends.then(|| misreported(message)).flatten() {
            violations.add(|| Violation::of(history, breach, message.stamp, 0));
        }
        if reread.is_some_and(|begun| is_missing(message, begun)) {
            violations.add(|| Violation::of(history, Breach::NotStored, message.stamp, 0));
        }
        let told = message.records().filter_map(|(_, one)| place_of(one));
        places.extend(told.map(|place| (place, message.stamp)));
    }
    places.sort_unstable();
    places.dedup();
    for pair in places.windows(2) {
        let [(place, stamp), (other_place, other)] = *pair else {
            continue;
        };
        if place == other_place {
            let breach = Breach::SamePosition { other };
            violations.add(|| Violation::of(history, breach, stamp, 0).with(history, other));
        }
    }
    violations
}

/// Where the last final reading begins that came to its end.
fn reread(history: &History<'_>) -> Option<usize> {
    let (mut begun, mut found) = (None, None);
    for (index, record) in history.records() {
        match (record.entry.operation, record.phase) {
            (Operation::Reread, Phase::Invoke) => begun = Some(index),
            (Operation::Reread, Phase::Ok) => found = begun.or(found),
            _ => {}
        }
    }
    found
}

fn is_missing(message: Message<'_>, reread: usize) -> bool {
    let was_ok = |one: &Try| {
        let is_before = one.end.is_some_and(|end| end < reread);
        is_before && one.outcome() == Outcome::Ok
    };
    let mut records = message.records();
    message.tries().iter().any(was_ok)
        && !records
            .any(|(index, record)| index > reread && record.entry.operation == Operation::Stored)
        && !message.is_in_any_gap()
}

/// Whether a caller was told something else than the broker said within the call.
fn misreported(message: Message<'_>) -> Option<Breach> {
    message
        .tries()
        .iter()
        .filter(|one| one.is_publish())
        .find_map(|one| {
            let end = one.end?;
            let sends = || {
                message.records().filter(move |(index, record)| {
                    let is_within = (one.invoke..=end).contains(index);
                    is_within && record.entry.operation == Operation::Send
                })
            };
            let count = |phase| sends().filter(|(_, record)| record.phase == phase).count();
            match one.outcome() {
                Outcome::Ok if count(Phase::Ok) == 0 => Some(Breach::OkUnacknowledged),
                Outcome::Fail if count(Phase::Invoke) > count(Phase::Fail) => {
                    Some(Breach::FailUnproven)
                }
                _ => None,
            }
        })
}
