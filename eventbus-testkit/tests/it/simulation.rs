//! A service under the faults of many seeds: what a user of [`Simulation`] writes, and that a service
//! with a bug is found out, its faults shrunk, and its panic repeated.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use eventbus_core::{
    Context, Event, Json, Key, MemoryUnit, Result, RetryPolicy, Topic, unknown_version,
};
use eventbus_testkit::faults::{Call, Fault};
use eventbus_testkit::{FaultPlan, Simulation, TestBus};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
struct OrderCreated {
    order_id: u64,
    amount: u64,
}

impl Event for OrderCreated {
    const TYPE: &'static str = "OrderCreated";
    const TOPIC: Topic = Topic::from_static("order-events");
    const VERSION: u32 = 1;
    type Codec = Json;

    fn key(&self) -> Option<Key> {
        Some(Key::display(self.order_id % 3))
    }

    fn upcast(version: u32, _: &[u8]) -> Result<Self> {
        Err(unknown_version::<Self>(version))
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct OrderBilled {
    order_id: u64,
}

impl Event for OrderBilled {
    const TYPE: &'static str = "OrderBilled";
    const TOPIC: Topic = Topic::from_static("billing-events");
    const VERSION: u32 = 1;
    type Codec = Json;

    fn key(&self) -> Option<Key> {
        Some(Key::display(self.order_id % 3))
    }

    fn upcast(version: u32, _: &[u8]) -> Result<Self> {
        Err(unknown_version::<Self>(version))
    }
}

const ORDERS: u64 = 20;

#[test]
fn effects_happen_once_and_in_order_under_any_faults() {
    Simulation::new().seeds(0..300).run(async |test: TestBus| {
        let bills = MemoryUnit::new(test.broker().clone(), Vec::new());
        let billing = test.consumer("billing").unit(bills.clone()).on(
            async |order: OrderCreated, mut cx: Context<(), MemoryUnit<Vec<u64>>>| {
                cx.transaction().await?.push(order.order_id);
                cx.publish(OrderBilled {
                    order_id: order.order_id,
                })?;
                Ok(())
            },
        );
        let _billing = test.spawn(billing).await;
        let mails = MemoryUnit::new(test.broker().clone(), Vec::new());
        let mailing = test.consumer("mailing").unit(mails.clone()).on(
            async |billed: OrderBilled, mut cx: Context<(), MemoryUnit<Vec<u64>>>| {
                cx.transaction().await?.push(billed.order_id);
                Ok(())
            },
        );
        let _mailing = test.spawn(mailing).await;
        for order_id in 0..ORDERS {
            let amount = 5;
            test.publish_surely(OrderCreated { order_id, amount }).await;
        }
        test.heal().await;
        for handled in [bills.state().await, mails.state().await] {
            for key in 0..3 {
                let of_key: Vec<u64> = handled.iter().copied().filter(|id| id % 3 == key).collect();
                let wanted: Vec<u64> = (0..ORDERS).filter(|id| id % 3 == key).collect();
                assert_eq!(of_key, wanted);
            }
        }
        assert!(test.dead_letters().await.is_empty());
    });
}

/// A service that counts without a unit of work, and so counts what it handles twice.
async fn forgetful(test: &TestBus) -> u64 {
    let total = Arc::new(AtomicU64::new(0));
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&total))
        .retry(RetryPolicy::fixed(3, Duration::from_millis(10)))
        .on(async |order: OrderCreated, cx: Context<AtomicU64>| {
            cx.state().fetch_add(order.amount, Ordering::SeqCst);
            Ok(())
        });
    let _consumer = test.spawn(consumer).await;
    for order_id in 0..ORDERS {
        let amount = 5;
        test.publish_surely(OrderCreated { order_id, amount }).await;
    }
    test.heal().await;
    total.load(Ordering::SeqCst)
}

#[test]
fn a_service_that_counts_duplicates_is_found_out_with_few_faults() {
    let runs = RefCell::new(Vec::new());
    let found = catch_unwind(AssertUnwindSafe(|| {
        Simulation::new()
            .seeds(0..1_000)
            .run(async |test: TestBus| {
                let total = forgetful(&test).await;
                runs.borrow_mut().push(total);
                assert_eq!(total, ORDERS * 5);
            });
    }));
    assert!(found.is_err(), "a thousand seeds did not find it");
    // The last run is the one with the fewest faults.
    assert_ne!(runs.borrow().last(), Some(&(ORDERS * 5)));
}

#[test]
fn the_same_faults_do_the_same() {
    let total = |seed| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        runtime.block_on(async { forgetful(&TestBus::with_faults(seed)).await })
    };
    for seed in 0..100 {
        assert_eq!(total(seed), total(seed), "seed {seed}");
    }
}

#[tokio::test]
async fn an_unanswered_publish_is_on_the_broker_and_taken_again_under_the_same_id() {
    let plan = FaultPlan::none().with(Call::Publish, 1, Fault::Unanswered { done: true });
    let test = TestBus::with_plan(plan);
    let order = OrderCreated {
        order_id: 1,
        amount: 5,
    };
    let id = test.publish_surely(order).await;
    test.heal().await;
    let published = test.published_with_envelopes::<OrderCreated>().await;
    let ids: Vec<_> = published.iter().map(|(envelope, _)| &envelope.id).collect();
    assert_eq!(ids, [&id, &id]);
}
