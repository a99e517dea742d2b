//! How a PostgreSQL broker is set up, and what its URL says.

use std::fmt;
use std::time::Duration;

use eventbus_core::{Error, ErrorKind, Result, duration, redacted_option};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use super::tables::{SCHEMA_RULE, is_schema};
use crate::option::misread;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Most partitions a topic may have on this broker.
pub(super) const PARTITIONS_MAX: u32 = 4096;
/// Those that publish and settle hold one each.
const CONNECTIONS_MIN: u32 = 4;
const TIMEOUT_MIN: Duration = Duration::from_millis(100);
const LEASE_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// Options of a URL that are PostgreSQL's own.
const NATIVE: [&str; 6] = [
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "application_name",
    "host",
];

/// The set-up of a [`PostgresBroker`](crate::PostgresBroker).
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use eventbus_sql::PostgresConfig;
///
/// let url = "postgres://shop:secret@db.example/shop?sslmode=verify-full&schema=bus&lease=5s";
/// let config = PostgresConfig::from_url(url)?;
/// assert_eq!(config.schema, "bus");
/// assert_eq!(config.lease, Duration::from_secs(5));
/// assert!(!format!("{config:?}").contains("secret"));
/// # Ok::<(), eventbus_core::Error>(())
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct PostgresConfig {
    /// Server, database, user, password and encryption.
    pub connect: PgConnectOptions,
    /// Where the broker's tables are; it is created when it is missing.
    pub schema: String,
    /// Partitions of a topic that nobody declared; one whose name ends in `.dlq` has a single one.
    pub partitions: u32,
    /// Most connections of this client, beside one that hears of what other processes do. A store has
    /// as many for transactions that it lends, and as many for the service itself.
    pub connections: u32,
    /// How long a statement, or the wait for a connection, may take.
    pub timeout: Duration,
    /// How long a member that says nothing keeps its partitions. One whose process is dead, where
    /// others on its machine can tell, loses them at once.
    pub lease: Duration,
    /// How long a group is remembered that has no member: until then retention keeps what it has
    /// not read.
    pub group_expiry: Duration,
    /// How long the inbox remembers that an event was handled: longer than any duplicate is late,
    /// by a broker that was away or an operator who publishes again.
    pub inbox_retention: Duration,
    /// How often retention and the expiry of groups are looked at.
    pub retention_interval: Duration,
}

impl fmt::Debug for PostgresConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither the password nor where its certificates are.
        f.debug_struct("PostgresConfig")
            .field("host", &self.connect.get_host())
            .field("port", &self.connect.get_port())
            .field("database", &self.connect.get_database())
            .field("user", &self.connect.get_username())
            .field("schema", &self.schema)
            .field("partitions", &self.partitions)
            .field("connections", &self.connections)
            .field("timeout", &self.timeout)
            .field("lease", &self.lease)
            .field("group_expiry", &self.group_expiry)
            .field("inbox_retention", &self.inbox_retention)
            .field("retention_interval", &self.retention_interval)
            .finish()
    }
}

impl PostgresConfig {
    /// The defaults on this database: schema `eventbus`, 4 partitions, 10 connections, 5 seconds for
    /// a statement, leases of 10 seconds, groups and handled events remembered for 7 days, retention
    /// looked at every minute.
    #[must_use]
    pub fn new(connect: PgConnectOptions) -> Self {
        Self {
            connect,
            schema: "eventbus".to_owned(),
            partitions: 4,
            connections: 10,
            timeout: Duration::from_secs(5),
            lease: Duration::from_secs(10),
            group_expiry: 7 * DAY,
            inbox_retention: 7 * DAY,
            retention_interval: Duration::from_secs(60),
        }
    }

    /// Sets where the tables are: a lower case letter, then up to 39 lower case letters, digits and
    /// underscores. Connecting checks it.
    #[must_use]
    pub fn with_schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// Sets the partitions of topics that nobody declared, 1 to 4096.
    #[must_use]
    pub fn with_partitions(mut self, partitions: u32) -> Self {
        self.partitions = partitions.clamp(1, PARTITIONS_MAX);
        self
    }

