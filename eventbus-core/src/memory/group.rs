//! What a group knows of a partition, and how partitions move between its members.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::member::Slot;
use super::state::State;
use crate::balance::{Share, balance};
use crate::clock::FOREVER;
use crate::delivery::{Lane, Signal};
use crate::message::Group;

/// A group: its members in the order in which they joined, and the topics it ever subscribed to.
#[derive(Debug)]
pub(super) struct GroupState {
    pub(super) name: Group,
    pub(super) members: Vec<usize>,
    pub(super) topics: Vec<usize>,
    /// Lanes whose owner was told `Revoking` and has not released them.
    pub(super) revocations: Vec<Revocation>,
}

impl GroupState {
    pub(super) fn new(name: Group) -> Self {
        Self {
            name,
            members: Vec::new(),
            topics: Vec::new(),
            revocations: Vec::new(),
        }
    }
}

/// A lane on its way from one member to another.
#[derive(Clone, Copy, Debug)]
pub(super) struct Revocation {
    place: Place,
    /// When it is taken without the owner's release.
    pub(super) deadline: Instant,
    /// Who gets it; nobody when no member reads the topic any more.
    to: Option<usize>,
}

/// A partition as a group sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) topic: usize,
    pub(super) partition: usize,
    /// The group's place among the partition's cursors.
    pub(super) cursor: usize,
}

/// How far a group is on one partition, and who reads it.
#[derive(Debug)]
pub(super) struct Cursor {
    /// Everything before it is settled; after a crash reading starts here.
    pub(super) committed: u64,
    /// Everything from here on was never handed out.
    high: u64,
    /// How often positions below `high` were handed out; one that is missing was once.
    again: BTreeMap<u64, u32>,
    pub(super) owner: Option<Owner>,
}

/// The member that holds a partition, and as which lane.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    pub(super) member: usize,
    pub(super) lane: Lane,
}

impl Cursor {
    pub(super) fn new(committed: u64) -> Self {
        Self {
            committed,
            high: committed,
            again: BTreeMap::new(),
            owner: None,
        }
    }

    /// Counts one hand-out and answers how many that makes.
    pub(super) fn count(&mut self, position: u64) -> u32 {
        if position >= self.high {
            self.high = position + 1;
            return 1;
        }
        let times = self.again.entry(position).or_insert(1);
        *times += 1;
        *times
    }

    /// Records everything before `committed` as settled.
    pub(super) fn settle_up_to(&mut self, committed: u64) {
        self.committed = committed;
        if !self.again.is_empty() {
            // Nothing asks for the counts below it any more.
            self.again = self.again.split_off(&committed);
        }
    }

    /// Messages published and not settled.
    pub(super) fn lag(&self, base: u64, end: u64) -> u64 {
        end.saturating_sub(self.committed.max(base))
    }
}

impl State {
    /// Brings the group's partitions to an even share: unowned ones are assigned, the others
    /// announced to their owners.
    pub(super) fn rebalance(&mut self, group: usize) {
        let places = self.places(group);
        let members = self.groups[group].members.clone();
        let index_of = |member: usize| members.iter().position(|found| *found == member);
        let shares: Vec<Share> = places
            .iter()
            .map(|place| {
                let holder = match self.revocation(group, *place) {
                    Some(revocation) => revocation.to,
                    None => self.cursor(*place).owner.map(|owner| owner.member),
                };
                Share {
                    topic: place.topic,
                    holder: holder.and_then(index_of),
                }
            })
            .collect();
        let targets = balance(&shares, members.len(), |member, topic| {
            self.member(members[member]).reads(topic)
        });
        for (place, target) in places.into_iter().zip(targets) {
            self.aim(group, place, target.map(|index| members[index]));
        }
        // Whoever waits has to learn of new deadlines.
        for member in members {
            self.member_mut(member).wake();
        }
    }

    /// Takes the first step that brings `place` to `target`.
    fn aim(&mut self, group: usize, place: Place, target: Option<usize>) {
        let Some(owner) = self.cursor(place).owner else {
            if let Some(member) = target {
                self.assign(member, place);
            }
            return;
        };
        let revocations = &mut self.groups[group].revocations;
        if let Some(revocation) = revocations.iter_mut().find(|found| found.place == place) {
            revocation.to = target;
            return;
        }
        if target == Some(owner.member) {
            return;
        }
        let member = self.member_mut(owner.member);
        if member.forget_unseen(owner.lane) {
            self.vacate(group, place);
            self.aim(group, place, target);
            return;
        }
        member.revoke(owner.lane);
        let deadline = Instant::now() + member.limits.revoke_timeout.min(FOREVER);
        self.groups[group].revocations.push(Revocation {
            place,
            deadline,
            to: target,
        });
    }

