//! Publishing: permits, the idempotent producer, and delivery reports.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use eventbus_core::{
    Capabilities, Error, ErrorKind, Message, Outcome, PublishError, Result, Topic, Unpublished,
};
use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::producer::{
    DeliveryResult, Producer as _, ProducerContext, PurgeConfig, ThreadedProducer,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::client::{Complaints, Context, blocking};
use crate::config::{KILOBYTES_IN_FLIGHT, MESSAGES_IN_FLIGHT};
use crate::error::{into_error, of_code, outcome};
use crate::in_flight::{BatchId, Failures, InFlight};
use crate::record::to_record;
use crate::topics::Topics;

const PUBLISH: &str = "publish";

/// Most messages that are given to the client at once, before others on the runtime get their turn.
const PORTION: usize = 512;

/// Publishes to one cluster.
pub(crate) struct Producer {
    config: ClientConfig,
    context: Context,
    in_flight: Arc<InFlight>,
    messages: Arc<Semaphore>,
    kilobytes: Arc<Semaphore>,
    /// Replaced when the client has lost its place on the brokers; none after closing.
    client: RwLock<Option<Client>>,
}

type Client = Arc<ThreadedProducer<Reports>>;

/// How long a client that is replaced may wait for what it has sent.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Hears what became of messages.
struct Reports {
    context: Context,
    in_flight: Arc<InFlight>,
}

impl ClientContext for Reports {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.context.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.context.error(error, reason);
    }

    fn stats_raw(&self, _statistics: &[u8]) {}
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, token: usize) {
        let failure = result.as_ref().err();
        let failure = failure.map(|(error, _)| error.rdkafka_error_code().unwrap_or(Code::Unknown));
        self.in_flight.answered(token, failure);
    }
}

impl std::fmt::Debug for Producer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Producer")
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

/// Messages that were given to the client, and those it did not take.
struct Portion {
    first: usize,
    answer: oneshot::Receiver<Failures>,
}

impl Producer {
    pub(crate) fn new(config: ClientConfig, complaints: Complaints) -> Result<Self> {
        let producer = Self {
            config,
            context: Context { complaints },
            in_flight: Arc::default(),
            messages: Arc::new(Semaphore::new(MESSAGES_IN_FLIGHT)),
            kilobytes: Arc::new(Semaphore::new(KILOBYTES_IN_FLIGHT)),
            client: RwLock::new(None),
        };
        let client = producer.connect()?;
        *producer
            .client
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(client);
        Ok(producer)
    }

    fn connect(&self) -> Result<Client> {
        let reports = Reports {
            context: self.context.clone(),
            in_flight: Arc::clone(&self.in_flight),
        };
        let client = ThreadedProducer::from_config_and_context(&self.config, reports);
        Ok(Arc::new(
            client.map_err(|error| into_error("connect", error))?,
        ))
    }

