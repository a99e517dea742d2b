//! Where reading starts and ends, what readers and groups are told of gaps, and how far they are.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use eventbus_core::{
    AdminReply, AdminRequest, Delivery, ErrorKind, Group, GroupPosition, Key, Outcome, Position,
    Start, Subscription, Until,
};

use super::{BrokerHarness, DEADLINE, Stage, unique_group, unique_topic};
use crate::probe::{Probe, text_of, within};

/// A new group that starts at the earliest message sees what was published before it existed,
/// where `history` is declared; otherwise it sees what comes from then on, and what is published before
/// is refused or passed over.
pub async fn start_earliest_sees_history_where_declared(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let key = Key::from("k");
        publish_before_any_group(&stage, &key).await;
        let mut probe = stage.member().await;
        stage.publish(&key, &["after"]).await;
        let texts = stage.drain_texts(&mut probe).await;
        if stage.capabilities.history {
            assert_eq!(texts, ["before", "after"]);
        } else {
            assert_eq!(texts, ["after"]);
        }
    })
    .await;
}

/// Publishes to a topic that has no group. Where a broker keeps messages for groups only, it may say
/// that nobody would get this one.
async fn publish_before_any_group(stage: &Stage, key: &Key) {
    let batch = vec![stage.message(key, "before")];
    let Err(error) = stage.broker.publish(batch).await else {
        return;
    };
    assert!(!stage.capabilities.history, "{error}");
    let refused = &error.unpublished[0];
    assert_eq!(refused.outcome, Outcome::NotTaken, "{error}");
    assert!(refused.error.is_retryable(), "a group may come: {error}");
}

/// A new group that starts at the latest message sees only what comes; one that exists goes on
/// where it was, whatever it asks for.
pub async fn start_latest_sees_only_what_comes(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let key = Key::from("k");
        publish_before_any_group(&stage, &key).await;
        let latest = stage.subscription().with_start(Start::Latest);
        let mut probe = stage.only_member(latest.clone()).await;
        stage.publish(&key, &["after"]).await;
        assert_eq!(stage.drain_texts(&mut probe).await, ["after"]);
        probe.crash();
        let mut probe = stage.only_member(latest).await;
        assert_eq!(probe.collect_texts(1).await, ["after"]);
    })
    .await;
}

/// Where `replay` is declared, groups and readers start at any position.
pub async fn reading_starts_at_a_position(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        if !stage.capabilities.replay {
            let start = Start::Position(Position(0));
            stage.refuses(stage.reader().with_start(start)).await;
            stage.refuses(stage.subscription().with_start(start)).await;
            stage.refuses(stage.reader()).await;
            return;
        }
        stage.publish(&Key::from("k"), &["a", "b", "c", "d"]).await;
        let positions = positions(&stage).await;
        assert!(positions.is_sorted(), "{positions:?}");
        let start = Start::Position(positions[2]);
        for subscription in [stage.reader(), stage.subscription()] {
            let mut probe = stage.only_member(subscription.with_start(start)).await;
            let assigned = probe.assigned()[0].position;
            assert!(assigned.is_none_or(|assigned| assigned <= positions[2]));
            let deliveries = probe.collect(2).await;
            assert_eq!(texts(&deliveries), ["c", "d"]);
            assert_eq!(deliveries[0].position, Some(positions[2]));
        }
    })
    .await;
}

/// Where `replay` is declared, groups and readers start at the first message at or after a time.
pub async fn reading_starts_at_a_time(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        if !stage.capabilities.replay {
            let start = Start::Time(SystemTime::now());
            stage.refuses(stage.reader().with_start(start)).await;
            stage.refuses(stage.subscription().with_start(start)).await;
            return;
        }
        let key = Key::from("k");
        stage.publish(&key, &["a", "b"]).await;
        let between = passed_time().await;
        stage.publish(&key, &["c", "d"]).await;
        let start = Start::Time(between);
        for subscription in [stage.reader(), stage.subscription()] {
            let mut probe = stage.only_member(subscription.with_start(start)).await;
            assert_eq!(probe.collect_texts(2).await, ["c", "d"]);
        }
        let bounded = stage.reader().with_until(Until::Time(between));
        let mut probe = stage.only_member(bounded).await;
        probe.hear_until(|probe| probe.ended().len() == 1).await;
        assert_eq!(probe.collect_texts(2).await, ["a", "b"]);
        assert_eq!(probe.waiting(), 0, "it read beyond its end");
    })
    .await;
}

