//! Batches that are published and not answered: one answer a batch, whatever came of its messages.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rdkafka::error::RDKafkaErrorCode as Code;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

/// Messages that failed, by their place in the batch.
pub(crate) type Failures = Vec<(u32, Code)>;

/// What is in flight, by the number that goes with each message through the client.
#[derive(Debug, Default)]
pub(crate) struct InFlight(Mutex<Places>);

#[derive(Debug, Default)]
struct Places {
    batches: Vec<Option<Batch>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Batch {
    /// Messages that nothing was heard of, and one more while the batch is being sent.
    waiting: u32,
    failures: Failures,
    answer: oneshot::Sender<Failures>,
    /// Given back when the last message is answered, also where nobody waits for that any more.
    _permits: [OwnedSemaphorePermit; 2],
}

/// The place of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatchId(u32);

const _: () = assert!(
    usize::BITS == 64,
    "a batch and a place in it fit into one word"
);

impl BatchId {
    /// What goes with a message: which batch, and which message of it.
    pub(crate) fn token(self, index: u32) -> usize {
        (self.0 as usize) << 32 | index as usize
    }
}

impl InFlight {
    fn lock(&self) -> MutexGuard<'_, Places> {
        // Each change is a few assignments that do not panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a batch; [`sent`](Self::sent) says that there are no more messages of it.
    pub(crate) fn begin(
        &self,
        permits: [OwnedSemaphorePermit; 2],
    ) -> (BatchId, oneshot::Receiver<Failures>) {
        let (answer, answered) = oneshot::channel();
        let batch = Some(Batch {
            waiting: 1,
            failures: Vec::new(),
            answer,
            _permits: permits,
        });
        let mut places = self.lock();
        let id = match places.free.pop() {
            Some(id) => {
                places.batches[id as usize] = batch;
                id
            }
            None => {
                places.batches.push(batch);
                // Bounded by the permits.
                (places.batches.len() - 1) as u32
            }
        };
        (BatchId(id), answered)
    }

    /// Counts messages that are about to be given to the client.
    pub(crate) fn add(&self, id: BatchId, messages: u32) {
        if let Some(batch) = &mut self.lock().batches[id.0 as usize] {
            batch.waiting += messages;
        }
    }

    /// Every message of the batch has been given to the client.
    pub(crate) fn sent(&self, id: BatchId) {
        self.conclude(id.0, None);
    }

    /// What came of the message with this token.
    pub(crate) fn answered(&self, token: usize, failure: Option<Code>) {
        let (id, index) = ((token >> 32) as u32, token as u32);
        self.conclude(id, failure.map(|code| (index, code)));
    }

    fn conclude(&self, id: u32, failure: Option<(u32, Code)>) {
        let mut places = self.lock();
        let Some(batch) = &mut places.batches[id as usize] else {
            return;
        };
        batch.failures.extend(failure);
        batch.waiting -= 1;
        if batch.waiting > 0 {
            return;
        }
        let batch = places.batches[id as usize].take();
        places.free.push(id);
        drop(places);
        if let Some(batch) = batch {
            // Whoever published may have given up.
            let _ = batch.answer.send(batch.failures);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;

    fn permits(of: &Arc<Semaphore>) -> [OwnedSemaphorePermit; 2] {
        let one = || Arc::clone(of).try_acquire_owned().expect("there is one");
        [one(), one()]
    }

    #[test]
    fn a_batch_is_answered_once_when_all_of_it_is() {
        let semaphore = Arc::new(Semaphore::new(4));
        let in_flight = InFlight::default();
        let (first, mut answered) = in_flight.begin(permits(&semaphore));
        let (second, _) = in_flight.begin(permits(&semaphore));
        in_flight.add(first, 2);
        in_flight.answered(first.token(0), None);
        in_flight.sent(first);
        assert!(answered.try_recv().is_err(), "one is still on its way");
        in_flight.answered(first.token(1), Some(Code::MessageTimedOut));
        assert_eq!(
            answered.try_recv().expect("all are answered"),
            [(1, Code::MessageTimedOut)]
        );
        assert_eq!(semaphore.available_permits(), 2);
        in_flight.sent(second);
        assert_eq!(semaphore.available_permits(), 4, "nobody waits for it");
        let (third, _) = in_flight.begin(permits(&semaphore));
        assert!([first, second].contains(&third), "places are used again");
    }
}
