//! `eventbus`: the command line. Arguments are in `cli.rs`, each subcommand is a file of `command/`.

mod cli;
mod command;
mod output;
mod place;
mod record;
mod secret;

use std::io;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use cli::Cli;
use output::Output;

/// What a command found out; an error is apart from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// All is as asked.
    Done,
    /// It is not: topics differ from their file, or something is not healthy.
    NotAsItShouldBe,
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => Self::SUCCESS,
            Outcome::NotAsItShouldBe => Self::from(3),
        }
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let warnings = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(warnings)
        .with_writer(io::stderr)
        .without_time()
        .with_target(false)
        .init();
    match run(cli) {
        Ok(outcome) => outcome.into(),
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("eventbus: {}", secret::hidden(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let mut stdout = io::stdout();
    runtime.block_on(command::run(
        cli.clone(),
        &mut Output::new(cli.json, &mut stdout),
    ))
}

/// Prints help, or what is wrong with the arguments without a password that stands among them.
fn refuse(error: &clap::Error) -> ExitCode {
    let text = error.render();
    match error.use_stderr() {
        true => eprint!("{}", secret::hidden(&text.to_string())),
        false => {
            // A reader that left before the end of the help has seen enough.
            let _ = error.print();
        }
    }
    // clap's codes are 0 and 2.
    ExitCode::from(error.exit_code().unsigned_abs() as u8)
}

/// Whether the reader of the output has left, such as `head`.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let causes = error.chain();
    causes
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
