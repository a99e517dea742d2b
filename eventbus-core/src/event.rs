//! What makes a type an event, and the one path on which data of any version are read.

use crate::codec::Codec;
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Key, Topic};

/// A fact that a service publishes, one Rust type per event type and version.
///
/// Derived, hardly ever written by hand:
///
/// ```
/// use serde::{Deserialize, Serialize};
/// # use eventbus_core as eventbus;
/// use eventbus_core::{Event, Json, Key, Result, Topic, unknown_version};
///
/// #[derive(Serialize, Deserialize)]
/// struct OrderCreated { order_id: u64, amount: u64 }
///
/// // What `#[derive(Event)]` with
/// // `#[event(type = "OrderCreated", topic = "order-events", key = "order_id")]` writes:
/// impl Event for OrderCreated {
///     const TYPE: &'static str = "OrderCreated";
///     const TOPIC: Topic = Topic::from_static("order-events");
///     const VERSION: u32 = 1;
///     type Codec = Json;
///
///     fn key(&self) -> Option<Key> {
///         Some(Key::display(&self.order_id))
///     }
///
///     fn upcast(version: u32, _data: &[u8]) -> Result<Self> {
///         Err(unknown_version::<Self>(version))
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an event",
    label = "this type is not an event",
    note = "derive it: `#[derive(Event, Serialize, Deserialize)]` and `#[event(type = \"OrderCreated\", topic = \"order-events\", key = \"order_id\")]`"
)]
pub trait Event: Sized + Send + 'static {
    /// Its name on the wire: it outlives the name of the Rust type.
    const TYPE: &'static str;
    /// Where it is published.
    const TOPIC: Topic;
    /// The version of its data, from 1 on. Raise it when readers of the old data cannot read the new.
    const VERSION: u32;
    /// How its data become bytes.
    type Codec: Codec<Self>;

    /// What keeps it in order; events of one key are handled one after another.
    fn key(&self) -> Option<Key>;

    /// Reads data of a version other than [`VERSION`](Self::VERSION): through [`upcast_from`] the
    /// version before, or not at all through [`unknown_version`].
    ///
    /// # Errors
    ///
    /// `Codec` when nothing leads from that version to this one.
    fn upcast(version: u32, data: &[u8]) -> Result<Self>;
}

/// Reads data of any version: the one path for live, retried, re-driven and replayed messages.
///
/// # Errors
///
/// `Codec` when the data are not what they claim to be, or of a version nothing leads from.
pub fn read_event<E: Event>(version: u32, data: &[u8]) -> Result<E> {
    let event = if version == E::VERSION {
        E::Codec::decode(data)
    } else {
        E::upcast(version, data)
    };
    event.map_err(|error| error.with("type", E::TYPE).with("version", version))
}

/// Reads data as `P`, of the version before, and converts them. For [`Event::upcast`].
///
/// # Errors
///
/// `Codec` when the data are newer than `E`, or `P` cannot read them either.
pub fn upcast_from<P, E>(version: u32, data: &[u8]) -> Result<E>
where
    P: Event,
    E: Event + From<P>,
{
    const { assert_upcast::<P, E>() };
    if version > E::VERSION {
        return Err(unknown_version::<E>(version));
    }
    if version == P::VERSION {
        return P::Codec::decode(data).map(E::from);
    }
    P::upcast(version, data).map(E::from)
}

/// Refuses, at compile time, an upcast from an event that is not an older version of `E`.
///
/// [`upcast_from`] checks it where it is compiled into a program; the derive checks it in a `const`
/// of its own too, so that `cargo check` of a library reports it already.
#[doc(hidden)]
#[track_caller]
pub const fn assert_upcast<P: Event, E: Event>() {
    assert!(
        P::VERSION < E::VERSION,
        "`from` must name a lower version of the event"
    );
    assert!(
        is_same(P::TYPE, E::TYPE),
        "`from` must name an event of the same `type`"
    );
}

/// The error of a version that nothing leads from. For [`Event::upcast`].
pub fn unknown_version<E: Event>(version: u32) -> Error {
    let message = if version > E::VERSION {
        "the event is newer than this service: deploy the service, then re-drive the dead letter"
    } else {
        "nothing leads from this version: name the older type in #[event(from = \"…\")]"
    };
    Error::new(ErrorKind::Codec, "read event", message).with("known version", E::VERSION)
}

/// Whether two names are the same, where `==` is not to be had.
pub(crate) const fn is_same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    if a.len() != b.len() {
        return false;
    }
    let mut index = 0;
    while index < a.len() {
        if a[index] != b[index] {
            return false;
        }
        index += 1;
    }
    true
}
