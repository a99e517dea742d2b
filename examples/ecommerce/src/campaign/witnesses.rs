//! What is left when the shop has stopped: topics, journals, stock, ledgers and dead letters.

use std::collections::{BTreeMap, HashMap};

use anyhow::Context as _;
use eventbus::desk::HeldReport;
use eventbus::prelude::{Event as _, EventBus, Start, Topic, Until};

use super::victim::Yard;
use crate::database::{Database, Handled};
use crate::databases::Databases;
use crate::events::{OrderCreated, OrderId, topics};
use crate::fake;
use crate::fake::mailer::MailerCalls;
use crate::fake::psp::PspCalls;
use crate::service::gateway::{Board, OrderView};
use crate::service::inventory::Warehouse;
use crate::shop::{SERVICES, dead_letters, held, usual_stock};

/// Everything the checker asks.
#[derive(Debug)]
pub struct Witnesses {
    /// Every event of the shop as it lies in its topic: per key, the order is the topic's.
    pub wire: Vec<Published>,
    /// What was ordered.
    pub orders: BTreeMap<OrderId, OrderCreated>,
    /// What each service handled, in the order in which it was committed.
    pub journals: BTreeMap<&'static str, Vec<Handled>>,
    /// Where the gateway sees each order.
    pub board: HashMap<OrderId, OrderView>,
    /// The payment provider's books.
    pub psp: PspCalls,
    /// The mail provider's books.
    pub mailer: MailerCalls,
    /// What was on the shelves in the beginning.
    pub stock: BTreeMap<String, u32>,
    /// What is on the shelves.
    pub on_shelf: BTreeMap<String, u32>,
    /// What is set aside.
    pub set_aside: BTreeMap<String, u32>,
    /// What services could not handle.
    pub dead_letters: Vec<String>,
}

/// An event as it lies in its topic.
#[derive(Clone, Debug)]
pub struct Published {
    /// Its topic.
    pub topic: String,
    /// Its order.
    pub key: String,
    /// Its type.
    pub event_type: String,
    /// Its id.
    pub id: String,
}

/// The service that needs a person now and then.
pub const PAYMENT: &str = "payment";

impl Witnesses {
    /// Asks everybody; the shop has stopped, the providers are still there.
    ///
    /// # Errors
    ///
    /// When somebody cannot be asked.
    pub async fn hear(bus: &EventBus, yard: &Yard, databases: &Databases) -> anyhow::Result<Self> {
        let (wire, orders) = read_topics(bus).await?;
        let mut journals = BTreeMap::new();
        for (service, _) in SERVICES {
            let journal = databases.connect(service).await?.journal().await;
            let journal = journal.with_context(|| format!("read the journal of {service}"))?;
            journals.insert(service, journal);
        }
        let board = Board::open(databases).await?;
        let mut views = HashMap::new();
        for order_id in orders.keys() {
            if let Some(view) = board.find(*order_id).await? {
                views.insert(*order_id, view);
            }
        }
        let warehouse = Warehouse::open(databases).await?;
        Ok(Self {
            wire,
            orders,
            journals,
            board: views,
            psp: fake::ask(&yard.psp.url).await?,
            mailer: fake::ask(&yard.mailer.url).await?,
            stock: usual_stock(),
            on_shelf: warehouse.on_shelf().await?,
            set_aside: warehouse.set_aside().await?,
            dead_letters: dead_letters(bus).await?,
        })
    }
}

/// The services' databases, to see what is in their outboxes.
///
/// # Errors
///
/// When one cannot be opened.
pub async fn connect(databases: &Databases) -> anyhow::Result<Vec<Database>> {
    let mut connected = Vec::new();
    for (service, _) in SERVICES {
        connected.push(databases.connect(service).await?);
    }
    Ok(connected)
}

/// How many events are committed and not published, or published and not settled, over all services.
///
/// # Errors
///
/// When a database or the broker does not say.
pub async fn lag(bus: &EventBus, databases: &[Database]) -> anyhow::Result<u64> {
    let mut messages = 0;
    for database in databases {
        let unpublished = database.unpublished().await;
        messages += unpublished.context("look into an outbox")?;
    }
    for (service, topics) in SERVICES {
        let lanes = bus.lag(service, topics).await.context("ask for the lag")?;
        messages += lanes.iter().map(|lane| lane.messages).sum::<u64>();
        let held = held(bus, service).await?;
        messages += held.iter().filter(|held| !waits_for_us(held)).count() as u64;
    }
    Ok(messages)
}

/// Whether nothing happens to it until somebody decides.
pub fn waits_for_us(held: &HeldReport) -> bool {
    held.wait.is_parked() && held.decision.is_none()
}

async fn read_topics(
    bus: &EventBus,
) -> anyhow::Result<(Vec<Published>, BTreeMap<OrderId, OrderCreated>)> {
    let reader = bus
        .read(&topic_names(), Start::Earliest, Some(Until::Now))
        .await;
    let mut reader = reader.context("read the topics from their beginning")?;
    let (mut wire, mut orders) = (Vec::new(), BTreeMap::new());
    while let Some(record) = reader.next().await? {
        let envelope = bus.envelope(&record.message)?;
        if envelope.event_type == OrderCreated::TYPE
            && let Some(order) = bus.event::<OrderCreated>(&record.message)?
        {
            orders.insert(order.order_id, order);
        }
        let key = record.message.key.map(|key| key.to_string());
        wire.push(Published {
            topic: record.message.topic.to_string(),
            key: key.unwrap_or_default(),
            event_type: envelope.event_type,
            id: envelope.id.to_string(),
        });
    }
    Ok((wire, orders))
}

fn topic_names() -> Vec<Topic> {
    topics().into_iter().map(|topic| topic.name).collect()
}
