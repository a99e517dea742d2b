//! The schedule in the database: messages that wait for their time, and who is at what is due.

mod due;
mod statements;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    Error, EventId, Refused, Result, ScheduleStore, Scheduled, ScheduledReport, TakeScheduled,
    Taken, Timestamp, Topic,
};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;
use tokio::time::timeout;

use super::config::SqliteConfig;
use super::database::Shared;
use super::error::into_error;
use super::headers::peek;
use due::{Writing, read_state};
use statements::{LIST, SELECT_STATE};

/// Keeps scheduled messages in an SQLite file, beside a broker or alone; clones share it.
///
/// What waits is on disk when that is acknowledged, and processes of the machine that open the same
/// file see one schedule. One of them that consumes from this file hears within a few milliseconds
/// of what another adds; each publishes what it added itself anyway.
#[derive(Clone, Debug)]
pub struct SqliteSchedule {
    database: Shared,
}

impl SqliteSchedule {
    /// Opens the file, and creates or updates the store's tables in it.
    ///
    /// # Errors
    ///
    /// As [`SqliteBroker::connect`](crate::SqliteBroker::connect).
    pub async fn connect(config: SqliteConfig) -> Result<Self> {
        Ok(Self::new(Shared::open(&config).await?))
    }

    pub(super) fn new(database: Shared) -> Self {
        Self { database }
    }

    /// Writes in the next commit.
    async fn write<T, F>(&self, operation: &'static str, work: F) -> Result<T>
    where
        T: Send + Sync + 'static,
        F: for<'c> Fn(Writing<'c>) -> BoxFuture<'c, Result<T>> + Send + Sync + 'static,
    {
        let tables = self.database.tables.clone();
        let work = Arc::new(work);
        let written = self.database.writer.run(operation, move |connection| {
            let (tables, work) = (tables.clone(), Arc::clone(&work));
            async move {
                let tables = &tables;
                work(Writing { tables, connection }).await
            }
            .boxed()
        });
        written.await
    }
}

#[async_trait]
impl ScheduleStore for SqliteSchedule {
    async fn add(&self, messages: &[Scheduled]) -> Result<()> {
        let messages = Arc::new(messages.to_vec());
        let earlier = self.write("schedule event", move |mut writing| {
            let messages = Arc::clone(&messages);
            async move { writing.add(&messages).await }.boxed()
        });
        if let Some(version) = earlier.await? {
            self.database.wakes.schedule_changed(version);
        }
        Ok(())
    }

    async fn cancel(&self, id: &EventId) -> Result<bool> {
        let id = id.clone();
        let cancelled = self.write("cancel scheduled message", move |mut writing| {
            let id = id.clone();
            async move { writing.cancel(&id).await }.boxed()
        });
        cancelled.await
    }

    async fn take(&self, request: &TakeScheduled) -> Result<Taken> {
        let operation = "take scheduled messages";
        let query = sqlx::query(self.database.sql(SELECT_STATE)).bind(request.now.as_micros());
        let rows = self.database.read(operation, query).await?;
        let state = rows.first().map(|row| read_state(row, request));
        let (taken, is_free) = state.transpose()?.unwrap_or_default();
        // Mostly nothing is due: then nothing is written, and nobody waits for the writer.
        if !is_free {
            return Ok(taken);
        }
        let request = request.clone();
        let taken = self.write(operation, move |mut writing| {
            let request = request.clone();
            async move { writing.take(&request).await }.boxed()
        });
        taken.await
    }

    async fn done(&self, claim: u64, published: &[EventId], refused: &Refused) -> Result<()> {
        let reported = Arc::new((published.to_vec(), refused.clone()));
        let done = self.write("report published messages", move |mut writing| {
            let reported = Arc::clone(&reported);
            async move {
                let (published, refused) = &*reported;
                writing.done(claim, published, refused).await
            }
            .boxed()
        });
        done.await
    }

    async fn list(
        &self,
        after: Option<&ScheduledReport>,
        reports_max: usize,
    ) -> Result<Vec<ScheduledReport>> {
        let query = sqlx::query(self.database.sql(LIST))
            .bind(after.map_or(i64::MIN, |after| after.due.as_micros()))
            .bind(after.map_or(0, |after| after.number as i64))
            .bind(i64::try_from(reports_max).unwrap_or(i64::MAX));
        let rows = self.database.read("list scheduled messages", query).await?;
        rows.iter().map(read_report).collect()
    }

    async fn changed(&self, seen: u64) {
        // Does not have the file looked at: mostly, whoever adds something sees to it by itself.
        let mut version = self.database.wakes.schedule();
        let newer = version.wait_for(|version| *version > seen as i64);
        // It is over either way: the time, or the wait.
        let _ = timeout(LOOK, newer).await;
    }
}

/// How often the schedule is looked at for what processes left that ended.
const LOOK: Duration = Duration::from_secs(5);

/// Reads a row of `LIST`: without its payload, so that its checksum is left to whoever takes it.
fn read_report(row: &SqliteRow) -> Result<ScheduledReport> {
    let number: i64 = row.try_get(0).map_err(native)?;
    let (id, topic): (String, String) = (
        row.try_get(1).map_err(native)?,
        row.try_get(2).map_err(native)?,
    );
    let due = Timestamp::from_micros(row.try_get(3).map_err(native)?);
    let is_taken: bool = row.try_get(4).map_err(native)?;
    let head: Vec<u8> = row.try_get(5).map_err(native)?;
    let payload: i64 = row.try_get(6).map_err(native)?;
    let message = peek(&Topic::new(&topic)?, head.into());
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
