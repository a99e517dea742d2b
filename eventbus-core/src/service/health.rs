//! How a service is: whether it may be given work, and what its consumers and brokers are doing.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout};

use crate::bus::EventBus;
use crate::consumer::{ConsumerState, ConsumerStatus, Runtime};
use crate::error::{Error, error_chain};
use crate::message::{Group, Topic};

/// How long a broker may take to answer before it counts as away.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// How long an answer is good for: whoever asks often does not burden the broker.
const FRESH: Duration = Duration::from_secs(1);

/// Tells how a [`Service`](crate::Service) is; clones are the same. Made by
/// [`Service::handle`](crate::Service::handle).
#[derive(Clone, Debug)]
pub struct ServiceHandle {
    watched: Arc<Watched>,
}

/// What a service is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServiceState {
    /// Its parts were not started.
    Starting,
    /// Its parts run.
    Running,
    /// Its parts are being stopped, one after another.
    Stopping {
        /// The failure that ended it; `None` after a signal.
        failure: Option<String>,
    },
    /// All its parts have ended.
    Stopped,
}

/// How a service is.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ServiceHealth {
    /// Its name.
    pub service: Arc<str>,
    /// What it is doing.
    pub state: ServiceState,
    /// Its brokers, the first one being that of the bus it was made of.
    pub brokers: Vec<BrokerHealth>,
    /// Its consumers, in the order in which they were added.
    pub consumers: Vec<ConsumerHealth>,
}

/// How a broker is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BrokerHealth {
    /// How it is called, such as `kafka`.
    pub system: &'static str,
    /// How long its answer took.
    pub took: Duration,
    /// Why it is away, if it is.
    pub error: Option<String>,
}

/// How a consumer is.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConsumerHealth {
    /// Its group.
    pub group: Group,
    /// The topics it consumes.
    pub topics: Vec<Topic>,
    /// What it is doing.
    pub status: ConsumerStatus,
}

impl ServiceHandle {
    pub(super) fn new(watched: Arc<Watched>) -> Self {
        Self { watched }
    }

    /// What the service is doing. Never blocks and asks nobody.
    pub fn state(&self) -> ServiceState {
        self.watched.lock().state.clone()
    }

    /// How the service is. Asks its brokers, at most once a second and for at most two, however
    /// many ask this.
    pub async fn health(&self) -> ServiceHealth {
        let brokers = self.watched.ask_brokers().await;
        let Seen {
            state, consumers, ..
        } = self.watched.lock().clone();
        let consumers = consumers.iter().map(|runtime| ConsumerHealth {
            group: runtime.group.clone(),
            topics: runtime.topics.clone(),
            status: runtime.status(),
        });
        ServiceHealth {
            service: Arc::clone(&self.watched.name),
            state,
            brokers,
            consumers: consumers.collect(),
        }
    }
}

impl ServiceHealth {
    /// Whether the service may be given work: it runs, its brokers answer, no consumer has failed.
    ///
    /// A consumer that is paused or holds leaves it ready, and [`concerns`](Self::concerns) name it.
    /// Readiness decides who is sent requests, and consumers fetch their work themselves: to send no
    /// requests would not spare what they need, and when it is shared, all replicas would be gone.
    pub fn is_ready(&self) -> bool {
        self.reasons().is_empty()
    }

    /// Why it is not ready; empty when it is.
    pub fn reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        reasons.extend(match &self.state {
            ServiceState::Running => None,
            ServiceState::Starting => Some("the service is starting".to_owned()),
            ServiceState::Stopping { failure: None } => Some("the service is stopping".to_owned()),
            ServiceState::Stopping {
                failure: Some(failure),
            } => Some(format!("the service is stopping: {failure}")),
            ServiceState::Stopped => Some("the service has stopped".to_owned()),
        });
        let away = self.brokers.iter().filter_map(|broker| {
            let error = broker.error.as_ref()?;
            Some(format!("the broker is away: {}: {error}", broker.system))
        });
        reasons.extend(away);
        let failed = self.consumers.iter().filter_map(|consumer| {
            let ConsumerState::Failed { error } = &consumer.status.state else {
                return None;
            };
            Some(format!(
                "the consumer has failed: {}: {error}",
                consumer.group
            ))
        });
        reasons.extend(failed);
        reasons
    }

    /// What somebody should look at although the service is ready: consumers that are paused or
    /// hold, and keys that are blocked.
    pub fn concerns(&self) -> Vec<String> {
        self.consumers
            .iter()
            .flat_map(ConsumerHealth::concerns)
            .collect()
    }
}