    /// Gives a partition that nobody owns to `member`.
    fn assign(&mut self, member: usize, place: Place) {
        let topic = &mut self.topics[place.topic];
        let partition = &mut topic.partitions[place.partition];
        let from = partition.cursors[place.cursor].committed;
        let lane = self.members[member]
            .as_mut()
            .expect("only living members are balanced")
            .open(&topic.name, Slot::of_group(place, from), partition);
        partition.cursors[place.cursor].owner = Some(Owner { member, lane });
    }

    /// Takes a partition from its owner, without a word to it.
    fn vacate(&mut self, group: usize, place: Place) -> Option<Owner> {
        self.groups[group]
            .revocations
            .retain(|revocation| revocation.place != place);
        let partition = &mut self.topics[place.topic].partitions[place.partition];
        let owner = partition.cursors[place.cursor].owner.take()?;
        partition.forget_listener(owner.member, owner.lane);
        self.member_mut(owner.member).close_lane(owner.lane);
        Some(owner)
    }

    /// Gives `lanes` of `member` away; the ones it does not hold are ignored.
    pub(super) fn release(&mut self, group: usize, member: usize, lanes: &[Lane]) {
        for lane in lanes {
            let Some(place) = self.member(member).place(*lane) else {
                continue;
            };
            let promised = self.revocation(group, place).and_then(|found| found.to);
            self.vacate(group, place);
            if let Some(to) = promised {
                self.assign(to, place);
            }
        }
        self.rebalance(group);
    }

    /// Takes the lanes whose owners did not release them in time.
    pub(super) fn take_overdue(&mut self, group: usize) {
        if self.groups[group].revocations.is_empty() {
            return;
        }
        let now = Instant::now();
        let overdue: Vec<Revocation> = self.groups[group]
            .revocations
            .iter()
            .filter(|revocation| revocation.deadline <= now)
            .copied()
            .collect();
        for revocation in &overdue {
            self.take_away(group, revocation.place);
            if let Some(to) = revocation.to {
                self.assign(to, revocation.place);
            }
        }
        if !overdue.is_empty() {
            self.rebalance(group);
        }
    }

    /// Takes every lane of the group away and shares them out anew.
    pub(super) fn lose(&mut self, group: usize) {
        for place in self.places(group) {
            self.take_away(group, place);
        }
        self.rebalance(group);
    }

    /// Takes one lane away and tells its owner that it is lost.
    fn take_away(&mut self, group: usize, place: Place) {
        if let Some(owner) = self.vacate(group, place) {
            let member = self.member_mut(owner.member);
            if !member.forget_unseen(owner.lane) {
                member.tell(Signal::Lost(vec![owner.lane]));
            }
        }
    }

    /// Removes a member from its group; its lanes go to the others at once.
    pub(super) fn leave_group(&mut self, group: usize, member: usize) {
        for place in self.places(group) {
            let owner = self.cursor(place).owner;
            if owner.is_some_and(|owner| owner.member == member) {
                self.vacate(group, place);
            }
        }
        self.groups[group].members.retain(|found| *found != member);
        self.rebalance(group);
    }

    /// The partitions of all topics the group ever subscribed to.
    fn places(&self, group: usize) -> Vec<Place> {
        let mut places = Vec::new();
        for topic in &self.groups[group].topics {
            let Some(cursor) = self.topics[*topic].cursor_of(group) else {
                continue;
            };
            places.extend(
                (0..self.topics[*topic].partitions.len()).map(|partition| Place {
                    topic: *topic,
                    partition,
                    cursor,
                }),
            );
        }
        places
    }

    fn revocation(&self, group: usize, place: Place) -> Option<&Revocation> {
        self.groups[group]
            .revocations
            .iter()
            .find(|revocation| revocation.place == place)
    }

    fn cursor(&self, place: Place) -> &Cursor {
        &self.topics[place.topic].partitions[place.partition].cursors[place.cursor]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hand_outs_are_counted_from_one() {
        let mut cursor = Cursor::new(5);
        assert_eq!([cursor.count(5), cursor.count(6)], [1, 1]);
        assert_eq!([cursor.count(5), cursor.count(5)], [2, 3]);
        cursor.settle_up_to(6);
        assert!(cursor.again.is_empty());
        assert_eq!([cursor.count(6), cursor.count(7)], [2, 1]);
    }
}
