//! Contracts, message, envelope, consumer runtime and in-memory broker of eventbus.

#![warn(clippy::unwrap_used, clippy::print_stdout)]

mod activity;
mod balance;
mod broker;
mod bus;
mod chunk;
mod clock;
mod coalescer;
mod codec;
mod consumer;
mod context;
mod dead_letter;
mod delivery;
mod drained;
mod duplicates;
mod envelope;
mod error;
mod event;
mod format;
mod handler;
pub mod header;
mod held_keys;
mod key_state;
mod lane_table;
mod lease;
pub mod lines;
pub mod log;
mod memory;
mod message;
mod outbox;
mod outgoing;
mod reader;
pub mod refusal;
mod relay;
mod retry;
mod schedule;
mod scheduled;
mod sending;
mod service;
mod topic;
mod unit_of_work;
mod url;
mod whereabouts;

pub use activity::Activity;
pub use balance::{Share, balance};
pub use broker::{
    AdminReply, AdminRequest, Broker, Capabilities, Deliveries, Durability, GroupPosition, LaneLag,
    Member, Outcome, PublishError, Publisher, Settlement, Subscriber, TopicReport, Unpublished,
};
pub use clock::{Clock, SystemClock, Timestamp};
pub use codec::{Codec, Json};
pub use delivery::{
    Assignment, Delivery, Lane, Limits, Position, Receipt, Signal, Start, Subscription, Until,
};
pub use drained::{Drain, DrainReport, Undrained};
pub use duplicates::{
    CLAIMS_LOST, ClaimEvents, DUPLICATES_FORGOTTEN, DuplicateStore, DuplicateWindow, EventClaim,
};
pub use envelope::{Envelope, EventId, Metadata};
pub use error::{BoxError, Error, ErrorKind, Result, Retry, error_chain, find_cause};
#[doc(hidden)]
pub use event::assert_upcast;
pub use event::{Event, read_event, unknown_version, upcast_from};
pub use format::{
    CloudEventsBinaryFormat, CloudEventsBinding, CloudEventsFormat, EnvelopeFormat, FlatFormat,
    Format, Formats, Reading,
};
pub use key_state::{
    Claim, Due, DueName, HELD_KEYS_MAX, HeldMessage, HeldName, HeldPlace, HeldReport, HoldEntry,
    KeyAction, KeyDecision, KeyStateDesk, KeyStateStore, Wait,
};
pub use lane_table::{LaneTable, Settled};
pub use lease::{
    HeldLeases, LEASE_PARTITIONS_MAX, Lease, LeaseConfig, LeaseMember, LeaseReply, LeaseRequest,
    LeaseSignal, LeaseStore, LeaseTopic, Leaseholder, MemberId, ProcessId,
};
pub use memory::{
    CommitFault, MemoryBroker, MemoryConfig, MemoryDuplicates, MemoryKeyState, MemoryLeases,
    MemoryOutbox, MemoryProfile, MemorySchedule, MemoryUnit,
};
pub use message::{
    Group, HEADER_BYTES_MAX, HEADERS_MAX, Headers, HeadersBuilder, HeadersBytesIter, HeadersIter,
    KEY_BYTES_MAX, Key, Message, NAME_LENGTH_MAX, Topic,
};
pub use schedule::{
    BusyTaker, Refused, SCHEDULED_MAX, ScheduleStore, Scheduled, ScheduledReport, TakeScheduled,
    Taken,
};
pub use topic::{Compression, TopicPartition, TopicSpec, partition_of};

pub use bus::{EventBus, EventBusBuilder};
pub use coalescer::{Coalescer, Flush, Flushes, Ticket};
pub use consumer::{
    BLOCKED_KEYS, Breaker, CONSUMED_MESSAGES, Consumer, ConsumerBuilder, ConsumerState,
    ConsumerStatus, Counts, DEAD_LETTERS, DUPLICATES, Dispatch, DispatchFuture, FAILED_ATTEMPTS,
    GAPS, HANDLED, HELD_MESSAGES, LaneStatus, OPERATION_DURATION, OnPoison, PROCESS_DURATION,
    Replay, ReplayReport, Request, SCHEDULE_LATENESS, SCHEDULED_WAITING, SENT_MESSAGES, SKIPPED,
};
pub use context::Context;
pub use dead_letter::{
    DEAD_LETTER_CLAIM_TIME, DEAD_LETTERS_BYTES_MAX, DEAD_LETTERS_MAX, DeadLetter, DeadLetterStatus,
    DeadLetters, Decision, DeskAction, DeskEntry, DeskReport, ERROR_GROUPS_MAX, Edit, ErrorGroup,
    Redrive,
};
pub use handler::{BatchHandler, BatchItem, Handler};
pub use held_keys::{HELD_LIST_MAX, HeldKeys};
pub use outbox::{
    OUTBOX_BYTES_MIN, OUTBOX_LANES, OutboxDepth, OutboxMessage, OutboxStore, outbox_lane,
};
pub use outgoing::{Origin, Outgoing, OutgoingBatch};
pub use reader::{Reader, Record};
pub use relay::{
    OUTBOX_AGE, OUTBOX_HELD_BACK, OUTBOX_MESSAGES, OnRefused, RELAY_GIVEN_UP, RELAY_HELD, RELAYED,
    Relay, RelayHandle, RelayStatus,
};
pub use retry::{OnError, RetryPolicy};
pub use scheduled::{SCHEDULED_LIST_MAX, ScheduledEvents};
pub use sending::PartlyPublished;
pub use service::{
    BrokerHealth, ConsumerHealth, Service, ServiceHandle, ServiceHealth, ServiceState, Stopping,
};
pub use unit_of_work::{Committed, InboxEntry, NoUnit, Unit, UnitOfWork, Work};
pub use url::{credentials, duration, host_and_port, redacted_option, redacted_url};
pub use whereabouts::{EventPlace, GroupProgress, HeldFor, Lookup, Progress, Unknown, Whereabouts};
