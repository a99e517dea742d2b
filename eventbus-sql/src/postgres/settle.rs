//! How far groups are: one statement for whatever waits, fenced by the epoch of each lease.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use eventbus_core::log::{Advance, furthest};
use eventbus_core::{Coalescer, Error, ErrorKind, Flushes, Result};
use tokio::sync::oneshot;

use super::page::{ids, stored, to_u64};
use super::session::Sessions;
use super::tables::Tables;
use super::writer::Line;

const SETTLE: &str = "settle";

/// A place goes on only for the holder of its epoch, who holds it until this is committed, and never
/// back. Rows are locked in their order, as everybody does, so that nobody waits in a circle.
const ADVANCE: &str = "
    WITH new AS (
        SELECT * FROM unnest($1::bigint[], $2::int[], $3::bigint[], $4::bigint[])
            AS new(consumer_group, lane, epoch, position)
    ), locked AS MATERIALIZED (
        SELECT lease.consumer_group, lease.lane, new.position
        FROM {s}.leases AS lease JOIN new
            ON lease.consumer_group = new.consumer_group AND lease.lane = new.lane
            AND lease.epoch = new.epoch
        ORDER BY lease.consumer_group, lease.lane
        FOR SHARE OF lease
    )
    UPDATE {s}.cursors AS mine SET position = locked.position
    FROM locked
    WHERE mine.consumer_group = locked.consumer_group AND mine.lane = locked.lane
        AND mine.position <= locked.position
    RETURNING mine.lane";

/// Hands settlements to the task that records them.
#[derive(Clone, Debug)]
pub(super) struct Settler {
    settles: Coalescer<Settle>,
}

#[derive(Debug)]
struct Settle {
    advances: Vec<Advance>,
    reply: oneshot::Sender<Result<(), Arc<Error>>>,
}

impl Settler {
    /// The handle, and the task behind it.
    pub(super) fn new(
        sessions: &Sessions,
        tables: &Tables,
        stale: &Arc<AtomicU64>,
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (settles, flushes) = Coalescer::new();
        let task = SettlerTask {
            flushes,
            line: Line::new(SETTLE, sessions.clone()),
            tables: tables.clone(),
            stale: Arc::clone(stale),
        };
        (Self { settles }, task.run())
    }

    /// Records how far groups are.
    pub(super) async fn settle(&self, advances: Vec<Advance>) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.settles.add(Settle { advances, reply });
        let gone = |_| {
            let message = "the database was closed: connect again";
            Error::new(ErrorKind::Closed, SETTLE, message)
        };
        let answer = answer.await.map_err(gone)?;
        answer.map_err(|error| {
            Error::new(error.kind(), SETTLE, "the positions were not recorded")
                .with_retry(error.retry())
                .with_source(error)
        })
    }
}

/// The task behind [`Settler`].
#[derive(Debug)]
struct SettlerTask {
    flushes: Flushes<Settle>,
    line: Line,
    tables: Tables,
    stale: Arc<AtomicU64>,
}

impl SettlerTask {
    /// Records until it is aborted with its database.
    async fn run(mut self) {
        let mut batch: Vec<Settle> = Vec::new();
        loop {
            // The outcome is told to each caller, so the ticket's is not asked for.
            self.flushes.next(&mut batch).await.done();
            let advances = furthest(batch.iter().flat_map(|settle| &settle.advances));
            let recorded = self.record(&advances).await.map_err(Arc::new);
            for settle in batch.drain(..) {
                // The member is gone, so nobody waits for the answer.
                let _ = settle.reply.send(recorded.clone());
            }
        }
    }

    /// Records advances, and counts how many of them came too late.
    async fn record(&mut self, advances: &[Advance]) -> Result<()> {
        let mut session = self.line.take().await?;
        let groups: Vec<i64> = advances.iter().map(|advance| advance.group).collect();
        let lanes: Vec<u32> = advances.iter().map(|advance| advance.lane).collect();
        let epochs: Vec<i64> = advances.iter().map(|it| it.epoch as i64).collect();
        let positions = advances
            .iter()
            .map(|advance| stored(to_u64(advance.position)));
        let query = sqlx::query(self.tables.sql(ADVANCE))
            .bind(groups)
            .bind(ids(&lanes))
            .bind(epochs)
            .bind(positions.collect::<Vec<_>>());
        let advanced = session.rows(query).await?;
        self.line.keep(session);
        let late = advances.len().saturating_sub(advanced.len());
        self.stale.fetch_add(late as u64, Ordering::Relaxed);
        Ok(())
    }
}
