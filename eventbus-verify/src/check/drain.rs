//! I10: nothing is settled unhandled, and a shutdown that is done has nothing left.

use std::collections::HashMap;

use super::{Breach, Violation, Violations};
use crate::history::{History, Message};
use crate::record::{Operation, Phase, Record};
use crate::stamp::Stamp;

/// Finds messages that were settled before they were handled or kept, handlers that a shutdown left
/// running, and consumers that went on after it.
///
/// Needs a record of each handler that runs ([`Operation::Handle`]). A message may be settled once
///
/// - a handler of it ended with ok,
/// - or one had begun that never said how it ended, or that ended only later in another process, and
///   there is an effect: it was killed or stood still after its commit, and the inbox knows,
/// - or it was stored as a dead letter or parked, or might have been by a process that was killed.
///
/// Where nobody announced that a message would be kept, and somebody found it in the store later,
/// nothing is said of when that was.
///
/// Linear; takes 40 bytes for each handler that runs at a time.
#[must_use]
pub fn drain(history: &History<'_>) -> Violations {
    let mut violations = Violations::default();
    for message in history.messages() {
        let unhandled = settled_unhandled(message);
        for group in unhandled {
            let breach = Breach::SettledUnhandled;
            violations.add(|| Violation::of(history, breach, message.stamp, group));
        }
    }
    shutdowns(history, &mut violations);
    violations
}

/// A call that may have made it right to settle.
struct Work {
    group: u16,
    process: u32,
    session: u32,
    operation: Operation,
    /// Whether it was said before it began; what was read out of a store was not.
    is_announced: bool,
    ended: Option<Phase>,
}

/// The groups that settled the message too soon.
fn settled_unhandled(message: Message<'_>) -> Vec<u16> {
    let mut works: Vec<Work> = Vec::new();
    // Settled while this work of the same process was open: right only if it never says how it ended.
    let mut pending: Vec<usize> = Vec::new();
    let mut found = Vec::new();
    for (_, record) in message.records() {
        match (record.entry.operation, record.phase) {
            (Operation::Settle, Phase::Invoke) => match why_settled(message, &works, record) {
                Some(Why::Done) => {}
                Some(Why::Perhaps(work)) => pending.push(work),
                None => found.push(record.entry.group),
            },
            (Operation::Handle | Operation::DeadLetter | Operation::Park, Phase::Invoke) => {
                works.push(begun(record));
            }
            (Operation::Handle | Operation::DeadLetter | Operation::Park, phase) => {
                let ended = end(&mut works, record, phase);
                if pending.contains(&ended) {
                    found.push(record.entry.group);
                }
            }
            _ => {}
        }
    }
    found.retain(|group| !was_found_kept(&works, *group));
    found.sort_unstable();
    found.dedup();
    found
}

/// Whether it was kept, and nobody said when.
fn was_found_kept(works: &[Work], group: u16) -> bool {
    let mut kept = works
        .iter()
        .filter(|work| work.group == group && work.operation != Operation::Handle)
        .peekable();
    let is_known = kept.peek().is_some();
    is_known && kept.all(|work| !work.is_announced && work.ended == Some(Phase::Ok))
}

/// Why it may have been right to settle.
enum Why {
    /// It was handled or kept, or may have been by another process.
    Done,
    /// This work of the same process may have been done.
    Perhaps(usize),
}

fn why_settled(message: Message<'_>, works: &[Work], settle: &Record) -> Option<Why> {
    let mut perhaps = None;
    for (index, work) in works.iter().enumerate() {
        if work.group != settle.entry.group {
            continue;
        }
        let is_possible = may_be_done(work, message);
        if work.ended == Some(Phase::Ok) || (is_possible && work.process != settle.process) {
            return Some(Why::Done);
        }
        if is_possible {
            perhaps = Some(Why::Perhaps(index));
        }
    }
    perhaps
}

fn begun(record: &Record) -> Work {
    Work {
        group: record.entry.group,
        process: record.process,
        session: record.session,
        operation: record.entry.operation,
        is_announced: true,
        ended: None,
    }
}

/// Notes the end of a work, and answers which one it is.
fn end(works: &mut Vec<Work>, record: &Record, phase: Phase) -> usize {
    let belongs = |work: &Work| {
        work.ended.is_none()
            && work.operation == record.entry.operation
            && work.group == record.entry.group
            && (work.process, work.session) == (record.process, record.session)
    };
    let at = works.iter().rposition(belongs).unwrap_or_else(|| {
        works.push(Work {
            is_announced: false,
            ..begun(record)
        });
        works.len() - 1
    });
    works[at].ended = Some(phase);
    at
}

/// Whether it may be done without having said so.
fn may_be_done(work: &Work, message: Message<'_>) -> bool {
    let is_open = matches!(work.ended, None | Some(Phase::Unknown));
    let is_handler = work.operation == Operation::Handle;
    is_open && (!is_handler || message.has_effect(work.group))
}

type Handler = (u32, u32, u16, Stamp);

fn shutdowns(history: &History<'_>, violations: &mut Violations) {
    let mut drained: HashMap<(u32, u16), usize> = HashMap::new();
    let mut running: HashMap<Handler, usize> = HashMap::new();
    for (index, record) in history.records() {
        let entry = &record.entry;
        if let (Operation::Drain, Phase::Ok) = (entry.operation, record.phase) {
            drained.insert((record.process, entry.group), index);
            left_running(history, record, index, &running, violations);
            continue;
        }
        let Some(stamp) = entry.stamp else {
            continue;
        };
        let handler = (record.process, record.session, entry.group, stamp);
        match (entry.operation, record.phase) {
            (Operation::Handle, Phase::Invoke) => {
                running.insert(handler, index);
            }
            (Operation::Handle, _) => {
                running.remove(&handler);
                continue;
            }
            (Operation::Settle, Phase::Invoke) | (Operation::Deliver, Phase::Ok) => {}
            _ => continue,
        }
        let is_drained = |group| drained.get(&(record.process, group));
        if let Some(&done) = is_drained(entry.group).or_else(|| is_drained(0)) {
            violations.add(|| {
                Violation::of(history, Breach::AfterDrain, stamp, entry.group)
                    .with_records(history, &[done])
            });
        }
    }
}

fn left_running(
    history: &History<'_>,
    drain: &Record,
    index: usize,
    running: &HashMap<Handler, usize>,
    violations: &mut Violations,
) {
    let group = drain.entry.group;
    for (process, _, of, stamp) in running.keys() {
        if *process == drain.process && (group == 0 || *of == group) {
            violations.add(|| {
                Violation::of(history, Breach::LeftRunning, *stamp, *of)
                    .with_records(history, &[index])
            });
        }
    }
}
