//! How a SQLite broker is set up, and what its URL says.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use eventbus_core::{Clock, Error, ErrorKind, Result, SystemClock, duration, redacted_url};

use super::tables::Tables;
use crate::option::misread;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Most partitions a topic may have on this broker.
pub(super) const PARTITIONS_MAX: u32 = 4096;

/// The set-up of a [`SqliteBroker`](crate::SqliteBroker).
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use eventbus_sql::SqliteConfig;
///
/// let config = SqliteConfig::from_url("sqlite://shop.db?prefix=bus_&group_expiry=30d")?;
/// assert_eq!(config.path.to_str(), Some("shop.db"));
/// assert_eq!(config.group_expiry, Duration::from_secs(30 * 24 * 60 * 60));
/// # Ok::<(), eventbus_core::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SqliteConfig {
    /// The file; it is created when it is missing, its directory is not.
    pub path: PathBuf,
    /// What the names of the broker's tables begin with, so that they live beside a team's own.
    pub prefix: String,
    /// Partitions of a topic that nobody declared; one whose name ends in `.dlq` has a single one.
    pub partitions: u32,
    /// How long a write waits while another process writes to the file.
    pub busy_timeout: Duration,
    /// How long a member that says nothing keeps its partitions. One whose process is dead loses
    /// them at once.
    pub lease: Duration,
    /// How long a group is remembered that has no member: until then retention keeps what it has
    /// not read.
    pub group_expiry: Duration,
    /// How long the inbox remembers that an event was handled: longer than any duplicate is late,
    /// such as one that an operator re-drives.
    pub inbox_retention: Duration,
    /// How long a handler or a request may keep a transaction open, while nobody else writes to the
    /// file. What takes longer is given up, and whatever shares its commit is to be done again.
    /// Shorter than `busy_timeout` and than a third of `lease`, or members would lose what they hold
    /// while they wait to renew it. None: 3 seconds, or what fits under the other two.
    pub transaction_limit: Option<Duration>,
    /// How often retention and the expiry of groups are looked at.
    pub retention_interval: Duration,
    /// What gives messages the time at which they were taken, and says how old they are.
    pub clock: Arc<dyn Clock>,
}

