//! Events, a state that records calls, and a broker that fails on demand.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    AdminReply, AdminRequest, BoxError, Broker, Capabilities, Context, Error, ErrorKind, Member,
    MemoryBroker, MemoryConfig, Message, Outcome, PublishError, Publisher, Result, Subscriber,
    Subscription, Unpublished,
};
use eventbus_testkit::TestBus;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// Writes what the derive would: core knows no macros, not in its tests either.
macro_rules! event {
    ($name:ty, $event_type:literal, $topic:literal, $version:literal) => {
        impl eventbus_core::Event for $name {
            const TYPE: &'static str = $event_type;
            const TOPIC: eventbus_core::Topic = eventbus_core::Topic::from_static($topic);
            const VERSION: u32 = $version;
            type Codec = eventbus_core::Json;

            fn key(&self) -> Option<eventbus_core::Key> {
                Some(eventbus_core::Key::display(self.order))
            }

            fn upcast(version: u32, _: &[u8]) -> eventbus_core::Result<Self> {
                Err(eventbus_core::unknown_version::<Self>(version))
            }
        }
    };
}

pub(crate) use event;

event!(OrderCreated, "OrderCreated", "orders", 1);
event!(OrderCancelled, "OrderCancelled", "orders", 1);
event!(OrderPaid, "OrderPaid", "payments", 1);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OrderCreated {
    pub(crate) order: u64,
    pub(crate) amount: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OrderCancelled {
    pub(crate) order: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OrderPaid {
    pub(crate) order: u64,
    pub(crate) note: String,
}

pub(crate) fn order(order: u64) -> OrderCreated {
    OrderCreated { order, amount: 0 }
}

pub(crate) fn amount(order: u64, amount: u64) -> OrderCreated {
    OrderCreated { order, amount }
}

pub(crate) fn paid(order: u64) -> OrderPaid {
    OrderPaid {
        order,
        note: String::new(),
    }
}

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const MINUTE: Duration = Duration::from_secs(60);

/// One call of a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) order: u64,
    pub(crate) amount: u64,
    pub(crate) attempt: u32,
    pub(crate) at: Instant,
}

/// What handlers did, and which orders they fail.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    calls: Mutex<Vec<Call>>,
    broken: Mutex<HashSet<u64>>,
}

impl Calls {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn note(&self, order: &OrderCreated, attempt: u32) {
        self.calls.lock().unwrap().push(Call {
            order: order.order,
            amount: order.amount,
            attempt,
            at: Instant::now(),
        });
    }

    pub(crate) fn break_order(&self, order: u64) {
        self.broken.lock().unwrap().insert(order);
    }

    pub(crate) fn mend_all(&self) {
        self.broken.lock().unwrap().clear();
    }

    pub(crate) fn check(&self, order: u64) -> Result<(), BoxError> {
        match self.broken.lock().unwrap().contains(&order) {
            true => Err(format!("order {order} is broken").into()),
            false => Ok(()),
        }
    }

    pub(crate) fn all(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    pub(crate) fn of(&self, order: u64) -> Vec<Call> {
        let mut calls = self.all();
        calls.retain(|call| call.order == order);
        calls
    }

    pub(crate) fn attempts(&self, order: u64) -> Vec<u32> {
        self.of(order).iter().map(|call| call.attempt).collect()
    }

    pub(crate) fn amounts(&self, order: u64) -> Vec<u64> {
        self.of(order).iter().map(|call| call.amount).collect()
    }
}

/// Notes the call, then fails the orders that are broken.
pub(crate) async fn noting(order: OrderCreated, cx: Context<Calls>) -> Result<(), BoxError> {
    cx.state().note(&order, cx.attempt());
    cx.state().check(order.order)
}

/// Notes the call, publishes that the order is paid, then fails the orders that are broken.
pub(crate) async fn paying(order: OrderCreated, cx: Context<Calls>) -> Result<(), BoxError> {
    cx.state().note(&order, cx.attempt());
    cx.publish(paid(order.order))?;
    cx.state().check(order.order)
}

/// How a [`FaultyBroker`] answers publishes to some topics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Refused: the broker is away.
    Away,
    /// Refused for good.
    Refused,
    /// Refused for what the messages are.
    TooLarge,
    /// Refused: there is no such topic.
    Missing,
    /// Never answered.
    Silent,
}

/// A broker whose publishes fail on demand; clones share the fault.
#[derive(Clone, Debug)]
pub(crate) struct FaultyBroker {
    inner: MemoryBroker,
    faults: Arc<Mutex<Option<(&'static str, Fault)>>>,
    refused: Arc<AtomicUsize>,
}

impl FaultyBroker {
    /// Publishes to topics whose name ends so fail from now on.
    pub(crate) fn fail(&self, ending: &'static str, fault: Fault) {
        *self.faults.lock().unwrap() = Some((ending, fault));
    }

    pub(crate) fn mend(&self) {
        *self.faults.lock().unwrap() = None;
    }

    /// How many publishes failed.
    pub(crate) fn failed(&self) -> usize {
        self.refused.load(Ordering::SeqCst)
    }
}

/// A bus whose broker fails on demand.
pub(crate) fn faulty() -> (TestBus, FaultyBroker) {
    let mut broker = None;
    let test = TestBus::wrapping(MemoryConfig::default(), |inner| {
        let faulty = FaultyBroker {
            inner,
            faults: Arc::default(),
            refused: Arc::default(),
        };
        broker = Some(faulty.clone());
        faulty
    });
    (test, broker.expect("the bus was made with it"))
}

#[async_trait]
impl Publisher for FaultyBroker {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        let fault = *self.faults.lock().unwrap();
        let Some((ending, fault)) = fault else {
            return self.inner.publish(batch).await;
        };
        let (failed, rest): (Vec<_>, Vec<_>) = (0..)
            .zip(batch)
            .partition(|(_, message)| message.topic.as_str().ends_with(ending));
        if !rest.is_empty() {
            let rest = rest.into_iter().map(|(_, message)| message).collect();
            self.inner.publish(rest).await?;
        }
        if failed.is_empty() {
            return Ok(());
        }
        self.refused.fetch_add(1, Ordering::SeqCst);
        let kind = match fault {
            Fault::Away => ErrorKind::Unavailable,
            Fault::Refused => ErrorKind::Unauthorized,
            Fault::TooLarge => ErrorKind::InvalidInput,
            Fault::Missing => ErrorKind::NotFound,
            Fault::Silent => std::future::pending().await,
        };
        let unpublished = failed.into_iter().map(|(index, message)| {
            let error = Error::new(kind, "publish", "as the test asked for");
            Unpublished::new(index, message, Outcome::NotTaken, error)
        });
        Err(PublishError::new(unpublished.collect()))
    }
}

#[async_trait]
impl Subscriber for FaultyBroker {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        self.inner.subscribe(subscription).await
    }
}

#[async_trait]
impl Broker for FaultyBroker {
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
