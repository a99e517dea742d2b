//! The events that one consumer has claimed under its duplicate window: renewed together while they
//! are handled, and given up when they are not.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metrics::counter;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::activity::Part;
use crate::duplicates::{CLAIMS_LOST, ClaimEvents, DuplicateWindow, EventClaim};
use crate::envelope::EventId;
use crate::error::Result;
use crate::lease::MemberId;
use crate::message::Group;

/// How long a duplicate waits before it asks again whether the first one is done.
const ASK_AGAIN_MIN: Duration = Duration::from_millis(10);
const ASK_AGAIN_MAX: Duration = Duration::from_millis(500);

/// What one consumer has claimed.
pub(crate) struct Claims {
    window: DuplicateWindow,
    group: Group,
    /// As whom it claims; another consumer of the group is another one, in the same process, too.
    member: MemberId,
    state: Mutex<State>,
    /// Held while claims are renewed or released: a renewal that is under way would make a claim
    /// again that was released meanwhile.
    calls: tokio::sync::Mutex<()>,
    changed: Notify,
    part: Arc<Part>,
}

#[derive(Debug, Default)]
struct State {
    /// What is handled now, or waits to be marked.
    held: HashMap<EventId, Hold>,
    holds: u64,
    /// What nobody handles any more and was not released yet.
    dropped: HashSet<EventId>,
    /// What is being released.
    releasing: HashSet<EventId>,
    /// When claims are renewed; none while there are none.
    renew_at: Option<Instant>,
}

#[derive(Debug)]
struct Hold {
    /// Tells this one from others of the same event.
    number: u64,
    /// The store has granted it, so that it is renewed.
    is_granted: bool,
    /// Its handler has succeeded: that it counts as handled is no news.
    is_marking: bool,
}

/// What came of asking for an event.
pub(crate) enum Claiming {
    Granted(Claimed),
    Handled,
    /// Somebody else is at it: ask again after this time.
    Busy(Duration),
}

/// An event that is this consumer's to handle; dropped, it is given up.
pub(crate) struct Claimed {
    claims: Arc<Claims>,
    id: EventId,
    number: u64,
}

impl fmt::Debug for Claims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claims")
            .field("window", &self.window)
            .field("member", &self.member)
            .finish_non_exhaustive()
    }
}

