//! The gateway's listener: started in the background, stopped without cutting anybody off.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Context as _;
use eventbus::prelude::EventBus;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::warn;

use super::board::Board;
use super::routes;

/// How long open connections may take to finish when the gateway stops.
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// A gateway that is listening.
#[derive(Debug)]
pub struct Gateway {
    /// Where, such as `http://127.0.0.1:8080`.
    pub url: String,
    stop: oneshot::Sender<()>,
    server: JoinHandle<std::io::Result<()>>,
}

impl Gateway {
    /// Listens and serves in the background.
    ///
    /// # Errors
    ///
    /// When the port is taken.
    pub async fn start(bus: EventBus, board: Board, port: u16) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
        let listener = listener.with_context(|| {
            format!("listen on port {port}: choose another with `--port`, 0 takes a free one")
        })?;
        let url = format!("http://{}", listener.local_addr()?);
        let (stop, stopped) = oneshot::channel();
        let routes = routes(bus, board);
        let server = tokio::spawn(async move {
            axum::serve(listener, routes)
                .with_graceful_shutdown(async {
                    // A dropped sender stops the gateway as well.
                    let _ = stopped.await;
                })
                .await
        });
        Ok(Self { url, stop, server })
    }

    /// Takes no more orders, answers those that are being taken, and ends.
    pub async fn stop(self) {
        // The receiver is gone when the server ended by itself.
        let _ = self.stop.send(());
        if timeout(STOP_WITHIN, self.server).await.is_err() {
            warn!("open connections were cut off");
        }
    }
}
