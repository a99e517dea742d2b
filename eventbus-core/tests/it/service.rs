//! A service stops in order, in time, and says why it is not ready.

use std::future::pending;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use eventbus_core::{
    BoxError, Context, ErrorKind, MemoryConfig, Result, Service, ServiceHandle, ServiceState,
    Stopping,
};
use eventbus_testkit::TestBus;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use crate::fixtures::{OrderCreated, SECOND, order};

/// What happened, in order.
#[derive(Clone, Debug, Default)]
struct Diary(Arc<Mutex<Vec<String>>>);

impl Diary {
    fn note(&self, what: &str) {
        self.0.lock().unwrap().push(what.to_owned());
    }

    fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

/// A part that takes a while to end, and notes when it is told to and when it has.
fn part(
    diary: &Diary,
    name: &'static str,
    takes: Duration,
) -> impl FnOnce(Stopping) -> futures_util::future::BoxFuture<'static, io::Result<()>> + use<> {
    let diary = diary.clone();
    move |stop| {
        Box::pin(async move {
            stop.await;
            diary.note(&format!("{name} is told"));
            sleep(takes).await;
            diary.note(&format!("{name} ends"));
            Ok(())
        })
    }
}

/// A consumer whose handlers take ten seconds.
async fn slow_consumer(test: &TestBus, diary: &Diary) -> eventbus_core::Consumer {
    let consumer = test.consumer("billing").state(diary.clone()).on(
        async |_: OrderCreated, cx: Context<Diary>| {
            sleep(10 * SECOND).await;
            cx.state().note("handler ends");
            Ok(())
        },
    );
    test.spawn(consumer).await
}

struct Run {
    handle: ServiceHandle,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<Result<()>>,
}

impl Run {
    async fn of(service: Service) -> Self {
        let handle = service.handle();
        assert_eq!(handle.health().await.reasons(), ["the service is starting"]);
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(service.run_until(async {
            let _ = stopped.await;
        }));
        sleep(2 * SECOND).await;
        Self { handle, stop, task }
    }
}

