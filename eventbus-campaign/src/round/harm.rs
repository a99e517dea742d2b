//! What is done to the tried system, one thing at a time, and how it is healed.

use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use eventbus::Group;
use eventbus::broker::AdminRequest;
use eventbus_testkit::{Direction, FaultProxy, Protocol, Statements, WireFault};
use eventbus_verify::Fault;
use rustix::process::Signal;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};
use tokio::time::sleep;

use super::{Round, Setting};
use crate::child::patiently;
use crate::crash_point::CrashPoint;
use crate::plan::{Harm, Plan};
use crate::process::{Process, Role, Spec};
use crate::product::Product;
use crate::recorded::group_name;
use crate::server::Server;
use crate::site::{Ground, LEASE, Site};
use crate::tried::TOPIC;

/// A step that was not reached for so long is not going to be.
const STEP_WITHIN: Duration = Duration::from_secs(10);
/// How many members may join besides.
const EXTRA_MAX: usize = 2;
/// How often a member joins or leaves in a row, and how fast.
const CHURN: usize = 5;
const CHURN_EVERY: Duration = Duration::from_secs(2);
/// The steps of who publishes.
const SOURCE_STEPS: &[&str] = &[
    "publish.before",
    "publish.after",
    "sql.commit.before",
    "sql.commit.after",
];
/// The steps of who commits to an outbox.
const APPEND_STEPS: &[&str] = &[
    "unit.outbox.before",
    "unit.outbox.after",
    "unit.commit.before",
    "unit.commit.after",
];
/// The steps of who relays.
const RELAY_STEPS: &[&str] = &[
    "relay.next.after",
    "publish.before",
    "publish.after",
    "relay.remove.before",
    "relay.remove.after",
];
/// The steps of who handles.
const CONSUME_STEPS: &[&str] = &[
    "handle.before",
    "handle.after",
    "unit.inbox.before",
    "unit.inbox.after",
    "unit.outbox.before",
    "unit.outbox.after",
    "unit.commit.before",
    "unit.commit.after",
    "settle.before",
    "settle.after",
];

/// What only some rounds need to do harm with.
#[derive(Debug, Default)]
pub(super) struct Tools {
    proxy: Option<FaultProxy>,
    disk: Option<SmallDisk>,
    /// While there is a file of this name, no dead letter is taken.
    letters_away: PathBuf,
}

impl Tools {
    /// Makes what a plan needs.
    pub(super) async fn prepare(plan: &Plan, setting: &Setting) -> anyhow::Result<Self> {
        let disk = match plan.small_disk {
            Some(size) => Some(SmallDisk::mount(setting.directory.join("disk"), size)?),
            None => None,
        };
        let proxy = match (plan.has_wire, setting.base.address()) {
            (true, Some(address)) => {
                let protocol = protocol(&setting.base);
                Some(FaultProxy::start_with(address, protocol).await?)
            }
            _ => None,
        };
        Ok(Self {
            proxy,
            disk,
            letters_away: setting.directory.join("letters-away"),
        })
    }

    /// Where the things of the round are.
    pub(super) fn site(&self, setting: &Setting) -> Site {
        let directory = self.disk.as_ref().map(|disk| &disk.path);
        let directory = directory.unwrap_or(&setting.directory);
        let prefix = format!("verify_{}_{}", std::process::id(), setting.number);
        Site::new(&setting.base, directory, &prefix)
    }

    /// The same, as processes reach it.
    pub(super) fn reached(&self, site: &Site) -> anyhow::Result<Site> {
        match &self.proxy {
            Some(proxy) => site.through(proxy),
            None => Ok(site.clone()),
        }
    }

    /// What members are told because of that.
    pub(super) fn consumer_args(&self) -> [String; 2] {
        let file = self.letters_away.display().to_string();
        ["--letters-away".to_owned(), file]
    }
}

/// Which requests are commits, to the proxy.
fn protocol(base: &Ground) -> Protocol {
    let of_sql = || Protocol::Postgres(Statements::commits());
    base.product().map_or_else(of_sql, Product::protocol)
}

