//! The names of the broker's tables, put into SQL in this one place, and bringing them up to date.

use eventbus_core::{Error, ErrorKind, Result};
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row, SqlSafeStr, SqlStr, SqliteConnection};

use super::error::into_error;

/// What brings an older version to the next, in order.
const MIGRATIONS: [&str; 4] = [
    include_str!("../../migrations/sqlite/0001_log.sql"),
    include_str!("../../migrations/sqlite/0002_held_keys.sql"),
    include_str!("../../migrations/sqlite/0003_schedule.sql"),
    include_str!("../../migrations/sqlite/0004_unit_of_work.sql"),
];

const PREFIX_RULE: &str = "a prefix has a letter, then up to 31 letters, digits and underscores, and does not begin with sqlite_";

/// Writes SQL for tables of one prefix.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    prefix: String,
}

impl Tables {
    pub(super) fn new(prefix: &str) -> Result<Self> {
        Self::check_prefix(prefix).map_err(|reason| {
            Error::new(ErrorKind::InvalidInput, "open database", reason).with("prefix", prefix)
        })?;
        Ok(Self {
            prefix: prefix.to_owned(),
        })
    }

    /// Whether names that begin like this need no quotes and mean nothing to SQLite.
    pub(super) fn check_prefix(prefix: &str) -> Result<(), &'static str> {
        let letter = prefix.starts_with(|first: char| first.is_ascii_alphabetic());
        let name = prefix
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let reserved = prefix.to_ascii_lowercase().starts_with("sqlite_");
        if letter && name && !reserved && prefix.len() <= 32 {
            return Ok(());
        }
        Err(PREFIX_RULE)
    }

    /// Puts the prefix in for `{p}`.
    ///
    /// No text has a `LIMIT` that is a parameter and nothing else: SQLite plans by its value, so it
    /// would compile the statement anew each time. `LIMIT ?1 + 0` is planned once.
    pub(super) fn sql(&self, text: &str) -> SqlStr {
        // Safe: the text is the crate's own, and the prefix was checked.
        AssertSqlSafe(text.replace("{p}", &self.prefix)).into_sql_str()
    }

    /// Inserts so many messages.
    pub(super) fn insert_messages(&self, rows: usize) -> SqlStr {
        let mut text = String::with_capacity(64 + rows * 8);
        text.push_str("INSERT INTO {p}messages (id, head, payload) VALUES ");
        for row in 0..rows {
            text.push_str(if row == 0 { "(?,?,?)" } else { ",(?,?,?)" });
        }
        self.sql(&text)
    }

    /// Creates the tables or brings them up to date. Whoever opens at the same time waits; the
    /// tables of others are not touched.
    pub(super) async fn migrate(&self, connection: &mut SqliteConnection) -> Result<()> {
        // At once for writing, so that a file that cannot be written is found here.
        execute(
            "open database",
            connection,
            "BEGIN IMMEDIATE".into_sql_str(),
        )
        .await?;
        let migrated = self.migrate_in_transaction(connection).await;
        let end = if migrated.is_ok() {
            "COMMIT"
        } else {
            "ROLLBACK"
        };
        let ended = execute("open database", connection, end.into_sql_str()).await;
        migrated.and(ended)
    }

    async fn migrate_in_transaction(&self, connection: &mut SqliteConnection) -> Result<()> {
        check_encoding(connection).await?;
        let version = self.version(connection).await?;
        let newest = MIGRATIONS.len();
        if version > newest {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "open database",
                format!("its tables are of version {version}, this program knows up to {newest}: use a newer version of the program"),
            )
            .with("prefix", &self.prefix));
        }
        for migration in &MIGRATIONS[version..] {
            self.run(connection, migration).await?;
        }
        if version < newest {
            self.run(connection, "DELETE FROM {p}schema").await?;
            let insert = format!("INSERT INTO {{p}}schema (version) VALUES ({newest})");
            self.run(connection, &insert).await?;
        }
        Ok(())
    }

    /// The version of the tables; zero, and an empty table of versions, when there are none.
    async fn version(&self, connection: &mut SqliteConnection) -> Result<usize> {
        // An underscore in a pattern stands for any character, so names are compared by their start.
        let present = sqlx::query("SELECT name FROM sqlite_schema WHERE type = 'table' AND lower(substr(name, 1, length(?1))) = lower(?1)")
            .bind(&self.prefix)
            .fetch_all(&mut *connection)
            .await
            .map_err(|error| into_error("open database", error))?;
        let names = present.iter().map(|row| row.try_get(0));
        let names = names.collect::<sqlx::Result<Vec<String>>>();
        let names = names.map_err(|error| into_error("open database", error))?;
        let is_ours = |name: &str| {
            let full = format!("{}{name}", self.prefix);
            names.iter().any(|found| found.eq_ignore_ascii_case(&full))
        };
        if !is_ours("schema") {
            if let Some(taken) = TABLES.iter().find(|name| is_ours(name)) {
                return Err(Error::new(
                    ErrorKind::AlreadyExists,
                    "open database",
                    "a table of this name is there that is not the broker's: choose another `prefix`",
                )
                .with("table", format_args!("{}{taken}", self.prefix)));
            }
            self.run(
                connection,
                "CREATE TABLE {p}schema (version INTEGER NOT NULL)",
            )
            .await?;
            return Ok(0);
        }
        let rows = sqlx::query(self.sql("SELECT version FROM {p}schema"))
            .fetch_all(connection)
            .await
            .map_err(|error| into_error("open database", error))?;
        let version = rows.first().and_then(version_in);
        version.ok_or_else(|| {
            Error::new(
                ErrorKind::Codec,
                "open database",
                "the table of versions holds none: the file is damaged, restore it from a copy",
            )
            .with("table", format_args!("{}schema", self.prefix))
        })
    }

    async fn run(&self, connection: &mut SqliteConnection, text: &str) -> Result<()> {
        execute("open database", connection, self.sql(text)).await
    }
}

