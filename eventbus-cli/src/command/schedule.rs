//! `eventbus schedule`: events that wait for their time.

use anyhow::bail;
use clap::{Args, Subcommand};
use eventbus::desk::ScheduledReport;
use eventbus::prelude::{EventBus, EventId, Topic};
use eventbus::{Key, ScheduledEvents};
use serde::Serialize;

use crate::Outcome;
use crate::output::{Output, counted};

/// How many are asked for at once.
const PAGE: usize = 500;

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum ScheduleCommand {
    /// List events that wait for their time, earliest first
    List(ListArgs),
    /// Take events back, so that they are not published
    Cancel(CancelArgs),
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus schedule list
  eventbus schedule list --topic reminders --key 42
  eventbus --json schedule list | jq 'map(select(.taken | not) | .id)'

A time that is over says that nobody has published the event yet: look at the processes whose buses
have this schedule, and at the broker.")]
pub(crate) struct ListArgs {
    /// Only events for this topic; may be said several times
    #[arg(long, value_parser = super::topic)]
    topic: Vec<Topic>,
    /// Only events of this key
    #[arg(long)]
    key: Option<String>,
    /// How many are shown, the earliest
    #[arg(long, default_value_t = 1000)]
    limit: usize,
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus schedule cancel 0198c1d2-7a54-7bb1-9c6f-3f1f6d6f8a10
  eventbus --json schedule list --key 42 | jq -r '.[].id' | xargs eventbus schedule cancel")]
pub(crate) struct CancelArgs {
    /// The ids, as `eventbus schedule list` shows them
    #[arg(required = true)]
    ids: Vec<String>,
}

/// An event that waits, for scripts.
#[derive(Serialize)]
pub(super) struct Waiting {
    id: String,
    /// When it is published.
    due: String,
    topic: String,
    key: Option<String>,
    #[serde(rename = "type")]
    event_type: Option<String>,
    bytes: usize,
    /// Whether it may be on the broker already.
    taken: bool,
}

impl Waiting {
    pub(super) fn new(report: &ScheduledReport) -> Self {
        Self {
            id: report.id.to_string(),
            due: report.due.to_string(),
            topic: report.topic.to_string(),
            key: report.key.as_ref().map(Key::to_string),
            event_type: report.event_type.clone(),
            bytes: report.bytes,
            taken: report.is_taken,
        }
    }
}

/// How many were taken back, for scripts.
#[derive(Serialize)]
struct Cancelled {
    cancelled: usize,
}

pub(crate) async fn run(
    command: ScheduleCommand,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<Outcome> {
    let scheduled = bus.scheduled()?;
    match command {
        ScheduleCommand::List(args) => list(args, &scheduled, out).await?,
        ScheduleCommand::Cancel(args) => cancel(args, &scheduled, out).await?,
    }
    Ok(Outcome::Done)
}

async fn list(
    args: ListArgs,
    scheduled: &ScheduledEvents,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    let waiting = find(&args, scheduled).await?;
    if out.is_json() {
        return out.json(&waiting);
    }
    let rows = waiting.iter().map(|waiting| {
        [
            waiting.due.clone(),
            waiting.topic.clone(),
            waiting.key.clone().unwrap_or_default(),
            waiting.event_type.clone().unwrap_or_default(),
            waiting.id.clone(),
        ]
    });
    let heading = ["due", "topic", "key", "type", "id"];
    out.table(heading, rows, "nothing waits for its time")?;
    if waiting.len() == args.limit {
        out.line("there may be more: raise --limit")?;
    }
    Ok(())
}

async fn find(args: &ListArgs, scheduled: &ScheduledEvents) -> anyhow::Result<Vec<Waiting>> {
    let is_wanted = |report: &&ScheduledReport| {
        let key = report.key.as_ref().map(Key::to_string);
        (args.topic.is_empty() || args.topic.contains(&report.topic))
            && (args.key.is_none() || key == args.key)
    };
    let mut found = Vec::new();
    let mut last = None;
    while found.len() < args.limit {
        let page = scheduled.page(last.as_ref(), PAGE).await?;
        if page.is_empty() {
            break;
        }
        found.extend(page.iter().filter(is_wanted).map(Waiting::new));
        last = page.into_iter().next_back();
    }
    found.truncate(args.limit);
    Ok(found)
}

async fn cancel(
    args: CancelArgs,
    scheduled: &ScheduledEvents,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    let mut late = Vec::new();
    for id in &args.ids {
        if !scheduled.cancel(&EventId::parse(id)?).await? {
            late.push(id.as_str());
        }
    }
    let cancelled = args.ids.len() - late.len();
    match out.is_json() {
        true => out.json(&Cancelled { cancelled })?,
        false => out.line(format_args!(
            "cancelled: {}",
            counted(cancelled, "event", "events")
        ))?,
    }
    if !late.is_empty() {
        bail!(
            "not waiting any more: {}: `eventbus tail` shows what was published",
            late.join(", ")
        );
    }
    Ok(())
}
