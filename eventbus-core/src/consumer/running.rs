//! A consumer that runs: its tasks, its status, and how it ends.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::Runtime;
use super::departure::Departure;
use super::dispatch::Layers;
use super::held::Keeper;
use super::lanes::LaneStatus;
use super::pump::Pump;
use super::settler::{self, SettleItem};
use super::telemetry::Counts;
use super::worker::{Inbox, Item, Worker};
use crate::broker::Deliveries;
use crate::clock::FOREVER;
use crate::coalescer::Coalescer;
use crate::dead_letter::DeadLetters;
use crate::delivery::Subscription;
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Group, Topic};

/// A consumer that runs. Dropping it is a crash: handlers are dropped, nothing more is settled, and
/// what was unsettled is handed out again; end it with [`shutdown`](Self::shutdown).
///
/// # Examples
///
/// ```
/// # use eventbus_macros::Event;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(crate = "eventbus_core", type = "OrderCreated", topic = "order-events", key = "order_id")]
/// # struct OrderCreated { order_id: u64 }
/// use eventbus_core::{ConsumerState, Context, EventBus, MemoryBroker};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let bus = EventBus::new(MemoryBroker::new());
/// let consumer = bus.consumer("billing").on(async |_: OrderCreated, _: Context| Ok(())).spawn().await?;
/// assert_eq!(consumer.status().state, ConsumerState::Running);
/// consumer.pause();
/// assert_eq!(consumer.status().state, ConsumerState::Paused);
/// consumer.resume();
/// let asked_to_end = async { /* a signal */ };
/// consumer.run_until(asked_to_end).await?;
/// # Ok::<(), eventbus_core::Error>(())
/// # }).unwrap();
/// ```
#[derive(Debug)]
#[must_use = "a dropped consumer stops at once: keep it, `let consumer = …`, and end it with `.shutdown().await`"]
pub struct Consumer {
    runtime: Arc<Runtime>,
    inboxes: Vec<Arc<Inbox>>,
    settler: Coalescer<SettleItem>,
    stop_pump: watch::Sender<bool>,
    ended: watch::Receiver<bool>,
    workers: JoinSet<()>,
    settling: AbortOnDrop<()>,
    /// Brings held messages; where the bus has a store of them.
    keeping: Option<AbortOnDrop<()>>,
    /// Renews claims; where the consumer has a duplicate window.
    claiming: Option<AbortOnDrop<()>>,
    pumping: AbortOnDrop<Option<Box<dyn Deliveries>>>,
}

/// A task that ends with its handle.
#[derive(Debug)]
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a consumer is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConsumerState {
    /// It handles what comes.
    Running,
    /// It was told to pause.
    Paused,
    /// It would only fail, and probes with single messages until it does not.
    Holding {
        /// Why.
        reason: String,
    },
    /// It met an error that trying again does not help against, and waits for its end.
    Failed {
        /// The error.
        error: String,
    },
}

/// What [`Consumer::status`] shows.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConsumerStatus {
    /// What it is doing.
    pub state: ConsumerState,
    /// Its lanes, by topic and partition.
    pub lanes: Vec<LaneStatus>,
    /// Keys and single messages that are put aside in the store of held keys, on its lanes.
    pub held: usize,
    /// What it has counted.
    pub counts: Counts,
}

/// How long a broker has to answer at the end, however late it is.
const ANSWER_MIN: Duration = Duration::from_secs(1);

/// Joins and starts all tasks.
pub(crate) async fn start<V: Layers>(
    runtime: Arc<Runtime>,
    subscription: Subscription,
    service: V,
) -> Result<Consumer> {
    let member = runtime.bus.broker().subscribe(subscription).await?;
    tracing::info!(group = %runtime.group, "consumer joined");
    let activity = runtime.bus.shared_activity();

    let settler_part = activity.part();
    let (settler, flushes) = Coalescer::for_part(Some(Arc::clone(&settler_part)));
    let settling = guard(
        &runtime,
        settler::run(
            Arc::clone(&runtime),
            settler_part,
            flushes,
            member.settlement,
        ),
    );

    let mut workers = JoinSet::new();
    let mut inboxes = Vec::new();
    // More workers than runs would leave some without a slot.
    let count = runtime.settings.workers.min(runtime.settings.concurrency);
    for index in 0..count {
        let part = activity.part();
        let inbox = Arc::new(Inbox::new(Arc::clone(&part)));
        let number = runtime.gate.add_worker(Arc::clone(&inbox));
        let slots = runtime.settings.concurrency / count
            + usize::from(index < runtime.settings.concurrency % count);
        let worker = Worker::new(
            Arc::clone(&runtime),
            Arc::clone(&inbox),
            part,
            settler.clone(),
            (number, slots),
            &service,
        );
        let watched = Arc::clone(&runtime);
        workers.spawn(async move {
            let fall = Fall(Some(watched));
            worker.run().await;
            fall.caught();
        });
        inboxes.push(inbox);
    }

    if runtime.replay.is_none() {
        runtime.bus.start_schedule();
    }
    let keeping = runtime.held.as_ref().map(|held| {
        runtime.bus.add_keeper(held);
        let keeper = Keeper::new(Arc::clone(&runtime), Arc::clone(held), inboxes.clone());
        guard(&runtime, keeper.run())
    });

    let claiming = runtime
        .claims
        .as_ref()
        .map(|claims| guard(&runtime, Arc::clone(claims).keep()));

    let (stop_pump, stop) = watch::channel(false);
    let (ended_sender, ended) = watch::channel(false);
    let pump = Pump::new(
        Arc::clone(&runtime),
        inboxes.clone(),
        settler.clone(),
        ended_sender,
    );
    let watched = Arc::clone(&runtime);
    let pumping = AbortOnDrop(tokio::spawn(async move {
        let fall = Fall(Some(Arc::clone(&watched)));
        let (deliveries, result) = pump.run(member.deliveries, stop).await;
        fall.caught();
        if let Err(error) = result {
            watched.fail(error);
        }
        Some(deliveries)
    }));
    Ok(Consumer {
        runtime,
        inboxes,
        settler,
        stop_pump,
        ended,
        workers,
        settling,
        keeping,
        claiming,
        pumping,
    })
}

