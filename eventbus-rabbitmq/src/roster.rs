//! Who is in a group, as one member has heard it, and what each is to have. Members announce themselves
//! to each other; all compute the same shares from what was announced. Nothing is sent here.
//!
//! This decides who asks for a partition, not who gets messages: that is the server's to say. While two
//! members have heard different things, a partition is asked for by both, or by none, until the next
//! announcement.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::time::Duration;

use eventbus_core::{Share, Topic, TopicPartition, balance};
use tokio::time::Instant;

use crate::config::PARTITIONS_MAX;

/// How often a member announces itself, whether or not something has changed.
pub(crate) const BEAT: Duration = Duration::from_secs(1);
/// Who has not been heard for so long is gone.
const FORGOTTEN: Duration = Duration::from_secs(4);

/// Most partitions that a member may read, over all its topics: who announces more is no member of ours, and
/// each costs every member memory and time.
const PLACES_MAX: u32 = 64 * PARTITIONS_MAX;
/// Most other members that are known at a time; a further one is heard when one of them is gone.
const MEMBERS_MAX: usize = 1024;

/// The first line of an announcement.
const HEAD: &str = "eventbus-member 1";

/// What a member says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Announcement {
    /// Nobody else's.
    pub(crate) member: u64,
    /// When it joined, in milliseconds of its clock: only to put members in an order.
    pub(crate) joined: u64,
    /// It is leaving.
    pub(crate) is_leaving: bool,
    /// The topics it reads, with their partitions.
    pub(crate) topics: Vec<(Topic, u32)>,
    /// What it has and keeps, or is about to have.
    pub(crate) keeps: BTreeSet<TopicPartition>,
}

impl Announcement {
    /// As text, a line for each part, which an operator can read.
    pub(crate) fn write(&self) -> String {
        let mut text = format!("{HEAD}\nmember {:x}\njoined {}\n", self.member, self.joined);
        if self.is_leaving {
            text.push_str("leaving\n");
        }
        for (topic, partitions) in &self.topics {
            let _ = writeln!(text, "reads {topic} {partitions}");
        }
        for place in &self.keeps {
            let _ = writeln!(text, "keeps {} {}", place.topic, place.partition);
        }
        text
    }

    /// Reads what a member of this version has written; lines of a later one are passed over. Anybody may
    /// publish here: what no member would say is none.
    pub(crate) fn read(text: &[u8]) -> Option<Self> {
        let mut lines = std::str::from_utf8(text).ok()?.lines();
        if lines.next()? != HEAD {
            return None;
        }
        let (mut member, mut joined) = (None, None);
        let mut read = Self {
            member: 0,
            joined: 0,
            is_leaving: false,
            topics: Vec::new(),
            keeps: BTreeSet::new(),
        };
        for line in lines {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            let place = || {
                let (topic, number) = rest.split_once(' ')?;
                Some((Topic::new(topic).ok()?, number.parse::<u32>().ok()?))
            };
            match word {
                "member" => member = u64::from_str_radix(rest, 16).ok(),
                "joined" => joined = rest.parse().ok(),
                "leaving" => read.is_leaving = true,
                "reads" => read.topics.extend(place()),
                "keeps" => {
                    let place = place().map(|(topic, number)| TopicPartition::new(topic, number));
                    read.keeps.extend(place);
                }
                _ => {}
            }
        }
        (read.member, read.joined) = (member?, joined?);
        let counts = read.topics.iter().map(|(_, count)| u64::from(*count));
        let is_fit = counts.clone().all(|count| count <= PARTITIONS_MAX.into())
            && counts.sum::<u64>() <= PLACES_MAX.into()
            && read.keeps.len() <= PLACES_MAX as usize;
        is_fit.then_some(read)
    }
}

/// What hearing an announcement has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Nobody knew of this member.
    New,
    /// It has, or reads, something else than before.
    Changed,
    /// It is still there.
    Same,
    /// It is gone.
    Left,
}

