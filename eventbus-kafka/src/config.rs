//! How a Kafka client is set up, and what its URL says.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use eventbus_core::{
    Error, ErrorKind, Result, credentials, duration, host_and_port, redacted_option, redacted_url,
};
use percent_encoding::percent_decode_str;
use rdkafka::ClientConfig;

/// The set-up of a [`KafkaBroker`](crate::KafkaBroker).
///
/// # Examples
///
/// ```
/// use eventbus_kafka::KafkaConfig;
///
/// let config = KafkaConfig::from_url("kafka://one.example:9092,two.example:9092?compression.type=lz4")?;
/// assert_eq!(config.servers, "one.example:9092,two.example:9092");
/// assert_eq!(config.options["compression.type"], "lz4");
/// # Ok::<(), eventbus_core::Error>(())
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct KafkaConfig {
    /// Brokers to begin with, `HOST:PORT` with commas between them; the others are found by them.
    pub servers: String,
    /// User and password, for SASL.
    pub credentials: Option<(String, String)>,
    /// Whether connections are encrypted. None: where there are credentials and a broker to begin
    /// with is on another machine.
    pub tls: Option<bool>,
    /// Whether a topic that is published or subscribed to is created where it is missing, with the
    /// brokers' defaults; otherwise that is `NotFound`.
    pub create_topics: bool,
    /// How long a message is tried to be published before it is given back.
    pub publish_timeout: Duration,
    /// How long a member that says nothing keeps its partitions; brokers bound it, by
    /// `group.min.session.timeout.ms` and its like.
    pub session_timeout: Duration,
    /// Options of librdkafka as its documentation (`CONFIGURATION.md`) names them.
    pub options: BTreeMap<String, String>,
}

impl fmt::Debug for KafkaConfig {
    /// Hides what may be secret: the password, and values of options.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = self.credentials.as_ref().map(|(user, _)| user);
        f.debug_struct("KafkaConfig")
            .field("servers", &self.servers)
            .field("user", &user)
            .field("tls", &self.tls)
            .field("create_topics", &self.create_topics)
            .field("publish_timeout", &self.publish_timeout)
            .field("session_timeout", &self.session_timeout)
            .field("options", &self.options.keys())
            .finish_non_exhaustive()
    }
}

/// Options that would break a promise of this broker, and what to do instead.
const REFUSED: &[(&str, &str)] = &[
    (
        "acks",
        "every replica in sync acknowledges, or a message could be lost",
    ),
    (
        "auto.offset.reset",
        "a group begins where its subscription says, and a gap is reported",
    ),
    ("bootstrap.servers", "name the brokers before the `?`"),
    (
        "enable.auto.commit",
        "a message is recorded when it is settled",
    ),
    (
        "enable.auto.offset.store",
        "a message is recorded when it is settled",
    ),
    (
        "enable.idempotence",
        "without it a retry of the client may publish twice or out of order",
    ),
    ("enable.partition.eof", "it is set where it is needed"),
    ("group.id", "each consumer names its group"),
    ("message.timeout.ms", "use `publish_timeout`"),
    ("delivery.timeout.ms", "use `publish_timeout`"),
    (
        "partition.assignment.strategy",
        "partitions are given up one by one, which only the cooperative one does",
    ),
    (
        "partitioner",
        "a key has the partition that Kafka's Java client gives it, on every broker",
    ),
    ("session.timeout.ms", "use `session_timeout`"),
    (
        "sasl.password",
        "name user and password before the host: kafka://USER:PASSWORD@HOST",
    ),
    (
        "sasl.username",
        "name user and password before the host: kafka://USER:PASSWORD@HOST",
    ),
    ("security.protocol", "use `tls=true` or `tls=false`"),
    (
        "transactional.id",
        "events are published one by one; effects happen once by a unit of work or a duplicate window",
    ),
];

/// Other names of options, as librdkafka has them, and the names that are used here.
const ALIASES: &[(&str, &str)] = &[
    ("compression.codec", "compression.type"),
    ("max.in.flight", "max.in.flight.requests.per.connection"),
    ("message.send.max.retries", "retries"),
    ("metadata.broker.list", "bootstrap.servers"),
    ("queue.buffering.max.ms", "linger.ms"),
    ("request.required.acks", "acks"),
    ("sasl.mechanisms", "sasl.mechanism"),
];

const OWN_OPTIONS: &str = "the options are create_topics, publish_timeout, session_timeout, tls, and those of librdkafka's CONFIGURATION.md, which have a dot in their names";

