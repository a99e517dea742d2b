//! `eventbus tail`: what is on topics, and what comes.

use clap::Args;
use eventbus::EventBus;
use eventbus::prelude::{Start, Topic, Until};

use crate::Outcome;
use crate::output::Output;
use crate::place;
use crate::record::{Filter, Shown};

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus tail order-events                              follow what comes
  eventbus tail order-events --from earliest --key 42     the history of order 42, then what comes
  eventbus tail order-events --from 15m --until now       the last quarter of an hour
  eventbus tail order-events --from earliest --count 1    the oldest event there is
  eventbus tail order-events --json | jq .data            the data for a script

It reads without a group: nobody's place moves. The order is that of each partition.")]
pub(crate) struct TailArgs {
    /// The topics
    #[arg(required = true, value_parser = super::topic)]
    topics: Vec<Topic>,
    /// Where to begin: earliest, latest, how long ago (15m), a time, or a position of each partition
    #[arg(long, default_value = "latest", value_parser = place::start)]
    from: Start,
    /// Where to end: now, how long ago, a time, or a position; without it, it follows for ever
    #[arg(long, value_parser = place::until)]
    until: Option<Until>,
    /// End after so many events
    #[arg(long)]
    count: Option<u64>,
    #[command(flatten)]
    filter: Filter,
}

pub(crate) async fn run(
    args: TailArgs,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<Outcome> {
    super::require_topics(bus, &args.topics).await?;
    let mut reader = bus.read(&args.topics, args.from, args.until).await?;
    let mut left = args.count.unwrap_or(u64::MAX);
    while left > 0
        && let Some(record) = reader.next().await?
    {
        if args.filter.takes(&record.message) {
            Shown::of(&record).write(out)?;
            left -= 1;
        }
    }
    Ok(Outcome::Done)
}
