//! Settled is final, unsettled comes again first and in order, and nothing else does.

use eventbus_core::{Delivery, Key};

use super::{BrokerHarness, DEADLINE, Stage, borrowed, numbered};
use crate::probe::{Probe, text_of, within};

/// What was settled stays settled when the member leaves and another one joins.
pub async fn settled_message_is_not_delivered_again(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 2).await;
        let mut probe = stage.member().await;
        for key in stage.keys() {
            stage.publish(&key, &["a", "b", "c"]).await;
        }
        let deliveries = probe.collect(6).await;
        probe.settle(&deliveries).await;
        probe.close().await;
        let mut probe = stage.member().await;
        assert!(stage.drain(&mut probe).await.is_empty());
    })
    .await;
}

/// After a member left, its unsettled messages come first and in order, the settled ones never.
pub async fn unsettled_messages_come_first_after_close(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let probe = leave_three_of_five(&stage).await;
        probe.close().await;
        expect_three_of_five(&stage).await;
    })
    .await;
}

/// After a crash, unsettled messages come first and in order, the settled ones never.
pub async fn crash_hands_unsettled_messages_out_again(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let probe = leave_three_of_five(&stage).await;
        probe.crash();
        expect_three_of_five(&stage).await;
    })
    .await;
}

async fn leave_three_of_five(stage: &Stage) -> Probe {
    let mut probe = stage.member().await;
    stage
        .publish(&Key::from("k"), &["0", "1", "2", "3", "4"])
        .await;
    let deliveries = probe.collect(5).await;
    probe.settle(&deliveries[..2]).await;
    probe
}

async fn expect_three_of_five(stage: &Stage) {
    stage.publish(&Key::from("k"), &["5"]).await;
    let mut probe = stage.member().await;
    let deliveries = probe.collect(4).await;
    assert_eq!(texts(&deliveries), ["2", "3", "4", "5"]);
    probe.settle(&deliveries).await;
    assert!(stage.drain(&mut probe).await.is_empty());
}

/// A lane that is released comes back under a new epoch, with what was unsettled first.
pub async fn released_lane_is_handed_out_again(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = leave_three_of_five(&stage).await;
        let lane = probe.lane(&stage.topic, 0);
        probe
            .release(&[lane])
            .await
            .expect("a lane can be released");
        probe.hold(1).await;
        assert_ne!(probe.lane(&stage.topic, 0), lane, "the epoch has to rise");
        let deliveries = probe.collect(3).await;
        assert_eq!(texts(&deliveries), ["2", "3", "4"]);
        probe.settle(&deliveries).await;
        assert!(stage.drain(&mut probe).await.is_empty());
    })
    .await;
}

/// Settling out of order records nothing beyond the first unsettled message: from it on everything is
/// handed out again.
pub async fn low_water_never_passes_an_unsettled_message(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = stage.member().await;
        let all = numbered("", 8);
        stage.publish(&Key::from("k"), &borrowed(&all)).await;
        let deliveries = probe.collect(8).await;
        // 2 and 5 stay unsettled, the last one is settled first.
        for index in [7, 0, 3, 1, 6, 4] {
            probe.settle([&deliveries[index]]).await;
        }
        probe.crash();
        let mut probe = stage.member().await;
        let again = stage.drain(&mut probe).await;
        assert_eq!(texts(&again), ["2", "3", "4", "5", "6", "7"]);
        probe.settle(&again).await;
        probe.close().await;
        let mut probe = stage.member().await;
        assert!(stage.drain(&mut probe).await.is_empty());
    })
    .await;
}

/// Receipts of an earlier epoch, or settled before, change nothing.
pub async fn stale_receipts_are_ignored(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = stage.member().await;
        stage.publish(&Key::from("k"), &["a", "b"]).await;
        let old = probe.collect(2).await;
        let lane = probe.lane(&stage.topic, 0);
        probe
            .release(&[lane])
            .await
            .expect("a lane can be released");
        probe.hold(1).await;
        let new = probe.collect(2).await;
        assert_eq!(texts(&new), ["a", "b"]);
        // The same call as a late handler would make, and one made twice.
        probe.settle(&old).await;
        probe.settle([&new[0]]).await;
        probe.settle([&new[0]]).await;
        probe.crash();
        let mut probe = stage.member().await;
        let again = stage.drain(&mut probe).await;
        assert_eq!(texts(&again), ["b"], "a stale receipt counted");
        probe.settle(&again).await;
    })
    .await;
}

/// A message says how often the group was handed it, over all its members.
pub async fn handed_out_is_counted_where_declared(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let mut probe = stage.member().await;
        stage.publish(&Key::from("k"), &["a", "b"]).await;
        for expected in 1..=3 {
            let deliveries = probe.collect(2).await;
            assert_eq!(texts(&deliveries), ["a", "b"]);
            for delivery in &deliveries {
                let count = stage.capabilities.hand_out_count.then_some(expected);
                assert_eq!(delivery.handed_out, count);
            }
            probe.crash();
            probe = stage.member().await;
        }
        let deliveries = probe.collect(2).await;
        probe.settle(&deliveries).await;
    })
    .await;
}

fn texts(deliveries: &[Delivery]) -> Vec<String> {
    deliveries.iter().map(text_of).collect()
}
