//! Tells a history by hand, a record a millisecond, and says what the checks find in it.

use std::time::Duration;

use eventbus_verify::{
    Bounds, Breach, Effect, Entry, Fault, History, Invariant, Ledger, Operation, Phase, Promises,
    Record, RunId, Sample, Stamp, Violation,
};

pub(crate) const RUN: RunId = RunId(9);
/// The group that everything is about, unless said otherwise.
pub(crate) const GROUP: u16 = 1;
/// Who publishes, who consumes, and who watches.
pub(crate) const PUBLISHER: u32 = 1;
pub(crate) const CONSUMER: u32 = 2;
pub(crate) const HARNESS: u32 = 3;

const MILLISECOND: u64 = 1_000_000;

/// What is promised in all stories.
pub(crate) fn promises() -> Promises {
    let bounds = Bounds::default()
        .with_in_flight_max(2)
        .with_attempts_max(3)
        .with_sample(Sample::ResidentBytes, 1000);
    Promises::to([GROUP])
        .with_recovery_max(Duration::from_secs(1))
        .with_bounds(bounds)
}

/// A message of the only producer and key.
pub(crate) fn message(key_seq: u32) -> Stamp {
    Stamp::new(1, 7, key_seq)
}

#[derive(Default)]
pub(crate) struct Story {
    now: u64,
    records: Vec<Record>,
    effects: Vec<Effect>,
}

impl Story {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Something happens, a millisecond after what was before.
    pub(crate) fn say(&mut self, process: u32, phase: Phase, entry: Entry) -> &mut Self {
        self.now += MILLISECOND;
        self.records
            .push(Record::new(self.now, process, 1, phase, entry));
        self
    }

    pub(crate) fn wait(&mut self, milliseconds: u64) -> &mut Self {
        self.now += milliseconds * MILLISECOND;
        self
    }

    /// A call begins and ends.
    pub(crate) fn call(&mut self, process: u32, outcome: Phase, entry: Entry) -> &mut Self {
        self.say(process, Phase::Invoke, entry)
            .say(process, outcome, entry)
    }

    pub(crate) fn publish(&mut self, stamp: Stamp, outcome: Phase) -> &mut Self {
        self.call(PUBLISHER, outcome, published(stamp))
    }

    /// The message is appended in a transaction.
    pub(crate) fn append(&mut self, stamp: Stamp, transaction: u64) -> &mut Self {
        let entry = of(Operation::Append, stamp).with_transaction(transaction);
        self.call(PUBLISHER, Phase::Ok, entry)
    }

    pub(crate) fn commit(&mut self, transaction: u64, outcome: Phase) -> &mut Self {
        let entry = Entry::new(Operation::Commit).with_transaction(transaction);
        self.call(PUBLISHER, outcome, entry)
    }

    pub(crate) fn deliver(&mut self, stamp: Stamp) -> &mut Self {
        self.say(CONSUMER, Phase::Ok, of(Operation::Deliver, stamp))
    }

    pub(crate) fn effect(&mut self, stamp: Stamp) -> &mut Self {
        self.effect_of(GROUP, stamp)
    }

    pub(crate) fn effect_of(&mut self, group: u16, stamp: Stamp) -> &mut Self {
        self.raw_effect(Effect {
            group,
            id: stamp.id(RUN),
            key: stamp.key,
            key_seq: stamp.key_seq,
            attempt: 1,
            order: 0,
        })
    }

    /// An effect that is committed after all others.
    pub(crate) fn raw_effect(&mut self, effect: Effect) -> &mut Self {
        let order = self.effects.len() as u64;
        self.effects.push(Effect { order, ..effect });
        self
    }

    pub(crate) fn settle(&mut self, stamp: Stamp) -> &mut Self {
        self.call(CONSUMER, Phase::Ok, of(Operation::Settle, stamp))
    }

