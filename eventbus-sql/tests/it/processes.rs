//! Several processes on one file or database: opening, waking, dying and standing still. What holds
//! for both is a function that the tests of both call.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use eventbus_core::{
    AdminReply, AdminRequest, Broker, Delivery, Message, Publisher, Subscription, Topic, TopicSpec,
    Until,
};
use eventbus_sql::SqliteBroker;
use eventbus_testkit::{Probe, text_of, within};

use crate::child::{GROUP, Process, TOPIC, config, micros, number};
use crate::place::Place;

const LIMIT: Duration = Duration::from_secs(60);

async fn open(file: &Path, partitions: u32) -> SqliteBroker {
    let broker = SqliteBroker::connect(config(file)).await.expect("it opens");
    let topic = TopicSpec::new(TOPIC).with_partitions(partitions);
    let applied = broker.admin(AdminRequest::ApplyTopics(vec![topic])).await;
    applied.expect("the topic is created");
    broker
}

/// Everything on the topic.
pub(crate) async fn all(broker: &dyn Broker, partitions: usize) -> Vec<Delivery> {
    all_of(broker, TOPIC, partitions).await
}

pub(crate) async fn all_of(broker: &dyn Broker, topic: Topic, partitions: usize) -> Vec<Delivery> {
    let reader = Subscription::reader(vec![topic]).with_until(Until::Now);
    let mut probe = Probe::join(broker, reader).await.expect("it can be read");
    let mut all = Vec::new();
    while probe.ended().len() < partitions || probe.waiting() > 0 {
        if probe.waiting() == 0 {
            probe.step().await.expect("the reader goes on");
        }
        let batch = probe.collect(probe.waiting()).await;
        probe.settle(&batch).await;
        all.extend(batch);
    }
    all
}

