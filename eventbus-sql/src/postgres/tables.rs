//! The names of the broker's tables, put into SQL in this one place, and bringing them up to date.

use eventbus_core::{Error, ErrorKind, Result};
use sqlx::{AssertSqlSafe, Row, SqlSafeStr, SqlStr};

use super::database::Database;
use super::session::Session;

/// What brings an older version to the next, in order.
const MIGRATIONS: [&str; 4] = [
    include_str!("../../migrations/postgres/0001_log.sql"),
    include_str!("../../migrations/postgres/0002_held_keys.sql"),
    include_str!("../../migrations/postgres/0003_schedule.sql"),
    include_str!("../../migrations/postgres/0004_unit_of_work.sql"),
];

const CREATE_SCHEMA: &str = "CREATE SCHEMA IF NOT EXISTS {s}";
const CREATE_VERSION: &str = "
    CREATE TABLE {s}.version (version integer NOT NULL);
    INSERT INTO {s}.version VALUES (0)";

/// Microseconds on the clock of the database, now and not when the transaction began.
const NOW: &str = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint";

/// What a schema may be called.
pub(super) const SCHEMA_RULE: &str = "a schema has a lower case letter, then up to 39 lower case letters, digits and underscores, and does not begin with pg_";

/// Writes SQL for tables of one schema.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    schema: String,
    /// As it stands in SQL: a word that means something to PostgreSQL needs the quotes.
    quoted: String,
}

impl Tables {
    pub(super) fn new(schema: &str) -> Result<Self> {
        if !is_schema(schema) {
            let error = Error::new(ErrorKind::InvalidInput, "open database", SCHEMA_RULE);
            return Err(error.with("schema", schema));
        }
        Ok(Self {
            schema: schema.to_owned(),
            quoted: format!("\"{schema}\""),
        })
    }

    pub(super) fn schema(&self) -> &str {
        &self.schema
    }

    /// What its notifications are called.
    pub(super) fn channel(&self) -> String {
        format!("eventbus_{}", self.schema)
    }

    /// Puts the schema in for `{s}`, and the present time for `{now}`.
    pub(super) fn sql(&self, text: &str) -> SqlStr {
        // Safe: the text is the crate's own, and the name of the schema was checked.
        AssertSqlSafe(self.text(text)).into_sql_str()
    }

    fn text(&self, text: &str) -> String {
        text.replace("{s}", &self.quoted).replace("{now}", NOW)
    }

    /// All of it, for a role that may create what the program's own may not.
    pub(super) fn script(&self) -> String {
        let newest = MIGRATIONS.len();
        let mut parts = vec!["BEGIN".to_owned(), CREATE_SCHEMA.to_owned()];
        parts.push(CREATE_VERSION.trim().to_owned());
        parts.extend(MIGRATIONS.map(|part| part.trim().trim_end_matches(';').to_owned()));
        parts.push(format!("UPDATE {{s}}.version SET version = {newest}"));
        parts.push("COMMIT;\n".to_owned());
        self.text(&parts.join(";\n\n"))
    }
}

/// Whether a name needs no more than quotes.
pub(super) fn is_schema(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    let begins = name.starts_with(|first: char| first.is_ascii_lowercase());
    begins && name.bytes().all(plain) && name.len() <= 40 && !name.starts_with("pg_")
}

impl Database {
    /// Creates the tables or brings them up to date, if they are not; then the role needs the right
    /// to do so. Whoever opens at the same time waits.
    pub(super) async fn migrate(&self) -> Result<()> {
        let mut session = self.session(OPEN).await?;
        let version = self.version(&mut session).await?;
        session.end();
        if version == Some(MIGRATIONS.len()) {
            return Ok(());
        }
        let mut session = self.begin(OPEN).await?;
        let lock = sqlx::query("SELECT pg_advisory_xact_lock(hashtext($1))");
        session.rows(lock.bind(self.tables.channel())).await?;
        // Somebody else may have done it meanwhile.
        let version = match self.version(&mut session).await? {
            Some(version) => version,
            None => self.create(&mut session).await?,
        };
        for migration in MIGRATIONS.iter().skip(version) {
            session.run(self.tables.sql(migration)).await?;
        }
        let newest = MIGRATIONS.len() as i32;
        let update = sqlx::query(self.tables.sql("UPDATE {s}.version SET version = $1"));
        session.rows(update.bind(newest)).await?;
        session.commit().await
    }

