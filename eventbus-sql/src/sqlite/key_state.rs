//! The store of held keys in the database: names, their messages, and who may write them.

mod held;
mod read;
mod statements;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    Claim, Due, DueName, Error, Group, HeldMessage, HeldName, HeldPlace, HeldReport, HoldEntry,
    KeyDecision, KeyStateDesk, KeyStateStore, Result, Timestamp, TopicPartition, Wait,
};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use super::error::into_error;
use super::store::SqliteStore;
use super::tables::Tables;
use held::{Held, about};
use read::{read_held, read_message, read_name, stored_name};
use statements::{
    ADD_GROUP, CLAIM, DECIDE, LIST, NOTE_DECIDED, SELECT_DUE, SELECT_MESSAGES, SELECT_NAMES,
    SELECT_NEXT_DUE, SELECT_SUPERSEDED, SELECT_VERSION, WAIT,
};

impl SqliteStore {
    fn held(&self, claim: Claim) -> Arc<Held> {
        Arc::new(Held {
            tables: self.database.tables.clone(),
            claim,
            now: self.database.now(),
        })
    }

    /// Writes under a claim, if no later one was made.
    async fn write<T, F>(&self, operation: &'static str, claim: &Claim, work: F) -> Result<T>
    where
        T: Send + Sync + 'static,
        F: for<'c> Fn(&'c Held, &'c mut SqliteConnection) -> BoxFuture<'c, Result<T>>
            + Send
            + Sync
            + 'static,
    {
        let held = self.held(claim.clone());
        let work = Arc::new(work);
        let written = self.database.writer.run(operation, move |connection| {
            let (held, work) = (Arc::clone(&held), Arc::clone(&work));
            async move {
                held.check_claim(operation, connection).await?;
                work(&held, connection).await
            }
            .boxed()
        });
        written.await
    }

    /// A group's number, and the count of decisions about it and of changes of its members; none before
    /// the first claim.
    pub(super) async fn version(&self, group: &Group) -> Result<Option<(i64, i64)>> {
        let sql = self.database.sql(SELECT_VERSION);
        let query = sqlx::query(sql).bind(group.as_str());
        let row = self
            .database
            .read_first("look for decisions", query)
            .await?;
        let version = |row: SqliteRow| Ok((row.try_get(0)?, row.try_get(1)?));
        row.map(version).transpose().map_err(native)
    }
}

#[async_trait]
impl KeyStateStore for SqliteStore {
    async fn claim(&self, group: &Group, place: &TopicPartition) -> Result<(Claim, Vec<HeldName>)> {
        let held = self.held(Claim::new(group.clone(), place.clone(), 0));
        let claimed = self
            .database
            .writer
            .run("claim held keys", move |connection| {
                let held = Arc::clone(&held);
                async move {
                    // Its generation counts decisions; it may read from another broker.
                    let group = sqlx::query(held.tables.sql(ADD_GROUP))
                        .bind(held.claim.group.to_string())
                        .bind(held.now.as_micros());
                    group.execute(&mut *connection).await.map_err(native)?;
                    let fence = held.of_place(CLAIM).fetch_one(&mut *connection).await;
                    let fence: i64 = fence.and_then(|row| row.try_get(0)).map_err(native)?;
                    let rows = held.of_place(SELECT_NAMES).fetch_all(connection).await;
                    let names = rows.map_err(native)?;
                    let names = names.iter().map(|row| {
                        let kind = row.try_get(0).map_err(native)?;
                        read_name(kind, row.try_get(1).map_err(native)?)
                    });
                    Ok((fence as u64, names.collect::<Result<Vec<_>>>()?))
                }
                .boxed()
            });
        let (fence, names) = claimed.await?;
        Ok((Claim::new(group.clone(), place.clone(), fence), names))
    }

