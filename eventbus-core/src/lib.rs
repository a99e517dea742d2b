//! Contracts, message, envelope, consumer runtime and in-memory broker of eventbus.

mod broker;
mod clock;
mod codec;
mod delivery;
mod envelope;
mod error;
mod event;
mod format;
pub mod header;
mod lane_table;
mod memory;
mod message;
mod topic;

pub use broker::{
    AdminReply, AdminRequest, Broker, Capabilities, Deliveries, Durability, LaneLag, Member,
    Outcome, PublishError, Publisher, Settlement, Subscriber, TopicReport, Unpublished,
};
pub use clock::{Clock, SystemClock, Timestamp};
pub use codec::{Codec, Json};
pub use delivery::{
    Assignment, Delivery, Lane, Limits, Position, Receipt, Signal, Start, Subscription, Until,
    Verdict,
};
pub use envelope::{Envelope, EventId, Metadata};
pub use error::{BoxError, Error, ErrorKind, Result, Retry, error_chain};
pub use event::{Event, read_event, unknown_version, upcast_from};
pub use format::{EnvelopeFormat, FlatFormat, Format, Formats, Reading};
pub use lane_table::{LaneTable, Settled};
pub use memory::{MemoryBroker, MemoryConfig, MemoryProfile};
pub use message::{
    Group, HEADER_BYTES_MAX, HEADERS_MAX, Headers, HeadersBuilder, HeadersIter, KEY_BYTES_MAX, Key,
    Message, NAME_LENGTH_MAX, Topic,
};
pub use topic::{TopicSpec, partition_of};
