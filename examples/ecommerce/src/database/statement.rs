//! Statements that both databases understand: parameters are `$1`, `$2` and so on.

use serde::Serialize;
use serde_json::Value as JsonValue;
use sqlx::encode::Encode;
use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use sqlx::types::{Json, Type};
use sqlx::{
    Arguments, Database as Driver, FromRow, PgConnection, PgPool, Postgres, Sqlite,
    SqliteConnection, SqlitePool,
};
use tracing::trace;

use super::Database;

/// A transaction in a service's database: what it writes through.
#[derive(Debug)]
pub enum Tx<'t> {
    /// In a file.
    Sqlite(&'t mut SqliteConnection),
    /// In a schema.
    Postgres(&'t mut PgConnection),
}

/// A statement and its values.
#[derive(Debug)]
pub struct Statement {
    text: &'static str,
    values: Vec<Value>,
}

/// A statement, without its values yet.
pub fn sql(text: &'static str) -> Statement {
    let values = Vec::new();
    Statement { text, values }
}

/// What a statement is given.
#[derive(Debug)]
pub enum Value {
    Text(String),
    Number(i64),
    Truth(bool),
    Json(JsonValue),
}

/// Where a query runs: in a transaction, or beside all of them, where it sees what is committed.
#[derive(Debug)]
pub enum Reader<'r> {
    Tx(Tx<'r>),
    File(&'r SqlitePool),
    Schema(&'r PgPool),
}

/// A row of either database.
pub trait Row: for<'r> FromRow<'r, SqliteRow> + for<'r> FromRow<'r, PgRow> + Send + Unpin {}

impl<T> Row for T where T: for<'r> FromRow<'r, SqliteRow> + for<'r> FromRow<'r, PgRow> + Send + Unpin
{}

impl Statement {
    /// Gives the next value.
    pub fn bind(mut self, value: impl Into<Value>) -> Self {
        self.values.push(value.into());
        self
    }

    /// Gives the next value as JSON.
    pub fn bind_json(self, value: &impl Serialize) -> Self {
        let json = serde_json::to_value(value).expect("what the shop keeps has a JSON form");
        self.bind(Value::Json(json))
    }

    /// Writes, and says how many rows.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub async fn execute(self, tx: &mut Tx<'_>) -> sqlx::Result<u64> {
        trace!(target: "eventbus::step", step = "shop.write.before");
        let rows = match tx {
            Tx::Sqlite(connection) => {
                let query = sqlx::query_with(self.text, arguments::<Sqlite>(self.values)?);
                query.execute(&mut **connection).await?.rows_affected()
            }
            Tx::Postgres(connection) => {
                let query = sqlx::query_with(self.text, arguments::<Postgres>(self.values)?);
                query.execute(&mut **connection).await?.rows_affected()
            }
        };
        trace!(target: "eventbus::step", step = "shop.write.after");
        Ok(rows)
    }

    /// Writes one row, and gives what the statement returns of it.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub async fn returning<T: Row>(self, tx: &mut Tx<'_>) -> sqlx::Result<T> {
        trace!(target: "eventbus::step", step = "shop.write.before");
        let row = self.fetch_one(tx).await?;
        trace!(target: "eventbus::step", step = "shop.write.after");
        Ok(row)
    }

    /// Reads a row, which there is.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub async fn fetch_one<'r, T: Row>(self, reader: impl Into<Reader<'r>>) -> sqlx::Result<T> {
        let row = self.fetch_optional(reader).await?;
        row.ok_or(sqlx::Error::RowNotFound)
    }

    /// Reads a row, if there is one.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub async fn fetch_optional<'r, T: Row>(
        self,
        reader: impl Into<Reader<'r>>,
    ) -> sqlx::Result<Option<T>> {
        Ok(self.fetch_all(reader).await?.pop())
    }

    /// Reads all rows.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub async fn fetch_all<'r, T: Row>(
        self,
        reader: impl Into<Reader<'r>>,
    ) -> sqlx::Result<Vec<T>> {
        let Self { text, values } = self;
        match reader.into() {
            Reader::Tx(Tx::Sqlite(connection)) => {
                let query = sqlx::query_as_with(text, arguments::<Sqlite>(values)?);
                query.fetch_all(connection).await
            }
            Reader::File(readers) => {
                let query = sqlx::query_as_with(text, arguments::<Sqlite>(values)?);
                query.fetch_all(readers).await
            }
            Reader::Tx(Tx::Postgres(connection)) => {
                let query = sqlx::query_as_with(text, arguments::<Postgres>(values)?);
                query.fetch_all(connection).await
            }
            Reader::Schema(pool) => {
                let query = sqlx::query_as_with(text, arguments::<Postgres>(values)?);
                query.fetch_all(pool).await
            }
        }
    }
}

/// The values as one of the drivers takes them.
fn arguments<D: Driver>(values: Vec<Value>) -> sqlx::Result<D::Arguments>
where
    String: for<'v> Encode<'v, D> + Type<D>,
    i64: for<'v> Encode<'v, D> + Type<D>,
    bool: for<'v> Encode<'v, D> + Type<D>,
    Json<JsonValue>: for<'v> Encode<'v, D> + Type<D>,
{
    let mut arguments = D::Arguments::default();
    for value in values {
        let added = match value {
            Value::Text(text) => arguments.add(text),
            Value::Number(number) => arguments.add(number),
            Value::Truth(truth) => arguments.add(truth),
            Value::Json(json) => arguments.add(Json(json)),
        };
        added.map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

impl<'r> From<&'r mut Tx<'_>> for Reader<'r> {
    fn from(tx: &'r mut Tx<'_>) -> Self {
        Self::Tx(match tx {
            Tx::Sqlite(connection) => Tx::Sqlite(connection),
            Tx::Postgres(connection) => Tx::Postgres(connection),
        })
    }
}

impl<'r> From<&'r Database> for Reader<'r> {
    fn from(database: &'r Database) -> Self {
        match database {
            Database::Sqlite(store) => Self::File(store.readers()),
            Database::Postgres(store) => Self::Schema(store.pool()),
        }
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

impl From<bool> for Value {
    fn from(truth: bool) -> Self {
        Self::Truth(truth)
    }
}
