//! Debezium's own event router reads the outbox, with the connector that the documentation shows.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use eventbus_core::{EventId, Key, Message, Origin, OutboxStore, Topic};
use futures_util::FutureExt;
use sqlx::Row;
use sqlx::postgres::PgConnectOptions;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};
use tokio::time::timeout;

use super::server::Server;
use super::service::Service;
use crate::events::{MailWanted, OrderPlaced, StockReserved};
use crate::place::Place;
use crate::waiting::until;

const PAGE: &str = include_str!("../../../../docs/brokers/postgres.md");
/// Maven may have to download all of it.
const LIMIT: Duration = Duration::from_secs(600);
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// What is written to Kafka.
#[derive(Debug, PartialEq, Eq)]
struct Record {
    topic: String,
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: BTreeMap<String, String>,
}

impl Record {
    fn parse(line: &str) -> Self {
        let mut parts = line.split('\t');
        let mut next = || parts.next().expect("topic, key and value");
        let (topic, key, value) = (next().to_owned(), bytes(next()), bytes(next()));
        let headers = parts.map(|part| part.split_once('=').expect("name and value"));
        Self {
            topic,
            key,
            value,
            headers: headers
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("it is hexadecimal");
    (hex != "-").then(|| (0..hex.len()).step_by(2).map(byte).collect())
}

/// The connector of the documentation, on this server.
fn connector(server: &Server) -> String {
    let (_, properties) = PAGE.split_once("```properties\n").expect("it is shown");
    let (properties, _) = properties.split_once("```").expect("it ends");
    let server_options: PgConnectOptions = Server::base().parse().expect("a good url");
    let (user, password) = credentials();
    let (schema, port) = (server.schema(), server_options.get_port().to_string());
    let table = format!("{schema}.outbox");
    let here = BTreeMap::from([
        ("database.hostname", server_options.get_host()),
        ("database.port", &port),
        ("database.user", &user),
        ("database.password", &password),
        (
            "database.dbname",
            server_options.get_database().expect("it is named"),
        ),
        ("table.include.list", &table),
        ("slot.name", schema),
        ("publication.name", schema),
    ]);
    let mut replaced = 0;
    let mut connector = String::new();
    for line in properties.lines() {
        let (name, value) = line.split_once('=').expect("a property");
        let value = here.get(name).inspect(|_| replaced += 1).unwrap_or(&value);
        connector += &format!("{name}={value}\n");
    }
    assert_eq!(replaced, here.len(), "the documentation names all of them");
    // A worker of Kafka Connect keeps them in Kafka.
    connector + "offset.storage=org.apache.kafka.connect.storage.MemoryOffsetBackingStore\n"
}

fn credentials() -> (String, String) {
    let base = Server::base();
    let (_, rest) = base.split_once("://").expect("a url");
    let (credentials, _) = rest.rsplit_once('@').expect("a user");
    let (user, password) = credentials.split_once(':').expect("a password");
    (user.to_owned(), password.to_owned())
}

/// Debezium on a service's outbox.
struct Debezium {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Debezium {
    fn start(properties: &Path, records: usize) -> Self {
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../dev/debezium/read");
        let mut command = Command::new(script);
        command.arg(properties).arg(records.to_string());
        let mut child = tokio::process::Command::from(command)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the script can be run");
        let output = child.stdout.take().expect("it is piped");
        Self {
            child,
            lines: BufReader::new(output).lines(),
        }
    }

    async fn next(&mut self) -> Record {
        let line = timeout(LIMIT, self.lines.next_line()).await;
        let line = line.expect("in time").expect("it can be read");
        Record::parse(&line.expect("it goes on: java and mvn are installed, see dev/debezium/read"))
    }

    async fn end(mut self) {
        let status = timeout(LIMIT, self.child.wait()).await;
        let status = status.expect("in time").expect("it can be waited for");
        assert!(status.success(), "{status}");
    }
}

/// Removes what Debezium leaves on the server: a slot that nobody reads keeps the log forever.
async fn clean_up(server: &Server) {
    let mut connection = server.connection().await;
    let drop_slot = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
        WHERE slot_name = $1";
    until(async || {
        // It is in use until the server has noticed that Debezium is gone.
        let dropped = sqlx::query(drop_slot).bind(server.schema());
        dropped.execute(&mut connection).await.is_ok()
    })
    .await;
    server.run("DROP PUBLICATION IF EXISTS {s}").await;
}

async fn has_logical_decoding(server: &Server) -> bool {
    let mut connection = server.connection().await;
    let level = sqlx::query("SHOW wal_level").fetch_one(&mut connection);
    let level = level.await.expect("it answers");
    level.get::<&str, _>(0) == "logical"
}

/// What is in the outbox, by id.
async fn messages(service: &Service) -> BTreeMap<String, Message> {
    let waiting = service.waiting().await.into_iter();
    waiting
        .map(|next| (next.id.to_string(), next.message))
        .collect()
}

/// Publishes one of each kind, and returns the ids in their order.
async fn publish(service: &Service, number: i64) -> Vec<EventId> {
    let trace = format!("00-{TRACE}-b7ad6b7169203331-01");
    let origin = Origin::new().with_traceparent(&trace);
    let begun = service.outbox.begin(origin).await;
    let mut tx = begun.expect("a transaction");
    // Any bytes, and a key that is not the number of anything.
    let raw = Message::new(Topic::from_static("raw"), (0..=255u8).collect::<Vec<_>>());
    let raw = (EventId::new(), raw.with_key(Key::from("ключ 1")));
    let empty = (
        EventId::new(),
        Message::new(Topic::from_static("raw"), Vec::new()),
    );
    let appended = [raw.clone(), empty.clone()];
    let appended = service.store.append(&mut tx, &appended).await;
    appended.expect("appended");
    let ids = vec![
        raw.0,
        empty.0,
        tx.publish(OrderPlaced { number }).expect("collected"),
        tx.publish(StockReserved { number }).expect("collected"),
        tx.publish(MailWanted { number }).expect("collected"),
    ];
    tx.commit().await.expect("it commits");
    ids
}

/// As a relay does that has published them.
async fn remove_all(service: &Service) {
    let waiting = service.waiting().await;
    let positions: Vec<_> = waiting.iter().map(|next| next.position).collect();
    let removed = service.store.remove(&positions).await;
    removed.expect("they are removed");
}

fn check(record: &Record, id: &EventId, message: &Message) {
    assert_eq!(record.topic, format!("outbox.event.{}", message.topic));
    let key = message.key.as_ref().map(|key| key.as_bytes().to_vec());
    assert_eq!(record.key, key, "{record:?}");
    assert_eq!(record.value.as_deref(), Some(&message.payload[..]));
    assert_eq!(record.header("id"), Some(id.to_string().as_str()));
    let event_type = message.headers.get_str("eb-type").unwrap_or_default();
    assert_eq!(record.header("eventType"), Some(event_type));
    // A span of Debezium's own, in the trace of the event.
    let is_traced = message.headers.get_str("traceparent").is_some();
    let trace = record.header("traceparent");
    let trace = trace.map(|trace| trace.split('-').nth(1).expect("a trace id"));
    assert_eq!(trace, is_traced.then_some(TRACE));
}

#[tokio::test]
#[ignore = "needs PostgreSQL, java and mvn: ./dev/test only debezium"]
async fn debezium_routes_the_outbox_as_it_documents() {
    let service = Service::open().await;
    if !has_logical_decoding(&service.server).await {
        // It was started by an older version of dev/brokers.
        service.server.restart().await;
    }
    let routed = AssertUnwindSafe(route(&service)).catch_unwind().await;
    clean_up(&service.server).await;
    routed.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

async fn route(service: &Service) {
    const ROUNDS: i64 = 4;
    let place = Place::new();
    let properties = place.file("connector.properties");
    std::fs::write(&properties, connector(&service.server)).expect("it can be written");
    let mut ids = publish(service, 0).await;
    let mut written = messages(service).await;
    let mut debezium = Debezium::start(&properties, ids.len() * ROUNDS as usize);
    // What waited comes from its snapshot, the rest from the log.
    let mut records = vec![debezium.next().await];
    for number in 1..ROUNDS {
        remove_all(service).await;
        ids.extend(publish(service, number).await);
        written.extend(messages(service).await);
    }
    while records.len() < ids.len() {
        records.push(debezium.next().await);
    }
    debezium.end().await;
    // In the order of commits and of rows, each once, and nothing for what was deleted.
    for (record, id) in records.iter().zip(&ids) {
        check(record, id, &written[&id.to_string()]);
    }
    let types: BTreeSet<_> = records.iter().map(|it| it.header("eventType")).collect();
    let all = ["", "MailWanted", "OrderPlaced", "StockReserved"].map(Some);
    assert_eq!(types, BTreeSet::from(all));
}
