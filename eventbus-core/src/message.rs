//! Bytes with a destination: topic, key, packed headers and payload. No meaning is read here.

use std::fmt;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use crate::chunk;
use crate::error::{Error, ErrorKind, Result};

/// Most bytes a key may have.
pub const KEY_BYTES_MAX: usize = 4 * 1024;
/// Most headers a message may have.
pub const HEADERS_MAX: usize = 64;
/// Most bytes the value of one header may have.
pub const HEADER_BYTES_MAX: usize = 8 * 1024;
/// Most characters a topic or group name may have.
pub const NAME_LENGTH_MAX: usize = 200;

/// The name of a topic; clones without allocating.
///
/// 1 to 200 of `A–Z a–z 0–9 . _ -`, which every supported broker takes.
#[derive(Clone)]
pub struct Topic(Name);

/// The name of a consumer group; clones without allocating. Same characters as a [`Topic`].
#[derive(Clone)]
pub struct Group(Name);

#[derive(Clone)]
enum Name {
    Static(&'static str),
    Shared(Arc<str>),
}

impl Name {
    fn as_str(&self) -> &str {
        match self {
            Self::Static(name) => name,
            Self::Shared(name) => name,
        }
    }
}

const fn is_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() > NAME_LENGTH_MAX {
        return false;
    }
    let mut index = 0;
    while index < bytes.len() {
        if !matches!(bytes[index], b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-') {
            return false;
        }
        index += 1;
    }
    true
}

fn checked_name(what: &'static str, name: &str) -> Result<Name> {
    if is_name(name) {
        return Ok(Name::Shared(Arc::from(name)));
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        what,
        format!("a name has 1 to {NAME_LENGTH_MAX} characters of A-Z a-z 0-9 . _ -"),
    )
    .with("name", format_args!("{name:?}")))
}

macro_rules! name_type {
    ($type:ident, $what:literal) => {
        impl $type {
            /// Checks `name` and keeps it.
            ///
            /// # Errors
            ///
            /// `InvalidInput` when a character or the length is not allowed.
            pub fn new(name: &str) -> Result<Self> {
                checked_name($what, name).map(Self)
            }

            /// Keeps a name known at compile time.
            ///
            /// # Panics
            ///
            /// At compile time, in a `const`, when a character or the length is not allowed.
            #[must_use]
            pub const fn from_static(name: &'static str) -> Self {
                assert!(
                    is_name(name),
                    "a name has 1 to 200 characters of A-Z a-z 0-9 . _ -"
                );
                Self(Name::Static(name))
            }

            /// The name.
            pub fn as_str(&self) -> &str {
                self.0.as_str()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.as_str())
            }
        }

        impl PartialEq for $type {
            fn eq(&self, other: &Self) -> bool {
                self.as_str() == other.as_str()
            }
        }

        impl Eq for $type {}

        impl PartialOrd for $type {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }

        impl Ord for $type {
            fn cmp(&self, other: &Self) -> std::cmp::Ordering {
                self.as_str().cmp(other.as_str())
            }
        }

        impl std::hash::Hash for $type {
            fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
                self.as_str().hash(state);
            }
        }

        impl std::borrow::Borrow<str> for $type {
            fn borrow(&self) -> &str {
                self.as_str()
            }
        }
    };
}

name_type!(Topic, "name a topic");
name_type!(Group, "name a group");

impl Topic {
    /// Whether it keeps the dead letters of a group, which is a topic of its own,
    /// `{topic}.{group}.dlq`: few messages, read rarely, never dropped, and one partition, so that they
    /// stay in their order.
    pub fn is_dead_letters(&self) -> bool {
        self.as_str().ends_with(".dlq")
    }
}

/// What keeps its messages in order and on one partition, such as an order's number as text.
///
/// # Examples
///
/// ```
/// use eventbus_core::Key;
///
/// assert_eq!(Key::display(42), Key::from("42"));
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Bytes);

