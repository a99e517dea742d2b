//! Runs one case in virtual time: publishes, lets the faults happen, heals everything and drains.

use std::sync::Arc;
use std::time::Duration;

use eventbus_core::{
    AdminReply, AdminRequest, BatchItem, BoxError, Breaker, Consumer, ConsumerState, Context,
    Event as EventType, EventBus, Group, Json, Key, Limits, MemoryBroker, MemoryConfig, Message,
    OnPoison, Publisher, Result, RetryPolicy, Topic, unknown_version,
};
use eventbus_core::{Broker, Start};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep_until};

use super::case::{Act, Case, Failing, Fault, Kind, Working};
use super::planted::{Plant, Planted};
use super::recorder::{Event, How, Log, Noted, Recorder};

const TOPIC: Topic = Topic::from_static("orders");
const GROUP: &str = "billing";

/// Longest virtual time in which everything has to be handled once all is healed.
const DRAIN_MAX: Duration = Duration::from_secs(3_600);

/// Most members over one run.
const MEMBERS_MAX: usize = 8;

const ALPHA: u8 = 0;
const BETA: u8 = 1;
const FOLLOWING: u8 = 2;

/// Message `number`, as an event of the type `KIND`.
#[derive(Debug, Serialize, Deserialize)]
struct Numbered<const KIND: u8> {
    number: usize,
}

impl<const KIND: u8> EventType for Numbered<KIND> {
    const TYPE: &'static str = match KIND {
        ALPHA => "Alpha",
        BETA => "Beta",
        _ => "Following",
    };
    const TOPIC: Topic = match KIND {
        FOLLOWING => Topic::from_static("following"),
        _ => TOPIC,
    };
    const VERSION: u32 = 1;
    type Codec = Json;

    fn key(&self) -> Option<Key> {
        None
    }

    fn upcast(version: u32, _: &[u8]) -> Result<Self> {
        Err(unknown_version::<Self>(version))
    }
}

fn message(case: &Case, number: usize) -> Message {
    let planned = &case.messages[number];
    let event_type = match planned.kind {
        Kind::Alpha => "Alpha",
        Kind::Beta => "Beta",
        Kind::Unknown => "Unknown",
    };
    let payload = format!("{{\"event_type\":\"{event_type}\",\"number\":{number}}}");
    let message = Message::new(TOPIC, payload);
    match planned.key {
        Some(key) => message.with_key(Key::display(key)),
        None => message,
    }
}

/// What the handlers of one member share.
#[derive(Debug)]
struct Watch {
    member: usize,
    case: Arc<Case>,
    log: Arc<Log>,
}

/// Notes how a handler ended, also when it is dropped.
struct Handling<'a> {
    watch: &'a Watch,
    run: usize,
    number: usize,
    how: How,
}

impl<'a> Handling<'a> {
    fn start(watch: &'a Watch, run: usize, number: usize) -> Self {
        watch.log.note(watch.member, Event::Started { run, number });
        Self {
            watch,
            run,
            number,
            how: How::Dropped,
        }
    }

    fn end(mut self, how: How) {
        self.how = how;
    }

    async fn attempt(&self, attempt: u32) -> Result<(), BoxError> {
        let Watch { case, log, .. } = self.watch;
        match case.act(self.number, attempt, log.now()) {
            Act::Succeed(working) => {
                work(working).await;
                Ok(())
            }
            Act::Fail(Failing::Error(working)) => {
                work(working).await;
                Err("planned failure".into())
            }
            Act::Fail(Failing::Panic(working)) => {
                work(working).await;
                // Unlike `panic!` it prints nothing.
                std::panic::resume_unwind(Box::new("planned panic"))
            }
            Act::Fail(Failing::Hangs) => std::future::pending().await,
        }
    }
}

impl Drop for Handling<'_> {
    fn drop(&mut self) {
        let (run, number, how) = (self.run, self.number, self.how);
        let ended = Event::Ended { run, number, how };
        self.watch.log.note(self.watch.member, ended);
    }
}

async fn work(working: Working) {
    match working {
        Working::Yields(times) => {
            for _ in 0..times {
                tokio::task::yield_now().await;
            }
        }
        Working::Sleeps(time) => tokio::time::sleep(Duration::from_millis(time)).await,
    }
}

fn follow_up(cx: &Context<Watch>, number: usize) -> Result<()> {
    if cx.state().case.messages[number].publishes {
        cx.publish(Numbered::<FOLLOWING> { number })?;
    }
    Ok(())
}

async fn single<const KIND: u8>(event: Numbered<KIND>, cx: Context<Watch>) -> Result<(), BoxError> {
    let watch = cx.state();
    let handling = Handling::start(watch, watch.log.next_run(), event.number);
    let result = handling.attempt(cx.attempt()).await;
    match result {
        Ok(()) => {
            follow_up(&cx, event.number)?;
            handling.end(How::Ok);
            Ok(())
        }
        Err(error) => {
            handling.end(How::Err);
            Err(error)
        }
    }
}

