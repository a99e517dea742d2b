//! The conformance suite of brokers: one function a check, and the macro that makes tests of them.
//!
//! An adapter's `tests/it/conformance.rs` holds a [`BrokerHarness`] and one line:
//!
//! ```
//! use std::sync::Arc;
//!
//! use eventbus_core::{Broker, MemoryBroker, Result};
//! use eventbus_testkit::{BrokerHarness, broker_conformance};
//!
//! struct Harness(MemoryBroker);
//!
//! impl Harness {
//!     async fn start() -> Self {
//!         Self(MemoryBroker::new())
//!     }
//! }
//!
//! #[async_trait::async_trait]
//! impl BrokerHarness for Harness {
//!     async fn connect(&self) -> Result<Arc<dyn Broker>> {
//!         Ok(Arc::new(self.0.connect()))
//!     }
//!
//!     async fn restart(&self) -> Result<bool> {
//!         Ok(false)
//!     }
//! }
//!
//! // Without the attribute where no server is needed.
//! broker_conformance!(#[ignore = "needs brokers: ./dev/test"] Harness::start().await);
//! ```
//!
//! A check panics when the broker breaks the contract. What a broker does not declare in its
//! [`Capabilities`] is checked to be `Unsupported`. Topics and groups are new in every check, so
//! that checks run side by side on one server. "Nothing more arrives" is never shown by waiting:
//! a later message on the same partitions marks the end.

mod content;
mod group;
mod lifecycle;
mod notes;
mod position;
mod pressure;
mod settlement;
mod topic;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use eventbus_core::{
    AdminRequest, Broker, Capabilities, Delivery, ErrorKind, Group, Key, Message, Result,
    Subscription, Topic, TopicSpec, partition_of,
};

use crate::probe::{Probe, text_of};

pub use content::{
    bytes_and_headers_arrive_unchanged, large_message_arrives_unchanged,
    later_messages_of_a_refused_key_are_held_back_where_declared,
    message_published_twice_arrives_twice, messages_of_a_key_keep_the_order_of_awaited_publishes,
    messages_of_a_key_keep_the_order_of_their_batch,
    messages_of_a_key_share_the_partition_of_that_key, oversized_message_is_refused_and_not_taken,
    partial_failure_names_the_right_messages,
};
pub use group::{
    concurrent_members_and_publishers_see_every_message_once, groups_fan_out_and_members_share,
    lane_that_is_not_released_in_time_is_lost, many_topics_do_not_mix,
    members_that_come_and_go_lose_nothing, moving_lane_waits_for_its_release,
};
pub use lifecycle::{
    close_ends_members_and_unblocks_next, close_is_idempotent_and_concurrent,
    closing_one_client_leaves_the_other_working, dropped_next_loses_nothing, health_is_answered,
    publish_after_close_is_not_taken, restart_keeps_what_was_acknowledged,
};
pub use notes::{NOTES_VARIABLE, note};
pub use position::{
    bounded_read_ends_where_it_says, empty_partition_ends_at_once, gap_is_reported_with_its_range,
    group_is_reset_only_without_members, groups_are_listed_with_their_positions,
    lag_counts_what_is_not_settled, reader_has_all_its_lanes_at_once, reader_moves_no_group,
    reading_starts_at_a_position, reading_starts_at_a_time,
    start_earliest_sees_history_where_declared, start_latest_sees_only_what_comes,
};
pub use pressure::{
    byte_limit_is_kept_and_large_messages_pass, control_signals_pass_while_full,
    lane_limit_is_kept, message_limit_is_kept, one_batch_is_bounded,
};
pub use settlement::{
    crash_hands_unsettled_messages_out_again, handed_out_is_counted_where_declared,
    low_water_never_passes_an_unsettled_message, released_lane_is_handed_out_again,
    settled_message_is_not_delivered_again, stale_receipts_are_ignored,
    unsettled_messages_come_first_after_close,
};
pub use topic::{
    missing_topic_is_not_found, topics_are_applied_and_drift_is_reported,
    topics_are_listed_where_possible,
};

