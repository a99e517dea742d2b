//! Events for later, with several processes on one file: at their time, whoever dies meanwhile.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use eventbus_core::{
    EventBus, EventId, Headers, Message, ScheduleStore, Scheduled, Start, Timestamp, Until, header,
};
use eventbus_sql::SqliteBroker;
use eventbus_testkit::within;
use sqlx::ConnectOptions;
use sqlx::sqlite::SqliteConnectOptions;

use crate::child::{Process, TOPIC, config, micros};
use crate::place::Place;

/// What was published, in the order of its key.
struct Published {
    payload: String,
    key: String,
    due: Timestamp,
}

pub(crate) async fn open(file: &Path) -> EventBus {
    let broker = SqliteBroker::connect(config(file)).await.expect("it opens");
    let schedule = Arc::new(broker.schedule());
    EventBus::builder(broker).schedule(schedule).build()
}

pub(crate) fn in_time(after: Duration) -> Timestamp {
    Timestamp::from_micros(micros() as i64).plus(after)
}

/// A message that a schedule keeps until then.
pub(crate) fn later(number: usize, time: Timestamp) -> Message {
    let id = EventId::from_name(&number.to_string()).to_string();
    let headers = Headers::builder()
        .push(header::ID, id)
        .and_then(|headers| headers.push(header::NOT_BEFORE, time.to_string()))
        .expect("within limits")
        .build();
    let message = Message::new(TOPIC, number.to_string()).with_headers(headers);
    message.with_key((number % 3).to_string())
}

