//! A service with its own data in the database, as the tests of its store see it.

use std::collections::BTreeMap;

use eventbus_core::{EventBus, MemoryBroker, OUTBOX_LANES, Origin, OutboxMessage, OutboxStore};
use eventbus_sql::{PostgresConfig, PostgresOutbox, PostgresStore, PostgresTransaction};
use sqlx::PgConnection;

use super::server::Server;

/// A service with a table of orders, and its outbox to a bus in memory.
pub(crate) struct Service {
    pub(crate) server: Server,
    pub(crate) bus: EventBus,
    pub(crate) store: PostgresStore,
    pub(crate) outbox: PostgresOutbox,
}

impl Service {
    pub(crate) async fn open() -> Self {
        Self::with(|config| config).await
    }

    /// One whose configuration differs.
    pub(crate) async fn with(change: impl FnOnce(PostgresConfig) -> PostgresConfig) -> Self {
        Self::on(Server::new().await, change).await
    }

    pub(crate) async fn on(
        server: Server,
        change: impl FnOnce(PostgresConfig) -> PostgresConfig,
    ) -> Self {
        let store = PostgresStore::connect(change(config(&server))).await;
        let store = store.expect("it connects");
        sqlx::raw_sql(
            "CREATE TABLE orders (number bigint PRIMARY KEY, version bigint NOT NULL DEFAULT 0);
             CREATE TABLE reserved (number bigint NOT NULL)",
        )
        .execute(store.pool())
        .await
        .expect("tables");
        let bus = EventBus::new(MemoryBroker::new());
        Self {
            outbox: store.outbox(&bus),
            server,
            bus,
            store,
        }
    }

    pub(crate) async fn begin(&self) -> PostgresTransaction {
        let begun = self.outbox.begin(Origin::new()).await;
        begun.expect("a transaction")
    }

    /// What is in the table of orders.
    pub(crate) async fn orders(&self) -> Vec<i64> {
        let orders = sqlx::query_scalar("SELECT number FROM orders ORDER BY number");
        orders.fetch_all(self.store.pool()).await.expect("it reads")
    }

    /// How often each order took effect.
    pub(crate) async fn reserved(&self) -> BTreeMap<i64, i64> {
        let sql = "SELECT number, count(*) FROM reserved GROUP BY number";
        let rows: Vec<(i64, i64)> = sqlx::query_as(sql)
            .fetch_all(self.store.pool())
            .await
            .expect("it reads");
        rows.into_iter().collect()
    }

    /// What waits in the outbox.
    pub(crate) async fn waiting(&self) -> Vec<OutboxMessage> {
        let lanes: Vec<u32> = (0..OUTBOX_LANES).collect();
        self.store
            .next(&lanes, 10_000, &[])
            .await
            .expect("it reads")
    }
}

/// The service's tables are found without naming their schema.
pub(crate) fn config(server: &Server) -> PostgresConfig {
    let mut config = server.config();
    config.connect = config.connect.options([("search_path", server.schema())]);
    config
}

pub(crate) async fn write(connection: &mut PgConnection, number: i64) -> sqlx::Result<()> {
    let order = sqlx::query("INSERT INTO orders (number) VALUES ($1)").bind(number);
    order.execute(connection).await.map(|_| ())
}
