//! Reads topics without a group: a bounded look, or a tail.

use std::collections::HashMap;

use crate::broker::Member;
use crate::delivery::{Delivery, Lane, Position, Receipt, Signal};
use crate::error::Result;
use crate::message::{Message, Topic};

/// Reads messages without moving any group; made by [`EventBus::read`](crate::EventBus::read).
#[derive(Debug)]
pub struct Reader {
    member: Member,
    /// Where lanes that have not ended come from.
    lanes: HashMap<Lane, (Topic, u32)>,
    /// How many lanes there were to begin with.
    partitions: usize,
    ended: bool,
    delivered: std::vec::IntoIter<Delivery>,
    /// What `delivered` held, to be settled before more is asked for.
    unsettled: Vec<Receipt>,
    bounded: bool,
}

/// One message as a [`Reader`] finds it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Record {
    /// The message.
    pub message: Message,
    /// Its partition.
    pub partition: u32,
    /// Its place there, where the broker has positions.
    pub position: Option<Position>,
}

impl Reader {
    pub(crate) fn new(member: Member, bounded: bool) -> Self {
        Self {
            member,
            lanes: HashMap::new(),
            partitions: 0,
            ended: false,
            delivered: Vec::new().into_iter(),
            unsettled: Vec::new(),
            bounded,
        }
    }

    /// How many partitions it reads; known when it has been asked for a message.
    pub(crate) fn partitions(&self) -> usize {
        self.partitions
    }

    /// The next message: in order within a partition; `None` at the end of a bounded read.
    ///
    /// # Cancellation
    ///
    /// Safe: a dropped future has passed no message by.
    ///
    /// # Errors
    ///
    /// Those of the broker; after a retryable one the next call goes on.
    pub async fn next(&mut self) -> Result<Option<Record>> {
        loop {
            if let Some(delivery) = self.delivered.next() {
                let partition = self
                    .lanes
                    .get(&delivery.receipt.lane)
                    .map_or(0, |(_, partition)| *partition);
                return Ok(Some(Record {
                    message: delivery.message,
                    partition,
                    position: delivery.position,
                }));
            }
            if self.ended {
                return Ok(None);
            }
            if !self.unsettled.is_empty() {
                self.member.settlement.settle(&self.unsettled).await?;
                self.unsettled.clear();
            }
            match self.member.deliveries.next().await? {
                Signal::Assigned(assignments) => {
                    self.partitions += assignments.len();
                    for assignment in assignments {
                        self.lanes
                            .insert(assignment.lane, (assignment.topic, assignment.partition));
                    }
                }
                Signal::Delivered(deliveries) => {
                    let receipts = deliveries.iter().map(|delivery| delivery.receipt);
                    self.unsettled.extend(receipts);
                    self.delivered = deliveries.into_iter();
                }
                Signal::Ended(ended) => self.end(&ended),
                Signal::Lost(lost) | Signal::Revoking(lost) => self.end(&lost),
                Signal::Gap { lane, from, to } => {
                    let topic = self.lanes.get(&lane).map(|(topic, _)| topic.as_str());
                    tracing::warn!(topic, %from, %to, "messages vanished before they were read");
                }
            }
        }
    }

    fn end(&mut self, lanes: &[Lane]) {
        for lane in lanes {
            self.lanes.remove(lane);
        }
        self.ended = self.bounded && self.lanes.is_empty();
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::Reader;
    use crate::broker::{Deliveries, Member, Publisher as _, Settlement};
    use crate::bus::EventBus;
    use crate::delivery::{Lane, Receipt, Signal, Start, Until};
    use crate::error::Result;
    use crate::memory::MemoryBroker;
    use crate::message::{Message, Topic};

    #[tokio::test]
    async fn a_bounded_read_goes_past_partitions_that_are_empty() {
        let (first, last) = (Topic::from_static("first"), Topic::from_static("last"));
        let broker = MemoryBroker::new();
        let message = Message::new(last.clone(), "found").with_key("42");
        broker.publish(vec![message]).await.expect("there is room");
        let bus = EventBus::new(broker);
        let topics = [first, last];
        let reader = bus.read(&topics, Start::Earliest, Some(Until::Now)).await;
        let mut reader = reader.expect("the broker has a history");
        let found = reader.next().await.expect("it can be read");
        assert!(found.is_some_and(|record| record.message.payload == "found"));
        assert!(reader.next().await.expect("it ends").is_none());
    }

    #[derive(Debug)]
    struct Nothing;

    #[async_trait]
    impl Deliveries for Nothing {
        async fn next(&mut self) -> Result<Signal> {
            Ok(Signal::Ended(Vec::new()))
        }

        async fn close(self: Box<Self>) -> Result<()> {
            Ok(())
        }
    }

    #[async_trait]
    impl Settlement for Nothing {
        async fn settle(&mut self, _: &[Receipt]) -> Result<()> {
            Ok(())
        }

        async fn release(&mut self, _: &[Lane]) -> Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_bounded_read_of_topics_without_partitions_ends() {
        let member = Member::new(Box::new(Nothing), Box::new(Nothing));
        let mut reader = Reader::new(member, true);
        assert!(reader.next().await.expect("it ends").is_none());
        assert!(reader.next().await.expect("it has ended").is_none());
    }
}
