//! The text of every error a user can meet, provoked for real and kept in `tests/golden/errors.txt`.
//!
//! `UPDATE_GOLDEN=1 cargo test -p eventbus --test it errors` writes the file anew.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use eventbus::broker::{AdminRequest, Broker, Publisher, Subscriber, Subscription};
use eventbus::format::{Codec, FlatFormat};
use eventbus::prelude::*;
use eventbus::store::{MemoryLeases, MemoryOutbox};
use eventbus::{
    BatchItem, Headers, MemoryBroker, MemoryConfig, MemoryKeyState, MemoryProfile, MemoryUnit,
    Message, Position, Relay, Timestamp,
};
use eventbus_testkit::TestBus;
use serde::{Deserialize, Serialize};

#[derive(Event, Serialize, Deserialize)]
#[event(type = "OrderCreated", topic = "order-events", key = "order_id")]
struct OrderCreated {
    order_id: String,
    note: String,
}

fn order(order_id: &str) -> OrderCreated {
    OrderCreated {
        order_id: order_id.to_owned(),
        note: String::new(),
    }
}

fn large() -> OrderCreated {
    OrderCreated {
        order_id: "42".to_owned(),
        note: "x".repeat(2 * 1024 * 1024),
    }
}

mod v2 {
    //! The same event as a newer service knows it.

    use super::{Deserialize, Event, Serialize};

    #[derive(Event, Serialize, Deserialize)]
    #[event(
        type = "OrderCreated",
        topic = "order-events",
        key = "order_id",
        version = 2
    )]
    pub(super) struct OrderCreated {
        pub(super) order_id: String,
    }
}

#[derive(Event, Serialize, Deserialize)]
#[event(type = "Counted", topic = "counts")]
struct Counted(u64);

/// Bytes that are not JSON.
#[derive(Debug)]
struct Raw;

impl Codec<Photo> for Raw {
    const CONTENT_TYPE: &'static str = "image/png";

    fn encode(_: &Photo) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn decode(_: &[u8]) -> Result<Photo> {
        Ok(Photo {})
    }
}

#[derive(Event)]
#[event(type = "Photo", topic = "photos", codec = "Raw")]
struct Photo {}

/// The lines of the golden file.
#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, error: &Error) {
        let text = eventbus::error_chain(error);
        writeln!(self.0, "{:?} | {text}", error.kind()).expect("a string takes it");
    }

    fn refused<T>(&mut self, result: Result<T>) {
        match result {
            Ok(_) => panic!("after {:?}: this was not refused", self.0.lines().last()),
            Err(error) => self.add(&error),
        }
    }

    fn section(&mut self, title: &str) {
        let gap = if self.0.is_empty() { "" } else { "\n" };
        writeln!(self.0, "{gap}# {title}").expect("a string takes it");
    }

    async fn letters(&mut self, test: &TestBus) {
        for letter in test.dead_letters().await {
            writeln!(self.0, "{} | {}", letter.cause, letter.error).expect("a string takes it");
        }
    }
}

async fn handled(_: OrderCreated, _: Context) -> Result<(), BoxError> {
    Ok(())
}

async fn batch(_: Vec<BatchItem<OrderCreated>>) -> Result<(), BoxError> {
    Ok(())
}

#[tokio::test]
async fn every_error_says_what_to_do() {
    let mut lines = Lines::default();
    connecting(&mut lines).await;
    naming(&mut lines);
    publishing(&mut lines).await;
    spawning(&mut lines).await;
    unsupported(&mut lines).await;
    handling(&mut lines).await;
    replaying(&mut lines).await;
    operating(&mut lines).await;
    closed(&mut lines).await;

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/errors.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &lines.0).expect("the repository can be written");
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        golden == lines.0,
        "texts have changed: look at them with UPDATE_GOLDEN=1 and `git diff`\n{}",
        lines.0
    );
}

