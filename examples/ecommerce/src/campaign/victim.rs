//! The processes of a campaign: the shop's, which die and start again, and the providers'.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use fastrand::Rng;
use tokio::time::{sleep, timeout};

use super::journal::{Journal, Note};
use super::{CampaignArgs, REFUSED, REVIEWED};
use crate::crash_point::CrashPoint;
use crate::fake::{FakeProcess, ledger_of};
use crate::process::{ShopProcess, Site, free_port};

/// How long a process may take to start.
const START_WITHIN: Duration = Duration::from_secs(30);
/// How often a log is looked into.
const GLANCE: Duration = Duration::from_millis(5);

/// Everything that runs in a campaign.
#[derive(Debug)]
pub struct Yard {
    site: Site,
    seed: u64,
    journal: Arc<Journal>,
    victims: Vec<Victim>,
    /// The payment provider.
    pub psp: Provider,
    /// The mail provider.
    pub mailer: Provider,
    restarts: Vec<Instant>,
    complaints: Vec<String>,
}

/// A process of the shop.
#[derive(Debug)]
struct Victim {
    process: ShopProcess,
    started: Instant,
}

/// A provider that can be killed and comes back where it was.
#[derive(Debug)]
pub struct Provider {
    command: &'static str,
    args: Vec<OsString>,
    /// Where it listens.
    pub url: String,
    process: FakeProcess,
}

impl Yard {
    /// Starts everything.
    ///
    /// # Errors
    ///
    /// When something does not start.
    pub async fn open(
        args: &CampaignArgs,
        data: &Path,
        journal: Arc<Journal>,
    ) -> anyhow::Result<Self> {
        let seed = args.seed.to_string();
        let faults = ["--seed", &seed, "--refuse", REFUSED, "--review", REVIEWED];
        let faults = faults.map(OsString::from);
        let psp = Provider::start("fake-psp", data, &faults).await?;
        let mailer = Provider::start("fake-mailer", data, &[]).await?;
        let site = Site {
            data: data.to_owned(),
            broker: args.broker.clone(),
            store: args.store.clone(),
            port: free_port()?,
            psp_url: psp.url.clone(),
            mailer_url: mailer.url.clone(),
        };
        let mut yard = Self {
            site,
            seed: args.seed,
            journal,
            victims: Vec::new(),
            psp,
            mailer,
            restarts: Vec::new(),
            complaints: Vec::new(),
        };
        for only in args.shape.processes() {
            let victim = yard.start(only, None)?;
            yard.victims.push(victim);
            yard.wait_until_open(yard.victims.len() - 1).await?;
        }
        Ok(yard)
    }

    /// The gateway.
    pub fn gateway_url(&self) -> String {
        self.site.gateway_url()
    }

    /// When processes were started again.
    pub fn restarts(&self) -> Vec<Instant> {
        self.restarts.clone()
    }

