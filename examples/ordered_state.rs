//! Two event types of one topic, handled in order per cart, with the consumer's own typed state.
//!
//! `cargo run --example ordered_state`

use std::collections::HashMap;
use std::sync::Mutex;

use eventbus::prelude::*;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

#[derive(Event, Serialize, Deserialize)]
#[event(type = "ItemAdded", topic = "cart-events", key = "cart")]
struct ItemAdded {
    cart: String,
    cents: i64,
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "CartCheckedOut", topic = "cart-events", key = "cart")]
struct CartCheckedOut {
    cart: String,
}

/// What the service knows: open carts, and how many were checked out.
struct Carts {
    open: Mutex<HashMap<String, i64>>,
    checked_out: watch::Sender<usize>,
}

async fn item_added(item: ItemAdded, cx: Context<Carts>) -> Result<(), BoxError> {
    let mut open = cx.state().open.lock().unwrap();
    *open.entry(item.cart).or_default() += item.cents;
    Ok(())
}

async fn checked_out(checkout: CartCheckedOut, cx: Context<Carts>) -> Result<(), BoxError> {
    let total = cx.state().open.lock().unwrap().remove(&checkout.cart);
    // Every item of the cart was handled before: same key, same order, whatever the type.
    println!("{} pays {} cents", checkout.cart, total.unwrap_or_default());
    cx.state().checked_out.send_modify(|count| *count += 1);
    Ok(())
}

#[tokio::main]
async fn main() -> eventbus::Result<()> {
    let bus = EventBus::connect("memory:").await?;
    let (checked_out_carts, mut progress) = watch::channel(0);

    let carts = bus
        .consumer("carts")
        .state(Carts {
            open: Mutex::default(),
            checked_out: checked_out_carts,
        })
        .on(item_added)
        .on(checked_out)
        .spawn()
        .await?;

    for cart in ["ann", "ben", "cem"].map(String::from) {
        for cents in [250, 1_999, 10] {
            bus.publish(ItemAdded {
                cart: cart.clone(),
                cents,
            })
            .await?;
        }
        bus.publish(CartCheckedOut { cart }).await?;
    }

    progress
        .wait_for(|count| *count == 3)
        .await
        .expect("the consumer runs");
    carts.shutdown().await
}
