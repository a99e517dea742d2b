//! Transactions of a service outside of its handlers, such as those of a web request.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use eventbus_core::{Event, EventBus, EventId, Origin, Outgoing, OutgoingBatch, Relay, Result};
use sqlx::PgConnection;

use super::lending::Loan;
use super::store::PostgresStore;

/// Begins transactions in a service's own database that publish to one bus.
#[derive(Clone, Debug)]
pub struct PostgresOutbox {
    store: PostgresStore,
    bus: EventBus,
}

impl PostgresOutbox {
    pub(super) fn new(store: PostgresStore, bus: EventBus) -> Self {
        Self { store, bus }
    }

    /// Begins a transaction whose events are part of the flow that `origin` describes.
    ///
    /// # Cancellation
    ///
    /// A dropped future leaves nothing behind.
    ///
    /// # Errors
    ///
    /// `Unavailable` when the server is away, or no connection was free within
    /// [`PostgresConfig::timeout`](crate::PostgresConfig::timeout); `Unsupported` inside a running
    /// handler, which has `cx.transaction()`.
    pub async fn begin(&self, origin: Origin) -> Result<PostgresTransaction> {
        let batch = self.bus.batch(origin)?;
        let lending = &self.store.database.lending;
        Ok(PostgresTransaction {
            loan: lending.borrow("begin transaction").await?,
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
    /// # use eventbus_sql::PostgresStore;
    /// # async fn example(bus: EventBus, store: PostgresStore) -> Result<()> {
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
    /// database: they are published when it commits, some milliseconds later than those of
    /// [`begin`](Self::begin). Write before you append, so that the order of what is published is that
    /// of what was written.
    ///
    /// # Errors
    ///
    /// As [`PostgresStore::append`].
    pub async fn append(&self, connection: &mut PgConnection, batch: OutgoingBatch) -> Result<()> {
        self.store.append(connection, &batch.into_messages()).await
    }
}

/// A transaction in a service's own database, and the events that it publishes; a connection by
/// `Deref`. Dropped, it is rolled back.
#[derive(Debug)]
#[must_use = "dropped, it is rolled back"]
pub struct PostgresTransaction {
    loan: Loan,
    batch: OutgoingBatch,
    store: PostgresStore,
}

impl PostgresTransaction {
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
    /// Nothing was committed, or, where the server was lost at this moment, it is unknown whether it
    /// was. Events with ids of the request's own ([`Outgoing::with_id`]) make it harmless to do
    /// it again. `InvalidInput`: what was written breaks a deferred constraint, a statement had failed
    /// before, or somebody else ended the transaction.
    pub async fn commit(self) -> Result<()> {
        let Self { loan, batch, store } = self;
        let messages = batch.into_messages();
        let tables = &store.database.tables;
        loan.keep("commit transaction", tables, &messages).await?;
        if !messages.is_empty() {
            store.appended();
        }
        Ok(())
    }

    /// Rolls back; so does dropping it.
    pub fn roll_back(self) {}
}

impl Deref for PostgresTransaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.loan.connection()
    }
}

impl DerefMut for PostgresTransaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.loan.connection_mut()
    }
}
