//! The store of held keys on a server: names, their messages, and who may write them.
//!
//! | key | holds |
//! | --- | --- |
//! | `eventbus:held:GROUP` | by `TOPIC PARTITION`: the fence of the latest claim |
//! | `eventbus:held:GROUP:decisions` | how many decisions there were |
//! | `eventbus:held:GROUP:TOPIC PARTITION:names` | the names that are held, in their order |
//! | `…:due`, `…:decided` | names by when they are tried, by when an operator decided |
//! | `…:n:NAME` | what a name waits for, and what was decided |
//! | `…:m:NAME` | its messages, in their order |
//!
//! A name begins with `k` for a key, with `m` for a message by itself. Each call is one script, which
//! does nothing under an earlier claim.

mod held;
mod scripts;

use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    Claim, Due, Durability, Error, ErrorKind, Group, HELD_KEYS_MAX, HeldMessage, HeldName,
    HeldPlace, HeldReport, HoldEntry, KeyDecision, KeyStateDesk, KeyStateStore, Result, Timestamp,
    Topic, TopicPartition, Wait,
};
use redis::{Cmd, FromRedisValue, Pipeline, Value};

use crate::database::Shared;
use crate::error::into_error;
use crate::leases::{changes_key, place_name};
use held::{
    read_due, read_first, read_messages, read_names, read_reports, stored_name, unreadable,
    wait_arguments,
};

const CLAIM: &str = "claim held keys";
const HOLD: &str = "hold messages";
const ADVANCE: &str = "take held messages";
const WAIT: &str = "park key";
const LOOK: &str = "look for due keys";
const DECISIONS: &str = "look for decisions";
const LIST: &str = "list held keys";
const MESSAGES: &str = "list held messages";
const DECIDE: &str = "decide about key";

/// How long a server that does not answer is left alone.
const BROKEN_PAUSE: Duration = Duration::from_millis(500);

/// Keeps held keys on a Redis server, for all processes of a group; clones share connections.
///
/// # Contract
///
/// - **Durability** is the server's, see [`durability`](Self::durability). What is held was taken from the
///   broker and is nowhere else, so the server has to keep as much as that does. With
///   [`RedisConfig::replicas`](crate::RedisConfig::replicas) each call waits for so many.
/// - A server whose memory is full refuses to hold more (`RateLimited`): keys are then held on the broker.
#[derive(Clone, Debug)]
pub struct RedisKeyState {
    shared: Shared,
}

fn fences_key(group: &Group) -> String {
    format!("eventbus:held:{group}")
}

fn decisions_key(group: &Group) -> String {
    format!("eventbus:held:{group}:decisions")
}

fn place_key(group: &Group, place: &TopicPartition) -> String {
    let place = place_name(&place.topic, place.partition);
    format!("eventbus:held:{group}:{place}")
}

/// A script about one place; what it is given comes behind the fence.
fn script(what: &str, group: &Group, place: &TopicPartition, fence: u64) -> Cmd {
    let mut ask = redis::cmd("EVAL");
    let begin = match what == scripts::HOLD {
        true => "",
        false => scripts::IN_NEED,
    };
    ask.arg([begin, scripts::COMMON, what].concat()).arg(4);
    ask.arg(fences_key(group)).arg(place_key(group, place));
    ask.arg(decisions_key(group)).arg(changes_key(group));
    ask.arg(place_name(&place.topic, place.partition));
    ask.arg(fence);
    ask
}

fn under(what: &str, claim: &Claim) -> Cmd {
    script(what, &claim.group, &claim.place, claim.fence)
}

