//! A broker that tells the recorder what passes through it: what is sent, handed out and settled.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use async_trait::async_trait;
use clap::Args;
use eventbus::broker::{
    AdminReply, AdminRequest, Broker, Capabilities, Deliveries, Delivery, Lane, Member, Outcome,
    PublishError, Publisher, Receipt, Settlement, Signal, Subscriber, Subscription, Unpublished,
};
use eventbus::prelude::{Error, ErrorKind, EventBus, Result};
use eventbus::store::KeyStateStore;
use eventbus::{
    KafkaBroker, Message, PostgresBroker, RabbitMqBroker, RedisBroker, SqliteBroker, SqliteConfig,
    SqliteStore, header,
};
use eventbus_verify::{Client, Entry, Operation, Phase, Session, Stamp};

use crate::prefixed::Prefixed;
use crate::site::rabbitmq::Counted;
use crate::tried::{self, TOPIC};

/// How a process reaches the broker that is tried.
#[derive(Args, Clone, Debug)]
pub struct BrokerArgs {
    /// The broker that is tried
    #[arg(long)]
    broker: String,
    /// What topics and groups begin with there
    #[arg(long, default_value = "")]
    prefix: String,
    /// The database in which keys are held, where that is not the broker
    #[arg(long, value_name = "URL")]
    held: Option<String>,
}

impl BrokerArgs {
    /// The broker that a URL names.
    #[must_use]
    pub fn new(broker: String) -> Self {
        Self {
            broker,
            prefix: String::new(),
            held: None,
        }
    }

    /// With names that begin like this.
    #[must_use]
    pub fn with_prefix(mut self, prefix: &str) -> Self {
        prefix.clone_into(&mut self.prefix);
        self
    }

    /// With keys that are held in this database.
    #[must_use]
    pub fn with_held(mut self, url: String) -> Self {
        self.held = Some(url);
        self
    }

    /// The arguments that say the same.
    #[must_use]
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec!["--broker".to_owned(), self.broker.clone()];
        if !self.prefix.is_empty() {
            args.extend(["--prefix".to_owned(), self.prefix.clone()]);
        }
        if let Some(held) = &self.held {
            args.extend(["--held".to_owned(), held.clone()]);
        }
        args
    }

    /// Connects to the broker as it is, past the recorder.
    ///
    /// # Errors
    ///
    /// Those of connecting, and for a broker that lives within one process.
    pub async fn connect(&self) -> anyhow::Result<Arc<dyn Broker>> {
        Ok(self.open().await?.0)
    }

    /// Connects, and finds the store for keys that are held.
    async fn open(&self) -> anyhow::Result<(Arc<dyn Broker>, Arc<dyn KeyStateStore>)> {
        let scheme = self.broker.split(':').next().unwrap_or_default();
        Ok(match scheme {
            "sqlite" => {
                let broker = SqliteBroker::from_url(&self.broker).await?;
                let held = Arc::new(broker.key_state());
                (Arc::new(broker), held)
            }
            "postgres" | "postgresql" => {
                let broker = PostgresBroker::from_url(&self.broker).await?;
                let held = Arc::new(broker.key_state());
                (Arc::new(broker), held)
            }
            "kafka" => {
                self.with_store(KafkaBroker::from_url(&self.broker).await?)
                    .await?
            }
            "redis" => {
                self.with_store(RedisBroker::from_url(&self.broker).await?)
                    .await?
            }
            "amqp" => {
                let broker = RabbitMqBroker::from_url(&self.broker).await?;
                self.with_store(Counted::new(broker, &self.broker)).await?
            }
            _ => anyhow::bail!(
                "a broker that processes share is sqlite:, postgres://, kafka://, redis:// or amqp://, not {scheme}:"
            ),
        })
    }

    /// A broker that holds no keys, with the store that does.
    async fn with_store(
        &self,
        broker: impl Broker,
    ) -> anyhow::Result<(Arc<dyn Broker>, Arc<dyn KeyStateStore>)> {
        let held = self.held.as_deref();
        let held = held.context("this broker holds no keys")?;
        let held = SqliteStore::connect(SqliteConfig::from_url(held)?).await?;
        let broker = Prefixed::new(Arc::new(broker), &self.prefix);
        Ok((Arc::new(broker), Arc::new(held)))
    }
}

