//! One round: a fresh system that is used, harmed, healed, drained and judged.
//!
//! ```text
//!  harness ── starts, harms ─▶ produce ─▶ broker ─▶ consume ─▶ effects ─┐
//!     ├────── probes ───────────────────────▲                           │
//!     └─ recorder ◀── what each tried and what came of it ── ledger ────┴▶ checks
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use eventbus::prelude::EventBus;
use eventbus_verify::{
    Entry, Fault, History, Operation, Promises, Report, RunId, Sample, Session, Violation,
};
use fastrand::Rng;
use tokio::time::sleep;

use crate::meter::{Meter, Taken};
use crate::plan::Plan;
use crate::probe::{Entrance, Prober};
use crate::process::{Process, Role, Spec};
use crate::product::Product;
use crate::recorded;
use crate::recording::Recording;
use crate::server::Server;
use crate::site::{Ground, Site};
use crate::store::Store;
use crate::tried::PROBER;
use crate::witness;

mod harm;
mod poison;

/// How often processes are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What a round is told.
#[derive(Clone, Debug)]
pub struct Setting {
    /// On what it runs.
    pub base: Ground,
    /// Where its files are; it is empty.
    pub directory: PathBuf,
    /// Decides everything that is decided by chance.
    pub seed: u64,
    /// When it has to begin to end.
    pub deadline: Instant,
    /// Tells the rounds of this harness apart on a server that they share.
    pub number: u32,
    /// Whether handlers have a bug, to see that it is found.
    pub has_bug: bool,
    /// The broker, where it is one that may be harmed.
    pub server: Option<Arc<Server>>,
}

/// What a round came to.
#[derive(Debug)]
pub struct Outcome {
    /// What the checker found.
    pub report: Report,
    /// What did not go as it should beside that.
    pub complaints: Vec<String>,
    /// At which named steps processes were ended, and how often.
    pub steps: BTreeMap<String, u64>,
    /// What processes took that lived through it.
    pub meter: Meter,
    /// How long messages came in.
    pub lasted: Duration,
    /// How long it took until everything was settled after that.
    pub drained: Duration,
    /// How long messages needed to get through when all was well, at the begin.
    pub passing: Option<Duration>,
}

impl Outcome {
    /// Whether everything is as it should be.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.report.passed() && self.complaints.is_empty()
    }
}

/// A round that runs.
pub struct Round {
    plan: Plan,
    setting: Setting,
    random: Rng,
    site: Site,
    /// The place as processes reach it.
    reached: Site,
    recording: Recording,
    session: Session,
    prober: Prober,
    /// The harness's own way to the broker, which no fault is on.
    bus: EventBus,
    store: Option<Store>,
    processes: Vec<Process>,
    /// What processes brought in that have ended.
    brought_in: u64,
    next_producer: u16,
    next_fault: u64,
    extra: u32,
    steps: BTreeMap<String, u64>,
    complaints: Vec<String>,
    meter: Meter,
    looked: Instant,
    /// What only some scenarios need.
    tools: harm::Tools,
}

/// Runs a round, and calls `progress` with how many messages came in and how many faults there were.
///
/// # Errors
///
/// When something cannot be started or read: then nothing is said of the tried system.
pub async fn run(
    plan: Plan,
    setting: Setting,
    progress: impl Fn(u64, u64) + Send + Sync,
) -> anyhow::Result<Outcome> {
    let groups = plan.groups.clone();
    let tools = harm::Tools::prepare(&plan, &setting).await?;
    let site = tools.site(&setting);
    site.prepare(&groups).await.context("prepare the tables")?;
    let outcome = played(plan, setting, tools, progress).await;
    if outcome.as_ref().is_ok_and(Outcome::passed) {
        site.remove(&groups).await?;
    }
    outcome
}