/// Spawns a part of a consumer whose error is the consumer's.
fn guard(
    runtime: &Arc<Runtime>,
    part: impl Future<Output = Result<()>> + Send + 'static,
) -> AbortOnDrop<()> {
    let watched = Arc::clone(runtime);
    AbortOnDrop(tokio::spawn(async move {
        let fall = Fall(Some(Arc::clone(&watched)));
        let result = part.await;
        fall.caught();
        if let Err(error) = result {
            watched.fail(error);
        }
    }))
}

/// Fails the consumer when a part of it panics, so that nobody waits for it in vain.
struct Fall(Option<Arc<Runtime>>);

impl Fall {
    fn caught(mut self) {
        self.0 = None;
    }
}

impl Drop for Fall {
    fn drop(&mut self) {
        if let Some(runtime) = &self.0
            && std::thread::panicking()
        {
            runtime.fail(Error::new(
                ErrorKind::Internal,
                "run consumer",
                "a part of it panicked: this is a bug of the SDK or of a layer",
            ));
        }
    }
}

impl Runtime {
    pub(crate) fn status(&self) -> ConsumerStatus {
        let state = if let Some(error) = self.failure_text() {
            ConsumerState::Failed { error }
        } else if self.gate.is_paused() {
            ConsumerState::Paused
        } else if let Some(reason) = self.gate.held_because() {
            ConsumerState::Holding { reason }
        } else {
            ConsumerState::Running
        };
        ConsumerStatus {
            state,
            lanes: self.lanes.status(),
            held: self.held.as_ref().map_or(0, |held| held.count()),
            counts: self.telemetry.counts(),
        }
    }
}

impl Consumer {
    /// Its group.
    pub fn group(&self) -> &Group {
        &self.runtime.group
    }

    /// The topics it consumes, by the names that the bus takes: without the prefix of the
    /// environment.
    pub fn topics(&self) -> &[Topic] {
        &self.runtime.topics
    }

    /// The dead letters it and other members of its group left.
    pub fn dead_letters(&self) -> DeadLetters {
        DeadLetters::new(
            self.runtime.bus.clone(),
            self.runtime.group.clone(),
            self.runtime.broker_topics.clone(),
        )
    }

    /// What it is doing, what is in flight, what was counted. Never blocks.
    pub fn status(&self) -> ConsumerStatus {
        self.runtime.status()
    }

    /// What is left to look at when somebody else runs it.
    pub(crate) fn runtime(&self) -> &Arc<Runtime> {
        &self.runtime
    }

    /// Starts no more handlers until [`resume`](Self::resume); those that run end. It stays a member
    /// of its group and keeps its lanes.
    pub fn pause(&self) {
        self.runtime.gate.set_paused(true);
    }

    /// Ends a pause.
    pub fn resume(&self) {
        self.runtime.gate.set_paused(false);
    }

    /// Runs until `signal` resolves, then shuts down.
    ///
    /// # Errors
    ///
    /// What ended the consumer before, or what its shutdown met.
    pub async fn run_until(self, signal: impl Future<Output = ()>) -> Result<()> {
        tokio::select! {
            () = signal => {}
            () = self.runtime.failed() => {}
        }
        self.shutdown().await
    }

    /// As [`run_until`](Self::run_until), with handlers that end until the instant that `signal`
    /// gives, where that comes before the shutdown timeout.
    pub(crate) async fn run_until_deadline(
        self,
        signal: impl Future<Output = Instant>,
    ) -> Result<()> {
        let deadline = tokio::select! {
            deadline = signal => Some(deadline),
            () = self.runtime.failed() => None,
        };
        let own = Instant::now() + self.runtime.settings.shutdown_timeout;
        let deadline = deadline.map_or(own, |deadline| deadline.min(own));
        self.stop(deadline, false).await.map(|_| ())
    }