impl Key {
    /// Keeps `bytes` as they are. Brokers take up to [`KEY_BYTES_MAX`]; publishing checks it.
    pub fn new(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }

    /// Uses the text of `value`, as `#[event(key = "…")]` does with the field it names.
    pub fn display(value: impl fmt::Display) -> Self {
        Self(chunk::display(value))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, shared.
    pub fn into_bytes(self) -> Bytes {
        self.0
    }
}

impl From<&str> for Key {
    fn from(text: &str) -> Self {
        Self(Bytes::copy_from_slice(text.as_bytes()))
    }
}

impl From<String> for Key {
    fn from(text: String) -> Self {
        Self(Bytes::from(text))
    }
}

impl fmt::Display for Key {
    /// Prints text as it is and other bytes escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match std::str::from_utf8(&self.0) {
            Ok(text) => f.write_str(text),
            Err(_) => write!(f, "{}", self.0.escape_ascii()),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// The headers of a message in one packed buffer, read lazily; clones without copying.
///
/// Names are text of 1 to 255 bytes, values are bytes; order and repetition are kept.
///
/// # Examples
///
/// ```
/// use eventbus_core::Headers;
///
/// let headers = Headers::builder()
///     .push("content-type", "application/json")?
///     .push("traceparent", "00-…-01")?
///     .build();
/// assert_eq!(headers.get("content-type"), Some("application/json".as_bytes()));
/// assert_eq!(headers.get_str("tenant"), None);
/// # Ok::<(), eventbus_core::Error>(())
/// ```
// Layout of one header: name length (1 byte), value length (4 bytes, little endian), name, value.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(Bytes);

const HEADER_PREFIX: usize = 5;

impl Headers {
    /// No headers.
    #[must_use]
    pub const fn new() -> Self {
        Self(Bytes::new())
    }

    /// Starts an empty set.
    pub fn builder() -> HeadersBuilder {
        HeadersBuilder::default()
    }

    /// Starts a set that holds these headers already.
    pub fn to_builder(&self) -> HeadersBuilder {
        HeadersBuilder {
            count: self.iter().count(),
            packed: BytesMut::from(self.0.as_ref()),
            unlimited: false,
        }
    }

    /// Takes headers as [`packed`](Self::packed) gave them, so that a store keeps one value.
    ///
    /// # Errors
    ///
    /// `Codec` when they are not whole: they end within a header, or a name is none of 1 to 255 bytes
    /// of text. A message with a part of its headers would be another message.
    pub fn from_packed(packed: Bytes) -> Result<Self> {
        let mut headers = HeadersBytesIter { rest: &packed };
        let are_named =
            headers.all(|(name, _)| !name.is_empty() && std::str::from_utf8(name).is_ok());
        if are_named && headers.rest.is_empty() {
            return Ok(Self(packed));
        }
        let at = packed.len() - headers.rest.len();
        Err(Error::new(
            ErrorKind::Codec,
            "read headers",
            "the packed headers are damaged",
        )
        .with("bytes", packed.len())
        .with("at", at))
    }

    /// The headers as one value, for [`from_packed`](Self::from_packed).
    pub fn packed(&self) -> &Bytes {
        &self.0
    }

    /// The value of the first header called `name`.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter_bytes()
            .find(|(found, _)| *found == name.as_bytes())
            .map(|(_, value)| value)
    }

    /// The value of the first header called `name`, if it is text.
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name)
            .and_then(|value| std::str::from_utf8(value).ok())
    }

    /// All headers in the order in which they were added.
    pub fn iter(&self) -> HeadersIter<'_> {
        HeadersIter(self.iter_bytes())
    }

    /// As [`iter`](Self::iter), without reading the names as text: for adapters.
    #[inline]
    pub fn iter_bytes(&self) -> HeadersBytesIter<'_> {
        HeadersBytesIter { rest: &self.0 }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes the packed headers take.
    pub fn packed_len(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(
                self.iter()
                    .map(|(name, value)| (name, value.escape_ascii().to_string())),
            )
            .finish()
    }
}

