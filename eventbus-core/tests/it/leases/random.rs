//! Random lives of a group: whatever happens, nobody believes in a lease that the store has given
//! to another, and in the end everything is held, evenly.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use eventbus_core::{
    HeldLeases, Lease, LeaseConfig, LeaseRequest, LeaseSignal, LeaseStore, LeaseTopic, Leaseholder,
    MemberId, MemoryLeases, Topic, TopicPartition,
};
use proptest::bool::weighted;
use proptest::collection::vec;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_assert, prop_oneof, proptest};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::GROUP;
use super::wire::{Fault, Wire};

const TTL: Duration = Duration::from_secs(1);
const REVOKE_TIMEOUT: Duration = Duration::from_millis(500);
/// How often everybody is asked what it believes.
const TICK: Duration = Duration::from_millis(20);
const MEMBERS_MAX: usize = 6;
static TOPICS: [Topic; 2] = [Topic::from_static("orders"), Topic::from_static("parcels")];

#[derive(Clone, Debug)]
struct Case {
    partitions: u32,
    /// Changes are not told.
    deaf: bool,
    /// How long every reply is on its way.
    latency: Duration,
    steps: Vec<Step>,
}

#[derive(Clone, Debug)]
enum Step {
    /// A member that reads these topics, and gives back after this time what is revoked.
    Join(Reads, Duration),
    Leave(usize),
    Crash(usize),
    /// The owner does not listen.
    Stall(usize, Duration),
    Fail(usize, Fault, Duration),
    Wait(Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reads {
    Both,
    First,
    Second,
}

impl Reads {
    fn topics(self) -> &'static [Topic] {
        match self {
            Self::Both => &TOPICS,
            Self::First => &TOPICS[..1],
            Self::Second => &TOPICS[1..],
        }
    }
}

fn millis(range: std::ops::Range<u64>) -> impl Strategy<Value = Duration> {
    range.prop_map(Duration::from_millis)
}

fn any_fault() -> impl Strategy<Value = Fault> {
    // Not at all, so that it is waited for, or so that it is not.
    let delay =
        || prop_oneof![2 => Just(Duration::ZERO), 2 => millis(1..300), 1 => millis(300..1_500)];
    let late = (any::<bool>(), weighted(0.3), delay(), delay());
    let late = late.prop_map(|(deaf, mute, request, reply)| Fault {
        deaf,
        mute,
        request,
        reply,
        ..Fault::default()
    });
    let down = Just(Fault {
        down: true,
        ..Fault::default()
    });
    prop_oneof![late, down]
}

fn any_step() -> impl Strategy<Value = Step> {
    let reads =
        prop_oneof![3 => Just(Reads::Both), 1 => Just(Reads::First), 1 => Just(Reads::Second)];
    // At once, in time, or never.
    let answer = prop_oneof![Just(Duration::ZERO), millis(1..500), Just(TTL * 1_000)];
    let member = 0..MEMBERS_MAX;
    prop_oneof![
        3 => (reads, answer).prop_map(|(reads, answer)| Step::Join(reads, answer)),
        1 => member.clone().prop_map(Step::Leave),
        1 => member.clone().prop_map(Step::Crash),
        1 => (member.clone(), millis(0..2_500)).prop_map(|(member, time)| Step::Stall(member, time)),
        3 => (member, any_fault(), millis(0..3_000))
            .prop_map(|(member, fault, time)| Step::Fail(member, fault, time)),
        4 => millis(0..1_500).prop_map(Step::Wait),
    ]
}

fn any_case() -> impl Strategy<Value = Case> {
    let latency = prop_oneof![Just(Duration::ZERO), millis(1..150)];
    let case = (1..8u32, any::<bool>(), latency, vec(any_step(), 1..30));
    case.prop_map(|(partitions, deaf, latency, steps)| Case {
        partitions,
        deaf,
        latency,
        steps,
    })
}

/// A hundred cases, or as many as `PROPTEST_CASES` says.
fn config() -> ProptestConfig {
    let config = ProptestConfig {
        max_shrink_time: 60_000,
        ..ProptestConfig::default()
    };
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => config,
        None => ProptestConfig {
            cases: 100,
            ..config
        },
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_place_has_one_holder_whatever_happens_and_in_the_end_everything_is_held(case in any_case()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime can be made");
        let broken = runtime.block_on(live(&case));
        prop_assert!(broken.is_ok(), "{}", broken.unwrap_err());
    }
}

async fn live(case: &Case) -> Result<(), String> {
    let mut world = World {
        store: MemoryLeases::new(),
        observer: MemberId::random(),
        case,
        owners: Vec::new(),
        leaving: Vec::new(),
        granted: Arc::default(),
    };
    for step in &case.steps {
        world.take(step).await?;
    }
    world.join(Reads::Both, Duration::ZERO);
    world.pass(TTL * 20).await?;
    world.check_end()
}

/// What was granted, by place, as owners heard of it; and what was wrong with that.
#[derive(Debug, Default)]
struct Granted {
    epochs: BTreeMap<TopicPartition, u64>,
    broken: Option<String>,
}

impl Granted {
    fn note(&mut self, leases: &[Lease]) {
        for lease in leases {
            let before = self.epochs.insert(lease.place.clone(), lease.epoch);
            if before.is_some_and(|before| before >= lease.epoch) {
                self.broken = Some(format!("epoch: {lease:?} was granted after {before:?}"));
            }
        }
    }
}

struct World<'c> {
    store: MemoryLeases,
    /// Looks into the store, reads nothing.
    observer: MemberId,
    case: &'c Case,
    owners: Vec<Owner>,
    /// They were told to leave and may be about something else.
    leaving: Vec<Owner>,
    granted: Arc<Mutex<Granted>>,
}

