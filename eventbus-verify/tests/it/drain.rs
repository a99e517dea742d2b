//! I10: nothing is settled unhandled, and a shutdown that is done has nothing left.

use eventbus_verify::{Breach, Entry, Fault, Operation, Phase};

use crate::story::{CONSUMER, GROUP, HARNESS, Story, message, of};

/// Another process of the same group.
const OTHER: u32 = 9;

fn drain(story: &mut Story, phase: Phase) {
    let entry = Entry::new(Operation::Drain).with_group(GROUP);
    story.say(CONSUMER, phase, entry);
}

#[test]
fn a_shutdown_ends_what_runs_and_leaves_the_rest() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Ok)
        .publish(message(1), Phase::Ok);
    story.deliver(message(0)).deliver(message(1));
    story.say(CONSUMER, Phase::Invoke, of(Operation::Handle, message(0)));
    story.begin(Fault::Terminate, 1);
    drain(&mut story, Phase::Invoke);
    story.effect(message(0));
    story.say(CONSUMER, Phase::Ok, of(Operation::Handle, message(0)));
    story.settle(message(0));
    drain(&mut story, Phase::Ok);
    story.end(Fault::Terminate, 1).probe(Phase::Ok);
    let handle = of(Operation::Handle, message(1));
    story.say(OTHER, Phase::Ok, of(Operation::Deliver, message(1)));
    story
        .say(OTHER, Phase::Invoke, handle)
        .effect(message(1))
        .say(OTHER, Phase::Ok, handle);
    story.call(OTHER, Phase::Ok, of(Operation::Settle, message(1)));
    story.holds();
}

#[test]
fn the_inbox_may_know_what_a_killed_process_did() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).deliver(message(0));
    story
        .say(CONSUMER, Phase::Invoke, of(Operation::Handle, message(0)))
        .effect(message(0));
    story.fault(Fault::Kill, 1);
    story.say(OTHER, Phase::Ok, of(Operation::Deliver, message(0)));
    story.call(OTHER, Phase::Ok, of(Operation::Settle, message(0)));
    story.holds();
}

#[test]
fn the_inbox_may_know_what_a_stopped_process_did() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).deliver(message(0));
    story
        .say(CONSUMER, Phase::Invoke, of(Operation::Handle, message(0)))
        .effect(message(0));
    story.begin(Fault::Stop, 1);
    story.say(OTHER, Phase::Ok, of(Operation::Deliver, message(0)));
    story.call(OTHER, Phase::Ok, of(Operation::Settle, message(0)));
    story.end(Fault::Stop, 1).probe(Phase::Ok);
    story.say(CONSUMER, Phase::Ok, of(Operation::Handle, message(0)));
    story.holds();
}

#[test]
fn what_is_kept_may_be_settled() {
    for operation in [Operation::DeadLetter, Operation::Park] {
        let mut story = Story::new();
        story
            .publish(message(0), Phase::Ok)
            .keep(operation, message(0));
        story.holds();
    }
}

#[test]
fn what_is_only_found_in_a_store_in_the_end_may_have_been_settled() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Ok)
        .deliver(message(0))
        .call(CONSUMER, Phase::Fail, of(Operation::Handle, message(0)))
        .settle(message(0))
        .say(HARNESS, Phase::Ok, of(Operation::DeadLetter, message(0)));
    story.holds();
}

#[test]
fn a_settlement_before_the_handler_is_noticed() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Ok)
        .deliver(message(0))
        .settle(message(0));
    story
        .call(CONSUMER, Phase::Ok, of(Operation::Handle, message(0)))
        .effect(message(0));
    story.breaks(&Breach::SettledUnhandled);
}

#[test]
fn a_settlement_during_the_handler_is_noticed() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).deliver(message(0));
    story.say(CONSUMER, Phase::Invoke, of(Operation::Handle, message(0)));
    story.settle(message(0)).effect(message(0));
    story.say(CONSUMER, Phase::Ok, of(Operation::Handle, message(0)));
    story.breaks(&Breach::SettledUnhandled);
}

#[test]
fn a_settlement_without_a_handler_is_noticed() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Unknown)
        .deliver(message(0))
        .settle(message(0));
    story.breaks(&Breach::SettledUnhandled);
}

#[test]
fn a_settlement_after_a_failed_handler_is_noticed() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Unknown)
        .deliver(message(0));
    story.call(CONSUMER, Phase::Fail, of(Operation::Handle, message(0)));
    story.settle(message(0));
    story.breaks(&Breach::SettledUnhandled);
}

#[test]
fn a_settlement_of_what_a_killed_process_did_not_commit_is_noticed() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Unknown)
        .deliver(message(0));
    story.say(CONSUMER, Phase::Invoke, of(Operation::Handle, message(0)));
    story.call(OTHER, Phase::Ok, of(Operation::Settle, message(0)));
    story.breaks(&Breach::SettledUnhandled);
}

#[test]
fn a_settlement_before_the_dead_letter_is_noticed() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).deliver(message(0));
    story.call(CONSUMER, Phase::Fail, of(Operation::Handle, message(0)));
    story.say(
        CONSUMER,
        Phase::Invoke,
        of(Operation::DeadLetter, message(0)),
    );
    story.settle(message(0));
    story.say(CONSUMER, Phase::Ok, of(Operation::DeadLetter, message(0)));
    story.breaks(&Breach::SettledUnhandled);
    // Also if somebody finds it in the store in the end.
    story.say(HARNESS, Phase::Ok, of(Operation::DeadLetter, message(0)));
    story.breaks(&Breach::SettledUnhandled);
}

#[test]
fn another_group_that_handled_it_says_nothing_of_this_one() {
    let mut story = Story::new();
    let elsewhere = of(Operation::Handle, message(0)).with_group(GROUP + 1);
    story
        .publish(message(0), Phase::Unknown)
        .call(CONSUMER, Phase::Ok, elsewhere);
    story.settle(message(0));
    story.breaks(&Breach::SettledUnhandled);
}

#[test]
fn a_handler_that_outlives_the_shutdown_is_noticed() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).deliver(message(0));
    story.say(CONSUMER, Phase::Invoke, of(Operation::Handle, message(0)));
    drain(&mut story, Phase::Ok);
    story.effect(message(0));
    story.say(CONSUMER, Phase::Ok, of(Operation::Handle, message(0)));
    let violation = story.breaks(&Breach::LeftRunning);
    let mut operations = violation.records.iter().map(|one| one.entry.operation);
    assert!(operations.any(|operation| operation == Operation::Drain));
}

#[test]
fn what_a_consumer_does_after_its_shutdown_is_noticed() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).effect(message(0));
    drain(&mut story, Phase::Ok);
    story.deliver(message(0));
    story.breaks(&Breach::AfterDrain);
}

#[test]
fn another_group_in_the_process_may_go_on() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).effect(message(0));
    drain(&mut story, Phase::Ok);
    let other = of(Operation::Deliver, message(0)).with_group(GROUP + 1);
    story.say(CONSUMER, Phase::Ok, other);
    story.holds();
    // Unless the whole process was shut down.
    story.say(CONSUMER, Phase::Ok, Entry::new(Operation::Drain));
    story.say(
        CONSUMER,
        Phase::Ok,
        of(Operation::Deliver, message(0)).with_group(GROUP + 2),
    );
    story.breaks(&Breach::AfterDrain);
}