/// Connects to a broker, through the recorder.
///
/// # Errors
///
/// Those of connecting.
pub async fn connect(
    broker: &BrokerArgs,
    client: &Arc<Client>,
    letters_away: Option<&Path>,
) -> anyhow::Result<EventBus> {
    let (broker, held) = broker.open().await?;
    let recorded = Recorded {
        broker,
        client: Arc::clone(client),
        letters_away: letters_away.map(Path::to_owned),
    };
    let builder = EventBus::builder(recorded).key_state(held);
    Ok(builder.source("campaign").build())
}

/// How the group with a number is called.
#[must_use]
pub fn group_name(number: u16) -> String {
    format!("group-{number}")
}

/// The number of a group; 0 for one that is none of the campaign's.
fn group_number(name: &str) -> u16 {
    let number = name.strip_prefix("group-");
    number.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// Tells the recorder of the messages of the tried topic, and of dead letters.
#[derive(Debug)]
struct Recorded {
    broker: Arc<dyn Broker>,
    client: Arc<Client>,
    /// While there is a file of this name, no dead letter is taken.
    letters_away: Option<PathBuf>,
}

impl Recorded {
    /// Refuses a batch with a dead letter, where none can be stored at present.
    fn refuse_letters(&self, batch: Vec<Message>) -> Result<Vec<Message>, PublishError> {
        let is_letter = |message: &Message| message.topic.is_dead_letters();
        let is_away = self.letters_away.as_ref().is_some_and(|file| file.exists());
        if !is_away || !batch.iter().any(is_letter) {
            return Ok(batch);
        }
        let refuse = |(index, message)| {
            let what = "the topic of dead letters is away";
            let error = Error::new(ErrorKind::Unavailable, "publish", what);
            Unpublished::new(index, message, Outcome::NotTaken, error)
        };
        let unpublished = batch.into_iter().enumerate().map(refuse);
        Err(PublishError::new(unpublished.collect()))
    }
}

/// What a message on its way to the broker is to the ledger.
fn sent(message: &Message) -> Option<Entry> {
    let stamp = stamp_of(message)?;
    if message.topic == TOPIC {
        return Some(Entry::of(Operation::Send, stamp));
    }
    let letters = message.topic.as_str().strip_suffix(".dlq")?;
    let (topic, group) = letters.rsplit_once('.')?;
    let entry = Entry::of(Operation::DeadLetter, stamp).with_group(group_number(group));
    (topic == TOPIC.as_str()).then_some(entry)
}

fn stamp_of(message: &Message) -> Option<Stamp> {
    let id = tried::message_id(message.headers.get_str(header::ID)?).ok()?;
    id.origin().map(|(_, stamp)| stamp)
}

/// Ends the process: what it does from now on would not be in the ledger.
pub fn told(recorded: eventbus_verify::Result<()>) {
    if let Err(error) = recorded {
        tracing::error!("{error}");
        std::process::exit(70);
    }
}

fn tell(session: &Session, phase: Phase, entries: &[Entry]) {
    if !entries.is_empty() {
        told(session.record(phase, entries));
    }
}

#[async_trait]
impl Publisher for Recorded {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        let session = self.client.session();
        let entries: Vec<Option<Entry>> = batch.iter().map(sent).collect();
        let all: Vec<Entry> = entries.iter().flatten().copied().collect();
        tell(&session, Phase::Invoke, &all);
        let published = match self.refuse_letters(batch) {
            Ok(batch) => self.broker.publish(batch).await,
            Err(error) => Err(error),
        };
        let mut phases = vec![Phase::Ok; entries.len()];
        if let Err(error) = &published {
            for unpublished in &error.unpublished {
                phases[unpublished.index] = match unpublished.outcome {
                    Outcome::NotTaken => Phase::Fail,
                    Outcome::Unknown => Phase::Unknown,
                };
            }
        }
        for phase in [Phase::Ok, Phase::Fail, Phase::Unknown] {
            let of_phase = entries.iter().zip(&phases);
            let of_phase = of_phase.filter(|(_, one)| **one == phase);
            let of_phase: Vec<Entry> = of_phase.filter_map(|(entry, _)| *entry).collect();
            tell(&session, phase, &of_phase);
        }
        published
    }
}

#[async_trait]
impl Subscriber for Recorded {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        let Some(group) = subscription.group.clone() else {
            return self.broker.subscribe(subscription).await;
        };
        let member = self.broker.subscribe(subscription).await?;
        let book = Arc::new(Book {
            session: self.client.session(),
            group: group_number(group.as_str()),
            handed_out: Mutex::default(),
            partitions: Mutex::default(),
        });
        let deliveries = RecordedDeliveries {
            inner: member.deliveries,
            book: Arc::clone(&book),
        };
        let settlement = RecordedSettlement {
            inner: member.settlement,
            book,
        };
        Ok(Member::new(Box::new(deliveries), Box::new(settlement)))
    }
}

