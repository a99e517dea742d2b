//! An ingress: messages of a queue that somebody else fills are moved to a topic, so that every group gets
//! them. Here is what users see; how messages are moved is in `ingress/mover.rs`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use eventbus_core::{Error, Group, Result, Topic};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::adopted::RabbitMqQueue;
use crate::broker::RabbitMqBroker;

mod journal;
mod mover;

use mover::Mover;

const INGRESS: &str = "start ingress";

impl RabbitMqBroker {
    /// Sets up an ingress: the messages of a queue that somebody else has declared are moved to a topic,
    /// each once, so that every group of the topic gets them.
    ///
    /// `topic` is its name on the broker, with the prefix of the bus, if any.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> eventbus_core::Result<()> {
    /// use eventbus_core::{EventBus, Topic};
    /// use eventbus_rabbitmq::RabbitMqBroker;
    ///
    /// let rabbit = RabbitMqBroker::from_url("amqp://rabbit.example/shop").await?;
    /// let bus = EventBus::builder(rabbit.clone()).build();
    /// // … start the consumers, and then:
    /// let orders = rabbit.ingress("order_events", Topic::from_static("orders")).key("order_id");
    /// let orders = orders.groups(&["payment", "inventory"])?.spawn().await?;
    /// bus.service("shop").background("orders", |stop| orders.run_until(stop));
    /// # Ok(())
    /// # }
    /// ```
    pub fn ingress(&self, queue: impl Into<RabbitMqQueue>, topic: Topic) -> RabbitMqIngressBuilder {
        RabbitMqIngressBuilder {
            broker: self.clone(),
            queue: queue.into(),
            topic,
            groups: Vec::new(),
        }
    }
}

/// Sets up an ingress; made by [`RabbitMqBroker::ingress`].
#[derive(Debug)]
#[must_use = "nothing is moved until `.spawn().await`"]
pub struct RabbitMqIngressBuilder {
    broker: RabbitMqBroker,
    queue: RabbitMqQueue,
    topic: Topic,
    groups: Vec<Group>,
}

impl RabbitMqIngressBuilder {
    /// Takes the key of each message from a field of its JSON body, such as `order_id` or
    /// `data.order_id`, and where it is not there from the header `eb-key`. A message without either is
    /// moved without a key, and counted.
    pub fn key(mut self, field: impl Into<String>) -> Self {
        self.queue = self.queue.with_key(field);
        self
    }

    /// Allows that the queue is not durable: a restart of the server loses it and all that is in it.
    pub fn volatile(mut self) -> Self {
        self.queue = self.queue.volatile();
        self
    }

    /// Creates the queues of these groups before anything is moved, so that they get everything, also
    /// where their consumers start later. A group that is not there gets nothing of what is moved before
    /// it is.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the name of a group is not allowed.
    pub fn groups(mut self, groups: &[&str]) -> Result<Self> {
        for group in groups {
            self.groups.push(Group::new(group)?);
        }
        Ok(self)
    }

    /// Starts it. Of several processes that run the same ingress one moves messages, and the others take
    /// its place when it ends.
    ///
    /// # Contract
    ///
    /// - A message is taken from the queue when the topic has it in the queue of every group.
    /// - A message has the id that its headers, its body or its property `message_id` says, which has to
    ///   be unique among all that are published to the queue. Any other is given one, which is noted
    ///   before it is published: what is published again, because the process, its connection or the
    ///   server ended between, has the same id, so that an inbox handles it once. After a second such
    ///   end while the first is being mended, and where the queue loses acknowledgements (a classic one
    ///   whose server crashes), it may be published with another id; it is never lost.
    /// - Order is that of the queue, for each key, as long as nobody else consumes it.
    /// - What is no JSON is moved as it is: each group stores it as a dead letter. What the topic cannot
    ///   take, because it is too large, goes to the queue `QUEUE:refused`, is counted and logged.
    ///
    /// # Errors
    ///
    /// `NotFound` when there is no such queue; `Unsupported` when it is not durable and that was not
    /// allowed, is deleted with its last consumer, or is a stream; `Conflict` when a group reads it as it
    /// is; those of the topic.
    pub async fn spawn(self) -> Result<RabbitMqIngress> {
        let Self {
            broker,
            queue,
            topic,
            groups,
        } = self;
        let shared = broker.shared();
        let closing = shared.closing(INGRESS)?;
        let (stop, stopping) = watch::channel(false);
        let status = Arc::<Status>::default();
        let mover = Mover {
            config: shared.config.clone(),
            queue,
            topic,
            topics: Arc::clone(&shared.topics),
            groups,
            status: Arc::clone(&status),
        };
        let session = mover.open().await?;
        let task = tokio::spawn(mover.run(session, stopping, closing));
        Ok(RabbitMqIngress {
            _broker: broker,
            status,
            stop,
            task,
        })
    }
}

/// An ingress that runs. Dropped, it ends at once; what it was about to move is moved by the next one.
#[derive(Debug)]
#[must_use = "an ingress that is dropped ends"]
pub struct RabbitMqIngress {
    /// Kept, as long as it runs: an ingress ends with its broker.
    _broker: RabbitMqBroker,
    status: Arc<Status>,
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<()>>,
}

/// What an ingress is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RabbitMqIngressStatus {
    /// Whether it is the one that moves messages; otherwise it waits to take another one's place.
    pub is_active: bool,
    /// Messages that were moved.
    pub moved: u64,
    /// Those of them in which the field of the key was not found.
    pub unkeyed: u64,
    /// Messages that went to the queue `QUEUE:refused`, because the topic cannot take them.
    pub refused: u64,
    /// How many others consume the queue: what they take does not come to the topic.
    pub competitors: u32,
    /// Why nothing is moved at the moment, if so.
    pub error: Option<String>,
}

#[derive(Debug, Default)]
struct Status(Mutex<RabbitMqIngressStatus>);

impl Status {
    fn lock(&self) -> MutexGuard<'_, RabbitMqIngressStatus> {
        // A status is a set of plain values: none is half written.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RabbitMqIngress {
    /// What it is doing.
    pub fn status(&self) -> RabbitMqIngressStatus {
        self.status.lock().clone()
    }

    /// Ends it: what it is moving is finished, unless the server does not take it now; then it is moved
    /// by the next one.
    ///
    /// # Errors
    ///
    /// What it had ended with before.
    pub async fn shutdown(mut self) -> Result<()> {
        self.stop.send_replace(true);
        joined((&mut self.task).await)
    }

    /// Runs until `signal` resolves, or it cannot go on.
    ///
    /// # Errors
    ///
    /// Why it could not go on. What passes, such as a server that is away, is in its
    /// [`status`](Self::status) meanwhile, and is no error.
    pub async fn run_until(mut self, signal: impl Future<Output = ()>) -> Result<()> {
        tokio::select! {
            ended = &mut self.task => return joined(ended),
            () = signal => {}
        }
        self.shutdown().await
    }
}

impl Drop for RabbitMqIngress {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn joined(ended: std::result::Result<Result<()>, tokio::task::JoinError>) -> Result<()> {
    match ended {
        Ok(result) => result,
        Err(error) => Err(Error::new(
            eventbus_core::ErrorKind::Internal,
            INGRESS,
            "the ingress did not come to its end",
        )
        .with_source(error)),
    }
}
