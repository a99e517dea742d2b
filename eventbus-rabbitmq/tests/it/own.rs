//! Servers of their own, for what must not be done to the one that all tests share.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use eventbus_core::{
    Broker, ErrorKind, Headers, Message, Outcome, Publisher, Subscriber, Subscription, TopicSpec,
};
use eventbus_rabbitmq::{RabbitMqBroker, RabbitMqConfig};
use eventbus_testkit::{Probe, within};
use tokio::sync::{Mutex, MutexGuard};

use crate::server::{create, group, topic};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../dev/brokers");
const MINUTE: Duration = Duration::from_secs(60);

/// One at a time: each is a whole machine of Erlang.
static ONE: LazyLock<Mutex<()>> = LazyLock::new(Mutex::default);

/// A server that is removed with it.
struct Own {
    data: PathBuf,
    url: String,
    _one: MutexGuard<'static, ()>,
}

impl Own {
    /// Starts one that knows these features of its version only; all of them, where none is named.
    async fn start(features: Option<&str>) -> Self {
        let one = ONE.lock().await;
        let base = std::env::var("DEV_BROKERS_DIR").map_or_else(
            |_| PathBuf::from("/var/tmp/eventbus-brokers-own"),
            |base| PathBuf::from(base).join("own"),
        );
        let data = base.join(std::process::id().to_string());
        std::fs::create_dir_all(&data).expect("there is room");
        for _ in 0..3 {
            let (data_of, features) = (data.clone(), features.map(str::to_owned));
            let started = tokio::task::spawn_blocking(move || {
                let mut command = Command::new(SCRIPT);
                command.args(["up", "rabbitmq"]);
                command.env("DEV_BROKERS_DATA", data_of);
                if let Some(features) = features {
                    command.env("RABBITMQ_FEATURE_FLAGS", features);
                }
                command.output().expect("the script is there")
            });
            let started = started.await.expect("it ends");
            let own = String::from_utf8_lossy(&started.stdout);
            let url = own.trim().strip_prefix("EVENTBUS_TEST_RABBITMQ=");
            if let Some(url) = url {
                return Self {
                    data,
                    url: url.to_owned(),
                    _one: one,
                };
            }
            // Another set of brokers may have taken a port just then: elsewhere from the beginning.
            println!("{}", String::from_utf8_lossy(&started.stderr));
            let down = Command::new(SCRIPT)
                .args(["down", "rabbitmq"])
                .env("DEV_BROKERS_DATA", &data)
                .output();
            down.expect("the script is there");
        }
        panic!("no server of its own has started");
    }

    fn config(&self) -> RabbitMqConfig {
        RabbitMqConfig::from_url(&self.url).expect("a good url")
    }

    async fn connect(&self, config: RabbitMqConfig) -> RabbitMqBroker {
        RabbitMqBroker::connect(config).await.expect("it answers")
    }

