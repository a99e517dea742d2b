//! Members and relays: each is a process that joins, leaves or dies.

use std::sync::Arc;
use std::time::Duration;

use eventbus_core::{
    Breaker, Consumer, ConsumerState, DuplicateWindow, EventBus, Limits, OnPoison, Relay,
    RetryPolicy, Start,
};
use eventbus_verify::{Entry, Operation, Phase};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::handlers::{Watch, follow, work, work_in_unit};
use super::{FOLLOWERS, WORKERS, World};
use crate::case::Once;
use crate::journal::Journal;

/// Most members and most relays over one run.
const MEMBERS_MAX: u32 = 8;
/// The numbers of their processes begin here.
const FIRST_MEMBER: u32 = 10;
const FIRST_RELAY: u32 = 30;
/// No shutdown takes that long.
const NEVER: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// One process with a member of each group.
struct Process {
    number: u32,
    consumers: [Consumer; 2],
}

/// The processes that run, and those that are about to end.
#[derive(Default)]
pub(crate) struct Members {
    running: Vec<Process>,
    joined: u32,
    leaving: Vec<JoinHandle<Result<(), String>>>,
}

impl Members {
    pub(crate) async fn join(&mut self, world: &World) -> Result<(), String> {
        let number = FIRST_MEMBER + self.joined;
        self.joined += 1;
        let bus = world.bus(number);
        let watch = Watch {
            process: number,
            planned: Arc::clone(&world.planned),
            books: world.books.clone(),
            effects: world.effects.clone(),
            is_healed: Arc::clone(&world.is_healed),
        };
        let workers = workers(world, &bus, watch.clone()).await?;
        let followers = followers(world, &bus, watch).await?;
        self.running.push(Process {
            number,
            consumers: [workers, followers],
        });
        Ok(())
    }

    /// Lets another one join, unless there were very many.
    pub(crate) async fn join_more(&mut self, world: &World) -> Result<(), String> {
        match self.joined < MEMBERS_MAX {
            true => self.join(world).await,
            false => Ok(()),
        }
    }

    /// Tells a process to stop; it dies if that takes longer.
    pub(crate) fn leave(&mut self, world: &World, which: usize, dies_after: Option<Duration>) {
        if self.running.is_empty() {
            return;
        }
        let process = self.running.remove(which % self.running.len());
        let [workers, followers] = process.consumers;
        let number = process.number;
        let stop = |consumer: Consumer, journal: Arc<Journal>| {
            tokio::spawn(stop(consumer, journal, number, dies_after))
        };
        self.leaving
            .push(stop(workers, Arc::clone(&world.books.work)));
        self.leaving
            .push(stop(followers, Arc::clone(&world.books.followed)));
    }