impl Round {
    /// Draws what is done next; none where nothing is done in this round.
    pub(super) fn pick(&mut self) -> Option<Harm> {
        let total: u32 = self.plan.harms.iter().map(|(_, weight)| weight).sum();
        let mut drawn = self.random.u32(0..total.max(1));
        for (harm, weight) in &self.plan.harms {
            if drawn < *weight {
                return Some(*harm);
            }
            drawn -= weight;
        }
        None
    }

    /// Does it, undoes it, and waits until messages pass again; now and then not.
    pub(super) async fn inject(&mut self, harm: Harm) -> anyhow::Result<()> {
        match harm {
            Harm::Kill => self.kill().await?,
            Harm::CrashAtStep => self.crash_at_step().await?,
            Harm::Pause => self.stand_still(20..LEASE.as_millis() as u64 / 3).await?,
            Harm::Zombie => {
                let lease = LEASE.as_millis() as u64;
                self.stand_still(lease + 500..2 * lease).await?;
            }
            Harm::Terminate => self.terminate().await?,
            Harm::TerminateTwice => self.terminate_twice().await?,
            Harm::TerminateAway => self.terminate_while_away().await?,
            Harm::Join => self.join().await?,
            Harm::Leave => self.leave().await?,
            Harm::Lock => self.lock().await?,
            Harm::FillDisk => self.fill_disk().await?,
            Harm::RefuseLetters => self.refuse_letters().await?,
            Harm::Churn => self.churn().await?,
            Harm::BrokerKill => self.end_broker(Fault::BrokerKill, Signal::KILL).await?,
            Harm::BrokerTerminate => {
                self.end_broker(Fault::BrokerTerminate, Signal::TERM)
                    .await?;
            }
            Harm::BrokerPause => self.pause_broker().await?,
            _ => self.harm_wire(harm).await?,
        }
        let is_hurried = self.random.u32(0..5) == 0;
        if !is_hurried && !self.plan.is_backlog {
            self.prober.pass(self.plan.recovery_max).await?;
        }
        Ok(())
    }

    /// One of those that may die, whichever role it has.
    fn victim(&mut self, may_be: impl Fn(&Process) -> bool) -> Option<usize> {
        let indices: Vec<usize> = (0..self.processes.len())
            .filter(|index| !self.processes[*index].spec.is_kept && may_be(&self.processes[*index]))
            .collect();
        self.random.choice(indices)
    }

    async fn kill(&mut self) -> anyhow::Result<()> {
        let Some(index) = self.victim(|_| true) else {
            return Ok(());
        };
        let number = self.begin(Fault::Kill)?;
        if let Err(error) = self.processes[index].kill().await {
            self.complaints.push(format!("{error:#}"));
        }
        // Some come back at once, some later.
        if self.random.bool() {
            self.rest().await;
        }
        self.restart(index).await?;
        self.end(Fault::Kill, number)
    }

    /// Starts a process again that has ended.
    async fn restart(&mut self, index: usize) -> anyhow::Result<()> {
        let spec = self.processes[index].spec.clone();
        let mut process = self.start(&spec, None)?;
        process.wait_until_ready().await?;
        let ended = std::mem::replace(&mut self.processes[index], process);
        self.note_end(&ended);
        Ok(())
    }

    async fn crash_at_step(&mut self) -> anyhow::Result<()> {
        let Some(index) = self.victim(|_| true) else {
            return Ok(());
        };
        let number = self.begin(Fault::Kill)?;
        let spec = self.processes[index].spec.clone();
        let steps = match spec.role {
            Role::Produce => SOURCE_STEPS,
            Role::Append => APPEND_STEPS,
            Role::Relay => RELAY_STEPS,
            Role::Consume(_) => CONSUME_STEPS,
        };
        // Of a broker that is none of ours the steps are not known.
        let is_known =
            |step: &&&str| self.setting.base.product().is_none() || !step.starts_with("sql.");
        let steps: Vec<&str> = steps.iter().filter(is_known).copied().collect();
        let step = self.random.choice(&steps).copied().unwrap_or_default();
        let point = CrashPoint {
            step: step.to_owned(),
            time: self.random.u64(1..40),
        };
        if let Err(error) = self.processes[index].kill().await {
            self.complaints.push(format!("{error:#}"));
        }
        let mut process = self.start(&spec, Some(&point))?;
        let ended = process.ended(STEP_WITHIN).await.ok();
        let is_reached = ended.is_some_and(|status| status.signal().is_some());
        match ended {
            Some(status) if !is_reached => {
                let log = process.log.display();
                let complaint =
                    format!("on its way to {point} a process ended with {status}: see {log}");
                self.complaints.push(complaint);
            }
            Some(_) => {}
            None => process.kill().await?,
        }
        let ended = std::mem::replace(&mut self.processes[index], process);
        self.note_end(&ended);
        self.restart(index).await?;
        *self.steps.entry(point.step).or_default() += u64::from(is_reached);
        self.end(Fault::Kill, number)
    }

