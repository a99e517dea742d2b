//! The gateway through its real HTTP listener.

use std::future::{IntoFuture as _, pending};
use std::time::Duration;

use eventbus::MemoryBroker;
use eventbus::prelude::{BoxError, Context, EventBus, Origin, Replay, Start, Until};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};

use super::{Board, consumer, routes};
use crate::database::sql;
use crate::events::{CancelReason, Cents, InventoryReleased, Notice, OrderCreated};
use crate::service::sample::{
    TestData, cancelled, on_each_store, order_id, reserved, told, unpaid,
};

const WITHIN: Duration = Duration::from_secs(10);

struct Counter {
    url: String,
    board: Board,
    bus: EventBus,
    _data: TestData,
    client: Client,
}

impl Counter {
    async fn open(data: TestData) -> Self {
        let bus = EventBus::builder(MemoryBroker::new())
            .source("gateway")
            .build();
        let board = Board::open(data.databases()).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = axum::serve(listener, routes(&bus, board.clone()));
        // Both end with the test's runtime.
        tokio::spawn(server.into_future());
        tokio::spawn(board.database().outbox(&bus).relay().run_until(pending()));
        let client = Client::builder().no_proxy().build().unwrap();
        Self {
            url,
            board,
            bus,
            _data: data,
            client,
        }
    }

    fn post(&self, body: impl Into<reqwest::Body>) -> RequestBuilder {
        let orders = format!("{}/orders", self.url);
        let request = self.client.post(orders).body(body);
        request.header("content-type", "application/json")
    }

    async fn get(&self, path: &str) -> Response {
        let url = format!("{}{path}", self.url);
        self.client.get(url).send().await.unwrap()
    }

