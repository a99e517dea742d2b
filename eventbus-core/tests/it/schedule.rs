//! The schedule in memory passes the suite of such stores.

use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::{MemorySchedule, Result, ScheduleStore};
use eventbus_testkit::{ScheduleHarness, schedule_store_conformance};

#[derive(Default)]
struct InMemory(MemorySchedule);

#[async_trait]
impl ScheduleHarness for InMemory {
    async fn open(&self) -> Result<Arc<dyn ScheduleStore>> {
        Ok(Arc::new(self.0.clone()))
    }
}

schedule_store_conformance!(InMemory::default());
