//! Brokers with one planted bug each: the check named after the broken promise has to fail.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::{
    AdminReply, AdminRequest, Broker, Capabilities, Deliveries, Headers, Lane, Limits, Member,
    MemoryBroker, MemoryConfig, MemoryProfile, Message, PublishError, Publisher, Receipt, Result,
    Settlement, Signal, Subscriber, Subscription,
};
use eventbus_testkit::{BrokerHarness, broker};
use futures_util::FutureExt;
use tokio::sync::Mutex;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The wrapper alone breaks nothing.
    Nothing,
    /// Two neighbours of a batch change places.
    Swap,
    /// A message that is in a batch twice is taken once.
    Deduplicate,
    /// Headers do not arrive.
    ForgetHeaders,
    /// Settling one message settles everything before it.
    SettleBeyond,
    /// The first message of a batch is settled when it is handed out: a crash loses it.
    SettleEarly,
    /// A lane is given away as soon as it is revoked, with handlers running.
    ReleaseEarly,
    /// The limits are not kept to.
    IgnoreLimits,
    /// A capability is declared that is not there.
    Boast,
    /// Gaps are not reported.
    HideGaps,
    /// What was handed to a dropped `next` is gone.
    ForgetDropped,
    /// Publishing goes on after `close`.
    IgnoreClose,
}

#[derive(Clone, Debug)]
struct FaultyBroker {
    inner: MemoryBroker,
    fault: Fault,
}

#[async_trait]
impl BrokerHarness for FaultyBroker {
    async fn connect(&self) -> Result<Arc<dyn Broker>> {
        Ok(Arc::new(Self {
            inner: self.inner.connect(),
            fault: self.fault,
        }))
    }

    async fn restart(&self) -> Result<bool> {
        Ok(false)
    }
}

#[async_trait]
impl Publisher for FaultyBroker {
    async fn publish(&self, mut batch: Vec<Message>) -> Result<(), PublishError> {
        match self.fault {
            Fault::Swap if batch.len() > 1 => {
                let same = (1..batch.len()).find(|index| batch[*index].key == batch[0].key);
                batch.swap(0, same.unwrap_or(0));
            }
            Fault::Deduplicate => batch.dedup(),
            Fault::ForgetHeaders => {
                for message in &mut batch {
                    message.headers = Headers::new();
                }
            }
            _ => {}
        }
        self.inner.publish(batch).await
    }
}

#[async_trait]
impl Subscriber for FaultyBroker {
    async fn subscribe(&self, mut subscription: Subscription) -> Result<Member> {
        if self.fault == Fault::IgnoreLimits {
            subscription.limits = Limits::default();
        }
        let member = self.inner.subscribe(subscription).await?;
        let settlement = Arc::new(Mutex::new(member.settlement));
        Ok(Member::new(
            Box::new(FaultyDeliveries {
                inner: member.deliveries,
                settlement: Arc::clone(&settlement),
                fault: self.fault,
            }),
            Box::new(FaultySettlement {
                inner: settlement,
                fault: self.fault,
                next: BTreeMap::new(),
            }),
        ))
    }
}

#[async_trait]
impl Broker for FaultyBroker {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.inner.capabilities();
        if self.fault == Fault::Boast {
            capabilities.hand_out_count = true;
        }
        capabilities
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        self.inner.admin(request).await
    }

    async fn close(&self) -> Result<()> {
        if self.fault == Fault::IgnoreClose {
            return Ok(());
        }
        self.inner.close().await
    }
}

#[derive(Debug)]
struct FaultyDeliveries {
    inner: Box<dyn Deliveries>,
    settlement: Arc<Mutex<Box<dyn Settlement>>>,
    fault: Fault,
}

