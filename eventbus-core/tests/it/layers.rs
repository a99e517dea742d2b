//! Layers around handlers, and what is refused when a consumer is set up.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context as TaskContext, Poll};

use eventbus_core::{BoxError, Context, ErrorKind, Event, Limits, Request, RetryPolicy};
use eventbus_testkit::TestBus;
use tower::limit::ConcurrencyLimitLayer;
use tower::timeout::TimeoutLayer;
use tower::{Layer, Service};

use crate::fixtures::{Calls, OrderCreated, SECOND, noting, order};

#[tokio::test]
async fn tower_s_timeout_fails_the_attempt() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .retry(RetryPolicy::immediate(2))
        .layer(TimeoutLayer::new(SECOND))
        .on(async |order: OrderCreated, cx: Context<Calls>| {
            cx.state().note(&order, cx.attempt());
            std::future::pending().await
        });
    let _consumer = test.spawn(consumer).await;
    test.publish(order(1)).await.unwrap();
    test.run_out().await;
    assert_eq!(calls.attempts(1), [1, 2]);
    let letters = test.dead_letters().await;
    assert_eq!(letters[0].cause, "error");
    assert!(
        letters[0].error.contains("timed out"),
        "{}",
        letters[0].error
    );
}

#[derive(Debug, Default)]
struct Gauge {
    now: AtomicUsize,
    most: AtomicUsize,
}

#[tokio::test]
async fn tower_s_concurrency_limit_bounds_the_handlers_that_run() {
    let test = TestBus::new();
    let gauge = Arc::new(Gauge::default());
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&gauge))
        .layer(ConcurrencyLimitLayer::new(3))
        .workers(2)
        .concurrency(20)
        .on(async |_: OrderCreated, cx: Context<Gauge>| {
            let now = cx.state().now.fetch_add(1, Ordering::SeqCst) + 1;
            cx.state().most.fetch_max(now, Ordering::SeqCst);
            tokio::time::sleep(SECOND).await;
            cx.state().now.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        });
    let consumer = test.spawn(consumer).await;
    for number in 1..=30 {
        test.publish(order(number)).await.unwrap();
    }
    test.run_out().await;
    // Each slot has its own clone of the layered service, and they share the limit.
    assert_eq!(gauge.most.load(Ordering::SeqCst), 3);
    assert_eq!(consumer.status().counts.handled, 30);
}

/// Notes what passes through, and refuses the first attempt.
#[derive(Clone, Debug)]
struct Watch(Arc<Mutex<Vec<String>>>);

#[derive(Clone, Debug)]
struct Watched<V>(V, Watch);

impl<V> Layer<V> for Watch {
    type Service = Watched<V>;

    fn layer(&self, inner: V) -> Watched<V> {
        Watched(inner, self.clone())
    }
}

impl<V> Service<Request> for Watched<V>
where
    V: Service<Request, Response = (), Error = BoxError> + Clone + Send + 'static,
    V::Future: Send,
{
    type Response = ();
    type Error = BoxError;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        self.1.0.lock().unwrap().push(format!(
            "{} {:?} {} {}",
            request.topic(),
            request.key().map(|key| key.as_bytes().to_vec()),
            request.attempt(),
            request.len()
        ));
        if request.attempt() == 1 {
            return Box::pin(std::future::ready(Err("refused by the layer".into())));
        }
        Box::pin(self.0.call(request))
    }
}

#[tokio::test]
async fn a_layer_sees_the_request_and_its_error_is_a_failed_attempt() {
    let test = TestBus::new();
    let calls = Calls::new();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .layer(Watch(Arc::clone(&seen)))
        .on(noting);
    let consumer = test.spawn(consumer).await;
    test.publish(order(7)).await.unwrap();
    test.run_out().await;
    assert_eq!(
        *seen.lock().unwrap(),
        ["orders Some([55]) 1 1", "orders Some([55]) 2 1"]
    );
    assert_eq!(calls.attempts(7), [2]);
    assert_eq!(consumer.status().counts.failed_attempts, 1);
}

/// Is never ready for the first who asks.
#[derive(Clone, Debug, Default)]
struct Reluctant(Arc<AtomicUsize>);

#[derive(Debug)]
struct Reluctantly<V>(V, Reluctant, Option<usize>);

impl<V: Clone> Clone for Reluctantly<V> {
    fn clone(&self) -> Self {
        Self(self.0.clone(), self.1.clone(), None)
    }
}

impl<V> Layer<V> for Reluctant {
    type Service = Reluctantly<V>;

    fn layer(&self, inner: V) -> Reluctantly<V> {
        Reluctantly(inner, self.clone(), None)
    }
}

impl<V: Service<Request>> Service<Request> for Reluctantly<V> {
    type Response = V::Response;
    type Error = V::Error;
    type Future = V::Future;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), V::Error>> {
        let asked = || self.1.0.fetch_add(1, Ordering::SeqCst);
        match *self.2.get_or_insert_with(asked) {
            0 => Poll::Pending,
            _ => self.0.poll_ready(cx),
        }
    }

    fn call(&mut self, request: Request) -> V::Future {
        self.0.call(request)
    }
}

