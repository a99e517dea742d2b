//! Publishes what a schedule holds when its time comes: one task a bus, in every process that has one.
//! What becomes of what the broker did not take is in `scheduler/postponed.rs`.

mod postponed;

use std::future::pending;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{trace, warn};

use super::{ScheduleStore, Scheduled, TakeScheduled, Taken};
use crate::activity::Part;
use crate::bus::{EventBus, WeakBus};
use crate::clock::Timestamp;
use crate::consumer::{SCHEDULE_LATENESS, SCHEDULED_WAITING, backoff::Backoff};
use crate::error::{Error, ErrorKind, Result};
use crate::lease::MemberId;
use postponed::{Outage, Outcome, StoppedKeys};

/// How long other schedulers wait for one that does not report. Those of a dead process of the same
/// machine are not waited for.
const TTL: Duration = Duration::from_secs(30);
/// How long a wait is at most for what has a date: the clock of the machine can be set.
const NEXT_MAX: Duration = Duration::from_secs(3600);
/// How long closing waits for what is being published.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// The schedule of one bus: its store, and the task that publishes from it.
#[derive(Debug)]
pub(crate) struct Schedule {
    pub(crate) store: Arc<dyn ScheduleStore>,
    alarm: Arc<Alarm>,
    /// Whether the task runs, to be looked at with each publish.
    is_running: Arc<AtomicBool>,
    task: Mutex<Task>,
}

#[derive(Debug)]
enum Task {
    NotStarted,
    Running(JoinHandle<()>),
    Closed,
}

/// When the task looks again, for those who may want that earlier.
#[derive(Debug)]
struct Alarm {
    /// When it looks by itself, in microseconds; the end of time while it does not wait.
    set_for: AtomicI64,
    rung: Notify,
    close: Notify,
    part: Arc<Part>,
}

