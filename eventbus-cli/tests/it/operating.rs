//! A shop's bus in a file, operated from a shell while a service works on it.

use std::process::{Command as Program, Stdio};

use assert_cmd::Command;
use eventbus::prelude::{
    BoxError, Connect, Consumer, Context, Event, EventBus, OnPoison, Result, RetryPolicy, Topic,
};
use eventbus::{Json, Key};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;

#[derive(Deserialize, Serialize)]
struct OrderCreated {
    order_id: u64,
}

impl Event for OrderCreated {
    const TYPE: &'static str = "OrderCreated";
    const TOPIC: Topic = Topic::from_static("orders");
    const VERSION: u32 = 1;
    type Codec = Json;

    fn key(&self) -> Option<Key> {
        Some(Key::display(self.order_id))
    }

    fn upcast(version: u32, _: &[u8]) -> Result<Self> {
        Err(eventbus::unknown_version::<Self>(version))
    }
}

/// A file of the test's own.
struct Shop {
    folder: TempDir,
}

impl Shop {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("there is a place for it");
        Self { folder }
    }

    fn url(&self) -> String {
        format!("sqlite://{}", self.folder.path().join("shop.db").display())
    }

    fn eventbus(&self, line: &str) -> Command {
        let mut command = Command::cargo_bin("eventbus").expect("it was built");
        command
            .env("EVENTBUS_URL", self.url())
            .args(line.split(' '));
        command
    }

    /// What a command that succeeds prints.
    fn run(&self, line: &str) -> String {
        let output = self.eventbus(line).assert().success().get_output().clone();
        String::from_utf8(output.stdout).expect("it is text")
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.run(&format!("--json {line}"))).expect("it is a document")
    }

    /// What a command that fails says.
    fn refused(&self, line: &str) -> String {
        let output = self.eventbus(line).assert().code(1).get_output().clone();
        String::from_utf8(output.stderr).expect("it is text")
    }

    /// Creates the topic and publishes orders of these numbers, in this order.
    fn with_orders(orders: &[u64]) -> Self {
        let shop = Self::new();
        let topics = "[[topic]]\nname = \"orders\"\npartitions = 2\n";
        let apply = shop.eventbus("topics apply -").write_stdin(topics).assert();
        apply.success();
        let lines: Vec<_> = orders
            .iter()
            .map(|id| format!("{{\"order_id\":{id}}}"))
            .collect();
        let publish = "publish orders --type OrderCreated --key-field order_id --lines";
        let publish = shop
            .eventbus(publish)
            .write_stdin(lines.join("\n"))
            .assert();
        publish.success();
        shop
    }
}

/// A service that can't handle an order until it is told that it can.
struct Billing {
    stock: watch::Sender<bool>,
    consumer: Consumer,
    bus: EventBus,
}

impl Billing {
    async fn on(shop: &Shop) -> Self {
        Self::with(shop, OnPoison::SkipKey).await
    }

    async fn with(shop: &Shop, on_poison: OnPoison) -> Self {
        let bus = EventBus::connect(&shop.url())
            .await
            .expect("the file is there");
        let (stock, has_stock) = watch::channel(false);
        let bill = async |order: OrderCreated, cx: Context<watch::Receiver<bool>>| match *cx
            .state()
            .borrow()
        {
            true => Ok(()),
            false => Err(BoxError::from(format!(
                "no stock for order {}",
                order.order_id
            ))),
        };
        let consumer = bus.consumer("billing").state(has_stock).on(bill);
        let consumer = consumer.retry(RetryPolicy::none());
        let consumer = consumer.on_poison(on_poison).spawn().await;
        Self {
            stock,
            consumer: consumer.expect("the file takes it"),
            bus,
        }
    }

    /// Waits until nothing is left to do.
    async fn is_done(&self) {
        let behind = async || {
            let lags = self
                .bus
                .lags(&[OrderCreated::TOPIC])
                .await
                .expect("the file is there");
            lags.iter().map(|place| place.lag).sum::<u64>()
        };
        while behind().await > 0 {
            tokio::task::yield_now().await;
        }
    }

