//! `eventbus dlq`: the desk of dead letters, on the command line.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use eventbus::desk::{DeadLetterStatus, Decision, DeskReport};
use eventbus::prelude::{ErrorKind, EventBus, EventId, Redrive, Topic};
use eventbus::{DeadLetter, DeadLetters};
use serde::Serialize;

use crate::Outcome;
use crate::output::{Output, confirm, counted, progress};
use crate::record::ShownEvent;

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum DeadLettersCommand {
    /// List what is open
    List(ListArgs),
    /// Show one letter whole: its event, cause and what became of it
    Show(ShowArgs),
    /// Count open letters by what went wrong
    Groups(GroupsArgs),
    /// Give letters to their group again, and to no other
    Redrive(RedriveArgs),
    /// Put letters aside for good; they stay readable
    Discard(DiscardArgs),
}

/// Whose letters are meant.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Whose {
    /// Only what this group left; may be said several times
    #[arg(long)]
    group: Vec<String>,
    /// Only of this topic; may be said several times
    #[arg(long, value_parser = super::topic)]
    topic: Vec<Topic>,
}

/// Which letters are meant, of those that are open.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Which {
    /// Only letters whose error contains this text
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
    /// Only letters of this cause: error, panic, deadline, undecodable, no_handler, hand_outs
    #[arg(long)]
    cause: Option<String>,
    #[command(flatten)]
    filter: crate::record::Filter,
}

impl Which {
    fn takes(&self, letter: &DeadLetter) -> bool {
        self.error
            .as_ref()
            .is_none_or(|text| letter.error.contains(text))
            && self
                .cause
                .as_ref()
                .is_none_or(|cause| letter.cause == *cause)
            && self.filter.takes(&letter.message)
    }

