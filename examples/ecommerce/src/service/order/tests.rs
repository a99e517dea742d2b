//! The rules of the order service.

use super::{consumer, open};
use crate::events::{CancelReason, Notice, OrderCancelled, OrderShipped};
use crate::service::sample::{
    TestData, created, line, on_each_store, order_id, publish_twice, serve, short, test_bus, told,
    unpaid,
};

on_each_store!(
    a_told_customer_means_a_shipped_order,
    short_stock_and_declined_cards_cancel,
    the_mail_about_a_cancellation_ships_nothing,
    the_end_of_an_order_delivered_twice_is_said_once,
    a_second_end_is_left_to_a_person,
);

async fn a_told_customer_means_a_shipped_order(data: TestData) {
    let bus = test_bus();
    let database = open(data.databases()).await.unwrap();
    let _order = serve(&bus, &database, consumer(&bus, database.clone())).await;
    bus.publish(created(1, vec![line("teapot", 1)]))
        .await
        .unwrap();
    bus.publish(told(1, Notice::Shipped)).await.unwrap();
    bus.settled().await;
    let shipped = bus.published::<OrderShipped>().await;
    assert_eq!(shipped.len(), 1);
    assert_eq!(shipped[0].order_id, order_id(1));
}

async fn short_stock_and_declined_cards_cancel(data: TestData) {
    let bus = test_bus();
    let database = open(data.databases()).await.unwrap();
    let _order = serve(&bus, &database, consumer(&bus, database.clone())).await;
    bus.publish(short(1)).await.unwrap();
    bus.publish(unpaid(2)).await.unwrap();
    bus.settled().await;
    let mut cancelled = bus.published::<OrderCancelled>().await;
    cancelled.sort_by_key(|order| order.order_id);
    let reasons: Vec<CancelReason> = cancelled.iter().map(|order| order.reason).collect();
    assert_eq!(
        reasons,
        [CancelReason::OutOfStock, CancelReason::PaymentDeclined]
    );
}

async fn the_mail_about_a_cancellation_ships_nothing(data: TestData) {
    let bus = test_bus();
    let database = open(data.databases()).await.unwrap();
    let _order = serve(&bus, &database, consumer(&bus, database.clone())).await;
    bus.publish(short(1)).await.unwrap();
    bus.publish(told(1, Notice::Cancelled)).await.unwrap();
    bus.settled().await;
    assert!(bus.published::<OrderShipped>().await.is_empty());
    assert!(bus.dead_letters().await.is_empty());
}

async fn the_end_of_an_order_delivered_twice_is_said_once(data: TestData) {
    let bus = test_bus();
    let database = open(data.databases()).await.unwrap();
    let _order = serve(&bus, &database, consumer(&bus, database.clone())).await;
    publish_twice(&bus, short(1)).await;
    publish_twice(&bus, unpaid(2)).await;
    publish_twice(&bus, told(3, Notice::Shipped)).await;
    assert_eq!(bus.published::<OrderCancelled>().await.len(), 2);
    assert_eq!(bus.published::<OrderShipped>().await.len(), 1);
    assert!(bus.dead_letters().await.is_empty());
}

async fn a_second_end_is_left_to_a_person(data: TestData) {
    let bus = test_bus();
    let database = open(data.databases()).await.unwrap();
    let _order = serve(&bus, &database, consumer(&bus, database.clone())).await;
    bus.publish(short(1)).await.unwrap();
    bus.settled().await;
    bus.publish(told(1, Notice::Shipped)).await.unwrap();
    bus.run_out().await;
    assert!(bus.published::<OrderShipped>().await.is_empty());
    assert_eq!(bus.dead_letters().await.len(), 1);
}
