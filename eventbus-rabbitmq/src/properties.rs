//! A message as the properties of one of AMQP, and back. Nothing is sent here.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use bytes::Bytes;
use eventbus_core::{
    Error, ErrorKind, Formats, Headers, HeadersBuilder, Key, Message, Result, Topic, header, lines,
};
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldArray, FieldTable, LongString, ShortString};

/// The key.
const KEY: &str = "eb-key";
/// In which order the headers are, where that is not the usual one (see [`place`]): a byte for each header,
/// which is the place of its name among all names in that order. AMQP's table has no order, and each
/// name once; of one that is repeated it has a list.
const ORDER: &str = "eb-order";
/// All headers as [`Headers::packed`] gives them, where the table cannot hold them.
const PACKED: &str = "eb-packed";

/// The server counts how often it took a message back.
const DELIVERY_COUNT: &str = "x-delivery-count";
/// The place of a message in a stream.
const STREAM_OFFSET: &str = "x-stream-offset";
/// The mark that a reader publishes to find the end of a stream: no message, whoever reads it.
const MARK: &str = "eb-mark";

/// What servers take in one frame, unless they are told otherwise.
const FRAME_BYTES: usize = 128 * 1024;
/// What a frame has beside key and headers of a message.
const OTHER_BYTES: usize = 8 * 1024;

/// Kept when the server ends.
const PERSISTENT: u8 = 2;

/// What the server, or its other clients, give a meaning of their own.
fn is_reserved(name: &str) -> bool {
    matches!(name, KEY | ORDER | PACKED | MARK | "CC" | "BCC") || name.starts_with("x-")
}

/// Checks what most servers would close the connection for.
///
/// # Errors
///
/// `InvalidInput` when the headers do not fit a frame.
pub(crate) fn check(message: &Message) -> Result<()> {
    fits(message, FRAME_BYTES)
}

/// As [`check`], for a server that takes so many bytes in a frame.
pub(crate) fn fits(message: &Message, frame: usize) -> Result<()> {
    // A small frame has little beside them: names of an exchange and of headers are short.
    let most = frame - OTHER_BYTES.min(frame / 2);
    let key = message.key.as_ref().map_or(0, |key| key.as_bytes().len());
    let bytes = key + message.headers.packed_len() + 2 * message.headers.iter_bytes().count();
    if bytes <= most {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        "publish",
        "key and headers have more bytes than fit one frame, as the server has it: put the rest into the payload",
    )
    .with("bytes", bytes)
    .with("at most", most)
    .with("topic", &message.topic))
}

/// The properties of a message that is to be kept.
pub(crate) fn to_properties(message: &Message) -> BasicProperties {
    let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
    if message.key.is_none() && message.headers.is_empty() {
        return properties;
    }
    let mut table = table_of(&message.headers).unwrap_or_else(|| {
        let packed = long(message.headers.packed());
        BTreeMap::from([(ShortString::from(PACKED), packed)])
    });
    if let Some(key) = &message.key {
        table.insert(ShortString::from(KEY), long(key.as_bytes()));
    }
    properties.with_headers(FieldTable::from(table))
}

/// The properties of a mark, which has no payload.
pub(crate) fn to_mark(name: &str) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert(MARK.into(), long(name.as_bytes()));
    let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
    properties.with_headers(headers)
}

/// The properties of a message that is put aside as it came. What would let the server drop it, refuse it
/// or send it elsewhere, too, is kept in headers that say nothing to it.
pub(crate) fn to_keep(came: &BasicProperties) -> BasicProperties {
    let mut table = came.headers().clone().unwrap_or_default();
    table = FieldTable::from(
        table
            .inner()
            .iter()
            .map(|(name, value)| match name.as_str() {
                "CC" => (ShortString::from("eb-cc"), value.clone()),
                "BCC" => (ShortString::from("eb-bcc"), value.clone()),
                _ => (name.clone(), value.clone()),
            })
            .collect::<BTreeMap<_, _>>(),
    );
    let aside = [
        ("eb-expiration", came.expiration()),
        ("eb-user-id", came.user_id()),
    ];
    for (name, value) in aside {
        if let Some(value) = value {
            table.insert(name.into(), long(value.as_str().as_bytes()));
        }
    }
    let mut kept = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_headers(table);
    kept = with(
        kept,
        came.content_type(),
        BasicProperties::with_content_type,
    );
    kept = with(
        kept,
        came.content_encoding(),
        BasicProperties::with_content_encoding,
    );
    kept = with(
        kept,
        came.correlation_id(),
        BasicProperties::with_correlation_id,
    );
    kept = with(kept, came.reply_to(), BasicProperties::with_reply_to);
    kept = with(kept, came.message_id(), BasicProperties::with_message_id);
    kept = with(kept, came.kind(), BasicProperties::with_type);
    kept = with(kept, came.app_id(), BasicProperties::with_app_id);
    kept = with(kept, came.cluster_id(), BasicProperties::with_cluster_id);
    if let Some(timestamp) = came.timestamp() {
        kept = kept.with_timestamp(*timestamp);
    }
    if let Some(priority) = came.priority() {
        kept = kept.with_priority(*priority);
    }
    kept
}

