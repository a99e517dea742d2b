//! The store of a service: its own database, in which its writes, its duplicate check and what it
//! publishes commit together. What it does as a unit, an outbox and so on is in files of these names.

use std::path::PathBuf;

use eventbus_core::{Error, ErrorKind, EventBus, EventId, Message, Result};
use sqlx::{Connection, SqliteConnection, SqlitePool};

use super::config::SqliteConfig;
use super::database::Shared;
use super::outbox;
use super::transaction::SqliteOutbox;

/// A service's own database in an SQLite file: what a handler or a request writes there, the record
/// that an event was handled, and what is published commit together or not at all.
///
/// It keeps its tables beside those of the service. Clones share the file, and so does a
/// [`SqliteBroker`](crate::SqliteBroker) on it, which is better on a file of its own: publishing and
/// settling would wait while a handler writes.
///
/// ```text
///  request ─▶ outbox.begin ──────┐ INSERT INTO orders …          ┐
///  handler ─▶ cx.transaction() ──┤ UPDATE stock … · inbox ───────┼─▶ one COMMIT ─▶ relay ─▶ broker
///  handler ─▶ cx.transaction() ──┘ what they publish · outbox ───┘
/// ```
///
/// # Contract
///
/// - **One writes at a time**, as SQLite has it. Whoever opens a transaction has the connection for
///   itself until it ends; those that come meanwhile follow, and several share a commit. Open it
///   late, and wait for nobody else while it is open: what takes longer than
///   [`SqliteConfig::transaction_limit`] of real time is given up, its statement interrupted. The file
///   stays locked until whoever holds it lets go: the log says who.
/// - **Nothing on the same file inside of it.** Publishing, scheduling, cancelling or beginning
///   another transaction on this file waits for the one that is open: whoever waits for that while
///   holding it waits until the limit, and fails. `cx.publish` and
///   [`SqliteTransaction::publish`](crate::SqliteTransaction::publish) do not wait.
/// - **Nobody else commits it.** A `COMMIT` or `ROLLBACK` while the connection is lent undoes all
///   work that shares the commit, and each piece is told to be done again. Transactions begun inside
///   it (`connection.begin()`) are savepoints.
/// - **Effects happen once.** The inbox of a consumer group holds the ids of the events it has
///   handled, for [`SqliteConfig::inbox_retention`]; they are inserted before the handler writes.
/// - **Order.** What commits first is published first.
///
/// # Examples
///
/// ```
/// use eventbus_core::{BoxError, Context, EventBus, MemoryBroker, Origin};
/// use eventbus_sql::SqliteStore;
/// # use eventbus_core::{Event, Json, Key, Topic, unknown_version};
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Serialize, Deserialize)]
/// # struct OrderPlaced { order_id: i64 }
/// # impl Event for OrderPlaced {
/// #     const TYPE: &'static str = "OrderPlaced";
/// #     const TOPIC: Topic = Topic::from_static("order-events");
/// #     const VERSION: u32 = 1;
/// #     type Codec = Json;
/// #     fn key(&self) -> Option<Key> { Some(Key::display(self.order_id)) }
/// #     fn upcast(version: u32, _: &[u8]) -> eventbus_core::Result<Self> { Err(unknown_version::<Self>(version)) }
/// # }
///
/// async fn reserve(order: OrderPlaced, mut cx: Context<(), SqliteStore>) -> Result<(), BoxError> {
///     sqlx::query("UPDATE stock SET free = free - 1").execute(cx.transaction().await?).await?;
///     Ok(())
/// }
///
/// # let directory = std::env::temp_dir().join(format!("eventbus-store-doc-{}", std::process::id()));
/// # std::fs::create_dir_all(&directory).unwrap();
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// # let file = directory.join("orders.db");
/// let bus = EventBus::new(MemoryBroker::new());
/// let store = SqliteStore::open(file).await?;
/// let outbox = store.outbox(&bus);
///
/// let mut tx = outbox.begin(Origin::new()).await?;
/// sqlx::query("CREATE TABLE stock (free INTEGER)").execute(&mut *tx).await?;
/// tx.publish(OrderPlaced { order_id: 42 })?;
/// tx.commit().await?;
///
/// let inventory = bus.consumer("inventory").unit(store).on(reserve).spawn().await?;
/// # inventory.shutdown().await?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # }).unwrap();
/// # std::fs::remove_dir_all(&directory).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct SqliteStore {
    pub(super) database: Shared,
    pub(super) group_max: usize,
}

impl SqliteStore {
    /// Opens the file with the defaults of [`SqliteConfig::new`].
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub async fn open(path: impl Into<PathBuf>) -> Result<Self> {
        Self::connect(SqliteConfig::new(path)).await
    }

    /// Opens the file, and creates or updates the store's tables in it.
    ///
    /// # Errors
    ///
    /// As [`SqliteBroker::connect`](crate::SqliteBroker::connect).
    pub async fn connect(config: SqliteConfig) -> Result<Self> {
        Ok(Self::on(Shared::open(&config).await?))
    }

    pub(super) fn on(database: Shared) -> Self {
        Self {
            database,
            group_max: 1,
        }
    }

    /// Sets the most events that one transaction of a unit holds, at least one. Of more than one
    /// the handlers run one after the other, in a transaction that is open from the first to the
    /// last: fast where they do nothing but write to this file.
    #[must_use]
    pub fn with_group_max(mut self, events: usize) -> Self {
        self.group_max = events.max(1);
        self
    }

    /// What requests write and publish through, to the broker of `bus`.
    #[must_use]
    pub fn outbox(&self, bus: &EventBus) -> SqliteOutbox {
        SqliteOutbox::new(self.clone(), bus.clone())
    }

    /// Connections of the service's own that see what is committed and cannot write; at most four at
    /// a time.
    pub fn readers(&self) -> &SqlitePool {
        &self.database.readers
    }

    /// Appends messages, in order, in a transaction of somebody else's on the same file: they are
    /// published when it commits.
    ///
    /// [`SqliteOutbox::append`] does so with events.
    ///
    /// # Errors
    ///
    /// `InvalidInput` outside of a transaction of sqlx's: each row would be published whatever
    /// becomes of the rest. Otherwise those of the file; the transaction is to be rolled back then.
    pub async fn append(
        &self,
        connection: &mut SqliteConnection,
        messages: &[(EventId, Message)],
    ) -> Result<()> {
        if !connection.is_in_transaction() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                APPEND,
                "the connection is in no transaction, so this would not commit together with anything: use the connection of a transaction that sqlx's `begin` gave",
            ));
        }
        let (tables, now) = (&self.database.tables, self.database.now());
        match outbox::append(tables, connection, messages, now).await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.database.error(APPEND, error)),
        }
    }
}

pub(super) const APPEND: &str = "append to outbox";
