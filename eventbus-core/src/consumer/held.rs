//! Held keys as one consumer knows them: which lanes it has claimed in the store, what is held
//! there, and what is due. Putting messages aside and taking them back is the workers' business.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Runtime;
use super::backoff::Backoff;
use super::worker::{Inbox, Item};
use crate::activity::Part;
use crate::clock::Timestamp;
use crate::delivery::{Delivery, Lane, Receipt};
use crate::error::{ErrorKind, Result};
use crate::key_state::{Claim, Due, DueName, HeldMessage, HeldName, KeyDecision, KeyStateStore};
use crate::message::{Group, Key};
use crate::topic::TopicPartition;

/// Most held names that one consumer works on at once; each has one message in memory.
const IN_WORK_MAX: usize = 256;

/// How long is waited before a lane is claimed again that somebody else has claimed.
pub(crate) const RECLAIM: Duration = Duration::from_millis(100);

/// The tag of receipts that the broker knows nothing of.
const NO_TAG: u64 = u64::MAX;

/// What one consumer knows about held keys.
pub(crate) struct HeldLanes {
    pub(crate) store: Arc<dyn KeyStateStore>,
    /// Names held over all lanes. Mostly none: then nothing else is looked at.
    count: AtomicUsize,
    lanes: Mutex<HashMap<Lane, ClaimedLane>>,
    /// There may be something due that nobody has looked for.
    changed: Notify,
    part: Arc<Part>,
}

struct ClaimedLane {
    claim: Claim,
    /// Another member claimed it later, though the lane is ours: it is to be claimed anew.
    is_stale: bool,
    /// It goes to another member: what is held stays in the store, for that one.
    is_leaving: bool,
    /// Whether a worker has a message of the name now.
    names: HashMap<HeldName, bool>,
}

impl fmt::Debug for HeldLanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldLanes")
            .field("store", &self.store)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

impl HeldLanes {
    pub(crate) fn new(store: Arc<dyn KeyStateStore>, part: Arc<Part>) -> Self {
        Self {
            store,
            count: AtomicUsize::new(0),
            lanes: Mutex::default(),
            changed: Notify::new(),
            part,
        }
    }

