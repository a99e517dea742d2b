//! Where the services have their databases: an SQLite file each in the data directory, or a schema each
//! in one PostgreSQL database.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use eventbus::{PostgresConfig, PostgresStore, SqliteStore};
use sqlx::{AssertSqlSafe, ConnectOptions as _};

use crate::database::{Database, Tables};

/// What a URL leaves out: what the schemas' names begin with, and few enough connections for six
/// services on a server that allows a hundred.
const POSTGRES_DEFAULTS: &str = "schema=shop&connections=5";
/// What belongs to the bus, and to no service.
const BUS: &str = "bus";
/// A schema's name is `<prefix>_<service>`, of at most 40 characters.
const PREFIX_MAX: usize = 40 - "_notification".len();

/// Which databases the services have.
#[derive(Args, Clone, Debug)]
pub struct StoreArgs {
    /// What each service keeps its own data in, inbox and outbox included: `sqlite`, a file each in
    /// the data directory, or `postgres://USER:PASSWORD@HOST:PORT/DATABASE`, a schema each there.
    /// The schemas are called `shop_order` and so on; with `?schema=blue` they are `blue_order` …,
    /// so that several shops have room in one database
    #[arg(long, value_name = "sqlite|URL", default_value = "sqlite")]
    pub store: String,
}

/// Where the services have their databases.
#[derive(Clone, Debug)]
pub enum Databases {
    /// A file each in this directory.
    Files(PathBuf),
    /// A schema each, whose name begins with the one that is configured.
    Schemas(Box<PostgresConfig>),
}

impl StoreArgs {
    /// Where the databases are that the user named.
    ///
    /// # Errors
    ///
    /// When it is neither `sqlite` nor a good URL of PostgreSQL.
    pub fn databases(&self, data: &Path) -> anyhow::Result<Databases> {
        let store = self.store.as_str();
        if store == "sqlite" {
            return Ok(Databases::Files(data.to_owned()));
        }
        if !store.starts_with("postgres://") && !store.starts_with("postgresql://") {
            // What stands behind the scheme of a URL may be a password.
            let shown = store.split_once("://").map_or(store, |(scheme, _)| scheme);
            bail!(
                "`--store` is `sqlite`, for a file per service in the data directory, or \
                 `postgres://USER:PASSWORD@HOST:PORT/DATABASE`, for a schema per service there, \
                 and not `{shown}`"
            );
        }
        // Of an option that is given twice the second counts.
        let (address, options) = self.parts();
        let url = format!("{address}?{POSTGRES_DEFAULTS}&{options}");
        let config = PostgresConfig::from_url(&url).context("read `--store`")?;
        let prefix = &config.schema;
        ensure!(
            prefix.len() <= PREFIX_MAX,
            "the schemas of `--store` are called `{prefix}_gateway` and so on: choose a `schema` of \
             at most {PREFIX_MAX} characters"
        );
        Ok(Databases::Schemas(Box::new(config)))
    }

    /// The same with schemas that nobody has used yet; files are in a directory of their own anyway.
    ///
    /// # Errors
    ///
    /// As [`databases`](Self::databases).
    pub fn fresh(&self) -> anyhow::Result<Self> {
        let Databases::Schemas(config) = self.databases(Path::new(""))? else {
            return Ok(self.clone());
        };
        let prefix = format!("{}_{:06x}", config.schema, fastrand::u32(0..1 << 24));
        let (address, options) = self.parts();
        let store = format!("{address}?{options}&schema={prefix}");
        Ok(Self { store })
    }

    /// Where the bus keeps what its broker cannot: beside the services' databases.
    pub fn of_bus(&self, data: &Path) -> String {
        let (address, options) = self.parts();
        match self.databases(data) {
            Ok(Databases::Schemas(config)) => {
                let schema = format!("{}_{BUS}", config.schema);
                format!("{address}?{POSTGRES_DEFAULTS}&{options}&schema={schema}")
            }
            _ => format!("sqlite://{}", file_of(data, BUS).display()),
        }
    }

    fn parts(&self) -> (&str, &str) {
        self.store.split_once('?').unwrap_or((&self.store, ""))
    }
}

impl Databases {
    /// Opens the database of a service, and brings its tables up to date.
    ///
    /// # Errors
    ///
    /// When it is away, of a later version, or not to be written.
    pub async fn open(&self, service: &str, tables: &Tables) -> anyhow::Result<Database> {
        let database = self.connect(service).await?;
        let updated = match self {
            Self::Files(data) => tables.update_file(&file_of(data, service)).await,
            Self::Schemas(config) => {
                let connect = in_schema(config, service).connect;
                tables.update_schema(&connect).await
            }
        };
        updated.with_context(|| self.opening(service))?;
        Ok(database)
    }

    /// Opens the database of a service as it is.
    ///
    /// # Errors
    ///
    /// When it is away.
    pub async fn connect(&self, service: &str) -> anyhow::Result<Database> {
        let opened = match self {
            Self::Files(data) => {
                let store = SqliteStore::open(file_of(data, service)).await;
                store.map(Database::Sqlite)
            }
            Self::Schemas(config) => {
                let store = PostgresStore::connect(in_schema(config, service)).await;
                store.map(Database::Postgres)
            }
        };
        opened.with_context(|| self.opening(service))
    }

