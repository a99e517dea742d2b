//! Who is to be woken when something was written: by this process at once, by another one within a
//! few milliseconds, and only while somebody waits.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use eventbus_core::Result;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{Row, SqliteConnection};
use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use tracing::warn;

use super::append::{LaneRow, SELECT_LANES};
use super::database::connect;
use super::error::into_error;
use super::outbox::last_appended;
use super::tables::Tables;

/// How often the file is looked at while somebody waits.
const POLL: Duration = Duration::from_millis(8);
/// How long a file that cannot be read is left alone.
const BROKEN_PAUSE: Duration = Duration::from_millis(500);

/// The end of one lane, as far as it was seen, and who waits for more.
#[derive(Debug)]
pub(super) struct LaneEnd {
    next: AtomicU64,
    readers: Mutex<Vec<Weak<Notify>>>,
}

impl LaneEnd {
    /// The position that the next message gets.
    pub(super) fn next(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    /// Takes note of an end, and wakes who waits if it is a new one.
    pub(super) fn reaches(&self, next: u64) {
        if self.next.fetch_max(next, Ordering::AcqRel) >= next {
            return;
        }
        for reader in lock(&self.readers).iter() {
            if let Some(reader) = reader.upgrade() {
                reader.notify_one();
            }
        }
    }

    /// Lets `reader` be woken until it is dropped.
    pub(super) fn listen(&self, reader: &Arc<Notify>) {
        let mut readers = lock(&self.readers);
        readers.retain(|known| known.strong_count() > 0);
        let known = readers
            .iter()
            .any(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(reader)));
        if !known {
            readers.push(Arc::downgrade(reader));
        }
    }
}

/// Everything of one database that somebody may wait for.
#[derive(Debug)]
pub(super) struct Wakes {
    lanes: Mutex<HashMap<u32, Weak<LaneEnd>>>,
    /// The generation of each group whose members wait for changes.
    groups: Mutex<HashMap<i64, watch::Sender<i64>>>,
    /// The version of the schedule, for those who wait for what it holds.
    schedule: watch::Sender<i64>,
    /// The last position of the outbox that was seen.
    outbox: watch::Sender<i64>,
    waiting: AtomicUsize,
    waits: Notify,
}

/// Held while somebody waits.
#[derive(Debug)]
pub(super) struct Waiting<'w>(&'w Wakes);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Wakes {
    pub(super) fn new() -> Self {
        Self {
            lanes: Mutex::new(HashMap::new()),
            groups: Mutex::new(HashMap::new()),
            schedule: watch::Sender::new(0),
            outbox: watch::Sender::new(0),
            waiting: AtomicUsize::new(0),
            waits: Notify::new(),
        }
    }

    /// The end of a lane, for those who read it.
    pub(super) fn lane(&self, lane: u32, next: u64) -> Arc<LaneEnd> {
        let mut lanes = lock(&self.lanes);
        let known = lanes.get(&lane).and_then(Weak::upgrade);
        let end = known.unwrap_or_else(|| {
            lanes.retain(|_, end| end.strong_count() > 0);
            let end = Arc::new(LaneEnd {
                next: AtomicU64::new(next),
                readers: Mutex::new(Vec::new()),
            });
            lanes.insert(lane, Arc::downgrade(&end));
            end
        });
        drop(lanes);
        end.reaches(next);
        end
    }

    /// Takes note of lanes that became longer.
    pub(super) fn appended(&self, ends: &[(u32, u64)]) {
        for (lane, next) in ends {
            let end = lock(&self.lanes).get(lane).and_then(Weak::upgrade);
            if let Some(end) = end {
                end.reaches(*next);
            }
        }
    }

    /// Hears of changes of a group.
    pub(super) fn group(&self, group: i64) -> watch::Receiver<i64> {
        let mut groups = lock(&self.groups);
        groups.retain(|_, sender| sender.receiver_count() > 0);
        let sender = groups.entry(group).or_insert_with(|| watch::Sender::new(0));
        sender.subscribe()
    }

    /// Takes note that members or leases of a group changed.
    pub(super) fn group_changed(&self, group: i64, generation: i64) {
        if let Some(sender) = lock(&self.groups).get(&group) {
            sender.send_if_modified(|known| {
                let newer = *known < generation;
                *known = generation.max(*known);
                newer
            });
        }
    }

    /// Hears of messages that are due earlier than all others.
    pub(super) fn schedule(&self) -> watch::Receiver<i64> {
        self.schedule.subscribe()
    }

