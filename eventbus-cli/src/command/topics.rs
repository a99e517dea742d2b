//! `eventbus topics`: created from a file, compared with it, listed.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use eventbus::EventBus;
use eventbus::TopicReport;
use eventbus::prelude::{ErrorKind, Topic, TopicSpec};
use serde::{Deserialize, Serialize};

use crate::Outcome;
use crate::output::{Output, counted};

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum TopicsCommand {
    /// Create the topics of a file that are missing, and show how others differ from it
    Apply(ApplyArgs),
    /// Compare the topics with a file; changes nothing
    Check(CheckArgs),
    /// List the topics there are
    List(ListArgs),
}

const FILE_HELP: &str = "\
The file is TOML, or JSON where its name ends in .json:
  [[topic]]
  name = \"order-events\"
  partitions = 20         # the broker's default when left out
  retention = \"90d\"       # how long messages are kept; left to the broker when left out
  retention_bytes = 1000000000   # how much is kept, over all partitions; the same

  {\"topic\": [{\"name\": \"order-events\", \"partitions\": 20, \"retention\": \"90d\"}]}

What exists is never changed: more partitions would put keys elsewhere and break their order, a
shorter retention would remove messages. Where a retention can be changed, the difference says how.
Exit code 3: something differs from the file.";

#[derive(Args, Clone, Debug)]
#[command(after_help = format!("\
Examples:
  eventbus topics apply topics.toml
  eventbus topics apply topics.toml --dry-run    show what would be done

{FILE_HELP}"))]
pub(crate) struct ApplyArgs {
    /// The file; - is standard input
    file: PathBuf,
    /// Show what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Args, Clone, Debug)]
#[command(after_help = format!("\
Examples:
  eventbus topics check topics.toml || echo 'missing, or not as declared'

{FILE_HELP}"))]
pub(crate) struct CheckArgs {
    /// The file; - is standard input
    file: PathBuf,
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  eventbus topics list
  eventbus topics list --all     the dead letters' topics, too
  eventbus --json topics list | jq -r '.[].name'")]
pub(crate) struct ListArgs {
    /// Dead letters' topics, too: {topic}.{group}.dlq
    #[arg(long)]
    all: bool,
}

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Declaration {
    topic: Vec<DeclaredTopic>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeclaredTopic {
    name: String,
    partitions: Option<u32>,
    retention: Option<String>,
    retention_bytes: Option<u64>,
}

impl DeclaredTopic {
    fn spec(&self) -> anyhow::Result<TopicSpec> {
        let mut spec = TopicSpec::new(Topic::new(&self.name)?);
        if let Some(partitions) = self.partitions {
            ensure!(
                partitions > 0,
                "a topic has at least one partition: {}",
                self.name
            );
            spec = spec.with_partitions(partitions);
        }
        if let Some(retention) = &self.retention {
            let retention: Duration = humantime::parse_duration(retention).with_context(|| {
                format!("{}: retention is a time such as 12h or 90d", self.name)
            })?;
            spec = spec.with_retention(retention);
        }
        if let Some(bytes) = self.retention_bytes {
            spec = spec.with_retention_bytes(bytes);
        }
        Ok(spec)
    }
}

/// What is to be done about a topic, or was.
#[derive(Debug, Serialize)]
struct Step {
    name: String,
    /// `create`, `created`, `unchanged` or `differs`.
    state: &'static str,
    /// As it is; as declared where it is missing.
    partitions: Option<u32>,
    /// How it differs from the file, a sentence each.
    drift: Vec<String>,
}

impl Step {
    fn missing(spec: &TopicSpec) -> Self {
        Self {
            name: spec.name.to_string(),
            state: "create",
            partitions: spec.partitions,
            drift: Vec::new(),
        }
    }

    fn of(report: TopicReport) -> Self {
        let state = match (report.created, report.drift.is_empty()) {
            (true, _) => "created",
            (false, true) => "unchanged",
            (false, false) => "differs",
        };
        Self {
            name: report.name.to_string(),
            state,
            partitions: Some(report.partitions),
            drift: report.drift,
        }
    }
}

pub(crate) async fn run(
    command: TopicsCommand,
    bus: &EventBus,
    out: &mut Output<'_>,
) -> anyhow::Result<Outcome> {
    match command {
        TopicsCommand::Apply(args) => apply(&args, bus, out).await,
        TopicsCommand::Check(args) => {
            let steps = plan(&read(&args.file)?, bus).await?;
            show(&steps, out)?;
            let as_declared = steps.iter().all(|step| step.state == "unchanged");
            Ok(outcome(as_declared))
        }
        TopicsCommand::List(args) => list(&args, bus, out).await,
    }
}

async fn apply(args: &ApplyArgs, bus: &EventBus, out: &mut Output<'_>) -> anyhow::Result<Outcome> {
    let specs = read(&args.file)?;
    let steps = match args.dry_run {
        true => plan(&specs, bus).await?,
        false => {
            let reports = bus.apply_topics(&specs).await?;
            reports.into_iter().map(Step::of).collect()
        }
    };
    show(&steps, out)?;
    let as_declared = steps.iter().all(|step| step.drift.is_empty());
    Ok(outcome(as_declared))
}

fn outcome(as_declared: bool) -> Outcome {
    match as_declared {
        true => Outcome::Done,
        false => Outcome::NotAsItShouldBe,
    }
}

/// What `apply` would do. Applying changes nothing about a topic that exists, so only those are
/// given to the broker, which knows all differences.
async fn plan(specs: &[TopicSpec], bus: &EventBus) -> anyhow::Result<Vec<Step>> {
    let mut steps = Vec::new();
    for spec in specs {
        match bus.describe_topics(std::slice::from_ref(&spec.name)).await {
            Err(error) if error.kind() == ErrorKind::NotFound => steps.push(Step::missing(spec)),
            Err(error) => return Err(error.into()),
            Ok(_) => {
                let reports = bus.apply_topics(std::slice::from_ref(spec)).await?;
                steps.extend(reports.into_iter().map(Step::of));
            }
        }
    }
    Ok(steps)
}

fn show(steps: &[Step], out: &mut Output<'_>) -> anyhow::Result<()> {
    if out.is_json() {
        return out.json(&steps);
    }
    let rows = steps.iter().map(|step| {
        let partitions = step
            .partitions
            .map_or("default".to_owned(), |count| count.to_string());
        [
            step.name.clone(),
            step.state.to_owned(),
            partitions,
            step.drift.join("\n"),
        ]
    });
    out.table(
        ["topic", "state", "partitions", "differences"],
        rows,
        "the file declares no topic",
    )?;
    Ok(())
}

/// A topic as it is.
#[derive(Serialize)]
struct Listed {
    name: String,
    partitions: u32,
}

async fn list(args: &ListArgs, bus: &EventBus, out: &mut Output<'_>) -> anyhow::Result<Outcome> {
    let mut topics = bus.describe_topics(&[]).await?;
    let all = topics.len();
    topics.retain(|topic| args.all || !topic.name.is_dead_letters());
    let hidden = all - topics.len();
    let listed = topics.iter().map(|topic| Listed {
        name: topic.name.to_string(),
        partitions: topic.partitions,
    });
    if out.is_json() {
        out.json(&listed.collect::<Vec<_>>())?;
        return Ok(Outcome::Done);
    }
    let rows = listed.map(|topic| [topic.name, topic.partitions.to_string()]);
    out.table(
        ["topic", "partitions"],
        rows,
        "there are no topics: create them with `eventbus topics apply`",
    )?;
    if hidden > 0 {
        let hidden = counted(hidden, "topic of dead letters", "topics of dead letters");
        out.line(format_args!("and {hidden}, shown by --all"))?;
    }
    Ok(Outcome::Done)
}

/// Reads a file of topics.
fn read(path: &Path) -> anyhow::Result<Vec<TopicSpec>> {
    let shown = path.display();
    let text = match path.as_os_str() == "-" {
        true => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map(|_| text)
        }
        false => std::fs::read_to_string(path),
    };
    let text = text.with_context(|| format!("read {shown}"))?;
    let is_json = path
        .extension()
        .is_some_and(|extension| extension == "json");
    let declared = parse(&text, is_json).with_context(|| format!("read the topics of {shown}"))?;
    declared.topic.iter().map(DeclaredTopic::spec).collect()
}

fn parse(text: &str, is_json: bool) -> anyhow::Result<Declaration> {
    // On standard input the first character tells.
    match is_json || text.trim_start().starts_with('{') {
        true => Ok(serde_json::from_str(text)?),
        false => Ok(toml::from_str(text)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    #[test]
    fn a_file_is_read_as_toml_and_as_json() {
        let toml = "[[topic]]\nname = \"a\"\npartitions = 3\nretention = \"2d\"\nretention_bytes = 4096\n\n[[topic]]\nname = \"b\"\n";
        let json = r#"{"topic": [{"name": "a", "partitions": 3, "retention": "2d", "retention_bytes": 4096}, {"name": "b"}]}"#;
        let expected = [
            TopicSpec::new(Topic::from_static("a"))
                .with_partitions(3)
                .with_retention(2 * DAY)
                .with_retention_bytes(4096),
            TopicSpec::new(Topic::from_static("b")),
        ];
        for (text, is_json) in [(toml, false), (json, true), (json, false)] {
            let declared = parse(text, is_json).unwrap();
            let specs: Vec<_> = declared.topic.iter().map(|it| it.spec().unwrap()).collect();
            assert_eq!(specs, expected);
        }
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named() {
        let refused = |text: &str| {
            let declared = parse(text, false)?;
            declared
                .topic
                .iter()
                .map(DeclaredTopic::spec)
                .collect::<anyhow::Result<Vec<_>>>()
        };
        for (text, expected) in [
            (
                "[[topic]]\nname = \"a\"\npartition = 3",
                "unknown field `partition`",
            ),
            ("[[topic]]\nname = \"a b\"", "A-Z a-z 0-9"),
            (
                "[[topic]]\nname = \"a\"\npartitions = 0",
                "at least one partition",
            ),
            (
                "[[topic]]\nname = \"a\"\nretention = \"long\"",
                "such as 12h",
            ),
        ] {
            let error = refused(text).unwrap_err();
            assert!(format!("{error:#}").contains(expected), "{error:#}");
        }
    }
}
