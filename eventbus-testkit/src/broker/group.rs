//! Groups fan out, members share, and lanes move without two members working on one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use eventbus_core::{Delivery, Key, Limits, Subscription};
use tokio::task::JoinSet;

use super::{BrokerHarness, DEADLINE, Stage, borrowed, numbered, unique_group, unique_topic};
use crate::probe::{Ledger, Probe, Record, text_of, within};

/// Each group gets every message; within a group each message goes to exactly one member, and the
/// members hold equal parts.
pub async fn groups_fan_out_and_members_share(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 4).await;
        let mut first = stage.member().await;
        let mut second = stage.join(stage.subscription()).await;
        share(&mut first, &mut second, 2).await;
        let other_group = Subscription::group(unique_group(), vec![stage.topic.clone()]);
        let mut other = stage.only_member(other_group).await;
        for key in stage.keys() {
            stage.publish(&key, &["a", "b", "c"]).await;
        }
        for (probe, count) in [(&mut first, 6), (&mut second, 6), (&mut other, 12)] {
            let deliveries = probe.collect(count).await;
            probe.settle(&deliveries).await;
        }
        assert!(stage.drain(&mut other).await.is_empty());
        first.close().await;
        second.hold(4).await;
        // `drain` returns what came before its marks: the marks of the other group's drain, which
        // the first two never read.
        let left = stage.drain(&mut second).await;
        assert_eq!(left.len(), 4, "each message once: {left:?}");
    })
    .await;
}

/// Lets two members hear what there is until each holds `lanes`.
async fn share(first: &mut Probe, second: &mut Probe, lanes: usize) {
    while first.assigned().len() != lanes || second.assigned().len() != lanes {
        tokio::select! {
            step = first.step() => step.expect("the member goes on"),
            step = second.step() => step.expect("the member goes on"),
        }
    }
}

/// Many publishers and members at once: each message reaches exactly one member, in order per key.
pub async fn concurrent_members_and_publishers_see_every_message_once(harness: &dyn BrokerHarness) {
    const PUBLISHERS: usize = 8;
    const MESSAGES: usize = 100;
    within(DEADLINE, async {
        let stage = Arc::new(Stage::new(harness, 8).await);
        let ledger = Arc::new(Ledger::new());
        let mut first = stage.member().await;
        let mut workers = JoinSet::new();
        for worker in 1..5 {
            let probe = stage.join(stage.subscription()).await;
            spawn_worker(&mut workers, probe, worker, &ledger);
        }
        // All are there before the first message: nothing may come twice.
        first.hear_until(|probe| probe.assigned().len() <= 2).await;
        spawn_worker(&mut workers, first, 0, &ledger);
        let mut publishers = JoinSet::new();
        for publisher in 0..PUBLISHERS {
            let stage = Arc::clone(&stage);
            publishers.spawn(async move {
                let key = Key::display(publisher);
                for texts in numbered("", MESSAGES).chunks(10) {
                    stage.publish(&key, &borrowed(texts)).await;
                }
            });
        }
        join(publishers).await;
        ledger.reaches(PUBLISHERS * MESSAGES).await;
        let mut last = stage_drain_all(&stage, &ledger, PUBLISHERS * MESSAGES).await;
        join_closed(workers, &ledger).await;
        last.retain(|record| !record.text.starts_with("group-"));
        expect_each_once_in_order(&last, PUBLISHERS * MESSAGES);
    })
    .await;
}

/// Publishes a last message to every partition, waits for them and returns all records.
async fn stage_drain_all(stage: &Stage, ledger: &Ledger, before: usize) -> Vec<Record> {
    let mark = unique_group().to_string();
    for key in stage.keys() {
        stage.publish(&key, &[&mark]).await;
    }
    ledger.reaches(before + stage.partitions as usize).await;
    while marks(ledger, &mark) < stage.partitions as usize {
        ledger.reaches(ledger.records().len() + 1).await;
    }
    ledger.records()
}

