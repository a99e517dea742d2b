//! The server that `dev/brokers up rabbitmq` started. Tests name topics and groups of their own.

use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use eventbus_core::{AdminRequest, Broker, Group, Result, Topic, TopicSpec};
use eventbus_rabbitmq::{RabbitMqBroker, RabbitMqConfig};
use lapin::options::ConfirmSelectOptions;
use lapin::{Channel, Connection, ConnectionProperties};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

const URL: &str = "EVENTBUS_TEST_RABBITMQ";

/// Held by every test that uses the server, and alone by one that restarts it.
static IN_USE: LazyLock<Arc<RwLock<()>>> = LazyLock::new(Arc::default);

pub(crate) struct Server(Mutex<Option<Use>>);

/// How a test uses the server; the others get it back when the test ends, however it does.
enum Use {
    Shared(#[allow(dead_code, reason = "it is held")] OwnedRwLockReadGuard<()>),
    Alone(OwnedRwLockWriteGuard<()>),
}

impl Server {
    pub(crate) async fn new() -> Self {
        // What the client does is told as RUST_LOG says; the first test sets it up.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .try_init();
        let in_use = Arc::clone(&IN_USE).read_owned().await;
        Self(Mutex::new(Some(Use::Shared(in_use))))
    }

    pub(crate) fn url() -> String {
        std::env::var(URL).unwrap_or_else(|_| {
            panic!("{URL} is not set: run ./dev/test only brokers, or export $(dev/brokers up rabbitmq)")
        })
    }

    pub(crate) fn config() -> RabbitMqConfig {
        let config = RabbitMqConfig::from_url(&Self::url()).expect("a good url");
        config.with_heartbeat(Duration::from_secs(3))
    }

    pub(crate) async fn connect(&self) -> Result<RabbitMqBroker> {
        RabbitMqBroker::connect(Self::config()).await
    }

    /// A connection of the client that is beneath, to do what others might.
    pub(crate) async fn raw(&self) -> Connection {
        let connected = Connection::connect(&Self::url(), ConnectionProperties::default()).await;
        connected.expect("the server answers")
    }

    /// Another connection, and a channel of it on which the server confirms what is published.
    pub(crate) async fn confirming(&self) -> (Connection, Channel) {
        let connection = self.raw().await;
        let channel = connection.create_channel().await.expect("there is one");
        let confirms = channel.confirm_select(ConfirmSelectOptions::default());
        confirms.await.expect("it confirms");
        (connection, channel)
    }

    /// Asks the server's own tool.
    pub(crate) async fn control(&self, arguments: &[&str]) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../dev/brokers");
        let mut command = Command::new(script);
        command.arg("rabbitmqctl").args(arguments);
        let done = tokio::task::spawn_blocking(move || command.output());
        let done = done.await.expect("it ends").expect("the script is there");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{said}");
    }

    /// Stops the server as a crash would and starts it again, when no other test uses it.
    pub(crate) async fn restart(&self) {
        self.alone().await;
        restart().await;
        self.shared();
    }

    /// Waits until no other test uses the server, and keeps it alone.
    pub(crate) async fn alone(&self) {
        let mine = self.0.lock().expect("not poisoned").take();
        drop(mine);
        let alone = Arc::clone(&IN_USE).write_owned().await;
        *self.0.lock().expect("not poisoned") = Some(Use::Alone(alone));
    }

    /// Lets others use it, too.
    pub(crate) fn shared(&self) {
        let mut mine = self.0.lock().expect("not poisoned");
        if let Some(Use::Alone(alone)) = mine.take() {
            *mine = Some(Use::Shared(alone.downgrade()));
        }
    }
}

/// A server that is killed sooner after a quorum queue was made may come back without a leader for it (see
/// `docs/brokers/rabbitmq.md`), and tells nobody when that is over.
const QUEUES_ARE_KEPT: Duration = Duration::from_secs(3);

/// Restarts the server, whoever uses it.
pub(crate) async fn restart() {
    tokio::time::sleep(QUEUES_ARE_KEPT).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../dev/brokers");
    let restarted = tokio::task::spawn_blocking(move || {
        Command::new(script).args(["restart", "rabbitmq"]).output()
    });
    let restarted = restarted
        .await
        .expect("it ends")
        .expect("the script is there");
    assert!(
        restarted.status.success(),
        "{}",
        String::from_utf8_lossy(&restarted.stderr)
    );
}

pub(crate) fn topic(name: &str) -> Topic {
    Topic::new(&format!("{name}-{:016x}", fastrand::u64(..))).expect("a good name")
}

pub(crate) fn group(name: &str) -> Group {
    Group::new(&format!("{name}-{:016x}", fastrand::u64(..))).expect("a good name")
}

pub(crate) async fn create(broker: &RabbitMqBroker, topic: &Topic, partitions: u32) {
    let spec = TopicSpec::new(topic.clone()).with_partitions(partitions);
    let applied = broker.admin(AdminRequest::ApplyTopics(vec![spec])).await;
    applied.expect("a topic can be created");
}
