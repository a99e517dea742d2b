//! The two halves of a member.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use eventbus_core::{Deliveries, ErrorKind, Lane, Receipt, Result, Retry, Settlement, Signal};
use rdkafka::consumer::Consumer as _;

use crate::client::blocking;
use crate::committer::Committer;
use crate::subscriber::Member;

const SETTLE: &str = "settle";

/// How long a commit is repeated before its failure is told.
const PATIENCE: Duration = Duration::from_secs(5);

/// The member, held by both halves; the last one to be dropped makes it leave.
#[derive(Debug)]
pub(crate) struct Owner(pub(crate) Arc<Member>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// The receiving half.
#[derive(Debug)]
pub(crate) struct KafkaDeliveries(pub(crate) Arc<Owner>);

#[async_trait]
impl Deliveries for KafkaDeliveries {
    async fn next(&mut self) -> Result<Signal> {
        let member = &self.0.0;
        // What is there needs no waiting; others on the runtime get their turn all the same.
        tokio::task::coop::consume_budget().await;
        loop {
            member.check_open("read")?;
            let (signal, failure, astray) = {
                let mut lanes = member.lanes();
                let signal = lanes.next_signal();
                let failure = match signal {
                    Some(_) => None,
                    None => lanes.take_failure(),
                };
                (signal, failure, lanes.take_astray())
            };
            member.lead_all(astray);
            if let Some(signal) = signal {
                return Ok(signal);
            }
            if let Some(error) = failure {
                return Err(error);
            }
            member.notify.notified().await;
        }
    }

    async fn close(self: Box<Self>) -> Result<()> {
        let member = &self.0.0;
        member.end();
        member.gone().await
    }
}

/// The answering half.
#[derive(Debug)]
pub(crate) struct KafkaSettlement {
    owner: Arc<Owner>,
    /// None for a reader, which commits nothing.
    committer: Option<Committer>,
}

#[async_trait]
impl Settlement for KafkaSettlement {
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()> {
        let member = &self.owner.0;
        member.check_open(SETTLE)?;
        let stale = member.lanes().settle(settled.iter().copied());
        if stale > 0 {
            tracing::debug!(
                stale,
                "receipts of partitions that are gone were passed over"
            );
        }
        // There may be credit again.
        member.notify.notify_one();
        self.commit().await
    }

    async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        let member = Arc::clone(&self.owner.0);
        let given_up = member.lanes().release(lanes);
        member.notify.notify_one();
        if let (Some(places), Some(client)) = (given_up, member.client()) {
            blocking(move || member.give_up(&client, &places)).await?;
        }
        Ok(())
    }
}

impl KafkaSettlement {
    pub(crate) fn new(owner: Arc<Owner>) -> Result<Self> {
        let is_group = owner.0.subscription.group.is_some();
        let committer = is_group.then(|| Committer::spawn(SETTLE)).transpose()?;
        Ok(Self { owner, committer })
    }

    /// Commits what is settled and not committed, and waits for the coordinator's answer.
    ///
    /// While the group shares its partitions out anew, a commit may be of the generation before,
    /// though the partition stays here: it is repeated. One that is lost has nothing to commit.
    async fn commit(&mut self) -> Result<()> {
        let (member, Some(committer)) = (&self.owner.0, &mut self.committer) else {
            return Ok(());
        };
        let deadline = Instant::now() + PATIENCE;
        let mut pause = Duration::from_millis(10);
        loop {
            let offsets = member.lanes().uncommitted();
            if offsets.is_empty() {
                return Ok(());
            }
            let Some(client) = member.client() else {
                return member.check_open(SETTLE);
            };
            let context = Arc::clone(client.context());
            let answer = tokio::select! {
                answer = committer.commit(client, offsets) => Some(answer?),
                () = context.given_up() => None,
            };
            let Some((done, offsets)) = answer else {
                // Its thread waits for the old client. What that had is lost, and has nothing to commit.
                *committer = Committer::spawn(SETTLE)?;
                continue;
            };
            match done {
                Ok(()) => {
                    member.lanes().committed(&offsets);
                    return Ok(());
                }
                Err(error) if error.is_retryable() && Instant::now() + pause < deadline => {
                    tracing::debug!(%error, "a commit is repeated");
                    member.check_open(SETTLE)?;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(250));
                }
                Err(error) => {
                    // The member ended meanwhile.
                    member.check_open(SETTLE)?;
                    return Err(match error.kind() {
                        // Of a topic that is gone, or that the broker has not heard of yet.
                        ErrorKind::NotFound => error.with_retry(Retry::Later),
                        _ => error,
                    });
                }
            }
        }
    }
}