impl KafkaConfig {
    /// The defaults: missing topics are created, 30 seconds for a publish, sessions of 10 seconds.
    #[must_use]
    pub fn new(servers: impl Into<String>) -> Self {
        Self {
            servers: servers.into(),
            credentials: None,
            tls: None,
            create_topics: true,
            publish_timeout: Duration::from_secs(30),
            session_timeout: Duration::from_secs(10),
            options: BTreeMap::new(),
        }
    }

    /// Sets user and password.
    #[must_use]
    pub fn with_credentials(
        mut self,
        user: impl Into<String>,
        password: impl Into<String>,
    ) -> Self {
        self.credentials = Some((user.into(), password.into()));
        self
    }

    /// Sets whether connections are encrypted; needs the feature `tls`.
    #[must_use]
    pub fn with_tls(mut self, tls: bool) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Sets whether missing topics are created.
    #[must_use]
    pub fn with_create_topics(mut self, create: bool) -> Self {
        self.create_topics = create;
        self
    }

    /// Sets how long a message is tried to be published.
    #[must_use]
    pub fn with_publish_timeout(mut self, timeout: Duration) -> Self {
        self.publish_timeout = timeout;
        self
    }

    /// Sets how long a silent member keeps its partitions.
    #[must_use]
    pub fn with_session_timeout(mut self, timeout: Duration) -> Self {
        self.session_timeout = timeout;
        self
    }

    /// Sets an option of librdkafka.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for one that would break a promise of this broker. Whether it exists at all is
    /// said when connecting.
    pub fn with_option(mut self, name: &str, value: impl Into<String>) -> Result<Self> {
        let name = canonical(name);
        check_free(name)?;
        self.options.insert(name.to_owned(), value.into());
        Ok(self)
    }