    /// All `OrderCreated` there are, each with its envelope, when none waits to be published.
    async fn created(&self) -> Vec<(OrderCreated, eventbus::Envelope)> {
        type Seen = std::sync::Arc<std::sync::Mutex<Vec<(OrderCreated, eventbus::Envelope)>>>;
        async fn see(order: OrderCreated, cx: Context<Seen>) -> Result<(), BoxError> {
            let envelope = cx.envelope()?;
            cx.state().lock().unwrap().push((order, envelope));
            Ok(())
        }
        let published = async {
            while self.board.database().unpublished().await.unwrap() > 0 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(WITHIN, published).await.expect("it is published");
        let seen = Seen::default();
        let replay = Replay::from(Start::Earliest).until(Until::Now);
        let reader = self.bus.consumer("test").state(Seen::clone(&seen)).on(see);
        reader.replay(replay).await.unwrap();
        std::mem::take(&mut seen.lock().unwrap())
    }
}

fn order() -> Value {
    json!({
        "customer": { "name": "Ada Moreau", "email": "ada@example.com" },
        "card": "tok_4242",
        "items": [{ "product": "teapot", "quantity": 2 }, { "product": "timer", "quantity": 1 }],
    })
}

async fn problem(response: Response) -> (StatusCode, Value) {
    let status = response.status();
    assert_eq!(
        response.headers()["content-type"],
        "application/problem+json"
    );
    let problem: Value = response.json().await.unwrap();
    assert_eq!(problem["status"], status.as_u16());
    for member in ["type", "title", "detail", "instance"] {
        assert!(problem[member].is_string(), "{member} of {problem}");
    }
    (status, problem)
}

on_each_store!(
    an_order_is_accepted_and_published_with_its_origin,
    the_board_follows_the_events,
    news_that_come_at_the_same_moment_are_all_on_the_board,
    the_same_key_is_the_same_order,
    bad_values_are_pointed_at_and_leave_no_event,
    bodies_that_are_no_order_are_refused_and_leave_no_event,
    a_body_of_ten_megabytes_is_answered,
    bad_headers_are_refused,
    what_is_not_there_is_a_problem,
    an_order_is_taken_while_the_broker_is_away,
    an_order_that_cannot_be_written_may_come_again,
);

async fn an_order_is_accepted_and_published_with_its_origin(data: TestData) {
    let shop = Counter::open(data).await;
    let request = shop
        .post(order().to_string())
        .header("x-user-id", "u-17")
        .header("x-session-id", "s-4")
        .header("x-correlation-id", "req-9");
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let answer: Value = response.json().await.unwrap();
    assert_eq!(
        location,
        format!("/orders/{}", answer["order_id"].as_str().unwrap())
    );

    let created = shop.created().await;
    let (order, envelope) = &created[0];
    assert_eq!(order.order_id.to_string(), answer["order_id"]);
    assert_eq!(order.total, Cents(2 * 3900 + 595));
    assert_eq!(envelope.source, "gateway");
    assert_eq!(envelope.correlation_id, "req-9");
    assert_eq!(envelope.metadata["userId"], "u-17");
    assert_eq!(envelope.metadata["sessionId"], "s-4");

    let shown = shop.get(&location).await;
    assert_eq!(shown.status(), StatusCode::OK);
    let shown: Value = shown.json().await.unwrap();
    assert_eq!(shown["status"], "placed", "known at once");
}

async fn the_board_follows_the_events(data: TestData) {
    let shop = Counter::open(data).await;
    let following = consumer(&shop.bus, &shop.board).spawn().await;
    let following = following.unwrap();
    shop.bus.publish(reserved(1)).await.unwrap();
    let heard = async {
        while shop.board.count_open().await.unwrap() == 0 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(WITHIN, heard).await.expect("it is heard of");
    let shown = shop.get(&format!("/orders/{}", order_id(1))).await;
    let shown: Value = shown.json().await.unwrap();
    assert_eq!(shown["status"], "reserved");
    following.shutdown().await.unwrap();
}

async fn news_that_come_at_the_same_moment_are_all_on_the_board(data: TestData) {
    let shop = Counter::open(data).await;
    let following = consumer(&shop.bus, &shop.board).spawn().await;
    let following = following.unwrap();
    for number in 0..30 {
        let released = InventoryReleased {
            order_id: order_id(number),
            lines: Vec::new(),
        };
        let published = tokio::try_join!(
            shop.bus.publish(unpaid(number)),
            shop.bus.publish(released),
            shop.bus
                .publish(cancelled(number, CancelReason::PaymentDeclined)),
            shop.bus.publish(told(number, Notice::Cancelled)),
        );
        published.unwrap();
    }
    let over = async {
        for number in 0..30 {
            let is_over = async || {
                let order = shop.board.find(order_id(number)).await.unwrap();
                order.is_some_and(|order| order.is_over())
            };
            while !is_over().await {
                sleep(Duration::from_millis(5)).await;
            }
        }
    };
    timeout(WITHIN, over).await.expect("none is overwritten");
    following.shutdown().await.unwrap();
}

async fn the_same_key_is_the_same_order(data: TestData) {
    let shop = Counter::open(data).await;
    let post = |key: &'static str, user: &'static str, body: Value| {
        let request = shop.post(body.to_string()).header("idempotency-key", key);
        let request = request.header("x-user-id", user);
        async move { request.send().await.unwrap() }
    };
    let first: Value = post("k1", "u1", order()).await.json().await.unwrap();
    let again = post("k1", "u1", order()).await;
    assert_eq!(again.status(), StatusCode::ACCEPTED);
    let again: Value = again.json().await.unwrap();
    assert_eq!(first, again);
    assert_eq!(shop.created().await.len(), 1, "and one event");

    let mut other = order();
    other["items"][0]["quantity"] = json!(3);
    let (status, _) = problem(post("k1", "u1", other).await).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let stranger: Value = post("k1", "u2", order()).await.json().await.unwrap();
    assert_ne!(
        first["order_id"], stranger["order_id"],
        "keys belong to their user"
    );
}

async fn bad_values_are_pointed_at_and_leave_no_event(data: TestData) {
    let shop = Counter::open(data).await;
    let cases = [
        ("/items/0/product", json!("unicorn")),
        ("/items/0/quantity", json!(0)),
        ("/items/0/quantity", json!(-1)),
        ("/items/0/quantity", json!(101)),
        ("/items/0/quantity", json!(i64::MAX)),
        ("/items/0/quantity", json!(1.5)),
        ("/items/0/quantity", json!("two")),
        ("/items/1/product", json!("teapot")),
        ("/items", json!([])),
        (
            "/items",
            json!(vec![json!({ "product": "teapot", "quantity": 1 }); 51]),
        ),
        ("/items", json!("teapot")),
        ("/card", json!("4242424242424242")),
        ("/card", json!("tok_")),
        ("/customer/name", json!("")),
        ("/customer/name", json!("a\u{0}b")),
        ("/customer/email", json!("nobody")),
    ];
    for (pointer, value) in cases {
        let mut body = order();
        *body.pointer_mut(pointer).unwrap() = value.clone();
        let response = shop.post(body.to_string()).send().await.unwrap();
        let (status, problem) = problem(response).await;
        assert_eq!(
            status,
            StatusCode::UNPROCESSABLE_ENTITY,
            "{pointer}: {value}"
        );
        let pointed: Vec<&Value> = problem["errors"].as_array().unwrap().iter().collect();
        let wanted = format!("#{pointer}");
        assert!(
            pointed.iter().any(|error| error["pointer"] == wanted),
            "{wanted}: {problem}"
        );
        assert_eq!(problem["instance"], "/orders");
    }
    assert!(shop.created().await.is_empty());
}

async fn bodies_that_are_no_order_are_refused_and_leave_no_event(data: TestData) {
    let shop = Counter::open(data).await;
    let cases: [(&str, StatusCode); 6] = [
        ("", StatusCode::BAD_REQUEST),
        ("{", StatusCode::BAD_REQUEST),
        ("{} {}", StatusCode::UNPROCESSABLE_ENTITY),
        ("[]", StatusCode::UNPROCESSABLE_ENTITY),
        ("null", StatusCode::UNPROCESSABLE_ENTITY),
        ("\u{feff}{}", StatusCode::BAD_REQUEST),
    ];
    for (body, expected) in cases {
        let response = shop.post(body).send().await.unwrap();
        assert_eq!(problem(response).await.0, expected, "{body:?}");
    }
    let trailing = format!("{} x", order());
    let response = shop.post(trailing).send().await.unwrap();
    assert_eq!(problem(response).await.0, StatusCode::BAD_REQUEST);

    let plain = shop.client.post(format!("{}/orders", shop.url));
    let response = plain.body(order().to_string()).send().await.unwrap();
    assert_eq!(
        problem(response).await.0,
        StatusCode::UNSUPPORTED_MEDIA_TYPE
    );
    assert!(shop.created().await.is_empty());
}

async fn a_body_of_ten_megabytes_is_answered(data: TestData) {
    let shop = Counter::open(data).await;
    let response = shop.post(vec![b' '; 10 << 20]).send().await.unwrap();
    assert_eq!(problem(response).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(shop.created().await.is_empty());
}

async fn bad_headers_are_refused(data: TestData) {
    let shop = Counter::open(data).await;
    let long = "x".repeat(201);
    for (name, value) in [("idempotency-key", ""), ("x-user-id", long.as_str())] {
        let request = shop.post(order().to_string()).header(name, value);
        let (status, problem) = problem(request.send().await.unwrap()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(
            problem["detail"].as_str().unwrap().contains(name),
            "{problem}"
        );
    }
    assert!(shop.created().await.is_empty());
}

async fn what_is_not_there_is_a_problem(data: TestData) {
    let shop = Counter::open(data).await;
    let unknown = format!("/orders/{}", order_id(7));
    for path in [unknown.as_str(), "/orders/seven", "/nothing"] {
        let (status, problem) = problem(shop.get(path).await).await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert_eq!(problem["instance"], path);
    }
    let response = shop.get("/orders").await;
    assert_eq!(response.headers()["allow"], "POST");
    assert_eq!(problem(response).await.0, StatusCode::METHOD_NOT_ALLOWED);
}

async fn an_order_is_taken_while_the_broker_is_away(data: TestData) {
    let shop = Counter::open(data).await;
    shop.bus.close().await.unwrap();
    let response = shop.post(order().to_string()).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let waiting = shop.board.database().unpublished().await.unwrap();
    assert_eq!(waiting, 1, "its event is published later");
}

async fn an_order_that_cannot_be_written_may_come_again(data: TestData) {
    let shop = Counter::open(data).await;
    let outbox = shop.board.database().outbox(&shop.bus);
    let mut tx = outbox.begin(Origin::new()).await.unwrap();
    let broken = sql("DROP TABLE orders").execute(&mut tx.tx()).await;
    broken.unwrap();
    tx.commit().await.unwrap();
    let response = shop.post(order().to_string()).send().await.unwrap();
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(problem(response).await.0, StatusCode::SERVICE_UNAVAILABLE);
}
