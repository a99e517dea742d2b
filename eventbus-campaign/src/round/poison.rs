//! What must hold of messages that no handler can handle, beside that they are not lost.

use std::collections::{BTreeMap, HashSet};

use eventbus::prelude::EventBus;
use eventbus_verify::{Effect, Stamp};

use crate::child::consume::is_poison;
use crate::witness;

/// Finds poison with an effect, poison that became a dead letter more than once, and other messages
/// that were taken for poison. The first group parks keys, the others keep dead letters.
pub(super) async fn complaints(
    bus: &EventBus,
    effects: &[Effect],
    groups: &[u16],
) -> anyhow::Result<Vec<String>> {
    let mut complaints = Vec::new();
    for effect in effects {
        let stamp = effect.id.origin().map(|(_, stamp)| stamp);
        if let Some(stamp) = stamp.filter(|stamp| is_poison(*stamp)) {
            complaints.push(format!(
                "poison {stamp} has an effect in group {}",
                effect.group
            ));
        }
    }
    let Some((parks, others)) = groups.split_first() else {
        return Ok(complaints);
    };
    for group in others {
        let mut letters: BTreeMap<Stamp, u32> = BTreeMap::new();
        for stamp in witness::dead_letters(bus, *group).await? {
            *letters.entry(stamp).or_default() += 1;
        }
        for (stamp, count) in letters {
            if !is_poison(stamp) {
                complaints.push(format!(
                    "{stamp} is a dead letter of group {group}, and no poison"
                ));
            }
            if count > 1 {
                complaints.push(format!("{stamp} is {count} dead letters of group {group}"));
            }
        }
    }
    // Behind poison wait the others of its key, and nothing of other keys.
    let parked = witness::parked(bus, *parks).await?;
    let poisoned: HashSet<u32> = parked
        .iter()
        .filter(|stamp| is_poison(**stamp))
        .map(|stamp| stamp.key)
        .collect();
    for stamp in parked {
        if !poisoned.contains(&stamp.key) {
            complaints.push(format!(
                "{stamp} is parked, and nothing of its key is poison"
            ));
        }
    }
    complaints.truncate(20);
    Ok(complaints)
}
