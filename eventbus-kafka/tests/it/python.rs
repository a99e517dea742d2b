//! The same messages through clients of Python: what we publish they read, what they publish we read, and
//! a key has the same partition for both.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use eventbus_core::{
    BoxError, Context, Event, EventBus, FlatFormat, Json, Key, Record, Start, Topic, TopicSpec,
    Until, header, partition_of, unknown_version,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::server::Server;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/interop.py");
const REQUIREMENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/requirements.txt");

/// Python with its clients, in a folder beside what cargo builds; made by the first test.
fn python() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
        let python = folder.join("bin/python");
        if !run(Command::new(&python).args(["-c", "import confluent_kafka, kafka"])) {
            let venv = Command::new("python3").args(["-m", "venv"]).arg(&folder).status();
            assert!(
                venv.is_ok_and(|status| status.success()),
                "no environment for Python can be made: install python3 with venv (Debian: python3-venv)"
            );
        }
        let pip = ["-m", "pip", "install", "--quiet", "--requirement", REQUIREMENTS];
        let installed = Command::new(&python).args(pip).status();
        assert!(
            installed.is_ok_and(|status| status.success()),
            "the clients of {REQUIREMENTS} cannot be installed from PyPI"
        );
        python
    })
}

fn run(command: &mut Command) -> bool {
    let ended = command.stderr(Stdio::null()).status();
    ended.is_ok_and(|status| status.success())
}

/// Runs the script, and gives what it answers.
async fn ask(arguments: Vec<String>, input: Value) -> Vec<Value> {
    let url = Server::url();
    let servers = url
        .strip_prefix("kafka://")
        .expect("it is one of Kafka")
        .to_owned();
    let asked = tokio::task::spawn_blocking(move || {
        let mut child = Command::new(python())
            .arg(SCRIPT)
            .arg(servers)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin
            .write_all(input.to_string().as_bytes())
            .expect("it reads");
        drop(stdin);
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "the script failed");
        serde_json::from_slice(&output.stdout).expect("it answers JSON")
    });
    asked.await.expect("it does not panic")
}

async fn python_reads(topic: &Topic, count: usize) -> Vec<Value> {
    let arguments = vec!["read".to_owned(), topic.to_string(), count.to_string()];
    let found = ask(arguments, Value::Null).await;
    assert_eq!(found.len(), count, "messages of {topic}");
    found
}

