//! A message as it is shown: its envelope, where it stands, and its data.

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use eventbus::format::Formats;
use eventbus::header::KnownHeaders;
use eventbus::{Envelope, EventId, Message, Metadata, Record, Timestamp};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::output::Output;

/// Which events are meant.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Filter {
    /// Only events of this key
    #[arg(long)]
    pub(crate) key: Option<String>,
    /// Only events of this type
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) event_type: Option<String>,
}

impl Filter {
    pub(crate) fn takes(&self, message: &Message) -> bool {
        let key = message.key.as_ref().map(|key| key.as_bytes());
        let is_key = |wanted: &String| key == Some(wanted.as_bytes());
        let is_type = |wanted: &String| event_type(message).as_ref() == Some(wanted);
        self.key.as_ref().is_none_or(is_key) && self.event_type.as_ref().is_none_or(is_type)
    }
}

fn event_type(message: &Message) -> Option<String> {
    let known = KnownHeaders::of(&message.headers);
    let (_, reading) = FORMATS.read(message, &known).ok()?;
    Some(reading.event_type.into_owned())
}

/// A message for scripts. The names are a promise: they are added to, never changed.
#[derive(Debug, Serialize)]
pub(crate) struct Shown {
    pub(crate) topic: String,
    pub(crate) partition: u32,
    /// As text: it may be larger than what JSON readers take for a number.
    pub(crate) position: Option<String>,
    pub(crate) key: Option<String>,
    #[serde(flatten)]
    pub(crate) event: ShownEvent,
}

/// An event apart from where it stands.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ShownEvent {
    pub(crate) id: Option<String>,
    #[serde(rename = "type")]
    pub(crate) event_type: Option<String>,
    pub(crate) version: Option<u32>,
    pub(crate) time: Option<String>,
    pub(crate) source: Option<String>,
    pub(crate) correlation_id: Option<String>,
    pub(crate) causation_id: Option<String>,
    pub(crate) metadata: Metadata,
    /// The only group it is meant for.
    pub(crate) to_group: Option<String>,
    /// The data, where they are JSON.
    pub(crate) data: Option<Box<RawValue>>,
    /// The data, where they are not; the whole payload where no format claims the message.
    pub(crate) data_base64: Option<String>,
    /// Why it can't be read.
    pub(crate) unreadable: Option<String>,
}

impl Shown {
    pub(crate) fn of(record: &Record) -> Self {
        let message = &record.message;
        Self {
            topic: message.topic.to_string(),
            partition: record.partition,
            position: record.position.map(|position| position.to_string()),
            key: message.key.as_ref().map(ToString::to_string),
            event: ShownEvent::of(message),
        }
    }

    /// Writes it for whoever reads the output.
    pub(crate) fn write(&self, out: &mut Output<'_>) -> anyhow::Result<()> {
        if out.is_json() {
            return out.json(self);
        }
        let place = match &self.position {
            Some(position) => format!("{}/{}@{position}", self.topic, self.partition),
            None => format!("{}/{}", self.topic, self.partition),
        };
        let key = self
            .key
            .as_deref()
            .map_or("no key".to_owned(), |key| format!("key {key}"));
        out.line(format_args!("{}  {key}  {place}", self.event.headline()))?;
        out.line(format_args!("    {}", self.event.data_text()))?;
        Ok(())
    }
}

