//! I4: in order within a key, of effects and on the wire.

use std::collections::{HashMap, HashSet};

use super::{Breach, Violation, Violations};
use crate::history::{History, Message};
use crate::record::{Operation, Phase};
use crate::stamp::Stamp;

/// Finds messages whose effect was committed, or that were first handed out, after a later one of
/// their key.
///
/// Each message is judged at its first effect, and at its first delivery, in a group. So what is
/// handed out again is no breach, as long as it was handed out in order once: a broker repeats what
/// was not settled. A message that never comes is none either, but [lost](super::no_loss()); one that
/// comes late is.
///
/// A message counts only if its place is certain: a try of it was ok that began before any of a
/// later one. A try whose outcome is unknown may be done at any later time. Messages that became
/// dead letters leave the order of effects, because later ones go on and an operator brings them
/// back; those that are parked hold their key, and stay in order. Those that a group was told have
/// vanished leave all order, should they come all the same.
///
/// n log n; takes about 60 bytes for each message, delivery and effect of one key at a time.
#[must_use]
pub fn key_order(history: &History<'_>) -> Violations {
    let mut violations = Violations::default();
    let mut messages = history.messages().peekable();
    while let Some(first) = messages.next() {
        let mut stream = Stream::default();
        stream.add(first);
        let belongs = |next: &Message<'_>| stream_of(next.stamp) == stream_of(first.stamp);
        while let Some(message) = messages.next_if(belongs) {
            stream.add(message);
        }
        stream.check(history, first.stamp, &mut violations);
    }
    violations
}

fn stream_of(stamp: Stamp) -> (u16, u32) {
    (stamp.producer, stamp.key)
}

/// The messages of a producer and a key.
#[derive(Default)]
struct Stream {
    /// Number, and where its first try begins and its first one that was ok, in the order of numbers.
    tries: Vec<(u32, Option<usize>, Option<usize>)>,
    /// Group, order of commit, number.
    effects: Vec<(u16, u64, u32)>,
    /// Group, place in the ledger, number.
    deliveries: Vec<(u16, u64, u32)>,
    /// Group and number of those that left the order of effects.
    kept: HashSet<(u16, u32)>,
    /// Group and number of those that left all order.
    vanished: HashSet<(u16, u32)>,
}

impl Stream {
    fn add(&mut self, message: Message<'_>) {
        let number = message.stamp.key_seq;
        let fate = message.fate();
        self.tries.push((number, fate.first_invoke, fate.ok_invoke));
        for effect in message.effects {
            self.effects.push((effect.group, effect.order, number));
        }
        for (index, record) in message.records() {
            let group = record.entry.group;
            match record.entry.operation {
                Operation::Deliver if record.phase == Phase::Ok => {
                    self.deliveries.push((group, index as u64, number));
                }
                // Also without an outcome: it may have been stored.
                Operation::DeadLetter if record.phase != Phase::Fail => {
                    self.kept.insert((group, number));
                }
                _ => {}
            }
            if message.is_in_gap(group) {
                self.vanished.insert((group, number));
            }
        }
    }

    fn check(mut self, history: &History<'_>, of: Stamp, violations: &mut Violations) {
        let certain = self.certain();
        let stamp = |number| Stamp::new(of.producer, of.key, number);
        self.effects.sort_unstable();
        self.deliveries.sort_unstable();

        for (group, number, after) in late(&self.effects, &certain) {
            if self.kept.contains(&(group, number)) || self.vanished.contains(&(group, number)) {
                continue;
            }
            let after = stamp(after);
            let breach = Breach::EffectLate { after };
            violations
                .add(|| Violation::of(history, breach, stamp(number), group).with(history, after));
        }
        for (group, number, after) in late(&self.deliveries, &certain) {
            if self.vanished.contains(&(group, number)) {
                continue;
            }
            let after = stamp(after);
            let breach = Breach::DeliveredLate { after };
            violations
                .add(|| Violation::of(history, breach, stamp(number), group).with(history, after));
        }
    }

    /// The messages that must come before all with a higher number.
    fn certain(&self) -> HashSet<u32> {
        let mut later_begins = usize::MAX;
        let mut certain = HashSet::with_capacity(self.tries.len());
        for (number, first, ok) in self.tries.iter().rev() {
            if ok.is_some_and(|ok| ok < later_begins) {
                certain.insert(*number);
            }
            later_begins = later_begins.min(first.unwrap_or(usize::MAX));
        }
        certain
    }
}

/// Group and number of what first comes after a higher number, and which one that is.
fn late(sorted: &[(u16, u64, u32)], certain: &HashSet<u32>) -> Vec<(u16, u32, u32)> {
    let mut late = Vec::new();
    let mut highest: HashMap<u16, u32> = HashMap::new();
    let mut seen: HashSet<(u16, u32)> = HashSet::new();
    for (group, _, number) in sorted {
        if !seen.insert((*group, *number)) {
            continue;
        }
        let highest = highest.entry(*group).or_insert(*number);
        if *number < *highest && certain.contains(number) {
            late.push((*group, *number, *highest));
        }
        *highest = (*highest).max(*number);
    }
    late
}
