//! Joining a group, or opening a reader.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use async_trait::async_trait;
use eventbus_core::{
    Group, LeaseConfig, LeaseTopic, Leaseholder, Member, Result, Subscriber, Subscription, Until,
};

use super::broker::PostgresBroker;
use super::database::Shared;
use super::groups::lanes_of;
use super::leases::PostgresLeases;
use super::page::{LaneRow, to_u64};
use eventbus_core::log::{LogDeliveries, LogSettlement, MemberHandle, Place, Seat, TopicLanes};

const SUBSCRIBE: &str = "subscribe";

#[async_trait]
impl Subscriber for PostgresBroker {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        self.client().check_open(SUBSCRIBE)?;
        subscription.check()?;
        let database = &self.client().database;
        let topics = distinct(database.topics_of(&subscription.topics).await?);
        let (handle, leaseholder) = match &subscription.group {
            Some(group) => join(database, group, &topics, &subscription).await?,
            None => (read(database, &topics, &subscription).await?, None),
        };
        self.client().adopt(&handle)?;
        Ok(Member::new(
            Box::new(LogDeliveries::new(Arc::clone(&handle), leaseholder)),
            Box::new(LogSettlement::new(handle)),
        ))
    }
}

fn distinct(topics: Vec<Arc<TopicLanes>>) -> Vec<Arc<TopicLanes>> {
    let mut distinct: Vec<Arc<TopicLanes>> = Vec::with_capacity(topics.len());
    for topic in topics {
        if distinct.iter().all(|known| known.name != topic.name) {
            distinct.push(topic);
        }
    }
    distinct
}

async fn join(
    database: &Shared,
    name: &Group,
    topics: &[Arc<TopicLanes>],
    subscription: &Subscription,
) -> Result<(Arc<MemberHandle<Shared>>, Option<Leaseholder>)> {
    let group = database
        .join_group(name, topics, subscription.start)
        .await?;
    let ended = Arc::new(AtomicBool::new(false));
    let leases = PostgresLeases::new(database.clone(), Arc::clone(&ended));
    let shared = topics.iter().map(|topic| LeaseTopic {
        name: topic.name.clone(),
        partitions: topic.partitions,
    });
    let config = LeaseConfig::new(name.clone(), shared.collect())
        .with_ttl(database.config.lease)
        .with_revoke_timeout(subscription.limits.revoke_timeout);
    let leaseholder = Leaseholder::join(Arc::new(leases), config);
    let seat = Seat {
        group,
        member: leaseholder.member(),
        held: leaseholder.held(),
    };
    let handle = MemberHandle::new(database.clone(), subscription.limits, ended, Some(seat));
    Ok((Arc::new(handle), Some(leaseholder)))
}

async fn read(
    database: &Shared,
    topics: &[Arc<TopicLanes>],
    subscription: &Subscription,
) -> Result<Arc<MemberHandle<Shared>>> {
    let ended = Arc::new(AtomicBool::new(false));
    let handle = MemberHandle::new(database.clone(), subscription.limits, ended, None);
    let handle = Arc::new(handle);
    let lanes = lanes_of(topics);
    let starts = database.start_positions(SUBSCRIBE, &lanes, subscription.start);
    let starts = starts.await?;
    let rows = database.lanes(SUBSCRIBE, &lanes).await?;
    let ends = ends(&lanes, &rows, subscription.until, &handle);
    let mut places = Vec::new();
    for topic in topics {
        for (partition, lane) in topic.lanes() {
            let next = rows.get(&lane).map_or(0, |row| row.next);
            let end = database.wakes.lane(lane, next.into());
            end.listen(&handle.notify);
            places.push(Place {
                topic: Arc::clone(topic),
                partition,
                position: starts.get(&lane).copied().unwrap_or(0).into(),
                until: ends.get(&lane).copied().unwrap_or(u64::MAX).into(),
                end,
                epoch: None,
            });
        }
    }
    handle.open(places);
    Ok(handle)
}

/// Where a reader ends on each lane, as far as that is known already.
fn ends(
    lanes: &[u32],
    rows: &HashMap<u32, LaneRow>,
    until: Option<Until>,
    handle: &MemberHandle<Shared>,
) -> HashMap<u32, u64> {
    match until {
        None => HashMap::new(),
        Some(Until::Position(position)) => {
            let position = to_u64(position);
            lanes.iter().map(|lane| (*lane, position)).collect()
        }
        Some(Until::Time(time)) => {
            // The reader finds out when the clock of the database is there, which may be now.
            handle.end_at(time.into());
            HashMap::new()
        }
        Some(_) => rows.iter().map(|(lane, row)| (*lane, row.next)).collect(),
    }
}
