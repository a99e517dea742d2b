//! What the store promises: alone undone, together committed, and there after a restart.

use sqlx::types::Json;

use super::{Store, Work};
use crate::service::sample::TestData;

const MIGRATIONS: &[&str] = &["CREATE TABLE notes (note TEXT PRIMARY KEY) STRICT"];

async fn open(data: &TestData) -> Store {
    Store::open(data.path(), "test", MIGRATIONS).await.unwrap()
}

async fn note(work: &mut Work, note: &str) -> sqlx::Result<()> {
    let note = sqlx::query("INSERT INTO notes (note) VALUES (?)").bind(note);
    note.execute(&mut **work).await.map(|_| ())
}

async fn notes(store: &Store) -> String {
    let notes = sqlx::query_scalar("SELECT json_group_array(note) FROM notes");
    let Json(notes): Json<Vec<String>> = notes.fetch_one(&mut *store.reader().await).await.unwrap();
    notes.join(" ")
}

#[tokio::test]
async fn committed_work_is_there_after_a_restart() {
    let data = TestData::new();
    let store = open(&data).await;
    let mut work = store.begin().await.unwrap();
    note(&mut work, "a").await.unwrap();
    assert_eq!(notes(&store).await, "", "nobody sees it before");
    work.commit().await.unwrap();
    assert_eq!(notes(&store).await, "a");
    drop(store);
    assert_eq!(notes(&open(&data).await).await, "a");
}

#[tokio::test]
async fn work_that_fails_or_is_dropped_is_undone_alone() {
    let data = TestData::new();
    let store = open(&data).await;
    let mut kept = store.begin().await.unwrap();
    note(&mut kept, "kept").await.unwrap();
    let (kept, ()) = tokio::join!(kept.commit(), async {
        // Both come between the end of that work and its commit, for which it has to queue.
        let mut fails = store.begin().await.unwrap();
        note(&mut fails, "fails").await.unwrap();
        note(&mut fails, "fails").await.unwrap_err();
        drop(fails);
        let mut dropped = store.begin().await.unwrap();
        note(&mut dropped, "dropped").await.unwrap();
    });
    kept.unwrap();
    assert_eq!(notes(&store).await, "kept");
    let mut work = store.begin().await.unwrap();
    note(&mut work, "later").await.unwrap();
    work.commit().await.unwrap();
    assert_eq!(notes(&store).await, "kept later");
}

#[tokio::test]
async fn work_done_side_by_side_shares_a_commit() {
    let data = TestData::new();
    let store = open(&data).await;
    let write = async |text: &str| {
        let mut work = store.begin().await.unwrap();
        note(&mut work, text).await.unwrap();
        work.commit().await.unwrap();
    };
    tokio::join!(write("a"), write("b"), write("c"));
    assert_eq!(notes(&store).await, "a b c");
}

#[tokio::test]
async fn a_file_of_a_later_program_is_refused() {
    let data = TestData::new();
    drop(open(&data).await);
    let error = Store::open(data.path(), "test", &[]).await.unwrap_err();
    let text = format!("{error:#}");
    assert!(
        text.contains("test.db") && text.contains("version 1"),
        "{text}"
    );
}