    /// Creates the schema and its table of versions; the version is 0 then.
    async fn create(&self, session: &mut Session) -> Result<usize> {
        let schema = sqlx::query("SELECT 1 FROM pg_namespace WHERE nspname = $1");
        let schema = session.rows(schema.bind(self.tables.schema())).await?;
        if schema.is_empty() {
            session.run(self.tables.sql(CREATE_SCHEMA)).await?;
        }
        let taken = session.rows(sqlx::query(FIND_TABLES).bind(self.tables.schema()));
        if let Some(row) = taken.await?.first() {
            let taken: String = session.column(row, 0)?;
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                OPEN,
                "the schema has tables that are not the broker's: choose another `schema`",
            )
            .with("schema", self.tables.schema())
            .with("table", taken));
        }
        session.run(self.tables.sql(CREATE_VERSION)).await?;
        Ok(0)
    }

    /// The version of the tables; `None` when there are none.
    async fn version(&self, session: &mut Session) -> Result<Option<usize>> {
        let found = session.rows(sqlx::query(FIND_VERSION).bind(self.tables.schema()));
        if found.await?.is_empty() {
            return Ok(None);
        }
        let rows = session.rows(sqlx::query(
            self.tables.sql("SELECT version FROM {s}.version"),
        ));
        let rows = rows.await?;
        let version = rows.first().and_then(|row| row.try_get::<i32, _>(0).ok());
        let version = version.and_then(|version| usize::try_from(version).ok());
        match version {
            Some(version) if version <= MIGRATIONS.len() => Ok(Some(version)),
            Some(version) => Err(self.version_error(
                ErrorKind::Unsupported,
                format!("its tables are of version {version}, this program knows up to {}: use a newer version of the program", MIGRATIONS.len()),
            )),
            None => Err(self.version_error(
                ErrorKind::AlreadyExists,
                "the schema's table `version` is not the broker's: choose another `schema`".to_owned(),
            )),
        }
    }

    fn version_error(&self, kind: ErrorKind, message: String) -> Error {
        Error::new(kind, OPEN, message).with("schema", self.tables.schema())
    }
}

const OPEN: &str = "open database";

/// Asks the tables of the catalogue. `to_regclass` asks a cache, which after the wait for a lock does
/// not know yet what was created meanwhile.
const FIND_VERSION: &str = "
    SELECT 1 FROM pg_class JOIN pg_namespace AS space ON space.oid = relnamespace
    WHERE nspname = $1 AND relname = 'version'";

/// Tables that are there already, in an existing schema without versions.
const FIND_TABLES: &str = "
    SELECT relname::text FROM pg_class JOIN pg_namespace AS space ON space.oid = relnamespace
    WHERE nspname = $1 AND relkind IN ('r', 'p', 'v', 'm', 'f') LIMIT 1";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_is_a_plain_name() {
        for good in ["eventbus", "a", "bus_2", "order"] {
            assert!(Tables::new(good).is_ok(), "{good}");
        }
        let long = "a".repeat(41);
        for bad in [
            "", "1a", "_a", "a-b", "a b", "A", "a\"", "\u{e4}", "pg_x", &long,
        ] {
            let error = Tables::new(bad).expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn every_statement_names_the_schema() {
        let script = Tables::new("shop").expect("a good name").script();
        assert!(!script.contains("{s}"), "{script}");
        for part in script.split("CREATE TABLE ").skip(1) {
            assert!(part.starts_with("\"shop\"."), "{part}");
        }
        assert!(script.contains("UPDATE \"shop\".version SET version = 4;"));
    }
}