    fn client(&self) -> Option<Client> {
        self.client
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Publishes a batch; see [`eventbus_core::Publisher::publish`].
    pub(crate) async fn publish(
        &self,
        capabilities: &Capabilities,
        topics: &Topics,
        batch: Vec<Message>,
    ) -> Result<(), PublishError> {
        let Some(client) = self.client() else {
            return Err(closed(batch));
        };
        // Nearly every batch goes as it is.
        let (mut places, mut messages, mut refused) = match capabilities.is_sound(&batch) {
            true => (None, batch, Vec::new()),
            false => {
                let (sound, refused) = capabilities.check_batch(batch);
                let (places, messages): (Vec<_>, Vec<_>) = sound.into_iter().unzip();
                (Some(places), messages, refused)
            }
        };
        let missing = missing(topics, &messages).await;
        if !missing.is_empty() {
            let all = places.unwrap_or_else(|| (0..messages.len()).collect());
            let all = all.into_iter().zip(messages);
            let (known, theirs) = keep_known(all, &missing, &mut refused);
            (places, messages) = (Some(known), theirs);
        }
        let mut failures = self.send(&client, &messages).await;
        if !failures.is_empty() {
            self.look_after(&client, topics, &messages, &failures);
            failures.sort_unstable_by_key(|(index, _)| *index);
            let is_closed = self.client().is_none();
            refused.extend(unpublished(places, messages, &failures, is_closed));
        }
        PublishError::of(refused)
    }

    /// Gives messages to the client, portion by portion, and waits for what became of them.
    async fn send(&self, client: &Client, messages: &[Message]) -> Vec<(usize, Code)> {
        let mut portions = Vec::with_capacity(messages.len().div_ceil(PORTION));
        let mut failures = Vec::new();
        let mut first = 0;
        while first < messages.len() {
            let (count, kilobytes) = portion(&messages[first..]);
            let Some(permits) = self.permits(count, kilobytes).await else {
                failures.extend((first..messages.len()).map(|index| (index, Code::PurgeQueue)));
                break;
            };
            let part = &messages[first..first + count];
            let (answer, refused) = self.give(client, permits, part);
            failures.extend(
                refused
                    .into_iter()
                    .map(|(index, code)| (first + index, code)),
            );
            portions.push(Portion { first, answer });
            first += count;
            if first < messages.len() {
                tokio::task::yield_now().await;
            }
        }
        for portion in portions {
            // The sender goes with the client's last report.
            let failed = portion.answer.await.unwrap_or_default();
            let failed = failed.into_iter();
            failures.extend(failed.map(|(index, code)| (portion.first + index as usize, code)));
        }
        failures
    }

    async fn permits(
        &self,
        messages: usize,
        kilobytes: usize,
    ) -> Option<[OwnedSemaphorePermit; 2]> {
        // Both are far below 2^32.
        let messages = Arc::clone(&self.messages).acquire_many_owned(messages as u32);
        let messages = messages.await.ok()?;
        let kilobytes = Arc::clone(&self.kilobytes).acquire_many_owned(kilobytes as u32);
        Some([messages, kilobytes.await.ok()?])
    }

    /// Gives a portion to the client, which takes each message or says at once why not.
    fn give(
        &self,
        client: &Client,
        permits: [OwnedSemaphorePermit; 2],
        messages: &[Message],
    ) -> (oneshot::Receiver<Failures>, Vec<(usize, Code)>) {
        let (batch, answer): (BatchId, _) = self.in_flight.begin(permits);
        self.in_flight.add(batch, messages.len() as u32);
        let mut refused = Vec::new();
        let mut lines = Vec::with_capacity(512);
        for (index, message) in messages.iter().enumerate() {
            let token = batch.token(index as u32);
            if let Err((error, _)) = client.send(to_record(message, token, &mut lines)) {
                let code = error.rdkafka_error_code().unwrap_or(Code::Unknown);
                self.in_flight.answered(token, None);
                refused.push((index, code));
            }
        }
        self.in_flight.sent(batch);
        (answer, refused)
    }

    /// Does what failures ask for: a topic that is gone is looked for anew, and a client that has lost
    /// its place on the brokers is replaced.
    fn look_after(
        &self,
        client: &Client,
        topics: &Topics,
        messages: &[Message],
        failures: &[(usize, Code)],
    ) {
        for (index, code) in failures {
            let is_missing = matches!(
                code,
                Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition
            );
            if is_missing && let Some(message) = messages.get(*index) {
                topics.forget(&message.topic);
            }
        }
        let Some((code, reason)) = client.client().fatal_error() else {
            return;
        };
        let mut current = self.client.write().unwrap_or_else(PoisonError::into_inner);
        if !current.as_ref().is_some_and(|it| Arc::ptr_eq(it, client)) {
            return;
        }
        tracing::warn!(%code, reason, "the Kafka producer begins anew");
        match self.connect() {
            Ok(fresh) => {
                let old = current.replace(fresh);
                drop(current);
                // It waits for its thread.
                std::thread::spawn(move || {
                    if let Some(old) = old {
                        // What is on its way is heard of first: it may yet be taken.
                        let _ = old.flush(LAST_WORDS);
                        end(old);
                    }
                });
            }
            Err(error) => tracing::error!(%error, "the Kafka producer could not begin anew"),
        }
    }

    /// Waits for what is in flight, at most so long, and ends the client.
    pub(crate) async fn close(&self, timeout: Duration) -> Result<()> {
        let client = self
            .client
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(client) = client else {
            return Ok(());
        };
        self.messages.close();
        let flushed = blocking(move || {
            let flushed = client.flush(timeout);
            end(client);
            flushed
        });
        let flushed = flushed.await?;
        flushed.map_err(|error| into_error("close", error))
    }
}

/// Ends a client. What it still has is reported first, as not published: dropping it would leave those
/// who published without an answer.
fn end(client: Client) {
    client.purge(PurgeConfig::default().queue().inflight());
    if let Err(error) = client.flush(Duration::from_secs(1)) {
        tracing::debug!(%error, "a producer ends without having reported everything");
    }
}

/// The topics of a batch that are missing and are not created, each with the reason.
async fn missing(topics: &Topics, batch: &[Message]) -> Vec<(Topic, Error)> {
    let mut last: Option<&Topic> = None;
    let mut missing = Vec::new();
    for message in batch {
        // Mostly a batch is of one topic.
        if last == Some(&message.topic) {
            continue;
        }
        last = Some(&message.topic);
        if let Err(error) = topics.ensure(PUBLISH, &message.topic).await {
            missing.push((message.topic.clone(), error));
        }
    }
    missing
}

/// Takes out the messages of topics that are missing.
fn keep_known(
    messages: impl Iterator<Item = (usize, Message)>,
    missing: &[(Topic, Error)],
    refused: &mut Vec<Unpublished>,
) -> (Vec<usize>, Vec<Message>) {
    let known = messages.filter_map(|(index, message)| {
        let fault = missing.iter().find(|(topic, _)| *topic == message.topic);
        let Some((topic, error)) = fault else {
            return Some((index, message));
        };
        let error = Error::new(error.kind(), PUBLISH, error.to_string())
            .with_retry(error.retry())
            .with("topic", topic);
        refused.push(Unpublished::new(index, message, Outcome::NotTaken, error));
        None
    });
    known.unzip()
}

/// How many messages from here on make a portion, and the kilobytes they take.
fn portion(messages: &[Message]) -> (usize, usize) {
    let mut bytes = 0;
    let mut count = 0;
    for message in messages.iter().take(PORTION) {
        let size = message.size();
        if count > 0 && (bytes + size) / 1024 + 1 > KILOBYTES_IN_FLIGHT / 4 {
            break;
        }
        bytes += size;
        count += 1;
    }
    (count, (bytes / 1024 + 1).min(KILOBYTES_IN_FLIGHT))
}

/// The messages that failed, given back; failures are in the order of the messages. Their places in
/// the batch are said where they are others than here.
fn unpublished(
    places: Option<Vec<usize>>,
    messages: Vec<Message>,
    failures: &[(usize, Code)],
    is_closed: bool,
) -> Vec<Unpublished> {
    let mut failures = failures.iter().peekable();
    let mut found = Vec::with_capacity(failures.len());
    for (index, message) in messages.into_iter().enumerate() {
        let place = places.as_ref().map_or(index, |places| places[index]);
        if let Some((_, code)) = failures.next_if(|(failed, _)| *failed == index) {
            let error = match code {
                Code::PurgeQueue | Code::PurgeInflight if is_closed => closed_error(),
                // The client was replaced under it.
                Code::PurgeQueue | Code::PurgeInflight => {
                    of_code(PUBLISH, Code::Fatal).with("topic", &message.topic)
                }
                code => of_code(PUBLISH, *code).with("topic", &message.topic),
            };
            found.push(Unpublished::new(place, message, outcome(*code), error));
        }
    }
    found
}

fn closed(batch: Vec<Message>) -> PublishError {
    let refused = batch.into_iter().enumerate().map(|(index, message)| {
        Unpublished::new(index, message, Outcome::NotTaken, closed_error())
    });
    PublishError::new(refused.collect())
}

fn closed_error() -> Error {
    Error::new(
        ErrorKind::Closed,
        PUBLISH,
        "the broker handle was closed: connect again",
    )
}
