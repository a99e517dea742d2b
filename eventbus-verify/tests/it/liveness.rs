//! I7: after a fault messages pass again, soon and all.

use std::time::Duration;

use eventbus_verify::{Breach, Entry, Fault, History, Phase, Sample, check};

use crate::story::{CONSUMER, GROUP, HARNESS, Story};

#[test]
fn a_probe_that_passes_in_time_is_enough() {
    let mut story = Story::new();
    story.probe(Phase::Ok);
    story
        .begin(Fault::Kill, 1)
        .probe(Phase::Fail)
        .end(Fault::Kill, 1);
    story.probe(Phase::Unknown).wait(900).probe(Phase::Ok);
    story.holds();
}

#[test]
fn only_the_end_of_the_last_fault_counts() {
    let mut story = Story::new();
    story
        .begin(Fault::Stop, 1)
        .begin(Fault::Cut, 2)
        .end(Fault::Stop, 1);
    story.wait(5000).end(Fault::Cut, 2).probe(Phase::Ok);
    story.holds();
}

#[test]
fn the_next_fault_may_come_before_a_probe() {
    let mut story = Story::new();
    story.begin(Fault::Kill, 1).end(Fault::Kill, 1).wait(500);
    story.fault(Fault::Kill, 2);
    story.holds();
    let ledger = story.ledger();
    let history = History::new(&ledger, []);
    let recoveries = check::recoveries(&history, Duration::from_secs(1));
    assert_eq!((recoveries.times.len(), recoveries.interrupted), (1, 1));
    assert_eq!(recoveries.times[0], Duration::from_millis(2));
}

#[test]
fn a_late_probe_is_noticed() {
    let mut story = Story::new();
    story
        .begin(Fault::Kill, 1)
        .end(Fault::Kill, 1)
        .wait(1000)
        .probe(Phase::Ok);
    let after = Duration::from_millis(1002);
    let violation = story.breaks(&Breach::NotRecovered { after });
    assert_eq!(
        violation.records.len(),
        2,
        "the end of the fault and the probe"
    );
}

#[test]
fn a_probe_that_began_before_says_nothing() {
    let mut story = Story::new();
    let probe = Entry::new(eventbus_verify::Operation::Probe);
    story
        .begin(Fault::Kill, 1)
        .say(HARNESS, Phase::Invoke, probe);
    story.end(Fault::Kill, 1).say(HARNESS, Phase::Ok, probe);
    let after = Duration::from_millis(1);
    story.breaks(&Breach::NotRecovered { after });
}

#[test]
fn a_run_that_ends_before_a_probe_has_shown_nothing() {
    let mut story = Story::new();
    story
        .begin(Fault::Kill, 1)
        .end(Fault::Kill, 1)
        .probe(Phase::Fail);
    let after = Duration::from_millis(2);
    story.breaks(&Breach::NotRecovered { after });
}

#[test]
fn a_long_time_without_a_probe_is_noticed_though_a_fault_ends_it() {
    let mut story = Story::new();
    story.begin(Fault::Kill, 1).end(Fault::Kill, 1).wait(1000);
    story.fault(Fault::Kill, 2);
    let after = Duration::from_millis(1001);
    story.breaks(&Breach::NotRecovered { after });
}

#[test]
fn the_last_lag_counts() {
    let lag = |value| Entry::sample(Sample::Lag, value).with_group(GROUP);
    let mut story = Story::new();
    story
        .say(CONSUMER, Phase::Ok, lag(7))
        .say(CONSUMER, Phase::Ok, lag(0));
    story.holds();
    story.say(CONSUMER, Phase::Ok, lag(3));
    let violation = story.breaks(&Breach::LagLeft { lag: 3 });
    assert_eq!((violation.group, violation.records.len()), (GROUP, 1));
}
