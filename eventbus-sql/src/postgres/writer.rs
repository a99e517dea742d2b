//! The one that publishes: whatever is to be published joins the next commit of this client.
//!
//! ```text
//!  publish ─┐                  ┌ one statement: lock lanes in their order · give positions · insert
//!  publish ─┼─▶ [ next flush ] ┤   and its commit (fsync), which makes the positions visible in order
//!  publish ─┘                  └ then: whoever waits hears of it, whoever reads is woken
//! ```
//!
//! A lane's row is locked from when positions are given until they are visible, so nobody ever sees
//! a later position of a lane before an earlier one. No round trip lies between.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use eventbus_core::{Coalescer, Error, ErrorKind, Flushes, Message, Outcome, Result};
use sqlx::Row;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::trace;

use super::headers::Columns;
use super::session::{Failure, Session, Sessions};
use super::tables::Tables;
use super::wake::Bell;
use crate::wakes::Wakes;

/// Most messages of a statement, and bytes after which no more are added.
const ROWS_MAX: usize = 2000;
const BYTES_MAX: usize = 8 * 1024 * 1024;
/// A connection that lay idle for longer is asked whether it lives, so that one which died meanwhile
/// costs no unknown outcome.
const IDLE_TRUSTED: Duration = Duration::from_secs(2);

const PUBLISH: &str = "publish";

/// Locks the lanes in ascending order, as everybody does, so that nobody waits in a circle. What was
/// read before the lock was had is read again with it.
const APPEND: &str = "
    WITH locked AS MATERIALIZED (
        SELECT id, next, newest FROM {s}.lanes WHERE id = ANY($6::int[]) ORDER BY id FOR UPDATE
    ), stamped AS MATERIALIZED (
        SELECT id, next, greatest(newest, {now}) AS taken FROM locked
    ), inserted AS (
        INSERT INTO {s}.messages (lane, position, taken, key, headers, payload)
        SELECT new.lane, stamped.next + new.number, stamped.taken, new.key, new.headers, new.payload
        FROM unnest($1::int[], $2::bigint[], $3::bytea[], $4::bytea[], $5::bytea[])
            AS new(lane, number, key, headers, payload)
        JOIN stamped ON stamped.id = new.lane
    )
    UPDATE {s}.lanes AS lane
    SET next = stamped.next + added.messages, newest = stamped.taken, bytes = lane.bytes + added.bytes
    FROM unnest($6::int[], $7::bigint[], $8::bigint[]) AS added(id, messages, bytes)
    JOIN stamped ON stamped.id = added.id
    WHERE lane.id = added.id
    RETURNING lane.id, lane.next";

/// Hands messages to the task that publishes them.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    publishes: Coalescer<Publish>,
}

/// Why a publish was not acknowledged.
#[derive(Clone, Debug)]
pub(super) struct Refused {
    pub(super) error: Arc<Error>,
    pub(super) outcome: Outcome,
}

impl Refused {
    pub(super) fn not_taken(error: Error) -> Self {
        Self::new(error, Outcome::NotTaken)
    }

    fn new(error: Error, outcome: Outcome) -> Self {
        let error = Arc::new(error);
        Self { error, outcome }
    }

    /// Why a statement that commits by itself failed.
    fn committing(failure: Failure) -> Self {
        let outcome = match failure.is_loss() {
            true => Outcome::Unknown,
            false => Outcome::NotTaken,
        };
        Self::new(failure.into_error(PUBLISH), outcome)
    }

    /// Whether one of several publishes may be the reason.
    fn is_of_one(&self) -> bool {
        self.outcome == Outcome::NotTaken && !self.error.is_retryable()
    }
}

/// Messages with their lanes, to be taken together.
#[derive(Debug)]
struct Publish {
    messages: Vec<(u32, Message)>,
    reply: oneshot::Sender<Result<(), Refused>>,
}

