//! What was put aside: published when its time has come, or as operators decide.

use tokio::time::Instant;

use super::pass::is_of_the_message;
use super::runner::{LOOK_INTERVAL, Runner};
use crate::clock::Timestamp;
use crate::error::{Error, ErrorKind, Result};
use crate::key_state::{Claim, Due, DueName, HeldMessage, HeldName, KeyAction};

/// Names that are dealt with in one pass.
const NAMES_MAX: usize = 64;
/// Messages of them that are dealt with in one pass: what is next on the lanes waits meanwhile.
const MESSAGES_MAX: usize = 100;

/// What is known of when something that was put aside is to be dealt with, so that its store is not
/// asked in each pass.
#[derive(Debug)]
pub(super) struct DueLook {
    /// When it was asked last, and how often.
    asked: Option<Instant>,
    askings: u64,
    /// Something has changed since, or names were dealt with.
    is_stale: bool,
    /// When the next name's time comes, as it said.
    next: Option<Timestamp>,
    /// Up to which decision of operators it was asked.
    decisions: u64,
}

impl DueLook {
    pub(super) fn new() -> Self {
        Self {
            asked: None,
            askings: 0,
            is_stale: true,
            next: None,
            decisions: 0,
        }
    }

    /// Has the store asked in the next pass.
    pub(super) fn changed(&mut self) {
        self.is_stale = true;
    }

    /// How often the store was asked.
    pub(super) fn askings(&self) -> u64 {
        self.askings
    }

    /// Up to which decision it was asked.
    pub(super) fn decisions(&self) -> u64 {
        self.decisions
    }

    fn is_needed(&self, now: Timestamp) -> bool {
        let is_old = |asked: Instant| asked.elapsed() >= LOOK_INTERVAL;
        let is_time = self.next.is_some_and(|next| next <= now);
        self.is_stale || is_time || self.asked.is_none_or(is_old)
    }

    fn answered(&mut self, due: &Due) {
        self.asked = Some(Instant::now());
        self.askings += 1;
        // Names that are dealt with may have another time afterwards.
        self.is_stale = !due.names.is_empty();
        self.next = due.next;
        self.decisions = due.version;
    }
}

impl Runner {
    /// Deals with the names whose time has come; returns when the next one's does.
    pub(super) async fn publish_due(&mut self) -> Result<Option<Timestamp>> {
        let now = self.relay.bus.clock().now();
        if !self.due.is_needed(now) {
            return Ok(self.due.next);
        }
        let claims = self.lanes.claims();
        let due = self
            .relay
            .held
            .due(&self.relay.name, &claims, now, NAMES_MAX)
            .await?;
        self.due.answered(&due);
        let more = due.names.len() >= NAMES_MAX;
        let mut room = MESSAGES_MAX;
        for name in due.names {
            let lane = name.held.place.partition;
            let claim = claims.iter().find(|claim| claim.place == name.held.place);
            let Some(claim) = claim.filter(|_| self.lanes.is_ours(lane)) else {
                continue;
            };
            match self.deal_with(claim, &name, &mut room).await {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Conflict => self.lanes.reclaim(lane),
                Err(error) => return Err(error),
            }
        }
        let more = more || room == 0;
        Ok(if more { Some(now) } else { due.next })
    }

    /// Deals with what a name holds, as far as there is room: the rest of it is due still.
    async fn deal_with(&mut self, claim: &Claim, due: &DueName, room: &mut usize) -> Result<()> {
        let name = &due.held.name;
        let action = due.decision.as_ref().map(|decision| decision.action);
        let mut first = self.relay.held.advance(claim, name, None).await?;
        let mut given_up = match action {
            Some(KeyAction::Discard) => u64::MAX,
            Some(KeyAction::Release) => 1,
            _ => 0,
        };
        while let Some(message) = first {
            if *room == 0 {
                return Ok(());
            }
            *room -= 1;
            if given_up > 0 {
                given_up -= 1;
                self.tell_given_up(due, &message);
            } else if let Err(error) = self.publish_held(&message).await {
                return self.wait_again(claim, due, &message, &error).await;
            }
            let done = Some(message.number);
            first = self.relay.held.advance(claim, name, done).await?;
        }
        self.free(claim.place.partition, name);
        Ok(())
    }

    async fn publish_held(&self, message: &HeldMessage) -> Result<()> {
        let sent = self
            .relay
            .bus
            .send_in_time(vec![message.message.clone()])
            .await;
        sent.map_err(Error::from)?;
        self.relay.shared.lock().published += 1;
        metrics::counter!(super::RELAYED).increment(1);
        Ok(())
    }

    /// The message and what is behind it wait on: for an operator when the broker refuses it.
    async fn wait_again(
        &self,
        claim: &Claim,
        due: &DueName,
        message: &HeldMessage,
        error: &Error,
    ) -> Result<()> {
        let refused = is_of_the_message(error);
        let attempts = message.attempts.saturating_add(1);
        let until = (!refused).then(|| self.later(attempts));
        let mut wait = self.wait(until, error, attempts);
        wait.first_failed = message.first_failed.or(wait.first_failed);
        // A decision was carried out by trying: what failed is tried again at its time without one.
        let decided = due.decision.is_some();
        let held = &self.relay.held;
        held.wait(claim, &due.held.name, &wait, decided).await
    }

    fn free(&mut self, lane: u32, name: &HeldName) {
        if let Some(lane) = self.lanes.get_mut(lane) {
            lane.names.remove(name);
        }
    }

    fn tell_given_up(&self, due: &DueName, message: &HeldMessage) {
        let by = due.decision.as_ref().map_or("", |decision| &decision.by);
        tracing::warn!(
            relay = %self.relay.name, held = %due.held, topic = %message.message.topic, by,
            "an operator gave up a committed message: it is not published"
        );
        metrics::counter!(super::RELAY_GIVEN_UP).increment(1);
    }
}
