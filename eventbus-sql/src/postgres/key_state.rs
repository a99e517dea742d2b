//! The store of held keys in the database: names, their messages, and who may write them.

mod held;
mod read;
mod statements;

use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    Claim, Due, DueName, Error, Group, HeldMessage, HeldName, HeldPlace, HeldReport, HoldEntry,
    KeyDecision, KeyStateDesk, KeyStateStore, Result, Timestamp, TopicPartition, Wait,
};

use super::error::into_error;
use super::session::PgQuery;
use super::store::PostgresStore;
use held::{Held, about, of_place, with_wait};
use read::{read_held, read_message, read_name, stored_name};
use statements::{
    ADD_GROUP, CLAIM, DECIDE, LIST, NOTE_DECIDED, SELECT_DUE, SELECT_MESSAGES, SELECT_NAMES,
    SELECT_NEXT_DUE, SELECT_SUPERSEDED, SELECT_VERSION, WAIT,
};

const CLAIM_KEYS: &str = "claim held keys";
const DECIDE_KEY: &str = "decide about key";
const LIST_KEYS: &str = "list held keys";
const LIST_MESSAGES: &str = "list held messages";
const LOOK: &str = "look for due keys";
const LOOK_DECISIONS: &str = "look for decisions";

impl PostgresStore {
    /// Begins to write under a claim, if no later one was made.
    async fn write<'h>(&'h self, operation: &'static str, claim: &'h Claim) -> Result<Held<'h>> {
        let mut held = Held {
            tables: &self.database.tables,
            claim,
            session: self.database.begin(operation).await?,
        };
        held.check_claim(operation).await?;
        Ok(held)
    }

    /// Counts the decisions about a group; none before the first claim.
    async fn version(&self, group: &Group) -> Result<Option<(i64, i64)>> {
        let sql = self.database.tables.sql(SELECT_VERSION);
        let rows = self.database.query(LOOK_DECISIONS, || {
            sqlx::query(sql.clone()).bind(group.as_str())
        });
        let rows = rows.await?;
        let Some(row) = rows.first() else {
            return Ok(None);
        };
        let column = |index| self.database.column(LOOK_DECISIONS, row, index);
        Ok(Some((column(0)?, column(1)?)))
    }
}

#[async_trait]
impl KeyStateStore for PostgresStore {
    async fn claim(&self, group: &Group, place: &TopicPartition) -> Result<(Claim, Vec<HeldName>)> {
        let tables = &self.database.tables;
        let mut session = self.database.begin(CLAIM_KEYS).await?;
        // Its generation counts decisions; it may read from another broker.
        let add = sqlx::query(tables.sql(ADD_GROUP)).bind(group.as_str());
        session.rows(add).await?;
        let claimed = session.rows(of_place(tables.sql(CLAIM), group, place));
        let claimed = claimed.await?;
        let fence = claimed.first().map(|row| session.column(row, 0));
        let fence: i64 = fence.transpose()?.unwrap_or(0);
        // Behind the claim, so that all is seen that was written under an earlier one.
        let rows = session.rows(of_place(tables.sql(SELECT_NAMES), group, place));
        let names = rows.await?;
        let names = names.iter().map(|row| {
            let kind = session.column(row, 0)?;
            read_name(kind, session.column(row, 1)?)
        });
        let names = names.collect::<Result<Vec<_>>>()?;
        session.commit().await?;
        let claim = Claim::new(group.clone(), place.clone(), fence as u64);
        Ok((claim, names))
    }

    async fn hold(&self, claim: &Claim, entries: &[HoldEntry]) -> Result<()> {
        let mut held = self.write("hold messages", claim).await?;
        for entry in entries {
            held.hold_one(entry).await?;
        }
        held.session.commit().await
    }

    async fn advance(
        &self,
        claim: &Claim,
        name: &HeldName,
        done: Option<u64>,
    ) -> Result<Option<HeldMessage>> {
        let mut held = self.write("take held messages", claim).await?;
        let first = held.advance(name, done).await?;
        held.session.commit().await?;
        Ok(first)
    }

