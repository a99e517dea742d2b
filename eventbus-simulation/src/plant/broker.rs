//! A broker with a bug, between the SDK and what notes the truth.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use eventbus_core::{
    AdminReply, AdminRequest, Broker, Capabilities, Deliveries, Delivery, Error, ErrorKind,
    EventId, Headers, Key, Lane, Member, Message, Outcome, PublishError, Publisher, Receipt,
    Result, Settlement, Signal, Subscriber, Subscription, Topic, Unpublished, header,
};
use tokio::time::sleep;

use super::{Bed, Plant};

/// A broker with the bug of a [`Bed`], if that is one of brokers.
#[derive(Clone, Debug)]
pub(crate) struct PlantedBroker {
    inner: Arc<dyn Broker>,
    bed: Bed,
}

impl PlantedBroker {
    pub(crate) fn new(inner: Arc<dyn Broker>, bed: Bed) -> Self {
        Self { inner, bed }
    }
}

fn is_dead_letter(message: &Message) -> bool {
    message.headers.get_str("eb-dlq-group").is_some()
}

fn key_of(message: &Message) -> Option<(&Topic, &Key)> {
    Some((&message.topic, message.key.as_ref()?))
}

/// The first two of a key.
fn pair_of_a_key(messages: &[&Message]) -> Option<(usize, usize)> {
    (0..messages.len()).find_map(|first| {
        let key = key_of(messages[first])?;
        let mut later = first + 1..messages.len();
        let second = later.find(|second| key_of(messages[*second]) == Some(key))?;
        Some((first, second))
    })
}

/// The same message under another id.
fn with_fresh_id(message: Message) -> Message {
    if message.headers.get_str(header::CAUSATION_ID).is_none() || is_dead_letter(&message) {
        return message;
    }
    let mut headers = Headers::builder();
    for (name, value) in message.headers.iter() {
        let fresh = EventId::new().to_string();
        let value = match name {
            header::ID => fresh.as_bytes(),
            _ => value,
        };
        headers = headers.push(name, value).expect("the headers were sound");
    }
    message.with_headers(headers.build())
}

#[async_trait]
impl Publisher for PlantedBroker {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        let bed = &self.bed;
        let (mut batch, mut places) = (batch, Vec::new());
        let count = batch.len();
        let drops = |message: &Message| match is_dead_letter(message) {
            true => bed.has(Plant::DropsDeadLetters),
            false => bed.strikes(Plant::DropsPublished, 7),
        };
        let kept = batch.into_iter().enumerate();
        let kept = kept.filter(|(_, message)| !drops(message));
        batch = kept
            .map(|(place, message)| {
                places.push(place);
                message
            })
            .collect();
        if batch.is_empty() {
            return Ok(());
        }
        let messages: Vec<&Message> = batch.iter().collect();
        if bed.has(Plant::SwapsPublished)
            && let Some((first, second)) = pair_of_a_key(&messages)
        {
            batch.swap(first, second);
        }
        if bed.has(Plant::FreshIds) {
            batch = batch.into_iter().map(with_fresh_id).collect();
        }
        if bed.has(Plant::AcknowledgesEarly) {
            let inner = Arc::clone(&self.inner);
            tokio::spawn(async move {
                sleep(Duration::from_millis(200)).await;
                // The bug: nobody hears of it.
                drop(inner.publish(batch).await);
            });
            return Ok(());
        }
        let sent = batch.clone();
        let Err(error) = self.inner.publish(batch).await else {
            return Ok(());
        };
        let error = misreport(bed, &sent, error);
        let Some(mut error) = error else {
            return Ok(());
        };
        for unpublished in &mut error.unpublished {
            unpublished.index = places[unpublished.index];
        }
        debug_assert!(error.unpublished.iter().all(|one| one.index < count));
        Err(error)
    }
}

/// What the caller is told of an error; nothing means ok.
fn misreport(bed: &Bed, sent: &[Message], mut error: PublishError) -> Option<PublishError> {
    let unpublished = &mut error.unpublished;
    let is_part = unpublished.len() < sent.len();
    if bed.has(Plant::OkForUnknown) {
        unpublished.retain(|one| one.outcome != Outcome::Unknown);
    }
    if bed.has(Plant::OkForRefused) {
        unpublished.retain(|one| one.outcome != Outcome::NotTaken);
    }
    if bed.has(Plant::OkForPart) && is_part {
        unpublished.clear();
    }
    if bed.has(Plant::BlamesAnother) && is_part {
        let failed: HashSet<usize> = unpublished.iter().map(|one| one.index).collect();
        let taken = sent.iter().enumerate();
        let taken = taken.filter(|(index, _)| !failed.contains(index));
        *unpublished = taken
            .map(|(index, message)| {
                let error = Error::new(ErrorKind::Unavailable, "publish", "planted");
                Unpublished::new(index, message.clone(), Outcome::NotTaken, error)
            })
            .collect();
    }
    (!error.unpublished.is_empty()).then_some(error)
}

#[async_trait]
impl Subscriber for PlantedBroker {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        let member = self.inner.subscribe(subscription).await?;
        let mischief = Arc::new(Mischief {
            bed: self.bed.clone(),
            broker: Arc::clone(&self.inner),
            settlement: tokio::sync::Mutex::new(member.settlement),
            unsettled: Mutex::default(),
        });
        Ok(Member::new(
            Box::new(PlantedDeliveries {
                inner: member.deliveries,
                mischief: Arc::clone(&mischief),
            }),
            Box::new(PlantedSettlement { mischief }),
        ))
    }
}