/// Iterates over the names and values of [`Headers`].
#[derive(Clone, Debug)]
pub struct HeadersIter<'a>(HeadersBytesIter<'a>);

impl<'a> Iterator for HeadersIter<'a> {
    type Item = (&'a str, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, value) = self.0.next()?;
        Some((std::str::from_utf8(name).ok()?, value))
    }
}

/// Iterates over the names and values of [`Headers`] as bytes; ends where they are cut, which those of a message are not.
#[derive(Clone, Debug)]
pub struct HeadersBytesIter<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for HeadersBytesIter<'a> {
    type Item = (&'a [u8], &'a [u8]);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (prefix, rest) = self.rest.split_at_checked(HEADER_PREFIX)?;
        let name_length = usize::from(prefix[0]);
        let value_length =
            u32::from_le_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        let (name, rest) = rest.split_at_checked(name_length)?;
        let (value, rest) = rest.split_at_checked(value_length)?;
        self.rest = rest;
        Some((name, value))
    }
}

fn value_too_long(name: &str, length: usize) -> Error {
    let message = "a header's value has at most 8192 bytes: put it into the payload";
    Error::new(ErrorKind::InvalidInput, "add header", message)
        .with("header", name)
        .with("bytes", length)
}

/// Packs headers one after another.
#[derive(Debug, Default)]
pub struct HeadersBuilder {
    packed: BytesMut,
    count: usize,
    /// Whether the limits of messages that are published do not apply.
    unlimited: bool,
}

impl HeadersBuilder {
    /// Adds a header.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the name is empty or longer than 255 bytes, the value longer than
    /// [`HEADER_BYTES_MAX`], or [`HEADERS_MAX`] are there already, unless it is
    /// [`unlimited`](Self::unlimited).
    pub fn push(mut self, name: &str, value: impl AsRef<[u8]>) -> Result<Self> {
        self.add(name, value.as_ref())?;
        Ok(self)
    }

    /// As [`push`](Self::push), in place.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push); nothing is added then.
    #[inline]
    pub fn add(&mut self, name: &str, value: &[u8]) -> Result<()> {
        let fits = self.unlimited || value.len() <= HEADER_BYTES_MAX && self.count < HEADERS_MAX;
        let lengths = (u8::try_from(name.len()), u32::try_from(value.len()));
        let (Ok(name_length @ 1..), Ok(value_length), true) = (lengths.0, lengths.1, fits) else {
            return Err(self.refuse(name, value.len()));
        };
        let mut prefix = [name_length; HEADER_PREFIX];
        prefix[1..].copy_from_slice(&value_length.to_le_bytes());
        self.packed
            .reserve(HEADER_PREFIX + name.len() + value.len());
        self.packed.extend_from_slice(&prefix);
        self.packed.extend_from_slice(name.as_bytes());
        self.packed.extend_from_slice(value);
        self.count += 1;
        Ok(())
    }

    /// Why a header is not added.
    #[cold]
    fn refuse(&self, name: &str, length: usize) -> Error {
        let refuse = |message: &str| {
            Error::new(ErrorKind::InvalidInput, "add header", message)
                .with("header", name)
                .with("bytes", length)
        };
        if name.is_empty() || name.len() > usize::from(u8::MAX) {
            return refuse("a header's name has 1 to 255 bytes");
        }
        if self.count < HEADERS_MAX || self.unlimited {
            return value_too_long(name, length);
        }
        refuse("a message has at most 64 headers: put the rest into the payload")
    }

