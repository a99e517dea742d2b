//! The consumer runtime, relays, leases, held keys, schedules and units of work of the eventbus SDK in
//! virtual time, under whatever a seed decides: what brokers and databases do that keep their word,
//! members and relays that come, go and die, and handlers that fail.
//!
//! ```text
//!  producers ─▶ bus ─┐                     ┌─ consumers ─▶ handlers ─▶ effects
//!  writers ─▶ outbox ─▶ relays ─▶ [ plant ▶ notes ▶ faults ▶ broker in memory ]
//!                                      │
//!                                   ledger ─▶ the checks of `eventbus-verify`
//! ```
//!
//! A [`Case`] is all of a run, and made from a seed; [`Case::run`] says what of the promises it broke.
//! A failing case is [shrunk](Case::shrink) and can be read. With a [`Plant`] the same run has a bug
//! on purpose: the checks have to find each, or they prove nothing.
//!
//! ```
//! use eventbus_simulation::{Case, Plant};
//!
//! let sound = (0..20).map(|seed| Case::of_seed(seed).run(None));
//! assert!(sound.into_iter().all(|verdict| verdict.is_sound()));
//! assert!(Plant::DropsDelivered.found_by(0..200).is_some());
//! ```

#![warn(clippy::unwrap_used, clippy::print_stdout)]

mod case;
mod event;
mod journal;
mod plant;
mod recording;
mod stores;
mod survey;
mod world;

pub use case::{Case, Happening, Once, Planned, Setting, Source};
pub use plant::Plant;
pub use survey::Survey;
pub use world::Verdict;
