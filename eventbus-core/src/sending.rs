//! What becomes of several messages that are published together, when some of them are not taken.

use std::collections::{HashMap, HashSet};
use std::fmt;

use crate::broker::{Outcome, PublishError, Unpublished};
use crate::envelope::EventId;
use crate::error::{Error, ErrorKind, Retry};
use crate::message::{Key, Message, Topic};

/// Which events of a [`publish_all`](crate::EventBus::publish_all) that failed are on the broker;
/// the source of its error.
///
/// # Examples
///
/// ```
/// use eventbus_core::{Error, PartlyPublished};
///
/// fn missing(error: &Error) -> usize {
///     PartlyPublished::of(error).map_or(0, |partly| partly.not_taken.len())
/// }
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub struct PartlyPublished {
    /// Those that the broker has taken.
    pub published: Vec<EventId>,
    /// Those that are not on the broker.
    pub not_taken: Vec<EventId>,
    /// Those that may be on the broker: publishing them again, with the same ids, may duplicate
    /// them recognisably.
    pub unknown: Vec<EventId>,
    first: Error,
}

impl PartlyPublished {
    /// What an error of `publish_all` says of each event.
    pub fn of(error: &Error) -> Option<&Self> {
        std::error::Error::source(error)?.downcast_ref()
    }

    /// Sorts the events of a batch by what became of them.
    pub(crate) fn error(ids: Vec<EventId>, error: PublishError) -> Error {
        let retry = match error.is_retryable() {
            true => Retry::Later,
            false => Retry::Never,
        };
        let outcomes: HashMap<usize, Outcome> = error
            .unpublished
            .iter()
            .map(|unpublished| (unpublished.index, unpublished.outcome))
            .collect();
        let mut partly = Self {
            published: Vec::new(),
            not_taken: Vec::new(),
            unknown: Vec::new(),
            first: error.into(),
        };
        for (index, id) in ids.into_iter().enumerate() {
            let place = match outcomes.get(&index) {
                None => &mut partly.published,
                Some(Outcome::NotTaken) => &mut partly.not_taken,
                Some(Outcome::Unknown) => &mut partly.unknown,
            };
            place.push(id);
        }
        Error::new(
            partly.first.kind(),
            "publish all",
            "not all events were published: the source, a `PartlyPublished`, says which were",
        )
        .with_retry(retry)
        .with_source(partly)
    }
}

impl fmt::Display for PartlyPublished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} published, {} not taken, {} unknown",
            self.published.len(),
            self.not_taken.len(),
            self.unknown.len()
        )
    }
}

impl std::error::Error for PartlyPublished {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.first)
    }
}

/// Whether two messages have to stay in order.
pub(crate) fn repeats_a_key(messages: &[Message]) -> bool {
    if messages.len() < 2 {
        return false;
    }
    let mut seen = HashSet::with_capacity(messages.len());
    let mut keyed = messages.iter().filter_map(place);
    !keyed.all(|place| seen.insert(place))
}

fn place(message: &Message) -> Option<(&Topic, &Key)> {
    message.key.as_ref().map(|key| (&message.topic, key))
}

/// Messages to be sent by turns: of each key one at a time, so that after a failure none of them
/// stands on the broker before an earlier one.
#[derive(Debug)]
pub(crate) struct Turns {
    rest: Vec<(usize, Message)>,
    /// The places in the batch of what was taken out last.
    turn: Vec<usize>,
    unpublished: Vec<Unpublished>,
    /// Keys of which a message was not taken, and whether it may be tried again.
    stopped: HashMap<(Topic, Key), Retry>,
}

impl Turns {
    pub(crate) fn new(messages: Vec<Message>) -> Self {
        Self {
            rest: messages.into_iter().enumerate().collect(),
            turn: Vec::new(),
            unpublished: Vec::new(),
            stopped: HashMap::new(),
        }
    }

    /// Sends all of them by `publish`, and says what became of each.
    pub(crate) async fn send<F>(
        mut self,
        publish: impl Fn(Vec<Message>) -> F,
    ) -> Result<(), PublishError>
    where
        F: Future<Output = Result<(), PublishError>>,
    {
        loop {
            let turn = self.next();
            if turn.is_empty() {
                return self.end();
            }
            if let Err(error) = publish(turn).await {
                self.failed(error);
            }
        }
    }

    /// What is sent next; nothing at the end.
    fn next(&mut self) -> Vec<Message> {
        let mut seen = HashSet::new();
        let mut messages = Vec::new();
        self.turn.clear();
        for (index, message) in std::mem::take(&mut self.rest) {
            let place = place(&message).map(|(topic, key)| (topic.clone(), key.clone()));
            if let Some(retry) = place.as_ref().and_then(|place| self.stopped.get(place)) {
                let error = held_back().with_retry(*retry);
                let held = Unpublished::new(index, message, Outcome::NotTaken, error);
                self.unpublished.push(held);
            } else if place.is_none_or(|place| seen.insert(place)) {
                self.turn.push(index);
                messages.push(message);
            } else {
                self.rest.push((index, message));
            }
        }
        messages
    }

    /// Notes what of the last turn was not taken.
    fn failed(&mut self, error: PublishError) {
        for mut unpublished in error.unpublished {
            unpublished.index = self.turn[unpublished.index];
            if let Some((topic, key)) = place(&unpublished.message) {
                let place = (topic.clone(), key.clone());
                self.stopped.insert(place, unpublished.error.retry());
            }
            self.unpublished.push(unpublished);
        }
    }

    /// What became of all of them.
    fn end(self) -> Result<(), PublishError> {
        PublishError::of(self.unpublished)
    }
}

fn held_back() -> Error {
    Error::new(
        ErrorKind::Conflict,
        "publish",
        "an earlier message of this key was not taken, and this one is not to overtake it",
    )
}