    async fn hold(&self, claim: &Claim, entries: &[HoldEntry]) -> Result<()> {
        let entries = Arc::new(entries.to_vec());
        self.write("hold messages", claim, move |held, connection| {
            let entries = Arc::clone(&entries);
            async move {
                for entry in entries.iter() {
                    held.hold_one(entry, connection).await?;
                }
                Ok(())
            }
            .boxed()
        })
        .await
    }

    async fn advance(
        &self,
        claim: &Claim,
        name: &HeldName,
        done: Option<u64>,
    ) -> Result<Option<HeldMessage>> {
        let name = name.clone();
        self.write("take held messages", claim, move |held, connection| {
            let name = name.clone();
            async move { held.advance(&name, done, connection).await }.boxed()
        })
        .await
    }

    async fn wait(
        &self,
        claim: &Claim,
        name: &HeldName,
        wait: &Wait,
        carried_out: bool,
    ) -> Result<()> {
        let (name, wait) = (name.clone(), wait.clone());
        self.write("park key", claim, move |held, connection| {
            let sql = held.tables.sql(WAIT);
            let query = about(sql, &held.claim.group, &held.claim.place, &name)
                .bind(wait.until.map(Timestamp::as_micros))
                .bind(wait.attempts)
                .bind(wait.first_failed.map(Timestamp::as_micros))
                .bind(wait.cause.clone())
                .bind(wait.error.clone())
                .bind(carried_out);
            async move { query.execute(connection).await.map(|_| ()).map_err(native) }.boxed()
        })
        .await
    }

    async fn due(
        &self,
        group: &Group,
        claims: &[Claim],
        now: Timestamp,
        names_max: usize,
    ) -> Result<Due> {
        // Read first: a decision made meanwhile is one more reason to look again.
        let version = self.version(group).await?.map_or(0, |(_, version)| version);
        let mine: Vec<_> = claims
            .iter()
            .map(|claim| {
                let place = &claim.place;
                // A topic's name has no character that JSON escapes.
                format!("[\"{}\",{},{}]", place.topic, place.partition, claim.fence)
            })
            .collect();
        let mine = format!("[{}]", mine.join(","));
        let query = |sql| {
            let query = sqlx::query(self.database.sql(sql)).bind(group.to_string());
            query.bind(mine.clone()).bind(now.as_micros())
        };
        let names_max = i64::try_from(names_max).unwrap_or(i64::MAX);
        let operation = "look for due keys";
        let due = query(SELECT_DUE).bind(names_max);
        let due = self.database.read(operation, due).await?;
        let names = due.iter().map(|row| {
            let (held, wait, decision) = read_held(row)?;
            Ok(DueName::new(held, wait, decision))
        });
        let names = names.collect::<Result<Vec<_>>>()?;
        let next = self
            .database
            .read_first(operation, query(SELECT_NEXT_DUE))
            .await?;
        let next: Option<i64> = match next {
            Some(row) => row.try_get(0).map_err(native)?,
            None => None,
        };
        // Read last: whatever a later claim has kept from the answers before is told.
        let superseded = sqlx::query(self.database.sql(SELECT_SUPERSEDED));
        let superseded = superseded.bind(group.to_string()).bind(mine.clone());
        let superseded = self.database.read(operation, superseded).await?;
        let superseded = superseded.iter().map(|row| {
            let at: i64 = row.try_get(0).map_err(native)?;
            Ok(claims[at as usize].clone())
        });
        let superseded = superseded.collect::<Result<Vec<_>>>()?;
        let next = next.map(Timestamp::from_micros);
        Ok(Due::new(names, next, version as u64).with_superseded(superseded))
    }

