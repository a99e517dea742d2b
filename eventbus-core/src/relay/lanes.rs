//! The lanes that a relay has: by lease, and by a claim on what is held there.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::{OUTBOX, Relay};
use crate::error::Result;
use crate::key_state::{Claim, HeldName, KeyStateStore};
use crate::lease::{LeaseConfig, LeaseSignal, LeaseTopic, Leaseholder};
use crate::message::Group;
use crate::outbox::OUTBOX_LANES;
use crate::topic::TopicPartition;

/// How long a lane may be kept after it is to be given away: a batch ends in that time.
const REVOKE_TIMEOUT: Duration = Duration::from_secs(5);

/// How many lanes are claimed at the same time.
const CLAIMS_MAX: usize = 4;

/// The lanes of one relay.
#[derive(Debug)]
pub(super) struct Lanes {
    leaseholder: Leaseholder,
    /// What this relay says of itself to the others: the lanes, and where it publishes to.
    topics: Vec<LeaseTopic>,
    held: Arc<dyn KeyStateStore>,
    group: Group,
    lanes: BTreeMap<u32, Lane>,
    /// Granted and not claimed yet.
    granted: Vec<TopicPartition>,
    /// To be given away: nothing of them is published any more.
    leaving: Vec<TopicPartition>,
}

/// One lane while it is ours.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) claim: Claim,
    /// Names of which messages are put aside: later ones go behind them.
    pub(super) names: HashSet<HeldName>,
}

impl Lanes {
    pub(super) fn new(relay: &Relay) -> Self {
        let topic = LeaseTopic {
            name: OUTBOX,
            partitions: OUTBOX_LANES,
        };
        let mut topics = vec![topic];
        // Without partitions, so that there is nothing to share out: others only see that it is there.
        topics.extend(relay.target.clone().map(|name| LeaseTopic {
            name,
            partitions: 0,
        }));
        let config = LeaseConfig::new(relay.name.clone(), topics.clone())
            .with_ttl(relay.ttl)
            .with_revoke_timeout(REVOKE_TIMEOUT);
        Self {
            leaseholder: Leaseholder::join(Arc::clone(&relay.leases), config),
            topics,
            held: Arc::clone(&relay.held),
            group: relay.name.clone(),
            lanes: BTreeMap::new(),
            granted: Vec::new(),
            leaving: Vec::new(),
        }
    }

    /// Takes in what changed.
    pub(super) fn update(&mut self) -> Result<()> {
        while let Some(signal) = self.leaseholder.next().now_or_never() {
            self.hear(signal)?;
        }
        Ok(())
    }

    /// Claims what is new; whether there was any.
    pub(super) async fn claim(&mut self) -> Result<bool> {
        let claim = |place| self.held.claim(&self.group, place);
        let claims: Vec<_> = self.granted.iter().map(claim).collect();
        let claims = stream::iter(claims).buffered(CLAIMS_MAX);
        let claimed: Vec<_> = claims.try_collect().await?;
        let is_new = !claimed.is_empty();
        for (place, (claim, names)) in self.granted.drain(..).zip(claimed) {
            let names = names.into_iter().collect();
            self.lanes.insert(place.partition, Lane { claim, names });
        }
        Ok(is_new)
    }

    /// Whether lanes are to be released.
    pub(super) fn are_leaving(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// Gives lanes away that are to be released: no batch of theirs is under way, and what was
    /// published of them is removed.
    pub(super) fn release(&mut self) {
        let leaving = std::mem::take(&mut self.leaving);
        self.leaseholder.held().release(&leaving);
    }

    /// Waits until something changes, which [`update`](Self::update) takes in.
    pub(super) async fn changed(&mut self) -> Result<()> {
        let signal = self.leaseholder.next().await;
        self.hear(signal)
    }

    fn hear(&mut self, signal: Result<LeaseSignal>) -> Result<()> {
        match signal {
            Ok(LeaseSignal::Granted(leases)) => {
                self.granted
                    .extend(leases.into_iter().map(|lease| lease.place));
            }
            Ok(LeaseSignal::Revoking(places)) => {
                self.forget(&places);
                self.leaving.extend(places);
            }
            Ok(LeaseSignal::Lost(places)) => {
                self.forget(&places);
                self.leaving.retain(|leaving| !places.contains(leaving));
            }
            Err(error) if error.is_retryable() => {
                tracing::warn!(relay = %self.group, error = %error, "leases are asked for again");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn forget(&mut self, places: &[TopicPartition]) {
        for place in places {
            self.lanes.remove(&place.partition);
        }
        self.granted.retain(|granted| !places.contains(granted));
    }

    /// Has a lane claimed anew: another relay claimed it later, though the lease is ours.
    pub(super) fn reclaim(&mut self, lane: u32) {
        if let Some(lane) = self.lanes.remove(&lane) {
            self.granted.push(lane.claim.place);
        }
    }

    /// How many relays of this outbox publish to another target.
    pub(super) fn elsewhere(&self) -> usize {
        let is_named = |topic: &LeaseTopic| self.topics.iter().any(|ours| ours.name == topic.name);
        let held = self.leaseholder.held();
        held.count_members(|member| {
            member.topics.len() != self.topics.len() || !member.topics.iter().all(is_named)
        })
    }

    /// The lanes that are ours now, by the clock.
    pub(super) fn numbers(&self) -> Vec<u32> {
        let held = self.leaseholder.held();
        let ours = |lane: &&Lane| held.epoch(&lane.claim.place).is_some();
        let lanes = self.lanes.values().filter(ours);
        lanes.map(|lane| lane.claim.place.partition).collect()
    }

    pub(super) fn is_ours(&self, lane: u32) -> bool {
        let found = self.lanes.get(&lane);
        found.is_some_and(|found| self.leaseholder.held().epoch(&found.claim.place).is_some())
    }

    pub(super) fn claims(&self) -> Vec<Claim> {
        self.lanes.values().map(|lane| lane.claim.clone()).collect()
    }

    pub(super) fn get_mut(&mut self, lane: u32) -> Option<&mut Lane> {
        self.lanes.get_mut(&lane)
    }

    pub(super) fn holds(&self, lane: u32, name: &HeldName) -> bool {
        let found = self.lanes.get(&lane);
        found.is_some_and(|found| found.names.contains(name))
    }

    /// Gives everything away.
    pub(super) async fn leave(self) -> Result<()> {
        self.leaseholder.close().await
    }
}