/// A member with its owner, which is a task of its own.
struct Owner {
    member: MemberId,
    reads: Reads,
    held: HeldLeases,
    wire: Arc<Wire>,
    commands: mpsc::UnboundedSender<Command>,
    task: JoinHandle<Result<(), String>>,
}

enum Command {
    Stall(Duration),
    Leave,
}

impl World<'_> {
    async fn take(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Join(reads, answer) if self.owners.len() < MEMBERS_MAX => {
                self.join(*reads, *answer);
            }
            Step::Leave(member) if *member < self.owners.len() => {
                let owner = self.owners.remove(*member);
                owner.command(Command::Leave);
                self.leaving.push(owner);
            }
            Step::Crash(member) if *member < self.owners.len() => {
                self.owners.remove(*member).task.abort();
            }
            Step::Stall(member, time) if *member < self.owners.len() => {
                self.owners[*member].command(Command::Stall(*time));
            }
            Step::Fail(member, fault, time) if *member < self.owners.len() => {
                self.owners[*member].wire.fail(fault.clone(), *time);
            }
            Step::Wait(time) => self.pass(*time).await?,
            _ => {}
        }
        Ok(())
    }

    fn join(&mut self, reads: Reads, answer: Duration) {
        let fault = Fault {
            deaf: self.case.deaf,
            reply: self.case.latency,
            ..Fault::default()
        };
        let wire = Arc::new(Wire::new(&self.store, fault));
        let topics = reads.topics().iter().map(|name| LeaseTopic {
            name: name.clone(),
            partitions: self.case.partitions,
        });
        let config = LeaseConfig::new(GROUP, topics.collect())
            .with_ttl(TTL)
            .with_revoke_timeout(REVOKE_TIMEOUT);
        let leaseholder = Leaseholder::join(Arc::clone(&wire) as Arc<dyn LeaseStore>, config);
        let (commands, receiver) = mpsc::unbounded_channel();
        self.owners.push(Owner {
            member: leaseholder.member(),
            reads,
            held: leaseholder.held(),
            wire,
            commands,
            task: tokio::spawn(own(
                leaseholder,
                receiver,
                answer,
                Arc::clone(&self.granted),
            )),
        });
    }

    /// Lets time pass and asks everybody again and again.
    async fn pass(&self, time: Duration) -> Result<(), String> {
        for _ in 0..=time.as_millis() / TICK.as_millis() {
            self.check().await?;
            sleep(TICK).await;
        }
        self.check().await
    }

    /// Whoever believes to hold a place is the one that the store gave it to, in this epoch.
    async fn check(&self) -> Result<(), String> {
        if let Some(broken) = self.granted.lock().expect("no panic").broken.take() {
            return Err(broken);
        }
        let request = LeaseRequest::new(GROUP, self.observer, Vec::new(), TTL);
        let reply = self.store.exchange(&request).await.map_err(text)?;
        for owner in self.owners.iter().chain(&self.leaving) {
            let leases = reply.leases_of(owner.member);
            for place in self.places() {
                let Some(epoch) = owner.held.epoch(&place) else {
                    continue;
                };
                let lease = Lease { place, epoch };
                if !leases.contains(&lease) {
                    return Err(format!(
                        "holder: {} believes in {lease:?}: {reply:?}",
                        owner.member
                    ));
                }
            }
        }
        Ok(())
    }

    fn places(&self) -> impl Iterator<Item = TopicPartition> {
        let partitions = self.case.partitions;
        TOPICS.iter().flat_map(move |topic| {
            (0..partitions).map(move |number| TopicPartition::new(topic.clone(), number))
        })
    }

    fn check_end(&self) -> Result<(), String> {
        let mut loads: BTreeMap<Reads, BTreeSet<usize>> = BTreeMap::new();
        for owner in &self.owners {
            let load = self
                .places()
                .filter(|place| owner.held.epoch(place).is_some());
            loads.entry(owner.reads).or_default().insert(load.count());
        }
        let holds = |place: &TopicPartition| {
            self.owners
                .iter()
                .any(|owner| owner.held.epoch(place).is_some())
        };
        // The last one that joined reads both topics.
        if let Some(place) = self.places().find(|place| !holds(place)) {
            return Err(format!("end: nobody holds {place}"));
        }
        let is_even = |loads: &BTreeSet<usize>| {
            loads
                .last()
                .zip(loads.first())
                .is_none_or(|(most, least)| most - least <= 1)
        };
        if !loads.values().all(is_even) {
            return Err(format!("end: the shares are not even: {loads:?}"));
        }
        if let Some(owner) = self.owners.iter().find(|owner| owner.task.is_finished()) {
            return Err(format!("end: the owner {} ended", owner.member));
        }
        Ok(())
    }
}

