//! I3: one effect a group.

use eventbus_verify::{Breach, Phase};

use crate::story::{GROUP, Story, message};

#[test]
fn each_group_may_have_one() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).handle(message(0));
    story
        .effect_of(GROUP + 1, message(0))
        .effect_of(GROUP + 2, message(0));
    story.holds();
}

#[test]
fn a_second_one_is_noticed_once() {
    for more in 1..4 {
        let mut story = Story::new();
        story.publish(message(0), Phase::Ok).handle(message(0));
        story.publish(message(1), Phase::Ok).handle(message(1));
        for _ in 0..more {
            story.effect(message(0));
        }
        let violation = story.breaks(&Breach::EffectTwice);
        assert_eq!(violation.effects.len(), 1 + more);
        assert!(
            violation
                .records
                .iter()
                .all(|one| one.entry.stamp == Some(message(0)))
        );
    }
}

#[test]
fn a_second_one_in_another_group_names_it() {
    let mut story = Story::new();
    story.publish(message(0), Phase::Ok).handle(message(0));
    story
        .effect_of(GROUP + 1, message(0))
        .effect_of(GROUP + 1, message(0));
    let violation = story.breaks(&Breach::EffectTwice);
    assert_eq!((violation.group, violation.effects.len()), (GROUP + 1, 2));
}
