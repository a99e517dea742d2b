//! The tried process that handles: a member of a group, whose effects commit with its inbox.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use eventbus::prelude::{BoxError, Context, OnPoison, RetryPolicy};
use eventbus::{Consumer, Limits, PostgresStore, SqliteStore};
use eventbus_verify::{Entry, Operation, Payload, Session, Stamp};
use sqlx::AssertSqlSafe;
use tokio::time::sleep;

use super::{Child, ChildArgs};
use crate::recorded::{group_name, told};
use crate::store::Store;
use crate::tried::{PROBER, Tried, message_id};

/// How it handles.
#[derive(Args, Clone, Debug)]
pub struct ConsumeArgs {
    #[command(flatten)]
    pub child: ChildArgs,
    /// The number of its group
    #[arg(long)]
    group: u16,
    /// The database of the group's effects
    #[arg(long)]
    effects: String,
    /// Most events of one transaction
    #[arg(long, default_value_t = 64)]
    group_max: usize,
    /// Most messages that are handed out and not settled
    #[arg(long, default_value_t = 1000)]
    in_flight: usize,
    /// How many handlers run at once
    #[arg(long, default_value_t = 16)]
    concurrency: usize,
    /// What its handlers do beside writing
    #[arg(long, value_enum, default_value_t = Manner::Plain)]
    manner: Manner,
    /// Makes what cannot be handled a dead letter, in place of parking its key
    #[arg(long)]
    dead_letters: bool,
    /// How long a shutdown may take
    #[arg(long, default_value = "25s", value_parser = humantime::parse_duration)]
    shutdown: Duration,
}

/// What handlers do beside writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Manner {
    /// Nothing.
    Plain,
    /// They fail each time at some messages, panic at others, and fail once at yet others.
    Poison,
    /// They take ten milliseconds each, and six seconds at some messages of one key.
    Slow,
    /// They take up to twenty milliseconds, by chance.
    Uneven,
    /// They forget to write now and then: a bug, to see that it is found.
    Forgetful,
}

/// How often a message is tried.
pub const ATTEMPTS: u32 = 3;
/// The messages with these rests of key and number are poison.
/// The key whose handlers take longer than a lease now and then.
const SLOW_KEY: u32 = 7;
const SLOW: Duration = Duration::from_secs(6);
const POISON_KEYS: u32 = 25;
const POISON_NUMBERS: u32 = 40;

impl Manner {
    /// Does what comes before the write.
    async fn act(self, stamp: Stamp, attempt: u32) -> Result<(), BoxError> {
        match self {
            Self::Plain | Self::Forgetful => {}
            Self::Poison => return poison(stamp, attempt),
            Self::Slow if stamp.key == SLOW_KEY && is_marked(stamp, 7) => sleep(SLOW).await,
            Self::Slow => sleep(Duration::from_millis(10)).await,
            Self::Uneven => sleep(Duration::from_millis(fastrand::u64(0..20))).await,
        }
        Ok(())
    }
}

impl Manner {
    fn forgets(self, stamp: Stamp) -> bool {
        self == Self::Forgetful && stamp.key.is_multiple_of(100) && is_marked(stamp, 9)
    }
}

/// Whether no handler can ever handle it, where they are of the poisoned manner.
#[must_use]
pub fn is_poison(stamp: Stamp) -> bool {
    stamp.producer != PROBER && stamp.key.is_multiple_of(POISON_KEYS) && is_marked(stamp, 3)
}

fn is_marked(stamp: Stamp, rest: u32) -> bool {
    stamp.key_seq % POISON_NUMBERS == rest
}

fn poison(stamp: Stamp, attempt: u32) -> Result<(), BoxError> {
    if is_poison(stamp) {
        assert!(stamp.key.is_multiple_of(2), "a handler that panics");
        return Err("a handler that always fails".into());
    }
    match is_marked(stamp, 5) && attempt == 1 {
        true => Err("a handler that fails once".into()),
        false => Ok(()),
    }
}

/// Handles until it is told to stop.
///
/// # Errors
///
/// When it cannot start, and what its shutdown met.
pub async fn run(args: ConsumeArgs) -> anyhow::Result<()> {
    let child = Child::start(&args.child).await?;
    let store = Store::connect(&args.effects).await?;
    let consumer = spawn(&child, &args, store).await?;
    child.is_ready();
    child.stopped().await;
    let session = child.client.session();
    let drain = Entry::new(Operation::Drain).with_group(args.group);
    told(session.invoke(drain));
    let ended = consumer.shutdown().await;
    match &ended {
        Ok(()) => told(session.ok(drain)),
        Err(_) => told(session.unknown(drain)),
    }
    child.bus.close().await?;
    ended.context("shut down")
}

