//! Joining a group, or opening a reader.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use async_trait::async_trait;
use eventbus_core::log::{LogDeliveries, LogSettlement, MemberHandle, Place, Seat, TopicLanes};
use eventbus_core::{
    Group, LeaseConfig, LeaseTopic, Leaseholder, Member, Position, Result, Subscriber,
    Subscription, Until,
};

use crate::broker::RedisBroker;
use crate::database::Shared;
use crate::leases::RedisLeases;
use crate::pages;
use crate::topics::stream;

const SUBSCRIBE: &str = "subscribe";

#[async_trait]
impl Subscriber for RedisBroker {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        self.client().check_open(SUBSCRIBE)?;
        subscription.check()?;
        let shared = &self.client().shared;
        let mut topics: Vec<Arc<TopicLanes>> = Vec::new();
        for name in &subscription.topics {
            let topic = shared.database.meet_topic(SUBSCRIBE, name).await?;
            if topics.iter().all(|known| known.name != topic.name) {
                topics.push(topic);
            }
        }
        let (handle, leaseholder) = match &subscription.group {
            Some(group) => join(shared, group, &topics, &subscription).await?,
            None => (read(shared, &topics, &subscription).await?, None),
        };
        self.client().adopt(&handle)?;
        Ok(Member::new(
            Box::new(LogDeliveries::new(Arc::clone(&handle), leaseholder)),
            Box::new(LogSettlement::new(handle)),
        ))
    }
}

async fn join(
    shared: &Shared,
    name: &Group,
    topics: &[Arc<TopicLanes>],
    subscription: &Subscription,
) -> Result<(Arc<MemberHandle<Shared>>, Option<Leaseholder>)> {
    let database = &shared.database;
    let begun = database.join_group(SUBSCRIBE, name, topics, subscription.start);
    let group = begun.await?;
    let ended = Arc::new(AtomicBool::new(false));
    let leases = RedisLeases::new(Arc::clone(database), Arc::clone(&ended));
    let read = topics.iter().map(|topic| LeaseTopic {
        name: topic.name.clone(),
        partitions: topic.partitions,
    });
    let config = LeaseConfig::new(name.clone(), read.collect())
        .with_ttl(database.config.lease)
        .with_revoke_timeout(subscription.limits.revoke_timeout);
    let leaseholder = Leaseholder::join(Arc::new(leases), config);
    let seat = Seat {
        group,
        member: leaseholder.member(),
        held: leaseholder.held(),
    };
    let handle = MemberHandle::new(shared.clone(), subscription.limits, ended, Some(seat));
    Ok((Arc::new(handle), Some(leaseholder)))
}

async fn read(
    shared: &Shared,
    topics: &[Arc<TopicLanes>],
    subscription: &Subscription,
) -> Result<Arc<MemberHandle<Shared>>> {
    let (database, ended) = (&shared.database, Arc::new(AtomicBool::new(false)));
    let handle = MemberHandle::new(shared.clone(), subscription.limits, ended, None);
    let handle = Arc::new(handle);
    let mut places = Vec::new();
    for topic in topics {
        for (partition, row) in topic.lanes() {
            let stream = stream(topic, partition);
            let (server, start) = (&database.server, subscription.start);
            let position = pages::start(server, SUBSCRIBE, &stream, start).await?;
            let look = pages::look(server, SUBSCRIBE, &stream).await?;
            let end = database.wakes.lane(row, look.end());
            end.listen(&handle.notify);
            let until = match subscription.until {
                None => Position(u128::MAX),
                Some(Until::Position(position)) => position,
                Some(Until::Time(time)) => {
                    // The reader finds out when the server's date is there, which may be now.
                    handle.end_at(time.into());
                    Position(u128::MAX)
                }
                Some(_) => look.end(),
            };
            places.push(Place {
                topic: Arc::clone(topic),
                partition,
                position,
                until,
                end,
                epoch: None,
            });
        }
    }
    handle.open(places);
    Ok(handle)
}
