//! What a deployment decides: where the broker is, what is kept beside it, how topics are called.

use std::ffi::OsString;
use std::fmt;

use serde::Deserialize;

use eventbus_core::{Error, ErrorKind, Result, redacted_url};

const URL: &str = "EVENTBUS_URL";
const SOURCE: &str = "EVENTBUS_SOURCE";
const TOPIC_PREFIX: &str = "EVENTBUS_TOPIC_PREFIX";
const STORE: &str = "EVENTBUS_STORE";
const KNOWN: [&str; 4] = [URL, SOURCE, TOPIC_PREFIX, STORE];

/// The configuration of a bus, as a file or the environment gives it. A service with several buses
/// keeps a map of them by name.
///
/// # Examples
///
/// ```
/// use eventbus::EventBusConfig;
///
/// // From any serde format; an unknown key is an error.
/// let config: EventBusConfig = toml::from_str(
///     r#"
///     url = "memory:?partitions=8"
///     source = "order-service"
///     topic_prefix = "staging."
///     "#,
/// )
/// .unwrap();
/// assert_eq!(config.topic_prefix, "staging.");
/// ```
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct EventBusConfig {
    /// Where the broker is, such as `memory:`. May hold a password, which is never shown.
    pub url: String,
    /// How the service names itself in events; by default the program's name.
    #[serde(default)]
    pub source: Option<String>,
    /// What stands before every topic's name in this environment.
    #[serde(default)]
    pub topic_prefix: String,
    /// Where keys are held and events wait for their time, such as `sqlite://held.db` or
    /// `postgres://db.example/shop`: for a broker that keeps neither, such as Kafka. A `redis://`
    /// server keeps held keys only. Without it they are on the broker, where that can. May hold a password, which is never shown.
    ///
    /// It is a part of the bus: all processes on one broker name the same, and no other broker has
    /// it. What is held was taken from the broker and is nowhere else, so it has to be as durable.
    #[serde(default)]
    pub store: Option<String>,
}

impl EventBusConfig {
    /// The configuration of a URL alone.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            source: None,
            topic_prefix: String::new(),
            store: None,
        }
    }

    /// Sets how the service names itself.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<String>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Sets what stands before every topic's name.
    #[must_use]
    pub fn with_topic_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.topic_prefix = prefix.into();
        self
    }

    /// Sets where keys are held and events wait for their time.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> eventbus::Result<()> {
    /// use eventbus::EventBusConfig;
    /// use eventbus::prelude::*;
    ///
    /// let config = EventBusConfig::new("kafka://kafka.example:9092")
    ///     .with_store("postgres://shop:secret@db.example/shop");
    /// let bus = EventBus::connect_with(&config).await?;
    /// assert!(bus.held_keys("payments")?.list().await?.is_empty());
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_store(mut self, url: impl Into<String>) -> Self {
        self.store = Some(url.into());
        self
    }

    /// Reads `EVENTBUS_URL`, `EVENTBUS_SOURCE`, `EVENTBUS_TOPIC_PREFIX` and `EVENTBUS_STORE`. Other
    /// variables that begin with `EVENTBUS_` are warned of, except what Kubernetes sets for a service
    /// of that name, such as `EVENTBUS_SERVICE_HOST`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when there is no `EVENTBUS_URL`, or a variable is a misspelling of one of the
    /// four, such as `EVENTBUS_URI`.
    pub fn from_env() -> Result<Self> {
        Self::new("").overridden_by(variables(std::env::vars_os()))
    }

    /// Replaces what the environment sets; for a configuration read from a file.
    ///
    /// # Errors
    ///
    /// As [`from_env`](Self::from_env).
    pub fn overridden_by(
        mut self,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self> {
        for (name, value) in variables {
            match name.as_str() {
                URL => self.url = value,
                SOURCE => self.source = Some(value),
                TOPIC_PREFIX => self.topic_prefix = value,
                STORE => self.store = Some(value),
                name if name.starts_with("EVENTBUS_") => check_unknown(name)?,
                _ => {}
            }
        }
        match self.url.is_empty() {
            false => Ok(self),
            true => Err(Error::new(
                ErrorKind::InvalidInput,
                "read configuration",
                "no broker is given: set EVENTBUS_URL, for example to memory:",
            )),
        }
    }
}

/// Refuses a misspelling and warns of what else nobody reads.
fn check_unknown(name: &str) -> Result<()> {
    if is_service_link(name) {
        return Ok(());
    }
    let meant = KNOWN.iter().find(|known| distance(known, name) <= 2);
    if let Some(meant) = meant {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "read configuration",
            format!("unknown variable: did you mean {meant}?"),
        )
        .with("variable", name));
    }
    tracing::warn!(variable = name, known = ?KNOWN, "unknown variable: nobody reads it");
    Ok(())
}

