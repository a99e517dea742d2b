//! Handlers in a transaction of whichever store the service has: the SDK's units do all of it.

use std::any::Any;

use async_trait::async_trait;
use eventbus::prelude::BoxError;
use eventbus::unit_of_work::{Committed, InboxEntry, Unit, UnitOfWork, Work};
use eventbus::{Group, Message, Result};
use sqlx::{PgConnection, SqliteConnection};

use super::{Database, Tx};

/// What a store does for a handler, which finds it in its context.
#[derive(Debug)]
pub struct Lent(Box<dyn Work>);

impl Unit for Database {
    type Resource = Lent;
}

#[async_trait]
impl UnitOfWork for Database {
    fn group_max(&self) -> usize {
        match self {
            Self::Sqlite(store) => store.group_max(),
            Self::Postgres(store) => store.group_max(),
        }
    }

    async fn begin(&self, group: &Group, events: &[InboxEntry]) -> Result<Box<dyn Work>> {
        let work = match self {
            Self::Sqlite(store) => store.begin(group, events).await?,
            Self::Postgres(store) => store.begin(group, events).await?,
        };
        Ok(Box::new(Lent(work)))
    }
}

impl Lent {
    /// The transaction, whichever the store's is.
    ///
    /// # Errors
    ///
    /// Those of opening it.
    pub async fn tx(&mut self) -> std::result::Result<Tx<'_>, BoxError> {
        let connection = self.0.transaction().await?;
        if connection.is::<SqliteConnection>() {
            let connection = connection.downcast_mut().expect("it is of SQLite");
            return Ok(Tx::Sqlite(connection));
        }
        let connection = connection.downcast_mut::<PgConnection>();
        Ok(Tx::Postgres(connection.expect("there is no third store")))
    }
}

#[async_trait]
impl Work for Lent {
    fn is_duplicate(&self, index: usize) -> bool {
        self.0.is_duplicate(index)
    }

    async fn transaction(&mut self) -> Result<&mut (dyn Any + Send)> {
        self.0.transaction().await?;
        Ok(self)
    }

    async fn commit(self: Box<Self>, outgoing: Vec<Message>) -> Result<Committed> {
        self.0.commit(outgoing).await
    }

    async fn roll_back(self: Box<Self>, error: Option<&BoxError>) -> Result<()> {
        self.0.roll_back(error).await
    }
}
