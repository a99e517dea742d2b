//! `eventbus dlq`: the desk of dead letters, on the command line.

mod desks;
mod shown;

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use eventbus::desk::DeskReport;
use eventbus::prelude::{EventBus, EventId, Redrive, Topic};
use eventbus::{DeadLetter, Edit};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::Outcome;
use crate::output::{Output, confirm, counted, progress};

pub(crate) use desks::Desks;
pub(crate) use shown::ShownLetter;

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
    /// Give the group a changed event in place of a letter's
    Edit(EditArgs),
    /// Put letters aside for good; they stay readable
    Discard(DiscardArgs),
}

/// Whose letters, or keys, are meant.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Whose {
    /// Only of this group; may be said several times
    #[arg(long)]
    pub(crate) group: Vec<String>,
    /// Only of this topic; may be said several times
    #[arg(long, value_parser = super::topic)]
    pub(crate) topic: Vec<Topic>,
}

/// Which letters are meant, of those that are open.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Which {
    /// Only letters whose error contains this text
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
    /// Only letters of this fingerprint, as `eventbus dlq groups` shows it
    #[arg(long)]
    fingerprint: Option<String>,
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
            && self
                .fingerprint
                .as_ref()
                .is_none_or(|fingerprint| letter.fingerprint() == *fingerprint)
            && self.filter.takes(&letter.message)
    }

    fn takes_all(&self) -> bool {
        let Self {
            error,
            fingerprint,
            cause,
            filter,
        } = self;
        let said = [error, fingerprint, cause, &filter.key, &filter.event_type];
        said.into_iter().all(Option::is_none)
    }
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus dlq list
  eventbus dlq list --group payments --error 'card declined'
  eventbus --json dlq list | jq -r '.[].id'")]
pub(crate) struct ListArgs {
    /// How many are listed, at most
    #[arg(long, default_value_t = 1000)]
    limit: usize,
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

Letters are together when their errors differ in numbers, ids and quoted parts only. To deal with one
line: eventbus dlq redrive --all --fingerprint 'error: no label for parcel <n>'")]
pub(crate) struct GroupsArgs {
    #[command(flatten)]
    whose: Whose,
}

/// On whose behalf something is decided.
#[derive(Args, Clone, Debug)]
pub(crate) struct Who {
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
}

impl Who {
    pub(crate) fn by(&self) -> &str {
        &self.by
    }

