//! A member in another process that stands still for longer than its lease: this test binary, started
//! with one ignored test.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use eventbus_core::{
    AdminReply, AdminRequest, Broker, Group, Message, Publisher, Signal, Start, Subscriber,
    Subscription, Topic, TopicSpec,
};
use eventbus_redis::RedisBroker;
use eventbus_testkit::{Probe, within};

use crate::server::Server;

const ROLE: &str = "EVENTBUS_REDIS_CHILD";
const MARK: &str = "child: ";
const LIMIT: Duration = Duration::from_secs(30);

/// A child that ends with it.
struct Process(Child);

impl Process {
    fn start(topic: &Topic) -> Self {
        let program = std::env::current_exe().expect("this test has a path");
        let child = Command::new(program)
            .args([
                "--exact",
                "stopped::plays_its_role",
                "--ignored",
                "--nocapture",
            ])
            .env(ROLE, topic.as_str())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        Self(child.expect("this test can be started again"))
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([format!("-{name}"), self.0.id().to_string()])
            .status();
        assert!(sent.expect("there is a kill command").success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn say(text: &str) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{MARK}{text}").expect("the parent listens");
    output.flush().expect("the parent listens");
}

async fn connect() -> RedisBroker {
    let config = Server::config().with_lease(Duration::from_secs(1));
    RedisBroker::connect(config).await.expect("it answers")
}

fn workers(topic: &Topic) -> Subscription {
    let group = Group::new(topic.as_str()).expect("a topic's name is one of a group");
    Subscription::group(group, vec![topic.clone()]).with_start(Start::Earliest)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "is started by another test as another process"]
async fn plays_its_role() {
    let Ok(topic) = std::env::var(ROLE) else {
        return;
    };
    let topic = Topic::new(&topic).expect("a good name");
    let broker = connect().await;
    let mut member = broker.subscribe(workers(&topic)).await.expect("it joins");
    loop {
        if let Ok(Signal::Delivered(batch)) = member.deliveries.next().await {
            say("holding");
            let mut line = String::new();
            std::io::stdin()
                .read_line(&mut line)
                .expect("the parent speaks");
            let settled = batch.iter().map(|it| it.receipt);
            let settled: Vec<_> = settled.collect();
            // It may know by now that the lane is lost, or be told so.
            let _ = member.settlement.settle(&settled).await;
            say("settled");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_member_that_stood_still_is_fenced() {
    let _server = Server::new().await;
    let broker = connect().await;
    let name = format!("stopped-{:016x}", fastrand::u64(..));
    let topic = Topic::new(&name).expect("a good name");
    let spec = TopicSpec::new(topic.clone()).with_partitions(1);
    let made = broker.admin(AdminRequest::ApplyTopics(vec![spec])).await;
    made.expect("it is made");
    let message = Message::new(topic.clone(), "1");
    broker.publish(vec![message]).await.expect("it is taken");
    let mut child = Process::start(&topic);
    let output = child.0.stdout.take().expect("it is piped");
    let mut lines = BufReader::new(output).lines().map_while(Result::ok);
    let mut hear = || lines.find_map(|line| Some(line.split_once(MARK)?.1.to_owned()));
    assert_eq!(hear().as_deref(), Some("holding"));
    child.signal("STOP");
    let mut probe = Probe::join(&broker, workers(&topic))
        .await
        .expect("it joins");
    let again = within(LIMIT, probe.collect(1)).await;
    assert_eq!(&again[0].message.payload[..], b"1");
    // It settles what is not its own any more.
    let input = child.0.stdin.as_mut().expect("it is piped");
    input.write_all(b"\n").expect("it listens");
    child.signal("CONT");
    assert_eq!(hear().as_deref(), Some("settled"));
    let request = AdminRequest::Lag {
        group: Group::new(topic.as_str()).expect("a good name"),
        topics: vec![topic],
    };
    let AdminReply::Lag(lag) = broker.admin(request).await.expect("it is declared") else {
        panic!("not an answer to the request");
    };
    assert_eq!(lag[0].messages, 1, "a settlement of a former owner counted");
    probe.settle(&again).await;
}
