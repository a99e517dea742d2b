//! `eventbus keys`: keys that wait behind an event that can't be handled, and what becomes of them.

use std::collections::BTreeSet;

use anyhow::{bail, ensure};
use clap::{Args, Subcommand};
use eventbus::desk::{HeldReport, KeyAction};
use eventbus::prelude::EventBus;
use eventbus::{HeldKeys, Key};
use serde::Serialize;

use super::dead_letters::{Who, Whose};
use crate::Outcome;
use crate::output::{Output, confirm, counted};

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// List keys that are parked
    Parked(ParkedArgs),
    /// Handle all events of keys, in order, the first with its attempts anew
    Retry(RetryArgs),
    /// Make the first event of keys a dead letter, and go on behind it
    Release(ReleaseArgs),
    /// Make all events of keys dead letters
    Discard(DiscardArgs),
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus keys parked
  eventbus keys parked --group payments --topic order-events
  eventbus keys parked --delayed                  those that are tried again by themselves, too
  eventbus --json keys parked | jq 'map(.messages) | add'

A parked key waits behind an event that can't be handled: later events of the key are kept in order
until it is retried, released or discarded.")]
pub(crate) struct ParkedArgs {
    #[command(flatten)]
    whose: Whose,
    /// Also keys that wait for their next attempt
    #[arg(long)]
    delayed: bool,
}

