//! A bounded replay into a new read model, through the handlers that also serve live events.
//! Groups do not move, and nothing is sent.
//!
//! `cargo run --example replay`

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use eventbus::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "ProductSold", topic = "sales-events", key = "product")]
struct ProductSold {
    product: String,
    cents: i64,
}

/// Turnover by product.
type Turnover = Mutex<BTreeMap<String, i64>>;

async fn sold(sale: ProductSold, cx: Context<Turnover>) -> Result<(), BoxError> {
    let mut turnover = cx.state().lock().unwrap();
    *turnover.entry(sale.product).or_default() += sale.cents;
    Ok(())
}

/// The projection, whether it is fed live or by a replay.
fn turnover(bus: &EventBus, model: &Arc<Turnover>) -> ConsumerBuilder<Turnover> {
    bus.consumer("turnover")
        .shared_state(Arc::clone(model))
        .on(sold)
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let bus = EventBus::connect("memory:").await?;
    for day in 0..1_000 {
        let product = ["tea", "cup", "pot"][day % 3].to_owned();
        bus.publish(ProductSold {
            product,
            cents: 100,
        })
        .await?;
    }

    let all = Arc::new(Turnover::default());
    let report = turnover(&bus, &all)
        .replay(Replay::from(Start::Earliest))
        .await?;
    println!("{} sales: {:?}", report.handled, all.lock().unwrap());
    assert_eq!(all.lock().unwrap().values().sum::<i64>(), 100_000);

    let tea = Arc::new(Turnover::default());
    let report = turnover(&bus, &tea)
        .replay(Replay::from(Start::Earliest).key("tea"))
        .await?;
    println!("{} of tea, {} passed over", report.handled, report.skipped);
    assert_eq!((report.handled, report.skipped), (334, 666));
    Ok(())
}