    /// Adds a header whose value is what `value` shows, without a text in between.
    pub(crate) fn push_display(self, name: &str, value: impl fmt::Display) -> Result<Self> {
        use fmt::Write as _;

        let before = self.packed.len();
        let mut this = self.push(name, "")?;
        let begin = this.packed.len();
        let written = write!(this.packed, "{value}");
        let length = this.packed.len() - begin;
        if written.is_err() || length > HEADER_BYTES_MAX {
            return Err(value_too_long(name, length));
        }
        // Of the value, behind that of the name; it fits, see above.
        this.packed[before + 1..before + HEADER_PREFIX]
            .copy_from_slice(&(length as u32).to_le_bytes());
        Ok(this)
    }

    /// Lifts the limits on number and length: for a message that is on a broker already, which an
    /// adapter delivers as it is, and for its dead letter.
    #[must_use]
    pub fn unlimited(mut self) -> Self {
        self.unlimited = true;
        self
    }

    /// Adds a header if there is a value.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push).
    pub fn push_some(self, name: &str, value: Option<impl AsRef<[u8]>>) -> Result<Self> {
        match value {
            Some(value) => self.push(name, value),
            None => Ok(self),
        }
    }

    /// The packed headers.
    pub fn build(self) -> Headers {
        Headers(self.packed.freeze())
    }

    /// Starts an empty set that is packed into `buffer`, for adapters that read many messages into
    /// one piece of memory. Whatever the buffer holds is dropped.
    #[must_use]
    pub fn on(mut buffer: BytesMut) -> Self {
        buffer.clear();
        Self {
            packed: buffer,
            count: 0,
            unlimited: false,
        }
    }

    /// The packed headers, and what is left of the buffer they were packed [`on`](Self::on).
    pub fn build_with_rest(mut self) -> (Headers, BytesMut) {
        let packed = self.packed.split().freeze();
        (Headers(packed), self.packed)
    }
}

/// Bytes with a destination: all a broker ever sees.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Message {
    /// Where it goes.
    pub topic: Topic,
    /// What keeps it in order; without one it goes to any partition.
    pub key: Option<Key>,
    /// What is known about it without reading the payload.
    pub headers: Headers,
    /// The bytes a format made.
    pub payload: Bytes,
}

impl Message {
    /// Creates a message without key and headers.
    pub fn new(topic: Topic, payload: impl Into<Bytes>) -> Self {
        Self {
            topic,
            key: None,
            headers: Headers::new(),
            payload: payload.into(),
        }
    }

    /// Sets the key.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<Key>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Sets the headers.
    #[must_use]
    pub fn with_headers(mut self, headers: Headers) -> Self {
        self.headers = headers;
        self
    }

    /// Bytes of key, headers and payload: what credit, limits and retention count.
    pub fn size(&self) -> usize {
        let key = self.key.as_ref().map_or(0, |key| key.0.len());
        key + self.headers.packed_len() + self.payload.len()
    }

    /// A copy with memory of its own: for who keeps it long, beside others whose memory it shares and
    /// that go.
    #[must_use]
    pub(crate) fn detached(&self) -> Self {
        Self {
            topic: self.topic.clone(),
            key: (self.key.as_ref()).map(|key| Key(Bytes::copy_from_slice(&key.0))),
            headers: Headers(Bytes::copy_from_slice(&self.headers.0)),
            payload: Bytes::copy_from_slice(&self.payload),
        }
    }

