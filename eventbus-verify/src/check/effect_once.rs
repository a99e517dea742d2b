//! I3: one effect a group.

use super::{Breach, Violation, Violations};
use crate::history::History;

/// Finds messages that have several effects in a group.
///
/// Linear; takes no memory to speak of.
#[must_use]
pub fn effect_once(history: &History<'_>) -> Violations {
    let mut violations = Violations::default();
    for message in history.messages() {
        // They are sorted by group.
        for effects in message
            .effects
            .chunk_by(|one, next| one.group == next.group)
        {
            if let [first, _, ..] = effects {
                let breach = Breach::EffectTwice;
                violations.add(|| Violation::of(history, breach, message.stamp, first.group));
            }
        }
    }
    violations
}
