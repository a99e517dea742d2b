//! I1: what was taken has an effect in every group, or is kept or reported by name.

use eventbus_verify::{Breach, Entry, Operation, Phase};

use crate::story::{CONSUMER, GROUP, PUBLISHER, Story, message, of, published};

#[test]
fn what_was_handled_is_not_lost() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).handle(message(0));
    story
        .append(message(1), 5)
        .commit(5, Phase::Ok)
        .handle(message(1));
    story.holds();
}

#[test]
fn tries_that_failed_or_are_unknown_need_no_effect() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Fail);
    story.publish(message(1), Phase::Unknown);
    story.say(PUBLISHER, Phase::Invoke, published(message(2)));
    story.append(message(3), 5).commit(5, Phase::Fail);
    story.append(message(4), 6).commit(6, Phase::Unknown);
    story.append(message(5), 7);
    story.holds();
}

#[test]
fn what_is_kept_or_reported_is_not_lost() {
    let mut story = Story::new();
    let at = published(message(2)).with_position(4, 20);
    story
        .publish(message(0), Phase::Ok)
        .keep(Operation::DeadLetter, message(0));
    story
        .publish(message(1), Phase::Ok)
        .keep(Operation::Park, message(1));
    story.call(PUBLISHER, Phase::Ok, at);
    story.say(CONSUMER, Phase::Ok, Entry::gap(GROUP, 4, 18, 3));
    story.holds();
}

#[test]
fn what_has_no_effect_is_lost() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).handle(message(0));
    story.publish(message(1), Phase::Ok);
    let violation = story.breaks(&Breach::Lost);
    assert_eq!(
        (violation.stamp, violation.group),
        (Some(message(1)), GROUP)
    );
    assert_eq!(violation.records.len(), 2, "only its own records show it");
    assert_eq!(
        violation.to_string(),
        "I1 no loss: message 1/7#1 (producer 1, key 7, number 1, \
         id 00000009-0001-8000-8000-070000000001) in group 1: it was taken, but there is no effect \
         of it, no dead letter, nothing parked and no reported gap\n  \
         record 7 at 0.008000000 process 1 session 1: Publish invoke of 1/7#1 checksum 000003e9\n  \
         record 8 at 0.009000000 process 1 session 1: Publish ok of 1/7#1 checksum 000003e9\n  \
         no effect\n"
    );
}

#[test]
fn what_was_committed_and_never_relayed_is_lost() {
    let mut story = Story::new();
    story.append(message(0), 5).commit(5, Phase::Ok);
    let violation = story.breaks(&Breach::Lost);
    assert_eq!(violation.records.len(), 4, "with its transaction");
}

#[test]
fn an_effect_in_another_group_is_none_here() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Ok)
        .effect_of(GROUP + 1, message(0));
    story.breaks(&Breach::Lost);
}

#[test]
fn a_second_try_that_was_ok_counts() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Unknown)
        .publish(message(0), Phase::Ok);
    story.breaks(&Breach::Lost);
}

#[test]
fn a_dead_letter_that_was_not_stored_keeps_nothing() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).deliver(message(0));
    let letter = of(Operation::DeadLetter, message(0));
    story.call(CONSUMER, Phase::Fail, letter);
    story.breaks(&Breach::Lost);
}

#[test]
fn a_gap_elsewhere_explains_nothing() {
    for gap in [
        Entry::gap(GROUP, 4, 21, 3),
        Entry::gap(GROUP, 4, 17, 3),
        Entry::gap(GROUP, 5, 18, 5),
        Entry::gap(GROUP + 1, 4, 18, 5),
    ] {
        let mut story = Story::new();
        let at = published(message(0)).with_position(4, 20);
        story
            .call(PUBLISHER, Phase::Ok, at)
            .say(CONSUMER, Phase::Ok, gap);
        story.breaks(&Breach::Lost);
    }
}
