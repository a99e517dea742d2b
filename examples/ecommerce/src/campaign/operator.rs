//! Somebody who deals with parked keys while the shop is being killed: lets some be tried again,
//! although the provider is not healed yet, and makes others dead letters.

use std::sync::Arc;
use std::time::Duration;

use eventbus::EventBusConfig;
use eventbus::desk::KeyAction;
use eventbus::prelude::EventBus;
use fastrand::Rng;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::journal::{Journal, Note};
use super::witnesses::{PAYMENT, waits_for_us};
use crate::brokers::connect;
use crate::shop::held;

/// How often the operator looks.
const GLANCE: Duration = Duration::from_millis(500);
/// Who that is, and why something is decided.
const NAME: &str = "operator";
const BECAUSE: &str = "the campaign wants to see it";

/// An operator at work.
#[derive(Debug)]
pub struct Operator {
    stop: watch::Sender<bool>,
    work: JoinHandle<anyhow::Result<()>>,
}

impl Operator {
    /// Begins; the seed decides what is done with what.
    pub fn start(broker: &EventBusConfig, seed: u64, journal: Arc<Journal>) -> Self {
        let (stop, mut stopped) = watch::channel(false);
        let (broker, mut random) = (broker.clone(), Rng::with_seed(seed));
        let work = tokio::spawn(async move {
            // An error says that it dropped: that stops the operator as well.
            while timeout(GLANCE, stopped.wait_for(|stop| *stop))
                .await
                .is_err()
            {
                // Not connected meanwhile, so that the last process that dies leaves the file alone.
                let bus = connect(&broker).await?;
                decide(&bus, &mut random, &journal).await?;
                bus.close().await?;
            }
            Ok(())
        });
        Self { stop, work }
    }

    /// Decides nothing more.
    ///
    /// # Errors
    ///
    /// When a decision could not be made.
    pub async fn finish(self) -> anyhow::Result<()> {
        self.stop.send_replace(true);
        self.work.await?
    }
}

async fn decide(bus: &EventBus, random: &mut Rng, journal: &Journal) -> anyhow::Result<()> {
    for held in held(bus, PAYMENT).await? {
        if !waits_for_us(&held) {
            continue;
        }
        let (keys, held) = (bus.held_keys(PAYMENT)?, &held.held);
        let action = match random.bool() {
            true => KeyAction::Retry,
            false => KeyAction::Release,
        };
        if keys.decide(held, action, NAME, BECAUSE).await? {
            journal.note(Note::Decided(&format!("{action:?} {held}")));
        }
    }
    Ok(())
}
