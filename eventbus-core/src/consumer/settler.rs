//! Passes receipts of what is done to the broker: one call in flight, everything that comes
//! meanwhile in the next.

use std::sync::Arc;

use tracing::trace;

use super::Runtime;
use super::backoff::Backoff;
use crate::activity::Part;
use crate::broker::Settlement;
use crate::coalescer::{Flushes, move_all};
use crate::delivery::{Lane, Receipt};
use crate::error::Result;

/// What the settler is told, in order.
#[derive(Debug)]
pub(crate) enum SettleItem {
    Settled(Vec<Receipt>),
    /// No handler of these lanes runs any more.
    Release(Vec<Lane>),
    /// The end: nothing comes after it.
    Stop,
}

/// Settles until it is told to stop; returns an error that trying again does not help against.
pub(crate) async fn run(
    runtime: Arc<Runtime>,
    part: Arc<Part>,
    mut flushes: Flushes<SettleItem>,
    mut settlement: Box<dyn Settlement>,
) -> Result<()> {
    let mut items = Vec::new();
    let mut receipts = Vec::new();
    loop {
        let flush = flushes.next(&mut items).await;
        part.raise();
        let mut stop = false;
        for item in items.drain(..) {
            match item {
                SettleItem::Settled(mut more) => move_all(&mut more, &mut receipts),
                SettleItem::Release(lanes) => {
                    settle(&runtime, settlement.as_mut(), &mut receipts).await?;
                    release(&runtime, settlement.as_mut(), &lanes).await?;
                }
                SettleItem::Stop => stop = true,
            }
        }
        settle(&runtime, settlement.as_mut(), &mut receipts).await?;
        flush.done();
        part.lower();
        if stop {
            return Ok(());
        }
    }
}

async fn settle(
    runtime: &Runtime,
    settlement: &mut dyn Settlement,
    receipts: &mut Vec<Receipt>,
) -> Result<()> {
    if receipts.is_empty() {
        return Ok(());
    }
    let mut backoff = Backoff::new();
    trace!(target: "eventbus::step", step = "settle.before");
    while let Err(error) = settlement.settle(receipts).await {
        retry(runtime, error, &mut backoff).await?;
    }
    trace!(target: "eventbus::step", step = "settle.after");
    receipts.clear();
    Ok(())
}

async fn release(runtime: &Runtime, settlement: &mut dyn Settlement, lanes: &[Lane]) -> Result<()> {
    let mut backoff = Backoff::new();
    trace!(target: "eventbus::step", step = "release.before");
    while let Err(error) = settlement.release(lanes).await {
        retry(runtime, error, &mut backoff).await?;
    }
    trace!(target: "eventbus::step", step = "release.after");
    runtime.close_lanes(lanes);
    Ok(())
}

async fn retry(runtime: &Runtime, error: crate::Error, backoff: &mut Backoff) -> Result<()> {
    if !error.is_retryable() {
        return Err(error);
    }
    tracing::warn!(group = %runtime.group, error = %error, "settling is tried again");
    tokio::time::sleep(backoff.next()).await;
    Ok(())
}