async fn played(
    plan: Plan,
    setting: Setting,
    tools: harm::Tools,
    progress: impl Fn(u64, u64) + Send + Sync,
) -> anyhow::Result<Outcome> {
    let site = tools.site(&setting);
    let base = setting.base.clone();
    let run = RunId(setting.seed as u32 ^ setting.number.rotate_left(16));
    let recording = Recording::start(&setting.directory, run).await?;
    let client = &recording.client;
    let bus = recorded::connect(&site.broker(), client, None).await?;
    let store = match plan.has_outbox {
        true => Some(Store::connect(&site.store()).await?),
        false => None,
    };
    let entrance = match &store {
        Some(store) => Entrance::Outbox(store.outbox(&bus)),
        None => Entrance::Publish(bus.clone()),
    };
    let mut readers = Vec::new();
    for group in &plan.groups {
        readers.push(site.reader(*group).await?);
    }
    let mut round = Round {
        random: Rng::with_seed(setting.seed),
        reached: tools.reached(&site)?,
        session: client.session(),
        prober: Prober::new(client, entrance, readers.clone()),
        bus: bus.clone(),
        store: store.clone(),
        site,
        recording,
        processes: Vec::new(),
        brought_in: 0,
        next_producer: PROBER + 1,
        next_fault: 1,
        extra: 0,
        steps: BTreeMap::new(),
        complaints: Vec::new(),
        meter: Meter::default()
            .with_read_ahead(setting.base.product().map_or(0, Product::read_ahead)),
        looked: Instant::now(),
        tools,
        plan,
        setting,
    };
    let begun = Instant::now();
    let passing = round.go_through(&progress).await?;
    let lasted = begun.elapsed();
    let begun = Instant::now();
    round.stop(Role::is_source).await;
    // Where the broker does not count what is handed out, that is over when no effect is added.
    let counted = base.product().is_none_or(Product::tells_lag);
    let effects = if counted { &[][..] } else { &readers };
    let stuck = witness::settled(&bus, store.as_ref(), &round.plan.groups, effects).await?;
    let drained = begun.elapsed();
    round.complaints.extend(stuck);
    round.stop(|_| true).await;
    witness::note_what_is_left(&bus, &round.session, &round.plan.groups).await?;
    let mut effects = Vec::new();
    for reader in readers {
        effects.extend(reader.effects().await?);
        reader.close().await;
    }
    if round.plan.has_poison {
        let found = poison::complaints(&bus, &effects, &round.plan.groups).await?;
        round.complaints.extend(found);
    }
    bus.close().await?;
    let Round {
        plan,
        recording,
        complaints,
        steps,
        meter,
        ..
    } = round;
    let ledger = recording.finish().await?;
    let promises = Promises::to(plan.groups)
        .with_recovery_max(plan.recovery_max)
        .with_bounds(plan.bounds);
    let report =
        tokio::task::spawn_blocking(move || Report::of(&History::new(&ledger, effects), &promises));
    Ok(Outcome {
        report: report.await?,
        complaints,
        steps,
        meter,
        lasted,
        drained,
        passing,
    })
}

impl Round {
    /// Starts everybody, and harms them until all messages have come in.
    async fn go_through(
        &mut self,
        progress: &(impl Fn(u64, u64) + Send + Sync),
    ) -> anyhow::Result<Option<Duration>> {
        let (sources, others): (Vec<Spec>, Vec<Spec>) = self
            .plan
            .specs
            .clone()
            .into_iter()
            .partition(|spec| spec.role.is_source());
        if self.plan.is_backlog {
            self.start_all(sources.clone()).await?;
            self.until_all_is_in(progress).await?;
        }
        // Whoever joins takes from the others what they have begun with.
        let number = self.begin(Fault::MemberJoin)?;
        self.start_all(others).await?;
        if !self.plan.is_backlog {
            self.start_all(sources).await?;
        }
        self.end(Fault::MemberJoin, number)?;
        let passing = match self.plan.is_backlog {
            // It waits behind everything.
            true => None,
            false => self.prober.pass(self.plan.recovery_max).await?,
        };
        let mut harmed = 0;
        while self.goes_on(harmed).await? {
            self.rest().await;
            if let Some(harm) = self.pick() {
                self.inject(harm).await?;
                harmed += 1;
            }
            progress(self.messages(), self.next_fault - 1);
        }
        // The last faults are judged, too.
        self.prober.pass(self.plan.recovery_max).await?;
        Ok(passing)
    }

    async fn start_all(&mut self, specs: Vec<Spec>) -> anyhow::Result<()> {
        for spec in specs {
            let process = self.start(&spec, None)?;
            self.processes.push(process);
        }
        for process in &mut self.processes {
            process.wait_until_ready().await?;
        }
        Ok(())
    }

    /// Waits until a backlog is there.
    async fn until_all_is_in(
        &mut self,
        progress: &(impl Fn(u64, u64) + Send + Sync),
    ) -> anyhow::Result<()> {
        while self.messages() < self.plan.messages && Instant::now() < self.setting.deadline {
            sleep(LOOK_EVERY / 5).await;
            self.look();
            progress(self.messages(), 0);
        }
        self.stop(Role::is_source).await;
        Ok(())
    }

