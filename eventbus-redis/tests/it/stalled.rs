//! A server that stands still, or refuses for a while: what was given up is not sent, and what could be
//! tried again is.

use std::time::Duration;

use eventbus_core::{ErrorKind, Message, Outcome, Publisher, Topic};
use eventbus_redis::RedisBroker;
use eventbus_testkit::within;
use redis::AsyncCommands;

use crate::own_server::OwnServer;

const LIMIT: Duration = Duration::from_secs(30);
const TOPIC: Topic = Topic::from_static("orders");

async fn connect(server: &OwnServer) -> RedisBroker {
    let config = server.config().with_partitions(1);
    let config = config.with_timeout(Duration::from_secs(1));
    let broker = RedisBroker::connect(config).await.expect("it answers");
    let published = broker.publish(vec![Message::new(TOPIC, "first")]).await;
    published.expect("it is taken");
    broker
}

async fn published(broker: &RedisBroker, text: &'static str) {
    within(LIMIT, async {
        while broker
            .publish(vec![Message::new(TOPIC, text)])
            .await
            .is_err()
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_publish_that_was_given_up_before_it_was_sent_is_not_sent() {
    let server = OwnServer::start(&[]).await;
    let broker = connect(&server).await;
    server.signal("STOP");
    // The first is on its way; what comes meanwhile waits for it to be answered.
    let on_its_way = broker.publish(vec![Message::new(TOPIC, "on its way")]);
    let given_up = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let publish = broker.publish(vec![Message::new(TOPIC, "given up")]);
        tokio::time::timeout(Duration::from_millis(300), publish).await
    };
    let (first, second) = tokio::join!(on_its_way, given_up);
    let first = first.expect_err("nobody answers");
    assert_eq!(first.unpublished[0].outcome, Outcome::Unknown);
    assert!(second.is_err(), "it was given up");
    server.signal("CONT");
    published(&broker, "last").await;
    let mut native = server.native().await;
    let all: redis::Value = native.xrange_all(TOPIC.as_str()).await.expect("it answers");
    let all = format!("{all:?}");
    assert!(all.contains("last"), "{all}");
    assert!(!all.contains("given up"), "{all}");
    // What nobody answered was done when it went on, and before what was published since.
    assert!(all.find("on its way") < all.find("last"), "{all}");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn what_comes_behind_a_piece_that_nobody_answered_is_not_sent() {
    let server = OwnServer::start(&[]).await;
    let broker = connect(&server).await;
    server.signal("STOP");
    let messages = (0..2000).map(|number| Message::new(TOPIC, number.to_string()));
    let error = broker.publish(messages.collect()).await;
    let error = error.expect_err("nobody answers");
    let outcomes: Vec<_> = error.unpublished.iter().map(|it| it.outcome).collect();
    assert_eq!(outcomes.len(), 2000);
    let sent = outcomes
        .iter()
        .filter(|it| **it == Outcome::Unknown)
        .count();
    assert!((1..1000).contains(&sent), "{sent} were sent");
    assert!(outcomes[sent..].iter().all(|it| *it == Outcome::NotTaken));
    server.signal("CONT");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_login_that_was_refused_for_a_while_is_tried_again() {
    let server = OwnServer::start(&[]).await;
    let mut native = server.native().await;
    let set = async |native: &mut redis::aio::MultiplexedConnection, password: &str| {
        let mut set = redis::cmd("ACL");
        set.arg("SETUSER").arg("shop").arg("on").arg("resetpass");
        set.arg(format!(">{password}")).arg("~*").arg("+@all");
        let _: () = set.query_async(native).await.expect("it is set");
        // A login lasts as long as its connection.
        let mut kill = redis::cmd("CLIENT");
        kill.arg("KILL").arg("USER").arg("shop");
        let _: i64 = kill.query_async(native).await.expect("they are ended");
    };
    set(&mut native, "first").await;
    let url = format!(
        "redis://shop:first@127.0.0.1:{}?partitions=1",
        server.port()
    );
    let broker = RedisBroker::from_url(&url).await.expect("it answers");
    published(&broker, "before").await;
    set(&mut native, "second").await;
    let refused = within(LIMIT, async {
        loop {
            let error = broker.publish(vec![Message::new(TOPIC, "refused")]).await;
            let error = error.expect_err("the password is another one");
            let refused = error.unpublished.into_iter().next().expect("it says so");
            // A lost connection is noticed by the command that it is lost with.
            if refused.error.kind() != ErrorKind::Unavailable {
                return refused;
            }
        }
    })
    .await;
    assert_eq!(
        refused.error.kind(),
        ErrorKind::Unauthorized,
        "{}",
        refused.error
    );
    assert_eq!(refused.outcome, Outcome::NotTaken);
    set(&mut native, "first").await;
    published(&broker, "behind").await;
}
