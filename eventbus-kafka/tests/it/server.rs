//! The server that `dev/brokers up kafka` started. Tests name topics and groups of their own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use eventbus_core::{Result, Topic};
use eventbus_kafka::{KafkaBroker, KafkaConfig};
use eventbus_testkit::{FaultProxy, Protocol, Requests};
use tokio::sync::{OwnedRwLockReadGuard, RwLock};

const URL: &str = "EVENTBUS_TEST_KAFKA";
const TLS_URL: &str = "EVENTBUS_TEST_KAFKA_TLS";
const SASL_URL: &str = "EVENTBUS_TEST_KAFKA_SASL";

/// Held by every test that uses the server, and alone by one that restarts it.
static IN_USE: LazyLock<Arc<RwLock<()>>> = LazyLock::new(Arc::default);

pub(crate) struct Server(Mutex<Option<OwnedRwLockReadGuard<()>>>);

impl Server {
    pub(crate) async fn new() -> Self {
        // What the client does is told as RUST_LOG says; the first test sets it up.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .try_init();
        let in_use = Arc::clone(&IN_USE).read_owned().await;
        Self(Mutex::new(Some(in_use)))
    }

    pub(crate) fn url() -> String {
        variable(URL)
    }

    /// Where user and password are asked for.
    pub(crate) fn sasl_url() -> String {
        variable(SASL_URL)
    }

    /// Where connections are encrypted.
    #[cfg(feature = "tls")]
    pub(crate) fn tls_url() -> String {
        variable(TLS_URL)
    }

    /// Where the server keeps the messages of a partition: beside the certificate that a URL names.
    pub(crate) fn log_of(topic: &Topic, partition: u32) -> PathBuf {
        let url = variable(TLS_URL);
        let authority = url.split_once("ssl.ca.location=");
        let (_, authority) = authority.expect("the url names a certificate");
        let directory = Path::new(authority).parent().expect("it is in one");
        directory.join(format!("data/{topic}-{partition}/{:020}.log", 0))
    }

    /// A wire to the server that can be harmed, also at these requests, and the way through it.
    pub(crate) async fn proxy(requests: Requests) -> (FaultProxy, KafkaConfig) {
        let url = Self::url();
        let address = url.trim_start_matches("kafka://");
        let proxy = FaultProxy::start_with(address, Protocol::Kafka(requests)).await;
        let proxy = proxy.expect("it starts");
        let through = proxy.url(&url).expect("the url has a host");
        let config = KafkaConfig::from_url(&through).expect("a good url");
        (proxy, config)
    }

    pub(crate) fn config() -> KafkaConfig {
        let config = KafkaConfig::from_url(&Self::url()).expect("a good url");
        let config = config.with_session_timeout(Duration::from_secs(3));
        // The suite lets members come and go for every few messages.
        let config = config.with_option("heartbeat.interval.ms", "50");
        config.expect("it may be set")
    }

    /// Stops the server as a crash would and starts it again, when no other test uses it.
    pub(crate) async fn restart(&self) {
        let mine = self.0.lock().expect("not poisoned").take();
        drop(mine);
        let alone = Arc::clone(&IN_USE).write_owned().await;
        restart().await;
        *self.0.lock().expect("not poisoned") = Some(alone.downgrade());
    }

    pub(crate) async fn connect(&self) -> Result<KafkaBroker> {
        KafkaBroker::connect(Self::config()).await
    }
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run ./dev/test only brokers, or export $(dev/brokers up kafka)")
    })
}

async fn restart() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../dev/brokers");
    let restarted = tokio::task::spawn_blocking(move || {
        Command::new(script).args(["restart", "kafka"]).output()
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
