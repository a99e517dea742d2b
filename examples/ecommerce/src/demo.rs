//! The demo: everything started, an order book placed over HTTP, one order's events shown, and a
//! summary that must add up.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use eventbus::prelude::EventBus;
use indicatif::{ProgressBar, ProgressStyle};

use crate::data_dir::DataDir;
use crate::databases::{Databases, StoreArgs};
use crate::fake::{FakeProcess, ask, ledger_of};
use crate::shop::{Service, Shop, Surroundings, broker_url, connect, lives_in_process};

mod checkout;
mod history;
pub mod order_book;
mod summary;
mod timeline;

use checkout::Checkout;
use history::History;
use order_book::OrderBook;
use summary::{Findings, Summary};

/// Without any order ending for so long, the rest counts as unfinished.
const PATIENCE: Duration = Duration::from_secs(30);

/// About twice what the events of one order take on the in-memory broker.
const ORDER_BYTES: usize = 32 * 1024;
const EVENT_BYTES_MIN: usize = 16 * 1024 * 1024;

/// What the demo does.
#[derive(Args, Debug)]
pub struct DemoArgs {
    /// How many orders to place; some that must be refused come on top
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    orders: u32,
    /// Decides who orders what and which calls the payment provider fails at first
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Makes the last line of stdout one JSON object; everything else goes to stderr
    #[arg(long)]
    json: bool,
    /// The broker on which the services meet, such as `memory:` [default: the embedded one, an
    /// SQLite file among the others]
    #[arg(long, value_name = "URL")]
    broker: Option<String>,
    #[command(flatten)]
    store: StoreArgs,
    /// A new directory for the services' files, to look into afterwards [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Places so many orders a second, whether earlier ones have ended or not; without it, the next
    /// is placed when an earlier one ends
    #[arg(long, value_name = "ORDERS", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: Option<u32>,
    /// Lets the payment provider never be busy or slow, to measure the shop without it
    #[arg(long)]
    calm: bool,
}

/// Runs the demo; the exit code says whether it adds up.
///
/// # Errors
///
/// When something cannot be started or asked.
pub async fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    let data = data_dir(args.data.clone())?;
    // What a shop did before would not add up with this run.
    let databases = args.store.fresh()?.databases(data.path())?;
    let outcome = run_in(&args, data.path(), &databases).await;
    match data {
        DataDir::Kept(_) => eprintln!("the services' data are in {databases}"),
        DataDir::Temporary(_) => {
            let removed = databases.remove(Service::names()).await;
            // What went wrong first says more.
            return outcome.and_then(|code| removed.map(|()| code));
        }
    }
    outcome
}

