//! Goes through scenarios, round by round, until the time is over or enough messages were checked.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use fastrand::Rng;
use indicatif::HumanCount;
use tempfile::TempDir;
use tokio::sync::oneshot;

use crate::progress::Progress;
use crate::report::{Environment, Report};
use crate::results::{Part, Results};
use crate::round::{self, Outcome, Setting};
use crate::scenario::{self, Amount, RunsOn, Scenario};
use crate::server::Server;
use crate::simulated::Simulated;
use crate::site::Ground;
use crate::tally::{Tally, percentile};

/// A round that has less time than this is not begun.
const ROUND_MIN: Duration = Duration::from_secs(5);
/// Without `--minutes`, the number of messages is the bound.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
const POSTGRES: &str = "EVENTBUS_TEST_POSTGRES";

/// What is tried, on what, and for how long.
#[derive(Args, Clone, Debug)]
pub struct VerifyArgs {
    /// For how long all scenarios run together [default: 5, or no limit with --messages]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: Option<u64>,
    /// How many messages each scenario checks on each broker, if the time is enough
    #[arg(long)]
    messages: Option<u64>,
    /// As much of each scenario as the documentation promises; writes docs/verification.md, unless
    /// --report says otherwise
    #[arg(long, conflicts_with_all = ["minutes", "messages"])]
    full: bool,
    /// Decides what is published, who is harmed, when and how [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// On what it is tried, again and again: `sqlite`, `postgres://…`, `kafka`, `redis` or `rabbitmq`
    /// for a broker that is started for it and may be killed, or `kafka://…`, `redis://…`, `amqp://…`
    /// [default: sqlite, and the server that EVENTBUS_TEST_POSTGRES names]
    #[arg(long, value_name = "URL")]
    broker: Vec<String>,
    /// Which scenario is tried, again and again; `list` shows them all [default: all]
    #[arg(long, value_name = "NAME")]
    scenario: Vec<String>,
    /// Writes a report to this file
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Keeps what each scenario comes to in this file, with what is there of others, of which the
    /// report is made: so a full run need not be one run
    #[arg(long, value_name = "FILE")]
    results: Option<PathBuf>,
    /// Runs so many seeds of the simulation besides, and looks for every planted bug [default: 0, or
    /// 100000 with --full]
    #[arg(long, value_name = "SEEDS")]
    simulated: Option<u64>,
    /// Where the files of the rounds lie [default: the machine's directory for temporary files]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// How many messages each round has [default: what its scenario says]
    #[arg(long, value_name = "MESSAGES")]
    round: Option<u64>,
    /// Plants a bug, and so has to fail: handlers of `embedded` and `outbox` forget to write now and then
    #[arg(long)]
    plant: bool,
    /// Scenarios that cannot run on this machine are no failure
    #[arg(long)]
    allow_missing: bool,
}

