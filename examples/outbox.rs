//! Effects once: an order and its event commit together, and so do the stock it takes, the record
//! that its event was handled, and what follows from it. No two of them can disagree, whatever is
//! killed when; nobody writes a table of handled ids.
//!
//! `cargo run --example outbox`

use std::path::Path;

use eventbus::SqliteStore;
use eventbus::prelude::*;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{Sender, channel};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderPlaced", topic = "order-events", key = "order_id")]
struct OrderPlaced {
    order_id: i64,
    item: String,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "StockReserved", topic = "stock-events", key = "order_id")]
struct StockReserved {
    order_id: i64,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let data = tempfile::tempdir()?;
    let bus = EventBus::connect(&url(&data.path().join("bus.db"))).await?;
    let store = SqliteStore::open(data.path().join("shop.db")).await?;
    let outbox = store.outbox(&bus);

    let mut tx = outbox.begin(Origin::new()).await?;
    sqlx::raw_sql(
        "CREATE TABLE orders (id INTEGER PRIMARY KEY, item TEXT);
         CREATE TABLE stock (item TEXT PRIMARY KEY, free INTEGER);
         INSERT INTO stock VALUES ('lamp', 10)",
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;

    // A handler writes through `cx.transaction()`; what it publishes commits with it.
    let inventory = bus
        .consumer("inventory")
        .unit(store.clone())
        .on(
            async |order: OrderPlaced, mut cx: Context<(), SqliteStore>| {
                sqlx::query("UPDATE stock SET free = free - 1 WHERE item = ?")
                    .bind(&order.item)
                    .execute(cx.transaction().await?)
                    .await?;
                let OrderPlaced { order_id, .. } = order;
                cx.publish(StockReserved { order_id })?;
                Ok(())
            },
        )
        .spawn()
        .await?;

    let (reserved, mut all_reserved) = channel(1);
    let packing = bus
        .consumer("packing")
        .state(reserved)
        .on(async |stock: StockReserved, cx: Context<Sender<i64>>| {
            cx.state().send(stock.order_id).await?;
            Ok(())
        })
        .spawn()
        .await?;

    // A web request does the same with `begin`.
    let mut tx = outbox
        .begin(Origin::new().with_correlation_id("POST /orders 1"))
        .await?;
    let (order_id, item) = (1, "lamp".to_owned());
    sqlx::query("INSERT INTO orders (id, item) VALUES (?, ?)")
        .bind(order_id)
        .bind(&item)
        .execute(&mut *tx)
        .await?;
    tx.publish(OrderPlaced { order_id, item })?;
    tx.commit().await?;

    // The relay brings to the broker what was committed, also after a restart.
    let relay = outbox.relay();
    bus.service("shop")
        .consumer(inventory)
        .consumer(packing)
        .background("relay", |stop| relay.run_until(stop))
        .run_until(async {
            let order_id = all_reserved.recv().await;
            println!("order {} may be packed", order_id.unwrap_or_default());
        })
        .await?;

    let free: i64 = sqlx::query_scalar("SELECT free FROM stock WHERE item = 'lamp'")
        .fetch_one(store.readers())
        .await?;
    println!("{free} lamps are free");
    Ok(())
}

fn url(file: &Path) -> String {
    format!("sqlite://{}", file.display())
}
