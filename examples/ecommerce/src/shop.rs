//! Puts the services of the shop together: topics, consumers, the gateway's listener. Starting and
//! stopping them in the right order is the business of the SDK.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::ValueEnum;
use eventbus::desk::HeldReport;
use eventbus::prelude::{ConsumerBuilder, Event as _, EventBus, Topic};
use eventbus::{Durability, Stopping, health};
use tokio::net::TcpListener;
use tracing::{debug, info, warn};

use crate::catalogue;
use crate::client::mailer::HttpMailer;
use crate::client::psp::HttpPsp;
use crate::database::{Database, Outbox};
use crate::databases::Databases;
use crate::events::{
    InventoryReserved, NotificationSent, OrderCreated, PaymentProcessed, ShippingCreated, topics,
};
use crate::service::gateway::{self, Board};
use crate::service::inventory::{self, Warehouse};
use crate::service::notification;
use crate::service::order;
use crate::service::payment;
use crate::service::shipping;

/// Without any order ending for so long, those under way are lost where the broker dies with this
/// process.
const FINISH_WITHIN: Duration = Duration::from_secs(10);

/// The services, each a consumer group and a database, and the topics that they consume.
pub const SERVICES: [(&str, &[Topic]); 6] = [
    (
        "gateway",
        &[
            OrderCreated::TOPIC,
            InventoryReserved::TOPIC,
            PaymentProcessed::TOPIC,
            ShippingCreated::TOPIC,
            NotificationSent::TOPIC,
        ],
    ),
    (
        "order",
        &[
            OrderCreated::TOPIC,
            InventoryReserved::TOPIC,
            PaymentProcessed::TOPIC,
            NotificationSent::TOPIC,
        ],
    ),
    ("inventory", &[OrderCreated::TOPIC, PaymentProcessed::TOPIC]),
    ("payment", &[InventoryReserved::TOPIC]),
    ("shipping", &[PaymentProcessed::TOPIC]),
    (
        "notification",
        &[OrderCreated::TOPIC, ShippingCreated::TOPIC],
    ),
];

/// What the log says when a shop is open.
pub const OPEN: &str = "the shop is open";

/// A service of the shop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Service {
    /// Takes orders over HTTP and says where they stand
    Gateway,
    /// Decides how each order ends
    Order,
    /// Sets stock aside and puts it back
    Inventory,
    /// Charges cards
    Payment,
    /// Packs parcels
    Shipping,
    /// Mails customers
    Notification,
}

impl Service {
    /// The names of all.
    pub fn names() -> impl Iterator<Item = &'static str> {
        let services = Self::value_variants().iter();
        services.map(|service| service.name())
    }

    /// Its name: the consumer group, and the source of its events.
    fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Order => "order",
            Self::Inventory => "inventory",
            Self::Payment => "payment",
            Self::Shipping => "shipping",
            Self::Notification => "notification",
        }
    }
}

/// What the services need from outside.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Where each service has its database.
    pub databases: Databases,
    /// The gateway's port.
    pub port: u16,
    /// The payment provider, for the payment service.
    pub psp_url: Option<String>,
    /// The mail provider, for the notification service.
    pub mailer_url: Option<String>,
    /// What is on the shelves when the shop opens for the first time.
    pub stock: BTreeMap<String, u32>,
}

/// What there is to see of a shop.
#[derive(Debug)]
pub struct Shop {
    /// What the gateway knows of the orders, if it is among the services.
    pub board: Option<Board>,
    /// What the inventory holds, if it is among the services.
    pub warehouse: Option<Warehouse>,
    /// Where the gateway listens, if it is among the services.
    pub gateway_url: Option<String>,
    handlers_max: Option<usize>,
}

impl Shop {
    /// Puts these services together. Their consumers begin at once; orders are taken when what is
    /// returned runs.
    ///
    /// # Errors
    ///
    /// When the broker, a topic, a consumer or the gateway's port is not to be had.
    pub async fn open(
        bus: &EventBus,
        services: &[Service],
        surroundings: Surroundings,
    ) -> anyhow::Result<(Self, eventbus::Service)> {
        apply_topics(bus).await?;
        let mut shop = Self {
            board: None,
            warehouse: None,
            gateway_url: None,
            handlers_max: surroundings.databases.handlers_max(),
        };
        let mut parts = bus.service("shop");
        for service in services {
            let bus = bus.with_source(service.name());
            parts = shop.consume(parts, *service, &bus, &surroundings).await?;
        }
        Ok((shop, parts))
    }

    /// A shop whose services are in other processes.
    ///
    /// # Errors
    ///
    /// When a database is not to be had.
    pub async fn elsewhere(databases: &Databases, gateway_url: String) -> anyhow::Result<Self> {
        Ok(Self {
            board: Some(Board::open(databases).await?),
            warehouse: Some(Warehouse::open(databases).await?),
            gateway_url: Some(gateway_url),
            handlers_max: None,
        })
    }

