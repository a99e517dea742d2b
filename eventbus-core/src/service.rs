//! A service: consumers, servers and what runs beside them, started together and stopped in order.
//!
//! ```text
//!  signal, or the first failure
//!    └▶ not ready ─▶ notice ─▶ servers ─▶ consumers ─▶ background ─▶ buses closed
//!                    (wait)    accept     finish,       relays,
//!                              no more    settle,       health page
//!                                         leave
//! ```

use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use crate::bus::EventBus;
use crate::clock::FOREVER;
use crate::consumer::Consumer;
use crate::error::{BoxError, Error, ErrorKind, Result};

mod health;
mod parts;

pub use health::{BrokerHealth, ConsumerHealth, ServiceHandle, ServiceHealth, ServiceState};

use health::Watched;
use parts::Parts;

/// How long a broker has to take its leave, however late it is.
const CLOSE_MIN: Duration = Duration::from_secs(1);

/// Consumers, servers and what runs beside them, made by [`EventBus::service`].
///
/// Whatever ends it, a signal or the first part that fails, it ends in this order: it is not ready
/// any more; its servers take no more requests and answer the open ones; its consumers finish what
/// they began, settle and leave their groups; what runs in the background ends; the buses are closed.
///
/// # Examples
///
/// ```
/// # use eventbus_macros::Event;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Event, Serialize, Deserialize)]
/// # #[event(crate = "eventbus_core", type = "OrderCreated", topic = "order-events", key = "order_id")]
/// # struct OrderCreated { order_id: u64 }
/// use eventbus_core::{BoxError, Context, EventBus, MemoryBroker};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let bus = EventBus::new(MemoryBroker::new());
/// let payments = bus.consumer("payments").on(async |_: OrderCreated, _: Context| Ok(())).spawn().await?;
///
/// let service = bus
///     .service("payments")
///     .consumer(payments)
///     .server("http", |stop| async {
///         stop.await; // such as `axum::serve(listener, app).with_graceful_shutdown(stop)`
///         Ok::<(), BoxError>(())
///     });
/// let health = service.handle(); // what `/readyz` asks
/// let asked_to_end = async { assert!(health.health().await.is_ready()) };
/// service.run_until(asked_to_end).await?;
/// assert!(!health.health().await.is_ready());
/// # Ok::<(), eventbus_core::Error>(())
/// # }).unwrap();
/// ```
#[must_use = "nothing runs until `.run_until(…).await`"]
pub struct Service {
    watched: Arc<Watched>,
    consumers: Vec<Consumer>,
    servers: Vec<Part>,
    background: Vec<Part>,
    deadline: Duration,
    notice: Duration,
}

/// A part that was not started.
struct Part {
    name: String,
    start: Box<dyn FnOnce(Stopping) -> Running + Send>,
}

type Running = Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send>>;

/// Resolves when a part of a service has to end.
pub struct Stopping(Pin<Box<dyn Future<Output = ()> + Send>>);

impl Future for Stopping {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for Stopping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stopping")
    }
}

impl Service {
    pub(crate) fn new(bus: EventBus, name: &str) -> Self {
        Self {
            watched: Arc::new(Watched::new(name, bus)),
            consumers: Vec::new(),
            servers: Vec::new(),
            background: Vec::new(),
            deadline: Duration::from_secs(25),
            notice: Duration::ZERO,
        }
    }

    /// Adds a consumer. Its bus is closed with the service, also where it is another one.
    pub fn consumer(mut self, consumer: Consumer) -> Self {
        self.watched.add(consumer.runtime());
        self.consumers.push(consumer);
        self
    }

    /// Adds a server, or something else that brings work in: it is the first to be stopped. What
    /// `start` makes runs until [`Stopping`] resolves and then ends by itself; when it ends earlier,
    /// the service does, too.
    pub fn server<P, E>(
        mut self,
        name: impl Into<String>,
        start: impl FnOnce(Stopping) -> P + Send + 'static,
    ) -> Self
    where
        P: IntoFuture<Output = Result<(), E>>,
        P::IntoFuture: Send + 'static,
        E: Into<BoxError>,
    {
        self.servers.push(Part::new(name.into(), start));
        self
    }

    /// Adds what the other parts need to the end, or what is to be seen until then, such as a health
    /// page on a port of its own: it is stopped when the consumers are. It may end by itself.
    pub fn background<P, E>(
        mut self,
        name: impl Into<String>,
        start: impl FnOnce(Stopping) -> P + Send + 'static,
    ) -> Self
    where
        P: IntoFuture<Output = Result<(), E>>,
        P::IntoFuture: Send + 'static,
        E: Into<BoxError>,
    {
        self.background.push(Part::new(name.into(), start));
        self
    }

