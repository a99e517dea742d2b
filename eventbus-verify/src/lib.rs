//! A ledger of what was tried with an event bus, written by a recorder in a process of its own.

#![warn(clippy::unwrap_used, clippy::print_stdout)]

mod checksum;
mod client;
mod clock;
mod error;
mod ledger;
mod payload;
mod record;
mod recorder;
mod stamp;

pub use checksum::crc32c;
pub use client::{Client, Session};
pub use clock::monotonic_nanos;
pub use error::{Error, Result};
pub use ledger::{Cut, Ledger, LedgerWriter};
pub use payload::{Payload, PayloadError};
pub use record::{Entry, Fault, Operation, Phase, Record, Sample};
pub use recorder::Recorder;
pub use stamp::{MessageId, RunId, Stamp};
