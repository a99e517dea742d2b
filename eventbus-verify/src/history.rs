//! A ledger and the effects of the tried system, sorted by message: what the checks go through.

use std::collections::{HashMap, HashSet};

use crate::ledger::Ledger;
use crate::record::{Operation, Phase, Record};
use crate::stamp::{MessageId, Stamp};

/// A row that a handler wrote within the transaction that is tried: the truth about what was
/// processed, whatever the ledger says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Effect {
    /// The group whose handler it was.
    pub group: u16,
    /// The id the event had.
    pub id: MessageId,
    /// The key the event had.
    pub key: u32,
    /// The number the event had within its key.
    pub key_seq: u32,
    /// Which attempt it was.
    pub attempt: u16,
    /// In which order the rows of a group and key were committed; such as a number that the table
    /// counts up, since the transactions of a key never overlap where order is promised.
    pub order: u64,
}

impl Effect {
    /// The message that its id says it is of.
    fn stamp(&self) -> Option<Stamp> {
        self.id.origin().map(|(_, stamp)| stamp)
    }
}

/// What a run left: the ledger, and the effects that the caller read out of the tried system.
///
/// Built in n log n. Besides the 88 bytes a record of the ledger it takes 4 for each record and 48 for
/// each effect; what a check takes on top of that, it says, and one check runs at a time. So 100
/// million records with 10 million effects are 10 GB; who tries more begins a new ledger now and
/// then, when everything is drained.
#[derive(Debug)]
pub struct History<'a> {
    ledger: &'a Ledger,
    /// Which records speak of a message, by message, and in order of time.
    by_message: Vec<u32>,
    /// Those of this run, by message, group and order.
    effects: Vec<Effect>,
    /// Those whose id no message of this run has.
    foreign: Vec<Effect>,
    commits: HashMap<(u32, u64), Commit>,
    gaps: Gaps,
}

/// What became of a transaction.
#[derive(Clone, Copy, Debug)]
struct Commit {
    /// Where the attempt to commit is in the ledger.
    invoke: usize,
    /// Where what is known of it ends.
    last: usize,
    outcome: Outcome,
}

/// What became of a try, in Jepsen's three values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Ok,
    Fail,
    Unknown,
}

impl<'a> History<'a> {
    /// Sorts a ledger and the effects there are.
    ///
    /// # Panics
    ///
    /// When the ledger has more than four billion records.
    #[must_use]
    pub fn new(ledger: &'a Ledger, effects: impl IntoIterator<Item = Effect>) -> Self {
        let records = ledger.records();
        u32::try_from(records.len()).expect("a ledger has at most four billion records");
        let mut by_message: Vec<u32> = (0..records.len() as u32)
            .filter(|index| records[*index as usize].entry.stamp.is_some())
            .collect();
        by_message.sort_unstable_by_key(|index| (records[*index as usize].entry.stamp, *index));

        let is_ours = |effect: &Effect| {
            let origin = effect.id.origin();
            origin.is_some_and(|(run, _)| run == ledger.run())
        };
        let (mut effects, foreign): (Vec<_>, Vec<_>) = effects.into_iter().partition(is_ours);
        effects.sort_unstable_by_key(|effect| (effect.stamp(), effect.group, effect.order));
        Self {
            ledger,
            by_message,
            effects,
            foreign,
            commits: commits(records),
            gaps: Gaps::of(records),
        }
    }