    /// Starts the consumer and the relay of one service.
    async fn consume(
        &mut self,
        parts: eventbus::Service,
        service: Service,
        bus: &EventBus,
        surroundings: &Surroundings,
    ) -> anyhow::Result<eventbus::Service> {
        let databases = &surroundings.databases;
        match service {
            Service::Gateway => {
                let board = self.board.insert(Board::open(databases).await?).clone();
                let parts = self.serve(parts, bus, &board, surroundings.port).await?;
                let consumer = gateway::consumer(bus, &board);
                self.spawn(parts, service, board.database().outbox(bus), consumer)
                    .await
            }
            Service::Order => {
                let database = order::open(databases).await?;
                let (outbox, consumer) = (database.outbox(bus), order::consumer(bus, database));
                self.spawn(parts, service, outbox, consumer).await
            }
            Service::Inventory => {
                let warehouse = Warehouse::open(databases).await?;
                warehouse.deliver(bus, &surroundings.stock).await?;
                let warehouse = self.warehouse.insert(warehouse).clone();
                let consumer = inventory::consumer(bus, &warehouse);
                self.spawn(parts, service, warehouse.database().outbox(bus), consumer)
                    .await
            }
            Service::Payment => {
                let url = surroundings.psp_url.as_deref();
                let psp = Arc::new(HttpPsp::new(url.context("payment needs a provider")?)?);
                let database = payment::open(databases).await?;
                let (outbox, consumer) =
                    (database.outbox(bus), payment::consumer(bus, database, psp));
                self.spawn(parts, service, outbox, consumer).await
            }
            Service::Shipping => {
                let database = shipping::open(databases).await?;
                let (outbox, consumer) = (database.outbox(bus), shipping::consumer(bus, database));
                self.spawn(parts, service, outbox, consumer).await
            }
            Service::Notification => {
                let url = surroundings.mailer_url.as_deref();
                let mailer = HttpMailer::new(url.context("notification needs a provider")?)?;
                let database = notification::open(databases).await?;
                let outbox = database.outbox(bus);
                let consumer = notification::consumer(bus, database, Arc::new(mailer));
                self.spawn(parts, service, outbox, consumer).await
            }
        }
    }

    async fn spawn<S>(
        &self,
        parts: eventbus::Service,
        service: Service,
        outbox: Outbox,
        consumer: ConsumerBuilder<S, Database>,
    ) -> anyhow::Result<eventbus::Service>
    where
        S: Send + Sync + 'static,
    {
        let consumer = match self.handlers_max {
            Some(handlers) => consumer.concurrency(handlers),
            None => consumer,
        };
        let consumer = consumer.spawn().await;
        let consumer = consumer.with_context(|| format!("start the {} service", service.name()))?;
        let name = format!("{}-outbox", service.name());
        let relay = outbox.relay().name(&name)?;
        info!(service = service.name(), "started");
        Ok(parts
            .consumer(consumer)
            .background(name, |stop| relay.run_until(stop)))
    }

    /// Listens for orders, and for those who ask whether the shop is alive and ready.
    async fn serve(
        &mut self,
        parts: eventbus::Service,
        bus: &EventBus,
        board: &Board,
        port: u16,
    ) -> anyhow::Result<eventbus::Service> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
        let listener = listener.with_context(|| {
            format!("listen on port {port}: choose another with `--port`, 0 takes a free one")
        })?;
        self.gateway_url = Some(format!("http://{}", listener.local_addr()?));
        let routes = gateway::routes(bus, board.clone());
        let routes = routes.merge(health::router(&parts.handle()));
        let unfinished = lives_in_process(bus).then_some(board.clone());
        Ok(parts.server("gateway", |stop: Stopping| async move {
            let server = axum::serve(listener, routes).with_graceful_shutdown(stop);
            server.await?;
            if let Some(board) = unfinished {
                wait_for_orders(&board).await;
            }
            Ok::<(), std::io::Error>(())
        }))
    }
}

/// Whether what is on the broker lives and dies with this process.
pub fn lives_in_process(bus: &EventBus) -> bool {
    bus.capabilities().durability == Durability::Process
}

/// Creates the topics that are missing and warns of those that differ from the table.
async fn apply_topics(bus: &EventBus) -> anyhow::Result<()> {
    let reports = bus.apply_topics(&topics()).await;
    for report in reports.context("create the topics")? {
        for difference in report.drift {
            // That the in-memory broker forgets everything with its process is no surprise.
            match lives_in_process(bus) {
                true => debug!(topic = %report.name, difference),
                false => warn!(topic = %report.name, difference, "it is not as declared"),
            }
        }
    }
    Ok(())
}

/// Orders under way are lost with such a broker's process, so stopping waits for them.
async fn wait_for_orders(board: &Board) {
    match board.wait_until_open(0, FINISH_WITHIN).await {
        Ok(0) => {}
        Ok(orders) => warn!(
            orders,
            "orders under way are lost: this broker ends with the process"
        ),
        Err(error) => warn!(%error, "nobody knows whether orders under way are lost"),
    }
}

/// What is on the shelves of a new shop: enough of everything, and a few of what is limited.
pub fn usual_stock() -> BTreeMap<String, u32> {
    catalogue::PRODUCTS
        .iter()
        .map(|product| {
            let limited = product.id == catalogue::LIMITED;
            (product.id.to_owned(), if limited { 10 } else { 10_000 })
        })
        .collect()
}

/// What a service has put aside, where its broker can.
///
/// # Errors
///
/// When the store does not say.
pub async fn held(bus: &EventBus, service: &str) -> anyhow::Result<Vec<HeldReport>> {
    match bus.held_keys(service) {
        Ok(held) => held.list().await.context("list held keys"),
        Err(_) => Ok(Vec::new()),
    }
}

/// What services could not handle, each in a sentence.
///
/// # Errors
///
/// When the broker or the store does not say.
pub async fn dead_letters(bus: &EventBus) -> anyhow::Result<Vec<String>> {
    let mut sentences = Vec::new();
    for (service, topics) in SERVICES {
        let letters = bus.dead_letters(service, topics)?.list().await;
        for letter in letters.context("list the dead letters")? {
            let (topic, error) = (&letter.message.topic, &letter.error);
            sentences.push(format!(
                "{service} could not handle a message of {topic}: {error}"
            ));
        }
        for held in held(bus, service).await? {
            let (held, error) = (&held.held, &held.wait.error);
            sentences.push(format!("{service} still holds {held}: {error}"));
        }
    }
    Ok(sentences)
}
