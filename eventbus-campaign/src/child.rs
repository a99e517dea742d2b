//! What the tried processes have in common: the recorder, the bus, how they say how they are, and
//! how they end.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use eventbus::prelude::{ErrorKind, EventBus};
use eventbus_verify::Client;
use tokio::runtime::Handle;
use tokio::time::sleep;

use crate::crash_point::CrashPoint;
use crate::recorded::{self, BrokerArgs, group_name};
use crate::tried::TOPIC;

pub mod append;
pub mod consume;
pub mod produce;
pub mod relay;

/// How long a process goes on trying to reach its broker or database when it starts.
const START_WITHIN: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);
/// How often a process says how it is.
const STATUS_EVERY: Duration = Duration::from_millis(200);
/// How often the lag is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How much longer nobody looks than a look takes.
const LOOK_SHARE: u32 = 5;

/// What every tried process is told.
#[derive(Args, Clone, Debug)]
pub struct ChildArgs {
    /// The socket of the recorder
    #[arg(long)]
    recorder: PathBuf,
    #[command(flatten)]
    broker: BrokerArgs,
    /// Decides what is published, and when
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// While there is a file of this name, no dead letter is taken
    #[arg(long, value_name = "FILE")]
    letters_away: Option<PathBuf>,
    /// Aborts at the Nth time that a named step is reached
    #[arg(long, value_name = "STEP:N")]
    pub crash_at: Option<CrashPoint>,
}

/// What a tried process has.
#[derive(Clone, Debug)]
pub struct Child {
    /// The recorder.
    pub client: Arc<Client>,
    /// The broker that is tried.
    pub bus: EventBus,
    /// Where its random numbers begin.
    pub seed: u64,
    /// How many messages it has brought in, or handled.
    pub messages: Arc<AtomicU64>,
    stopping: Arc<AtomicBool>,
}

impl Child {
    /// Connects to recorder and broker, and begins to say how it is.
    ///
    /// # Errors
    ///
    /// When either is not there for a minute.
    pub async fn start(args: &ChildArgs) -> anyhow::Result<Self> {
        let client = Client::connect(&args.recorder).context("connect to the recorder")?;
        let client = Arc::new(client);
        let away = args.letters_away.as_deref();
        let connect = async || recorded::connect(&args.broker, &client, away).await;
        let bus = patiently(connect).await;
        let child = Self {
            client,
            bus: bus.context("connect to the broker")?,
            seed: args.seed,
            messages: Arc::default(),
            stopping: Arc::default(),
        };
        tokio::spawn(say_status(Arc::clone(&child.messages)));
        let stopping = Arc::clone(&child.stopping);
        tokio::spawn(async move {
            eventbus::shutdown_signal().await;
            stopping.store(true, Ordering::SeqCst);
        });
        Ok(child)
    }

    /// Whether it was told to stop.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Resolves when it is told to stop.
    pub async fn stopped(&self) {
        while !self.is_stopping() {
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Says that it does its work from now on.
    pub fn is_ready(&self) {
        say("ready");
    }

    /// Looks for ever at how many messages wait for the slowest of these groups.
    pub fn watch_lag(&self, groups: &[u16]) -> Arc<AtomicU64> {
        let (lag, bus) = (Arc::new(AtomicU64::new(0)), self.bus.clone());
        let seen = Arc::clone(&lag);
        let groups: Vec<String> = groups.iter().map(|group| group_name(*group)).collect();
        tokio::spawn(async move {
            loop {
                let begun = Instant::now();
                // What the broker does not say is as it was.
                if let Some(lag) = lag_of(&bus, &groups).await {
                    seen.store(lag, Ordering::Relaxed);
                }
                // Where a look is dear, it is taken less often.
                sleep(LOOK_EVERY.max(LOOK_SHARE * begun.elapsed())).await;
            }
        });
        lag
    }

    /// Waits while more than so many messages wait.
    pub async fn wait_for_room(&self, lag: &AtomicU64, max: u64) {
        while lag.load(Ordering::Relaxed) > max && !self.is_stopping() {
            sleep(LOOK_EVERY / 5).await;
        }
    }
}

/// How many messages wait for the slowest group.
async fn lag_of(bus: &EventBus, groups: &[String]) -> Option<u64> {
    let mut most = 0;
    for group in groups {
        match bus.lag(group, &[TOPIC]).await {
            Ok(lanes) => most = most.max(lanes.iter().map(|lane| lane.messages).sum()),
            // It has not subscribed yet, and waits for nothing.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(_) => return None,
        }
    }
    Some(most)
}

/// Tries until it succeeds: whoever starts may do so within a fault.
///
/// # Errors
///
/// The last one, after a minute.
pub async fn patiently<T>(attempt: impl AsyncFn() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + START_WITHIN;
    loop {
        match attempt().await {
            Err(error) if Instant::now() < deadline => tracing::warn!("{error:#}"),
            outcome => return outcome,
        }
        sleep(PAUSE).await;
    }
}

/// Ends the process when its parent does, even if that was killed: its end of the pipe closes then.
pub fn end_with_parent() {
    std::thread::spawn(|| {
        // Whatever ends the reading, nobody is there any more.
        drop(std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
        std::process::exit(75);
    });
}

async fn say_status(messages: Arc<AtomicU64>) {
    loop {
        let tasks = Handle::current().metrics().num_alive_tasks();
        say(&format!(
            "status {} {tasks}",
            messages.load(Ordering::Relaxed)
        ));
        sleep(STATUS_EVERY).await;
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // Without a parent nobody wants to know, and the process is about to end.
    drop(writeln!(out, "{line}").and_then(|()| out.flush()));
}
