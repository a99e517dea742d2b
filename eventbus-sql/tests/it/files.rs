//! Files that cannot be used as they are, and disks that are full: said, never a hang.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use eventbus_core::{
    AdminRequest, Broker, Error, ErrorKind, Message, Outcome, Publisher, Subscription, Topic, Until,
};
use eventbus_sql::{SqliteBroker, SqliteConfig};
use eventbus_testkit::{Probe, within};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Row, SqliteConnection};

use crate::child::Process;
use crate::place::Place;

const TOPIC: Topic = Topic::from_static("orders");
const LIMIT: Duration = Duration::from_secs(30);

fn message(bytes: usize) -> Message {
    Message::new(TOPIC, vec![b'x'; bytes]).with_key("k")
}

fn config(file: &Path) -> SqliteConfig {
    SqliteConfig::new(file).with_busy_timeout(Duration::from_millis(300))
}

async fn refused(config: SqliteConfig) -> Error {
    let opened = within(LIMIT, SqliteBroker::connect(config)).await;
    opened.expect_err("it cannot be opened")
}

async fn sqlite(file: &Path) -> SqliteConnection {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true);
    options.connect().await.expect("it is a database")
}

async fn run(connection: &mut SqliteConnection, sql: &str) {
    let ran = sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await;
    ran.expect("the statement is right");
}

#[tokio::test]
async fn a_missing_directory_is_not_found() {
    let error = refused(SqliteConfig::new("/nowhere/at/all/shop.db")).await;
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

#[tokio::test]
async fn a_directory_is_no_file() {
    let place = Place::new();
    let error = refused(config(&place.file(""))).await;
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
}

#[tokio::test]
async fn a_file_of_another_kind_is_no_database() {
    let place = Place::new();
    let file = place.file("letter.txt");
    std::fs::write(&file, "Dear Sir or Madam, ".repeat(500)).expect("it can be written");
    let error = refused(config(&file)).await;
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    let kept = std::fs::read_to_string(&file).expect("it is still there");
    assert!(kept.starts_with("Dear Sir"), "it was changed");
}

#[tokio::test]
async fn tables_of_a_newer_version_are_left_alone() {
    let place = Place::new();
    let file = place.file("newer.db");
    let mut connection = sqlite(&file).await;
    run(
        &mut connection,
        "CREATE TABLE eventbus_schema (version); INSERT INTO eventbus_schema VALUES (99)",
    )
    .await;
    let error = refused(config(&file)).await;
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("version 99"), "{error}");
}

#[tokio::test]
async fn tables_of_a_team_stay_untouched_and_a_taken_name_is_said() {
    let place = Place::new();
    let file = place.file("shop.db");
    let mut connection = sqlite(&file).await;
    run(
        &mut connection,
        "CREATE TABLE topics (mine TEXT); INSERT INTO topics VALUES ('kept');
         CREATE TABLE eventbusXtopics (mine TEXT);",
    )
    .await;
    let broker = SqliteBroker::connect(config(&file))
        .await
        .expect("it lives beside");
    broker
        .publish(vec![message(10)])
        .await
        .expect("it is taken");
    let kept = sqlx::query("SELECT mine FROM topics")
        .fetch_one(&mut connection)
        .await;
    assert_eq!(kept.expect("it is there").get::<String, _>(0), "kept");

    run(&mut connection, "CREATE TABLE bus_lanes (mine TEXT)").await;
    let error = refused(config(&file).with_prefix("bus_")).await;
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    assert!(error.to_string().contains("bus_lanes"), "{error}");
}

