//! The broker's schema beside a team's own tables.

use eventbus_core::{ErrorKind, Message, Publisher, Topic};
use eventbus_sql::PostgresBroker;

use super::server::Server;

const TOPIC: Topic = Topic::from_static("orders");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn tables_made_by_the_script_are_those_made_by_connecting() {
    let (by_script, by_connecting) = (Server::new().await, Server::new().await);
    let script = PostgresBroker::migrations(by_script.schema()).expect("a good name");
    by_script.run(&script).await;
    by_connecting.connect().await.expect("it answers");
    let mut shapes = Vec::new();
    for server in [&by_script, &by_connecting] {
        let rows: Vec<(String, String, String)> = sqlx::query_as(
            "SELECT table_name::text, column_name::text, data_type::text
             FROM information_schema.columns WHERE table_schema = $1 ORDER BY 1, 2",
        )
        .bind(server.schema())
        .fetch_all(&mut server.connection().await)
        .await
        .expect("it can be read");
        shapes.push(rows);
    }
    assert!(shapes[0].len() > 20);
    assert_eq!(shapes[0], shapes[1]);
    by_script.connect().await.expect("there is nothing to do");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn an_empty_schema_is_used_and_one_with_tables_of_others_is_not() {
    let (empty, taken) = (Server::new().await, Server::new().await);
    empty.run("CREATE SCHEMA {s}").await;
    let broker = empty.connect().await.expect("nothing is in the way");
    let published = broker.publish(vec![Message::new(TOPIC, "first")]).await;
    published.expect("it is taken");

    taken
        .run("CREATE SCHEMA {s}; CREATE TABLE {s}.messages (mine text)")
        .await;
    let error = taken.connect().await.expect_err("the name is taken");
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    assert!(
        error.to_string().contains("choose another `schema`"),
        "{error}"
    );
    taken
        .run("INSERT INTO {s}.messages VALUES ('still there')")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn tables_of_a_newer_version_are_left_alone() {
    let server = Server::new().await;
    server.connect().await.expect("it answers");
    server.run("UPDATE {s}.version SET version = 99").await;
    let error = server.connect().await.expect_err("they are newer");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(
        error.to_string().contains("newer version of the program"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs brokers: ./dev/test"]
async fn clients_that_create_the_tables_at_once_all_succeed() {
    for _ in 0..10 {
        let server = Server::new().await;
        let clients = (0..8).map(|_| server.connect());
        for client in futures_util::future::join_all(clients).await {
            client.expect("one creates them, the others wait");
        }
    }
}
