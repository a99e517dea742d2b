//! Whether a broker is empty: everything settled, nothing held, nothing scheduled.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;

use crate::broker::GroupPosition;
use crate::bus::EventBus;
use crate::clock::Timestamp;
use crate::consumer::backoff::Backoff;
use crate::delivery::Position;
use crate::error::Result;
use crate::key_state::HeldReport;
use crate::message::{Group, Topic};

/// Names of a group that one look reports at most.
const HELD_MAX: usize = 100;

impl EventBus {
    /// Finds out whether these topics are drained: everything on them is settled by every group that
    /// reads them, no key of theirs is held or parked, and no event for them waits for its time.
    /// Awaited, it resolves when they are; [`report`](Drain::report) looks once and says what is left.
    ///
    /// It says so of one moment, at which no handler ran whose event came from these topics. That lasts
    /// as long as nobody publishes to them: stop who does first, such as the relay, or have a
    /// [`Relay`](crate::Relay) wait for it. Name the topics to which handlers publish, too.
    ///
    /// Dead letters do not count, because their keys have gone on without them; deal with them before
    /// the broker is switched off.
    ///
    /// # Examples
    ///
    /// ```
    /// # use eventbus_macros::Event;
    /// # use serde::{Deserialize, Serialize};
    /// # #[derive(Event, Serialize, Deserialize)]
    /// # #[event(crate = "eventbus_core", type = "OrderCreated", topic = "order-events", key = "order_id")]
    /// # struct OrderCreated { order_id: u64 }
    /// use eventbus_core::{Context, Event as _, EventBus, MemoryBroker};
    ///
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// let old = EventBus::new(MemoryBroker::new());
    /// let billing = old.consumer("billing").on(async |_: OrderCreated, _: Context| Ok(())).spawn().await?;
    /// old.publish(OrderCreated { order_id: 42 }).await?;
    ///
    /// old.drained(&[OrderCreated::TOPIC]).await?;
    /// assert_eq!(billing.status().counts.handled, 1);
    /// # billing.shutdown().await?;
    /// # Ok::<(), eventbus_core::Error>(())
    /// # }).unwrap();
    /// ```
    pub fn drained(&self, topics: &[Topic]) -> Drain {
        Drain {
            bus: self.clone(),
            topics: topics.to_vec(),
            groups: Vec::new(),
        }
    }
}

/// Looks whether topics are drained; made by [`EventBus::drained`].
#[derive(Clone, Debug)]
#[must_use = "nothing is looked at until `.await` or `.report().await`"]
pub struct Drain {
    bus: EventBus,
    topics: Vec<Topic>,
    groups: Vec<String>,
}

/// Where the groups are: where each has settled everything up to.
type Positions = BTreeMap<(Group, Topic, u32), Position>;

impl Drain {
    /// Looks at this group only, and at those that are named likewise; otherwise at all that ever
    /// read the topics. For a service that means its own, or where a group is gone for good.
    pub fn of_group(mut self, group: &str) -> Self {
        self.groups.push(group.to_owned());
        self
    }

    /// Looks once.
    ///
    /// # Errors
    ///
    /// Those of the broker and its stores; `NotFound` when a topic is not there, `Unsupported` where
    /// the broker can't tell how far groups are, `InvalidInput` when a name is not allowed.
    pub async fn report(&self) -> Result<DrainReport> {
        let topics = self.bus.topics(&self.topics)?;
        let (before, mut left) = self.unsettled(&topics).await?;
        if left.is_empty() {
            // What is put aside or scheduled stands there before it is settled, so it is found
            // behind the look at what is settled.
            self.find_held(&before, &topics, &mut left).await?;
            self.find_scheduled(&topics, &mut left).await?;
        }
        if left.is_empty() {
            // Between both looks nothing was published, so that there was a moment at which all
            // this held at once.
            let (after, unsettled) = self.unsettled(&topics).await?;
            left = unsettled;
            if left.is_empty() && before != after {
                left.push(Undrained::Published);
            }
        }
        Ok(DrainReport { left })
    }

    async fn unsettled(&self, topics: &[Topic]) -> Result<(Positions, Vec<Undrained>)> {
        let groups = self.groups.iter().map(|group| Group::new(group));
        let mut unread: BTreeSet<Group> = groups.collect::<Result<_>>()?;
        let named = unread.clone();
        let mut unread_topics: BTreeSet<&Topic> = topics.iter().collect();
        let (mut positions, mut left) = (Positions::new(), Vec::new());
        for found in self.bus.lags(&self.topics).await? {
            let GroupPosition {
                group,
                topic,
                partition,
                position,
                lag,
                ..
            } = found;
            if !named.is_empty() && !named.contains(&group) {
                continue;
            }
            unread.remove(&group);
            unread_topics.remove(&topic);
            if lag > 0 {
                left.push(Undrained::Unsettled {
                    group: group.clone(),
                    topic: topic.clone(),
                    partition,
                    messages: lag,
                });
            }
            positions.insert((group, topic, partition), position);
        }
        left.extend(unread.into_iter().map(Undrained::UnknownGroup));
        if named.is_empty() {
            let unread = unread_topics.into_iter().cloned();
            left.extend(unread.map(Undrained::UnreadTopic));
        }
        Ok((positions, left))
    }

