//! The suite that every store of leases passes.

use std::sync::Arc;

use eventbus_core::{LeaseStore, Result};
use eventbus_sql::PostgresLeases;
use eventbus_testkit::{LeaseHarness, lease_store_conformance};

use super::server::Server;

#[async_trait::async_trait]
impl LeaseHarness for Server {
    async fn connect(&self) -> Result<Arc<dyn LeaseStore>> {
        Ok(Arc::new(PostgresLeases::connect(self.config()).await?))
    }
}

lease_store_conformance!(
    #[ignore = "needs brokers: ./dev/test"]
    Server::new().await
);