    pub(crate) fn because(&self) -> &str {
        &self.because
    }
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
    #[command(flatten)]
    who: Who,
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
  eventbus dlq edit 5d0c1f9e-4f0c-5a8e-9b53-7d1a8f0f2b11 '{\"street\": \"Elm Street 7\"}' --because typo
  eventbus dlq edit 5d0c1f9e-4f0c-5a8e-9b53-7d1a8f0f2b11 --without-header eb-expires-at

The changed event has an id of its own and names the old one as its cause; only the group that left
the letter gets it. Prints the new id.")]
pub(crate) struct EditArgs {
    /// The letter's id, as `eventbus dlq list` shows it
    id: String,
    /// The new data as JSON; without them the data stay
    data: Option<String>,
    /// Set a header; may be said several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = super::publish::pair)]
    header: Vec<(String, String)>,
    /// Take a header away; may be said several times
    #[arg(long, value_name = "NAME")]
    without_header: Vec<String>,
    #[command(flatten)]
    whose: Whose,
    #[command(flatten)]
    who: Who,
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
        DeadLettersCommand::Edit(args) => edit(args, bus, out).await,
        DeadLettersCommand::Discard(args) => decide(args.decide, Verb::Discard, bus, out).await,
    }?;
    Ok(Outcome::Done)
}

async fn list(args: ListArgs, bus: &EventBus, out: &mut Output<'_>) -> anyhow::Result<()> {
    let desks = Desks::of(bus, &args.whose.group, &args.whose.topic).await?;
    let (mut letters, mut more) = (Vec::new(), 0);
    let visited = desks.visit(|letter| match args.which.takes(&letter) {
        true if letters.len() < args.limit => {
            letters.push((letter.failed_at, ShownLetter::of(&letter)));
        }
        true => more += 1,
        false => {}
    });
    visited.await?;
    letters.sort_by_key(|(failed_at, _)| *failed_at);
    let letters: Vec<_> = letters.into_iter().map(|(_, letter)| letter).collect();
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
    if more > 0 {
        out.line(format_args!("and {more} more: raise --limit, or choose"))?;
    }
    Ok(())
}

async fn show(args: ShowArgs, bus: &EventBus, out: &mut Output<'_>) -> anyhow::Result<()> {
    let desks = Desks::of(bus, &args.whose.group, &args.whose.topic).await?;
    let id = EventId::parse(&args.id)?;
    let (desk, letter) = desks.find(&id).await?;
    let history = desk.history(&id).await?;
    let letter = ShownLetter::of(&letter).with_history(&history);
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
    for entry in &letter.history {
        out.line(format_args!("{:<9} {entry}", ""))?;
    }
    Ok(())
}

/// Letters that went wrong in the same way.
#[derive(Serialize)]
struct Alike {
    group: String,
    topic: String,
    /// What their errors have in common, for `--fingerprint`.
    fingerprint: String,
    /// The error of one of them.
    error: String,
    letters: u64,
    first_failed_at: String,
    failed_at: String,
    /// One of them, for `eventbus dlq show`.
    example: String,
}

async fn groups(args: GroupsArgs, bus: &EventBus, out: &mut Output<'_>) -> anyhow::Result<()> {
    let desks = Desks::of(bus, &args.whose.group, &args.whose.topic).await?;
    let mut alike = Vec::new();
    for desk in &desks.0 {
        let groups = desk.letters.by_error().await?;
        alike.extend(groups.into_iter().map(|errors| Alike {
            group: desk.group.clone(),
            topic: desk.topic.to_string(),
            fingerprint: errors.fingerprint,
            error: errors.error,
            letters: errors.count,
            first_failed_at: errors.first_seen.to_string(),
            failed_at: errors.last_seen.to_string(),
            example: errors.example.to_string(),
        }));
    }
    alike.sort_by_key(|alike| std::cmp::Reverse(alike.letters));
    if out.is_json() {
        return out.json(&alike);
    }
    let rows = alike.into_iter().map(|alike| {
        [
            alike.letters.to_string(),
            alike.group,
            alike.topic,
            alike.failed_at,
            alike.fingerprint,
        ]
    });
    let heading = ["letters", "group", "topic", "last failed", "fingerprint"];
    out.table(heading, rows, "there is no open dead letter")?;
    Ok(())
}

/// The event that takes a letter's place, for scripts.
#[derive(Serialize)]
struct Edited {
    id: String,
}

async fn edit(args: EditArgs, bus: &EventBus, out: &mut Output<'_>) -> anyhow::Result<()> {
    let mut edit = Edit::new().by(&args.who.by).because(&args.who.because);
    if let Some(data) = args.data {
        let data: &RawValue = serde_json::from_str(&data).context("the data are not JSON")?;
        edit = edit.data(data.get().to_owned());
    }
    for (name, value) in args.header {
        edit = edit.header(name, value);
    }
    for name in args.without_header {
        edit = edit.without_header(name);
    }
    let desks = Desks::of(bus, &args.whose.group, &args.whose.topic).await?;
    let id = EventId::parse(&args.id)?;
    let (desk, letter) = desks.find(&id).await?;
    let id = desk.edit(&id, edit).await?.to_string();
    match out.is_json() {
        true => out.json(&Edited { id })?,
        false => out.line(format_args!("{id} is for {}", letter.group))?,
    }
    Ok(())
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
        "say which letters: their ids, --error, --fingerprint, --cause, --type, --key, or --all"
    );
    let ids = args.ids.iter().map(|id| EventId::parse(id));
    let ids = ids.collect::<Result<BTreeSet<_>, _>>()?;
    let desks = Desks::of(bus, &args.whose.group, &args.whose.topic).await?;
    let mut chosen = BTreeSet::new();
    let visited = desks.visit(|letter| {
        let is_named = ids.is_empty() || ids.contains(&letter.id);
        if is_named && args.which.takes(&letter) {
            chosen.insert(letter.id);
        }
    });
    visited.await?;
    // What was asked about is decided about: what comes meanwhile is left.
    let chosen = Arc::new(chosen);
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
        let chosen = Arc::clone(&chosen);
        let decision = Redrive::matching(move |letter| chosen.contains(&letter.id));
        let decision = decision.by(&args.who.by).because(&args.who.because);
        let (progress, before) = (bar.clone(), bar.position());
        let decision =
            decision.on_progress(move |report| progress.set_position(before + report.ended()));
        let report = match verb {
            Verb::Discard => desk.letters.discard(decision).await?,
            Verb::Redrive(None) => desk.letters.redrive(decision).await?,
            Verb::Redrive(Some(rate)) => desk.letters.redrive(decision.rate(rate)).await?,
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
