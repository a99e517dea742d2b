//! Transactions of a service outside of its handlers, such as those of a web request.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use eventbus_core::{Event, EventBus, EventId, Origin, Outgoing, OutgoingBatch, Relay, Result};
use sqlx::SqliteConnection;
use tracing::trace;

use super::lending::Loan;
use super::outbox;
use super::store::{APPEND, SqliteStore};

/// Begins transactions in a service's own database that publish to one bus.
#[derive(Clone, Debug)]
pub struct SqliteOutbox {
    store: SqliteStore,
    bus: EventBus,
}

impl SqliteOutbox {
    pub(super) fn new(store: SqliteStore, bus: EventBus) -> Self {
        Self { store, bus }
    }

    /// Begins a transaction whose events are part of the flow that `origin` describes. Waits for
    /// those that were begun before.
    ///
    /// # Cancellation
    ///
    /// A dropped future leaves nothing behind.
    ///
    /// # Errors
    ///
    /// `Unavailable` when another process holds the file for longer than
    /// [`SqliteConfig::busy_timeout`](crate::SqliteConfig::busy_timeout) or its disk is full;
    /// `Unsupported` inside a running handler, which has `cx.transaction()`.
    pub async fn begin(&self, origin: Origin) -> Result<SqliteTransaction> {
        let batch = self.bus.batch(origin)?;
        let writer = &self.store.database.writer;
        let loan = writer.borrow("begin transaction", "a request".to_owned());
        Ok(SqliteTransaction {
            loan: loan.await?,
            batch,
            store: self.store.clone(),
        })
    }

    /// What publishes the events that were committed, and removes them; every process of the service
    /// may run one.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use eventbus_core::{EventBus, Result};
    /// # use eventbus_sql::SqliteStore;
    /// # async fn example(bus: EventBus, store: SqliteStore) -> Result<()> {
    /// let relay = store.outbox(&bus).relay();
    /// bus.service("orders")
    ///     .background("relay", |stop| relay.run_until(stop))
    ///     .run_until(async { /* until a signal comes */ })
    ///     .await
    /// # }
    /// ```
    pub fn relay(&self) -> Relay {
        Relay::new(&self.bus, Arc::new(self.store.clone()))
    }

    /// Appends events, made by [`EventBus::batch`], in a transaction of somebody else's on the same
    /// file: they are published when it commits, some milliseconds later than those of
    /// [`begin`](Self::begin).
    ///
    /// # Errors
    ///
    /// As [`SqliteStore::append`].
    pub async fn append(
        &self,
        connection: &mut SqliteConnection,
        batch: OutgoingBatch,
    ) -> Result<()> {
        self.store.append(connection, &batch.into_messages()).await
    }
}

/// A transaction in a service's own database, and the events that it publishes; a connection by
/// `Deref`. Dropped, it is rolled back.
///
/// Nobody else writes to the file until it ends, a bus or a schedule on the same file included: to
/// wait meanwhile for what they write, such as `bus.publish`, `bus.cancel` or another `begin`, is to
/// wait for oneself, until [`SqliteConfig::transaction_limit`](crate::SqliteConfig::transaction_limit).
#[derive(Debug)]
#[must_use = "dropped, it is rolled back"]
pub struct SqliteTransaction {
    loan: Loan,
    batch: OutgoingBatch,
    /// Keeps the file open.
    store: SqliteStore,
}

impl SqliteTransaction {
    /// Adds an event to be published when the transaction has committed, and returns its id.
    ///
    /// # Errors
    ///
    /// As [`OutgoingBatch::publish`].
    pub fn publish<E: Event>(&mut self, event: impl Into<Outgoing<E>>) -> Result<EventId> {
        self.batch.publish(event)
    }

    /// Commits what was written together with the events, and resolves when it is on disk.
    ///
    /// # Cancellation
    ///
    /// A dropped future leaves the outcome unknown.
    ///
    /// # Errors
    ///
    /// Nothing was committed, or it is unknown whether it was: a disk that fails at this moment may
    /// have it. Events with ids of the request's own ([`Outgoing::with_id`]) make it harmless to do
    /// it again. `InvalidInput`: what was written breaks a deferred constraint.
    pub async fn commit(self) -> Result<()> {
        let Self {
            mut loan,
            batch,
            store,
        } = self;
        let (tables, now) = (&store.database.tables, store.database.now());
        let messages = batch.into_messages();
        trace!(target: "eventbus::step", step = "unit.outbox.before");
        let appended = outbox::append(tables, loan.connection_mut(), &messages, now).await;
        let appended = appended.map_err(|error| store.database.error(APPEND, error))?;
        trace!(target: "eventbus::step", step = "unit.outbox.after");
        trace!(target: "eventbus::step", step = "unit.commit.before");
        loan.keep("commit transaction", appended).await?;
        trace!(target: "eventbus::step", step = "unit.commit.after");
        Ok(())
    }

    /// Rolls back; so does dropping it.
    pub fn roll_back(self) {}
}

impl Deref for SqliteTransaction {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        self.loan.connection()
    }
}

impl DerefMut for SqliteTransaction {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        self.loan.connection_mut()
    }
}
