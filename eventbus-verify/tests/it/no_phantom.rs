//! I2: nothing is seen that nobody tried, that failed, or that was changed.

use eventbus_verify::{Breach, Effect, Entry, MessageId, Operation, Phase, RunId};

use crate::story::{CONSUMER, GROUP, HARNESS, PUBLISHER, Story, message, of, published};

#[test]
fn a_try_that_may_have_been_done_may_be_seen() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Unknown).handle(message(0));
    story
        .append(message(1), 5)
        .commit(5, Phase::Unknown)
        .handle(message(1));
    // Its publisher was killed before it heard.
    story
        .say(PUBLISHER, Phase::Invoke, published(message(2)))
        .handle(message(2));
    story
        .publish(message(3), Phase::Fail)
        .publish(message(3), Phase::Ok)
        .handle(message(3));
    story.holds();
}

#[test]
fn it_may_be_seen_before_its_publisher_hears_ok() {
    let mut story = Story::new();
    story
        .say(PUBLISHER, Phase::Invoke, published(message(0)))
        .handle(message(0))
        .say(PUBLISHER, Phase::Ok, published(message(0)));
    story.holds();
}

#[test]
fn what_nobody_tried_is_a_phantom() {
    let mut story = Story::new();
    story.effect(message(0));
    story.breaks(&Breach::NeverPublished);
    let mut story = Story::new();
    story.deliver(message(0));
    story.breaks(&Breach::NeverPublished);
    let mut story = Story::new();
    story.say(HARNESS, Phase::Ok, of(Operation::Stored, message(0)));
    story.breaks(&Breach::NeverPublished);
}

#[test]
fn what_failed_must_not_be_seen() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Fail).handle(message(0));
    story.breaks(&Breach::Failed);
}

#[test]
fn what_was_rolled_back_must_not_be_seen() {
    let mut story = Story::new();
    story
        .append(message(0), 5)
        .commit(5, Phase::Fail)
        .handle(message(0));
    story.breaks(&Breach::Failed);
    let mut story = Story::new();
    story.append(message(0), 5).handle(message(0));
    story.breaks(&Breach::Failed);
}

#[test]
fn what_was_not_committed_yet_must_not_be_seen() {
    let mut story = Story::new();
    story
        .append(message(0), 5)
        .handle(message(0))
        .commit(5, Phase::Ok);
    let violation = story.breaks(&Breach::BeforePublished);
    let commits = violation.records.iter();
    let commits = commits.filter(|record| record.entry.operation == Operation::Commit);
    assert_eq!(commits.count(), 2, "the transaction shows it");
}

#[test]
fn what_is_seen_between_a_failed_try_and_the_next_one_is_a_phantom() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Fail)
        .handle(message(0))
        .publish(message(0), Phase::Ok);
    story.breaks(&Breach::BeforePublished);
}

#[test]
fn a_changed_payload_is_noticed() {
    let mut story = Story::new();
    let changed = of(Operation::Deliver, message(0)).with_checksum(1);
    story.publish(message(0), Phase::Ok).handle(message(0));
    story.fault(eventbus_verify::Fault::Kill, 1);
    story.say(CONSUMER, Phase::Ok, changed);
    story.breaks(&Breach::Changed);
}

#[test]
fn what_cannot_be_read_is_noticed() {
    let mut story = Story::new();
    let unreadable = Entry::new(Operation::Deliver).with_group(GROUP);
    story.say(CONSUMER, Phase::Fail, unreadable);
    let violation = story.breaks(&Breach::Unreadable);
    assert_eq!(violation.records.len(), 1);
}

#[test]
fn an_effect_of_another_run_is_noticed() {
    for id in [message(0).id(RunId(8)), MessageId::from_u128(17)] {
        let mut story = Story::new();
        story.raw_effect(Effect {
            id,
            ..effect_of_message_0()
        });
        story.breaks(&Breach::ForeignEffect);
    }
}

#[test]
fn an_effect_of_two_messages_is_noticed() {
    let mixed = [
        Effect {
            key: 8,
            ..effect_of_message_0()
        },
        Effect {
            key_seq: 1,
            ..effect_of_message_0()
        },
    ];
    for effect in mixed {
        let mut story = Story::new();
        story.publish(message(0), Phase::Ok).raw_effect(effect);
        let violation = story.breaks(&Breach::MixedUp);
        assert_eq!(violation.effects, [effect]);
    }
}

fn effect_of_message_0() -> Effect {
    Effect {
        group: GROUP,
        id: message(0).id(crate::story::RUN),
        key: message(0).key,
        key_seq: 0,
        attempt: 1,
        order: 0,
    }
}
