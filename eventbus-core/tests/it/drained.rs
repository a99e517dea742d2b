//! A broker is drained when everything on it is settled, nothing is held and nothing scheduled; and
//! what is left is said.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use eventbus_core::{
    AdminReply, AdminRequest, BoxError, Broker, Capabilities, Context, DrainReport, ErrorKind,
    Event, Member, MemoryBroker, MemoryConfig, Message, OnPoison, PublishError, Publisher, Result,
    RetryPolicy, Subscriber, Subscription, Undrained,
};
use eventbus_testkit::TestBus;
use tokio::time::{Instant, timeout};

use crate::fixtures::{Calls, MINUTE, OrderCreated, OrderPaid, SECOND, noting, order, paid};

async fn look(test: &TestBus) -> DrainReport {
    test.drained(&[OrderCreated::TOPIC]).report().await.unwrap()
}

fn only(report: &DrainReport) -> &Undrained {
    assert_eq!(report.left.len(), 1, "{report}");
    assert!(!report.is_drained());
    &report.left[0]
}

#[tokio::test]
async fn it_is_drained_when_the_last_handler_has_ended_and_not_before() {
    let test = TestBus::new();
    let slow = test.consumer("billing").on(
        async |_: OrderCreated, _: Context| -> Result<(), BoxError> {
            tokio::time::sleep(10 * SECOND).await;
            Ok(())
        },
    );
    let _billing = test.spawn(slow).await;
    assert!(look(&test).await.is_drained(), "nothing was published");
    let begun = Instant::now();
    test.publish(order(1)).await.unwrap();
    tokio::time::sleep(SECOND).await;
    let report = look(&test).await;
    let Undrained::Unsettled {
        group, messages, ..
    } = only(&report)
    else {
        panic!("{report}");
    };
    assert_eq!((group.as_str(), *messages), ("billing", 1));
    test.drained(&[OrderCreated::TOPIC]).await.unwrap();
    assert!(begun.elapsed() >= 10 * SECOND);
}

#[tokio::test]
async fn a_parked_key_keeps_it_from_being_drained_until_an_operator_decides() {
    let test = TestBus::holding_keys();
    let calls = Calls::new();
    calls.break_order(1);
    let billing = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(noting)
        .retry(RetryPolicy::none());
    let _billing = test.spawn(billing).await;
    test.publish(order(1)).await.unwrap();
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    let report = look(&test).await;
    assert!(matches!(only(&report), Undrained::Held { .. }), "{report}");
    assert!(report.to_string().contains("order 1 is broken"), "{report}");
    let waiting = test.drained(&[OrderCreated::TOPIC]).into_future();
    assert!(timeout(10 * MINUTE, waiting).await.is_err());
    calls.mend_all();
    let desk = test.held_keys("billing").unwrap();
    let held = desk.list().await.unwrap().remove(0).held;
    assert!(desk.retry(&held, "ann", "mended").await.unwrap());
    test.run_out().await;
    assert!(look(&test).await.is_drained());
    assert_eq!(calls.attempts(1), [1, 1, 1]);
}

#[tokio::test]
async fn an_attempt_that_is_delayed_and_an_event_that_is_scheduled_are_waited_for() {
    let test = TestBus::holding_keys();
    let billing = test
        .consumer("billing")
        .on(async |_: OrderCreated, cx: Context| match cx.attempt() {
            1 => Err("not yet".into()),
            _ => Ok(()),
        })
        .on_poison(OnPoison::ParkKey)
        .retry(RetryPolicy::none().delayed([10 * MINUTE]));
    let _billing = test.spawn(billing).await;
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    let report = look(&test).await;
    assert!(report.to_string().contains("later attempt"), "{report}");
    test.run_out().await;
    assert!(look(&test).await.is_drained());

    test.publish_after(order(2), MINUTE).await.unwrap();
    test.publish_after(paid(2), 10 * MINUTE).await.unwrap();
    let report = look(&test).await;
    let Undrained::Scheduled { messages, .. } = only(&report) else {
        panic!("{report}");
    };
    assert_eq!(*messages, 1, "of other topics nothing is said");
    test.run_out().await;
    assert!(look(&test).await.is_drained());
}

#[tokio::test]
async fn every_group_counts_unless_some_are_named_and_who_is_unknown_is_said() {
    let test = TestBus::new();
    let handle = async |_: OrderCreated, _: Context| Ok(());
    let _billing = test.spawn(test.consumer("billing").on(handle)).await;
    let mailing = test.spawn(test.consumer("mailing").on(handle)).await;
    mailing.pause();
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    let report = look(&test).await;
    assert!(report.to_string().contains("mailing"), "{report}");
    let of_group = |group: &str| test.drained(&[OrderCreated::TOPIC]).of_group(group);
    assert!(of_group("billing").report().await.unwrap().is_drained());
    let report = of_group("bling").report().await.unwrap();
    assert!(
        matches!(only(&report), Undrained::UnknownGroup(_)),
        "{report}"
    );
    assert!(of_group("bad name").report().await.is_err());
}

#[tokio::test]
async fn a_topic_that_nobody_reads_is_not_drained() {
    let test = TestBus::new();
    let missing = test.drained(&[OrderPaid::TOPIC]).report().await;
    assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
    test.publish(paid(1)).await.unwrap();
    let report = test.drained(&[OrderPaid::TOPIC]).report().await.unwrap();
    assert!(
        matches!(only(&report), Undrained::UnreadTopic(_)),
        "{report}"
    );
}

/// A broker on which something comes and is handled right after somebody looked where groups are.
#[derive(Clone, Debug)]
struct Meddled {
    inner: MemoryBroker,
    meddles: Arc<AtomicBool>,
}

impl Meddled {
    async fn meddle(&self, groups: &AdminRequest) -> Result<()> {
        let message = Message::new(
            OrderCreated::TOPIC,
            r#"{"event_type":"OrderCreated","order":1,"amount":1}"#,
        );
        self.inner.publish(vec![message]).await?;
        loop {
            let AdminReply::Groups(found) = self.inner.admin(groups.clone()).await? else {
                unreachable!("it was asked for groups");
            };
            if found.iter().all(|position| position.lag == 0) {
                return Ok(());
            }
            tokio::task::yield_now().await;
        }
    }
}

#[async_trait]
impl Publisher for Meddled {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        self.inner.publish(batch).await
    }
}

#[async_trait]
impl Subscriber for Meddled {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        self.inner.subscribe(subscription).await
    }
}

#[async_trait]
impl Broker for Meddled {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        let asks_for_groups = matches!(request, AdminRequest::Groups { .. });
        let reply = self.inner.admin(request.clone()).await?;
        if asks_for_groups && self.meddles.swap(false, Ordering::SeqCst) {
            self.meddle(&request).await?;
        }
        Ok(reply)
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

#[tokio::test]
async fn what_comes_and_goes_while_it_is_looked_keeps_it_from_being_called_drained() {
    let meddles = Arc::new(AtomicBool::new(false));
    let test = TestBus::wrapping(MemoryConfig::default(), |inner| Meddled {
        inner,
        meddles: Arc::clone(&meddles),
    });
    let handle = async |_: OrderCreated, _: Context| Ok(());
    let billing = test.spawn(test.consumer("billing").on(handle)).await;
    assert!(look(&test).await.is_drained());
    meddles.store(true, Ordering::SeqCst);
    let report = look(&test).await;
    assert!(matches!(only(&report), Undrained::Published), "{report}");
    assert_eq!(billing.status().counts.handled, 1);
    assert!(look(&test).await.is_drained());
}
