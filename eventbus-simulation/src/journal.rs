//! The ledger of a run in memory, in virtual time: what a recorder writes of a real one.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use eventbus_verify::{Entry, Ledger, Operation, Phase, Record};
use tokio::time::Instant;

use crate::event::RUN;

/// Collects records. No two have the same time, so that their order is the order of events.
#[derive(Debug)]
pub(crate) struct Journal {
    begun: Instant,
    sessions: AtomicU32,
    records: Mutex<Vec<Record>>,
}

impl Journal {
    pub(crate) fn new() -> Self {
        Self {
            begun: Instant::now(),
            sessions: AtomicU32::new(1),
            records: Mutex::new(Vec::new()),
        }
    }

    /// The number of a new caller.
    pub(crate) fn session(&self) -> u32 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn note(&self, process: u32, session: u32, phase: Phase, entry: Entry) {
        let now = u64::try_from(self.begun.elapsed().as_nanos()).expect("runs last for days");
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let after = records.last().map_or(0, |last| last.time + 1);
        records.push(Record::new(now.max(after), process, session, phase, entry));
    }

    /// The ledger until now, ended in order.
    pub(crate) fn ledger(&self) -> Ledger {
        self.note(0, 0, Phase::Ok, Entry::new(Operation::Close));
        Ledger::from_records(RUN, self.records())
    }

    /// What was noted until now.
    pub(crate) fn records(&self) -> Vec<Record> {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.clone()
    }
}
