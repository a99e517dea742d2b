//! A member never holds more unsettled than its limits say, however much is published.

use eventbus_core::{Key, Limits, Message};

use super::{BrokerHarness, DEADLINE, Stage, borrowed, numbered};
use crate::probe::{Probe, within};

/// A second member's join is the signal that ends a wait: whatever would be delivered before it
/// was delivered by then.
async fn hear_all(stage: &Stage, probe: &mut Probe) -> Probe {
    let newcomer = stage.join(stage.subscription()).await;
    probe.hear_until(|probe| !probe.revoking().is_empty()).await;
    newcomer
}

async fn limited(stage: &Stage, limits: Limits) -> Probe {
    let limits = limits.with_revoke_timeout(DEADLINE);
    let subscription = stage.subscription().with_limits(limits);
    stage.only_member(subscription).await.holding()
}

/// Collects and settles `total` in portions and asserts that never more than `most` were unsettled.
async fn work_off(probe: &mut Probe, total: usize, most: usize) {
    let mut done = 0;
    while done < total {
        let first = probe.collect(1).await;
        let rest = probe.collect(probe.waiting()).await;
        let count = first.len() + rest.len();
        assert!(count <= most, "{count} are unsettled");
        done += count;
        probe.settle(first.iter().chain(&rest)).await;
    }
    assert_eq!(done, total);
}

/// At most `Limits::messages` are unsettled over all lanes.
pub async fn message_limit_is_kept(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 2).await;
        let mut probe = limited(&stage, Limits::default().with_messages(10)).await;
        for key in stage.keys() {
            stage.publish(&key, &borrowed(&numbered("", 50))).await;
        }
        probe.hear_until(|probe| probe.waiting() >= 10).await;
        let newcomer = hear_all(&stage, &mut probe).await;
        assert_eq!(probe.waiting(), 10);
        newcomer.crash();
        let lanes = probe.revoking().to_vec();
        probe.release(&lanes).await.expect("lanes can be released");
        probe.hold(2).await;
        work_off(&mut probe, 100, 10).await;
        assert!(stage.drain(&mut probe).await.is_empty());
    })
    .await;
}

/// At most `Limits::lane_messages` are unsettled on one lane, and the others go on beside it.
pub async fn lane_limit_is_kept(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 2).await;
        let mut probe = limited(&stage, Limits::default().with_lane_messages(5)).await;
        let keys = stage.keys();
        stage.publish(&keys[0], &borrowed(&numbered("", 50))).await;
        probe.hear_until(|probe| probe.waiting() >= 5).await;
        stage.publish(&keys[1], &["beside"]).await;
        probe.hear_until(|probe| probe.waiting() >= 6).await;
        let newcomer = hear_all(&stage, &mut probe).await;
        assert_eq!(probe.waiting(), 6);
        newcomer.crash();
        let lanes = probe.revoking().to_vec();
        probe.release(&lanes).await.expect("lanes can be released");
        probe.hold(2).await;
        work_off(&mut probe, 51, 6).await;
        assert!(stage.drain(&mut probe).await.is_empty());
    })
    .await;
}

/// At most `Limits::bytes` are unsettled, and a message larger than that comes alone.
pub async fn byte_limit_is_kept_and_large_messages_pass(harness: &dyn BrokerHarness) {
    const SMALL: usize = 100;
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let limits = Limits::default().with_bytes(SMALL * 4 + SMALL / 2);
        let mut probe = limited(&stage, limits).await;
        let message = |size: usize| {
            // Key and payload count.
            Message::new(stage.topic.clone(), vec![b'x'; size - 1]).with_key("k")
        };
        let batch = (0..20).map(|_| message(SMALL)).collect();
        stage.broker.publish(batch).await.expect("there is room");
        let batch = vec![message(SMALL * 10), message(SMALL)];
        stage.broker.publish(batch).await.expect("there is room");
        work_off(&mut probe, 20, 4).await;
        let large = probe.collect(1).await;
        assert_eq!(large[0].message.payload.len(), SMALL * 10 - 1);
        assert_eq!(
            probe.waiting(),
            0,
            "a message larger than the limit is alone"
        );
        probe.settle(&large).await;
        work_off(&mut probe, 1, 1).await;
        assert!(stage.drain(&mut probe).await.is_empty());
    })
    .await;
}

/// One `Delivered` holds at most `Limits::batch`.
pub async fn one_batch_is_bounded(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = limited(&stage, Limits::default().with_batch(7)).await;
        let key = Key::from("k");
        stage.publish(&key, &borrowed(&numbered("", 50))).await;
        let mut heard = 0;
        while heard < 50 {
            probe.step().await.expect("the member goes on");
            assert!(probe.waiting() <= 7, "{} at once", probe.waiting());
            heard += probe.waiting();
            let deliveries = probe.collect(probe.waiting()).await;
            probe.settle(&deliveries).await;
        }
    })
    .await;
}

/// A member that can take no more hears what happens to its lanes all the same.
pub async fn control_signals_pass_while_full(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 2).await;
        let mut probe = limited(&stage, Limits::default().with_messages(1)).await;
        for key in stage.keys() {
            stage.publish(&key, &["a", "b", "c"]).await;
        }
        let first = probe.collect(1).await;
        let mut newcomer = hear_all(&stage, &mut probe).await;
        assert_eq!(probe.waiting(), 0, "more than one is unsettled");
        let lanes = probe.revoking().to_vec();
        probe.release(&lanes).await.expect("lanes can be released");
        newcomer.hold(1).await;
        let moved = lanes.contains(&first[0].receipt.lane);
        let deliveries = newcomer.collect(3).await;
        newcomer.settle(&deliveries).await;
        probe.settle(&first).await;
        work_off(&mut probe, if moved { 3 } else { 2 }, 1).await;
    })
    .await;
}
