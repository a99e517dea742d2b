//! A shop moves to another broker while orders come in. Its stock service reads both brokers for a
//! while; a new version's relay waits until the old version's has ended and the old broker is
//! drained. Each order takes effect once, in its customer's order, and nobody stops ordering.
//!
//!     cargo run --example moving_brokers

use std::path::Path;
use std::time::Duration;

use eventbus::prelude::*;
use eventbus::{SqliteOutbox, SqliteStore};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderPlaced", topic = "order-events", key = "customer")]
struct OrderPlaced {
    customer: i64,
    number: i64,
}

const CUSTOMERS: i64 = 5;

/// Takes an order: what a web request does. It knows no broker.
async fn place_order(shop: &SqliteOutbox, number: i64) -> Result<(), BoxError> {
    let customer = number % CUSTOMERS;
    let mut tx = shop.begin(Origin::new()).await?;
    sqlx::query("INSERT INTO orders (customer, number) VALUES (?, ?)")
        .bind(customer)
        .bind(number)
        .execute(&mut *tx)
        .await?;
    tx.publish(OrderPlaced { customer, number })?;
    tx.commit().await?;
    Ok(())
}

/// The stock service: the same on either broker, with one inbox in its database.
async fn stock_on(bus: &EventBus, store: &SqliteStore) -> eventbus::Result<Consumer> {
    bus.consumer("stock")
        .unit(store.clone())
        .on(
            async |order: OrderPlaced, mut cx: Context<(), SqliteStore>| {
                sqlx::query("INSERT INTO reserved (customer, number) VALUES (?, ?)")
                    .bind(order.customer)
                    .bind(order.number)
                    .execute(cx.transaction().await?)
                    .await?;
                Ok(())
            },
        )
        .spawn()
        .await
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let data = tempfile::tempdir()?;
    let old = EventBus::connect(&url(&data.path().join("old.db"))).await?;
    let new = EventBus::connect(&url(&data.path().join("new.db"))).await?;
    let store = SqliteStore::open(data.path().join("shop.db")).await?;
    let shop = store.outbox(&old);
    let mut tx = shop.begin(Origin::new()).await?;
    sqlx::raw_sql(
        "CREATE TABLE orders (customer INTEGER, number INTEGER);
         CREATE TABLE reserved (place INTEGER PRIMARY KEY, customer INTEGER, number INTEGER)",
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;

    // First, whoever reads the old broker reads the new one as well.
    let on_old = stock_on(&old, &store).await?;
    let on_new = stock_on(&new, &store).await?;

    // The version that runs: its relay publishes to the old broker.
    let (end_old_version, ended) = oneshot::channel::<()>();
    let old_relay = tokio::spawn(shop.relay().run_until(async {
        let _ = ended.await;
    }));
    for number in 1..=200 {
        place_order(&shop, number).await?;
    }

    // The version that is deployed: its relay waits for the old one, and for what that published.
    let drained = old.drained(&[OrderPlaced::TOPIC]);
    let new_relay = store.outbox(&new).relay().target("new")?.after(drained);
    let status = new_relay.handle();
    let (end_new_version, ended) = oneshot::channel::<()>();
    let new_relay = tokio::spawn(new_relay.run_until(async {
        let _ = ended.await;
    }));
    for number in 201..=300 {
        place_order(&shop, number).await?;
    }
    println!("both run: {}", status.status().error.unwrap_or_default());
    drop(end_old_version); // the deployment is through
    old_relay.await??;
    for number in 301..=400 {
        place_order(&shop, number).await?;
    }

    while handled(&on_old) + handled(&on_new) < 400 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (old_handled, new_handled) = (handled(&on_old), handled(&on_new));
    println!("{old_handled} orders came on the old broker, {new_handled} on the new one");

    // Each customer's orders took effect once, in their order, whichever broker they came on.
    for customer in 0..CUSTOMERS {
        let sql = "SELECT number FROM reserved WHERE customer = ? ORDER BY place";
        let numbers: Vec<i64> = sqlx::query_scalar(sql)
            .bind(customer)
            .fetch_all(store.readers())
            .await?;
        let expected: Vec<_> = (1..=400).filter(|n| n % CUSTOMERS == customer).collect();
        assert_eq!(numbers, expected);
    }
    println!("each of them once, in order; the old broker can go");

    drop(end_new_version);
    new_relay.await??;
    on_old.shutdown().await?;
    on_new.shutdown().await?;
    Ok(())
}

fn handled(stock: &Consumer) -> u64 {
    stock.status().counts.handled
}

fn url(file: &Path) -> String {
    format!("sqlite://{}", file.display())
}
