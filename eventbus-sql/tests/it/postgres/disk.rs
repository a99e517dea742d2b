//! A disk that is full: what is refused is refused as a whole, and all goes on when there is room.

use std::collections::BTreeSet;

use eventbus_core::{BoxError, Error, ErrorKind};
use eventbus_sql::PostgresConfig;

use super::own_server::{OwnServer, give};
use super::shop::{Booked, Shop, Taken, config};
use crate::files::SmallDisk;
use crate::place::Place;
use crate::waiting::{is_holding, until};

const ORDERS_MAX: i64 = 1000;
const TO_BOOK: std::ops::Range<i64> = 10_000..10_020;

/// The store's tables lie on a small disk, the shop's and the server's log do not.
struct SmallServer {
    // In this order: the server has files open on the disk, which lies in the place.
    server: OwnServer,
    disk: SmallDisk,
    _place: Place,
}

impl SmallServer {
    async fn start() -> Self {
        let server = OwnServer::start().await;
        let place = Place::new();
        let disk = SmallDisk::mount(&place, "16m");
        give(&disk.0);
        let path = disk.0.display();
        let create = format!("CREATE TABLESPACE small LOCATION '{path}'");
        server.run(&create).await;
        Self {
            server,
            disk,
            _place: place,
        }
    }

    /// What creates the store's tables, on the small disk.
    fn small(&self) -> PostgresConfig {
        let mut config = config(&self.server.url("shop"));
        let space = [("default_tablespace", "small")];
        config.connect = config.connect.options(space);
        config
    }
}

/// Takes orders until one is refused because the disk is full; returns its number and why.
async fn order_until_refused(shop: &Shop, from: i64) -> (i64, BoxError) {
    let note = "x".repeat(1200);
    for number in from..from + ORDERS_MAX {
        if let Err(error) = shop.order(number, &note).await {
            return (number, error);
        }
    }
    panic!("the disk never fills up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "mounts a tmpfs, as root: ./dev/test only campaigns"]
async fn a_full_small_disk_marks_nothing_by_half_and_all_goes_on_when_there_is_room() {
    let place = SmallServer::start().await;
    drop(Shop::on(place.small()).await);
    let shop = Shop::open(config(&place.server.url("shop"))).await;
    // Its tables have rows by now, and the room of a page.
    let relay = shop.relay();
    shop.order(0, "").await.expect("there is room");
    until(async || relay.handle.status().published == 1).await;
    relay.stop().await;
    let books = shop.book().await;
    until(async || shop.booked().await == [0]).await;

    place.disk.fill();
    let (refused, error) = order_until_refused(&shop, 1).await;
    let error = error.downcast::<Error>().expect("an error of the store's");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.is_retryable(), "{error}");
    assert!(error.to_string().contains("disk is full"), "{error}");
    // Others may fit into the last page.
    let _ = order_until_refused(&shop, refused + 1).await;

    let mut taken = shop.orders().await;
    assert!(!taken.contains(&refused));
    assert!(taken.remove(&0), "it was published before");
    let unpublished = shop.unpublished::<Taken>().await;
    assert_eq!(unpublished, taken, "an order and its event, or neither");

    for number in TO_BOOK {
        let note = "x".repeat(1200);
        let published = shop.bus.publish(Taken { number, note }).await;
        published.expect("the broker has room");
    }
    until(async || is_holding(&books)).await;
    // Now and then one may still fit.
    until(async || {
        let booked: BTreeSet<i64> = shop.booked().await.into_iter().collect();
        shop.unpublished::<Booked>().await == booked
    })
    .await;
    // It tries again and again meanwhile.
    let probes = shop.last_booked().await;
    until(async || shop.last_tried().await > probes + 5).await;
    let relay = shop.relay();
    until(async || {
        let status = relay.handle.status();
        status.published > 0 || status.error.is_some()
    })
    .await;

    place.disk.make_room();
    let last = order_after(&shop, refused).await;
    let orders: BTreeSet<i64> = (0..=last).collect();
    let all: BTreeSet<i64> = orders.iter().copied().chain(TO_BOOK).collect();
    until(async || shop.booked().await.len() >= all.len()).await;
    until(async || shop.waiting().await == 0).await;
    until(async || relay.handle.status().error.is_none()).await;
    relay.stop().await;
    let counts = books.status().counts;
    books.shutdown().await.expect("it ends well");
    assert_eq!((counts.failed_attempts, counts.dead_lettered), (0, 0));
    assert_eq!(shop.orders().await, orders);
    let booked = shop.booked().await;
    assert_eq!(booked.len(), all.len(), "each has one effect");
    let published = shop.published::<Taken>().await.into_iter();
    assert_eq!(published.collect::<BTreeSet<i64>>(), all);
    let published = shop.published::<Booked>().await.into_iter();
    assert_eq!(published.collect::<BTreeSet<i64>>(), all);
}

/// The handler's own statement is what is refused, and its connection lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "mounts a tmpfs, as root: ./dev/test only campaigns"]
async fn a_handler_whose_rows_have_no_room_on_a_small_disk_is_held_and_not_counted() {
    let place = SmallServer::start().await;
    let shop = Shop::open(place.small()).await;
    let books = shop.book().await;
    place.disk.fill();
    let mut random = fastrand::Rng::with_seed(1);
    for number in TO_BOOK {
        // No page has room for a second one, and it cannot be compressed.
        let note = std::iter::repeat_with(|| random.alphanumeric()).take(5000);
        let note = note.collect();
        let published = shop.bus.publish(Taken { number, note }).await;
        published.expect("the broker has room");
    }
    until(async || is_holding(&books)).await;
    let tried = books.status().counts.handled;
    place.disk.make_room();
    until(async || shop.booked().await.len() >= TO_BOOK.count()).await;
    let counts = books.status().counts;
    books.shutdown().await.expect("it ends well");
    assert!(tried < TO_BOOK.count() as u64, "the disk was full");
    assert_eq!((counts.failed_attempts, counts.dead_lettered), (0, 0));
    let booked: BTreeSet<i64> = shop.booked().await.into_iter().collect();
    assert_eq!(booked, TO_BOOK.collect());
}

/// Takes again what was refused, and all up to some more.
async fn order_after(shop: &Shop, refused: i64) -> i64 {
    let last = refused + 20 + shop.orders().await.last().expect("there are some");
    for number in 0..=last {
        shop.order(number, "").await.expect("there is room again");
    }
    last
}
