//! I8: memory, queues, attempts and duplicates stay under what was promised.

use eventbus_verify::{Breach, Entry, Fault, Operation, Phase, Promises, Sample};

use crate::story::{CONSUMER, GROUP, Story, message, of};

#[test]
fn what_is_at_the_bound_holds() {
    let mut story = Story::new();
    story.say(
        CONSUMER,
        Phase::Ok,
        Entry::sample(Sample::ResidentBytes, 1000),
    );
    story.say(CONSUMER, Phase::Ok, Entry::sample(Sample::Queued, u64::MAX));
    let last = of(Operation::Handle, message(0)).with_attempt(3);
    story
        .publish(message(0), Phase::Ok)
        .call(CONSUMER, Phase::Fail, last);
    story.handle(message(0));
    story.holds();
}

#[test]
fn a_measurement_above_its_bound_is_noticed() {
    let mut story = Story::new();
    story.say(
        CONSUMER,
        Phase::Ok,
        Entry::sample(Sample::ResidentBytes, 1001),
    );
    let violation = story.breaks(&Breach::Exceeded {
        sample: Sample::ResidentBytes,
        value: 1001,
        max: 1000,
    });
    assert_eq!(violation.records.len(), 1);
}

#[test]
fn an_attempt_too_many_is_noticed() {
    let mut story = Story::new();
    let fourth = of(Operation::Handle, message(0)).with_attempt(4);
    story
        .publish(message(0), Phase::Ok)
        .call(CONSUMER, Phase::Fail, fourth);
    story.handle(message(0));
    story.breaks(&Breach::TooManyAttempts { attempt: 4, max: 3 });
}

#[test]
fn each_fault_explains_what_was_in_flight() {
    let mut story = Story::new();
    for key_seq in 0..2 {
        story
            .publish(message(key_seq), Phase::Ok)
            .handle(message(key_seq));
    }
    for fault in 1..4 {
        story.fault(Fault::Kill, fault);
        story.deliver(message(0)).deliver(message(1));
    }
    story.holds();
}

#[test]
fn a_repetition_without_a_fault_is_noticed() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Ok)
        .handle(message(0))
        .deliver(message(0));
    // A fault after it explains nothing.
    story.fault(Fault::Kill, 1);
    story.breaks(&Breach::TooManyDuplicates {
        duplicates: 1,
        faults: 0,
    });
}

#[test]
fn more_repetitions_than_were_in_flight_are_noticed_once() {
    let mut story = Story::new();
    for key_seq in 0..4 {
        story
            .publish(message(key_seq), Phase::Ok)
            .handle(message(key_seq));
    }
    story.fault(Fault::Kill, 1);
    for key_seq in 0..4 {
        story.deliver(message(key_seq));
    }
    let violation = story.breaks(&Breach::TooManyDuplicates {
        duplicates: 3,
        faults: 1,
    });
    assert_eq!(
        violation.stamp,
        Some(message(2)),
        "the first that was too much"
    );
}

#[test]
fn copies_and_dead_letters_that_come_back_are_no_repetitions() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Unknown)
        .publish(message(0), Phase::Ok);
    story.handle(message(0)).deliver(message(0));
    story
        .publish(message(1), Phase::Ok)
        .keep(Operation::DeadLetter, message(1));
    story.handle(message(1));
    let other = of(Operation::Deliver, message(0)).with_group(GROUP + 1);
    story
        .say(CONSUMER, Phase::Ok, other)
        .say(CONSUMER, Phase::Ok, other);
    story.holds();
}

#[test]
fn what_has_no_bound_is_not_checked() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Ok)
        .handle(message(0))
        .deliver(message(0));
    story.publish(message(1), Phase::Ok);
    story.breaks_of(&Promises::to([GROUP]), &Breach::Lost);
}
