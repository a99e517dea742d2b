//! Removes what every group has read and nobody is to read again: streams lie in memory.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use eventbus_core::log::TopicLanes;
use eventbus_core::{Position, Result};

use crate::database::Database;
use crate::groups::{damaged, positions_key};
use crate::leases::GROUPS;
use crate::position::{self, EntryId};
use crate::topics::{self, stream};

const TRIM: &str = "remove what was read";
/// How often it is looked for, unless retention is shorter.
const INTERVAL_MAX: Duration = Duration::from_secs(60);
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// Looks for it until it is aborted with its database.
pub(crate) async fn run(database: Arc<Database>) {
    let interval = database.config.retention.min(database.config.group_expiry);
    let interval = interval.clamp(INTERVAL_MIN, INTERVAL_MAX);
    loop {
        tokio::time::sleep(interval).await;
        for topic in database.known.topics() {
            if let Err(error) = database.trim_read(&topic).await {
                tracing::warn!(%error, topic = %topic.name, "what was read is removed later");
            }
        }
    }
}

impl Database {
    /// Removes what all groups that live have settled and that is older than the topic keeps. Where no
    /// group ever read, nothing was read; dead letters are an operator's to remove.
    async fn trim_read(&self, topic: &TopicLanes) -> Result<()> {
        if topic.name.is_dead_letters() {
            return Ok(());
        }
        let stored = topics::find(&self.server, TRIM, &topic.name).await?;
        let declared = stored.and_then(|stored| stored.retention);
        let retention = declared.unwrap_or(self.config.retention);
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
            trim.arg(stream(topic, partition))
                .arg("MINID")
                .arg("~")
                .arg(kept.to_string());
            let removed: u64 = self.server.control.ask(TRIM, &trim).await?;
            if removed > 0 {
                tracing::debug!(topic = %topic.name, partition, removed, "what was read is removed");
            }
        }
        Ok(())
    }

    /// By partition, what no group that lives has settled yet. A group lives that had a member since
    /// `group_expiry` began.
    async fn read_by_all(&self, topic: &TopicLanes, now: i64) -> Result<HashMap<u32, Position>> {
        let expiry = i64::try_from(self.config.group_expiry.as_millis()).unwrap_or(i64::MAX);
        let mut living = redis::cmd("ZRANGEBYSCORE");
        living
            .arg(GROUPS)
            .arg(now.saturating_sub(expiry))
            .arg("+inf");
        let living: Vec<String> = self.server.control.ask(TRIM, &living).await?;
        let mut all = redis::cmd("HGETALL");
        all.arg(positions_key(&topic.name));
        let all: HashMap<String, String> = self.server.control.ask(TRIM, &all).await?;
        let mut read: HashMap<u32, Position> = HashMap::new();
        for (name, text) in &all {
            let Some((group, partition)) = name.rsplit_once(' ') else {
                return Err(damaged(TRIM, &topic.name));
            };
            if !living.iter().any(|living| living == group) {
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
