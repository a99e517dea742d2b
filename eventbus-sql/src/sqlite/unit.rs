//! Units of work in a service's own database.

use std::any::Any;

use async_trait::async_trait;
use eventbus_core::{EventId, Group, InboxEntry, Message, Result, Unit, UnitOfWork, Work};
use sqlx::SqliteConnection;
use tracing::trace;

use super::error;
use super::inbox;
use super::lending::Loan;
use super::outbox;
use super::store::{APPEND, SqliteStore};
use crate::unit::{LateWork, OPEN, UnitStore};

impl Unit for SqliteStore {
    type Resource = SqliteConnection;
}

#[async_trait]
impl UnitOfWork for SqliteStore {
    fn group_max(&self) -> usize {
        self.group_max
    }

    async fn begin(&self, group: &Group, events: &[InboxEntry]) -> Result<Box<dyn Work>> {
        Ok(Box::new(
            LateWork::begin(self.clone(), group, events).await?,
        ))
    }
}

impl UnitStore for SqliteStore {
    type Loan = Loan;

    async fn open(&self, group: &Group, ids: &[EventId]) -> Result<(Loan, Vec<bool>)> {
        let name = format!("a handler of group {group}");
        let (tables, now) = (&self.database.tables, self.database.now());
        let recording = inbox::recording(tables, group, ids, now);
        let (first, count) = recording.map_err(|error| self.database.error(OPEN, error))?;
        trace!(target: "eventbus::step", step = "unit.inbox.before");
        let borrowed = self.database.writer.borrow_for(OPEN, name, first);
        let (mut loan, rows) = borrowed.await?;
        let connection = loan.connection_mut();
        let recorded = (rows, count);
        let recorded = inbox::record_rest(tables, connection, group, ids, recorded, now).await;
        let duplicates = recorded.map_err(|error| self.database.error(OPEN, error))?;
        trace!(target: "eventbus::step", step = "unit.inbox.after");
        Ok((loan, duplicates))
    }

    async fn has_handled(&self, group: &Group, id: &EventId) -> Result<bool> {
        self.database.has_handled(group, id).await
    }

    fn resource(loan: &mut Loan) -> &mut (dyn Any + Send) {
        loan.connection_mut()
    }

    async fn keep(&self, mut loan: Loan, messages: Vec<(EventId, Message)>) -> Result<()> {
        let (tables, now) = (&self.database.tables, self.database.now());
        trace!(target: "eventbus::step", step = "unit.outbox.before");
        let appended = outbox::append(tables, loan.connection_mut(), &messages, now).await;
        let appended = appended.map_err(|error| self.database.error(APPEND, error))?;
        trace!(target: "eventbus::step", step = "unit.outbox.after");
        trace!(target: "eventbus::step", step = "unit.commit.before");
        loan.keep("commit", appended).await?;
        trace!(target: "eventbus::step", step = "unit.commit.after");
        Ok(())
    }

    fn cannot_write(native: &sqlx::Error) -> bool {
        error::cannot_write(native)
    }

    async fn undo(&self, loan: Loan) -> Result<()> {
        loan.undo("roll back").await
    }
}