    async fn stand_still(&mut self, millis: std::ops::Range<u64>) -> anyhow::Result<()> {
        let time = Duration::from_millis(self.random.u64(millis));
        let Some(index) = self.victim(|_| true) else {
            return Ok(());
        };
        let number = self.begin(Fault::Stop)?;
        self.processes[index].signal(Signal::STOP)?;
        sleep(time).await;
        self.processes[index].signal(Signal::CONT)?;
        self.end(Fault::Stop, number)
    }

    async fn terminate(&mut self) -> anyhow::Result<()> {
        let Some(index) = self.victim(|_| true) else {
            return Ok(());
        };
        let number = self.begin(Fault::Terminate)?;
        if let Err(error) = self.processes[index].stop().await {
            self.complaints.push(format!("{error:#}"));
        }
        self.restart(index).await?;
        self.end(Fault::Terminate, number)
    }

    /// The second signal ends the process at once, unless it was done before.
    async fn terminate_twice(&mut self) -> anyhow::Result<()> {
        let Some(index) = self.victim(|process| matches!(process.spec.role, Role::Consume(_)))
        else {
            return Ok(());
        };
        let number = self.begin(Fault::Terminate)?;
        let process = &mut self.processes[index];
        process.signal(Signal::TERM)?;
        sleep(Duration::from_millis(self.random.u64(0..100))).await;
        // One that has ended already cannot be told again.
        drop(process.signal(Signal::TERM));
        let status = process.ended(Duration::from_secs(60)).await?;
        if !matches!(status.code(), Some(0 | 130)) {
            let log = process.log.display();
            let complaint = format!("told to stop twice, a process ended with {status}: see {log}");
            self.complaints.push(complaint);
        }
        self.restart(index).await?;
        self.end(Fault::Terminate, number)
    }

    /// What cannot be settled is left to others, and the process ends all the same.
    async fn terminate_while_away(&mut self) -> anyhow::Result<()> {
        let Some(index) = self.victim(|process| matches!(process.spec.role, Role::Consume(_)))
        else {
            return Ok(());
        };
        let number = self.begin(Fault::Terminate)?;
        let away = self.take_away().await?;
        self.processes[index].signal(Signal::TERM)?;
        sleep(Duration::from_millis(self.random.u64(500..4000))).await;
        self.bring_back(away).await?;
        // Whether it could say goodbye is not promised; that it ends is.
        self.processes[index].ended(Duration::from_secs(60)).await?;
        self.restart(index).await?;
        self.end(Fault::Terminate, number)
    }

    async fn join(&mut self) -> anyhow::Result<()> {
        let extra = |process: &&Process| process.spec.name.starts_with("extra");
        let group = self.random.choice(self.plan.groups.clone());
        let member = |spec: &Spec| group.is_some_and(|group| spec.role == Role::Consume(group));
        let like = self.plan.specs.iter().find(|spec| member(spec)).cloned();
        let Some(like) = like.filter(|_| self.processes.iter().filter(extra).count() < EXTRA_MAX)
        else {
            return self.leave().await;
        };
        self.extra += 1;
        let spec = Spec {
            name: format!("extra-{}", self.extra),
            is_kept: false,
            ..like
        };
        let number = self.begin(Fault::MemberJoin)?;
        let mut process = self.start(&spec, None)?;
        process.wait_until_ready().await?;
        self.processes.push(process);
        self.end(Fault::MemberJoin, number)
    }