    /// Sets the most connections, at least 4.
    #[must_use]
    pub fn with_connections(mut self, connections: u32) -> Self {
        self.connections = connections.max(CONNECTIONS_MIN);
        self
    }

    /// Sets how long a statement may take, at least a tenth of a second.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.max(TIMEOUT_MIN);
        self
    }

    /// Sets how long a silent member keeps its partitions, at least a tenth of a second.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease.max(LEASE_MIN);
        self
    }

    /// Sets how long a group without members is remembered.
    #[must_use]
    pub fn with_group_expiry(mut self, expiry: Duration) -> Self {
        self.group_expiry = expiry;
        self
    }

    /// Sets how long the inbox remembers an event.
    #[must_use]
    pub fn with_inbox_retention(mut self, retention: Duration) -> Self {
        self.inbox_retention = retention;
        self
    }

    /// Sets how often retention is looked at, at least every ten milliseconds apart.
    #[must_use]
    pub fn with_retention_interval(mut self, interval: Duration) -> Self {
        self.retention_interval = interval.max(INTERVAL_MIN);
        self
    }

    /// Reads `postgres://USER:PASSWORD@HOST:PORT/DATABASE`, with `schema`, `partitions`,
    /// `connections`, `timeout`, `lease`, `group_expiry`, `inbox_retention` and `retention_interval` as
    /// options behind `?`, and of PostgreSQL's own ones `sslmode`, `sslrootcert`, `sslcert`, `sslkey`,
    /// `application_name` and `host` (the directory of a socket). Times are numbers with a unit:
    /// `500ms`, `5s`, `10m`, `1h`, `7d`.
    ///
    /// Without `sslmode` the connection is encrypted where the server offers it; `verify-full` also
    /// makes sure that it is the right server.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the scheme, an option or a value is unknown; it says what is allowed, and
    /// shows no password.
    pub fn from_url(url: &str) -> Result<Self> {
        let refuse = |message: &str| Error::new(ErrorKind::InvalidInput, READ_URL, message);
        let (address, options) = url.split_once('?').unwrap_or((url, ""));
        if !address.starts_with("postgres://") && !address.starts_with("postgresql://") {
            return Err(refuse(ADDRESS));
        }
        // A password with a `/` or a `?` would become a part of the database's name, or of an option.
        let path = address.splitn(4, '/').nth(3).unwrap_or_default();
        if path.contains('@') {
            return Err(refuse(ADDRESS));
        }
        let options = options.split('&').filter(|option| !option.is_empty());
        let (native, own): (Vec<&str>, Vec<&str>) = options.partition(|option| {
            let name = option.split('=').next();
            name.is_some_and(|name| NATIVE.contains(&name))
        });
        let connect: PgConnectOptions =
            format!("{address}?{}", native.join("&"))
                .parse()
                .map_err(|error: sqlx::Error| {
                    // As text, and no source: the driver may cite an option.
                    let reason = error.to_string();
                    refuse(ADDRESS).with("reason", redacted_option(url, &reason))
                })?;
        let mut config = Self::new(named(connect));
        for option in own {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            config
                .set(name, value)
                .map_err(|reason| misread(refuse(reason), url, (name, value), reason != OPTIONS))?;
        }
        Ok(config)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), &'static str> {
        let time = || duration(value).ok_or(TIME);
        let time_of =
            |least: Duration, rule| Some(time()?).filter(|time| *time >= least).ok_or(rule);
        match name {
            "schema" if is_schema(value) => value.clone_into(&mut self.schema),
            "schema" => return Err(SCHEMA_RULE),
            "partitions" => {
                let count = value.parse().ok();
                self.partitions = count
                    .filter(|count| (1..=PARTITIONS_MAX).contains(count))
                    .ok_or("`partitions` is a number from 1 to 4096")?;
            }
            "connections" => {
                let count = value.parse().ok();
                self.connections = count
                    .filter(|count| (CONNECTIONS_MIN..=1000).contains(count))
                    .ok_or("`connections` is a number from 4 to 1000")?;
            }
            "timeout" => self.timeout = time_of(TIMEOUT_MIN, "`timeout` is at least 100ms")?,
            "lease" => self.lease = time_of(LEASE_MIN, "`lease` is at least 100ms")?,
            "group_expiry" => self.group_expiry = time()?,
            "inbox_retention" => self.inbox_retention = time()?,
            "retention_interval" => {
                let rule = "`retention_interval` is at least 10ms";
                self.retention_interval = time_of(INTERVAL_MIN, rule)?;
            }
            _ => return Err(OPTIONS),
        }
        Ok(())
    }

    /// Connections for whatever a service asks.
    pub(super) fn pool(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(self.connections)
            .acquire_timeout(self.timeout)
            .connect_lazy_with(self.connect.clone())
    }

    /// Names the server in an error, without user and password.
    pub(super) fn named(&self, error: Error) -> Error {
        let host = self.connect.get_host();
        let error = error.with("server", format_args!("{host}:{}", self.connect.get_port()));
        match self.connect.get_database() {
            Some(database) => error.with("database", database),
            None => error,
        }
    }
}

