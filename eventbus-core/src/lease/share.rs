//! Which places a member is to hold. Every member computes it from the same reply, so that nobody
//! has to decide for the others.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{LeaseMember, MemberId};
use crate::balance::{Share, balance};
use crate::message::Topic;
use crate::topic::TopicPartition;

/// The share of `id` among `members`, whatever their order.
pub(super) fn share_of(id: MemberId, members: &[&LeaseMember]) -> BTreeSet<TopicPartition> {
    let mut members = members.to_vec();
    members.sort_unstable_by_key(|member| member.id);
    let mut topics: BTreeMap<&Topic, u32> = BTreeMap::new();
    for topic in members.iter().flat_map(|member| &member.topics) {
        let partitions = topics.entry(&topic.name).or_default();
        *partitions = topic.partitions.max(*partitions);
    }
    let places: Vec<(usize, TopicPartition)> = topics
        .iter()
        .enumerate()
        .flat_map(|(index, (name, partitions))| {
            (0..*partitions)
                .map(move |number| (index, TopicPartition::new((*name).clone(), number)))
        })
        .collect();
    let mut holders = HashMap::new();
    for (index, member) in members.iter().enumerate() {
        holders.extend(member.leases.iter().map(|lease| (&lease.place, index)));
    }
    let shares: Vec<Share> = places
        .iter()
        .map(|(topic, place)| Share {
            topic: *topic,
            holder: holders.get(place).copied(),
        })
        .collect();
    let reads: Vec<Vec<bool>> = members
        .iter()
        .map(|member| {
            let reads = |name: &Topic| member.topics.iter().any(|topic| topic.name == *name);
            topics.keys().map(|name| reads(name)).collect()
        })
        .collect();
    let targets = balance(&shares, members.len(), |member, topic| reads[member][topic]);
    let mine = |target: &Option<usize>| target.is_some_and(|member| members[member].id == id);
    places
        .into_iter()
        .zip(&targets)
        .filter(|(_, target)| mine(target))
        .map(|((_, place), _)| place)
        .collect()
}
