//! Bytes that changed on disk are found and said, and never served.

use std::path::{Path, PathBuf};
use std::time::Duration;

use eventbus_core::{
    AdminRequest, Broker, Error, ErrorKind, EventId, HeldName, HoldEntry, Key, KeyStateDesk,
    KeyStateStore, LeaseRequest, LeaseStore, LeaseTopic, MemberId, Message, OUTBOX_LANES,
    OutboxStore, Position, Publisher, Result, ScheduleStore, Scheduled, Start, Subscription,
    TakeScheduled, Timestamp, Topic, TopicPartition, TopicSpec, Until, Wait,
};
use eventbus_sql::{SqliteBroker, SqliteConfig};
use eventbus_testkit::{Probe, text_of, within};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

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

// ---- columns that another program wrote

/// A database with a held key, a scheduled message and one in the outbox, opened again after `text`.
async fn changed(place: &Place, text: &str) -> SqliteBroker {
    let file = place.file("changed.db");
    let broker = open(&file).await.expect("it opens");
    let store = broker.key_state();
    let (claim, _) = store
        .claim(&GROUP, &held_place())
        .await
        .expect("it is free");
    let message = Message::new(TOPIC, "held").with_key("k");
    let position = Some(Position(7));
    let entry = HoldEntry::new(held_name(), message.clone(), position, Wait::nothing());
    store.hold(&claim, &[entry]).await.expect("it is held");
    let due = Timestamp::from_micros(1);
    let scheduled = Scheduled::new(EventId::from_name("1"), due, message.clone());
    let added = broker.schedule().add(&[scheduled]).await;
    added.expect("it is added");
    let mut connection = SqliteConnectOptions::new()
        .filename(&file)
        .connect()
        .await
        .expect("it is a database");
    let messages = [(EventId::from_name("1"), message)];
    let mut transaction = connection.begin().await.expect("it begins");
    let appended = store.append(&mut transaction, &messages).await;
    appended.expect("it is appended");
    transaction.commit().await.expect("it commits");
    broker.close().await.expect("it closes");
    sql(&file, text).await;
    open(&file).await.expect("it opens")
}

fn held_place() -> TopicPartition {
    TopicPartition::new(TOPIC, 0)
}

fn held_name() -> HeldName {
    HeldName::Key(Key::from("k"))
}

async fn take(broker: &SqliteBroker) -> Result<Vec<Scheduled>> {
    let now = Timestamp::from_micros(2);
    let request = TakeScheduled::new(MemberId::random(), now, LIMIT);
    Ok(broker.schedule().take(&request).await?.messages)
}

#[tokio::test]
async fn a_number_that_no_held_message_has_is_damage() {
    for number in ["9223372036854775807", "-1", "17592186044416"] {
        let place = Place::new();
        let text = format!("UPDATE eventbus_held_names SET next_number = {number}");
        let broker = changed(&place, &text).await;
        let store = broker.key_state();
        let (claim, _) = store.claim(&GROUP, &held_place()).await.expect("a claim");
        let message = Message::new(TOPIC, "more").with_key("k");
        let entry = HoldEntry::new(held_name(), message, None, Wait::nothing());
        let error = store.hold(&claim, &[entry]).await.expect_err(number);
        assert_eq!(error.kind(), ErrorKind::Codec, "{error}");
    }
}

#[tokio::test]
async fn a_held_name_of_no_kind_and_a_position_of_no_length_are_damage() {
    for text in [
        "UPDATE eventbus_held_names SET kind = 7",
        "UPDATE eventbus_held_names SET kind = 1, name = x'ff'",
    ] {
        let place = Place::new();
        let store = changed(&place, text).await.key_state();
        let error = store.list(&GROUP, None, 10).await.expect_err(text);
        assert_eq!(error.kind(), ErrorKind::Codec, "{error}");
    }
    let place = Place::new();
    let text = "UPDATE eventbus_held_messages SET position = x'07'";
    let store = changed(&place, text).await.key_state();
    let (claim, _) = store.claim(&GROUP, &held_place()).await.expect("a claim");
    let first = store.advance(&claim, &held_name(), None).await;
    assert_eq!(first.expect_err(text).kind(), ErrorKind::Codec);
}

#[tokio::test]
async fn a_number_that_no_scheduled_message_has_is_damage_and_ends_nothing() {
    for number in ["9223372036854775807", "17592186044417"] {
        let place = Place::new();
        let text = format!("UPDATE eventbus_scheduled SET number = {number}");
        let broker = changed(&place, &text).await;
        assert!(take(&broker).await.expect("it is put off").is_empty());
        let message = Message::new(TOPIC, "more");
        let more = Scheduled::new(EventId::from_name("2"), Timestamp::from_micros(1), message);
        let error = broker.schedule().add(&[more]).await.expect_err(number);
        assert_eq!(error.kind(), ErrorKind::Codec, "{error}");
        assert!(broker.schedule().list(None, 10).await.is_ok());
    }
}

#[tokio::test]
async fn another_topic_or_id_beside_a_message_is_found() {
    for column in ["topic = 'stocks'", "event_id = '7'"] {
        let place = Place::new();
        let broker = changed(&place, &format!("UPDATE eventbus_scheduled SET {column}")).await;
        assert!(take(&broker).await.expect("it is put off").is_empty());
    }
    for column in [
        "aggregatetype = 'stocks'",
        "id = '7'",
        "lane = (lane + 1) % 16",
    ] {
        let place = Place::new();
        let broker = changed(&place, &format!("UPDATE eventbus_outbox SET {column}")).await;
        let lanes: Vec<u32> = (0..OUTBOX_LANES).collect();
        let waiting = broker.key_state().next(&lanes, 10, &[]).await;
        assert!(waiting.expect("it is put aside").is_empty(), "{column}");
    }
    let place = Place::new();
    let broker = changed(&place, "SELECT 1").await;
    assert_eq!(take(&broker).await.expect("it is due").len(), 1);
}

#[tokio::test]
async fn a_member_that_says_it_reads_endless_partitions_is_damage() {
    let place = Place::new();
    let broker = changed(&place, "SELECT 1").await;
    let store = broker.key_state();
    let topics = vec![LeaseTopic {
        name: TOPIC,
        partitions: 4,
    }];
    let request = LeaseRequest::new(GROUP, MemberId::random(), topics.clone(), LIMIT);
    store.exchange(&request).await.expect("it joins");
    let endless = "UPDATE eventbus_members SET topics = 'orders 4294967295'";
    sql(&place.file("changed.db"), endless).await;
    let other = LeaseRequest::new(GROUP, MemberId::random(), topics, LIMIT);
    let error = store
        .exchange(&other)
        .await
        .expect_err("nobody can share that out");
    assert_eq!(error.kind(), ErrorKind::Codec, "{error}");
    let mut many = other.clone();
    many.topics[0].partitions = u32::MAX;
    let error = store.exchange(&many).await.expect_err("it is not kept");
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
}

#[tokio::test]
async fn a_table_whose_name_is_no_text_is_no_panic() {
    let place = Place::new();
    let file = filled(&place).await;
    let mut bytes = std::fs::read(&file).expect("it can be read");
    let marker = b"eventbus_messageseventbus_messages";
    let at = bytes
        .windows(marker.len())
        .position(|window| window == marker);
    bytes[at.expect("the schema is in the file") + 16] = 0xff;
    std::fs::write(&file, &bytes).expect("it can be written");
    let (texts, error) = read(&file).await;
    assert!(error.is_some() || texts.len() == MESSAGES);
}
