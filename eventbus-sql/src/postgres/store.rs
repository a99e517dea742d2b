//! The store of a service: its own database, in which its writes, its duplicate check and what it
//! publishes commit together. What it does as a unit, an outbox and so on is in files of these names.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    Error, ErrorKind, EventBus, EventId, Group, LeaseReply, LeaseRequest, LeaseStore, MemberId,
    Message, Result,
};
use sqlx::{Connection, PgConnection, PgPool};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::config::PostgresConfig;
use super::database::Shared;
use super::leases::PostgresLeases;
use super::outbox::{self, Append, Floor};
use super::tables::Tables;
use super::transaction::PostgresOutbox;
use crate::wakes::Wakes;

/// A service's own PostgreSQL database: what a handler or a request writes there, the record that an
/// event was handled, and what is published commit together or not at all.
///
/// It keeps its tables in a schema of their own, `eventbus` unless another is named; the service's
/// are wherever its `search_path` says. Clones share connections, and so may any number of
/// processes share the database. Services that share one have a schema each, or the relays of one
/// publish what another has committed.
///
/// ```text
///  request ─▶ outbox.begin ──────┐ INSERT INTO orders …          ┐
///  handler ─▶ cx.transaction() ──┤ UPDATE stock … · inbox ───────┼─▶ one COMMIT ─▶ relay ─▶ broker
///  handler ─▶ cx.transaction() ──┘ what they publish · outbox ───┘
/// ```
///
/// # Contract
///
/// - **Transactions are PostgreSQL's**, of the isolation that `default_transaction_isolation` says, of
///   the server or of [`PostgresConfig::connect`]. Each has a connection for itself, at most [`PostgresConfig::connections`] at once; whoever comes
///   later waits for [`PostgresConfig::timeout`]. That is also the longest time of a statement and of
///   a transaction in which nothing happens: the server ends it then. `SET LOCAL` changes both; what is
///   set without `LOCAL` stays with the connection, for whoever has it next.
/// - **Nobody else commits it.** Where a `COMMIT` or `ROLLBACK` of somebody else's ended it, nothing is
///   published and the work has failed: an event is handled again. Transactions begun inside it (`connection.begin()`) are
///   savepoints.
/// - **Effects happen once.** The inbox of a consumer group holds the ids of the events it has
///   handled, for [`PostgresConfig::inbox_retention`]; they are inserted before the handler writes. Of
///   two replicas that handle one event at the same moment, the second waits for the first.
/// - **Order.** Of two transactions of which the second wrote when the first had committed, or had
///   waited for a lock of it, the first is published first. So write before you
///   [`append`](Self::append) by hand; the SDK's own transactions append at the end.
/// - **Nothing waits for a transaction that is open** but what it publishes itself. While one stays open
///   that has published, what others published and was removed meanwhile is passed over at each read:
///   after some hundred thousand events reading the outbox becomes slow until it ends.
///
/// # Examples
///
/// ```no_run
/// use eventbus_core::{BoxError, Context, EventBus, MemoryBroker, Origin};
/// use eventbus_sql::PostgresStore;
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
/// async fn reserve(order: OrderPlaced, mut cx: Context<(), PostgresStore>) -> Result<(), BoxError> {
///     sqlx::query("UPDATE stock SET free = free - 1").execute(cx.transaction().await?).await?;
///     Ok(())
/// }
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let bus = EventBus::new(MemoryBroker::new());
/// let store = PostgresStore::from_url("postgres://shop:secret@localhost/shop").await?;
/// let outbox = store.outbox(&bus);
///
/// let mut tx = outbox.begin(Origin::new()).await?;
/// sqlx::query("INSERT INTO orders (id) VALUES (42)").execute(&mut *tx).await?;
/// tx.publish(OrderPlaced { order_id: 42 })?;
/// tx.commit().await?;
///
/// let inventory = bus.consumer("inventory").unit(store).on(reserve).spawn().await?;
/// # inventory.shutdown().await?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct PostgresStore {
    pub(super) database: Shared,
    pub(super) appending: Arc<Appending>,
    pub(super) floor: Arc<Floor>,
    pub(super) group_max: usize,
    leases: PostgresLeases,
    /// The service's own connections: those that are lent would not let it begin transactions.
    pool: Arc<OnceLock<PgPool>>,
}

impl PostgresStore {
    /// Connects to the database that `url` names, see [`PostgresConfig::from_url`].
    ///
    /// # Errors
    ///
    /// Those of reading the url and of [`connect`](Self::connect).
    pub async fn from_url(url: &str) -> Result<Self> {
        Self::connect(PostgresConfig::from_url(url)?).await
    }