async fn spawn(child: &Child, args: &ConsumeArgs, store: Store) -> eventbus::Result<Consumer> {
    let limits = Limits::default()
        .with_messages(args.in_flight)
        .with_lane_messages(args.in_flight)
        .with_batch(args.in_flight.min(256));
    let poison = match args.dead_letters {
        true => OnPoison::SkipKey,
        false => OnPoison::ParkKey,
    };
    let books = |insert, probe| Books {
        child: child.clone(),
        session: Arc::new(child.client.session()),
        group: args.group,
        manner: args.manner,
        insert,
        probe,
    };
    let builder = child
        .bus
        .consumer(&group_name(args.group))
        .retry(RetryPolicy::fixed(ATTEMPTS, Duration::from_millis(50)))
        .on_poison(poison)
        .limits(limits)
        .concurrency(args.concurrency)
        .shutdown_timeout(args.shutdown);
    match store {
        Store::Sqlite(store) => {
            let builder = builder.state(books(insert("").into(), probe("").into()));
            let store = store.with_group_max(args.group_max);
            builder.unit(store).on(handle_in_sqlite).spawn().await
        }
        Store::Postgres(store, schema) => {
            let schema = format!("{schema}.");
            let builder = builder.state(books(insert(&schema).into(), probe(&schema).into()));
            let store = store.with_group_max(args.group_max);
            builder.unit(store).on(handle_in_postgres).spawn().await
        }
    }
}

fn insert(schema: &str) -> String {
    format!(
        "INSERT INTO {schema}effects (consumers, id, key, number, attempt) VALUES ($1, $2, $3, $4, $5)"
    )
}

fn probe(schema: &str) -> String {
    format!("INSERT INTO {schema}probes (number, consumers, key) VALUES ($1, $2, $3)")
}

/// What handlers know.
#[derive(Clone, Debug)]
struct Books {
    child: Child,
    session: Arc<Session>,
    group: u16,
    manner: Manner,
    insert: Arc<str>,
    probe: Arc<str>,
}

/// A handler that runs. Dropped before it ends, nobody knows what came of it.
struct Run {
    session: Arc<Session>,
    entry: Entry,
    is_over: bool,
}

impl Books {
    fn begin(&self, event: &Tried, attempt: u32) -> Result<(Run, Payload), BoxError> {
        let payload = event
            .read(self.child.client.run())
            .inspect_err(|_| self.unreadable())?;
        let entry = Entry::of(Operation::Handle, payload.stamp)
            .with_group(self.group)
            .with_attempt(attempt as u16)
            .with_checksum(payload.checksum);
        told(self.session.invoke(entry));
        let run = Run {
            session: Arc::clone(&self.session),
            entry,
            is_over: false,
        };
        Ok((run, payload))
    }

    fn unreadable(&self) {
        let entry = Entry::new(Operation::Deliver).with_group(self.group);
        told(self.session.fail(entry));
    }
}

impl Run {
    fn end(mut self, outcome: &Result<(), BoxError>) {
        self.is_over = true;
        match outcome {
            Ok(()) => told(self.session.ok(self.entry)),
            Err(_) => told(self.session.fail(self.entry)),
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.is_over {
            told(self.session.unknown(self.entry));
        }
    }
}

async fn handle_in_sqlite(
    event: Tried,
    mut cx: Context<Books, SqliteStore>,
) -> Result<(), BoxError> {
    let books = cx.state().clone();
    let (run, payload) = books.begin(&event, cx.attempt())?;
    let outcome = async {
        books.manner.act(payload.stamp, cx.attempt()).await?;
        if books.manner.forgets(payload.stamp) {
            return Ok(());
        }
        let (stamp, id, attempt) = (
            payload.stamp,
            message_id(&cx.id().to_string())?,
            cx.attempt(),
        );
        let connection = cx.transaction().await?;
        sqlx::query(AssertSqlSafe(&*books.insert))
            .bind(i64::from(books.group))
            .bind(&id.as_u128().to_be_bytes()[..])
            .bind(i64::from(event.key))
            .bind(i64::from(stamp.key_seq))
            .bind(i64::from(attempt))
            .execute(&mut *connection)
            .await?;
        if stamp.producer == PROBER {
            sqlx::query(AssertSqlSafe(&*books.probe))
                .bind(i64::from(stamp.key_seq))
                .bind(i64::from(books.group))
                .bind(i64::from(stamp.key))
                .execute(connection)
                .await?;
        }
        Ok(())
    }
    .await;
    run.end(&outcome);
    books.child.messages.fetch_add(1, Ordering::Relaxed);
    outcome
}

async fn handle_in_postgres(
    event: Tried,
    mut cx: Context<Books, PostgresStore>,
) -> Result<(), BoxError> {
    let books = cx.state().clone();
    let (run, payload) = books.begin(&event, cx.attempt())?;
    let outcome = async {
        books.manner.act(payload.stamp, cx.attempt()).await?;
        if books.manner.forgets(payload.stamp) {
            return Ok(());
        }
        let (stamp, id, attempt) = (
            payload.stamp,
            message_id(&cx.id().to_string())?,
            cx.attempt(),
        );
        let connection = cx.transaction().await?;
        sqlx::query(AssertSqlSafe(&*books.insert))
            .bind(i64::from(books.group))
            .bind(&id.as_u128().to_be_bytes()[..])
            .bind(i64::from(event.key))
            .bind(i64::from(stamp.key_seq))
            .bind(i64::from(attempt))
            .execute(&mut *connection)
            .await?;
        if stamp.producer == PROBER {
            sqlx::query(AssertSqlSafe(&*books.probe))
                .bind(i64::from(stamp.key_seq))
                .bind(i64::from(books.group))
                .bind(i64::from(stamp.key))
                .execute(connection)
                .await?;
        }
        Ok(())
    }
    .await;
    run.end(&outcome);
    books.child.messages.fetch_add(1, Ordering::Relaxed);
    outcome
}