    async fn decided(&self, group: &Group, seen: u64) {
        let _waiting = self.database.wakes.wait();
        let id = match self.version(group).await {
            Ok(Some((id, version))) if version as u64 == seen => id,
            // The group is made known by the first claim, and who claims looks again by itself.
            Ok(None) => return std::future::pending().await,
            Ok(Some(_)) => return,
            // It is a hint: whoever asks for what is due hears what is wrong.
            Err(_) => return tokio::time::sleep(BROKEN_PAUSE).await,
        };
        let mut generation = self.database.wakes.group(id);
        let newer = generation.wait_for(|generation| *generation > seen as i64);
        if newer.await.is_err() {
            // It is dropped with the database only; then nothing is decided any more.
            std::future::pending().await
        }
    }
}

/// How long a file that cannot be read is left alone.
const BROKEN_PAUSE: Duration = Duration::from_millis(500);

#[async_trait]
impl KeyStateDesk for SqliteStore {
    async fn list(
        &self,
        group: &Group,
        after: Option<&HeldPlace>,
        names_max: usize,
    ) -> Result<Vec<HeldReport>> {
        let after_name = after.map(|after| stored_name(&after.name));
        let (kind, name) = after_name.unzip();
        let query = sqlx::query(self.database.sql(LIST))
            .bind(group.to_string())
            .bind(after.map(|after| after.place.topic.to_string()))
            .bind(after.map(|after| after.place.partition))
            .bind(kind)
            .bind(name)
            .bind(i64::try_from(names_max).unwrap_or(i64::MAX));
        let rows = self.database.read("list held keys", query).await?;
        let reports = rows.iter().map(|row| {
            let (held, wait, decision) = read_held(row)?;
            let since = row.try_get(13).map(Timestamp::from_micros);
            let messages: i64 = row.try_get(14).map_err(native)?;
            let since = since.map_err(native)?;
            Ok(HeldReport::new(
                held,
                wait,
                since,
                messages as u64,
                decision,
            ))
        });
        reports.collect()
    }

    async fn messages(
        &self,
        group: &Group,
        held: &HeldPlace,
        after: Option<u64>,
        messages_max: usize,
    ) -> Result<Vec<HeldMessage>> {
        let query = about(
            self.database.sql(SELECT_MESSAGES),
            group,
            &held.place,
            &held.name,
        )
        .bind(after.unwrap_or(0) as i64)
        .bind(i64::try_from(messages_max).unwrap_or(i64::MAX));
        let rows = self.database.read("list held messages", query).await?;
        let messages = rows.iter().map(|row| {
            let is_first = row.try_get(6).map_err(native)?;
            read_message(&held.place.topic, row, is_first)
        });
        messages.collect()
    }

    async fn decide(
        &self,
        group: &Group,
        held: &HeldPlace,
        decision: &KeyDecision,
    ) -> Result<bool> {
        let tables = self.database.tables.clone();
        let about_what = Arc::new((group.clone(), held.clone(), decision.clone()));
        let decided = self
            .database
            .writer
            .run("decide about key", move |connection| {
                let (tables, about_what) = (tables.clone(), Arc::clone(&about_what));
                async move {
                    let (group, held, decision) = &*about_what;
                    decide(&tables, group, held, decision, connection).await
                }
                .boxed()
            });
        let Some((id, generation)) = decided.await? else {
            return Ok(false);
        };
        self.database.wakes.group_changed(id, generation);
        Ok(true)
    }
}

/// Records a decision, and returns the group with its new generation; `None` when there is nothing
/// to decide.
async fn decide(
    tables: &Tables,
    group: &Group,
    held: &HeldPlace,
    decision: &KeyDecision,
    connection: &mut SqliteConnection,
) -> Result<Option<(i64, i64)>> {
    let decided = about(tables.sql(DECIDE), group, &held.place, &held.name)
        .bind(decision.action.as_str())
        .bind(decision.by.clone())
        .bind(decision.because.clone())
        .bind(decision.at.as_micros())
        .fetch_optional(&mut *connection)
        .await
        .map_err(native)?;
    if decided.is_none() {
        return Ok(None);
    }
    let noted = sqlx::query(tables.sql(NOTE_DECIDED)).bind(group.to_string());
    let row = noted.fetch_one(connection).await;
    let generation = row.and_then(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
    generation.map(Some).map_err(native)
}

fn native(error: sqlx::Error) -> Error {
    into_error("keep held keys", error)
}
