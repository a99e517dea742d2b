//! I4: in order within a key, of effects and on the wire.

use eventbus_verify::{Breach, Entry, Fault, Operation, Phase, Stamp};

use crate::story::{CONSUMER, GROUP, PUBLISHER, Story, message, of, published};

#[test]
fn a_suffix_may_be_handed_out_again() {
    let mut story = Story::new();
    for key_seq in 0..4 {
        story.publish(message(key_seq), Phase::Ok);
    }
    story
        .handle(message(0))
        .deliver(message(1))
        .deliver(message(2));
    story.fault(Fault::Kill, 1);
    story
        .handle(message(1))
        .handle(message(2))
        .handle(message(3));
    story.holds();
}

#[test]
fn keys_and_producers_have_no_order_between_them() {
    let mut story = Story::new();
    let (other_key, other_producer) = (Stamp::new(1, 8, 0), Stamp::new(2, 7, 0));
    for stamp in [message(0), other_key, other_producer] {
        story.publish(stamp, Phase::Ok);
    }
    story
        .handle(other_producer)
        .handle(other_key)
        .handle(message(0));
    story.holds();
}

#[test]
fn an_unknown_one_may_come_at_any_time_or_never() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Unknown);
    story.publish(message(1), Phase::Ok).handle(message(1));
    story.publish(message(2), Phase::Unknown);
    story.publish(message(3), Phase::Ok).handle(message(3));
    story.handle(message(0));
    story.holds();
}

#[test]
fn one_that_is_tried_again_after_a_later_one_may_follow_it() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Unknown);
    story.publish(message(1), Phase::Ok).handle(message(1));
    story.publish(message(0), Phase::Ok).handle(message(0));
    story.holds();
}

#[test]
fn what_operators_bring_back_from_the_dead_letters_may_come_late() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Ok)
        .keep(Operation::DeadLetter, message(0));
    story.publish(message(1), Phase::Ok).handle(message(1));
    story.handle(message(0));
    story.holds();
}

#[test]
fn what_is_parked_holds_its_key() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Ok)
        .keep(Operation::Park, message(0));
    story.publish(message(1), Phase::Ok).handle(message(1));
    story.handle(message(0));
    story.breaks(&Breach::EffectLate { after: message(1) });
}

#[test]
fn what_was_reported_as_vanished_may_come_late() {
    let mut story = Story::new();
    story.call(
        PUBLISHER,
        Phase::Ok,
        published(message(0)).with_position(4, 20),
    );
    story.say(CONSUMER, Phase::Ok, Entry::gap(GROUP, 4, 20, 1));
    story.publish(message(1), Phase::Ok).handle(message(1));
    story.handle(message(0));
    story.holds();
}

#[test]
fn an_effect_after_a_later_one_is_noticed() {
    let mut story = Story::new();
    for key_seq in 0..4 {
        story.publish(message(key_seq), Phase::Ok);
    }
    for key_seq in [0, 2, 1, 3] {
        story.effect(message(key_seq));
    }
    let violation = story.breaks(&Breach::EffectLate { after: message(2) });
    assert_eq!(violation.stamp, Some(message(1)));
    let shown: Vec<u32> = violation.effects.iter().map(|one| one.key_seq).collect();
    assert_eq!(shown, [2, 1], "in order of commit");
    assert_eq!(violation.records.len(), 4, "of the two messages only");
}

#[test]
fn a_first_delivery_after_a_later_one_is_noticed() {
    let mut story = Story::new();
    for key_seq in 0..3 {
        story
            .publish(message(key_seq), Phase::Ok)
            .effect(message(key_seq));
    }
    story
        .deliver(message(0))
        .deliver(message(2))
        .deliver(message(1));
    let violation = story.breaks(&Breach::DeliveredLate { after: message(2) });
    assert_eq!(violation.stamp, Some(message(1)));
}

#[test]
fn one_that_never_comes_is_lost_and_not_late() {
    let mut story = Story::new();
    for key_seq in 0..3 {
        story.publish(message(key_seq), Phase::Ok);
    }
    story.handle(message(0)).handle(message(2));
    let violation = story.breaks(&Breach::Lost);
    assert_eq!(violation.stamp, Some(message(1)));
}

#[test]
fn calls_that_overlap_keep_the_order_they_began_in() {
    let mut story = Story::new();
    story
        .say(PUBLISHER, Phase::Invoke, published(message(0)))
        .say(PUBLISHER, Phase::Invoke, published(message(1)))
        .say(PUBLISHER, Phase::Ok, published(message(0)))
        .say(PUBLISHER, Phase::Ok, published(message(1)))
        .effect(message(1))
        .effect(message(0));
    story.breaks(&Breach::EffectLate { after: message(1) });
}

#[test]
fn a_known_one_must_not_come_after_an_unknown_later_one() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Ok)
        .publish(message(1), Phase::Unknown);
    story.effect(message(1)).effect(message(0));
    story.breaks(&Breach::EffectLate { after: message(1) });
}

#[test]
fn messages_of_one_outbox_are_in_order() {
    let mut story = Story::new();
    story
        .append(message(0), 5)
        .append(message(1), 5)
        .commit(5, Phase::Ok);
    story.effect(message(1)).effect(message(0));
    story.breaks(&Breach::EffectLate { after: message(1) });
}

#[test]
fn a_dead_letter_of_another_group_excuses_nothing() {
    let mut story = Story::new();
    story
        .publish(message(0), Phase::Ok)
        .publish(message(1), Phase::Ok);
    let letter = of(Operation::DeadLetter, message(0)).with_group(GROUP + 1);
    story.call(CONSUMER, Phase::Ok, letter);
    story.effect(message(1)).effect(message(0));
    story.breaks(&Breach::EffectLate { after: message(1) });
}
