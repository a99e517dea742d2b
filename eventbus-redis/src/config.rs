//! How a Redis broker is set up, and what its URL says.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use eventbus_core::{
    Error, ErrorKind, Result, credentials, duration, redacted_option, redacted_url,
};

/// Most partitions a topic may have on this broker.
pub(crate) const PARTITIONS_MAX: u32 = 4096;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The set-up of a [`RedisBroker`](crate::RedisBroker).
///
/// # Examples
///
/// ```
/// use eventbus_redis::RedisConfig;
///
/// let config = RedisConfig::from_url("redis://shop:s%40crt@cache.example:6380/2?partitions=8&retention=1d")?;
/// assert_eq!((config.host.as_str(), config.port, config.database), ("cache.example", 6380, 2));
/// assert_eq!(config.partitions, 8);
/// # Ok::<(), eventbus_core::Error>(())
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct RedisConfig {
    /// The server's name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Which of its databases.
    pub database: i64,
    /// Who asks; none is Redis's `default`.
    pub user: Option<String>,
    /// The password, if the server wants one.
    pub password: Option<String>,
    /// Whether connections are encrypted, as `rediss://` says; needs the feature `tls`.
    pub tls: bool,
    /// A file of the authorities that servers' certificates are trusted by, as PEM, in place of the public
    /// ones.
    pub tls_ca: Option<PathBuf>,
    /// A file of the certificate that this client shows, as PEM, and of its key; both or neither.
    pub tls_cert: Option<PathBuf>,
    /// See `tls_cert`.
    pub tls_key: Option<PathBuf>,
    /// Whether a topic that is published or subscribed to is created where it is missing; otherwise
    /// that is `NotFound`, but for dead letters.
    pub create_topics: bool,
    /// The partitions of topics that nobody declared.
    pub partitions: u32,
    /// How long a command may take, one for leases and positions half of `lease` at most. A large
    /// publish is several commands.
    pub timeout: Duration,
    /// How long a member that says nothing keeps its partitions.
    pub lease: Duration,
    /// How long what every group has read is kept, where a topic's declaration says nothing else. Of
    /// several clients that read a topic, the shortest counts.
    pub retention: Duration,
    /// How long a group is remembered that has no member: until then what it has not read is kept. Of
    /// several clients with members of a group, the longest counts.
    pub group_expiry: Duration,
    /// How many replicas have to have a message before it counts as published; 0 waits for none.
    pub replicas: u32,
}

impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConfig")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("database", &self.database)
            .field("user", &self.user)
            .field("tls", &self.tls)
            .field("tls_ca", &self.tls_ca)
            .field("tls_cert", &self.tls_cert)
            .field("tls_key", &self.tls_key)
            .field("create_topics", &self.create_topics)
            .field("partitions", &self.partitions)
            .field("timeout", &self.timeout)
            .field("lease", &self.lease)
            .field("retention", &self.retention)
            .field("group_expiry", &self.group_expiry)
            .field("replicas", &self.replicas)
            .finish_non_exhaustive()
    }
}

impl RedisConfig {
    /// The defaults on this server: port 6379, database 0, 4 partitions, 5 seconds for a command,
    /// leases of 10 seconds; what was read is kept for 7 days, and so is what a group without members
    /// has not read.
    #[must_use]
    pub fn new(host: impl Into<String>) -> Self {
        Self {
            host: host.into(),
            port: 6379,
            database: 0,
            user: None,
            password: None,
            tls: false,
            tls_ca: None,
            tls_cert: None,
            tls_key: None,
            create_topics: true,
            partitions: 4,
            timeout: Duration::from_secs(5),
            lease: Duration::from_secs(10),
            retention: 7 * DAY,
            group_expiry: 7 * DAY,
            replicas: 0,
        }
    }

    /// Sets the server's port.
    #[must_use]
    pub fn with_port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Sets whether missing topics are created.
    #[must_use]
    pub fn with_create_topics(mut self, create: bool) -> Self {
        self.create_topics = create;
        self
    }

    /// Sets the partitions of topics that nobody declared, 1 to 4096.
    #[must_use]
    pub fn with_partitions(mut self, partitions: u32) -> Self {
        self.partitions = partitions.clamp(1, PARTITIONS_MAX);
        self
    }

