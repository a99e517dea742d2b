//! The suite that every broker passes.

use std::sync::Arc;

use eventbus_core::{Broker, Result};
use eventbus_testkit::{BrokerHarness, broker_conformance};

use crate::server::Server;

#[async_trait::async_trait]
impl BrokerHarness for Server {
    async fn connect(&self) -> Result<Arc<dyn Broker>> {
        Ok(Arc::new(Self::connect(self).await?))
    }

    async fn restart(&self) -> Result<bool> {
        Self::restart(self).await;
        Ok(true)
    }
}

broker_conformance!(
    #[ignore = "needs brokers: ./dev/test"]
    Server::new().await
);
