//! The suite that every schedule passes.

use std::sync::Arc;

use eventbus_core::{Result, ScheduleStore};
use eventbus_sql::PostgresSchedule;
use eventbus_testkit::{ScheduleHarness, schedule_store_conformance};

use super::server::Server;

#[async_trait::async_trait]
impl ScheduleHarness for Server {
    async fn open(&self) -> Result<Arc<dyn ScheduleStore>> {
        Ok(Arc::new(PostgresSchedule::connect(self.config()).await?))
    }
}

schedule_store_conformance!(
    #[ignore = "needs brokers: ./dev/test"]
    Server::new().await
);