/// Gives the suite clients of one server.
#[async_trait]
pub trait BrokerHarness: Send + Sync {
    /// An independent client: closing it leaves the others working.
    ///
    /// # Errors
    ///
    /// When the server is away.
    async fn connect(&self) -> Result<Arc<dyn Broker>>;

    /// Stops the server and starts it again on the same data; `false` when that is impossible,
    /// which is right only for a broker that declares [`Durability::Process`].
    ///
    /// [`Durability::Process`]: eventbus_core::Durability::Process
    ///
    /// # Errors
    ///
    /// When the server does not come back.
    async fn restart(&self) -> Result<bool>;
}

/// Expands to one `#[tokio::test]` for each check of [`broker`](crate::broker).
///
/// The expression makes the [`BrokerHarness`] of one test and may `await`. An attribute in front of
/// it is put on every test.
#[macro_export]
macro_rules! broker_conformance {
    (@checks $attributes:tt $harness:expr; $($check:ident)*) => {
        $( $crate::broker_conformance!(@check $attributes $harness; $check); )*
    };
    (@check [$(#[$attribute:meta])*] $harness:expr; $check:ident) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        $(#[$attribute])*
        async fn $check() {
            let harness = $harness;
            $crate::broker::$check(&harness).await;
            $crate::broker::note(stringify!($check), &harness).await;
        }
    };
    (@all $attributes:tt $harness:expr) => {
        $crate::broker_conformance!(@checks $attributes $harness;
            bytes_and_headers_arrive_unchanged
            large_message_arrives_unchanged
            message_published_twice_arrives_twice
            messages_of_a_key_keep_the_order_of_their_batch
            messages_of_a_key_keep_the_order_of_awaited_publishes
            messages_of_a_key_share_the_partition_of_that_key
            oversized_message_is_refused_and_not_taken
            partial_failure_names_the_right_messages
            later_messages_of_a_refused_key_are_held_back_where_declared
            settled_message_is_not_delivered_again
            unsettled_messages_come_first_after_close
            crash_hands_unsettled_messages_out_again
            released_lane_is_handed_out_again
            low_water_never_passes_an_unsettled_message
            stale_receipts_are_ignored
            handed_out_is_counted_where_declared
            groups_fan_out_and_members_share
            concurrent_members_and_publishers_see_every_message_once
            many_topics_do_not_mix
            members_that_come_and_go_lose_nothing
            moving_lane_waits_for_its_release
            lane_that_is_not_released_in_time_is_lost
            start_earliest_sees_history_where_declared
            start_latest_sees_only_what_comes
            reading_starts_at_a_position
            reading_starts_at_a_time
            bounded_read_ends_where_it_says
            empty_partition_ends_at_once
            reader_has_all_its_lanes_at_once
            reader_moves_no_group
            gap_is_reported_with_its_range
            lag_counts_what_is_not_settled
            groups_are_listed_with_their_positions
            group_is_reset_only_without_members
            message_limit_is_kept
            byte_limit_is_kept_and_large_messages_pass
            lane_limit_is_kept
            one_batch_is_bounded
            control_signals_pass_while_full
            close_is_idempotent_and_concurrent
            close_ends_members_and_unblocks_next
            closing_one_client_leaves_the_other_working
            publish_after_close_is_not_taken
            dropped_next_loses_nothing
            health_is_answered
            restart_keeps_what_was_acknowledged
            topics_are_applied_and_drift_is_reported
            topics_are_listed_where_possible
            missing_topic_is_not_found
        );
    };
    // One attribute, not several: before an expression a repetition would be ambiguous.
    (#[$attribute:meta] $harness:expr) => {
        $crate::broker_conformance!(@all [#[$attribute]] $harness);
    };
    ($harness:expr) => {
        $crate::broker_conformance!(@all [] $harness);
    };
}

/// How long a check may take, on a slow machine with other tests beside it.
const DEADLINE: Duration = Duration::from_secs(60);

/// One check's client, topic and group.
struct Stage {
    broker: Arc<dyn Broker>,
    capabilities: Capabilities,
    topic: Topic,
    partitions: u32,
    group: Group,
}

impl Stage {
    /// Connects and creates a topic of its own.
    async fn new(harness: &dyn BrokerHarness, partitions: u32) -> Self {
        let broker = harness.connect().await.expect("the server answers");
        let capabilities = broker.capabilities();
        let stage = Self {
            topic: unique_topic(),
            group: unique_group(),
            capabilities,
            broker,
            partitions,
        };
        stage.create(&stage.topic, partitions).await;
        stage
    }

    async fn create(&self, topic: &Topic, partitions: u32) {
        let spec = TopicSpec::new(topic.clone()).with_partitions(partitions);
        self.broker
            .admin(AdminRequest::ApplyTopics(vec![spec]))
            .await
            .expect("a topic can be created");
    }

    fn subscription(&self) -> Subscription {
        Subscription::group(self.group.clone(), vec![self.topic.clone()])
    }

    fn reader(&self) -> Subscription {
        Subscription::reader(vec![self.topic.clone()])
    }

    /// A member of the group that holds all partitions.
    async fn member(&self) -> Probe {
        self.only_member(self.subscription()).await
    }

    /// A member that waits until it holds all partitions.
    async fn only_member(&self, subscription: Subscription) -> Probe {
        let mut probe = self.join(subscription).await;
        probe.hold(self.partitions as usize).await;
        probe
    }

    async fn join(&self, subscription: Subscription) -> Probe {
        Probe::join(&*self.broker, subscription)
            .await
            .expect("a member can join")
    }

    /// A message of the topic.
    fn message(&self, key: &Key, text: &str) -> Message {
        Message::new(self.topic.clone(), text.to_owned()).with_key(key.clone())
    }

    /// Publishes one message for each text, as one batch.
    async fn publish(&self, key: &Key, texts: &[&str]) {
        let batch = texts.iter().map(|text| self.message(key, text)).collect();
        self.broker.publish(batch).await.expect("there is room");
    }

    /// A key for each partition, in the order of the partitions.
    fn keys(&self) -> Vec<Key> {
        (0..self.partitions)
            .map(|partition| key_on(partition, self.partitions))
            .collect()
    }

    /// Publishes a last message to every partition and returns what came before it, unsettled.
    async fn drain(&self, probe: &mut Probe) -> Vec<Delivery> {
        let mark = unique_group().to_string();
        for key in self.keys() {
            self.publish(&key, &[&mark]).await;
        }
        let mut before = Vec::new();
        let mut marks = 0;
        while marks < self.partitions {
            for delivery in probe.collect(1).await {
                if text_of(&delivery) == mark {
                    marks += 1;
                    probe.settle([&delivery]).await;
                } else {
                    before.push(delivery);
                }
            }
        }
        before
    }

    async fn drain_texts(&self, probe: &mut Probe) -> Vec<String> {
        self.drain(probe).await.iter().map(text_of).collect()
    }

    /// Asserts that a subscription is refused because a capability is not declared.
    async fn refuses(&self, subscription: Subscription) {
        let error = self
            .broker
            .subscribe(subscription)
            .await
            .expect_err("it is not declared, so it is refused");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }

    /// Asserts that a request is refused because a capability is not declared.
    async fn refuses_request(&self, request: AdminRequest) {
        let error = self
            .broker
            .admin(request)
            .await
            .expect_err("it is not declared, so it is refused");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
}

/// A key that belongs to `partition`.
fn key_on(partition: u32, partitions: u32) -> Key {
    (0u32..)
        .map(Key::display)
        .find(|key| partition_of(key, partitions) == partition)
        .expect("some number belongs to every partition")
}

fn unique_name(kind: &str) -> String {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanos = since.expect("it is later than 1970").as_nanos();
    format!("{kind}-{nanos:x}-{:x}-{number}", std::process::id())
}

pub(crate) fn unique_topic() -> Topic {
    Topic::new(&unique_name("topic")).expect("it is a name")
}

pub(crate) fn unique_group() -> Group {
    Group::new(&unique_name("group")).expect("it is a name")
}

/// Texts `{prefix}{number}`.
fn numbered(prefix: &str, count: usize) -> Vec<String> {
    (0..count)
        .map(|number| format!("{prefix}{number}"))
        .collect()
}

/// Borrows texts.
fn borrowed(texts: &[String]) -> Vec<&str> {
    texts.iter().map(String::as_str).collect()
}
