//! Order per key while members come and go under load, and while the server does.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use eventbus_core::{Broker, Key, Limits, Message, Publisher, Subscription, Topic};
use eventbus_rabbitmq::RabbitMqBroker;
use eventbus_testkit::{Probe, text_of, within};
use tokio::task::JoinSet;

use crate::server::{Server, create, group, restart, topic};

const KEYS: usize = 24;

/// What was handed out, settled or not, in the order in which handlers saw it.
#[derive(Default)]
struct Seen {
    /// The last number of each key that was settled.
    settled: Mutex<HashMap<Key, usize>>,
    repeated: AtomicUsize,
    /// Those of them that were handed out for the first time: so they were published twice.
    repeated_as_new: AtomicUsize,
    /// Messages that were published again, because nobody has acknowledged them.
    published_again: AtomicUsize,
    stop: AtomicBool,
}

impl Seen {
    /// A handler's view of a batch: the next number of each key, or one that was seen before.
    fn see(&self, key: &Key, number: usize, handed_out: Option<u32>) {
        let mut settled = self.settled.lock().expect("not poisoned");
        let next = settled.get(key).map_or(0, |last| last + 1);
        assert!(number <= next, "key {key}: {number} before {next}");
        if number < next {
            self.repeated.fetch_add(1, Ordering::Relaxed);
            let is_new = usize::from(handed_out == Some(1));
            self.repeated_as_new.fetch_add(is_new, Ordering::Relaxed);
        } else {
            settled.insert(key.clone(), number);
        }
    }

    /// A message comes again where it was taken from a member, or was published again, and else never: two
    /// members that were handed the same message would both see it as new.
    fn check_repeated(&self) {
        let as_new = self.repeated_as_new.load(Ordering::Relaxed);
        let again = self.published_again.load(Ordering::Relaxed);
        let all = self.repeated.load(Ordering::Relaxed);
        println!("{all} repeated, {as_new} of them as new, {again} published again");
        assert!(as_new <= again, "{as_new} as new, {again} published again");
    }

    fn has_all(&self, messages: usize) -> bool {
        let settled = self.settled.lock().expect("not poisoned");
        settled.len() == KEYS && settled.values().all(|last| last + 1 == messages)
    }
}

/// Works off what comes until all is there, or it is told to leave.
async fn work(broker: RabbitMqBroker, subscription: Subscription, seen: Arc<Seen>, rounds: usize) {
    let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
    for _ in 0..rounds {
        if seen.stop.load(Ordering::SeqCst) {
            break;
        }
        let step = tokio::time::timeout(Duration::from_millis(200), probe.step()).await;
        match step {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(error)) if error.is_retryable() => {}
            Ok(Err(error)) => panic!("the member goes on: {error}"),
        }
        let waiting = probe.waiting();
        if waiting == 0 {
            continue;
        }
        let deliveries = probe.collect(waiting).await;
        for delivery in &deliveries {
            let key = delivery.message.key.as_ref().expect("all have one");
            let number = text_of(delivery).parse().expect("a number");
            seen.see(key, number, delivery.handed_out);
        }
        probe.settle(&deliveries).await;
    }
    probe.close().await;
    broker.close().await.expect("it closes");
}

/// Publishes numbers on each key, one batch after the other; what is not acknowledged again.
async fn publish(broker: RabbitMqBroker, topic: Topic, messages: usize, seen: Arc<Seen>) {
    for number in 0..messages {
        let all = (0..KEYS)
            .map(|key| Message::new(topic.clone(), number.to_string()).with_key(Key::display(key)));
        let mut batch: Vec<_> = all.collect();
        while let Err(error) = broker.publish(batch).await {
            assert!(error.is_retryable(), "{error}");
            batch = error.into_messages();
            seen.published_again
                .fetch_add(batch.len(), Ordering::Relaxed);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn order_is_kept_while_members_join_and_leave_under_load() {
    const MESSAGES: usize = 250;
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let orders = topic("orders");
    create(&broker, &orders, 6).await;
    let limits = Limits::default().with_lane_messages(16);
    let subscription = Subscription::group(group("workers"), vec![orders.clone()]);
    let subscription = subscription.with_limits(limits);
    let seen = Arc::<Seen>::default();
    let mut tasks = JoinSet::new();
    // One that stays, so that the group is there before the first message.
    let first = server.connect().await.expect("it answers");
    tasks.spawn(work(
        first,
        subscription.clone(),
        Arc::clone(&seen),
        usize::MAX,
    ));
    while Probe::join(&broker, subscription.clone()).await.is_err() {}
    tasks.spawn(publish(broker, orders, MESSAGES, Arc::clone(&seen)));
    within(Duration::from_secs(150), async {
        while !seen.has_all(MESSAGES) {
            let mut coming = JoinSet::new();
            for rounds in [10, 25] {
                let other = server.connect().await.expect("it answers");
                let seen = Arc::clone(&seen);
                coming.spawn(work(other, subscription.clone(), seen, rounds));
            }
            while let Some(left) = coming.join_next().await {
                left.expect("order is kept");
            }
        }
        seen.stop.store(true, Ordering::SeqCst);
        while let Some(ended) = tasks.join_next().await {
            ended.expect("order is kept");
        }
    })
    .await;
    // Nothing that was published has failed here.
    assert_eq!(seen.published_again.load(Ordering::Relaxed), 0);
    seen.check_repeated();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_server_that_crashes_loses_nothing_and_keeps_order() {
    const MESSAGES: usize = 400;
    let server = Server::new().await;
    server.alone().await;
    let broker = server.connect().await.expect("it answers");
    let orders = topic("orders");
    create(&broker, &orders, 3).await;
    let limits = Limits::default().with_lane_messages(16);
    let subscription = Subscription::group(group("workers"), vec![orders.clone()]);
    let subscription = subscription.with_limits(limits);
    let seen = Arc::<Seen>::default();
    let mut tasks = JoinSet::new();
    for _ in 0..2 {
        let worker = server.connect().await.expect("it answers");
        tasks.spawn(work(
            worker,
            subscription.clone(),
            Arc::clone(&seen),
            usize::MAX,
        ));
    }
    drop(Probe::join(&broker, subscription).await.expect("it joins"));
    // Killed within half a second of creating a queue, a single RabbitMQ 3.10 may lose the queue with all
    // it has confirmed, whoever the client is. Nothing says when that is over but the clock.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let publishing = tokio::spawn(publish(broker, orders, MESSAGES, Arc::clone(&seen)));
    within(Duration::from_secs(150), async {
        // In the middle of publishing and consuming.
        for part in [10, 120] {
            while !seen
                .settled
                .lock()
                .expect("not poisoned")
                .values()
                .any(|last| *last > part)
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            restart().await;
        }
        publishing.await.expect("all is published");
        while !seen.has_all(MESSAGES) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        seen.stop.store(true, Ordering::SeqCst);
        while let Some(ended) = tasks.join_next().await {
            ended.expect("order is kept");
        }
    })
    .await;
    server.shared();
    // A channel publishes again by itself what it has lost, which is not counted: all that was under way.
    println!("{} repeated", seen.repeated.load(Ordering::Relaxed));
}
