//! A broker that meets a plan of faults is one like any other while nothing goes wrong.

use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::{Broker, MemoryBroker, Result};
use eventbus_testkit::{BrokerHarness, FaultPlan, FaultyBroker};

struct Calm(FaultyBroker);

impl Calm {
    fn new() -> Self {
        Self(FaultyBroker::new(MemoryBroker::new(), FaultPlan::none()))
    }
}

#[async_trait]
impl BrokerHarness for Calm {
    async fn connect(&self) -> Result<Arc<dyn Broker>> {
        Ok(Arc::new(self.0.connect()))
    }

    async fn restart(&self) -> Result<bool> {
        Ok(false)
    }
}

eventbus_testkit::broker_conformance!(Calm::new());