impl Writer {
    /// The handle, and the task behind it.
    pub(super) fn new(
        sessions: &Sessions,
        tables: &Tables,
        wakes: &Arc<Wakes>,
        bell: &Arc<Bell>,
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (publishes, flushes) = Coalescer::new();
        let task = WriterTask {
            flushes,
            line: Line::new(PUBLISH, sessions.clone()),
            tables: tables.clone(),
            wakes: Arc::clone(wakes),
            bell: Arc::clone(bell),
        };
        (Self { publishes }, task.run())
    }

    /// Takes messages durably, all or none.
    pub(super) async fn publish(&self, messages: Vec<(u32, Message)>) -> Result<(), Refused> {
        let (reply, answer) = oneshot::channel();
        self.publishes.add(Publish { messages, reply });
        answer.await.unwrap_or_else(|_| {
            let message = "the database was closed: connect again";
            let error = Error::new(ErrorKind::Closed, PUBLISH, message);
            Err(Refused::new(error, Outcome::Unknown))
        })
    }
}

/// The task behind [`Writer`].
#[derive(Debug)]
struct WriterTask {
    flushes: Flushes<Publish>,
    line: Line,
    tables: Tables,
    wakes: Arc<Wakes>,
    bell: Arc<Bell>,
}

impl WriterTask {
    /// Publishes until it is aborted with its database.
    async fn run(mut self) {
        let mut batch = Vec::new();
        loop {
            // The outcome is told to each caller, so the ticket's is not asked for.
            self.flushes.next(&mut batch).await.done();
            let several = batch.len() > 1;
            self.write(std::mem::take(&mut batch)).await;
            if several {
                // Those who were just answered put in what they have next, and it is one commit
                // instead of two.
                tokio::task::yield_now().await;
                tokio::task::yield_now().await;
            }
        }
    }

    /// Commits a batch and answers everybody in it.
    async fn write(&mut self, batch: Vec<Publish>) {
        match self.commit(&batch).await {
            Err(refused) if batch.len() > 1 && refused.is_of_one() => {
                for publish in batch {
                    let alone = self.commit(std::slice::from_ref(&publish)).await;
                    answer(publish, alone);
                }
            }
            committed => {
                for publish in batch {
                    answer(publish, committed.clone());
                }
            }
        }
    }

    async fn commit(&mut self, batch: &[Publish]) -> Result<(), Refused> {
        let messages = batch.iter().flat_map(|publish| &publish.messages);
        let mut messages: Vec<&(u32, Message)> = messages.collect();
        messages.sort_by_key(|(lane, _)| *lane);
        if messages.is_empty() {
            return Ok(());
        }
        let mut session = self.line.take().await.map_err(Refused::not_taken)?;
        trace!(target: "eventbus::step", step = "sql.commit.before");
        let ends = append(&mut session, &self.tables, &messages).await?;
        trace!(target: "eventbus::step", step = "sql.commit.after");
        self.line.keep(session);
        self.wakes.appended(&ends);
        self.bell.lanes(&ends);
        Ok(())
    }
}

fn answer(publish: Publish, committed: Result<(), Refused>) {
    // The publisher is gone, so nobody waits for the answer.
    let _ = publish.reply.send(committed);
}

/// Gives positions to messages, which are sorted by lane, and commits them. Returns the new ends of
/// the lanes.
async fn append(
    session: &mut Session,
    tables: &Tables,
    messages: &[&(u32, Message)],
) -> Result<Vec<(u32, u64)>, Refused> {
    let pieces = pieces(messages);
    if let [whole] = &pieces[..] {
        return append_piece(session, tables, whole)
            .await
            .map_err(Refused::committing);
    }
    // Nothing is committed before the end, whatever becomes of the connection until then.
    let undone = |failure: Failure| Refused::not_taken(failure.into_error(PUBLISH));
    session.begin().await.map_err(undone)?;
    let mut ends = Vec::new();
    for piece in &pieces {
        ends.extend(append_piece(session, tables, piece).await.map_err(undone)?);
    }
    let committed = session.ask(sqlx::query("COMMIT")).await;
    committed.map_err(Refused::committing)?;
    Ok(ends)
}

