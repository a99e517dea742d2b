//! The routes over a real socket, from the start of a service to its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use axum::Router;
use axum::routing::get;
use eventbus_core::{
    AdminReply, AdminRequest, Broker, Capabilities, Error, ErrorKind, EventBus, Member,
    MemoryBroker, Message, PublishError, Publisher, Result, Subscriber, Subscription,
};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot};

/// A broker that can be away.
#[derive(Debug)]
struct Fading {
    inner: MemoryBroker,
    away: Arc<AtomicBool>,
}

#[async_trait]
impl Publisher for Fading {
    async fn publish(&self, batch: Vec<Message>) -> Result<(), PublishError> {
        self.inner.publish(batch).await
    }
}

#[async_trait]
impl Subscriber for Fading {
    async fn subscribe(&self, subscription: Subscription) -> Result<Member> {
        self.inner.subscribe(subscription).await
    }
}

#[async_trait]
impl Broker for Fading {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn admin(&self, request: AdminRequest) -> Result<AdminReply> {
        match self.away.load(Ordering::Relaxed) {
            true => Err(Error::new(
                ErrorKind::Unavailable,
                "ask",
                "the broker is down",
            )),
            false => self.inner.admin(request).await,
        }
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

async fn ask(address: std::net::SocketAddr, path: &str) -> (u16, Value) {
    let answer = reqwest::get(format!("http://{address}{path}"))
        .await
        .unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test]
async fn readiness_goes_before_the_sockets_and_open_requests_are_answered() {
    let away = Arc::new(AtomicBool::new(false));
    let bus = EventBus::new(Fading {
        inner: MemoryBroker::new(),
        away: Arc::clone(&away),
    });
    let service = bus.service("shop");
    let health = service.handle();

    // A page of its own, which outlives the servers.
    let page = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let page_address = page.local_addr().unwrap();
    let page_routes = eventbus_axum::router(&health);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (began, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (noted, waited) = (Arc::clone(&began), Arc::clone(&go_on));
    let slow = get(async move || {
        noted.notify_one();
        waited.notified().await;
        "\"done\""
    });
    let routes = Router::new()
        .route("/slow", slow)
        .merge(eventbus_axum::router(&health));

    let early = axum::serve(
        TcpListener::bind("127.0.0.1:0").await.unwrap(),
        eventbus_axum::router(&health),
    );
    let early_address = early.local_addr().unwrap();
    let early = tokio::spawn(early.into_future());
    let (status, answer) = ask(early_address, "/readyz").await;
    assert_eq!(
        (status, &answer["reasons"][0]),
        (503, &"the service is starting".into())
    );
    early.abort();

    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(
        service
            .background("health page", |stop| {
                axum::serve(page, page_routes).with_graceful_shutdown(stop)
            })
            .server("http", |stop| {
                axum::serve(listener, routes).with_graceful_shutdown(stop)
            })
            .run_until(async {
                let _ = stopped.await;
            }),
    );

    // What was asked before it ran is good for a second, so this may be asked twice.
    while ask(address, "/readyz").await.0 != 200 {
        tokio::task::yield_now().await;
    }
    let (status, answer) = ask(address, "/livez").await;
    assert_eq!((status, &answer["state"]), (200, &"running".into()));
    away.store(true, Ordering::Relaxed);
    let answer = loop {
        let (status, answer) = ask(address, "/readyz").await;
        if status == 503 {
            break answer;
        }
    };
    assert_eq!(answer["brokers"][0]["up"], false);
    assert_eq!(
        answer["reasons"][0],
        "the broker is away: memory: ask: the broker is down"
    );
    away.store(false, Ordering::Relaxed);

    let open = tokio::spawn(ask(address, "/slow"));
    began.notified().await;
    stop.send(()).unwrap();
    let answer = loop {
        let (status, answer) = ask(page_address, "/readyz").await;
        if status == 503 && answer["state"] == "stopping" {
            break answer;
        }
    };
    assert_eq!(answer["reasons"][0], "the service is stopping");
    assert_eq!(ask(page_address, "/livez").await.0, 200);
    while reqwest::get(format!("http://{address}/livez"))
        .await
        .is_ok()
    {
        tokio::task::yield_now().await;
    }
    go_on.notify_one();
    assert_eq!(open.await.unwrap(), (200, "done".into()));
    running.await.unwrap().unwrap();
    assert!(
        reqwest::get(format!("http://{page_address}/livez"))
            .await
            .is_err()
    );
}
