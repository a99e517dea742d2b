//! The tried process that publishes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::Args;
use eventbus::PartlyPublished;
use eventbus_verify::{Entry, Operation, Phase, Session, Stamp};
use fastrand::Rng;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::{Child, ChildArgs};
use crate::recorded::told;
use crate::tried::Draft;

const PAUSE: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// What it publishes.
#[derive(Args, Clone, Debug)]
pub struct ProduceArgs {
    #[command(flatten)]
    pub child: ChildArgs,
    #[command(flatten)]
    load: LoadArgs,
}

/// How much is published, by whomever.
#[derive(Args, Clone, Debug)]
pub struct LoadArgs {
    /// The number of the first producer
    #[arg(long)]
    pub producer: u16,
    /// How many producers there are, each with one call at a time
    #[arg(long, default_value_t = 2)]
    pub lanes: u16,
    /// The groups that are waited for when they fall behind
    #[arg(long, value_delimiter = ',')]
    pub groups: Vec<u16>,
    /// How many keys there are
    #[arg(long, default_value_t = 500)]
    pub keys: u32,
    /// Most messages of one call or transaction
    #[arg(long, default_value_t = 200)]
    pub batch: usize,
    /// Bytes of a payload
    #[arg(long, default_value_t = 64)]
    pub bytes: usize,
    /// How many messages may wait before it waits, too
    #[arg(long, default_value_t = 2000)]
    pub lag_max: u64,
    /// How long each producer rests between two calls
    #[arg(long, default_value = "0ms", value_parser = humantime::parse_duration)]
    pub rest: Duration,
}

impl LoadArgs {
    /// What the producers of this process number and draw.
    pub fn sources(&self, seed: u64) -> impl Iterator<Item = Source> + '_ {
        (self.producer..self.producer + self.lanes).map(move |producer| Source {
            producer,
            numbers: vec![0; self.keys as usize],
            random: Rng::with_seed(seed ^ (u64::from(producer) << 32)),
            batch: self.batch,
            bytes: self.bytes,
        })
    }
}

/// Numbers the messages of a producer.
#[derive(Debug)]
pub struct Source {
    producer: u16,
    numbers: Vec<u32>,
    /// What it draws from.
    pub random: Rng,
    batch: usize,
    bytes: usize,
}

impl Source {
    /// Whose messages they are.
    #[must_use]
    pub fn producer(&self) -> u16 {
        self.producer
    }

    /// The next messages, at least one.
    pub fn next(&mut self, child: &Child) -> Vec<Draft> {
        let count = self.random.usize(1..=self.batch.max(1));
        let draft = |_| {
            let key = self.random.usize(0..self.numbers.len());
            let number = self.numbers[key];
            self.numbers[key] += 1;
            let stamp = Stamp::new(self.producer, key as u32, number);
            Draft::new(child.client.run(), stamp, self.bytes)
        };
        (0..count).map(draft).collect()
    }
}

/// Publishes until it is told to stop.
///
/// # Errors
///
/// When it cannot start.
pub async fn run(args: ProduceArgs) -> anyhow::Result<()> {
    let child = Child::start(&args.child).await?;
    let lag = child.watch_lag(&args.load.groups);
    let mut producers = JoinSet::new();
    for source in args.load.sources(child.seed) {
        let (child, lag) = (child.clone(), Arc::clone(&lag));
        producers.spawn(produce(child, source, lag, args.load.clone()));
    }
    child.is_ready();
    producers.join_all().await;
    child.bus.close().await?;
    Ok(())
}

async fn produce(child: Child, mut source: Source, lag: Arc<AtomicU64>, load: LoadArgs) {
    let session = child.client.session();
    while !child.is_stopping() {
        child.wait_for_room(&lag, load.lag_max).await;
        let drafts = source.next(&child);
        let count = drafts.len() as u64;
        publish(&child, &session, drafts).await;
        child.messages.fetch_add(count, Ordering::Relaxed);
        sleep(load.rest).await;
    }
}

/// Publishes messages until all are taken, or the process is to stop.
async fn publish(child: &Child, session: &Session, mut drafts: Vec<Draft>) {
    let mut pause = PAUSE;
    loop {
        drafts = publish_once(child, session, drafts).await;
        if drafts.is_empty() || child.is_stopping() {
            return;
        }
        sleep(pause).await;
        pause = (2 * pause).min(PAUSE_MAX);
    }
}

/// Publishes messages with one call; the answer is what was not taken for certain.
pub async fn publish_once(child: &Child, session: &Session, drafts: Vec<Draft>) -> Vec<Draft> {
    let entry = |draft: &Draft| draft.entry(Operation::Publish);
    let entries: Vec<Entry> = drafts.iter().map(entry).collect();
    told(session.record(Phase::Invoke, &entries));
    let events: Vec<_> = drafts.iter().map(Draft::outgoing).collect();
    let error = match child.bus.publish_all(events).await {
        Ok(_) => {
            told(session.record(Phase::Ok, &entries));
            return Vec::new();
        }
        Err(error) => error,
    };
    tracing::warn!("{error}");
    let partly = PartlyPublished::of(&error);
    let phase = |draft: &Draft| match partly {
        Some(partly) if partly.published.contains(draft.id()) => Phase::Ok,
        Some(partly) if partly.not_taken.contains(draft.id()) => Phase::Fail,
        _ => Phase::Unknown,
    };
    let mut left = Vec::new();
    for draft in drafts {
        let phase = phase(&draft);
        told(session.record(phase, &[entry(&draft)]));
        if phase != Phase::Ok {
            left.push(draft);
        }
    }
    left
}
