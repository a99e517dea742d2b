//! When a service is told to end.

use std::io;

/// Resolves at the first Ctrl-C or SIGTERM. A second one ends the process at once, which loses
/// nothing: what was not settled is handed out again.
///
/// # Panics
///
/// When the process may not listen to signals.
///
/// # Examples
///
/// ```no_run
/// # use eventbus::prelude::*;
/// # async fn run(consumer: eventbus::Consumer) -> eventbus::Result<()> {
/// consumer.run_until(shutdown_signal()).await
/// # }
/// ```
pub async fn shutdown_signal() {
    let first = listen().expect("a process may listen to its own signals");
    first.await;
    tokio::spawn(async {
        if let Ok(second) = listen() {
            second.await;
            // The shell's code for a process that was interrupted.
            std::process::exit(130);
        }
    });
}

#[cfg(unix)]
fn listen() -> io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn listen() -> io::Result<impl Future<Output = ()>> {
    Ok(async {
        // Without a signal to wait for there is nothing to react to.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    })
}
