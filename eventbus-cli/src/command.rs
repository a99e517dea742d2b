//! From parsed arguments to a connected bus and the subcommand.

pub(crate) mod dead_letters;
pub(crate) mod health;
pub(crate) mod keys;
pub(crate) mod lag;
pub(crate) mod publish;
pub(crate) mod replay;
pub(crate) mod schedule;
pub(crate) mod tail;
pub(crate) mod topics;
pub(crate) mod whereabouts;

use anyhow::{Context, ensure};
use eventbus::prelude::{Connect, ErrorKind, EventBus, Topic};
use eventbus::{EventBusConfig, SqliteConfig};

use crate::Outcome;
use crate::cli::{Cli, Command};
use crate::output::Output;
use topics::TopicsCommand;

/// Connects, runs one subcommand and closes.
pub(crate) async fn run(cli: Cli, out: &mut Output<'_>) -> anyhow::Result<Outcome> {
    let url = cli.url.context(
        "no broker is given: say --url sqlite://shop.db, or set EVENTBUS_URL once for all commands",
    )?;
    if url == "memory:" {
        eprintln!("eventbus: note: `memory:` is empty and ends with this command");
    }
    require_file(&url, &cli.command)?;
    let mut config = EventBusConfig::new(&url);
    config.store = cli.store;
    let bus = match EventBus::connect_with(&config).await {
        Err(error) if is_away(&error) && matches!(cli.command, Command::Health(_)) => {
            return health::away(&error, out);
        }
        Err(error) if is_left_out(&error) => {
            return Err(error).context(
                "this program can speak what it was installed with: `cargo install --path eventbus-cli --features kafka`, or kafka-tls, rabbitmq-tls, redis-tls",
            );
        }
        connected => connected?,
    };
    let outcome = match cli.command {
        Command::Publish(args) => publish::run(args, &bus, out).await,
        Command::Tail(args) => tail::run(args, &bus, out).await,
        Command::Topics(command) => topics::run(command, &bus, out).await,
        Command::Lag(args) => lag::run(args, &bus, out).await,
        Command::Dlq(command) => dead_letters::run(command, &bus, out).await,
        Command::Keys(command) => keys::run(command, &bus, out).await,
        Command::Schedule(command) => schedule::run(command, &bus, out).await,
        Command::Whereabouts(args) => whereabouts::run(args, &bus, out).await,
        Command::Replay(args) => replay::run(args, &bus, out).await,
        Command::Health(args) => health::run(args, &bus, out).await,
    }?;
    bus.close().await?;
    Ok(outcome)
}

/// Refuses a file that is not there, which connecting would create: a misspelt name is no empty bus.
fn require_file(url: &str, command: &Command) -> anyhow::Result<()> {
    let creates = match command {
        Command::Publish(args) => args.create,
        Command::Topics(TopicsCommand::Apply(_)) => true,
        _ => false,
    };
    if creates || !url.starts_with("sqlite:") {
        return Ok(());
    }
    let path = SqliteConfig::from_url(url)?.path;
    ensure!(
        path.exists(),
        "there is no file {}: look at --url; `eventbus topics apply` and `eventbus publish --create` make one",
        path.display()
    );
    Ok(())
}

/// Whether this build cannot speak to the broker.
fn is_left_out(error: &eventbus::Error) -> bool {
    error.kind() == ErrorKind::Unsupported && error.to_string().contains("this build")
}

/// Whether the broker is the problem, not what was asked.
fn is_away(error: &eventbus::Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout)
}

/// Reads a topic's name.
fn topic(name: &str) -> Result<Topic, String> {
    Topic::new(name).map_err(|error| error.to_string())
}

/// Refuses topics that do not exist: on some brokers, looking at one would create it.
async fn require_topics(bus: &EventBus, topics: &[Topic]) -> anyhow::Result<()> {
    for topic in topics {
        let found = bus.describe_topics(std::slice::from_ref(topic)).await;
        found.with_context(|| {
            format!("the topic {topic} can't be used: `eventbus topics list` shows those there are")
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
