//! What one member believes it holds, and what it has to tell its owner and the store. Knows the
//! time it is given and waits for nothing.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashSet};

use tokio::time::Instant;

use super::leaseholder::{LeaseConfig, LeaseSignal};
use super::share::share_of;
use super::{Lease, LeaseMember, LeaseReply, LeaseRequest, MemberId};
use crate::clock::FOREVER;
use crate::error::{Error, Result};
use crate::topic::TopicPartition;

/// The state of one member. Everything in it is bounded by the number of places.
#[derive(Debug)]
pub(super) struct Book {
    pub(super) member: MemberId,
    config: LeaseConfig,
    held: BTreeMap<TopicPartition, Held>,
    /// When all that is held ends, unless it is renewed: `ttl` after the last answered request was
    /// sent, which is before the store counts from.
    until: Instant,
    /// What it is to hold, as the last reply has it.
    share: BTreeSet<TopicPartition>,
    /// What is held no more and may stand in the store.
    released: BTreeSet<Lease>,
    /// Members whose processes are gone and that may stand in the store.
    dead: Vec<MemberId>,
    /// The members of the last reply, but for the dead.
    pub(super) members: Vec<LeaseMember>,
    /// What the owner was granted and does not know to be lost.
    lost: BTreeSet<TopicPartition>,
    error: Option<Error>,
    /// The owner closed or dropped it: nothing is held from then on.
    closed: bool,
}

#[derive(Debug)]
struct Held {
    epoch: u64,
    stage: Stage,
}

/// What the owner knows of a place that is held, and what it has to hear.
#[derive(Debug, PartialEq, Eq)]
enum Stage {
    /// It has not heard that it is granted.
    Granted,
    /// It is to keep it.
    Kept,
    /// It has to hear that it must give it back until then.
    Leaving(Instant),
    /// It was told so.
    Revoked(Instant),
}

impl Stage {
    fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Granted | Self::Kept => None,
            Self::Leaving(until) | Self::Revoked(until) => Some(*until),
        }
    }
}

impl Book {
    pub(super) fn new(config: LeaseConfig, now: Instant) -> Self {
        Self {
            member: MemberId::random(),
            config,
            held: BTreeMap::new(),
            until: now,
            share: BTreeSet::new(),
            released: BTreeSet::new(),
            dead: Vec::new(),
            members: Vec::new(),
            lost: BTreeSet::new(),
            error: None,
            closed: false,
        }
    }

    /// The epoch of a place that is surely held at `now`.
    pub(super) fn epoch(&self, place: &TopicPartition, now: Instant) -> Option<u64> {
        let held = self.held.get(place)?;
        (now < self.until).then_some(held.epoch)
    }