    async fn find_held(
        &self,
        positions: &Positions,
        topics: &[Topic],
        left: &mut Vec<Undrained>,
    ) -> Result<()> {
        let Some(store) = self.bus.key_state() else {
            return Ok(());
        };
        let groups: BTreeSet<&Group> = positions.keys().map(|(group, ..)| group).collect();
        for group in groups {
            let mut after = None;
            let mut found = 0;
            while found < HELD_MAX {
                let page = store.list(group, after.as_ref(), HELD_MAX).await?;
                let Some(last) = page.last() else { break };
                after = Some(last.held.clone());
                for report in page {
                    if topics.is_empty() || topics.contains(&report.held.place.topic) {
                        found += 1;
                        left.push(Undrained::Held {
                            group: group.clone(),
                            report: Box::new(report),
                        });
                    }
                }
            }
        }
        Ok(())
    }

    async fn find_scheduled(&self, topics: &[Topic], left: &mut Vec<Undrained>) -> Result<()> {
        if self.bus.schedule().is_none() {
            return Ok(());
        }
        let waiting = self.bus.scheduled()?;
        let mut last = None;
        let (mut messages, mut next) = (0, None);
        loop {
            let page = waiting.page(last.as_ref(), 500).await?;
            let Some(end) = page.last() else { break };
            last = Some(end.clone());
            let is_ours = |topic: &Topic| topics.is_empty() || topics.contains(topic);
            for report in page.iter().filter(|report| is_ours(&report.topic)) {
                messages += 1;
                next.get_or_insert(report.due);
            }
        }
        if let Some(next) = next {
            left.push(Undrained::Scheduled { messages, next });
        }
        Ok(())
    }

    async fn wait(self) -> Result<()> {
        let mut backoff = Backoff::new();
        loop {
            let report = match self.report().await {
                Ok(report) => report,
                Err(error) if error.is_retryable() => {
                    tracing::warn!(error = %error, "it is looked again whether the broker is drained");
                    tokio::time::sleep(backoff.next()).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            if report.is_drained() {
                return Ok(());
            }
            tracing::debug!(left = %report, "not drained yet");
            tokio::time::sleep(backoff.next()).await;
        }
    }
}

impl IntoFuture for Drain {
    type Output = Result<()>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

    /// Waits until the topics are drained; looks every two seconds at the latest. A broker that is
    /// away is asked again, other errors end it.
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.wait())
    }
}

/// What keeps topics from being drained.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DrainReport {
    /// Each reason there is. Held keys and what is scheduled are looked for when all is settled.
    pub left: Vec<Undrained>,
}

impl DrainReport {
    /// Whether nothing is left.
    pub fn is_drained(&self) -> bool {
        self.left.is_empty()
    }
}

/// The first few reasons, in one line.
impl fmt::Display for DrainReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 3;
        if self.left.is_empty() {
            return f.write_str("drained");
        }
        for (index, reason) in self.left.iter().take(SHOWN).enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{reason}")?;
        }
        match self.left.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

/// One reason why topics are not drained.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Undrained {
    /// A group has not settled everything: it waits, or is being handled.
    Unsettled {
        /// The group.
        group: Group,
        /// The topic, by its name on the broker.
        topic: Topic,
        /// Its partition.
        partition: u32,
        /// How many messages.
        messages: u64,
    },
    /// A key is held: parked until an operator decides, or until a later attempt.
    Held {
        /// The group.
        group: Group,
        /// What is held, and why.
        report: Box<HeldReport>,
    },
    /// Events wait for their time.
    Scheduled {
        /// How many.
        messages: u64,
        /// When the first one comes.
        next: Timestamp,
    },
    /// Something was published meanwhile.
    Published,
    /// A group that was named has read none of the topics.
    UnknownGroup(Group),
    /// No group has read a topic: whoever is to read it has not come yet.
    UnreadTopic(Topic),
}

impl fmt::Display for Undrained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsettled {
                group,
                topic,
                partition,
                messages,
            } => write!(
                f,
                "{group} has {messages} messages of {topic}/{partition} to settle"
            ),
            Self::Held { group, report } => {
                let HeldReport { held, wait, .. } = &**report;
                match wait.is_parked() {
                    true => write!(f, "{group} has parked {held}: {}", wait.error),
                    false => write!(f, "{group} holds {held} for a later attempt"),
                }
            }
            Self::Scheduled { messages, next } => {
                write!(
                    f,
                    "{messages} events wait for their time, the first until {next}"
                )
            }
            Self::Published => f.write_str("something was published meanwhile"),
            Self::UnknownGroup(group) => write!(f, "{group} has read none of the topics"),
            Self::UnreadTopic(topic) => write!(f, "no group has read {topic}"),
        }
    }
}