#[async_trait]
impl Broker for PlantedBroker {
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

/// What the two halves of a member share.
#[derive(Debug)]
struct Mischief {
    bed: Bed,
    broker: Arc<dyn Broker>,
    settlement: tokio::sync::Mutex<Box<dyn Settlement>>,
    /// What was handed out and not settled, in order.
    unsettled: Mutex<Vec<(Receipt, Message)>>,
}

impl Mischief {
    fn unsettled(&self) -> MutexGuard<'_, Vec<(Receipt, Message)>> {
        self.unsettled
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Settles what nobody gave a verdict on.
    async fn settle_unasked(&self, receipts: Vec<Receipt>) {
        // Where it fails, the bug does no harm this time.
        drop(self.settlement.lock().await.settle(&receipts).await);
    }

    fn take_unsettled(&self) -> Vec<Receipt> {
        let taken = std::mem::take(&mut *self.unsettled());
        taken.into_iter().map(|(receipt, _)| receipt).collect()
    }

    async fn deliver(&self, deliveries: &mut Vec<Delivery>) {
        let bed = &self.bed;
        let messages: Vec<&Message> = deliveries.iter().map(|one| &one.message).collect();
        let pair = pair_of_a_key(&messages);
        if let Some((first, second)) = pair {
            if bed.has(Plant::SwapsDelivered) {
                let message = deliveries[first].message.clone();
                deliveries[first].message = deliveries[second].message.clone();
                deliveries[second].message = message;
            }
            if bed.has(Plant::HoldsBack) {
                let late = deliveries.remove(first);
                deliveries.push(late);
            }
        }
        let mut dropped = Vec::new();
        deliveries.retain(|delivery| {
            let drops = bed.strikes(Plant::DropsDelivered, 7);
            dropped.extend(drops.then_some(delivery.receipt));
            !drops
        });
        for delivery in deliveries.iter_mut() {
            if bed.strikes(Plant::ChangesPayload, 5) {
                let text = String::from_utf8_lossy(&delivery.message.payload);
                let changed = text.replacen("the text", "The text", 1);
                delivery.message.payload = Bytes::from(changed.into_bytes());
            }
        }
        let handed = deliveries.iter();
        let handed = handed.map(|delivery| (delivery.receipt, delivery.message.clone()));
        self.unsettled().extend(handed);
        if bed.has(Plant::SettlesFirst) {
            dropped.extend(deliveries.iter().map(|delivery| delivery.receipt));
        }
        if !dropped.is_empty() {
            self.settle_unasked(dropped).await;
        }
    }
}

#[derive(Debug)]
struct PlantedDeliveries {
    inner: Box<dyn Deliveries>,
    mischief: Arc<Mischief>,
}

impl Drop for PlantedDeliveries {
    fn drop(&mut self) {
        let Mischief { bed, .. } = &*self.mischief;
        if bed.has(Plant::SettlesOnCrash)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let mischief = Arc::clone(&self.mischief);
            let receipts = mischief.take_unsettled();
            runtime.spawn(async move { mischief.settle_unasked(receipts).await });
        }
    }
}

#[async_trait]
impl Deliveries for PlantedDeliveries {
    async fn next(&mut self) -> Result<Signal> {
        let mut signal = self.inner.next().await?;
        match &mut signal {
            Signal::Delivered(deliveries) => self.mischief.deliver(deliveries).await,
            Signal::Revoking(lanes) if self.mischief.bed.has(Plant::ReleasesEarly) => {
                let mut settlement = self.mischief.settlement.lock().await;
                // Where it fails, the bug does no harm this time.
                drop(settlement.release(lanes).await);
            }
            _ => {}
        }
        Ok(signal)
    }

    async fn close(mut self: Box<Self>) -> Result<()> {
        let mischief = Arc::clone(&self.mischief);
        if mischief.bed.has(Plant::SettlesOnClose) {
            mischief.settle_unasked(mischief.take_unsettled()).await;
        }
        let inner = std::mem::replace(&mut self.inner, Box::new(Closed));
        // What is left was not lost in a crash.
        drop(mischief.take_unsettled());
        inner.close().await
    }
}

/// In the place of what was closed.
#[derive(Debug)]
struct Closed;

#[async_trait]
impl Deliveries for Closed {
    async fn next(&mut self) -> Result<Signal> {
        Err(Error::new(ErrorKind::Closed, "next", "it was closed"))
    }

    async fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct PlantedSettlement {
    mischief: Arc<Mischief>,
}

#[async_trait]
impl Settlement for PlantedSettlement {
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()> {
        let Mischief {
            bed,
            broker,
            settlement,
            ..
        } = &*self.mischief;
        let mut settled = settled.to_vec();
        let (more, again) = {
            let mut unsettled = self.mischief.unsettled();
            let is_settled = |receipt: &Receipt| settled.contains(receipt);
            let again = unsettled.iter().find(|(receipt, _)| is_settled(receipt));
            let again = again.map(|(_, message)| message.clone());
            unsettled.retain(|(receipt, _)| !is_settled(receipt));
            let more = unsettled.first().map(|(receipt, _)| *receipt);
            (more, again)
        };
        if let Some(more) = more
            && bed.strikes(Plant::SettlesOneMore, 5)
        {
            settled.push(more);
        }
        settlement.lock().await.settle(&settled).await?;
        if let Some(again) = again
            && bed.strikes(Plant::HandsOutAgain, 5)
        {
            // Where it fails, the bug does no harm this time.
            drop(broker.publish(vec![again]).await);
        }
        Ok(())
    }

    async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        self.mischief.settlement.lock().await.release(lanes).await
    }
}