    /// The ledger.
    #[must_use]
    pub fn ledger(&self) -> &'a Ledger {
        self.ledger
    }

    /// How many effects there are, those of other runs not counted.
    #[must_use]
    pub fn effects_count(&self) -> usize {
        self.effects.len()
    }

    /// Those whose id no message of this run has.
    pub(crate) fn foreign(&self) -> &[Effect] {
        &self.foreign
    }

    /// The records with their place in the ledger, in order of time.
    pub(crate) fn records(&self) -> impl Iterator<Item = (usize, &'a Record)> + use<'a> {
        self.ledger.records().iter().enumerate()
    }

    pub(crate) fn record(&self, index: usize) -> &'a Record {
        &self.ledger.records()[index]
    }

    /// Every message that a record or an effect speaks of, by producer, key and number.
    pub(crate) fn messages(&self) -> Messages<'_> {
        Messages {
            history: self,
            records: &self.by_message,
            effects: &self.effects,
        }
    }

    /// One of them.
    pub(crate) fn message(&self, stamp: Stamp) -> Message<'_> {
        let stamp_of = |index: &u32| self.record(*index as usize).entry.stamp;
        let from = self
            .by_message
            .partition_point(|index| stamp_of(index) < Some(stamp));
        let first = self
            .effects
            .partition_point(|effect| effect.stamp() < Some(stamp));
        let mut messages = Messages {
            history: self,
            records: &self.by_message[from..],
            effects: &self.effects[first..],
        };
        messages.next_of(stamp)
    }

    /// Whether a group was told that what is at this position vanished.
    pub(crate) fn is_in_gap(&self, group: u16, place: u32, position: u64) -> bool {
        self.gaps.holds(group, place, position)
    }

    /// Whether anybody was.
    pub(crate) fn is_in_any_gap(&self, place: u32, position: u64) -> bool {
        let mut groups = self.gaps.groups.iter();
        groups.any(|group| self.gaps.holds(*group, place, position))
    }

    /// Between which places in the ledger a transaction was committed.
    pub(crate) fn commit_range(&self, process: u32, number: u64) -> Option<(usize, usize)> {
        let commit = self.commit(process, Some(number))?;
        Some((commit.invoke, commit.last))
    }

    fn commit(&self, process: u32, transaction: Option<u64>) -> Option<Commit> {
        self.commits.get(&(process, transaction?)).copied()
    }
}

fn commits(records: &[Record]) -> HashMap<(u32, u64), Commit> {
    let mut commits: HashMap<(u32, u64), Commit> = HashMap::new();
    for (index, record) in records.iter().enumerate() {
        let (Operation::Commit, Some(number)) = (record.entry.operation, record.entry.position)
        else {
            continue;
        };
        let commit = commits.entry((record.process, number)).or_insert(Commit {
            invoke: index,
            last: index,
            outcome: Outcome::Unknown,
        });
        commit.last = index;
        match record.phase {
            Phase::Ok => commit.outcome = Outcome::Ok,
            Phase::Fail => commit.outcome = Outcome::Fail,
            Phase::Invoke | Phase::Unknown => {}
        }
    }
    commits
}

/// Goes through messages in order.
#[derive(Clone, Debug)]
pub(crate) struct Messages<'h> {
    history: &'h History<'h>,
    records: &'h [u32],
    effects: &'h [Effect],
}

impl<'h> Messages<'h> {
    fn next_of(&mut self, stamp: Stamp) -> Message<'h> {
        let history = self.history;
        let is_of = |index: &u32| history.record(*index as usize).entry.stamp == Some(stamp);
        let (records, rest) = split_while(self.records, is_of);
        self.records = rest;
        let (effects, rest) = split_while(self.effects, |effect| effect.stamp() == Some(stamp));
        self.effects = rest;
        Message {
            history,
            stamp,
            indices: records,
            effects,
        }
    }
}

impl<'h> Iterator for Messages<'h> {
    type Item = Message<'h>;

    fn next(&mut self) -> Option<Message<'h>> {
        let recorded = self.records.first();
        let recorded = recorded.and_then(|at| self.history.record(*at as usize).entry.stamp);
        let effected = self.effects.first().and_then(Effect::stamp);
        let stamp = match (recorded, effected) {
            (Some(one), Some(other)) => one.min(other),
            (one, other) => one.or(other)?,
        };
        Some(self.next_of(stamp))
    }
}

fn split_while<T>(slice: &[T], belongs: impl Fn(&T) -> bool) -> (&[T], &[T]) {
    let end = slice.iter().position(|one| !belongs(one));
    slice.split_at(end.unwrap_or(slice.len()))
}