async fn python_publishes(topic: &Topic, messages: &[Value]) -> Vec<Value> {
    let arguments = vec!["publish".to_owned(), topic.to_string()];
    let places = ask(arguments, Value::Array(messages.to_vec())).await;
    assert_eq!(places.len(), messages.len());
    places
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A message as the script takes it.
fn message(key: Option<&[u8]>, value: Option<&[u8]>, headers: Value) -> Value {
    json!({ "key": key.map(hex), "value": value.map(hex), "headers": headers })
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct OrderPlaced {
    order_id: u64,
    note: String,
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

fn order(order_id: u64) -> OrderPlaced {
    OrderPlaced {
        order_id,
        note: "zwölf Gläser ☕".to_owned(),
    }
}

/// A bus on topics of its own.
struct Site {
    bus: EventBus,
    topic: Topic,
    _server: Server,
}

impl Site {
    async fn new(partitions: u32, flat: bool) -> Self {
        let server = Server::new().await;
        let prefix = format!("interop-{:016x}.", fastrand::u64(..));
        let broker = server.connect().await.expect("it answers");
        let builder = EventBus::builder(broker).topic_prefix(&prefix);
        let bus = match flat {
            true => builder.format(FlatFormat).build(),
            false => builder.build(),
        };
        let spec = TopicSpec::new(OrderPlaced::TOPIC).with_partitions(partitions);
        bus.apply_topics(&[spec]).await.expect("it is created");
        let topic = Topic::new(&format!("{prefix}{}", OrderPlaced::TOPIC)).expect("a good name");
        Self {
            bus,
            topic,
            _server: server,
        }
    }

    async fn read(&self) -> Vec<Record> {
        let topics = [OrderPlaced::TOPIC];
        let reader = self
            .bus
            .read(&topics, Start::Earliest, Some(Until::Now))
            .await;
        let mut reader = reader.expect("it reads");
        let mut records = Vec::new();
        while let Some(record) = reader.next().await.expect("it reads on") {
            records.push(record);
        }
        records
    }

    /// What we read of a topic, by partition and offset.
    async fn by_place(&self) -> HashMap<(u64, u64), Record> {
        let records = self.read().await.into_iter();
        let placed = records.map(|record| {
            let position = record.position.expect("Kafka has positions");
            let offset = u64::try_from(position.0).expect("an offset");
            ((u64::from(record.partition), offset), record)
        });
        placed.collect()
    }
}

fn place(of: &Value) -> (u64, u64) {
    let number = |name: &str| {
        of[name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name} in {of}"))
    };
    (number("partition"), number("offset"))
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn python_reads_what_a_bus_publishes() {
    for flat in [false, true] {
        let site = Site::new(3, flat).await;
        let id = site.bus.publish(order(42)).await.expect("it is taken");
        let found = &python_reads(&site.topic, 1).await[0];
        let ours = site.by_place().await;
        let ours = &ours[&place(found)].message;

        assert_eq!(found["key"], hex(b"42"));
        assert_eq!(found["value"], hex(&ours.payload));
        let headers = found["headers"].as_array().expect("headers");
        let lines: Vec<_> = ours
            .headers
            .iter()
            .filter(|(name, _)| name.starts_with("eb-"))
            .flat_map(|(name, value)| [name.as_bytes(), b": ", value, b"\n"].concat())
            .collect();
        let expected = [
            json!(["eb-headers", hex(&lines)]),
            json!([header::CONTENT_TYPE, hex(b"application/json")]),
        ];
        assert_eq!(*headers, expected, "ours are lines of one");
        let lines = String::from_utf8(lines).expect("text");
        let format = if flat { "flat" } else { "envelope" };
        for line in [
            format!("{}: {format}", header::FORMAT),
            format!("{}: {id}", header::ID),
            format!("{}: OrderPlaced", header::TYPE),
        ] {
            assert!(lines.lines().any(|it| it == line), "{line} in {lines}");
        }

        let body: Value = serde_json::from_slice(&ours.payload).expect("JSON");
        let data = match flat {
            true => {
                assert_eq!(body["event_type"], "OrderPlaced");
                &body
            }
            false => {
                assert_eq!(body["eventId"], id.to_string());
                assert_eq!(body["eventType"], "OrderPlaced");
                &body["data"]
            }
        };
        assert_eq!(data["order_id"], 42);
        assert_eq!(data["note"], order(42).note);
    }
}

fn random_key(random: &mut fastrand::Rng) -> Vec<u8> {
    let length = match random.u32(0..10) {
        0 => 1,
        // Of three bytes a letter, and a key has at most 4096.
        1 => random.usize(200..1300),
        _ => random.usize(2..40),
    };
    match random.bool() {
        true => (0..length).map(|_| random.u8(..)).collect(),
        false => {
            let letters: String = (0..length).map(|_| random.char('ß'..='⿕')).collect();
            letters.into_bytes()
        }
    }
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_key_has_the_same_partition_from_python_as_from_us() {
    const PARTITIONS: u32 = 17;
    let site = Site::new(PARTITIONS, false).await;
    let mut random = fastrand::Rng::with_seed(7);
    let mut keys: Vec<Vec<u8>> = (0..200).map(|_| random_key(&mut random)).collect();
    // Java's client gives it a partition, too: only a message without a key has none.
    keys.push(Vec::new());
    let messages = keys.iter().map(|key| {
        eventbus_core::Message::new(site.topic.clone(), "ours").with_key(Key::new(key.clone()))
    });
    let published = site.bus.publish_messages(messages.collect()).await;
    published.expect("all are taken");
    let theirs: Vec<_> = keys
        .iter()
        .map(|key| message(Some(key), Some(b"theirs"), json!([])))
        .collect();
    python_publishes(&site.topic, &theirs).await;

    let found = python_reads(&site.topic, 2 * keys.len()).await;
    for key in &keys {
        let expected = partition_of(&Key::new(key.clone()), PARTITIONS);
        let of_key: Vec<_> = found.iter().filter(|it| it["key"] == hex(key)).collect();
        assert!(of_key.len() >= 2, "both published {key:?}");
        for it in of_key {
            assert_eq!(it["partition"], expected, "{key:?} in {it}");
        }
    }
}

const PLAIN: &[u8] = br#"{"event_type":"OrderPlaced","order_id":7,"note":"without headers"}"#;

/// What somebody who knows nothing of us may publish, and what of it we read: its key, its payload and
/// its headers.
fn foreign() -> Vec<Value> {
    let long_name = "x".repeat(300);
    vec![
        message(Some(b"7"), Some(PLAIN), json!([])),
        message(None, Some(PLAIN), json!([])),
        message(Some(b""), Some(PLAIN), json!([])),
        message(
            Some(&[0xff, 0, 0xfe]),
            Some(PLAIN),
            json!([["trace", hex(&[0, 0xff])]]),
        ),
        message(Some(b"7"), None, json!([["why", hex(b"tombstone")]])),
        message(Some(b"7"), Some(b""), json!([])),
        message(
            Some(b"7"),
            Some(PLAIN),
            json!([["nothing", null], ["nothing", hex(b"again")]]),
        ),
        message(
            Some(b"7"),
            Some(PLAIN),
            json!([[long_name, hex(b"1")], ["kept", hex(b"2")]]),
        ),
        message(
            Some(b"7"),
            Some(PLAIN),
            json!([[[hex(&[0xff, 0xfe])], hex(b"1")], ["kept", hex(b"2")]]),
        ),
        message(
            Some(b"7"),
            Some(PLAIN),
            json!([["eb-headers", hex(b"not lines")], ["kept", hex(b"2")]]),
        ),
        message(
            Some(b"7"),
            Some(PLAIN),
            json!([["eb-headers", hex(b"x: no name of ours\n")]]),
        ),
        message(Some(b"7"), Some(b"not JSON \xff"), json!([])),
        message(
            Some(b"7"),
            Some(PLAIN),
            json!([
                ["eb-format", hex(b"flat")],
                ["eb-id", hex(b"0192f1c4-0000-7000-8000-00000000002a")],
                ["eb-type", hex(b"OrderPlaced")],
                ["eb-version", hex(b"1")],
            ]),
        ),
    ]
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_python_publishes_is_read_as_it_is() {
    let site = Site::new(3, false).await;
    let foreign = foreign();
    let places = python_publishes(&site.topic, &foreign).await;
    let read = site.by_place().await;
    for (sent, at) in foreign.iter().zip(&places) {
        let record = read
            .get(&place(at))
            .unwrap_or_else(|| panic!("{sent} at {at} is missing"));
        let got = &record.message;
        let key = got.key.as_ref().map(|key| hex(key.as_bytes()));
        assert_eq!(json!(key), sent["key"], "no key is not an empty key");
        let value = sent["value"].as_str().unwrap_or_default();
        assert_eq!(hex(&got.payload), value, "a tombstone has an empty payload");
        let mut expected = Vec::new();
        let mut left_out = 0;
        for pair in sent["headers"].as_array().expect("headers") {
            match pair[0].as_str().filter(|name| name.len() <= 255) {
                Some(name) => expected.push(json!([name, pair[1].as_str().unwrap_or_default()])),
                None => left_out += 1,
            }
        }
        if left_out > 0 {
            expected.push(json!([
                header::HEADERS_LEFT_OUT,
                hex(left_out.to_string().as_bytes())
            ]));
        }
        let headers: Vec<_> = got
            .headers
            .iter()
            .map(|(name, value)| json!([name, hex(value)]))
            .collect();
        assert_eq!(headers, expected);
    }
    assert_eq!(read.len(), foreign.len());
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_python_publishes_is_handled_or_a_dead_letter() {
    let site = Site::new(3, false).await;
    let foreign = foreign();
    python_publishes(&site.topic, &foreign).await;
    let said = foreign.len() as u64;
    // A tombstone, an empty payload, and what is no JSON.
    const UNREADABLE: u64 = 3;

    let group = format!("interop-{:016x}", fastrand::u64(..));
    let (handled, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let consumer = site
        .bus
        .consumer(&group)
        .on(move |order: OrderPlaced, cx: Context| {
            let handled = handled.clone();
            async move {
                handled.send((order, cx.id().to_string()))?;
                Ok::<(), BoxError>(())
            }
        });
    let consumer = consumer.spawn().await.expect("it joins");
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    loop {
        let counts = consumer.status().counts;
        if counts.handled == said - UNREADABLE && counts.dead_lettered == UNREADABLE {
            break;
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "{counts:?} of {said}"
        );
        tokio::task::yield_now().await;
    }
    let mut ids = Vec::new();
    while let Ok((order, id)) = heard.try_recv() {
        assert_eq!((order.order_id, &*order.note), (7, "without headers"));
        ids.push(id);
    }
    assert!(
        ids.contains(&"0192f1c4-0000-7000-8000-00000000002a".to_owned()),
        "{ids:?}"
    );
    ids.sort();
    ids.dedup();
    assert_eq!(
        ids.len() as u64,
        said - UNREADABLE,
        "each has an id of its own"
    );
    let letters = consumer
        .dead_letters()
        .list()
        .await
        .expect("they are stored");
    for letter in &letters {
        assert_eq!(letter.cause, "undecodable", "{}", letter.error);
        assert_eq!(
            letter.message.key.as_ref().map(Key::as_bytes),
            Some(&b"7"[..])
        );
    }
    assert_eq!(letters.len() as u64, UNREADABLE);
    consumer.shutdown().await.expect("it ends well");
}
