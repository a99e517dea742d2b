//! The suite that every store of leases passes.

use std::sync::Arc;

use eventbus_core::{LeaseStore, Result};
use eventbus_sql::{SqliteConfig, SqliteStore};
use eventbus_testkit::{LeaseHarness, lease_store_conformance};

use crate::place::Place;

#[async_trait::async_trait]
impl LeaseHarness for Place {
    async fn connect(&self) -> Result<Arc<dyn LeaseStore>> {
        let store = SqliteStore::connect(SqliteConfig::new(self.file("leases.db"))).await?;
        Ok(Arc::new(store))
    }
}

lease_store_conformance!(Place::new());
