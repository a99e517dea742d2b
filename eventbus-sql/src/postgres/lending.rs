//! Connections lent inside a transaction, for pieces of work that write something of their own.
//!
//! ```text
//!  BEGIN · mark as open ─▶ lent ─▶ [ piece of work ] ─▶ is the mark there? append · COMMIT ─▶ kept
//!                                                   └▶ dropped, or undone: ROLLBACK
//! ```
//!
//! The mark is gone with the transaction: where somebody else has ended it, nothing is appended, and
//! whoever did the work is told.

use std::time::Duration;

use eventbus_core::{Error, ErrorKind, EventId, Group, Message, Result, Retry};
use sqlx::{Connection, PgConnection, SqlSafeStr};
use tokio::time::Instant;
use tracing::{error, trace};

use super::config::PostgresConfig;
use super::inbox::{self, Recorded};
use super::outbox::{self, Append};
use super::session::{Failure, Session, Sessions};
use super::tables::Tables;

/// In one round trip.
const BEGIN: &str = "BEGIN; SET LOCAL eventbus.is_open TO 'yes'";
const COMMIT: &str = "COMMIT";
/// Commits only the transaction that was begun: a division by zero stops what is behind it.
const CHECK_AND_COMMIT: &str = "
    SELECT 1 / (coalesce(current_setting('eventbus.is_open', true), '') = 'yes')::int; COMMIT";
const DIVISION_BY_ZERO: &str = "22012";
/// The server ended a transaction in which nothing happened for too long, or one that took too long.
const IDLE_TOO_LONG: [&str; 2] = ["25P03", "25P04"];

/// The connections that are lent.
#[derive(Clone, Debug)]
pub(super) struct Lending {
    sessions: Sessions,
}

impl Lending {
    pub(super) fn new(config: &PostgresConfig) -> Self {
        Self {
            sessions: Sessions::lent(config),
        }
    }

    /// Begins a transaction; on another connection where one had died while it lay idle.
    pub(super) async fn borrow(&self, operation: &'static str) -> Result<Loan> {
        let begun = match self.begin(operation).await? {
            Err(failure) if failure.is_loss() => self.begin(operation).await?,
            begun => begun,
        };
        begun.map_err(|failure| failure.into_error(operation))
    }

    async fn begin(&self, operation: &'static str) -> Result<Result<Loan, Failure>> {
        let mut session = self.sessions.get(operation).await?;
        let begun = session.execute(BEGIN.into_sql_str()).await;
        Ok(begun.map(|()| Loan {
            session,
            begun: Instant::now(),
            recorded: None,
        }))
    }
}

/// A connection inside a transaction until the piece of work is kept. Dropped, the connection is
/// closed, and so the work undone.
#[derive(Debug)]
pub(crate) struct Loan {
    session: Session,
    begun: Instant,
    /// What the inbox holds when the transaction is committed, whoever does so.
    recorded: Option<Recorded>,
}

impl Loan {
    pub(super) fn connection(&self) -> &PgConnection {
        self.session.connection()
    }

    pub(super) fn connection_mut(&mut self) -> &mut PgConnection {
        self.session.connection_mut()
    }

    /// Records in the inbox that a group handles these events; returns which it has handled before.
    pub(super) async fn record(
        &mut self,
        operation: &'static str,
        tables: &Tables,
        group: &Group,
        ids: &[EventId],
    ) -> Result<Vec<bool>> {
        trace!(target: "eventbus::step", step = "unit.inbox.before");
        let age = self.begun.elapsed();
        let recorded = self
            .session
            .limited(async |connection| inbox::record(tables, connection, group, ids).await)
            .await;
        let (recorded, duplicates) = self.answered(operation, age, recorded)?;
        trace!(target: "eventbus::step", step = "unit.inbox.after");
        self.recorded = recorded;
        Ok(duplicates)
    }

