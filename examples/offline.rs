//! The broker is away and a shop goes on selling: what it commits waits in its own database, and
//! arrives when the broker is back. Without an outbox, publishing fails in time and says so.
//!
//! Here the broker is a file, and away is: somebody else holds it locked, as a backup may.
//!
//!     cargo run --example offline

use std::path::Path;
use std::time::{Duration, Instant};

use eventbus::prelude::*;
use eventbus::{SqliteOutbox, SqliteStore};
use serde::{Deserialize, Serialize};
use sqlx::{Connection, SqliteConnection};
use tokio::sync::oneshot;

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderPlaced", topic = "order-events", key = "order_id")]
struct OrderPlaced {
    order_id: i64,
}

async fn place_order(shop: &SqliteOutbox, order_id: i64) -> Result<(), BoxError> {
    let mut tx = shop.begin(Origin::new()).await?;
    sqlx::query("INSERT INTO orders VALUES (?)")
        .bind(order_id)
        .execute(&mut *tx)
        .await?;
    tx.publish(OrderPlaced { order_id })?;
    tx.commit().await?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let data = tempfile::tempdir()?;
    let broker = data.path().join("bus.db");
    // A broker that does not answer is given up after half a second.
    let url = format!("sqlite://{}?busy_timeout=500ms", broker.display());
    let bus = EventBus::connect(&url).await?;
    let store = SqliteStore::open(data.path().join("shop.db")).await?;
    let shop = store.outbox(&bus);
    let mut tx = shop.begin(Origin::new()).await?;
    sqlx::raw_sql("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;

    let shipping = bus
        .consumer("shipping")
        .unit(store.clone())
        .on(async |_: OrderPlaced, _: Context<(), SqliteStore>| Ok(()))
        .spawn()
        .await?;
    let relay = shop.relay();
    let status = relay.handle();
    let (stop, stopped) = oneshot::channel::<()>();
    let relay = tokio::spawn(relay.run_until(async {
        let _ = stopped.await;
    }));
    place_order(&shop, 1).await?;
    until(|| shipping.status().counts.handled == 1).await;

    let mut backup = lock(&broker).await?;
    println!("the broker is away");
    let begun = Instant::now();
    for order_id in 2..=100 {
        place_order(&shop, order_id).await?;
    }
    println!("99 orders accepted in {:?}", begun.elapsed());

    let begun = Instant::now();
    let refused = bus.publish(OrderPlaced { order_id: 101 }).await;
    let error = refused.expect_err("nobody takes it");
    println!(
        "past the outbox, after {:?}: {error}, {}",
        begun.elapsed(),
        if error.is_retryable() {
            "try again"
        } else {
            "give it up"
        }
    );
    assert!(error.is_retryable());

    until(|| status.status().error.is_some()).await;
    println!(
        "the relay says: {}",
        status.status().error.unwrap_or_default()
    );

    sqlx::query("ROLLBACK").execute(&mut backup).await?;
    until(|| shipping.status().counts.handled == 100).await;
    println!("the broker is back: all 100 orders are shipped, each once");

    drop(stop);
    relay.await??;
    shipping.shutdown().await?;
    Ok(())
}

/// Keeps everybody else from writing to the broker's file.
async fn lock(broker: &Path) -> Result<SqliteConnection, BoxError> {
    let mut backup = SqliteConnection::connect(&format!("sqlite://{}", broker.display())).await?;
    loop {
        let begun = sqlx::query("BEGIN IMMEDIATE").execute(&mut backup).await;
        if begun.is_ok() {
            return Ok(backup);
        }
    }
}

async fn until(reached: impl Fn() -> bool) {
    while !reached() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
