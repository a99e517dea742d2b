//! Another process on the same file or database: this test binary, started with one ignored test.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use eventbus_core::{
    Broker, Deliveries, EventId, Group, Key, Member, Message, ScheduleStore, Scheduled, Signal,
    Subscription, Topic,
};
use eventbus_sql::{SqliteBroker, SqliteConfig};

use crate::scheduled;

const ROLE: &str = "EVENTBUS_SQL_CHILD";
/// What a child's lines begin with, so that those of the test harness are told apart.
const MARK: &str = "child: ";

pub(crate) const TOPIC: Topic = Topic::from_static("numbers");
pub(crate) const GROUP: Group = Group::from_static("workers");

/// The leases in these tests: short, so that a member that stands still is replaced soon.
pub(crate) fn config(file: &Path) -> SqliteConfig {
    SqliteConfig::new(file)
        .with_lease(Duration::from_secs(1))
        .with_busy_timeout(Duration::from_secs(2))
}

/// A child that is killed with it.
pub(crate) struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    pub(crate) fn start(role: &str, place: impl AsRef<Path>) -> Self {
        let program = std::env::current_exe().expect("this test has a path");
        Self::run(Command::new(program), role, place)
    }

    /// A child whose files cannot grow beyond so many kilobytes, until [`lift`](Self::lift).
    pub(crate) fn start_limited(role: &str, place: impl AsRef<Path>, kilobytes: u32) -> Self {
        let program = std::env::current_exe().expect("this test has a path");
        let mut shell = Command::new("bash");
        // What is ignored here stays ignored: a write beyond the limit fails instead of killing.
        let script = format!("trap '' XFSZ; ulimit -S -f {kilobytes}; exec \"$0\" \"$@\"");
        shell.args(["-c", &script]).arg(program);
        Self::run(shell, role, place)
    }

    /// Takes the limit away.
    pub(crate) fn lift(&self) {
        let lifted = Command::new("prlimit")
            .args(["--fsize=unlimited", "--pid", &self.child.id().to_string()])
            .status();
        assert!(lifted.expect("there is a prlimit command").success());
    }

    fn run(mut command: Command, role: &str, place: impl AsRef<Path>) -> Self {
        let mut child = command
            .args([
                "--exact",
                "child::plays_its_role",
                "--ignored",
                "--nocapture",
            ])
            .env(ROLE, format!("{role} {}", place.as_ref().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this test can be started again");
        let output = child.stdout.take().expect("it is piped");
        Self {
            input: child.stdin.take().expect("it is piped"),
            output: BufReader::new(output),
            child,
        }
    }

    /// The next thing it says; nothing when it has ended.
    pub(crate) fn hear(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self
                .output
                .read_line(&mut line)
                .expect("its output can be read")
                == 0
            {
                return None;
            }
            if let Some((_, said)) = line.split_once(MARK) {
                return Some(said.trim_end().to_owned());
            }
        }
    }

    /// Lets it go on with its next step.
    pub(crate) fn nod(&mut self) {
        self.input.write_all(b"\n").expect("it listens");
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([format!("-{name}"), self.child.id().to_string()])
            .status();
        assert!(sent.expect("there is a kill command").success());
    }

    /// Kills it and returns all it said until then.
    pub(crate) fn kill(mut self) -> Vec<String> {
        self.child.kill().expect("it can be killed");
        std::iter::from_fn(|| self.hear()).collect()
    }

    /// Waits for its end.
    pub(crate) fn succeeds(mut self) -> Vec<String> {
        let said = std::iter::from_fn(|| self.hear()).collect();
        let status = self.child.wait().expect("it ends");
        assert!(status.success(), "{said:?}");
        said
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn say(text: impl std::fmt::Display) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{MARK}{text}").expect("the parent listens");
    output.flush().expect("the parent listens");
}

fn wait_for_nod() {
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .expect("the parent speaks");
}

pub(crate) fn micros() -> u128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("it is later than 1970").as_micros()
}

pub(crate) fn number(number: usize) -> Message {
    Message::new(TOPIC, number.to_string()).with_key(Key::display(number % 7))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "is started by other tests as another process"]
async fn plays_its_role() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let (role, place) = role.split_once(' ').expect("a role and a place");
    let file = Path::new(place);
    match role.split_once(':').unwrap_or((role, "")) {
        ("open", _) => {
            connect(place).await;
            say("open");
        }
        ("publish", from) => publish(&*connect(place).await, from.parse().expect("a number")).await,
        ("consume", _) => consume(&*connect(place).await).await,
        ("tail", _) => tail(&*connect(place).await).await,
        ("linger", _) => linger(&*connect(place).await).await,
        ("fill", _) => fill(&*connect(place).await).await,
        ("schedule", millis) => schedule(file, millis_of(millis)).await,
        ("schedule-and-die", step) => {
            let step: &'static str = step.to_owned().leak();
            tracing::subscriber::set_global_default(DiesAt(step)).expect("it is the first");
            schedule(file, Duration::from_millis(100)).await;
        }
        ("schedule-nothing", _) => schedule_nothing(file).await,
        ("store-only", millis) => store_only(&open(file).await, millis_of(millis)).await,
        #[cfg(feature = "postgres")]
        ("relay", _) if place.starts_with("postgres:") => {
            crate::postgres::relays::relay(place).await;
        }
        ("relay", _) => crate::relays::relay_file(file).await,
        ("shop", _) => crate::crash::trade(open(file).await, file).await,
        _ => panic!("no such role: {role}"),
    }
}