    /// Takes note of the schedule's version.
    pub(super) fn schedule_changed(&self, version: i64) {
        self.schedule
            .send_if_modified(|known| std::mem::replace(known, version.max(*known)) < version);
    }

    /// Hears of what is appended to the outbox.
    pub(super) fn outbox(&self) -> watch::Receiver<i64> {
        self.outbox.subscribe()
    }

    /// Takes note of how far the outbox goes.
    pub(super) fn outbox_reaches(&self, position: i64) {
        self.outbox.send_if_modified(|known| {
            let newer = *known < position;
            *known = position.max(*known);
            newer
        });
    }

    /// Has the file looked at until the guard is dropped.
    pub(super) fn wait(&self) -> Waiting<'_> {
        if self.waiting.fetch_add(1, Ordering::AcqRel) == 0 {
            self.waits.notify_one();
        }
        Waiting(self)
    }

    /// Resolves when somebody waits.
    async fn wanted(&self) {
        while self.waiting.load(Ordering::Acquire) == 0 {
            self.waits.notified().await;
        }
    }

    fn watched_lanes(&self) -> Vec<u32> {
        let lanes = lock(&self.lanes);
        let alive = lanes.iter().filter(|(_, end)| end.strong_count() > 0);
        alive.map(|(lane, _)| *lane).collect()
    }

    fn watched_groups(&self) -> Vec<i64> {
        lock(&self.groups).keys().copied().collect()
    }
}

/// Looks whether another process wrote, while somebody waits for that.
pub(super) async fn watch(wakes: Arc<Wakes>, options: SqliteConnectOptions, tables: Tables) {
    loop {
        wakes.wanted().await;
        let watched = watch_on_one_connection(&wakes, &options, &tables).await;
        if let Err(error) = watched {
            warn!(%error, "cannot see what other processes write; trying again");
            sleep(BROKEN_PAUSE).await;
        }
    }
}

async fn watch_on_one_connection(
    wakes: &Wakes,
    options: &SqliteConnectOptions,
    tables: &Tables,
) -> Result<()> {
    let mut connection = connect(options).await?;
    let mut seen = None;
    loop {
        wakes.wanted().await;
        // Counts the commits of all other connections, those of this process included.
        let version = version(&mut connection).await?;
        if seen != Some(version) {
            look(wakes, tables, &mut connection).await?;
            seen = Some(version);
        }
        sleep(POLL).await;
    }
}

async fn version(connection: &mut SqliteConnection) -> Result<i64> {
    let row = sqlx::query("PRAGMA data_version")
        .fetch_one(connection)
        .await;
    row.and_then(|row| row.try_get(0))
        .map_err(|error| into_error("watch database", error))
}

/// Reads the ends, generations and versions that somebody waits for.
async fn look(wakes: &Wakes, tables: &Tables, connection: &mut SqliteConnection) -> Result<()> {
    let native = |error| into_error("watch database", error);
    let lanes = wakes.watched_lanes();
    if !lanes.is_empty() {
        let rows = sqlx::query(tables.sql(SELECT_LANES))
            .bind(format!("{lanes:?}"))
            .fetch_all(&mut *connection)
            .await
            .map_err(native)?;
        for row in &rows {
            let (lane, state) = LaneRow::read(row).map_err(native)?;
            wakes.appended(&[(lane, state.next)]);
        }
    }
    let groups = wakes.watched_groups();
    if !groups.is_empty() {
        let rows = sqlx::query(tables.sql(GENERATIONS))
            .bind(format!("{groups:?}"))
            .fetch_all(&mut *connection)
            .await
            .map_err(native)?;
        for row in &rows {
            let group = row.try_get(0).map_err(native)?;
            wakes.group_changed(group, row.try_get(1).map_err(native)?);
        }
    }
    if wakes.schedule.receiver_count() > 0 {
        let query = sqlx::query(tables.sql("SELECT version FROM {p}schedule"));
        let row = query.fetch_one(&mut *connection).await.map_err(native)?;
        wakes.schedule_changed(row.try_get(0).map_err(native)?);
    }
    if wakes.outbox.receiver_count() > 0 {
        let last = last_appended(tables, connection).await.map_err(native)?;
        wakes.outbox_reaches(last);
    }
    Ok(())
}

const GENERATIONS: &str = "
    SELECT id, generation FROM {p}consumer_groups
    WHERE id IN (SELECT value FROM json_each(?))";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
