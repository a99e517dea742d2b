//! A broker with a fault of its own, by which the checker is tested.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use eventbus_core::{
    AdminReply, AdminRequest, Broker, Capabilities, Deliveries, Delivery, Lane, Member, Message,
    PublishError, Publisher, Receipt, Result, Settlement, Signal, Subscriber, Subscription,
};

use super::recorder::Recorder;

/// What the broker does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plant {
    Nothing,
    /// Two messages of a key change places, once per member.
    Swap,
    /// A message is settled unseen, once per member.
    Drop,
    /// A message is settled that nobody gave a verdict on, once per member.
    SettleOneMore,
}

/// Stands between a consumer and the recorder, so that the recorder sees what really happened.
#[derive(Debug)]
pub(super) struct Planted {
    inner: Recorder,
    plant: Plant,
}

impl Planted {
    pub(super) fn new(inner: Recorder, plant: Plant) -> Self {
        Self { inner, plant }
    }
}

#[async_trait]
impl Publisher for Planted {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        self.inner.publish(batch).await
    }
}

#[async_trait]
impl Subscriber for Planted {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        let member = self.inner.subscribe(subscription).await?;
        let mischief = Arc::new(Mutex::new(Mischief {
            plant: self.plant,
            ..Mischief::default()
        }));
        Ok(Member::new(
            Box::new(PlantedDeliveries {
                inner: member.deliveries,
                mischief: Arc::clone(&mischief),
            }),
            Box::new(PlantedSettlement {
                inner: member.settlement,
                mischief,
            }),
        ))
    }
}

#[async_trait]
impl Broker for Planted {
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
    plant: Plant,
    is_done: bool,
    unsettled: Vec<Receipt>,
    /// Settled with the next call.
    smuggled: Vec<Receipt>,
}

impl Default for Mischief {
    fn default() -> Self {
        Self {
            plant: Plant::Nothing,
            is_done: false,
            unsettled: Vec::new(),
            smuggled: Vec::new(),
        }
    }
}

impl Mischief {
    fn deliver(&mut self, deliveries: &mut Vec<Delivery>) {
        match self.plant {
            Plant::Swap if !self.is_done => {
                let pair = pair_of_a_key(deliveries);
                if let Some((first, second)) = pair {
                    self.is_done = true;
                    let message = deliveries[first].message.clone();
                    deliveries[first].message = deliveries[second].message.clone();
                    deliveries[second].message = message;
                }
            }
            Plant::Drop if !self.is_done && deliveries.len() > 1 => {
                self.is_done = true;
                let dropped = deliveries.remove(0);
                self.smuggled.push(dropped.receipt);
            }
            _ => {}
        }
        let receipts = deliveries.iter().map(|delivery| delivery.receipt);
        self.unsettled.extend(receipts);
    }

    fn settle(&mut self, settled: &mut Vec<Receipt>) {
        let smuggled = self.smuggled.drain(..);
        settled.extend(smuggled);
        self.unsettled.retain(|receipt| !settled.contains(receipt));
        if self.plant == Plant::SettleOneMore
            && !self.is_done
            && let Some(receipt) = self.unsettled.last()
        {
            self.is_done = true;
            settled.push(*receipt);
        }
    }
}

fn pair_of_a_key(deliveries: &[Delivery]) -> Option<(usize, usize)> {
    let key = |index: usize| deliveries[index].message.key.as_ref();
    (0..deliveries.len())
        .filter(|first| key(*first).is_some())
        .find_map(|first| {
            let second = (first + 1..deliveries.len()).find(|second| key(*second) == key(first))?;
            Some((first, second))
        })
}

#[derive(Debug)]
struct PlantedDeliveries {
    inner: Box<dyn Deliveries>,
    mischief: Arc<Mutex<Mischief>>,
}

#[async_trait]
impl Deliveries for PlantedDeliveries {
    async fn next(&mut self) -> Result<Signal> {
        let mut signal = self.inner.next().await?;
        if let Signal::Delivered(deliveries) = &mut signal {
            self.mischief.lock().unwrap().deliver(deliveries);
        }
        Ok(signal)
    }

    async fn close(self: Box<Self>) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct PlantedSettlement {
    inner: Box<dyn Settlement>,
    mischief: Arc<Mutex<Mischief>>,
}

#[async_trait]
impl Settlement for PlantedSettlement {
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()> {
        let mut settled = settled.to_vec();
        self.mischief.lock().unwrap().settle(&mut settled);
        self.inner.settle(&settled).await
    }

    async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        self.inner.release(lanes).await
    }
}