    /// How many events a service handles at a time, if that is for the database to say: more handlers
    /// than connections would only wait for one, and requests behind them.
    pub fn handlers_max(&self) -> Option<usize> {
        match self {
            Self::Files(_) => None,
            Self::Schemas(config) => Some(config.connections.saturating_sub(1).max(1) as usize),
        }
    }

    /// Removes the schemas of these services and of the bus; files go with their directory.
    ///
    /// # Errors
    ///
    /// When the server does not do so.
    pub async fn remove(&self, services: impl IntoIterator<Item = &str>) -> anyhow::Result<()> {
        let Self::Schemas(config) = self else {
            return Ok(());
        };
        let connected = config.connect.connect().await;
        let mut connection = connected.context("connect to the database given with `--store`")?;
        for service in services.into_iter().chain([BUS]) {
            let schema = in_schema(config, service).schema;
            // The configuration has none but plain names.
            let drop = AssertSqlSafe(format!("DROP SCHEMA IF EXISTS \"{schema}\" CASCADE"));
            let dropped = sqlx::raw_sql(drop).execute(&mut connection).await;
            dropped.with_context(|| format!("drop the schema {schema}"))?;
        }
        Ok(())
    }

    fn opening(&self, service: &str) -> String {
        let place = match self {
            Self::Files(data) => file_of(data, service).display().to_string(),
            Self::Schemas(config) => format!("the schema {}", in_schema(config, service).schema),
        };
        format!("open {place}, the data of the {service} service")
    }
}

impl fmt::Display for Databases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files(data) => write!(f, "the files in {}", data.display()),
            Self::Schemas(config) => write!(f, "the schemas {}_…", config.schema),
        }
    }
}

fn file_of(data: &Path, service: &str) -> PathBuf {
    data.join(format!("{service}.db"))
}

/// The service finds its own tables, which are beside the store's, without naming their schema.
fn in_schema(config: &PostgresConfig, service: &str) -> PostgresConfig {
    let schema = format!("{}_{service}", config.schema);
    let mut config = config.clone();
    config.connect = config.connect.options([("search_path", &schema)]);
    config.with_schema(schema)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::sample::{TestData, on_each_store};

    impl StoreArgs {
        fn of(store: &str) -> Self {
            let store = store.to_owned();
            Self { store }
        }
    }

    #[test]
    fn a_store_is_named_or_refused_without_showing_a_password() {
        let data = Path::new("data");
        let named = |store: &str| StoreArgs::of(store).databases(data);
        assert!(matches!(named("sqlite"), Ok(Databases::Files(at)) if at == data));
        for (store, prefix, connections) in [
            ("postgres://me:secret@db/shop", "shop", 5),
            ("postgresql://db/shop?schema=blue&connections=9", "blue", 9),
        ] {
            let Ok(Databases::Schemas(config)) = named(store) else {
                panic!("{store} is a store");
            };
            assert_eq!((&*config.schema, config.connections), (prefix, connections));
            assert_eq!(
                in_schema(&config, "order").schema,
                format!("{prefix}_order")
            );
        }
        let refused = [
            ("mysql://me:secret@db/shop", "postgres://USER"),
            ("postgres", "postgres://USER"),
            ("", "`sqlite`"),
            ("postgres://me:secret@db/shop?colour=red", "schema"),
            ("postgres://me:secret@db/shop?schema=Blue", "lower case"),
            (
                "postgres://db/shop?schema=a_prefix_that_is_rather_long",
                "27 characters",
            ),
        ];
        for (store, hint) in refused {
            let error = format!("{:#}", named(store).expect_err(store));
            assert!(error.contains(hint), "{error}");
            assert!(error.contains("--store"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn fresh_schemas_fit_their_longest_name() {
        let store = format!("postgres://db/shop?schema={}", "a".repeat(20));
        let fresh = StoreArgs::of(&store).fresh().unwrap();
        let config = match fresh.databases(Path::new("")) {
            Ok(Databases::Schemas(config)) => config,
            other => panic!("a URL of PostgreSQL, and not {other:?}"),
        };
        assert!(in_schema(&config, "notification").schema.len() <= 40);
    }

    on_each_store!(a_database_of_a_later_program_is_refused,);

    async fn a_database_of_a_later_program_is_refused(data: TestData) {
        let notes = Tables {
            sqlite: &["CREATE TABLE notes (note TEXT) STRICT"],
            postgres: &["CREATE TABLE notes (note text)"],
        };
        let older = Tables {
            sqlite: &[],
            postgres: &[],
        };
        let databases = data.databases();
        drop(databases.open("order", &notes).await.unwrap());
        drop(databases.open("order", &notes).await.unwrap());
        let error = databases.open("order", &older).await.unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("order") && text.contains("version 1"),
            "{text}"
        );
    }
}
