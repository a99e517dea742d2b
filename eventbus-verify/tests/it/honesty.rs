//! I9: a caller is never told more than is so.

use eventbus_verify::{Breach, Entry, Operation, Phase, Stamp};

use crate::story::{CONSUMER, GROUP, HARNESS, PUBLISHER, Story, message, of, published};

/// A publish, and what the adapter answered within it.
fn publish_over(story: &mut Story, stamp: Stamp, sends: &[Phase], told: Phase) {
    story.say(PUBLISHER, Phase::Invoke, published(stamp));
    for answer in sends {
        story.call(PUBLISHER, *answer, of(Operation::Send, stamp));
    }
    story.say(PUBLISHER, told, published(stamp));
}

/// A final reading that finds these.
fn reread(story: &mut Story, stamps: &[Stamp]) {
    let reread = Entry::new(Operation::Reread);
    story.say(HARNESS, Phase::Invoke, reread);
    for stamp in stamps {
        story.say(HARNESS, Phase::Ok, of(Operation::Stored, *stamp));
    }
    story.say(HARNESS, Phase::Ok, reread);
}

#[test]
fn what_the_broker_said_may_be_told() {
    let mut story = Story::new();
    publish_over(&mut story, message(0), &[Phase::Ok], Phase::Ok);
    publish_over(
        &mut story,
        message(1),
        &[Phase::Unknown, Phase::Ok],
        Phase::Ok,
    );
    publish_over(&mut story, message(2), &[Phase::Fail], Phase::Fail);
    publish_over(&mut story, message(3), &[], Phase::Fail);
    // Nobody need be told all that is known.
    publish_over(&mut story, message(4), &[Phase::Ok], Phase::Unknown);
    publish_over(&mut story, message(5), &[Phase::Unknown], Phase::Unknown);
    for key_seq in [0, 1, 4] {
        story.handle(message(key_seq));
    }
    story.holds();
}

#[test]
fn an_ok_that_the_broker_did_not_say_is_noticed() {
    for sends in [&[Phase::Unknown][..], &[Phase::Fail], &[]] {
        let mut story = Story::new();
        publish_over(&mut story, message(0), &[Phase::Ok], Phase::Ok);
        publish_over(&mut story, message(1), sends, Phase::Ok);
        story.handle(message(0)).handle(message(1));
        let violation = story.breaks(&Breach::OkUnacknowledged);
        assert_eq!(violation.stamp, Some(message(1)));
    }
}

#[test]
fn an_ok_from_an_earlier_call_is_none() {
    let mut story = Story::new();
    publish_over(&mut story, message(0), &[Phase::Ok], Phase::Unknown);
    publish_over(&mut story, message(0), &[Phase::Unknown], Phase::Ok);
    story.handle(message(0));
    story.breaks(&Breach::OkUnacknowledged);
}

#[test]
fn a_failure_that_the_broker_did_not_say_is_noticed() {
    for sends in [&[Phase::Unknown][..], &[Phase::Fail, Phase::Ok]] {
        let mut story = Story::new();
        publish_over(&mut story, message(0), sends, Phase::Fail);
        story.breaks(&Breach::FailUnproven);
    }
}

#[test]
fn the_final_reading_finds_what_was_ok() {
    let mut story = Story::new();
    for key_seq in 0..2 {
        story
            .publish(message(key_seq), Phase::Ok)
            .handle(message(key_seq));
    }
    story
        .publish(message(2), Phase::Unknown)
        .publish(message(3), Phase::Fail);
    story.call(
        PUBLISHER,
        Phase::Ok,
        published(message(4)).with_position(4, 20),
    );
    story.say(CONSUMER, Phase::Ok, Entry::gap(GROUP, 4, 20, 1));
    reread(&mut story, &[message(0), message(1)]);
    // What comes after it, it can't have found.
    story.publish(message(5), Phase::Ok).handle(message(5));
    story.holds();
}

#[test]
fn what_the_final_reading_lacks_is_noticed() {
    let mut story = Story::new();
    for key_seq in 0..2 {
        story
            .publish(message(key_seq), Phase::Ok)
            .handle(message(key_seq));
    }
    reread(&mut story, &[message(0)]);
    let violation = story.breaks(&Breach::NotStored);
    assert_eq!(violation.stamp, Some(message(1)));
}

#[test]
fn a_reading_that_did_not_come_to_its_end_says_nothing() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).handle(message(0));
    story.call(HARNESS, Phase::Fail, Entry::new(Operation::Reread));
    story.holds();
}

#[test]
fn two_messages_at_one_position_are_noticed() {
    let mut story = Story::new();
    for key_seq in 0..2 {
        let at = published(message(key_seq)).with_position(4, 20);
        story
            .call(PUBLISHER, Phase::Ok, at)
            .handle(message(key_seq));
    }
    let violation = story.breaks(&Breach::SamePosition { other: message(1) });
    assert_eq!(violation.stamp, Some(message(0)));
}

#[test]
fn one_message_may_be_at_two_positions_and_be_seen_there_often() {
    let mut story = Story::new();
    let stored = of(Operation::Stored, message(0));
    story.publish(message(0), Phase::Unknown);
    story.call(
        PUBLISHER,
        Phase::Ok,
        published(message(0)).with_position(4, 21),
    );
    story.handle(message(0));
    for position in [20, 21, 21] {
        story.say(HARNESS, Phase::Ok, stored.with_position(4, position));
    }
    story.holds();
}
