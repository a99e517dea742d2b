//! The store of held keys in memory passes the suite of such stores.

use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::{KeyStateStore, MemoryKeyState, Result};
use eventbus_testkit::{KeyStateHarness, key_state_conformance};

#[derive(Default)]
struct InMemory(MemoryKeyState);

#[async_trait]
impl KeyStateHarness for InMemory {
    async fn open(&self) -> Result<Arc<dyn KeyStateStore>> {
        Ok(Arc::new(self.0.clone()))
    }
}

key_state_conformance!(InMemory::default());