/// Sets a property that is there.
fn with(
    kept: BasicProperties,
    text: &Option<ShortString>,
    set: impl Fn(BasicProperties, ShortString) -> BasicProperties,
) -> BasicProperties {
    match text {
        Some(text) => set(kept, text.clone()),
        None => kept,
    }
}

fn long(bytes: &[u8]) -> AMQPValue {
    AMQPValue::LongString(LongString::from(bytes))
}

/// Where a header usually is: ours before others, both by their names.
fn place(name: &str) -> (bool, &str) {
    (!name.as_bytes().starts_with(lines::OURS), name)
}

/// Headers as a table; none where it cannot hold them.
fn table_of(headers: &Headers) -> Option<BTreeMap<ShortString, AMQPValue>> {
    let mut table = BTreeMap::new();
    let mut is_in_order = true;
    let mut before = None;
    for (name, value) in headers.iter() {
        if is_reserved(name) {
            return None;
        }
        is_in_order &= before < Some(place(name));
        before = Some(place(name));
        // A name has at most 255 bytes.
        match table.entry(ShortString::from(name)) {
            Entry::Vacant(entry) => drop(entry.insert(long(value))),
            Entry::Occupied(entry) => match entry.into_mut() {
                AMQPValue::FieldArray(values) => values.push(long(value)),
                first => {
                    let all = vec![std::mem::replace(first, AMQPValue::Void), long(value)];
                    *first = AMQPValue::FieldArray(FieldArray::from(all));
                }
            },
        }
    }
    if !is_in_order {
        table.insert(ShortString::from(ORDER), long(&order(headers)?));
    }
    Some(table)
}

/// In which order they are, as [`ORDER`] says it; none where there are too many.
fn order(headers: &Headers) -> Option<Vec<u8>> {
    let mut names: Vec<_> = headers.iter().map(|(name, _)| place(name)).collect();
    names.sort_unstable();
    names.dedup();
    if names.len() > usize::from(u8::MAX) {
        return None;
    }
    let places = headers.iter().map(|(name, _)| {
        // Each name is among them, and there are at most 255.
        names.binary_search(&place(name)).unwrap_or_default() as u8
    });
    Some(places.collect())
}

/// What a delivery of AMQP says.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) message: Message,
    /// How often the server took it back before, where it counts that.
    pub(crate) returned: Option<u32>,
    /// Its place in a stream.
    pub(crate) offset: Option<u64>,
    /// What the mark is called that it is.
    pub(crate) mark: Option<String>,
}

/// The message of a delivery. What a stream says of it is believed where it is from one (`is_log`);
/// elsewhere the same headers are of whoever published it.
pub(crate) fn read(topic: &Topic, delivery: Delivery, is_log: bool) -> Read {
    let mut read = Read {
        message: Message::new(topic.clone(), Bytes::from(delivery.data)),
        returned: None,
        offset: None,
        mark: None,
    };
    let table = delivery.properties.headers().as_ref();
    if let Some(table) = table.map(FieldTable::inner) {
        read.message.key = table
            .get(KEY)
            .map(|key| Key::new(Bytes::copy_from_slice(&text(key))));
        if delivery.redelivered {
            read.returned = table.get(DELIVERY_COUNT).and_then(number);
        }
        if is_log {
            read.offset = table.get(STREAM_OFFSET).and_then(number);
            read.mark = mark(table).filter(|_| read.message.payload.is_empty());
        }
        read.message.headers = headers(table);
    }
    if read.message.headers.get(header::ID).is_none() {
        read.message.headers = with_foreign(&read.message, &delivery.properties);
    }
    read
}

