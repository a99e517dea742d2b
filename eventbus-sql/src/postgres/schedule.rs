//! The schedule in the database: messages that wait for their time, and who is at what is due.

mod due;
mod statements;

use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    Error, EventId, Refused, Result, ScheduleStore, Scheduled, ScheduledReport, TakeScheduled,
    Taken, Timestamp,
};
use sqlx::Row;
use sqlx::postgres::PgRow;
use tokio::time::timeout;

use super::config::PostgresConfig;
use super::database::Shared;
use super::error::into_error;
use due::{Writing, message_head, read_state};
use statements::{LIST, SELECT_STATE};

/// Keeps scheduled messages in a PostgreSQL database, beside a broker or alone; clones share it.
///
/// What waits is on disk when that is acknowledged, and all processes see one schedule. Claims of
/// what is due last by the clock of the database.
#[derive(Clone, Debug)]
pub struct PostgresSchedule {
    database: Shared,
}

impl PostgresSchedule {
    /// Connects, and creates or updates the store's tables.
    ///
    /// # Errors
    ///
    /// As [`PostgresBroker::connect`](crate::PostgresBroker::connect).
    pub async fn connect(config: PostgresConfig) -> Result<Self> {
        Ok(Self::new(Shared::open(&config).await?))
    }

    pub(super) fn new(database: Shared) -> Self {
        Self { database }
    }
}

const TAKE: &str = "take scheduled messages";
const LIST_MESSAGES: &str = "list scheduled messages";

#[async_trait]
impl ScheduleStore for PostgresSchedule {
    async fn add(&self, messages: &[Scheduled]) -> Result<()> {
        let mut writing = Writing::begin(&self.database, "schedule event").await?;
        let earlier = writing.add(messages).await?;
        writing.session.commit().await?;
        if let Some(version) = earlier {
            self.database.wakes.schedule_changed(version);
            self.database.bell.schedule(version);
        }
        Ok(())
    }

    async fn cancel(&self, id: &EventId) -> Result<bool> {
        let mut writing = Writing::begin(&self.database, "cancel scheduled message").await?;
        let cancelled = writing.cancel(id).await?;
        writing.session.commit().await?;
        Ok(cancelled)
    }

    async fn take(&self, request: &TakeScheduled) -> Result<Taken> {
        let sql = self.database.tables.sql(SELECT_STATE);
        let now = request.now.as_micros();
        let rows = self
            .database
            .query(TAKE, || sqlx::query(sql.clone()).bind(now));
        let rows = rows.await?;
        let state = rows.first().map(|row| read_state(row, request));
        let (taken, is_free) = state.transpose()?.unwrap_or_default();
        // Mostly nothing is due: then nothing is locked.
        if !is_free {
            return Ok(taken);
        }
        let mut writing = Writing::begin(&self.database, TAKE).await?;
        let taken = writing.take(request).await?;
        writing.session.commit().await?;
        Ok(taken)
    }

    async fn done(&self, claim: u64, published: &[EventId], refused: &Refused) -> Result<()> {
        let mut writing = Writing::begin(&self.database, "report published messages").await?;
        writing.done(claim, published, refused).await?;
        writing.session.commit().await
    }

    async fn list(
        &self,
        after: Option<&ScheduledReport>,
        reports_max: usize,
    ) -> Result<Vec<ScheduledReport>> {
        let sql = self.database.tables.sql(LIST);
        let reports_max = i64::try_from(reports_max).unwrap_or(i64::MAX);
        let rows = self.database.query(LIST_MESSAGES, || {
            sqlx::query(sql.clone())
                .bind(after.map_or(i64::MIN, |after| after.due.as_micros()))
                .bind(after.map_or(0, |after| after.number as i64))
                .bind(reports_max)
        });
        let rows = rows.await?;
        rows.iter().map(read_report).collect()
    }

    async fn changed(&self, seen: u64) {
        let _waiting = self.database.wakes.wait();
        let mut version = self.database.wakes.schedule();
        let newer = version.wait_for(|version| *version > seen as i64);
        // It is over either way: the time, or the wait.
        let _ = timeout(LOOK, newer).await;
    }
}

/// How often the schedule is looked at for what processes left that ended.
const LOOK: Duration = Duration::from_secs(5);

/// Reads a row of `LIST`: without its payload.
fn read_report(row: &PgRow) -> Result<ScheduledReport> {
    let number: i64 = row.try_get(0).map_err(native)?;
    let (id, topic): (String, String) = (
        row.try_get(1).map_err(native)?,
        row.try_get(2).map_err(native)?,
    );
    let due = Timestamp::from_micros(row.try_get(3).map_err(native)?);
    let is_taken: bool = row.try_get(4).map_err(native)?;
    let headers: &[u8] = row.try_get(6).map_err(native)?;
    let payload: i64 = row.try_get(7).map_err(native)?;
    let message = message_head(&topic, row.try_get(5).map_err(native)?, headers)?;
    let bytes = message.size() + usize::try_from(payload).unwrap_or(0);
    let scheduled = Scheduled::new(EventId::parse(&id)?, due, message);
    let report = ScheduledReport::new(number as u64, &scheduled).with_bytes(bytes);
    Ok(match is_taken {
        true => report.with_taken(),
        false => report,
    })
}

fn native(error: sqlx::Error) -> Error {
    into_error("keep scheduled messages", error)
}
