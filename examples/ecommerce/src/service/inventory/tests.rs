//! The rules of the inventory service.

use std::collections::BTreeMap;

use eventbus::prelude::Consumer;
use eventbus_testkit::TestBus;

use super::{Warehouse, consumer};
use crate::events::{InventoryReleased, InventoryReserved, InventoryShort};
use crate::service::sample::{
    TestData, created, line, on_each_store, order_id, publish_twice, serve, test_bus, unpaid,
};

async fn open(bus: &TestBus, data: &TestData, teapots: u32, mugs: u32) -> (Warehouse, Consumer) {
    let shelf = pieces(&[("teapot", teapots), ("mug-blue", mugs)]);
    let warehouse = Warehouse::open(data.databases()).await.unwrap();
    warehouse.deliver(bus, &shelf).await.unwrap();
    let consumer = serve(bus, warehouse.database(), consumer(bus, &warehouse)).await;
    (warehouse, consumer)
}

fn pieces(of: &[(&str, u32)]) -> BTreeMap<String, u32> {
    let pieces = of
        .iter()
        .map(|(product, count)| ((*product).to_owned(), *count));
    pieces.collect()
}

on_each_store!(
    what_is_there_is_set_aside,
    all_or_nothing_is_set_aside,
    one_product_on_two_lines_counts_together,
    an_order_delivered_twice_reserves_once_and_says_so_once,
    an_unpaid_order_goes_back_on_the_shelf_once,
    nothing_held_means_nothing_to_put_back,
);

async fn what_is_there_is_set_aside(data: TestData) {
    let bus = test_bus();
    let (stock, _inventory) = open(&bus, &data, 5, 5).await;
    let order = created(1, vec![line("teapot", 2), line("mug-blue", 5)]);
    bus.publish(order.clone()).await.unwrap();
    bus.settled().await;
    let reserved = bus.published::<InventoryReserved>().await;
    assert_eq!(reserved.len(), 1);
    assert_eq!(
        (&reserved[0].lines, reserved[0].total),
        (&order.lines, order.total)
    );
    assert_eq!(
        stock.on_shelf().await.unwrap(),
        pieces(&[("teapot", 3), ("mug-blue", 0)])
    );
    assert_eq!(
        stock.set_aside().await.unwrap(),
        pieces(&[("teapot", 2), ("mug-blue", 5)])
    );
}

async fn all_or_nothing_is_set_aside(data: TestData) {
    let bus = test_bus();
    let (stock, _inventory) = open(&bus, &data, 5, 1).await;
    let order = created(1, vec![line("teapot", 2), line("mug-blue", 2)]);
    bus.publish(order).await.unwrap();
    bus.settled().await;
    let short = bus.published::<InventoryShort>().await;
    assert_eq!(short[0].product, "mug-blue");
    assert!(bus.published::<InventoryReserved>().await.is_empty());
    assert_eq!(
        stock.on_shelf().await.unwrap(),
        pieces(&[("teapot", 5), ("mug-blue", 1)])
    );
}

async fn one_product_on_two_lines_counts_together(data: TestData) {
    let bus = test_bus();
    let (stock, _inventory) = open(&bus, &data, 3, 0).await;
    let order = created(1, vec![line("teapot", 2), line("teapot", 2)]);
    bus.publish(order).await.unwrap();
    bus.settled().await;
    assert_eq!(bus.published::<InventoryShort>().await.len(), 1);
    assert_eq!(
        stock.on_shelf().await.unwrap(),
        pieces(&[("teapot", 3), ("mug-blue", 0)])
    );
}

async fn an_order_delivered_twice_reserves_once_and_says_so_once(data: TestData) {
    let bus = test_bus();
    let (stock, _inventory) = open(&bus, &data, 5, 0).await;
    publish_twice(&bus, created(1, vec![line("teapot", 2)])).await;
    assert_eq!(bus.published::<InventoryReserved>().await.len(), 1);
    assert_eq!(stock.on_shelf().await.unwrap()["teapot"], 3);
    publish_twice(&bus, created(2, vec![line("teapot", 9)])).await;
    assert_eq!(bus.published::<InventoryShort>().await.len(), 1);
}

async fn an_unpaid_order_goes_back_on_the_shelf_once(data: TestData) {
    let bus = test_bus();
    let (stock, _inventory) = open(&bus, &data, 5, 0).await;
    bus.publish(created(1, vec![line("teapot", 2)]))
        .await
        .unwrap();
    bus.settled().await;
    publish_twice(&bus, unpaid(1)).await;
    let released = bus.published::<InventoryReleased>().await;
    assert_eq!(released.len(), 1);
    assert_eq!(released[0].order_id, order_id(1));
    assert_eq!(stock.on_shelf().await.unwrap()["teapot"], 5);
    assert!(stock.set_aside().await.unwrap().is_empty());
}

async fn nothing_held_means_nothing_to_put_back(data: TestData) {
    let bus = test_bus();
    let (stock, _inventory) = open(&bus, &data, 5, 0).await;
    bus.publish(unpaid(1)).await.unwrap();
    bus.run_out().await;
    assert_eq!(bus.dead_letters().await.len(), 1);
    assert_eq!(stock.on_shelf().await.unwrap()["teapot"], 5);
}
