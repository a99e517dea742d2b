//! Asks whether messages pass: one to each partition, which each group has to handle.

use std::sync::Arc;
use std::time::{Duration, Instant};

use eventbus::broker::partition_of;
use eventbus::prelude::EventBus;
use eventbus::{Key, Result};
use eventbus_verify::{Client, Entry, Operation, Phase, Session, Stamp};
use tokio::time::{sleep, timeout};

use crate::site::{PARTITIONS, Reader};
use crate::store::Outbox;
use crate::tried::{Draft, PROBER};

/// How often is looked whether a probe has passed.
const GLANCE: Duration = Duration::from_millis(10);
/// No producer has such keys: one of theirs may be parked, and what is behind it waits.
const KEYS_FROM: u32 = 1_000_000;

/// How messages get into the system.
#[derive(Clone, Debug)]
pub enum Entrance {
    /// They are published.
    Publish(EventBus),
    /// They are committed.
    Outbox(Outbox),
}

/// Sends probes, numbered from 0.
#[derive(Debug)]
pub struct Prober {
    client: Arc<Client>,
    session: Session,
    entrance: Entrance,
    readers: Vec<Reader>,
    /// One key for each partition.
    keys: Vec<u32>,
    next: u32,
}

impl Prober {
    /// Probes that have passed when every group has handled them.
    #[must_use]
    pub fn new(client: &Arc<Client>, entrance: Entrance, readers: Vec<Reader>) -> Self {
        let partition = |key: &u32| partition_of(&Key::display(key), PARTITIONS);
        let first_of = |wanted| (KEYS_FROM..).find(|key| partition(key) == wanted);
        Self {
            client: Arc::clone(client),
            session: client.session(),
            entrance,
            readers,
            keys: (0..PARTITIONS).filter_map(first_of).collect(),
            next: 0,
        }
    }

    /// Sends probes until one passes, and says how long that took; none if none did in time.
    ///
    /// # Errors
    ///
    /// Those of the recorder, and of reading effects.
    pub async fn pass(&mut self, limit: Duration) -> anyhow::Result<Option<Duration>> {
        let begun = Instant::now();
        while begun.elapsed() < limit {
            let number = self.next;
            self.next += 1;
            let probe = Entry::new(Operation::Probe).with_position(0, u64::from(number));
            self.session.invoke(probe)?;
            // One that was sent passes in the end, behind what had piled up.
            let left = limit.saturating_sub(begun.elapsed());
            let has_passed = match timeout(left, self.send_and_see(number)).await {
                Ok(seen) => seen?,
                Err(_) => false,
            };
            if has_passed {
                self.session.ok(probe)?;
                return Ok(Some(begun.elapsed()));
            }
            self.session.fail(probe)?;
        }
        Ok(None)
    }

    async fn send_and_see(&self, number: u32) -> anyhow::Result<bool> {
        let run = self.client.run();
        let drafts: Vec<Draft> = self
            .keys
            .iter()
            .map(|key| Draft::new(run, Stamp::new(PROBER, *key, number), 0))
            .collect();
        // A session of its own: a call that was given up may still end.
        let session = self.client.session();
        let sent = match &self.entrance {
            Entrance::Publish(bus) => publish(bus, &session, &drafts).await?,
            Entrance::Outbox(outbox) => append(outbox, &session, &drafts, number).await?,
        };
        if let Err(error) = sent {
            tracing::debug!("a probe was not sent: {error}");
            sleep(GLANCE).await;
            return Ok(false);
        }
        for reader in &self.readers {
            while reader.probes(number).await? < self.keys.len() as u64 {
                sleep(GLANCE).await;
            }
        }
        Ok(true)
    }
}

async fn publish(
    bus: &EventBus,
    session: &Session,
    drafts: &[Draft],
) -> eventbus_verify::Result<Result<()>> {
    let entries = entries(drafts, Operation::Publish);
    session.record(Phase::Invoke, &entries)?;
    let events: Vec<_> = drafts.iter().map(Draft::outgoing).collect();
    let sent = bus.publish_all(events).await;
    let phase = match sent {
        Ok(_) => Phase::Ok,
        Err(_) => Phase::Unknown,
    };
    session.record(phase, &entries)?;
    Ok(sent.map(drop))
}

/// The transactions of the harness have the numbers of its probes.
async fn append(
    outbox: &Outbox,
    session: &Session,
    drafts: &[Draft],
    number: u32,
) -> eventbus_verify::Result<Result<()>> {
    let number = u64::from(number);
    let entries: Vec<Entry> = entries(drafts, Operation::Append)
        .into_iter()
        .map(|entry| entry.with_transaction(number))
        .collect();
    let commit = Entry::new(Operation::Commit).with_transaction(number);
    session.record(Phase::Invoke, &entries)?;
    let mut transaction = match outbox.begin().await {
        Ok(transaction) => transaction,
        Err(error) => return Ok(Err(error)),
    };
    for draft in drafts {
        if let Err(error) = transaction.publish(draft.outgoing()) {
            return Ok(Err(error));
        }
    }
    session.record(Phase::Ok, &entries)?;
    session.invoke(commit)?;
    let committed = transaction.commit().await;
    match committed {
        Ok(()) => session.ok(commit)?,
        Err(_) => session.unknown(commit)?,
    }
    Ok(committed)
}

fn entries(drafts: &[Draft], operation: Operation) -> Vec<Entry> {
    drafts.iter().map(|draft| draft.entry(operation)).collect()
}
