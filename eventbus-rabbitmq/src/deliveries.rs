//! The two halves of a member or reader.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use async_trait::async_trait;
use eventbus_core::{Deliveries, ErrorKind, Lane, Receipt, Result, Settlement, Signal};
use futures_util::future::join_all;
use futures_util::task::AtomicWaker;
use lapin::options::BasicAckOptions;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::lanes::{Acknowledgement, Lanes};
use crate::link::{closed, natively};
use crate::topics::settle_down;

const SETTLE: &str = "settle";

/// What a task of its own does for the two halves.
#[derive(Debug)]
pub(crate) struct Member {
    lanes: Mutex<Lanes>,
    /// Who waits in `next`.
    waker: AtomicWaker,
    orders: mpsc::Sender<Order>,
    /// Whether it is to end.
    ending: watch::Sender<bool>,
    /// Whether its task has ended.
    gone: watch::Receiver<bool>,
    /// See [`Lanes`].
    pub(crate) attention: Arc<Notify>,
    /// Whether settling waits for the server, which it does for a group.
    is_group: bool,
}

/// What the task of a member is asked for.
#[derive(Debug)]
pub(crate) enum Order {
    /// Give lanes away, and say when that is done.
    Release(Vec<Lane>, oneshot::Sender<()>),
}

/// The ends that the task of a member holds.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) orders: mpsc::Receiver<Order>,
    pub(crate) ending: watch::Receiver<bool>,
    pub(crate) gone: watch::Sender<bool>,
}

/// Waits until somebody says that it is to end.
pub(crate) async fn is_ending(mut ending: watch::Receiver<bool>) {
    // Whoever could say so is gone, which means the same.
    let _ = ending.wait_for(|ending| *ending).await;
}

impl Member {
    pub(crate) fn new(lanes: Lanes, attention: Arc<Notify>, is_group: bool) -> (Self, Ends) {
        let (give, orders) = mpsc::channel(4);
        let (end, ending) = watch::channel(false);
        let (gone, is_gone) = watch::channel(false);
        let member = Self {
            lanes: Mutex::new(lanes),
            waker: AtomicWaker::new(),
            orders: give,
            ending: end,
            gone: is_gone,
            attention,
            is_group,
        };
        let ends = Ends {
            orders,
            ending,
            gone,
        };
        (member, ends)
    }

    pub(crate) fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `next` look again.
    pub(crate) fn wake(&self) {
        self.waker.wake();
    }

    /// Makes it leave.
    pub(crate) fn end(&self) {
        self.ending.send_replace(true);
        self.wake();
    }

    /// Waits until it has left.
    pub(crate) async fn left(&self) {
        let mut gone = self.gone.clone();
        // Its task is gone when nobody can say so any more.
        let _ = gone.wait_for(|gone| *gone).await;
    }

    fn check_open(&self, operation: &'static str) -> Result<()> {
        match *self.ending.borrow() {
            true => Err(closed(operation)),
            false => Ok(()),
        }
    }

    /// Acknowledges what is settled, and waits until the server has it.
    ///
    /// # Errors
    ///
    /// `Timeout` where the server has not said so; what went with its lane is handed out again.
    pub(crate) async fn acknowledge(&self) -> Result<()> {
        let unacked = self.lanes().unacked();
        let acknowledged = unacked.into_iter().map(|lane| async move {
            let done = self.acknowledge_lane(&lane).await;
            let Err(error) = done else {
                self.lanes().known(&lane);
                return None;
            };
            if error.kind() == ErrorKind::Timeout && lane.channel.status().connected() {
                return Some(error);
            }
            // The lane is lost, or soon will be: it is handed out again.
            tracing::debug!(%error, "settled messages of a lane that is gone are handed out again");
            None
        });
        let failures = join_all(acknowledged).await;
        failures.into_iter().flatten().next().map_or(Ok(()), Err)
    }

    /// Acknowledges everything up to a tag. The server confirms no acknowledgement; what is asked of the
    /// queue behind it is answered when the queue has it.
    async fn acknowledge_lane(&self, lane: &Acknowledgement) -> Result<()> {
        let ack = async {
            if lane.is_sent {
                return Ok(());
            }
            let options = BasicAckOptions { multiple: true };
            let acked = lane.channel.basic_ack(lane.tag, options).await;
            acked.inspect(|()| self.lanes().acked(lane))
        };
        let done = natively(SETTLE, async {
            match self.is_group {
                true => {
                    // Both are written at once.
                    let asked = settle_down(&lane.channel, lane.queue.clone());
                    let (acked, asked) = tokio::join!(ack, asked);
                    acked.and(asked.map(drop))
                }
                false => ack.await,
            }
        });
        done.await?
            .map_err(|error| crate::error::into_error(SETTLE, error))
    }
}

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
pub(crate) struct RabbitMqDeliveries(pub(crate) Arc<Owner>);

#[async_trait]
impl Deliveries for RabbitMqDeliveries {
    async fn next(&mut self) -> Result<Signal> {
        let member = &self.0.0;
        // What is there needs no waiting; others on the runtime get their turn all the same.
        tokio::task::coop::consume_budget().await;
        poll_fn(|cx| {
            member.waker.register(cx.waker());
            if let Err(error) = member.check_open("read") {
                return Poll::Ready(Err(error));
            }
            member.lanes().poll(cx)
        })
        .await
    }

    async fn close(self: Box<Self>) -> Result<()> {
        let member = &self.0.0;
        member.end();
        member.left().await;
        Ok(())
    }
}

/// The answering half.
#[derive(Debug)]
pub(crate) struct RabbitMqSettlement(pub(crate) Arc<Owner>);

#[async_trait]
impl Settlement for RabbitMqSettlement {
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()> {
        let member = &self.0.0;
        member.check_open(SETTLE)?;
        let stale = member.lanes().settle(settled.iter().copied());
        if stale > 0 {
            tracing::debug!(
                stale,
                "receipts of partitions that are gone were passed over"
            );
        }
        // There may be credit again.
        member.wake();
        member.acknowledge().await
    }

    async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        let member = &self.0.0;
        let (done, is_done) = oneshot::channel();
        let order = Order::Release(lanes.to_vec(), done);
        if member.orders.send(order).await.is_ok() {
            // The member ended meanwhile, and with it all its lanes.
            let _ = is_done.await;
        }
        Ok(())
    }
}