impl Claims {
    pub(crate) fn new(window: DuplicateWindow, group: Group, part: Arc<Part>) -> Self {
        Self {
            window,
            group,
            member: MemberId::random(),
            state: Mutex::default(),
            calls: tokio::sync::Mutex::new(()),
            changed: Notify::new(),
            part,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for an event.
    pub(crate) async fn claim(self: &Arc<Self>, id: &EventId) -> Result<Claiming> {
        let Some(claimed) = self.hold(id) else {
            return Ok(Claiming::Busy(ASK_AGAIN_MIN));
        };
        let request = self.request(vec![id.clone()]);
        let claims = self.window.store.claim(&request).await?;
        Ok(match claims.first() {
            Some(EventClaim::Granted) => {
                claimed.grant();
                Claiming::Granted(claimed)
            }
            Some(EventClaim::Handled) => {
                claimed.end();
                Claiming::Handled
            }
            Some(EventClaim::Busy { free_in }) => {
                claimed.end();
                Claiming::Busy((*free_in).clamp(ASK_AGAIN_MIN, ASK_AGAIN_MAX))
            }
            // It answers for each: this one gives the claim up, whether it was made or not.
            None => Claiming::Busy(ASK_AGAIN_MAX),
        })
    }

    /// Notes that an event is handled here, unless it is already: by a duplicate of another key, or
    /// of none.
    fn hold(self: &Arc<Self>, id: &EventId) -> Option<Claimed> {
        let mut state = self.lock();
        if state.releasing.contains(id) || state.held.contains_key(id) {
            return None;
        }
        // What was given up a moment ago is taken up again.
        state.dropped.remove(id);
        state.holds += 1;
        let number = state.holds;
        let hold = Hold {
            number,
            is_granted: false,
            is_marking: false,
        };
        state.held.insert(id.clone(), hold);
        if state.renew_at.is_none() {
            state.renew_at = Some(Instant::now() + self.renew_after());
            drop(state);
            self.wake();
        }
        Some(Claimed {
            claims: Arc::clone(self),
            id: id.clone(),
            number,
        })
    }

    fn renew_after(&self) -> Duration {
        self.window.lease / 3
    }

    fn request(&self, ids: Vec<EventId>) -> ClaimEvents {
        ClaimEvents::new(self.group.clone(), self.member, ids, self.window.lease)
    }

    fn wake(&self) {
        self.part.raise();
        self.changed.notify_one();
    }

    /// Renews and releases until it is dropped.
    ///
    /// # Errors
    ///
    /// None: what the store does not answer is tried again, or ends with its lease.
    pub(crate) async fn keep(self: Arc<Self>) -> Result<()> {
        loop {
            self.part.raise();
            self.release_dropped().await;
            self.renew_when_due().await;
            let renew_at = self.lock().renew_at;
            self.part.set_due(renew_at);
            self.part.lower();
            let due = async {
                match renew_at {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.changed.notified() => {}
                () = due => {}
            }
        }
    }

    async fn renew_when_due(&self) {
        let _call = self.calls.lock().await;
        let held: Vec<_> = {
            let now = Instant::now();
            let mut state = self.lock();
            if state.renew_at.is_none_or(|due| due > now) {
                return;
            }
            let idle = state.held.is_empty();
            state.renew_at = (!idle).then(|| now + self.renew_after());
            let granted = state.held.iter().filter(|(_, hold)| hold.is_granted);
            granted.map(|(id, _)| id.clone()).collect()
        };
        if held.is_empty() {
            return;
        }
        let request = self.request(held);
        match self.window.store.claim(&request).await {
            Ok(claims) => self.tell_lost(&request.ids, &claims),
            // It is renewed again in time, and if the store stays away, nobody else can claim.
            Err(error) => {
                tracing::warn!(group = %self.group, error = %error, "claims of events could not be renewed");
            }
        }
    }

    fn tell_lost(&self, ids: &[EventId], claims: &[EventClaim]) {
        for (id, claim) in ids.iter().zip(claims) {
            if *claim != EventClaim::Granted && self.is_handling(id) {
                counter!(CLAIMS_LOST).increment(1);
                tracing::warn!(
                    group = %self.group, %id,
                    "the claim of an event was not renewed in time: another member handles it, too, or has done so"
                );
            }
        }
    }

    /// Whether a handler of the event runs here.
    fn is_handling(&self, id: &EventId) -> bool {
        let state = self.lock();
        state.held.get(id).is_some_and(|hold| !hold.is_marking)
    }

    /// Gives up what nobody handles any more.
    pub(crate) async fn release_dropped(&self) {
        let _call = self.calls.lock().await;
        let ids: Vec<_> = {
            let mut state = self.lock();
            let dropped = std::mem::take(&mut state.dropped);
            // With what is left of a call whose future was dropped.
            state.releasing.extend(dropped);
            state.releasing.iter().cloned().collect()
        };
        if ids.is_empty() {
            return;
        }
        let store = &self.window.store;
        if let Err(error) = store.release(&self.group, self.member, &ids).await {
            tracing::warn!(
                group = %self.group, error = %error,
                "claims of events could not be released: others have them when the lease is over"
            );
        }
        self.lock().releasing.clear();
    }
}

impl Claimed {
    fn grant(&self) {
        if let Some(hold) = self.claims.lock().held.get_mut(&self.id) {
            hold.is_granted = true;
        }
    }

    fn note_marking(&self) {
        if let Some(hold) = self.claims.lock().held.get_mut(&self.id) {
            hold.is_marking = true;
        }
    }

    /// Marks the event as handled, which ends the claim.
    pub(crate) async fn mark_handled(&self) -> Result<()> {
        self.note_marking();
        let window = &self.claims.window;
        let ids = std::slice::from_ref(&self.id);
        window
            .store
            .mark_handled(&self.claims.group, ids, window.length)
            .await?;
        self.end();
        Ok(())
    }

    /// Notes that the store knows of no claim of ours.
    fn end(&self) {
        self.claims.lock().forget(self);
    }
}

impl State {
    /// Forgets a claim; false when that was done before.
    fn forget(&mut self, claimed: &Claimed) -> bool {
        let hold = self.held.get(&claimed.id);
        let is_there = hold.is_some_and(|hold| hold.number == claimed.number);
        if is_there {
            self.held.remove(&claimed.id);
        }
        is_there
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        let mut state = self.claims.lock();
        if state.forget(self) {
            state.dropped.insert(self.id.clone());
            drop(state);
            self.claims.wake();
        }
    }
}

impl fmt::Debug for Claimed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Claimed").field(&self.id).finish()
    }
}
