//! The crash campaign: a shop that is killed over and over while clients place orders, and a checker
//! that finds out whether anything was lost, done twice or done in the wrong order.
//!
//! ```text
//!  campaign ── POST /orders ─▶ shop (one process or two) ── calls ─▶ fake providers
//!     │                          ▲ SIGKILL, SIGTERM, or an abort at a named step; started again
//!     └── heal, drain ── reads ─▶ topics, journals, ledgers, stock ─▶ what does not add up
//! ```
//!
//! The campaign itself and the files survive; only processes die, so this proves nothing about a
//! power cut.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use eventbus::prelude::{Event as _, EventBus, Redrive};
use fastrand::Rng;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use tokio::time::sleep;

use crate::brokers::{BrokerArgs, connect};
use crate::crash_point::CrashPoint;
use crate::data_dir::DataDir;
use crate::database::Database;
use crate::databases::{Databases, StoreArgs};
use crate::demo::order_book::{End, OrderBook};
use crate::events::InventoryReserved;
use crate::process::Shape;
use crate::shop::{self, Service};

mod check;
mod journal;
mod load;
mod operator;
mod victim;
mod witnesses;

use check::Verdict;
use journal::{Journal, Note};
use load::Load;
use operator::Operator;
use victim::Yard;
use witnesses::{PAYMENT, Witnesses};

/// Every named step from handling to publishing, of dead-lettering and of settling, and at which of
/// its first so many times it is crashed.
const STEPS: [(&str, u64); 23] = [
    ("handle.before", OFTEN),
    ("unit.inbox.before", OFTEN),
    ("unit.inbox.after", OFTEN),
    ("shop.write.before", OFTEN),
    ("shop.write.after", OFTEN),
    ("handle.after", OFTEN),
    ("unit.outbox.before", OFTEN),
    ("unit.outbox.after", OFTEN),
    ("unit.commit.before", OFTEN),
    ("unit.commit.after", OFTEN),
    ("settle.before", OFTEN),
    ("settle.after", OFTEN),
    ("relay.next.after", OFTEN),
    // The broker's acknowledgement comes between the two.
    ("publish.before", OFTEN),
    ("publish.after", OFTEN),
    ("relay.remove.before", OFTEN),
    ("relay.remove.after", OFTEN),
    // Of whatever is in a database, the broker's topics and positions included.
    ("sql.commit.before", OFTEN),
    ("sql.commit.after", OFTEN),
    ("dead_letter.before", RARELY),
    ("dead_letter.after", RARELY),
    ("park.before", RARELY),
    ("park.after", RARELY),
];
/// What happens with each order, and what happens with those that need a person.
const OFTEN: u64 = 40;
const RARELY: u64 = 2;
/// Until it is healed, the payment provider does not know cards of the first kind, whose orders
/// become dead letters, and looks into those of the second, whose orders are held and then parked.
/// What is left of both is tried again then. One order in so many has such a card.
const REFUSED: &str = "9999";
const REVIEWED: &str = "9998";
const ODD_CARD_EVERY: usize = 8;
/// A step that was not reached for so long is not going to be.
const STEP_WITHIN: Duration = Duration::from_secs(30);
/// How often is asked whether everything is settled, and how often the answer has to be yes.
const GLANCE: Duration = Duration::from_millis(50);
const QUIET_PASSES: u32 = 5;
/// Without anything being settled for so long, the rest never is.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long orders go on being placed after the last crash.
const AFTERWARDS: Duration = Duration::from_secs(1);

/// What the campaign does.
#[derive(Args, Clone, Debug)]
pub struct CampaignArgs {
    /// How often a process is killed at a random moment
    #[arg(long, default_value_t = 20)]
    kills: u32,
    /// How often a process is told to stop at a random moment
    #[arg(long, default_value_t = 0)]
    terms: u32,
    /// How often the process is crashed at each named step
    #[arg(long, default_value_t = 1)]
    steps: u32,
    /// How the services are spread over processes
    #[arg(long, value_enum, default_value_t = Shape::Single)]
    shape: Shape,
    /// Decides who orders what, who is killed, and when
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Orders a second
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: u32,
    #[command(flatten)]
    broker: BrokerArgs,
    #[command(flatten)]
    store: StoreArgs,
}