impl ShownEvent {
    pub(crate) fn of(message: &Message) -> Self {
        let known = KnownHeaders::of(&message.headers);
        let to_group = known.to_group().map(str::to_owned);
        let read = FORMATS.read(message, &known);
        match (read, envelope(message)) {
            (Ok((_, reading)), Ok(envelope)) => {
                let data = std::str::from_utf8(&reading.data).ok();
                let data = data.and_then(|data| RawValue::from_string(data.to_owned()).ok());
                let said = |text: String| (text != UNSAID).then_some(text);
                let time = (envelope.time != UNSAID_TIME).then(|| envelope.time.to_string());
                Self {
                    id: said(envelope.id.to_string()),
                    event_type: Some(envelope.event_type),
                    version: Some(envelope.version),
                    time,
                    source: Some(envelope.source),
                    correlation_id: said(envelope.correlation_id),
                    causation_id: envelope.causation_id,
                    metadata: envelope.metadata,
                    to_group,
                    data_base64: data.is_none().then(|| STANDARD.encode(&reading.data)),
                    data,
                    unreadable: None,
                }
            }
            (Err(error), _) | (_, Err(error)) => Self {
                to_group,
                data_base64: Some(STANDARD.encode(&message.payload)),
                unreadable: Some(eventbus::error_chain(&error)),
                ..Self::default()
            },
        }
    }

    /// When, what and which, in one line.
    pub(crate) fn headline(&self) -> String {
        if let Some(reason) = &self.unreadable {
            return format!("unreadable: {reason}");
        }
        let time = self.time.as_deref().unwrap_or(UNSAID);
        let event_type = self.event_type.as_deref().unwrap_or(UNSAID);
        let version = self.version.unwrap_or(1);
        let id = self.id.as_deref().unwrap_or(UNSAID);
        let only = self.to_group.as_deref();
        let only = only.map_or(String::new(), |group| format!("  for {group} alone"));
        format!("{time}  {event_type} v{version}  {id}{only}")
    }

    /// The data as text.
    pub(crate) fn data_text(&self) -> &str {
        match (&self.data, &self.data_base64) {
            (Some(data), _) => data.get(),
            (None, Some(data)) => data,
            (None, None) => "",
        }
    }
}

static FORMATS: LazyLock<Formats> = LazyLock::new(Formats::default);

/// Stands for what a foreign publisher left out: a service would make an id of the place, and take
/// the time at which it reads.
const UNSAID: &str = "-";
const UNSAID_TIME: Timestamp = Timestamp::from_micros(i64::MIN);

fn envelope(message: &Message) -> eventbus::Result<Envelope> {
    FORMATS.envelope(message, (EventId::parse(UNSAID)?, UNSAID_TIME))
}

#[cfg(test)]
mod tests {
    use eventbus::{Headers, Topic};
    use proptest::prelude::{any, prop, prop_assert, proptest};

    use super::*;

    proptest! {
        #[test]
        fn any_message_is_shown_as_json(
            headers in prop::collection::vec(("(eb-[a-z-]{2,14}|[a-z]{1,9})", any::<Vec<u8>>()), 0..9),
            payload in prop::collection::vec(any::<u8>(), 0..99),
        ) {
            let mut built = Headers::builder();
            for (name, value) in &headers {
                built = built.push(name, value).expect("within limits");
            }
            let message = Message::new(Topic::from_static("orders"), payload);
            let shown = ShownEvent::of(&message.with_headers(built.build()));
            drop((shown.headline(), shown.data_text().len()));
            let json = serde_json::to_string(&shown).expect("it has a JSON form");
            prop_assert!(serde_json::from_str::<serde_json::Value>(&json).is_ok());
        }
    }

    #[test]
    fn what_a_foreign_publisher_left_out_is_not_made_up() {
        let topic = Topic::from_static("orders");
        let flat = Message::new(topic.clone(), r#"{"event_type":"OrderCreated","n":1}"#);
        let shown = ShownEvent::of(&flat);
        assert_eq!((shown.id.as_ref(), shown.time.as_ref()), (None, None));
        assert_eq!(shown.headline(), "-  OrderCreated v1  -");
        let strange = ShownEvent::of(&Message::new(topic, vec![0xff, 0xfe]));
        assert_eq!(strange.data_base64.as_deref(), Some("//4="));
        assert!(
            strange
                .headline()
                .starts_with("unreadable: read message: no format claims it")
        );
    }
}
