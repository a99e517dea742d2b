//! A ledger of what was tried with an event bus, written by a recorder in a process that nobody kills,
//! and a checker of what must hold over it.
//!
//! ```text
//!  harness ───── faults, probes ──────────▶ ┐
//!  tried process ─ invoke, ok, fail, unknown ▶ recorder ─▶ ledger ─┐
//!        └ handlers ─ effect rows ─▶ its database ─────────────────┴▶ History ─▶ checks ─▶ Report
//! ```
//!
//! A harness starts the recorder (`eventbus-recorder LEDGER SOCKET RUN`), and every tried process
//! connects to it with a [`Client`]. Messages carry a [`Payload`]. Around each call stands a record:
//! before it, that it is about to begin; after it, what came of it, in Jepsen's three values. Each
//! handler writes an [`Effect`] within the transaction that is tried. At the end the faults are
//! healed, everything that can be handled is handled, and the harness reads effects, dead letters and
//! what is parked out of the tried system.
//!
//! ```no_run
//! use eventbus_verify::{Client, Entry, History, Ledger, Operation, Payload, Promises, Report, Stamp};
//!
//! # fn main() -> eventbus_verify::Result<()> {
//! # let publish = |_: Vec<u8>| true;
//! let client = Client::connect("run/recorder.socket".as_ref())?;
//! let session = client.session();
//! let stamp = Stamp::new(1, 7, 0);
//! let (payload, checksum) = Payload::encode(client.run(), stamp, 200);
//! let entry = Entry::of(Operation::Publish, stamp).with_checksum(checksum);
//! session.invoke(entry)?;
//! match publish(payload) {
//!     true => session.ok(entry)?,
//!     false => session.unknown(entry)?,
//! }
//!
//! // When all is over:
//! let ledger = Ledger::read("run/ledger".as_ref())?;
//! # let effects = Vec::new();
//! let history = History::new(&ledger, effects);
//! let report = Report::of(&history, &Promises::to([1]));
//! assert!(report.passed(), "{}", report.to_markdown());
//! # Ok(())
//! # }
//! ```
//!
//! # What a pass promises
//!
//! Of the messages, calls and faults that this ledger has, and with the effects that the caller read:
//!
//! - what was acknowledged was handled by every group, or is kept or reported by name ([`check::no_loss`]),
//! - nothing was seen that nobody sent, that failed, was rolled back, or changed ([`check::no_phantom`]),
//! - each group has one effect of it ([`check::effect_once`]), in order within a key
//!   ([`check::key_order`]),
//! - after faults messages passed again in time ([`check::liveness`]), and measurements, attempts and
//!   duplicates stayed within the bounds that were given ([`check::bounds`]),
//! - no caller was told more than the broker had said, or than was stored ([`check::honesty`]), and
//!   nothing was settled unhandled, nor left by a shutdown ([`check::drain`]).
//!
//! # What it does not
//!
//! - Anything about what did not happen: other faults, other timing, a loss that is rarer than one in
//!   the number of messages. Without a fault in the ledger nothing is said of faults.
//! - Durability below the kernel. A SIGKILL leaves the page cache; only a machine that loses power, or
//!   a file system that forgets what was not synced, tries `fsync`.
//! - Order across keys, between producers, and of tries whose outcome is unknown or that were begun
//!   again after later ones of their key: those may be done at any time.
//! - Whether the harness is right. A try that it does not announce, a key whose messages it publishes
//!   out of order, or an effect that it writes outside of the transaction shows as a breach or hides
//!   one. What only an operation records can be checked only where it is recorded: honesty needs
//!   [`Operation::Send`] or a final reading, drain needs [`Operation::Handle`], and duplicates need
//!   [`Operation::Deliver`].
//! - Groups that begin later than the first message, or take a part of the messages: such a group is
//!   left out of [`Promises::groups`], and then losses are not looked for in it.
//! - I5 (sagas) and I6 (event store): the SDK has neither yet, and their records would be guesses.
//! - Isolation of transactions against each other, for which there is Elle.

#![warn(clippy::unwrap_used, clippy::print_stdout)]

pub mod check;
mod checksum;
mod client;
mod clock;
mod error;
mod history;
mod ledger;
mod payload;
mod record;
mod recorder;
mod report;
mod stamp;

pub use check::{Bounds, Breach, Invariant, Promises, Recoveries, Violation, Violations};
pub use checksum::crc32c;
pub use client::{Client, Session};
pub use clock::monotonic_nanos;
pub use error::{Error, Result};
pub use history::{Effect, History};
pub use ledger::{Cut, Ledger, LedgerWriter};
pub use payload::{Payload, PayloadError};
pub use record::{Entry, Fault, Operation, Phase, Record, Sample};
pub use recorder::Recorder;
pub use report::{Kept, Messages, Report};
pub use stamp::{MessageId, RunId, Stamp};
