//! `eventbus publish`: events whose type is known only as text.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::Args;
use eventbus::broker::PublishError;
use eventbus::format::{
    CloudEventsBinaryFormat, CloudEventsFormat, EnvelopeFormat, FlatFormat, Format,
};
use eventbus::prelude::{EventBus, EventId, Topic, TopicSpec};
use eventbus::{Envelope, Key, Message};
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::Outcome;
use crate::output::{Output, counted, progress};

/// How many events are on their way at once.
const BATCH: usize = 500;

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus publish order-events --type OrderCreated --key 42 '{\"order_id\": 42, \"amount\": 250}'
  eventbus publish order-events --type OrderCreated --key-field order_id < order.json
  eventbus publish order-events --type OrderCreated --key-field order_id --lines --file all.jsonl

The data are JSON. With --lines each line is an event of its own, in order; when one is refused,
those before it are on the broker, and the message says how many. Ids are new unless --id gives
one: publish again under the same id where it is not known whether the first time arrived.")]
pub(crate) struct PublishArgs {
    /// The topic
    #[arg(value_parser = super::topic)]
    topic: Topic,
    /// The data as JSON; without them they come from --file or standard input
    data: Option<String>,
    /// The type of the event, such as OrderCreated
    #[arg(long = "type", value_name = "TYPE")]
    event_type: String,
    /// The version of the data
    #[arg(long, default_value_t = 1)]
    version: u32,
    /// What keeps events in order, such as an order's number
    #[arg(long, conflicts_with = "key_field")]
    key: Option<String>,
    /// The member of the data that is the key
    #[arg(long, value_name = "MEMBER")]
    key_field: Option<String>,
    /// The id of the event
    #[arg(long, conflicts_with = "lines")]
    id: Option<String>,
    /// What is constant along the flow that the event is part of
    #[arg(long, value_name = "ID")]
    correlation_id: Option<String>,
    /// What travels along, such as tenant=acme; may be said several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Who says that it happened
    #[arg(long, default_value = "eventbus-cli")]
    source: String,
    /// How the event is laid out
    #[arg(long, default_value = "envelope", value_parser = ["envelope", "flat", "cloudevents", "cloudevents-binary"])]
    format: String,
    /// Read the data from this file
    #[arg(long, conflicts_with = "data")]
    file: Option<PathBuf>,
    /// Each line is an event
    #[arg(long, conflicts_with = "data")]
    lines: bool,
    /// Create the topic if there is none, with the broker's defaults
    #[arg(long)]
    pub(crate) create: bool,
}

/// Reads NAME=VALUE.
pub(crate) fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("say NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// What was published, one a line.
#[derive(Serialize)]
struct Published<'a> {
    topic: &'a str,
    key: Option<String>,
    id: String,
}

