//! On which broker the services meet, and what is kept beside it where it cannot keep that itself.

use std::path::Path;

use anyhow::Context as _;
use clap::Args;
use eventbus::EventBusConfig;
use eventbus::prelude::{Connect as _, EventBus};

use crate::databases::StoreArgs;

/// On which broker the services meet.
#[derive(Args, Clone, Debug)]
pub struct BrokerArgs {
    /// The broker on which the services meet, such as `kafka://HOST:PORT`, `redis://HOST:PORT` or
    /// `amqp://HOST:PORT`, or `memory:`, which lives and dies with this process [default: the embedded one, an SQLite file in the data directory]
    #[arg(long, value_name = "URL")]
    broker: Option<String>,
    /// What stands before the names of the topics, so that several shops have room on one broker
    /// [default: nothing; `demo` and `campaign` take a fresh one on a broker that is named]
    #[arg(long, value_name = "PREFIX")]
    topic_prefix: Option<String>,
}

impl BrokerArgs {
    /// Whether the user named the broker that lives inside the process.
    pub fn is_memory(&self) -> bool {
        let url = self.broker.as_deref();
        url.is_some_and(|url| url.starts_with("memory:"))
    }

    /// The same with topics that nobody has used yet; the embedded broker is a fresh one anyway.
    pub fn fresh(&self) -> Self {
        let mut fresh = self.clone();
        if self.broker.is_some() && !self.is_memory() {
            let prefix = || format!("shop-{:06x}.", fastrand::u32(0..1 << 24));
            fresh.topic_prefix.get_or_insert_with(prefix);
        }
        fresh
    }

    /// The in-memory broker with room for so many bytes; another as it is.
    pub fn with_room(mut self, bytes: usize) -> Self {
        if let Some("memory:") = self.broker.as_deref() {
            self.broker = Some(format!("memory:?bytes={bytes}"));
        }
        self
    }

    /// What is left on the broker when the data directory is gone.
    pub fn leftovers(&self) -> Option<String> {
        let prefix = self.topic_prefix.as_deref()?;
        Some(format!("the topics {prefix}* stay on the broker"))
    }

    /// The configuration of the bus.
    pub fn config(&self, data: &Path, store: &StoreArgs) -> EventBusConfig {
        let url = match &self.broker {
            Some(url) => url.clone(),
            None => format!("sqlite://{}", data.join("bus.db").display()),
        };
        // Message brokers keep neither held keys nor what is tried again later.
        let keeps_none = ["kafka:", "redis:", "amqp:"].map(|scheme| url.starts_with(scheme));
        let beside = keeps_none.contains(&true).then(|| store.of_bus(data));
        let prefix = self.topic_prefix.as_deref().unwrap_or_default();
        let config = EventBusConfig::new(url).with_topic_prefix(prefix);
        match beside {
            Some(store) => config.with_store(store),
            None => config,
        }
    }

    /// What another process of the shop is told.
    pub fn arguments(&self) -> Vec<String> {
        let options = [
            ("--broker", &self.broker),
            ("--topic-prefix", &self.topic_prefix),
        ];
        let given = options
            .into_iter()
            .filter_map(|(name, value)| Some([name.to_owned(), value.clone()?]));
        given.flatten().collect()
    }
}

/// Connects to the broker.
///
/// # Errors
///
/// When there is none at the URL.
pub async fn connect(config: &EventBusConfig) -> anyhow::Result<EventBus> {
    let connected = EventBus::connect_with(config).await;
    connected.context("connect to the broker given with `--broker`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(broker: Option<&str>) -> BrokerArgs {
        BrokerArgs {
            broker: broker.map(str::to_owned),
            topic_prefix: None,
        }
    }

    #[test]
    fn shops_have_topics_of_their_own_on_a_broker_that_is_shared() {
        let fresh = named(Some("kafka://host")).fresh();
        assert_ne!(
            fresh.topic_prefix,
            named(Some("kafka://host")).fresh().topic_prefix
        );
        assert_eq!(
            fresh.arguments()[..3],
            ["--broker", "kafka://host", "--topic-prefix"]
        );
        for own in [None, Some("memory:")] {
            assert_eq!(named(own).fresh().topic_prefix, None);
        }
    }

    #[test]
    fn what_message_brokers_do_not_keep_is_in_the_shop_s_store() {
        let data = Path::new("data");
        let beside = |broker, store: &str| {
            let store = StoreArgs {
                store: store.to_owned(),
            };
            named(broker).config(data, &store).store
        };
        assert_eq!(beside(None, "sqlite"), None);
        for url in ["kafka://host", "redis://host", "amqp://host"] {
            let store = beside(Some(url), "sqlite");
            assert_eq!(store.as_deref(), Some("sqlite://data/bus.db"));
        }
        assert_eq!(
            beside(Some("kafka://host"), "postgres://db/shop?schema=blue").as_deref(),
            Some("postgres://db/shop?schema=shop&connections=5&schema=blue&schema=blue_bus")
        );
    }
}