impl SqliteConfig {
    /// The defaults on this file: prefix `eventbus_`, 4 partitions, 5 seconds for writes, leases of
    /// 10 seconds, groups remembered for 7 days, as is what was handled, transactions of 3 seconds,
    /// retention looked at every minute.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            prefix: "eventbus_".to_owned(),
            partitions: 4,
            busy_timeout: Duration::from_secs(5),
            lease: Duration::from_secs(10),
            group_expiry: 7 * DAY,
            inbox_retention: 7 * DAY,
            transaction_limit: None,
            retention_interval: Duration::from_secs(60),
            clock: Arc::new(SystemClock),
        }
    }

    /// Sets what the names of the tables begin with: a letter, then up to 31 letters, digits and
    /// underscores. Connecting checks it.
    #[must_use]
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Sets the partitions of topics that nobody declared, 1 to 4096.
    #[must_use]
    pub fn with_partitions(mut self, partitions: u32) -> Self {
        self.partitions = partitions.clamp(1, PARTITIONS_MAX);
        self
    }

    /// Sets how long a write waits for another process.
    #[must_use]
    pub fn with_busy_timeout(mut self, timeout: Duration) -> Self {
        self.busy_timeout = timeout;
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

    /// Sets how long the inbox remembers that an event was handled.
    #[must_use]
    pub fn with_inbox_retention(mut self, retention: Duration) -> Self {
        self.inbox_retention = retention;
        self
    }

    /// Sets how long a transaction may be open. Connecting checks that it is shorter than
    /// `busy_timeout` and than a third of `lease`.
    #[must_use]
    pub fn with_transaction_limit(mut self, limit: Duration) -> Self {
        self.transaction_limit = Some(limit.max(INTERVAL_MIN));
        self
    }

    /// Sets how often retention is looked at, at least every ten milliseconds apart.
    #[must_use]
    pub fn with_retention_interval(mut self, interval: Duration) -> Self {
        self.retention_interval = interval.max(INTERVAL_MIN);
        self
    }

    /// Sets the clock.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Reads `sqlite://shop.db` (beside the working directory) or `sqlite:///var/lib/shop.db`, with
    /// `prefix`, `partitions`, `busy_timeout`, `lease`, `group_expiry`, `inbox_retention`,
    /// `transaction_limit` and `retention_interval` as options behind `?`. Times are numbers with a unit: `500ms`, `5s`, `10m`, `1h`, `7d`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the scheme, an option or a value is unknown, `Unsupported` for a
    /// database in memory; it says what is allowed.
    pub fn from_url(url: &str) -> Result<Self> {
        let refuse = |message: &str| {
            Error::new(ErrorKind::InvalidInput, "read broker url", message)
                .with("url", redacted_url(url))
        };
        let (address, options) = url.split_once('?').unwrap_or((url, ""));
        let Some(path) = address.strip_prefix("sqlite:") else {
            return Err(refuse("the SQLite broker's url is `sqlite://FILE`"));
        };
        let path = path.strip_prefix("//").unwrap_or(path);
        if path == ":memory:" {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "read broker url",
                "a SQLite database in memory is seen by one connection and outlives nothing: use `memory:`, or name a file",
            )
            .with("url", redacted_url(url)));
        }
        let path = unescaped(path)
            .filter(|path| !path.is_empty())
            .ok_or_else(|| refuse("the url names no file: write `sqlite://shop.db`, or `sqlite:///var/lib/shop.db` for an absolute path"))?;
        let mut config = Self::new(path);
        for option in options.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            config
                .set(name, value)
                .map_err(|reason| misread(refuse(reason), url, (name, value), reason != OPTIONS))?;
        }
        Ok(config)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), &'static str> {
        let time = || {
            duration(value)
                .ok_or("a time is a number with a unit, such as 500ms, 5s, 10m, 1h or 7d")
        };
        match name {
            "prefix" => {
                Tables::check_prefix(value)?;
                self.prefix = value.to_owned();
            }
            "partitions" => {
                let count = value.parse().ok();
                self.partitions = count
                    .filter(|count| (1..=PARTITIONS_MAX).contains(count))
                    .ok_or("`partitions` is a number from 1 to 4096")?;
            }
            "busy_timeout" => self.busy_timeout = time()?,
            "lease" => {
                let lease = Some(time()?).filter(|lease| *lease >= LEASE_MIN);
                self.lease = lease.ok_or("`lease` is at least 100ms")?;
            }
            "group_expiry" => self.group_expiry = time()?,
            "inbox_retention" => self.inbox_retention = time()?,
            "transaction_limit" => {
                let limit = Some(time()?).filter(|limit| *limit >= INTERVAL_MIN);
                limit.ok_or("`transaction_limit` is at least 10ms")?;
                self.transaction_limit = limit;
            }
            "retention_interval" => {
                let interval = Some(time()?).filter(|interval| *interval >= INTERVAL_MIN);
                self.retention_interval =
                    interval.ok_or("`retention_interval` is at least 10ms")?;
            }
            _ => {
                return Err(OPTIONS);
            }
        }
        Ok(())
    }

    /// Whether two handles of one file can share what runs for it.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        self.partitions == other.partitions
            && self.busy_timeout == other.busy_timeout
            && self.lease == other.lease
            && self.group_expiry == other.group_expiry
            && self.inbox_retention == other.inbox_retention
            && self.transaction_limit == other.transaction_limit
            && self.retention_interval == other.retention_interval
    }

    /// How long a transaction may be open.
    pub(super) fn checked_transaction_limit(&self) -> Result<Duration> {
        let longest = self.busy_timeout.min(self.lease / 3);
        match self.transaction_limit {
            None => Ok(TRANSACTION_LIMIT.min(longest * 19 / 20).max(INTERVAL_MIN)),
            Some(limit) if limit < longest => Ok(limit),
            Some(limit) => Err(Error::new(
                ErrorKind::InvalidInput,
                "open database",
                "`transaction_limit` must be shorter than `busy_timeout` and than a third of `lease`: while a transaction is open, nobody else writes to the file, not even to renew a lease; lower it, or raise the others",
            )
            .with("transaction_limit", format_args!("{limit:?}"))
            .with("busy_timeout", format_args!("{:?}", self.busy_timeout))
            .with("lease", format_args!("{:?}", self.lease))),
        }
    }

    /// The file as every handle of this process names it, whatever way it was reached.
    pub(super) fn canonical_path(&self) -> Result<PathBuf> {
        if let Ok(path) = self.path.canonicalize() {
            return Ok(path);
        }
        let missing = |message: &str| {
            Error::new(ErrorKind::NotFound, "open database", message)
                .with("path", self.path.display())
        };
        let name = self.path.file_name();
        let name = name.ok_or_else(|| missing("the path names no file"))?;
        let directory = match self.path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let directory = directory.canonicalize().map_err(|error| {
            missing("the directory of the file cannot be entered: create it, the file itself is created by itself")
                .with_source(error)
        })?;
        Ok(directory.join(name))
    }
}

