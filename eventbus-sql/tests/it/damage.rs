//! Bytes that changed on disk are found and said, and never served.

use std::path::{Path, PathBuf};
use std::time::Duration;

use eventbus_core::{
    AdminRequest, Broker, Error, ErrorKind, Message, Position, Publisher, Result, Start,
    Subscription, Topic, TopicSpec, Until,
};
use eventbus_sql::{SqliteBroker, SqliteConfig};
use eventbus_testkit::{Probe, text_of, within};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions};

use crate::place::{Place, crash_image};

const TOPIC: Topic = Topic::from_static("orders");
const GROUP: eventbus_core::Group = eventbus_core::Group::from_static("payments");
const LIMIT: Duration = Duration::from_secs(30);
const MESSAGES: usize = 300;

async fn open(file: &Path) -> Result<SqliteBroker> {
    let config = SqliteConfig::new(file).with_busy_timeout(Duration::from_millis(300));
    SqliteBroker::connect(config).await
}

/// A database with messages, and its write-ahead log written back.
async fn filled(place: &Place) -> PathBuf {
    let file = place.file("filled.db");
    let broker = open(&file).await.expect("it opens");
    let topic = TopicSpec::new(TOPIC).with_partitions(1);
    let applied = broker.admin(AdminRequest::ApplyTopics(vec![topic])).await;
    applied.expect("the topic is created");
    let text = |number| format!("message-{number:04}-{}", "x".repeat(100));
    let batch = (0..MESSAGES).map(|number| Message::new(TOPIC, text(number)).with_key("k"));
    broker.publish(batch.collect()).await.expect("it is taken");
    let member = Subscription::group(GROUP, vec![TOPIC]);
    let probe = Probe::join(&broker, member).await.expect("it can join");
    probe.close().await;
    sql(&file, "PRAGMA wal_checkpoint(TRUNCATE)").await;
    let still = place.file("still.db");
    crash_image(&file, &still);
    still
}

async fn sql(file: &Path, text: &str) {
    let options = SqliteConnectOptions::new().filename(file);
    let mut connection = options.connect().await.expect("it is a database");
    let ran = sqlx::raw_sql(AssertSqlSafe(text))
        .execute(&mut connection)
        .await;
    ran.expect("the statement is right");
}

/// Reads everything; what arrived, and what went wrong.
async fn read(file: &Path) -> (Vec<String>, Option<Error>) {
    let broker = match open(file).await {
        Ok(broker) => broker,
        Err(error) => return (Vec::new(), Some(error)),
    };
    let reader = Subscription::reader(vec![TOPIC]).with_until(Until::Now);
    let mut probe = match Probe::join(&broker, reader).await {
        Ok(probe) => probe,
        Err(error) => return (Vec::new(), Some(error)),
    };
    let mut texts = Vec::new();
    loop {
        let step = within(LIMIT, probe.step()).await;
        let batch = probe.collect(probe.waiting()).await;
        probe.settle(&batch).await;
        texts.extend(batch.iter().map(text_of));
        match step {
            Err(error) => return (texts, Some(error)),
            Ok(()) if probe.ended().len() == 1 => return (texts, None),
            Ok(()) => {}
        }
    }
}

#[tokio::test]
async fn a_flipped_bit_in_a_message_is_named_and_not_served() {
    let place = Place::new();
    let file = filled(&place).await;
    let mut bytes = std::fs::read(&file).expect("it can be read");
    let marker = b"message-0123-xxxx";
    let at = bytes
        .windows(marker.len())
        .position(|window| window == marker);
    bytes[at.expect("it is in the file") + 40] ^= 0x10;
    std::fs::write(&file, &bytes).expect("it can be written");
    let (texts, error) = read(&file).await;
    let error = error.expect("it is found");
    assert_eq!(error.kind(), ErrorKind::Codec, "{error}");
    for part in [
        "topic: orders",
        "position: 123",
        "partition: 0",
        "reset it to the next",
    ] {
        assert!(error.to_string().contains(part), "{error}");
    }
    assert!(texts.len() <= 123 && texts.iter().all(|text| text.ends_with(&"x".repeat(100))));

    // What the error says to do.
    let broker = open(&file).await.expect("it opens");
    let reset = AdminRequest::ResetGroup {
        group: GROUP,
        topic: TOPIC,
        to: Start::Position(Position(124)),
    };
    broker.admin(reset).await.expect("the group has no member");
    let member = Subscription::group(GROUP, vec![TOPIC]);
    let mut probe = Probe::join(&broker, member).await.expect("it can join");
    let first = within(LIMIT, probe.collect(1)).await;
    assert!(text_of(&first[0]).starts_with("message-0124-"));
}