fn millis_of(text: &str) -> Duration {
    Duration::from_millis(text.parse().expect("a number"))
}

/// A file, or the URL of a PostgreSQL database.
async fn connect(place: &str) -> Box<dyn Broker> {
    #[cfg(feature = "postgres")]
    if place.starts_with("postgres:") {
        let broker = eventbus_sql::PostgresBroker::from_url(place).await;
        return Box::new(broker.expect("the server answers"));
    }
    Box::new(open(Path::new(place)).await)
}

async fn open(file: &Path) -> SqliteBroker {
    let broker = SqliteBroker::connect(config(file)).await;
    broker.expect("the file opens")
}

/// Publishes numbers for ever and says each that was acknowledged.
async fn publish(broker: &dyn Broker, from: usize) {
    for first in (from..).step_by(3) {
        let batch = (first..first + 3).map(number).collect();
        broker.publish(batch).await.expect("it is taken");
        for number in first..first + 3 {
            say(number);
        }
    }
}

/// Handles numbers for ever and says each before it is settled.
async fn consume(broker: &dyn Broker) {
    let mut member = broker
        .subscribe(Subscription::group(GROUP, vec![TOPIC]))
        .await
        .expect("it can join");
    loop {
        let Signal::Delivered(batch) = next(&mut member).await else {
            continue;
        };
        for delivery in &batch {
            say(String::from_utf8_lossy(&delivery.message.payload));
            let settled = [delivery.receipt];
            member
                .settlement
                .settle(&settled)
                .await
                .expect("it is recorded");
        }
    }
}

/// The next signal; the database may be away for a while.
async fn next(member: &mut Member) -> Signal {
    loop {
        match member.deliveries.next().await {
            Ok(signal) => return signal,
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
    }
}

/// Says for each message how many microseconds after its time it came.
async fn tail(broker: &dyn Broker) {
    let reader = Subscription::reader(vec![TOPIC]).with_start(eventbus_core::Start::Latest);
    let member = broker.subscribe(reader).await.expect("it can read");
    let mut deliveries: Box<dyn Deliveries> = member.deliveries;
    loop {
        match deliveries.next().await.expect("it goes on") {
            Signal::Assigned(_) => say("ready"),
            Signal::Delivered(batch) => {
                let now = micros();
                for delivery in batch {
                    let sent = String::from_utf8_lossy(&delivery.message.payload);
                    let sent: u128 = sent.parse().expect("a time");
                    say(now.saturating_sub(sent));
                }
            }
            _ => {}
        }
    }
}

/// Takes a message and settles it much later.
async fn linger(broker: &dyn Broker) {
    let mut member = broker
        .subscribe(Subscription::group(GROUP, vec![TOPIC]))
        .await
        .expect("it can join");
    loop {
        if let Signal::Delivered(batch) = next(&mut member).await {
            say("holding");
            wait_for_nod();
            let settled: Vec<_> = batch.iter().map(|delivery| delivery.receipt).collect();
            // The member may have been told by now, or be told by the database.
            let _ = member.settlement.settle(&settled).await;
            say("settled");
        }
    }
}

/// Publishes until the file may not grow any more, and once again when it may.
async fn fill(broker: &dyn Broker) {
    let message = || Message::new(TOPIC, vec![b'x'; 100_000]).with_key("k");
    let mut taken = 0;
    let error = loop {
        match broker.publish(vec![message()]).await {
            Ok(()) => taken += 1,
            Err(error) => break error,
        }
    };
    say(format_args!(
        "{:?} {}",
        error.unpublished[0].error.kind(),
        error.is_retryable()
    ));
    say(taken);
    wait_for_nod();
    let again = broker.publish(error.into_messages()).await;
    assert!(again.is_ok(), "there is room again");
    say("recovered");
}

/// Ends this process at a step, as a power cut would.
struct DiesAt(&'static str);

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
        struct Step(&'static str);
        impl tracing::field::Visit for Step {
            fn record_str(&mut self, _: &tracing::field::Field, value: &str) {
                if value == self.0 {
                    std::process::abort();
                }
            }

            fn record_debug(&mut self, _: &tracing::field::Field, _: &dyn std::fmt::Debug) {}
        }
        event.record(&mut Step(self.0));
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// Schedules 50 numbers in one call, and waits for its end.
async fn schedule(file: &Path, after: Duration) {
    let bus = scheduled::open(file).await;
    let time = scheduled::in_time(after);
    let messages = (0..50).map(|number| scheduled::later(number, time));
    let stored = bus.publish_messages(messages.collect()).await;
    stored.expect("they are stored");
    say("stored");
    wait_for_nod();
}

/// Puts one number into the schedule, as a process that ends before its time.
async fn store_only(broker: &SqliteBroker, after: Duration) {
    let time = scheduled::in_time(after);
    let message = scheduled::later(1, time);
    let one = Scheduled::new(EventId::from_name("1"), time, message);
    let stored = broker.schedule().add(&[one]).await;
    stored.expect("it is stored");
    say("stored");
    wait_for_nod();
}

/// Publishes what others schedule.
async fn schedule_nothing(file: &Path) {
    let bus = scheduled::open(file).await;
    let any = Message::new(Topic::from_static("others"), "any");
    bus.publish_messages(vec![any]).await.expect("it is taken");
    say("ready");
    wait_for_nod();
}
