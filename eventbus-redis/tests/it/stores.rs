//! The suites that every store of held keys, and every store of duplicate windows, passes.

use std::sync::Arc;

use eventbus_core::{DuplicateStore, KeyStateStore, Result};
use eventbus_redis::RedisDuplicates;
use eventbus_testkit::{
    DuplicatesHarness, KeyStateHarness, duplicates_conformance, key_state_conformance,
};

use crate::server::Server;

#[async_trait::async_trait]
impl KeyStateHarness for Server {
    async fn open(&self) -> Result<Arc<dyn KeyStateStore>> {
        Ok(Arc::new(self.connect().await?.key_state()))
    }
}

#[async_trait::async_trait]
impl DuplicatesHarness for Server {
    async fn open(&self) -> Result<Arc<dyn DuplicateStore>> {
        Ok(Arc::new(RedisDuplicates::connect(Self::config()).await?))
    }
}

mod key_state {
    use super::{Server, key_state_conformance};

    key_state_conformance!(
        #[ignore = "needs brokers: ./dev/test"]
        Server::new().await
    );
}

mod duplicates {
    use super::{Server, duplicates_conformance};

    duplicates_conformance!(
        #[ignore = "needs brokers: ./dev/test"]
        Server::new().await
    );
}