async fn wait_until_nothing_waits(bus: &EventBus) {
    let scheduled = bus.scheduled().expect("there is a schedule");
    let waits = async || {
        let page = scheduled.page(None, 1).await;
        !page.expect("it can be listed").is_empty()
    };
    let nothing = async {
        while waits().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(Duration::from_secs(60), nothing).await;
}

async fn published(bus: &EventBus) -> Vec<Published> {
    let reader = bus.read(&[TOPIC], Start::Earliest, Some(Until::Now)).await;
    let mut reader = reader.expect("it can be read");
    let mut found = Vec::new();
    while let Some(record) = reader.next().await.expect("it goes on") {
        let message = record.message;
        let due = message.headers.get_str(header::NOT_BEFORE);
        let due: Timestamp = due.expect("it was scheduled").parse().expect("a time");
        found.push(Published {
            payload: String::from_utf8_lossy(&message.payload).into_owned(),
            key: message.key.expect("it has one").to_string(),
            due,
        });
    }
    found
}

fn counts(published: &[Published]) -> HashMap<&str, usize> {
    let mut counts = HashMap::new();
    for it in published {
        *counts.entry(it.payload.as_str()).or_default() += 1;
    }
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_process_scheduled_is_published_by_the_next() {
    let place = Place::new();
    let file = place.file("killed.db");
    let mut child = Process::start("schedule:300", &file);
    assert_eq!(child.hear().as_deref(), Some("stored"));
    child.kill();
    let bus = open(&file).await;
    let listed = bus.scheduled().expect("there is one").list().await;
    assert_eq!(listed.expect("it can be listed").len(), 50);
    // Whoever publishes something takes part.
    let other = Message::new(eventbus_core::Topic::from_static("others"), "any");
    bus.publish_messages(vec![other])
        .await
        .expect("it is taken");
    wait_until_nothing_waits(&bus).await;
    let published = published(&bus).await;
    assert_eq!(published.len(), 50);
    assert_eq!(counts(&published).len(), 50);
    bus.close().await.expect("it closes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_dies_while_publishing_loses_nothing() {
    for (step, copies) in [
        ("schedule.taken", 1),
        ("schedule.published", 2),
        ("schedule.done", 1),
    ] {
        let place = Place::new();
        let file = place.file("dies.db");
        let mut child = Process::start(&format!("schedule-and-die:{step}"), &file);
        assert_eq!(child.hear().as_deref(), Some("stored"));
        assert_eq!(child.hear(), None, "it dies");
        drop(child);
        let begun = std::time::Instant::now();
        let bus = open(&file).await;
        let again = later(99, in_time(Duration::from_millis(1)));
        bus.publish_messages(vec![again])
            .await
            .expect("it is taken");
        wait_until_nothing_waits(&bus).await;
        let waited = begun.elapsed();
        assert!(waited < Duration::from_secs(10), "the dead are waited for");
        let published = published(&bus).await;
        let counts = counts(&published);
        assert_eq!(counts.len(), 51, "{step}: something is lost");
        let most = counts.values().max().copied();
        assert!(most <= Some(copies), "{step}: {counts:?}");
        bus.close().await.expect("it closes");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_side_by_side_publish_once_and_in_order() {
    let place = Place::new();
    let file = place.file("both.db");
    let bus = open(&file).await;
    let children: Vec<_> = (0..2)
        .map(|_| {
            let mut child = Process::start("schedule-nothing", &file);
            assert_eq!(child.hear().as_deref(), Some("ready"));
            child
        })
        .collect();
    let begin = in_time(Duration::from_secs(1));
    for first in (0..300).step_by(30) {
        // Of a key some come in the order of adding, some before those that were added earlier.
        let batch = (first..first + 30).map(|number| {
            let wait = Duration::from_millis(number as u64 * 7 % 40);
            later(number, begin.plus(wait))
        });
        let stored = bus.publish_messages(batch.collect()).await;
        stored.expect("they are stored");
    }
    wait_until_nothing_waits(&bus).await;
    let published = published(&bus).await;
    assert_eq!(published.len(), 300, "something is there twice");
    assert_eq!(counts(&published).len(), 300);
    for key in ["0", "1", "2"] {
        let of_key: Vec<_> = published.iter().filter(|it| it.key == key).collect();
        let number = |it: &Published| it.payload.parse::<usize>().expect("a number");
        let order: Vec<_> = of_key.iter().map(|it| (it.due, number(it))).collect();
        assert!(order.is_sorted(), "{key}: {order:?}");
    }
    drop(children);
    bus.close().await.expect("it closes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_of_another_process_comes_within_moments_of_its_time() {
    let place = Place::new();
    let file = place.file("wake.db");
    let bus = open(&file).await;
    // Reading from the file, it hears of what others write.
    let mut reader = bus
        .read(&[TOPIC], Start::Latest, None)
        .await
        .expect("it can be read");
    let other = Message::new(eventbus_core::Topic::from_static("others"), "any");
    bus.publish_messages(vec![other])
        .await
        .expect("it is taken");
    let mut child = Process::start("store-only:400", &file);
    assert_eq!(child.hear().as_deref(), Some("stored"));
    child.kill();
    let record = within(Duration::from_secs(30), reader.next()).await;
    let message = record.expect("it reads").expect("it goes on").message;
    let due = message.headers.get_str(header::NOT_BEFORE);
    let due: Timestamp = due.expect("it was scheduled").parse().expect("a time");
    let late = in_time(Duration::ZERO).since(due);
    println!("late by {late:?}");
    // Without the wake-up it would be found seconds later.
    assert!(late < Duration::from_secs(1), "{late:?}");
    bus.close().await.expect("it closes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_message_holds_up_no_other_and_is_not_lost() {
    let place = Place::new();
    let file = place.file("damaged.db");
    let broker = SqliteBroker::connect(config(&file))
        .await
        .expect("it opens");
    let time = in_time(Duration::ZERO);
    let scheduled = (0..3).map(|number| {
        let id = EventId::from_name(&number.to_string());
        Scheduled::new(id, time, later(number, time))
    });
    let scheduled: Vec<_> = scheduled.collect();
    broker
        .schedule()
        .add(&scheduled)
        .await
        .expect("they are stored");
    let damage = "UPDATE eventbus_scheduled SET payload = x'ff' WHERE number = 1";
    let options = SqliteConnectOptions::new().filename(&file);
    let mut connection = options.connect().await.expect("it is a database");
    let damaged = sqlx::raw_sql(damage).execute(&mut connection).await;
    damaged.expect("the statement is right");

    let bus = open(&file).await;
    let again = later(99, in_time(Duration::from_millis(1)));
    bus.publish_messages(vec![again])
        .await
        .expect("it is taken");
    let desk = bus.scheduled().expect("there is one");
    let one_is_left = async {
        while desk.list().await.expect("it can be listed").len() > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(Duration::from_secs(60), one_is_left).await;
    let left = desk.list().await.expect("it can be listed").remove(0);
    assert_eq!(left.id, scheduled[0].id);
    assert!(left.due > in_time(Duration::from_secs(3000)));
    assert!(bus.cancel(&left.id).await.expect("the store answers"));
    assert_eq!(counts(&published(&bus).await).len(), 3);
    bus.close().await.expect("it closes");
}
