//! Several processes on one database: opening, waking, dying and standing still.

use eventbus_core::{AdminRequest, Broker, Publisher, TopicSpec};
use eventbus_sql::PostgresBroker;

use super::server::Server;
use crate::child::{Process, TOPIC, number};
use crate::processes::{killed_consumers, killed_publishers, replace_and_wake, wake_another};

async fn open(server: &Server, partitions: u32) -> PostgresBroker {
    let broker = PostgresBroker::from_url(&server.url()).await;
    let broker = broker.expect("the server answers");
    let topic = TopicSpec::new(TOPIC).with_partitions(partitions);
    let applied = broker.admin(AdminRequest::ApplyTopics(vec![topic])).await;
    applied.expect("the topic is created");
    broker
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn processes_that_open_a_new_schema_at_once_all_succeed() {
    let server = Server::new().await;
    let children: Vec<_> = (0..6)
        .map(|_| Process::start("open", server.url()))
        .collect();
    for child in children {
        assert_eq!(child.succeeds(), ["open"]);
    }
    let broker = open(&server, 1).await;
    broker.publish(vec![number(1)]).await.expect("it is taken");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn what_a_killed_publisher_was_told_is_there_is_there() {
    let server = Server::new().await;
    let broker = open(&server, 4).await;
    killed_publishers(&broker, &server.url()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn killed_consumers_lose_nothing_and_are_replaced_at_once() {
    let server = Server::new().await;
    let broker = open(&server, 4).await;
    killed_consumers(&broker, &server.url()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn another_process_hears_of_a_message_within_milliseconds() {
    let server = Server::new().await;
    let broker = open(&server, 1).await;
    wake_another(&broker, &server.url()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_member_that_stood_still_is_fenced() {
    let server = Server::new().await;
    let broker = open(&server, 1).await;
    broker.publish(vec![number(1)]).await.expect("it is taken");
    let mut child = Process::start("linger", server.url());
    assert_eq!(child.hear().as_deref(), Some("holding"));
    // Inside a transaction, too: the server ends one that says nothing.
    child.signal("STOP");
    replace_and_wake(child, &broker).await;
}
