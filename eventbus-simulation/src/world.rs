//! Runs a case: starts everybody, lets everything happen, heals, drains, and checks.

mod drain;
mod handlers;
mod members;
mod producers;
mod verdict;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use eventbus_core::{
    Clock, EventBus, KeyStateStore, MemoryBroker, MemoryConfig, MemoryUnit, ScheduleStore,
    Timestamp,
};
use eventbus_testkit::FaultyBroker;
use eventbus_verify::{Effect, Entry, Fault, Operation, Phase, Stamp};
use tokio::time::{Instant, sleep_until};

use crate::case::{Case, Happening, Once, Planned};
use crate::journal::Journal;
use crate::plant::{Bed, Plant, PlantedBroker, PlantedDuplicates, PlantedStores, PlantedUnit};
use crate::recording::Recording;
use crate::stores::Stores;
use handlers::Effects;
use members::{Members, Relays};

pub use verdict::Verdict;

/// The group that handles what producers publish, and the one that handles what it publishes.
pub(crate) const WORKERS: &str = "workers";
pub(crate) const FOLLOWERS: &str = "followers";
/// Their numbers in the ledgers.
pub(crate) const WORKERS_GROUP: u16 = 1;
pub(crate) const FOLLOWERS_GROUP: u16 = 2;

/// The ledgers of a run, one for each topic, whose messages other groups handle.
#[derive(Clone, Debug)]
pub(crate) struct Books {
    pub(crate) work: Arc<Journal>,
    pub(crate) followed: Arc<Journal>,
}

impl Books {
    fn new() -> Self {
        Self {
            work: Arc::new(Journal::new()),
            followed: Arc::new(Journal::new()),
        }
    }

    /// That of a topic.
    pub(crate) fn of(&self, topic: &str) -> &Journal {
        match topic.starts_with("followed") {
            true => &self.followed,
            false => &self.work,
        }
    }

    /// The number of a group; relays hold keys under a name of their own.
    pub(crate) fn group_of(name: &str) -> u16 {
        match name {
            WORKERS => WORKERS_GROUP,
            FOLLOWERS => FOLLOWERS_GROUP,
            _ => 3,
        }
    }
}

/// A date that follows virtual time.
#[derive(Debug)]
struct VirtualClock {
    begun: Instant,
}

impl Clock for VirtualClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(1_767_225_600_000_000).plus(self.begun.elapsed())
    }
}

/// Everything that outlives those who take part.
#[derive(Debug)]
pub(crate) struct World {
    case: Case,
    /// What the handler of each message does.
    planned: Arc<HashMap<Stamp, Planned>>,
    bed: Bed,
    books: Books,
    clock: Arc<dyn Clock>,
    broker: FaultyBroker,
    stores: Stores,
    work: PlantedUnit,
    followed: PlantedUnit,
    duplicates: PlantedDuplicates,
    /// What handlers without a unit of work did.
    effects: Effects,
    /// Whether poison can be handled now.
    is_healed: Arc<AtomicBool>,
}

impl World {
    fn new(case: Case, plant: Option<Plant>) -> Self {
        let bed = Bed::new(plant);
        let books = Books::new();
        let clock: Arc<dyn Clock> = Arc::new(VirtualClock {
            begun: Instant::now(),
        });
        let config = MemoryConfig::default()
            .like(case.setting.profile)
            .with_partitions(case.setting.partitions)
            .with_clock(Arc::clone(&clock));
        let broker = FaultyBroker::new(MemoryBroker::with(config), case.faults.clone());
        let unit = |group_max: usize| {
            // Process 0 is the database.
            let broker = client(&broker, &bed, 0, &books);
            let unit = MemoryUnit::on(Arc::new(broker), Vec::<Effect>::new());
            PlantedUnit::new(unit.with_group_max(group_max), bed.clone())
        };
        Self {
            work: unit(match case.setting.once {
                Once::Unit(group_max) => group_max,
                Once::Nothing | Once::Window => 1,
            }),
            followed: unit(1),
            duplicates: PlantedDuplicates::new(bed.clone()),
            stores: Stores::new(Arc::clone(&clock), books.clone()),
            planned: Arc::new(case.planned()),
            case,
            bed,
            books,
            clock,
            broker,
            effects: Effects::default(),
            is_healed: Arc::default(),
        }
    }