async fn run_in(args: &DemoArgs, data: &Path, databases: &Databases) -> anyhow::Result<ExitCode> {
    let bus = connect(&broker(args, data)).await?;
    let book = OrderBook::write(args.orders, args.seed, &run_name(&bus, args.seed));
    let book = Arc::new(book);
    let (psp, mailer) = start_fakes(args, data).await?;
    let surroundings = Surroundings {
        databases: databases.clone(),
        port: 0,
        psp_url: Some(psp.url.clone()),
        mailer_url: Some(mailer.url.clone()),
        stock: book.stock.clone(),
    };
    let (shop, service) = Shop::open(&bus, Service::value_variants(), surroundings).await?;
    let mut shown = None;
    let show = async { shown = Some(show(args, &bus, &shop, &book, [&psp, &mailer]).await) };
    service.run_until(show).await.context("run the shop")?;
    let (drawings, summary) = shown.context("the shop ended before the demo did")??;

    let mut out: Box<dyn Write + Send> = match args.json {
        true => Box::new(std::io::stderr()),
        false => Box::new(std::io::stdout()),
    };
    writeln!(out, "{drawings}{summary}")?;
    if args.json {
        let line = serde_json::to_string(&summary.line())?;
        writeln!(std::io::stdout(), "{line}")?;
    }
    Ok(match summary.complaints.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Places the orders, waits for their ends and asks everybody: two orders drawn, and the summary.
async fn show(
    args: &DemoArgs,
    bus: &EventBus,
    shop: &Shop,
    book: &Arc<OrderBook>,
    [psp, mailer]: [&FakeProcess; 2],
) -> anyhow::Result<(String, Summary)> {
    let bar = progress_bar(args.orders);
    let gateway = shop.gateway_url.as_deref();
    let gateway = gateway.context("the demo runs a gateway")?;
    let board = shop.board.clone().context("the demo runs a gateway")?;
    let warehouse = shop.warehouse.clone().context("the demo has stock")?;
    let checkout = Checkout::place_all(gateway, book, &board, args.rate, &bar).await?;
    bar.set_message("waiting for the ends");
    let unfinished = board.wait_until_open(0, PATIENCE).await?;
    bar.finish_and_clear();

    let history = History::read(bus).await?;
    let findings = Findings {
        psp: ask(&psp.url).await?,
        mailer: ask(&mailer.url).await?,
        unfinished,
        dead_letters: shop.dead_letters().await?,
        orders: checkout.look_up(&board).await?,
        on_shelf: warehouse.on_shelf().await?,
        set_aside: warehouse.set_aside().await?,
    };
    let summary = Summary::of(book, &checkout, &history, &findings);
    let shown = checkout.one_of_each_end(book, &findings.orders);
    let drawings = shown.into_iter().map(|(title, order_id)| {
        let drawing = timeline::draw(&history.of(order_id));
        format!("{title}: {order_id}\n{drawing}\n")
    });
    Ok((drawings.collect(), summary))
}

/// The in-memory broker gets room for all events of the run, to be able to show and count them.
fn broker(args: &DemoArgs, data: &Path) -> String {
    match args.broker.as_deref() {
        Some("memory:") => format!(
            "memory:?bytes={}",
            EVENT_BYTES_MIN + args.orders as usize * ORDER_BYTES
        ),
        named => broker_url(named, data),
    }
}

/// Names the run's idempotency keys: the same seed places the same orders, but a broker that
/// outlives the run has to see other orders every time.
fn run_name(bus: &EventBus, seed: u64) -> String {
    match lives_in_process(bus) {
        true => format!("demo-{seed}"),
        false => format!("demo-{seed}-{}", uuid::Uuid::now_v7()),
    }
}

/// An empty directory: what a shop did before would not add up with this run.
fn data_dir(path: Option<PathBuf>) -> anyhow::Result<DataDir> {
    let Some(path) = path else {
        return DataDir::temporary();
    };
    let data = DataDir::open(path)?;
    let is_empty = std::fs::read_dir(data.path())?.next().is_none();
    anyhow::ensure!(
        is_empty,
        "{} is not empty: the demo needs a directory of its own, to be able to add up",
        data.path().display()
    );
    Ok(data)
}

async fn start_fakes(args: &DemoArgs, data: &Path) -> anyhow::Result<(FakeProcess, FakeProcess)> {
    let mut psp = ledger_of("fake-psp", data).to_vec();
    psp.extend(["--seed".into(), args.seed.to_string().into()]);
    psp.extend(args.calm.then(|| "--calm".into()));
    let psp = FakeProcess::start("fake-psp", &psp);
    let mailer = ledger_of("fake-mailer", data);
    let mailer = FakeProcess::start("fake-mailer", &mailer);
    tokio::try_join!(psp, mailer)
}

/// Shown on a terminal only.
fn progress_bar(orders: u32) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} orders, {elapsed}, {msg}");
    let bar = ProgressBar::new(u64::from(orders)).with_message("placing");
    match style {
        Ok(style) => bar.with_style(style),
        // The bar is decoration: its default style will do.
        Err(_) => bar,
    }
}