    async fn leave(&mut self) -> anyhow::Result<()> {
        let Some(index) = self.victim(|process| process.spec.name.starts_with("extra")) else {
            return Ok(());
        };
        let number = self.begin(Fault::MemberLeave)?;
        let mut process = self.processes.swap_remove(index);
        if let Err(error) = process.stop().await {
            self.complaints.push(format!("{error:#}"));
        }
        self.end(Fault::MemberLeave, number)
    }

    /// The group shares its partitions out again before it has come to rest.
    async fn churn(&mut self) -> anyhow::Result<()> {
        for _ in 0..CHURN {
            let begun = Instant::now();
            match self.random.bool() {
                true => self.join().await?,
                false => self.leave().await?,
            }
            sleep(CHURN_EVERY.saturating_sub(begun.elapsed())).await;
        }
        Ok(())
    }

    fn server(&self) -> anyhow::Result<Arc<Server>> {
        let server = self.setting.server.clone();
        server.context("the broker is one of the campaign's own")
    }

    /// Ends the broker by a signal, and starts it again on what it had written.
    async fn end_broker(&mut self, fault: Fault, signal: Signal) -> anyhow::Result<()> {
        let server = self.server()?;
        let number = self.begin(fault)?;
        server.signal(signal)?;
        server.ended().await?;
        if self.random.bool() {
            self.rest().await;
        }
        server.up().await?;
        self.is_there().await?;
        self.end(fault, number)
    }

    async fn pause_broker(&mut self) -> anyhow::Result<()> {
        let server = self.server()?;
        let time = Duration::from_millis(self.random.u64(200..2 * LEASE.as_millis() as u64));
        let number = self.begin(Fault::BrokerStop)?;
        server.signal(Signal::STOP)?;
        sleep(time).await;
        server.signal(Signal::CONT)?;
        self.is_there().await?;
        self.end(Fault::BrokerStop, number)
    }

    /// Waits until a client that knows nothing yet finds the leaders of the tried topic and the
    /// coordinator of every group.
    async fn is_there(&self) -> anyhow::Result<()> {
        let groups = self.plan.groups.clone();
        let groups = groups.into_iter().map(group_name);
        let groups: Vec<Group> = groups
            .map(|name| Group::new(&name))
            .collect::<eventbus::Result<_>>()?;
        patiently(async || {
            let broker = self.site.broker().connect().await?;
            for group in &groups {
                let (group, topics) = (group.clone(), vec![TOPIC]);
                broker.admin(AdminRequest::Lag { group, topics }).await?;
            }
            broker.close().await?;
            Ok(())
        })
        .await
    }

    /// Longer than who writes is ready to wait, now and then.
    async fn lock(&mut self) -> anyhow::Result<()> {
        let number = self.begin(Fault::Other)?;
        let away = self.take_away().await?;
        sleep(Duration::from_millis(self.random.u64(200..7000))).await;
        self.bring_back(away).await?;
        self.end(Fault::Other, number)
    }

    /// Takes the broker away: nobody else can write to its file, or reach its server.
    async fn take_away(&mut self) -> anyhow::Result<Option<sqlx::SqliteConnection>> {
        if self.plan.has_wire {
            self.set_wire(WireFault::Cut);
            return Ok(None);
        }
        let file = SqliteConnectOptions::new().filename(self.site.file("bus"));
        let file = file.busy_timeout(Duration::from_secs(20));
        let mut connection = file.connect().await.context("lock the broker's file")?;
        let lock = sqlx::query("BEGIN IMMEDIATE").execute(&mut connection);
        lock.await.context("lock the broker's file")?;
        Ok(Some(connection))
    }

    async fn bring_back(&mut self, away: Option<sqlx::SqliteConnection>) -> anyhow::Result<()> {
        match away {
            Some(mut connection) => {
                sqlx::query("ROLLBACK").execute(&mut connection).await?;
                connection.close().await?;
            }
            None => self.set_wire(WireFault::None),
        }
        Ok(())
    }