    /// Checks the limits that hold on every broker.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the key or the whole message is too large.
    pub fn check(&self, message_bytes_max: usize) -> Result<()> {
        let refuse = |message: String| {
            Error::new(ErrorKind::InvalidInput, "publish", message).with("topic", &self.topic)
        };
        if let Some(key) = &self.key
            && key.0.len() > KEY_BYTES_MAX
        {
            return Err(refuse(format!(
                "the key has {} bytes, at most {KEY_BYTES_MAX} are allowed: use a short key, such as an id",
                key.0.len()
            )));
        }
        if self.size() > message_bytes_max {
            return Err(refuse(format!(
                "the message has {} bytes, this broker takes {message_bytes_max}: store the data elsewhere and publish a reference to it",
                self.size()
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_headers_that_are_not_whole_are_refused() {
        let headers = Headers::builder()
            .push("name", "value")
            .and_then(|headers| headers.push("other", ""));
        let headers = headers.expect("within limits").build();
        let first = HEADER_PREFIX + 9;
        for length in 0..headers.packed_len() {
            let cut = headers.packed().slice(..length);
            let is_whole = length == 0 || length == first;
            assert_eq!(
                Headers::from_packed(cut).is_ok(),
                is_whole,
                "{length} bytes"
            );
        }
        for packed in [
            &b"\0\0\0\0\0"[..],
            b"\x01\0\0\0\0\xff",
            b"\x01\xff\xff\xff\xffa",
        ] {
            let error = Headers::from_packed(Bytes::from_static(packed)).expect_err("damaged");
            assert_eq!(error.kind(), ErrorKind::Codec);
        }
    }

    #[test]
    fn headers_keep_order_repetition_and_bytes() {
        let headers = Headers::builder()
            .push("a", [0u8, 255, 10])
            .and_then(|builder| builder.push("b", ""))
            .and_then(|builder| builder.push("a", "second"))
            .expect("within limits")
            .build();
        let all: Vec<_> = headers.iter().collect();
        assert_eq!(
            all,
            [
                ("a", &[0u8, 255, 10][..]),
                ("b", &[][..]),
                ("a", &b"second"[..])
            ]
        );
        assert_eq!(headers.get("a"), Some(&[0u8, 255, 10][..]));
        assert_eq!(headers.to_builder().build(), headers);
        let again = Headers::from_packed(headers.packed().clone());
        assert_eq!(again.expect("they are whole"), headers);
    }

    #[test]
    fn headers_are_bounded() {
        let mut builder = Headers::builder();
        for index in 0..HEADERS_MAX {
            builder = builder
                .push(&format!("h{index}"), "v")
                .expect("within limits");
        }
        assert_eq!(
            builder
                .push("one-more", "v")
                .expect_err("over the limit")
                .kind(),
            ErrorKind::InvalidInput
        );
        assert!(Headers::builder().push("", "v").is_err());
        assert!(
            Headers::builder()
                .push("h", vec![0; HEADER_BYTES_MAX + 1])
                .is_err()
        );
    }

    #[test]
    fn headers_of_others_are_kept_whatever_their_number_and_length() {
        let long = vec![7; HEADER_BYTES_MAX + 1];
        let mut builder = Headers::builder().unlimited();
        for _ in 0..=HEADERS_MAX {
            builder = builder.push("h", &long).expect("there is no limit");
        }
        let headers = builder.build();
        assert_eq!(headers.iter().count(), HEADERS_MAX + 1);
        assert!(headers.iter().all(|(_, value)| value == long));
    }

    #[test]
    fn cut_headers_end_the_iteration_without_a_panic() {
        let headers = Headers::builder()
            .push("name", "value")
            .expect("within limits")
            .build();
        for length in 0..headers.0.len() {
            let cut = Headers(headers.0.slice(..length));
            assert_eq!(cut.iter().count(), 0);
        }
    }

    #[test]
    fn names_are_checked() {
        assert!(Topic::new("orders.v1_a-B").is_ok());
        assert!(Topic::new("").is_err());
        assert!(Topic::new("no spaces").is_err());
        assert!(Group::new(&"x".repeat(NAME_LENGTH_MAX + 1)).is_err());
    }

    #[test]
    fn a_message_over_the_limit_is_refused() {
        let message = Message::new(Topic::from_static("t"), vec![0; 11]).with_key("k");
        assert!(message.check(12).is_ok());
        assert!(message.check(11).is_err());
        let message = message.with_key("k".repeat(KEY_BYTES_MAX + 1));
        assert!(message.check(usize::MAX).is_err());
    }
}
