//! The connections with which the SDK itself reads a file. A pool of sqlx's asks a connection after
//! each use whether it is still there: for a short statement that is half of its time.

use std::sync::{Mutex, PoisonError};

use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions, SqliteRow};
use sqlx::{ConnectOptions, Executor, Sqlite, SqliteConnection};
use tokio::sync::Semaphore;

/// A few connections that are opened when they are needed and kept.
#[derive(Debug)]
pub(super) struct Readers {
    options: SqliteConnectOptions,
    /// As many as may read at a time.
    places: Semaphore,
    idle: Mutex<Vec<SqliteConnection>>,
}

impl Readers {
    pub(super) fn new(options: SqliteConnectOptions, most: usize) -> Self {
        Self {
            options,
            places: Semaphore::new(most),
            idle: Mutex::new(Vec::with_capacity(most)),
        }
    }

    /// Runs one statement. A connection whose statement failed, or whose future was dropped, is
    /// closed.
    pub(super) async fn fetch_all(
        &self,
        query: sqlx::query::Query<'_, Sqlite, SqliteArguments>,
    ) -> sqlx::Result<Vec<SqliteRow>> {
        let (place, mut connection) = self.take().await?;
        let rows = query.fetch_all(&mut connection).await?;
        self.give_back(connection);
        drop(place);
        Ok(rows)
    }

    /// Runs one statement for its first row.
    pub(super) async fn fetch_first(
        &self,
        query: sqlx::query::Query<'_, Sqlite, SqliteArguments>,
    ) -> sqlx::Result<Option<SqliteRow>> {
        let (place, mut connection) = self.take().await?;
        let row = connection.fetch_optional(query).await?;
        self.give_back(connection);
        drop(place);
        Ok(row)
    }

    async fn take(&self) -> sqlx::Result<(tokio::sync::SemaphorePermit<'_>, SqliteConnection)> {
        let place = self.places.acquire().await;
        let place = place.map_err(|_| sqlx::Error::PoolClosed)?;
        let idle = self.lock().pop();
        let connection = match idle {
            Some(connection) => connection,
            None => self.options.connect().await?,
        };
        Ok((place, connection))
    }

    fn give_back(&self, connection: SqliteConnection) {
        self.lock().push(connection);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<SqliteConnection>> {
        // It is pushed to and popped from, so it is whole.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
