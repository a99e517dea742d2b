//! Files that cannot be used as they are, and disks that are full: said, never a hang.

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
    let options = SqliteConnectOptions::new().filename(file).create_if_missing(true);
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
    run(&mut connection, "CREATE TABLE eventbus_schema (version); INSERT INTO eventbus_schema VALUES (99)").await;
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
    let broker = SqliteBroker::connect(config(&file)).await.expect("it lives beside");
    broker.publish(vec![message(10)]).await.expect("it is taken");
    let kept = sqlx::query("SELECT mine FROM topics").fetch_one(&mut connection).await;
    assert_eq!(kept.expect("it is there").get::<String, _>(0), "kept");

    run(&mut connection, "CREATE TABLE bus_lanes (mine TEXT)").await;
    let error = refused(config(&file).with_prefix("bus_")).await;
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    assert!(error.to_string().contains("bus_lanes"), "{error}");
}

#[tokio::test]
async fn two_prefixes_are_two_brokers_in_one_file() {
    let place = Place::new();
    let file = place.file("two.db");
    let one = SqliteBroker::connect(config(&file)).await.expect("it opens");
    let two = config(&file).with_prefix("other_");
    let two = SqliteBroker::connect(two).await.expect("it opens");
    one.publish(vec![message(10)]).await.expect("it is taken");
    let missing = two.admin(AdminRequest::DescribeTopics(vec![TOPIC])).await;
    assert_eq!(missing.expect_err("it has none").kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn other_options_for_an_open_file_are_a_conflict() {
    let place = Place::new();
    let file = place.file("shared.db");
    let _open = SqliteBroker::connect(config(&file)).await.expect("it opens");
    let error = refused(config(&file).with_partitions(9)).await;
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_writer_is_waited_for_and_then_said() {
    let place = Place::new();
    let file = place.file("locked.db");
    let broker = SqliteBroker::connect(config(&file)).await.expect("it opens");
    broker.publish(vec![message(10)]).await.expect("it is taken");
    let mut connection = sqlite(&file).await;
    run(&mut connection, "CREATE TABLE mine (it); BEGIN IMMEDIATE; INSERT INTO mine VALUES (1)").await;
    let begun = Instant::now();
    let error = within(LIMIT, broker.publish(vec![message(10)])).await;
    let error = error.expect_err("somebody else writes");
    assert!(begun.elapsed() >= Duration::from_millis(250), "it did not wait");
    assert!(error.is_retryable());
    assert_eq!(error.unpublished[0].error.kind(), ErrorKind::Unavailable);
    assert_eq!(error.unpublished[0].outcome, Outcome::NotTaken);
    // Reading goes on meanwhile.
    assert_eq!(count(&broker).await, 1);
    run(&mut connection, "COMMIT").await;
    broker.publish(error.into_messages()).await.expect("the way is free");
    assert_eq!(count(&broker).await, 2);
}

/// How many messages there are.
async fn count(broker: &SqliteBroker) -> usize {
    let reader = Subscription::reader(vec![TOPIC]).with_until(Until::Now);
    let mut probe = Probe::join(broker, reader).await.expect("it can be read");
    within(LIMIT, probe.hear_until(|probe| probe.ended().len() == 4)).await;
    probe.waiting()
}

/// A small file system of its own.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(place: &Place, size: &str) -> Self {
        let path = place.file("small");
        std::fs::create_dir_all(&path).expect("the directory can be created");
        mount(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"], &path);
        Self(path)
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
#[cfg_attr(not(target_os = "linux"), ignore = "mounts a tmpfs")]
async fn a_full_disk_loses_nothing_and_is_recovered_from() {
    if !may_mount() {
        return limited_file_size().await;
    }
    let place = Place::new();
    let disk = SmallDisk::mount(&place, "6m");
    let ballast = disk.0.join("ballast");
    std::fs::write(&ballast, vec![0; 2 << 20]).expect("there is room");
    let broker = SqliteBroker::connect(config(&disk.0.join("bus.db"))).await.expect("it opens");
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
    assert!(error.is_retryable());
    assert!(taken > 0);
    std::fs::remove_file(&ballast).expect("it is there");
    let again = within(LIMIT, broker.publish(error.into_messages())).await;
    again.expect("there is room again");
    assert_eq!(count(&broker).await, taken + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_file_is_said() {
    let place = Place::new();
    let file = if may_mount() {
        let disk = SmallDisk::mount(&place, "6m");
        let file = disk.0.join("bus.db");
        drop(sqlite(&file).await);
        std::fs::write(&file, b"").expect("it can be written");
        disk.remount_read_only();
        let error = refused(config(&file)).await;
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        return;
    } else {
        place.file("bus.db")
    };
    std::fs::write(&file, b"").expect("it can be written");
    let mut rights = std::fs::metadata(&file).expect("it is there").permissions();
    rights.set_readonly(true);
    std::fs::set_permissions(&file, rights).expect("it is ours");
    let error = refused(config(&file)).await;
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
}

/// Whether this is root: then rights say nothing, but file systems can be mounted.
fn may_mount() -> bool {
    let id = Command::new("id").arg("-u").output().expect("there is an id command");
    if id.stdout.trim_ascii() != b"0" {
        return false;
    }
    let place = Place::new();
    let path = place.file("probe");
    std::fs::create_dir_all(&path).expect("the directory can be created");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "tmpfs"])
        .arg(&path)
        .status();
    let mounted = mounted.is_ok_and(|status| status.success());
    if mounted {
        // It was only tried.
        let _ = Command::new("umount").arg("-l").arg(&path).status();
    }
    mounted
}

/// Without the right to mount: the log may not grow, as another process sets its limit.
async fn limited_file_size() {
    let place = Place::new();
    let file = place.file("limited.db");
    drop(SqliteBroker::connect(config(&file)).await.expect("it opens"));
    let program = std::env::current_exe().expect("this test has a path");
    let status = Command::new("prlimit")
        .arg("--fsize=1000000")
        .arg(program)
        .args(["--exact", "child::plays_its_role", "--ignored"])
        .env("EVENTBUS_SQL_CHILD", format!("fill {}", file.display()))
        .status();
    assert!(status.expect("there is a prlimit command").success());
}