    async fn fill_disk(&mut self) -> anyhow::Result<()> {
        let number = self.begin(Fault::DiskFull)?;
        let time = Duration::from_millis(self.random.u64(300..3000));
        let disk = self
            .tools
            .disk
            .as_ref()
            .context("a small disk is mounted")?;
        disk.fill()?;
        sleep(time).await;
        disk.make_room()?;
        self.end(Fault::DiskFull, number)
    }

    async fn refuse_letters(&mut self) -> anyhow::Result<()> {
        let number = self.begin(Fault::Other)?;
        std::fs::write(&self.tools.letters_away, "")?;
        sleep(Duration::from_millis(self.random.u64(200..2000))).await;
        std::fs::remove_file(&self.tools.letters_away)?;
        self.end(Fault::Other, number)
    }

    fn set_wire(&self, fault: WireFault) {
        if let Some(proxy) = &self.tools.proxy {
            proxy.set(fault);
        }
    }

    /// Harms the wire for a while; now and then for longer than a statement may take.
    async fn harm_wire(&mut self, harm: Harm) -> anyhow::Result<()> {
        let millis = match self.random.u32(0..4) {
            0 => self.random.u64(5_000..9_000),
            _ => self.random.u64(100..2_000),
        };
        let late = |random: &mut fastrand::Rng| Duration::from_millis(random.u64(1..150));
        let (fault, wire) = match harm {
            Harm::HalfOpen => (Fault::HalfOpen, WireFault::HalfOpen),
            Harm::Delay => {
                let to_server = late(&mut self.random);
                let to_client = late(&mut self.random);
                let delay = WireFault::Delay {
                    to_server,
                    to_client,
                };
                (Fault::Delay, delay)
            }
            Harm::LoseAnswers => (Fault::OneWayLoss, WireFault::Lose(Direction::ToClient)),
            Harm::LoseQuestions => (Fault::OneWayLoss, WireFault::Lose(Direction::ToServer)),
            Harm::Truncate => {
                let direction = match self.random.bool() {
                    true => Direction::ToServer,
                    false => Direction::ToClient,
                };
                let after = self.random.usize(0..5_000);
                (Fault::Truncate, WireFault::Truncate { direction, after })
            }
            Harm::LoseCommits => (Fault::ResponseLoss, WireFault::LoseResponse),
            Harm::LateCommits => {
                let late = Duration::from_millis(self.random.u64(100..LEASE.as_millis() as u64));
                (Fault::Delay, WireFault::DelayRequest(late))
            }
            Harm::Misreport => {
                let product = self.setting.base.product();
                let refusals = product.map_or(&[][..], Product::refusals);
                let code = self.random.choice(refusals).copied().unwrap_or_default();
                (Fault::ResponseLoss, WireFault::Misreport(code))
            }
            _ => (Fault::Cut, WireFault::Cut),
        };
        let number = self.begin(fault)?;
        self.set_wire(wire);
        sleep(Duration::from_millis(millis)).await;
        self.set_wire(WireFault::None);
        self.end(fault, number)
    }
}

/// A file system in memory of its own, so that it can be full. Unmounted when it is dropped.
#[derive(Debug)]
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    fn mount(path: PathBuf, size: &str) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&path)?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(&path)
            .output()
            .context("run mount")?;
        let said = String::from_utf8_lossy(&mounted.stderr).into_owned();
        ensure!(
            mounted.status.success(),
            "a small disk cannot be mounted: {said}"
        );
        Ok(Self { path })
    }

    fn ballast(&self) -> PathBuf {
        self.path.join("ballast")
    }

    /// Takes all the room there is.
    fn fill(&self) -> anyhow::Result<()> {
        use std::io::Write as _;

        let mut file = std::fs::File::create(self.ballast())?;
        let block = vec![0; 64 * 1024];
        for length in [block.len(), 4096] {
            while file.write_all(&block[..length]).is_ok() {}
        }
        Ok(())
    }

    fn make_room(&self) -> std::io::Result<()> {
        std::fs::remove_file(self.ballast())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily, because processes that were just killed may not be gone. What cannot be unmounted
        // the machine still names.
        drop(
            Command::new("umount")
                .arg("--lazy")
                .arg(&self.path)
                .output(),
        );
    }
}
