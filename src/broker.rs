//! What a broker adapter implements, and the parts that help with it. Services never name these.
//!
//! An adapter depends on `eventbus-core` alone, where the same items stand.

pub use eventbus_core::{
    AdminReply, AdminRequest, Assignment, Broker, Capabilities, Deliveries, Delivery, Durability,
    Lane, Member, Outcome, PublishError, Publisher, Receipt, Settlement, Signal, Subscriber,
    Subscription, Unpublished,
};
// Shared arithmetic and machinery.
pub use eventbus_core::{Coalescer, Flush, Flushes, LaneTable, Settled, Ticket, partition_of};
// What messages are made of, and its limits.
pub use eventbus_core::{
    HEADER_BYTES_MAX, HEADERS_MAX, HeadersBuilder, HeadersIter, KEY_BYTES_MAX, NAME_LENGTH_MAX,
};