fn mark(table: &BTreeMap<ShortString, AMQPValue>) -> Option<String> {
    match table.get(MARK)? {
        AMQPValue::LongString(name) => Some(name.to_string()),
        _ => None,
    }
}

/// The headers of a message of another client, with what it says in properties of AMQP, which have no
/// place in a message otherwise. Its id is that of the event, unless the body says another.
fn with_foreign(message: &Message, properties: &BasicProperties) -> Headers {
    let property = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
    let properties = [
        (header::CONTENT_TYPE, property(properties.content_type())),
        (
            "amqp-content-encoding",
            property(properties.content_encoding()),
        ),
        ("amqp-correlation-id", property(properties.correlation_id())),
        ("amqp-reply-to", property(properties.reply_to())),
        ("amqp-message-id", property(properties.message_id())),
        (
            "amqp-timestamp",
            properties.timestamp().map(|it| it.to_string()),
        ),
        ("amqp-type", property(properties.kind())),
        ("amqp-app-id", property(properties.app_id())),
    ];
    let mut builder = message.headers.to_builder().unlimited();
    for (name, value) in &properties {
        if let Some(value) = value
            && message.headers.get(name).is_none()
        {
            add(&mut builder, name, value.as_bytes());
        }
    }
    let id = properties
        .iter()
        .find(|(name, _)| *name == "amqp-message-id");
    if let Some((_, Some(id))) = id
        && !id.is_empty()
        && Formats::default().own_id(message).is_none()
    {
        add(&mut builder, header::ID, id.as_bytes());
    }
    builder.build()
}

fn headers(table: &BTreeMap<ShortString, AMQPValue>) -> Headers {
    if let Some(AMQPValue::LongString(packed)) = table.get(PACKED)
        && let Ok(headers) = Headers::from_packed(Bytes::copy_from_slice(packed.as_bytes()))
    {
        return headers;
    }
    // Ours before others, both by their names.
    let of = |is_foreign: bool| {
        let all = table.iter().filter(|(name, _)| {
            !matches!(name.as_str(), KEY | ORDER | DELIVERY_COUNT | STREAM_OFFSET)
        });
        all.filter(move |(name, _)| place(name.as_str()).0 == is_foreign)
    };
    let others = || of(false).chain(of(true));
    let mut builder = Headers::builder().unlimited();
    if let Some(AMQPValue::LongString(order)) = table.get(ORDER) {
        let named: Vec<_> = others().collect();
        if let Some(ordered) = in_order(&named, order.as_bytes()) {
            for (name, value) in ordered {
                add(&mut builder, name, &text(value));
            }
            return builder.build();
        }
    }
    let mut left_out = 0_usize;
    for (name, value) in others() {
        let values = match value {
            AMQPValue::FieldArray(values) => values.as_slice(),
            value => std::slice::from_ref(value),
        };
        for value in values {
            let is_structured =
                matches!(value, AMQPValue::FieldTable(_) | AMQPValue::FieldArray(_));
            if is_structured || !add(&mut builder, name.as_str(), &text(value)) {
                left_out += 1;
            }
        }
    }
    if left_out > 0 {
        let count = left_out.to_string();
        add(&mut builder, header::HEADERS_LEFT_OUT, count.as_bytes());
    }
    builder.build()
}

/// Adds a header, unless no message can have it: its name is empty.
fn add(builder: &mut HeadersBuilder, name: &str, value: &[u8]) -> bool {
    builder.add(name, value).is_ok()
}

/// The headers in the order that was noted; none where the note does not fit them.
fn in_order<'t>(
    named: &[(&'t ShortString, &'t AMQPValue)],
    order: &[u8],
) -> Option<Vec<(&'t str, &'t AMQPValue)>> {
    let mut taken = vec![0_usize; named.len()];
    let mut ordered = Vec::with_capacity(order.len());
    for place in order {
        let (name, value) = named.get(usize::from(*place))?;
        let taken = &mut taken[usize::from(*place)];
        let value = match value {
            AMQPValue::FieldArray(values) => values.as_slice().get(*taken)?,
            value if *taken == 0 => value,
            _ => return None,
        };
        *taken += 1;
        ordered.push((name.as_str(), value));
    }
    let all = named.iter().zip(&taken).all(|((_, value), taken)| {
        *taken
            == match value {
                AMQPValue::FieldArray(values) => values.as_slice().len(),
                _ => 1,
            }
    });
    all.then_some(ordered)
}

