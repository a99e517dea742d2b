//! `eventbus whereabouts`: the events of a key, for whoever answers a customer.

use clap::Args;
use eventbus::prelude::{Start, Topic};
use eventbus::{EventBus, EventPlace, GroupProgress, HeldFor, Progress, Whereabouts};
use serde::Serialize;
use serde_json::{Value, json};

use super::dead_letters::ShownLetter;
use super::schedule::Waiting;
use crate::Outcome;
use crate::output::{Output, progress};
use crate::place;

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus whereabouts order-events 42
  eventbus whereabouts order-events 42 --since 2d     on a large topic: only the last two days

Shows each event of the key, and for each group that reads the topic whether it has settled the
event, how many messages stand before it, or that it is held with its key; what of the key
waits for its time; and the dead letters of the key, whatever became of them. What the broker can't tell is named as unknown.")]
pub(crate) struct WhereaboutsArgs {
    /// The topic
    #[arg(value_parser = super::topic)]
    topic: Topic,
    /// The key, such as an order's number
    key: String,
    /// Where to begin: earliest, how long ago (2d), a time, or a position of each partition
    #[arg(long, default_value = "earliest", value_parser = place::start)]
    since: Start,
    /// How many events and dead letters are shown, the latest
    #[arg(long, default_value_t = 100)]
    latest: usize,
    /// A group whose dead letters are looked at, too, where the broker does not know its groups
    #[arg(long)]
    group: Vec<String>,
}

pub(crate) async fn run(
    args: WhereaboutsArgs,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<Outcome> {
    let bar = progress("reading the topic", None);
    bar.enable_steady_tick(std::time::Duration::from_millis(100));
    let lookup = bus.whereabouts(&args.topic, args.key.as_str());
    let lookup = lookup.since(args.since).latest(args.latest);
    let lookup = args
        .group
        .into_iter()
        .fold(lookup, |lookup, group| lookup.group(group));
    let places = lookup.await;
    bar.finish_and_clear();
    let places = places?;
    match out.is_json() {
        true => out.json(&document(&places))?,
        false => out.line(&places)?,
    }
    Ok(Outcome::Done)
}

/// What is found, for scripts.
#[derive(Serialize)]
struct Document {
    topic: String,
    key: String,
    earlier: u64,
    events: Vec<Value>,
    held: Vec<Value>,
    scheduled: Vec<Waiting>,
    dead_letters: Vec<ShownLetter>,
    unknown: Vec<Value>,
}

fn document(places: &Whereabouts) -> Document {
    let letters = places.dead_letters.iter();
    let unknown = places.unknown.iter();
    Document {
        topic: places.topic.to_string(),
        key: places.key.to_string(),
        earlier: places.earlier,
        events: places.events.iter().map(event).collect(),
        held: places.held.iter().map(held).collect(),
        scheduled: places.scheduled.iter().map(Waiting::new).collect(),
        dead_letters: letters.map(ShownLetter::of).collect(),
        unknown: unknown
            .map(|unknown| json!({ "what": unknown.what, "reason": unknown.reason }))
            .collect(),
    }
}

fn held(held: &HeldFor) -> Value {
    let report = &held.report;
    json!({
        "group": held.group.as_str(),
        "partition": report.held.place.partition,
        "since": report.since.to_string(),
        "until": report.wait.until.map(|it| it.to_string()),
        "error": report.wait.error,
        "messages": report.messages,
    })
}

fn event(event: &EventPlace) -> Value {
    let envelope = event.envelope.as_ref();
    json!({
        "id": event.id.to_string(),
        "type": envelope.map(|it| &it.event_type),
        "time": envelope.map(|it| it.time.to_string()),
        "partition": event.partition,
        "position": event.position.map(|it| it.to_string()),
        "to_group": event.to_group.as_ref().map(|it| it.as_str()),
        "groups": event.groups.iter().map(group).collect::<Vec<_>>(),
    })
}

fn group(group: &GroupProgress) -> Value {
    let (state, before) = match group.progress {
        Progress::Settled => ("settled", None),
        Progress::Waiting { before } => ("waiting", before),
        Progress::Held { before, .. } => ("held", Some(before)),
        _ => ("unknown", None),
    };
    json!({ "group": group.group.as_str(), "state": state, "before": before })
}