    async fn wait(
        &self,
        claim: &Claim,
        name: &HeldName,
        wait: &Wait,
        carried_out: bool,
    ) -> Result<()> {
        let mut held = self.write("park key", claim).await?;
        let sql = held.tables.sql(WAIT);
        let query = with_wait(about(sql, &claim.group, &claim.place, name), wait);
        held.session.rows(query.bind(carried_out)).await?;
        held.session.commit().await
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
        let topics: Vec<&str> = claims.iter().map(|it| it.place.topic.as_str()).collect();
        let partitions: Vec<i32> = claims.iter().map(|it| it.place.partition as i32).collect();
        let fences: Vec<i64> = claims.iter().map(|claim| claim.fence as i64).collect();
        let names_max = i64::try_from(names_max).unwrap_or(i64::MAX);
        let (due, next) = (
            self.database.tables.sql(SELECT_DUE),
            self.database.tables.sql(SELECT_NEXT_DUE),
        );
        let about_mine = |sql| -> PgQuery<'_> {
            sqlx::query(sql)
                .bind(group.as_str())
                .bind(&topics)
                .bind(&partitions)
                .bind(&fences)
                .bind(now.as_micros())
        };
        let rows = self
            .database
            .query(LOOK, || about_mine(due.clone()).bind(names_max))
            .await?;
        let names = rows.iter().map(|row| {
            let (held, wait, decision) = read_held(row)?;
            Ok(DueName::new(held, wait, decision))
        });
        let names = names.collect::<Result<Vec<_>>>()?;
        let rows = self.database.query(LOOK, || about_mine(next.clone()));
        let next = rows.await?;
        let next = next.first().map(|row| self.database.column(LOOK, row, 0));
        let next: Option<i64> = next.transpose()?.flatten();
        // Read last: whatever a later claim has kept from the answers before is told.
        let superseded = self.database.tables.sql(SELECT_SUPERSEDED);
        let rows = self.database.query(LOOK, || {
            sqlx::query(superseded.clone())
                .bind(group.as_str())
                .bind(&topics)
                .bind(&partitions)
                .bind(&fences)
        });
        let rows = rows.await?;
        let superseded = rows.iter().map(|row| {
            let at: i64 = self.database.column(LOOK, row, 0)?;
            Ok(claims[at as usize - 1].clone())
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

/// How long a database that cannot be read is left alone.
const BROKEN_PAUSE: Duration = Duration::from_millis(500);

#[async_trait]
impl KeyStateDesk for PostgresStore {
    async fn list(
        &self,
        group: &Group,
        after: Option<&HeldPlace>,
        names_max: usize,
    ) -> Result<Vec<HeldReport>> {
        let (kind, name) = after.map(|after| stored_name(&after.name)).unzip();
        let names_max = i64::try_from(names_max).unwrap_or(i64::MAX);
        let sql = self.database.tables.sql(LIST);
        let rows = self.database.query(LIST_KEYS, || {
            sqlx::query(sql.clone())
                .bind(group.as_str())
                .bind(after.map(|after| after.place.topic.as_str()))
                .bind(after.map(|after| after.place.partition as i32))
                .bind(kind)
                .bind(name.clone())
                .bind(names_max)
        });
        let rows = rows.await?;
        let reports = rows.iter().map(|row| {
            let (held, wait, decision) = read_held(row)?;
            let since: i64 = self.database.column(LIST_KEYS, row, 13)?;
            let messages: i64 = self.database.column(LIST_KEYS, row, 14)?;
            let since = Timestamp::from_micros(since);
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
        let sql = self.database.tables.sql(SELECT_MESSAGES);
        let messages_max = i64::try_from(messages_max).unwrap_or(i64::MAX);
        let rows = self.database.query(LIST_MESSAGES, || {
            about(sql.clone(), group, &held.place, &held.name)
                .bind(after.unwrap_or(0) as i64)
                .bind(messages_max)
        });
        let rows = rows.await?;
        let messages = rows.iter().map(|row| {
            let is_first = self.database.column(LIST_MESSAGES, row, 7)?;
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
        let tables = &self.database.tables;
        let mut session = self.database.begin(DECIDE_KEY).await?;
        let decide = about(tables.sql(DECIDE), group, &held.place, &held.name)
            .bind(decision.action.as_str())
            .bind(decision.by.clone())
            .bind(decision.because.clone())
            .bind(decision.at.as_micros());
        if session.rows(decide).await?.is_empty() {
            session.commit().await?;
            return Ok(false);
        }
        let note = sqlx::query(tables.sql(NOTE_DECIDED)).bind(group.as_str());
        let rows = session.rows(note).await?;
        let noted = rows.first().map(|row| -> Result<(i64, i64)> {
            Ok((session.column(row, 0)?, session.column(row, 1)?))
        });
        let noted = noted.transpose()?;
        session.commit().await?;
        if let Some((id, generation)) = noted {
            self.database.group_changed(id, generation);
        }
        Ok(true)
    }
}

fn native(error: sqlx::Error) -> Error {
    into_error("keep held keys", error)
}