/// Handles events in turn; what stands behind a failed one of its key is left alone.
async fn batch(items: Vec<BatchItem<Numbered<ALPHA>, Watch>>) -> Result<(), BoxError> {
    let watch = items[0].cx.state();
    let run = watch.log.next_run();
    let mut failed = Vec::new();
    let mut good = Vec::new();
    for item in &items {
        let number = item.event.number;
        let key = watch.case.messages[number].key;
        if key.is_some() && failed.contains(&key) {
            continue;
        }
        let handling = Handling::start(watch, run, number);
        match handling.attempt(item.cx.attempt()).await {
            Ok(()) => good.push((item, handling)),
            Err(error) if watch.case.setting.batch_fails_whole => return Err(error),
            Err(error) => {
                handling.end(How::Err);
                item.fail(error);
                failed.push(key);
            }
        }
    }
    for (item, handling) in good {
        follow_up(&item.cx, item.event.number)?;
        handling.end(How::Ok);
    }
    Ok(())
}

/// A member of the group, until it leaves.
struct Running {
    member: usize,
    consumer: Consumer,
}

/// What is still to be done.
#[derive(Clone, Copy)]
enum Step {
    Befall(Fault),
    Resume(usize),
}

struct Driver {
    /// By milliseconds.
    steps: Vec<(u64, Step)>,
    case: Arc<Case>,
    plant: Plant,
    log: Arc<Log>,
    server: MemoryBroker,
    running: Vec<Running>,
    /// How many members there were.
    joined: usize,
    leaving: Vec<tokio::task::JoinHandle<Result<(), String>>>,
}

/// Runs a case and returns what happened and how it ended.
pub(super) fn drive(case: &Case, plant: Plant) -> (Vec<Noted>, Result<(), String>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without sockets can be built");
    let case = Arc::new(case.clone());
    runtime.block_on(async {
        let log = Log::new();
        let config = MemoryConfig::default()
            .like(case.profile)
            .with_partitions(case.partitions);
        let mut driver = Driver {
            steps: Vec::new(),
            case,
            plant,
            log: Arc::clone(&log),
            server: MemoryBroker::with(config),
            running: Vec::new(),
            joined: 0,
            leaving: Vec::new(),
        };
        let end = driver.run().await;
        (log.take(), end)
    })
}

impl Driver {
    async fn run(&mut self) -> Result<(), String> {
        for _ in 0..self.case.members {
            self.join().await?;
        }
        // So that the lanes have found their owners before the first message.
        tokio::time::sleep(Duration::from_millis(5)).await;
        let case = Arc::clone(&self.case);
        let begun = Instant::now();
        let faults = case.faults.iter().copied();
        self.steps = faults
            .map(|(at, fault)| (at, Step::Befall(fault)))
            .collect();
        let mut at = 0;
        let mut published = 0;
        for (count, pause) in case.batches.iter().copied().cycle() {
            at += pause;
            self.step_until(begun, at).await?;
            sleep_until(begun + Duration::from_millis(at)).await;
            let end = (published + count).min(case.messages.len());
            let messages = (published..end).map(|number| message(&case, number));
            let taken = self.server.publish(messages.collect()).await;
            taken.map_err(|error| format!("publish: {error:?}"))?;
            published = end;
            if published == case.messages.len() {
                break;
            }
        }
        self.step_until(begun, u64::MAX).await?;
        self.drain().await
    }

    /// Takes all steps up to this time, each at its own.
    async fn step_until(&mut self, begun: Instant, until: u64) -> Result<(), String> {
        while let Some(index) = (0..self.steps.len()).min_by_key(|index| self.steps[*index].0)
            && self.steps[index].0 <= until
        {
            let (at, step) = self.steps.remove(index);
            sleep_until(begun + Duration::from_millis(at)).await;
            match step {
                Step::Befall(fault) => self.befall(at, fault).await?,
                Step::Resume(member) => {
                    let mut running = self.running.iter();
                    if let Some(paused) = running.find(|running| running.member == member) {
                        paused.consumer.resume();
                    }
                }
            }
        }
        Ok(())
    }

