//! A database that is dumped with events in its outbox, and restored somewhere else.

use std::collections::BTreeSet;

use eventbus_core::{EventId, Outgoing};

use super::own_server::OwnServer;
use super::shop::{Booked, Shop, Taken, by_key, check, config};
use crate::waiting::until;

const WAITING: i64 = 100;
const BOOKED: i64 = 200;
const ALL: i64 = 300;

async fn publish(shop: &Shop, number: i64, id: &EventId) {
    let note = String::new();
    let event = Outgoing::new(Taken { number, note }).with_id(id.clone());
    shop.bus.publish(event).await.expect("it is published");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_restored_dump_publishes_what_waited_and_knows_what_was_handled() {
    let server = OwnServer::start().await;
    let shop = Shop::open(config(&server.url("shop"))).await;
    for number in 0..WAITING {
        shop.order(number, "").await.expect("it is taken");
    }
    let ids: Vec<_> = (WAITING..BOOKED).map(|_| EventId::new()).collect();
    let books = shop.book().await;
    for (number, id) in (WAITING..).zip(&ids) {
        publish(&shop, number, id).await;
    }
    until(async || books.status().counts.handled >= ids.len() as u64).await;
    books.shutdown().await.expect("it ends well");
    let before = shop.next().await;
    server.create_database("restored").await;
    server.copy("shop", "restored");

    let restored = Shop::on(config(&server.url("restored"))).await;
    assert_eq!(restored.next().await, before);
    for number in BOOKED..ALL {
        restored.order(number, "").await.expect("it is taken");
    }
    let after = restored.next().await;
    assert_eq!(after[..before.len()], before, "what is new comes after");
    let books = restored.book().await;
    for (number, id) in (WAITING..).zip(&ids) {
        publish(&restored, number, id).await;
    }
    until(async || books.status().counts.duplicates >= ids.len() as u64).await;
    assert_eq!(restored.booked().await, shop.booked().await);

    let relay = restored.relay();
    until(async || restored.booked().await.len() == ALL as usize).await;
    until(async || restored.waiting().await == 0).await;
    relay.stop().await;
    books.shutdown().await.expect("it ends well");
    let booked = restored.booked().await;
    assert_eq!(booked.len(), ALL as usize, "each has one effect");
    let relayed: BTreeSet<i64> = (0..WAITING).chain(BOOKED..ALL).collect();
    let mut published = restored.published::<Taken>().await;
    published.retain(|number| relayed.contains(number));
    check(&published, &relayed);
    let published = restored.published::<Booked>().await;
    assert_eq!(
        by_key(&published),
        by_key(&booked),
        "in the order of the effects"
    );
}
