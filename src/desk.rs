//! What operators' tools name: what was done with dead letters and held keys, what waits for its
//! time, and the bounds.

pub use eventbus_core::{
    DEAD_LETTER_CLAIM_TIME, DEAD_LETTERS_BYTES_MAX, DEAD_LETTERS_MAX, DeadLetterStatus, Decision,
    DeskAction, DeskEntry, DeskReport, ERROR_GROUPS_MAX, ErrorGroup,
};
pub use eventbus_core::{
    HELD_KEYS_MAX, HELD_LIST_MAX, HeldMessage, HeldName, HeldPlace, HeldReport, KeyAction,
    KeyDecision,
};
pub use eventbus_core::{SCHEDULED_LIST_MAX, SCHEDULED_MAX, ScheduledReport};