    /// The database as a process uses it.
    fn stores(&self, process: u32) -> Arc<PlantedStores> {
        let stores = self.stores.used_by(process);
        Arc::new(PlantedStores::new(stores, self.bed.clone()))
    }

    /// A bus of a process of its own.
    fn bus(&self, process: u32) -> EventBus {
        let stores = self.stores(process);
        let key_state: Arc<dyn KeyStateStore> = Arc::clone(&stores) as _;
        let schedule: Arc<dyn ScheduleStore> = stores;
        EventBus::builder(client(&self.broker, &self.bed, process, &self.books))
            .source("simulation")
            .clock(Arc::clone(&self.clock))
            .key_state(key_state)
            .schedule(schedule)
            .build()
    }

    async fn run(&self) -> Verdict {
        if !self.case.is_calm() {
            let fault = Entry::fault(Operation::FaultBegin, Fault::Other, 1);
            self.books.work.note(0, 0, Phase::Ok, fault);
            self.books.followed.note(0, 0, Phase::Ok, fault);
        }
        let mut members = Members::default();
        let mut relays = Relays::default();
        let result = self.live(&mut members, &mut relays).await;
        Verdict::of(self, result).await
    }

    async fn live(&self, members: &mut Members, relays: &mut Relays) -> Result<(), String> {
        for _ in 0..self.case.setting.members {
            members.join(self).await?;
        }
        for _ in 0..self.case.setting.relays {
            relays.join(self);
        }
        // So that the lanes have found their owners before the first message.
        tokio::time::sleep(Duration::from_millis(5)).await;
        let producers = producers::start(self);
        let begun = Instant::now();
        for (at, happening) in &self.case.happenings {
            sleep_until(begun + Duration::from_millis(*at)).await;
            self.befall(*happening, members, relays).await?;
        }
        producers.end().await?;
        self.drain(members, relays).await
    }

    async fn befall(
        &self,
        happening: Happening,
        members: &mut Members,
        relays: &mut Relays,
    ) -> Result<(), String> {
        match happening {
            Happening::Join => members.join_more(self).await?,
            Happening::Leave(which) => members.leave(self, which, None),
            Happening::LeaveAndCrash(which, after) => {
                members.leave(self, which, Some(Duration::from_millis(after)));
            }
            Happening::Crash(which) => members.crash(which),
            Happening::RelayJoin => relays.join(self),
            Happening::RelayLeave(which) => relays.leave(which),
            Happening::RelayCrash(which) => relays.crash(which),
            Happening::StoresAway(time) => self.stores.be_away(Duration::from_millis(time)),
            Happening::StoresLate(by) => self.stores.be_late(Duration::from_millis(by)),
            Happening::StoresUnanswered(calls) => self.stores.leave_unanswered(calls),
            Happening::UnitAway(times) => self.work.sound().fail_begin(times),
            Happening::CommitFails(times, applies) => {
                let fault = match applies {
                    true => eventbus_core::CommitFault::After,
                    false => eventbus_core::CommitFault::Before,
                };
                self.work.sound().fail_commit(times, fault);
            }
        }
        Ok(())
    }
}

/// A client of the broker for one process: the bug, then what notes the truth, then the faults.
fn client(broker: &FaultyBroker, bed: &Bed, process: u32, books: &Books) -> PlantedBroker {
    let recording = Recording::new(Arc::new(broker.connect()), process, books.clone());
    PlantedBroker::new(Arc::new(recording), bed.clone())
}

impl Case {
    /// Runs the case, with a bug or without, and says what of the promises it broke.
    ///
    /// Takes milliseconds, and does not depend on the time of the machine.
    ///
    /// # Panics
    ///
    /// Inside a tokio runtime: it has one of its own.
    #[must_use]
    pub fn run(&self, plant: Option<Plant>) -> Verdict {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime without sockets can be built");
        runtime.block_on(async { World::new(self.clone(), plant).run().await })
    }
}