pub(crate) async fn run(
    args: PublishArgs,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<Outcome> {
    match args.create {
        true => drop(
            bus.apply_topics(&[TopicSpec::new(args.topic.clone())])
                .await?,
        ),
        false => super::require_topics(bus, std::slice::from_ref(&args.topic))
            .await
            .context("create it with `eventbus topics apply`, or add --create")?,
    }
    match args.lines {
        true => publish_lines(&args, bus, out).await,
        false => publish_one(&args, bus, out).await,
    }
}

async fn publish_one(
    args: &PublishArgs,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<Outcome> {
    let data = match &args.data {
        Some(data) => data.clone(),
        None => {
            let mut data = String::new();
            input(args)?
                .read_to_string(&mut data)
                .context("read the data")?;
            data
        }
    };
    let message = message(args, bus, &data)?;
    let id = published(args, bus, &message).id;
    send(args, bus, out, vec![message])
        .await
        .map_err(|(_, error)| error)?;
    if !out.is_json() {
        out.line(format_args!(
            "{} {id} is on {}",
            args.event_type, args.topic
        ))?;
    }
    Ok(Outcome::Done)
}

async fn publish_lines(
    args: &PublishArgs,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<Outcome> {
    let bar = progress("events published", None);
    let mut lines = input(args)?.lines().enumerate();
    let mut published = 0;
    loop {
        let (batch, fault) = read_batch(&mut lines, args, bus);
        let count = batch.len();
        let (unsent, refused) = match send(args, bus, out, batch).await {
            Ok(()) => (0, None),
            Err((unsent, error)) => (unsent, Some(error)),
        };
        published += count - unsent;
        bar.inc((count - unsent) as u64);
        if let Some(error) = refused.or(fault) {
            bar.finish_and_clear();
            let before = counted(
                published,
                "event is on the broker",
                "events are on the broker",
            );
            return Err(error.context(format!("{before} before that")));
        }
        if count == 0 {
            break;
        }
    }
    bar.finish_and_clear();
    if !out.is_json() {
        let text = counted(published, "event is", "events are");
        out.line(format_args!("{text} on {}", args.topic))?;
    }
    Ok(Outcome::Done)
}

/// The events of the next lines, and what is wrong with the line behind them, if something is.
fn read_batch(
    lines: &mut impl Iterator<Item = (usize, io::Result<String>)>,
    args: &PublishArgs,
    bus: &EventBus,
) -> (Vec<Message>, Option<anyhow::Error>) {
    let mut batch = Vec::new();
    for (index, line) in lines {
        let made = match line {
            Ok(line) if line.trim().is_empty() => continue,
            Ok(line) => message(args, bus, &line),
            Err(error) => Err(error.into()),
        };
        match made.with_context(|| format!("line {}", index + 1)) {
            Ok(message) => batch.push(message),
            Err(fault) => return (batch, Some(fault)),
        }
        if batch.len() == BATCH {
            break;
        }
    }
    (batch, None)
}

/// Where the data come from when they are not an argument.
fn input(args: &PublishArgs) -> anyhow::Result<Box<dyn BufRead + Send>> {
    match &args.file {
        Some(path) => {
            let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
            Ok(Box::new(BufReader::new(file)))
        }
        None => {
            ensure!(
                !io::stdin().is_terminal(),
                "there are no data: give them as an argument, with --file, or through a pipe"
            );
            Ok(Box::new(BufReader::new(io::stdin())))
        }
    }
}

fn message(args: &PublishArgs, bus: &EventBus, data: &str) -> anyhow::Result<Message> {
    let data: &RawValue = serde_json::from_str(data).context("the data are not JSON")?;
    let id = args
        .id
        .as_deref()
        .map_or_else(|| Ok(EventId::new()), EventId::parse)?;
    let mut envelope = Envelope::new(id, &args.event_type, args.version, bus.clock().now());
    envelope.source.clone_from(&args.source);
    envelope.metadata = args.metadata.iter().cloned().collect();
    if let Some(correlation_id) = &args.correlation_id {
        envelope.correlation_id.clone_from(correlation_id);
    }
    let format: &dyn Format = match args.format.as_str() {
        "flat" => &FlatFormat,
        "cloudevents" => &const { CloudEventsFormat::new() },
        "cloudevents-binary" => &const { CloudEventsBinaryFormat::new() },
        _ => &EnvelopeFormat,
    };
    let (headers, payload) = format.write(&envelope, "application/json", data.get().as_bytes())?;
    let mut message = Message::new(args.topic.clone(), payload).with_headers(headers);
    message.key = key(args, data)?;
    message.check(bus.event_bytes_max())?;
    Ok(message)
}

fn key(args: &PublishArgs, data: &RawValue) -> anyhow::Result<Option<Key>> {
    let Some(member) = &args.key_field else {
        return Ok(args.key.as_deref().map(Key::from));
    };
    let data: Value = serde_json::from_str(data.get())?;
    match data.get(member) {
        Some(Value::String(text)) => Ok(Some(Key::from(text.as_str()))),
        Some(Value::Number(number)) => Ok(Some(Key::display(number))),
        _ => bail!("the data have no text or number {member:?} that could be the key"),
    }
}

/// Publishes a batch and names what was taken; an error comes with how many were not.
async fn send(
    args: &PublishArgs,
    bus: &EventBus,
    out: &mut Output<'_>,
    batch: Vec<Message>,
) -> Result<(), (usize, anyhow::Error)> {
    if batch.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = match out.is_json() {
        true => batch
            .iter()
            .map(|message| published(args, bus, message))
            .collect(),
        false => Vec::new(),
    };
    let result = bus.publish_messages(batch).await;
    let unsent: Vec<usize> = result
        .as_ref()
        .err()
        .map_or(Vec::new(), |error: &PublishError| {
            error
                .unpublished
                .iter()
                .map(|unpublished| unpublished.index)
                .collect()
        });
    for (index, name) in names.iter().enumerate() {
        if !unsent.contains(&index) {
            out.json(name).map_err(|error| (unsent.len(), error))?;
        }
    }
    result.map_err(|error| (unsent.len(), eventbus::Error::from(error).into()))
}

fn published<'a>(args: &'a PublishArgs, bus: &EventBus, message: &Message) -> Published<'a> {
    let id = bus
        .envelope(message)
        .map(|envelope| envelope.id.to_string());
    Published {
        topic: args.topic.as_str(),
        key: message.key.as_ref().map(ToString::to_string),
        id: id.unwrap_or_default(),
    }
}
