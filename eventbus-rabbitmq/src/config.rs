//! How a client of RabbitMQ is set up, and what its URL says.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use eventbus_core::{
    Error, ErrorKind, Limits, Result, Topic, credentials, duration, host_and_port, redacted_option,
    redacted_url,
};
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};
use percent_encoding::percent_decode_str;

use crate::adopted::RabbitMqQueue;

/// The set-up of a [`RabbitMqBroker`](crate::RabbitMqBroker).
///
/// # Examples
///
/// ```
/// use eventbus_rabbitmq::RabbitMqConfig;
///
/// let config = RabbitMqConfig::from_url("amqp://ann:secret@one.example,two.example/shop?partitions=8")?;
/// assert_eq!(config.servers, "one.example:5672,two.example:5672");
/// assert_eq!((config.vhost.as_str(), config.partitions), ("shop", 8));
/// # Ok::<(), eventbus_core::Error>(())
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct RabbitMqConfig {
    /// The nodes of one cluster, `HOST:PORT` with commas between them; the first that answers is used.
    pub servers: String,
    /// The virtual host.
    pub vhost: String,
    /// User and password.
    pub credentials: (String, String),
    /// Whether connections are encrypted; needs the feature `tls`.
    pub tls: bool,
    /// A file of authorities that servers' certificates are trusted by besides the system's, as PEM.
    pub tls_ca: Option<PathBuf>,
    /// A file of the certificate that this client shows, as PEM, and of its key; both or neither.
    pub tls_cert: Option<PathBuf>,
    /// See `tls_cert`.
    pub tls_key: Option<PathBuf>,
    /// Whether a topic that is published or subscribed to is created where it is missing; otherwise
    /// that is `NotFound`, but for dead letters.
    pub create_topics: bool,
    /// Partitions of a topic that is created without a declaration.
    pub partitions: u32,
    /// How long a message is tried to be published before it is given back.
    pub publish_timeout: Duration,
    /// How long a connection may say nothing before both sides take it for dead; whole seconds, which
    /// the server may shorten. After so long, twice at most, others get the partitions of a process
    /// that stands still.
    pub heartbeat: Duration,
    /// Most messages that the server sends ahead for one partition. They lie in this process's memory.
    pub prefetch: u16,
    /// Most bytes of one message; the server's `max_message_size` has to allow for it.
    pub message_bytes_max: usize,
    /// Topics that are queues of somebody else, each read by one group as it is.
    pub queues: BTreeMap<Topic, RabbitMqQueue>,
}

impl fmt::Debug for RabbitMqConfig {
    /// Hides the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitMqConfig")
            .field("servers", &self.servers)
            .field("vhost", &self.vhost)
            .field("user", &self.credentials.0)
            .field("tls", &self.tls)
            .field("tls_ca", &self.tls_ca)
            .field("tls_cert", &self.tls_cert)
            .field("tls_key", &self.tls_key)
            .field("create_topics", &self.create_topics)
            .field("partitions", &self.partitions)
            .field("publish_timeout", &self.publish_timeout)
            .field("heartbeat", &self.heartbeat)
            .field("prefetch", &self.prefetch)
            .field("message_bytes_max", &self.message_bytes_max)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

const OPTIONS: &str = "the options are create_topics, heartbeat, message_bytes_max, partitions, prefetch, publish_timeout, queues, tls_ca, tls_cert, tls_key and volatile_queues";

/// Most partitions of a topic: each is a queue for every group.
pub(crate) const PARTITIONS_MAX: u32 = 1024;

impl RabbitMqConfig {
    /// The defaults: the virtual host `/` as `guest`, missing topics are created with 4 partitions, 30
    /// seconds for a publish, heartbeats of 6 seconds, 256 messages sent ahead, 16 MiB a message.
    #[must_use]
    pub fn new(servers: impl Into<String>) -> Self {
        Self {
            servers: servers.into(),
            vhost: "/".to_owned(),
            credentials: ("guest".to_owned(), "guest".to_owned()),
            tls: false,
            tls_ca: None,
            tls_cert: None,
            tls_key: None,
            create_topics: true,
            partitions: 4,
            publish_timeout: Duration::from_secs(30),
            heartbeat: Duration::from_secs(6),
            prefetch: 256,
            message_bytes_max: 16 * 1024 * 1024,
            queues: BTreeMap::new(),
        }
    }

    /// Sets the virtual host.
    #[must_use]
    pub fn with_vhost(mut self, vhost: impl Into<String>) -> Self {
        self.vhost = vhost.into();
        self
    }