fn numbers(said: &[String]) -> BTreeSet<usize> {
    said.iter()
        .map(|said| said.parse().expect("a number"))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_open_a_new_file_at_once_all_succeed() {
    let place = Place::new();
    let file = place.file("new.db");
    let children: Vec<_> = (0..6).map(|_| Process::start("open", &file)).collect();
    for child in children {
        assert_eq!(child.succeeds(), ["open"]);
    }
    let broker = open(&file, 1).await;
    broker.publish(vec![number(1)]).await.expect("it is taken");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_publisher_was_told_is_there_is_there() {
    let place = Place::new();
    let file = place.file("killed.db");
    let broker = open(&file, 4).await;
    killed_publishers(&broker, &file.display().to_string()).await;
}

/// On a topic of four partitions.
pub(crate) async fn killed_publishers(broker: &dyn Broker, place: &str) {
    let mut acknowledged = BTreeSet::new();
    for round in 0..8usize {
        let mut child = Process::start(&format!("publish:{}", round * 1_000_000), place);
        // Both write at the same time, so positions are given by two processes.
        let from_here: Vec<_> = (0..10)
            .map(|each| round * 1_000_000 + 500_000 + each)
            .collect();
        let first = child.hear().expect("something is acknowledged");
        for each in &from_here {
            broker
                .publish(vec![number(*each)])
                .await
                .expect("it is taken");
        }
        acknowledged.insert(first.parse().expect("a number"));
        acknowledged.extend(from_here);
        acknowledged.extend(numbers(&child.kill()));
    }
    let all = all(broker, 4).await;
    let found: BTreeSet<usize> = all
        .iter()
        .map(|it| text_of(it).parse().expect("a number"))
        .collect();
    assert_eq!(found.len(), all.len(), "something was taken twice");
    let lost: Vec<_> = acknowledged.difference(&found).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    // A child's batch of three is taken whole or not at all.
    let of_children = found.iter().filter(|found| *found % 1_000_000 < 500_000);
    for number in of_children {
        let first = number - number % 1_000_000 % 3;
        assert!(
            (first..first + 3).all(|of_batch| found.contains(&of_batch)),
            "{number}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_consumers_lose_nothing_and_are_replaced_at_once() {
    let place = Place::new();
    let file = place.file("consumers.db");
    let broker = open(&file, 4).await;
    killed_consumers(&broker, &file.display().to_string()).await;
}

/// On a topic of four partitions.
pub(crate) async fn killed_consumers(broker: &dyn Broker, place: &str) {
    const MESSAGES: usize = 2_000;
    let batch = (0..MESSAGES).map(number).collect();
    broker.publish(batch).await.expect("it is taken");
    let mut handled = BTreeSet::new();
    for _ in 0..6 {
        let mut child = Process::start("consume", place);
        let started = Instant::now();
        for _ in 0..20 {
            let said = child.hear().expect("it handles something");
            handled.insert(said.parse::<usize>().expect("a number"));
        }
        // The one before it was killed while it held everything.
        assert!(started.elapsed() < Duration::from_secs(20));
        handled.extend(numbers(&child.kill()));
    }
    assert!(
        handled.len() < MESSAGES,
        "the children were killed in the middle"
    );
    let rest = within(LIMIT, async {
        let member = Subscription::group(GROUP, vec![TOPIC]);
        let mut probe = Probe::join(broker, member).await.expect("it can join");
        let mut rest = BTreeSet::new();
        while handled.union(&rest).count() < MESSAGES {
            let first = probe.collect(1).await;
            let more = probe.collect(probe.waiting()).await;
            let batch: Vec<_> = first.into_iter().chain(more).collect();
            rest.extend(
                batch
                    .iter()
                    .map(|it| text_of(it).parse::<usize>().expect("a number")),
            );
            probe.settle(&batch).await;
        }
        probe.close().await;
        rest
    });
    let rest = rest.await;
    // Each child may have had one settlement on its way when it was killed.
    assert!(
        rest.intersection(&handled).count() <= 6 * 4,
        "settled messages came again"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_hears_of_a_message_within_milliseconds() {
    let place = Place::new();
    let file = place.file("wake.db");
    let broker = open(&file, 1).await;
    wake_another(&broker, &file.display().to_string()).await;
}

pub(crate) async fn wake_another(broker: &dyn Broker, place: &str) {
    const MESSAGES: usize = 40;
    let mut child = Process::start("tail", place);
    assert_eq!(child.hear().as_deref(), Some("ready"));
    let mut latencies = Vec::new();
    for _ in 0..MESSAGES {
        let message = Message::new(TOPIC, micros().to_string());
        broker.publish(vec![message]).await.expect("it is taken");
        let latency = child.hear().expect("it hears of it");
        latencies.push(latency.parse::<u64>().expect("a number"));
    }
    latencies.sort_unstable();
    let median = latencies[MESSAGES / 2];
    assert!(median <= 20_000, "median {median} µs of {latencies:?}");
}

/// Stops a child when it is not writing: one that stands still inside a commit holds SQLite's lock,
/// and nobody can write until it goes on.
async fn stop_between_commits(child: &Process, broker: &SqliteBroker) {
    child.signal("STOP");
    while broker.admin(AdminRequest::Health).await.is_err() {
        child.signal("CONT");
        let written = broker.admin(AdminRequest::Health).await;
        written.expect("nobody stands still");
        child.signal("STOP");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_stood_still_is_fenced() {
    let place = Place::new();
    let file = place.file("still.db");
    let broker = open(&file, 1).await;
    broker.publish(vec![number(1)]).await.expect("it is taken");
    let mut child = Process::start("linger", &file);
    assert_eq!(child.hear().as_deref(), Some("holding"));
    stop_between_commits(&child, &broker).await;
    replace_and_wake(child, &broker).await;
}

/// Takes over from a child that stands still while it holds message 1.
pub(crate) async fn replace_and_wake(mut child: Process, broker: &dyn Broker) {
    let member = Subscription::group(GROUP, vec![TOPIC]);
    let mut probe = Probe::join(broker, member).await.expect("it can join");
    let again = within(LIMIT, probe.collect(1)).await;
    assert_eq!(text_of(&again[0]), "1");
    // It settles what is not its own any more.
    child.nod();
    child.signal("CONT");
    assert_eq!(child.hear().as_deref(), Some("settled"));
    let request = AdminRequest::Lag {
        group: GROUP,
        topics: vec![TOPIC],
    };
    let AdminReply::Lag(lag) = broker.admin(request).await.expect("it is declared") else {
        panic!("not an answer to the request");
    };
    assert_eq!(lag[0].messages, 1, "a settlement of a former owner counted");
    probe.settle(&again).await;
}
