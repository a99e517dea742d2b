//! What handlers do, and what they note.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use eventbus_core::{BoxError, Context};
use eventbus_verify::{Effect, Entry, Operation, Phase, Stamp};
use tokio::time::sleep;

use super::{Books, FOLLOWERS_GROUP, WORKERS_GROUP};
use crate::case::Planned;
use crate::event::{Numbered, RUN, checksum_of};
use crate::plant::PlantedUnit;

/// Effects outside of any transaction, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Effects(Arc<Mutex<Vec<Effect>>>);

impl Effects {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Vec<Effect>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the handlers of one member share.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    pub(crate) process: u32,
    pub(crate) planned: Arc<HashMap<Stamp, Planned>>,
    pub(crate) books: Books,
    pub(crate) effects: Effects,
    pub(crate) is_healed: Arc<AtomicBool>,
}

/// A handler that runs, in the ledger; dropped, it has done nothing.
struct Handling<'a> {
    watch: &'a Watch,
    entry: Entry,
    session: u32,
    /// The event that it publishes.
    follows: Option<Entry>,
    is_done: bool,
}

impl<'a> Handling<'a> {
    fn begin(watch: &'a Watch, stamp: Stamp, checksum: u32, group: u16, attempt: u32) -> Self {
        let entry = Entry::of(Operation::Handle, stamp)
            .with_group(group)
            .with_attempt(u16::try_from(attempt).unwrap_or(u16::MAX))
            .with_checksum(checksum);
        let session = watch.books.work.session();
        let handling = Self {
            watch,
            entry,
            session,
            follows: None,
            is_done: false,
        };
        handling.note(Phase::Invoke);
        handling
    }

    fn note(&self, phase: Phase) {
        let Watch { books, process, .. } = self.watch;
        let journal = match self.entry.group {
            WORKERS_GROUP => &books.work,
            _ => &books.followed,
        };
        journal.note(*process, self.session, phase, self.entry);
    }

    fn follow(&mut self, stamp: Stamp) {
        let entry = Entry::of(Operation::Publish, stamp).with_checksum(checksum_of(stamp));
        self.follows = Some(entry);
        self.note_following(Phase::Invoke);
    }

    fn note_following(&self, phase: Phase) {
        let Watch { books, process, .. } = self.watch;
        if let Some(entry) = self.follows {
            books.followed.note(*process, self.session, phase, entry);
        }
    }

    fn end(mut self) {
        self.is_done = true;
        self.note(Phase::Ok);
    }

    fn effect(&self) -> Effect {
        let stamp = self.entry.stamp.expect("every event of a run has a stamp");
        Effect {
            group: self.entry.group,
            id: stamp.id(RUN),
            key: stamp.key,
            key_seq: stamp.key_seq,
            attempt: self.entry.attempt,
            // Known when all are read.
            order: 0,
        }
    }
}

impl Drop for Handling<'_> {
    fn drop(&mut self) {
        if !self.is_done {
            self.note_following(Phase::Fail);
            self.note(Phase::Fail);
        }
    }
}

/// The stamp of what the handler of this message publishes.
pub(crate) fn following(stamp: Stamp) -> Stamp {
    Stamp::new(stamp.producer + 100, stamp.key, stamp.key_seq)
}

impl Watch {
    fn planned(&self, stamp: Stamp) -> Planned {
        let planned = self.planned.get(&stamp);
        *planned.expect("every message was planned")
    }

    /// Whether this attempt fails.
    fn fails(&self, planned: &Planned, attempt: u32) -> bool {
        let is_healed = self.is_healed.load(Ordering::SeqCst);
        !is_healed && attempt <= planned.failures
    }
}

fn fail(planned: &Planned) -> BoxError {
    if planned.panics {
        // Unlike `panic!` it prints nothing.
        std::panic::resume_unwind(Box::new("a planned panic"));
    }
    "a planned failure".into()
}

async fn take_time(planned: &Planned) {
    if planned.takes > 0 {
        sleep(Duration::from_millis(planned.takes)).await;
    }
}

/// Handles what producers publish, in a unit of work.
pub(crate) async fn work_in_unit(
    event: Numbered<false>,
    mut cx: Context<Watch, PlantedUnit>,
) -> Result<(), BoxError> {
    let watch = cx.state().clone();
    let (stamp, attempt) = (event.stamp(), cx.attempt());
    let planned = watch.planned(stamp);
    let mut handling = Handling::begin(&watch, stamp, event.checksum(), WORKERS_GROUP, attempt);
    take_time(&planned).await;
    if watch.fails(&planned, attempt) && !planned.fails_late {
        return Err(fail(&planned));
    }
    let effect = handling.effect();
    cx.transaction().await?.push(effect);
    if planned.follows {
        let following = following(stamp);
        handling.follow(following);
        cx.publish(Numbered::<true>::of(following))?;
    }
    if watch.fails(&planned, attempt) {
        return Err(fail(&planned));
    }
    handling.end();
    Ok(())
}

/// Handles what producers publish, without a unit of work.
pub(crate) async fn work(event: Numbered<false>, cx: Context<Watch>) -> Result<(), BoxError> {
    let watch = cx.state();
    let (stamp, attempt) = (event.stamp(), cx.attempt());
    let planned = watch.planned(stamp);
    let mut handling = Handling::begin(watch, stamp, event.checksum(), WORKERS_GROUP, attempt);
    take_time(&planned).await;
    if watch.fails(&planned, attempt) {
        return Err(fail(&planned));
    }
    if planned.follows {
        let following = following(stamp);
        handling.follow(following);
        cx.publish(Numbered::<true>::of(following))?;
    }
    watch.effects.lock().push(handling.effect());
    handling.end();
    Ok(())
}

/// Handles what handlers publish.
pub(crate) async fn follow(
    event: Numbered<true>,
    mut cx: Context<Watch, PlantedUnit>,
) -> Result<(), BoxError> {
    let watch = cx.state().clone();
    let attempt = cx.attempt();
    let handling = Handling::begin(
        &watch,
        event.stamp(),
        event.checksum(),
        FOLLOWERS_GROUP,
        attempt,
    );
    let effect = handling.effect();
    cx.transaction().await?.push(effect);
    handling.end();
    Ok(())
}