    /// Lets the keeper look again.
    pub(crate) fn wake(&self) {
        self.part.raise();
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Lane, ClaimedLane>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims a partition, for as long as it takes; counts as work, so that tests wait for it.
    pub(crate) async fn claim_place(
        &self,
        group: &Group,
        place: &TopicPartition,
    ) -> Result<(Claim, Vec<HeldName>)> {
        let mut backoff = Backoff::new();
        loop {
            match self.store.claim(group, place).await {
                Err(error) if error.is_retryable() => {
                    tracing::warn!(%group, %place, error = %error, "claiming held keys is tried again");
                    tokio::time::sleep(backoff.next()).await;
                }
                result => return result,
            }
        }
    }

    /// Takes in a lane that was claimed, before any delivery of it is passed on.
    pub(crate) fn open(&self, lane: Lane, claim: Claim, names: Vec<HeldName>) {
        self.count.fetch_add(names.len(), Ordering::AcqRel);
        let names = names.into_iter().map(|name| (name, false)).collect();
        self.lock().insert(
            lane,
            ClaimedLane {
                claim,
                is_stale: false,
                is_leaving: false,
                names,
            },
        );
        self.wake();
    }

    /// Brings nothing more of lanes that leave; called before the workers hear of it, so that none of
    /// them gets a message of a lane that it has let go of.
    pub(crate) fn leave(&self, leaving: &[Lane]) {
        let mut lanes = self.lock();
        for lane in leaving {
            if let Some(lane) = lanes.get_mut(lane) {
                lane.is_leaving = true;
            }
        }
    }

    /// Passes a held message to its worker, unless its lane leaves or is gone.
    fn pass(&self, lane: Lane, inbox: &Inbox, item: Item) {
        // Under the lock: a lane that leaves later does so behind this message in the inbox.
        let lanes = self.lock();
        if lanes.get(&lane).is_some_and(|lane| !lane.is_leaving) {
            inbox.push(item);
        }
    }

    /// Forgets lanes that are not ours any more.
    pub(crate) fn close(&self, closed: &[Lane]) {
        let mut lanes = self.lock();
        for lane in closed {
            if let Some(closed) = lanes.remove(lane) {
                self.count.fetch_sub(closed.names.len(), Ordering::AcqRel);
            }
        }
    }

    /// How many names are held over all lanes.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Whether messages of this key are put aside.
    #[inline]
    pub(crate) fn holds(&self, lane: Lane, key: Option<&Key>) -> bool {
        self.count() > 0 && key.is_some_and(|key| self.holds_key(lane, key))
    }

    fn holds_key(&self, lane: Lane, key: &Key) -> bool {
        let name = HeldName::Key(key.clone());
        let lanes = self.lock();
        lanes
            .get(&lane)
            .is_some_and(|lane| lane.names.contains_key(&name))
    }

    /// The right to write for a lane, while it is ours.
    pub(crate) fn claim(&self, lane: Lane) -> Option<Claim> {
        self.lock().get(&lane).map(|lane| lane.claim.clone())
    }

    /// Notes that one more message of a name is held. Whoever works on the name comes to it.
    pub(crate) fn add(&self, lane: Lane, name: &HeldName) {
        if let Some(lane) = self.lock().get_mut(&lane)
            && let Entry::Vacant(place) = lane.names.entry(name.clone())
        {
            place.insert(false);
            self.count.fetch_add(1, Ordering::AcqRel);
        }
        self.wake();
    }

    /// Notes that a name is held and nobody works on it.
    pub(crate) fn rest(&self, lane: Lane, name: &HeldName) {
        if let Some(lane) = self.lock().get_mut(&lane)
            && lane.names.insert(name.clone(), false).is_none()
        {
            self.count.fetch_add(1, Ordering::AcqRel);
        }
        self.wake();
    }

    /// Notes that nothing of a name is held any more.
    pub(crate) fn free(&self, lane: Lane, name: &HeldName) {
        if let Some(lane) = self.lock().get_mut(&lane)
            && lane.names.remove(name).is_some()
        {
            self.count.fetch_sub(1, Ordering::AcqRel);
        }
        self.wake();
    }

    /// Has a lane claimed anew: a member that had it before claimed it too late.
    pub(crate) fn reclaim(&self, lane: Lane) {
        if let Some(lane) = self.lock().get_mut(&lane) {
            lane.is_stale = true;
        }
        self.wake();
    }

    fn stale(&self) -> Vec<(Lane, Claim)> {
        let lanes = self.lock();
        let stale = lanes.iter().filter(|(_, found)| found.is_stale);
        stale
            .map(|(lane, found)| (*lane, found.claim.clone()))
            .collect()
    }

    /// Takes in a lane that was claimed anew, unless it has left meanwhile.
    fn reopen(&self, lane: Lane, claim: Claim, names: Vec<HeldName>) {
        if let Some(found) = self.lock().get_mut(&lane) {
            found.claim = claim;
            found.is_stale = false;
            for name in names {
                if let Entry::Vacant(place) = found.names.entry(name) {
                    place.insert(false);
                    self.count.fetch_add(1, Ordering::AcqRel);
                }
            }
        }
    }

    fn claims(&self) -> Vec<(Lane, Claim)> {
        let lanes = self.lock();
        let staying = lanes.iter().filter(|(_, found)| !found.is_leaving);
        staying
            .map(|(lane, found)| (*lane, found.claim.clone()))
            .collect()
    }

    fn in_work(&self) -> usize {
        let lanes = self.lock();
        let names = lanes.values().flat_map(|lane| lane.names.values());
        names.filter(|in_work| **in_work).count()
    }

    /// Marks a name as worked on; false when it is already, is not ours, or is not known yet: the
    /// store has it, and the worker that puts it aside has not heard so. It wakes the keeper then,
    /// when nothing of the name is before it any more.
    fn take(&self, lane: Lane, name: &HeldName) -> bool {
        let mut lanes = self.lock();
        let in_work = lanes
            .get_mut(&lane)
            .and_then(|lane| lane.names.get_mut(name));
        in_work.is_some_and(|in_work| !std::mem::replace(in_work, true))
    }
}

/// The first message of a held name, on its way to its worker.
#[derive(Debug)]
pub(crate) struct HeldDelivery {
    pub(crate) delivery: Delivery,
    pub(crate) held: Held,
}

/// What a worker knows about a delivery that came from the store of held keys.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) name: HeldName,
    /// Of the message among those of its name.
    pub(crate) number: u64,
    pub(crate) attempts: u32,
    pub(crate) first_failed: Option<Timestamp>,
    /// What an operator decided; carried out on this message.
    pub(crate) decision: Option<KeyDecision>,
    /// What it was parked for.
    pub(crate) cause: String,
    pub(crate) error: String,
}

impl HeldDelivery {
    /// A held message as a delivery on the lane of its partition.
    pub(crate) fn new(lane: Lane, name: HeldName, message: HeldMessage) -> Self {
        let receipt = Receipt { lane, tag: NO_TAG };
        let mut delivery = Delivery::new(message.message, receipt);
        delivery.position = message.position;
        Self {
            delivery,
            held: Held {
                name,
                number: message.number,
                attempts: message.attempts,
                first_failed: message.first_failed,
                decision: None,
                cause: String::new(),
                error: String::new(),
            },
        }
    }
}