/// The other members.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    others: HashMap<u64, (Announcement, Instant)>,
}

impl Roster {
    pub(crate) fn hear(&mut self, said: Announcement, now: Instant) -> Heard {
        if said.is_leaving {
            return match self.others.remove(&said.member) {
                Some(_) => Heard::Left,
                None => Heard::Same,
            };
        }
        let (member, keeps) = (said.member, said.clone());
        if self.others.len() >= MEMBERS_MAX && !self.others.contains_key(&member) {
            return Heard::Same;
        }
        match self.others.insert(member, (said, now)) {
            None => Heard::New,
            Some((before, _)) if before == keeps => Heard::Same,
            Some(_) => Heard::Changed,
        }
    }

    /// Strikes out who has not been heard for long. Says whether there was one.
    pub(crate) fn forget(&mut self, now: Instant) -> bool {
        let before = self.others.len();
        let is_here = |heard: Instant| now.duration_since(heard) < FORGOTTEN;
        self.others.retain(|_, (_, heard)| is_here(*heard));
        self.others.len() < before
    }

    /// When the next one is to be struck out, if it is not heard until then.
    pub(crate) fn forgets_at(&self) -> Option<Instant> {
        let heard = self.others.values().map(|(_, heard)| *heard).min();
        heard.map(|heard| heard + FORGOTTEN)
    }

    pub(crate) fn clear(&mut self) {
        self.others.clear();
    }

