//! The fault proxy before a real PostgreSQL: here, because the testkit knows no driver.

use std::time::Duration;

use eventbus_testkit::{FaultProxy, Protocol, Statements, WireFault, within};
use sqlx::{Connection, PgConnection};

const LIMIT: Duration = Duration::from_secs(20);

fn server() -> String {
    let url = std::env::var("EVENTBUS_TEST_POSTGRES");
    url.expect("EVENTBUS_TEST_POSTGRES is set: run ./dev/test only brokers")
}

async fn proxy(url: &str) -> (FaultProxy, String) {
    let address = url.rsplit('@').next().expect("an address");
    let address = address.split('/').next().expect("an address");
    let protocol = Protocol::Postgres(Statements::commits());
    let proxy = FaultProxy::start_with(address, protocol).await;
    let proxy = proxy.expect("it starts");
    let through = proxy.url(url).expect("the URL has a host");
    (proxy, through)
}

async fn run(connection: &mut PgConnection, sql: &'static str) -> sqlx::Result<()> {
    sqlx::query(sql).execute(connection).await.map(drop)
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_commit_is_done_and_whoever_asked_never_hears_so() {
    let url = server();
    let (proxy, through) = proxy(&url).await;
    let mut direct = PgConnection::connect(&url).await.expect("it answers");
    run(&mut direct, "DROP TABLE IF EXISTS verify_proxy")
        .await
        .expect("dropped");
    run(&mut direct, "CREATE TABLE verify_proxy (number INT)")
        .await
        .expect("created");

    let mut harmed = PgConnection::connect(&through).await.expect("it answers");
    proxy.set(WireFault::LoseResponse);
    // What is no commit is answered.
    run(&mut harmed, "BEGIN").await.expect("begun");
    run(&mut harmed, "INSERT INTO verify_proxy VALUES (1)")
        .await
        .expect("written");
    let committed = within(LIMIT, run(&mut harmed, "COMMIT")).await;
    assert!(committed.is_err(), "nobody heard of it");
    assert_eq!(proxy.traffic().responses_lost, 1);

    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM verify_proxy")
        .fetch_one(&mut direct)
        .await
        .expect("it answers");
    assert_eq!(rows, 1, "it was committed all the same");
    proxy.heal();
    let mut again = PgConnection::connect(&through).await.expect("it answers");
    run(&mut again, "BEGIN").await.expect("begun");
    run(&mut again, "DROP TABLE verify_proxy")
        .await
        .expect("dropped");
    run(&mut again, "COMMIT")
        .await
        .expect("committed, and told");
}

#[tokio::test]
#[ignore = "needs brokers: ./dev/test"]
async fn a_statement_on_a_half_open_wire_waits_and_its_connection_is_lost() {
    let (proxy, through) = proxy(&server()).await;
    let mut harmed = PgConnection::connect(&through).await.expect("it answers");
    proxy.set(WireFault::HalfOpen);
    let asked = tokio::time::timeout(Duration::from_millis(200), run(&mut harmed, "SELECT 1"));
    assert!(asked.await.is_err(), "nothing comes, and no end either");
    proxy.heal();
    let ended = within(LIMIT, run(&mut harmed, "SELECT 1")).await;
    assert!(ended.is_err(), "it has lost something");
}