    /// Sets user and password.
    #[must_use]
    pub fn with_credentials(
        mut self,
        user: impl Into<String>,
        password: impl Into<String>,
    ) -> Self {
        self.credentials = (user.into(), password.into());
        self
    }

    /// Sets whether connections are encrypted; needs the feature `tls`.
    #[must_use]
    pub fn with_tls(mut self, tls: bool) -> Self {
        self.tls = tls;
        self
    }

    /// Sets whether missing topics are created.
    #[must_use]
    pub fn with_create_topics(mut self, create: bool) -> Self {
        self.create_topics = create;
        self
    }

    /// Sets the partitions of a topic that is created without a declaration, 1 to 1,024.
    #[must_use]
    pub fn with_partitions(mut self, partitions: u32) -> Self {
        self.partitions = partitions.clamp(1, PARTITIONS_MAX);
        self
    }

    /// Sets how long a message is tried to be published.
    #[must_use]
    pub fn with_publish_timeout(mut self, timeout: Duration) -> Self {
        self.publish_timeout = timeout;
        self
    }

    /// Sets how long a connection may say nothing, at least a second.
    #[must_use]
    pub fn with_heartbeat(mut self, heartbeat: Duration) -> Self {
        self.heartbeat = heartbeat.max(Duration::from_secs(1));
        self
    }

    /// Sets how many messages the server sends ahead for one partition, at least one.
    #[must_use]
    pub fn with_prefetch(mut self, messages: u16) -> Self {
        self.prefetch = messages.max(1);
        self
    }

    /// Sets the most bytes of one message.
    #[must_use]
    pub fn with_message_bytes_max(mut self, bytes: usize) -> Self {
        self.message_bytes_max = bytes.max(1);
        self
    }

    /// Makes a topic of a queue that somebody else has declared: a group that reads the topic reads the
    /// queue as it is, beside other consumers of it, and what is published to the topic goes to the
    /// queue. Only one group may; that all groups get its messages, an
    /// [ingress](crate::RabbitMqBroker::ingress) sees to.
    #[must_use]
    pub fn with_queue(mut self, topic: Topic, queue: impl Into<RabbitMqQueue>) -> Self {
        self.queues.insert(topic, queue.into());
        self
    }

