//! Where the events of a key are: what a support engineer asks first. Reads only, moves nothing.

mod lookup;
mod report;

pub use lookup::Lookup;
pub use report::{EventPlace, GroupProgress, HeldFor, Progress, Unknown, Whereabouts};
