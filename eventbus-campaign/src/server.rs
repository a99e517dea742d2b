//! A broker of the campaign's own, which `dev/brokers` starts, so that it may be harmed.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::sleep;

use crate::product::Product;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../dev/brokers");
/// Where `dev/brokers` is told that a broker's files lie.
const DATA: &str = "DEV_BROKERS_DATA";
/// And how often Redis is to write its file: before it acknowledges.
const FSYNC: (&str, &str) = ("DEV_BROKERS_REDIS_FSYNC", "always");
/// How long it may take to end when it is told to.
const END_WITHIN: Duration = Duration::from_secs(60);

/// A broker that runs, or was killed. Dropped, it is removed.
#[derive(Debug)]
pub struct Server {
    product: Product,
    directory: TempDir,
    url: String,
}

impl Server {
    /// Starts a broker with its files in a directory of its own, in `data` where that is said.
    ///
    /// # Errors
    ///
    /// When it does not start; what `dev/brokers` said is in it.
    pub async fn start(product: Product, data: Option<&Path>) -> anyhow::Result<Self> {
        let mut builder = tempfile::Builder::new();
        let prefix = format!("eventbus-verify-{}-", product.command());
        // RabbitMQ runs as a user of its own, who has to enter it.
        builder.prefix(&prefix);
        builder.permissions(Permissions::from_mode(0o755));
        let directory = match data {
            // The script goes elsewhere.
            Some(data) => builder.tempdir_in(std::path::absolute(data)?),
            None => builder.tempdir(),
        };
        let mut server = Self {
            product,
            directory: directory.context("make a directory for a broker")?,
            url: String::new(),
        };
        server.url = server.up().await?;
        Ok(server)
    }

    /// Where clients reach it.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.files().join("log")
    }

    fn files(&self) -> PathBuf {
        self.directory.path().join(self.product.command())
    }

    /// Starts it, unless it runs, and waits until it gives work to clients.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn up(&self) -> anyhow::Result<String> {
        let output = Command::new(SCRIPT)
            .args(["up", self.product.command()])
            .env(DATA, self.directory.path())
            .env(FSYNC.0, FSYNC.1)
            .stdin(Stdio::null())
            .output()
            .await
            .context("run dev/brokers")?;
        let (name, said) = (self.product.name(), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{name} does not start: {said}");
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut lines = lines.lines().filter_map(|line| line.split_once('='));
        let url = lines.find(|(name, _)| *name == self.product.variable());
        Ok(url.context("dev/brokers says where it is")?.1.to_owned())
    }

    /// Sends a signal to its process.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.pid().context("the broker has ended by itself")?;
        kill_process(pid, signal).with_context(|| format!("send {signal:?} to the broker"))
    }

    /// Waits until its process has ended.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn ended(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while self.pid().is_some() {
            let is_late = begun.elapsed() > END_WITHIN;
            ensure!(!is_late, "the broker does not end");
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Its process, known by the id that was recorded and by its directory or settings.
    fn pid(&self) -> Option<Pid> {
        let id = std::fs::read_to_string(self.files().join("pid")).ok()?;
        let pid = Pid::from_raw(id.trim().parse().ok()?)?;
        let process = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
        let word = match self.product {
            Product::Kafka => self.files().join("server.properties"),
            Product::RabbitMq => self.files(),
            Product::Redis => {
                let place = std::fs::read_link(process.join("cwd")).ok()?;
                return (place == self.files().join("data")).then_some(pid);
            }
        };
        // Of one that has ended and was not waited for, it is empty.
        let command = std::fs::read(process.join("cmdline")).ok()?;
        let word = word.as_os_str().as_encoded_bytes();
        let mut words = command.split(|byte| *byte == 0);
        words.any(|one| one == word).then_some(pid)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its data are of no use any more, so it need not end well.
        if let Some(pid) = self.pid() {
            let _ = kill_process(pid, Signal::KILL);
        }
        let down = std::process::Command::new(SCRIPT)
            .args(["down", self.product.command()])
            .env(DATA, self.directory.path())
            .stdin(Stdio::null())
            .output();
        // What is left lies in a directory that is removed.
        drop(down);
    }
}
