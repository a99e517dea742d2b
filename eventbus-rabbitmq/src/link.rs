//! Connections to a server: made with a deadline, shared, and made anew when they were lost.

use std::sync::Arc;
use std::time::Duration;

use eventbus_core::{Error, ErrorKind, Result};
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::options::ConfirmSelectOptions;
use lapin::{Channel, Connection, ConnectionProperties, Event};
use tokio::runtime::Handle;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::config::RabbitMqConfig;
use crate::error::into_error;
use crate::tls;

/// How long anything that is asked of a server may take.
pub(crate) const ANSWER: Duration = Duration::from_secs(8);

/// How soon, and how rarely at last, it is tried to connect again.
pub(crate) const RECONNECT: (Duration, Duration) =
    (Duration::from_millis(50), Duration::from_secs(2));

/// How often whoever waits for the server to take messages looks whether the connection is still there.
const LOOK: Duration = Duration::from_millis(100);

/// A connection.
pub(crate) struct Link {
    connection: Arc<Connection>,
    /// Why the server takes no messages at the moment, if so.
    blocked: watch::Receiver<Option<String>>,
    /// Hears what the server says of the connection.
    listener: JoinHandle<()>,
    /// What it was made in.
    runtime: Handle,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}

impl Drop for Link {
    /// Ends the connection where nobody did: the client keeps one for ever that was dropped while a consumer
    /// was being made, and with it whatever the server has handed out through it.
    fn drop(&mut self) {
        self.listener.abort();
        if !self.is_open() {
            return;
        }
        let connection = Arc::clone(&self.connection);
        let mut closing = Box::pin(async move { close(&connection).await });
        // Asked for now: consumers that are dropped next would be cancelled one by one otherwise, and
        // later messages handed to others first.
        if (&mut closing).now_or_never().is_none() {
            self.runtime.spawn(in_time(closing));
        }
    }
}

impl Link {
    /// Connects to the first node that answers; `purpose` is shown to operators.
    ///
    /// # Errors
    ///
    /// Those of connecting to the last one.
    pub(crate) async fn connect(config: &RabbitMqConfig, purpose: &str) -> Result<Self> {
        const CONNECT: &str = "connect";
        let name = format!("eventbus {purpose}");
        let uris = config.uris()?;
        let files = tls::files(config).await?;
        // All of them together have the time of one answer.
        let each = ANSWER / uris.len().clamp(1, 4) as u32;
        let mut failure = None;
        for uri in uris {
            let properties =
                ConnectionProperties::default().with_connection_name(name.clone().into());
            let connecting = async {
                let runtime = lapin::runtime::default_runtime()?;
                Connection::connect_uri_with_config(uri, properties, files.clone(), runtime).await
            };
            let connected = timeout(each, connecting).await;
            let error = match connected {
                Ok(Ok(connection)) => return Ok(Self::new(connection)),
                Ok(Err(error)) => into_error(CONNECT, error),
                Err(_) => Error::new(
                    ErrorKind::Unavailable,
                    CONNECT,
                    "the server does not answer: look at host and port of the url, and whether that port speaks AMQP without TLS",
                ),
            };
            let is_final = error.kind() == ErrorKind::Unauthorized;
            failure = Some(error);
            if is_final {
                break;
            }
        }
        let none = || Error::new(ErrorKind::InvalidInput, CONNECT, "no server is named");
        let failure = failure.unwrap_or_else(none);
        Err(failure
            .with("servers", &config.servers)
            .with("vhost", &config.vhost))
    }

