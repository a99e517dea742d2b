//! Where the things of one round are: its broker, its outbox, and the effects of each group.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use eventbus::TopicSpec;
use eventbus::broker::AdminRequest;
use eventbus_testkit::FaultProxy;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, PgConnection};

use crate::product::Product;
use crate::recorded::BrokerArgs;
use crate::store::{self, own_schema};
use crate::tried::TOPIC;

mod kafka;
pub mod rabbitmq;
mod redis;

/// How many partitions the tried topic has.
pub const PARTITIONS: u32 = 8;
/// How long a member that says nothing keeps what it has. A store that does not answer within a third
/// of it counts as away, and so it has to do on a machine with more processes than processors.
pub const LEASE: Duration = Duration::from_secs(5);

/// On what everything runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ground {
    /// Files in a directory of the round's own.
    Sqlite,
    /// Schemas of the round's own, on the server with this URL.
    Postgres(String),
    /// Topics and groups of the round's own, on the broker with this URL. What it does not keep, held
    /// keys and effects, lies in files of the round's directory.
    Broker(Product, String),
    /// The same, on a broker that the campaign starts, so that it may be harmed.
    Own(Product),
}

impl Ground {
    /// Reads what `--broker` says.
    ///
    /// # Errors
    ///
    /// For a broker that cannot be tried like this; it says why.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let own = |product: &Product| text == product.command();
        if let Some(product) = Product::ALL.into_iter().find(own) {
            return Ok(Self::Own(product));
        }
        let scheme = text.split(':').next().unwrap_or_default();
        if let Some(product) = Product::ALL.into_iter().find(|it| it.scheme() == scheme) {
            ensure!(
                !text.contains(','),
                "the fault proxy stands before one broker: name one"
            );
            return Ok(Self::Broker(product, text.to_owned()));
        }
        match scheme {
            "sqlite" => Ok(Self::Sqlite),
            "postgres" | "postgresql" => Ok(Self::Postgres(text.to_owned())),
            "memory" => anyhow::bail!(
                "memory: lives within one process and ends with it, so that there is nothing to kill: \
                 its faults are tried by TestBus::with_faults, see docs/guide/verify-your-own.md"
            ),
            _ => anyhow::bail!(
                "write sqlite, kafka, redis, rabbitmq, postgres://USER:PASSWORD@HOST:PORT/DATABASE, kafka://HOST:PORT, \
                 redis://:PASSWORD@HOST:PORT, or amqp://USER:PASSWORD@HOST:PORT/VHOST"
            ),
        }
    }

    /// How it is called in the report.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sqlite => "SQLite",
            Self::Postgres(_) => "PostgreSQL",
            Self::Broker(product, _) | Self::Own(product) => product.name(),
        }
    }

    /// What names it on a command line, on whichever machine, without a password.
    #[must_use]
    pub fn as_said(&self) -> String {
        match self {
            Self::Sqlite => "sqlite".to_owned(),
            Self::Postgres(_) => "\"$EVENTBUS_TEST_POSTGRES\"".to_owned(),
            Self::Broker(product, _) => format!("\"${}\"", product.variable()),
            Self::Own(product) => product.command().to_owned(),
        }
    }

    /// Which message broker it is, if it is one and no database.
    #[must_use]
    pub fn product(&self) -> Option<Product> {
        match self {
            Self::Sqlite | Self::Postgres(_) => None,
            Self::Broker(product, _) | Self::Own(product) => Some(*product),
        }
    }

    /// Whether it is a server, which processes reach over a wire.
    #[must_use]
    pub fn has_wire(&self) -> bool {
        *self != Self::Sqlite
    }

    /// The address of the server, if there is one.
    #[must_use]
    pub fn address(&self) -> Option<String> {
        let (url, port) = match self {
            Self::Postgres(url) => (url, 5432),
            Self::Broker(product, url) => (url, product.port()),
            Self::Sqlite | Self::Own(_) => return None,
        };
        let rest = url.split("://").nth(1)?;
        let rest = rest.split(['/', '?']).next()?;
        let address = rest.rsplit('@').next()?;
        Some(match address.contains(':') {
            true => address.to_owned(),
            false => format!("{address}:{port}"),
        })
    }
}