    /// Reads `amqp://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…][/VHOST][?OPTION=VALUE&…]`, or `amqps://…`
    /// for TLS, with the options `create_topics`, `heartbeat`, `message_bytes_max`, `partitions`,
    /// `prefetch`, `publish_timeout`, `queues` and `volatile_queues`. The last two name queues of somebody
    /// else that are read as they are, `NAME` or `NAME:KEY_FIELD` with commas between them, each as the
    /// topic of its name (see [`with_queue`](Self::with_queue)). Times are numbers with a unit: `500ms`, `5s`, `1m`. Without a
    /// path the virtual host is `/`, which in a path is `%2f`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the scheme, an option or a value is wrong; it says what is allowed.
    pub fn from_url(url: &str) -> Result<Self> {
        let refuse = |message: &str| {
            Error::new(ErrorKind::InvalidInput, "read broker url", message)
                .with("url", redacted_url(url))
        };
        let tls = url.starts_with("amqps://");
        let address = url
            .strip_prefix("amqp://")
            .or_else(|| url.strip_prefix("amqps://"));
        let Some(address) = address else {
            return Err(refuse("RabbitMQ's url is `amqp://HOST:PORT/VHOST`"));
        };
        let (address, options) = address.split_once('?').unwrap_or((address, ""));
        if options.contains('@') {
            // A part of a password, mostly, which would be taken for an option.
            return Err(refuse(
                "write `%3f` for a `?` and `%40` for a `@` in a password or a value",
            ));
        }
        let (user, place) = match address.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, address),
        };
        let (hosts, path) = place.split_once('/').unwrap_or((place, ""));
        let port = if tls { 5671 } else { 5672 };
        let servers: Option<Vec<_>> = hosts.split(',').map(|it| host_and_port(it, port)).collect();
        let servers = servers.ok_or_else(|| {
            refuse("the url names no server, or one with a port beyond 65535: write `amqp://HOST:PORT/VHOST`, with commas between the nodes of a cluster")
        })?;
        if path.contains('/') {
            return Err(refuse(
                "the path is one virtual host: write `%2f` for a `/` in its name",
            ));
        }
        let mut config = Self::new(servers.join(",")).with_tls(tls);
        if !path.is_empty() {
            let vhost = percent_decode_str(path).decode_utf8();
            config.vhost = vhost
                .map_err(|_| refuse("the virtual host is no text"))?
                .into_owned();
        }
        if let Some(user) = user {
            config.credentials = credentials(user).ok_or_else(|| {
                refuse("credentials are `USER:PASSWORD@` before the host; write `%40` for a `@` in them")
            })?;
        }
        for option in options.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            config = config
                .set(name, value)
                .map_err(|reason| refuse(reason).with("option", redacted_option(url, name)))?;
        }
        Ok(config)
    }

    fn set(mut self, name: &str, value: &str) -> Result<Self, &'static str> {
        let time = || {
            let time = duration(value).filter(|time| !time.is_zero());
            time.ok_or("a time is a number with a unit, such as 500ms, 5s or 1m")
        };
        let number = |most: u64| {
            let number = value.parse::<u64>().ok();
            let number = number.filter(|number| (1..=most).contains(number));
            number.ok_or("the number is too small, too large, or none")
        };
        match name {
            "create_topics" => {
                self.create_topics = value.parse().map_err(|_| "it is `true` or `false`")?;
            }
            "heartbeat" => self.heartbeat = time()?.max(Duration::from_secs(1)),
            "message_bytes_max" => self.message_bytes_max = number(512 * 1024 * 1024)? as usize,
            "partitions" => self.partitions = number(PARTITIONS_MAX.into())? as u32,
            "prefetch" => self.prefetch = number(u16::MAX.into())? as u16,
            "publish_timeout" => self.publish_timeout = time()?,
            "queues" | "volatile_queues" => {
                for entry in value.split(',') {
                    let (topic, mut queue) = queue(entry)?;
                    queue.volatile = name == "volatile_queues";
                    self.queues.insert(topic, queue);
                }
            }
            "tls_ca" => self.tls_ca = Some(value.into()),
            "tls_cert" => self.tls_cert = Some(value.into()),
            "tls_key" => self.tls_key = Some(value.into()),
            _ => return Err(OPTIONS),
        }
        Ok(self)
    }

    /// How often it is looked whether what is on the server is still as it was made.
    pub(crate) fn check(&self) -> Duration {
        self.heartbeat * 5
    }

    /// How many messages the server may send ahead for one partition of a member with these limits.
    pub(crate) fn prefetch_within(&self, limits: &Limits) -> u16 {
        let most = limits.lane_messages.min(limits.messages);
        let most = u16::try_from(most).unwrap_or(u16::MAX);
        most.min(self.prefetch).max(1)
    }

    /// Where to connect to, node by node.
    ///
    /// # Errors
    ///
    /// `Unsupported` when it is to be encrypted and this build cannot, `InvalidInput` when no server is
    /// named.
    pub(crate) fn uris(&self) -> Result<Vec<AMQPUri>> {
        if self.tls && !cfg!(feature = "tls") {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "connect",
                "this build cannot encrypt: add the feature `rabbitmq-tls` to the dependency on eventbus, or, where nobody listens on the way, write `amqp://` for `amqps://`",
            )
            .with("servers", &self.servers));
        }
        let port = if self.tls { 5671 } else { 5672 };
        let uris: Option<Vec<_>> = self
            .servers
            .split(',')
            .map(|text| Some(self.uri(&host_and_port(text, port)?)))
            .collect();
        uris.ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                "connect",
                "the servers are `HOST:PORT`, with commas between several",
            )
            .with("servers", &self.servers)
        })
    }

    fn uri(&self, server: &str) -> AMQPUri {
        let (host, port) = server.rsplit_once(':').unwrap_or((server, ""));
        let (username, password) = self.credentials.clone();
        AMQPUri {
            scheme: match self.tls {
                true => AMQPScheme::AMQPS,
                false => AMQPScheme::AMQP,
            },
            authority: AMQPAuthority {
                userinfo: AMQPUserInfo { username, password },
                host: host.trim_matches(['[', ']']).to_owned(),
                port: port.parse().unwrap_or_default(),
            },
            vhost: self.vhost.clone(),
            query: AMQPQueryString {
                heartbeat: Some(self.heartbeat.as_secs().clamp(1, 600) as u16),
                ..AMQPQueryString::default()
            },
        }
    }
}

