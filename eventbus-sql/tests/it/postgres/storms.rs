//! A server that crashes, or ends all its connections, again and again while a shop works on it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::own_server::{OwnServer, give};
use super::shop::{Booked, KEYS, Shop, Taken, check, config};
use crate::files::SmallDisk;
use crate::place::Place;
use crate::waiting::until;

const PAUSE: Duration = Duration::from_millis(5);

/// Takes the orders of one key one after the other, each until it is taken.
async fn take_orders(shop: Shop, key: i64, stop: Arc<AtomicBool>) -> BTreeSet<i64> {
    let mut taken = BTreeSet::new();
    for round in 0.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let number = key + KEYS * round;
        while shop.order(number, "").await.is_err() {
            sleep(PAUSE).await;
        }
        taken.insert(number);
    }
    taken
}

/// Orders, relays and books while `harm` is done, and adds up.
async fn survives(server: OwnServer, harm: impl AsyncFnOnce(&OwnServer, &Shop)) {
    let shop = Shop::open(config(&server.url("shop"))).await;
    let (books, relay) = (shop.book().await, shop.relay());
    let other = Shop::on(config(&server.url("shop"))).await;
    let other = Shop {
        bus: shop.bus.clone(),
        outbox: other.store.outbox(&shop.bus),
        ..other
    };
    let second = other.relay();
    let stop = Arc::new(AtomicBool::new(false));
    let takers: Vec<_> = (0..KEYS)
        .map(|key| tokio::spawn(take_orders(shop.clone(), key, Arc::clone(&stop))))
        .collect();
    harm(&server, &shop).await;
    stop.store(true, Ordering::SeqCst);
    let mut taken = BTreeSet::new();
    for taker in takers {
        let of_key = tokio::time::timeout(crate::waiting::LIMIT, taker).await;
        taken.extend(of_key.expect("in time").expect("it does not panic"));
    }
    let all = taken.len();
    until(async || shop.booked().await.len() >= all).await;
    until(async || shop.waiting().await == 0).await;
    relay.stop().await;
    second.stop().await;
    let counts = books.status().counts;
    books.shutdown().await.expect("it ends well");

    assert_eq!(shop.orders().await, taken);
    check(&shop.published::<Taken>().await, &taken);
    let booked = shop.booked().await;
    assert_eq!(booked.len(), all, "each has one effect");
    check(&booked, &taken);
    check(&shop.published::<Booked>().await, &taken);
    assert_eq!((counts.failed_attempts, counts.dead_lettered), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_server_that_crashes_again_and_again_loses_and_doubles_nothing() {
    survives(OwnServer::start().await, async |server, shop| {
        for _ in 0..4 {
            let before = shop.booked().await.len();
            server.restart().await;
            // It works again, and is in the middle of something.
            until(async || shop.booked().await.len() > before + 50).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn connections_that_end_all_the_time_lose_and_double_nothing() {
    const LONG: Duration = Duration::from_secs(5);
    const END_ALL: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = 'shop'";
    survives(OwnServer::start().await, async |server, _| {
        let begun = Instant::now();
        while begun.elapsed() < LONG {
            server.run(END_ALL).await;
            // As long as a few transactions take, or none would ever come to its end.
            sleep(10 * PAUSE).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "mounts a tmpfs, as root: ./dev/test only campaigns"]
async fn a_server_that_stops_because_its_log_on_a_small_disk_has_no_room_loses_and_doubles_nothing()
{
    let place = Place::new();
    let disk = SmallDisk::mount(&place, "64m");
    give(&disk.0);
    let server = OwnServer::start_with_log(&disk.0).await;
    survives(server, async |server, shop| {
        until(async || shop.booked().await.len() > 50).await;
        disk.fill();
        until(async || server.has_said("PANIC") && server.has_said("No space left")).await;
        disk.make_room();
        server.restart().await;
        let before = shop.booked().await.len();
        until(async || shop.booked().await.len() > before + 50).await;
    })
    .await;
}
