//! Another process: this test binary, started with one ignored test, that dies at a step.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use eventbus_core::Topic;
use eventbus_rabbitmq::{RabbitMqBroker, RabbitMqQueue};

use crate::server::Server;

const ROLE: &str = "EVENTBUS_RABBITMQ_CHILD";

/// Runs an ingress in another process, which dies as if it were killed when it is at this step for the
/// given time, counted from one.
pub(crate) async fn move_and_die(queue: &str, topic: &Topic, step: &str, time: usize) {
    let role = format!("{queue} {topic} {step} {time}");
    let ended = tokio::task::spawn_blocking(move || {
        let mut child = Command::new(std::env::current_exe().expect("this test has a path"))
            .args([
                "--exact",
                "child::plays_its_role",
                "--ignored",
                "--nocapture",
            ])
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("it can be started");
        // It ends when this is closed, which a test that fails does by its end.
        let stdin = child.stdin.take();
        let status = child.wait();
        drop(stdin);
        status
    });
    let status = ended.await.expect("it runs").expect("it ends");
    assert_eq!(status.code(), None, "it was to die at the step");
}

#[tokio::test]
#[ignore = "is started by other tests as another process"]
async fn plays_its_role() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    let mut words = role.split(' ');
    let mut word = || {
        words
            .next()
            .expect("a queue, a topic, a step and a time")
            .to_owned()
    };
    let (queue, topic, step) = (word(), word(), word());
    let left = AtomicUsize::new(word().parse().expect("a number"));
    let dies = DiesAt { step, left };
    tracing::subscriber::set_global_default(dies).expect("it is the first");
    let broker = RabbitMqBroker::connect(Server::config()).await;
    let topic = Topic::new(&topic).expect("a good name");
    let queue = RabbitMqQueue::new(queue).with_key("order_id");
    let ingress = broker.expect("it answers").ingress(queue, topic);
    let ingress = ingress.spawn().await.expect("it starts");
    let ended = ingress.run_until(std::future::pending()).await;
    panic!("it goes on until it dies: {ended:?}");
}

/// Ends this process at a step, as a power cut would.
struct DiesAt {
    step: String,
    /// How often it has still to come there.
    left: AtomicUsize,
}

impl tracing::Subscriber for DiesAt {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "eventbus::step"
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        struct Step<'d>(&'d DiesAt);
        impl tracing::field::Visit for Step<'_> {
            fn record_str(&mut self, _: &tracing::field::Field, value: &str) {
                if value == self.0.step && self.0.left.fetch_sub(1, Ordering::Relaxed) == 1 {
                    std::process::abort();
                }
            }

            fn record_debug(&mut self, _: &tracing::field::Field, _: &dyn std::fmt::Debug) {}
        }
        event.record(&mut Step(self));
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}
