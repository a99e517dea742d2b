//! What a store implements so that keys are held, leases shared out, events sent later and events
//! kept until their time, all durably, and duplicates known; and who holds leases over it.

pub use eventbus_core::{
    BusyTaker, MemorySchedule, Refused, SCHEDULED_MAX, ScheduleStore, Scheduled, ScheduledReport,
    TakeScheduled, Taken,
};
pub use eventbus_core::{
    Claim, Due, DueName, HELD_KEYS_MAX, HeldMessage, HeldName, HeldPlace, HeldReport, HoldEntry,
    KeyAction, KeyDecision, KeyStateDesk, KeyStateStore, Wait,
};
pub use eventbus_core::{ClaimEvents, DuplicateStore, EventClaim, MemoryDuplicates};
pub use eventbus_core::{
    HeldLeases, LEASE_PARTITIONS_MAX, Lease, LeaseConfig, LeaseMember, LeaseReply, LeaseRequest,
    LeaseSignal, LeaseStore, LeaseTopic, Leaseholder, MemberId, MemoryLeases, ProcessId,
    TopicPartition,
};
pub use eventbus_core::{
    MemoryOutbox, OUTBOX_BYTES_MIN, OUTBOX_LANES, OutboxDepth, OutboxMessage, OutboxStore,
    outbox_lane,
};
#[cfg(feature = "postgres")]
pub use eventbus_sql::{PostgresOutbox, PostgresSchedule, PostgresStore, PostgresTransaction};
#[cfg(feature = "sqlite")]
pub use eventbus_sql::{SqliteOutbox, SqliteSchedule, SqliteStore, SqliteTransaction};
