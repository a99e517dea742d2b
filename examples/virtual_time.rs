//! A test of a service with retries half an hour apart, in no time at all.
//!
//! `cargo run --example virtual_time`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use eventbus::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "InvoiceDue", topic = "invoice-events", key = "customer")]
struct InvoiceDue {
    customer: String,
    cents: i64,
}

#[derive(Event, Debug, PartialEq, Serialize, Deserialize)]
#[event(type = "InvoiceSent", topic = "invoice-events", key = "customer")]
struct InvoiceSent {
    customer: String,
}

/// The mail server of the accounting department, often away.
#[derive(Default)]
struct MailServer {
    up: AtomicBool,
}

async fn send(invoice: InvoiceDue, cx: Context<MailServer>) -> Result<(), BoxError> {
    if !cx.state().up.load(Ordering::Relaxed) {
        return Err("the mail server is away".into());
    }
    println!("{} owes {} cents", invoice.customer, invoice.cents);
    cx.publish(InvoiceSent {
        customer: invoice.customer,
    })?;
    Ok(())
}

/// The service: three attempts, half an hour apart.
fn invoicing(bus: &EventBus, server: Arc<MailServer>) -> ConsumerBuilder<MailServer> {
    bus.consumer("invoicing")
        .shared_state(server)
        .on(send)
        .on(async |_: InvoiceSent, _: Context<MailServer>| Ok(()))
        .retry(RetryPolicy::fixed(3, Duration::from_secs(30 * 60)))
}

/// In a crate of your own this is a `#[tokio::test]`.
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let begun = std::time::Instant::now();

    let test = eventbus_testkit::TestBus::new();
    let server = Arc::new(MailServer::default());
    let _invoicing = test.spawn(invoicing(&test, Arc::clone(&server))).await;
    let customer = String::from("ann");

    test.publish(InvoiceDue {
        customer: customer.clone(),
        cents: 999,
    })
    .await
    .unwrap();
    test.settled().await;
    assert_eq!(test.published::<InvoiceSent>().await, []);

    test.advance(Duration::from_secs(45 * 60)).await;
    server.up.store(true, Ordering::Relaxed);
    test.advance(Duration::from_secs(45 * 60)).await;
    assert_eq!(
        test.published::<InvoiceSent>().await,
        [InvoiceSent { customer }]
    );
    assert!(test.dead_letters().await.is_empty());

    println!("an hour and a half passed in {:?}", begun.elapsed());
}
