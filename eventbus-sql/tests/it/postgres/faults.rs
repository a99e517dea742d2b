//! What goes wrong with servers: restarts, ended connections, lost answers, no room, no rights.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use eventbus_core::{
    AdminRequest, Broker, Deliveries, Delivery, ErrorKind, Group, Key, Member, Message, Outcome,
    Publisher, Settlement, Signal, Subscriber, Subscription, Topic, TopicSpec, error_chain,
};
use eventbus_sql::{PostgresBroker, PostgresConfig};
use eventbus_testkit::within;
use sqlx::{Connection, PgConnection};
use tokio::sync::watch;

use super::proxy::Proxy;
use super::server::{Server, restart};
use crate::processes::all;

const TOPIC: Topic = crate::child::TOPIC;
const GROUP: Group = crate::child::GROUP;
const LIMIT: Duration = Duration::from_secs(60);
const KEYS: usize = 8;

async fn open(url: &str) -> PostgresBroker {
    let broker = PostgresBroker::from_url(url).await;
    let broker = broker.expect("the server answers");
    let topic = TopicSpec::new(TOPIC).with_partitions(4);
    let applied = broker.admin(AdminRequest::ApplyTopics(vec![topic])).await;
    applied.expect("the topic is created");
    broker
}

fn message(key: usize, number: usize) -> Message {
    Message::new(TOPIC, format!("{key}/{number}")).with_key(Key::display(key))
}

/// Key and number of a message.
fn read(delivery: &Delivery) -> (usize, usize) {
    let text = String::from_utf8_lossy(&delivery.message.payload);
    let (key, number) = text.split_once('/').expect("a key and a number");
    (
        key.parse().expect("a key"),
        number.parse().expect("a number"),
    )
}

/// What became of the messages of one key.
#[derive(Debug, Default)]
struct Sent {
    acknowledged: BTreeSet<usize>,
    /// May be there more than once.
    unknown: BTreeSet<usize>,
}

/// Publishes the numbers of one key one after the other until it is told to stop, each until it is
/// acknowledged.
async fn publish_key(broker: PostgresBroker, key: usize, stop: Arc<AtomicBool>) -> Sent {
    let mut sent = Sent::default();
    for number in 0.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        while let Err(error) = broker.publish(vec![message(key, number)]).await {
            assert!(error.is_retryable(), "{}", error_chain(&error));
            if error.unpublished[0].outcome == Outcome::Unknown {
                sent.unknown.insert(number);
            }
        }
        sent.acknowledged.insert(number);
    }
    sent
}

/// Handles what comes and settles it, until everything that was sent has come.
async fn consume(
    broker: PostgresBroker,
    sent: watch::Receiver<Option<usize>>,
) -> Vec<(usize, usize)> {
    let member = join(&broker).await;
    let (mut deliveries, mut settlement) = (member.deliveries, member.settlement);
    let mut handled = Vec::new();
    let mut distinct = BTreeSet::new();
    while sent.borrow().is_none_or(|count| distinct.len() < count) {
        let Some(signal) = next(&mut *deliveries).await else {
            continue;
        };
        match signal {
            Signal::Delivered(batch) => {
                handled.extend(batch.iter().map(read));
                distinct.extend(batch.iter().map(read));
                let settled: Vec<_> = batch.iter().map(|it| it.receipt).collect();
                // Those of a lane that was lost come again; the others are recorded with the next.
                if let Err(error) = settlement.settle(&settled).await {
                    assert!(error.is_retryable(), "{}", error_chain(&error));
                }
            }
            Signal::Revoking(lanes) => release(&mut *settlement, &lanes).await,
            _ => {}
        }
    }
    handled
}

/// Joins the group; the server may be away.
async fn join(broker: &PostgresBroker) -> Member {
    loop {
        let group = Subscription::group(GROUP, vec![TOPIC]);
        match broker.subscribe(group).await {
            Ok(member) => return member,
            Err(error) => assert!(error.is_retryable(), "{}", error_chain(&error)),
        }
    }
}

async fn release(settlement: &mut dyn Settlement, lanes: &[eventbus_core::Lane]) {
    settlement
        .release(lanes)
        .await
        .expect("they are given away");
}

