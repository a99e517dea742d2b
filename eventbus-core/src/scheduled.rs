//! Events for later, as users say it: publishing at a time, cancelling, and what waits.

use std::sync::Arc;
use std::time::Duration;

use crate::broker::{Outcome, PublishError, Unpublished};
use crate::bus::EventBus;
use crate::clock::Timestamp;
use crate::envelope::EventId;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::header;
use crate::message::{Key, Message, Topic};
use crate::outgoing::Outgoing;
use crate::schedule::{ScheduleStore, Scheduled, ScheduledReport};

/// Most messages that [`ScheduledEvents::list`] and [`ScheduledEvents::of_key`] return.
pub const SCHEDULED_LIST_MAX: usize = 10_000;

/// How many are asked for at once.
const PAGE: usize = 500;

impl EventBus {
    /// Publishes an event at a time to come; resolves with its id when that is stored durably.
    ///
    /// When the time comes, one of the processes whose buses share the store publishes the event,
    /// in its order per key: by time, then as it was scheduled. Delivery is at least once, with the
    /// same id. What has a time that is over is published at once.
    ///
    /// What the broker refuses is tried again each minute, and what it does not take while it takes
    /// others after up to a minute; later ones of its key wait behind it. Only when another process
    /// takes over meanwhile, or more than 10,000 keys are stopped so, may one be overtaken.
    ///
    /// An id that waits already keeps its place and time, so that a call may be repeated;
    /// [`cancel`](Self::cancel) it first to give it another time.
    ///
    /// # Examples
    ///
    /// ```
    /// # use eventbus_macros::Event;
    /// # use serde::{Deserialize, Serialize};
    /// # #[derive(Event, Serialize, Deserialize)]
    /// # #[event(crate = "eventbus_core", type = "PaymentReminder", topic = "reminders", key = "order_id")]
    /// # struct PaymentReminder { order_id: u64 }
    /// use std::{sync::Arc, time::Duration};
    /// use eventbus_core::{EventBus, MemoryBroker, MemorySchedule};
    ///
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// let bus = EventBus::builder(MemoryBroker::new())
    ///     .schedule(Arc::new(MemorySchedule::new()))
    ///     .build();
    /// let tomorrow = bus.clock().now().plus(Duration::from_secs(24 * 60 * 60));
    /// let id = bus.publish_at(PaymentReminder { order_id: 42 }, tomorrow).await?;
    /// assert!(bus.cancel(&id).await?);
    /// # Ok::<(), eventbus_core::Error>(())
    /// # }).unwrap();
    /// ```
    ///
    /// # Errors
    ///
    /// As [`publish`](Self::publish); `Unsupported` when the bus has no schedule, `RateLimited` when
    /// that is full.
    pub async fn publish_at<E: Event>(
        &self,
        event: impl Into<Outgoing<E>> + Send,
        time: impl Into<Timestamp> + Send,
    ) -> Result<EventId> {
        self.publish(event.into().with_not_before(time.into()))
            .await
    }

    /// Publishes an event after `delay`; otherwise as [`publish_at`](Self::publish_at).
    ///
    /// # Errors
    ///
    /// As [`publish_at`](Self::publish_at).
    pub async fn publish_after<E: Event>(
        &self,
        event: impl Into<Outgoing<E>> + Send,
        delay: Duration,
    ) -> Result<EventId> {
        let time = self.clock().now().plus(delay);
        self.publish_at(event, time).await
    }

    /// Takes a scheduled event back: `true` when it will not be published, `false` when it does not
    /// wait: it is published, or was never scheduled, or is on its way from an outbox to the schedule,
    /// which takes a relay some milliseconds. Inside a handler it is done at once, also if the
    /// handler fails.
    ///
    /// # Errors
    ///
    /// Those of the store; `Unsupported` when the bus has no schedule.
    pub async fn cancel(&self, id: &EventId) -> Result<bool> {
        match self.schedule() {
            Some(schedule) => schedule.store.cancel(id).await,
            None => Err(no_schedule("cancel scheduled event")),
        }
    }

    /// What waits for its time.
    ///
    /// # Errors
    ///
    /// `Unsupported` when the bus has no schedule.
    pub fn scheduled(&self) -> Result<ScheduledEvents> {
        let schedule = self
            .schedule()
            .ok_or_else(|| no_schedule("look for scheduled events"))?;
        Ok(ScheduledEvents {
            bus: self.clone(),
            store: Arc::clone(&schedule.store),
        })
    }

    /// Refuses a time to come where nothing can wait for it.
    pub(crate) fn check_time(&self, not_before: Option<Timestamp>) -> Result<()> {
        let is_to_come = not_before.is_some_and(|time| time > self.clock().now());
        match is_to_come && self.schedule().is_none() {
            true => Err(no_schedule("schedule event")),
            false => Ok(()),
        }
    }

    /// Puts messages of a time to come into the schedule, and returns the rest, which is to be sent
    /// now, whether that failed or not.
    pub(crate) async fn set_aside(&self, messages: Vec<Message>) -> (Vec<Message>, Apart) {
        self.start_schedule();
        if !messages.iter().any(|message| time_of(message).is_some()) {
            return (messages, Apart::Nothing);
        }
        let now = self.clock().now();
        let is_later = |(_, message): &(usize, Message)| time_of(message) > Some(now);
        let (later, rest): (Vec<_>, Vec<_>) = messages.into_iter().enumerate().partition(is_later);
        let scheduled = later.iter().filter_map(|(_, message)| {
            let id = self.formats().id_of(message, EventId::new, now);
            Some(Scheduled::new(id, time_of(message)?, message.clone()))
        });
        let scheduled: Vec<_> = scheduled.collect();
        let failed = match self.schedule_all(&scheduled).await {
            Ok(()) => Vec::new(),
            Err(error) => not_scheduled(error, later),
        };
        let (places, messages) = rest.into_iter().unzip();
        (messages, Apart::Some { places, failed })
    }