#[async_trait]
impl Deliveries for FaultyDeliveries {
    async fn next(&mut self) -> Result<Signal> {
        loop {
            let signal = self.inner.next().await?;
            match &signal {
                Signal::Delivered(batch) if self.fault == Fault::SettleEarly => {
                    let early = [batch[0].receipt];
                    self.settlement.lock().await.settle(&early).await?;
                }
                Signal::Revoking(lanes) if self.fault == Fault::ReleaseEarly => {
                    self.settlement.lock().await.release(lanes).await?;
                }
                Signal::Gap { .. } if self.fault == Fault::HideGaps => continue,
                Signal::Delivered(_) if self.fault == Fault::ForgetDropped => {
                    // The signal is held over an await, so that a dropped future takes it along.
                    tokio::task::yield_now().await;
                }
                _ => {}
            }
            return Ok(signal);
        }
    }

    async fn close(self: Box<Self>) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct FaultySettlement {
    inner: Arc<Mutex<Box<dyn Settlement>>>,
    fault: Fault,
    /// The first tag of each lane that was not settled.
    next: BTreeMap<(u32, u32), u64>,
}

#[async_trait]
impl Settlement for FaultySettlement {
    async fn settle(&mut self, settled: &[Receipt]) -> Result<()> {
        let mut all = settled.to_vec();
        if self.fault == Fault::SettleBeyond {
            for Receipt { lane, tag } in settled {
                let next = self.next.entry((lane.id, lane.epoch)).or_default();
                let before = (*next..*tag).map(|tag| Receipt { lane: *lane, tag });
                all.extend(before);
                *next = (*tag + 1).max(*next);
            }
        }
        self.inner.lock().await.settle(&all).await
    }

    async fn release(&mut self, lanes: &[Lane]) -> Result<()> {
        self.inner.lock().await.release(lanes).await
    }
}

/// Whether `check` accepts a broker with this fault.
#[expect(clippy::future_not_send, reason = "the test's own thread runs it")]
async fn accepts(fault: Fault, check: impl AsyncFn(&dyn BrokerHarness)) -> bool {
    let broker = FaultyBroker {
        // It does not count what it hands out, which is what is boasted of.
        inner: MemoryBroker::with(MemoryConfig::default().like(MemoryProfile::Kafka)),
        fault,
    };
    let check = AssertUnwindSafe(async { check(&broker).await });
    check.catch_unwind().await.is_ok()
}

/// One test for each fault: the check fails with it and passes without it.
macro_rules! catches {
    ($($name:ident: $fault:ident by $check:ident;)*) => {
        $(
            #[tokio::test(start_paused = true)]
            async fn $name() {
                assert!(accepts(Fault::Nothing, broker::$check).await, "it accepts nothing");
                assert!(!accepts(Fault::$fault, broker::$check).await, "it catches nothing");
            }
        )*
    };
}

catches! {
    swapped_messages_are_caught: Swap by messages_of_a_key_keep_the_order_of_their_batch;
    silent_deduplication_is_caught: Deduplicate by message_published_twice_arrives_twice;
    forgotten_headers_are_caught: ForgetHeaders by bytes_and_headers_arrive_unchanged;
    settling_beyond_the_unsettled_is_caught: SettleBeyond by low_water_never_passes_an_unsettled_message;
    message_lost_in_a_crash_is_caught: SettleEarly by handed_out_is_counted_where_declared;
    message_lost_in_comings_and_goings_is_caught: SettleEarly by members_that_come_and_go_lose_nothing;
    lane_given_away_too_early_is_caught: ReleaseEarly by moving_lane_waits_for_its_release;
    ignored_message_limit_is_caught: IgnoreLimits by message_limit_is_kept;
    ignored_byte_limit_is_caught: IgnoreLimits by byte_limit_is_kept_and_large_messages_pass;
    ignored_lane_limit_is_caught: IgnoreLimits by lane_limit_is_kept;
    ignored_batch_limit_is_caught: IgnoreLimits by one_batch_is_bounded;
    boasting_is_caught: Boast by handed_out_is_counted_where_declared;
    hidden_gap_is_caught: HideGaps by gap_is_reported_with_its_range;
    message_taken_by_a_dropped_next_is_caught: ForgetDropped by dropped_next_loses_nothing;
    publishing_after_close_is_caught: IgnoreClose by publish_after_close_is_not_taken;
}