    /// Sets how long stopping takes at most; by default 25 seconds. Servers get half of it, handlers
    /// end at nine tenths; what is late is dropped, and what was not settled is handed out again.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline.min(FOREVER);
        self
    }

    /// Sets how long servers go on taking requests after a signal, so that load balancers notice
    /// that the service is not ready; by default not at all, and at most a quarter of the
    /// [`deadline`](Self::deadline).
    pub fn notice(mut self, notice: Duration) -> Self {
        self.notice = notice;
        self
    }

    /// What tells how the service is, now and while it runs.
    pub fn handle(&self) -> ServiceHandle {
        ServiceHandle::new(Arc::clone(&self.watched))
    }

    /// Starts all parts, runs until `signal` resolves or a part fails, and stops in order.
    ///
    /// # Cancellation
    ///
    /// A dropped future is a crash: all parts are dropped, and what was not settled is handed out
    /// again.
    ///
    /// # Errors
    ///
    /// The first that came, naming the part: what ended the service, or what stopping met. Further
    /// ones are logged.
    pub async fn run_until(self, signal: impl Future<Output = ()>) -> Result<()> {
        let watched = Arc::clone(&self.watched);
        let (deadline, notice) = (self.deadline, self.notice.min(self.deadline / 4));
        let mut stages = Stages::start(self);
        // Says that it is stopped, also when this future is dropped.
        let _run = watched.run();
        let mut errors = Vec::new();
        tokio::select! {
            () = signal => {}
            failure = stages.failed() => errors.push(failure),
        }
        watched.stop(errors.first());
        let begun = Instant::now();
        if errors.is_empty() {
            tokio::time::sleep(notice).await;
        }
        stages.stop(begun, deadline, &mut errors).await;
        close(&watched, begun + deadline, &mut errors).await;
        let mut errors = errors.into_iter();
        let first = errors.next();
        for error in errors {
            tracing::error!(?error, "something more did not stop cleanly");
        }
        first.map_or(Ok(()), Err)
    }
}

impl Part {
    fn new<P, E>(name: String, start: impl FnOnce(Stopping) -> P + Send + 'static) -> Self
    where
        P: IntoFuture<Output = Result<(), E>>,
        P::IntoFuture: Send + 'static,
        E: Into<BoxError>,
    {
        let start = |stopping: Stopping| -> Running {
            let running = start(stopping).into_future();
            Box::pin(async { running.await.map_err(Into::into) })
        };
        Self {
            name,
            start: Box::new(start),
        }
    }
}

/// The parts that run, by when they are stopped.
struct Stages {
    servers: Parts,
    consumers: Parts,
    background: Parts,
}

impl Stages {
    fn start(service: Service) -> Self {
        let name = &service.watched.name;
        for bus in service.watched.buses() {
            bus.start_schedule();
        }
        let mut stages = Self {
            servers: Parts::new(name),
            consumers: Parts::new(name),
            background: Parts::that_may_end(name),
        };
        for consumer in service.consumers {
            let part = format!("consumer {}", consumer.group());
            let stop = stages.consumers.stopping();
            let run = async { Ok(consumer.run_until_deadline(stop).await?) };
            stages.consumers.spawn(part, run);
        }
        for (parts, kept) in [
            (&mut stages.background, service.background),
            (&mut stages.servers, service.servers),
        ] {
            for part in kept {
                let stop = parts.stopping();
                let stop = Stopping(Box::pin(async {
                    stop.await;
                }));
                parts.spawn(part.name, (part.start)(stop));
            }
        }
        stages
    }

    /// Resolves with the error of the first part that fails.
    async fn failed(&mut self) -> Error {
        tokio::select! {
            failure = self.servers.failed() => failure,
            failure = self.consumers.failed() => failure,
            failure = self.background.failed() => failure,
        }
    }

    async fn stop(mut self, begun: Instant, deadline: Duration, errors: &mut Vec<Error>) {
        let (end, handlers_end) = (begun + deadline, begun + deadline * 9 / 10);
        let servers_end = Instant::now() + end.saturating_duration_since(Instant::now()) / 2;
        self.servers.stop(servers_end, servers_end, errors).await;
        self.consumers.stop(handlers_end, end, errors).await;
        self.background.stop(end, end, errors).await;
    }
}

/// Closes every bus once.
async fn close(watched: &Watched, deadline: Instant, errors: &mut Vec<Error>) {
    for bus in watched.buses() {
        let deadline = deadline.max(Instant::now() + CLOSE_MIN);
        let closed = tokio::time::timeout_at(deadline, bus.close()).await;
        let closed = closed.unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Timeout,
                "close bus",
                "the broker did not answer in time: it notices by itself that the connection is gone",
            ))
        });
        errors.extend(
            closed
                .err()
                .map(|error| error.with("service", &watched.name)),
        );
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |parts: &[Part]| -> Vec<_> { parts.iter().map(|it| it.name.clone()).collect() };
        f.debug_struct("Service")
            .field("name", &self.watched.name)
            .field("consumers", &self.consumers)
            .field("servers", &names(&self.servers))
            .field("background", &names(&self.background))
            .finish_non_exhaustive()
    }
}
