//! The arguments that all subcommands share, and which subcommands there are.

use clap::{Parser, Subcommand};

use crate::command::dead_letters::DeadLettersCommand;
use crate::command::health::HealthArgs;
use crate::command::keys::KeysCommand;
use crate::command::lag::LagArgs;
use crate::command::publish::PublishArgs;
use crate::command::replay::ReplayArgs;
use crate::command::schedule::ScheduleCommand;
use crate::command::tail::TailArgs;
use crate::command::topics::TopicsCommand;
use crate::command::whereabouts::WhereaboutsArgs;

/// Publishes, follows, finds, replays and operates the events of an event bus.
#[derive(Clone, Debug, Parser)]
#[command(name = "eventbus", version, after_help = AFTER_HELP, max_term_width = 100)]
pub(crate) struct Cli {
    /// The broker, such as sqlite://shop.db; a password in it is never shown
    #[arg(
        long,
        env = "EVENTBUS_URL",
        hide_env_values = true,
        global = true,
        help_heading = EVERYWHERE
    )]
    pub(crate) url: Option<String>,
    /// Where keys are held and events wait for their time, for a broker that keeps neither, such as
    /// postgres://db/shop: what the services have as EVENTBUS_STORE
    #[arg(
        long,
        env = "EVENTBUS_STORE",
        hide_env_values = true,
        global = true,
        help_heading = EVERYWHERE
    )]
    pub(crate) store: Option<String>,
    /// Answer in JSON for scripts: one document, or one a line where there are many
    #[arg(long, global = true, help_heading = EVERYWHERE)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The options that every subcommand takes, apart from its own.
const EVERYWHERE: &str = "Everywhere";

const AFTER_HELP: &str = "\
Start here:
  export EVENTBUS_URL=sqlite://shop.db
  eventbus topics list                      what topics there are
  eventbus tail order-events                follow what is published
  eventbus whereabouts order-events 42      where the events of order 42 are
  eventbus lag                              how far behind everybody is
  eventbus keys parked                      what waits behind an event that can't be handled
  eventbus dlq list                         what could not be handled, and why
  eventbus schedule list                    what waits for its time

Topics and groups are named as they are on the broker: with the prefix, where services have one.

Exit codes:
  0  done
  1  it failed; the message says what to do
  2  the command line is wrong
  3  it is not as it should be: topics differ from their file, or something is not healthy";

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Command {
    /// Publish events from an argument, a file or standard input
    Publish(PublishArgs),
    /// Follow topics, or look at what is on them
    Tail(TailArgs),
    /// Create topics, compare them with their file, list them
    #[command(subcommand)]
    Topics(TopicsCommand),
    /// Show how far groups are behind
    Lag(LagArgs),
    /// Look at messages that could not be handled, and decide about them
    #[command(subcommand)]
    Dlq(DeadLettersCommand),
    /// Look at keys that wait behind an event that can't be handled, and decide about them
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Look at events that wait for their time, and take them back
    #[command(subcommand)]
    Schedule(ScheduleCommand),
    /// Find the events of a key and what each group did with them
    Whereabouts(WhereaboutsArgs),
    /// Give a group events of the past again
    Replay(ReplayArgs),
    /// Ask whether the broker answers and everybody keeps up
    Health(HealthArgs),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_subcommand_teaches_by_examples() {
        fn check(command: &clap::Command) {
            if command.get_subcommands().next().is_none() {
                let help = command.get_after_help().map(ToString::to_string);
                let name = command.get_name();
                let teaches = help.is_some_and(|help| help.contains("eventbus "));
                assert!(teaches, "{name} has no examples");
            }
            command.get_subcommands().for_each(check);
        }
        Cli::command().get_subcommands().for_each(check);
    }
}
