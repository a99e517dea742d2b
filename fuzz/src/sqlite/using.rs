//! Everything that a service, its operators and its relays do with a database, one after the other.

use std::path::Path;
use std::time::Duration;

use eventbus_core::{
    Broker, ErrorKind, EventBus, EventId, KeyStateDesk, KeyStateStore, LeaseRequest, LeaseStore,
    MemberId, Message, OutboxStore, Publisher, Refused, Result, ScheduleStore, Start, Subscription,
    TakeScheduled, Timestamp, TopicPartition, Until,
};
use eventbus_sql::SqliteBroker;
use eventbus_testkit::Probe;

use super::sound::{ORDERS, PAYMENTS, RELAYS, Sound, config, lanes, lease_topics, place};

/// How long anything may take that has to end, on the slowest machine.
const LIMIT: Duration = Duration::from_secs(30);
/// How long a member is listened to that may have nothing to say.
const SILENCE: Duration = Duration::from_millis(40);

/// Whatever was done to the file: each call ends, with an error or with messages that were written.
pub(super) async fn everything(path: &Path, sound: &Sound) {
    let Some(broker) = ends(SqliteBroker::connect(config(path))).await else {
        return;
    };
    let bus = EventBus::builder(broker.clone()).build();
    operators(&bus).await;
    readers(&broker, sound).await;
    members(&broker, sound).await;
    held(&broker, sound).await;
    schedulers(&broker, sound).await;
    relays(&broker, sound).await;
    let more = vec![Message::new(ORDERS, "more").with_key("k")];
    let published = tokio::time::timeout(LIMIT, broker.publish(more)).await;
    // Taken or refused: it ended.
    drop(published.expect("publishing hangs"));
    ends(broker.close()).await;
}

/// The answer, if it is none of the errors that damage has.
async fn ends<T>(call: impl Future<Output = Result<T>>) -> Option<T> {
    let ended = tokio::time::timeout(LIMIT, call).await;
    match ended.expect("a call hangs") {
        Ok(answer) => Some(answer),
        Err(error) => {
            assert!(error.kind() != ErrorKind::Closed, "{error}");
            None
        }
    }
}

fn written(message: &Message, sound: &[Message], by: &str) {
    let is_same = |written: &Message| {
        (&written.key, &written.headers, &written.payload)
            == (&message.key, &message.headers, &message.payload)
    };
    assert!(sound.iter().any(is_same), "{by} got {message:?}");
}

async fn operators(bus: &EventBus) {
    ends(bus.describe_topics(&[])).await;
    ends(bus.lags(&[])).await;
    ends(bus.lag(PAYMENTS.as_str(), &[ORDERS])).await;
    ends(bus.health()).await;
}

/// What is read is the log from its beginning, and all of it where no error is reported.
async fn readers(broker: &SqliteBroker, sound: &Sound) {
    let reader = Subscription::reader(vec![ORDERS]).with_until(Until::Now);
    let Some(mut probe) = ends(Probe::join(broker, reader)).await else {
        return;
    };
    let mut read = 0;
    while probe.ended().len() < probe.assigned().len() || probe.assigned().is_empty() {
        let Some(()) = ends(probe.step()).await else {
            return;
        };
        let batch = probe.collect(probe.waiting()).await;
        for delivery in &batch {
            written(&delivery.message, &sound.log, "a reader");
        }
        read += batch.len();
        probe.settle(&batch).await;
    }
    assert!(read <= sound.log.len());
    let from_time = Subscription::reader(vec![ORDERS])
        .with_start(Start::Time(std::time::UNIX_EPOCH))
        .with_until(Until::Now);
    ends(Probe::join(broker, from_time)).await;
}

