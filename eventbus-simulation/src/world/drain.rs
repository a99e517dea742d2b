//! The end of a run: everything is healed, and everything that can be handled is handled.

use std::sync::atomic::Ordering;
use std::time::Duration;

use eventbus_core::{AdminReply, AdminRequest, Broker, EventBus, Group, HeldReport, Topic};
use tokio::time::{Instant, sleep};

use super::members::{Members, Relays};
use super::{FOLLOWERS, WORKERS, World};
use crate::event::{FOLLOWED, WORK};

/// Longest virtual time in which everything has to be handled once all is healed.
const DRAIN_MAX: Duration = Duration::from_secs(900);
/// The name under which relays hold keys.
const RELAYS: &str = "outbox";

impl World {
    pub(super) async fn drain(
        &self,
        members: &mut Members,
        relays: &mut Relays,
    ) -> Result<(), String> {
        self.broker.heal();
        self.stores.heal();
        self.work.sound().fail_begin(0);
        self.work
            .sound()
            .fail_commit(0, eventbus_core::CommitFault::Before);
        self.is_healed.store(true, Ordering::SeqCst);
        if members.is_empty() {
            members.join(self).await?;
        }
        if relays.is_empty() {
            relays.join(self);
        }
        // An operator of a process of its own.
        let bus = self.bus(9);
        self.wait(&bus, members, relays).await?;
        relays.end().await?;
        members.end(self).await
    }

    async fn wait(&self, bus: &EventBus, members: &Members, relays: &Relays) -> Result<(), String> {
        let begun = Instant::now();
        let mut pause = Duration::from_millis(20);
        loop {
            if let Some(complaint) = members.complaint() {
                return Err(complaint);
            }
            if relays.has_failed() {
                return Err("a relay ended without being told to".to_owned());
            }
            let left = self.left(bus).await?;
            if left.is_empty() {
                return Ok(());
            }
            if begun.elapsed() > DRAIN_MAX {
                let status = members.status();
                return Err(format!(
                    "stuck: not over a quarter of an hour after everything was healed: {left:?}\n{status}"
                ));
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
        }
    }

    /// What is still to be done, in words.
    async fn left(&self, bus: &EventBus) -> Result<Vec<String>, String> {
        let failed = |error| format!("cannot be asked what is left: {error:?}");
        let mut left = Vec::new();
        let mut add = |count: usize, what: &str| {
            if count > 0 {
                left.push(format!("{count} {what}"));
            }
        };
        let rows = self.stores.rows().await.map_err(failed)?;
        add(rows.len(), "messages in the outbox");
        let scheduled = self.stores.scheduled().await.map_err(failed)?;
        add(scheduled, "messages in the schedule");
        for unit in [&self.work, &self.followed] {
            // What a commit could not send, the next one would.
            drop(unit.sound().flush().await);
            let unsent = unit.sound().outbox_len().await;
            add(unsent, "messages of a unit of work");
        }
        for (group, topic) in [(WORKERS, WORK), (FOLLOWERS, FOLLOWED)] {
            add(self.lag(group, topic).await?, "messages to settle");
            let held = retry_held(bus, group).await.map_err(failed)?;
            add(held.len(), "held keys");
        }
        let held = retry_held(bus, RELAYS).await.map_err(failed)?;
        add(held.len(), "held keys of relays");
        Ok(left)
    }

    async fn lag(&self, group: &'static str, topic: Topic) -> Result<usize, String> {
        let request = AdminRequest::Lag {
            group: Group::from_static(group),
            topics: vec![topic],
        };
        match self.broker.admin(request).await {
            Ok(AdminReply::Lag(lanes)) => {
                let lag: u64 = lanes.iter().map(|lane| lane.messages).sum();
                usize::try_from(lag).map_err(|error| error.to_string())
            }
            // A topic that nobody published to has no lag.
            Err(error) if error.kind() == eventbus_core::ErrorKind::NotFound => Ok(0),
            other => Err(format!("the lag cannot be read: {other:?}")),
        }
    }
}

/// Tries every parked key again; returns all that is held.
async fn retry_held(bus: &EventBus, group: &str) -> eventbus_core::Result<Vec<HeldReport>> {
    let desk = bus.held_keys(group)?;
    let held = desk.list().await?;
    for report in held.iter().filter(|report| report.wait.is_parked()) {
        // One that was decided about already goes on by itself.
        desk.retry(&report.held, "simulation", "everything is healed")
            .await?;
    }
    Ok(held)
}