#[tokio::test]
async fn a_file_of_another_encoding_is_refused() {
    let place = Place::new();
    let file = place.file("wide.db");
    let mut connection = sqlite(&file).await;
    run(
        &mut connection,
        "PRAGMA encoding = 'UTF-16'; CREATE TABLE mine (it)",
    )
    .await;
    let error = refused(config(&file)).await;
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

#[tokio::test]
async fn two_prefixes_are_two_brokers_in_one_file() {
    let place = Place::new();
    let file = place.file("two.db");
    let one = SqliteBroker::connect(config(&file))
        .await
        .expect("it opens");
    let two = config(&file).with_prefix("other_");
    let two = SqliteBroker::connect(two).await.expect("it opens");
    one.publish(vec![message(10)]).await.expect("it is taken");
    let missing = two.admin(AdminRequest::DescribeTopics(vec![TOPIC])).await;
    assert_eq!(
        missing.expect_err("it has none").kind(),
        ErrorKind::NotFound
    );
}

#[tokio::test]
async fn other_options_for_an_open_file_are_a_conflict() {
    let place = Place::new();
    let file = place.file("shared.db");
    let _open = SqliteBroker::connect(config(&file))
        .await
        .expect("it opens");
    let error = refused(config(&file).with_partitions(9)).await;
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_writer_is_waited_for_and_then_said() {
    let place = Place::new();
    let file = place.file("locked.db");
    let broker = SqliteBroker::connect(config(&file))
        .await
        .expect("it opens");
    broker
        .publish(vec![message(10)])
        .await
        .expect("it is taken");
    let mut connection = sqlite(&file).await;
    run(
        &mut connection,
        "CREATE TABLE mine (it); BEGIN IMMEDIATE; INSERT INTO mine VALUES (1)",
    )
    .await;
    let begun = Instant::now();
    let error = within(LIMIT, broker.publish(vec![message(10)])).await;
    let error = error.expect_err("somebody else writes");
    assert!(
        begun.elapsed() >= Duration::from_millis(250),
        "it did not wait"
    );
    assert!(error.is_retryable());
    assert_eq!(error.unpublished[0].error.kind(), ErrorKind::Unavailable);
    assert_eq!(error.unpublished[0].outcome, Outcome::NotTaken);
    // Reading goes on meanwhile.
    assert_eq!(read(&broker, TOPIC).await, 1);
    run(&mut connection, "COMMIT").await;
    broker
        .publish(error.into_messages())
        .await
        .expect("the way is free");
    assert_eq!(read(&broker, TOPIC).await, 2);
}

/// How many messages there are.
async fn read(broker: &SqliteBroker, topic: Topic) -> usize {
    let reader = Subscription::reader(vec![topic]).with_until(Until::Now);
    let mut probe = Probe::join(broker, reader).await.expect("it can be read");
    within(LIMIT, probe.hear_until(|probe| probe.ended().len() == 4)).await;
    probe.waiting()
}

/// A small file system of its own.
pub(crate) struct SmallDisk(pub(crate) PathBuf);

impl SmallDisk {
    pub(crate) fn mount(place: &Place, size: &str) -> Self {
        let path = place.file("small");
        std::fs::create_dir_all(&path).expect("the directory can be created");
        mount(
            &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"],
            &path,
        );
        Self(path)
    }

    /// Takes all the room that is left.
    pub(crate) fn fill(&self) {
        let mut file = File::create(self.ballast()).expect("it can be created");
        while file.write_all(&[0; 4096]).is_ok() {}
    }

    pub(crate) fn make_room(&self) {
        std::fs::remove_file(self.ballast()).expect("it is there");
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    fn remount_read_only(&self) {
        mount(&["-o", "remount,ro"], &self.0);
    }
}

fn mount(arguments: &[&str], path: &Path) {
    let mounted = Command::new("mount").args(arguments).arg(path).status();
    assert!(mounted.expect("there is a mount command").success());
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: files on it may still be open.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_may_not_grow_loses_nothing_and_is_recovered_from() {
    let place = Place::new();
    let file = place.file("limited.db");
    drop(
        SqliteBroker::connect(config(&file))
            .await
            .expect("it opens"),
    );
    let mut child = Process::start_limited("fill", &file, 2_000);
    assert_eq!(child.hear().as_deref(), Some("Unavailable true"));
    let taken: usize = child.hear().expect("how many").parse().expect("a number");
    child.lift();
    child.nod();
    assert_eq!(child.hear().as_deref(), Some("recovered"));
    let broker = SqliteBroker::connect(config(&file))
        .await
        .expect("it opens");
    assert_eq!(
        read(&broker, Topic::from_static("numbers")).await,
        taken + 1
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "mounts a tmpfs, as root: cargo test -p eventbus-sql -- --ignored small_disk"]
async fn a_full_small_disk_loses_nothing_and_is_recovered_from() {
    let place = Place::new();
    let disk = SmallDisk::mount(&place, "12m");
    // The log is written back into the file, so there has to be room for twice the messages.
    std::fs::write(disk.ballast(), vec![0; 7 << 20]).expect("there is room");
    let file = disk.0.join("bus.db");
    let broker = SqliteBroker::connect(config(&file))
        .await
        .expect("it opens");
    let mut taken = 0;
    let error = loop {
        match within(LIMIT, broker.publish(vec![message(100_000)])).await {
            Ok(()) => taken += 1,
            Err(error) => break error,
        }
        assert!(taken < 1000, "the disk never fills up");
    };
    let unpublished = &error.unpublished[0];
    assert_eq!(unpublished.error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.is_retryable() && taken > 0);
    disk.make_room();
    let again = within(LIMIT, broker.publish(error.into_messages())).await;
    assert!(again.is_ok(), "there is room again");
    assert_eq!(read(&broker, TOPIC).await, taken + 1);
}

#[tokio::test]
#[ignore = "mounts a tmpfs, as root: cargo test -p eventbus-sql -- --ignored small_disk"]
async fn a_small_disk_that_is_read_only_is_said() {
    let place = Place::new();
    let disk = SmallDisk::mount(&place, "6m");
    let file = disk.0.join("bus.db");
    std::fs::write(&file, b"").expect("it can be written");
    disk.remount_read_only();
    let error = refused(config(&file)).await;
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
}
