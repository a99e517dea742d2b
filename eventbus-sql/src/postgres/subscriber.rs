//! Joining a group, or opening a reader.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::log::{Joining, MemberHandle, Place, TopicLanes, distinct};
use eventbus_core::{Member, Result, Subscriber, Subscription, Until};

use super::broker::PostgresBroker;
use super::database::Shared;
use super::groups::lanes_of;
use super::leases::PostgresLeases;
use super::page::{LaneRow, to_u64};

const SUBSCRIBE: &str = "subscribe";

#[async_trait]
impl Subscriber for PostgresBroker {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        let members = &self.client().members;
        members.check_open(SUBSCRIBE)?;
        subscription.check()?;
        let database = &self.client().database;
        let topics = distinct(database.topics_of(&subscription.topics).await?);
        let Some(name) = &subscription.group else {
            return members.read(read(database, &topics, &subscription).await?);
        };
        let group = database.join_group(name, &topics, subscription.start);
        let group = group.await?;
        let joining = Joining {
            group: name.clone(),
            number: group,
            topics: &topics,
            lease: database.config.lease,
        };
        members.join(database.clone(), &subscription, joining, |ended| {
            PostgresLeases::new(database.clone(), ended)
        })
    }
}

async fn read(
    database: &Shared,
    topics: &[Arc<TopicLanes>],
    subscription: &Subscription,
) -> Result<Arc<MemberHandle<Shared>>> {
    let handle = MemberHandle::reader(database.clone(), subscription.limits);
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
                left: None,
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
