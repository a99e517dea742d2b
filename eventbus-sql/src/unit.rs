//! A unit of work over a store that lends a transaction late. No SQL is here.
//!
//! ```text
//!  begin: handled before? ─▶ handler ─ asks ─▶ open: record the ids ─▶ writes ─▶ keep: append, COMMIT
//!                                               └ handled meanwhile: the handler is told, all is undone
//! ```

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::{
    BoxError, Committed, Error, ErrorKind, EventId, Group, InboxEntry, Message, Result, Work,
    find_cause, header,
};

/// A store that lends transactions with an inbox and an outbox in them.
pub(crate) trait UnitStore: Clone + Debug + Send + Sync + 'static {
    /// A transaction that is open. Dropped, it is undone.
    type Loan: Debug + Send + 'static;

    /// Opens a transaction and records these ids in it first of all; returns which of them the group
    /// has handled before.
    fn open(
        &self,
        group: &Group,
        ids: &[EventId],
    ) -> impl Future<Output = Result<(Self::Loan, Vec<bool>)>> + Send;

    /// Whether the group has handled an event, as far as that is committed.
    fn has_handled(&self, group: &Group, id: &EventId)
    -> impl Future<Output = Result<bool>> + Send;

    /// What handlers write through.
    fn resource(loan: &mut Self::Loan) -> &mut (dyn Any + Send);

    /// Appends messages to the outbox and commits.
    fn keep(
        &self,
        loan: Self::Loan,
        messages: Vec<(EventId, Message)>,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Whether the database could not write, whatever was to be written: its disk is full, or fails.
    fn cannot_write(native: &sqlx::Error) -> bool;

    /// Undoes what was written. An error says that the store is why it had to be.
    fn undo(&self, loan: Self::Loan) -> impl Future<Output = Result<()>> + Send;
}

pub(crate) const OPEN: &str = "open transaction";

/// What handles some events of a group, and the transaction when it is open.
#[derive(Debug)]
pub(crate) struct LateWork<S: UnitStore> {
    store: S,
    group: Group,
    ids: Vec<EventId>,
    duplicates: Vec<bool>,
    loan: Option<S::Loan>,
    /// Why there is no transaction although one was asked for.
    refused: Option<Arc<Error>>,
}

impl<S: UnitStore> LateWork<S> {
    /// Finds out what was handled before; of several events, by opening the transaction.
    pub(crate) async fn begin(store: S, group: &Group, events: &[InboxEntry]) -> Result<Self> {
        let mut work = Self {
            store,
            group: group.clone(),
            ids: events.iter().map(|event| event.id.clone()).collect(),
            duplicates: vec![false; events.len()],
            loan: None,
            refused: None,
        };
        match &work.ids[..] {
            [id] => work.duplicates = vec![work.store.has_handled(group, id).await?],
            _ => work.open().await?,
        }
        Ok(work)
    }

    async fn open(&mut self) -> Result<()> {
        let (loan, duplicates) = self.store.open(&self.group, &self.ids).await?;
        self.loan = Some(loan);
        self.duplicates = duplicates;
        Ok(())
    }

    /// The transaction, opened if it is not.
    async fn loan(&mut self) -> Result<&mut S::Loan> {
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

/// The same error for somebody else.
fn again(error: &Arc<Error>) -> Error {
    let message = "the store did not open one";
    Error::new(error.kind(), OPEN, message)
        .with_retry(error.retry())
        .with_source(Arc::clone(error))
}

#[async_trait]
impl<S: UnitStore> Work for LateWork<S> {
    fn is_duplicate(&self, index: usize) -> bool {
        self.duplicates[index]
    }

    async fn transaction(&mut self) -> Result<&mut (dyn Any + Send)> {
        if let Err(error) = self.loan().await {
            return Err(self.refuse(error));
        }
        Ok(S::resource(self.loan.as_mut().expect("it was opened")))
    }

    async fn commit(mut self: Box<Self>, outgoing: Vec<Message>) -> Result<Committed> {
        let messages: Vec<_> = outgoing.into_iter().map(identified).collect();
        let opened = self.loan().await.map(|_| ());
        if self.duplicates == [true] {
            // Whoever handled it published the same events, and this wrote nothing.
            if let Some(loan) = self.loan.take() {
                self.store.undo(loan).await?;
            }
            return Ok(Committed::SettleNext);
        }
        opened?;
        let loan = self.loan.take().expect("it was opened");
        self.store.keep(loan, messages).await?;
        Ok(Committed::SettleNext)
    }

    async fn roll_back(mut self: Box<Self>, error: Option<&BoxError>) -> Result<()> {
        match (self.loan.take(), self.refused.take()) {
            (Some(loan), _) => {
                self.store.undo(loan).await?;
                let native = error.and_then(|error| find_cause(error.as_ref()));
                match native.filter(|native| S::cannot_write(native)) {
                    Some(native) => Err(not_written(native)),
                    None => Ok(()),
                }
            }
            (None, Some(error)) => Err(again(&error)),
            (None, None) => Ok(()),
        }
    }
}

fn not_written(native: &sqlx::Error) -> Error {
    let message = format!(
        "the database could not write what a handler wrote: free some space, or look at its disk and log; the event is handled again ({native})"
    );
    Error::new(ErrorKind::Unavailable, "write in a handler", message)
}

/// A message with its event's id, which formats write as a header.
fn identified(message: Message) -> (EventId, Message) {
    let id = message.headers.get_str(header::ID);
    let id = id.and_then(|id| EventId::parse(id).ok());
    (id.unwrap_or_else(EventId::new), message)
}
