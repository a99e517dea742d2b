//! A service's database, whichever it is: SQLite in a file or a schema of PostgreSQL.

use eventbus::prelude::{EventBus, Origin, Outgoing};
use eventbus::store::OutboxStore;
use eventbus::{
    PostgresConfig, PostgresOutbox, PostgresStore, PostgresTransaction, Relay, SqliteOutbox,
    SqliteStore, SqliteTransaction,
};
use sqlx::AssertSqlSafe;

use crate::child::patiently;
use crate::tried::Tried;

/// A service's database.
#[derive(Clone, Debug)]
pub enum Store {
    /// In a file.
    Sqlite(SqliteStore),
    /// In a schema; with the name of that which the campaign's own tables lie in.
    Postgres(PostgresStore, String),
}

impl Store {
    /// Connects to the database that a URL names, however long it is away.
    ///
    /// # Errors
    ///
    /// Those of connecting.
    pub async fn connect(url: &str) -> anyhow::Result<Self> {
        patiently(async || {
            if url.starts_with("sqlite:") {
                let config = eventbus::SqliteConfig::from_url(url)?;
                return Ok(Self::Sqlite(SqliteStore::connect(config).await?));
            }
            let schema = own_schema(&PostgresConfig::from_url(url)?.schema);
            Ok(Self::Postgres(PostgresStore::from_url(url).await?, schema))
        })
        .await
    }

    /// What requests write and publish through.
    #[must_use]
    pub fn outbox(&self, bus: &EventBus) -> Outbox {
        match self {
            Self::Sqlite(store) => Outbox::Sqlite(store.outbox(bus)),
            Self::Postgres(store, schema) => {
                Outbox::Postgres(store.outbox(bus), store.clone(), schema.clone())
            }
        }
    }

    /// How many messages wait for a relay.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub async fn waiting(&self) -> eventbus::Result<u64> {
        let depth = match self {
            Self::Sqlite(store) => store.depth().await?,
            Self::Postgres(store, _) => store.depth().await?,
        };
        Ok(depth.messages())
    }
}

/// An outbox of such a database.
#[derive(Clone, Debug)]
pub enum Outbox {
    /// In a file.
    Sqlite(SqliteOutbox),
    /// In a schema.
    Postgres(PostgresOutbox, PostgresStore, String),
}

impl Outbox {
    /// Begins a transaction.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub async fn begin(&self) -> eventbus::Result<Transaction> {
        Ok(match self {
            Self::Sqlite(outbox) => {
                Transaction::Sqlite(Box::new(outbox.begin(Origin::new()).await?))
            }
            Self::Postgres(outbox, _, schema) => {
                let transaction = outbox.begin(Origin::new()).await?;
                Transaction::Postgres(Box::new(transaction), schema.clone())
            }
        })
    }

    /// What publishes what was committed.
    pub fn relay(&self) -> Relay {
        match self {
            Self::Sqlite(outbox) => outbox.relay(),
            Self::Postgres(outbox, ..) => outbox.relay(),
        }
    }

    /// The parts that a transaction of the service's own is made of, where there may be such.
    #[must_use]
    pub fn by_hand(&self) -> Option<(&PostgresOutbox, &PostgresStore, &str)> {
        match self {
            Self::Sqlite(_) => None,
            Self::Postgres(outbox, store, schema) => Some((outbox, store, schema)),
        }
    }
}

/// A transaction that publishes.
#[derive(Debug)]
pub enum Transaction {
    /// In a file.
    Sqlite(Box<SqliteTransaction>),
    /// In a schema.
    Postgres(Box<PostgresTransaction>, String),
}

impl Transaction {
    /// Writes the row of a piece of business, and says whether it was not there yet.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub async fn write(&mut self, producer: u16, number: u64) -> sqlx::Result<bool> {
        let (producer, number) = (i64::from(producer), number.cast_signed());
        let rows = match self {
            Self::Sqlite(transaction) => {
                let query = sqlx::query(AssertSqlSafe(ordered("")));
                let query = query.bind(producer).bind(number);
                query.execute(&mut ***transaction).await?.rows_affected()
            }
            Self::Postgres(transaction, schema) => {
                let sql = AssertSqlSafe(ordered(&format!("{schema}.")));
                let query = sqlx::query(sql).bind(producer).bind(number);
                query.execute(&mut ***transaction).await?.rows_affected()
            }
        };
        Ok(rows == 1)
    }

    /// Adds an event.
    ///
    /// # Errors
    ///
    /// Those of writing it.
    pub fn publish(&mut self, event: Outgoing<Tried>) -> eventbus::Result<()> {
        match self {
            Self::Sqlite(transaction) => transaction.publish(event)?,
            Self::Postgres(transaction, _) => transaction.publish(event)?,
        };
        Ok(())
    }

    /// Commits.
    ///
    /// # Errors
    ///
    /// Those of the database; it may be committed all the same.
    pub async fn commit(self) -> eventbus::Result<()> {
        match self {
            Self::Sqlite(transaction) => transaction.commit().await,
            Self::Postgres(transaction, _) => transaction.commit().await,
        }
    }

    /// Rolls back.
    pub fn roll_back(self) {
        match self {
            Self::Sqlite(transaction) => transaction.roll_back(),
            Self::Postgres(transaction, _) => transaction.roll_back(),
        }
    }
}

/// Writes the row of a piece of business.
#[must_use]
pub fn ordered(schema: &str) -> String {
    format!("INSERT INTO {schema}orders (producer, number) VALUES ($1, $2) ON CONFLICT DO NOTHING")
}

/// The schema beside one of the SDK's, which takes no tables of others, for the campaign's own.
#[must_use]
pub fn own_schema(schema: &str) -> String {
    format!("{schema}_own")
}

/// The statements that make the campaign's own tables, and take none away.
#[must_use]
pub fn tables(schema: Option<&str>) -> String {
    let (create, schema, serial, bytes) = match schema {
        Some(schema) => (
            format!("CREATE SCHEMA IF NOT EXISTS {schema};"),
            format!("{schema}."),
            "BIGSERIAL PRIMARY KEY",
            "BYTEA",
        ),
        None => (
            String::new(),
            String::new(),
            "INTEGER PRIMARY KEY AUTOINCREMENT",
            "BLOB",
        ),
    };
    format!(
        "{create}
         CREATE TABLE IF NOT EXISTS {schema}orders (
             producer BIGINT NOT NULL, number BIGINT NOT NULL, PRIMARY KEY (producer, number));
         CREATE TABLE IF NOT EXISTS {schema}effects (
             position {serial}, consumers BIGINT NOT NULL, id {bytes} NOT NULL,
             key BIGINT NOT NULL, number BIGINT NOT NULL, attempt BIGINT NOT NULL);
         CREATE TABLE IF NOT EXISTS {schema}probes (
             number BIGINT NOT NULL, consumers BIGINT NOT NULL, key BIGINT NOT NULL);"
    )
}