    /// What the member that says this of itself is to have.
    pub(crate) fn share(&self, me: &Announcement) -> BTreeSet<TopicPartition> {
        let others = self.others.values().map(|(said, _)| said);
        let mut members: Vec<_> = others.chain([me]).collect();
        members.sort_by_key(|said| (said.joined, said.member));
        let mut partitions: HashMap<&Topic, u32> = HashMap::new();
        for (topic, count) in members.iter().flat_map(|said| &said.topics) {
            let most = partitions.entry(topic).or_default();
            *most = (*most).max(*count);
        }
        let mut topics: Vec<_> = partitions.into_iter().collect();
        topics.sort();
        let mut shares = Vec::new();
        let mut places = Vec::new();
        for (number, (topic, count)) in topics.iter().enumerate() {
            for partition in 0..*count {
                let place = TopicPartition::new((*topic).clone(), partition);
                shares.push(Share {
                    topic: number,
                    holder: members.iter().position(|said| said.keeps.contains(&place)),
                });
                places.push(place);
            }
        }
        let may_read = |member: usize, topic: usize| {
            let (topic, _) = topics[topic];
            members[member].topics.iter().any(|(name, _)| name == topic)
        };
        let targets = balance(&shares, members.len(), may_read);
        let is_mine = |target: &Option<usize>| {
            target.is_some_and(|member| members[member].member == me.member)
        };
        let mine = places.into_iter().zip(&targets);
        mine.filter(|(_, target)| is_mine(target))
            .map(|(place, _)| place)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(member: u64, keeps: &[u32]) -> Announcement {
        let topic = Topic::from_static("orders");
        let keeps = keeps
            .iter()
            .map(|it| TopicPartition::new(topic.clone(), *it));
        Announcement {
            member,
            joined: 1000 + member,
            is_leaving: false,
            keeps: keeps.collect(),
            topics: vec![(topic, 6)],
        }
    }

    fn numbers(share: &BTreeSet<TopicPartition>) -> Vec<u32> {
        share.iter().map(|place| place.partition).collect()
    }

    #[test]
    fn an_announcement_comes_back_as_it_was() {
        for is_leaving in [false, true] {
            let mut said = said(0xff00, &[0, 5]);
            said.is_leaving = is_leaving;
            assert_eq!(Announcement::read(said.write().as_bytes()), Some(said));
        }
        for text in ["", "hello", "eventbus-member 2\nmember 1\njoined 1", HEAD] {
            assert_eq!(Announcement::read(text.as_bytes()), None, "{text:?}");
        }
        let said = |lines: &str| format!("{HEAD}\nmember 1\njoined 2\n{lines}");
        assert!(Announcement::read(said("reads t 1024\n").as_bytes()).is_some());
        for lines in [
            "reads t 1025\n",
            "reads t 4294967295\n",
            &"reads t 1024\n".repeat(65),
        ] {
            assert_eq!(Announcement::read(said(lines).as_bytes()), None, "{lines}");
        }
        let later = format!("{HEAD}\nmember 1\njoined 2\nmood good\n");
        assert!(Announcement::read(later.as_bytes()).is_some());
    }

    #[test]
    fn members_that_have_heard_the_same_share_all_there_is() {
        let now = Instant::now();
        let all = [said(1, &[0, 1, 2, 3, 4, 5]), said(2, &[]), said(3, &[])];
        let mut taken = Vec::new();
        for me in &all {
            let mut roster = Roster::default();
            for other in all.iter().filter(|other| other.member != me.member) {
                assert_eq!(roster.hear(other.clone(), now), Heard::New);
            }
            let share = numbers(&roster.share(me));
            assert_eq!(share.len(), 2);
            taken.extend(share);
        }
        taken.sort_unstable();
        assert_eq!(taken, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn no_more_members_are_known_than_there_can_be() {
        let now = Instant::now();
        let mut roster = Roster::default();
        for member in 0..MEMBERS_MAX as u64 {
            assert_eq!(roster.hear(said(member, &[]), now), Heard::New);
        }
        assert_eq!(roster.hear(said(5000, &[]), now), Heard::Same);
        assert_eq!(roster.hear(said(7, &[1]), now), Heard::Changed);
        let mut leaving = said(7, &[]);
        leaving.is_leaving = true;
        roster.hear(leaving, now);
        assert_eq!(roster.hear(said(5000, &[]), now), Heard::New);
    }

    #[test]
    fn what_a_member_keeps_stays_with_it() {
        let now = Instant::now();
        let mut roster = Roster::default();
        roster.hear(said(1, &[3, 4, 5]), now);
        assert_eq!(numbers(&roster.share(&said(2, &[0, 1, 2]))), [0, 1, 2]);
        // Of a place that two keep, the one that joined first has it.
        roster.hear(said(1, &[2, 3, 4, 5]), now);
        assert_eq!(numbers(&roster.share(&said(2, &[0, 1, 2]))).len(), 3);
    }

    #[test]
    fn who_leaves_or_falls_silent_is_struck_out() {
        let now = Instant::now();
        let mut roster = Roster::default();
        let me = said(9, &[]);
        roster.hear(said(1, &[0]), now);
        roster.hear(said(2, &[1]), now + BEAT);
        assert_eq!(roster.hear(said(2, &[1]), now + BEAT), Heard::Same);
        assert_eq!(roster.hear(said(2, &[2]), now + BEAT), Heard::Changed);
        assert!(!roster.forget(now + FORGOTTEN - BEAT));
        assert!(roster.forget(now + FORGOTTEN));
        let mut leaving = said(2, &[]);
        leaving.is_leaving = true;
        assert_eq!(roster.hear(leaving.clone(), now), Heard::Left);
        assert_eq!(roster.hear(leaving, now), Heard::Same);
        assert_eq!(roster.share(&me).len(), 6);
        assert_eq!(roster.forgets_at(), None);
    }

    #[test]
    fn only_who_reads_a_topic_gets_its_partitions() {
        let mut roster = Roster::default();
        let mut other = said(1, &[]);
        other.topics = vec![(Topic::from_static("payments"), 2)];
        roster.hear(other, Instant::now());
        assert_eq!(numbers(&roster.share(&said(2, &[]))), [0, 1, 2, 3, 4, 5]);
    }
}
