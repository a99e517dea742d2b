//! Stand-ins for the providers the shop depends on: each a process of its own that speaks HTTP on
//! loopback, remembers every call, in a file if there is one, and lives no longer than the process
//! that started it.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::Context as _;
use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use clap::Args;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use crate::client::IDEMPOTENCY_KEY;

mod ledger;
pub mod mailer;
pub mod psp;

/// Where a fake listens.
#[derive(Args, Clone, Debug)]
pub struct FakeArgs {
    /// The port on loopback; 0 takes a free one. The address is the first line on stdout
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// The file in which it remembers what it was asked; without one, it forgets with its end
    #[arg(long, value_name = "FILE")]
    ledger: Option<PathBuf>,
}

/// A fake running as a child process; killed when dropped, and ends itself when we end.
#[derive(Debug)]
pub struct FakeProcess {
    /// Where it listens, such as `http://127.0.0.1:40123`.
    pub url: String,
    /// Its stdin stays open as long as we live: that is how it knows.
    child: Option<Child>,
}

impl FakeProcess {
    /// Starts `ecommerce <command> <args>` and waits for its address.
    ///
    /// # Errors
    ///
    /// When this program cannot start itself, or the child says no address.
    pub async fn start(command: &str, args: &[OsString]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("find this program's own file")?;
        let mut child = Command::new(program)
            .arg(command)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start `ecommerce {command}`"))?;
        let stdout = child.stdout.take().context("the child has a stdout")?;
        let url = BufReader::new(stdout).lines().next_line().await?;
        let url = url.with_context(|| {
            format!("`ecommerce {command}` ended without an address: run it by hand to see why")
        })?;
        Ok(Self {
            url,
            child: Some(child),
        })
    }

    /// Kills it, as a crash would.
    ///
    /// # Errors
    ///
    /// When it cannot be waited for.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(child) = &mut self.child {
            child.kill().await.context("kill a fake provider")?;
        }
        Ok(())
    }

    /// The provider at `url` if there is one, otherwise `ecommerce <command>` with its ledger in
    /// the data directory.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub async fn unless_given(
        url: Option<String>,
        command: &str,
        data: &Path,
    ) -> anyhow::Result<Self> {
        match url {
            Some(url) => Ok(Self { url, child: None }),
            None => Self::start(command, &ledger_of(command, data)).await,
        }
    }
}

/// The arguments that let a fake keep its ledger in the data directory.
pub fn ledger_of(command: &str, data: &Path) -> [OsString; 2] {
    let ledger = data.join(format!("{command}.ledger"));
    ["--ledger".into(), ledger.into()]
}

/// Asks the fake at `url` what it was asked.
///
/// # Errors
///
/// When it does not answer.
pub async fn ask<T: DeserializeOwned>(url: &str) -> anyhow::Result<T> {
    let client = reqwest::Client::builder().no_proxy().build()?;
    let response = client.get(format!("{url}/calls")).send().await;
    let response = response.with_context(|| format!("ask the fake provider at {url}"))?;
    Ok(response.error_for_status()?.json().await?)
}

/// Serves `routes` on loopback until stdin closes, or ctrl-c when a person started it.
async fn serve(port: u16, routes: Router) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .await
        .with_context(|| {
            format!("listen on port {port}: is it taken? `--port 0` finds a free one")
        })?;
    let address = listener.local_addr()?;
    writeln!(std::io::stdout(), "http://{address}")?;
    tokio::select! {
        served = async { axum::serve(listener, routes).await } => served.context("serve HTTP"),
        () = told_to_stop() => Ok(()),
    }
}

/// Ctrl-c in a terminal reaches the whole process group; the fakes have to outlive the services
/// that are still finishing then, so only the end of stdin counts when it is a pipe.
async fn told_to_stop() {
    let by_hand = std::io::stdin().is_terminal();
    let (closed, closing) = oneshot::channel();
    // A plain thread, because tokio's stdin would keep the runtime from ending.
    std::thread::spawn(move || {
        // Whatever ends reading means that nobody holds the other end.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        // The receiver is gone when the server ended first.
        let _ = closed.send(());
    });
    let interrupted = async {
        loop {
            let signal = tokio::signal::ctrl_c().await;
            if by_hand || signal.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        _ = closing => {}
        () = interrupted => {}
    }
}

/// The answer when the ledger cannot be written: nothing happened, and the caller may come again.
fn not_written(error: &std::io::Error) -> Response {
    let text = format!("the ledger cannot be written: {error}");
    (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
}

/// The idempotency key of a call; providers insist on one.
fn idempotency_key(headers: &HeaderMap) -> Option<String> {
    let key = headers.get(IDEMPOTENCY_KEY)?.to_str().ok()?;
    (!key.is_empty()).then(|| key.to_owned())
}