/// Runs what was asked for; the exit code says whether everything held.
///
/// # Errors
///
/// When something cannot be started or read, and when it is interrupted.
pub async fn run(args: VerifyArgs) -> anyhow::Result<ExitCode> {
    if args.scenario.iter().any(|name| name == "list") {
        list();
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(data) = &args.data {
        std::fs::create_dir_all(data)
            .with_context(|| format!("make the directory {}", data.display()))?;
    }
    let running = Run::new(args)?;
    tokio::select! {
        outcome = running.go() => outcome,
        // All children are killed when their handles are dropped.
        () = eventbus::shutdown_signal() => anyhow::bail!("interrupted"),
    }
}

fn list() {
    for scenario in scenario::ALL {
        let on = match scenario.runs_on {
            RunsOn::All => "sqlite, postgres, kafka, redis, rabbitmq",
            RunsOn::Servers => "postgres, kafka, redis, rabbitmq",
            RunsOn::Postgres => "postgres",
            RunsOn::SqliteOnSmallDisk => "sqlite, as root",
        };
        let covers: Vec<String> = scenario.covers.iter().map(ToString::to_string).collect();
        let Scenario { name, about, .. } = scenario;
        println!(
            "{name:12} {about}\n{:12} on {on}; covers {}",
            "",
            covers.join(", ")
        );
    }
}

/// What was asked for.
struct Run {
    args: VerifyArgs,
    seed: u64,
    parts: Vec<(Scenario, Ground)>,
    total: Duration,
}

impl Run {
    fn new(args: VerifyArgs) -> anyhow::Result<Self> {
        let mut bases = Vec::new();
        for broker in &args.broker {
            bases.push(Ground::parse(broker)?);
        }
        if bases.is_empty() {
            bases.push(Ground::Sqlite);
            bases.extend(std::env::var(POSTGRES).ok().map(Ground::Postgres));
        }
        let scenarios = scenarios(&args.scenario)?;
        let parts: Vec<(Scenario, Ground)> = scenarios
            .iter()
            .flat_map(|scenario| bases.iter().map(|base| (*scenario, base.clone())))
            .filter(|(scenario, base)| scenario.can_run_on(base))
            .collect();
        ensure!(!parts.is_empty(), "none of these scenarios runs on that");
        let total = match (args.minutes, args.messages) {
            (Some(minutes), _) => Duration::from_secs(60 * minutes),
            (None, Some(_)) => LONGEST,
            (None, None) => Duration::from_secs(300),
        };
        Ok(Self {
            seed: args.seed.unwrap_or_else(|| fastrand::u64(0..1_000_000)),
            args,
            parts,
            total,
        })
    }

    async fn go(self) -> anyhow::Result<ExitCode> {
        eprintln!("seed {}", self.seed);
        let begun = Instant::now();
        let mut results = match &self.args.results {
            Some(file) => Results::read(file)?,
            None => Results::default(),
        };
        let commit = Environment::commit();
        let mut is_fine = true;
        if let Some(simulated) = self.simulate().await? {
            println!("{}", simulated.line());
            is_fine &= simulated.passed();
            results.simulated = Some(simulated);
        }
        let mut left = self.total;
        let mut shares: u32 = self.parts.iter().map(|(scenario, _)| scenario.share).sum();
        for (index, (scenario, base)) in self.parts.iter().enumerate() {
            // What others did not need is for those that follow.
            let share = left * scenario.share / shares;
            shares -= scenario.share;
            let (time, messages) = self.amount(scenario, base, share);
            let tally = self.part(index, scenario, base, time, messages).await;
            left = self.total.saturating_sub(begun.elapsed());
            println!("{}", line(&tally));
            for text in &tally.shown {
                println!("  {}", text.replace('\n', "\n  "));
            }
            is_fine &= tally.passed() || (self.args.allow_missing && tally.missing.is_some());
            results.add(Part {
                tally,
                command: self.command(),
                commit: commit.clone(),
            });
            // At once: what is known is not lost with what comes after it.
            if let Some(file) = &self.args.results {
                results.write(file)?;
            }
        }
        self.write_report(&results).await?;
        match is_fine {
            true => Ok(ExitCode::SUCCESS),
            false => Ok(ExitCode::FAILURE),
        }
    }

    /// Runs the simulation, where it is asked for.
    async fn simulate(&self) -> anyhow::Result<Option<Simulated>> {
        let usual = if self.args.full { 100_000 } else { 0 };
        let seeds = self.args.simulated.unwrap_or(usual);
        if seeds == 0 {
            return Ok(None);
        }
        let from = self.seed.wrapping_mul(1_000_000);
        // No task of the runtime: an interrupted run would wait for its end.
        let (tell, told) = oneshot::channel();
        std::thread::spawn(move || tell.send(Simulated::run(from, seeds)));
        Ok(Some(told.await.context("the simulation panicked")?))
    }

    async fn write_report(&self, results: &Results) -> anyhow::Result<()> {
        let usual = self
            .args
            .full
            .then(|| PathBuf::from("docs/verification.md"));
        let Some(file) = self.args.report.clone().or(usual) else {
            return Ok(());
        };
        let mut bases: Vec<&Ground> = self.parts.iter().map(|(_, base)| base).collect();
        bases.dedup();
        let report = Report {
            results,
            environment: &Environment::look(&bases).await,
        };
        std::fs::write(&file, report.to_markdown())
            .with_context(|| format!("write {}", file.display()))
    }

    /// What was asked for, without what is of this machine only.
    fn command(&self) -> String {
        let mut command = "dev/verify".to_owned();
        let mut add = |name: &str, value: Option<String>| {
            let said = value.map(|value| format!(" --{name} {value}"));
            command.extend(said.map(|said| said.trim_end().to_owned()));
        };
        add(
            "minutes",
            self.args.minutes.map(|minutes| minutes.to_string()),
        );
        add(
            "messages",
            self.args.messages.map(|messages| messages.to_string()),
        );
        add(
            "round",
            self.args.round.map(|messages| messages.to_string()),
        );
        let bases = self.args.broker.iter().map(|broker| Ground::parse(broker));
        for base in bases.flatten() {
            add("broker", Some(base.as_said()));
        }
        for scenario in &self.args.scenario {
            add("scenario", Some(scenario.clone()));
        }
        add(
            "simulated",
            self.args.simulated.map(|seeds| seeds.to_string()),
        );
        add("seed", Some(self.seed.to_string()));
        command
    }

    /// The rounds of one scenario on one broker.
    async fn part(
        &self,
        index: usize,
        scenario: &Scenario,
        base: &Ground,
        time: Duration,
        enough: Option<u64>,
    ) -> Tally {
        let mut tally = Tally::new(scenario.name, base.name());
        if scenario.runs_on == RunsOn::SqliteOnSmallDisk && !rustix::process::geteuid().is_root() {
            tally.missing = Some("only root may mount a disk".to_owned());
            return tally;
        }
        let shown = Progress::new(format!("{} on {}", scenario.name, base.name()));
        let server = match self.server(base).await {
            Ok(server) => server,
            Err(error) => {
                tally.fail(self.seed, &error);
                return tally;
            }
        };
        let deadline = Instant::now() + time;
        let mut rounds = self.rounds(index);
        loop {
            let (number, seed) = rounds.next();
            let turn = Turn {
                scenario,
                base,
                server: server.as_ref(),
                number,
                seed,
                deadline,
                missing: enough.map(|enough| enough.saturating_sub(tally.messages.total())),
            };
            match self.round(turn, &tally, &shown).await {
                Ok(outcome) => tally.add(seed, &outcome),
                Err(error) => {
                    tally.fail(seed, &error);
                    eprintln!("{}", again(scenario, base, seed));
                }
            }
            let is_enough = enough.is_some_and(|enough| tally.messages.total() >= enough);
            if is_enough || !tally.passed() || Instant::now() + ROUND_MIN >= deadline {
                break;
            }
        }
        shown.finish();
        tally
    }

    /// Starts the broker of a scenario, where it is one of the campaign's own.
    async fn server(&self, base: &Ground) -> anyhow::Result<Option<Arc<Server>>> {
        let Ground::Own(product) = base else {
            return Ok(None);
        };
        let server = Server::start(*product, self.args.data.as_deref()).await?;
        Ok(Some(Arc::new(server)))
    }

    /// For how long a scenario runs, and how many messages are enough.
    fn amount(
        &self,
        scenario: &Scenario,
        base: &Ground,
        share: Duration,
    ) -> (Duration, Option<u64>) {
        match (self.args.full, scenario.full_on(base)) {
            (false, _) => (share, self.args.messages),
            (true, Amount::Messages(messages)) => (LONGEST, Some(messages)),
            (true, Amount::Minutes(minutes)) => (Duration::from_secs(60 * minutes), None),
        }
    }

    fn rounds(&self, index: usize) -> Rounds {
        Rounds {
            seed: self.seed,
            next: (index * 10_000) as u32,
            seeds: Rng::with_seed(self.seed.wrapping_add(index as u64)),
            is_first: true,
        }
    }

    /// One round; its files are kept if something went wrong.
    async fn round(
        &self,
        turn: Turn<'_>,
        tally: &Tally,
        shown: &Progress,
    ) -> anyhow::Result<Outcome> {
        let Turn {
            scenario,
            base,
            server,
            number,
            seed,
            deadline,
            missing,
        } = turn;
        let mut plan = (scenario.plan)(base);
        plan.messages = self.args.round.unwrap_or(plan.messages);
        if let Some(missing) = missing {
            plan.messages = plan.messages.min(missing);
        }
        let place = self.place()?;
        let setting = Setting {
            base: match (server, base.product()) {
                (Some(server), Some(product)) => Ground::Broker(product, server.url().to_owned()),
                _ => base.clone(),
            },
            server: server.cloned(),
            directory: place.path().to_owned(),
            seed,
            deadline,
            number,
            has_bug: self.args.plant,
        };
        let (done, harmed) = (tally.messages.total(), tally.faults_total());
        let progress = |messages, faults| shown.tell(done + messages, harmed + faults);
        match round::run(plan, setting, progress).await {
            Ok(outcome) if outcome.passed() => Ok(outcome),
            Ok(outcome) => {
                let kept = keep(place, server);
                std::fs::write(kept.join("report.md"), outcome.report.to_markdown())?;
                let (name, kept) = (scenario.name, kept.display());
                eprintln!("{name} FAILED: files, logs and ledger are in {kept}");
                eprintln!("{}", again(scenario, base, seed));
                Ok(outcome)
            }
            Err(error) => {
                let kept = keep(place, server);
                Err(error.context(format!("files, logs and ledger are in {}", kept.display())))
            }
        }
    }

    fn place(&self) -> anyhow::Result<TempDir> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("eventbus-verify-");
        match &self.args.data {
            Some(data) => builder.tempdir_in(data),
            None => builder.tempdir(),
        }
        .context("make a directory for the files of a round")
    }
}

