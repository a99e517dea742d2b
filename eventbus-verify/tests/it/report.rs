//! What a reader of a report sees.

use eventbus_verify::{Entry, Fault, History, Invariant, Operation, Phase, Report};

use crate::story::{GROUP, HARNESS, Story, message, promises};

fn told() -> Story {
    let mut story = Story::new();
    for key_seq in 0..3 {
        story
            .publish(message(key_seq), Phase::Ok)
            .handle(message(key_seq));
    }
    story
        .publish(message(3), Phase::Unknown)
        .publish(message(4), Phase::Fail);
    story
        .publish(message(5), Phase::Ok)
        .keep(Operation::DeadLetter, message(5));
    story
        .fault(Fault::Kill, 1)
        .fault(Fault::DiskFull, 2)
        .fault(Fault::Kill, 3);
    story.deliver(message(2));
    story
}

fn close(story: &mut Story) {
    story.say(HARNESS, Phase::Ok, Entry::new(Operation::Close));
}

fn report(story: &Story) -> Report {
    let ledger = story.ledger();
    let promises = promises().without(Invariant::Honesty);
    Report::of(&History::new(&ledger, story.effects()), &promises)
}

#[test]
fn a_run_that_passed_is_summed_up() {
    let mut story = told();
    close(&mut story);
    let report = report(&story);
    assert!(report.passed());
    assert_eq!(report.messages.total(), 6);
    assert_eq!(report.duplicates[&GROUP], 1);
    assert_eq!(report.faults[&Fault::Kill], 2);
    let text = report.to_markdown();
    for line in [
        "# Run 00000009: passed",
        "| messages checked | 6 |",
        "| of these published ok | 4 |",
        "| duplicates on the wire | 1 |",
        "| dead letters | 1 |",
        "## Faults: 3",
        "| Kill | 2 |",
        "The first probe passed after 2.0ms (p50), 2.0ms (p99), 2.0ms (max).",
        "## Violations: 0",
        "| I1 no loss | 0 |",
        "| I9 honesty | not promised, not checked |",
    ] {
        assert!(text.lines().any(|one| one == line), "{line}\n\n{text}");
    }
}

#[test]
fn a_ledger_without_its_end_does_not_pass() {
    let report = report(&told());
    assert!(!report.passed());
    assert!(
        report
            .to_markdown()
            .starts_with("# Run 00000009: not passed: the ledger")
    );
}

#[test]
fn a_run_without_messages_does_not_pass() {
    let mut story = Story::new();
    close(&mut story);
    let report = report(&story);
    assert!(!report.passed());
    assert!(report.to_markdown().contains("no message was checked"));
    assert!(report.to_markdown().contains("nothing is said of faults"));
}

#[test]
fn a_violation_is_shown_with_its_records() {
    let mut story = told();
    story.publish(message(6), Phase::Ok);
    close(&mut story);
    let report = report(&story);
    assert_eq!(report.violations_total(), 1);
    let text = report.to_markdown();
    assert!(text.starts_with("# Run 00000009: 1 violations"));
    assert!(text.contains("| I1 no loss | 1 |"));
    assert!(text.contains("Publish ok of 1/7#6"), "{text}");
}

#[test]
fn a_flood_of_violations_is_counted_and_not_kept() {
    let mut story = Story::new();
    for key_seq in 0..1000 {
        story.publish(message(key_seq), Phase::Ok);
    }
    let report = report(&story);
    assert_eq!(report.violations_total(), 1000);
    let kept: usize = report
        .violations
        .iter()
        .map(|(_, found)| found.examples().len())
        .sum();
    assert_eq!(kept, 100);
}