/// Where the things of one round are.
#[derive(Clone, Debug)]
pub struct Site {
    base: Ground,
    directory: PathBuf,
    /// What the round's schemas, topics and groups begin with.
    prefix: String,
}

impl Site {
    /// A place of its own for a round, on files in a directory or in schemas with a prefix.
    #[must_use]
    pub fn new(base: &Ground, directory: &Path, prefix: &str) -> Self {
        Self {
            base: base.clone(),
            directory: directory.to_owned(),
            prefix: prefix.to_owned(),
        }
    }

    /// The same place, reached through a proxy.
    ///
    /// # Errors
    ///
    /// When there is no wire to it.
    pub fn through(&self, proxy: &FaultProxy) -> anyhow::Result<Self> {
        let there = |url: &str| proxy.url(url).context("a server has an address");
        let base = match &self.base {
            Ground::Postgres(url) => Ground::Postgres(there(url)?),
            Ground::Broker(product, url) => Ground::Broker(*product, there(url)?),
            Ground::Sqlite | Ground::Own(_) => anyhow::bail!("there is no wire to a file"),
        };
        Ok(Self {
            base,
            ..self.clone()
        })
    }

    /// The broker.
    #[must_use]
    pub fn broker(&self) -> BrokerArgs {
        let Ground::Broker(product, url) = &self.base else {
            let url = format!("{}&partitions={PARTITIONS}", self.url("bus"));
            return BrokerArgs::new(url);
        };
        let and = if url.contains('?') { '&' } else { '?' };
        let lease = match product {
            Product::Kafka => "session_timeout",
            Product::Redis => "lease",
            Product::RabbitMq => "heartbeat",
        };
        let seconds = LEASE.as_secs();
        BrokerArgs::new(format!("{url}{and}{lease}={seconds}s"))
            .with_prefix(&self.prefix)
            .with_held(self.url("held"))
    }

    /// The outbox of the service that appends.
    #[must_use]
    pub fn store(&self) -> String {
        self.url("store")
    }

    /// The inbox and the effects of a group.
    #[must_use]
    pub fn effects(&self, group: u16) -> String {
        self.url(&format!("group_{group}"))
    }

    fn url(&self, part: &str) -> String {
        let lease = LEASE.as_secs();
        match &self.base {
            Ground::Sqlite | Ground::Broker(..) | Ground::Own(_) => {
                format!("sqlite://{}?lease={lease}s", self.file(part).display())
            }
            Ground::Postgres(url) => {
                let and = if url.contains('?') { '&' } else { '?' };
                let schema = self.schema(part);
                format!("{url}{and}schema={schema}&lease={lease}s&connections=6")
            }
        }
    }

    /// The file of a part, where it is one.
    #[must_use]
    pub fn file(&self, part: &str) -> PathBuf {
        self.directory.join(format!("{part}.db"))
    }

    fn schema(&self, part: &str) -> String {
        format!("{}_{part}", self.prefix)
    }

    /// Makes the campaign's own tables, and the tried topic where a broker has to be told of it.
    ///
    /// # Errors
    ///
    /// Those of database and broker.
    pub async fn prepare(&self, groups: &[u16]) -> anyhow::Result<()> {
        if let Ground::Broker(product, _) = &self.base {
            self.make_topic(*product, groups).await?;
        }
        let groups = groups.iter().map(|group| format!("group_{group}"));
        for part in groups.chain(["store".to_owned()]) {
            match &self.base {
                Ground::Sqlite | Ground::Broker(..) | Ground::Own(_) => {
                    let file = SqliteConnectOptions::new().filename(self.file(&part));
                    let file = file
                        .create_if_missing(true)
                        .journal_mode(SqliteJournalMode::Wal);
                    let mut connection = file.connect().await?;
                    let tables = AssertSqlSafe(store::tables(None));
                    sqlx::raw_sql(tables).execute(&mut connection).await?;
                    connection.close().await?;
                }
                Ground::Postgres(url) => {
                    let tables = store::tables(Some(&own_schema(&self.schema(&part))));
                    run(url, &tables).await?;
                }
            }
        }
        Ok(())
    }

