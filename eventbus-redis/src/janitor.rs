//! Removes what every group has read and nobody is to read again: streams lie in memory.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use eventbus_core::log::TopicLanes;
use eventbus_core::{Position, Result, TopicSpec};

use crate::database::Database;
use crate::groups::{damaged, positions_key};
use crate::leases::{EXPIRIES, GROUPS};
use crate::position::{self, EntryId};
use crate::topics::{self, stream};

const TRIM: &str = "remove what was read";
/// How often it is looked for, unless retention is shorter.
const INTERVAL_MAX: Duration = Duration::from_secs(60);
/// Entries that are removed by one command, so that the server does other things in between.
const TRIM_MAX: u64 = 10_000;
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// Looks for it until it is aborted with its database.
pub(crate) async fn run(database: Arc<Database>) {
    let interval = database.config.retention.min(database.config.group_expiry);
    let interval = interval.clamp(INTERVAL_MIN, INTERVAL_MAX);
    loop {
        tokio::time::sleep(interval).await;
        for topic in database.known.topics() {
            if let Err(error) = database.look_after(&topic).await {
                tracing::warn!(%error, topic = %topic.name, "what was read is removed later");
            }
        }
    }
}

impl Database {
    /// Looks whether the topic is on the server as it is known here, stores it again where the server has
    /// lost it, so that nobody creates it with another count of partitions, and removes what was read.
    /// Who only publishes or looks has no say in how long things are kept, and does neither.
    async fn look_after(&self, topic: &TopicLanes) -> Result<()> {
        let is_read = self.known.is_read(&topic.name);
        let stored = topics::find(&self.server, TRIM, &topic.name).await?;
        match stored {
            Some(stored) if self.known.compare(topic, stored.partitions) => {}
            Some(stored) => tracing::error!(
                topic = %topic.name, partitions = stored.partitions, known = topic.partitions,
                "the topic was created anew with other partitions: restart this process"
            ),
            None if is_read => {
                tracing::error!(topic = %topic.name, "the server has lost the topic: it is stored again");
                let spec = TopicSpec::new(topic.name.clone()).with_partitions(topic.partitions);
                topics::create(&self.server, &self.config, TRIM, &spec).await?;
            }
            None => {}
        }
        if !is_read || topic.name.is_dead_letters() {
            return Ok(());
        }
        let declared = stored.and_then(|stored| stored.retention);
        let retention = declared.unwrap_or(self.config.retention);
        self.trim_read(topic, retention).await
    }

    /// Removes what all groups that live have settled and that is older than the topic keeps. Where no
    /// group ever read, nothing was read; dead letters are an operator's to remove.
    async fn trim_read(&self, topic: &TopicLanes, retention: Duration) -> Result<()> {
        let now = self.server.now(TRIM).await?.as_micros() / 1000;
        let read = self.read_by_all(topic, now).await?;
        let too_old = now.saturating_sub(i64::try_from(retention.as_millis()).unwrap_or(i64::MAX));
        for (partition, position) in read {
            let Ok(millis) = u64::try_from(too_old) else {
                continue;
            };
            let too_old = EntryId {
                millis,
                sequence: 0,
            };
            let kept = too_old.min(position::from(position).first());
            let mut trim = redis::cmd("XTRIM");
            trim.arg(stream(topic, partition)).arg("MINID").arg("~");
            trim.arg(kept.to_string()).arg("LIMIT").arg(TRIM_MAX);
            let mut removed = 0;
            loop {
                let more: u64 = self.server.control.ask(TRIM, &trim).await?;
                removed += more;
                // By whole nodes of the stream: less than that is left where a node's end is.
                if more < TRIM_MAX / 2 {
                    break;
                }
            }
            if removed > 0 {
                tracing::debug!(topic = %topic.name, partition, removed, "what was read is removed");
            }
        }
        Ok(())
    }

    /// By partition, what no group that lives has settled yet. A group lives that had a member within the
    /// longest `group_expiry` that one of its members was set up with.
    async fn read_by_all(&self, topic: &TopicLanes, now: i64) -> Result<HashMap<u32, Position>> {
        let mut seen = redis::cmd("ZRANGE");
        seen.arg(GROUPS).arg(0).arg(-1).arg("WITHSCORES");
        let seen: HashMap<String, i64> = self.server.control.ask(TRIM, &seen).await?;
        let mut expiries = redis::cmd("HGETALL");
        expiries.arg(EXPIRIES);
        let expiries: HashMap<String, i64> = self.server.control.ask(TRIM, &expiries).await?;
        let own = i64::try_from(self.config.group_expiry.as_millis()).unwrap_or(i64::MAX);
        let lives = |group: &str| {
            let expiry = expiries.get(group).copied().unwrap_or(own);
            let seen = seen.get(group);
            seen.is_some_and(|at| *at >= now.saturating_sub(expiry))
        };
        let mut all = redis::cmd("HGETALL");
        all.arg(positions_key(&topic.name));
        let all: HashMap<String, String> = self.server.control.ask(TRIM, &all).await?;
        let mut read: HashMap<u32, Position> = HashMap::new();
        for (name, text) in &all {
            let Some((group, partition)) = name.rsplit_once(' ') else {
                return Err(damaged(TRIM, &topic.name));
            };
            if !lives(group) {
                continue;
            }
            let (Ok(partition), Some(position)) =
                (partition.parse(), position::read(text.as_bytes()))
            else {
                return Err(damaged(TRIM, &topic.name));
            };
            let least = read.entry(partition).or_insert(position);
            *least = position.min(*least);
        }
        Ok(read)
    }
}
