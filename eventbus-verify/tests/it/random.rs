//! Correct histories, at random: no check may find anything in one.

use eventbus_verify::{Fault, History, Ledger, Operation, Phase, Report};
use proptest::prelude::{any, prop_assert, proptest};

use crate::model::{RUN, Told, promises, run};

proptest! {
    #[test]
    fn a_bus_that_works_breaks_nothing(seed in any::<u64>(), steps in 0_usize..600) {
        let report = check(&run(seed, steps));
        prop_assert!(report.violations_total() == 0, "{}", report.to_markdown());
    }
}

#[test]
fn the_model_does_what_it_is_there_for() {
    let told = run(3, 20_000);
    let count = |operation: Operation, phase: Phase| {
        let records = told.records.iter();
        records
            .filter(|one| one.entry.operation == operation && one.phase == phase)
            .count()
    };
    for (operation, phase) in [
        (Operation::Publish, Phase::Fail),
        (Operation::Publish, Phase::Unknown),
        (Operation::Commit, Phase::Fail),
        (Operation::Commit, Phase::Unknown),
        (Operation::Drain, Phase::Ok),
        (Operation::DeadLetter, Phase::Ok),
        (Operation::Park, Phase::Ok),
        (Operation::Gap, Phase::Ok),
    ] {
        assert!(count(operation, phase) >= 20, "{operation:?} {phase:?}");
    }
    let report = check(&told);
    assert!(report.passed(), "{}", report.to_markdown());
    assert!(report.messages.ok > 2000, "{:?}", report.messages);
    assert!(
        report
            .duplicates
            .values()
            .all(|duplicates| *duplicates > 100)
    );
    assert!(report.faults[&Fault::Kill] > 200);
}

fn check(told: &Told) -> Report {
    let ledger = Ledger::from_records(RUN, told.records.clone());
    let history = History::new(&ledger, told.effects.iter().copied());
    Report::of(&history, &promises())
}
