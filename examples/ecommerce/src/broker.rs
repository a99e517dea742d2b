//! The broker that the services meet on, and the bus that each of them gets.

use anyhow::Context as _;
use eventbus::prelude::{Connect as _, EventBus, EventBusConfig};
use eventbus::{MemoryBroker, MemoryConfig};

use tracing::{debug, warn};

use crate::events::topics;

/// The broker behind a URL. On `memory:` all services share one inside this process.
#[derive(Debug)]
pub struct ShopBroker {
    url: String,
    memory: Option<MemoryBroker>,
}

impl ShopBroker {
    /// The broker at `url`. Connects when a service asks for its bus.
    ///
    /// # Errors
    ///
    /// When an option of a `memory:` URL is not one.
    pub fn new(url: &str) -> anyhow::Result<Self> {
        let memory = match url.starts_with("memory:") {
            true => Some(MemoryBroker::with(MemoryConfig::from_url(url)?)),
            false => None,
        };
        Ok(Self {
            url: url.to_owned(),
            memory,
        })
    }

    /// Whether it lives and dies with this process.
    pub fn is_memory(&self) -> bool {
        self.memory.is_some()
    }

    /// A bus for one service; its name is the `source` of the events that the service publishes.
    ///
    /// # Errors
    ///
    /// When there is no broker at the URL.
    pub async fn bus(&self, service: &str) -> anyhow::Result<EventBus> {
        if let Some(memory) = &self.memory {
            return Ok(EventBus::builder(memory.connect()).source(service).build());
        }
        let config = EventBusConfig::new(&self.url).with_source(service);
        let connected = EventBus::connect_with(&config).await;
        connected.context("connect to the broker given with `--broker`")
    }

    /// Creates the topics that are missing and warns of those that differ from the table.
    ///
    /// # Errors
    ///
    /// When the broker refuses.
    pub async fn apply_topics(&self) -> anyhow::Result<()> {
        let bus = self.bus("shop").await?;
        let reports = bus
            .apply_topics(&topics())
            .await
            .context("create the topics")?;
        for report in reports {
            for difference in report.drift {
                // That the in-memory broker forgets everything with its process is no surprise.
                match self.is_memory() {
                    true => debug!(topic = %report.name, difference),
                    false => warn!(topic = %report.name, difference, "it is not as declared"),
                }
            }
        }
        Ok(())
    }
}