/// A time that lies behind everything published so far and before everything that follows, by
/// clocks that count milliseconds.
async fn passed_time() -> SystemTime {
    let start = SystemTime::now();
    let middle = start + Duration::from_millis(20);
    while SystemTime::now() < middle + Duration::from_millis(20) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    middle
}

/// A bounded reader gets what there was, says so once for each lane, and gets nothing later.
pub async fn bounded_read_ends_where_it_says(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 2).await;
        if !stage.capabilities.replay {
            stage.refuses(stage.reader().with_until(Until::Now)).await;
            return;
        }
        let keys = stage.keys();
        for key in &keys {
            stage.publish(key, &["a", "b", "c"]).await;
        }
        let mut now = stage
            .only_member(stage.reader().with_until(Until::Now))
            .await;
        for key in &keys {
            stage.publish(key, &["later"]).await;
        }
        now.hear_until(|probe| probe.ended().len() == 2).await;
        let deliveries = now.collect(6).await;
        assert_eq!(now.waiting(), 0, "it read beyond its end");
        assert!(!texts(&deliveries).contains(&"later".to_owned()));
        let end = deliveries
            .iter()
            .find(|found| text_of(found) == "c")
            .and_then(|found| found.position)
            .expect("a broker that replays has positions");
        let lane_of_end = deliveries
            .iter()
            .find(|found| found.position == Some(end))
            .map(|found| found.message.key.clone());
        let until = stage.reader().with_until(Until::Position(end));
        let mut until = stage.only_member(until).await;
        until.hear_until(|probe| probe.ended().len() == 2).await;
        let count = until.waiting();
        for delivery in until.collect(count).await {
            let place = delivery
                .position
                .expect("a broker that replays has positions");
            assert!(place < end, "it read beyond its end");
        }
        assert!(lane_of_end.is_some());
    })
    .await;
}

/// A bounded read of a partition without messages ends at once.
pub async fn empty_partition_ends_at_once(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 3).await;
        if !stage.capabilities.replay {
            stage.refuses(stage.reader().with_until(Until::Now)).await;
            return;
        }
        let reader = stage.reader().with_until(Until::Now);
        let mut probe = stage.only_member(reader).await;
        probe.hear_until(|probe| probe.ended().len() == 3).await;
        assert_eq!(probe.waiting(), 0);
    })
    .await;
}

/// The first signal of a reader assigns all its lanes, of all topics, with and without messages;
/// they stay its own when another reader comes.
pub async fn reader_has_all_its_lanes_at_once(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 3).await;
        let empty = unique_topic();
        stage.create(&empty, 2).await;
        let topics = vec![empty, stage.topic.clone()];
        let reader = Subscription::reader(topics).with_until(Until::Now);
        if !stage.capabilities.replay {
            stage.refuses(reader).await;
            return;
        }
        for key in stage.keys() {
            stage.publish(&key, &["a"]).await;
        }
        let mut probe = stage.join(reader.clone()).await;
        probe.step().await.expect("the reader goes on");
        assert_eq!(probe.assigned().len(), 5);
        let mut other = stage.join(reader).await;
        other.step().await.expect("the reader goes on");
        assert_eq!(other.assigned().len(), 5);
        for mut probe in [probe, other] {
            probe.hear_until(|probe| probe.ended().len() == 5).await;
            assert_eq!(probe.collect_texts(3).await, ["a", "a", "a"]);
            assert!(probe.revoking().is_empty() && probe.lost().is_empty());
            assert_eq!(probe.assigned().len(), 5);
        }
    })
    .await;
}

/// What a reader reads and settles moves no group's position, and readers do not share.
pub async fn reader_moves_no_group(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        if !stage.capabilities.replay {
            stage.refuses(stage.reader()).await;
            return;
        }
        let mut member = stage.member().await;
        stage.publish(&Key::from("k"), &["a", "b"]).await;
        for _ in 0..2 {
            let mut reader = stage.only_member(stage.reader()).await;
            let deliveries = reader.collect(2).await;
            assert_eq!(texts(&deliveries), ["a", "b"]);
            reader.settle(&deliveries).await;
            reader.close().await;
        }
        assert_eq!(member.collect_texts(2).await, ["a", "b"]);
        member.crash();
        let mut member = stage.member().await;
        assert_eq!(stage.drain_texts(&mut member).await, ["a", "b"]);
    })
    .await;
}