    async fn join(&mut self) -> Result<(), String> {
        let member = self.joined;
        self.joined += 1;
        let setting = &self.case.setting;
        let recorder = Recorder::new(self.server.connect(), member, Arc::clone(&self.log));
        let bus = EventBus::new(Planted::new(recorder, self.plant));
        let limits = Limits::default()
            .with_batch(setting.batch)
            .with_messages(setting.limit_messages)
            .with_lane_messages(setting.lane_messages)
            .with_bytes(setting.bytes)
            .with_revoke_timeout(setting.revoke_timeout);
        let shutdown_timeout = match member % 2 {
            0 => setting.shutdown_timeout,
            _ => setting.shutdown_timeout.max(Duration::from_secs(10)),
        };
        let (poison, attempts) = match setting.blocked_until {
            Some(_) => (OnPoison::BlockKey, setting.attempts_max),
            None => (OnPoison::SkipKey, setting.attempts_max),
        };
        let consumer = bus
            .consumer(GROUP)
            .state(Watch {
                member,
                case: Arc::clone(&self.case),
                log: Arc::clone(&self.log),
            })
            .concurrency(setting.concurrency)
            .workers(setting.workers)
            .limits(limits)
            .start(Start::Earliest)
            .deadline(setting.deadline)
            .shutdown_timeout(shutdown_timeout)
            .on_poison(poison)
            .retry(RetryPolicy::fixed(attempts, setting.retry_delay))
            // It would hold on for good when only failing messages are left.
            .breaker(Breaker::default().with_failure_rate(2.0))
            .on(single::<BETA>);
        let consumer = match setting.batch_max {
            Some(batch_max) => consumer.on_batch(batch_max, batch),
            None => consumer.on(single::<ALPHA>),
        };
        let consumer = consumer.spawn().await;
        let consumer = consumer.map_err(|error| format!("spawn: {error:?}"))?;
        self.running.push(Running { member, consumer });
        Ok(())
    }

    async fn befall(&mut self, at: u64, fault: Fault) -> Result<(), String> {
        let count = self.running.len();
        match fault {
            Fault::Join if self.joined < MEMBERS_MAX => self.join().await?,
            Fault::Lose => self.server.lose(&Group::from_static(GROUP)),
            Fault::Outage(time) => self.log.begin_outage(Duration::from_millis(time)),
            Fault::Leave(index) if count > 0 => {
                let running = self.running.remove(index % count);
                self.leave(running, None);
            }
            Fault::LeaveAndCrash(index, after) if count > 0 => {
                let running = self.running.remove(index % count);
                self.leave(running, Some(Duration::from_millis(after)));
            }
            Fault::Crash(index) if count > 0 => {
                let running = self.running.remove(index % count);
                self.log.note(running.member, Event::Crashes);
                drop(running);
            }
            Fault::Pause(index, time) if count > 0 => {
                let Running { member, consumer } = &self.running[index % count];
                consumer.pause();
                self.steps.push((at + time, Step::Resume(*member)));
            }
            _ => {}
        }
        Ok(())
    }

    fn leave(&mut self, running: Running, crash_after: Option<Duration>) {
        let Running { member, consumer } = running;
        let log = Arc::clone(&self.log);
        self.leaving.push(tokio::spawn(async move {
            log.note(member, Event::Leaves);
            // A pause does not keep a consumer from its end.
            let shutdown = consumer.shutdown();
            let never = Duration::from_secs(7 * 24 * 60 * 60);
            let ended = tokio::time::timeout(crash_after.unwrap_or(never), shutdown).await;
            match (ended, crash_after) {
                (Ok(Ok(())), _) => log.note(member, Event::Left),
                // Handlers that it dropped at its deadline: an end like any other.
                (Ok(Err(error)), _) if error.to_string().contains("did not end in time") => {
                    log.note(member, Event::Left);
                }
                (Ok(Err(error)), _) => return Err(format!("shutdown: {error:?}")),
                (Err(_), Some(_)) => log.note(member, Event::Crashes),
                (Err(_), None) => return Err("stuck: a shutdown did not end in a week".to_owned()),
            }
            Ok(())
        }));
    }

    /// Heals everything, waits until all is handled, and ends.
    async fn drain(&mut self) -> Result<(), String> {
        for running in &self.running {
            running.consumer.resume();
        }
        if self.running.is_empty() {
            self.join().await?;
        }
        let begun = Instant::now();
        let mut pause = Duration::from_millis(20);
        while self.lag().await? > 0 {
            if begun.elapsed() > DRAIN_MAX {
                let status: Vec<_> = self
                    .running
                    .iter()
                    .map(|one| one.consumer.status())
                    .collect();
                return Err(format!(
                    "lost: {} messages are not settled after an hour: {status:#?}",
                    self.lag().await?
                ));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
        for running in std::mem::take(&mut self.running) {
            if let ConsumerState::Failed { error } = running.consumer.status().state {
                return Err(format!("failed: {error}"));
            }
            self.leave(running, None);
        }
        for leaving in std::mem::take(&mut self.leaving) {
            leaving
                .await
                .map_err(|error| format!("shutdown: {error}"))??;
        }
        Ok(())
    }

    async fn lag(&self) -> Result<u64, String> {
        let request = AdminRequest::Lag {
            group: Group::from_static(GROUP),
            topics: vec![TOPIC],
        };
        match self.server.admin(request).await {
            Ok(AdminReply::Lag(lanes)) => Ok(lanes.iter().map(|lane| lane.messages).sum()),
            other => Err(format!("lag: {other:?}")),
        }
    }
}
