#![doc = include_str!("../README.md")]

mod event;
mod mistakes;
mod options;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Makes a struct an event: writes its `impl Event`.
///
/// | option | value | |
/// | --- | --- | --- |
/// | `type` | text | compulsory; its name on the wire, which outlives the name of the struct |
/// | `topic` | a topic's name | compulsory; where it is published |
/// | `key` | a field, or a path of fields: `"order.id"`, `"0"` | what keeps it in order, as text: the field needs `Display`; none: no order |
/// | `version` | an integer from 1 on | the version of its data; 1 without it |
/// | `from` | the path of a type | the version before, from which older data are converted; needs `version` and `From<that type>` |
/// | `codec` | the path of a type | how its data become bytes; JSON without it, which needs serde's derives |
/// | `crate` | the path of a module | where the SDK is found; `::eventbus` without it |
///
/// Paths are resolved where the struct stands. An event owns its data and has no type parameters;
/// several event types are several structs. For a key made of several fields, implement `Event` by
/// hand.
///
/// # Errors
///
/// The compiler points at the option that is wrong, and at all of them at once. That `from` names an
/// older version of the same event type is checked too.
///
/// # Examples
///
/// An event at version 2 that still reads what version 1 wrote:
///
/// ```
/// use eventbus_core::read_event;
/// use eventbus_macros::Event;
/// use serde::{Deserialize, Serialize};
///
/// mod v1 {
///     # use eventbus_macros::Event;
///     # use serde::{Deserialize, Serialize};
///     #[derive(Event, Serialize, Deserialize)]
///     #[event(type = "OrderCreated", topic = "order-events", key = "order_id")]
///     # #[event(crate = "eventbus_core")]
///     pub struct OrderCreated {
///         pub order_id: u64,
///     }
/// }
///
/// #[derive(Event, Serialize, Deserialize)]
/// #[event(type = "OrderCreated", topic = "order-events", key = "order_id")]
/// #[event(version = 2, from = "v1::OrderCreated")]
/// # #[event(crate = "eventbus_core")]
/// struct OrderCreated {
///     order_id: u64,
///     currency: String,
/// }
///
/// impl From<v1::OrderCreated> for OrderCreated {
///     fn from(before: v1::OrderCreated) -> Self {
///         Self { order_id: before.order_id, currency: "EUR".to_owned() }
///     }
/// }
///
/// let order: OrderCreated = read_event(1, br#"{"order_id":123}"#)?;
/// assert_eq!(order.currency, "EUR");
/// # Ok::<(), eventbus_core::Error>(())
/// ```
#[proc_macro_derive(Event, attributes(event))]
pub fn derive_event(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    event::expand(&input)
        .unwrap_or_else(|error| error.to_compile_error())
        .into()
}
