//! What is published from outside and inside of handlers: what it carries and when it is refused.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use eventbus_core::{
    AdminReply, AdminRequest, BoxError, Broker, Capabilities, ConsumerState, Context, Error,
    ErrorKind, Event, EventId, Member, MemoryBroker, MemoryConfig, MemoryProfile, Message, Origin,
    Outcome, Outgoing, PartlyPublished, PublishError, Publisher, RetryPolicy, Start, Subscriber,
    Subscription, Unpublished, Until, header,
};
use eventbus_testkit::TestBus;

use crate::fixtures::{Calls, OrderCreated, OrderPaid, order, paid, paying};

fn too_large(order: u64) -> OrderPaid {
    OrderPaid {
        order,
        note: "x".repeat(2 * 1024 * 1024),
    }
}

#[tokio::test]
async fn an_event_too_large_for_the_broker_is_refused_where_it_is_published() {
    let test = TestBus::like(MemoryProfile::Kafka);
    let error = test.publish(too_large(1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let consumer = test.consumer("billing").retry(RetryPolicy::none()).on(
        async |order: OrderCreated, cx: Context| {
            cx.publish(paid(order.order))?;
            let error = cx.publish(too_large(order.order)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            Err(error.into())
        },
    );
    let _consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    assert!(test.published::<OrderPaid>().await.is_empty());
    let letters = test.dead_letters().await;
    assert_eq!(letters[0].cause, "error");
    assert!(
        letters[0].error.contains("a reference to it"),
        "{}",
        letters[0].error
    );
}

#[tokio::test]
async fn an_event_that_just_fits_has_a_dead_letter_that_fits() {
    let test = TestBus::like(MemoryProfile::Kafka);
    let consumer = test
        .consumer("accounts")
        .retry(RetryPolicy::none())
        .on(async |_: OrderPaid, _: Context| Err("a long error ".repeat(10_000).into()));
    let _consumer = test.spawn(consumer).await;
    // The largest that is taken, found by halving.
    let (mut fits, mut refused) = (0, 2 * 1024 * 1024);
    while refused - fits > 1 {
        let middle = (fits + refused) / 2;
        let event = OrderPaid {
            order: 1,
            note: "x".repeat(middle),
        };
        match test.publish(event).await {
            Ok(_) => fits = middle,
            Err(_) => refused = middle,
        }
    }
    test.run_out().await;
    let published = test.published::<OrderPaid>().await.len();
    assert!(fits > 900_000);
    assert_eq!(test.dead_letters().await.len(), published);
}

#[tokio::test]
async fn a_handler_s_events_carry_the_flow_of_what_caused_them() {
    let test = TestBus::new();
    let consumer = test
        .consumer("billing")
        .on(async |order: OrderCreated, cx: Context| {
            let paid = Outgoing::new(paid(order.order)).with_metadata("provider", "psp");
            cx.publish(paid)?;
            Ok(())
        });
    let _consumer = test.spawn(consumer).await;
    let origin = Origin::new()
        .with_correlation_id("request-1")
        .with_metadata("userId", "u-17")
        .with_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
        .with_tracestate("vendor=1");
    let cause = test
        .publish(Outgoing::new(order(1)).with_origin(origin))
        .await
        .unwrap();
    test.settled().await;
    let mut reader = test
        .read(&[OrderPaid::TOPIC], Start::Earliest, Some(Until::Now))
        .await
        .unwrap();
    let record = reader.next().await.unwrap().expect("it was published");
    let envelope = test.envelope(&record.message).unwrap();
    assert_eq!(envelope.correlation_id, "request-1");
    assert_eq!(envelope.causation_id, Some(cause.to_string()));
    assert_eq!(envelope.source, "test");
    let metadata: Vec<_> = envelope
        .metadata
        .iter()
        .map(|(n, v)| (n.as_str(), v.as_str()))
        .collect();
    assert_eq!(metadata, [("provider", "psp"), ("userId", "u-17")]);
    let headers = &record.message.headers;
    assert!(
        headers
            .get_str(header::TRACEPARENT)
            .unwrap()
            .starts_with("00-4bf92f")
    );
    assert_eq!(headers.get_str(header::TRACESTATE), Some("vendor=1"));
}

type Ids = Mutex<Vec<Vec<EventId>>>;

/// Publishes three events of one type and two keys, then fails twice.
async fn publishing_three(order: OrderCreated, cx: Context<Ids>) -> Result<(), BoxError> {
    let ids = [order.order, order.order, order.order + 1]
        .map(|order| cx.publish(paid(order)).expect("it fits"));
    cx.state().lock().unwrap().push(ids.to_vec());
    match cx.attempt() {
        3 => Ok(()),
        _ => Err("not yet".into()),
    }
}

#[tokio::test]
async fn a_handler_run_again_publishes_the_same_ids_and_all_differ() {
    let test = TestBus::new();
    let ids = Arc::new(Ids::default());
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&ids))
        .on(publishing_three);
    let _consumer = test.spawn(consumer).await;
    let other = Arc::new(Ids::default());
    let stock = test
        .consumer("stock")
        .shared_state(Arc::clone(&other))
        .on(publishing_three);
    let _stock = test.spawn(stock).await;
    test.publish(order(1)).await.unwrap();
    test.run_out().await;
    let runs = ids.lock().unwrap().clone();
    assert_eq!(runs.len(), 3);
    assert!(runs.iter().all(|run| *run == runs[0]));
    let others = other.lock().unwrap().clone();
    let all: HashSet<_> = runs[0].iter().chain(&others[0]).collect();
    assert_eq!(all.len(), 6, "another group's events are other events");
    assert_eq!(test.published::<OrderPaid>().await.len(), 6);
}

#[tokio::test]
async fn publishing_past_the_context_is_refused_unless_it_is_spelled_out() {
    let test = TestBus::new();
    let consumer = test
        .consumer("billing")
        .state(test.bus().clone())
        .retry(RetryPolicy::none())
        .on(
            async |order: OrderCreated, cx: Context<eventbus_core::EventBus>| {
                let bus = cx.state();
                let error = bus.publish(paid(order.order)).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                assert!(error.to_string().contains("cx.publish("), "{error}");
                assert!(error.to_string().contains("publish_now("), "{error}");
                assert!(bus.publish_all([paid(order.order)]).await.is_err());
                bus.publish_now(paid(order.order)).await?;
                Ok(())
            },
        );
    let consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    assert_eq!(consumer.status().counts.handled, 1);
    assert_eq!(test.published::<OrderPaid>().await.len(), 1);
}

#[tokio::test]
async fn publish_all_takes_nothing_when_one_event_is_too_large() {
    let test = TestBus::like(MemoryProfile::Kafka);
    let error = test.publish_all([paid(1), too_large(2)]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(test.published::<OrderPaid>().await.is_empty());
}

#[tokio::test]
#[should_panic(expected = "use a bus like a broker with `replay`")]
async fn what_was_published_to_a_broker_that_keeps_nothing_is_not_read_again() {
    let test = TestBus::like(MemoryProfile::RabbitMq);
    test.publish(paid(1)).await.unwrap();
    test.published::<OrderPaid>().await;
}

/// A broker that does not take messages with a text in them, as long as it is told to, and takes
/// the others of the batch, later ones of the same key, too.
#[derive(Clone, Debug)]
struct Partial {
    inner: MemoryBroker,
    refused: Arc<Mutex<Option<(&'static str, Outcome)>>>,
}

fn partial(profile: MemoryProfile) -> (TestBus, Partial) {
    let mut broker = None;
    let test = TestBus::wrapping(MemoryConfig::default().like(profile), |inner| {
        let refused = Arc::default();
        broker.insert(Partial { inner, refused }).clone()
    });
    (test, broker.expect("the bus was made with it"))
}

#[async_trait]
impl Publisher for Partial {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        let refused = *self.refused.lock().unwrap();
        let mut unpublished = Vec::new();
        for (index, message) in batch.into_iter().enumerate() {
            match refused {
                Some((text, outcome)) if text_in(&message, text) => {
                    let error = Error::new(ErrorKind::Unavailable, "publish", "as asked for");
                    unpublished.push(Unpublished::new(index, message, outcome, error));
                }
                _ => self.inner.publish(vec![message]).await?,
            }
        }
        match unpublished.is_empty() {
            true => Ok(()),
            false => Err(PublishError::new(unpublished)),
        }
    }
}

fn text_in(message: &Message, text: &str) -> bool {
    String::from_utf8_lossy(&message.payload).contains(text)
}

#[async_trait]
impl Subscriber for Partial {
    async fn subscribe(&self, subscription: Subscription) -> eventbus_core::Result<Member> {
        self.inner.subscribe(subscription).await
    }
}

#[async_trait]
impl Broker for Partial {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn admin(&self, request: AdminRequest) -> eventbus_core::Result<AdminReply> {
        self.inner.admin(request).await
    }

    async fn close(&self) -> eventbus_core::Result<()> {
        self.inner.close().await
    }
}

fn noted(order: u64, note: &str) -> OrderPaid {
    OrderPaid {
        order,
        note: note.to_owned(),
    }
}

#[tokio::test]
async fn what_a_handler_published_is_in_order_after_a_part_of_it_was_not_taken() {
    let (test, broker) = partial(MemoryProfile::Kafka);
    let consumer = test
        .consumer("billing")
        .on(async |_: OrderCreated, cx: Context| {
            for (order, note) in [(1, "first"), (2, "other"), (1, "second"), (1, "third")] {
                cx.publish(noted(order, note))?;
            }
            Ok(())
        });
    let consumer = test.spawn(consumer).await;
    *broker.refused.lock().unwrap() = Some(("second", Outcome::NotTaken));
    test.publish(order(1)).await.unwrap();
    test.settled().await;
    let state = consumer.status().state;
    assert!(matches!(state, ConsumerState::Holding { .. }), "{state:?}");
    let notes = async || {
        let mut published = test.published::<OrderPaid>().await;
        published.retain(|paid| paid.order == 1);
        published
            .into_iter()
            .map(|paid| paid.note)
            .collect::<Vec<_>>()
    };
    assert_eq!(notes().await, ["first"]);
    *broker.refused.lock().unwrap() = None;
    test.run_out().await;
    assert_eq!(notes().await, ["first", "second", "third"]);
    assert_eq!(test.published::<OrderPaid>().await.len(), 4);
    assert_eq!(consumer.status().counts.handled, 1);
}

#[tokio::test]
async fn publish_all_says_which_events_are_on_the_broker() {
    let (test, broker) = partial(MemoryProfile::Kafka);
    let ids: Vec<_> = (0..3).map(|_| EventId::new()).collect();
    let events = ids.iter().zip(["first", "second", "third"]);
    let events: Vec<_> = events
        .map(|(id, note)| Outgoing::new(noted(1, note)).with_id(id.clone()))
        .collect();
    *broker.refused.lock().unwrap() = Some(("second", Outcome::Unknown));
    let error = test.publish_all(events.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.is_retryable());
    let partly = PartlyPublished::of(&error).expect("it says what became of each");
    assert_eq!(partly.published, [ids[0].clone(), ids[2].clone()]);
    assert_eq!(partly.unknown, [ids[1].clone()]);
    assert!(partly.not_taken.is_empty());
    let chain = eventbus_core::error_chain(&error);
    assert!(
        chain.contains("2 published, 0 not taken, 1 unknown"),
        "{chain}"
    );
    assert!(chain.contains("as asked for"), "{chain}");

    *broker.refused.lock().unwrap() = Some(("ir", Outcome::NotTaken));
    let error = test.publish_all(events).await.unwrap_err();
    let partly = PartlyPublished::of(&error).expect("it says what became of each");
    assert_eq!(partly.not_taken, [ids[0].clone(), ids[2].clone()]);
}

#[tokio::test]
async fn what_is_published_is_there_before_its_cause_is_settled() {
    let (test, broker) = crate::fixtures::faulty();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(paying);
    let consumer = test.spawn(consumer).await;
    broker.fail("payments", crate::fixtures::Fault::Silent);
    test.publish(order(1)).await.unwrap();
    tokio::time::sleep(crate::fixtures::SECOND).await;
    assert_eq!(crate::failures::lag(&test, "billing").await, 1);
    drop(consumer);
    broker.mend();
    let again = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .on(paying);
    let _again = test.spawn(again).await;
    test.run_out().await;
    assert_eq!(calls.attempts(1), [1, 1]);
    assert_eq!(test.published::<OrderPaid>().await, [paid(1)]);
}
