//! Notes what passes between consumers, handlers and the broker, in the order in which it happens.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    AdminReply, AdminRequest, Broker, Capabilities, Deliveries, Error, ErrorKind, Lane, Member,
    MemoryBroker, Message, Outcome, PublishError, Publisher, Receipt, Result, Settlement, Signal,
    Subscriber, Subscription, Unpublished,
};
use tokio::time::Instant;

/// One thing that happened to a member; messages go by their numbers.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// One batch.
    Delivered(Vec<Handed>),
    /// The member heard it.
    Lost(Vec<Lane>),
    Released(Vec<Lane>),
    Settled(Vec<Receipt>),
    /// A handler's run began with a message; several messages may be part of one run.
    Started {
        run: usize,
        number: usize,
    },
    Ended {
        run: usize,
        number: usize,
        how: How,
    },
    DeadLettered(usize),
    /// What the handler of a message published was taken.
    Published(usize),
    Leaves,
    Left,
    Crashes,
}

/// A delivery, as far as the checker looks at it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handed {
    pub(super) number: usize,
    pub(super) receipt: Receipt,
    pub(super) bytes: usize,
}

/// How a handler ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    Ok,
    Err,
    /// By a panic, or by nobody's will of its own.
    Dropped,
}

/// Something that happened, to which member, and when.
#[derive(Clone, Debug)]
pub(super) struct Noted {
    pub(super) at: Duration,
    pub(super) member: usize,
    pub(super) event: Event,
}

/// What all parts of one run write to.
#[derive(Debug)]
pub(super) struct Log {
    begun: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    noted: Vec<Noted>,
    runs: usize,
    outage_until: Duration,
}

impl Log {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            begun: Instant::now(),
            state: Mutex::default(),
        })
    }

    pub(super) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    pub(super) fn note(&self, member: usize, event: Event) {
        let at = self.now();
        self.state
            .lock()
            .unwrap()
            .noted
            .push(Noted { at, member, event });
    }

    pub(super) fn next_run(&self) -> usize {
        let mut state = self.state.lock().unwrap();
        state.runs += 1;
        state.runs
    }

    /// Lets publishes of consumers fail for some time.
    pub(super) fn begin_outage(&self, length: Duration) {
        let until = self.now() + length;
        let mut state = self.state.lock().unwrap();
        state.outage_until = state.outage_until.max(until);
    }

    fn is_outage(&self) -> bool {
        self.now() < self.state.lock().unwrap().outage_until
    }

    pub(super) fn take(&self) -> Vec<Noted> {
        std::mem::take(&mut self.state.lock().unwrap().noted)
    }
}

/// The number that a payload holds, in whichever format.
pub(super) fn number_of(message: &Message) -> usize {
    let text = std::str::from_utf8(&message.payload).expect("payloads are JSON");
    let digits = text.rsplit_once("\"number\":").expect("it has a number").1;
    let end = digits
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(digits.len());
    digits[..end].parse().expect("it is a number")
}

/// The broker as one consumer sees it.
#[derive(Debug)]
pub(super) struct Recorder {
    inner: MemoryBroker,
    member: usize,
    log: Arc<Log>,
}

impl Recorder {
    pub(super) fn new(inner: MemoryBroker, member: usize, log: Arc<Log>) -> Self {
        Self { inner, member, log }
    }
}

#[async_trait]
impl Publisher for Recorder {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        if self.log.is_outage() {
            let refuse = |(index, message)| {
                let error = Error::new(ErrorKind::Unavailable, "publish", "planned outage");
                Unpublished::new(index, message, Outcome::NotTaken, error)
            };
            return Err(PublishError::new(
                batch.into_iter().enumerate().map(refuse).collect(),
            ));
        }
        let numbers: Vec<_> = batch
            .iter()
            .map(|message| (number_of(message), message.topic.as_str().ends_with(".dlq")))
            .collect();
        self.inner.publish(batch).await?;
        for (number, is_letter) in numbers {
            self.log.note(
                self.member,
                match is_letter {
                    true => Event::DeadLettered(number),
                    false => Event::Published(number),
                },
            );
        }
        Ok(())
    }
}

#[async_trait]
impl Subscriber for Recorder {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        let member = self.inner.subscribe(subscription).await?;
        Ok(Member::new(
            Box::new(RecordedDeliveries {
                inner: member.deliveries,
                member: self.member,
                log: Arc::clone(&self.log),
            }),
            Box::new(RecordedSettlement {
                inner: member.settlement,
                member: self.member,
                log: Arc::clone(&self.log),
            }),
        ))
    }
}

#[async_trait]
impl Broker for Recorder {
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

#[derive(Debug)]
struct RecordedDeliveries {
    inner: Box<dyn Deliveries>,
    member: usize,
    log: Arc<Log>,
}

#[async_trait]
impl Deliveries for RecordedDeliveries {
    async fn next(&mut self) -> Result<Signal> {
        let signal = self.inner.next().await?;
        match &signal {
            Signal::Delivered(deliveries) => {
                let handed = deliveries.iter().map(|delivery| Handed {
                    number: number_of(&delivery.message),
                    receipt: delivery.receipt,
                    bytes: delivery.message.size(),
                });
                self.log
                    .note(self.member, Event::Delivered(handed.collect()));
            }
            Signal::Lost(lanes) => self.log.note(self.member, Event::Lost(lanes.clone())),
            _ => {}
        }
        Ok(signal)
    }

    async fn close(self: Box<Self>) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct RecordedSettlement {
    inner: Box<dyn Settlement>,
    member: usize,
    log: Arc<Log>,
}

#[async_trait]
impl Settlement for RecordedSettlement {
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()> {
        self.inner.settle(settled).await?;
        let receipts = settled.to_vec();
        self.log.note(self.member, Event::Settled(receipts));
        Ok(())
    }

    async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        self.inner.release(lanes).await?;
        self.log.note(self.member, Event::Released(lanes.to_vec()));
        Ok(())
    }
}
