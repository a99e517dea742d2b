//! Waiting for what a consumer or a store comes to.

use std::time::Duration;

use eventbus_core::{Consumer, ConsumerState};
use tokio::time::{sleep, timeout};

pub(crate) const LIMIT: Duration = Duration::from_secs(30);
pub(crate) const PAUSE: Duration = Duration::from_millis(2);

pub(crate) async fn until(mut condition: impl AsyncFnMut() -> bool) {
    let met = async {
        while !condition().await {
            sleep(PAUSE).await;
        }
    };
    timeout(LIMIT, met).await.expect("it comes to that");
}

pub(crate) fn is_holding(consumer: &Consumer) -> bool {
    matches!(consumer.status().state, ConsumerState::Holding { .. })
}

/// Until so many events are handled, or found to have been.
pub(crate) async fn handled(consumer: &Consumer, events: u64) {
    until(async || {
        let counts = consumer.status().counts;
        counts.handled + counts.duplicates >= events
    })
    .await;
}