impl Owner {
    fn command(&self, command: Command) {
        self.commands
            .send(command)
            .expect("an owner ends after its last command");
    }
}

/// What an owner does: notes what it is granted and gives back what is revoked.
async fn own(
    mut leaseholder: Leaseholder,
    mut commands: mpsc::UnboundedReceiver<Command>,
    answer: Duration,
    granted: Arc<Mutex<Granted>>,
) -> Result<(), String> {
    loop {
        let signal = tokio::select! {
            command = commands.recv() => match command {
                Some(Command::Stall(time)) => {
                    sleep(time).await;
                    continue;
                }
                Some(Command::Leave) => return leaseholder.close().await.map_err(text),
                None => return Err("nobody is there".to_owned()),
            },
            signal = leaseholder.next() => signal,
        };
        match signal {
            Ok(LeaseSignal::Granted(leases)) => granted.lock().expect("no panic").note(&leases),
            Ok(LeaseSignal::Revoking(places)) => {
                let held = leaseholder.held();
                tokio::spawn(async move {
                    sleep(answer).await;
                    held.release(&places);
                });
            }
            Ok(_) => {}
            Err(error) if error.is_retryable() => {}
            Err(error) => return Err(text(error)),
        }
    }
}

fn text(error: impl Debug) -> String {
    format!("{error:?}")
}