    /// Ends what is over at `now`; true when something was.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let all = self.until <= now;
        let is_over = |held: &Held| all || held.stage.deadline().is_some_and(|until| until <= now);
        let over: Vec<TopicPartition> = self
            .held
            .iter()
            .filter(|(_, held)| is_over(held))
            .map(|(place, _)| place.clone())
            .collect();
        for place in &over {
            self.give_up(place);
        }
        !over.is_empty()
    }

    /// Gives back what the owner is done with; what is not held is ignored.
    pub(super) fn release(&mut self, places: &[TopicPartition]) {
        for place in places {
            self.give_up(place);
            self.lost.remove(place);
        }
    }

    /// Holds nothing from now on.
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.held.clear();
        self.lost.clear();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn fail(&mut self, error: Error) {
        self.error = Some(error);
    }

    /// What to tell and to ask the store at `now`.
    pub(super) fn request(&mut self, now: Instant) -> LeaseRequest {
        self.expire(now);
        let config = &self.config;
        let is_missing = |place: &&TopicPartition| !self.held.contains_key(*place);
        LeaseRequest::new(
            config.group.clone(),
            self.member,
            config.topics.clone(),
            config.ttl,
        )
        .with_released(self.released.iter().cloned().collect())
        .with_dead(self.dead.clone())
        .with_wanted(self.share.iter().filter(is_missing).cloned().collect())
    }

    /// Takes the answer to `asked`, which was sent at `sent`, by which the members in `dead` are
    /// there no more; true when there is more to ask for at once.
    pub(super) fn apply(
        &mut self,
        asked: &LeaseRequest,
        reply: &LeaseReply,
        dead: Vec<MemberId>,
        sent: Instant,
        now: Instant,
    ) -> bool {
        let until = sent + self.config.ttl.min(FOREVER);
        if self.closed || until <= now {
            // It says nothing about what is held now.
            return true;
        }
        self.until = until;
        self.error = None;
        self.dead = dead;
        let is_living = |member: &&LeaseMember| !self.dead.contains(&member.id);
        let living: Vec<&LeaseMember> = reply.members.iter().filter(is_living).collect();
        self.take_over(reply.leases_of(self.member));
        self.share = share_of(self.member, &living);
        self.members = living.iter().map(|member| (*member).clone()).collect();
        self.revoke(now + self.config.revoke_timeout.min(FOREVER));
        self.has_more_to_ask(asked, &living)
    }

    /// Makes what is held what the store says, but for what was released meanwhile.
    fn take_over(&mut self, leases: &[Lease]) {
        let leases: BTreeSet<&Lease> = leases.iter().collect();
        self.released.retain(|lease| leases.contains(lease));
        let lost = &mut self.lost;
        self.held.retain(|place, held| {
            let lease = Lease {
                place: place.clone(),
                epoch: held.epoch,
            };
            let kept = leases.contains(&lease);
            if !kept && held.stage != Stage::Granted {
                lost.insert(lease.place);
            }
            kept
        });
        for lease in leases {
            if !self.released.contains(lease)
                && let Entry::Vacant(entry) = self.held.entry(lease.place.clone())
            {
                entry.insert(Held {
                    epoch: lease.epoch,
                    stage: Stage::Granted,
                });
            }
        }
    }

    /// Asks the owner to give back what is not its share, until `until`.
    fn revoke(&mut self, until: Instant) {
        let mut unseen = Vec::new();
        for (place, held) in &mut self.held {
            match held.stage {
                Stage::Granted if !self.share.contains(place) => unseen.push(place.clone()),
                Stage::Kept if !self.share.contains(place) => held.stage = Stage::Leaving(until),
                Stage::Leaving(_) if self.share.contains(place) => held.stage = Stage::Kept,
                _ => {}
            }
        }
        for place in &unseen {
            self.give_up(place);
        }
    }

    /// Whether a request would tell or get something that `asked` did not.
    fn has_more_to_ask(&self, asked: &LeaseRequest, living: &[&LeaseMember]) -> bool {
        let taken: HashSet<&TopicPartition> = living
            .iter()
            .flat_map(|member| &member.leases)
            .map(|lease| &lease.place)
            .chain(&asked.wanted)
            .collect();
        self.released
            .iter()
            .any(|lease| !asked.released.contains(lease))
            || self.dead.iter().any(|member| !asked.dead.contains(member))
            || self.share.iter().any(|place| !taken.contains(place))
    }

    fn give_up(&mut self, place: &TopicPartition) {
        let Some(held) = self.held.remove(place) else {
            return;
        };
        if held.stage != Stage::Granted {
            self.lost.insert(place.clone());
        }
        self.released.insert(Lease {
            place: place.clone(),
            epoch: held.epoch,
        });
    }

    /// The next thing that the owner has to hear. What is lost goes first, because it may be
    /// granted again already.
    pub(super) fn next(&mut self) -> Option<Result<LeaseSignal>> {
        if !self.lost.is_empty() {
            let lost = std::mem::take(&mut self.lost);
            return Some(Ok(LeaseSignal::Lost(lost.into_iter().collect())));
        }
        let leaving = self.leaving();
        if !leaving.is_empty() {
            return Some(Ok(LeaseSignal::Revoking(leaving)));
        }
        let granted = self.granted();
        if !granted.is_empty() {
            return Some(Ok(LeaseSignal::Granted(granted)));
        }
        self.error.take().map(Err)
    }

    fn leaving(&mut self) -> Vec<TopicPartition> {
        let mut leaving = Vec::new();
        for (place, held) in &mut self.held {
            if let Stage::Leaving(until) = held.stage {
                held.stage = Stage::Revoked(until);
                leaving.push(place.clone());
            }
        }
        leaving
    }

    fn granted(&mut self) -> Vec<Lease> {
        let mut granted = Vec::new();
        for (place, held) in &mut self.held {
            if held.stage == Stage::Granted {
                held.stage = Stage::Kept;
                granted.push(Lease {
                    place: place.clone(),
                    epoch: held.epoch,
                });
            }
        }
        granted
    }

    /// When the next lease is over, unless something happens before.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.held
            .values()
            .filter_map(|held| held.stage.deadline())
            .chain((!self.held.is_empty()).then_some(self.until))
            .min()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::lease::{LeaseTopic, ProcessId};
    use crate::message::{Group, Topic};

    const TTL: Duration = Duration::from_secs(10);

    fn topics() -> Vec<LeaseTopic> {
        vec![LeaseTopic {
            name: Topic::from_static("orders"),
            partitions: 1,
        }]
    }

    fn book(now: Instant) -> Book {
        let config = LeaseConfig::new(Group::from_static("payments"), topics());
        Book::new(config.with_ttl(TTL), now)
    }

    fn lease(epoch: u64) -> Lease {
        Lease {
            place: TopicPartition::new(Topic::from_static("orders"), 0),
            epoch,
        }
    }

    /// Takes a reply in that came so long after its request was sent.
    fn hear(book: &mut Book, epoch: u64, after: Duration, now: Instant) -> bool {
        let asked = book.request(now);
        let member = LeaseMember::new(book.member, ProcessId::current(), topics());
        let reply = LeaseReply::new(vec![member.with_leases(vec![lease(epoch)])]);
        book.apply(&asked, &reply, Vec::new(), now, now + after)
    }

    #[test]
    fn a_lease_lasts_from_before_it_was_asked_for() {
        let now = Instant::now();
        let mut book = book(now);
        hear(&mut book, 1, TTL / 2, now);
        let place = lease(1).place;
        assert_eq!(
            book.epoch(&place, now + TTL - Duration::from_nanos(1)),
            Some(1)
        );
        assert_eq!(book.epoch(&place, now + TTL), None);
    }

    #[test]
    fn a_reply_that_is_older_than_its_leases_says_nothing() {
        let now = Instant::now();
        let mut book = book(now);
        assert!(hear(&mut book, 1, TTL, now), "it asks again");
        assert!(book.next().is_none());
    }

    #[test]
    fn a_lease_of_another_epoch_is_another_lease() {
        let now = Instant::now();
        let mut book = book(now);
        hear(&mut book, 1, Duration::ZERO, now);
        assert!(
            matches!(book.next(), Some(Ok(LeaseSignal::Granted(found))) if found == [lease(1)])
        );
        // The store's clock went on while this machine slept, and the member was granted anew.
        hear(&mut book, 2, Duration::ZERO, now);
        assert!(
            matches!(book.next(), Some(Ok(LeaseSignal::Lost(found))) if found == [lease(1).place])
        );
        assert!(
            matches!(book.next(), Some(Ok(LeaseSignal::Granted(found))) if found == [lease(2)])
        );
    }
}
