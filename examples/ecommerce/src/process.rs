//! Processes of the shop: the campaign kills them, and the demo may have the services in them.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::brokers::BrokerArgs;
use crate::crash_point::CrashPoint;
use crate::databases::StoreArgs;
use crate::shop::OPEN;

/// How long a process may take to stop.
const STOP_WITHIN: Duration = Duration::from_secs(40);

/// How the services are spread over processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// All in one
    Single,
    /// The first three in one, the others in another
    Split,
    /// All in one, and all but the gateway in another too: two members in each group
    Twins,
    /// Each in its own
    Each,
}

impl Shape {
    /// The services of each process; none means all.
    pub fn processes(self) -> &'static [&'static str] {
        match self {
            Self::Single => &[""],
            Self::Split => &["gateway,order,inventory", "payment,shipping,notification"],
            Self::Twins => &["", "order,inventory,payment,shipping,notification"],
            Self::Each => &[
                "gateway",
                "order",
                "inventory",
                "payment",
                "shipping",
                "notification",
            ],
        }
    }
}

/// What the processes of a shop have in common.
#[derive(Clone, Debug)]
pub struct Site {
    /// Where the files are, and the logs.
    pub data: PathBuf,
    /// On which broker the services meet.
    pub broker: BrokerArgs,
    /// Where each service has its database.
    pub store: StoreArgs,
    /// The gateway's port.
    pub port: u16,
    /// The payment provider.
    pub psp_url: String,
    /// The mail provider.
    pub mailer_url: String,
}

impl Site {
    /// Where the gateway listens.
    pub fn gateway_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Starts a process with these services; none means all.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn start(
        &self,
        only: &'static str,
        crash_at: Option<&CrashPoint>,
    ) -> anyhow::Result<ShopProcess> {
        let name = if only.is_empty() { "all" } else { only };
        let log = self.data.join(format!("{name}.log"));
        let stderr = OpenOptions::new().create(true).append(true).open(&log)?;
        let log_begin = stderr.metadata()?.len();
        let program = std::env::current_exe().context("find this program's own file")?;
        let mut command = Command::new(program);
        command
            .arg("run")
            .arg("--data")
            .arg(&self.data)
            .args(self.broker.arguments())
            .arg("--store")
            .arg(&self.store.store)
            .arg("--port")
            .arg(self.port.to_string())
            .arg("--psp")
            .arg(&self.psp_url)
            .arg("--mailer")
            .arg(&self.mailer_url)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .kill_on_drop(true);
        if !only.is_empty() {
            command.arg("--only").arg(only);
        }
        if let Some(point) = crash_at {
            command.arg("--crash-at").arg(point.to_string());
        }
        let child = command.spawn().context("start a process of the shop")?;
        Ok(ShopProcess {
            only,
            child,
            log,
            log_begin,
        })
    }
}

/// A process of the shop; killed when dropped.
#[derive(Debug)]
pub struct ShopProcess {
    /// Its services; none means all.
    pub only: &'static str,
    /// The process itself.
    pub child: Child,
    /// Where its log is, and where in it this run begins.
    log: PathBuf,
    log_begin: u64,
}

impl ShopProcess {
    /// Where its log is.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Whether it says in its log that it is open.
    ///
    /// # Errors
    ///
    /// When the log cannot be read.
    pub fn says_open(&self) -> anyhow::Result<bool> {
        let mut log = File::open(&self.log)?;
        log.seek(SeekFrom::Start(self.log_begin))?;
        let mut text = Vec::new();
        log.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).contains(OPEN))
    }

    /// Tells it to stop, and waits until it has.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        if let Some(pid) = self.child.id() {
            let told = Command::new("kill")
                .arg("-TERM")
                .arg(pid.to_string())
                .status()
                .await;
            ensure!(
                told.context("run `kill`")?.success(),
                "process {pid} cannot be told to stop"
            );
        }
        let status = timeout(STOP_WITHIN, self.child.wait()).await;
        Ok(status.context("a process was told to stop and goes on")??)
    }
}

/// A port that was free a moment ago: who is killed has to come back to the same.
///
/// # Errors
///
/// When there is none.
pub fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    Ok(listener.local_addr()?.port())
}
