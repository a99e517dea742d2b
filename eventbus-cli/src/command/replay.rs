//! `eventbus replay`: events of the past, given again to one group and to no other.

use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use eventbus::prelude::{ErrorKind, EventBus, Start, Topic, Until};
use eventbus::{Message, Reader, Record, header};
use serde::Serialize;
use tokio::time::Instant;

use crate::Outcome;
use crate::output::{Output, confirm, counted, progress};
use crate::place;
use crate::record::Filter;

/// How many copies are on their way at once.
const BATCH: usize = 100;

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus replay order-events --to-group search --from 2d               what search missed
  eventbus replay order-events --to-group search --from earliest --dry-run     only count them
  eventbus replay order-events --to-group mail --key 42 --from 1h --rate 20 --yes

Each event in the range is published once more to its topic, unchanged and with its id, for this
group alone; other groups pass over it. It comes behind what is on the topic. Copies that re-drives
and replays made before are left out. A group that recognises duplicates by id, such as one with a
unit of work, passes over events that it has handled: that is its job.

To look at events without publishing any: eventbus tail TOPIC --from 2d --until now
To rebuild a read model from inside a program: ConsumerBuilder::replay")]
pub(crate) struct ReplayArgs {
    /// The topic
    #[arg(value_parser = super::topic)]
    topic: Topic,
    /// The group that gets them
    #[arg(long)]
    to_group: String,
    /// Where to begin: earliest, how long ago (2d), a time, or a position of each partition
    #[arg(long, value_parser = place::start)]
    from: Start,
    /// Where to end: now, how long ago, a time, or a position
    #[arg(long, default_value = "now", value_parser = place::until)]
    until: Until,
    #[command(flatten)]
    filter: Filter,
    /// At most so many a second
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Count them, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

/// What was replayed, for scripts.
#[derive(Serialize)]
struct Replayed {
    /// In the range and meant.
    events: u64,
    /// Published again.
    published: u64,
}

pub(crate) async fn run(
    args: ReplayArgs,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<Outcome> {
    super::require_topics(bus, std::slice::from_ref(&args.topic)).await?;
    require_group(&args, bus).await?;
    let events = count(&args, bus).await?;
    let what = counted(usize::try_from(events)?, "event", "events");
    let mut replayed = Replayed {
        events,
        published: 0,
    };
    if !args.dry_run && events > 0 {
        let question = format!(
            "Publish {what} of {} again for {}?",
            args.topic, args.to_group
        );
        confirm(&question, args.yes)?;
        replayed.published = copy(&args, bus, events).await?;
    }
    if out.is_json() {
        out.json(&replayed)?;
    } else if args.dry_run {
        out.line(format_args!(
            "{what} would be published again for {}",
            args.to_group
        ))?;
    } else {
        out.line(format_args!("{what} published again for {}", args.to_group))?;
    }
    Ok(Outcome::Done)
}

/// Refuses a group that does not read the topic: nobody would ever get what is published for it.
async fn require_group(args: &ReplayArgs, bus: &EventBus) -> anyhow::Result<()> {
    let positions = match bus.lags(std::slice::from_ref(&args.topic)).await {
        // The broker does not know its groups.
        Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),
        positions => positions?,
    };
    let mut groups: Vec<_> = positions.iter().map(|place| place.group.as_str()).collect();
    groups.dedup();
    let known = match groups.is_empty() {
        true => "no group does".to_owned(),
        false => format!("known are {}", groups.join(", ")),
    };
    ensure!(
        groups.contains(&args.to_group.as_str()),
        "no group {} reads {}: {known}. A new one gets what is kept by itself: start its consumer, with `.start(Start::Time(…))` where not all of it",
        args.to_group,
        args.topic
    );
    Ok(())
}

async fn reader(args: &ReplayArgs, bus: &EventBus) -> anyhow::Result<Reader> {
    let topics = std::slice::from_ref(&args.topic);
    let reader = bus.read(topics, args.from, Some(args.until)).await;
    reader.context("read what is to be replayed")
}

/// The next event in the range that is meant.
async fn next(args: &ReplayArgs, reader: &mut Reader) -> anyhow::Result<Option<Record>> {
    while let Some(record) = reader.next().await? {
        let is_copy = record.message.headers.get(header::TO_GROUP).is_some();
        if !is_copy && args.filter.takes(&record.message) {
            return Ok(Some(record));
        }
    }
    Ok(None)
}

async fn count(args: &ReplayArgs, bus: &EventBus) -> anyhow::Result<u64> {
    let bar = progress("events found", None);
    let mut reader = reader(args, bus).await?;
    let mut count = 0;
    while next(args, &mut reader).await?.is_some() {
        count += 1;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(count)
}

/// Publishes copies; no more than were counted, should more have come meanwhile.
async fn copy(args: &ReplayArgs, bus: &EventBus, events: u64) -> anyhow::Result<u64> {
    let bar = progress("publishing again", Some(events));
    let mut reader = reader(args, bus).await?;
    let begun = Instant::now();
    let batch_max = args.rate.map_or(BATCH, |rate| BATCH.min(rate as usize));
    let mut published = 0;
    while published < events {
        let mut batch = Vec::new();
        while batch.len() < batch_max
            && published + (batch.len() as u64) < events
            && let Some(record) = next(args, &mut reader).await?
        {
            batch.push(for_group(&record.message, &args.to_group)?);
        }
        if batch.is_empty() {
            break;
        }
        if let Some(rate) = args.rate {
            let due = Duration::from_secs_f64(published as f64 / f64::from(rate));
            tokio::time::sleep_until(begun + due).await;
        }
        let count = batch.len() as u64;
        let sent = bus
            .publish_messages(batch)
            .await
            .map_err(eventbus::Error::from);
        sent.with_context(|| {
            format!("{published} of {events} events were published again before")
        })?;
        published += count;
        bar.inc(count);
    }
    bar.finish_and_clear();
    Ok(published)
}

fn for_group(message: &Message, group: &str) -> anyhow::Result<Message> {
    let headers = message.headers.to_builder().push(header::TO_GROUP, group)?;
    Ok(message.clone().with_headers(headers.build()))
}
