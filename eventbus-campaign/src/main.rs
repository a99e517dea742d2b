//! What `dev/verify` runs: the SDK under kills, stops, cuts and full disks, and what held under them.
#![allow(
    unreachable_pub,
    reason = "a program: nothing is reachable from outside, and `pub(crate)` everywhere reads worse"
)]

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

mod child;
mod crash_point;
mod meter;
mod plan;
mod prefixed;
mod probe;
mod process;
mod product;
mod progress;
mod recorded;
mod recording;
mod report;
mod results;
mod round;
mod scenario;
mod server;
mod simulated;
mod site;
mod store;
mod tally;
mod tried;
mod verify;
mod witness;

use child::append::AppendArgs;
use child::consume::ConsumeArgs;
use child::produce::ProduceArgs;
use child::relay::RelayArgs;
use crash_point::CrashPoint;
use verify::VerifyArgs;

/// Tries the eventbus SDK under faults, and checks what it promises.
///
/// Processes that publish, commit, relay and handle are killed, stopped and continued, cut off from
/// their server, or meet a full disk. A recorder writes down what each tried and what came of it.
/// When all is healed and drained, the checker looks for messages that are lost, doubled, out of
/// order or never sent. Exits with 1 when it finds one, keeps all files then, and says how to run
/// the same again.
#[derive(Debug, Parser)]
#[command(name = "dev/verify", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    role: Option<RoleCommand>,
    #[command(flatten)]
    verify: VerifyArgs,
}

/// What this program is when the harness starts it again.
#[derive(Debug, Subcommand)]
enum RoleCommand {
    #[command(hide = true)]
    Recorder(RecorderArgs),
    #[command(hide = true)]
    Produce(ProduceArgs),
    #[command(hide = true)]
    Append(AppendArgs),
    #[command(hide = true)]
    Relay(RelayArgs),
    #[command(hide = true)]
    Consume(ConsumeArgs),
}

#[derive(Args, Debug)]
struct RecorderArgs {
    ledger: PathBuf,
    socket: PathBuf,
    run: u32,
}

impl RoleCommand {
    fn crash_at(&self) -> Option<CrashPoint> {
        match self {
            Self::Recorder(_) => None,
            Self::Produce(args) => args.child.crash_at.clone(),
            Self::Append(args) => args.child.crash_at.clone(),
            Self::Relay(args) => args.child.crash_at.clone(),
            Self::Consume(args) => args.child.crash_at.clone(),
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let crash_at = cli.role.as_ref().and_then(RoleCommand::crash_at);
    start_logging(crash_at);
    let outcome = match cli.role {
        None => verify::run(cli.verify).await,
        Some(role) => play(role).await.map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}

async fn play(role: RoleCommand) -> anyhow::Result<()> {
    match role {
        RoleCommand::Recorder(args) => {
            return recording::record(&args.ledger, &args.socket, args.run);
        }
        _ => child::end_with_parent(),
    }
    match role {
        RoleCommand::Recorder(_) => Ok(()),
        RoleCommand::Produce(args) => child::produce::run(args).await,
        RoleCommand::Append(args) => child::append::run(args).await,
        RoleCommand::Relay(args) => child::relay::run(args).await,
        RoleCommand::Consume(args) => child::consume::run(args).await,
    }
}

/// Logs to stderr; `RUST_LOG` overrides what.
fn start_logging(crash_at: Option<CrashPoint>) {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("warn,sqlx::query=error,librdkafka=off,lapin=off"));
    let log = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_filter(filter);
    tracing_subscriber::registry()
        .with(log)
        .with(crash_at.map(CrashPoint::layer))
        .init();
}
