//! Tells other processes what was written, and hears it from them.
//!
//! ```text
//!  commit ─▶ bell ─▶ one notification for all that was written meanwhile ─▶ every process listens
//!                    (after the commit: it never holds one up)               and looks by itself, too
//! ```
//!
//! A notification is a hint that makes it quick. Where none comes, be it because a process died
//! before it sent one or a proxy passes none on, looking finds out.

use std::collections::BTreeMap;
use std::future::{Future, pending};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use eventbus_core::Result;
use sqlx::postgres::{PgConnectOptions, PgListener};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::error::into_error;
use super::page::ids;
use super::session::{Session, Sessions, listening};
use super::tables::Tables;
use crate::wakes::Wakes;

/// How often the database is looked at while somebody waits and notifications come.
const LOOK: Duration = Duration::from_millis(500);
/// How often while none can come.
const LOOK_ALONE: Duration = Duration::from_millis(20);
/// How long a database that cannot be asked, or listened to, is left alone.
const BROKEN_PAUSE: Duration = Duration::from_millis(500);
const LISTEN_PAUSE: Duration = Duration::from_secs(5);
/// Most bytes of one notification: PostgreSQL takes 7999.
const NOTE_BYTES: usize = 7900;

const WATCH: &str = "watch database";

/// What became greater: the end of a lane, the generation of a group, the version of the schedule, or
/// how often somebody's commits added to the outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Note {
    Lane(u32),
    Group(i64),
    Schedule,
    Outbox(Teller),
}

/// Who tells of its commits, so that it does not hear of them twice.
type Teller = u64;

/// Tells other processes what was written; at most one value waits for each lane and group.
#[derive(Debug, Default)]
pub(super) struct Bell {
    notes: Mutex<BTreeMap<Note, u64>>,
    rung: Notify,
    teller: Teller,
    /// How often this client's commits added to the outbox.
    outbox: AtomicU64,
}

impl Bell {
    /// The handle, and the task behind it.
    pub(super) fn new(
        sessions: Sessions,
        tables: &Tables,
    ) -> (Arc<Self>, impl Future<Output = ()> + Send + use<>) {
        let bell = Arc::new(Self {
            teller: RandomState::new().hash_one(()),
            ..Self::default()
        });
        let ringing = Arc::clone(&bell).ring(sessions, tables.channel());
        (bell, ringing)
    }

    pub(super) fn lanes(&self, ends: &[(u32, u64)]) {
        self.note(ends.iter().map(|(lane, next)| (Note::Lane(*lane), *next)));
    }

    pub(super) fn group(&self, group: i64, generation: i64) {
        self.note([(Note::Group(group), generation as u64)]);
    }

    pub(super) fn schedule(&self, version: i64) {
        self.note([(Note::Schedule, version as u64)]);
    }

    pub(super) fn outbox(&self) {
        let times = self.outbox.fetch_add(1, Ordering::Relaxed) + 1;
        self.note([(Note::Outbox(self.teller), times)]);
    }

    fn note(&self, news: impl IntoIterator<Item = (Note, u64)>) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        for (note, value) in news {
            let known = notes.entry(note).or_insert(value);
            *known = value.max(*known);
        }
        drop(notes);
        self.rung.notify_one();
    }

    fn take(&self) -> BTreeMap<Note, u64> {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *notes)
    }

    async fn ring(self: Arc<Self>, sessions: Sessions, channel: String) {
        loop {
            self.rung.notified().await;
            let sent = send(&sessions, &channel, &payloads(&self.take())).await;
            if let Err(error) = sent {
                // Others look by themselves, so nothing is lost by this.
                debug!(%error, "other processes were not told what was written");
                sleep(BROKEN_PAUSE).await;
            }
        }
    }
}

/// A notification has to be on no disk: whoever comes later looks.
const NOTIFY: &str = "
    SELECT set_config('synchronous_commit', 'off', true), pg_notify($1, payload)
    FROM unnest($2::text[]) AS payload";

async fn send(sessions: &Sessions, channel: &str, payloads: &[String]) -> Result<()> {
    if payloads.is_empty() {
        return Ok(());
    }
    let mut session = sessions.get("notify").await?;
    let query = sqlx::query(NOTIFY).bind(channel).bind(payloads);
    session.rows(query).await?;
    session.end();
    Ok(())
}

/// News as texts that PostgreSQL takes.
fn payloads(news: &BTreeMap<Note, u64>) -> Vec<String> {
    let mut payloads: Vec<String> = Vec::new();
    for (note, value) in news {
        let text = match note {
            Note::Lane(lane) => format!("l{lane}:{value}"),
            Note::Group(group) => format!("g{group}:{value}"),
            Note::Schedule => format!("s:{value}"),
            Note::Outbox(teller) => format!("o{teller}:{value}"),
        };
        match payloads.last_mut() {
            Some(last) if last.len() + text.len() < NOTE_BYTES => {
                last.push(' ');
                last.push_str(&text);
            }
            _ => payloads.push(text),
        }
    }
    payloads
}

fn read_payload(payload: &str) -> impl Iterator<Item = (Note, u64)> {
    payload.split(' ').filter_map(|text| {
        let (note, value) = text.split_once(':')?;
        let note = match note.split_at_checked(1)? {
            ("l", lane) => Note::Lane(lane.parse().ok()?),
            ("g", group) => Note::Group(group.parse().ok()?),
            ("s", "") => Note::Schedule,
            ("o", teller) => Note::Outbox(teller.parse().ok()?),
            // Of a later version.
            _ => return None,
        };
        Some((note, value.parse().ok()?))
    })
}