impl ConsumerHealth {
    fn concerns(&self) -> Vec<String> {
        let mut concerns = Vec::new();
        concerns.extend(match &self.status.state {
            ConsumerState::Paused => Some(format!("the consumer is paused: {}", self.group)),
            ConsumerState::Holding { reason } => {
                Some(format!("the consumer holds: {}: {reason}", self.group))
            }
            ConsumerState::Running | ConsumerState::Failed { .. } => None,
        });
        let blocked = self.status.counts.blocked_keys;
        if blocked > 0 {
            concerns.push(format!("{blocked} keys are blocked: {}", self.group));
        }
        concerns
    }
}

/// What a service and its handles share.
pub(super) struct Watched {
    pub(super) name: Arc<str>,
    seen: Mutex<Seen>,
    /// The last answers of the brokers; held while they are asked.
    answers: tokio::sync::Mutex<Option<(Instant, Vec<BrokerHealth>)>>,
}

#[derive(Clone)]
struct Seen {
    state: ServiceState,
    /// One for each connection.
    buses: Vec<EventBus>,
    consumers: Vec<Arc<Runtime>>,
}

impl Watched {
    pub(super) fn new(name: &str, bus: EventBus) -> Self {
        Self {
            name: Arc::from(name),
            seen: Mutex::new(Seen {
                state: ServiceState::Starting,
                buses: vec![bus],
                consumers: Vec::new(),
            }),
            answers: tokio::sync::Mutex::new(None),
        }
    }

    pub(super) fn add(&self, consumer: &Arc<Runtime>) {
        let mut seen = self.lock();
        let known = |bus: &EventBus| bus.shares_connection_with(&consumer.bus);
        if !seen.buses.iter().any(known) {
            seen.buses.push(consumer.bus.clone());
        }
        seen.consumers.push(Arc::clone(consumer));
    }

    /// Says that the parts run, until what it returns is dropped.
    pub(super) fn run(self: &Arc<Self>) -> Run {
        self.lock().state = ServiceState::Running;
        Run(Arc::clone(self))
    }

    pub(super) fn stop(&self, failure: Option<&Error>) {
        let failure = failure.map(|error| error_chain(error));
        self.lock().state = ServiceState::Stopping { failure };
    }

    pub(super) fn buses(&self) -> Vec<EventBus> {
        self.lock().buses.clone()
    }

    async fn ask_brokers(&self) -> Vec<BrokerHealth> {
        let mut answers = self.answers.lock().await;
        if let Some((asked, answers)) = &*answers
            && asked.elapsed() < FRESH
        {
            return answers.clone();
        }
        let brokers = join_all(self.buses().iter().map(ask)).await;
        *answers = Some((Instant::now(), brokers.clone()));
        brokers
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched")
            .field("name", &self.name)
            .field("state", &self.lock().state)
            .finish_non_exhaustive()
    }
}

/// A run of a service; its end, also in a panic, is seen by the handles.
pub(super) struct Run(Arc<Watched>);

impl Drop for Run {
    fn drop(&mut self) {
        self.0.lock().state = ServiceState::Stopped;
    }
}

async fn ask(bus: &EventBus) -> BrokerHealth {
    let begun = Instant::now();
    let error = match timeout(ANSWER_MAX, bus.health()).await {
        Ok(Ok(_)) => None,
        Ok(Err(error)) => Some(error_chain(&error)),
        Err(_) => Some(format!("no answer within {ANSWER_MAX:?}")),
    };
    BrokerHealth {
        system: bus.capabilities().system,
        took: begun.elapsed(),
        error,
    }
}
