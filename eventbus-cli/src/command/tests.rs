//! Subcommands on a broker in memory, as they would be typed.

use std::sync::atomic::{AtomicU64, Ordering};

use clap::Parser;
use eventbus::Key;
use eventbus::prelude::{
    BoxError, Connect, Consumer, Context, Event, EventBus, OnPoison, Result, RetryPolicy, Start,
    Topic,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Outcome;
use crate::cli::Cli;
use crate::output::Output;

#[derive(Deserialize, Serialize)]
struct OrderCreated {
    order_id: u64,
}

impl Event for OrderCreated {
    const TYPE: &'static str = "OrderCreated";
    const TOPIC: Topic = Topic::from_static("orders");
    const VERSION: u32 = 1;
    type Codec = eventbus::Json;

    fn key(&self) -> Option<Key> {
        Some(Key::display(self.order_id))
    }

    fn upcast(version: u32, _: &[u8]) -> Result<Self> {
        Err(eventbus::unknown_version::<Self>(version))
    }
}

/// A broker of the test's own, on which commands are run one after another.
struct Desk {
    url: String,
    bus: EventBus,
}

impl Desk {
    async fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let url = format!("memory:cli-{number}?partitions=1");
        let bus = EventBus::connect(&url).await.unwrap();
        Self { url, bus }
    }

    /// With orders of these numbers.
    async fn with_orders(orders: &[u64]) -> Self {
        let desk = Self::new().await;
        for order_id in orders {
            let order_id = *order_id;
            desk.bus.publish(OrderCreated { order_id }).await.unwrap();
        }
        desk
    }

    async fn try_run(&self, line: &str) -> anyhow::Result<(Outcome, String)> {
        let arguments = ["eventbus", "--url", &self.url].into_iter();
        let cli = Cli::try_parse_from(arguments.chain(line.split(' ')))?;
        let mut written = Vec::new();
        let mut out = Output::new(cli.json, &mut written);
        let outcome = super::run(cli, &mut out).await?;
        Ok((outcome, String::from_utf8(written)?))
    }

    async fn run(&self, line: &str) -> String {
        let (outcome, text) = self.try_run(line).await.unwrap();
        assert_eq!(outcome, Outcome::Done, "{text}");
        text
    }

    async fn json(&self, line: &str) -> Value {
        let text = self.run(&format!("--json {line}")).await;
        serde_json::from_str(&text).unwrap()
    }

    async fn lines(&self, line: &str) -> Vec<Value> {
        let text = self.run(&format!("--json {line}")).await;
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    }

    async fn refused(&self, line: &str) -> String {
        let error = self.try_run(line).await.expect_err("it is refused");
        format!("{error:#}")
    }

    /// A group that can't handle orders, and has given all of them up.
    async fn failing_group(&self, orders: u64) -> Consumer {
        let refuse = async |order: OrderCreated, _: Context| -> std::result::Result<(), BoxError> {
            Err(format!("no stock for order {}", order.order_id).into())
        };
        let consumer = self.bus.consumer("billing").on(refuse);
        let consumer = consumer.retry(RetryPolicy::none());
        let consumer = consumer.on_poison(OnPoison::SkipKey).spawn().await.unwrap();
        while self
            .bus
            .lag("billing", &[OrderCreated::TOPIC])
            .await
            .unwrap()[0]
            .messages
            > 0
            || consumer.status().counts.dead_lettered < orders
        {
            tokio::task::yield_now().await;
        }
        consumer
    }
}

#[tokio::test]
async fn what_is_published_is_shown_by_tail() {
    let desk = Desk::new().await;
    let error = desk.refused("publish orders --type OrderCreated {}").await;
    assert!(error.contains("--create"), "{error}");
    let published = desk
        .json("publish orders --create --type OrderCreated --key-field order_id --metadata tenant=acme {\"order_id\":42}")
        .await;
    assert_eq!(
        (&published["topic"], &published["key"]),
        (&json!("orders"), &json!("42"))
    );
    let tail = "tail orders --from earliest --until now";
    let events = desk.lines(tail).await;
    let event = &events[0];
    assert_eq!(event["id"], published["id"]);
    assert_eq!(event["type"], "OrderCreated");
    assert_eq!(event["data"], json!({ "order_id": 42 }));
    assert_eq!(event["metadata"], json!({ "tenant": "acme" }));
    assert_eq!(
        (&event["source"], &event["position"]),
        (&json!("eventbus-cli"), &json!("0"))
    );
    let text = desk.run(tail).await;
    assert!(
        text.contains("OrderCreated v1") && text.contains("orders/0@0"),
        "{text}"
    );
    assert!(text.contains("    {\"order_id\":42}"), "{text}");
    let error = desk
        .refused("publish orders --type OrderCreated no-json")
        .await;
    assert!(error.contains("not JSON"), "{error}");
    let error = desk
        .refused("publish orders --type T --key-field id {}")
        .await;
    assert!(error.contains("\"id\""), "{error}");
}