async fn connecting(lines: &mut Lines) {
    lines.section("connecting and configuration");
    for url in [
        "",
        "localhost:9092",
        "carrier-pigeon://user:secret@loft?key=secret",
        "memory:?like=nats",
        "memory:?partitions=0",
        "memory:?partitions=many",
        "memory:?bytes=1",
        "memory:?size=1",
    ] {
        lines.refused(eventbus::connect(url).await);
    }
    let unknown = [("EVENTBUS_URI".to_owned(), "memory:".to_owned())];
    lines.refused(EventBusConfig::new("memory:").overridden_by(unknown));
    lines.refused(EventBusConfig::new("").overridden_by([]));
    let config = EventBusConfig::new("memory:").with_topic_prefix("my staging/");
    let bus = EventBus::connect_with(&config).await;
    match bus {
        Ok(bus) => lines.refused(bus.publish(order("42")).await),
        Err(error) => lines.add(&error),
    }
    for store in [
        "memory:",
        "kafka://user:secret@host",
        "sqlite://",
        "held.db",
    ] {
        let config = EventBusConfig::new("memory:").with_store(store);
        lines.refused(EventBus::connect_with(&config).await);
    }
    assert!(!lines.0.contains("secret"), "{}", lines.0);
}

fn naming(lines: &mut Lines) {
    lines.section("names, headers, ids");
    lines.refused(Topic::new("order events"));
    lines.refused(Topic::new(&"x".repeat(300)));
    lines.refused(eventbus::Group::new(""));
    lines.refused(Headers::builder().push("", "value"));
    lines.refused(Headers::builder().push("note", "x".repeat(1024 * 1024)));
    let many = (0..1000).try_fold(Headers::builder(), |headers, number| {
        headers.push("note", number.to_string())
    });
    lines.refused(many);
    lines.refused(EventId::parse(""));
    lines.refused("yesterday".parse::<Timestamp>());
}

async fn publishing(lines: &mut Lines) {
    lines.section("publishing");
    let test = TestBus::like(MemoryProfile::Kafka);
    lines.refused(test.publish(large()).await);
    lines.refused(test.publish(order(&"x".repeat(70_000))).await);
    lines.refused(test.publish(Photo {}).await);
    let flat = EventBus::builder(MemoryBroker::new())
        .format(FlatFormat)
        .build();
    lines.refused(flat.publish(Counted(1)).await);
    let config = MemoryConfig::default()
        .with_bytes(4096)
        .with_publish_timeout(Duration::from_secs(1));
    let small = TestBus::wrapping(config, |server| server);
    let consumer = small.consumer("payments").on(handled);
    let consumer = small.spawn(consumer).await;
    consumer.pause();
    let full = loop {
        if let Err(error) = small.publish(order("42")).await {
            break error;
        }
    };
    lines.add(&full);
}

async fn spawning(lines: &mut Lines) {
    lines.section("setting a consumer up");
    let test = TestBus::new();
    let payments = || test.consumer("payments");
    lines.refused(payments().spawn().await);
    lines.refused(test.consumer("pay ments").on(handled).spawn().await);
    lines.refused(test.consumer(&"x".repeat(240)).on(handled).spawn().await);
    lines.refused(test.consumer(&"x".repeat(190)).on(handled).spawn().await);
    lines.refused(payments().on(handled).on(handled).spawn().await);
    lines.refused(payments().on(handled).state(()).on(handled).spawn().await);
    let unit = MemoryUnit::new(test.broker().clone(), ());
    lines.refused(payments().on(handled).unit(unit).spawn().await);
    lines.refused(payments().on(handled).concurrency(0).spawn().await);
    lines.refused(payments().on(handled).hand_outs_max(0).spawn().await);
    lines.refused(payments().on(handled).workers(0).spawn().await);
    lines.refused(
        payments()
            .on(handled)
            .deadline(Duration::ZERO)
            .spawn()
            .await,
    );
    lines.refused(payments().on_batch(0, batch).spawn().await);
    let windowed = || payments().duplicate_window(DuplicateWindow::in_memory());
    lines.refused(windowed().on_batch(10, batch).spawn().await);
    let unit = MemoryUnit::new(MemoryBroker::new(), ());
    let with_unit = windowed()
        .unit(unit)
        .on(async |_: OrderCreated, _: Context<(), MemoryUnit<()>>| Ok(()));
    lines.refused(with_unit.spawn().await);
    let store = std::sync::Arc::new(MemoryOutbox::new());
    let leases = std::sync::Arc::new(MemoryLeases::new());
    let held = std::sync::Arc::new(MemoryKeyState::new());
    let relay = Relay::on(test.bus(), store, leases, held);
    let moved = relay.after(test.drained(&[OrderCreated::TOPIC]));
    lines.refused(moved.run_until(async {}).await);
}

