//! The fault proxy between a client and a server that echoes.

use std::time::{Duration, Instant};

use eventbus_testkit::{Direction, FaultProxy, WireFault, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(10);
/// Long enough for what passes to have passed.
const SILENCE: Duration = Duration::from_millis(100);

/// Sends back whatever it is sent.
async fn echo() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.into_split();
                tokio::io::copy(&mut from, &mut to).await
            });
        }
    });
    address
}

async fn started() -> FaultProxy {
    FaultProxy::start(echo().await).await.expect("it starts")
}

async fn connected(proxy: &FaultProxy) -> TcpStream {
    TcpStream::connect(proxy.address())
        .await
        .expect("it listens")
}

async fn says(stream: &mut TcpStream, text: &str) -> std::io::Result<String> {
    stream.write_all(text.as_bytes()).await?;
    let mut heard = vec![0; text.len()];
    stream.read_exact(&mut heard).await?;
    Ok(String::from_utf8(heard).expect("it is what was sent"))
}

/// Whether nothing comes, and no end either.
async fn is_silent(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 1];
    timeout(SILENCE, stream.read(&mut buffer)).await.is_err()
}

async fn is_reset(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 1];
    let read = within(LIMIT, stream.read(&mut buffer)).await;
    read.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn what_is_sent_passes_and_so_does_the_end() {
    let proxy = started().await;
    let mut stream = connected(&proxy).await;
    let text = "x".repeat(100_000);
    let (mut from, mut to) = stream.split();
    let mut heard = Vec::new();
    let (sent, read) = tokio::join!(
        async {
            to.write_all(text.as_bytes()).await?;
            to.shutdown().await
        },
        from.read_to_end(&mut heard)
    );
    sent.expect("it is sent");
    assert_eq!(read.expect("it ends"), text.len());
}

#[tokio::test]
async fn a_cut_resets_all_connections_until_it_is_healed() {
    let proxy = started().await;
    let mut stream = connected(&proxy).await;
    assert_eq!(
        says(&mut stream, "hello").await.expect("it passes"),
        "hello"
    );
    proxy.set(WireFault::Cut);
    assert!(is_reset(&mut stream).await);
    let mut other = connected(&proxy).await;
    assert!(says(&mut other, "hello").await.is_err());
    proxy.heal();
    let mut third = connected(&proxy).await;
    assert_eq!(says(&mut third, "again").await.expect("it passes"), "again");
    assert_eq!(proxy.traffic().connections, 3);
}

#[tokio::test]
async fn on_a_half_open_wire_nothing_passes_and_nobody_hears_of_an_end() {
    let proxy = started().await;
    let mut stream = connected(&proxy).await;
    says(&mut stream, "hello").await.expect("it passes");
    proxy.set(WireFault::HalfOpen);
    stream.write_all(b"lost").await.expect("it is sent");
    stream.shutdown().await.expect("it ends");
    assert!(is_silent(&mut stream).await);
    proxy.heal();
    assert!(is_reset(&mut stream).await, "it has lost something");
}

#[tokio::test]
async fn a_connection_that_lost_nothing_outlives_a_half_open_wire() {
    let proxy = started().await;
    let mut stream = connected(&proxy).await;
    says(&mut stream, "hello").await.expect("it passes");
    proxy.set(WireFault::HalfOpen);
    assert!(is_silent(&mut stream).await);
    proxy.heal();
    assert_eq!(
        says(&mut stream, "again").await.expect("it passes"),
        "again"
    );
}

#[tokio::test]
async fn answers_vanish_while_questions_arrive() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let proxy = FaultProxy::start(address).await.expect("it starts");
    let mut client = connected(&proxy).await;
    let (mut server, _) = listener.accept().await.expect("it is connected");
    proxy.set(WireFault::Lose(Direction::ToClient));
    client.write_all(b"ask").await.expect("it is sent");
    let mut heard = [0; 3];
    within(LIMIT, server.read_exact(&mut heard))
        .await
        .expect("it arrives");
    server.write_all(b"answer").await.expect("it is sent");
    assert!(is_silent(&mut client).await);
    proxy.heal();
    assert!(is_reset(&mut client).await);
    assert!(is_reset(&mut server).await);
}

#[tokio::test]
async fn a_truncated_message_arrives_in_part() {
    let proxy = started().await;
    let mut stream = connected(&proxy).await;
    proxy.set(WireFault::Truncate {
        direction: Direction::ToServer,
        after: 3,
    });
    stream.write_all(b"hello").await.expect("it is sent");
    let mut heard = Vec::new();
    let read = within(LIMIT, stream.read_to_end(&mut heard)).await;
    assert!(read.is_err(), "it is reset");
    assert!(b"hel".starts_with(&heard[..]), "{heard:?}");
}

#[tokio::test]
async fn what_is_late_arrives_and_a_healed_wire_is_fast_at_once() {
    let proxy = started().await;
    let mut stream = connected(&proxy).await;
    let late = Duration::from_millis(150);
    proxy.set(WireFault::Delay {
        to_server: late,
        to_client: late,
    });
    let begun = Instant::now();
    assert_eq!(
        says(&mut stream, "hello").await.expect("it passes"),
        "hello"
    );
    assert!(begun.elapsed() >= 2 * late);
    proxy.set(WireFault::Delay {
        to_server: LIMIT * 10,
        to_client: Duration::ZERO,
    });
    stream.write_all(b"hello").await.expect("it is sent");
    assert!(is_silent(&mut stream).await);
    proxy.heal();
    let mut heard = [0; 5];
    within(LIMIT, stream.read_exact(&mut heard))
        .await
        .expect("it passes");
}

#[tokio::test]
async fn a_dropped_proxy_ends_its_connections() {
    let proxy = started().await;
    let mut stream = connected(&proxy).await;
    says(&mut stream, "hello").await.expect("it passes");
    let address = proxy.address();
    drop(proxy);
    let mut buffer = [0; 1];
    let read = within(LIMIT, stream.read(&mut buffer)).await;
    assert!(matches!(read, Ok(0) | Err(_)));
    let refused = async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    within(LIMIT, refused).await;
}

#[tokio::test]
async fn a_url_is_given_the_proxys_address() {
    let proxy = started().await;
    let address = proxy.address();
    for (url, expected) in [
        (
            "postgres://a:b@host:1/shop?x=/y",
            format!("postgres://a:b@{address}/shop?x=/y"),
        ),
        ("amqp://host", format!("amqp://{address}")),
    ] {
        assert_eq!(proxy.url(url), Some(expected));
    }
    assert_eq!(proxy.url("sqlite:///tmp/a.db"), None);
}