    fn new(connection: Connection) -> Self {
        let (tell, blocked) = watch::channel(None);
        let mut events = Box::pin(connection.events_listener());
        let listener = tokio::spawn(async move {
            while let Some(event) = events.next().await {
                match event {
                    Event::ConnectionBlocked(reason) => {
                        tracing::warn!(reason, "RabbitMQ takes no messages");
                        tell.send_replace(Some(reason));
                    }
                    Event::ConnectionUnblocked => {
                        tracing::info!("RabbitMQ takes messages again");
                        tell.send_replace(None);
                    }
                    _ => {}
                }
            }
        });
        Self {
            connection: Arc::new(connection),
            blocked,
            listener,
            runtime: Handle::current(),
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.connection.status().connected()
    }

    /// Most bytes of a frame, which the properties of a message have to fit.
    pub(crate) fn frame_bytes_max(&self) -> usize {
        self.connection.configuration().frame_max() as usize
    }

    /// Why the server takes no messages at the moment, if so.
    pub(crate) fn blocked(&self) -> Option<String> {
        self.blocked.borrow().clone()
    }

    /// Waits until the server takes messages, or the connection is gone.
    pub(crate) async fn unblocked(&self) {
        let mut blocked = self.blocked.clone();
        // The client tells nobody that a connection is gone but whoever asks for something through it.
        while self.is_open() {
            let waited = timeout(LOOK, blocked.wait_for(Option::is_none));
            if waited.await.is_ok() {
                return;
            }
        }
    }

    /// A new channel.
    pub(crate) async fn channel(&self, operation: &'static str) -> Result<Channel> {
        within(operation, self.connection.create_channel()).await
    }

    /// A new channel on which the server says what becomes of each message.
    pub(crate) async fn confirming(&self, operation: &'static str) -> Result<Channel> {
        let channel = self.channel(operation).await?;
        let confirms = channel.confirm_select(ConfirmSelectOptions::default());
        within(operation, confirms).await?;
        Ok(channel)
    }

    /// Ends the connection and all its channels; what was not acknowledged is the next owner's.
    pub(crate) async fn close(&self) {
        in_time(close(&self.connection)).await;
    }
}

async fn close(connection: &Connection) -> lapin::Result<()> {
    connection.close(200, "done".into()).await
}

/// Waits for the end of a connection, but not for ever.
async fn in_time(closing: impl Future<Output = lapin::Result<()>>) {
    match timeout(ANSWER, closing).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection was closed before"),
        Err(_) => tracing::warn!(
            "RabbitMQ does not answer that a connection is to end: it keeps what it has handed out until it sees it gone"
        ),
    }
}

/// Waits for an answer, but not for ever.
pub(crate) async fn within<T>(
    operation: &'static str,
    asked: impl Future<Output = lapin::Result<T>>,
) -> Result<T> {
    let answered = timeout(ANSWER, asked)
        .await
        .map_err(|_| silent(operation))?;
    answered.map_err(|error| into_error(operation, error))
}

/// As [`within`], with what the client itself says.
pub(crate) async fn natively<T>(
    operation: &'static str,
    asked: impl Future<Output = lapin::Result<T>>,
) -> Result<lapin::Result<T>> {
    timeout(ANSWER, asked).await.map_err(|_| silent(operation))
}

/// The server has said nothing for as long as it is waited for.
pub(crate) fn silent(operation: &'static str) -> Error {
    Error::new(
        ErrorKind::Timeout,
        operation,
        "the server has not answered in time",
    )
}

/// A connection that several use, made when it is first needed and again when it was lost.
#[derive(Debug)]
pub(crate) struct SharedLink {
    config: RabbitMqConfig,
    purpose: &'static str,
    link: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Idle,
    Linked(Arc<Link>),
    Closed,
}

impl SharedLink {
    pub(crate) fn new(config: RabbitMqConfig, purpose: &'static str) -> Self {
        Self {
            config,
            purpose,
            link: Mutex::new(State::Idle),
        }
    }

    /// The connection, made anew where need be.
    pub(crate) async fn get(&self, operation: &'static str) -> Result<Arc<Link>> {
        let mut state = self.link.lock().await;
        match &*state {
            State::Linked(link) if link.is_open() => return Ok(Arc::clone(link)),
            State::Closed => return Err(closed(operation)),
            _ => {}
        }
        let link = Arc::new(Link::connect(&self.config, self.purpose).await?);
        *state = State::Linked(Arc::clone(&link));
        Ok(link)
    }

    /// The connection, where there is one.
    pub(crate) async fn present(&self) -> Option<Arc<Link>> {
        match &*self.link.lock().await {
            State::Linked(link) if link.is_open() => Some(Arc::clone(link)),
            _ => None,
        }
    }

    /// A new channel of it.
    pub(crate) async fn channel(&self, operation: &'static str) -> Result<Channel> {
        self.get(operation).await?.channel(operation).await
    }

    pub(crate) async fn close(&self) {
        let state = std::mem::replace(&mut *self.link.lock().await, State::Closed);
        if let State::Linked(link) = state {
            link.close().await;
        }
    }
}

/// What a handle says after it was closed.
pub(crate) fn closed(operation: &'static str) -> Error {
    Error::new(
        ErrorKind::Closed,
        operation,
        "the broker handle was closed: connect again",
    )
}
