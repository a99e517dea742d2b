//! I1: what was taken has an effect in every group, or is kept or reported by name.

use super::{Breach, Violation, Violations};
use crate::history::{History, Message, Outcome};
use crate::record::Operation;

/// Finds messages that were published with ok, or appended in a transaction that was committed, and
/// that a group has neither handled, nor kept as a dead letter or parked, nor reported as vanished.
///
/// It says nothing of tries that failed or whose outcome is unknown. The run must be over: faults
/// healed, and everything that can be handled, handled. Dead letters and parked messages count with
/// an `ok`, which the harness may write after having read the stores at the end.
///
/// Linear, for each group; takes no memory to speak of.
#[must_use]
pub fn no_loss(history: &History<'_>, groups: &[u16]) -> Violations {
    let mut violations = Violations::default();
    for message in history.messages() {
        if message.fate().outcome != Some(Outcome::Ok) {
            continue;
        }
        for group in groups.iter().filter(|group| is_lost(message, **group)) {
            violations.add(|| Violation::of(history, Breach::Lost, message.stamp, *group));
        }
    }
    violations
}

fn is_lost(message: Message<'_>, group: u16) -> bool {
    !message.has_effect(group)
        && !message.was(Operation::DeadLetter, group)
        && !message.was(Operation::Park, group)
        && !message.is_in_gap(group)
}