/// Pages are read as one text of bytes, which only UTF-8 leaves as they are.
async fn check_encoding(connection: &mut SqliteConnection) -> Result<()> {
    let row = sqlx::query("PRAGMA encoding").fetch_one(connection).await;
    let encoding: String = row
        .and_then(|row| row.try_get(0))
        .map_err(|error| into_error("open database", error))?;
    if encoding == "UTF-8" {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        "open database",
        "the file was created with another text encoding than UTF-8: use another file",
    )
    .with("encoding", encoding))
}

fn version_in(row: &SqliteRow) -> Option<usize> {
    let version: i64 = row.try_get(0).ok()?;
    usize::try_from(version).ok()
}

const TABLES: [&str; 14] = [
    "topics",
    "lanes",
    "messages",
    "consumer_groups",
    "cursors",
    "members",
    "claims",
    "held_names",
    "held_messages",
    "scheduled",
    "schedule",
    "outbox",
    "inbox",
    "leases",
];

/// Runs statements that answer nothing.
pub(super) async fn execute(
    operation: &'static str,
    connection: &mut SqliteConnection,
    sql: SqlStr,
) -> Result<()> {
    let ran = sqlx::raw_sql(sql).execute(connection).await;
    ran.map(|_| ())
        .map_err(|error| into_error(operation, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_a_plain_name() {
        for good in ["eventbus_", "a", "Bus2_"] {
            assert!(Tables::new(good).is_ok(), "{good}");
        }
        let long = "a".repeat(33);
        for bad in [
            "", "1a", "_a", "a-b", "a b", "a;", "\u{e4}", "sqlite_x", "SQLITE_", &long,
        ] {
            let error = Tables::new(bad).expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn no_statement_is_compiled_anew_for_its_limit() {
        let texts = [
            include_str!("page.rs"),
            include_str!("outbox.rs"),
            include_str!("inbox.rs"),
            include_str!("groups.rs"),
            include_str!("janitor.rs"),
            include_str!("admin.rs"),
            include_str!("topics.rs"),
            include_str!("key_state/statements.rs"),
            include_str!("schedule/statements.rs"),
        ];
        for text in texts {
            for limit in text.split("LIMIT ?").skip(1) {
                let rest = limit.trim_start_matches(|digit: char| digit.is_ascii_digit());
                assert!(rest.starts_with(" + 0"), "LIMIT ?{limit:.40}");
            }
        }
    }

    #[test]
    fn every_table_that_is_created_is_known() {
        for (number, migration) in MIGRATIONS.iter().enumerate() {
            for part in migration.split("CREATE TABLE {p}").skip(1) {
                let name = part.split_whitespace().next().expect("a name");
                assert!(TABLES.contains(&name), "{name} of migration {}", number + 1);
            }
        }
    }
}
