//! The databases of the services, an SQLite file or a PostgreSQL schema each, and how a service writes
//! to its own. What is written, is the business of the services; that it happens once, and is
//! published when it is committed, is the business of the SDK's stores.
//!
//! A team whose service has one database needs none of this: it names the store, as in
//! `Context<(), PostgresStore>`, and writes through the connection of sqlx that `cx.transaction()`
//! lends. The shop runs on either, with the same services.

use eventbus::prelude::{BoxError, Context, Event, EventBus, Origin, Outgoing};
use eventbus::store::OutboxStore as _;
use eventbus::{
    EventId, PostgresOutbox, PostgresStore, PostgresTransaction, Relay, SqliteOutbox, SqliteStore,
    SqliteTransaction,
};

mod statement;
mod tables;
mod unit;

pub use statement::{Tx, sql};
pub use tables::Tables;

/// A service's own database.
#[derive(Clone, Debug)]
pub enum Database {
    /// A file.
    Sqlite(SqliteStore),
    /// A schema.
    Postgres(PostgresStore),
}

/// Begins transactions that are no handler's, such as those of a web request.
#[derive(Clone, Debug)]
pub enum Outbox {
    /// In a file.
    Sqlite(SqliteOutbox),
    /// In a schema.
    Postgres(PostgresOutbox),
}

/// Such a transaction. Dropped, it is rolled back.
#[derive(Debug)]
pub enum Transaction {
    /// In a file.
    Sqlite(SqliteTransaction),
    /// In a schema.
    Postgres(PostgresTransaction),
}

/// An event that a service handled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handled {
    /// The event's key.
    pub key: String,
    /// Its type.
    pub event_type: String,
    /// Its id.
    pub event_id: String,
}

/// Opens the transaction in which an event is handled, and notes it in the journal.
///
/// # Errors
///
/// Those of [`Context::transaction`], and of the database.
pub async fn handling<'c, E: Event + Sync, S: Send + Sync>(
    event: &E,
    cx: &'c mut Context<S, Database>,
) -> Result<Tx<'c>, BoxError> {
    let (key, id) = (event.key(), cx.id().to_string());
    let mut tx = cx.transaction().await?.tx().await?;
    sql("INSERT INTO handled (key, event_type, event_id) VALUES ($1, $2, $3)")
        .bind(key.map(|key| key.to_string()).unwrap_or_default())
        .bind(E::TYPE)
        .bind(id)
        .execute(&mut tx)
        .await?;
    Ok(tx)
}

impl Database {
    /// What requests write and publish through.
    pub fn outbox(&self, bus: &EventBus) -> Outbox {
        match self {
            Self::Sqlite(store) => Outbox::Sqlite(store.outbox(bus)),
            Self::Postgres(store) => Outbox::Postgres(store.outbox(bus)),
        }
    }

    /// How many events are committed and not published.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn unpublished(&self) -> eventbus::Result<u64> {
        let depth = match self {
            Self::Sqlite(store) => store.depth().await?,
            Self::Postgres(store) => store.depth().await?,
        };
        Ok(depth.lanes.iter().map(|(_, messages)| messages).sum())
    }

    /// What the service handled, in the order in which it was committed.
    ///
    /// # Errors
    ///
    /// When the database cannot be read.
    pub async fn journal(&self) -> sqlx::Result<Vec<Handled>> {
        let rows: Vec<(String, String, String)> =
            sql("SELECT key, event_type, event_id FROM handled ORDER BY sequence")
                .fetch_all(self)
                .await?;
        let rows = rows.into_iter();
        Ok(rows
            .map(|(key, event_type, event_id)| Handled {
                key,
                event_type,
                event_id,
            })
            .collect())
    }
}

impl Outbox {
    /// Begins a transaction whose events are part of the flow that `origin` describes.
    ///
    /// # Errors
    ///
    /// When the database is away.
    pub async fn begin(&self, origin: Origin) -> eventbus::Result<Transaction> {
        Ok(match self {
            Self::Sqlite(outbox) => Transaction::Sqlite(outbox.begin(origin).await?),
            Self::Postgres(outbox) => Transaction::Postgres(outbox.begin(origin).await?),
        })
    }

    /// What publishes the events that were committed.
    pub fn relay(&self) -> Relay {
        match self {
            Self::Sqlite(outbox) => outbox.relay(),
            Self::Postgres(outbox) => outbox.relay(),
        }
    }
}

impl Transaction {
    /// What is written through.
    pub fn tx(&mut self) -> Tx<'_> {
        match self {
            Self::Sqlite(transaction) => Tx::Sqlite(transaction),
            Self::Postgres(transaction) => Tx::Postgres(transaction),
        }
    }

    /// Adds an event to be published when the transaction has committed.
    ///
    /// # Errors
    ///
    /// When it cannot be written down.
    pub fn publish<E: Event>(
        &mut self,
        event: impl Into<Outgoing<E>>,
    ) -> eventbus::Result<EventId> {
        match self {
            Self::Sqlite(transaction) => transaction.publish(event),
            Self::Postgres(transaction) => transaction.publish(event),
        }
    }

    /// Commits what was written together with the events.
    ///
    /// # Errors
    ///
    /// Nothing was committed, or it is unknown whether it was.
    pub async fn commit(self) -> eventbus::Result<()> {
        match self {
            Self::Sqlite(transaction) => transaction.commit().await,
            Self::Postgres(transaction) => transaction.commit().await,
        }
    }
}
