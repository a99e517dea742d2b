//! What happened, read back from the topics by a reader that moves no group.

use std::collections::HashSet;

use anyhow::Context as _;
use eventbus::prelude::{EventBus, Start, Topic, Until};

use crate::events::{OrderId, topics};

/// Every event there was, in the order of its time.
#[derive(Debug)]
pub struct History(Vec<Recorded>);

/// What the timeline and the summary want to know of an event.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Its id.
    pub id: String,
    /// The event that caused it.
    pub cause: Option<String>,
    /// Its type.
    pub event_type: String,
    /// The service that published it.
    pub source: String,
    /// When, in microseconds since 1970.
    pub micros: i64,
    /// The order.
    pub order_id: String,
}

impl History {
    /// Reads all topics of the shop from their beginning to now.
    ///
    /// # Errors
    ///
    /// When the broker cannot read from the beginning.
    pub async fn read(bus: &EventBus) -> anyhow::Result<Self> {
        let topics: Vec<Topic> = topics().into_iter().map(|topic| topic.name).collect();
        let reader = bus.read(&topics, Start::Earliest, Some(Until::Now)).await;
        let mut reader = reader.context("read the topics from their beginning")?;
        let mut events = Vec::new();
        while let Some(record) = reader.next().await? {
            let envelope = bus.envelope(&record.message)?;
            let order_id = record.message.key.map(|key| key.to_string());
            events.push(Recorded {
                id: envelope.id.to_string(),
                cause: envelope.causation_id,
                event_type: envelope.event_type,
                source: envelope.source,
                micros: envelope.time.as_micros(),
                order_id: order_id.unwrap_or_default(),
            });
        }
        events.sort_by_key(|event| event.micros);
        Ok(Self(events))
    }

    /// The events of one order, each once.
    pub fn of(&self, order_id: OrderId) -> Vec<Recorded> {
        let order_id = order_id.to_string();
        let mut seen = HashSet::new();
        let events = self.0.iter().filter(|event| event.order_id == order_id);
        let events = events.filter(|event| seen.insert(&event.id));
        events.cloned().collect()
    }

    /// How many events these orders made, and how many copies of them there are besides:
    /// at-least-once may publish one again.
    pub fn count(&self, orders: &HashSet<String>) -> (usize, usize) {
        let mut ids = HashSet::new();
        let mut again = 0;
        for event in self
            .0
            .iter()
            .filter(|event| orders.contains(&event.order_id))
        {
            if !ids.insert(&event.id) {
                again += 1;
            }
        }
        (ids.len(), again)
    }
}