    /// Reads `kafka://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…][?OPTION=VALUE&…]`, with the options
    /// `create_topics`, `publish_timeout`, `session_timeout`, `tls`, and any of librdkafka, such as
    /// `compression.type=zstd`. Times are numbers with a unit: `500ms`, `5s`, `1m`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the scheme, an option or a value is wrong; it says what is allowed.
    pub fn from_url(url: &str) -> Result<Self> {
        let refuse = |message: &str| {
            Error::new(ErrorKind::InvalidInput, "read broker url", message)
                .with("url", redacted_url(url))
        };
        let Some(address) = url.strip_prefix("kafka://") else {
            return Err(refuse("the Kafka broker's url is `kafka://HOST:PORT`"));
        };
        let (address, options) = address.split_once('?').unwrap_or((address, ""));
        if options.contains('@') {
            // A part of a password, mostly, which would be taken for an option.
            return Err(refuse(
                "write `%3f` for a `?` and `%40` for a `@` in a password or a value",
            ));
        }
        let (user, hosts) = match address.rsplit_once('@') {
            Some((user, hosts)) => (Some(user), hosts),
            None => (None, address),
        };
        let servers = hosts.trim_end_matches('/').split(',');
        let servers: Option<Vec<_>> = servers.map(|server| host_and_port(server, 9092)).collect();
        let servers = servers.ok_or_else(|| {
            refuse(
                "the url names no broker, or one with a port beyond 65535 or a path behind it: write `kafka://HOST:PORT`, with commas between several",
            )
        })?;
        let mut config = Self::new(servers.join(","));
        if let Some(user) = user {
            let credentials = credentials(user);
            config.credentials = Some(credentials.ok_or_else(|| {
                refuse("credentials are `USER:PASSWORD@` before the host; write `%40` for a `@` in them")
            })?);
        }
        for option in options.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let value = percent_decode_str(value).decode_utf8_lossy();
            config = config
                .set(name, &value)
                .map_err(|reason| refuse(&reason).with("option", redacted_option(url, name)))?;
        }
        Ok(config)
    }

    fn set(mut self, name: &str, value: &str) -> Result<Self, String> {
        let time = || {
            duration(value)
                .filter(|time| !time.is_zero())
                .ok_or("a time is a number with a unit, such as 500ms, 5s or 1m")
        };
        let truth = || value.parse::<bool>().map_err(|_| "it is `true` or `false`");
        match name {
            "create_topics" => self.create_topics = truth()?,
            "publish_timeout" => self.publish_timeout = time()?,
            "session_timeout" => self.session_timeout = time()?,
            "tls" => self.tls = Some(truth()?),
            name if name.contains('.')
                || name == "debug"
                || REFUSED.iter().any(|it| it.0 == name) =>
            {
                return self.with_option(name, value).map_err(|error| {
                    // The URL is told by the caller's error.
                    error.to_string()
                });
            }
            _ => return Err(OWN_OPTIONS.to_owned()),
        }
        Ok(self)
    }

    /// Most bytes of one message: what a broker takes by default, or `message.max.bytes`, less room
    /// for what the protocol adds.
    pub(crate) fn message_bytes_max(&self) -> usize {
        let option = self.options.get("message.max.bytes");
        let bytes = option.and_then(|bytes| bytes.parse().ok());
        bytes
            .unwrap_or(BROKER_MESSAGE_BYTES)
            .saturating_sub(OVERHEAD)
            .max(1)
    }

    /// Whether connections are encrypted.
    fn is_encrypted(&self) -> bool {
        let is_far = |server: &str| {
            let host = server.rsplit_once(':').map_or(server, |(host, _)| host);
            !matches!(host, "127.0.0.1" | "localhost" | "[::1]")
        };
        self.tls
            .unwrap_or(self.credentials.is_some() && self.servers.split(',').any(is_far))
    }

    /// What every client is made from.
    ///
    /// # Errors
    ///
    /// `Unsupported` when it is to be encrypted and this build cannot.
    fn client(&self) -> Result<ClientConfig> {
        let encrypted = self.is_encrypted();
        if encrypted && !cfg!(feature = "tls") {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "connect",
                "this build cannot encrypt: add the feature `kafka-tls` to the dependency on eventbus, or, where nobody listens on the way, `tls=false` to the url",
            )
            .with("servers", &self.servers));
        }
        for name in self.options.keys() {
            check_free(canonical(name))?;
        }
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.servers)
            .set("client.id", "eventbus")
            .set("allow.auto.create.topics", "false")
            // A connection that hangs is given up, and a broker that is back is found soon.
            .set("socket.timeout.ms", "10000")
            .set("socket.connection.setup.timeout.ms", "5000")
            .set("socket.keepalive.enable", "true")
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "1000")
            .set("retry.backoff.max.ms", "500");
        let protocol = match (encrypted, self.credentials.is_some()) {
            (false, false) => "plaintext",
            (false, true) => "sasl_plaintext",
            (true, false) => "ssl",
            (true, true) => "sasl_ssl",
        };
        config.set("security.protocol", protocol);
        if let Some((user, password)) = &self.credentials {
            config
                .set("sasl.mechanism", "PLAIN")
                .set("sasl.username", user)
                .set("sasl.password", password);
        }
        Ok(config)
    }

    /// What the producer is made from.
    pub(crate) fn producer(&self) -> Result<ClientConfig> {
        let mut config = self.client()?;
        config
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("partitioner", "murmur2_random")
            .set("linger.ms", "2")
            .set(
                "message.timeout.ms",
                self.publish_timeout.as_millis().to_string(),
            )
            .set("message.max.bytes", BROKER_MESSAGE_BYTES.to_string())
            .set(
                "queue.buffering.max.messages",
                (2 * MESSAGES_IN_FLIGHT).to_string(),
            )
            .set(
                "queue.buffering.max.kbytes",
                (2 * KILOBYTES_IN_FLIGHT).to_string(),
            );
        self.add_options(&mut config);
        Ok(config)
    }

    /// What a consumer of `group` is made from; of a reader the group is a name that nobody else has.
    pub(crate) fn consumer(&self, group: &str) -> Result<ClientConfig> {
        let session = self.session_timeout.as_millis();
        let mut config = self.client()?;
        config
            .set("group.id", group)
            // A commit whose coordinator is gone is tried three times, each for so long, and until then
            // the member can neither join again nor leave (librdkafka 2.12, `rd_kafka_assignment_serve`).
            .set("socket.timeout.ms", "5000")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error")
            // What is read ahead is bounded by bytes; when it is used up it is looked at again soon.
            .set("fetch.queue.backoff.ms", "10")
            .set("fetch.error.backoff.ms", "50")
            .set("queued.max.messages.kbytes", "32768")
            .set("check.crcs", "true");
        // With the protocol of KIP-848 the brokers decide about these.
        if self.options.get("group.protocol").map(String::as_str) != Some("consumer") {
            let heartbeat = (session / 4).clamp(1, 500);
            config
                .set("partition.assignment.strategy", "cooperative-sticky")
                .set("session.timeout.ms", session.to_string())
                // By heartbeats members hear that partitions are to move: the others wait for that.
                .set("heartbeat.interval.ms", heartbeat.to_string());
        }
        self.add_options(&mut config);
        Ok(config)
    }

    fn add_options(&self, config: &mut ClientConfig) {
        for (name, value) in &self.options {
            config.set(name, value);
        }
    }
}

/// The name that is used here for an option of this one.
fn canonical(name: &str) -> &str {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name);
    alias.map_or(name, |(_, name)| name)
}

/// Refuses an option that would break a promise of this broker.
fn check_free(name: &str) -> Result<()> {
    let refused = REFUSED.iter().find(|(refused, _)| *refused == name);
    let Some((_, reason)) = refused else {
        return Ok(());
    };
    let message = format!("this option of librdkafka is not free: {reason}");
    Err(Error::new(ErrorKind::InvalidInput, "set option", message).with("option", name))
}

