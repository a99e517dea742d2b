//! What happened, read from the topics by a reader that moves no group.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::Context as _;
use eventbus::prelude::{EventBus, Start, Topic, Until};
use eventbus::{Reader, Record};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::events::{OrderId, topics};

/// When nothing comes for so long, nothing more is taken to come.
const QUIET: Duration = Duration::from_secs(1);

/// Reads what happens: afterwards where the broker lets it, otherwise from now on.
#[derive(Debug)]
pub struct Watch {
    bus: EventBus,
    live: Option<Live>,
}

/// What collects from now on, and how it is told to end.
#[derive(Debug)]
struct Live {
    collecting: JoinHandle<anyhow::Result<Vec<Recorded>>>,
    end: oneshot::Sender<()>,
}

/// Every event there was, in the order of its time.
#[derive(Debug)]
pub struct History(Vec<Recorded>);

/// What the timeline and the summary want to know of an event.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Its id.
    pub id: String,
    /// The event that caused it.
    pub cause: Option<String>,
    /// Its type.
    pub event_type: String,
    /// The service that published it.
    pub source: String,
    /// When, in microseconds since 1970.
    pub micros: i64,
    /// The order.
    pub order_id: String,
}

impl Watch {
    /// Begins, before anything happens.
    ///
    /// # Errors
    ///
    /// When the broker cannot be read.
    pub async fn begin(bus: &EventBus) -> anyhow::Result<Self> {
        let live = match bus.capabilities().replay {
            true => None,
            false => Some(Live::begin(bus).await?),
        };
        let bus = bus.clone();
        Ok(Self { bus, live })
    }

    /// Ends, after everything has happened.
    ///
    /// # Errors
    ///
    /// When the broker cannot be read, or was away meanwhile.
    pub async fn end(self) -> anyhow::Result<History> {
        let mut events = match self.live {
            Some(live) => live.end().await?,
            None => read_back(&self.bus).await?,
        };
        events.sort_by_key(|event| event.micros);
        Ok(History(events))
    }
}

async fn read_back(bus: &EventBus) -> anyhow::Result<Vec<Recorded>> {
    let reader = bus.read(&names(), Start::Earliest, Some(Until::Now)).await;
    let mut reader = reader.context("read the topics from their beginning")?;
    let mut events = Vec::new();
    while let Some(record) = reader.next().await? {
        events.push(Recorded::of(bus, record)?);
    }
    Ok(events)
}

fn names() -> Vec<Topic> {
    topics().into_iter().map(|topic| topic.name).collect()
}

impl Live {
    async fn begin(bus: &EventBus) -> anyhow::Result<Self> {
        let reader = bus.read(&names(), Start::Latest, None).await;
        let reader = reader.context("read the topics from now on")?;
        let (end, ended) = oneshot::channel();
        let collecting = tokio::spawn(collect(bus.clone(), reader, ended));
        Ok(Self { collecting, end })
    }

    async fn end(self) -> anyhow::Result<Vec<Recorded>> {
        // It has ended by itself, and says why.
        let _: Result<(), ()> = self.end.send(());
        self.collecting.await.context("the reader panicked")?
    }
}

async fn collect(
    bus: EventBus,
    mut reader: Reader,
    mut ended: oneshot::Receiver<()>,
) -> anyhow::Result<Vec<Recorded>> {
    let mut events = Vec::new();
    loop {
        tokio::select! {
            record = reader.next() => match record? {
                Some(record) => events.push(Recorded::of(&bus, record)?),
                None => return Ok(events),
            },
            _ = &mut ended => break,
        }
    }
    while let Ok(record) = timeout(QUIET, reader.next()).await {
        let Some(record) = record? else {
            break;
        };
        events.push(Recorded::of(&bus, record)?);
    }
    Ok(events)
}

impl Recorded {
    fn of(bus: &EventBus, record: Record) -> anyhow::Result<Self> {
        let envelope = bus.envelope(&record.message)?;
        let order_id = record.message.key.map(|key| key.to_string());
        Ok(Self {
            id: envelope.id.to_string(),
            cause: envelope.causation_id,
            event_type: envelope.event_type,
            source: envelope.source,
            micros: envelope.time.as_micros(),
            order_id: order_id.unwrap_or_default(),
        })
    }
}

impl History {
    /// The events of one order, each once.
    pub fn of(&self, order_id: OrderId) -> Vec<Recorded> {
        let order_id = order_id.to_string();
        let mut seen = HashSet::new();
        let events = self.0.iter().filter(|event| event.order_id == order_id);
        let events = events.filter(|event| seen.insert(&event.id));
        events.cloned().collect()
    }

    /// How many events these orders made, and how many copies of them there are besides:
    /// at-least-once may publish one again.
    pub fn count(&self, orders: &HashSet<String>) -> (usize, usize) {
        let mut ids = HashSet::new();
        let mut again = 0;
        for event in self
            .0
            .iter()
            .filter(|event| orders.contains(&event.order_id))
        {
            if !ids.insert(&event.id) {
                again += 1;
            }
        }
        (ids.len(), again)
    }
}