    async fn stop(self) {
        self.consumer.shutdown().await.expect("it stops");
        self.bus.close().await.expect("it closes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_go_from_the_desk_back_to_the_service() {
    let shop = Shop::with_orders(&[1, 2, 3]);
    let billing = Billing::on(&shop).await;
    billing.is_done().await;
    assert_eq!(shop.json("dlq groups")[0]["letters"], 3);
    let places = shop.json("whereabouts orders 2");
    assert_eq!(places["events"][0]["groups"][0]["state"], "settled");
    assert_eq!(places["dead_letters"][0]["error"], "no stock for order 2");
    shop.eventbus("health --dead-letters-max 0")
        .assert()
        .code(3);

    let id = places["dead_letters"][0]["id"]
        .as_str()
        .expect("it has one");
    let discard = shop.json(&format!("dlq discard {id} --by ann --because gone"));
    assert_eq!(discard["letters"], 1);
    billing.stock.send_replace(true);
    let first = shop.json("dlq list --limit 1")[0]["id"].clone();
    let first = first.as_str().expect("it has one");
    let edited = shop.json(&format!("dlq edit {first} {{\"order_id\":9}} --by ann"));
    assert!(
        shop.run(&format!("dlq show {first}"))
            .contains("edited by ann into")
    );
    let new_id = edited["id"].as_str().expect("it has one");
    let tail = shop.run("tail orders --from earliest --until now");
    assert!(
        tail.contains(new_id) && tail.contains("{\"order_id\":9}"),
        "{tail}"
    );
    let redrive = shop.json("dlq redrive --all --error stock --by ann --yes");
    assert_eq!(redrive["letters"], 1);
    billing.is_done().await;
    assert_eq!(billing.consumer.status().counts.handled, 2);
    assert_eq!(shop.run("dlq list"), "there is no open dead letter\n");
    shop.run("health --dead-letters-max 0 --lag-max 0");
    let places = shop.json("whereabouts orders 2");
    assert_eq!(places["dead_letters"][0]["status"], "discarded");
    assert_eq!(places["dead_letters"][0]["because"], "gone");
    billing.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_counted_and_what_is_past_is_replayed() {
    let shop = Shop::with_orders(&[1, 1, 1]);
    let billing = Billing::on(&shop).await;
    billing.stock.send_replace(true);
    billing.is_done().await;
    billing.stop().await;
    shop.run("publish orders --type OrderCreated --key 1 {\"order_id\":1}");
    let lag = shop.json("lag --group billing");
    assert_eq!(
        (&lag[0]["topic"], &lag[0]["lag"]),
        (&json!("orders"), &json!(1))
    );
    let places = shop.json("whereabouts orders 1");
    let last = &places["events"][3]["groups"][0];
    assert_eq!(
        (&last["state"], &last["before"]),
        (&json!("waiting"), &json!(0))
    );
    let replayed = shop.json("replay orders --to-group billing --from earliest --yes");
    assert_eq!(replayed, json!({ "events": 4, "published": 4 }));
    assert_eq!(shop.json("lag --group billing")[0]["lag"], 5);

    let billing = Billing::on(&shop).await;
    billing.stock.send_replace(true);
    billing.is_done().await;
    assert_eq!(billing.consumer.status().counts.handled, 5);
    billing.stop().await;
}

#[test]
fn tail_follows_what_other_processes_publish() {
    let shop = Shop::with_orders(&[1]);
    let tail = Program::new(assert_cmd::cargo::cargo_bin("eventbus"))
        .args(["--url", &shop.url(), "--json", "tail", "orders"])
        .args(["--from", "earliest", "--key", "2", "--count", "1"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    shop.run("publish orders --type OrderCreated --key 3 {\"order_id\":3}");
    shop.run("publish orders --type OrderCreated --key 2 {\"order_id\":2}");
    let output = tail.wait_with_output().expect("it ends");
    assert!(output.status.success());
    let event: Value = serde_json::from_slice(&output.stdout).expect("one line");
    assert_eq!(event["data"], json!({ "order_id": 2 }));
}

#[test]
fn a_file_that_is_not_there_is_not_created_by_looking() {
    let shop = Shop::new();
    for line in ["topics list", "tail orders", "lag", "dlq list", "health"] {
        let text = shop.refused(line);
        assert!(
            text.contains("there is no file") && text.contains("shop.db"),
            "{text}"
        );
    }
    assert!(!shop.folder.path().join("shop.db").exists());
    shop.run("publish orders --create --type OrderCreated {}");
    assert_eq!(shop.json("topics list")[0]["name"], "orders");
    let text = shop.refused("tail order");
    assert!(text.contains("the topic order can't be used"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn scheduled_events_are_listed_and_cancelled() {
    let shop = Shop::with_orders(&[1]);
    assert_eq!(shop.run("schedule list"), "nothing waits for its time\n");
    let bus = EventBus::connect(&shop.url()).await.expect("it connects");
    let later = async |order_id, hours: u64| {
        let delay = std::time::Duration::from_secs(3600 * hours);
        let published = bus.publish_after(OrderCreated { order_id }, delay).await;
        published.expect("it is stored").to_string()
    };
    let (second, first) = (later(2, 2).await, later(1, 1).await);

    let listed = shop.json("schedule list");
    let ids: Vec<_> = listed.as_array().expect("a list").iter().collect();
    assert_eq!(
        (&ids[0]["id"], &ids[1]["id"]),
        (&json!(first), &json!(second))
    );
    assert_eq!(listed[0]["type"], "OrderCreated");
    assert_eq!(
        (&listed[0]["topic"], &listed[0]["taken"]),
        (&json!("orders"), &json!(false))
    );
    let of_key = shop.json("schedule list --topic orders --key 2");
    assert_eq!(of_key.as_array().map(Vec::len), Some(1));
    assert!(
        shop.run("schedule list --limit 1")
            .contains("raise --limit")
    );
    let places = shop.json("whereabouts orders 1");
    assert_eq!(places["scheduled"][0]["id"], json!(first));

    let cancelled = shop.json(&format!("schedule cancel {first}"));
    assert_eq!(cancelled, json!({ "cancelled": 1 }));
    let error = shop.refused(&format!("schedule cancel {first} {second}"));
    assert!(
        error.contains(&format!("not waiting any more: {first}")),
        "{error}"
    );
    assert_eq!(shop.run("schedule list"), "nothing waits for its time\n");
    bus.close().await.expect("it closes");
}

#[tokio::test(flavor = "multi_thread")]
async fn parked_keys_are_listed_retried_and_discarded() {
    let shop = Shop::with_orders(&[1, 2, 1]);
    let billing = Billing::with(&shop, OnPoison::ParkKey).await;
    billing.is_done().await;
    let parked = shop.json("keys parked");
    let parked = parked.as_array().expect("it is a list");
    let of_key = |key: &str| parked.iter().find(|parked| parked["key"] == key);
    let first = of_key("1").expect("it is parked");
    assert_eq!(
        (&first["messages"], &first["until"]),
        (&json!(2), &json!(null))
    );
    assert_eq!(first["error"], "no stock for order 1");
    assert_eq!(parked.len(), 2);
    assert!(
        shop.run("keys parked --group billing")
            .contains("no stock for order 2")
    );

    shop.eventbus("health --parked-max 1").assert().code(3);
    shop.run("health --parked-max 2");

    billing.stock.send_replace(true);
    let error = shop.refused("keys retry 7 --group billing");
    assert!(error.contains("no group holds the key 7"), "{error}");
    let retried = shop.json("keys retry 1 --group billing --by ann --because delivered");
    assert_eq!(retried, json!({ "keys": 1 }));
    while shop.json("keys parked").as_array().map(Vec::len) != Some(1) {
        tokio::task::yield_now().await;
    }
    let error = shop.refused("keys discard --all");
    assert!(
        error.contains("Discard 1 key?") && error.contains("--yes"),
        "{error}"
    );
    assert_eq!(shop.run("keys discard --all --yes"), "discard: 1 key\n");
    while shop.json("dlq list").as_array().map(Vec::len) != Some(1) {
        tokio::task::yield_now().await;
    }
    let letter = &shop.json("dlq list")[0];
    let error = letter["error"].as_str().expect("it has one");
    assert!(error.contains("no stock for order 2"), "{error}");
    assert_eq!(shop.run("keys parked"), "no key is parked\n");
    billing.stop().await;
}
