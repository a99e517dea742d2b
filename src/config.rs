//! What a deployment decides: where the broker is, how topics are called.

use std::ffi::OsString;
use std::fmt;

use serde::Deserialize;

use eventbus_core::{Error, ErrorKind, Result};

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
}

impl EventBusConfig {
    /// The configuration of a URL alone.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            source: None,
            topic_prefix: String::new(),
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

    /// Reads `EVENTBUS_URL`, `EVENTBUS_SOURCE` and `EVENTBUS_TOPIC_PREFIX`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when there is no `EVENTBUS_URL`, or another variable begins with `EVENTBUS_`.
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
                "EVENTBUS_URL" => self.url = value,
                "EVENTBUS_SOURCE" => self.source = Some(value),
                "EVENTBUS_TOPIC_PREFIX" => self.topic_prefix = value,
                name if name.starts_with("EVENTBUS_") => {
                    return Err(Error::new(
                        ErrorKind::InvalidInput,
                        "read configuration",
                        "unknown variable: known are EVENTBUS_URL, EVENTBUS_SOURCE and EVENTBUS_TOPIC_PREFIX",
                    )
                    .with("variable", name));
                }
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
            .field("url", &redacted(&self.url))
            .field("source", &self.source)
            .field("topic_prefix", &self.topic_prefix)
            .finish()
    }
}

/// A URL as it may be shown: without what stands between `//` and `@`, and without its options.
pub(crate) fn redacted(url: &str) -> String {
    let url = url.split_once('?').map_or(url, |(url, _)| url);
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://***@{host}"),
        _ => url.to_owned(),
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
        ] {
            let shown = format!("{:?}", EventBusConfig::new(url));
            assert!(!shown.contains("secret"), "{shown}");
        }
        assert_eq!(redacted("memory:?like=kafka"), "memory:");
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
    fn the_environment_overrides_and_unknown_names_are_errors() {
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
        let typo =
            EventBusConfig::new("memory:").overridden_by(variables(&[("EVENTBUS_URI", "x")]));
        assert!(typo.is_err());
        assert!(EventBusConfig::new("").overridden_by(Vec::new()).is_err());
    }
}
