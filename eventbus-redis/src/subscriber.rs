//! Joining a group, or opening a reader.

use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::log::{Joining, MemberHandle, Place, TopicLanes, distinct};
use eventbus_core::{Member, Position, Result, Subscriber, Subscription, Until};

use crate::broker::RedisBroker;
use crate::database::Shared;
use crate::leases::RedisLeases;
use crate::pages;
use crate::topics::stream;

const SUBSCRIBE: &str = "subscribe";

#[async_trait]
impl Subscriber for RedisBroker {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        let members = &self.client().members;
        members.check_open(SUBSCRIBE)?;
        subscription.check()?;
        let shared = &self.client().shared;
        let database = &shared.database;
        let mut topics = Vec::with_capacity(subscription.topics.len());
        for name in &subscription.topics {
            topics.push(database.meet_topic(SUBSCRIBE, name).await?);
        }
        let topics = distinct(topics);
        let Some(group) = &subscription.group else {
            return members.read(read(shared, &topics, &subscription).await?);
        };
        let begun = database.join_group(SUBSCRIBE, group, &topics, subscription.start);
        let joining = Joining {
            group: group.clone(),
            number: begun.await?,
            topics: &topics,
            lease: database.config.lease,
        };
        members.join(shared.clone(), &subscription, joining, |ended| {
            RedisLeases::new(Arc::clone(database), ended)
        })
    }
}

async fn read(
    shared: &Shared,
    topics: &[Arc<TopicLanes>],
    subscription: &Subscription,
) -> Result<Arc<MemberHandle<Shared>>> {
    let database = &shared.database;
    let handle = MemberHandle::reader(shared.clone(), subscription.limits);
    let mut places = Vec::new();
    for topic in topics {
        for (partition, row) in topic.lanes() {
            let stream = stream(topic, partition);
            let (server, start) = (&database.server, subscription.start);
            let look = pages::look(server, SUBSCRIBE, &stream).await?;
            let position = pages::start(server, SUBSCRIBE, &stream, look, start).await?;
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
                left: None,
                epoch: None,
            });
        }
    }
    handle.open(places);
    Ok(handle)
}