/// Shows in the server's list of connections who they are, unless the url says so.
fn named(connect: PgConnectOptions) -> PgConnectOptions {
    match connect.get_application_name() {
        Some(_) => connect,
        None => connect.application_name("eventbus"),
    }
}

const READ_URL: &str = "read broker url";
const ADDRESS: &str = "a PostgreSQL broker is postgres://USER:PASSWORD@HOST:PORT/DATABASE, with the characters that mean something in a url as %-codes";
const TIME: &str = "a time is a number with a unit, such as 500ms, 5s, 10m, 1h or 7d";
const OPTIONS: &str = "the options are schema, partitions, connections, timeout, lease, group_expiry, inbox_retention, retention_interval, and of PostgreSQL's own sslmode, sslrootcert, sslcert, sslkey, application_name and host";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_server_and_options() {
        let config = PostgresConfig::from_url(
            "postgresql://me:s%40crt@db:6000/shop?schema=bus&partitions=8&connections=5&timeout=2s&lease=3s&group_expiry=1h&inbox_retention=2h&retention_interval=1m&sslmode=disable",
        )
        .expect("a good url");
        let connect = &config.connect;
        assert_eq!((connect.get_host(), connect.get_port()), ("db", 6000));
        assert_eq!(connect.get_database(), Some("shop"));
        assert_eq!((config.schema.as_str(), config.partitions), ("bus", 8));
        assert_eq!(
            (config.connections, config.timeout),
            (5, Duration::from_secs(2))
        );
        assert_eq!(config.lease, Duration::from_secs(3));
        assert_eq!(config.group_expiry, Duration::from_secs(3600));
        assert_eq!(config.inbox_retention, Duration::from_secs(7200));
        assert_eq!(config.retention_interval, Duration::from_secs(60));
    }

    #[test]
    fn what_a_url_gets_wrong_is_answered_with_what_is_allowed() {
        let cases = [
            ("memory:", "postgres://USER"),
            ("postgres://me:secret@host:port/db", "postgres://USER"),
            ("postgres://me:secret@h/db?mode=rwc", "schema, partitions"),
            ("postgres://me:secret@h/db?schema=a-b", "lower case letters"),
            (
                "postgres://me:secret@h/db?schema=pg_x",
                "lower case letters",
            ),
            ("postgres://me:secret@h/db?partitions=0", "1 to 4096"),
            ("postgres://me:secret@h/db?connections=1", "4 to 1000"),
            ("postgres://me:secret@h/db?lease=5", "with a unit"),
            ("postgres://me:secret@h/db?timeout=5ms", "at least 100ms"),
            ("postgres://me:secret@h/db?sslmode=maybe", "postgres://USER"),
            ("postgres://me:se/secret@h/db", "%-codes"),
            ("postgres://me/secret@h/db", "%-codes"),
            ("postgres://me:1?secret@h/db", "the options are schema"),
            ("postgres://h/db?user=me&password=secret", "option: user"),
            ("postgres://h/db?password=secret", "the options are schema"),
        ];
        for (url, allowed) in cases {
            let error = PostgresConfig::from_url(url).expect_err(url);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{url}");
            let shown = eventbus_core::error_chain(&error);
            assert!(shown.contains(allowed), "{shown}");
            assert!(!shown.contains("secret"), "{shown}");
        }
    }
}