    async fn make_topic(&self, product: Product, groups: &[u16]) -> anyhow::Result<()> {
        let broker = self.broker().connect().await?;
        let topic = TopicSpec::new(TOPIC).with_partitions(PARTITIONS);
        broker.admin(AdminRequest::ApplyTopics(vec![topic])).await?;
        if product == Product::RabbitMq {
            rabbitmq::make_groups(&*broker, groups).await?;
        }
        broker.close().await?;
        Ok(())
    }

    /// The database of a group's effects, for whoever reads them.
    ///
    /// # Errors
    ///
    /// Those of connecting.
    pub async fn reader(&self, group: u16) -> anyhow::Result<Reader> {
        let part = format!("group_{group}");
        Ok(match &self.base {
            Ground::Sqlite | Ground::Broker(..) | Ground::Own(_) => {
                let file = SqliteConnectOptions::new().filename(self.file(&part));
                let pool = sqlx::sqlite::SqlitePoolOptions::new().max_connections(1);
                let file = file.busy_timeout(Duration::from_secs(30));
                Reader::Sqlite(pool.connect_with(file).await?)
            }
            Ground::Postgres(url) => {
                let pool = sqlx::postgres::PgPoolOptions::new().max_connections(1);
                Reader::Postgres(pool.connect(url).await?, own_schema(&self.schema(&part)))
            }
        })
    }

    /// Removes what is not in the round's directory.
    ///
    /// # Errors
    ///
    /// Those of database and broker.
    pub async fn remove(&self, groups: &[u16]) -> anyhow::Result<()> {
        let url = match &self.base {
            Ground::Postgres(url) => url,
            Ground::Broker(product, url) => {
                let prefix = &self.prefix;
                return match product {
                    Product::Kafka => kafka::remove(url, prefix).await,
                    Product::Redis => redis::remove(url, prefix).await,
                    Product::RabbitMq => rabbitmq::remove(url, prefix, groups).await,
                };
            }
            Ground::Sqlite | Ground::Own(_) => return Ok(()),
        };
        let groups = groups.iter().map(|group| format!("group_{group}"));
        for part in groups.chain(["store".to_owned(), "bus".to_owned()]) {
            let schema = self.schema(&part);
            for schema in [own_schema(&schema), schema] {
                run(url, &format!("DROP SCHEMA IF EXISTS {schema} CASCADE")).await?;
            }
        }
        Ok(())
    }
}

/// A database of effects that is read.
#[derive(Clone, Debug)]
pub enum Reader {
    /// A file.
    Sqlite(sqlx::SqlitePool),
    /// A schema.
    Postgres(sqlx::PgPool, String),
}

async fn run(url: &str, sql: &str) -> anyhow::Result<()> {
    let mut connection = PgConnection::connect(url).await?;
    let sql = AssertSqlSafe(sql.to_owned());
    sqlx::raw_sql(sql).execute(&mut connection).await?;
    connection.close().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Ground;

    #[test]
    fn the_address_of_a_server_is_found_in_its_url() {
        for (url, address) in [
            ("postgres://a:b@host:5433/shop", "host:5433"),
            ("postgres://host?x=/y", "host:5432"),
            ("kafka://host?x=y", "host:9092"),
            ("kafka://a:b@host:9093", "host:9093"),
            ("redis://:b@host", "host:6379"),
            ("amqp://a:b@host/%2f", "host:5672"),
        ] {
            let base = Ground::parse(url).expect("a URL");
            assert_eq!(base.address().as_deref(), Some(address));
        }
    }

    #[test]
    fn a_broker_that_nothing_outlives_is_refused() {
        let refused = Ground::parse("memory:").expect_err("there is nothing to kill");
        assert!(refused.to_string().contains("TestBus"), "{refused}");
    }
}