/// How one process ends.
#[derive(Clone, Debug)]
enum Round {
    /// Killed after so long.
    Kill(Duration),
    /// Told to stop when it has run for so long.
    Term(Duration),
    /// Aborted by itself at a step.
    Step(CrashPoint),
    /// A provider is killed instead.
    Provider,
}

/// Runs the campaign; the exit code says whether everything adds up.
///
/// # Errors
///
/// When something cannot be started or read.
pub async fn run(mut args: CampaignArgs) -> anyhow::Result<ExitCode> {
    let data = DataDir::temporary()?;
    args.store = args.store.fresh()?;
    args.broker = args.broker.fresh();
    let databases = args.store.databases(data.path())?;
    let verdict = campaign(&args, &data, &databases).await;
    match &verdict {
        Ok(verdict) => println_to_stdout(&verdict.to_string())?,
        Err(error) => eprintln!("error: {error:#}"),
    }
    if matches!(&verdict, Ok(verdict) if verdict.complaints.is_empty()) {
        databases.remove(Service::names()).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let files = data.keep();
    let again: Vec<String> = std::env::args().skip(1).collect();
    eprintln!(
        "\nall files, logs and the journal are in {}, what the services know in {databases}",
        files.display()
    );
    eprintln!(
        "again: ecommerce {} # the seed is {}",
        again.join(" "),
        args.seed
    );
    Ok(ExitCode::FAILURE)
}

/// Goes through all rounds, lets the shop come to rest, and asks everybody.
async fn campaign(
    args: &CampaignArgs,
    data: &DataDir,
    databases: &Databases,
) -> anyhow::Result<Verdict> {
    let mut random = Rng::with_seed(args.seed);
    let rounds = rounds(args, &mut random);
    let journal = Arc::new(Journal::create(&data.path().join("campaign.journal"))?);
    let mut yard = Yard::open(args, data.path(), Arc::clone(&journal)).await?;
    let book = book(args, rounds.len());
    let load = Load::start(
        &yard.gateway_url(),
        Arc::clone(&book),
        args.rate,
        Arc::clone(&journal),
    );

    let broker = args.broker.config(data.path(), &args.store);
    let operator = Operator::start(&broker, args.seed, Arc::clone(&journal));
    let bar = progress_bar(rounds.len());
    let mut crashes = BTreeMap::new();
    for round in rounds {
        journal.note(Note::Round(&format!("{round:?}")));
        match round {
            Round::Kill(after) => yard.kill_one(&mut random, after).await?,
            Round::Term(after) => yard.stop_one(&mut random, after).await?,
            Round::Provider => yard.kill_provider(&mut random).await?,
            Round::Step(point) => {
                let reached = yard.crash_at(&point, STEP_WITHIN).await?;
                *crashes.entry(point.step).or_default() += u32::from(reached);
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();

    sleep(AFTERWARDS).await;
    operator.finish().await?;
    yard.heal().await?;
    let told = load.finish().await?;
    let bus = connect(&broker).await?;
    let (redriven, stuck) = drain(&bus, &witnesses::connect(databases).await?).await?;
    yard.stop_all().await?;
    let witnesses = Witnesses::hear(&bus, &yard, databases).await?;
    bus.close().await?;
    let mut verdict = Verdict::of(&book, &told, &witnesses);
    verdict.complaints.extend(stuck);
    verdict.complaints.extend(yard.complaints().iter().cloned());
    let unreached = crashes.iter().filter(|(_, times)| **times == 0);
    let unreached = unreached.map(|(step, _)| format!("the step {step} was never reached"));
    verdict.complaints.extend(unreached);
    verdict.crashes = crashes;
    verdict.restarts = yard.restarts();
    verdict.redriven = redriven;
    Ok(verdict)
}

/// Waits until nothing is left to be handled, and gives the dead letters to their service again;
/// says how many these were, and what never ended.
async fn drain(bus: &EventBus, databases: &[Database]) -> anyhow::Result<(usize, Option<String>)> {
    let mut redriven = 0;
    loop {
        if let Some(stuck) = settled(bus, databases).await? {
            return Ok((redriven, Some(stuck)));
        }
        let more = redrive(bus).await?;
        if more == 0 {
            return Ok((redriven, None));
        }
        redriven += more;
    }
}

/// Waits until everything that was committed is published and settled, and says what never is.
async fn settled(bus: &EventBus, databases: &[Database]) -> anyhow::Result<Option<String>> {
    // It grows, too: who handles an event publishes the next ones.
    let (mut last, mut since) = (u64::MAX, Instant::now());
    // An event may have moved on from a topic not yet asked to one that was asked already.
    let mut passes = 0;
    while passes < QUIET_PASSES {
        let lag = witnesses::lag(bus, databases).await?;
        passes = if lag == 0 { passes + 1 } else { 0 };
        if lag != last {
            (last, since) = (lag, Instant::now());
        }
        if since.elapsed() > PATIENCE && lag > 0 {
            return Ok(Some(format!("{lag} events are never settled")));
        }
        sleep(GLANCE).await;
    }
    Ok(None)
}

/// What happens, in which order: the seed decides.
fn rounds(args: &CampaignArgs, random: &mut Rng) -> Vec<Round> {
    let mut rounds = Vec::new();
    for _ in 0..args.kills {
        // Some die while they start.
        let longest = if random.u32(0..5) == 0 { 100 } else { 1500 };
        rounds.push(Round::Kill(Duration::from_millis(random.u64(0..longest))));
        if random.u32(0..20) == 0 {
            rounds.push(Round::Provider);
        }
    }
    for _ in 0..args.terms {
        rounds.push(Round::Term(Duration::from_millis(random.u64(100..1500))));
    }
    for (step, times) in STEPS {
        for _ in 0..args.steps {
            rounds.push(Round::Step(CrashPoint {
                step: step.to_owned(),
                time: random.u64(1..=times),
            }));
        }
    }
    random.shuffle(&mut rounds);
    rounds
}

/// More orders than can be placed while all this happens.
fn book(args: &CampaignArgs, rounds: usize) -> Arc<OrderBook> {
    let seconds = 60 + 20 * rounds as u32;
    let orders = args.rate.saturating_mul(seconds).min(100_000);
    let mut book = OrderBook::write(orders, args.seed, &format!("campaign-{}", args.seed));
    book.posts
        .retain(|post| !matches!(post.end, End::Refused(_)));
    let odd = book.posts.iter_mut().step_by(ODD_CARD_EVERY);
    for (post, card) in odd.zip([REFUSED, REVIEWED].into_iter().cycle()) {
        if post.end == End::Shipped {
            post.body = with_card(&post.body, card);
        }
    }
    Arc::new(book)
}

/// The same order with a card whose token ends like this.
fn with_card(body: &str, suffix: &str) -> String {
    let mut order: Value = serde_json::from_str(body).expect("the book writes JSON");
    order["card"] = format!("tok_{suffix}").into();
    order.to_string()
}

/// Gives the payment service what it could not handle again, now that the provider is healed; says
/// how much that was.
async fn redrive(bus: &EventBus) -> anyhow::Result<usize> {
    let topics = [InventoryReserved::TOPIC];
    let desk = bus.dead_letters(PAYMENT, &topics)?;
    let redrive = Redrive::all()
        .by("campaign")
        .because("the provider is healed");
    let report = desk
        .redrive(redrive)
        .await
        .context("re-drive the dead letters")?;
    let mut again = usize::try_from(report.done)?;
    for held in shop::held(bus, PAYMENT).await? {
        if witnesses::waits_for_us(&held) {
            let retry = bus.held_keys(PAYMENT)?;
            let because = "the provider is healed";
            again += usize::from(retry.retry(&held.held, "campaign", because).await?);
        }
    }
    Ok(again)
}

fn println_to_stdout(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;

    writeln!(std::io::stdout(), "{text}").context("write to stdout")
}

/// Shown on a terminal only.
fn progress_bar(rounds: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} rounds, {elapsed}");
    let bar = ProgressBar::new(rounds as u64);
    match style {
        Ok(style) => bar.with_style(style),
        // The bar is decoration: its default style will do.
        Err(_) => bar,
    }
}
