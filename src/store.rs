//! What an implementer of a store meets: held keys and leases.

pub use eventbus_core::{
    Claim, Due, DueName, HELD_KEYS_MAX, HoldEntry, KeyStateDesk, KeyStateStore, MemoryKeyState,
};
pub use eventbus_core::{
    HeldLeases, Lease, LeaseConfig, LeaseMember, LeaseReply, LeaseRequest, LeaseSignal, LeaseStore,
    LeaseTopic, Leaseholder, MemberId, MemoryLeases, ProcessId,
};
