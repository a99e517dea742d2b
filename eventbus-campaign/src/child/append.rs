//! The tried process that does business: a row and some events in one transaction, or neither.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::Args;
use eventbus::prelude::Origin;
use eventbus_verify::{Entry, Operation, Phase, Session};
use sqlx::AssertSqlSafe;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::produce::{LoadArgs, Source};
use super::{Child, ChildArgs};
use crate::recorded::told;
use crate::store::{Outbox, Store, ordered};
use crate::tried::Draft;

const PAUSE: Duration = Duration::from_millis(20);
/// One transaction in so many is rolled back.
const ROLL_BACK: u32 = 10;

/// What it does.
#[derive(Args, Clone, Debug)]
pub struct AppendArgs {
    #[command(flatten)]
    pub child: ChildArgs,
    #[command(flatten)]
    load: LoadArgs,
    /// The service's database
    #[arg(long)]
    store: String,
    /// One transaction in so many appends at its begin and stays open for a while; 0: none
    #[arg(long, default_value_t = 0)]
    linger: u32,
    /// How long that is at most
    #[arg(long, default_value = "3s", value_parser = humantime::parse_duration)]
    linger_max: Duration,
}

/// Does business until it is told to stop.
///
/// # Errors
///
/// When it cannot start.
pub async fn run(args: AppendArgs) -> anyhow::Result<()> {
    let child = Child::start(&args.child).await?;
    let store = Store::connect(&args.store).await?;
    let outbox = store.outbox(&child.bus);
    let lag = child.watch_lag(&args.load.groups);
    let waiting = watch_outbox(store.clone());
    let numbers = Arc::new(AtomicU64::new(1));
    let mut services = JoinSet::new();
    for source in args.load.sources(child.seed) {
        let service = Service {
            session: child.client.session(),
            child: child.clone(),
            outbox: outbox.clone(),
            numbers: Arc::clone(&numbers),
            producer: source.producer(),
            linger: args.linger,
            linger_max: args.linger_max,
        };
        let room = [Arc::clone(&lag), Arc::clone(&waiting)];
        services.spawn(service.run(source, room, args.load.clone()));
    }
    child.is_ready();
    services.join_all().await;
    child.bus.close().await?;
    Ok(())
}

/// Looks for ever at how much waits for a relay.
fn watch_outbox(store: Store) -> Arc<AtomicU64> {
    let waiting = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&waiting);
    tokio::spawn(async move {
        loop {
            if let Ok(messages) = store.waiting().await {
                seen.store(messages, Ordering::Relaxed);
            }
            sleep(super::LOOK_EVERY).await;
        }
    });
    waiting
}

struct Service {
    session: Session,
    child: Child,
    outbox: Outbox,
    /// Numbers the transactions of the process.
    numbers: Arc<AtomicU64>,
    producer: u16,
    linger: u32,
    linger_max: Duration,
}

/// How a transaction is meant to end, and how it gets there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    Commit,
    RollBack,
    /// Appends first, and commits so much later.
    Linger(Duration),
}

/// What is known of a transaction when it is over.
enum Ended {
    /// It is committed, or rolled back as planned.
    Done,
    /// It is surely not committed.
    NotDone,
    /// It may be committed.
    Unknown,
    /// One of those before is committed: its row is there.
    WasDone,
}

impl Service {
    async fn run(self, mut source: Source, room: [Arc<AtomicU64>; 2], load: LoadArgs) {
        let mut business = 0;
        while !self.child.is_stopping() {
            for lag in &room {
                self.child.wait_for_room(lag, load.lag_max).await;
            }
            let drafts = source.next(&self.child);
            let plan = self.plan(&mut source);
            business += 1;
            self.settle(business, &drafts, plan).await;
            let messages = &self.child.messages;
            messages.fetch_add(drafts.len() as u64, Ordering::Relaxed);
            sleep(load.rest).await;
        }
    }

    fn plan(&self, source: &mut Source) -> Plan {
        let can_linger = self.linger > 0 && self.outbox.by_hand().is_some();
        if can_linger && source.random.u32(0..self.linger) == 0 {
            let longest = self.linger_max.as_millis() as u64;
            let millis = source.random.u64(50..=longest.max(50));
            return Plan::Linger(Duration::from_millis(millis));
        }
        match source.random.u32(0..ROLL_BACK) {
            0 => Plan::RollBack,
            _ => Plan::Commit,
        }
    }

