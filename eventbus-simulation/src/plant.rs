//! Planted bugs: each is a mistake that an adapter, a store or a unit of work could make, in a wrapper
//! around one that makes none. The checks have to find every one of them.

mod broker;
mod stores;
mod unit;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) use broker::PlantedBroker;
pub(crate) use stores::{PlantedDuplicates, PlantedStores};
pub(crate) use unit::PlantedUnit;

macro_rules! plants {
    ($($name:ident: $what:literal,)*) => {
        /// A mistake on purpose.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Plant {
            $(#[doc = concat!("It ", $what, ".")] $name,)*
        }

        impl Plant {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// What is wrong, as a sentence without its subject.
            #[must_use]
            pub fn what(self) -> &'static str {
                match self {
                    $(Self::$name => $what,)*
                }
            }
        }
    };
}

plants! {
    // Brokers that publish.
    OkForUnknown: "answers ok where the outcome is unknown",
    OkForRefused: "answers ok where the message was refused",
    OkForPart: "answers ok for a whole batch of which a part was taken",
    BlamesAnother: "reports the messages that were taken as those that were not, and the other way round",
    DropsPublished: "drops one of seven messages that it says it took",
    SwapsPublished: "swaps two messages of a key in a batch",
    AcknowledgesEarly: "acknowledges first, and publishes a fifth of a second later",
    FreshIds: "gives what a handler publishes another id each time",
    DropsDeadLetters: "says that it stored a dead letter, and did not",
    // Brokers that deliver.
    SettlesFirst: "settles what it hands out before it is handled",
    SettlesOneMore: "settles one message more than it was told to",
    SettlesOnClose: "settles at the end what was handed out and not handled",
    SettlesOnCrash: "settles what a member had when it died",
    SwapsDelivered: "hands out two messages of a key in the wrong order",
    HoldsBack: "hands out a message only after later ones of its key",
    DropsDelivered: "settles one of seven messages instead of handing it out",
    ChangesPayload: "changes a byte of a message",
    HandsOutAgain: "hands out a message again that was settled",
    ReleasesEarly: "gives lanes away while their handlers run",
    // Outboxes.
    SkipsLateCommits: "reads an outbox behind the last position it saw",
    PublishesUncommitted: "publishes what is not committed, and may never be",
    RemovesFirst: "removes messages from an outbox before they are published",
    RemovesAll: "removes all that it read from an outbox, when a part of it was published",
    RemovesOneMore: "removes the next message of an outbox, too",
    RemovesNothing: "says that it removed messages from an outbox, and did not, once",
    ReadsBackwards: "reads the messages of a lane in the wrong order",
    GrantsToAll: "grants a lease to whoever wants it",
    // Held keys and schedules.
    HoldsOnlyFirst: "holds the first message of a key, and drops those behind it",
    FreesHeldKeys: "drops what is held behind the first message of a key when that is done",
    TakesForGood: "removes scheduled messages when they are taken",
    FiresTwice: "leaves a scheduled message in its place after it was published, once",
    // Units of work and duplicate windows.
    ForgetsInbox: "does not record which events were handled",
    CommitsFailures: "commits what a failed handler wrote",
    OkForFailedCommit: "answers ok for a commit that failed",
    DropsOutgoing: "commits without one of three messages that were to be published",
    ShortWindow: "forgets after a millisecond what was handled",
    MarksFirst: "marks an event as handled when it is claimed",
}

impl fmt::Display for Plant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}: it {}", self.what())
    }
}

/// Which bug is planted in a run, and how often it had an occasion.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bed {
    plant: Option<Plant>,
    occasions: Arc<AtomicU64>,
}

impl Bed {
    pub(crate) fn new(plant: Option<Plant>) -> Self {
        Self {
            plant,
            occasions: Arc::default(),
        }
    }

    fn has(&self, plant: Plant) -> bool {
        self.plant == Some(plant)
    }

    /// Whether it is this bug, and the first of so many occasions.
    fn strikes(&self, plant: Plant, every: u64) -> bool {
        self.has(plant)
            && self
                .occasions
                .fetch_add(1, Ordering::Relaxed)
                .is_multiple_of(every)
    }

    /// Whether it is this bug, at its first occasion.
    fn strikes_once(&self, plant: Plant) -> bool {
        self.strikes(plant, u64::MAX)
    }
}
