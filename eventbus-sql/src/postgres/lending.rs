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
use sqlx::{PgConnection, SqlSafeStr};
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
        let recorded = self
            .session
            .limited(async |connection| inbox::record(tables, connection, group, ids).await)
            .await;
        let (recorded, duplicates) = self.answered(operation, recorded)?;
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
        let mut commit = CHECK_AND_COMMIT;
        if !messages.is_empty() {
            trace!(target: "eventbus::step", step = "unit.outbox.before");
            let appended = self
                .session
                .limited(async |connection| {
                    outbox::append(tables, connection, messages, Append::WhereOpen).await
                })
                .await;
            let appended = self.answered(operation, appended)?;
            trace!(target: "eventbus::step", step = "unit.outbox.after");
            if appended < messages.len() as u64 {
                return Err(self.ended(operation, tables).await);
            }
            commit = COMMIT;
        }
        trace!(target: "eventbus::step", step = "sql.commit.before");
        let committed = self.session.execute(commit.into_sql_str()).await;
        if let Err(failure) = &committed
            && failure.code().as_deref() == Some(DIVISION_BY_ZERO)
        {
            return Err(self.ended(operation, tables).await);
        }
        self.answered(operation, committed)?;
        trace!(target: "eventbus::step", step = "sql.commit.after");
        self.session.end();
        Ok(())
    }

    /// Undoes the work. An error says that the connection is lost, which is why it had to be; it is
    /// not where the work took too long.
    pub(super) async fn undo(mut self, operation: &'static str, tables: &Tables) -> Result<()> {
        match self.forget(tables).await {
            Ok(()) => self.session.end(),
            // Its connection is closed, and so it is undone.
            Err(failure) if self.is_overdue(&failure) => {}
            Err(failure) => return Err(failure.into_error(operation)),
        }
        Ok(())
    }

    /// Whether the connection was lost because nothing happened in the transaction for so long that the
    /// server ended it, or may have been.
    fn is_overdue(&self, failure: &Failure) -> bool {
        failure.is_loss() && self.begun.elapsed() >= self.session.timeout()
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
            Ok(()) => self.session.end(),
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

    /// Why a statement was refused. What only a commit checks is broken by the work that is in it: the
    /// client's own tables have nothing of the kind.
    fn answered<T>(&self, operation: &'static str, answer: Result<T, Failure>) -> Result<T> {
        answer.map_err(|failure| match failure.code().as_deref() {
            Some(code) if code.starts_with("23") => broken(operation, failure),
            _ if self.is_overdue(&failure) => overdue(operation, self.session.timeout(), failure),
            _ => failure.into_error(operation),
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

fn broken(operation: &'static str, failure: Failure) -> Error {
    let message = "what was written breaks a constraint that is checked at the commit";
    Error::new(ErrorKind::InvalidInput, operation, message)
        .with_source(failure.into_error(operation))
}
