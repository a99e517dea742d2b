//! What a run comes to, as numbers and as Markdown.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::Duration;

use crate::check::{
    Invariant, Promises, Recoveries, Violation, Violations, recoveries, wire_duplicates,
};
use crate::history::{History, Outcome};
use crate::ledger::Cut;
use crate::record::{Fault, Operation, Phase};
use crate::stamp::RunId;

/// How many violations of each invariant the Markdown shows.
const SHOWN: usize = 5;

/// What a run comes to.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// The run.
    pub run: RunId,
    /// How many records there are.
    pub records: usize,
    /// From the first record to the last.
    pub lasted: Duration,
    /// What was cut off the end of the ledger.
    pub cut: Cut,
    /// Whether the recorder ended the ledger.
    pub is_complete: bool,
    /// How many client processes were recorded.
    pub processes: u64,
    /// How many messages were checked, by what became of the tries to publish or append them.
    pub messages: Messages,
    /// How many effects there are.
    pub effects: usize,
    /// How many deliveries there were.
    pub deliveries: u64,
    /// How many of these were of a message that the group had been handed before.
    pub duplicates: BTreeMap<u16, u64>,
    /// How many dead letters, parked messages and vanished positions were recorded.
    pub kept: Kept,
    /// How many faults there were, by kind.
    pub faults: BTreeMap<Fault, u64>,
    /// How long it took until messages passed again.
    pub recoveries: Recoveries,
    /// What was checked, and what was found.
    pub violations: Vec<(Invariant, Violations)>,
}

/// Messages by what became of the tries to publish or append them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Messages {
    /// One try was ok.
    pub ok: u64,
    /// Every try surely failed.
    pub failed: u64,
    /// One may have been done.
    pub unknown: u64,
    /// Nobody tried, and they were seen all the same.
    pub untried: u64,
}

impl Messages {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.ok + self.failed + self.unknown + self.untried
    }
}

/// What was neither handled nor lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Kept {
    /// Records of dead letters that were stored.
    pub dead_letters: u64,
    /// Records of messages that were parked.
    pub parked: u64,
    /// Positions that groups were told have vanished.
    pub vanished: u64,
}

impl Report {
    /// Checks a history against what was promised, and sums it up.
    #[must_use]
    pub fn of(history: &History<'_>, promises: &Promises) -> Self {
        let ledger = history.ledger();
        let records = ledger.records();
        let first = records.first().map_or(0, |record| record.time);
        let last = records.last().map_or(0, |record| record.time);
        let mut report = Self {
            run: ledger.run(),
            records: records.len(),
            lasted: Duration::from_nanos(last - first),
            cut: ledger.cut(),
            is_complete: ledger.is_complete(),
            processes: 0,
            messages: messages(history),
            effects: history.effects_count(),
            deliveries: 0,
            duplicates: wire_duplicates(history),
            kept: Kept::default(),
            faults: BTreeMap::new(),
            recoveries: recoveries(history, promises.recovery_max),
            violations: promises.check(history),
        };
        report.count(history);
        report
    }

    /// Whether the ledger is whole, something was checked, and nothing was found.
    #[must_use]
    pub fn passed(&self) -> bool {
        let mut found = self.violations.iter();
        self.is_complete && self.messages.total() > 0 && found.all(|(_, found)| found.is_empty())
    }

    /// How many violations there are.
    #[must_use]
    pub fn violations_total(&self) -> u64 {
        self.violations.iter().map(|(_, found)| found.total()).sum()
    }

    /// The report for a reader who knows nothing of the run.
    #[must_use]
    pub fn to_markdown(&self) -> String {
        let mut text = String::new();
        self.write(&mut text)
            .expect("a string takes whatever is written");
        text
    }

    fn count(&mut self, history: &History<'_>) {
        for (_, record) in history.records() {
            let entry = &record.entry;
            match (entry.operation, record.phase) {
                (Operation::Connect, _) => self.processes += 1,
                (Operation::Deliver, Phase::Ok) => self.deliveries += 1,
                (Operation::DeadLetter, Phase::Ok) => self.kept.dead_letters += 1,
                (Operation::Park, Phase::Ok) => self.kept.parked += 1,
                (Operation::Gap, _) => self.kept.vanished += u64::from(entry.detail),
                (Operation::FaultBegin, _) => {
                    *self.faults.entry(Fault::of(entry)).or_default() += 1;
                }
                _ => {}
            }
        }
    }

