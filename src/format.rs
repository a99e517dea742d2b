//! How events become bytes: codecs of event types, formats of topics, and how to write another.

pub use eventbus_core::{
    CloudEventsBinaryFormat, CloudEventsBinding, CloudEventsFormat, Codec, EnvelopeFormat,
    FlatFormat, Format, Formats, Json, Reading, read_event,
};