/// Whether Kubernetes sets a variable of this name for a service: `…_SERVICE_HOST`,
/// `…_SERVICE_PORT_NAME`, `…_PORT`, `…_PORT_80_TCP_ADDR` and the like.
fn is_service_link(name: &str) -> bool {
    let words: Vec<_> = name.split('_').collect();
    let is_service = |pair: &[&str]| pair[0] == "SERVICE" && ["HOST", "PORT"].contains(&pair[1]);
    let is_port = |three: &[&str]| {
        three[0] == "PORT"
            && three[1].parse::<u16>().is_ok()
            && ["TCP", "UDP", "SCTP"].contains(&three[2])
    };
    words.last() == Some(&"PORT")
        || words.windows(2).any(is_service)
        || words.windows(3).any(is_port)
}

/// How many characters have to be put in, taken out or replaced to make one text of the other.
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (index, byte) in one.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], index + 1);
        for (column, found) in other.bytes().enumerate() {
            let replaced = diagonal + usize::from(byte != found);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}

/// The variables that are text. `std::env::vars` panics when any other program's is not.
fn variables(
    all: impl IntoIterator<Item = (OsString, OsString)>,
) -> impl Iterator<Item = (String, String)> {
    all.into_iter().filter_map(|(name, value)| {
        let value = value.to_string_lossy().into_owned();
        Some((name.into_string().ok()?, value))
    })
}

impl fmt::Debug for EventBusConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventBusConfig")
            .field("url", &redacted_url(&self.url))
            .field("source", &self.source)
            .field("topic_prefix", &self.topic_prefix)
            .field("store", &self.store.as_deref().map(redacted_url))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        for url in [
            "kafka://user:secret@broker:9092/?sasl.password=secret",
            "amqp://u:p@ss:secret@host/%2f",
            "redis://:secret@host:6379/0?password=secret",
            "kafka::/user:secret@host/",
        ] {
            let config = EventBusConfig::new(url).with_store(url);
            let shown = format!("{config:?}");
            assert!(!shown.contains("secret"), "{shown}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn variables_that_are_no_text_are_nobody_s_concern() {
        use std::os::unix::ffi::OsStringExt;

        let latin = OsString::from_vec(vec![b'M', 0xfc]);
        let all = [
            ("NAME".into(), latin.clone()),
            (latin, "x".into()),
            ("EVENTBUS_URL".into(), "memory:".into()),
        ];
        let config = EventBusConfig::new("").overridden_by(variables(all));
        assert_eq!(config.expect("one of them counts").url, "memory:");
    }

    #[test]
    fn the_environment_overrides_and_misspelled_names_are_errors() {
        let variables = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect::<Vec<_>>()
        };
        let config = EventBusConfig::new("memory:")
            .overridden_by(variables(&[
                ("EVENTBUS_SOURCE", "orders"),
                ("PATH", "/bin"),
            ]))
            .expect("known variables");
        assert_eq!(config.source.as_deref(), Some("orders"));
        for typo in [
            "EVENTBUS_URI",
            "EVENTBUS_URLS",
            "EVENTBUS_TOPIC_PREFX",
            "EVENTBUS_SOURCES",
        ] {
            let refused = EventBusConfig::new("memory:").overridden_by(variables(&[(typo, "x")]));
            let error = refused.expect_err(typo).to_string();
            assert!(error.contains("did you mean EVENTBUS_"), "{error}");
        }
        assert!(EventBusConfig::new("").overridden_by(Vec::new()).is_err());
    }
    #[test]
    fn what_orchestrators_set_is_no_error() {
        for name in [
            "EVENTBUS_SERVICE_HOST",
            "EVENTBUS_SERVICE_PORT",
            "EVENTBUS_SERVICE_PORT_HTTP",
            "EVENTBUS_PORT",
            "EVENTBUS_PORT_9092_TCP",
            "EVENTBUS_PORT_9092_TCP_ADDR",
            "EVENTBUS_KAFKA_PORT_9092_TCP_PROTO",
            "EVENTBUS_URL_SERVICE_HOST",
        ] {
            assert!(is_service_link(name), "{name}");
            let variables = [(name.to_owned(), "tcp://10.0.0.1:9092".to_owned())];
            let config = EventBusConfig::new("memory:").overridden_by(variables);
            assert_eq!(config.expect(name), EventBusConfig::new("memory:"));
        }
        for name in [
            "EVENTBUS_PORTS",
            "EVENTBUS_PORT_NAME",
            "EVENTBUS_HOST",
            "EVENTBUS_LOG",
        ] {
            assert!(!is_service_link(name), "{name}");
            let variables = [(name.to_owned(), "x".to_owned())];
            let config = EventBusConfig::new("memory:").overridden_by(variables);
            assert_eq!(config.expect(name), EventBusConfig::new("memory:"));
        }
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
