//! Topics are created as declared, never changed silently, and missing ones are named.

use eventbus_core::{AdminReply, AdminRequest, ErrorKind, TopicReport, TopicSpec};

use super::{BrokerHarness, DEADLINE, Stage, unique_topic};
use crate::probe::within;

/// Applying creates what is missing; applying again changes nothing and names each difference.
pub async fn topics_are_applied_and_drift_is_reported(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let declared = TopicSpec::new(unique_topic()).with_partitions(3);
        let created = reports(&stage, vec![declared.clone()]).await;
        assert_eq!(created[0].name, declared.name);
        assert!(created[0].created && created[0].drift.is_empty());
        assert_eq!(created[0].partitions, 3);
        let again = reports(&stage, vec![declared.clone()]).await;
        assert!(!again[0].created && again[0].drift.is_empty());
        let more = declared.clone().with_partitions(5);
        let new = TopicSpec::new(unique_topic());
        let drifted = reports(&stage, vec![more, new]).await;
        assert_eq!(drifted[0].partitions, 3, "the count must not change");
        assert_eq!(drifted[0].drift.len(), 1, "{:?}", drifted[0].drift);
        assert!(drifted[1].created && drifted[1].partitions > 0);
        let described = stage
            .broker
            .admin(AdminRequest::DescribeTopics(vec![declared.name.clone()]))
            .await
            .expect("the topic is there");
        let expected = TopicReport::new(declared.name, 3);
        assert_eq!(described, AdminReply::Topics(vec![expected]));
    })
    .await;
}

async fn reports(stage: &Stage, topics: Vec<TopicSpec>) -> Vec<TopicReport> {
    let reply = stage.broker.admin(AdminRequest::ApplyTopics(topics)).await;
    match reply.expect("topics can be applied") {
        AdminReply::Topics(reports) => reports,
        other => panic!("not an answer to the request: {other:?}"),
    }
}

/// Where no topic is named, all there are are described, or the broker says that it can't list them.
pub async fn topics_are_listed_where_possible(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 2).await;
        let all = AdminRequest::DescribeTopics(Vec::new());
        match stage.broker.admin(all).await {
            Ok(AdminReply::Topics(reports)) => {
                assert!(reports.is_sorted_by_key(|report| report.name.clone()));
                assert!(reports.contains(&TopicReport::new(stage.topic.clone(), 2)));
            }
            Ok(other) => panic!("not an answer to the request: {other:?}"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}"),
        }
    })
    .await;
}

/// Describing a topic that does not exist is `NotFound`.
pub async fn missing_topic_is_not_found(harness: &dyn BrokerHarness) {
    within(DEADLINE, async {
        let stage = Stage::new(harness, 1).await;
        let error = stage
            .broker
            .admin(AdminRequest::DescribeTopics(vec![unique_topic()]))
            .await
            .expect_err("there is no such topic");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    })
    .await;
}