#[tokio::test]
async fn parts_stop_in_order_and_the_bus_last() {
    let test = TestBus::new();
    let diary = Diary::default();
    let consumer = slow_consumer(&test, &diary).await;
    let run = Run::of(
        test.service("shop")
            .background("relay", part(&diary, "relay", SECOND))
            .server("http", part(&diary, "http", 3 * SECOND))
            .consumer(consumer),
    )
    .await;
    assert!(run.handle.health().await.is_ready());
    test.publish(order(1)).await.unwrap();
    sleep(SECOND).await;

    run.stop.send(()).unwrap();
    sleep(SECOND).await;
    let health = run.handle.health().await;
    assert_eq!(health.reasons(), ["the service is stopping"]);
    // Consumers go on while the servers end.
    test.publish(order(2)).await.unwrap();
    run.task.await.unwrap().unwrap();
    assert_eq!(
        diary.lines(),
        [
            "http is told",
            "http ends",
            "handler ends",
            "handler ends",
            "relay is told",
            "relay ends"
        ]
    );
    assert_eq!(run.handle.state(), ServiceState::Stopped);
    let closed = test.publish(order(3)).await.unwrap_err();
    assert_eq!(closed.kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn servers_go_on_until_balancers_have_noticed() {
    let test = TestBus::new();
    let diary = Diary::default();
    let service = test.service("shop").notice(5 * SECOND);
    let run = Run::of(service.server("http", part(&diary, "http", SECOND))).await;
    run.stop.send(()).unwrap();
    sleep(4 * SECOND).await;
    assert!(!run.handle.health().await.is_ready());
    assert!(
        diary.lines().is_empty(),
        "it stopped before the notice was over"
    );
    run.task.await.unwrap().unwrap();
    assert_eq!(diary.lines(), ["http is told", "http ends"]);
}

#[tokio::test]
async fn the_first_failure_stops_all_and_is_named() {
    let test = TestBus::new();
    let diary = Diary::default();
    let service = test
        .service("shop")
        .server("http", part(&diary, "http", SECOND))
        .background("exchange rates", |_| async {
            sleep(5 * SECOND).await;
            Err::<(), BoxError>("the source is gone".into())
        });
    let handle = service.handle();
    let error = service.run_until(pending()).await.unwrap_err();
    assert_eq!(
        eventbus_core::error_chain(&error),
        "run service: a part failed (service: shop, part: exchange rates): the source is gone"
    );
    assert_eq!(diary.lines(), ["http is told", "http ends"]);
    assert_eq!(handle.state(), ServiceState::Stopped);
}

#[tokio::test]
async fn a_consumer_that_fails_ends_the_service() {
    let test = TestBus::new();
    let diary = Diary::default();
    let consumer = slow_consumer(&test, &diary).await;
    let service = test
        .service("shop")
        .consumer(consumer)
        .server("http", part(&diary, "http", SECOND));
    let handle = service.handle();
    let bus = test.bus().clone();
    let (error, ()) = tokio::join!(service.run_until(pending()), async {
        sleep(SECOND).await;
        bus.close().await.unwrap();
        sleep(SECOND / 1000).await;
        assert!(!handle.health().await.is_ready());
    });
    let error = error.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    let context: Vec<_> = error.context().collect();
    assert!(context.contains(&("part", "consumer billing")), "{error}");
    assert_eq!(diary.lines(), ["http is told", "http ends"]);
}

#[tokio::test]
async fn a_server_that_ends_or_panics_ends_the_service_and_background_may_end() {
    for panics in [false, true] {
        let test = TestBus::new();
        let service = test
            .service("shop")
            .background("warm-up", |_| async { Ok::<(), BoxError>(()) })
            .server("http", move |_| async move {
                sleep(5 * SECOND).await;
                assert!(!panics, "out of sockets");
                Ok::<(), BoxError>(())
            });
        let begun = Instant::now();
        let error = service.run_until(pending()).await.unwrap_err();
        assert!(begun.elapsed() >= 5 * SECOND);
        let expected = if panics {
            "panicked"
        } else {
            "ended by itself"
        };
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.to_string().contains("part: http"), "{error}");
    }
}

#[tokio::test]
async fn the_deadline_holds_for_all_and_names_who_is_late() {
    let test = TestBus::new();
    let diary = Diary::default();
    let handlers = test
        .consumer("billing")
        .on(async |_: OrderCreated, _: Context| {
            sleep(1000 * SECOND).await;
            Ok(())
        });
    let consumer = test.spawn(handlers).await;
    let service = test
        .service("shop")
        .deadline(20 * SECOND)
        .background("relay", part(&diary, "relay", SECOND))
        .server("http", part(&diary, "http", 100 * SECOND))
        .consumer(consumer);
    let run = Run::of(service).await;
    test.publish(order(1)).await.unwrap();
    sleep(SECOND).await;
    let begun = Instant::now();
    run.stop.send(()).unwrap();
    let error = run.task.await.unwrap().unwrap_err();
    assert!(begun.elapsed() <= 20 * SECOND, "{:?}", begun.elapsed());
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.to_string().contains("part: http"), "{error}");
    assert_eq!(
        diary.lines(),
        ["http is told", "relay is told", "relay ends"],
        "half of the time was for the others"
    );
}

#[tokio::test]
async fn a_dropped_service_is_stopped() {
    let test = TestBus::new();
    let diary = Diary::default();
    let run = Run::of(
        test.service("shop")
            .server("http", part(&diary, "http", SECOND)),
    )
    .await;
    run.task.abort();
    assert!(run.task.await.unwrap_err().is_cancelled());
    assert_eq!(run.handle.state(), ServiceState::Stopped);
    assert!(diary.lines().is_empty());
}

#[tokio::test]
async fn a_paused_consumer_is_a_concern_and_a_broker_that_is_away_a_reason() {
    let test = TestBus::wrapping(MemoryConfig::default(), |server| server);
    let diary = Diary::default();
    let consumer = slow_consumer(&test, &diary).await;
    consumer.pause();
    let run = Run::of(test.service("shop").consumer(consumer)).await;
    let health = run.handle.health().await;
    assert!(health.is_ready());
    assert_eq!(health.concerns(), ["the consumer is paused: billing"]);
    test.bus().close().await.unwrap();
    assert!(
        run.handle.health().await.is_ready(),
        "answers are good for a second"
    );
    sleep(2 * SECOND).await;
    let reasons = run.handle.health().await.reasons();
    assert!(
        reasons
            .iter()
            .any(|it| it.starts_with("the broker is away: memory: ")),
        "{reasons:?}"
    );
}