/// All that is known of a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'h> {
    history: &'h History<'h>,
    pub(crate) stamp: Stamp,
    indices: &'h [u32],
    /// By group and order.
    pub(crate) effects: &'h [Effect],
}

impl<'h> Message<'h> {
    /// Its records with their place in the ledger, in order of time.
    pub(crate) fn records(self) -> impl Iterator<Item = (usize, &'h Record)> {
        self.indices.iter().map(move |index| {
            let index = *index as usize;
            (index, self.history.record(index))
        })
    }

    /// Whether something is recorded as done, in a group.
    pub(crate) fn was(self, operation: Operation, group: u16) -> bool {
        self.records().any(|(_, record)| {
            record.entry.operation == operation
                && record.entry.group == group
                && record.phase == Phase::Ok
        })
    }

    pub(crate) fn has_effect(self, group: u16) -> bool {
        self.effects.iter().any(|effect| effect.group == group)
    }

    /// Whether it was somewhere that a group was told has vanished.
    pub(crate) fn is_in_gap(self, group: u16) -> bool {
        if !self.history.gaps.groups.contains(&group) {
            return false;
        }
        let mut places = self.places();
        places.any(|(place, position)| self.history.is_in_gap(group, place, position))
    }

    pub(crate) fn is_in_any_gap(self) -> bool {
        let mut places = self.places();
        places.any(|(place, position)| self.history.is_in_any_gap(place, position))
    }

    /// Where the broker has it, or had it.
    fn places(self) -> impl Iterator<Item = (u32, u64)> + use<'h> {
        self.records().filter_map(|(_, record)| place_of(record))
    }

    /// The calls that tried to bring it into the system, in order of time.
    pub(crate) fn tries(self) -> Vec<Try> {
        let mut tries: Vec<Try> = Vec::new();
        for (index, record) in self.records() {
            if !matches!(
                record.entry.operation,
                Operation::Publish | Operation::Append
            ) {
                continue;
            }
            if record.phase == Phase::Invoke {
                tries.push(self.begun(index, record));
                continue;
            }
            let belongs = |one: &&mut Try| {
                let invoke = self.history.record(one.invoke);
                one.end.is_none()
                    && invoke.process == record.process
                    && invoke.session == record.session
                    && invoke.entry.operation == record.entry.operation
            };
            if let Some(found) = tries.iter_mut().rev().find(belongs) {
                found.end = Some(index);
                found.said = match record.phase {
                    Phase::Ok => Outcome::Ok,
                    Phase::Fail => Outcome::Fail,
                    Phase::Invoke | Phase::Unknown => Outcome::Unknown,
                };
            }
        }
        tries
    }

    fn begun(self, index: usize, record: &Record) -> Try {
        let commit = (record.entry.operation == Operation::Append)
            .then(|| self.history.commit(record.process, record.entry.position));
        Try {
            invoke: index,
            end: None,
            said: Outcome::Unknown,
            checksum: record.entry.checksum,
            commit,
        }
    }

    pub(crate) fn fate(self) -> Fate {
        Fate::of(&self.tries())
    }
}

/// Where a record says its message is. Other operations use the position for something else.
pub(crate) fn place_of(record: &Record) -> Option<(u32, u64)> {
    let entry = &record.entry;
    let tells = matches!(
        entry.operation,
        Operation::Publish | Operation::Deliver | Operation::Stored
    );
    let position = entry
        .position
        .filter(|_| tells && record.phase == Phase::Ok)?;
    Some((entry.place, position))
}

/// One call that tried to bring a message into the system.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Try {
    /// Where it begins in the ledger.
    pub(crate) invoke: usize,
    /// Where it ends, if it does.
    pub(crate) end: Option<usize>,
    /// What the caller was told of it.
    said: Outcome,
    pub(crate) checksum: u32,
    /// Of an append: its transaction, and whether anybody tried to commit it.
    commit: Option<Option<Commit>>,
}