#[tokio::test]
async fn lines_of_a_file_are_events_and_a_bad_one_is_named() {
    let desk = Desk::new().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let good: Vec<_> = (0..1234)
        .map(|number| format!("{{\"order_id\":{number}}}"))
        .collect();
    std::fs::write(path, good.join("\n")).unwrap();
    let publish = format!(
        "publish orders --create --type OrderCreated --key-field order_id --lines --file {path}"
    );
    assert_eq!(desk.run(&publish).await, "1234 events are on orders\n");
    std::fs::write(
        path,
        "{\"order_id\":1}\n\n{\"order_id\":\n{\"order_id\":2}\n",
    )
    .unwrap();
    let error = desk.refused(&publish).await;
    assert!(
        error.starts_with("1 event is on the broker before that: line 3: "),
        "{error}"
    );
    let events = desk
        .lines("tail orders --from earliest --until now --key 1")
        .await;
    assert_eq!(events.len(), 2);
}

#[tokio::test]
async fn tail_filters_and_ends() {
    let desk = Desk::with_orders(&[1, 2, 1, 3]).await;
    let count = async |line: &str| desk.lines(line).await.len();
    assert_eq!(count("tail orders --from earliest --until now").await, 4);
    assert_eq!(
        count("tail orders --from earliest --until now --key 1").await,
        2
    );
    assert_eq!(count("tail orders --from earliest --count 3").await, 3);
    assert_eq!(count("tail orders --from 2 --until now").await, 2);
    assert_eq!(
        count("tail orders --from 1h --until 3 --type OrderCreated").await,
        3
    );
    assert_eq!(
        count("tail orders --from earliest --until now --type Other").await,
        0
    );
    let error = desk.refused("tail order --count 1").await;
    assert!(error.contains("topics list"), "{error}");
}

#[tokio::test]
async fn topics_are_planned_created_and_compared() {
    let desk = Desk::new().await;
    let file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
    let path = file.path().to_str().unwrap();
    let states = |text: &str| -> Vec<String> {
        let steps: Vec<Value> = serde_json::from_str(text).unwrap();
        steps
            .iter()
            .map(|step| step["state"].as_str().unwrap().to_owned())
            .collect()
    };
    std::fs::write(path, "[[topic]]\nname = \"orders\"\npartitions = 3\n").unwrap();
    let (outcome, text) = desk
        .try_run(&format!("--json topics check {path}"))
        .await
        .unwrap();
    assert_eq!(
        (outcome, states(&text)),
        (Outcome::NotAsItShouldBe, vec!["create".into()])
    );
    desk.run(&format!("topics apply --dry-run {path}")).await;
    assert_eq!(desk.json("topics list").await, json!([]));
    let text = desk.run(&format!("--json topics apply {path}")).await;
    assert_eq!(states(&text), ["created"]);
    let text = desk.run(&format!("--json topics check {path}")).await;
    assert_eq!(states(&text), ["unchanged"]);
    assert_eq!(
        desk.json("topics list").await,
        json!([{ "name": "orders", "partitions": 3 }])
    );

    std::fs::write(path, "[[topic]]\nname = \"orders\"\npartitions = 5\n").unwrap();
    for verb in ["apply", "apply --dry-run", "check"] {
        let (outcome, text) = desk
            .try_run(&format!("topics {verb} {path}"))
            .await
            .unwrap();
        assert_eq!(outcome, Outcome::NotAsItShouldBe, "{verb}");
        assert!(text.contains("5 partitions are declared"), "{text}");
    }
}

#[tokio::test]
async fn lag_is_shown_by_group_and_by_partition() {
    let desk = Desk::with_orders(&[1, 2, 3]).await;
    assert_eq!(desk.run("lag").await, "no group reads these topics\n");
    let idle = async |_: OrderCreated, _: Context| Ok(());
    let consumer = desk
        .bus
        .consumer("shipping")
        .on(idle)
        .start(Start::Earliest);
    let consumer = consumer.spawn().await.unwrap();
    consumer.shutdown().await.unwrap();
    let before = desk.json("lag orders").await[0]["lag"].as_u64().unwrap();
    desk.run("publish orders --type OrderCreated {\"order_id\":4}")
        .await;
    let lag = desk.json("lag orders --group shipping").await;
    assert_eq!(lag[0]["lag"], before + 1);
    assert_eq!(lag[0]["partitions"][0]["partition"], 0);
    assert_eq!(desk.json("lag --group nobody").await, json!([]));
    let text = desk.run("lag --partitions").await;
    assert!(
        text.contains("shipping") && text.contains("position"),
        "{text}"
    );
}

