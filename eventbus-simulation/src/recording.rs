//! Notes what a broker really does, beneath whatever stands between it and the SDK.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use eventbus_core::{
    AdminReply, AdminRequest, Broker, Capabilities, Deliveries, Delivery, Lane, Member, Message,
    Outcome, PublishError, Publisher, Receipt, Result, Settlement, Signal, Subscriber,
    Subscription, Topic,
};
use eventbus_verify::{Entry, Operation, Phase, Stamp};

use crate::event::{self, FOLLOWED};
use crate::journal::Journal;
use crate::world::Books;

/// A broker, and the process that uses it.
#[derive(Clone, Debug)]
pub(crate) struct Recording {
    inner: Arc<dyn Broker>,
    process: u32,
    books: Books,
}

impl Recording {
    pub(crate) fn new(inner: Arc<dyn Broker>, process: u32, books: Books) -> Self {
        Self {
            inner,
            process,
            books,
        }
    }

    /// What a message on its way to the broker is to the ledger.
    fn entry(message: &Message) -> Option<Entry> {
        let (stamp, checksum) = event::read(message)?;
        match message.headers.get_str("eb-dlq-group") {
            // The calls of handlers end long after what they published was sent.
            None if message.topic == FOLLOWED => None,
            None => Some(Entry::of(Operation::Send, stamp).with_checksum(checksum)),
            Some(group) => {
                let entry = Entry::of(Operation::DeadLetter, stamp);
                Some(entry.with_group(Books::group_of(group)))
            }
        }
    }

    fn journal(&self, message: &Message) -> &Journal {
        let topic = message.headers.get_str("eb-dlq-topic");
        self.books.of(topic.unwrap_or(message.topic.as_str()))
    }
}

#[async_trait]
impl Publisher for Recording {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        let entries: Vec<_> = batch
            .iter()
            .map(|message| Some((self.journal(message), Self::entry(message)?)))
            .collect();
        let session = self.books.work.session();
        let note = |index: usize, phase| {
            if let Some((journal, entry)) = entries[index] {
                journal.note(self.process, session, phase, entry);
            }
        };
        let count = batch.len();
        (0..count).for_each(|index| note(index, Phase::Invoke));
        let result = self.inner.publish(batch).await;
        let mut phases = vec![Phase::Ok; count];
        if let Err(error) = &result {
            for unpublished in &error.unpublished {
                phases[unpublished.index] = match unpublished.outcome {
                    Outcome::NotTaken => Phase::Fail,
                    Outcome::Unknown => Phase::Unknown,
                };
            }
        }
        for (index, phase) in phases.into_iter().enumerate() {
            note(index, phase);
        }
        result
    }
}

#[async_trait]
impl Subscriber for Recording {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        let Some(group) = subscription.group.clone() else {
            return self.inner.subscribe(subscription).await;
        };
        let member = self.inner.subscribe(subscription).await?;
        let notes = Arc::new(Notes {
            group: Books::group_of(group.as_str()),
            process: self.process,
            books: self.books.clone(),
            places: Mutex::default(),
        });
        Ok(Member::new(
            Box::new(RecordedDeliveries {
                inner: member.deliveries,
                notes: Arc::clone(&notes),
            }),
            Box::new(RecordedSettlement {
                inner: member.settlement,
                notes,
            }),
        ))
    }
}

#[async_trait]
impl Broker for Recording {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        self.inner.admin(request).await
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

/// What the two halves of a member know.
#[derive(Debug)]
struct Notes {
    group: u16,
    process: u32,
    books: Books,
    places: Mutex<Places>,
}

#[derive(Debug, Default)]
struct Places {
    /// The topic and the partition of each lane that was ever assigned.
    lanes: HashMap<u32, (Topic, u32)>,
    /// What was handed out and not settled, by its receipt.
    unsettled: HashMap<Receipt, (Topic, Stamp)>,
}

impl Notes {
    fn hear(&self, signal: &Signal) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        match signal {
            Signal::Assigned(assignments) => {
                for assignment in assignments {
                    let place = (assignment.topic.clone(), assignment.partition);
                    places.lanes.insert(assignment.lane.id, place);
                }
            }
            Signal::Delivered(deliveries) => {
                for delivery in deliveries {
                    self.deliver(&mut places, delivery);
                }
            }
            _ => {}
        }
    }

    fn deliver(&self, places: &mut Places, delivery: &Delivery) {
        let topic = delivery.message.topic.clone();
        let journal = self.books.of(topic.as_str());
        let Some((stamp, checksum)) = event::read(&delivery.message) else {
            let entry = Entry::new(Operation::Deliver).with_group(self.group);
            journal.note(self.process, 0, Phase::Fail, entry);
            return;
        };
        let lane = places.lanes.get(&delivery.receipt.lane.id);
        let partition = lane.map_or(0, |(_, partition)| *partition);
        let mut entry = Entry::of(Operation::Deliver, stamp)
            .with_group(self.group)
            .with_checksum(checksum);
        if let Some(position) = delivery.position {
            let position = u64::try_from(position.0).expect("positions in memory are numbers");
            entry = entry.with_position(partition, position);
        }
        journal.note(self.process, 0, Phase::Ok, entry);
        places.unsettled.insert(delivery.receipt, (topic, stamp));
    }

    /// Those of them that were handed out, with the topic each is of.
    fn take(&self, settled: &[Receipt]) -> Vec<(Topic, Entry)> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        settled
            .iter()
            .filter_map(|receipt| places.unsettled.remove(receipt))
            .map(|(topic, stamp)| {
                let entry = Entry::of(Operation::Settle, stamp);
                (topic, entry.with_group(self.group))
            })
            .collect()
    }
}

#[derive(Debug)]
struct RecordedDeliveries {
    inner: Box<dyn Deliveries>,
    notes: Arc<Notes>,
}

#[async_trait]
impl Deliveries for RecordedDeliveries {
    async fn next(&mut self) -> Result<Signal> {
        let signal = self.inner.next().await?;
        self.notes.hear(&signal);
        Ok(signal)
    }

    async fn close(self: Box<Self>) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct RecordedSettlement {
    inner: Box<dyn Settlement>,
    notes: Arc<Notes>,
}

#[async_trait]
impl Settlement for RecordedSettlement {
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()> {
        let Notes { books, process, .. } = &*self.notes;
        for (topic, entry) in self.notes.take(settled) {
            let journal = books.of(topic.as_str());
            journal.note(*process, 0, Phase::Invoke, entry);
        }
        self.inner.settle(settled).await
    }

    async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        self.inner.release(lanes).await
    }
}