impl Try {
    pub(crate) fn is_publish(&self) -> bool {
        self.commit.is_none()
    }

    /// What became of it. An append is what its transaction is; one that nobody tried to commit is
    /// surely not done, because an invoke is written before the call.
    pub(crate) fn outcome(&self) -> Outcome {
        match (self.said, self.commit) {
            (said, None) => said,
            (Outcome::Fail, Some(_)) | (_, Some(None)) => Outcome::Fail,
            (Outcome::Ok, Some(Some(commit))) => commit.outcome,
            (Outcome::Unknown, Some(Some(commit))) => match commit.outcome {
                Outcome::Fail => Outcome::Fail,
                Outcome::Ok | Outcome::Unknown => Outcome::Unknown,
            },
        }
    }

    /// Before which place in the ledger nobody else can have seen it.
    fn visible_from(&self) -> usize {
        match self.commit {
            Some(Some(commit)) => commit.invoke,
            _ => self.invoke,
        }
    }
}

/// What all tries of a message come to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fate {
    /// Ok if one was, fail if all were.
    pub(crate) outcome: Option<Outcome>,
    /// Where the first try begins.
    pub(crate) first_invoke: Option<usize>,
    /// Where the first try begins that was ok.
    pub(crate) ok_invoke: Option<usize>,
    /// Before which place in the ledger nobody can have seen it; unless all tries failed.
    pub(crate) visible_from: Option<usize>,
    /// The checksum of its payload, if a try says one.
    pub(crate) checksum: u32,
    /// How many copies of it there may be without anybody handing out one twice.
    pub(crate) copies: usize,
}

impl Fate {
    fn of(tries: &[Try]) -> Self {
        let oks = || tries.iter().filter(|one| one.outcome() == Outcome::Ok);
        let possible = || tries.iter().filter(|one| one.outcome() != Outcome::Fail);
        let outcome = match (oks().next(), possible().next(), tries.first()) {
            (Some(_), _, _) => Some(Outcome::Ok),
            (None, Some(_), _) => Some(Outcome::Unknown),
            (None, None, Some(_)) => Some(Outcome::Fail),
            (None, None, None) => None,
        };
        Self {
            outcome,
            first_invoke: tries.first().map(|one| one.invoke),
            ok_invoke: oks().next().map(|one| one.invoke),
            visible_from: possible().map(Try::visible_from).min(),
            checksum: tries.iter().map(|one| one.checksum).max().unwrap_or(0),
            copies: possible().count(),
        }
    }
}

/// The positions that groups were told have vanished.
#[derive(Debug)]
struct Gaps {
    /// From and until, without overlap and sorted, by group and place.
    ranges: HashMap<(u16, u32), Vec<(u64, u64)>>,
    groups: HashSet<u16>,
}

impl Gaps {
    fn of(records: &[Record]) -> Self {
        let mut told: HashMap<(u16, u32), Vec<(u64, u64)>> = HashMap::new();
        for record in records {
            let entry = &record.entry;
            if let (Operation::Gap, Some(from)) = (entry.operation, entry.position) {
                let until = from.saturating_add(u64::from(entry.detail));
                let ranges = told.entry((entry.group, entry.place)).or_default();
                ranges.push((from, until));
            }
        }
        for ranges in told.values_mut() {
            ranges.sort_unstable();
            ranges.dedup_by(|next, before| {
                let overlaps = next.0 <= before.1;
                if overlaps {
                    before.1 = before.1.max(next.1);
                }
                overlaps
            });
        }
        Self {
            groups: told.keys().map(|(group, _)| *group).collect(),
            ranges: told,
        }
    }

    fn holds(&self, group: u16, place: u32, position: u64) -> bool {
        let Some(ranges) = self.ranges.get(&(group, place)) else {
            return false;
        };
        let after = ranges.partition_point(|(from, _)| *from <= position);
        after > 0 && position < ranges[after - 1].1
    }
}
