//! The recorder in a process of its own, which nobody kills.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use eventbus_verify::{Client, Ledger, Recorder, RunId};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{sleep, timeout};

const START_WITHIN: Duration = Duration::from_secs(10);
const STOP_WITHIN: Duration = Duration::from_secs(120);

/// A recorder that runs.
#[derive(Debug)]
pub struct Recording {
    /// Where it listens.
    pub socket: PathBuf,
    /// The harness's own connection.
    pub client: Arc<Client>,
    ledger: PathBuf,
    child: Child,
    stdin: ChildStdin,
}

impl Recording {
    /// Starts a recorder whose ledger and socket lie in a directory.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn start(directory: &Path, run: RunId) -> anyhow::Result<Self> {
        let (ledger, socket) = (directory.join("ledger"), directory.join("recorder"));
        let mut child = Command::new(std::env::current_exe()?)
            .arg("recorder")
            .arg(&ledger)
            .arg(&socket)
            .arg(run.0.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("start the recorder")?;
        let stdin = child.stdin.take().context("a process has an input")?;
        let deadline = Instant::now() + START_WITHIN;
        let client = loop {
            match Client::connect(&socket) {
                Ok(client) => break client,
                Err(error) => ensure!(Instant::now() < deadline, "{error}"),
            }
            sleep(Duration::from_millis(10)).await;
        };
        Ok(Self {
            socket,
            client: Arc::new(client),
            ledger,
            child,
            stdin,
        })
    }

    /// Ends the recorder, and reads what it wrote.
    ///
    /// # Errors
    ///
    /// When it lacks something.
    pub async fn finish(mut self) -> anyhow::Result<Ledger> {
        self.client.flush(STOP_WITHIN)?;
        drop(self.stdin);
        let status = timeout(STOP_WITHIN, self.child.wait()).await;
        let status = status.context("the recorder does not end")??;
        ensure!(status.success(), "the recorder ended with {status}");
        let ledger = self.ledger.clone();
        Ok(tokio::task::spawn_blocking(move || Ledger::read(&ledger)).await??)
    }
}

/// Records until the standard input ends.
///
/// # Errors
///
/// Those of the recorder.
pub fn record(ledger: &Path, socket: &Path, run: u32) -> anyhow::Result<()> {
    let recorder = Recorder::start(ledger, socket, RunId(run))?;
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    recorder.stop()?;
    Ok(())
}
