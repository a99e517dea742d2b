//! The tried process that publishes what was committed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::Args;
use tokio::time::sleep;

use super::{Child, ChildArgs};
use crate::store::Store;

/// What it relays.
#[derive(Args, Clone, Debug)]
pub struct RelayArgs {
    #[command(flatten)]
    pub child: ChildArgs,
    /// The service's database
    #[arg(long)]
    store: String,
    /// Most messages that it publishes at once
    #[arg(long, default_value_t = 500)]
    batch: usize,
    /// After how long others take over from one that says nothing
    #[arg(long, default_value = "5s", value_parser = humantime::parse_duration)]
    lease: Duration,
}

/// Relays until it is told to stop.
///
/// # Errors
///
/// When it cannot start, and what ends a relay.
pub async fn run(args: RelayArgs) -> anyhow::Result<()> {
    let child = Child::start(&args.child).await?;
    let store = Store::connect(&args.store).await?;
    let relay = store.outbox(&child.bus).relay();
    let relay = relay.batch(args.batch).lease_ttl(args.lease);
    let (handle, messages) = (relay.handle(), Arc::clone(&child.messages));
    tokio::spawn(async move {
        loop {
            messages.store(handle.status().published, Ordering::Relaxed);
            sleep(super::STATUS_EVERY).await;
        }
    });
    child.is_ready();
    relay.run_until(child.stopped()).await?;
    child.bus.close().await?;
    Ok(())
}