async fn unsupported(lines: &mut Lines) {
    lines.section("what memory:?like=rabbitmq and memory:?like=kafka do not declare");
    let rabbit = TestBus::like(MemoryProfile::RabbitMq);
    let topics = [OrderCreated::TOPIC];
    rabbit.publish(order("42")).await.expect("it is taken");
    let payments = || rabbit.consumer("payments").on(handled);
    lines.refused(payments().start(Start::Position(Position(0))).spawn().await);
    lines.refused(
        payments()
            .start(Start::Time(SystemTime::UNIX_EPOCH))
            .spawn()
            .await,
    );
    lines.refused(payments().replay(Replay::from(Start::Earliest)).await);
    let delay = Duration::from_secs(900);
    lines.refused(rabbit.publish_after(order("42"), delay).await);
    lines.refused(rabbit.cancel(&EventId::from_name("reminder")).await);
    lines.refused(rabbit.scheduled());
    lines.refused(
        rabbit
            .read(&topics, Start::Earliest, Some(Until::Now))
            .await,
    );
    let trim = AdminRequest::Trim {
        topic: OrderCreated::TOPIC,
        partition: 0,
        before: Position(0),
    };
    lines.refused(rabbit.broker().admin(trim).await);
    let group = eventbus::Group::from_static("payments");
    let mut bounded = Subscription::group(group, topics.to_vec());
    bounded.until = Some(Until::Now);
    lines.refused(rabbit.broker().subscribe(bounded).await);
}

async fn handling(lines: &mut Lines) {
    lines.section("in handlers, and why messages became dead letters");
    let test = TestBus::new();
    let consumer = test
        .consumer("payments")
        .state(test.bus().clone())
        .retry(RetryPolicy::none())
        .deadline(Duration::from_secs(10))
        .workers(1)
        .concurrency(1)
        .on(async |order: OrderCreated, cx: Context<EventBus>| {
            match order.order_id.as_str() {
                "publishes past its context" => {
                    cx.state().publish(order).await?;
                }
                "publishes too much" => {
                    let note = "x".repeat(9 * 1024 * 1024);
                    cx.publish(OrderCreated { note, ..order })?;
                }
                "panics" => panic!("the amount is negative"),
                "waits" => std::future::pending::<()>().await,
                _ => {}
            }
            Ok(())
        });
    let _consumer = test.spawn(consumer).await;
    for name in [
        "publishes past its context",
        "publishes too much",
        "panics",
        "waits",
    ] {
        test.publish(order(name)).await.expect("it is taken");
        test.run_out().await;
    }
    for body in [
        "not JSON",
        r#"{"event_type":"OrderCreated","order_id":"#,
        r#"{"event_type":"OrderCreated","order_id":42}"#,
        r#"{"event_type":"OrderMoved"}"#,
    ] {
        let message = Message::new(OrderCreated::TOPIC, body).with_key("publishes too much");
        test.broker()
            .publish(vec![message])
            .await
            .expect("it is taken");
    }
    let order_id = "publishes too much".to_owned();
    test.publish(v2::OrderCreated { order_id })
        .await
        .expect("it is taken");
    test.run_out().await;
    lines.letters(&test).await;

    let test = TestBus::new();
    let consumer = test
        .consumer("archive")
        .on(async |_: v2::OrderCreated, _: Context| Ok(()));
    let _consumer = test.spawn(consumer).await;
    test.publish(order("42")).await.expect("it is taken");
    test.run_out().await;
    lines.letters(&test).await;

    let test = TestBus::new();
    let consumer = test
        .consumer("keeping")
        .unit(MemoryUnit::new(test.broker().clone(), ()))
        .retry(RetryPolicy::none())
        .on(async |_: OrderCreated, cx: Context<(), MemoryUnit<()>>| {
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                drop(cx);
            });
            Ok(())
        });
    let _consumer = test.spawn(consumer).await;
    test.publish(order("42")).await.expect("it is taken");
    test.run_out().await;
    lines.letters(&test).await;

    let test = TestBus::new();
    let consumer = test
        .consumer("reminding")
        .unit(MemoryUnit::new(test.broker().clone(), ()))
        .retry(RetryPolicy::none())
        .on(
            async |order: OrderCreated, cx: Context<(), MemoryUnit<()>>| {
                cx.publish_after(order, Duration::from_secs(900))?;
                Ok(())
            },
        );
    let _consumer = test.spawn(consumer).await;
    test.publish(order("42")).await.expect("it is taken");
    test.run_out().await;
    lines.letters(&test).await;
}

