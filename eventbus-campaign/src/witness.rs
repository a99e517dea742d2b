//! What the tried system is asked when all is over: effects, dead letters, what is parked, and
//! everything that the broker has.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use eventbus::prelude::{EventBus, Start, Until};
use eventbus::{Message, header};
use eventbus_verify::{Effect, Entry, MessageId, Operation, Phase, Sample, Session, Stamp};
use sqlx::{AssertSqlSafe, Row as _};
use tokio::time::sleep;

use crate::child::patiently;
use crate::recorded::group_name;
use crate::site::Reader;
use crate::store::Store;
use crate::tried::{TOPIC, message_id};

/// How often is asked whether everything is settled, and how often the answer has to be yes.
const GLANCE: Duration = Duration::from_millis(50);
const QUIET_PASSES: u32 = 5;
/// For how long no effect is added where only that tells that nothing is handed out any more.
const STILL: Duration = Duration::from_secs(10);
/// Without anything being settled for so long, the rest never is.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many records are written at a time.
const BATCH: usize = 512;

impl Reader {
    /// Every effect of a group, in the order in which they were committed within a key.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub async fn effects(&self) -> anyhow::Result<Vec<Effect>> {
        const COLUMNS: &str = "SELECT consumers, id, key, number, attempt, position FROM";
        let mut effects = Vec::new();
        match self {
            Self::Sqlite(pool) => {
                let sql = AssertSqlSafe(format!("{COLUMNS} effects"));
                for row in sqlx::query(sql).fetch_all(pool).await? {
                    let id: Vec<u8> = row.try_get(1)?;
                    let number = |column| row.try_get::<i64, _>(column);
                    effects.push(effect(&id, number)?);
                }
            }
            Self::Postgres(pool, schema) => {
                let sql = AssertSqlSafe(format!("{COLUMNS} {schema}.effects"));
                for row in sqlx::query(sql).fetch_all(pool).await? {
                    let id: Vec<u8> = row.try_get(1)?;
                    let number = |column| row.try_get::<i64, _>(column);
                    effects.push(effect(&id, number)?);
                }
            }
        }
        Ok(effects)
    }

    /// The number of the effect that was added last.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub async fn last_effect(&self) -> anyhow::Result<u64> {
        const LAST: &str = "SELECT COALESCE(MAX(position), 0) FROM";
        let last: i64 = match self {
            Self::Sqlite(pool) => {
                let sql = AssertSqlSafe(format!("{LAST} effects"));
                sqlx::query_scalar(sql).fetch_one(pool).await?
            }
            Self::Postgres(pool, schema) => {
                let sql = AssertSqlSafe(format!("{LAST} {schema}.effects"));
                sqlx::query_scalar(sql).fetch_one(pool).await?
            }
        };
        Ok(last.cast_unsigned())
    }

    /// How many effects the messages of a probe have.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub async fn probes(&self, number: u32) -> anyhow::Result<u64> {
        const COUNT: &str = "SELECT COUNT(*) FROM";
        let count: i64 = match self {
            Self::Sqlite(pool) => {
                let sql = AssertSqlSafe(format!("{COUNT} probes WHERE number = $1"));
                let query = sqlx::query_scalar(sql).bind(i64::from(number));
                query.fetch_one(pool).await?
            }
            Self::Postgres(pool, schema) => {
                let sql = AssertSqlSafe(format!("{COUNT} {schema}.probes WHERE number = $1"));
                let query = sqlx::query_scalar(sql).bind(i64::from(number));
                query.fetch_one(pool).await?
            }
        };
        Ok(count.cast_unsigned())
    }

    /// Ends its connections.
    pub async fn close(self) {
        match self {
            Self::Sqlite(pool) => pool.close().await,
            Self::Postgres(pool, _) => pool.close().await,
        }
    }
}

fn effect(id: &[u8], number: impl Fn(usize) -> sqlx::Result<i64>) -> anyhow::Result<Effect> {
    let id: [u8; 16] = id.try_into().context("an id has sixteen bytes")?;
    Ok(Effect {
        group: u16::try_from(number(0)?)?,
        id: MessageId::from_u128(u128::from_be_bytes(id)),
        key: u32::try_from(number(2)?)?,
        key_seq: u32::try_from(number(3)?)?,
        attempt: u16::try_from(number(4)?)?,
        order: number(5)?.cast_unsigned(),
    })
}