    pub(crate) fn crash(&mut self, which: usize) {
        if !self.running.is_empty() {
            self.running.remove(which % self.running.len());
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// What the consumers are doing, where one does not run as it should.
    pub(crate) fn complaint(&self) -> Option<String> {
        let consumers = self.running.iter().flat_map(|process| &process.consumers);
        consumers
            .map(Consumer::status)
            .find_map(|status| match status.state {
                ConsumerState::Failed { error } => Some(format!("a consumer failed: {error}")),
                _ => None,
            })
    }

    /// What all of them are doing.
    pub(crate) fn status(&self) -> String {
        let consumers = self.running.iter().flat_map(|process| &process.consumers);
        let status: Vec<_> = consumers.map(Consumer::status).collect();
        format!("{status:#?}")
    }

    /// Stops all, and waits for everybody who is about to end.
    pub(crate) async fn end(&mut self, world: &World) -> Result<(), String> {
        while !self.running.is_empty() {
            self.leave(world, 0, None);
        }
        for leaving in std::mem::take(&mut self.leaving) {
            let ended = leaving.await;
            ended.map_err(|error| format!("a shutdown panicked: {error}"))??;
        }
        Ok(())
    }
}

async fn stop(
    consumer: Consumer,
    journal: Arc<Journal>,
    process: u32,
    dies_after: Option<Duration>,
) -> Result<(), String> {
    let group = super::Books::group_of(consumer.group().as_str());
    let entry = Entry::new(Operation::Drain).with_group(group);
    let session = journal.session();
    journal.note(process, session, Phase::Invoke, entry);
    let ended = timeout(dies_after.unwrap_or(NEVER), consumer.shutdown()).await;
    match (ended, dies_after) {
        (Ok(Ok(())), _) => {
            journal.note(process, session, Phase::Ok, entry);
            Ok(())
        }
        // Handlers were dropped at the deadline, or the broker was away: an end like any other.
        (Ok(Err(_)), _) | (Err(_), Some(_)) => Ok(()),
        (Err(_), None) => Err("a shutdown did not end in a week".to_owned()),
    }
}

async fn workers(world: &World, bus: &EventBus, watch: Watch) -> Result<Consumer, String> {
    let setting = &world.case.setting;
    let limits = Limits::default()
        .with_batch(setting.batch)
        .with_messages(setting.in_flight)
        .with_revoke_timeout(setting.revoke_timeout);
    let poison = match setting.parks {
        true => OnPoison::ParkKey,
        false => OnPoison::SkipKey,
    };
    let consumer = bus
        .consumer(WORKERS)
        .state(watch)
        .concurrency(setting.concurrency)
        .workers(setting.workers)
        .limits(limits)
        .start(Start::Earliest)
        .deadline(Duration::from_secs(600))
        .shutdown_timeout(setting.shutdown_timeout)
        .on_poison(poison)
        .retry(RetryPolicy::fixed(
            setting.attempts_max,
            setting.retry_delay,
        ))
        // It would hold on for good when only failing messages are left.
        .breaker(Breaker::default().with_failure_rate(2.0));
    let spawned = match setting.once {
        Once::Nothing => consumer.on(work).spawn().await,
        Once::Window => {
            let window = DuplicateWindow::new(world.duplicates.clone());
            consumer.duplicate_window(window).on(work).spawn().await
        }
        Once::Unit(_) => {
            let consumer = consumer.unit(world.work.clone());
            consumer.on(work_in_unit).spawn().await
        }
    };
    spawned.map_err(|error| format!("a consumer was refused: {error:?}"))
}

async fn followers(world: &World, bus: &EventBus, watch: Watch) -> Result<Consumer, String> {
    let consumer = bus
        .consumer(FOLLOWERS)
        .state(watch)
        .start(Start::Earliest)
        .deadline(Duration::from_secs(600))
        .shutdown_timeout(world.case.setting.shutdown_timeout)
        .breaker(Breaker::default().with_failure_rate(2.0))
        .unit(world.followed.clone())
        .on(follow);
    let spawned = consumer.spawn().await;
    spawned.map_err(|error| format!("a consumer was refused: {error:?}"))
}

/// The relays that run.
#[derive(Default)]
pub(crate) struct Relays {
    running: Vec<RunningRelay>,
    joined: u32,
    ending: Vec<JoinHandle<Result<(), String>>>,
}

struct RunningRelay {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), String>>,
}

impl Relays {
    pub(crate) fn join(&mut self, world: &World) {
        let number = FIRST_RELAY + self.joined;
        self.joined += 1;
        let relay = Relay::new(&world.bus(number), world.stores(number))
            .batch(world.case.setting.relay_batch)
            .lease_ttl(Duration::from_secs(2));
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            let signal = async {
                // A sender that is gone says the same.
                drop(stopped.await);
            };
            let ended = relay.run_until(signal).await;
            ended.map_err(|error| format!("a relay failed: {error:?}"))
        });
        self.running.push(RunningRelay { stop, task });
    }

    pub(crate) fn leave(&mut self, which: usize) {
        if !self.running.is_empty() {
            let relay = self.running.remove(which % self.running.len());
            drop(relay.stop);
            self.ending.push(relay.task);
        }
    }

    pub(crate) fn crash(&mut self, which: usize) {
        if !self.running.is_empty() {
            let relay = self.running.remove(which % self.running.len());
            relay.task.abort();
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Whether one has ended without being told to.
    pub(crate) fn has_failed(&self) -> bool {
        self.running.iter().any(|relay| relay.task.is_finished())
    }

    pub(crate) async fn end(&mut self) -> Result<(), String> {
        while !self.running.is_empty() {
            self.leave(0);
        }
        for ending in std::mem::take(&mut self.ending) {
            let ended = ending.await;
            ended.map_err(|error| format!("a relay panicked: {error}"))??;
        }
        Ok(())
    }
}