fn marks(ledger: &Ledger, mark: &str) -> usize {
    let records = ledger.records();
    records.iter().filter(|record| record.text == mark).count()
}

fn expect_each_once_in_order(records: &[Record], count: usize) {
    let mut last: BTreeMap<Option<Key>, u64> = BTreeMap::new();
    for record in records {
        let number: u64 = record.text.parse().expect("the text is a number");
        let before = last.insert(record.key.clone(), number);
        let expected = before.map_or(0, |before| before + 1);
        assert_eq!(number, expected, "key {:?}", record.key);
    }
    assert_eq!(records.len(), count);
}

fn spawn_worker(workers: &mut JoinSet<()>, probe: Probe, worker: usize, ledger: &Arc<Ledger>) {
    let ledger = Arc::clone(ledger);
    workers.spawn(async move { probe.work(worker, &ledger).await });
}

async fn join_closed(workers: JoinSet<()>, ledger: &Ledger) {
    ledger.close();
    join(workers).await;
}

async fn join(mut tasks: JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        ended.expect("the task did not panic");
    }
}

/// One member of twenty topics gets each topic's messages on that topic.
pub async fn many_topics_do_not_mix(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let topics: Vec<_> = (0..20).map(|_| unique_topic()).collect();
        for topic in &topics {
            stage.create(topic, 1).await;
        }
        let subscription = Subscription::group(stage.group.clone(), topics.clone());
        let mut probe = stage.join(subscription).await;
        probe.hold(topics.len()).await;
        for number in 0..5 {
            let batch = topics.iter().map(|topic| {
                let mut message = stage.message(&Key::from("k"), &format!("{topic}/{number}"));
                message.topic = topic.clone();
                message
            });
            let batch = batch.collect();
            stage.broker.publish(batch).await.expect("there is room");
        }
        let deliveries = probe.collect(100).await;
        let mut seen: BTreeMap<_, Vec<String>> = BTreeMap::new();
        for delivery in &deliveries {
            let topic = delivery.message.topic.clone();
            assert_eq!(delivery.receipt.lane, probe.lane(&topic, 0));
            seen.entry(topic).or_default().push(text_of(delivery));
        }
        for topic in &topics {
            assert_eq!(seen[topic], numbered(&format!("{topic}/"), 5));
        }
        probe.settle(&deliveries).await;
    })
    .await;
}

/// While members join, leave and crash every few messages, none is lost, and none comes twice
/// that was settled.
pub async fn members_that_come_and_go_lose_nothing(harness: &dyn BrokerHarness) {
    const MESSAGES: usize = 150;
    // Fifty times members share out anew what they have; where they agree about that in turns, as on
    // Kafka, each time takes a second.
    within(3 * DEADLINE, async {
        let stage = Stage::new(harness, 3).await;
        let mut member = stage.member().await;
        for texts in numbered("", MESSAGES).chunks(3) {
            for (key, text) in stage.keys().iter().zip(texts) {
                stage.publish(key, &[text]).await;
            }
        }
        let mut settled = BTreeSet::new();
        let mut round = 0;
        while settled.len() < MESSAGES {
            let mut deliveries = member.collect(1).await;
            let more = member.waiting().min(round % 7);
            deliveries.extend(member.collect(more).await);
            // Now and then the last one stays unsettled, or all of them.
            let count = match round % 5 {
                0 | 1 => deliveries.len() - 1,
                2 => 0,
                _ => deliveries.len(),
            };
            for delivery in &deliveries[..count] {
                assert!(settled.insert(text_of(delivery)), "settled, yet handed out");
            }
            member.settle(&deliveries[..count]).await;
            let mut next = stage.join(stage.subscription()).await;
            if round % 2 == 0 {
                hear_some(&mut member, &mut next).await;
            }
            match round % 4 {
                0 | 1 => member.close().await,
                _ => member.crash(),
            }
            member = next;
            round += 1;
        }
        assert!(stage.drain(&mut member).await.is_empty());
    })
    .await;
}

