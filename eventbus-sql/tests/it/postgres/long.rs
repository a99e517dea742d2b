//! Transactions that stay open for long while thousands of events pass: one that publishes, and one
//! that looks at the past.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use eventbus_core::Origin;
use sqlx::Connection;
use tokio::time::timeout;

use super::own_server::OwnServer;
use super::shop::{KEYS, Shop, Taken, check, config};
use crate::waiting::until;

const SECONDS: &str = "EVENTBUS_TEST_LONG_SECONDS";
/// As many events as a transaction publishes.
const MANY: i64 = 50;
/// Until the relay has looked again at what waits.
const LOOKS: Duration = Duration::from_secs(60);

/// How long the transactions stay open.
fn long() -> Duration {
    let seconds = std::env::var(SECONDS).map_or(Ok(3), |seconds| seconds.parse());
    Duration::from_secs(seconds.expect("a number of seconds"))
}

async fn order_many(shop: &Shop, from: i64) {
    let mut tx = shop.outbox.begin(Origin::new()).await.expect("it begins");
    for number in from..from + MANY {
        let note = String::new();
        tx.publish(Taken { number, note }).expect("collected");
    }
    tx.commit().await.expect("it commits");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn what_a_long_transaction_publishes_is_not_passed_over() {
    let server = OwnServer::start().await;
    let shop = Shop::open(config(&server.url("shop"))).await;
    let relay = shop.relay();
    let mut connection = shop.store.pool().acquire().await.expect("a connection");
    let mut late = connection.begin().await.expect("a transaction");
    let mut batch = shop.bus.batch(Origin::new()).expect("a batch");
    for number in 0..KEYS {
        let note = String::new();
        batch.publish(Taken { number, note }).expect("collected");
    }
    let appended = shop.outbox.append(&mut late, batch).await;
    appended.expect("appended");

    let begun = Instant::now();
    let mut passed = 0;
    while begun.elapsed() < long() {
        order_many(&shop, KEYS + passed).await;
        passed += MANY;
        let published = async || relay.handle.status().published == passed as u64;
        until(published).await;
    }
    let seen = async { until(async || held_back(&relay) > long() / 2).await };
    timeout(LOOKS, seen).await.expect("the relay says so");
    let depth = eventbus_core::OutboxStore::depth(&shop.store).await;
    assert!(depth.expect("it counts").held_back >= Some(long()));
    late.commit().await.expect("it commits");
    let all = passed + KEYS;
    until(async || relay.handle.status().published == all as u64).await;
    until(async || held_back(&relay).is_zero()).await;
    relay.stop().await;
    let published: BTreeSet<i64> = shop.published::<Taken>().await.into_iter().collect();
    assert_eq!(published, (oldest(&published)..all).collect());
}

/// The first of the newest, which the broker in memory keeps.
fn oldest<'a>(published: impl IntoIterator<Item = &'a i64>) -> i64 {
    *published.into_iter().min().expect("there are some")
}

fn held_back(relay: &super::shop::Running) -> Duration {
    relay.handle.status().depth.held_back.unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_session_that_looks_at_the_past_holds_nothing_back() {
    let server = OwnServer::start().await;
    let shop = Shop::open(config(&server.url("shop"))).await;
    let mut connection = shop.store.pool().acquire().await.expect("a connection");
    let mut past = connection
        .begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ")
        .await
        .expect("a transaction");
    let look = async |past: &mut sqlx::PgConnection| -> i64 {
        let count = sqlx::query_scalar("SELECT count(*) FROM outbox");
        count.fetch_one(past).await.expect("it counts")
    };
    assert_eq!(look(&mut past).await, 0);
    let relay = shop.relay();
    let begun = Instant::now();
    let mut passed = 0;
    // What it may still see cannot be cleared away, and is in the way of nobody.
    while begun.elapsed() < long() || passed < 3_000 {
        order_many(&shop, passed).await;
        passed += MANY;
        until(async || relay.handle.status().published + 500 >= passed as u64).await;
    }
    until(async || relay.handle.status().published == passed as u64).await;
    until(async || shop.waiting().await == 0).await;
    let depth = eventbus_core::OutboxStore::depth(&shop.store).await;
    let held_back = depth.expect("it counts").held_back;
    assert!(held_back < Some(Duration::from_secs(1)), "{held_back:?}");
    assert_eq!(look(&mut past).await, 0, "it looks at the past");
    past.rollback().await.expect("it ends");
    relay.stop().await;
    let published = shop.published::<Taken>().await;
    check(&published, &(oldest(&published)..passed).collect());
}