/// Messages that vanished before they were read are reported with their range: to a group and to
/// a reader. Where `gaps` is not declared, nothing can be trimmed.
pub async fn gap_is_reported_with_its_range(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let trim = |before| AdminRequest::Trim {
            topic: stage.topic.clone(),
            partition: 0,
            before,
        };
        if !stage.capabilities.gaps {
            stage.refuses_request(trim(Position(0))).await;
            return;
        }
        let other = Subscription::group(unique_group(), vec![stage.topic.clone()]);
        let mut other = stage.only_member(other).await;
        let mut probe = stage.member().await;
        stage.publish(&Key::from("k"), &["a"]).await;
        let first = probe.collect(1).await;
        probe.settle(&first).await;
        probe.close().await;
        stage.publish(&Key::from("k"), &["b", "c", "d", "e"]).await;
        let all = other.collect(5).await;
        let before = all[3].position.expect("a broker with gaps has positions");
        stage
            .broker
            .admin(trim(before))
            .await
            .expect("`gaps` is declared");
        let mut probe = stage.member().await;
        assert_eq!(probe.collect_texts(2).await, ["d", "e"]);
        let (lane, from, to) = *probe.gaps().first().expect("the gap is reported");
        assert_eq!(lane, probe.lane(&stage.topic, 0));
        assert_eq!(to, before);
        let lost = all[1].position.expect("a broker with gaps has positions");
        assert!(from <= lost, "the gap hides a message that vanished");
        assert!(first[0].position.is_none_or(|settled| settled < from));
        if !stage.capabilities.replay {
            return;
        }
        let start = all[0].position.expect("a broker with gaps has positions");
        let reader = stage.reader().with_start(Start::Position(start));
        let mut reader = stage.only_member(reader).await;
        assert_eq!(reader.collect_texts(2).await, ["d", "e"]);
        assert_eq!(reader.gaps().len(), 1, "{:?}", reader.gaps());
        assert_eq!(reader.gaps()[0].2, before);
    })
    .await;
}

/// Lag counts what is published and not settled, per partition.
pub async fn lag_counts_what_is_not_settled(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 2).await;
        let request = AdminRequest::Lag {
            group: stage.group.clone(),
            topics: vec![stage.topic.clone()],
        };
        if !stage.capabilities.lag {
            stage.refuses_request(request).await;
            return;
        }
        let mut probe = stage.member().await;
        assert_eq!(lag(&stage, request.clone()).await, [0, 0]);
        stage.publish(&stage.keys()[1], &["a", "b", "c"]).await;
        assert_eq!(lag(&stage, request.clone()).await, [0, 3]);
        let deliveries = probe.collect(3).await;
        assert_eq!(lag(&stage, request.clone()).await, [0, 3]);
        probe.settle(&deliveries[..2]).await;
        assert_eq!(lag(&stage, request.clone()).await, [0, 1]);
        probe.settle(&deliveries[2..]).await;
        assert_eq!(lag(&stage, request).await, [0, 0]);
    })
    .await;
}

async fn lag(stage: &Stage, request: AdminRequest) -> Vec<u64> {
    let reply = stage.broker.admin(request).await;
    let AdminReply::Lag(mut lanes) = reply.expect("`lag` is declared") else {
        panic!("not an answer to the request");
    };
    lanes.sort_by_key(|lane| lane.partition);
    assert!(lanes.iter().all(|lane| lane.topic == stage.topic));
    lanes.iter().map(|lane| lane.messages).collect()
}

