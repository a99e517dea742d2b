//! Who publishes: by calls of a bus, in transactions of an outbox, for later.

use std::time::Duration;

use eventbus_core::{EventBus, EventId, Message, Origin, Outcome, Outgoing, PublishError};
use eventbus_verify::{Entry, Operation, Phase, Stamp};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::{Books, World};
use crate::case::{Planned, Source};
use crate::event::{Numbered, checksum_of};
use crate::stores::Stores;

/// Between two tries.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
/// No fault lasts so long.
const PATIENCE: Duration = Duration::from_secs(60 * 60);
/// Most messages of a batch, or of a transaction.
const BATCH_MAX: usize = 4;

/// Producers at work.
pub(crate) struct Producers(Vec<JoinHandle<Result<(), String>>>);

impl Producers {
    /// Waits until everything is published.
    pub(crate) async fn end(self) -> Result<(), String> {
        for producer in self.0 {
            let ended = producer.await;
            ended.map_err(|error| format!("a producer panicked: {error}"))??;
        }
        Ok(())
    }
}

/// Starts all producers of a case.
pub(crate) fn start(world: &World) -> Producers {
    let producer = |number: u16| Producer {
        number: u32::from(number),
        session: world.books.work.session(),
        books: world.books.clone(),
        bus: world.bus(u32::from(number)),
        stores: world.stores.clone(),
        batches: batches(world, number),
        transactions: 0,
    };
    Producers(vec![
        tokio::spawn(producer(1).publish()),
        tokio::spawn(producer(2).commit()),
        tokio::spawn(producer(3).commit()),
        tokio::spawn(producer(4).schedule()),
    ])
}

/// Messages of a producer; those without a pause between them belong together.
fn batches(world: &World, producer: u16) -> Vec<Vec<(Planned, Stamp)>> {
    let messages = world.case.messages.iter().copied();
    let messages = messages.zip(world.case.stamps());
    let ours = messages.filter(|(planned, _)| planned.source.producer() == producer);
    let mut batches: Vec<Vec<(Planned, Stamp)>> = Vec::new();
    for (planned, stamp) in ours {
        match batches.last_mut() {
            Some(last) if planned.pause == 0 && last.len() < BATCH_MAX => {
                last.push((planned, stamp));
            }
            _ => batches.push(vec![(planned, stamp)]),
        }
    }
    batches
}

struct Producer {
    number: u32,
    session: u32,
    books: Books,
    bus: EventBus,
    stores: Stores,
    batches: Vec<Vec<(Planned, Stamp)>>,
    transactions: u64,
}

impl Producer {
    fn note(&self, phase: Phase, entry: Entry) {
        self.books
            .work
            .note(self.number, self.session, phase, entry);
    }

    fn message(&self, stamp: Stamp) -> (EventId, Message) {
        self.written(Outgoing::new(Numbered::<false>::of(stamp)))
    }

    fn written(&self, event: Outgoing<Numbered<false>>) -> (EventId, Message) {
        let batch = self.bus.batch(Origin::new());
        let mut batch = batch.expect("producers are no handlers");
        batch.publish(event).expect("numbers can be written");
        let messages = batch.into_messages().into_iter();
        messages.last().expect("one event was published")
    }

    /// Publishes batch after batch, each again until it is taken.
    async fn publish(mut self) -> Result<(), String> {
        for batch in std::mem::take(&mut self.batches) {
            sleep(Duration::from_millis(batch[0].0.pause)).await;
            let stamps = batch.iter().map(|(_, stamp)| *stamp);
            let mut left: Vec<(Stamp, Message)> =
                stamps.map(|stamp| (stamp, self.message(stamp).1)).collect();
            let begun = Instant::now();
            while !left.is_empty() {
                left = self.try_to_publish(left).await?;
                if left.is_empty() {
                    break;
                }
                if begun.elapsed() > PATIENCE {
                    return Err("stuck: a publish did not succeed within an hour".to_owned());
                }
                sleep(AGAIN_AFTER).await;
            }
        }
        Ok(())
    }