/// Which keys a decision is about.
#[derive(Args, Clone, Debug)]
struct Decide {
    /// The keys
    keys: Vec<String>,
    /// All keys that are parked, or those that the other options leave
    #[arg(long, conflicts_with = "keys")]
    all: bool,
    #[command(flatten)]
    whose: Whose,
    #[command(flatten)]
    who: Who,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus keys retry 42 --group payments --because 'the account was corrected'
  eventbus keys retry --all --group payments --because 'the PSP is back'

The group's own consumer does it, now or when one runs; what fails again parks its key again.")]
pub(crate) struct RetryArgs {
    #[command(flatten)]
    decide: Decide,
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus keys release 42 --group payments --because 'booked by hand'

The first event stays readable: eventbus dlq list.")]
pub(crate) struct ReleaseArgs {
    #[command(flatten)]
    decide: Decide,
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus keys discard 42 --group payments --because 'a test order'

The events stay readable: eventbus dlq list.")]
pub(crate) struct DiscardArgs {
    #[command(flatten)]
    decide: Decide,
}

/// A key that waits, for scripts.
#[derive(Serialize)]
struct Waiting {
    group: String,
    topic: String,
    partition: u32,
    /// The key; `null` where one event waits by itself.
    key: Option<String>,
    since: String,
    /// When it is tried again; `null` where it is parked.
    until: Option<String>,
    attempts: u32,
    cause: String,
    error: String,
    messages: u64,
    /// What was decided and is not carried out yet.
    decision: Option<&'static str>,
}

impl Waiting {
    fn new(group: &str, report: &HeldReport) -> Self {
        let wait = &report.wait;
        Self {
            group: group.to_owned(),
            topic: report.held.place.topic.to_string(),
            partition: report.held.place.partition,
            key: report.held.name.key().map(Key::to_string),
            since: report.since.to_string(),
            until: wait.until.map(|until| until.to_string()),
            attempts: wait.attempts,
            cause: wait.cause.clone(),
            error: wait.error.clone(),
            messages: report.messages,
            decision: report.decision.as_ref().map(|made| made.action.as_str()),
        }
    }
}

/// How many keys were decided about, for scripts.
#[derive(Serialize)]
struct Decided {
    keys: usize,
}

pub(crate) async fn run(
    command: KeysCommand,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<Outcome> {
    match command {
        KeysCommand::Parked(args) => parked(args, bus, out).await?,
        KeysCommand::Retry(args) => decide(KeyAction::Retry, args.decide, bus, out).await?,
        KeysCommand::Release(args) => decide(KeyAction::Release, args.decide, bus, out).await?,
        KeysCommand::Discard(args) => decide(KeyAction::Discard, args.decide, bus, out).await?,
    }
    Ok(Outcome::Done)
}

/// What is held of some groups on some topics.
async fn held(bus: &EventBus, whose: &Whose) -> anyhow::Result<Vec<(HeldKeys, HeldReport)>> {
    let mut found = Vec::new();
    for group in groups(bus, whose).await? {
        let keys = bus.held_keys(&group)?;
        for report in keys.list().await? {
            if whose.topic.is_empty() || whose.topic.contains(&report.held.place.topic) {
                found.push((keys.clone(), report));
            }
        }
    }
    Ok(found)
}

/// How many keys are parked, over all groups.
pub(super) async fn count_parked(bus: &EventBus) -> anyhow::Result<usize> {
    let held = held(bus, &Whose::default()).await?;
    let parked = held.iter().filter(|(_, report)| report.wait.is_parked());
    Ok(parked.count())
}

/// The groups that are meant: those that are named, or all that read anything.
async fn groups(bus: &EventBus, whose: &Whose) -> anyhow::Result<BTreeSet<String>> {
    if !whose.group.is_empty() {
        return Ok(whose.group.iter().cloned().collect());
    }
    let places = bus.lags(&whose.topic).await?;
    Ok(places.iter().map(|place| place.group.to_string()).collect())
}

async fn parked(args: ParkedArgs, bus: &EventBus, out: &mut Output<'_>) -> anyhow::Result<()> {
    let mut held = held(bus, &args.whose).await?;
    held.retain(|(_, report)| args.delayed || report.wait.is_parked());
    let waiting: Vec<_> = held
        .iter()
        .map(|(keys, report)| Waiting::new(keys.group().as_str(), report))
        .collect();
    if out.is_json() {
        return out.json(&waiting);
    }
    let rows = waiting.iter().map(|waiting| {
        [
            waiting.group.clone(),
            waiting.topic.clone(),
            waiting.key.clone().unwrap_or_default(),
            waiting.messages.to_string(),
            waiting.attempts.to_string(),
            waiting.since.clone(),
            waiting.decision.unwrap_or_default().to_owned(),
            waiting.error.clone(),
        ]
    });
    let heading = [
        "group", "topic", "key", "events", "attempts", "since", "decided", "error",
    ];
    out.table(heading, rows, "no key is parked")?;
    Ok(())
}

async fn decide(
    action: KeyAction,
    args: Decide,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    ensure!(
        args.all || !args.keys.is_empty(),
        "no key is named: give keys, as `eventbus keys parked` shows them, or --all"
    );
    let mut held = held(bus, &args.whose).await?;
    held.retain(|(_, report)| {
        let key = report.held.name.key().map(Key::to_string);
        match args.all {
            true => report.wait.is_parked() && report.decision.is_none(),
            false => key.is_some_and(|key| args.keys.contains(&key)),
        }
    });
    for key in &args.keys {
        let is_meant = |report: &HeldReport| {
            let name = report.held.name.key();
            name.is_some_and(|name| name.to_string() == *key)
        };
        if !held.iter().any(|(_, report)| is_meant(report)) {
            bail!(
                "no group holds the key {key}: `eventbus keys parked --delayed` shows what is held"
            );
        }
    }
    let what = counted(held.len(), "key", "keys");
    if args.all && !held.is_empty() {
        confirm(&format!("{} {what}?", verb(action)), args.yes)?;
    }
    let (by, because) = (args.who.by(), args.who.because());
    let mut keys = 0;
    for (desk, report) in &held {
        let decided = desk.decide(&report.held, action, by, because).await?;
        keys += usize::from(decided);
    }
    if out.is_json() {
        return out.json(&Decided { keys });
    }
    let what = counted(keys, "key", "keys");
    out.line(format_args!("{}: {what}", action.as_str()))?;
    if keys < held.len() {
        let left = counted(held.len() - keys, "key", "keys");
        out.line(format_args!("{left} left: decided about before"))?;
    }
    Ok(())
}

fn verb(action: KeyAction) -> &'static str {
    match action {
        KeyAction::Release => "Release",
        KeyAction::Discard => "Discard",
        _ => "Retry",
    }
}