    /// Stops pulling, lets running handlers end, settles, gives the lanes back and leaves the group.
    ///
    /// What came before anything that has begun is still handled, partition by partition, so that the
    /// next owner goes on where this one ended and handles nothing twice; what came behind it goes
    /// to the next owner. This takes at most the shutdown timeout. What can't be handled in that
    /// time is left as well, and what was settled behind it is handled again; a warning says how
    /// much. That is so while the consumer is paused or holds, for blocked keys, and for retries that
    /// are due later.
    ///
    /// # Cancellation
    ///
    /// A dropped future is a crash: see [`Consumer`].
    ///
    /// # Errors
    ///
    /// What ended the consumer before, or what closing met; `Timeout` when handlers still ran at the
    /// end of the shutdown timeout and were dropped. Nothing handled is lost by it, but it may be
    /// handled again.
    pub async fn shutdown(self) -> Result<()> {
        let timeout = self.runtime.settings.shutdown_timeout;
        self.stop(Instant::now() + timeout, false).await.map(|_| ())
    }

    /// Handles everything up to the end of a bounded read, then shuts down.
    pub(crate) async fn finish(mut self) -> Result<Counts> {
        let runtime = Arc::clone(&self.runtime);
        let failed = tokio::select! {
            // The sender lives in the pump; when that is gone, the failure says why.
            _ = self.ended.wait_for(|ended| *ended) => false,
            () = runtime.failed() => true,
        };
        if failed {
            return self.stop(Instant::now(), false).await;
        }
        // A replay takes the time it takes.
        self.stop(Instant::now() + FOREVER, true).await
    }

    /// Lets the workers end, once everything is handled, or all lanes have left by a deadline.
    fn tell_stop(&self, deadline: Option<Instant>) -> Option<Arc<Departure>> {
        let runtime = &self.runtime;
        let mut ending = runtime.ending();
        *ending = true;
        let lanes = runtime.lanes.open_lanes();
        let departure = deadline
            .map(|until| Arc::new(Departure::until(runtime, lanes, until, self.inboxes.len())));
        for inbox in &self.inboxes {
            if let Some(departure) = &departure {
                inbox.push(Item::Leave(Arc::clone(departure)));
            }
            inbox.push(Item::Stop);
        }
        departure
    }

    async fn stop(mut self, deadline: Instant, finish: bool) -> Result<Counts> {
        // What it has not brought yet stays in the store.
        self.keeping = None;
        let departure = self.tell_stop((!finish).then_some(deadline));
        let runtime = Arc::clone(&self.runtime);
        let workers_end = async {
            while let Some(ended) = self.workers.join_next().await {
                if let Err(error) = ended {
                    tracing::error!(error = %error, "a worker ended in a panic");
                }
            }
        };
        tokio::select! {
            () = workers_end => {}
            () = runtime.failed(), if finish => {}
        }
        let timeout = self.runtime.settings.shutdown_timeout;
        let again = departure
            .as_ref()
            .map_or(0, |departure| departure.handled_again());
        if again > 0 {
            tracing::warn!(group = %self.runtime.group, events = again, "the next owner handles events again: something before them could not be handled in time");
        }
        // All verdicts are with the settler now; what it cannot record in time is handed out again.
        self.settler.add(SettleItem::Stop);
        let group = self.runtime.group.clone();
        let patience = || {
            let now = Instant::now();
            deadline.min(now + timeout).max(now + ANSWER_MIN)
        };
        let settled = tokio::time::timeout_at(patience(), &mut self.settling.0).await;
        self.claiming = None;
        if let Some(claims) = &self.runtime.claims {
            // What is not released in time is free when its lease is over.
            let _ = tokio::time::timeout_at(patience(), claims.release_dropped()).await;
        }
        let lanes = self.runtime.lanes.status();
        let unsettled: usize = lanes.iter().map(|lane| lane.in_flight).sum();
        self.stop_pump.send_replace(true);
        let closing = async {
            match (&mut self.pumping.0).await {
                Ok(Some(deliveries)) => deliveries.close().await,
                // The pump panicked, and the failure says so.
                _ => Ok(()),
            }
        };
        let closed = tokio::time::timeout_at(patience(), closing).await;
        let late = |message: &str| {
            Error::new(ErrorKind::Timeout, "shut consumer down", message).with("group", &group)
        };
        if let Some(failure) = self.runtime.take_failure() {
            return Err(failure);
        }
        if settled.is_err() {
            return Err(late(
                "what is done could not be recorded in time: it is handled again",
            ));
        }
        closed.unwrap_or_else(|_| {
            Err(late(
                "the broker did not answer in time: it notices by itself that the member is gone",
            ))
        })?;
        tracing::info!(group = %self.runtime.group, "consumer left");
        let dropped = departure
            .as_ref()
            .map_or(0, |departure| departure.dropped());
        // Who gives no time wants them dropped.
        if dropped > 0 && !timeout.is_zero() {
            return Err(late(
                "handlers did not end in time and were dropped: what was not settled goes to the next owner; raise `.shutdown_timeout(…)` or make them faster",
            )
            .with("timeout", format_args!("{timeout:?}"))
            .with("handlers dropped", dropped)
            .with("handled again", again)
            .with("not settled", unsettled));
        }
        Ok(self.runtime.telemetry.counts())
    }
}
