//! The program as people use it: the demo adds up, and the services stop when they are told.

mod crash;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ecommerce");

fn ecommerce(arguments: &[&str]) -> Output {
    let output = Command::new(PROGRAM).args(arguments).output();
    output.expect("the program starts")
}

/// Killed when the test fails before it ended by itself.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already when the test went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
        let child = Command::new(PROGRAM)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Self(child.expect("the program starts"))
    }

    /// Waits for the end, and says whether it was a good one.
    fn ended(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = self.0.try_wait().expect("it is our child") {
                return status.success();
            }
            assert!(Instant::now() < deadline, "it goes on");
            std::thread::yield_now();
        }
    }
}

#[test]
fn the_demo_adds_up_and_its_last_line_says_so() {
    let output = ecommerce(&["demo", "--orders", "120", "--seed", "7", "--json"]);
    let text = String::from_utf8(output.stderr).expect("text");
    assert!(output.status.success(), "{text}");
    assert!(text.contains("everything adds up"), "{text}");
    assert!(text.contains("└─ InventoryReserved"), "{text}");
    let stdout = String::from_utf8(output.stdout).expect("text");
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    let line: Value = serde_json::from_str(stdout.trim()).expect("one JSON object");
    let count = |name: &str| line[name].as_u64().expect("a number");
    assert_eq!(count("placed"), 120);
    assert_eq!(count("shipped") + count("cancelled"), 120);
    for zero in ["unfinished", "charges_twice", "mails_twice"] {
        assert_eq!(count(zero), 0, "{zero}");
    }
    assert_eq!(line["stock_conserved"], true);
    assert_eq!(line["money_conserved"], true);
    assert!(line["p50_ms"].as_f64() <= line["p99_ms"].as_f64());
    assert!(count("events") > 120 * 5);
}

#[test]
fn the_same_seed_has_the_same_ends() {
    let ends = || {
        let output = ecommerce(&["demo", "--orders", "80", "--seed", "3", "--json"]);
        let line: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        (
            line["shipped"].clone(),
            line["cancelled"].clone(),
            line["events"].clone(),
        )
    };
    assert_eq!(ends(), ends());
}

#[test]
fn some_services_alone_need_a_broker_that_is_shared() {
    let output = ecommerce(&["run", "--only", "order,payment", "--broker", "memory:"]);
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).expect("text");
    assert!(
        text.contains("--broker") && text.contains("memory:"),
        "{text}"
    );
}

#[test]
fn an_unknown_broker_is_named() {
    let output = ecommerce(&["run", "--broker", "pigeon://loft"]);
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).expect("text");
    assert!(
        text.contains("--broker") && text.contains("known scheme"),
        "{text}"
    );
}

#[test]
fn a_fake_ends_with_its_stdin() {
    for fake in ["fake-psp", "fake-mailer"] {
        let mut fake = Running::start(&[fake, "--port", "0"]);
        let stdout = fake.0.stdout.take().expect("a pipe");
        let mut address = String::new();
        BufReader::new(stdout)
            .read_line(&mut address)
            .expect("a line");
        assert!(address.starts_with("http://127.0.0.1:"), "{address}");
        drop(fake.0.stdin.take());
        assert!(fake.ended());
    }
}

/// A shop that is open.
#[cfg(unix)]
struct Shop {
    process: Running,
    log: BufReader<ChildStderr>,
    url: String,
}

#[cfg(unix)]
impl Shop {
    fn open(arguments: &[&str]) -> Self {
        let mut process = Running::start(&[&["run", "--port", "0"], arguments].concat());
        let mut log = BufReader::new(process.0.stderr.take().expect("a pipe"));
        let url = loop {
            let mut line = String::new();
            assert!(log.read_line(&mut line).expect("text") > 0, "it ended");
            if let Some(at) = line.find("http://") {
                let url = line[at..].split("/orders").next();
                break url.unwrap_or_default().to_owned();
            }
        };
        Self { process, log, url }
    }

    /// Places an order, and gives its place.
    async fn order(&self) -> String {
        let order = json!({
            "customer": { "name": "Ada Moreau", "email": "ada@example.com" },
            "card": "tok_4242",
            "items": [{ "product": "teapot", "quantity": 1 }],
        });
        let request = client().post(format!("{}/orders", self.url)).json(&order);
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status(), 202);
        let location = response.headers()["location"].to_str();
        location.expect("text").to_owned()
    }

    fn tell_to_stop(&self) {
        let pid = self.process.0.id().to_string();
        let told = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(told.expect("kill is there").success());
    }

    /// What it says of itself, once that is `status`.
    async fn readiness(&self, status: u16) -> Value {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let asked = client().get(format!("{}/readyz", self.url)).send().await;
            let answer = asked.expect("it answers");
            if answer.status() == status {
                return answer.json().await.expect("JSON");
            }
            assert!(Instant::now() < deadline, "never {status}: {answer:?}");
        }
    }

    /// Tells it to stop, and gives what it said.
    fn stop(mut self) -> String {
        self.tell_to_stop();
        assert!(self.process.ended());
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).expect("text");
        assert!(rest.contains("stopping"), "{rest}");
        rest
    }
}

#[cfg(unix)]
fn client() -> reqwest::Client {
    let client = reqwest::Client::builder().no_proxy().build();
    client.expect("a client")
}

#[cfg(unix)]
#[tokio::test]
async fn told_to_stop_a_shop_in_memory_finishes_the_orders_it_took() {
    let shop = Shop::open(&["--broker", "memory:"]);
    shop.order().await;
    let said = shop.stop();
    assert!(!said.contains("lost"), "{said}");
}

#[cfg(unix)]
#[tokio::test]
async fn told_to_stop_a_shop_is_not_ready_and_takes_orders_until_that_was_noticed() {
    let mut shop = Shop::open(&["--broker", "memory:", "--notice", "3"]);
    let ready = shop.readiness(200).await;
    assert_eq!(ready["consumers"].as_array().map(Vec::len), Some(6));
    shop.tell_to_stop();
    let leaving = shop.readiness(503).await;
    assert_eq!(leaving["reasons"], json!(["the service is stopping"]));
    shop.order().await;
    assert!(shop.process.ended());
    let alive = client().get(format!("{}/livez", shop.url)).send().await;
    assert!(alive.is_err(), "{alive:?}");
}

#[cfg(unix)]
#[tokio::test]
async fn a_shop_goes_on_where_it_was() {
    let directory = tempfile::tempdir().expect("a directory");
    let data = directory.path().to_str().expect("text");
    let gateway = Shop::open(&["--data", data, "--only", "gateway"]);
    let order = gateway.order().await;
    gateway.stop();

    let shop = Shop::open(&["--data", data]);
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let order = client().get(format!("{}{order}", shop.url)).send().await;
        let order: Value = order.expect("an answer").json().await.expect("an order");
        if order["status"] == "shipped" {
            break;
        }
        assert!(Instant::now() < deadline, "it does not end: {order}");
        tokio::task::yield_now().await;
    }
    shop.stop();
}
