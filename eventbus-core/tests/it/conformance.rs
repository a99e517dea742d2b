//! The in-memory broker under the conformance suite, as each of the brokers it can behave like.

use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::{Broker, MemoryBroker, MemoryConfig, MemoryProfile, Result};
use eventbus_testkit::BrokerHarness;

struct MemoryHarness(MemoryBroker);

impl MemoryHarness {
    fn like(profile: MemoryProfile) -> Self {
        Self(MemoryBroker::with(MemoryConfig::default().like(profile)))
    }
}

#[async_trait]
impl BrokerHarness for MemoryHarness {
    async fn connect(&self) -> Result<Arc<dyn Broker>> {
        Ok(Arc::new(self.0.connect()))
    }

    async fn restart(&self) -> Result<bool> {
        Ok(false)
    }
}

mod memory {
    use super::{MemoryHarness, MemoryProfile};
    eventbus_testkit::broker_conformance!(MemoryHarness::like(MemoryProfile::Memory));
}

mod kafka {
    use super::{MemoryHarness, MemoryProfile};
    eventbus_testkit::broker_conformance!(MemoryHarness::like(MemoryProfile::Kafka));
}

mod rabbitmq {
    use super::{MemoryHarness, MemoryProfile};
    eventbus_testkit::broker_conformance!(MemoryHarness::like(MemoryProfile::RabbitMq));
}

mod redis {
    use super::{MemoryHarness, MemoryProfile};
    eventbus_testkit::broker_conformance!(MemoryHarness::like(MemoryProfile::Redis));
}