const OPTIONS: &str = "the options are prefix, partitions, busy_timeout, lease, group_expiry, inbox_retention, transaction_limit and retention_interval";
const TRANSACTION_LIMIT: Duration = Duration::from_secs(3);
const LEASE_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// Replaces `%20` and the like by what they stand for.
fn unescaped(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, behind) = rest.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = behind;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_path_and_options() {
        let config = SqliteConfig::from_url(
            "sqlite:///var/lib/my%20shop.db?prefix=bus_&partitions=8&busy_timeout=250ms&lease=3s&group_expiry=1h&retention_interval=1m",
        )
        .expect("a good url");
        assert_eq!(config.path, Path::new("/var/lib/my shop.db"));
        assert_eq!((config.prefix.as_str(), config.partitions), ("bus_", 8));
        assert_eq!(config.busy_timeout, Duration::from_millis(250));
        assert_eq!(
            (config.lease, config.group_expiry),
            (Duration::from_secs(3), Duration::from_secs(3600))
        );
        assert_eq!(config.retention_interval, Duration::from_secs(60));
        let config = SqliteConfig::from_url("sqlite://shop.db").expect("a good url");
        assert_eq!(config.path, Path::new("shop.db"));
    }

    #[test]
    fn what_a_url_gets_wrong_is_answered_with_what_is_allowed() {
        let cases = [
            ("sqlite://", "names no file"),
            ("sqlite://a%2", "names no file"),
            ("sqlite://a.db?mode=rwc", "prefix, partitions, busy_timeout"),
            (
                "sqlite://a.db?prefix=a-b",
                "letters, digits and underscores",
            ),
            (
                "sqlite://a.db?prefix=sqlite_x",
                "letters, digits and underscores",
            ),
            ("sqlite://a.db?partitions=0", "1 to 4096"),
            ("sqlite://a.db?lease=5", "with a unit"),
            ("sqlite://a.db?lease=5ms", "at least 100ms"),
            ("memory:", "sqlite://FILE"),
        ];
        for (url, allowed) in cases {
            let error = SqliteConfig::from_url(url).expect_err(url);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{url}");
            assert!(error.to_string().contains(allowed), "{error}");
        }
        for url in ["sqlite::memory:", "sqlite://:memory:"] {
            let error = SqliteConfig::from_url(url).expect_err(url);
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{url}");
            assert!(error.to_string().contains("use `memory:`"), "{error}");
        }
    }

    #[test]
    fn what_may_be_a_password_is_in_no_error() {
        for url in [
            "kafka://me:secret@host/",
            "sqlite://me:secret@host/a.db?mode=rwc",
            "sqlite://a.db?key=secret",
            "sqlite://me:1?lease=secret@host",
            "sqlite::memory:?key=secret",
        ] {
            let error = SqliteConfig::from_url(url).expect_err(url);
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_transaction_is_shorter_than_others_wait() {
        let config = SqliteConfig::new("shop.db");
        let limit = |config: &SqliteConfig| config.checked_transaction_limit();
        let short = Duration::from_secs(1);
        assert_eq!(limit(&config).expect("the default"), 3 * short);
        for config in [
            config.clone().with_busy_timeout(short),
            config.clone().with_lease(3 * short),
        ] {
            assert!(limit(&config).expect("it fits") < short);
            let error = limit(&config.with_transaction_limit(short)).expect_err("too long");
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains("a third of `lease`"), "{error}");
        }
        let set = config.with_transaction_limit(short);
        assert_eq!(limit(&set).expect("it fits"), short);
    }

    #[test]
    fn a_missing_directory_is_named() {
        let config = SqliteConfig::new("/nowhere/at/all/shop.db");
        let error = config.canonical_path().expect_err("there is no directory");
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}