    /// Sets how long a command may take, at least a tenth of a second.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.max(TIME_MIN);
        self
    }

    /// Sets how long a silent member keeps its partitions, at least a tenth of a second.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease.max(TIME_MIN);
        self
    }

    /// Sets how long what every group has read is kept.
    #[must_use]
    pub fn with_retention(mut self, retention: Duration) -> Self {
        self.retention = retention;
        self
    }

    /// Sets how long a group without members is remembered.
    #[must_use]
    pub fn with_group_expiry(mut self, expiry: Duration) -> Self {
        self.group_expiry = expiry;
        self
    }

    /// Sets how many replicas have to have a message before it counts as published.
    #[must_use]
    pub fn with_replicas(mut self, replicas: u32) -> Self {
        self.replicas = replicas;
        self
    }

    /// Reads `redis://USER:PASSWORD@HOST:PORT/DATABASE`, or `rediss://` for TLS, with
    /// `create_topics`, `partitions`, `timeout`, `lease`, `retention`, `group_expiry`, `replicas`,
    /// `tls_ca`, `tls_cert` and `tls_key` as options behind `?`. Times are numbers with a unit: `500ms`,
    /// `5s`, `10m`, `1h`, `7d`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the scheme, an option or a value is unknown; it says what is allowed, and
    /// shows no password.
    pub fn from_url(url: &str) -> Result<Self> {
        let refuse = |message: &'static str| {
            Error::new(ErrorKind::InvalidInput, READ_URL, message).with("url", redacted_url(url))
        };
        let (address, options) = url.split_once('?').unwrap_or((url, ""));
        let (scheme, address) = address.split_once("://").ok_or_else(|| refuse(ADDRESS))?;
        let tls = match scheme {
            "redis" => false,
            "rediss" => true,
            _ => return Err(refuse(ADDRESS)),
        };
        let (who, place) = match address.rsplit_once('@') {
            Some((who, place)) => (Some(who), place),
            None => (None, address),
        };
        let (place, database) = place.split_once('/').unwrap_or((place, ""));
        let (host, port) = host_and_port(place).ok_or_else(|| refuse(ADDRESS))?;
        let mut config = Self::new(host).with_port(port);
        config.tls = tls;
        if !database.is_empty() {
            config.database = database.parse().map_err(|_| refuse(ADDRESS))?;
        }
        if let Some(who) = who {
            let (user, password) = credentials(who).ok_or_else(|| refuse(ADDRESS))?;
            config.user = Some(user).filter(|user| !user.is_empty());
            config.password = Some(password);
        }
        for option in options.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            config
                .set(name, value)
                .map_err(|message| refuse(message).with("option", redacted_option(url, name)))?;
        }
        Ok(config)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), &'static str> {
        let time = || duration(value).ok_or(TIME);
        let bounded = || {
            let time = time()?;
            (time >= TIME_MIN)
                .then_some(time)
                .ok_or("`timeout` and `lease` are at least 100ms")
        };
        match name {
            "create_topics" => {
                self.create_topics = value
                    .parse()
                    .map_err(|_| "`create_topics` is `true` or `false`")?;
            }
            "partitions" => {
                let count = value.parse().ok();
                self.partitions = count
                    .filter(|count| (1..=PARTITIONS_MAX).contains(count))
                    .ok_or("`partitions` is a number from 1 to 4096")?;
            }
            "timeout" => self.timeout = bounded()?,
            "lease" => self.lease = bounded()?,
            "retention" => self.retention = time()?,
            "group_expiry" => self.group_expiry = time()?,
            "replicas" => {
                self.replicas = value.parse().map_err(|_| "`replicas` is a number")?;
            }
            "tls_ca" => self.tls_ca = Some(value.into()),
            "tls_cert" => self.tls_cert = Some(value.into()),
            "tls_key" => self.tls_key = Some(value.into()),
            _ => return Err(OPTIONS),
        }
        Ok(())
    }

    /// Names the server in an error, without user and password.
    pub(crate) fn named(&self, error: Error) -> Error {
        error.with("server", format_args!("{}:{}", self.host, self.port))
    }
}

fn host_and_port(place: &str) -> Option<(&str, u16)> {
    let (host, port) = match place.strip_prefix('[') {
        // An IPv6 address.
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (host, port.strip_prefix(':'))
        }
        None => match place.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        },
    };
    let port = port.map_or(Some(6379), |port| port.parse().ok())?;
    (!host.is_empty()).then_some((host, port))
}

const TIME_MIN: Duration = Duration::from_millis(100);
const READ_URL: &str = "read broker url";
const ADDRESS: &str = "a Redis broker is redis://USER:PASSWORD@HOST:PORT/DATABASE, or rediss:// for TLS, with the characters that mean something in a url as %-codes";
const TIME: &str = "a time is a number with a unit, such as 500ms, 5s, 10m, 1h or 7d";
const OPTIONS: &str = "the options are create_topics, partitions, timeout, lease, retention, group_expiry, replicas, tls_ca, tls_cert and tls_key";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_server_and_options() {
        let config = RedisConfig::from_url(
            "rediss://me:s%40crt@one:6380/3?partitions=8&timeout=2s&lease=3s&retention=1h&group_expiry=2d&replicas=1",
        )
        .expect("a good url");
        assert_eq!(
            (config.host.as_str(), config.port, config.database),
            ("one", 6380, 3)
        );
        assert_eq!(config.user.as_deref(), Some("me"));
        assert_eq!(config.password.as_deref(), Some("s@crt"));
        assert!(config.tls);
        assert_eq!((config.partitions, config.replicas), (8, 1));
        assert_eq!(config.retention, Duration::from_secs(3600));
        let config = RedisConfig::from_url("redis://:only@[::1]").expect("a good url");
        assert_eq!((config.host.as_str(), config.port), ("::1", 6379));
        assert_eq!(
            (config.user, config.password.as_deref()),
            (None, Some("only"))
        );
    }

    #[test]
    fn what_a_url_gets_wrong_is_answered_with_what_is_allowed() {
        let cases = [
            ("memory:", "redis://USER"),
            ("redis://me:secret@:1", "redis://USER"),
            ("redis://me:secret@h:port", "redis://USER"),
            ("redis://me:secret@h/db", "redis://USER"),
            ("redis://secret@h", "redis://USER"),
            ("redis://me:secret@h?mode=1", "the options are"),
            ("redis://me:secret@h?create_topics=1", "`true` or `false`"),
            ("redis://me:secret@h?partitions=0", "1 to 4096"),
            ("redis://me:secret@h?lease=5", "with a unit"),
            ("redis://me:secret@h?lease=5ms", "at least 100ms"),
            ("redis://me:1?secret@h", "the options are"),
        ];
        for (url, allowed) in cases {
            let error = RedisConfig::from_url(url).expect_err(url);
            let text = error.to_string();
            assert!(text.contains(allowed), "{url}: {text}");
            assert!(!text.contains("secret"), "{text}");
        }
    }

    #[test]
    fn a_password_is_not_shown() {
        let config = RedisConfig::from_url("redis://me:secret@h").expect("a good url");
        assert!(!format!("{config:?}").contains("secret"));
    }
}