/// A count that Lua can say exactly.
fn bounded(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// What a script answers under an earlier claim, and where there is no room.
const STALE: i64 = -1;
const FULL: i64 = -2;

fn check(operation: &'static str, claim: &Claim, answer: &Value) -> Result<()> {
    let refuse = |kind, message: &str| {
        Error::new(kind, operation, message)
            .with("group", &claim.group)
            .with("topic", &claim.place.topic)
            .with("partition", claim.place.partition)
    };
    match answer {
        Value::Int(STALE) => Err(refuse(
            ErrorKind::Conflict,
            "another member has taken this partition over",
        )),
        Value::Int(FULL) => Err(refuse(
            ErrorKind::RateLimited,
            "as much is held as may be: retry, release or discard what is parked",
        )),
        _ => Ok(()),
    }
}

impl RedisKeyState {
    pub(crate) fn new(shared: Shared) -> Self {
        Self { shared }
    }

    /// What survives when a call has resolved.
    pub fn durability(&self) -> Durability {
        self.shared.database.server.durability
    }

    async fn keep(&self, operation: &'static str, ask: Cmd) -> Result<Value> {
        self.shared.database.server.keep(operation, ask).await
    }

    async fn ask<T: FromRedisValue>(&self, operation: &'static str, ask: &Cmd) -> Result<T> {
        let control = &self.shared.database.server.control;
        control.ask(operation, ask).await
    }

    async fn version(&self, group: &Group) -> Result<u64> {
        let mut get = redis::cmd("GET");
        get.arg(decisions_key(group));
        let version: Option<u64> = self.ask(DECISIONS, &get).await?;
        Ok(version.unwrap_or(0))
    }

    /// The places that were ever claimed, in their order.
    async fn places(&self, group: &Group) -> Result<Vec<TopicPartition>> {
        let mut ask = redis::cmd("HKEYS");
        ask.arg(fences_key(group));
        let names: Vec<String> = self.ask(LIST, &ask).await?;
        let read = |name: &String| {
            let (topic, partition) = name.rsplit_once(' ').ok_or_else(|| unreadable(LIST))?;
            let partition = partition.parse().map_err(|_| unreadable(LIST))?;
            Ok(TopicPartition::new(Topic::new(topic)?, partition))
        };
        let mut places = names.iter().map(read).collect::<Result<Vec<_>>>()?;
        places.sort_unstable();
        Ok(places)
    }
}

#[async_trait]
impl KeyStateStore for RedisKeyState {
    async fn claim(&self, group: &Group, place: &TopicPartition) -> Result<(Claim, Vec<HeldName>)> {
        let ask = script(scripts::CLAIM, group, place, 0);
        let Value::Array(answer) = self.keep(CLAIM, ask).await? else {
            return Err(unreadable(CLAIM));
        };
        let Ok([Value::Int(fence), Value::Array(names)]) = <[Value; 2]>::try_from(answer) else {
            return Err(unreadable(CLAIM));
        };
        let names = read_names(names)?;
        Ok((
            Claim::new(group.clone(), place.clone(), fence as u64),
            names,
        ))
    }

    async fn hold(&self, claim: &Claim, entries: &[HoldEntry]) -> Result<()> {
        let mut ask = under(scripts::HOLD, claim);
        ask.arg(HELD_KEYS_MAX);
        for entry in entries {
            ask.arg(stored_name(&entry.name));
            let position = entry.position.map(crate::position::stored);
            ask.arg(position.unwrap_or_default());
            wait_arguments(&mut ask, &entry.wait);
            ask.arg(held::packed(&entry.message, entry.position));
        }
        check(HOLD, claim, &self.keep(HOLD, ask).await?)
    }

    async fn advance(
        &self,
        claim: &Claim,
        name: &HeldName,
        done: Option<u64>,
    ) -> Result<Option<HeldMessage>> {
        let mut ask = under(scripts::ADVANCE, claim);
        ask.arg(stored_name(name));
        ask.arg(done.map(held::number).unwrap_or_default());
        let answer = self.keep(ADVANCE, ask).await?;
        check(ADVANCE, claim, &answer)?;
        read_first(ADVANCE, &claim.place.topic, answer)
    }

    async fn wait(
        &self,
        claim: &Claim,
        name: &HeldName,
        wait: &Wait,
        carried_out: bool,
    ) -> Result<()> {
        let mut ask = under(scripts::WAIT, claim);
        ask.arg(stored_name(name));
        wait_arguments(&mut ask, wait);
        ask.arg(u8::from(carried_out));
        check(WAIT, claim, &self.keep(WAIT, ask).await?)
    }

    async fn due(
        &self,
        group: &Group,
        claims: &[Claim],
        now: Timestamp,
        names_max: usize,
    ) -> Result<Due> {
        let mut pipeline = Pipeline::with_capacity(claims.len() + 1);
        // Read first: a decision made meanwhile is one more reason to look again.
        pipeline.cmd("GET").arg(decisions_key(group));
        for claim in claims {
            let mut ask = under(scripts::DUE, claim);
            ask.arg(now.as_micros()).arg(bounded(names_max));
            pipeline.add_command(ask);
        }
        let server = &self.shared.database.server;
        let answers: redis::RedisResult<Vec<Value>> = server.control.send(&pipeline).await;
        let answers = answers.map_err(|error| into_error(LOOK, error))?;
        let mut answers = answers.into_iter();
        let version = held::count(LOOK, answers.next())?;
        let (mut found, mut next, mut superseded) = (Vec::new(), None::<Timestamp>, Vec::new());
        for (claim, answer) in claims.iter().zip(answers) {
            if answer == Value::Int(STALE) {
                superseded.push(claim.clone());
                continue;
            }
            let (due, later) = read_due(LOOK, &claim.place, answer)?;
            found.extend(due);
            next = match (next, later) {
                (Some(next), Some(later)) => Some(next.min(later)),
                (next, later) => next.or(later),
            };
        }
        found.sort_by_key(|(since, _)| *since);
        found.truncate(names_max);
        let names = found.into_iter().map(|(_, name)| name).collect();
        Ok(Due::new(names, next, version).with_superseded(superseded))
    }

    async fn decided(&self, group: &Group, seen: u64) {
        let database = &self.shared.database;
        let _waiting = database.wakes.wait();
        // Before the look, so that a decision between both is heard.
        let mut changes = database.wakes.group(database.known.group(group));
        match self.version(group).await {
            Ok(version) if version == seen => {}
            Ok(_) => return,
            // It is a hint: whoever asks for what is due hears what is wrong.
            Err(_) => return tokio::time::sleep(BROKEN_PAUSE).await,
        }
        if changes.changed().await.is_err() {
            // It is dropped with the database only; then nothing is decided any more.
            std::future::pending().await
        }
    }
}

#[async_trait]
impl KeyStateDesk for RedisKeyState {
    async fn list(
        &self,
        group: &Group,
        after: Option<&HeldPlace>,
        names_max: usize,
    ) -> Result<Vec<HeldReport>> {
        let mut reports: Vec<HeldReport> = Vec::new();
        for place in self.places(group).await? {
            if reports.len() >= names_max {
                break;
            }
            let behind = match after {
                Some(after) if place < after.place => continue,
                Some(after) if place == after.place => stored_name(&after.name),
                _ => Vec::new(),
            };
            let mut ask = script(scripts::LIST, group, &place, 0);
            ask.arg(behind).arg(bounded(names_max - reports.len()));
            let answer = self.ask(LIST, &ask).await?;
            reports.extend(read_reports(LIST, &place, answer)?);
        }
        Ok(reports)
    }

    async fn messages(
        &self,
        group: &Group,
        held: &HeldPlace,
        after: Option<u64>,
        messages_max: usize,
    ) -> Result<Vec<HeldMessage>> {
        let mut ask = script(scripts::MESSAGES, group, &held.place, 0);
        ask.arg(stored_name(&held.name));
        ask.arg(after.unwrap_or(0)).arg(bounded(messages_max));
        let answer = self.ask(MESSAGES, &ask).await?;
        read_messages(MESSAGES, &held.place.topic, answer)
    }

    async fn decide(
        &self,
        group: &Group,
        held: &HeldPlace,
        decision: &KeyDecision,
    ) -> Result<bool> {
        let mut ask = script(scripts::DECIDE, group, &held.place, 0);
        ask.arg(stored_name(&held.name));
        ask.arg(decision.action.as_str());
        ask.arg(&decision.by).arg(&decision.because);
        ask.arg(decision.at.as_micros());
        Ok(self.keep(DECIDE, ask).await? == Value::Int(1))
    }
}