/// What watching needs of a database.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) wakes: Arc<Wakes>,
    pub(super) sessions: Sessions,
    pub(super) tables: Tables,
    pub(super) connect: PgConnectOptions,
    pub(super) bell: Arc<Bell>,
}

/// Hears what other processes write, and looks by itself while somebody waits.
pub(super) async fn watch(watched: Watched) {
    let mut ear = Ear::new(&watched);
    loop {
        watched.wakes.wanted().await;
        ear.open().await;
        if let Err(error) = look(&watched).await {
            warn!(%error, "cannot see what other processes write; trying again");
            sleep(BROKEN_PAUSE).await;
            continue;
        }
        let pause = sleep(ear.pause());
        tokio::pin!(pause);
        loop {
            tokio::select! {
                biased;
                heard = ear.hear() => match heard {
                    Some(payload) => apply(&watched, &payload),
                    // What was sent meanwhile is not heard, so it is looked for.
                    None => break,
                },
                () = &mut pause => break,
            }
        }
    }
}

/// Listens, where that is possible.
#[derive(Debug)]
struct Ear<'w> {
    watched: &'w Watched,
    listener: Option<PgListener>,
    /// When it is tried again.
    next_try: Instant,
}

impl<'w> Ear<'w> {
    fn new(watched: &'w Watched) -> Self {
        Self {
            watched,
            listener: None,
            next_try: Instant::now(),
        }
    }

    async fn open(&mut self) {
        if self.listener.is_some() || Instant::now() < self.next_try {
            return;
        }
        let channel = self.watched.tables.channel();
        let opening = listen(&self.watched.connect, &channel);
        match tokio::time::timeout(LISTEN_PAUSE, opening).await {
            Ok(Ok(listener)) => self.listener = Some(listener),
            failed => {
                self.next_try = Instant::now() + LISTEN_PAUSE;
                let error = failed.ok().and_then(Result::err);
                debug!(?error, "cannot listen to notifications; looking more often");
            }
        }
    }

    fn pause(&self) -> Duration {
        match self.listener {
            Some(_) => LOOK,
            None => LOOK_ALONE,
        }
    }

    /// The next notification; `None` when some may have been missed.
    async fn hear(&mut self) -> Option<String> {
        let Some(listener) = &mut self.listener else {
            return pending().await;
        };
        match listener.try_recv().await {
            Ok(Some(notification)) => Some(notification.payload().to_owned()),
            _ => {
                self.listener = None;
                None
            }
        }
    }
}

async fn listen(connect: &PgConnectOptions, channel: &str) -> Result<PgListener> {
    let native = |error| into_error("listen", error);
    let mut listener = PgListener::connect_with(&listening(connect))
        .await
        .map_err(native)?;
    // Whoever listens has to know that something was missed.
    listener.eager_reconnect(false);
    listener.listen(channel).await.map_err(native)?;
    Ok(listener)
}

fn apply(watched: &Watched, payload: &str) {
    let wakes = &watched.wakes;
    for (note, value) in read_payload(payload) {
        match note {
            Note::Lane(lane) => wakes.appended(&[(lane, value)]),
            Note::Group(group) => wakes.group_changed(group, value as i64),
            Note::Schedule => wakes.schedule_changed(value as i64),
            Note::Outbox(teller) if teller == watched.bell.teller => {}
            Note::Outbox(_) => wakes.outbox_grew(),
        }
    }
}

const SELECT_NEWS: &str = "
    SELECT false, id::bigint, next FROM {s}.lanes WHERE id = ANY($1)
    UNION ALL
    SELECT true, id, generation FROM {s}.consumer_groups WHERE id = ANY($2)";

/// Reads the ends and generations that somebody waits for.
async fn look(watched: &Watched) -> Result<()> {
    let lanes = watched.wakes.watched_lanes();
    let groups = watched.wakes.watched_groups();
    let mut session: Session = watched.sessions.get(WATCH).await?;
    let query = sqlx::query(watched.tables.sql(SELECT_NEWS))
        .bind(ids(&lanes))
        .bind(groups);
    let rows = session.rows(query).await?;
    for row in &rows {
        let (id, value): (i64, i64) = (session.column(row, 1)?, session.column(row, 2)?);
        match session.column(row, 0)? {
            true => watched.wakes.group_changed(id, value),
            false => watched.wakes.appended(&[(id as u32, value as u64)]),
        }
    }
    session.end();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_fit_notifications_and_are_read_as_they_were_written() {
        let lanes = (0..2000).map(|lane| (Note::Lane(lane), u64::MAX >> 1));
        let others = [
            (Note::Group(7), 9),
            (Note::Schedule, 3),
            (Note::Outbox(u64::MAX), 1),
        ];
        let news: BTreeMap<_, _> = lanes.chain(others).collect();
        let payloads = payloads(&news);
        assert!(payloads.len() > 1);
        assert!(payloads.iter().all(|payload| payload.len() < 8000));
        let read: BTreeMap<_, _> = payloads.iter().flat_map(|it| read_payload(it)).collect();
        assert_eq!(read, news);
    }

    #[test]
    fn what_a_later_version_says_is_passed_over() {
        let read: Vec<_> = read_payload("x5:1 l3:4 l:5 nonsense g-1:2 \u{e4}:1").collect();
        assert_eq!(read, [(Note::Lane(3), 4), (Note::Group(-1), 2)]);
    }
}
