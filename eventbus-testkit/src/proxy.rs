//! A wire that can be harmed: a TCP proxy between an adapter and its broker or database.
//!
//! ```text
//!  adapter ──▶ FaultProxy ──▶ server        passes, delays, swallows, truncates or cuts;
//!          ◀──            ◀──               or loses the response to what was served
//! ```
//!
//! # Examples
//!
//! ```
//! use eventbus_testkit::{FaultProxy, WireFault};
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//! use tokio::net::{TcpListener, TcpStream};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! let server = TcpListener::bind("127.0.0.1:0").await?;
//! let proxy = FaultProxy::start(server.local_addr()?.to_string()).await?;
//! let mut client = TcpStream::connect(proxy.address()).await?;
//! let (mut served, _) = server.accept().await?;
//!
//! client.write_all(b"hello").await?;
//! let mut heard = [0; 5];
//! served.read_exact(&mut heard).await?;
//! assert_eq!(&heard, b"hello");
//!
//! proxy.set(WireFault::Cut);
//! assert!(client.read(&mut heard).await.is_err(), "the connection was reset");
//! proxy.heal();
//! assert!(TcpStream::connect(proxy.address()).await.is_ok());
//! # Ok::<(), std::io::Error>(())
//! # }).unwrap();
//! ```

mod amqp;
mod kafka;
mod link;
mod postgres;
mod protocol;
mod redis;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

pub use amqp::{AmqpMethod, AmqpMethods};
pub use kafka::{KafkaApi, Requests};
pub use protocol::{Protocol, Statements};
pub use redis::RedisCommands;

/// What is wrong with a wire, for all connections over it, those that are made meanwhile included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WireFault {
    /// Nothing: everything passes.
    #[default]
    None,
    /// What is sent arrives so much later. Of each direction one piece is on its way at a time, so
    /// that a long delay is a slow wire, too.
    Delay {
        /// For what clients send.
        to_server: Duration,
        /// For what the server sends.
        to_client: Duration,
    },
    /// Connections are reset, and new ones as soon as they are made.
    Cut,
    /// Nothing passes, and nobody hears of it: bytes vanish, and so does the end of a connection.
    HalfOpen,
    /// What is sent in this direction vanishes, and what is sent in the other one passes.
    Lose(Direction),
    /// So many more bytes pass in this direction on each connection, and then it is reset: mostly
    /// within a message.
    Truncate {
        /// In which direction bytes are counted.
        direction: Direction,
        /// How many pass.
        after: usize,
    },
    /// Requests that the [`Protocol`] picks are served; their responses vanish, and then the
    /// connection is reset. So whoever asked does not know what became of it.
    LoseResponse,
    /// Requests that the [`Protocol`] picks arrive so much later, and so does what is sent behind them
    /// on their connection.
    DelayRequest(Duration),
    /// Requests that the [`Protocol`] picks are answered by an error of this number: of Kafka those to
    /// `Produce` and `OffsetCommit`, which are served all the same; of Redis one of the numbers of
    /// [`RedisCommands`], and the command is not served; of AMQP the channel is closed with this number
    /// in place of the method, which is not served. Of `PostgreSQL` none.
    Misreport(i16),
}

/// A direction on a wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums, reason = "a wire has two ends")]
pub enum Direction {
    /// What clients send.
    ToServer,
    /// What the server sends.
    ToClient,
}

/// What passed a proxy since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Traffic {
    /// Connections that were made to it.
    pub connections: u64,
    /// Connections that are open.
    pub open: u64,
    /// Requests that were served and whose response it lost.
    pub responses_lost: u64,
    /// Responses that were made to say an error.
    pub responses_misreported: u64,
}

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    open: AtomicU64,
    responses_lost: AtomicU64,
    responses_misreported: AtomicU64,
}

