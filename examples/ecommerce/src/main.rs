//! The reference system of eventbus: a shop of small services that talk through events only.
#![allow(
    unreachable_pub,
    reason = "a program: nothing is reachable from outside, and `pub(crate)` everywhere reads worse"
)]

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use eventbus::prelude::shutdown_signal;
use tracing::info;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

mod brokers;
mod campaign;
mod catalogue;
mod client;
mod crash_point;
mod data_dir;
mod database;
mod databases;
mod demo;
mod events;
mod fake;
mod process;
mod service;
mod shop;

use brokers::{BrokerArgs, connect};
use campaign::CampaignArgs;
use crash_point::CrashPoint;
use data_dir::DataDir;
use databases::StoreArgs;
use demo::DemoArgs;
use fake::FakeProcess;
use fake::mailer::MailerArgs;
use fake::psp::PspArgs;
use shop::{OPEN, Service, Shop, Surroundings, lives_in_process, usual_stock};

/// A shop of small services that talk through events only.
///
/// Six services share nothing but an event bus:
///
///   gateway ─ OrderCreated ▶ inventory ─ InventoryReserved ▶ payment ─ PaymentProcessed ▶
///   shipping ─ ShippingCreated ▶ notification ─ NotificationSent ▶ order ─ OrderShipped
///
/// Begin with `ecommerce demo`, which needs nothing else.
#[derive(Debug, Parser)]
#[command(name = "ecommerce", version, verbatim_doc_comment)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Places a thousand orders, shows one order's events, and checks that everything adds up
    ///
    /// Starts all services and two fake providers, places orders of which some fall short, are
    /// declined, come twice, or are refused, waits until each has ended, and prints a summary.
    /// Exits with 1 when stock, money or orders do not add up.
    Demo(DemoArgs),
    /// Runs the services until ctrl-c
    ///
    /// Then order something:
    ///
    ///   curl -i localhost:8080/orders -H 'content-type: application/json' -d '{
    ///     "customer": {"name": "Ada", "email": "ada@example.com"},
    ///     "card": "tok_4242", "items": [{"product": "teapot", "quantity": 1}]}'
    ///
    /// and follow the Location header of the answer.
    #[command(verbatim_doc_comment)]
    Run(RunArgs),
    /// Kills a shop over and over while orders are placed, and checks that nothing is lost
    ///
    /// Every order whose client saw a 202 must reach its end, be charged once and mailed once;
    /// stock and money must balance, and the events of an order stay in order. Exits with 1 when
    /// they do not, keeps all files then, and says how to run the same again.
    Campaign(CampaignArgs),
    /// Runs the fake payment provider until stdin closes
    ///
    /// POST /charges charges once per Idempotency-Key; GET /calls tells what it was asked.
    FakePsp(PspArgs),
    /// Runs the fake mail provider until stdin closes
    ///
    /// POST /mails sends once per Idempotency-Key; GET /calls tells what it was asked.
    FakeMailer(MailerArgs),
}

/// How the services run.
#[derive(Args, Debug)]
struct RunArgs {
    /// Where the services and the fake providers keep their files [default: ./ecommerce-data, or
    /// with `memory:` a temporary directory]
    #[arg(long, value_name = "DIR", verbatim_doc_comment)]
    data: Option<PathBuf>,
    #[command(flatten)]
    broker: BrokerArgs,
    #[command(flatten)]
    store: StoreArgs,
    /// The gateway's port on loopback; 0 takes a free one
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// How long the shop goes on taking orders when it is told to stop, so that those who watch
    /// `/readyz` send no more; six seconds at most
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    notice: u64,
    /// Only these services, such as `order,payment`; needs a broker that processes can share
    #[arg(long, value_delimiter = ',')]
    only: Vec<Service>,
    /// Aborts at the Nth time that a named step is reached, for the crash campaign
    #[arg(long, value_name = "STEP:N", hide = true)]
    crash_at: Option<CrashPoint>,
    /// A payment provider that is running already; otherwise a fake one is started
    #[arg(long, value_name = "URL")]
    psp: Option<String>,
    /// A mail provider that is running already; otherwise a fake one is started
    #[arg(long, value_name = "URL")]
    mailer: Option<String>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let (level, crash_at) = match &cli.command {
        Command::Demo(_) => ("warn", None),
        Command::Run(args) => ("info", args.crash_at.clone()),
        _ => ("info", None),
    };
    start_logging(level, crash_at);
    let outcome = match cli.command {
        Command::Demo(args) => demo::run(args).await,
        Command::Campaign(args) => campaign::run(args).await,
        Command::Run(args) => run(args).await.map(|()| ExitCode::SUCCESS),
        Command::FakePsp(args) => fake::psp::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::FakeMailer(args) => fake::mailer::run(args).await.map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Logs to stderr; `RUST_LOG` overrides what.
fn start_logging(default: &str, crash_at: Option<CrashPoint>) {
    // RabbitMQ's client logs an error for each channel that the server closes, also where that is an answer.
    let default = format!("{default},lapin=off");
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let log = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_filter(filter);
    tracing_subscriber::registry()
        .with(log)
        .with(crash_at.map(CrashPoint::layer))
        .init();
}

async fn run(args: RunArgs) -> anyhow::Result<()> {
    let data = match args.data {
        Some(data) => DataDir::open(data)?,
        // What is on such a broker ends with the process, so the rest may not outlive it.
        None if args.broker.is_memory() => DataDir::temporary()?,
        None => DataDir::open("ecommerce-data".into())?,
    };
    let databases = args.store.databases(data.path())?;
    let bus = connect(&args.broker.config(data.path(), &args.store)).await?;
    anyhow::ensure!(
        args.only.is_empty() || !lives_in_process(&bus),
        "`--only` runs some services in this process and leaves the others to other processes, but \
         `memory:` lives inside one process: leave out `--only`, or give a broker that processes \
         share with `--broker`"
    );
    let services = match args.only.is_empty() {
        true => Service::value_variants().to_vec(),
        false => args.only,
    };
    let fake = async |service, url, command| match services.contains(&service) {
        true => FakeProcess::unless_given(url, command, data.path())
            .await
            .map(Some),
        false => Ok(None),
    };
    // The fakes are kept until the services have stopped.
    let psp = fake(Service::Payment, args.psp, "fake-psp").await?;
    let mailer = fake(Service::Notification, args.mailer, "fake-mailer").await?;
    let surroundings = Surroundings {
        databases,
        port: args.port,
        psp_url: psp.as_ref().map(|psp| psp.url.clone()),
        mailer_url: mailer.as_ref().map(|mailer| mailer.url.clone()),
        stock: usual_stock(),
    };
    let (shop, service) = Shop::open(&bus, &services, surroundings).await?;
    if let Some(url) = shop.gateway_url {
        info!("taking orders at {url}/orders, until ctrl-c");
    }
    info!("{OPEN}");
    let told_to_stop = async {
        shutdown_signal().await;
        info!("stopping");
    };
    let service = service.notice(Duration::from_secs(args.notice));
    service
        .run_until(told_to_stop)
        .await
        .context("run the shop")
}
