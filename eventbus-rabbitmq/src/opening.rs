//! Beginning to read the partitions that a member is to have: each is asked for by a task of its own, so that
//! one whose queue does not answer, or is another's, keeps the member from nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use eventbus_core::{Error, Result, Retry, TopicPartition};
use lapin::Channel;
use lapin::types::FieldTable;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::groups::declare_queue;
use crate::lanes::Source;
use crate::link::Link;
use crate::names;
use crate::session::consume;
use crate::subscriber::Reading;
use crate::topics::consumers;

const SUBSCRIBE: &str = "subscribe";

/// How soon, and how rarely at last, it is tried again what has failed.
const AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// What a member is about to begin to read.
#[derive(Default)]
pub(crate) struct Opening {
    tasks: JoinSet<(TopicPartition, Result<Tried>)>,
    /// What they ask for.
    asked: BTreeSet<TopicPartition>,
    /// By what it is asked whether somebody else still has it.
    asking: BTreeMap<TopicPartition, Channel>,
    failing: BTreeMap<TopicPartition, Failing>,
}

struct Failing {
    reason: String,
    pause: Duration,
    until: Instant,
}

/// What came of asking for a partition.
enum Tried {
    Open(Box<Source>),
    /// It is not free yet.
    Taken(Channel),
}

/// What became of a partition.
pub(crate) enum Opened {
    Open(Box<Source>),
    Taken,
    /// It has failed, for a reason that it did not fail for before.
    Failed(Error),
    /// It has failed as before.
    StillFailing,
}

impl Opening {
    /// Asks for a partition, unless that is being done, or has just failed.
    pub(crate) fn ask(&mut self, link: &Arc<Link>, reading: &Arc<Reading>, place: TopicPartition) {
        let now = Instant::now();
        if self.failing.get(&place).is_some_and(|it| it.until > now)
            || !self.asked.insert(place.clone())
        {
            return;
        }
        let asking = self.asking.remove(&place);
        let (link, reading) = (Arc::clone(link), Arc::clone(reading));
        self.tasks.spawn(async move {
            let tried = open_if_free(&link, &reading, &place, asking).await;
            (place, tried)
        });
    }

    /// Forgets what is not wanted any more.
    pub(crate) fn retain(&mut self, is_wanted: impl Fn(&TopicPartition) -> bool) {
        self.asking.retain(|place, _| is_wanted(place));
        self.failing.retain(|place, _| is_wanted(place));
    }

    /// When something that has failed is to be asked for again.
    pub(crate) fn again_at(&self) -> Option<Instant> {
        let failing = self.failing.iter();
        let waiting = failing.filter(|(place, _)| !self.asked.contains(*place));
        waiting.map(|(_, it)| it.until).min()
    }

    /// The next partition of which something is known; never one, while none is asked for.
    pub(crate) async fn next(&mut self) -> (TopicPartition, Opened) {
        let Some(joined) = self.tasks.join_next().await else {
            return std::future::pending().await;
        };
        // A task that has panicked has said why, and nobody asks for what it was to open any more.
        let Ok((place, tried)) = joined else {
            return std::future::pending().await;
        };
        self.asked.remove(&place);
        let error = match tried {
            Ok(Tried::Open(source)) => {
                self.failing.remove(&place);
                return (place, Opened::Open(source));
            }
            Ok(Tried::Taken(channel)) => {
                self.failing.remove(&place);
                self.asking.insert(place.clone(), channel);
                return (place, Opened::Taken);
            }
            Err(error) => error,
        };
        let reason = error.to_string();
        let before = self.failing.get(&place);
        let pause = before.map_or(AGAIN.0, |it| (it.pause * 2).min(AGAIN.1));
        let is_known = before.is_some_and(|it| it.reason == reason);
        let until = Instant::now() + pause;
        let failing = Failing {
            reason,
            pause,
            until,
        };
        self.failing.insert(place.clone(), failing);
        match is_known {
            true => (place, Opened::StillFailing),
            // What is wrong with one partition does not end the member.
            false => (place, Opened::Failed(error.with_retry(Retry::Later))),
        }
    }

    /// Gives all of it up.
    pub(crate) async fn give_up(&mut self) {
        self.tasks.shutdown().await;
        *self = Self::default();
    }
}

async fn open_if_free(
    link: &Link,
    reading: &Reading,
    place: &TopicPartition,
    asking: Option<Channel>,
) -> Result<Tried> {
    let mut asking = match asking.filter(|it| it.status().connected()) {
        Some(asking) => asking,
        None => link.channel(SUBSCRIBE).await?,
    };
    if let Some(queue) = reading.queues.get(&place.topic) {
        // Beside whoever reads it, too.
        let name = queue.short_name(SUBSCRIBE)?;
        if consumers(SUBSCRIBE, &asking, name.clone()).await?.is_none() {
            return Err(queue.missing(SUBSCRIBE));
        }
        let source = consume(link, name, reading.prefetch, FieldTable::default()).await?;
        return Ok(Tried::Open(Box::new(source.adopted(queue.clone()))));
    }
    let queue = names::group_queue(&place.topic, &reading.group, place.partition);
    match consumers(SUBSCRIBE, &asking, queue.clone()).await? {
        Some(0) => {}
        Some(_) => return Ok(Tried::Taken(asking)),
        // Of a topic that others have found with more partitions: looked at again soon.
        None if !reading.has(place) => return Ok(Tried::Taken(link.channel(SUBSCRIBE).await?)),
        None => {
            tracing::error!(
                queue = queue.as_str(),
                "a queue was deleted, and what was in it is gone: it is created anew"
            );
            asking = link.channel(SUBSCRIBE).await?;
            declare_queue(SUBSCRIBE, link, &mut asking, &reading.group, place).await?;
        }
    }
    let source = consume(link, queue, reading.prefetch, FieldTable::default()).await?;
    Ok(Tried::Open(Box::new(source)))
}