/// Cuts messages into what one statement takes.
fn pieces<'m>(messages: &[&'m (u32, Message)]) -> Vec<Columns<'m>> {
    let mut pieces = vec![Columns::default()];
    let mut bytes = 0;
    for (lane, message) in messages {
        let last = pieces.len() - 1;
        if pieces[last].lanes.len() >= ROWS_MAX || bytes >= BYTES_MAX {
            pieces.push(Columns::default());
            bytes = 0;
        }
        if let Some(piece) = pieces.last_mut() {
            piece.push(*lane, message);
        }
        bytes += message.size();
    }
    pieces
}

async fn append_piece(
    session: &mut Session,
    tables: &Tables,
    piece: &Columns<'_>,
) -> Result<Vec<(u32, u64)>, Failure> {
    let query = sqlx::query(tables.sql(APPEND))
        .bind(&piece.lanes)
        .bind(&piece.offsets)
        .bind(&piece.keys)
        .bind(&piece.headers)
        .bind(&piece.payloads)
        .bind(&piece.lane_ids)
        .bind(&piece.lane_counts)
        .bind(&piece.lane_bytes);
    let rows = session.ask(query).await?;
    let mut ends = Vec::with_capacity(rows.len());
    for row in &rows {
        let lane: i32 = row.try_get(0).map_err(Failure::Native)?;
        let next: i64 = row.try_get(1).map_err(Failure::Native)?;
        ends.push((lane as u32, next as u64));
    }
    if ends.len() < piece.lane_ids.len() {
        let gone = sqlx::Error::Decode("a lane has no row".into());
        return Err(Failure::Native(gone));
    }
    Ok(ends)
}

/// A connection that one task keeps, for as long as it lives.
#[derive(Debug)]
pub(super) struct Line {
    operation: &'static str,
    sessions: Sessions,
    kept: Option<(Session, Instant)>,
}

impl Line {
    pub(super) fn new(operation: &'static str, sessions: Sessions) -> Self {
        Self {
            operation,
            sessions,
            kept: None,
        }
    }

    /// Takes the connection, or another one where it died. Who does not give it back has lost it.
    pub(super) async fn take(&mut self) -> Result<Session> {
        if let Some((mut session, used)) = self.kept.take()
            && (used.elapsed() < IDLE_TRUSTED || session.is_alive().await)
        {
            return Ok(session);
        }
        self.sessions.get(self.operation).await
    }

    pub(super) fn keep(&mut self, session: Session) {
        self.kept = Some((session, Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use eventbus_core::Topic;

    use super::*;

    #[test]
    fn a_piece_is_bounded_in_rows_and_bytes() {
        let message = |bytes: usize| Message::new(Topic::from_static("orders"), vec![0; bytes]);
        let small: Vec<_> = (0..ROWS_MAX * 2 + 1).map(|_| (7, message(1))).collect();
        let small: Vec<_> = small.iter().collect();
        let sizes: Vec<_> = pieces(&small).iter().map(|it| it.lanes.len()).collect();
        assert_eq!(sizes, [ROWS_MAX, ROWS_MAX, 1]);
        let large: Vec<_> = (0..3).map(|lane| (lane, message(BYTES_MAX))).collect();
        let large: Vec<_> = large.iter().collect();
        assert_eq!(pieces(&large).len(), 3);
    }

    #[test]
    fn messages_of_a_lane_are_numbered_from_0() {
        let message = |text: &'static str| Message::new(Topic::from_static("orders"), text);
        let all = [(2, message("a")), (2, message("bc")), (5, message("d"))];
        let all: Vec<_> = all.iter().collect();
        let pieces = pieces(&all);
        assert_eq!(pieces[0].offsets, [0, 1, 0]);
        assert_eq!(pieces[0].lane_ids, [2, 5]);
        assert_eq!(pieces[0].lane_counts, [2, 1]);
        assert_eq!(pieces[0].lane_bytes, [3, 1]);
    }
}