    /// Returns what was not taken, or may not have been.
    async fn try_to_publish(
        &self,
        batch: Vec<(Stamp, Message)>,
    ) -> Result<Vec<(Stamp, Message)>, String> {
        let entry =
            |stamp: Stamp| Entry::of(Operation::Publish, stamp).with_checksum(checksum_of(stamp));
        let (stamps, messages): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        for stamp in &stamps {
            self.note(Phase::Invoke, entry(*stamp));
        }
        let result = self.bus.publish_messages(messages).await;
        let unpublished = match result {
            Ok(()) => Vec::new(),
            Err(PublishError { unpublished, .. }) => unpublished,
        };
        let mut phases = vec![Phase::Ok; stamps.len()];
        let mut left = Vec::new();
        for one in unpublished {
            if !one.error.is_retryable() {
                return Err(format!("a publish failed for good: {:?}", one.error));
            }
            phases[one.index] = match one.outcome {
                Outcome::NotTaken => Phase::Fail,
                Outcome::Unknown => Phase::Unknown,
            };
            left.push((stamps[one.index], one.message));
        }
        for (stamp, phase) in stamps.into_iter().zip(phases) {
            self.note(phase, entry(stamp));
        }
        Ok(left)
    }

    fn append(&mut self, stamps: &[Stamp]) -> u64 {
        self.transactions += 1;
        for stamp in stamps {
            let entry = Entry::of(Operation::Append, *stamp)
                .with_checksum(checksum_of(*stamp))
                .with_transaction(self.transactions);
            self.note(Phase::Invoke, entry);
            self.note(Phase::Ok, entry);
        }
        self.transactions
    }

    fn commit_noted(&self, phase: Phase, transaction: u64) {
        let entry = Entry::new(Operation::Commit).with_transaction(transaction);
        self.note(phase, entry);
    }

    /// Writes transaction after transaction.
    async fn commit(mut self) -> Result<(), String> {
        let failed = |error| format!("the outbox failed: {error:?}");
        for batch in std::mem::take(&mut self.batches) {
            sleep(Duration::from_millis(batch[0].0.pause)).await;
            let stamps: Vec<Stamp> = batch.iter().map(|(_, stamp)| *stamp).collect();
            let messages = stamps.iter().map(|stamp| self.message(*stamp)).collect();
            let transaction = self.append(&stamps);
            let open = self.stores.append(messages).await.map_err(failed)?;
            let Source::Outbox {
                open: milliseconds,
                rolled_back,
                ..
            } = batch[0].0.source
            else {
                unreachable!("it is a producer of an outbox");
            };
            sleep(Duration::from_millis(milliseconds)).await;
            if rolled_back {
                self.stores.roll_back(&open).await.map_err(failed)?;
                self.commit_noted(Phase::Fail, transaction);
                continue;
            }
            self.commit_noted(Phase::Invoke, transaction);
            self.stores.commit(&open).map_err(failed)?;
            self.commit_noted(Phase::Ok, transaction);
        }
        Ok(())
    }

    /// Publishes for later, each message again until it is in the schedule or on the broker.
    async fn schedule(mut self) -> Result<(), String> {
        for (planned, stamp) in std::mem::take(&mut self.batches).into_iter().flatten() {
            let Source::Schedule(later) = planned.source else {
                unreachable!("it is a producer of a schedule");
            };
            sleep(Duration::from_millis(planned.pause)).await;
            let due = self.bus.clock().now().plus(Duration::from_millis(later));
            let event = Outgoing::new(Numbered::<false>::of(stamp)).with_not_before(due);
            let mut message = self.written(event).1;
            let begun = Instant::now();
            loop {
                let transaction = self.append(&[stamp]);
                self.commit_noted(Phase::Invoke, transaction);
                let Err(mut error) = self.bus.publish_messages(vec![message]).await else {
                    self.commit_noted(Phase::Ok, transaction);
                    break;
                };
                self.commit_noted(Phase::Unknown, transaction);
                if !error.is_retryable() || begun.elapsed() > PATIENCE {
                    return Err(format!("a publish for later failed for good: {error:?}"));
                }
                message = error.unpublished.remove(0).message;
                sleep(AGAIN_AFTER).await;
            }
        }
        Ok(())
    }
}