/// Every group that subscribed to a topic is named with its first unsettled place and its lag on
/// each partition, whether or not it has members; groups of other topics are not.
pub async fn groups_are_listed_with_their_positions(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 2).await;
        let request = AdminRequest::Groups {
            topics: vec![stage.topic.clone()],
        };
        if !stage.capabilities.lag {
            stage.refuses_request(request).await;
            return;
        }
        assert_eq!(groups(&stage, request.clone()).await, []);
        let other = Subscription::group(unique_group(), vec![stage.topic.clone()]);
        let name = other.group.clone().expect("it has a group");
        let elsewhere = Stage::new(harness, 1).await;
        let _elsewhere = elsewhere.member().await;
        let gone = stage.only_member(other).await;
        gone.close().await;
        let mut probe = stage.member().await;
        stage.publish(&stage.keys()[1], &["a", "b", "c"]).await;
        let deliveries = probe.collect(3).await;
        probe.settle(&deliveries[..2]).await;

        let found = groups(&stage, request.clone()).await;
        let expected = BTreeMap::from([(&name, [0, 3]), (&stage.group, [0, 1])]);
        let expected: Vec<_> = expected
            .into_iter()
            .flat_map(|(group, lags)| [(group, 0, lags[0]), (group, 1, lags[1])])
            .collect();
        let lags: Vec<_> = found
            .iter()
            .map(|found| (&found.group, found.partition, found.lag))
            .collect();
        assert_eq!(lags, expected);
        assert!(found.iter().all(|found| found.topic == stage.topic));
        let position = |group: &Group| {
            let mut found = found.iter().filter(|found| found.group == *group);
            found
                .find(|found| found.partition == 1)
                .map(|it| it.position)
        };
        if let Some(settled) = deliveries[1].position {
            assert!(position(&stage.group) > Some(settled));
            assert!(position(&stage.group) <= deliveries[2].position);
            assert!(position(&name) <= deliveries[0].position);
        }
        let all = groups(&stage, AdminRequest::Groups { topics: Vec::new() }).await;
        assert!(found.iter().all(|found| all.contains(found)));
        assert!(all.iter().any(|found| found.group == elsewhere.group));
        probe.settle(&deliveries[2..]).await;
        let found = groups(&stage, request).await;
        let mine = found.iter().filter(|found| found.group == stage.group);
        assert_eq!(mine.map(|found| found.lag).sum::<u64>(), 0);
        let missing = stage.broker.admin(AdminRequest::Groups {
            topics: vec![unique_topic()],
        });
        let error = missing.await.expect_err("there is no such topic");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    })
    .await;
}

async fn groups(stage: &Stage, request: AdminRequest) -> Vec<GroupPosition> {
    let reply = stage.broker.admin(request).await;
    let AdminReply::Groups(groups) = reply.expect("`lag` is declared") else {
        panic!("not an answer to the request");
    };
    groups
}

/// A group without members is moved; one with members, and one that does not exist, is not.
pub async fn group_is_reset_only_without_members(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let reset = |group: &Group, to| AdminRequest::ResetGroup {
            group: group.clone(),
            topic: stage.topic.clone(),
            to,
        };
        if !stage.capabilities.replay {
            let request = reset(&stage.group, Start::Earliest);
            stage.refuses_request(request).await;
            return;
        }
        let mut probe = stage.member().await;
        stage.publish(&Key::from("k"), &["a", "b", "c"]).await;
        let deliveries = probe.collect(3).await;
        probe.settle(&deliveries).await;
        let error = stage
            .broker
            .admin(reset(&stage.group, Start::Earliest))
            .await
            .expect_err("the group has a member");
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        probe.close().await;
        let second = deliveries[1].position.expect("positions are replayed");
        for (to, expected) in [
            (Start::Position(second), &["b", "c"][..]),
            (Start::Earliest, &["a", "b", "c"][..]),
            (Start::Latest, &[][..]),
        ] {
            stage
                .broker
                .admin(reset(&stage.group, to))
                .await
                .expect("the group has no member");
            let mut probe = stage.member().await;
            let mut texts = stage.drain_texts(&mut probe).await;
            // Marks of earlier rounds are messages like others.
            texts.retain(|text| !text.starts_with("group-"));
            assert_eq!(texts, expected, "reset to {to:?}");
            probe.close().await;
        }
        let error = stage
            .broker
            .admin(reset(&unique_group(), Start::Earliest))
            .await
            .expect_err("the group does not exist");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    })
    .await;
}

/// The positions of everything on the topic's only partition.
async fn positions(stage: &Stage) -> Vec<Position> {
    let reader = stage.reader().with_until(Until::Now);
    let mut probe: Probe = stage.only_member(reader).await;
    probe.hear_until(|probe| !probe.ended().is_empty()).await;
    let count = probe.waiting();
    let deliveries = probe.collect(count).await;
    deliveries
        .iter()
        .map(|found| found.position.expect("a broker that replays has positions"))
        .collect()
}

fn texts(deliveries: &[Delivery]) -> Vec<String> {
    deliveries.iter().map(text_of).collect()
}
