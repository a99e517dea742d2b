//! How long an idle consumer takes to hear of a message: one every 20 ms, handled in the process
//! that published it and in another one.

use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use eventbus::format::FlatFormat;
use eventbus::{BoxError, Consumer, Context, EventBus};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::{interval, timeout};

use super::{OrderCreated, broker, order};

const MESSAGES: u64 = 1_000;
const UNMEASURED: u64 = 50;
const PAUSE: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(10);

/// When a handler began with which message.
type Begun = (u64, u64);

/// Prints how long after the commit handlers began, in this process and in another.
#[allow(clippy::print_stdout, reason = "a bench prints its figures")]
pub(super) async fn measure(directory: &Path) {
    let bus = bus(&directory.join("same.db")).await;
    let (sender, mut begun) = channel(1);
    let consumer = consume(&bus, sender).await;
    println!("one message every {PAUSE:?}, {MESSAGES} times; from commit to handler");
    println!("  in the same process: {}", publish(&bus, &mut begun).await);
    consumer.shutdown().await.expect("it ends");

    let file = directory.join("other.db");
    let bus = self::bus(&file).await;
    let (mut other, mut begun) = other_process(&file);
    println!("  in another process: {}", publish(&bus, &mut begun).await);
    other.kill().expect("it is there");
    other.wait().expect("it is there");
}

/// Handles what another process publishes and prints when it began, until it is killed.
pub(super) async fn handle(file: &Path) {
    let (sender, mut begun) = channel(1);
    let _consumer = consume(&bus(file).await, sender).await;
    while let Some((order_id, at)) = begun.recv().await {
        writeln!(std::io::stdout(), "{order_id} {at}").expect("the other end reads");
    }
}

async fn bus(file: &Path) -> EventBus {
    EventBus::builder(broker(file).await)
        .format(FlatFormat)
        .build()
}

async fn consume(bus: &EventBus, begun: Sender<Begun>) -> Consumer {
    let consumer = bus.consumer("bench").state(begun).on(note_begin);
    consumer.spawn().await.expect("a consumer can be spawned")
}

async fn note_begin(order: OrderCreated, cx: Context<Sender<Begun>>) -> Result<(), BoxError> {
    let begun = (order.order_id, now());
    Ok(cx.state().send(begun).await?)
}

/// Publishes one message after the other and gives what came of it.
async fn publish(bus: &EventBus, begun: &mut Receiver<Begun>) -> String {
    let (mut whole, mut after_commit) = (Vec::new(), Vec::new());
    let mut ticks = interval(PAUSE);
    for order_id in 0..UNMEASURED + MESSAGES {
        ticks.tick().await;
        let before = now();
        let published = bus.publish(order(order_id)).await;
        let committed = now();
        published.expect("it is on disk");
        let heard = timeout(PATIENCE, begun.recv()).await;
        let (heard, at) = heard
            .expect("it is handled")
            .expect("the consumer is there");
        assert_eq!(heard, order_id);
        if order_id >= UNMEASURED {
            whole.push(at.saturating_sub(before));
            // A handler may begin before the publisher hears of the commit.
            after_commit.push(at.saturating_sub(committed));
        }
    }
    let (after_commit, whole) = (histogram(after_commit), histogram(whole));
    format!("{after_commit}; from the call of `publish`: {whole}")
}

/// Microseconds on a clock that processes share.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.expect("it is after 1970").as_micros();
    u64::try_from(now).expect("it is before the year 586912")
}

fn histogram(mut micros: Vec<u64>) -> String {
    micros.sort_unstable();
    let at = |share: f64| micros[((micros.len() - 1) as f64 * share) as usize] as f64 / 1000.0;
    let [median, p90, p99, most] = [0.5, 0.9, 0.99, 1.0].map(at);
    format!("p50 {median:.2} ms, p90 {p90:.2}, p99 {p99:.2}, max {most:.2}")
}

fn other_process(file: &Path) -> (Child, Receiver<Begun>) {
    let program = std::env::current_exe().expect("this program has a path");
    let mut child = Command::new(program)
        .arg("latency-of")
        .arg(file)
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let (sender, begun) = channel(1);
    std::thread::spawn(move || {
        for line in lines {
            let line = line.expect("text");
            let (order_id, at) = line.split_once(' ').expect("two numbers");
            let number = |text: &str| text.parse().expect("a number");
            // The measurement is over when nobody receives.
            let _ = sender.blocking_send((number(order_id), number(at)));
        }
    });
    (child, begun)
}