#[tokio::test]
async fn what_a_layer_reserved_for_a_dropped_run_is_free_again() {
    let test = TestBus::new();
    let calls = Calls::new();
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .retry(RetryPolicy::immediate(1))
        .deadline(2 * SECOND)
        .workers(1)
        .concurrency(2)
        .layer(ConcurrencyLimitLayer::new(1))
        .layer(Reluctant::default())
        .on(noting);
    let _consumer = test.spawn(consumer).await;
    // It gets the only permit, and waits in vain for the layer below.
    test.publish(order(1)).await.unwrap();
    test.advance(SECOND).await;
    test.publish(order(2)).await.unwrap();
    test.run_out().await;
    assert!(calls.attempts(1).is_empty(), "it ran into its deadline");
    assert_eq!(calls.attempts(2), [1]);
}

/// Lets all runs share one service.
#[derive(Clone, Debug)]
struct Share;

#[derive(Clone, Debug)]
struct Shared<V>(Arc<Mutex<V>>);

impl<V> Layer<V> for Share {
    type Service = Shared<V>;

    fn layer(&self, inner: V) -> Shared<V> {
        Shared(Arc::new(Mutex::new(inner)))
    }
}

impl<V: Service<Request>> Service<Request> for Shared<V> {
    type Response = V::Response;
    type Error = V::Error;
    type Future = V::Future;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), V::Error>> {
        self.0.lock().unwrap().poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> V::Future {
        self.0.lock().unwrap().call(request)
    }
}

#[tokio::test]
async fn runs_that_share_one_service_overlap_all_the_same() {
    let test = TestBus::new();
    let gauge = Arc::new(Gauge::default());
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&gauge))
        .layer(Share)
        .concurrency(5)
        .workers(1)
        .on(async |_: OrderCreated, cx: Context<Gauge>| {
            let now = cx.state().now.fetch_add(1, Ordering::SeqCst) + 1;
            cx.state().most.fetch_max(now, Ordering::SeqCst);
            tokio::time::sleep(SECOND).await;
            cx.state().now.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        });
    let consumer = test.spawn(consumer).await;
    for number in 1..=10 {
        test.publish(order(number)).await.unwrap();
    }
    test.run_out().await;
    assert_eq!(gauge.most.load(Ordering::SeqCst), 5);
    assert_eq!(consumer.status().counts.handled, 10);
}

#[tokio::test]
async fn a_consumer_set_up_wrongly_is_refused_with_what_to_do() {
    let test = TestBus::new();
    let base = || test.consumer("billing").shared_state(Calls::new());
    let refusals = [
        (base().spawn().await.unwrap_err(), "add `.on(…)`"),
        (
            base().on(noting).on(noting).spawn().await.unwrap_err(),
            "another group",
        ),
        (
            base().on(noting).concurrency(0).spawn().await.unwrap_err(),
            "at least one",
        ),
        (
            base().on(noting).workers(0).spawn().await.unwrap_err(),
            "at least one",
        ),
        (
            base()
                .on(noting)
                .deadline(std::time::Duration::ZERO)
                .spawn()
                .await
                .unwrap_err(),
            "longer than zero",
        ),
        (
            test.consumer("billing")
                .on(async |_: OrderCreated, _: Context| Ok(()))
                .state(1)
                .on(async |_: OrderCreated, _: Context<i32>| Ok(()))
                .spawn()
                .await
                .unwrap_err(),
            "comes before",
        ),
        (
            test.consumer("no spaces")
                .shared_state(Calls::new())
                .on(noting)
                .spawn()
                .await
                .unwrap_err(),
            "A-Z",
        ),
    ];
    for (error, advice) in refusals {
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains(advice), "{error}");
    }
    // Nothing of it joined the group.
    assert!(test.lag("billing", &[OrderCreated::TOPIC]).await.is_err());
}

#[tokio::test]
async fn a_full_window_stops_one_lane_and_no_other() {
    let test = TestBus::new();
    let calls = Calls::new();
    calls.break_order(1);
    let consumer = test
        .consumer("billing")
        .shared_state(Arc::clone(&calls))
        .limits(Limits::default().with_lane_messages(5))
        .retry(RetryPolicy::fixed(3, 60 * SECOND))
        .on(noting);
    let consumer = test.spawn(consumer).await;
    for step in 1..=50 {
        test.publish(crate::fixtures::amount(1, step))
            .await
            .unwrap();
    }
    for number in 2..=50 {
        test.publish(order(number)).await.unwrap();
    }
    test.settled().await;
    let status = consumer.status();
    assert!(
        status.lanes.iter().all(|lane| lane.in_flight <= 5),
        "{status:?}"
    );
    assert!(calls.all().len() > 20, "keys of other partitions go on");
    calls.mend_all();
    test.run_out().await;
    assert_eq!(consumer.status().counts.handled, 99);
}