async fn replaying(lines: &mut Lines) {
    lines.section("replaying");
    let test = TestBus::new();
    test.publish(order("42")).await.expect("it is taken");
    let replay = || Replay::from(Start::Earliest);
    let publishing = test.consumer("payments").retry(RetryPolicy::none());
    let publishing = publishing.on(async |order: OrderCreated, cx: Context| {
        cx.publish(order)?;
        Ok(())
    });
    lines.refused(publishing.replay(replay()).await);
    let unit = MemoryUnit::new(test.broker().clone(), ());
    let with_unit = test
        .consumer("payments")
        .unit(unit)
        .on(async |_: OrderCreated, _: Context<(), MemoryUnit<()>>| Ok(()));
    lines.refused(with_unit.replay(replay()).await);
}

async fn operating(lines: &mut Lines) {
    lines.section("operating");
    let test = TestBus::new();
    let topics = [OrderCreated::TOPIC];
    lines.refused(test.lag("payments", &topics).await);
    let consumer = test.consumer("payments").on(handled);
    let _consumer = test.spawn(consumer).await;
    lines.refused(test.lag("billing", &topics).await);
    let letters = test
        .bus()
        .dead_letters("payments", &topics)
        .expect("a good name");
    lines.refused(letters.show(&EventId::from_name("gone")).await);
    lines.refused(test.bus().dead_letters("pay ments", &topics));
    let too_many = TopicSpec::new(Topic::from_static("wide")).with_partitions(100_000);
    lines.refused(test.apply_topics(&[too_many]).await);
    let reset = AdminRequest::ResetGroup {
        group: eventbus::Group::from_static("payments"),
        topic: OrderCreated::TOPIC,
        to: Start::Earliest,
    };
    lines.refused(test.broker().admin(reset).await);
    let trim = AdminRequest::Trim {
        topic: OrderCreated::TOPIC,
        partition: 99,
        before: Position(0),
    };
    lines.refused(test.broker().admin(trim).await);
}

async fn closed(lines: &mut Lines) {
    lines.section("after close");
    let test = TestBus::new();
    let consumer = test.spawn(test.consumer("payments").on(handled)).await;
    test.close().await.expect("it closes");
    lines.refused(test.publish(order("42")).await);
    lines.refused(test.consumer("payments").on(handled).spawn().await);
    let delay = Duration::from_secs(900);
    lines.refused(test.publish_after(order("42"), delay).await);
    lines.refused(test.health().await);
    lines.refused(consumer.run_until(std::future::pending()).await);
}
