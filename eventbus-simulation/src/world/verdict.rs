//! What a run came to: its ledgers are completed and checked.

use std::collections::BTreeMap;
use std::fmt;

use eventbus_core::{EventBus, MemoryProfile, Start, Topic, Until};
use eventbus_verify::{
    Bounds, Effect, Entry, History, Invariant, Ledger, Operation, Phase, Promises, Record, Stamp,
    check,
};

use super::handlers::following;
use super::{FOLLOWERS_GROUP, WORKERS_GROUP, World};
use crate::case::Once;
use crate::event::{self, FOLLOWED, WORK};
use crate::journal::Journal;

/// What of the promises a run broke, and how large it was.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Verdict {
    /// What was broken, each with what shows it.
    pub broken: Vec<String>,
    /// Messages that were published, also those that handlers published.
    pub messages: u64,
    /// Effects of handlers.
    pub effects: u64,
    /// Faults of the broker that happened.
    pub faults: u64,
}

impl Verdict {
    /// Whether everything was kept.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.broken.is_empty()
    }

    pub(super) async fn of(world: &World, result: Result<(), String>) -> Self {
        let mut verdict = Self {
            broken: result.err().into_iter().collect(),
            faults: world.broker.happened() as u64,
            ..Self::default()
        };
        let work = match world.case.setting.once {
            Once::Unit(_) => world.work.sound().state().await,
            Once::Nothing | Once::Window => world.effects.lock().clone(),
        };
        let followed = world.followed.sound().state().await;
        complete_following(world, &work);
        for (journal, topic) in [(&world.books.work, WORK), (&world.books.followed, FOLLOWED)] {
            if let Err(error) = reread(world, journal, topic).await {
                verdict
                    .broken
                    .push(format!("the final reading failed: {error:?}"));
            }
        }
        let bounds = match world.case.is_calm() {
            // Nothing is handed out twice without a reason.
            true => Bounds::default().with_in_flight_max(0),
            false => Bounds::default(),
        };
        let promises = Promises::to([WORKERS_GROUP]).with_bounds(bounds.clone());
        let promises = match world.case.is_once() {
            true => promises,
            false => promises.without(Invariant::EffectOnce),
        };
        verdict.check(&world.books.work.ledger(), work, &promises);
        let promises = Promises::to([FOLLOWERS_GROUP]).with_bounds(bounds);
        verdict.check(&world.books.followed.ledger(), followed, &promises);
        verdict
    }

    fn check(&mut self, ledger: &Ledger, mut effects: Vec<Effect>, promises: &Promises) {
        self.effects += effects.len() as u64;
        for (order, effect) in (0..).zip(&mut effects) {
            effect.order = order;
        }
        let history = History::new(ledger, effects.clone());
        let mut stamps: Vec<Stamp> = ledger
            .records()
            .iter()
            .filter_map(|record| record.entry.stamp)
            .collect();
        stamps.sort_unstable();
        stamps.dedup();
        self.messages += stamps.len() as u64;
        let mut found = promises.clone().without(Invariant::NoLoss).check(&history);
        // Everything that was parked was tried again, and is handled now.
        let unparked = ledger.records().iter().copied();
        let unparked = unparked.filter(|record| record.entry.operation != Operation::Park);
        let unparked = Ledger::from_records(event::RUN, unparked.collect());
        let history = History::new(&unparked, effects);
        let lost = check::no_loss(&history, &promises.groups);
        found.push((Invariant::NoLoss, lost));
        for (_, violations) in found {
            let examples = violations.examples().iter().take(3);
            self.broken.extend(examples.map(ToString::to_string));
        }
    }
}

/// Says what became of what handlers published. What is part of a commit is published if, and only
/// if, the effect is; without a unit of work, the message is not settled before.
fn complete_following(world: &World, effects: &[Effect]) {
    let journal = &world.books.followed;
    let open = open_tries(&journal.records());
    for (stamp, (process, session)) in open {
        let is_committed = effects
            .iter()
            .filter_map(|effect| effect.id.origin())
            .any(|(_, cause)| following(cause) == stamp);
        let phase = match (is_committed, world.case.setting.once) {
            (true, _) => Phase::Ok,
            (false, Once::Unit(_)) => Phase::Fail,
            (false, _) => Phase::Unknown,
        };
        let entry = Entry::of(Operation::Publish, stamp);
        journal.note(process, session, phase, entry);
    }
}

/// The last try of each message that never said how it ended.
fn open_tries(records: &[Record]) -> BTreeMap<Stamp, (u32, u32)> {
    let mut open = BTreeMap::new();
    for record in records {
        let (Operation::Publish, Some(stamp)) = (record.entry.operation, record.entry.stamp) else {
            continue;
        };
        let of = (record.process, record.session);
        match record.phase {
            Phase::Invoke => {
                open.insert(stamp, of);
            }
            _ if open.get(&stamp) == Some(&of) => {
                open.remove(&stamp);
            }
            _ => {}
        }
    }
    open
}

/// Reads all that the broker has, where it keeps it.
async fn reread(world: &World, journal: &Journal, topic: Topic) -> eventbus_core::Result<()> {
    if world.case.setting.profile == MemoryProfile::RabbitMq {
        return Ok(());
    }
    let bus = EventBus::new(world.broker.connect());
    let entry = Entry::new(Operation::Reread);
    let session = journal.session();
    journal.note(0, session, Phase::Invoke, entry);
    let mut reader = bus
        .read(&[topic], Start::Earliest, Some(Until::Now))
        .await?;
    while let Some(record) = reader.next().await? {
        if let Some((stamp, checksum)) = event::read(&record.message) {
            let stored = Entry::of(Operation::Stored, stamp).with_checksum(checksum);
            journal.note(0, session, Phase::Ok, stored);
        }
    }
    journal.note(0, session, Phase::Ok, entry);
    Ok(())
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for broken in &self.broken {
            writeln!(f, "{broken}")?;
        }
        write!(
            f,
            "{} messages, {} effects, {} faults, {} promises broken",
            self.messages,
            self.effects,
            self.faults,
            self.broken.len()
        )
    }
}
