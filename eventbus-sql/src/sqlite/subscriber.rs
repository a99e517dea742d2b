//! Joining a group, or opening a reader.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use async_trait::async_trait;
use eventbus_core::{
    Group, LeaseConfig, LeaseTopic, Leaseholder, Member, Result, Start, Subscriber, Subscription,
    Until,
};

use super::broker::SqliteBroker;
use super::database::Shared;
use super::leases::SqliteLeases;
use super::page::to_u64;
use eventbus_core::log::{LogDeliveries, LogSettlement, MemberHandle, Place, Seat, TopicLanes};

#[async_trait]
impl Subscriber for SqliteBroker {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        self.client().check_open("subscribe")?;
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
    group: &Group,
    topics: &[Arc<TopicLanes>],
    subscription: &Subscription,
) -> Result<(Arc<MemberHandle<Shared>>, Option<Leaseholder>)> {
    let group = database
        .join_group(group, topics, subscription.start)
        .await?;
    let ended = Arc::new(AtomicBool::new(false));
    let leases = SqliteLeases::new(database.clone(), group.clone(), Arc::clone(&ended));
    let shared = topics.iter().map(|topic| LeaseTopic {
        name: topic.name.clone(),
        partitions: topic.partitions,
    });
    let config = LeaseConfig::new(group.name.clone(), shared.collect())
        .with_ttl(database.config.lease)
        .with_revoke_timeout(subscription.limits.revoke_timeout);
    let leaseholder = Leaseholder::join(Arc::new(leases), config);
    let seat = Seat {
        group: group.id,
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
    let now = database.now();
    let mut places = Vec::new();
    for topic in topics {
        for (partition, lane) in topic.lanes() {
            let row = database.lane(lane).await?;
            let until = match subscription.until {
                None => u64::MAX,
                Some(Until::Position(position)) => to_u64(position),
                Some(Until::Time(time)) if now >= time.into() => {
                    database.first_at_or_after(lane, time.into()).await?
                }
                Some(Until::Time(time)) => {
                    handle.end_at(time.into());
                    u64::MAX
                }
                Some(_) => row.next,
            };
            let position = match subscription.start {
                Start::Earliest => row.base,
                Start::Latest => row.next,
                start => database.start_position(lane, start).await?,
            };
            let end = database.wakes.lane(lane, row.next.into());
            end.listen(&handle.notify);
            places.push(Place {
                topic: Arc::clone(topic),
                partition,
                position: position.into(),
                until: until.into(),
                end,
                epoch: None,
            });
        }
    }
    handle.open(places);
    Ok(handle)
}
