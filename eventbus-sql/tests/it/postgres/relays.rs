//! Two relays of which one stands still beyond its lease, or is killed, on PostgreSQL.

use eventbus_core::{BoxError, Consumer, Context, EventBus, Origin, OutboxStore, Result};
use eventbus_sql::{PostgresBroker, PostgresConfig, PostgresStore};

use super::server::Server;
use crate::events::Counted;
use crate::relays::{self, Ledger, survives_relays_that_stand_still};

/// Broker and store are one schema.
#[derive(Clone)]
struct SchemaLedger {
    url: String,
    bus: EventBus,
    store: PostgresStore,
}

impl SchemaLedger {
    /// The table of the consumer is looked for in `schema`.
    async fn open(url: &str, schema: &str) -> Self {
        let broker = PostgresBroker::from_url(url).await;
        let mut config = PostgresConfig::from_url(url).expect("a good url");
        config.connect = config.connect.options([("search_path", schema)]);
        let store = PostgresStore::connect(config).await;
        Self {
            url: url.to_owned(),
            bus: EventBus::new(broker.expect("it connects")),
            store: store.expect("it connects"),
        }
    }
}

impl Ledger for SchemaLedger {
    fn bus(&self) -> &EventBus {
        &self.bus
    }

    fn place(&self) -> String {
        self.url.clone()
    }

    async fn commit(&self, number: i64) -> Result<()> {
        let mut tx = self.store.outbox(&self.bus).begin(Origin::new()).await?;
        tx.publish(Counted { number })?;
        tx.commit().await
    }

    async fn consume(&self) -> Consumer {
        let consumer = self.bus.consumer("ledger").unit(self.store.clone());
        let consumer = consumer.on(record).spawn().await;
        consumer.expect("it starts")
    }

    async fn recorded(&self) -> Vec<i64> {
        let numbers = sqlx::query_scalar("SELECT number FROM recorded ORDER BY place");
        numbers
            .fetch_all(self.store.pool())
            .await
            .expect("it reads")
    }

    async fn waiting(&self) -> u64 {
        self.store.depth().await.expect("it counts").messages()
    }

    /// A relay that stands still inside a transaction holds rows that no other one needs for long.
    async fn is_writable(&self) -> bool {
        true
    }
}

async fn record(counted: Counted, mut cx: Context<(), PostgresStore>) -> Result<(), BoxError> {
    sqlx::query("INSERT INTO recorded (number) VALUES ($1)")
        .bind(counted.number)
        .execute(cx.transaction().await?)
        .await?;
    Ok(())
}

pub(crate) async fn relay(url: &str) {
    // It looks for no table but those of the store.
    let ledger = SchemaLedger::open(url, "public").await;
    relays::relay(&ledger.bus, ledger.store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn a_relay_that_stood_still_loses_nothing_and_repeats_its_batch_at_most() {
    let server = Server::new().await;
    let ledger = SchemaLedger::open(&server.url(), server.schema()).await;
    server
        .run("CREATE TABLE {s}.recorded (place bigserial PRIMARY KEY, number bigint)")
        .await;
    survives_relays_that_stand_still(ledger).await;
}