#[tokio::test]
async fn dead_letters_are_listed_grouped_shown_and_decided_about() {
    let desk = Desk::with_orders(&[1, 2, 3]).await;
    assert_eq!(desk.run("dlq list").await, "there is no open dead letter\n");
    let billing = desk.failing_group(3).await;
    let letters = desk.json("dlq list").await;
    assert_eq!(letters.as_array().unwrap().len(), 3);
    assert_eq!(letters[0]["error"], "no stock for order 1");
    assert_eq!(letters[0]["event"]["data"], json!({ "order_id": 1 }));
    let alike = desk.json("dlq groups").await;
    let fingerprint = alike[0]["fingerprint"].as_str().unwrap();
    assert_eq!(fingerprint, "error: no stock for order <n>");
    assert_eq!(
        (&alike[0]["letters"], alike.as_array().unwrap().len()),
        (&json!(3), 1)
    );
    let id = letters[1]["id"].as_str().unwrap();
    let text = desk.run(&format!("dlq show {id}")).await;
    assert!(
        text.contains("status    open") && text.contains("no stock for order 2"),
        "{text}"
    );

    let error = desk.refused("dlq discard").await;
    assert!(error.contains("say which letters"), "{error}");
    let error = desk.refused("dlq discard --all").await;
    assert!(
        error.contains("Discard 3 dead letters?") && error.contains("--yes"),
        "{error}"
    );
    let text = desk
        .run(&format!("dlq discard {id} --by ann --because test"))
        .await;
    assert_eq!(text, "discarded: 1 dead letter\n");
    let text = desk.run(&format!("dlq show {id}")).await;
    assert!(text.contains("discarded by ann: test"), "{text}");
    let error = desk.refused(&format!("dlq redrive {id}")).await;
    assert!(error.contains("is no open letter"), "{error}");

    billing.shutdown().await.unwrap();
    let redrive = "dlq redrive --all --key 3 --yes --by ann";
    let redriven = desk.json(redrive).await;
    assert_eq!(
        (&redriven["letters"], &redriven["refused"]),
        (&json!(1), &json!(0))
    );
    assert_eq!(desk.json("dlq list").await.as_array().unwrap().len(), 1);
    let copies = desk.lines("tail orders --from 3 --until now").await;
    assert_eq!(
        (&copies[0]["to_group"], &copies[0]["key"]),
        (&json!("billing"), &json!("3"))
    );
}

#[tokio::test]
async fn whereabouts_tell_events_groups_and_dead_letters() {
    let desk = Desk::with_orders(&[1, 2]).await;
    let _billing = desk.failing_group(2).await;
    let places = desk.json("whereabouts orders 2").await;
    let group = json!({ "group": "billing", "state": "settled", "before": null });
    assert_eq!(places["events"][0]["groups"], json!([group]));
    assert_eq!(places["dead_letters"][0]["status"], "open");
    assert_eq!(places["unknown"], json!([]));
    let text = desk.run("whereabouts orders 2").await;
    assert!(
        text.contains("billing: settled") && text.contains("open: no stock"),
        "{text}"
    );
    let error = desk.refused("whereabouts order 2").await;
    assert!(error.contains("does not exist"), "{error}");
}

#[tokio::test]
async fn replay_publishes_again_for_one_group_after_a_yes() {
    let desk = Desk::with_orders(&[1, 2, 1]).await;
    let error = desk
        .refused("replay orders --to-group search --from earliest")
        .await;
    assert!(error.contains("no group search reads orders"), "{error}");
    let consumer = desk
        .bus
        .consumer("search")
        .on(async |_: OrderCreated, _: Context| Ok(()));
    let consumer = consumer.spawn().await.unwrap();
    let replay = "replay orders --to-group search --from earliest --key 1";
    let text = desk.run(&format!("{replay} --dry-run")).await;
    assert_eq!(text, "2 events would be published again for search\n");
    let error = desk.refused(replay).await;
    assert!(
        error.contains("Publish 2 events of orders again for search?"),
        "{error}"
    );
    let replayed = desk.json(&format!("{replay} --yes --rate 1000")).await;
    assert_eq!(replayed, json!({ "events": 2, "published": 2 }));
    let copies = desk.lines("tail orders --from 3 --until now").await;
    assert!(
        copies
            .iter()
            .all(|copy| copy["to_group"] == "search" && copy["key"] == "1")
    );
    let originals = desk
        .lines("tail orders --from earliest --until 3 --key 1")
        .await;
    assert_eq!(copies[0]["id"], originals[0]["id"]);
    // Copies are not copied.
    let replayed = desk.json(&format!("{replay} --yes")).await;
    assert_eq!(replayed["published"], 2);
    consumer.shutdown().await.unwrap();
}

#[tokio::test]
async fn health_has_limits_and_reasons() {
    let desk = Desk::with_orders(&[1, 2]).await;
    assert!(
        desk.run("health")
            .await
            .starts_with("healthy: memory answered")
    );
    let billing = desk.failing_group(2).await;
    billing.shutdown().await.unwrap();
    desk.run("publish orders --type OrderCreated {\"order_id\":4}")
        .await;
    let line = "--json health --lag-max 0 --dead-letters-max 1";
    let (outcome, text) = desk.try_run(line).await.unwrap();
    assert_eq!(outcome, Outcome::NotAsItShouldBe);
    let health: Value = serde_json::from_str(&text).unwrap();
    let reasons = [
        "the lag of billing on orders is 1",
        "2 dead letters are open",
    ];
    assert_eq!(
        (&health["reasons"], &health["lag"]),
        (&json!(reasons), &json!(1))
    );
}
