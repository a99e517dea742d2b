//! How an in-memory server is set up: size, partitions, clock, and which broker it behaves like.

use std::sync::Arc;
use std::time::Duration;

use crate::broker::{Capabilities, Durability};
use crate::clock::{Clock, SystemClock};
use crate::error::{Error, ErrorKind, Result};
use crate::message::Topic;
use crate::url::{redacted_option, redacted_url};

/// Most partitions a topic may have on this broker.
pub(super) const PARTITIONS_MAX: u32 = 4096;

const MIB: usize = 1024 * 1024;

/// The set-up of one in-memory server.
///
/// # Examples
///
/// ```
/// use eventbus_core::{MemoryConfig, MemoryProfile};
///
/// let config = MemoryConfig::from_url("memory:?like=kafka&partitions=8&bytes=67108864")?;
/// assert_eq!((config.profile, config.partitions), (MemoryProfile::Kafka, 8));
/// # Ok::<(), eventbus_core::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MemoryConfig {
    /// Partitions of a topic that nobody declared; one whose name ends in `.dlq` has a single one.
    pub partitions: u32,
    /// Most bytes stored over all topics, with [128 bytes](MemoryConfig::MESSAGE_OVERHEAD) added
    /// for each message, and an eighth beyond in reserve for dead letters and for what handlers
    /// publish.
    pub bytes: usize,
    /// Whose capabilities are declared and kept to.
    pub profile: MemoryProfile,
    /// How long a publish waits for room when the server is full.
    pub publish_timeout: Duration,
    /// What gives messages the time at which they were taken.
    pub clock: Arc<dyn Clock>,
}

impl Default for MemoryConfig {
    /// 4 partitions, 256 MiB, [`MemoryProfile::Memory`], 30 seconds, the machine's clock.
    fn default() -> Self {
        Self {
            partitions: 4,
            bytes: 256 * MIB,
            profile: MemoryProfile::default(),
            publish_timeout: Duration::from_secs(30),
            clock: Arc::new(SystemClock),
        }
    }
}

impl MemoryConfig {
    /// What each message counts beside its own bytes, so that empty ones are bounded as well.
    pub const MESSAGE_OVERHEAD: usize = 128;

    /// Sets the partitions of topics that nobody declared, 1 to 4096.
    #[must_use]
    pub fn with_partitions(mut self, partitions: u32) -> Self {
        self.partitions = partitions.clamp(1, PARTITIONS_MAX);
        self
    }

    /// Sets the most bytes stored over all topics.
    #[must_use]
    pub fn with_bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }

    /// Sets how long a publish waits for room.
    #[must_use]
    pub fn with_publish_timeout(mut self, timeout: Duration) -> Self {
        self.publish_timeout = timeout;
        self
    }

    /// Sets the clock.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Sets whose capabilities are declared and kept to.
    #[must_use]
    pub fn like(mut self, profile: MemoryProfile) -> Self {
        self.profile = profile;
        self
    }

    /// Reads `memory:`, with `like`, `partitions` and `bytes` as options behind `?`. A name, as in
    /// `memory:shop`, is left to [`MemoryBroker::from_url`](crate::MemoryBroker::from_url).
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the scheme, an option or a value is unknown; it says what is allowed.
    pub fn from_url(url: &str) -> Result<Self> {
        let refuse = |message: &str| {
            Error::new(ErrorKind::InvalidInput, "read broker url", message)
                .with("url", redacted_url(url))
        };
        let (address, options) = url.split_once('?').unwrap_or((url, ""));
        if !address.starts_with("memory:") {
            return Err(refuse(
                "the in-memory broker's url is `memory:` or `memory:NAME`, with options behind `?`",
            ));
        }
        let mut config = Self::default();
        for option in options.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            match name {
                "like" => {
                    config.profile = MemoryProfile::named(value).ok_or_else(|| {
                        refuse("`like` is one of memory, kafka, rabbitmq, redis")
                            .with("like", redacted_option(url, value))
                    })?;
                }
                "partitions" => {
                    config.partitions = value
                        .parse()
                        .ok()
                        .filter(|count| (1..=PARTITIONS_MAX).contains(count))
                        .ok_or_else(|| {
                            refuse("`partitions` is a number from 1 to 4096")
                                .with("partitions", redacted_option(url, value))
                        })?;
                }
                "bytes" => {
                    config.bytes = value
                        .parse()
                        .ok()
                        .filter(|bytes| *bytes >= 4096)
                        .ok_or_else(|| {
                            refuse("`bytes` is a number of at least 4096")
                                .with("bytes", redacted_option(url, value))
                        })?;
                }
                _ => {
                    return Err(refuse("the options are like, partitions and bytes")
                        .with("option", redacted_option(url, name)));
                }
            }
        }
        Ok(config)
    }

    /// Whether two URLs asked for the same server.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        (self.profile, self.partitions, self.bytes)
            == (other.profile, other.partitions, other.bytes)
    }

    /// What a server with this set-up declares.
    pub(super) fn capabilities(&self) -> Capabilities {
        let declared = self.profile.capabilities();
        let room = self.bytes.saturating_sub(Self::MESSAGE_OVERHEAD);
        Capabilities {
            message_bytes_max: declared.message_bytes_max.min(room),
            ..declared
        }
    }

    /// Whether messages of `topic` are there for groups and readers that come later.
    pub(super) fn keeps_history(&self, topic: &Topic) -> bool {
        self.profile != MemoryProfile::RabbitMq || topic.is_dead_letters()
    }
}