    /// Connects, and creates or updates the store's tables.
    ///
    /// # Errors
    ///
    /// As [`PostgresBroker::connect`](crate::PostgresBroker::connect).
    pub async fn connect(config: PostgresConfig) -> Result<Self> {
        Ok(Self::on(Shared::open(&config).await?))
    }

    pub(super) fn on(database: Shared) -> Self {
        Self {
            leases: PostgresLeases::new(database.clone(), Arc::default()),
            pool: Arc::default(),
            database,
            appending: Arc::default(),
            floor: Arc::default(),
            group_max: 1,
        }
    }

    /// What [`connect`](Self::connect) does to an empty database, as SQL: for a role that may create
    /// what the program's own may not. That one needs usage of the schema and all rights on its tables.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when it is no name for a schema.
    pub fn migrations(schema: &str) -> Result<String> {
        Ok(Tables::new(schema)?.script())
    }

    /// Sets the most events that one transaction of a unit holds, at least one. Of more than one
    /// the handlers run one after the other, in a transaction that is open from the first to the
    /// last: fast where they do nothing but write to this database.
    #[must_use]
    pub fn with_group_max(mut self, events: usize) -> Self {
        self.group_max = events.max(1);
        self
    }

    /// What requests write and publish through, to the broker of `bus`.
    #[must_use]
    pub fn outbox(&self, bus: &EventBus) -> PostgresOutbox {
        PostgresOutbox::new(self.clone(), bus.clone())
    }

    /// Connections of the service's own, for whatever else it asks its database; at most
    /// [`PostgresConfig::connections`] of them, too.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn pool(&self) -> &PgPool {
        self.pool.get_or_init(|| self.database.config.pool())
    }

    /// Appends messages, in order, in a transaction of somebody else's on the same database: they are
    /// published when it commits, some milliseconds later than those of the store's own transactions.
    ///
    /// [`PostgresOutbox::append`] does so with events.
    ///
    /// # Errors
    ///
    /// `InvalidInput` outside of a transaction of sqlx's: each row would be published whatever
    /// becomes of the rest. Otherwise those of the database; the transaction is to be rolled back then.
    pub async fn append(
        &self,
        connection: &mut PgConnection,
        messages: &[(EventId, Message)],
    ) -> Result<()> {
        if !connection.is_in_transaction() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                APPEND,
                "the connection is in no transaction, so this would not commit together with anything: use the connection of a transaction that sqlx's `begin` gave",
            ));
        }
        let tables = &self.database.tables;
        match outbox::append(tables, connection, messages, Append::Anywhere).await {
            Ok(_) => self.appending.expect(),
            Err(error) => return Err(self.database.error(APPEND, error)),
        }
        Ok(())
    }

    /// Tells relays, here and in other processes, that a transaction of this store added something.
    pub(super) fn appended(&self) {
        self.database.wakes.outbox_grew();
        self.database.bell.outbox();
    }
}

pub(super) const APPEND: &str = "append to outbox";

#[async_trait]
impl LeaseStore for PostgresStore {
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        self.leases.exchange(request).await
    }

    async fn leave(&self, group: &Group, member: MemberId) -> Result<()> {
        self.leases.leave(group, member).await
    }

    async fn changed(&self, group: &Group) {
        self.leases.changed(group).await;
    }
}

/// How often the outbox is looked at where nobody tells.
const LOOK: Duration = Duration::from_millis(250);
/// For how long, and how often at least, after a transaction of somebody else's has appended: when it
/// commits is not heard of.
const EXPECT: Duration = Duration::from_secs(2);
const EXPECT_LOOK: Duration = Duration::from_millis(20);

/// When something may have been appended.
#[derive(Debug, Default)]
pub(super) struct Appending {
    /// When somebody else's transaction appended last.
    expected: Mutex<Option<Instant>>,
    expecting: Notify,
}

impl Appending {
    /// Takes note of a transaction whose commit is not heard of.
    fn expect(&self) {
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.expecting.notify_waiters();
    }

    /// Waits until something may have been appended: looked at after 1, 2, 4 … 20 milliseconds where
    /// that is to be expected.
    pub(super) async fn wait(&self, wakes: &Wakes) {
        let _waiting = wakes.wait();
        let mut grew = wakes.outbox();
        // Before the time is read: what comes from now on is heard.
        let expecting = self.expecting.notified();
        let expected = *self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        let since = expected.map(|expected| expected.elapsed());
        let pause = since.filter(|since| *since < EXPECT).map_or(LOOK, |since| {
            since.clamp(Duration::from_millis(1), EXPECT_LOOK)
        });
        tokio::select! {
            // It ends with the database only, and then nothing is appended any more.
            _ = grew.changed() => {}
            () = expecting => {}
            () = sleep(pause) => {}
        }
    }
}