    fn takes_all(&self) -> bool {
        let Self {
            error,
            cause,
            filter,
        } = self;
        error.is_none() && cause.is_none() && filter.key.is_none() && filter.event_type.is_none()
    }
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus dlq list
  eventbus dlq list --group payments --error 'card declined'
  eventbus --json dlq list | jq -r '.[].id'")]
pub(crate) struct ListArgs {
    #[command(flatten)]
    whose: Whose,
    #[command(flatten)]
    which: Which,
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus dlq show 5d0c1f9e-4f0c-5a8e-9b53-7d1a8f0f2b11")]
pub(crate) struct ShowArgs {
    /// The letter's id, as `eventbus dlq list` shows it
    id: String,
    #[command(flatten)]
    whose: Whose,
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus dlq groups                     one line for each thing that goes wrong
  eventbus dlq groups --group payments

Letters are together when group, topic, cause and error are the same, apart from numbers and ids
in the error.")]
pub(crate) struct GroupsArgs {
    #[command(flatten)]
    whose: Whose,
}

/// The letters to decide about, and on whose behalf.
#[derive(Args, Clone, Debug)]
pub(crate) struct Decide {
    /// The letters' ids, as `eventbus dlq list` shows them
    ids: Vec<String>,
    /// All open letters, or those that the other options leave
    #[arg(long, conflicts_with = "ids")]
    all: bool,
    #[command(flatten)]
    whose: Whose,
    #[command(flatten)]
    which: Which,
    /// Who decides; it is recorded
    #[arg(long, env = "USER", hide_env_values = true, default_value = "unknown")]
    by: String,
    /// Why; it is recorded
    #[arg(
        long,
        value_name = "REASON",
        default_value = "",
        hide_default_value = true
    )]
    because: String,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus dlq redrive 5d0c1f9e-4f0c-5a8e-9b53-7d1a8f0f2b11 --because 'address corrected'
  eventbus dlq redrive --all --group payments --error PSP --rate 50 --because 'it is back'

Each event keeps its id, its attempts start anew, and only the group that left the letter gets
it, behind what was published of its key meanwhile. The decision is recorded.")]
pub(crate) struct RedriveArgs {
    #[command(flatten)]
    decide: Decide,
    /// At most so many a second
    #[arg(long)]
    rate: Option<u32>,
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus dlq discard 5d0c1f9e-4f0c-5a8e-9b53-7d1a8f0f2b11 --because 'order was a test'
  eventbus dlq discard --all --group mailing --error 'no such mailbox' --because 'moved away'

A letter that is discarded is not open any more; `eventbus dlq show` still shows it whole.")]
pub(crate) struct DiscardArgs {
    #[command(flatten)]
    decide: Decide,
}

pub(crate) async fn run(
    command: DeadLettersCommand,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<Outcome> {
    match command {
        DeadLettersCommand::List(args) => list(args, bus, out).await,
        DeadLettersCommand::Show(args) => show(args, bus, out).await,
        DeadLettersCommand::Groups(args) => groups(args, bus, out).await,
        DeadLettersCommand::Redrive(args) => {
            decide(args.decide, Verb::Redrive(args.rate), bus, out).await
        }
        DeadLettersCommand::Discard(args) => decide(args.decide, Verb::Discard, bus, out).await,
    }?;
    Ok(Outcome::Done)
}

/// The desks of several groups.
pub(crate) struct Desks(Vec<DeadLetters>);

impl Desks {
    /// The desks that there are of these groups and topics; where none are named, of all.
    pub(crate) async fn of(
        bus: &EventBus,
        groups: &[String],
        topics: &[Topic],
    ) -> anyhow::Result<Self> {
        let mut desks = Vec::new();
        for (group, topics) in readers(bus, groups, topics).await? {
            let mut kept = Vec::new();
            for topic in topics {
                if has_letters(bus, &group, &topic).await? {
                    kept.push(topic);
                }
            }
            if !kept.is_empty() {
                desks.push(bus.dead_letters(&group, &kept)?);
            }
        }
        Ok(Self(desks))
    }

    /// All open letters, oldest first.
    pub(crate) async fn list(&self) -> anyhow::Result<Vec<DeadLetter>> {
        let mut letters = Vec::new();
        for desk in &self.0 {
            letters.extend(desk.list().await?);
        }
        letters.sort_by_key(|letter| letter.failed_at);
        Ok(letters)
    }

    async fn show(&self, id: &EventId) -> anyhow::Result<DeadLetter> {
        for desk in &self.0 {
            match desk.show(id).await {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                letter => return Ok(letter?),
            }
        }
        bail!("there is no letter {id}: `eventbus dlq list` shows the open ones")
    }
}

/// Which groups read which topics.
async fn readers(
    bus: &EventBus,
    groups: &[String],
    topics: &[Topic],
) -> anyhow::Result<BTreeMap<String, BTreeSet<Topic>>> {
    if !groups.is_empty() && !topics.is_empty() {
        // Also of groups that the broker has forgotten or never knew.
        let topics: BTreeSet<_> = topics.iter().cloned().collect();
        let pairs = groups.iter().map(|group| (group.clone(), topics.clone()));
        return Ok(pairs.collect());
    }
    let positions = bus.lags(topics).await.context(
        "the groups and topics with dead letters are not known: name them with --group and --topic",
    )?;
    let mut readers: BTreeMap<String, BTreeSet<Topic>> = BTreeMap::new();
    for place in positions {
        let group = place.group.as_str();
        if groups.is_empty() || groups.iter().any(|wanted| wanted == group) {
            readers
                .entry(group.to_owned())
                .or_default()
                .insert(place.topic);
        }
    }
    Ok(readers)
}

/// Whether there is a topic for these letters; reading it would create it on some brokers.
async fn has_letters(bus: &EventBus, group: &str, topic: &Topic) -> anyhow::Result<bool> {
    let Ok(name) = Topic::new(&format!("{topic}.{group}.dlq")) else {
        return Ok(false);
    };
    match bus.describe_topics(&[name]).await {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A letter for scripts. The names are a promise: they are added to, never changed.
#[derive(Debug, Serialize)]
pub(crate) struct ShownLetter {
    id: String,
    group: String,
    topic: String,
    partition: u32,
    position: Option<String>,
    key: Option<String>,
    cause: String,
    error: String,
    attempts: u32,
    first_failed_at: String,
    failed_at: String,
    /// `open`, `redriven` or `discarded`.
    status: &'static str,
    by: Option<String>,
    because: Option<String>,
    at: Option<String>,
    event: ShownEvent,
}

impl ShownLetter {
    pub(crate) fn of(letter: &DeadLetter) -> Self {
        let (status, decision) = status(&letter.status);
        Self {
            id: letter.id.to_string(),
            group: letter.group.to_string(),
            topic: letter.message.topic.to_string(),
            partition: letter.partition,
            position: letter.position.map(|position| position.to_string()),
            key: letter.message.key.as_ref().map(ToString::to_string),
            cause: letter.cause.clone(),
            error: letter.error.clone(),
            attempts: letter.attempts,
            first_failed_at: letter.first_failed_at.to_string(),
            failed_at: letter.failed_at.to_string(),
            status,
            by: decision.map(|decision| decision.by.clone()),
            because: decision.map(|decision| decision.because.clone()),
            at: decision.map(|decision| decision.at.to_string()),
            event: ShownEvent::of(&letter.message),
        }
    }
}

fn status(status: &DeadLetterStatus) -> (&'static str, Option<&Decision>) {
    match status {
        DeadLetterStatus::Open => ("open", None),
        DeadLetterStatus::Claimed { decision, .. } => ("claimed", Some(decision)),
        DeadLetterStatus::Redriven(decision) => ("redriven", Some(decision)),
        DeadLetterStatus::Edited { decision, .. } => ("edited", Some(decision)),
        DeadLetterStatus::Discarded(decision) => ("discarded", Some(decision)),
        _ => ("unknown", None),
    }
}

async fn list(args: ListArgs, bus: &EventBus, out: &mut Output<'_>) -> anyhow::Result<()> {
    let desks = Desks::of(bus, &args.whose.group, &args.whose.topic).await?;
    let mut letters = desks.list().await?;
    letters.retain(|letter| args.which.takes(letter));
    let letters: Vec<_> = letters.iter().map(ShownLetter::of).collect();
    if out.is_json() {
        return out.json(&letters);
    }
    let rows = letters.into_iter().map(|letter| {
        [
            letter.id,
            letter.group,
            letter.topic,
            letter.key.unwrap_or_default(),
            letter.event.event_type.unwrap_or_default(),
            letter.failed_at,
            letter.attempts.to_string(),
            letter.error,
        ]
    });
    let heading = [
        "id", "group", "topic", "key", "type", "failed", "attempts", "error",
    ];
    out.table(heading, rows, "there is no open dead letter")?;
    Ok(())
}

async fn show(args: ShowArgs, bus: &EventBus, out: &mut Output<'_>) -> anyhow::Result<()> {
    let desks = Desks::of(bus, &args.whose.group, &args.whose.topic).await?;
    let letter = desks.show(&EventId::parse(&args.id)?).await?;
    let letter = ShownLetter::of(&letter);
    if out.is_json() {
        return out.json(&letter);
    }
    let none = || "-".to_owned();
    let place = letter
        .position
        .map_or(String::new(), |position| format!("@{position}"));
    let lines = [
        ("letter", letter.id),
        ("status", letter.status.to_owned()),
        ("group", letter.group),
        (
            "from",
            format!("{}/{}{place}", letter.topic, letter.partition),
        ),
        ("key", letter.key.unwrap_or_else(none)),
        ("cause", letter.cause),
        ("error", letter.error),
        ("attempts", letter.attempts.to_string()),
        (
            "failed",
            format!(
                "first {}, last {}",
                letter.first_failed_at, letter.failed_at
            ),
        ),
        ("event", letter.event.headline()),
        ("data", letter.event.data_text().to_owned()),
    ];
    for (name, value) in lines {
        out.line(format_args!("{name:<9} {value}"))?;
    }
    if let (Some(by), Some(because), Some(at)) = (letter.by, letter.because, letter.at) {
        out.line(format_args!(
            "{:<9} {} by {by} at {at}: {because}",
            "decided", letter.status
        ))?;
    }
    Ok(())
}

/// Letters that went wrong in the same way.
#[derive(Serialize)]
struct Alike {
    group: String,
    topic: String,
    cause: String,
    /// The error of one of them.
    error: String,
    letters: usize,
    first_failed_at: String,
    failed_at: String,
    /// One of them, for `eventbus dlq show`.
    example: String,
}

async fn groups(args: GroupsArgs, bus: &EventBus, out: &mut Output<'_>) -> anyhow::Result<()> {
    let desks = Desks::of(bus, &args.whose.group, &args.whose.topic).await?;
    let mut alike: BTreeMap<_, Alike> = BTreeMap::new();
    for letter in desks.list().await? {
        let group = letter.group.to_string();
        let topic = letter.message.topic.to_string();
        let likeness = (
            group.clone(),
            topic.clone(),
            letter.cause.clone(),
            shape(&letter.error),
        );
        let entry = alike.entry(likeness).or_insert_with(|| Alike {
            group,
            topic,
            cause: letter.cause.clone(),
            error: letter.error.clone(),
            letters: 0,
            first_failed_at: letter.failed_at.to_string(),
            failed_at: String::new(),
            example: letter.id.to_string(),
        });
        entry.letters += 1;
        entry.failed_at = letter.failed_at.to_string();
    }
    let mut alike: Vec<_> = alike.into_values().collect();
    alike.sort_by_key(|alike| std::cmp::Reverse(alike.letters));
    if out.is_json() {
        return out.json(&alike);
    }
    let rows = alike.into_iter().map(|alike| {
        [
            alike.letters.to_string(),
            alike.group,
            alike.topic,
            alike.cause,
            alike.failed_at,
            alike.error,
        ]
    });
    let heading = ["letters", "group", "topic", "cause", "last failed", "error"];
    out.table(heading, rows, "there is no open dead letter")?;
    Ok(())
}

/// An error without what differs from one event to the next: numbers, and ids, which hold some.
fn shape(error: &str) -> String {
    let shaped = error
        .split(' ')
        .map(|word| match word.contains(|c: char| c.is_ascii_digit()) {
            true => "#",
            false => word,
        });
    shaped.collect::<Vec<_>>().join(" ")
}

#[derive(Clone, Copy)]
enum Verb {
    Redrive(Option<u32>),
    Discard,
}

/// What was decided, for scripts.
#[derive(Default, Serialize)]
struct Decided {
    letters: u64,
    /// Somebody else was at them, or had dealt with them.
    taken: u64,
    /// Their event has expired, so they stay open.
    expired: u64,
    /// The broker does not take their event again, so they stay open.
    refused: u64,
}

impl Decided {
    fn add(&mut self, report: &DeskReport) {
        self.letters += report.done;
        self.taken += report.taken;
        self.expired += report.expired;
        self.refused += report.refused;
    }

    /// What was not done, and why.
    fn left(&self) -> impl Iterator<Item = (u64, &'static str)> {
        [
            (self.taken, "left to another operator"),
            (self.expired, "left open, because expired: edit or discard"),
            (
                self.refused,
                "left open, because refused by the broker: edit or discard",
            ),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
    }
}

async fn decide(
    args: Decide,
    verb: Verb,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    ensure!(
        args.all || !args.ids.is_empty() || !args.which.takes_all(),
        "say which letters: their ids, --error, --cause, --type, --key, or --all"
    );
    let ids = args.ids.iter().map(|id| EventId::parse(id));
    let ids = ids.collect::<Result<BTreeSet<_>, _>>()?;
    let desks = Desks::of(bus, &args.whose.group, &args.whose.topic).await?;
    let mut letters = desks.list().await?;
    letters.retain(|letter| args.which.takes(letter));
    letters.retain(|letter| ids.is_empty() || ids.contains(&letter.id));
    let chosen: BTreeSet<EventId> = letters.iter().map(|letter| letter.id.clone()).collect();
    if let Some(missing) = ids.difference(&chosen).next() {
        bail!("{missing} is no open letter: `eventbus dlq show {missing}` says what became of it");
    }
    let what = counted(chosen.len(), "dead letter", "dead letters");
    let question = match verb {
        Verb::Redrive(_) => format!("Re-drive {what}?"),
        Verb::Discard => format!("Discard {what}?"),
    };
    if !chosen.is_empty() && args.ids.is_empty() {
        confirm(&question, args.yes)?;
    }
    let bar = progress("deciding", Some(chosen.len() as u64));
    let mut decided = Decided::default();
    for desk in &desks.0 {
        let chosen = chosen.clone();
        let decision = Redrive::matching(move |letter| chosen.contains(&letter.id));
        let decision = decision.by(&args.by).because(&args.because);
        let (progress, before) = (bar.clone(), bar.position());
        let decision =
            decision.on_progress(move |report| progress.set_position(before + report.ended()));
        let report = match verb {
            Verb::Discard => desk.discard(decision).await?,
            Verb::Redrive(None) => desk.redrive(decision).await?,
            Verb::Redrive(Some(rate)) => desk.redrive(decision.rate(rate)).await?,
        };
        decided.add(&report);
    }
    bar.finish_and_clear();
    if out.is_json() {
        return out.json(&decided);
    }
    let count = usize::try_from(decided.letters).unwrap_or(usize::MAX);
    let what = counted(count, "dead letter", "dead letters");
    match verb {
        Verb::Redrive(_) => out.line(format_args!("re-driven: {what}"))?,
        Verb::Discard => out.line(format_args!("discarded: {what}"))?,
    }
    for (count, why) in decided.left() {
        out.line(format_args!("{count} {why}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_differ_in_numbers_have_one_shape() {
        let (one, other) = (
            "order 42: no stock of 7c9e-1",
            "order 43: no stock of 8a21-2",
        );
        assert_eq!(shape(one), shape(other));
        assert_ne!(shape(one), shape("order 42: no address of 7c9e-1"));
    }
}