/// A value as bytes: those of a text, and of anything else what it is written like.
fn text(value: &AMQPValue) -> std::borrow::Cow<'_, [u8]> {
    let shown = |value: &dyn std::fmt::Display| value.to_string().into_bytes().into();
    match value {
        AMQPValue::LongString(text) => text.as_bytes().into(),
        AMQPValue::ShortString(text) => text.as_str().as_bytes().into(),
        AMQPValue::ByteArray(bytes) => bytes.as_slice().into(),
        AMQPValue::Boolean(value) => shown(value),
        AMQPValue::ShortShortInt(value) => shown(value),
        AMQPValue::ShortShortUInt(value) => shown(value),
        AMQPValue::ShortInt(value) => shown(value),
        AMQPValue::ShortUInt(value) => shown(value),
        AMQPValue::LongInt(value) => shown(value),
        AMQPValue::LongUInt(value) => shown(value),
        AMQPValue::LongLongInt(value) => shown(value),
        AMQPValue::Timestamp(value) => shown(value),
        AMQPValue::Float(value) => shown(value),
        AMQPValue::Double(value) => shown(value),
        AMQPValue::DecimalValue(value) => {
            let value = f64::from(value.value) / 10_f64.powi(i32::from(value.scale));
            shown(&value)
        }
        AMQPValue::Void | AMQPValue::FieldArray(_) | AMQPValue::FieldTable(_) => (&[][..]).into(),
    }
}