    fn write(&self, text: &mut String) -> fmt::Result {
        let outcome = match self.passed() {
            true => "passed".to_owned(),
            false if self.violations_total() > 0 => {
                format!("{} violations", self.violations_total())
            }
            false if self.is_complete => "not passed: no message was checked".to_owned(),
            false => "not passed: the ledger lacks its end".to_owned(),
        };
        writeln!(text, "# Run {}: {outcome}\n", self.run)?;
        self.write_counts(text)?;
        self.write_faults(text)?;
        self.write_violations(text)
    }

    fn write_counts(&self, text: &mut String) -> fmt::Result {
        let Messages {
            ok,
            failed,
            unknown,
            untried,
        } = self.messages;
        let total = self.messages.total();
        let duplicates: u64 = self.duplicates.values().sum();
        writeln!(text, "| what | count |\n| --- | ---: |")?;
        writeln!(text, "| messages checked | {total} |")?;
        writeln!(text, "| of these published ok | {ok} |")?;
        writeln!(text, "| surely failed | {failed} |")?;
        writeln!(text, "| outcome unknown | {unknown} |")?;
        writeln!(text, "| seen, but never tried | {untried} |")?;
        writeln!(text, "| effects | {} |", self.effects)?;
        writeln!(text, "| deliveries | {} |", self.deliveries)?;
        writeln!(text, "| duplicates on the wire | {duplicates} |")?;
        writeln!(text, "| dead letters | {} |", self.kept.dead_letters)?;
        writeln!(text, "| parked | {} |", self.kept.parked)?;
        writeln!(
            text,
            "| positions reported as vanished | {} |",
            self.kept.vanished
        )?;
        writeln!(text, "| client processes | {} |", self.processes)?;
        writeln!(text, "| records | {} |", self.records)?;
        let Cut { records, bytes } = self.cut;
        writeln!(
            text,
            "| records cut off the end ({bytes} bytes) | {records} |"
        )?;
        writeln!(text, "\nIt lasted {:.1?}.", self.lasted)
    }

    fn write_faults(&self, text: &mut String) -> fmt::Result {
        let total: u64 = self.faults.values().sum();
        writeln!(text, "\n## Faults: {total}\n")?;
        if total == 0 {
            return writeln!(text, "None: nothing is said of faults.");
        }
        writeln!(text, "| kind | count |\n| --- | ---: |")?;
        for (fault, count) in &self.faults {
            writeln!(text, "| {fault:?} | {count} |")?;
        }
        let times = &self.recoveries.times;
        let interrupted = self.recoveries.interrupted;
        writeln!(
            text,
            "\n{} times messages were seen to pass again after all faults were over; {interrupted} times the next fault came before.",
            times.len()
        )?;
        if let [.., max] = times[..] {
            let (p50, p99) = (percentile(times, 50), percentile(times, 99));
            writeln!(
                text,
                "The first probe passed after {p50:.1?} (p50), {p99:.1?} (p99), {max:.1?} (max)."
            )?;
        }
        Ok(())
    }

    fn write_violations(&self, text: &mut String) -> fmt::Result {
        writeln!(text, "\n## Violations: {}\n", self.violations_total())?;
        writeln!(text, "| invariant | violations |\n| --- | ---: |")?;
        for (invariant, found) in &self.violations {
            writeln!(text, "| {invariant} | {} |", found.total())?;
        }
        for invariant in Invariant::ALL {
            if !self.violations.iter().any(|(one, _)| *one == invariant) {
                writeln!(text, "| {invariant} | not promised, not checked |")?;
            }
        }
        for (_, found) in &self.violations {
            let examples: &[Violation] = found.examples();
            for violation in examples.iter().take(SHOWN) {
                writeln!(text, "\n```text\n{violation}```")?;
            }
        }
        Ok(())
    }
}

fn messages(history: &History<'_>) -> Messages {
    let mut messages = Messages::default();
    for message in history.messages() {
        match message.fate().outcome {
            Some(Outcome::Ok) => messages.ok += 1,
            Some(Outcome::Fail) => messages.failed += 1,
            Some(Outcome::Unknown) => messages.unknown += 1,
            None => messages.untried += 1,
        }
    }
    messages
}

/// The smallest time that so many of a hundred do not exceed.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted[rank.saturating_sub(1)]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::percentile;

    #[test]
    fn a_percentile_is_a_time_that_was_measured() {
        let times: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 50), Duration::from_millis(100));
        assert_eq!(percentile(&times, 99), Duration::from_millis(198));
        assert_eq!(percentile(&times[..1], 99), Duration::from_millis(1));
    }
}
