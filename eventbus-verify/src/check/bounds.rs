//! I8: memory, queues, attempts and duplicates stay under what was promised.

use std::collections::{BTreeMap, HashMap};

use super::{Breach, Violation, Violations};
use crate::history::{History, Message};
use crate::record::{Operation, Phase, Sample};
use crate::stamp::Stamp;

/// What may not be exceeded; what is not named is not checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Bounds {
    /// The highest value of each measurement.
    pub samples: BTreeMap<Sample, u64>,
    /// The last attempt at a message that the retry policy allows.
    pub attempts_max: Option<u16>,
    /// How many messages a group has in flight at a fault, and so may be handed again after it.
    pub in_flight_max: Option<u64>,
}

impl Bounds {
    /// With the highest value of a measurement.
    #[must_use]
    pub fn with_sample(mut self, sample: Sample, max: u64) -> Self {
        self.samples.insert(sample, max);
        self
    }

    /// With the last attempt that is allowed.
    #[must_use]
    pub fn with_attempts_max(mut self, attempts_max: u16) -> Self {
        self.attempts_max = Some(attempts_max);
        self
    }

    /// With how many messages a group may be handed again after a fault.
    #[must_use]
    pub fn with_in_flight_max(mut self, in_flight_max: u64) -> Self {
        self.in_flight_max = Some(in_flight_max);
        self
    }
}

/// Finds measurements above their bounds, attempts beyond the last one, and groups that were handed
/// more messages twice than their faults explain.
///
/// Duplicates are counted up: until any moment a group may have been handed as many again as were
/// in flight, for each fault that had begun; without a fault, none. Planned changes that move
/// partitions are faults in this sense. A message is no duplicate where it may have been published
/// twice, or came back from the dead letters.
///
/// n log n; takes 24 bytes for each duplicate.
#[must_use]
pub fn bounds(history: &History<'_>, bounds: &Bounds) -> Violations {
    let mut violations = Violations::default();
    for (index, record) in history.records() {
        let entry = &record.entry;
        if entry.operation != Operation::Sample {
            continue;
        }
        let (Some(sample), Some(value)) = (Sample::of(entry), entry.position) else {
            continue;
        };
        let exceeded = bounds.samples.get(&sample).filter(|max| value > **max);
        if let Some(&max) = exceeded {
            let breach = Breach::Exceeded { sample, value, max };
            violations.add(|| Violation::new(history, breach, entry.group, &[index]));
        }
    }
    if let Some(max) = bounds.attempts_max {
        attempts(history, max, &mut violations);
    }
    if let Some(max) = bounds.in_flight_max {
        duplicates(history, max, &mut violations);
    }
    violations
}

fn attempts(history: &History<'_>, max: u16, violations: &mut Violations) {
    for message in history.messages() {
        let handles = message
            .records()
            .filter(|(_, record)| record.entry.operation == Operation::Handle);
        let beyond = handles.max_by_key(|(_, record)| record.entry.attempt);
        let Some((_, record)) = beyond.filter(|(_, record)| record.entry.attempt > max) else {
            continue;
        };
        let attempt = record.entry.attempt;
        let breach = Breach::TooManyAttempts { attempt, max };
        let group = record.entry.group;
        violations.add(|| Violation::of(history, breach, message.stamp, group));
    }
}

fn duplicates(history: &History<'_>, in_flight_max: u64, violations: &mut Violations) {
    let faults: Vec<usize> = history
        .records()
        .filter(|(_, record)| record.entry.operation == Operation::FaultBegin)
        .map(|(index, _)| index)
        .collect();
    let mut counted: HashMap<u16, (u64, bool)> = HashMap::new();
    for (index, group, stamp) in repeated(history) {
        let (count, is_told) = counted.entry(group).or_default();
        *count += 1;
        let begun = faults.partition_point(|fault| *fault < index);
        let duplicates = *count;
        let faults = begun as u64;
        if *is_told || duplicates <= faults.saturating_mul(in_flight_max) {
            continue;
        }
        *is_told = true;
        let breach = Breach::TooManyDuplicates { duplicates, faults };
        violations.add(|| Violation::of(history, breach, stamp, group));
    }
}

/// How many messages were handed out again, to each group.
///
/// n log n; takes 24 bytes for each of them.
#[must_use]
pub fn wire_duplicates(history: &History<'_>) -> BTreeMap<u16, u64> {
    let mut counts = BTreeMap::new();
    for (_, group, _) in repeated(history) {
        *counts.entry(group).or_default() += 1;
    }
    counts
}

/// The deliveries of what had been delivered, in order of time.
fn repeated(history: &History<'_>) -> Vec<(usize, u16, Stamp)> {
    let mut repeated = Vec::new();
    for message in history.messages() {
        repeats_of(message, &mut repeated);
    }
    repeated.sort_unstable();
    repeated
}

fn repeats_of(message: Message<'_>, repeated: &mut Vec<(usize, u16, Stamp)>) {
    // A message has a few groups at most. How many copies of it may still come to each:
    let mut left: Vec<(u16, usize)> = Vec::new();
    let copies = message.fate().copies.max(1);
    for (index, record) in message.records() {
        let group = record.entry.group;
        let at = match left.iter().position(|(known, _)| *known == group) {
            Some(at) => at,
            None => {
                left.push((group, copies));
                left.len() - 1
            }
        };
        let copies = &mut left[at].1;
        match (record.entry.operation, record.phase) {
            (Operation::DeadLetter | Operation::Park, Phase::Ok) => *copies += 1,
            (Operation::Deliver, Phase::Ok) if *copies > 0 => *copies -= 1,
            (Operation::Deliver, Phase::Ok) => repeated.push((index, group, message.stamp)),
            _ => {}
        }
    }
}
