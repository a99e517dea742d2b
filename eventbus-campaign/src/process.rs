//! A tried process as the harness sees it: started, watched, stopped, continued and killed by its id.

use std::fs::OpenOptions;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::crash_point::CrashPoint;

/// How long a process may take to start, and to stop.
const START_WITHIN: Duration = Duration::from_secs(60);
const STOP_WITHIN: Duration = Duration::from_secs(60);

/// What a process is, whichever time it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The subcommand.
    pub role: Role,
    /// What its log is called.
    pub name: String,
    /// What it is told besides.
    pub args: Vec<String>,
    /// Whether it lives through everything, so that what it takes can be watched.
    pub is_kept: bool,
}

/// What a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// It publishes.
    Produce,
    /// It commits to an outbox.
    Append,
    /// It publishes what is in the outbox.
    Relay,
    /// It handles, in this group.
    Consume(u16),
}

impl Role {
    /// The subcommand.
    #[must_use]
    pub fn command(self) -> &'static str {
        match self {
            Self::Produce => "produce",
            Self::Append => "append",
            Self::Relay => "relay",
            Self::Consume(_) => "consume",
        }
    }

    /// Whether it brings messages in.
    #[must_use]
    pub fn is_source(self) -> bool {
        matches!(self, Self::Produce | Self::Append)
    }
}

/// How a process says it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Status {
    /// Whether it does its work.
    pub is_ready: bool,
    /// How many messages it brought in, or handled.
    pub messages: u64,
    /// How many tasks it has.
    pub tasks: u64,
}

/// A process that runs, or has ended. Dropped, it is killed.
#[derive(Debug)]
pub struct Process {
    /// What it is.
    pub spec: Spec,
    /// Where its log is.
    pub log: PathBuf,
    child: Child,
    /// Whoever holds the other end ends when this is closed.
    _stdin: ChildStdin,
    status: watch::Receiver<Status>,
}

impl Process {
    /// Starts this program with a subcommand.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start(
        spec: &Spec,
        args: &[String],
        crash_at: Option<&CrashPoint>,
        logs: &Path,
    ) -> anyhow::Result<Self> {
        let log = logs.join(format!("{}.log", spec.name));
        let stderr = OpenOptions::new().create(true).append(true).open(&log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg(spec.role.command())
            .args(args)
            .args(&spec.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .process_group(0)
            .kill_on_drop(true);
        if let Some(point) = crash_at {
            command.arg("--crash-at").arg(point.to_string());
        }
        let mut child = command.spawn().context("start a tried process")?;
        let stdin = child.stdin.take().context("a process has an input")?;
        let stdout = child.stdout.take().context("a process has an output")?;
        let (sender, status) = watch::channel(Status::default());
        tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                sender.send_modify(|status| hear(&line, status));
            }
        });
        Ok(Self {
            spec: spec.clone(),
            log,
            child,
            _stdin: stdin,
            status,
        })
    }

    /// How it said it was last.
    #[must_use]
    pub fn status(&self) -> Status {
        *self.status.borrow()
    }

    /// Its id, while it has not ended.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits until it does its work.
    ///
    /// # Errors
    ///
    /// When it does not, or ends.
    pub async fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let mut status = self.status.clone();
        let ready = timeout(START_WITHIN, status.wait_for(|status| status.is_ready));
        let ready = match ready.await {
            Ok(Ok(_)) => true,
            Ok(Err(_)) | Err(_) => false,
        };
        let log = self.log.display();
        ensure!(
            ready,
            "a process does not start, or ended at once: see {log}"
        );
        Ok(())
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    ///
    /// When it does not in time.
    pub async fn ended(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let ended = timeout(limit, self.child.wait()).await;
        let log = self.log.display();
        Ok(ended.with_context(|| format!("a process does not end: see {log}"))??)
    }

    /// Kills it, and waits until it is dead.
    ///
    /// # Errors
    ///
    /// When it had ended by itself before, other than by an abort.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = self.log.display();
            ensure!(
                status.signal().is_some(),
                "a process ended by itself with {status}: see {log}"
            );
        }
        self.child.kill().await.context("kill a process")
    }

    /// Tells it to stop, and waits until it has.
    ///
    /// # Errors
    ///
    /// When it does not, or says that something went wrong.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::TERM)?;
        self.has_stopped().await
    }

    /// Waits until it has ended well.
    ///
    /// # Errors
    ///
    /// When it does not, or says that something went wrong.
    pub async fn has_stopped(&mut self) -> anyhow::Result<()> {
        let status = self.ended(STOP_WITHIN).await?;
        let log = self.log.display();
        ensure!(
            status.success(),
            "a process was told to stop and ended with {status}: see {log}"
        );
        Ok(())
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self
            .child
            .id()
            .and_then(|id| Pid::from_raw(id.cast_signed()));
        let log = self.log.display();
        let pid = pid.with_context(|| format!("a process has ended by itself: see {log}"))?;
        kill_process(pid, signal).with_context(|| format!("send {signal:?}"))
    }
}

fn hear(line: &str, status: &mut Status) {
    let mut words = line.split_whitespace();
    let number = |words: &mut std::str::SplitWhitespace<'_>| {
        words.next().and_then(|word| word.parse().ok()).unwrap_or(0)
    };
    match words.next() {
        Some("ready") => status.is_ready = true,
        Some("status") => {
            status.messages = number(&mut words);
            status.tasks = number(&mut words);
        }
        _ => {}
    }
}
