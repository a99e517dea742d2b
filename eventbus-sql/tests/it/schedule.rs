//! The suite that every schedule passes.

use std::sync::Arc;

use eventbus_core::{Result, ScheduleStore};
use eventbus_sql::{SqliteConfig, SqliteSchedule};
use eventbus_testkit::{ScheduleHarness, schedule_store_conformance};

use crate::place::Place;

#[async_trait::async_trait]
impl ScheduleHarness for Place {
    async fn open(&self) -> Result<Arc<dyn ScheduleStore>> {
        let store = SqliteSchedule::connect(SqliteConfig::new(self.file("schedule.db"))).await?;
        Ok(Arc::new(store))
    }
}

schedule_store_conformance!(Place::new());
