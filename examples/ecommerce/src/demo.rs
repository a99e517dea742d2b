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
use tokio::time::{Instant, sleep};

use crate::brokers::{BrokerArgs, connect};
use crate::data_dir::DataDir;
use crate::databases::{Databases, StoreArgs};
use crate::fake::{FakeProcess, ask, ledger_of};
use crate::process::{Shape, ShopProcess, Site, free_port};
use crate::shop::{Service, Shop, Surroundings, dead_letters, lives_in_process};

mod checkout;
mod history;
pub mod order_book;
mod summary;
mod timeline;

use checkout::Checkout;
use history::Watch;
use order_book::OrderBook;
use summary::{Findings, Summary};

/// Without any order ending for so long, the rest counts as unfinished.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a process may take to start, and how often its log is looked into.
const START_WITHIN: Duration = Duration::from_secs(60);
const GLANCE: Duration = Duration::from_millis(20);

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
    #[command(flatten)]
    broker: BrokerArgs,
    #[command(flatten)]
    store: StoreArgs,
    /// How the services are spread over processes
    #[arg(long, value_enum, default_value_t = Shape::Single)]
    shape: Shape,
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
pub async fn run(mut args: DemoArgs) -> anyhow::Result<ExitCode> {
    let data = data_dir(args.data.clone())?;
    // What a shop did before would not add up with this run.
    args.store = args.store.fresh()?;
    let databases = args.store.databases(data.path())?;
    // The in-memory broker gets room for all events of the run, to be able to show and count them.
    let room = EVENT_BYTES_MIN + args.orders as usize * ORDER_BYTES;
    args.broker = args.broker.fresh().with_room(room);
    if let Some(leftovers) = args.broker.leftovers() {
        eprintln!("{leftovers}");
    }
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
    let bus = connect(&args.broker.config(data, &args.store)).await?;
    let book = OrderBook::write(args.orders, args.seed, &run_name(&bus, args.seed));
    let book = Arc::new(book);
    let fakes = start_fakes(args, data).await?;
    let (drawings, summary) = match args.shape {
        Shape::Single => show_here(args, &bus, databases, &book, &fakes).await?,
        _ => show_elsewhere(args, data, &bus, databases, &book, &fakes).await?,
    };

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

/// Runs all services in this process, and shows them.
async fn show_here(
    args: &DemoArgs,
    bus: &EventBus,
    databases: &Databases,
    book: &Arc<OrderBook>,
    [psp, mailer]: &[FakeProcess; 2],
) -> anyhow::Result<(String, Summary)> {
    let surroundings = Surroundings {
        databases: databases.clone(),
        port: 0,
        psp_url: Some(psp.url.clone()),
        mailer_url: Some(mailer.url.clone()),
        stock: book.stock.clone(),
    };
    let (shop, service) = Shop::open(bus, Service::value_variants(), surroundings).await?;
    let mut shown = None;
    let show = async { shown = Some(show(args, bus, &shop, book, [psp, mailer]).await) };
    service.run_until(show).await.context("run the shop")?;
    shown.context("the shop ended before the demo did")?
}

/// Runs the services in processes of their own, and shows them.
async fn show_elsewhere(
    args: &DemoArgs,
    data: &Path,
    bus: &EventBus,
    databases: &Databases,
    book: &Arc<OrderBook>,
    [psp, mailer]: &[FakeProcess; 2],
) -> anyhow::Result<(String, Summary)> {
    anyhow::ensure!(
        !lives_in_process(bus),
        "`--shape` spreads the services over processes, but `memory:` lives inside one: leave one of \
         the two out"
    );
    let site = Site {
        data: data.to_owned(),
        broker: args.broker.clone(),
        store: args.store.clone(),
        port: free_port()?,
        psp_url: psp.url.clone(),
        mailer_url: mailer.url.clone(),
    };
    let shop = Shop::elsewhere(databases, site.gateway_url()).await?;
    let warehouse = shop.warehouse.as_ref().context("the demo has stock")?;
    // Before the inventory service puts what is usual on shelves that it finds empty.
    warehouse.deliver(bus, &book.stock).await?;
    let mut processes = Vec::new();
    for only in args.shape.processes() {
        let mut process = site.start(only, None)?;
        wait_until_open(&mut process).await?;
        processes.push(process);
    }
    let shown = show(args, bus, &shop, book, [psp, mailer]).await?;
    for process in &mut processes {
        let status = process.stop().await?;
        anyhow::ensure!(
            status.success(),
            "the process of {} ended with {status}",
            process.only
        );
    }
    Ok(shown)
}

async fn wait_until_open(process: &mut ShopProcess) -> anyhow::Result<()> {
    let deadline = Instant::now() + START_WITHIN;
    while !process.says_open()? {
        let ended = process.child.try_wait()?;
        if ended.is_some() || Instant::now() > deadline {
            let log = std::fs::read_to_string(process.log())?;
            anyhow::bail!("the process of {} does not open:\n{log}", process.only);
        }
        sleep(GLANCE).await;
    }
    Ok(())
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
    let watch = Watch::begin(bus).await?;
    let checkout = Checkout::place_all(gateway, book, &board, args.rate, &bar).await?;
    bar.set_message("waiting for the ends");
    let unfinished = board.wait_until_open(0, PATIENCE).await?;
    bar.finish_and_clear();

    let history = watch.end().await?;
    let findings = Findings {
        psp: ask(&psp.url).await?,
        mailer: ask(&mailer.url).await?,
        unfinished,
        dead_letters: dead_letters(bus).await?,
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

async fn start_fakes(args: &DemoArgs, data: &Path) -> anyhow::Result<[FakeProcess; 2]> {
    let mut psp = ledger_of("fake-psp", data).to_vec();
    psp.extend(["--seed".into(), args.seed.to_string().into()]);
    psp.extend(args.calm.then(|| "--calm".into()));
    let psp = FakeProcess::start("fake-psp", &psp);
    let mailer = ledger_of("fake-mailer", data);
    let mailer = FakeProcess::start("fake-mailer", &mailer);
    let (psp, mailer) = tokio::try_join!(psp, mailer)?;
    Ok([psp, mailer])
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