fn number<N: TryFrom<i64>>(value: &AMQPValue) -> Option<N> {
    let number = match value {
        AMQPValue::LongLongInt(number) => *number,
        AMQPValue::LongInt(number) => i64::from(*number),
        AMQPValue::LongUInt(number) => i64::from(*number),
        AMQPValue::ShortInt(number) => i64::from(*number),
        AMQPValue::ShortUInt(number) => i64::from(*number),
        AMQPValue::ShortShortInt(number) => i64::from(*number),
        AMQPValue::ShortShortUInt(number) => i64::from(*number),
        _ => return None,
    };
    N::try_from(number).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name() -> impl Strategy<Value = &'static str> {
        let names = [
            "eb-id",
            "eb-key",
            "eb-mark",
            "eb-order",
            "eb-packed",
            "x-death",
            "a",
            "b",
            "B",
            "CC",
        ];
        proptest::sample::select(names.to_vec())
    }

    fn value() -> impl Strategy<Value = &'static [u8]> {
        let values: [&[u8]; 5] = [b"", b"17", b"\xff", b"\x00\x01", b"one\ntwo"];
        proptest::sample::select(values.to_vec())
    }

    fn delivery(properties: BasicProperties) -> Delivery {
        let mut delivery = Delivery::mock(1, "".into(), "".into(), false, b"payload".to_vec());
        delivery.properties = properties;
        delivery
    }

    proptest! {
        #[test]
        fn a_message_comes_back_as_it_was(
            sent in proptest::collection::vec((name(), value()), 0..9),
            key in proptest::option::of(value()),
        ) {
            let mut headers = Headers::builder();
            for (name, value) in &sent {
                headers = headers.push(name, value).expect("within limits");
            }
            let topic = Topic::from_static("orders");
            let mut message = Message::new(topic.clone(), "payload").with_headers(headers.build());
            message.key = key.map(Key::new);
            let read = read(&topic, delivery(to_properties(&message)), false);
            prop_assert_eq!(read.message, message);
            prop_assert_eq!((read.returned, read.offset, read.mark), (None, None, None));
        }
    }

    #[test]
    fn headers_are_there_by_their_names_for_everybody() {
        let headers = Headers::builder()
            .push("eb-type", "Paid")
            .and_then(|headers| headers.push("eb-id", "17"))
            .expect("within limits")
            .build();
        let message = Message::new(Topic::from_static("t"), "").with_headers(headers);
        let properties = to_properties(&message.with_key("k"));
        let table = properties.headers().as_ref().expect("it has headers");
        for (name, value) in [("eb-type", &b"Paid"[..]), ("eb-id", b"17"), (KEY, b"k")] {
            assert_eq!(table.inner().get(name), Some(&long(value)), "{name}");
        }
    }

    #[test]
    fn headers_of_others_are_read_as_text() {
        let mut table = FieldTable::default();
        let mut list = FieldArray::default();
        list.push(long(b"one"));
        list.push(AMQPValue::LongInt(2));
        table.insert("count".into(), AMQPValue::LongLongInt(-3));
        table.insert("flag".into(), AMQPValue::Boolean(true));
        table.insert("list".into(), AMQPValue::FieldArray(list));
        table.insert("nothing".into(), AMQPValue::Void);
        table.insert(
            "nested".into(),
            AMQPValue::FieldTable(FieldTable::default()),
        );
        table.insert("".into(), long(b"nameless"));
        table.insert(ORDER.into(), long(&[9, 9]));
        table.insert(DELIVERY_COUNT.into(), AMQPValue::LongLongInt(2));
        table.insert(STREAM_OFFSET.into(), AMQPValue::LongLongInt(70));
        let properties = BasicProperties::default()
            .with_headers(table)
            .with_content_type("application/json".into());
        let read = read(&Topic::from_static("t"), delivery(properties), false);
        assert_eq!((read.returned, read.offset), (None, None));
        let found: Vec<_> = read.message.headers.iter().collect();
        let expected: [(&str, &[u8]); 7] = [
            ("count", b"-3"),
            ("flag", b"true"),
            ("list", b"one"),
            ("list", b"2"),
            ("nothing", b""),
            (header::HEADERS_LEFT_OUT, b"2"),
            (header::CONTENT_TYPE, b"application/json"),
        ];
        assert_eq!(found, expected);
    }

    /// Anybody can publish headers that are called like the server's.
    #[test]
    fn what_the_server_says_is_believed_where_it_can_say_it() {
        let mut table = FieldTable::default();
        table.insert(DELIVERY_COUNT.into(), AMQPValue::LongLongInt(2));
        table.insert(STREAM_OFFSET.into(), AMQPValue::LongLongInt(70));
        table.insert(MARK.into(), long(b"end"));
        let properties = BasicProperties::default().with_headers(table);
        let read = |is_log, payload: &[u8], redelivered| {
            let mut delivery = delivery(properties.clone());
            (delivery.data, delivery.redelivered) = (payload.to_vec(), redelivered);
            let read = read(&Topic::from_static("t"), delivery, is_log);
            (read.returned, read.offset, read.mark)
        };
        let end = Some("end".to_owned());
        assert_eq!(read(false, b"", false), (None, None, None));
        assert_eq!(read(false, b"", true), (Some(2), None, None));
        assert_eq!(read(true, b"", false), (None, Some(70), end));
        // A letter whose message had such a header.
        assert_eq!(read(true, b"x", false), (None, Some(70), None));
    }

    #[test]
    fn what_is_put_aside_says_nothing_to_the_server_any_more() {
        let mut table = FieldTable::default();
        table.insert("CC".into(), long(b"other"));
        table.insert("tenant".into(), long(b"acme"));
        let came = BasicProperties::default()
            .with_headers(table)
            .with_expiration("1000".into())
            .with_user_id("shop".into())
            .with_message_id("17".into())
            .with_timestamp(5);
        let mut table = FieldTable::default();
        table.insert("eb-cc".into(), long(b"other"));
        table.insert("eb-expiration".into(), long(b"1000"));
        table.insert("eb-user-id".into(), long(b"shop"));
        table.insert("tenant".into(), long(b"acme"));
        let kept = BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_headers(table)
            .with_message_id("17".into())
            .with_timestamp(5);
        assert_eq!(to_keep(&came), kept);
    }

    #[test]
    fn headers_that_fit_no_frame_are_refused() {
        let mut headers = Headers::builder().unlimited();
        for _ in 0..16 {
            headers = headers
                .push("h", vec![0; 8 * 1024])
                .expect("there is no limit");
        }
        let message = Message::new(Topic::from_static("t"), "").with_headers(headers.build());
        let error = check(&message).expect_err("the server takes less");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}