/// Brings workers the held messages whose time has come; one task.
pub(crate) struct Keeper {
    runtime: Arc<Runtime>,
    held: Arc<HeldLanes>,
    inboxes: Vec<Arc<Inbox>>,
}

impl Keeper {
    pub(crate) fn new(
        runtime: Arc<Runtime>,
        held: Arc<HeldLanes>,
        inboxes: Vec<Arc<Inbox>>,
    ) -> Self {
        Self {
            runtime,
            held,
            inboxes,
        }
    }

    /// Keeps until it is dropped: it holds nothing that its end could lose.
    ///
    /// # Errors
    ///
    /// What the store said cannot be mended by trying again.
    pub(crate) async fn run(self) -> Result<()> {
        let mut backoff = Backoff::new();
        let mut seen = 0;
        loop {
            self.held.part.raise();
            let next = match self.bring_due().await {
                Ok(due) => {
                    backoff.reset();
                    seen = due.version;
                    due.next.map(|next| self.instant_of(next))
                }
                Err(error) if error.is_retryable() => {
                    tracing::warn!(group = %self.runtime.group, error = %error, "the store of held keys is asked again");
                    Some(Instant::now() + backoff.next())
                }
                Err(error) => return Err(error),
            };
            self.held.part.set_due(next);
            self.held.part.lower();
            let come = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.held.changed.notified() => {}
                () = self.held.store.decided(&self.runtime.group, seen) => {}
                () = come => {}
            }
        }
    }

    /// The instant of a date to come.
    fn instant_of(&self, date: Timestamp) -> Instant {
        // Held keys are dated by the clock of the machine, which can be set: look again in an hour.
        let wait = date.since(self.runtime.bus.clock().now());
        Instant::now() + wait.min(Duration::from_secs(3600))
    }

    async fn bring_due(&self) -> Result<Due> {
        for (lane, claim) in self.held.stale() {
            let (claim, names) = self.held.store.claim(&claim.group, &claim.place).await?;
            self.held.reopen(lane, claim, names);
        }
        let lanes = self.held.claims();
        let claims: Vec<_> = lanes.iter().map(|(_, claim)| claim.clone()).collect();
        let in_work = self.held.in_work();
        let now = self.runtime.bus.clock().now();
        let store = &self.held.store;
        let mut due = store
            .due(&self.runtime.group, &claims, now, IN_WORK_MAX)
            .await?;
        for name in due
            .names
            .drain(..)
            .take(IN_WORK_MAX - in_work.min(IN_WORK_MAX))
        {
            let lane = lanes
                .iter()
                .find(|(_, claim)| claim.place == name.held.place);
            if let Some((lane, claim)) = lane
                && self.held.take(*lane, &name.held.name)
            {
                self.bring(*lane, claim, name).await?;
            }
        }
        let superseded = lanes
            .iter()
            .filter(|(_, claim)| due.superseded.contains(claim));
        let superseded: Vec<_> = superseded.map(|(lane, _)| *lane).collect();
        self.reclaim(&superseded).await;
        Ok(due)
    }

    /// Has lanes claimed anew that somebody has claimed after us, unless they leave meanwhile: the
    /// next owner, or a member that had them before us and claimed too late.
    async fn reclaim(&self, lanes: &[Lane]) {
        if !lanes.is_empty() {
            for lane in lanes {
                self.held.reclaim(*lane);
            }
            tokio::time::sleep(RECLAIM).await;
        }
    }

    /// Brings the first message of a name to its worker.
    async fn bring(&self, lane: Lane, claim: &Claim, due: DueName) -> Result<()> {
        let name = due.held.name;
        let first = match self.held.store.advance(claim, &name, None).await {
            Ok(Some(first)) => first,
            Ok(None) => {
                self.held.free(lane, &name);
                return Ok(());
            }
            Err(error) if error.kind() == ErrorKind::Conflict => {
                self.held.rest(lane, &name);
                self.reclaim(&[lane]).await;
                return Ok(());
            }
            Err(error) => {
                self.held.rest(lane, &name);
                return Err(error);
            }
        };
        let mut item = HeldDelivery::new(lane, name, first);
        item.held.decision = due.decision;
        item.held.cause = due.wait.cause;
        item.held.error = due.wait.error;
        let worker = self.worker_of(&item);
        let item = Item::Held(Box::new(item));
        self.held.pass(lane, &self.inboxes[worker], item);
        Ok(())
    }

    /// The worker of the message's key: where later ones of it come, too.
    fn worker_of(&self, item: &HeldDelivery) -> usize {
        match &item.delivery.message.key {
            Some(key) => self.runtime.worker_of_key(key, self.inboxes.len()),
            None => 0,
        }
    }
}
