//! Who is to be woken when something was written. What other processes wrote is for the databases'
//! modules to see; here is who waits for it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::{Notify, watch};

use crate::delivery::Position;

/// The end of one lane, as far as it was seen, and who waits for more.
#[derive(Debug)]
pub struct LaneEnd {
    next: Mutex<Position>,
    readers: Mutex<Vec<Weak<Notify>>>,
}

impl LaneEnd {
    /// The position that the next message gets.
    pub fn next(&self) -> Position {
        *lock(&self.next)
    }

    /// Takes note of an end, and wakes who waits if it is a new one.
    pub fn reaches(&self, next: Position) {
        {
            let mut known = lock(&self.next);
            if *known >= next {
                return;
            }
            *known = next;
        }
        for reader in lock(&self.readers).iter() {
            if let Some(reader) = reader.upgrade() {
                reader.notify_one();
            }
        }
    }

    /// Lets `reader` be woken until it is dropped.
    pub fn listen(&self, reader: &Arc<Notify>) {
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

/// Everything of one log that somebody may wait for.
#[derive(Debug)]
pub struct Wakes {
    lanes: Mutex<HashMap<u32, Weak<LaneEnd>>>,
    /// The generation of each group whose members wait for changes.
    groups: Mutex<HashMap<i64, watch::Sender<i64>>>,
    waiting: AtomicUsize,
    waits: Notify,
}

/// Held while somebody waits.
#[derive(Debug)]
pub struct Waiting<'w>(&'w Wakes);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Default for Wakes {
    fn default() -> Self {
        Self::new()
    }
}

impl Wakes {
    /// Nobody waits yet.
    pub fn new() -> Self {
        Self {
            lanes: Mutex::new(HashMap::new()),
            groups: Mutex::new(HashMap::new()),
            waiting: AtomicUsize::new(0),
            waits: Notify::new(),
        }
    }

    /// The end of a lane, for those who read it.
    pub fn lane(&self, lane: u32, next: Position) -> Arc<LaneEnd> {
        let mut lanes = lock(&self.lanes);
        let known = lanes.get(&lane).and_then(Weak::upgrade);
        let end = known.unwrap_or_else(|| {
            lanes.retain(|_, end| end.strong_count() > 0);
            let end = Arc::new(LaneEnd {
                next: Mutex::new(next),
                readers: Mutex::new(Vec::new()),
            });
            lanes.insert(lane, Arc::downgrade(&end));
            end
        });
        drop(lanes);
        end.reaches(next);
        end
    }

    /// The end of a lane that somebody reads.
    pub fn end_of(&self, lane: u32) -> Option<Arc<LaneEnd>> {
        lock(&self.lanes).get(&lane).and_then(Weak::upgrade)
    }

    /// Takes note of lanes that became longer.
    pub fn appended<P: Copy + Into<Position>>(&self, ends: &[(u32, P)]) {
        for (lane, next) in ends {
            if let Some(end) = self.end_of(*lane) {
                end.reaches((*next).into());
            }
        }
    }

    /// Takes note of where a lane ends in truth, after something said that it ends at `said`; whoever
    /// said something else since knows better.
    pub fn corrects(&self, lane: u32, said: Position, next: Position) {
        if let Some(end) = self.end_of(lane) {
            let mut known = lock(&end.next);
            if *known == said {
                *known = next;
            }
        }
    }

    /// Hears of changes of a group.
    pub fn group(&self, group: i64) -> watch::Receiver<i64> {
        let mut groups = lock(&self.groups);
        groups.retain(|_, sender| sender.receiver_count() > 0);
        let sender = groups.entry(group).or_insert_with(|| watch::Sender::new(0));
        sender.subscribe()
    }

    /// Takes note that members or leases of a group changed.
    pub fn group_changed(&self, group: i64, generation: i64) {
        if let Some(sender) = lock(&self.groups).get(&group) {
            sender.send_if_modified(|known| {
                let newer = *known < generation;
                *known = generation.max(*known);
                newer
            });
        }
    }

    /// Has the log looked at until the guard is dropped.
    pub fn wait(&self) -> Waiting<'_> {
        if self.waiting.fetch_add(1, Ordering::AcqRel) == 0 {
            self.waits.notify_one();
        }
        Waiting(self)
    }

    /// Resolves when somebody waits.
    pub async fn wanted(&self) {
        while self.waiting.load(Ordering::Acquire) == 0 {
            self.waits.notified().await;
        }
    }

    /// The lanes that somebody reads.
    pub fn watched_lanes(&self) -> Vec<u32> {
        let lanes = lock(&self.lanes);
        let alive = lanes.iter().filter(|(_, end)| end.strong_count() > 0);
        alive.map(|(lane, _)| *lane).collect()
    }

    /// The groups whose members wait for changes.
    pub fn watched_groups(&self) -> Vec<i64> {
        lock(&self.groups).keys().copied().collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
