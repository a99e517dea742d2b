//! How the data of an event become bytes. What stands around them is the format's affair.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind, Result};

/// Writes and reads the data of an event; belongs to the event type.
///
/// # Contract
///
/// - `decode(encode(event))` gives an equal event.
/// - Neither blocks, panics or depends on anything but its argument.
#[diagnostic::on_unimplemented(
    message = "the codec `{Self}` cannot write and read `{E}`",
    label = "no codec for this event",
    note = "the default codec is JSON: add `#[derive(Serialize, Deserialize)]` to `{E}`"
)]
pub trait Codec<E>: Debug + Send + Sync + 'static {
    /// The media type of the bytes.
    const CONTENT_TYPE: &'static str;

    /// Writes the data.
    ///
    /// # Errors
    ///
    /// `Codec` when a value has no form in this encoding.
    fn encode(event: &E) -> Result<Vec<u8>>;

    /// Reads the data.
    ///
    /// # Errors
    ///
    /// `Codec`: the message is dead-lettered without a retry.
    fn decode(data: &[u8]) -> Result<E>;
}

/// JSON through serde: the codec that `#[derive(Event)]` picks.
#[derive(Clone, Copy, Debug, Default)]
#[allow(clippy::exhaustive_structs, reason = "it has nothing to add")]
pub struct Json;

/// Most events are no longer.
const MOSTLY: usize = 512;

// The compiler then speaks of the missing codec, in the words above, and not of serde's traits.
#[diagnostic::do_not_recommend]
impl<E: Serialize + DeserializeOwned> Codec<E> for Json {
    const CONTENT_TYPE: &'static str = "application/json";

    fn encode(event: &E) -> Result<Vec<u8>> {
        let mut data = Vec::with_capacity(MOSTLY);
        serde_json::to_writer(&mut data, event).map_err(|error| {
            Error::new(
                ErrorKind::Codec,
                "write event",
                "the data have no JSON form",
            )
            .with_source(error)
        })?;
        Ok(data)
    }

    fn decode(data: &[u8]) -> Result<E> {
        serde_json::from_slice(data).map_err(|error| {
            Error::new(
                ErrorKind::Codec,
                "read event",
                "the data are not the JSON of this event",
            )
            .with_source(error)
        })
    }
}
