//! Dead letters through a bus: stored, listed, re-driven; and the log they are kept in.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use eventbus_core::{
    BoxError, Context, Event, EventBus, Headers, Json, Key, Message, Position, Publisher, Redrive,
    RetryPolicy, Start, Subscription, Topic, Until, unknown_version,
};
use eventbus_testkit::{Probe, text_of, within};
use serde::{Deserialize, Serialize};

use lapin::options::QueueDeleteOptions;

use crate::server::{Server, create, topic};

const MINUTE: Duration = Duration::from_secs(60);

#[derive(Serialize, Deserialize)]
pub(crate) struct OrderPlaced {
    pub(crate) order_id: u64,
}

impl Event for OrderPlaced {
    const TYPE: &'static str = "OrderPlaced";
    const TOPIC: Topic = Topic::from_static("orders");
    const VERSION: u32 = 1;
    type Codec = Json;

    fn key(&self) -> Option<Key> {
        Some(Key::display(self.order_id))
    }

    fn upcast(version: u32, _: &[u8]) -> eventbus_core::Result<Self> {
        Err(unknown_version::<Self>(version))
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn what_cannot_be_handled_is_a_letter_that_can_be_re_driven() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let prefix = format!("{}.", topic("letters"));
    let bus = EventBus::builder(broker).topic_prefix(&prefix).build();
    let is_broken = Arc::new(AtomicBool::new(true));
    let handled = Arc::new(AtomicUsize::new(0));
    let (seen_broken, count) = (Arc::clone(&is_broken), Arc::clone(&handled));
    let group = topic("billing").to_string();
    let consumer = bus.consumer(&group).retry(RetryPolicy::immediate(2)).on(
        move |order: OrderPlaced, _: Context| {
            let (broken, count) = (seen_broken.load(Ordering::SeqCst), Arc::clone(&count));
            async move {
                if broken && order.order_id.is_multiple_of(2) {
                    return Err(BoxError::from("the bank does not answer"));
                }
                count.fetch_add(1, Ordering::SeqCst);
                Ok(())
            }
        },
    );
    let consumer = consumer.spawn().await.expect("it joins");
    within(MINUTE, async {
        for order_id in 0..10 {
            let published = bus.publish(OrderPlaced { order_id }).await;
            published.expect("it is taken");
        }
        while consumer.status().counts.dead_lettered < 5 || handled.load(Ordering::SeqCst) < 5 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let desk = bus.dead_letters(&group, &[OrderPlaced::TOPIC]);
        let desk = desk.expect("it has a desk");
        for _ in 0..2 {
            // Reading them again finds the same: marks of earlier reads are passed over.
            let letters = desk.list().await.expect("they can be read");
            assert_eq!(letters.len(), 5);
            assert!(letters.iter().all(|it| it.error.contains("the bank")));
        }
        is_broken.store(false, Ordering::SeqCst);
        let redrive = Redrive::all().by("ann").because("the bank is back");
        let report = desk.redrive(redrive).await.expect("they are given again");
        assert_eq!((report.chosen, report.done), (5, 5));
        while handled.load(Ordering::SeqCst) < 10 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(desk.list().await.expect("it can be read").is_empty());
    })
    .await;
    drop(consumer);
    bus.close().await.expect("it closes");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_log_is_read_from_any_place_to_its_end() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let letters = Topic::new(&format!("{}.dlq", topic("log"))).expect("a good name");
    let reader = || Subscription::reader(vec![letters.clone()]).with_until(Until::Now);
    within(MINUTE, async {
        // It is created, and nothing is in it.
        let mut probe = Probe::join(&broker, reader()).await.expect("it reads");
        probe.hear_until(|probe| probe.ended().len() == 1).await;
        assert_eq!(probe.waiting(), 0);
        let texts: Vec<_> = (0..700).map(|number| number.to_string()).collect();
        // What was published with such a header is a letter all the same.
        let marked = Headers::builder().push("eb-mark", "m");
        let marked = marked.expect("within limits").build();
        let messages = texts
            .iter()
            .map(|text| Message::new(letters.clone(), text.clone()).with_headers(marked.clone()));
        broker
            .publish(messages.collect())
            .await
            .expect("it is taken");
        let mut probe = Probe::join(&broker, reader()).await.expect("it reads");
        let behind = vec![Message::new(letters.clone(), "behind")];
        broker.publish(behind).await.expect("it is taken");
        let mut deliveries = Vec::new();
        while probe.ended().is_empty() || probe.waiting() > 0 {
            if probe.waiting() == 0 {
                probe.step().await.expect("it goes on");
            }
            let some = probe.collect(probe.waiting()).await;
            probe.settle(&some).await;
            deliveries.extend(some);
        }
        let found: Vec<_> = deliveries.iter().map(text_of).collect();
        assert_eq!(found, texts);
        let from = deliveries[650].position.expect("a log has positions");
        let to = Position(from.0 + 3);
        let part = Subscription::reader(vec![letters.clone()])
            .with_start(Start::Position(from))
            .with_until(Until::Position(to));
        let mut probe = Probe::join(&broker, part).await.expect("it reads");
        probe.hear_until(|probe| probe.ended().len() == 1).await;
        assert_eq!(probe.waiting(), 3);
        assert_eq!(probe.collect_texts(3).await, texts[650..653]);
        let tail = Subscription::reader(vec![letters.clone()]).with_start(Start::Latest);
        let mut probe = Probe::join(&broker, tail).await.expect("it reads");
        let new = vec![Message::new(letters.clone(), "new")];
        broker.publish(new).await.expect("it is taken");
        assert_eq!(probe.collect_texts(1).await, ["new"]);
    })
    .await;
}

/// A process may end between creating a log and creating its streams.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_log_that_was_not_created_to_its_end_is_completed() {
    let server = Server::new().await;
    let broker = server.connect().await.expect("it answers");
    let letters = Topic::new(&format!("{}.dlq", topic("log"))).expect("a good name");
    create(&broker, &letters, 2).await;
    let raw = server.raw().await;
    let channel = raw.create_channel().await.expect("there is one");
    for partition in 0..2 {
        let name = format!("{letters}:{partition}").as_str().into();
        let deleted = channel.queue_delete(name, QueueDeleteOptions::default());
        deleted.await.expect("it is deleted");
    }
    within(MINUTE, async {
        // Another process, which does not know it yet.
        let another = server.connect().await.expect("it answers");
        let letter = vec![Message::new(letters.clone(), "x").with_key("k")];
        another.publish(letter).await.expect("it is taken");
        let reader = Subscription::reader(vec![letters.clone()]).with_until(Until::Now);
        let mut probe = Probe::join(&another, reader).await.expect("it reads");
        assert_eq!(probe.collect_texts(1).await, ["x"]);
    })
    .await;
}