    async fn control(&self, arguments: &[&str]) {
        let mut command = Command::new(SCRIPT);
        command.arg("rabbitmqctl").args(arguments);
        command.env("DEV_BROKERS_DATA", &self.data);
        let done = tokio::task::spawn_blocking(move || -> Output {
            command.output().expect("the script is there")
        });
        let done = done.await.expect("it ends");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{arguments:?}: {said}");
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let down = Command::new(SCRIPT)
            .args(["down", "rabbitmq"])
            .env("DEV_BROKERS_DATA", &self.data)
            .output();
        // Nothing of it is wanted any more.
        let _ = (down, std::fs::remove_dir_all(&self.data));
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs brokers: ./dev/test"]
async fn a_server_that_is_short_of_memory_takes_nothing_and_gives_what_it_has() {
    let own = Own::start(None).await;
    let config = own.config().with_publish_timeout(Duration::from_secs(2));
    let broker = own.connect(config.clone()).await;
    let orders = topic("orders");
    create(&broker, &orders, 2).await;
    let subscription = Subscription::group(group("billing"), vec![orders.clone()]);
    within(3 * MINUTE, async {
        let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
        probe.hold(2).await;
        let message = |text: &str| Message::new(orders.clone(), text.to_owned());
        let before: Vec<_> = (0..50).map(|it| message(&it.to_string())).collect();
        broker.publish(before).await.expect("it is taken");
        own.control(&["set_vm_memory_high_watermark", "0.0000001"])
            .await;
        // Whoever has published before hears of it at once, and sends nothing.
        let health = loop {
            match broker.admin(eventbus_core::AdminRequest::Health).await {
                Err(health) => break health,
                Ok(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        assert_eq!(health.kind(), ErrorKind::Unavailable, "{health}");
        assert!(health.to_string().contains("alarms"), "{health}");
        // Another one hears of it when its first message comes.
        let fresh = own.connect(config).await;
        for (broker, text, outcome) in [
            (&broker, "not sent", Outcome::NotTaken),
            (&fresh, "blocked", Outcome::Unknown),
        ] {
            let begun = Instant::now();
            let error = broker.publish(vec![message(text)]).await;
            let error = error.expect_err("the server takes nothing");
            assert!(begun.elapsed() < Duration::from_secs(10));
            let refused = &error.unpublished[0];
            assert_eq!(refused.outcome, outcome, "{error}");
            assert_eq!(refused.error.kind(), ErrorKind::Unavailable, "{error}");
            assert!(refused.error.is_retryable());
            assert!(error.to_string().contains("alarms"), "{error}");
            assert!(error.to_string().contains("memory"), "{error}");
        }
        // Reading and settling go on.
        let deliveries = probe.collect(50).await;
        probe.settle(&deliveries).await;
        own.control(&["set_vm_memory_high_watermark", "0.4"]).await;
        while broker
            .admin(eventbus_core::AdminRequest::Health)
            .await
            .is_err()
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        broker
            .publish(vec![message("again")])
            .await
            .expect("it is taken");
        // Whether the first one was taken, it was said to be unknown.
        let mut texts = Vec::new();
        while texts.last().map(String::as_str) != Some("again") {
            let deliveries = probe.collect(1).await;
            texts.extend(deliveries.iter().map(eventbus_testkit::text_of));
            probe.settle(&deliveries).await;
        }
        assert!(!texts.contains(&"not sent".to_owned()), "{texts:?}");
    })
    .await;
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_message_that_is_too_large_is_said_to_be() {
    let own = Own::start(None).await;
    own.control(&[
        "eval",
        "application:set_env(rabbit, max_message_size, 100000), application:set_env(rabbit, frame_max, 8192).",
    ])
    .await;
    let broker = own.connect(own.config()).await;
    let orders = topic("orders");
    create(&broker, &orders, 1).await;
    let subscription = Subscription::group(group("billing"), vec![orders.clone()]);
    within(MINUTE, async {
        let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
        probe.hold(1).await;
        let message = |bytes: usize| Message::new(orders.clone(), vec![b'x'; bytes]);
        let headers = Headers::builder().push("h", vec![b'x'; 7000]);
        let headers = headers.expect("within limits").build();
        // More than the server takes, more than the client was told to, and more than fits a frame.
        let cases = [
            (message(200_000), "max_message_size"),
            (message(17 * 1024 * 1024), "16777216"),
            (message(10).with_headers(headers), "fit one frame"),
        ];
        for (large, text) in cases {
            let begun = Instant::now();
            let batch = vec![message(10), large, message(10)];
            let error = broker.publish(batch).await;
            let error = error.expect_err("it is too large");
            assert!(begun.elapsed() < Duration::from_secs(10));
            assert_eq!(error.unpublished.len(), 1, "{error}");
            let refused = &error.unpublished[0];
            assert_eq!((refused.index, refused.outcome), (1, Outcome::NotTaken));
            assert_eq!(refused.error.kind(), ErrorKind::InvalidInput, "{error}");
            assert!(error.to_string().contains(text), "{error}");
            let deliveries = probe.collect(2).await;
            probe.settle(&deliveries).await;
        }
    })
    .await;
}

/// A server that has neither quorum queues nor streams, as those before 3.8 do not.
#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_server_that_is_too_old_is_said_to_be() {
    let own = Own::start(Some("")).await;
    let begun = Instant::now();
    let broker = own.connect(own.config()).await;
    let orders = topic("orders");
    let message = Message::new(orders.clone(), "x");
    let publish = broker.publish(vec![message]).await;
    let publish = publish
        .expect_err("it cannot keep it")
        .unpublished
        .remove(0);
    assert_eq!(publish.outcome, Outcome::NotTaken);
    let subscription = Subscription::group(group("billing"), vec![orders.clone()]);
    let subscribe = broker.subscribe(subscription).await;
    let specs = vec![TopicSpec::new(orders)];
    let apply = broker
        .admin(eventbus_core::AdminRequest::ApplyTopics(specs))
        .await;
    let errors = [
        publish.error,
        subscribe.expect_err("it cannot be read"),
        apply.expect_err("it cannot be created"),
    ];
    assert!(begun.elapsed() < Duration::from_secs(10));
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("3.9 or later"), "{error}");
    }
}

/// TLS as the server of Erlang speaks it, on a port that it is told to listen on.
#[cfg(feature = "tls")]
mod encrypted {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    use tempfile::TempDir;

    use super::*;

    /// An authority, and a certificate and key that it signed for 127.0.0.1, as files that the server's
    /// user can read.
    fn certificates() -> TempDir {
        let directory = tempfile::tempdir().expect("there is room");
        let open = |path: &Path, mode| {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(path, permissions).expect("it is ours");
        };
        open(directory.path(), 0o755);
        let mut authority = CertificateParams::new(Vec::new()).expect("no names");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let names = &mut authority.distinguished_name;
        names.push(DnType::CommonName, "authority");
        let key = KeyPair::generate().expect("there is entropy");
        let authority = CertifiedIssuer::self_signed(authority, key).expect("it signs itself");
        let names = vec!["127.0.0.1".to_owned()];
        let certificate = CertificateParams::new(names).expect("a good name");
        let key = KeyPair::generate().expect("there is entropy");
        let certificate = certificate.signed_by(&key, &authority).expect("it signs");
        for (name, text) in [
            ("ca.pem", authority.pem()),
            ("cert.pem", certificate.pem()),
            ("key.pem", key.serialize_pem()),
        ] {
            let path = directory.path().join(name);
            std::fs::write(&path, text).expect("there is room");
            open(&path, 0o644);
        }
        directory
    }

    #[tokio::test(flavor = "multi_thread")]
    #[ignore = "needs brokers: ./dev/test"]
    async fn a_client_that_trusts_the_authority_and_shows_a_certificate_is_served() {
        let own = Own::start(None).await;
        let files = certificates();
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a port");
        let port = free.local_addr().expect("it has one").port();
        drop(free);
        let file = |name: &str| files.path().join(name).display().to_string();
        let listen = format!(
            "rabbit_networking:start_ssl_listener({{\"127.0.0.1\", {port}}}, [{{cacertfile, \"{}\"}}, {{certfile, \"{}\"}}, {{keyfile, \"{}\"}}, {{verify, verify_peer}}, {{fail_if_no_peer_cert, true}}], 1).",
            file("ca.pem"),
            file("cert.pem"),
            file("key.pem"),
        );
        own.control(&["eval", &listen]).await;
        let url = |options: &str| {
            format!("amqps://eventbus:eventbus@127.0.0.1:{port}/%2f?publish_timeout=10s{options}")
        };
        let shown = format!("&tls_cert={}&tls_key={}", file("cert.pem"), file("key.pem"));
        let trusted = format!("&tls_ca={}", file("ca.pem"));
        let url_of_all = url(&format!("{trusted}{shown}"));
        let broker = RabbitMqBroker::from_url(&url_of_all)
            .await
            .expect("it answers");
        let orders = topic("orders");
        create(&broker, &orders, 1).await;
        within(MINUTE, async {
            let subscription = Subscription::group(group("billing"), vec![orders.clone()]);
            let mut probe = Probe::join(&broker, subscription).await.expect("it joins");
            probe.hold(1).await;
            let message = Message::new(orders.clone(), "sealed");
            broker.publish(vec![message]).await.expect("it is taken");
            assert_eq!(probe.collect_texts(1).await, ["sealed"]);
        })
        .await;
        for (options, advice) in [
            (shown.clone(), "`tls_ca`"),
            (trusted.clone(), "`tls_cert`"),
            (
                format!("{trusted}&tls_cert={}", file("cert.pem")),
                "go together",
            ),
            (format!("&tls_ca={}", file("none.pem")), "none.pem"),
        ] {
            let error = RabbitMqBroker::from_url(&url(&options)).await;
            let error = error.expect_err(&options);
            assert!(error.to_string().contains(advice), "{options}: {error:?}");
        }
    }
}