impl Schedule {
    pub(crate) fn new(store: Arc<dyn ScheduleStore>, part: Arc<Part>) -> Self {
        Self {
            store,
            alarm: Arc::new(Alarm {
                set_for: AtomicI64::new(i64::MAX),
                rung: Notify::new(),
                close: Notify::new(),
                part,
            }),
            is_running: Arc::default(),
            task: Mutex::new(Task::NotStarted),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Task> {
        self.task.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the task, unless it runs or the bus is closed.
    #[inline]
    pub(crate) fn start(&self, bus: &EventBus) {
        if !self.is_running.load(Ordering::Acquire) {
            self.start_slowly(bus);
        }
    }

    #[cold]
    fn start_slowly(&self, bus: &EventBus) {
        let mut task = self.lock();
        if matches!(*task, Task::Closed) || self.is_running.swap(true, Ordering::AcqRel) {
            return;
        }
        let scheduler = Scheduler {
            bus: bus.downgrade(),
            store: Arc::clone(&self.store),
            alarm: Arc::clone(&self.alarm),
            taker: MemberId::random(),
            stopped: StoppedKeys::default(),
            outage: Outage::default(),
            _run: Run(Arc::clone(&self.is_running)),
        };
        self.alarm.part.raise();
        *task = Task::Running(tokio::spawn(scheduler.run()));
    }

    /// Adds messages, and sees to it that they are published in time.
    pub(crate) async fn add(&self, messages: &[Scheduled]) -> Result<()> {
        if matches!(*self.lock(), Task::Closed) {
            return Err(Error::new(
                ErrorKind::Closed,
                "schedule event",
                "the bus is closed: connect again",
            ));
        }
        self.store.add(messages).await?;
        let first = messages.iter().map(|it| it.not_before.as_micros()).min();
        if first.is_some_and(|first| first < self.alarm.set_for.load(Ordering::Acquire)) {
            self.alarm.part.raise();
            self.alarm.rung.notify_one();
        }
        Ok(())
    }

    /// Ends the task when what it is publishing is done, or has taken too long.
    pub(crate) async fn close(&self) {
        let task = std::mem::replace(&mut *self.lock(), Task::Closed);
        if let Task::Running(mut running) = task {
            self.alarm.close.notify_one();
            if timeout(CLOSE_PATIENCE, &mut running).await.is_err() {
                running.abort();
            }
        }
        self.alarm.part.set_due(None);
        self.alarm.part.lower();
    }
}

impl Drop for Schedule {
    /// What is being published is published once more by the next one.
    fn drop(&mut self) {
        if let Task::Running(running) = &*self.lock() {
            running.abort();
        }
    }
}

/// The task.
struct Scheduler {
    /// Not held while it waits, so that a bus ends when nobody uses it.
    bus: WeakBus,
    store: Arc<dyn ScheduleStore>,
    alarm: Arc<Alarm>,
    taker: MemberId,
    /// Behind which messages later ones of their keys wait.
    stopped: StoppedKeys,
    /// Since when the broker takes nothing.
    outage: Outage,
    _run: Run,
}

/// Says that the task ended, also when its runtime did.
struct Run(Arc<AtomicBool>);

impl Drop for Run {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// When to look again.
struct Wait {
    /// What is added before this time is a reason to look at once.
    set_for: Timestamp,
    /// By itself at this time.
    until: Option<Instant>,
    /// When something changes in the store since this version of it.
    seen: Option<u64>,
}

impl Scheduler {
    async fn run(mut self) {
        let mut backoff = Backoff::new();
        while let Some(bus) = self.bus.upgrade() {
            self.alarm.set_for.store(i64::MAX, Ordering::Release);
            self.alarm.part.raise();
            let wait = match self.publish_due(&bus).await {
                Ok(wait) => {
                    backoff.reset();
                    wait
                }
                Err(error) => {
                    warn!(error = %error, "scheduled messages are tried again");
                    Wait {
                        set_for: Timestamp::from_micros(i64::MIN),
                        until: Some(Instant::now() + backoff.next()),
                        seen: None,
                    }
                }
            };
            drop(bus);
            if self.wait(wait).await {
                return;
            }
        }
    }

    /// Waits for a reason to look again; true when there is to be no other look.
    async fn wait(&self, wait: Wait) -> bool {
        self.alarm
            .set_for
            .store(wait.set_for.as_micros(), Ordering::Release);
        self.alarm.part.set_due(wait.until);
        self.alarm.part.lower();
        let come = async {
            match wait.until {
                Some(until) => sleep_until(until).await,
                None => pending().await,
            }
        };
        let changed = async {
            match wait.seen {
                Some(seen) => self.store.changed(seen).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = self.alarm.close.notified() => return true,
            () = self.alarm.rung.notified() => {}
            () = changed => {}
            () = come => {}
        }
        false
    }

    /// Publishes until nothing is due, and says when to look again.
    async fn publish_due(&mut self, bus: &EventBus) -> Result<Wait> {
        loop {
            let now = bus.clock().now();
            let begun = Instant::now();
            let taken = self.take(now).await?;
            report(&taken, now, bus.capabilities().system);
            if taken.messages.is_empty() {
                return Ok(wait_after(&taken, now, begun));
            }
            // Whoever stood still for so long publishes nothing that others may be at.
            if begun.elapsed() < TTL {
                self.publish(bus, taken).await?;
            }
        }
    }

    async fn take(&self, now: Timestamp) -> Result<Taken> {
        let request = TakeScheduled::new(self.taker, now, TTL);
        let taken = self.store.take(&request).await?;
        match &taken.busy {
            Some(busy) if busy.process.is_dead() => {
                let dead = busy.taker;
                self.store.take(&request.with_dead(dead)).await
            }
            _ => Ok(taken),
        }
    }

    /// Publishes what was taken and reports what became of it. An error when some of it is to be
    /// tried again soon.
    async fn publish(&mut self, bus: &EventBus, taken: Taken) -> Result<()> {
        let now = bus.clock().now();
        let (behind, ahead) = self.stopped.part(taken.messages, now);
        trace!(target: "eventbus::step", step = "schedule.taken");
        let mut outcome = Outcome::of(bus, ahead).await;
        trace!(target: "eventbus::step", step = "schedule.published");
        let holds_up = self.outage.holds_up(&*self.store, &outcome, now).await?;
        let failure = outcome.keep_due(holds_up);
        let refused = self
            .stopped
            .postpone(behind, outcome.left, bus.clock().now());
        let reported = self
            .store
            .done(taken.claim, &outcome.published, &refused)
            .await;
        trace!(target: "eventbus::step", step = "schedule.done");
        match reported {
            Err(error) if error.kind() == ErrorKind::Conflict => {
                warn!(error = %error, "scheduled messages may be published twice, with the same ids");
            }
            reported => reported?,
        }
        failure.map_or(Ok(()), Err)
    }
}

/// What nothing taken means for the next look.
fn wait_after(taken: &Taken, now: Timestamp, begun: Instant) -> Wait {
    let next = taken.next.map(|next| next.since(now).min(NEXT_MAX));
    let free = taken.busy.as_ref().map(|busy| busy.free_in);
    let wait = next.into_iter().chain(free).min();
    Wait {
        set_for: taken.next.unwrap_or(Timestamp::from_micros(i64::MAX)),
        until: wait.map(|wait| begun + wait),
        seen: Some(taken.version),
    }
}

/// Sets the gauges.
fn report(taken: &Taken, now: Timestamp, system: &'static str) {
    let labels = [("messaging.system", system)];
    metrics::gauge!(SCHEDULED_WAITING, &labels).set(taken.waiting as f64);
    let oldest = taken.messages.first();
    let late = oldest.map_or(Duration::ZERO, |oldest| now.since(oldest.not_before));
    metrics::gauge!(SCHEDULE_LATENESS, &labels).set(late.as_secs_f64());
}
