//! Joining a group, or opening a reader.

use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::log::{Joining, MemberHandle, Place, TopicLanes, distinct};
use eventbus_core::{Member, Result, Start, Subscriber, Subscription, Until};

use super::broker::SqliteBroker;
use super::database::Shared;
use super::leases::SqliteLeases;
use super::page::to_u64;

#[async_trait]
impl Subscriber for SqliteBroker {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        let members = &self.client().members;
        members.check_open("subscribe")?;
        subscription.check()?;
        let database = &self.client().database;
        let topics = distinct(database.topics_of(&subscription.topics).await?);
        let Some(name) = &subscription.group else {
            return members.read(read(database, &topics, &subscription).await?);
        };
        let group = database.join_group(name, &topics, subscription.start);
        let group = group.await?;
        let joining = Joining {
            group: group.name.clone(),
            number: group.id,
            topics: &topics,
            lease: database.config.lease,
        };
        members.join(database.clone(), &subscription, joining, |ended| {
            SqliteLeases::new(database.clone(), group.clone(), ended)
        })
    }
}

async fn read(
    database: &Shared,
    topics: &[Arc<TopicLanes>],
    subscription: &Subscription,
) -> Result<Arc<MemberHandle<Shared>>> {
    let handle = MemberHandle::reader(database.clone(), subscription.limits);
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
                left: None,
                end,
                epoch: None,
            });
        }
    }
    handle.open(places);
    Ok(handle)
}