#[tokio::test]
async fn bits_flipped_anywhere_are_never_served_and_never_hang() {
    let place = Place::new();
    let file = filled(&place).await;
    let sound = std::fs::read(&file).expect("it can be read");
    let (expected, error) = read(&file).await;
    assert!(error.is_none() && expected.len() == MESSAGES);
    // Spread over all pages, with an odd step so that every kind of byte is hit.
    for (round, at) in (0..sound.len()).step_by(sound.len() / 150 + 1).enumerate() {
        let mut bytes = sound.clone();
        bytes[at] ^= 1 << (round % 8);
        let flipped = place.file(&format!("flipped-{round}.db"));
        std::fs::write(&flipped, &bytes).expect("it can be written");
        let (texts, error) = read(&flipped).await;
        assert!(
            expected.starts_with(&texts),
            "byte {at}: other data were served"
        );
        if let Some(error) = error {
            assert!(error.kind() != ErrorKind::Closed, "byte {at}: {error}");
        } else {
            assert_eq!(
                texts.len(),
                MESSAGES,
                "byte {at}: messages are missing silently"
            );
        }
    }
}

#[tokio::test]
async fn a_missing_row_is_damage_and_no_gap() {
    let place = Place::new();
    let file = filled(&place).await;
    sql(
        &file,
        "DELETE FROM eventbus_messages WHERE payload LIKE 'message-0100-%'",
    )
    .await;
    let (texts, error) = read(&file).await;
    assert_eq!(texts.len(), 100);
    assert!(
        error
            .expect("it is found")
            .to_string()
            .contains("position: 100")
    );
}

#[tokio::test]
async fn a_changed_place_of_a_group_or_lane_is_found() {
    let place = Place::new();
    let file = filled(&place).await;
    sql(&file, "UPDATE eventbus_cursors SET position = 200").await;
    let broker = open(&file).await.expect("it opens");
    let member = Subscription::group(GROUP, vec![TOPIC]);
    let joined = Probe::join(&broker, member).await;
    assert_eq!(joined.expect_err("it is found").kind(), ErrorKind::Codec);

    sql(&file, "UPDATE eventbus_lanes SET next = next - 10").await;
    let (texts, error) = read(&file).await;
    assert!(texts.is_empty());
    assert_eq!(error.expect("it is found").kind(), ErrorKind::Codec);
    let error = broker
        .publish(vec![Message::new(TOPIC, "late").with_key("k")])
        .await;
    let error = error.expect_err("it is found");
    assert_eq!(
        error.unpublished[0].error.kind(),
        ErrorKind::Codec,
        "{error}"
    );
}

#[tokio::test]
async fn a_truncated_file_is_damaged() {
    let place = Place::new();
    let file = filled(&place).await;
    let bytes = std::fs::read(&file).expect("it can be read");
    for part in [2, 4] {
        let cut = place.file(&format!("cut-{part}.db"));
        std::fs::write(&cut, &bytes[..bytes.len() / part]).expect("it can be written");
        let (texts, error) = read(&cut).await;
        assert!(texts.len() < MESSAGES);
        assert_eq!(error.expect("it is found").kind(), ErrorKind::Codec);
    }
}

#[tokio::test]
async fn a_torn_log_keeps_what_was_committed_before() {
    let place = Place::new();
    let file = place.file("torn.db");
    let broker = open(&file).await.expect("it opens");
    let topic = TopicSpec::new(TOPIC).with_partitions(1);
    let applied = broker.admin(AdminRequest::ApplyTopics(vec![topic])).await;
    applied.expect("the topic is created");
    let publish = async |text: &'static str| {
        let message = Message::new(TOPIC, text).with_key("k");
        broker.publish(vec![message]).await.expect("it is taken");
    };
    let log = PathBuf::from(format!("{}-wal", file.display()));
    let length = || std::fs::metadata(&log).expect("there is a log").len() as usize;
    publish("first").await;
    let committed = length();
    publish("second").await;
    let all = length();
    for cut in (committed..all).step_by(777) {
        let torn = place.file(&format!("torn-{cut}.db"));
        crash_image(&file, &torn);
        let torn_log = format!("{}-wal", torn.display());
        let bytes = std::fs::read(&torn_log).expect("it can be read");
        std::fs::write(&torn_log, &bytes[..cut]).expect("it can be written");
        // As a power cut in the middle of the second commit leaves it.
        let (texts, error) = read(&torn).await;
        assert!(error.is_none(), "{error:?}");
        assert_eq!(texts, ["first"], "cut at {cut} of {all}");
    }
}