/// Lets a lane or more move to the newcomer.
async fn hear_some(member: &mut Probe, next: &mut Probe) {
    while next.assigned().is_empty() {
        tokio::select! {
            step = member.step() => step.expect("the member goes on"),
            step = next.step() => step.expect("the member goes on"),
        }
    }
}

/// A moving lane stays with its owner until it is released: settlements count until then, and the
/// next owner gets nothing earlier and everything unsettled first and in order.
pub async fn moving_lane_waits_for_its_release(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 2).await;
        let limits = Limits::default().with_revoke_timeout(DEADLINE);
        let mut owner = stage
            .only_member(stage.subscription().with_limits(limits))
            .await
            .holding();
        for key in stage.keys() {
            stage.publish(&key, &["a", "b", "c", "d"]).await;
        }
        let deliveries = owner.collect(8).await;
        let released = Arc::new(AtomicBool::new(false));
        let mut newcomer = stage.join(stage.subscription()).await;
        let seen_released = Arc::clone(&released);
        let newcomer = tokio::spawn(async move {
            newcomer.hold(1).await;
            assert!(seen_released.load(Ordering::SeqCst), "assigned too early");
            let deliveries = newcomer.collect(3).await;
            newcomer.settle(&deliveries).await;
            let texts: Vec<_> = deliveries.iter().map(text_of).collect();
            assert_eq!(texts, ["c", "d", "e"]);
            newcomer
        });
        owner.hear_until(|probe| probe.revoking().len() == 1).await;
        let moving = owner.revoking()[0];
        // Work goes on: what is in flight is settled, more is published.
        let of = |lane, deliveries: &[Delivery]| -> Vec<Delivery> {
            let of_lane = deliveries.iter().filter(|found| found.receipt.lane == lane);
            of_lane.cloned().collect()
        };
        let of_moving = of(moving, &deliveries);
        owner.settle(&of_moving[..2]).await;
        let partition = owner.assigned().iter().find(|found| found.lane == moving);
        let key = super::key_on(partition.expect("it is held").partition, 2);
        stage.publish(&key, &["e"]).await;
        released.store(true, Ordering::SeqCst);
        owner
            .release(&[moving])
            .await
            .expect("a lane can be released");
        let mut newcomer = newcomer.await.expect("the newcomer's view is right");
        // The lane that stayed was not touched.
        let staying = owner.assigned()[0].lane;
        owner.settle(&of(staying, &deliveries)).await;
        owner.close().await;
        newcomer.hold(2).await;
        assert!(stage.drain(&mut newcomer).await.is_empty());
    })
    .await;
}

/// A lane that its owner does not release in time is lost; its late settlements are ignored and
/// the next owner gets everything unsettled.
pub async fn lane_that_is_not_released_in_time_is_lost(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 2).await;
        let limits = Limits::default().with_revoke_timeout(Duration::from_millis(300));
        let mut owner = stage
            .only_member(stage.subscription().with_limits(limits))
            .await
            .holding();
        for key in stage.keys() {
            stage.publish(&key, &["a", "b"]).await;
        }
        let deliveries = owner.collect(4).await;
        let mut newcomer = stage.join(stage.subscription()).await;
        while owner.lost().is_empty() || newcomer.assigned().is_empty() {
            tokio::select! {
                step = owner.step() => step.expect("the member goes on"),
                step = newcomer.step() => step.expect("the member goes on"),
            }
        }
        let lost = owner.lost()[0];
        let late: Vec<_> = deliveries
            .iter()
            .filter(|found| found.receipt.lane == lost)
            .collect();
        assert_eq!(late.len(), 2);
        owner.settle(late).await;
        newcomer.crash();
        owner.close().await;
        let mut probe = stage.member().await;
        let again = stage.drain(&mut probe).await;
        assert_eq!(again.len(), 4, "a late settlement counted");
        probe.settle(&again).await;
    })
    .await;
}
