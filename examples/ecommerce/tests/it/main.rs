//! The program as people use it: the demo adds up, and the services stop when they are told.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Output, Stdio};
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
    let output = ecommerce(&["run", "--only", "order,payment"]);
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

#[cfg(unix)]
#[tokio::test]
async fn told_to_stop_the_shop_finishes_the_orders_it_took() {
    let mut shop = Running::start(&["run", "--port", "0"]);
    let mut log = BufReader::new(shop.0.stderr.take().expect("a pipe"));
    let orders = loop {
        let mut line = String::new();
        assert!(log.read_line(&mut line).expect("text") > 0, "it ended");
        if let Some(at) = line.find("http://") {
            break line[at..]
                .split([',', ' '])
                .next()
                .unwrap_or_default()
                .to_owned();
        }
    };
    let order = json!({
        "customer": { "name": "Ada Moreau", "email": "ada@example.com" },
        "card": "tok_4242",
        "items": [{ "product": "teapot", "quantity": 1 }],
    });
    let client = reqwest::Client::builder()
        .no_proxy()
        .build()
        .expect("a client");
    let response = client
        .post(&orders)
        .json(&order)
        .send()
        .await
        .expect("an answer");
    assert_eq!(response.status(), 202);

    let pid = shop.0.id().to_string();
    let told = Command::new("kill").args(["-TERM", &pid]).status();
    assert!(told.expect("kill is there").success());
    assert!(shop.ended());
    let mut rest = String::new();
    log.read_to_string(&mut rest).expect("text");
    assert!(
        rest.contains("stopping") && !rest.contains("lost"),
        "{rest}"
    );
}
