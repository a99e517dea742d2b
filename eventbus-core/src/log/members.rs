//! The members and readers of one client, which end with it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use crate::{
    Error, ErrorKind, Group, LeaseConfig, LeaseStore, LeaseTopic, Leaseholder, Member, Result,
    Subscription,
};

use super::deliveries::{LogDeliveries, LogSettlement, Seat};
use super::{Log, MemberHandle, TopicLanes};

/// All members and readers that a client of a log has.
#[derive(Debug)]
pub struct Members<L: Log> {
    closed: AtomicBool,
    members: Mutex<Vec<Weak<MemberHandle<L>>>>,
}

/// The group that a member joins.
#[derive(Debug)]
#[allow(clippy::exhaustive_structs, reason = "adapters create it")]
pub struct Joining<'t> {
    /// The group's name.
    pub group: Group,
    /// The group, as the adapter numbers it.
    pub number: i64,
    /// What the member reads.
    pub topics: &'t [Arc<TopicLanes>],
    /// How long it keeps its partitions when it says nothing.
    pub lease: Duration,
}

impl<L: Log> Default for Members<L> {
    fn default() -> Self {
        Self {
            closed: AtomicBool::new(false),
            members: Mutex::default(),
        }
    }
}

impl<L: Log> Members<L> {
    /// Refuses what is asked of a client that was closed.
    ///
    /// # Errors
    ///
    /// `Closed` from [`close`](Self::close) on.
    pub fn check_open(&self, operation: &'static str) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Closed,
                operation,
                "the broker handle is closed: connect again",
            ));
        }
        Ok(())
    }

    /// Has a member join a group by a store of leases, which is told when the member has left.
    ///
    /// # Errors
    ///
    /// `Closed` where the client was closed meanwhile.
    pub fn join<S: LeaseStore>(
        &self,
        log: L,
        subscription: &Subscription,
        joining: Joining<'_>,
        leases: impl FnOnce(Arc<AtomicBool>) -> S,
    ) -> Result<Member> {
        let ended = Arc::new(AtomicBool::new(false));
        let leases = leases(Arc::clone(&ended));
        let topics = joining.topics.iter().map(|topic| LeaseTopic {
            name: topic.name.clone(),
            partitions: topic.partitions,
        });
        let config = LeaseConfig::new(joining.group, topics.collect())
            .with_ttl(joining.lease)
            .with_revoke_timeout(subscription.limits.revoke_timeout);
        let leaseholder = Leaseholder::join(Arc::new(leases), config);
        let seat = Seat {
            group: joining.number,
            member: leaseholder.member(),
            held: leaseholder.held(),
        };
        let handle = MemberHandle::new(log, subscription.limits, ended, Some(seat));
        self.admit(Arc::new(handle), Some(leaseholder))
    }

    /// Has a reader end with the client.
    ///
    /// # Errors
    ///
    /// `Closed` where the client was closed meanwhile.
    pub fn read(&self, reader: Arc<MemberHandle<L>>) -> Result<Member> {
        self.admit(reader, None)
    }

    fn admit(
        &self,
        handle: Arc<MemberHandle<L>>,
        leaseholder: Option<Leaseholder>,
    ) -> Result<Member> {
        {
            let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
            self.check_open("subscribe")?;
            members.retain(|member| member.strong_count() > 0);
            members.push(Arc::downgrade(&handle));
        }
        Ok(Member::new(
            Box::new(LogDeliveries::new(Arc::clone(&handle), leaseholder)),
            Box::new(LogSettlement::new(handle)),
        ))
    }

    /// Ends all of them, and frees what they hold.
    ///
    /// # Errors
    ///
    /// The first of those of leaving; what is not freed is free when its lease is over.
    pub async fn close(&self) -> Result<()> {
        let members = {
            let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
            self.closed.store(true, Ordering::Release);
            std::mem::take(&mut *members)
        };
        let mut closed = Ok(());
        for member in members.iter().filter_map(Weak::upgrade) {
            closed = closed.and(member.leave().await);
        }
        closed
    }
}
