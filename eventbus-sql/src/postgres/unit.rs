//! Units of work in a service's own database.

use std::any::Any;

use async_trait::async_trait;
use eventbus_core::{EventId, Group, InboxEntry, Message, Result, Unit, UnitOfWork, Work};
use sqlx::PgConnection;

use super::error;
use super::lending::Loan;
use super::store::PostgresStore;
use crate::unit::{LateWork, OPEN, UnitStore};

impl Unit for PostgresStore {
    type Resource = PgConnection;
}

#[async_trait]
impl UnitOfWork for PostgresStore {
    fn group_max(&self) -> usize {
        self.group_max
    }

    async fn begin(&self, group: &Group, events: &[InboxEntry]) -> Result<Box<dyn Work>> {
        Ok(Box::new(
            LateWork::begin(self.clone(), group, events).await?,
        ))
    }
}

impl UnitStore for PostgresStore {
    type Loan = Loan;

    async fn open(&self, group: &Group, ids: &[EventId]) -> Result<(Loan, Vec<bool>)> {
        let mut loan = self.database.lending.borrow(OPEN).await?;
        let tables = &self.database.tables;
        let duplicates = loan.record(OPEN, tables, group, ids).await?;
        Ok((loan, duplicates))
    }

    async fn has_handled(&self, group: &Group, id: &EventId) -> Result<bool> {
        self.database.has_handled(group, id).await
    }

    fn resource(loan: &mut Loan) -> &mut (dyn Any + Send) {
        loan.connection_mut()
    }

    async fn keep(&self, loan: Loan, messages: Vec<(EventId, Message)>) -> Result<()> {
        loan.keep("commit", &self.database.tables, &messages)
            .await?;
        if !messages.is_empty() {
            self.appended();
        }
        Ok(())
    }

    fn cannot_write(native: &sqlx::Error) -> bool {
        error::cannot_write(native)
    }

    async fn undo(&self, loan: Loan) -> Result<()> {
        loan.undo("roll back", &self.database.tables).await
    }
}