    /// Whether the round is not over yet.
    async fn goes_on(&mut self, harmed: u64) -> anyhow::Result<bool> {
        self.look();
        if Instant::now() >= self.setting.deadline {
            return Ok(false);
        }
        if !self.plan.is_backlog {
            return Ok(self.messages() < self.plan.messages);
        }
        let left = witness::left(&self.bus, self.store.as_ref(), &self.plan.groups).await?;
        Ok(left > 0 || harmed == 0)
    }

    async fn rest(&mut self) {
        let millis = self.random.u64(self.plan.gap.clone());
        sleep(Duration::from_millis(millis)).await;
    }

    /// How many messages came in.
    fn messages(&self) -> u64 {
        let running = self
            .processes
            .iter()
            .filter(|process| process.spec.role.is_source())
            .map(|process| process.status().messages);
        self.brought_in + running.sum::<u64>()
    }

    /// Starts a process; a source gets numbers that no producer had.
    fn start(
        &mut self,
        spec: &Spec,
        crash_at: Option<&crate::crash_point::CrashPoint>,
    ) -> anyhow::Result<Process> {
        let mut args = vec![
            "--recorder".to_owned(),
            self.recording.socket.display().to_string(),
            "--seed".to_owned(),
            self.random.u64(..).to_string(),
        ];
        args.extend(self.reached.broker().to_args());
        let store = || ["--store".to_owned(), self.reached.store()];
        match spec.role {
            Role::Produce => {}
            Role::Append | Role::Relay => args.extend(store()),
            Role::Consume(group) => {
                args.extend(["--group".to_owned(), group.to_string()]);
                args.extend(["--effects".to_owned(), self.reached.effects(group)]);
                args.extend(self.tools.consumer_args());
                if self.setting.has_bug {
                    args.extend(["--manner", "forgetful"].map(str::to_owned));
                }
            }
        }
        if spec.role.is_source() {
            const PRODUCERS: u16 = 8;
            args.extend(["--producer".to_owned(), self.next_producer.to_string()]);
            let groups: Vec<String> = self.plan.groups.iter().map(u16::to_string).collect();
            args.extend(["--groups".to_owned(), groups.join(",")]);
            self.next_producer += PRODUCERS;
        }
        Process::start(spec, &args, crash_at, &self.setting.directory)
    }

    /// Notes what processes take, at most once a second.
    fn look(&mut self) {
        if self.looked.elapsed() < LOOK_EVERY {
            return;
        }
        self.looked = Instant::now();
        for process in &self.processes {
            let status = process.status();
            let Some(taken) = process.id().and_then(|id| Taken::by(id, status.tasks)) else {
                continue;
            };
            let resident = Entry::sample(Sample::ResidentBytes, taken.resident);
            // What the recorder cannot be told, its end will say.
            drop(self.session.ok(resident));
            if process.spec.is_kept {
                self.meter.note(&process.spec.name, taken);
            }
        }
    }

    /// Tells processes to stop, and keeps what went wrong.
    async fn stop(&mut self, is_meant: impl Fn(Role) -> bool) {
        let mut left = Vec::new();
        for mut process in std::mem::take(&mut self.processes) {
            if !is_meant(process.spec.role) {
                left.push(process);
                continue;
            }
            if let Err(error) = process.stop().await {
                self.complaints.push(format!("{error:#}"));
            }
            self.note_end(&process);
        }
        self.processes = left;
    }

    /// Keeps what a process brought in.
    fn note_end(&mut self, process: &Process) {
        if process.spec.role.is_source() {
            self.brought_in += process.status().messages;
        }
    }

    fn begin(&mut self, fault: Fault) -> anyhow::Result<u64> {
        let number = self.next_fault;
        self.next_fault += 1;
        self.session
            .ok(Entry::fault(Operation::FaultBegin, fault, number))?;
        Ok(number)
    }

    fn end(&self, fault: Fault, number: u64) -> anyhow::Result<()> {
        self.session
            .ok(Entry::fault(Operation::FaultEnd, fault, number))?;
        Ok(())
    }
}

/// The first violations of a report, each in a few lines.
#[must_use]
pub fn shown(report: &Report) -> Vec<&Violation> {
    let found = report.violations.iter();
    found
        .flat_map(|(_, found)| found.examples().iter().take(3))
        .collect()
}
