//! Sample events for the tests of the services, and their delivery as it may happen.

use eventbus::prelude::{Consumer, ConsumerBuilder, Event, EventId, Outgoing};
use eventbus_testkit::TestBus;
use tempfile::TempDir;
use uuid::Uuid;

use crate::database::Database;
use crate::databases::{Databases, StoreArgs};
use crate::events::{
    CancelReason, Cents, Customer, InventoryReserved, InventoryShort, Line, Notice,
    NotificationSent, OrderCancelled, OrderCreated, OrderId, PaymentFailed, PaymentProcessed,
    ShippingCreated,
};
use crate::shop::Service;

/// Names the tests that are run on each store: on files, and on a PostgreSQL server where there is one.
macro_rules! on_each_store {
    ($($name:ident,)+) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $name() {
                super::$name(crate::service::sample::TestData::in_files()).await;
            })+
        }

        mod postgres {
            $(#[tokio::test]
            #[ignore = "needs brokers: ./dev/test"]
            async fn $name() {
                super::$name(crate::service::sample::TestData::in_schemas()).await;
            })+
        }
    };
}
pub(crate) use on_each_store;

/// Databases that go with their test.
pub struct TestData {
    databases: Databases,
    _directory: TempDir,
}

impl TestData {
    pub fn in_files() -> Self {
        Self::of("sqlite".to_owned())
    }

    pub fn in_schemas() -> Self {
        const URL: &str = "EVENTBUS_TEST_POSTGRES";
        Self::of(std::env::var(URL).unwrap_or_else(|_| {
            panic!("{URL} is not set: run ./dev/test only brokers, or export $(dev/brokers up postgres)")
        }))
    }

    fn of(store: String) -> Self {
        let directory = TempDir::new().expect("a temporary directory is to be had");
        let store = StoreArgs { store }.fresh().expect("a store");
        let databases = store.databases(directory.path()).expect("a store");
        Self {
            databases,
            _directory: directory,
        }
    }

    pub fn databases(&self) -> &Databases {
        &self.databases
    }
}

impl Drop for TestData {
    fn drop(&mut self) {
        let databases = self.databases.clone();
        let removed = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(databases.remove(Service::names()))
        });
        // What a test leaves goes with the server's data; a failure to remove it earlier is none.
        let _ = removed.join();
    }
}

pub fn order_id(number: u128) -> OrderId {
    OrderId(Uuid::from_u128(number))
}

pub fn customer() -> Customer {
    Customer {
        name: "Ada Moreau".to_owned(),
        email: "ada.moreau@example.com".to_owned(),
    }
}

pub fn line(product: &str, quantity: u32) -> Line {
    Line {
        product: product.to_owned(),
        quantity,
    }
}

pub fn created(number: u128, lines: Vec<Line>) -> OrderCreated {
    OrderCreated {
        order_id: order_id(number),
        customer: customer(),
        lines,
        total: Cents(500),
        card: "tok_4242".to_owned(),
    }
}

pub fn reserved(number: u128) -> InventoryReserved {
    InventoryReserved {
        order_id: order_id(number),
        customer: customer(),
        lines: vec![line("teapot", 1)],
        total: Cents(500),
        card: "tok_4242".to_owned(),
    }
}

pub fn short(number: u128) -> InventoryShort {
    InventoryShort {
        order_id: order_id(number),
        customer: customer(),
        product: "teapot".to_owned(),
    }
}

pub fn paid(number: u128) -> PaymentProcessed {
    PaymentProcessed {
        order_id: order_id(number),
        customer: customer(),
        lines: vec![line("teapot", 1)],
        amount: Cents(500),
        charge_id: "ch_1".to_owned(),
    }
}

pub fn unpaid(number: u128) -> PaymentFailed {
    PaymentFailed {
        order_id: order_id(number),
        customer: customer(),
        reason: "insufficient funds".to_owned(),
    }
}

pub fn packed(number: u128) -> ShippingCreated {
    ShippingCreated {
        order_id: order_id(number),
        customer: customer(),
        tracking: "PX000000001".to_owned(),
    }
}

pub fn cancelled(number: u128, reason: CancelReason) -> OrderCancelled {
    OrderCancelled {
        order_id: order_id(number),
        customer: customer(),
        reason,
    }
}

pub fn told(number: u128, notice: Notice) -> NotificationSent {
    NotificationSent {
        order_id: order_id(number),
        notice,
        email: customer().email,
    }
}

/// A bus for services with databases.
pub fn test_bus() -> TestBus {
    TestBus::new().with_database()
}

/// Runs a service: its consumer, and the relay of its database.
pub async fn serve<S: Send + Sync + 'static>(
    bus: &TestBus,
    database: &Database,
    consumer: ConsumerBuilder<S, Database>,
) -> Consumer {
    bus.relay(database.outbox(bus).relay()).await;
    bus.spawn(consumer).await
}

/// Publishes the same event twice, as at-least-once delivery may.
pub async fn publish_twice<E: Event + Clone>(bus: &TestBus, event: E) {
    let id = EventId::new();
    for _ in 0..2 {
        let copy = Outgoing::new(event.clone()).with_id(id.clone());
        bus.publish(copy).await.expect("the bus takes it");
    }
    bus.settled().await;
}