#[async_trait]
impl Broker for Recorded {
    fn capabilities(&self) -> Capabilities {
        self.broker.capabilities()
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        self.broker.admin(request).await
    }

    async fn close(&self) -> Result<()> {
        self.broker.close().await
    }
}

/// What both halves of a member know.
#[derive(Debug)]
struct Book {
    session: Session,
    group: u16,
    handed_out: Mutex<HashMap<Receipt, Stamp>>,
    partitions: Mutex<HashMap<Lane, u32>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Book {
    fn hear(&self, signal: &Signal) {
        match signal {
            Signal::Assigned(assignments) => {
                let assigned = assignments.iter().map(|one| (one.lane, one.partition));
                lock(&self.partitions).extend(assigned);
            }
            Signal::Delivered(deliveries) => self.delivered(deliveries),
            Signal::Lost(lanes) => self.forget(lanes),
            Signal::Gap { lane, from, to } => {
                let count = u32::try_from(to.0.saturating_sub(from.0)).unwrap_or(u32::MAX);
                let (place, first) = (self.partition(*lane), from.0 as u64);
                let gap = Entry::gap(self.group, place, first, count);
                tell(&self.session, Phase::Ok, &[gap]);
            }
            _ => {}
        }
    }

    fn delivered(&self, deliveries: &[Delivery]) {
        let ours = deliveries.iter().filter(|one| one.message.topic == TOPIC);
        let (mut known, mut unreadable) = (Vec::new(), Vec::new());
        let mut handed_out = lock(&self.handed_out);
        for delivery in ours {
            let place = self.partition(delivery.receipt.lane);
            let at = |entry: Entry| match delivery.position {
                Some(position) => entry.with_position(place, position.0 as u64),
                None => entry,
            };
            match stamp_of(&delivery.message) {
                Some(stamp) => {
                    handed_out.insert(delivery.receipt, stamp);
                    let entry = Entry::of(Operation::Deliver, stamp).with_group(self.group);
                    known.push(at(entry));
                }
                None => unreadable.push(at(Entry::new(Operation::Deliver).with_group(self.group))),
            }
        }
        drop(handed_out);
        tell(&self.session, Phase::Ok, &known);
        tell(&self.session, Phase::Fail, &unreadable);
    }

    fn partition(&self, lane: Lane) -> u32 {
        lock(&self.partitions).get(&lane).copied().unwrap_or(0)
    }

    fn forget(&self, lanes: &[Lane]) {
        lock(&self.handed_out).retain(|receipt, _| !lanes.contains(&receipt.lane));
        lock(&self.partitions).retain(|lane, _| !lanes.contains(lane));
    }

    fn done(&self, settled: &[Receipt]) -> Vec<Entry> {
        let handed_out = lock(&self.handed_out);
        settled
            .iter()
            .filter_map(|receipt| handed_out.get(receipt))
            .map(|stamp| Entry::of(Operation::Settle, *stamp).with_group(self.group))
            .collect()
    }
}

#[derive(Debug)]
struct RecordedDeliveries {
    inner: Box<dyn Deliveries>,
    book: Arc<Book>,
}

#[async_trait]
impl Deliveries for RecordedDeliveries {
    async fn next(&mut self) -> Result<Signal> {
        // Nothing is awaited behind it, so that a dropped future has consumed no signal.
        let signal = self.inner.next().await?;
        self.book.hear(&signal);
        Ok(signal)
    }

    async fn close(self: Box<Self>) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct RecordedSettlement {
    inner: Box<dyn Settlement>,
    book: Arc<Book>,
}

#[async_trait]
impl Settlement for RecordedSettlement {
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()> {
        let entries = self.book.done(settled);
        tell(&self.book.session, Phase::Invoke, &entries);
        let outcome = self.inner.settle(settled).await;
        match outcome {
            Ok(()) => {
                tell(&self.book.session, Phase::Ok, &entries);
                let mut handed_out = lock(&self.book.handed_out);
                for receipt in settled {
                    handed_out.remove(receipt);
                }
            }
            Err(_) => tell(&self.book.session, Phase::Unknown, &entries),
        }
        outcome
    }

    async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        let released = self.inner.release(lanes).await;
        if released.is_ok() {
            self.book.forget(lanes);
        }
        released
    }
}
