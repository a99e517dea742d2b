//! Clients and members end cleanly, wake whoever waits, and lose nothing by it.

use std::task::Poll;

use eventbus_core::{AdminReply, AdminRequest, Durability, ErrorKind, Key, Outcome};
use tokio::task::JoinSet;

use super::{BrokerHarness, DEADLINE, Stage, borrowed, numbered};
use crate::probe::{Probe, within};

/// `close` may be called again, and by several at once.
pub async fn close_is_idempotent_and_concurrent(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 2).await;
        let mut members = JoinSet::new();
        for _ in 0..10 {
            let probe = stage.join(stage.subscription()).await;
            members.spawn(probe.close());
        }
        while let Some(closed) = members.join_next().await {
            closed.expect("a member can leave");
        }
        let (first, second) = tokio::join!(stage.broker.close(), stage.broker.close());
        first.expect("a client can be closed");
        second.expect("a client can be closed twice at once");
        stage.broker.close().await.expect("and once more");
    })
    .await;
}

/// Closing a client ends its members: a waiting `next` returns `Closed`, and what was unsettled
/// goes to the next owner.
pub async fn close_ends_members_and_unblocks_next(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = stage.member().await;
        stage.publish(&Key::from("k"), &["a"]).await;
        probe.collect(1).await;
        let waiting = tokio::spawn(async move {
            loop {
                if let Err(error) = probe.step().await {
                    return (error, probe);
                }
            }
        });
        tokio::task::yield_now().await;
        stage.broker.close().await.expect("a client can be closed");
        let (error, mut probe) = waiting.await.expect("it does not panic");
        assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
        let error = probe.step().await.expect_err("it stays closed");
        assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
        drop(probe);
        let other = harness.connect().await.expect("the server answers");
        let mut probe = Probe::join(&*other, stage.subscription())
            .await
            .expect("another client works");
        assert_eq!(probe.collect_texts(1).await, ["a"]);
    })
    .await;
}

/// Clients are independent of each other.
pub async fn closing_one_client_leaves_the_other_working(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = stage.member().await;
        let other = harness.connect().await.expect("the server answers");
        let message = stage.message(&Key::from("k"), "from another client");
        other.publish(vec![message]).await.expect("there is room");
        other.close().await.expect("a client can be closed");
        let deliveries = probe.collect(1).await;
        probe.settle(&deliveries).await;
        stage.publish(&Key::from("k"), &["from this client"]).await;
        assert_eq!(probe.collect_texts(1).await, ["from this client"]);
    })
    .await;
}

/// After `close` nothing is taken and nothing can be joined.
pub async fn publish_after_close_is_not_taken(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        stage.broker.close().await.expect("a client can be closed");
        let batch = vec![
            stage.message(&Key::from("a"), "1"),
            stage.message(&Key::from("b"), "2"),
        ];
        let error = stage
            .broker
            .publish(batch.clone())
            .await
            .expect_err("the client is closed");
        assert_eq!(error.unpublished.len(), 2);
        for unpublished in &error.unpublished {
            assert_eq!(unpublished.outcome, Outcome::NotTaken);
            assert_eq!(unpublished.error.kind(), ErrorKind::Closed);
            assert_eq!(unpublished.message, batch[unpublished.index]);
        }
        let error = stage
            .broker
            .subscribe(stage.subscription())
            .await
            .expect_err("the client is closed");
        assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    })
    .await;
}

/// A `next` that is dropped while it waits has taken nothing with it.
pub async fn dropped_next_loses_nothing(harness: &dyn BrokerHarness) {
    const MESSAGES: usize = 200;
    within(DEADLINE, async {
        let stage = Stage::new(harness, 2).await;
        let mut member = stage.member().await.into_member();
        let texts = numbered("", MESSAGES);
        let mut heard = Vec::new();
        let mut polls = 0u32;
        for (index, text) in texts.iter().enumerate() {
            let key = Key::display(index % 8);
            stage.publish(&key, &[text]).await;
            // Polled once, or a few times, then dropped.
            let mut next = std::pin::pin!(member.deliveries.next());
            for _ in 0..=index % 3 {
                polls += 1;
                if let Poll::Ready(signal) = futures_util::poll!(next.as_mut()) {
                    heard.push(signal.expect("the member goes on"));
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        assert!(polls > 0);
        let count = |signals: &[eventbus_core::Signal]| -> usize {
            signals
                .iter()
                .map(|signal| match signal {
                    eventbus_core::Signal::Delivered(batch) => batch.len(),
                    _ => 0,
                })
                .sum()
        };
        while count(&heard) < MESSAGES {
            let signal = member.deliveries.next().await;
            heard.push(signal.expect("the member goes on"));
        }
        let mut last = std::collections::HashMap::new();
        let mut settled = Vec::new();
        for signal in heard {
            let eventbus_core::Signal::Delivered(batch) = signal else {
                continue;
            };
            for delivery in batch {
                let number: u64 = crate::text_of(&delivery).parse().expect("a number");
                let before = last.insert(delivery.message.key.clone(), number);
                assert!(before.is_none_or(|before| before + 8 == number));
                settled.push(delivery);
            }
        }
        let mut probe = Probe::new(member);
        probe.settle(&settled).await;
        probe.close().await;
        let mut probe = stage.member().await;
        assert!(stage.drain(&mut probe).await.is_empty());
    })
    .await;
}

/// A broker that is there says so.
pub async fn health_is_answered(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let reply = stage.broker.admin(AdminRequest::Health).await;
        assert_eq!(reply.expect("the server answers"), AdminReply::Done);
    })
    .await;
}

/// What was acknowledged outlives the server's process, and so do the group's positions, unless
/// the broker declares [`Durability::Process`].
pub async fn restart_keeps_what_was_acknowledged(harness: &dyn BrokerHarness) {
    within(DEADLINE * 2, async {
        let stage = Stage::new(harness, 1).await;
        let durable = stage.capabilities.durability != Durability::Process;
        let mut probe = stage.member().await;
        let all = numbered("", 20);
        stage.publish(&Key::from("k"), &borrowed(&all)).await;
        let deliveries = probe.collect(20).await;
        probe.settle(&deliveries[..10]).await;
        probe.close().await;
        let restarted = harness.restart().await.expect("the server comes back");
        assert!(
            restarted || !durable,
            "a durable broker's harness restarts its server"
        );
        if !durable {
            return;
        }
        let broker = harness.connect().await.expect("the server answers");
        let mut probe = Probe::join(&*broker, stage.subscription())
            .await
            .expect("a member can join");
        assert_eq!(probe.collect_texts(10).await, all[10..]);
    })
    .await;
}