async fn members(broker: &SqliteBroker, sound: &Sound) {
    let member = Subscription::group(PAYMENTS, vec![ORDERS]);
    let Some(mut probe) = ends(Probe::join(broker, member)).await else {
        return;
    };
    let mut heard = 0;
    // A member that gets no partition, or no message, waits: that is no hang.
    while let Ok(Ok(())) = tokio::time::timeout(SILENCE, probe.step()).await {
        let batch = probe.collect(probe.waiting()).await;
        for delivery in &batch {
            written(&delivery.message, &sound.log, "a member");
        }
        heard += batch.len();
        let receipts: Vec<_> = batch.iter().map(|delivery| delivery.receipt).collect();
        if ends(probe.settle_receipts(&receipts)).await.is_none() || heard >= sound.log.len() - 4 {
            break;
        }
    }
    let closing = tokio::time::timeout(LIMIT, async { probe.crash() }).await;
    closing.expect("a member's end hangs");
}

async fn held(broker: &SqliteBroker, sound: &Sound) {
    let store = broker.key_state();
    let now = Timestamp::from_micros(i64::MAX / 4);
    let listed = ends(store.list(&PAYMENTS, None, 10)).await;
    for report in listed.unwrap_or_default() {
        let messages = ends(store.messages(&PAYMENTS, &report.held, None, 10)).await;
        for message in messages.unwrap_or_default() {
            written(&message.message, &sound.held, "the desk");
        }
    }
    let Some((claim, names)) = ends(store.claim(&PAYMENTS, &place())).await else {
        return;
    };
    ends(store.due(&PAYMENTS, std::slice::from_ref(&claim), now, 10)).await;
    for name in names {
        let wait = eventbus_core::Wait::nothing();
        let entry = eventbus_core::HoldEntry::new(name.clone(), sound.held[0].clone(), None, wait);
        ends(store.hold(&claim, &[entry])).await;
        let mut done = None;
        for _ in 0..5 {
            let Some(Some(first)) = ends(store.advance(&claim, &name, done)).await else {
                break;
            };
            written(&first.message, &sound.held, "a consumer");
            done = Some(first.number);
        }
    }
}

async fn schedulers(broker: &SqliteBroker, sound: &Sound) {
    let schedule = broker.schedule();
    ends(schedule.list(None, 10)).await;
    let now = Timestamp::from_micros(i64::MAX / 4);
    let request = TakeScheduled::new(MemberId::random(), now, Duration::from_secs(10));
    if let Some(taken) = ends(schedule.take(&request)).await {
        for scheduled in &taken.messages {
            written(&scheduled.message, &sound.scheduled, "a scheduler");
        }
        let ids: Vec<EventId> = taken.messages.iter().map(|one| one.id.clone()).collect();
        let refused = Refused {
            ids: Vec::new(),
            unknown: Vec::new(),
            again: now,
        };
        ends(schedule.done(taken.claim, &ids, &refused)).await;
    }
    let more = sound.scheduled[0].clone();
    let more = eventbus_core::Scheduled::new(EventId::from_name("more"), now, more);
    ends(schedule.add(&[more])).await;
    ends(schedule.cancel(&EventId::from_name("more"))).await;
}

async fn relays(broker: &SqliteBroker, sound: &Sound) {
    let store = broker.key_state();
    ends(store.depth()).await;
    let waiting = ends(store.next(&lanes(), 10, &[]))
        .await
        .unwrap_or_default();
    for waiting in &waiting {
        written(&waiting.message, &sound.outbox, "a relay");
    }
    let positions: Vec<u64> = waiting.iter().map(|waiting| waiting.position).collect();
    ends(store.remove(&positions)).await;
    let member = MemberId::random();
    let ttl = Duration::from_secs(10);
    let wanted = TopicPartition::new(lease_topics()[0].name.clone(), 1);
    let request = LeaseRequest::new(RELAYS, member, lease_topics(), ttl);
    if let Some(reply) = ends(store.exchange(&request.with_wanted(vec![wanted]))).await {
        let places = reply.members.iter().flat_map(|member| &member.topics);
        let places: u64 = places.map(|topic| u64::from(topic.partitions)).sum();
        // Each member makes a list of all of them.
        assert!(places <= 1 << 20, "{places} places to share out");
    }
    ends(store.leave(&RELAYS, member)).await;
}
