//! The suite that every store of held keys passes.

use std::sync::Arc;

use eventbus_core::{KeyStateStore, Result};
use eventbus_sql::PostgresStore;
use eventbus_testkit::{KeyStateHarness, key_state_conformance};

use super::server::Server;

#[async_trait::async_trait]
impl KeyStateHarness for Server {
    async fn open(&self) -> Result<Arc<dyn KeyStateStore>> {
        Ok(Arc::new(PostgresStore::connect(self.config()).await?))
    }
}

key_state_conformance!(
    #[ignore = "needs brokers: ./dev/test"]
    Server::new().await
);