    /// Processes that ended when nobody ended them, or did not end well.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// Kills a process when it has run for so long, and starts it again.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn kill_one(&mut self, random: &mut Rng, after: Duration) -> anyhow::Result<()> {
        let index = random.usize(0..self.victims.len());
        sleep(after.saturating_sub(self.victims[index].started.elapsed())).await;
        self.kill(index).await?;
        self.restart(index, None)
    }

    /// Tells a process to stop when it has been open for so long, and starts it again.
    ///
    /// # Errors
    ///
    /// When it does not start, or not stop.
    pub async fn stop_one(&mut self, random: &mut Rng, after: Duration) -> anyhow::Result<()> {
        let index = random.usize(0..self.victims.len());
        self.wait_until_open(index).await?;
        sleep(after).await;
        self.stop(index).await?;
        self.restart(index, None)
    }

    /// Lets each process in turn run into a step, and starts it again; false when none of them
    /// reached it.
    ///
    /// # Errors
    ///
    /// When a process does not start.
    pub async fn crash_at(&mut self, point: &CrashPoint, within: Duration) -> anyhow::Result<bool> {
        let mut reached = false;
        for index in 0..self.victims.len() {
            self.kill(index).await?;
            self.restart(index, Some(point))?;
            let victim = &mut self.victims[index];
            match timeout(within, victim.process.child.wait()).await {
                Ok(status) => {
                    let status = status?;
                    self.note_end(index, "crashed", status);
                    // Without a code it was a signal, and nobody else sent one.
                    if status.code().is_none() {
                        reached = true;
                    } else {
                        self.complain(index, status);
                    }
                }
                Err(_) => self.kill(index).await?,
            }
            self.restart(index, None)?;
        }
        Ok(reached)
    }

    /// Kills a provider and starts it again.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn kill_provider(&mut self, random: &mut Rng) -> anyhow::Result<()> {
        let provider = if random.bool() {
            &mut self.psp
        } else {
            &mut self.mailer
        };
        self.journal.note(Note::Ended(provider.command));
        provider.kill_and_start().await
    }

    /// Lets the payment provider know all cards, and look into none, from now on.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn heal(&mut self) -> anyhow::Result<()> {
        let refuse = self.psp.args.iter().position(|arg| arg == "--refuse");
        if let Some(at) = refuse {
            self.psp.args.truncate(at);
        }
        self.psp.kill_and_start().await
    }

    /// Tells all processes to stop.
    ///
    /// # Errors
    ///
    /// When one does not.
    pub async fn stop_all(&mut self) -> anyhow::Result<()> {
        for index in 0..self.victims.len() {
            self.wait_until_open(index).await?;
            self.stop(index).await?;
        }
        Ok(())
    }

    async fn kill(&mut self, index: usize) -> anyhow::Result<()> {
        let victim = &mut self.victims[index];
        if let Some(status) = victim.process.child.try_wait()? {
            self.complain(index, status);
            return Ok(());
        }
        victim
            .process
            .child
            .kill()
            .await
            .context("kill a process of the shop")?;
        if let Some(status) = victim.process.child.try_wait()? {
            self.note_end(index, "killed", status);
        }
        Ok(())
    }

    async fn stop(&mut self, index: usize) -> anyhow::Result<()> {
        let victim = &mut self.victims[index];
        let status = victim.process.stop().await?;
        self.note_end(index, "stopped", status);
        if !status.success() {
            self.complain(index, status);
        }
        Ok(())
    }

    fn restart(&mut self, index: usize, crash_at: Option<&CrashPoint>) -> anyhow::Result<()> {
        let only = self.victims[index].process.only;
        self.victims[index] = self.start(only, crash_at)?;
        self.restarts.push(Instant::now());
        Ok(())
    }

    fn start(&self, only: &'static str, crash_at: Option<&CrashPoint>) -> anyhow::Result<Victim> {
        let process = self.site.start(only, crash_at)?;
        let name = if only.is_empty() { "all" } else { only };
        self.journal.note(Note::Started(name));
        Ok(Victim {
            process,
            started: Instant::now(),
        })
    }

    /// Waits until a process says in its log that it is open.
    async fn wait_until_open(&mut self, index: usize) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_WITHIN;
        loop {
            let victim = &mut self.victims[index];
            if victim.process.says_open()? {
                return Ok(());
            }
            if let Some(status) = victim.process.child.try_wait()? {
                self.complain(index, status);
                self.restart(index, None)?;
            }
            ensure!(
                Instant::now() < deadline,
                "the shop does not open (seed {})",
                self.seed
            );
            sleep(GLANCE).await;
        }
    }

    fn note_end(&self, index: usize, how: &str, status: ExitStatus) {
        let name = self.victims[index].process.only;
        self.journal
            .note(Note::Ended(&format!("{name} {how}: {status}")));
    }

    fn complain(&mut self, index: usize, status: ExitStatus) {
        self.note_end(index, "ended by itself or badly", status);
        let log = self.victims[index].process.log().display();
        self.complaints
            .push(format!("a process ended with {status}: see {log}"));
    }
}

impl Provider {
    async fn start(command: &'static str, data: &Path, more: &[OsString]) -> anyhow::Result<Self> {
        let mut args = ledger_of(command, data).to_vec();
        args.extend(["--port".into(), free_port()?.to_string().into()]);
        args.extend_from_slice(more);
        let process = FakeProcess::start(command, &args).await?;
        Ok(Self {
            command,
            args,
            url: process.url.clone(),
            process,
        })
    }

    async fn kill_and_start(&mut self) -> anyhow::Result<()> {
        self.process.kill().await?;
        self.process = FakeProcess::start(self.command, &self.args).await?;
        Ok(())
    }
}
