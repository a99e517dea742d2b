//! Units of work in a service's own database.

use std::any::Any;
use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::{
    Committed, Error, ErrorKind, EventId, Group, InboxEntry, Message, Result, Unit, UnitOfWork,
    Work, header,
};
use sqlx::SqliteConnection;
use tracing::trace;

use super::database::Shared;
use super::inbox;
use super::lending::Loan;
use super::outbox;
use super::store::{APPEND, SqliteStore};

impl Unit for SqliteStore {
    type Resource = SqliteConnection;
}

#[async_trait]
impl UnitOfWork for SqliteStore {
    fn group_max(&self) -> usize {
        self.group_max
    }

    async fn begin(&self, group: &Group, events: &[InboxEntry]) -> Result<Box<dyn Work>> {
        let mut work = SqliteWork {
            database: self.database.clone(),
            group: group.clone(),
            ids: events.iter().map(|event| event.id.clone()).collect(),
            duplicates: vec![false; events.len()],
            loan: None,
            refused: None,
        };
        if self.group_max > 1 {
            work.open().await?;
            return Ok(Box::new(work));
        }
        for (id, is_duplicate) in work.ids.iter().zip(&mut work.duplicates) {
            *is_duplicate = self.database.has_handled(group, id).await?;
        }
        Ok(Box::new(work))
    }
}

/// What handles some events of a group, and the transaction when it is open.
#[derive(Debug)]
struct SqliteWork {
    /// Keeps the file open.
    database: Shared,
    group: Group,
    ids: Vec<EventId>,
    duplicates: Vec<bool>,
    loan: Option<Loan>,
    /// Why there is no transaction although one was asked for.
    refused: Option<Arc<Error>>,
}

impl SqliteWork {
    /// Opens the transaction and records the ids, first of all.
    async fn open(&mut self) -> Result<()> {
        let name = format!("a handler of group {}", self.group);
        let (tables, now) = (&self.database.tables, self.database.now());
        let recording = inbox::recording(tables, &self.group, &self.ids, now);
        let (first, count) = recording.map_err(|error| self.database.error(OPEN, error))?;
        trace!(target: "eventbus::step", step = "unit.inbox.before");
        let borrowed = self.database.writer.borrow_for(OPEN, name, first);
        let (mut loan, rows) = borrowed.await?;
        let connection = loan.connection_mut();
        let recorded = (rows, count);
        let recorded =
            inbox::record_rest(tables, connection, &self.group, &self.ids, recorded, now).await;
        self.duplicates = recorded.map_err(|error| self.database.error(OPEN, error))?;
        trace!(target: "eventbus::step", step = "unit.inbox.after");
        self.loan = Some(loan);
        Ok(())
    }

    /// The transaction, opened if it is not.
    async fn loan(&mut self) -> Result<&mut Loan> {
        if self.loan.is_none() {
            self.open().await?;
        }
        if let [true] = self.duplicates[..] {
            return Err(Error::new(
                ErrorKind::Conflict,
                OPEN,
                "the event was handled meanwhile by another member of the group: return this error from the handler as it is",
            ));
        }
        Ok(self.loan.as_mut().expect("it was opened"))
    }

    /// Remembers why there is no transaction, so that it is not taken for the handler's failure.
    fn refuse(&mut self, error: Error) -> Error {
        let error = Arc::new(error);
        self.refused = Some(Arc::clone(&error));
        again(&error)
    }
}

const OPEN: &str = "open transaction";

/// The same error for somebody else.
fn again(error: &Arc<Error>) -> Error {
    let message = "the store did not open one";
    Error::new(error.kind(), OPEN, message)
        .with_retry(error.retry())
        .with_source(Arc::clone(error))
}

#[async_trait]
impl Work for SqliteWork {
    fn is_duplicate(&self, index: usize) -> bool {
        self.duplicates[index]
    }

    async fn transaction(&mut self) -> Result<&mut (dyn Any + Send)> {
        match self.loan().await {
            Ok(_) => {}
            Err(error) => return Err(self.refuse(error)),
        }
        let loan = self.loan.as_mut().expect("it was opened");
        Ok(loan.connection_mut())
    }

    async fn commit(mut self: Box<Self>, outgoing: Vec<Message>) -> Result<Committed> {
        let messages: Vec<_> = outgoing.into_iter().map(identified).collect();
        let opened = self.loan().await.map(|_| ());
        if self.duplicates == [true] {
            // Whoever handled it published the same events, and this wrote nothing.
            return Ok(Committed::SettleNext);
        }
        opened?;
        let mut loan = self.loan.take().expect("it was opened");
        let (tables, now) = (&self.database.tables, self.database.now());
        trace!(target: "eventbus::step", step = "unit.outbox.before");
        let appended = outbox::append(tables, loan.connection_mut(), &messages, now).await;
        let appended = appended.map_err(|error| self.database.error(APPEND, error))?;
        trace!(target: "eventbus::step", step = "unit.outbox.after");
        loan.keep("commit", appended).await?;
        Ok(Committed::SettleNext)
    }

    async fn roll_back(mut self: Box<Self>) -> Result<()> {
        match (self.loan.take(), self.refused.take()) {
            (Some(loan), _) => loan.undo("roll back").await,
            (None, Some(error)) => Err(again(&error)),
            (None, None) => Ok(()),
        }
    }
}

/// A message with its event's id, which formats write as a header.
fn identified(message: Message) -> (EventId, Message) {
    let id = message.headers.get_str(header::ID);
    let id = id.and_then(|id| EventId::parse(id).ok());
    (id.unwrap_or_else(EventId::new), message)
}