/// Keeps the files of a round, and what its broker has logged until now.
fn keep(place: TempDir, server: Option<&Arc<Server>>) -> PathBuf {
    let kept = place.keep();
    if let Some(server) = server {
        // The broker itself is removed. What cannot be copied is missed by whoever looks for it.
        drop(std::fs::copy(server.log(), kept.join("broker.log")));
    }
    kept
}

/// The next round of a scenario.
#[derive(Clone, Copy)]
struct Turn<'a> {
    scenario: &'a Scenario,
    base: &'a Ground,
    /// The broker, where it is one of the campaign's own.
    server: Option<&'a Arc<Server>>,
    number: u32,
    seed: u64,
    deadline: Instant,
    /// How many messages are enough, with those before.
    missing: Option<u64>,
}

/// Numbers the rounds of a scenario, and gives each a seed.
struct Rounds {
    seed: u64,
    next: u32,
    seeds: Rng,
    is_first: bool,
}

impl Rounds {
    fn next(&mut self) -> (u32, u64) {
        let number = self.next;
        self.next += 1;
        // The first is that of the command line, so that one round can be repeated.
        let is_first = std::mem::take(&mut self.is_first);
        let seed = match is_first {
            true => self.seed,
            false => self.seeds.u64(0..1_000_000),
        };
        (number, seed)
    }
}

