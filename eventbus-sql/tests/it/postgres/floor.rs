//! Where reading the outbox begins: behind what was removed, and before all that may still come.

use std::time::Duration;

use eventbus_core::{Origin, OutboxStore};
use sqlx::Connection;
use tokio::time::sleep;

use super::service::Service;
use crate::events::OrderPlaced;
use crate::waiting::until;

/// More than is removed before a floor is looked for.
const MANY: i64 = 6_000;

/// Commits many messages, and removes them as a relay does.
async fn pass_many(service: &Service) {
    let mut tx = service.begin().await;
    for number in 0..MANY {
        tx.publish(OrderPlaced { number }).expect("collected");
    }
    tx.commit().await.expect("it commits");
    take_all(service).await;
}

async fn take_all(service: &Service) -> usize {
    let mut taken = 0;
    loop {
        let waiting = service.waiting().await;
        if waiting.is_empty() {
            return taken;
        }
        let positions: Vec<_> = waiting.iter().map(|next| next.position).collect();
        let removed = service.store.remove(&positions).await;
        removed.expect("they are removed");
        taken += positions.len();
    }
}

/// A row at the first position, as nobody of ours writes one.
async fn write_first(service: &Service) {
    let sql = "INSERT INTO outbox
        (position, lane, id, aggregatetype, aggregateid, type, payload, headers)
        OVERRIDING SYSTEM VALUE VALUES (1, 3, 'by-hand', 'order-events', '1', '', '', '')";
    let written = sqlx::raw_sql(sql).execute(service.store.pool()).await;
    written.expect("it is written");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_transaction_that_is_late_is_found_however_much_passed_meanwhile() {
    let service = Service::open().await;
    let mut late = service.store.pool().acquire().await.expect("a connection");
    for round in 0..3 {
        let mut tx = late.begin().await.expect("a transaction");
        let mut batch = service.bus.batch(Origin::new()).expect("a batch");
        batch
            .publish(OrderPlaced { number: -1 })
            .expect("collected");
        let appended = service.outbox.append(&mut tx, batch).await;
        appended.expect("appended");
        for _ in 0..3 {
            pass_many(&service).await;
            // By then it is asked whether who wrote meanwhile has ended.
            sleep(Duration::from_millis(60)).await;
        }
        assert!(service.waiting().await.is_empty());
        tx.commit().await.expect("it commits");
        assert_eq!(take_all(&service).await, 1, "round {round}");
    }
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_comes_below_the_floor_by_other_ways_is_found_when_it_is_counted() {
    let service = Service::open().await;
    until(async || {
        pass_many(&service).await;
        sleep(Duration::from_millis(60)).await;
        assert!(service.waiting().await.is_empty());
        write_first(&service).await;
        // Where there is no floor yet it is found.
        take_all(&service).await == 0
    })
    .await;
    let depth = service.store.depth().await.expect("it counts");
    assert_eq!(depth.messages(), 1);
    assert_eq!(take_all(&service).await, 1);

    // Positions that begin anew.
    let anew = "TRUNCATE outbox RESTART IDENTITY";
    let anew = sqlx::raw_sql(anew).execute(service.store.pool()).await;
    anew.expect("it is emptied");
    let mut tx = service.begin().await;
    tx.publish(OrderPlaced { number: 1 }).expect("collected");
    tx.commit().await.expect("it commits");
    service.store.depth().await.expect("it counts");
    assert_eq!(take_all(&service).await, 1);
}
