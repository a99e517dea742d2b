//! I7: after a fault messages pass again, soon and all.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::{Breach, Violation, Violations};
use crate::history::History;
use crate::record::{Operation, Phase, Sample};

/// How long it took until messages passed again, after each time that all faults were over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Recoveries {
    /// From the end of the last fault to the first probe that was ok and begun after it; sorted.
    pub times: Vec<Duration>,
    /// How often the next fault began before, and before the time to recover was over.
    pub interrupted: u64,
}

/// The times to recover from faults.
///
/// Linear; takes memory for the faults only.
#[must_use]
pub fn recoveries(history: &History<'_>, recovery_max: Duration) -> Recoveries {
    let mut recoveries = Recoveries::default();
    for heal in heals(history) {
        match heal.recovered {
            Some(_) => recoveries.times.push(heal.took),
            None if heal.is_interrupted && heal.took <= recovery_max => recoveries.interrupted += 1,
            None => {}
        }
    }
    recoveries.times.sort_unstable();
    recoveries
}

/// Finds times at which all faults were over and no probe passed within `recovery_max`, and groups
/// whose last measured lag is not 0.
///
/// If the next fault begins before, nothing is said of that time. If the ledger ends, it is a
/// breach: a run that ends before a probe has passed has shown nothing.
///
/// Linear; takes memory for the faults only.
#[must_use]
pub fn liveness(history: &History<'_>, recovery_max: Duration) -> Violations {
    let mut violations = Violations::default();
    for heal in heals(history) {
        let is_late = heal.took > recovery_max;
        let never = heal.recovered.is_none() && !heal.is_interrupted;
        if !is_late && !never {
            continue;
        }
        let indices: Vec<usize> = [heal.end].into_iter().chain(heal.recovered).collect();
        let after = heal.took;
        violations.add(|| Violation::new(history, Breach::NotRecovered { after }, 0, &indices));
    }
    for (group, (index, lag)) in last_lags(history) {
        if lag > 0 {
            let breach = Breach::LagLeft { lag };
            violations.add(|| Violation::new(history, breach, group, &[index]));
        }
    }
    violations
}

/// A time at which no fault was there any more.
struct Heal {
    /// Where the end of the last fault is in the ledger.
    end: usize,
    /// Where the first probe is that passed.
    recovered: Option<usize>,
    /// Until that, or until the next fault or the end of the ledger.
    took: Duration,
    /// Whether the next fault came before.
    is_interrupted: bool,
}

fn heals(history: &History<'_>) -> Vec<Heal> {
    let mut heals = Vec::new();
    let mut faults: HashSet<Option<u64>> = HashSet::new();
    let mut open: Option<usize> = None;
    let mut probing: HashMap<(u32, u32), usize> = HashMap::new();
    let since = |end: usize, index: usize| {
        let (end, now) = (history.record(end).time, history.record(index).time);
        Duration::from_nanos(now - end)
    };
    let heal = |end, index, recovered, is_interrupted| Heal {
        end,
        recovered,
        took: since(end, index),
        is_interrupted,
    };
    let mut last = 0;
    for (index, record) in history.records() {
        last = index;
        let session = (record.process, record.session);
        match (record.entry.operation, record.phase) {
            (Operation::FaultBegin, _) => {
                heals.extend(open.take().map(|end| heal(end, index, None, true)));
                faults.insert(record.entry.position);
            }
            (Operation::FaultEnd, _) => {
                faults.remove(&record.entry.position);
                open = faults.is_empty().then_some(index);
            }
            (Operation::Probe, Phase::Invoke) => {
                probing.insert(session, index);
            }
            (Operation::Probe, phase) => {
                let begun = probing.remove(&session);
                let passed =
                    |end: &mut usize| phase == Phase::Ok && begun.is_some_and(|begun| begun > *end);
                let recovered = open.take_if(passed);
                heals.extend(recovered.map(|end| heal(end, index, Some(index), false)));
            }
            _ => {}
        }
    }
    heals.extend(open.map(|end| heal(end, last, None, false)));
    heals
}

/// Where the last measurement of a group's lag is, and what it was; in the order of groups.
fn last_lags(history: &History<'_>) -> Vec<(u16, (usize, u64))> {
    let mut lags: HashMap<u16, (usize, u64)> = HashMap::new();
    for (index, record) in history.records() {
        let entry = &record.entry;
        let is_lag = entry.operation == Operation::Sample && Sample::of(entry) == Some(Sample::Lag);
        if let (true, Some(value)) = (is_lag, entry.position) {
            lags.insert(entry.group, (index, value));
        }
    }
    let mut lags: Vec<_> = lags.into_iter().collect();
    lags.sort_unstable();
    lags
}