/// The next signal, if one comes soon; the server may be away.
async fn next(deliveries: &mut dyn Deliveries) -> Option<Signal> {
    match tokio::time::timeout(Duration::from_millis(100), deliveries.next()).await {
        Ok(Ok(signal)) => Some(signal),
        Ok(Err(error)) => {
            assert!(error.is_retryable(), "{}", error_chain(&error));
            None
        }
        Err(_) => None,
    }
}

/// Publishes and consumes while `harm` is done, and adds up.
async fn survives(url: &str, harm: impl Future<Output = ()>) {
    let broker = open(url).await;
    let other = PostgresBroker::from_url(url).await.expect("it answers");
    let stop = Arc::new(AtomicBool::new(false));
    let publishers: Vec<_> = (0..KEYS)
        .map(|key| {
            let broker = if key % 2 == 0 { &broker } else { &other };
            tokio::spawn(publish_key(broker.clone(), key, Arc::clone(&stop)))
        })
        .collect();
    let (count, counted) = watch::channel(None);
    let consumer = tokio::spawn(consume(other.clone(), counted));
    harm.await;
    stop.store(true, Ordering::SeqCst);
    let mut sent = BTreeMap::new();
    for (key, publisher) in publishers.into_iter().enumerate() {
        let published = within(LIMIT, publisher).await.expect("it does not panic");
        assert!(!published.acknowledged.is_empty());
        sent.insert(key, published);
    }
    let total = sent.values().map(|sent| sent.acknowledged.len()).sum();
    count.send_replace(Some(total));
    let handled = within(LIMIT, consumer).await.expect("it does not panic");
    let broker = open(url).await;
    let logged: Vec<_> = all(&broker, 4).await.iter().map(read).collect();
    check_log(&sent, &logged);
    check_order(&handled);
}

/// Everything acknowledged is there, in its order, and twice only where that was said.
fn check_log(sent: &BTreeMap<usize, Sent>, logged: &[(usize, usize)]) {
    for (key, sent) in sent {
        let mine = logged.iter().filter(|(of, _)| of == key);
        let mine: Vec<usize> = mine.map(|(_, number)| *number).collect();
        assert!(mine.is_sorted(), "key {key} is out of order: {mine:?}");
        let distinct: BTreeSet<usize> = mine.iter().copied().collect();
        assert_eq!(distinct, sent.acknowledged, "key {key} lost some");
        for number in &distinct {
            let times = mine.iter().filter(|it| *it == number).count();
            assert!(
                times == 1 || sent.unknown.contains(number),
                "{number} of key {key} is there {times} times, and nobody said so"
            );
        }
    }
}