/// Waits until everything that was committed is published and settled; says what never is. Where the
/// lag leaves out what is handed out, it waits until nothing is added to these effects, too.
///
/// # Errors
///
/// When broker or database do not say.
pub async fn settled(
    bus: &EventBus,
    store: Option<&Store>,
    groups: &[u16],
    effects: &[Reader],
) -> anyhow::Result<Option<String>> {
    let (mut last, mut since, mut passes) = (u64::MAX, Instant::now(), 0);
    let (mut count, mut still_since) = (0, Instant::now());
    while passes < QUIET_PASSES || (!effects.is_empty() && still_since.elapsed() < STILL) {
        let mut counted = 0;
        for reader in effects {
            counted += reader.last_effect().await?;
        }
        if counted != count {
            (count, still_since) = (counted, Instant::now());
        }
        let left = left(bus, store, groups).await?;
        passes = if left == 0 { passes + 1 } else { 0 };
        if left != last {
            (last, since) = (left, Instant::now());
        }
        if left > 0 && since.elapsed() > PATIENCE {
            return Ok(Some(format!("{left} messages are never settled")));
        }
        sleep(GLANCE).await;
    }
    Ok(None)
}

/// How many messages are committed and not published, or published and not settled.
///
/// # Errors
///
/// When broker or database do not say.
pub async fn left(bus: &EventBus, store: Option<&Store>, groups: &[u16]) -> anyhow::Result<u64> {
    let mut left = match store {
        Some(store) => store.waiting().await?,
        None => 0,
    };
    for group in groups {
        left += lag(bus, *group).await?;
    }
    Ok(left)
}

/// How many messages a group has still to settle.
///
/// # Errors
///
/// When the broker does not say.
pub async fn lag(bus: &EventBus, group: u16) -> anyhow::Result<u64> {
    let name = group_name(group);
    // A connection that was lost with the broker is noticed by the first question.
    let lanes = patiently(async || Ok(bus.lag(&name, &[TOPIC]).await?)).await?;
    Ok(lanes.iter().map(|lane| lane.messages).sum())
}

/// Writes into the ledger what is left of each group, and all that the broker has.
///
/// # Errors
///
/// When the broker or the recorder are not there.
pub async fn note_what_is_left(
    bus: &EventBus,
    session: &Session,
    groups: &[u16],
) -> anyhow::Result<()> {
    for group in groups {
        let lag = Entry::sample(Sample::Lag, lag(bus, *group).await?).with_group(*group);
        session.ok(lag)?;
        let letters = patiently(async || dead_letters(bus, *group).await).await?;
        note(session, Operation::DeadLetter, *group, &letters)?;
        let parked = parked(bus, *group).await?;
        note(session, Operation::Park, *group, &parked)?;
    }
    if !bus.capabilities().replay {
        // Nobody can read again what the broker has.
        return Ok(());
    }
    let reread = Entry::new(Operation::Reread);
    session.invoke(reread)?;
    let read = async || {
        Ok(bus
            .read(&[TOPIC], Start::Earliest, Some(Until::Now))
            .await?)
    };
    let mut reader = patiently(read).await?;
    let mut stored = Vec::with_capacity(BATCH);
    while let Some(record) = reader.next().await? {
        let stamp = stamp_of(&record.message).context("the topic has a foreign message")?;
        let position = record.position.map_or(0, |position| position.0 as u64);
        let entry = Entry::of(Operation::Stored, stamp);
        stored.push(entry.with_position(record.partition, position));
        if stored.len() == BATCH {
            session.record(Phase::Ok, &stored)?;
            stored.clear();
        }
    }
    if !stored.is_empty() {
        session.record(Phase::Ok, &stored)?;
    }
    session.ok(reread)?;
    Ok(())
}

fn note(
    session: &Session,
    operation: Operation,
    group: u16,
    stamps: &[Stamp],
) -> anyhow::Result<()> {
    for stamp in stamps {
        session.ok(Entry::of(operation, *stamp).with_group(group))?;
    }
    Ok(())
}

/// What a group left as dead letters.
///
/// # Errors
///
/// When the broker cannot be read.
pub async fn dead_letters(bus: &EventBus, group: u16) -> anyhow::Result<Vec<Stamp>> {
    let desk = bus.dead_letters(&group_name(group), &[TOPIC])?;
    let mut page = desk.list().await?;
    let mut stamps = Vec::new();
    while let Some(last) = page.last() {
        let next = desk.list_after(last).await?;
        stamps.extend(page.iter().filter_map(|letter| stamp_of(&letter.message)));
        page = next;
    }
    Ok(stamps)
}

/// What waits with its key.
///
/// # Errors
///
/// When the store cannot be read.
pub async fn parked(bus: &EventBus, group: u16) -> anyhow::Result<Vec<Stamp>> {
    let desk = bus.held_keys(&group_name(group))?;
    let mut stamps = Vec::new();
    for report in desk.list().await? {
        let messages = desk.messages(&report.held).await?;
        stamps.extend(messages.iter().filter_map(|held| stamp_of(&held.message)));
    }
    Ok(stamps)
}

fn stamp_of(message: &Message) -> Option<Stamp> {
    let id = message_id(message.headers.get_str(header::ID)?).ok()?;
    id.origin().map(|(_, stamp)| stamp)
}
