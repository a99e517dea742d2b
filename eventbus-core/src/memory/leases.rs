//! The in-memory store of leases: what a real one does, on tokio's clock.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::clock::FOREVER;
use crate::error::Result;
use crate::lease::{
    Lease, LeaseMember, LeaseReply, LeaseRequest, LeaseStore, LeaseTopic, MemberId, ProcessId,
};
use crate::message::Group;
use crate::topic::TopicPartition;

/// Keeps leases in this process, for tests of whoever uses leases. Clones share the leases.
///
/// Its clock is tokio's, so that paused time drives it; it tells every change at once.
#[derive(Clone, Debug, Default)]
pub struct MemoryLeases {
    groups: Arc<Mutex<HashMap<Group, GroupLeases>>>,
}

#[derive(Debug, Default)]
struct GroupLeases {
    members: BTreeMap<MemberId, MemberEntry>,
    /// Every place that was ever granted: its epoch outlives its holders.
    places: BTreeMap<TopicPartition, PlaceEntry>,
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct MemberEntry {
    process: ProcessId,
    topics: Vec<LeaseTopic>,
    /// When it ends without another exchange.
    until: Instant,
}

#[derive(Debug, Default)]
struct PlaceEntry {
    epoch: u64,
    holder: Option<MemberId>,
}

impl MemoryLeases {
    /// A store without groups.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Group, GroupLeases>> {
        // Nothing is left half done by a panic that a later call could not read.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl LeaseStore for MemoryLeases {
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        let mut groups = self.lock();
        let group = groups.entry(request.group.clone()).or_default();
        Ok(group.exchange(request, Instant::now()))
    }

    async fn leave(&self, group: &Group, member: MemberId) -> Result<()> {
        if let Some(group) = self.lock().get_mut(group) {
            group.end(|id, _| id == member);
        }
        Ok(())
    }

    async fn changed(&self, group: &Group) {
        let changed = {
            let mut groups = self.lock();
            Arc::clone(&groups.entry(group.clone()).or_default().changed)
        };
        changed.notified().await;
    }
}

impl GroupLeases {
    fn exchange(&mut self, request: &LeaseRequest, now: Instant) -> LeaseReply {
        self.end(|id, entry| entry.until <= now || request.dead.contains(&id));
        self.join(request, now);
        self.release(request);
        self.grant(request);
        self.reply()
    }

    /// Ends the members that `ends` names.
    fn end(&mut self, ends: impl Fn(MemberId, &MemberEntry) -> bool) {
        let before = self.members.len();
        self.members.retain(|id, entry| !ends(*id, entry));
        if self.members.len() == before {
            return;
        }
        self.changed.notify_waiters();
        for entry in self.places.values_mut() {
            entry.holder = entry.holder.filter(|id| self.members.contains_key(id));
        }
    }

    fn join(&mut self, request: &LeaseRequest, now: Instant) {
        let entry = MemberEntry {
            process: request.process.clone(),
            topics: request.topics.clone(),
            until: now + request.ttl.min(FOREVER),
        };
        if self.members.insert(request.member, entry).is_none() {
            self.changed.notify_waiters();
        }
    }

    fn release(&mut self, request: &LeaseRequest) {
        for lease in &request.released {
            if let Some(entry) = self.places.get_mut(&lease.place)
                && entry.holder == Some(request.member)
                && entry.epoch == lease.epoch
            {
                entry.holder = None;
                self.changed.notify_waiters();
            }
        }
    }

    fn grant(&mut self, request: &LeaseRequest) {
        for place in &request.wanted {
            let entry = self.places.entry(place.clone()).or_default();
            if entry.holder.is_none() {
                entry.epoch += 1;
                entry.holder = Some(request.member);
                self.changed.notify_waiters();
            }
        }
    }

    fn reply(&self) -> LeaseReply {
        let mut leases: HashMap<MemberId, Vec<Lease>> = HashMap::new();
        for (place, entry) in &self.places {
            if let Some(holder) = entry.holder {
                leases.entry(holder).or_default().push(Lease {
                    place: place.clone(),
                    epoch: entry.epoch,
                });
            }
        }
        let members = self.members.iter().map(|(id, entry)| {
            LeaseMember::new(*id, entry.process.clone(), entry.topics.clone())
                .with_leases(leases.remove(id).unwrap_or_default())
        });
        LeaseReply::new(members.collect())
    }
}