/// The first time that each message of a key is handled is in order.
fn check_order(handled: &[(usize, usize)]) {
    let mut highest: BTreeMap<usize, usize> = BTreeMap::new();
    for (key, number) in handled {
        let next = highest.get(key).map_or(0, |highest| highest + 1);
        assert!(*number <= next, "{number} of key {key} came before {next}");
        highest.insert(*key, next.max(number + 1) - 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_restarted_server_loses_nothing_that_it_acknowledged() {
    let (server, _alone) = Server::alone().await;
    survives(&server.url(), async {
        for _ in 0..3 {
            restart().await;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn ended_connections_lose_nothing() {
    let server = Server::new().await;
    let name = server.schema().to_owned();
    let url = format!("{}&application_name={name}", server.url());
    let kill = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{name}'"
    );
    survives(&url, async {
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            server.run(&kill).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_commit_whose_answer_is_lost_is_unknown() {
    let server = Server::new().await;
    let proxy = Proxy::start().await;
    let broker = open(&proxy.url(&server)).await;
    broker
        .publish(vec![message(0, 0)])
        .await
        .expect("it is taken");
    proxy.lose_answers();
    let error = broker.publish(vec![message(0, 1)]).await;
    let error = error.expect_err("there was no answer");
    assert_eq!(error.unpublished[0].outcome, Outcome::Unknown);
    assert!(error.is_retryable(), "{}", error_chain(&error));
    proxy.mend();
    broker
        .publish(vec![message(0, 2)])
        .await
        .expect("it is taken");
    let logged: Vec<_> = all(&broker, 4).await.iter().map(read).collect();
    assert_eq!(logged, [(0, 0), (0, 1), (0, 2)], "it was on the broker");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_server_that_says_nothing_is_not_waited_for() {
    let server = Server::new().await;
    let proxy = Proxy::start().await;
    let broker = open(&format!("{}&timeout=1s", proxy.url(&server))).await;
    broker
        .publish(vec![message(0, 0)])
        .await
        .expect("it is taken");
    proxy.freeze();
    let started = Instant::now();
    let error = broker.publish(vec![message(0, 1)]).await;
    let error = error.expect_err("there was no answer");
    assert_eq!(error.unpublished[0].outcome, Outcome::Unknown);
    assert_eq!(error.unpublished[0].error.kind(), ErrorKind::Unavailable);
    assert!(started.elapsed() < Duration::from_secs(10));
    let health = broker.admin(AdminRequest::Health).await;
    assert!(health.is_err_and(|error| error.is_retryable()));
    proxy.mend();
    let recovered = async { while broker.publish(vec![message(0, 2)]).await.is_err() {} };
    within(LIMIT, recovered).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_foreign_lock_delays_a_publish_and_its_error_says_that_nothing_was_taken() {
    let server = Server::new().await;
    let broker = open(&format!("{}&timeout=500ms", server.url())).await;
    let mut other = server.connection().await;
    let lock = format!("BEGIN; LOCK TABLE {}.lanes", server.schema());
    let locked = sqlx::raw_sql(sqlx::AssertSqlSafe(lock)).execute(&mut other);
    locked.await.expect("it can be locked");
    let error = broker.publish(vec![message(0, 0)]).await;
    let error = error.expect_err("somebody holds the table");
    assert_eq!(error.unpublished[0].outcome, Outcome::NotTaken);
    assert!(error.is_retryable(), "{}", error_chain(&error));
    drop(other);
    let recovered = async { while broker.publish(vec![message(0, 1)]).await.is_err() {} };
    within(LIMIT, recovered).await;
    assert_eq!(all(&broker, 4).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn more_callers_than_connections_wait_for_their_turn() {
    let server = Server::new().await;
    let config = server.config().with_connections(4);
    let broker = PostgresBroker::connect(config).await.expect("it answers");
    let calls: Vec<_> = (0..200)
        .map(|number| {
            let broker = broker.clone();
            tokio::spawn(async move {
                let published = broker.publish(vec![message(number % KEYS, number)]).await;
                published.expect("it is taken");
                let healthy = broker.admin(AdminRequest::Health).await;
                healthy.expect("it answers");
            })
        })
        .collect();
    for call in calls {
        within(LIMIT, call).await.expect("it does not panic");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_server_without_a_free_connection_is_unavailable_until_there_is_one() {
    let server = Server::new().await;
    let role = Role::new(&server, "CONNECTION LIMIT 1").await;
    let only = PgConnection::connect(&role.url()).await;
    let _only = only.expect("there is one");
    let error = role.connect().await.expect_err("there is no second one");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.is_retryable());
    assert!(error.to_string().contains("max_connections"), "{error}");
    role.drop_with(&server).await;
}

/// A role of one test's own.
struct Role {
    name: String,
}

impl Role {
    async fn new(server: &Server, options: &str) -> Self {
        let name = format!("role_{}", server.schema());
        let create = format!("CREATE ROLE {name} LOGIN PASSWORD 'guest' {options}");
        server.run(&create).await;
        Self { name }
    }

    fn url(&self) -> String {
        let base = Server::base();
        let (_, address) = base.rsplit_once('@').expect("a user");
        format!("postgres://{}:guest@{address}", self.name)
    }

    async fn connect(&self) -> eventbus_core::Result<PostgresBroker> {
        let schema = self.name.trim_start_matches("role_");
        PostgresBroker::from_url(&format!("{}?schema={schema}", self.url())).await
    }

    async fn drop_with(self, server: &Server) {
        let name = &self.name;
        let drop = format!("DROP OWNED BY {name} CASCADE; DROP ROLE {name}");
        server.run(&drop).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_role_without_rights_is_told_which_it_needs() {
    let server = Server::new().await;
    let role = Role::new(&server, "").await;
    let error = role.connect().await.expect_err("it may create nothing");
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    assert!(
        error.to_string().contains("PostgresBroker::migrations"),
        "{error}"
    );

    let script = PostgresBroker::migrations(server.schema()).expect("a good name");
    server.run(&script).await;
    let name = &role.name;
    let grant = format!(
        "GRANT USAGE ON SCHEMA {{s}} TO {name};
         GRANT ALL ON ALL TABLES IN SCHEMA {{s}} TO {name}"
    );
    server.run(&grant).await;
    let broker = role.connect().await.expect("it has what it needs");
    broker
        .publish(vec![message(0, 0)])
        .await
        .expect("it is taken");

    server
        .run(&format!("REVOKE INSERT ON {{s}}.messages FROM {name}"))
        .await;
    let error = broker.publish(vec![message(0, 1)]).await;
    let refused = &error.expect_err("it may not insert").unpublished[0];
    assert_eq!(refused.error.kind(), ErrorKind::Unauthorized);
    assert_eq!(refused.outcome, Outcome::NotTaken);
    drop(broker);
    role.drop_with(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_server_that_takes_no_writes_is_unavailable_and_nothing_was_taken() {
    let server = Server::new().await;
    let broker = open(&server.url()).await;
    let role = Role::new(&server, "").await;
    let name = &role.name;
    let grant = format!(
        "GRANT USAGE ON SCHEMA {{s}} TO {name};
         GRANT ALL ON ALL TABLES IN SCHEMA {{s}} TO {name};
         ALTER ROLE {name} SET default_transaction_read_only = on"
    );
    server.run(&grant).await;
    let reader = role.connect().await.expect("the tables are there");
    let error = reader.publish(vec![message(0, 0)]).await;
    let error = error.expect_err("it may not write");
    assert!(error.is_retryable(), "{}", error_chain(&error));
    assert_eq!(error.unpublished[0].outcome, Outcome::NotTaken);
    assert!(all(&broker, 4).await.is_empty());
    drop(reader);
    role.drop_with(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn what_is_wrong_with_a_url_is_said_within_seconds() {
    let base = Server::base();
    let (user, address) = base.rsplit_once('@').expect("a user");
    let (server, _) = address.split_once('/').expect("a database");
    let name = user
        .split(':')
        .nth(1)
        .expect("a name")
        .trim_start_matches('/');
    let cases = [
        (
            "postgres://me:secret@127.0.0.1:1/db".to_owned(),
            ErrorKind::Unavailable,
            "host and port",
        ),
        (
            "postgres://me:secret@nowhere.invalid/db".to_owned(),
            ErrorKind::Unavailable,
            "host",
        ),
        // Packets to this address get no answer, or none that is of use.
        (
            "postgres://me:secret@192.0.2.1/db?timeout=2s".to_owned(),
            ErrorKind::Unavailable,
            "host",
        ),
        (
            format!("postgres://{name}:secret@{address}"),
            ErrorKind::Unauthorized,
            "user or password",
        ),
        (
            format!("{user}@{server}/nowhere"),
            ErrorKind::NotFound,
            "no such database",
        ),
        (
            format!("{base}?sslmode=require"),
            ErrorKind::Unavailable,
            "sslmode",
        ),
    ];
    for (url, kind, advice) in cases {
        let started = Instant::now();
        let error = PostgresBroker::from_url(&url).await.expect_err(&url);
        assert!(started.elapsed() < Duration::from_secs(10), "{url}");
        let said = error_chain(&error);
        assert_eq!(error.kind(), kind, "{url}: {said}");
        assert!(error.to_string().contains(advice), "{url}: {said}");
        assert!(!said.contains("secret"), "{said}");
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    }
    let config = PostgresConfig::from_url(&base).expect("a good url");
    let standing = PostgresBroker::connect(config.with_schema("A")).await;
    assert_eq!(
        standing.expect_err("a bad name").kind(),
        ErrorKind::InvalidInput
    );
}
