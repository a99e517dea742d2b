//! The suite that every store of held keys passes.

use std::sync::Arc;

use eventbus_core::{KeyStateStore, Result};
use eventbus_sql::{SqliteConfig, SqliteStore};
use eventbus_testkit::{KeyStateHarness, key_state_conformance};

use crate::place::Place;

#[async_trait::async_trait]
impl KeyStateHarness for Place {
    async fn open(&self) -> Result<Arc<dyn KeyStateStore>> {
        let store = SqliteStore::connect(SqliteConfig::new(self.file("keys.db"))).await?;
        Ok(Arc::new(store))
    }
}

key_state_conformance!(Place::new());