/// Whose capabilities an in-memory server declares and keeps to, so that a program is tried
/// without a broker against what that broker refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum MemoryProfile {
    /// All that this broker can do: 8 MiB a message, history, replay, counted hand-outs.
    #[default]
    Memory,
    /// As Kafka: 1 MiB a message, history and replay, hand-outs are not counted.
    Kafka,
    /// As RabbitMQ: 16 MiB a message; a new group begins with what is published from then on and
    /// nothing is read again, except dead letters; counted hand-outs.
    RabbitMq,
    /// As Redis streams: 16 MiB a message, history and replay, hand-outs are not counted.
    Redis,
}

impl MemoryProfile {
    fn named(name: &str) -> Option<Self> {
        match name {
            "memory" => Some(Self::Memory),
            "kafka" => Some(Self::Kafka),
            "rabbitmq" => Some(Self::RabbitMq),
            "redis" => Some(Self::Redis),
            _ => None,
        }
    }

    fn capabilities(self) -> Capabilities {
        let declared = Capabilities {
            system: "memory",
            durability: Durability::Process,
            lag: true,
            ..Capabilities::default()
        };
        match self {
            Self::Memory => Capabilities {
                message_bytes_max: 8 * MIB,
                history: true,
                replay: true,
                gaps: true,
                hand_out_count: true,
                ordered_pipelining: true,
                ..declared
            },
            Self::Kafka => Capabilities {
                message_bytes_max: MIB,
                history: true,
                replay: true,
                gaps: true,
                ..declared
            },
            Self::RabbitMq => Capabilities {
                message_bytes_max: 16 * MIB,
                hand_out_count: true,
                ..declared
            },
            Self::Redis => Capabilities {
                message_bytes_max: 16 * MIB,
                history: true,
                replay: true,
                gaps: true,
                ..declared
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_all_options() {
        let config = MemoryConfig::from_url("memory:?like=rabbitmq&partitions=8&bytes=65536")
            .expect("a good url");
        assert_eq!(config.profile, MemoryProfile::RabbitMq);
        assert_eq!((config.partitions, config.bytes), (8, 65536));
        let config = MemoryConfig::from_url("memory:").expect("a good url");
        assert_eq!(config.profile, MemoryProfile::Memory);
        assert!(MemoryConfig::from_url("memory://").is_ok());
    }

    #[test]
    fn an_unknown_option_or_value_is_answered_with_what_is_allowed() {
        let cases = [
            ("memory:?like=nats", "memory, kafka, rabbitmq, redis"),
            ("memory:?partitions=0", "1 to 4096"),
            ("memory:?partitions=many", "1 to 4096"),
            ("memory:?bytes=1", "at least 4096"),
            ("memory:?size=1", "like, partitions and bytes"),
            ("kafka://host", "`memory:`"),
        ];
        for (url, allowed) in cases {
            let error = MemoryConfig::from_url(url).expect_err(url);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{url}");
            assert!(error.to_string().contains(allowed), "{error}");
        }
    }

    #[test]
    fn what_may_be_a_password_is_in_no_error() {
        for url in [
            "kafka://me:secret@host/?partitions=2",
            "memory://me:secret@host?size=1",
            "memory:?password=secret",
            "memory:me:1?partitions=secret@host",
        ] {
            let error = MemoryConfig::from_url(url).expect_err(url);
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_message_is_never_larger_than_the_server() {
        let config = MemoryConfig::default().with_bytes(10_000);
        assert_eq!(config.capabilities().message_bytes_max, 9_872);
    }
}