    /// It is delivered, handled with its effect, and settled.
    pub(crate) fn handle(&mut self, stamp: Stamp) -> &mut Self {
        self.deliver(stamp)
            .say(CONSUMER, Phase::Invoke, of(Operation::Handle, stamp))
            .effect(stamp)
            .say(CONSUMER, Phase::Ok, of(Operation::Handle, stamp))
            .settle(stamp)
    }

    /// It is delivered, stored as a dead letter or parked, and settled.
    pub(crate) fn keep(&mut self, operation: Operation, stamp: Stamp) -> &mut Self {
        self.deliver(stamp)
            .call(CONSUMER, Phase::Fail, of(Operation::Handle, stamp))
            .call(CONSUMER, Phase::Ok, of(operation, stamp))
            .settle(stamp)
    }

    pub(crate) fn begin(&mut self, fault: Fault, number: u64) -> &mut Self {
        let entry = Entry::fault(Operation::FaultBegin, fault, number);
        self.say(HARNESS, Phase::Ok, entry)
    }

    pub(crate) fn end(&mut self, fault: Fault, number: u64) -> &mut Self {
        let entry = Entry::fault(Operation::FaultEnd, fault, number);
        self.say(HARNESS, Phase::Ok, entry)
    }

    pub(crate) fn probe(&mut self, outcome: Phase) -> &mut Self {
        self.call(HARNESS, outcome, Entry::new(Operation::Probe))
    }

    /// A fault that is over at once, and from which the system recovers at once.
    pub(crate) fn fault(&mut self, fault: Fault, number: u64) -> &mut Self {
        self.begin(fault, number)
            .end(fault, number)
            .probe(Phase::Ok)
    }

    pub(crate) fn ledger(&self) -> Ledger {
        Ledger::from_records(RUN, self.records.clone())
    }

    pub(crate) fn effects(&self) -> Vec<Effect> {
        self.effects.clone()
    }

    /// Asserts that no check finds anything.
    pub(crate) fn holds(&self) {
        let found = self.found(&promises());
        assert!(found.is_empty(), "{}", found[0]);
    }

    /// Asserts that one check finds this, once, and no other check anything.
    pub(crate) fn breaks(&self, breach: &Breach) -> Violation {
        self.breaks_of(&promises(), breach)
    }

    pub(crate) fn breaks_of(&self, promises: &Promises, breach: &Breach) -> Violation {
        let mut found = self.found(promises);
        let text: String = found.iter().map(ToString::to_string).collect();
        assert_eq!(found.len(), 1, "{text}");
        let violation = found.remove(0);
        assert_eq!(violation.breach, *breach, "{text}");
        violation
    }

    fn found(&self, promises: &Promises) -> Vec<Violation> {
        let ledger = self.ledger();
        let history = History::new(&ledger, self.effects.iter().copied());
        let mut all = Vec::new();
        for (invariant, violations) in promises.check(&history) {
            assert_eq!(violations.total(), violations.examples().len() as u64);
            for violation in violations.examples() {
                assert_eq!(violation.breach.invariant(), invariant);
                all.push(violation.clone());
            }
        }
        assert_eq!(promises.invariants, Invariant::ALL);
        all
    }
}

/// About a message, in the group unless the publisher does it, with its checksum.
pub(crate) fn of(operation: Operation, stamp: Stamp) -> Entry {
    let entry = Entry::of(operation, stamp);
    match operation {
        Operation::Deliver => entry.with_group(GROUP).with_checksum(checksum(stamp)),
        Operation::Handle | Operation::Settle | Operation::DeadLetter | Operation::Park => {
            entry.with_group(GROUP)
        }
        Operation::Stored => entry.with_checksum(checksum(stamp)),
        _ => entry,
    }
}

pub(crate) fn published(stamp: Stamp) -> Entry {
    of(Operation::Publish, stamp).with_checksum(checksum(stamp))
}

/// Stands for that of a payload.
pub(crate) fn checksum(stamp: Stamp) -> u32 {
    stamp.key_seq + 1000
}