fn scenarios(names: &[String]) -> anyhow::Result<Vec<Scenario>> {
    if names.is_empty() {
        return Ok(scenario::ALL.to_vec());
    }
    let find = |name: &String| {
        let found = scenario::ALL.iter().find(|scenario| scenario.name == name);
        let found = found.copied();
        found.with_context(|| format!("there is no scenario {name}: --scenario list shows them"))
    };
    names.iter().map(find).collect()
}

/// The command that does the same again.
fn again(scenario: &Scenario, base: &Ground, seed: u64) -> String {
    let broker = base.as_said();
    let name = scenario.name;
    format!("again: dev/verify --scenario {name} --broker {broker} --seed {seed}")
}

/// What a scenario came to, in a line.
fn line(tally: &Tally) -> String {
    let Tally { scenario, base, .. } = tally;
    if let Some(why) = &tally.missing {
        return format!("{scenario} on {base}: not run, {why}");
    }
    let outcome = match tally.passed() {
        true => "passed".to_owned(),
        false => format!(
            "FAILED, {} violations, {} complaints",
            tally.violations, tally.complaints
        ),
    };
    let seconds = |percent| {
        let time = percentile(&tally.recoveries, percent).unwrap_or_default();
        format!("{:.2} s", time.as_secs_f64())
    };
    let messages = tally.messages.total();
    let rate = messages as f64 / (tally.lasted + tally.drained).as_secs_f64().max(0.001);
    format!(
        "{scenario} on {base}: {outcome}; {} messages, {rate:.0}/s, {} faults, {} duplicates on the wire, \
         recovery {} (p50) {} (p99) {} (max), {} rounds",
        HumanCount(messages),
        HumanCount(tally.faults_total()),
        HumanCount(tally.duplicates),
        seconds(50),
        seconds(99),
        seconds(100),
        tally.seeds.len(),
    )
}