    async fn schedule_all(&self, scheduled: &[Scheduled]) -> Result<()> {
        match self.schedule() {
            _ if scheduled.is_empty() => Ok(()),
            Some(schedule) => schedule.add(scheduled).await,
            None => Err(no_schedule("schedule event")),
        }
    }
}

/// What of a batch is for later, while the rest is sent.
pub(crate) enum Apart {
    Nothing,
    Some {
        /// Where the rest stands in the whole batch.
        places: Vec<usize>,
        /// What could not be scheduled.
        failed: Vec<Unpublished>,
    },
}

impl Apart {
    /// What became of the whole batch, when the rest was sent.
    pub(crate) fn join(self, sent: Result<(), PublishError>) -> Result<(), PublishError> {
        let Self::Some { places, mut failed } = self else {
            return sent;
        };
        for mut unpublished in sent.err().map_or(Vec::new(), |error| error.unpublished) {
            unpublished.index = places[unpublished.index];
            failed.push(unpublished);
        }
        PublishError::of(failed)
    }
}

/// When a message is to be published, if it says so.
fn time_of(message: &Message) -> Option<Timestamp> {
    // What a foreign publisher wrote there otherwise says nothing about a time.
    message.headers.get_str(header::NOT_BEFORE)?.parse().ok()
}

/// What is for later was not stored: all of it, for the same reason.
fn not_scheduled(error: Error, later: Vec<(usize, Message)>) -> Vec<Unpublished> {
    let (kind, retry) = (error.kind(), error.retry());
    let outcome = match kind {
        ErrorKind::RateLimited | ErrorKind::Closed | ErrorKind::Unsupported => Outcome::NotTaken,
        // Trying again does no harm: an id that waits is passed over.
        _ => Outcome::Unknown,
    };
    let likewise = || {
        let reason = "as another message of the batch that is for later, it could not be scheduled";
        Error::new(kind, "schedule event", reason).with_retry(retry)
    };
    let mut error = Some(error);
    let failed = later.into_iter().map(|(index, message)| {
        let error = error.take().unwrap_or_else(likewise);
        Unpublished::new(index, message, outcome, error)
    });
    failed.collect()
}

/// Says that nothing can wait on a bus, and what helps.
fn no_schedule(operation: &'static str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        operation,
        "this bus has no schedule, so that nothing waits for its time: connect to sqlite://…, name one beside the broker (`EventBusConfig::store`), or set one up with `EventBus::builder(…).schedule(…)`",
    )
}

/// The events that wait for their time, for operators; made by [`EventBus::scheduled`].
///
/// # Examples
///
/// ```
/// use eventbus_core::{EventBus, Result};
///
/// async fn show(bus: &EventBus) -> Result<()> {
///     for waiting in bus.scheduled()?.list().await? {
///         println!("{} at {} to {}", waiting.id, waiting.due, waiting.topic);
///     }
///     Ok(())
/// }
/// ```
#[derive(Clone, Debug)]
pub struct ScheduledEvents {
    bus: EventBus,
    store: Arc<dyn ScheduleStore>,
}

impl ScheduledEvents {
    /// What waits, earliest first, at most [`SCHEDULED_LIST_MAX`].
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn list(&self) -> Result<Vec<ScheduledReport>> {
        self.find(|_| true).await
    }

    /// What waits for its time of a key of a topic, at most [`SCHEDULED_LIST_MAX`].
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn of_key(&self, topic: &Topic, key: &Key) -> Result<Vec<ScheduledReport>> {
        let topic = self.bus.topic(topic)?;
        self.find(|report| report.topic == topic && report.key.as_ref() == Some(key))
            .await
    }

    /// What waits behind `after`, in the order of its times: a page of at most `reports_max`, which
    /// is [`SCHEDULED_LIST_MAX`] if it is more.
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn page(
        &self,
        after: Option<&ScheduledReport>,
        reports_max: usize,
    ) -> Result<Vec<ScheduledReport>> {
        self.store
            .list(after, reports_max.min(SCHEDULED_LIST_MAX))
            .await
    }

    /// Takes an event back, as [`EventBus::cancel`].
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn cancel(&self, id: &EventId) -> Result<bool> {
        self.store.cancel(id).await
    }

    async fn find(
        &self,
        is_wanted: impl Fn(&ScheduledReport) -> bool,
    ) -> Result<Vec<ScheduledReport>> {
        let mut found = Vec::new();
        let mut last: Option<ScheduledReport> = None;
        while found.len() < SCHEDULED_LIST_MAX {
            let page = self.store.list(last.as_ref(), PAGE).await?;
            let Some(end) = page.last() else {
                break;
            };
            last = Some(end.clone());
            found.extend(page.into_iter().filter(|report| is_wanted(report)));
        }
        found.truncate(SCHEDULED_LIST_MAX);
        Ok(found)
    }
}