    /// Does a piece of business until it is known to be done, or the process is to stop.
    async fn settle(&self, business: u64, drafts: &[Draft], plan: Plan) {
        let mut unknown = Vec::new();
        loop {
            let number = self.numbers.fetch_add(1, Ordering::Relaxed);
            match self.attempt(number, business, drafts, plan).await {
                Ended::Done => return,
                Ended::WasDone => {
                    // Which one it was follows where only one is in question.
                    if let [number] = unknown[..] {
                        self.commit(Phase::Ok, number);
                    }
                    return;
                }
                Ended::Unknown => unknown.push(number),
                Ended::NotDone => {}
            }
            if self.child.is_stopping() {
                return;
            }
            sleep(PAUSE).await;
        }
    }

    async fn attempt(&self, number: u64, business: u64, drafts: &[Draft], plan: Plan) -> Ended {
        let entry = |draft: &Draft| draft.entry(Operation::Append).with_transaction(number);
        let entries: Vec<Entry> = drafts.iter().map(entry).collect();
        told(self.session.record(Phase::Invoke, &entries));
        let ended = match plan {
            Plan::Linger(time) => self.linger(number, business, drafts, &entries, time).await,
            _ => self.at_once(number, business, drafts, &entries, plan).await,
        };
        ended.unwrap_or_else(|error| {
            tracing::warn!("{error:#}");
            Ended::NotDone
        })
    }

    /// Through the SDK's transaction. An error of what comes before the commit says that nothing is done.
    async fn at_once(
        &self,
        number: u64,
        business: u64,
        drafts: &[Draft],
        entries: &[Entry],
        plan: Plan,
    ) -> anyhow::Result<Ended> {
        let mut transaction = self.outbox.begin().await?;
        if !transaction.write(self.producer, business).await? {
            transaction.roll_back();
            return Ok(Ended::WasDone);
        }
        for draft in drafts {
            transaction.publish(draft.outgoing())?;
        }
        told(self.session.record(Phase::Ok, entries));
        if plan == Plan::RollBack {
            transaction.roll_back();
            self.commit(Phase::Fail, number);
            return Ok(Ended::Done);
        }
        self.commit(Phase::Invoke, number);
        match transaction.commit().await {
            Ok(()) => self.commit(Phase::Ok, number),
            Err(error) => {
                tracing::warn!("{error}");
                self.commit(Phase::Unknown, number);
                return Ok(Ended::Unknown);
            }
        }
        Ok(Ended::Done)
    }

    /// Through a transaction of the service's own, which appends long before it commits.
    async fn linger(
        &self,
        number: u64,
        business: u64,
        drafts: &[Draft],
        entries: &[Entry],
        time: Duration,
    ) -> anyhow::Result<Ended> {
        let Some((outbox, store, schema)) = self.outbox.by_hand() else {
            return Ok(Ended::NotDone);
        };
        let mut batch = self.child.bus.batch(Origin::new())?;
        for draft in drafts {
            batch.publish(draft.outgoing())?;
        }
        let mut transaction = store.pool().begin().await?;
        let sql = AssertSqlSafe(ordered(&format!("{schema}.")));
        let written = sqlx::query(sql)
            .bind(i64::from(self.producer))
            .bind(business.cast_signed())
            .execute(&mut *transaction)
            .await?;
        if written.rows_affected() == 0 {
            return Ok(Ended::WasDone);
        }
        outbox.append(&mut transaction, batch).await?;
        told(self.session.record(Phase::Ok, entries));
        sleep(time).await;
        self.commit(Phase::Invoke, number);
        match transaction.commit().await {
            Ok(()) => self.commit(Phase::Ok, number),
            Err(error) => {
                tracing::warn!("{error}");
                self.commit(Phase::Unknown, number);
                return Ok(Ended::Unknown);
            }
        }
        Ok(Ended::Done)
    }

    fn commit(&self, phase: Phase, number: u64) {
        let entry = Entry::new(Operation::Commit).with_transaction(number);
        told(self.session.record(phase, &[entry]));
    }
}