/// Kafka's default for `message.max.bytes`, on brokers.
const BROKER_MESSAGE_BYTES: usize = 1_048_588;
/// Room for what a batch and a record need beside key, headers and payload.
const OVERHEAD: usize = 16 * 1024;

/// Most messages that are published and not answered.
pub(crate) const MESSAGES_IN_FLIGHT: usize = 50_000;
/// Most of their bytes, in units of 1,024.
pub(crate) const KILOBYTES_IN_FLIGHT: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_brokers_credentials_and_options() {
        let config = KafkaConfig::from_url(
            "kafka://me:p%40ss@one:9093,two/?tls=false&publish_timeout=5s&session_timeout=6s&create_topics=false&linger.ms=0",
        )
        .expect("a good url");
        assert_eq!(config.servers, "one:9093,two:9092");
        let credentials = config.credentials.as_ref().expect("there are some");
        assert_eq!(*credentials, ("me".to_owned(), "p@ss".to_owned()));
        assert_eq!((config.tls, config.create_topics), (Some(false), false));
        assert_eq!(config.publish_timeout, Duration::from_secs(5));
        assert_eq!(config.options["linger.ms"], "0");
        let producer = config.producer().expect("nothing is missing");
        assert_eq!(producer.get("linger.ms"), Some("0"));
        assert_eq!(producer.get("security.protocol"), Some("sasl_plaintext"));
        assert!(!format!("{config:?}").contains("p@ss"));
    }

    #[test]
    fn what_a_url_gets_wrong_is_answered_with_what_is_allowed() {
        let cases = [
            ("kafka:", "kafka://HOST:PORT"),
            ("kafka://", "names no broker"),
            ("kafka://a,,b", "names no broker"),
            ("kafka://a:port", "names no broker"),
            ("kafka://me@a", "USER:PASSWORD@"),
            ("kafka://a?partitions=3", "create_topics"),
            ("kafka://a?tls=maybe", "`true` or `false`"),
            ("kafka://a?publish_timeout=5", "with a unit"),
            ("kafka://a?acks=1", "every replica"),
            ("kafka://a?enable.auto.commit=true", "when it is settled"),
            ("kafka://a?group.id=x", "each consumer names its group"),
            ("kafka://a?request.required.acks=1", "every replica"),
            ("kafka://a?transactional.id=x", "one by one"),
            ("kafka://a?sasl.kerberos.principal=me@x", "`%40` for a `@`"),
        ];
        for (url, allowed) in cases {
            let error = KafkaConfig::from_url(url).expect_err(url);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{url}");
            assert!(error.to_string().contains(allowed), "{error}");
        }
    }

    #[test]
    fn an_option_has_one_name() {
        let url = "kafka://a?sasl.mechanisms=SCRAM-SHA-256&queue.buffering.max.ms=7";
        let config = KafkaConfig::from_url(url).expect("a good url");
        assert_eq!(config.options["sasl.mechanism"], "SCRAM-SHA-256");
        assert_eq!(config.options["linger.ms"], "7");
    }

    #[test]
    fn an_option_that_is_not_free_is_refused_however_it_is_set() {
        let mut config = KafkaConfig::new("a");
        config.options.insert("acks".to_owned(), "1".to_owned());
        let error = config.producer().expect_err("it would lose messages");
        assert!(error.to_string().contains("every replica"), "{error}");
        let mut config = KafkaConfig::new("a");
        let alias = "request.required.acks".to_owned();
        config.options.insert(alias, "1".to_owned());
        let error = config.producer().expect_err("it would lose messages");
        assert!(error.to_string().contains("every replica"), "{error}");
    }

    #[test]
    fn what_may_be_a_password_is_in_no_error() {
        for url in [
            "kafka://me:secret@",
            "kafka://secret@host",
            "kafka://me:secret@host?acks=1",
            "kafka://host?ssl.key.password=secret&acks=1",
            "kafka://host?password=secret",
            "kafka://me:9092?secret.word@host",
        ] {
            let error = KafkaConfig::from_url(url).expect_err(url);
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn credentials_are_not_sent_unencrypted_to_another_machine() {
        let near = KafkaConfig::from_url("kafka://me:secret@127.0.0.1:9092").expect("a good url");
        assert!(!near.is_encrypted());
        let far = KafkaConfig::from_url("kafka://me:secret@kafka.example").expect("a good url");
        assert!(far.is_encrypted());
        if cfg!(not(feature = "tls")) {
            let error = far.producer().expect_err("this build cannot encrypt");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains("kafka-tls"), "{error}");
        }
    }
}
