//! Runs many seeds on all processors, and shows the least that breaks a promise.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use eventbus_simulation::{Case, Plant, Survey, Verdict};
use indicatif::{ProgressBar, ProgressStyle};

/// How often a seed that failed once is run again to find it: where tasks are ready at one moment,
/// the runtime starts one of them by chance.
const AGAIN: usize = 20;

/// The eventbus SDK in virtual time, under the faults that seeds decide.
///
/// Each seed is a run of a few seconds of virtual time: messages from calls, outboxes and a schedule,
/// members and relays that come, go and die, handlers that fail, a broker and a database that are
/// away, late, or do not answer. The promises of the SDK are checked on the ledger of each.
///
/// Exit code: 0 all were kept, 1 one was broken, 2 wrong use.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  eventbus-simulation --seeds 100000\n  eventbus-simulation --from 586 --seeds 1\n  eventbus-simulation --plants"
)]
struct Arguments {
    /// How many seeds
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first one
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Stop after so many minutes, whatever is left
    #[arg(long)]
    minutes: Option<u64>,
    /// Threads; by default one a processor
    #[arg(long)]
    threads: Option<std::num::NonZero<usize>>,
    /// Plant every known bug, and show which seed finds it; one that none finds is a failure
    #[arg(long)]
    plants: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.plants {
        true => find_plants(&arguments),
        false => run_seeds(&arguments),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{text}").context("write to stdout")
}

/// Runs seeds until one breaks a promise, all are done, or the time is up.
fn run_seeds(arguments: &Arguments) -> anyhow::Result<bool> {
    let begun = Instant::now();
    let limit = arguments
        .minutes
        .map(|minutes| Duration::from_secs(60 * minutes));
    let mut broken = None;
    let bar = progress_bar(arguments.seeds);
    let see = |case: &Case, verdict: &Verdict| {
        bar.inc(1);
        if !verdict.is_sound() {
            broken.get_or_insert_with(|| (case.clone(), verdict.clone()));
        }
        let is_late = limit.is_some_and(|limit| begun.elapsed() > limit);
        broken.is_none() && !is_late
    };
    let threads = arguments.threads.map(std::num::NonZero::get);
    let total = Survey::run(arguments.from, arguments.seeds, threads, see);
    bar.finish_and_clear();
    print(&format!(
        "{} seeds in {:.0?}: {} messages, {} effects, {} faults of the broker, {} other happenings",
        total.seeds,
        begun.elapsed(),
        total.messages,
        total.effects,
        total.faults,
        total.happenings
    ))?;
    match broken {
        None => {
            print("no promise was broken")?;
            Ok(true)
        }
        Some((case, verdict)) => {
            show(&case, &verdict)?;
            Ok(false)
        }
    }
}

/// Shows the least that breaks a promise, of what broke one.
fn show(case: &Case, verdict: &Verdict) -> anyhow::Result<()> {
    let seed = case.seed;
    print(&format!(
        "seed {seed} broke a promise:\n{verdict}\n\nshrinking it …"
    ))?;
    let broken = |case: &Case| {
        let mut verdicts = (0..AGAIN).map(|_| case.run(None));
        verdicts.find(|verdict| !verdict.is_sound())
    };
    let smallest = case.clone().shrink(|case| broken(case).is_some());
    match broken(&smallest) {
        Some(verdict) => print(&format!("the least that does: {smallest:#?}\n{verdict}"))?,
        None => print("it did not break it again: run the seed some more times")?,
    }
    print(&format!(
        "again: eventbus-simulation --from {seed} --seeds 1"
    ))
}

fn find_plants(arguments: &Arguments) -> anyhow::Result<bool> {
    let mut all = true;
    for plant in Plant::ALL {
        let found = plant.found_by(arguments.from..arguments.from + arguments.seeds);
        match found {
            Some(seed) => print(&format!("seed {seed:>5} finds {plant}"))?,
            None => print(&format!("NO SEED finds {plant}"))?,
        }
        all &= found.is_some();
    }
    Ok(all)
}

/// Shown on a terminal only.
fn progress_bar(seeds: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} seeds, {elapsed}, {eta} left");
    let bar = ProgressBar::new(seeds);
    match style {
        Ok(style) => bar.with_style(style),
        // The bar is decoration: its default style will do.
        Err(_) => bar,
    }
}