/// A proxy on a port of its own on loopback, and the handle that says what is wrong with its wire.
///
/// # Contract
///
/// - A connection that has lost bytes is never used again: it is reset when the fault ends.
/// - Each connection holds at most one piece of 16 KiB for each direction, and of Kafka one response that
///   is rewritten, of AMQP one frame.
/// - All its tasks end when the handle is dropped, and all connections with them.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    fault: watch::Sender<WireFault>,
    counters: Arc<Counters>,
    /// Aborted when this is dropped; it owns the tasks of all connections.
    acceptor: JoinHandle<()>,
}

impl FaultProxy {
    /// Starts a proxy to `upstream`, such as `127.0.0.1:5432`, that knows nothing of what passes.
    ///
    /// # Errors
    ///
    /// When there is no port to listen on.
    pub async fn start(upstream: impl Into<String>) -> io::Result<Self> {
        Self::start_with(upstream, Protocol::Opaque).await
    }

    /// Starts a proxy that follows what passes, so that it can harm single requests and responses.
    ///
    /// # Errors
    ///
    /// When there is no port to listen on.
    pub async fn start_with(upstream: impl Into<String>, protocol: Protocol) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (fault, heard) = watch::channel(WireFault::None);
        let counters = Arc::new(Counters::default());
        let wire = Wire {
            address,
            upstream: upstream.into(),
            protocol,
            fault: heard,
            counters: Arc::clone(&counters),
        };
        Ok(Self {
            address,
            fault,
            counters,
            acceptor: tokio::spawn(wire.accept(listener)),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A URL of the server with this address in place of the server's; none if it has no host.
    pub fn url(&self, url: &str) -> Option<String> {
        let begin = url.find("://")? + 3;
        let end = url[begin..]
            .find(['/', '?'])
            .map_or(url.len(), |at| begin + at);
        let host = url[begin..end]
            .rfind('@')
            .map_or(begin, |at| begin + at + 1);
        let (before, behind) = (&url[..host], &url[end..]);
        (host < end).then(|| format!("{before}{}{behind}", self.address))
    }

    /// Does harm from now on, in place of what was set before.
    pub fn set(&self, fault: WireFault) {
        self.fault.send_replace(fault);
    }

    /// Lets everything pass from now on, on connections that have lost nothing and on new ones.
    pub fn heal(&self) {
        self.set(WireFault::None);
    }

    /// What is wrong at present.
    pub fn fault(&self) -> WireFault {
        *self.fault.borrow()
    }

    /// What passed until now.
    pub fn traffic(&self) -> Traffic {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            connections: load(&self.counters.connections),
            open: load(&self.counters.open),
            responses_lost: load(&self.counters.responses_lost),
            responses_misreported: load(&self.counters.responses_misreported),
        }
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

/// What the tasks of a proxy share.
#[derive(Clone, Debug)]
struct Wire {
    /// Where it begins.
    address: SocketAddr,
    upstream: String,
    protocol: Protocol,
    fault: watch::Receiver<WireFault>,
    counters: Arc<Counters>,
}

impl Wire {
    async fn accept(self, listener: TcpListener) {
        let mut links = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                // What has ended is forgotten at once, so that many connections take no memory.
                Some(_) = links.join_next() => continue,
            };
            match accepted {
                Ok((client, _)) => {
                    self.counters.connections.fetch_add(1, Ordering::Relaxed);
                    links.spawn(self.clone().connect(client));
                }
                // Mostly a lack of descriptors, which passes.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    async fn connect(self, client: TcpStream) {
        let _open = Open::count(&self.counters);
        if *self.fault.borrow() == WireFault::Cut {
            return link::reset(&client);
        }
        match TcpStream::connect(&self.upstream).await {
            Ok(server) => link::pass(client, server, self).await,
            Err(_) => link::reset(&client),
        }
    }
}

/// Counts a connection while it is open.
struct Open(Arc<Counters>);

impl Open {
    fn count(counters: &Arc<Counters>) -> Self {
        counters.open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counters))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}
