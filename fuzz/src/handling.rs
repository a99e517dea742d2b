//! Messages of whoever publishes on a topic, through a consumer: routed, handled, kept as dead letters.

use std::time::Duration;

use eventbus::Event;
use eventbus_core::{
    BoxError, Breaker, Context, DeadLetter, Message, Publisher, Redrive, RetryPolicy, Topic,
};
use eventbus_testkit::TestBus;
use serde::{Deserialize, Serialize};

use crate::{Target, message, runtime};

pub(crate) const TARGET: Target = Target {
    name: "handling",
    run,
    words: message::WORDS,
    cost: 40,
};

const TOPIC: Topic = Topic::from_static("orders");

/// How many messages one input has at most.
const MESSAGES_MAX: usize = 8;

mod v1 {
    //! What orders were before they had a currency.

    use super::{Deserialize, Event, Serialize};

    #[derive(Event, Serialize, Deserialize)]
    #[event(type = "OrderCreated", topic = "orders", key = "order_id")]
    pub(super) struct OrderCreated {
        pub(super) order_id: u64,
        pub(super) amount: i64,
    }
}

/// An order; those of an odd number cannot be handled.
#[derive(Event, Debug, PartialEq, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "orders", key = "order_id")]
#[event(version = 2, from = "v1::OrderCreated")]
pub(crate) struct OrderCreated {
    order_id: u64,
    amount: i64,
    currency: String,
}

impl OrderCreated {
    /// An order of this number.
    pub(crate) fn new(order_id: u64) -> Self {
        Self {
            order_id,
            amount: 250,
            currency: "EUR".to_owned(),
        }
    }
}

impl From<v1::OrderCreated> for OrderCreated {
    fn from(before: v1::OrderCreated) -> Self {
        Self {
            order_id: before.order_id,
            amount: before.amount,
            currency: "EUR".to_owned(),
        }
    }
}

fn run(data: &[u8]) {
    let mut messages = message::read_all(&TOPIC, data);
    messages.truncate(MESSAGES_MAX);
    runtime().block_on(handle(messages));
}

/// Every message is handled, skipped or kept, and what is kept is as it came.
async fn handle(messages: Vec<Message>) {
    let test = TestBus::new();
    let consumer = test.consumer("billing").on(bill);
    let consumer = consumer
        .retry(RetryPolicy::fixed(2, Duration::from_secs(1)))
        .breaker(Breaker::default().with_failure_rate(f64::INFINITY));
    let consumer = test.spawn(consumer).await;
    let taken = test.broker().publish(messages.clone()).await;
    let refused = taken.err().map_or(0, |error| error.unpublished.len());
    test.run_out().await;

    let counts = consumer.status().counts;
    let skipped = counts.skipped_expired + counts.skipped_other_group;
    let ended = counts.handled + counts.dead_lettered + skipped;
    assert_eq!(ended, (messages.len() - refused) as u64, "{counts:?}");
    let letters = test.dead_letters().await;
    for letter in &letters {
        assert!(messages.contains(&letter.message), "changed: {letter:?}");
    }
    // Two messages of one id share a letter.
    let are_kept = letters.len() as u64 <= counts.dead_lettered
        && letters.is_empty() == (counts.dead_lettered == 0);
    assert!(are_kept, "{} letters of {counts:?}", letters.len());

    let desk = consumer.dead_letters();
    let report = desk.redrive(Redrive::all().by("fuzz")).await;
    let report = report.expect("the desk answers");
    test.run_out().await;
    let left: Vec<DeadLetter> = test.dead_letters().await;
    // A letter that could not be given back is there still; others come back when they fail again.
    assert!(report.done + left.len() as u64 >= letters.len() as u64);
    consumer.shutdown().await.expect("it shuts down");
}

async fn bill(order: OrderCreated, _: Context) -> Result<(), BoxError> {
    match order.order_id % 2 {
        0 => Ok(()),
        _ => Err("an odd order".into()),
    }
}