    /// Keeps the work and what it publishes, and resolves when it is on disk. A dropped future leaves
    /// the outcome unknown.
    pub(super) async fn keep(
        mut self,
        operation: &'static str,
        tables: &Tables,
        messages: &[(EventId, Message)],
    ) -> Result<()> {
        let age = self.begun.elapsed();
        let mut commit = CHECK_AND_COMMIT;
        if !messages.is_empty() {
            trace!(target: "eventbus::step", step = "unit.outbox.before");
            let appended = self
                .session
                .limited(async |connection| {
                    outbox::append(tables, connection, messages, Append::WhereOpen).await
                })
                .await;
            let appended = self.answered(operation, age, appended)?;
            trace!(target: "eventbus::step", step = "unit.outbox.after");
            if appended < messages.len() as u64 {
                return Err(self.ended(operation, tables).await);
            }
            commit = COMMIT;
        }
        trace!(target: "eventbus::step", step = "unit.commit.before");
        let committed = self.session.execute(commit.into_sql_str()).await;
        if let Err(failure) = &committed
            && failure.code().as_deref() == Some(DIVISION_BY_ZERO)
        {
            return Err(self.ended(operation, tables).await);
        }
        let committed = self.answered(operation, age, committed);
        committed.map_err(|error| at_commit(operation, error))?;
        trace!(target: "eventbus::step", step = "unit.commit.after");
        self.give_back();
        Ok(())
    }

    /// Undoes the work. An error says that the connection is lost, which is why it had to be; it is
    /// not where the work took too long.
    pub(super) async fn undo(mut self, operation: &'static str, tables: &Tables) -> Result<()> {
        let age = self.begun.elapsed();
        match self.forget(tables).await {
            Ok(()) => self.give_back(),
            // Its connection is closed, and so it is undone.
            Err(failure) if self.is_overdue(age, &failure) => {}
            Err(failure) => return Err(failure.into_error(operation)),
        }
        Ok(())
    }

    /// Whether the connection was lost because nothing happened in the transaction for so long that the
    /// server ended it. Where somebody else has heard why it was lost, its age when the statement was
    /// sent has to tell.
    fn is_overdue(&self, age: Duration, failure: &Failure) -> bool {
        match failure.code() {
            Some(code) => IDLE_TOO_LONG.contains(&code.as_str()),
            None => failure.is_closed() && age >= self.session.timeout(),
        }
    }

    /// Gives the connection back, unless the driver has lost count of its transactions: after a `begin`
    /// that failed or was dropped it believes to be in none, and would commit where a savepoint ends.
    fn give_back(self) {
        if self.session.connection().is_in_transaction() {
            self.session.end();
        }
    }

    /// Ends whatever transaction is open, and takes back what the inbox holds of the one that was lent,
    /// should somebody have committed it.
    async fn forget(&mut self, tables: &Tables) -> Result<(), Failure> {
        self.session.execute("ROLLBACK".into_sql_str()).await?;
        let Some(recorded) = self.recorded.take() else {
            return Ok(());
        };
        self.session
            .limited(async |connection| inbox::forget(tables, connection, &recorded).await)
            .await
    }

    /// Somebody else has ended the transaction.
    async fn ended(mut self, operation: &'static str, tables: &Tables) -> Error {
        match self.forget(tables).await {
            Ok(()) => self.give_back(),
            Err(failure) => {
                let error = failure.into_error(operation);
                error!(%error, "a handler ended its transaction, and it is not known whether its event will be handled again");
            }
        }
        Error::new(
            ErrorKind::InvalidInput,
            operation,
            "the transaction was ended by somebody else, so what it publishes is not sent: leave BEGIN, COMMIT and ROLLBACK to whoever lent the connection; `connection.begin()` makes a savepoint",
        )
    }

    /// Why a statement failed that was sent when the transaction had that age.
    fn answered<T>(
        &self,
        operation: &'static str,
        age: Duration,
        answer: Result<T, Failure>,
    ) -> Result<T> {
        answer.map_err(|failure| match self.is_overdue(age, &failure) {
            true => overdue(operation, self.session.timeout(), failure),
            false => failure.into_error(operation),
        })
    }
}

/// Not to be tried again without counting: the next time would be as long.
fn overdue(operation: &'static str, timeout: Duration, failure: Failure) -> Error {
    let message = format!(
        "the transaction was open for longer than {timeout:?} and its connection is lost, maybe because nothing happened in it: open it later, wait for nobody meanwhile, or raise `timeout`"
    );
    Error::new(ErrorKind::Timeout, operation, message)
        .with_retry(Retry::Never)
        .with_source(failure.into_error(operation))
}

/// What only a commit finds is about the work that is in it: the client's own tables have nothing of
/// the kind.
fn at_commit(operation: &'static str, error: Error) -> Error {
    if error.kind() != ErrorKind::Internal {
        return error;
    }
    let message =
        "what was written breaks a constraint, or fails a trigger, that is checked at the commit";
    Error::new(ErrorKind::InvalidInput, operation, message).with_source(error)
}