/// `NAME` or `NAME:KEY_FIELD`, with what a URL writes otherwise.
fn queue(entry: &str) -> Result<(Topic, RabbitMqQueue), &'static str> {
    const RULE: &str = "a queue is `NAME` or `NAME:KEY_FIELD`, and its name that of a topic: A-Z a-z 0-9 . _ - only; give another one by `RabbitMqConfig::with_queue`";
    let entry = percent_decode_str(entry).decode_utf8().map_err(|_| RULE)?;
    let (name, key) = entry.split_once(':').unwrap_or((&entry, ""));
    let topic = Topic::new(name).map_err(|_| RULE)?;
    let queue = RabbitMqQueue::new(name);
    Ok((
        topic,
        match key {
            "" => queue,
            key => queue.with_key(key),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_servers_credentials_and_options() {
        let config = RabbitMqConfig::from_url(
            "amqp://me:p%40ss@one:5673,two/%2fshop?heartbeat=9s&publish_timeout=5s&partitions=3&prefetch=7&create_topics=false&message_bytes_max=1000",
        )
        .expect("a good url");
        assert_eq!(config.servers, "one:5673,two:5672");
        assert_eq!(config.credentials, ("me".to_owned(), "p@ss".to_owned()));
        assert_eq!(config.vhost, "/shop");
        assert_eq!(config.heartbeat, Duration::from_secs(9));
        assert_eq!(config.publish_timeout, Duration::from_secs(5));
        assert_eq!((config.partitions, config.prefetch), (3, 7));
        assert!(!config.create_topics);
        assert_eq!(config.message_bytes_max, 1000);
        let uris = config.uris().expect("nothing is missing");
        assert_eq!(
            (uris[0].authority.host.as_str(), uris[0].authority.port),
            ("one", 5673)
        );
        assert_eq!(uris[0].vhost, "/shop");
        assert!(!format!("{config:?}").contains("p@ss"));
    }

    #[test]
    fn without_a_path_the_virtual_host_is_the_first_one() {
        for url in ["amqp://a", "amqp://a/", "amqp://a/%2f"] {
            let config = RabbitMqConfig::from_url(url).expect("a good url");
            assert_eq!(config.vhost, "/", "{url}");
        }
    }

    #[test]
    fn a_url_names_queues_of_somebody_else() {
        let url = "amqp://a?queues=order_events:order_id,mail&volatile_queues=logs";
        let config = RabbitMqConfig::from_url(url).expect("a good url");
        let queue = |name| &config.queues[&Topic::from_static(name)];
        let orders = RabbitMqQueue::new("order_events").with_key("order_id");
        assert_eq!(*queue("order_events"), orders);
        assert_eq!(*queue("mail"), RabbitMqQueue::new("mail"));
        assert_eq!(*queue("logs"), RabbitMqQueue::new("logs").volatile());
    }

    #[test]
    fn what_a_url_gets_wrong_is_answered_with_what_is_allowed() {
        let cases = [
            ("amqp:", "amqp://HOST:PORT"),
            ("amqp://", "names no server"),
            ("amqp://a,,b", "names no server"),
            ("amqp://a:port", "names no server"),
            ("amqp://a/b/c", "%2f"),
            ("amqp://me@a", "USER:PASSWORD@"),
            ("amqp://a?tls=true", "create_topics"),
            ("amqp://a?create_topics=maybe", "`true` or `false`"),
            ("amqp://a?publish_timeout=5", "with a unit"),
            ("amqp://a?partitions=0", "too small"),
            ("amqp://a?prefetch=70000", "too large"),
            ("amqp://a?queues=order events", "with_queue"),
            ("amqp://a?queues=", "with_queue"),
            ("amqp://a?heartbeat=me@x", "`%40` for a `@`"),
        ];
        for (url, allowed) in cases {
            let error = RabbitMqConfig::from_url(url).expect_err(url);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{url}");
            assert!(error.to_string().contains(allowed), "{error}");
        }
    }

    #[test]
    fn what_may_be_a_password_is_in_no_error() {
        for url in [
            "amqp://me:secret@",
            "amqp://secret@host",
            "amqp://me:secret@host?acks=1",
            "amqp://host?password=secret",
            "amqp://me:5672?secret.word@host",
        ] {
            let error = RabbitMqConfig::from_url(url).expect_err(url);
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn tls_needs_its_feature() {
        let config = RabbitMqConfig::from_url("amqps://rabbit.example").expect("a good url");
        assert_eq!(config.servers, "rabbit.example:5671");
        if cfg!(not(feature = "tls")) {
            let error = config.uris().expect_err("this build cannot encrypt");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains("rabbitmq-tls"), "{error}");
        }
    }
}
