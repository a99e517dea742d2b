//! When a relay looks, waits and ends.

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use metrics::gauge;
use tokio::time::{Instant, sleep_until};

use super::lanes::Lanes;
use super::parked::DueLook;
use super::pass::Pass;
use super::taken::Taken;
use super::{OUTBOX_AGE, OUTBOX_HELD_BACK, OUTBOX_MESSAGES, Relay};
use crate::activity::Part;
use crate::clock::Timestamp;
use crate::consumer::backoff::Backoff;
use crate::error::{Error, Result, error_chain};
use crate::key_state::KeyStateStore;
use crate::message::Group;
use crate::outbox::{OUTBOX_LANES, OutboxStore};

/// How long the batch under way may take when the relay is to end.
const GRACE: Duration = Duration::from_secs(5);
/// How often it is counted what waits, and, where much does, how much longer at least than counting took.
/// The first time a little later: who comes to a large backlog has more urgent things to do.
const DEPTH_FIRST: Duration = Duration::from_secs(1);
const DEPTH_INTERVAL: Duration = Duration::from_secs(5);
const DEPTH_SHARE: u32 = 100;
/// The longest time without a look, should no store or clock have told of something.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// A relay that runs.
pub(super) struct Runner {
    pub(super) relay: Relay,
    pub(super) lanes: Lanes,
    /// How often a message failed, by its lane and position, while others were taken.
    pub(super) attempts: HashMap<(u32, u64), u32>,
    pub(super) due: DueLook,
    pub(super) taken: Taken,
    backoff: Backoff,
    next_count: Instant,
    /// What was published elsewhere before is handled: this relay may publish.
    is_free: bool,
    part: Arc<Part>,
}

impl Runner {
    pub(super) fn new(relay: Relay) -> Self {
        Self {
            lanes: Lanes::new(&relay),
            attempts: HashMap::new(),
            due: DueLook::new(),
            taken: Taken::new(relay.batch),
            backoff: Backoff::new(),
            next_count: Instant::now() + DEPTH_FIRST,
            is_free: false,
            part: relay.bus.shared_activity().part(),
            relay,
        }
    }

    pub(super) async fn run_until(mut self, signal: impl Future<Output = ()>) -> Result<()> {
        let outbox = Arc::clone(&self.relay.outbox);
        let (held, name) = (Arc::clone(&self.relay.held), self.relay.name.clone());
        let mut hint = Hint::new(outbox.as_ref());
        let mut decided = Decided::new(held.as_ref(), &name);
        let mut stop = Stop {
            signal: pin!(signal),
            came: false,
        };
        let result = loop {
            self.part.raise();
            if decided.take() {
                self.due.changed();
            }
            let looked = tokio::select! {
                biased;
                never = hint.listen() => match never {},
                never = decided.listen() => match never {},
                looked = self.pass() => looked,
                () = stop.grace() => break Ok(()),
            };
            let next = match looked {
                Ok(next) => next,
                Err(error) if error.is_retryable() => Some(self.fail(&error)),
                Err(error) => break Err(error),
            };
            if stop.came {
                break Ok(());
            }
            decided.listen_from(&self.due);
            let goes_on = next.is_some_and(|next| next <= Instant::now())
                || (hint.take() && !self.backoff.is_running());
            if goes_on {
                continue;
            }
            self.part.set_due(next);
            self.part.lower();
            match self.rest(next, &mut hint, &mut decided, &mut stop).await {
                Ok(()) if stop.came => break Ok(()),
                Ok(()) => {}
                Err(error) => break Err(error),
            }
        };
        if let Err(error) = self.remove_taken().await {
            tracing::warn!(relay = %self.relay.name, error = %error, "what was published last is published again");
        }
        let name = self.relay.name.clone();
        if let Err(error) = self.lanes.leave().await {
            tracing::warn!(relay = %name, error = %error, "others get the lanes when their lease is over");
        }
        result
    }

    /// Waits until there may be something to do; while something is away, for time alone.
    async fn rest(
        &mut self,
        next: Option<Instant>,
        hint: &mut Hint<'_>,
        decided: &mut Decided<'_>,
        stop: &mut Stop<'_, impl Future<Output = ()>>,
    ) -> Result<()> {
        let is_away = self.backoff.is_running();
        let mut look = Instant::now() + LOOK_INTERVAL;
        if !is_away {
            look = look.min(self.next_count);
        }
        let look = next.map_or(look, |next| next.min(look));
        tokio::select! {
            biased;
            () = stop.signal() => Ok(()),
            changed = self.lanes.changed() => changed,
            () = hint.heard(), if !is_away => Ok(()),
            () = decided.heard(), if !is_away => Ok(()),
            () = sleep_until(look) => Ok(()),
        }
    }

    /// Does what there is to do once; returns when to do more: at once, or when something is due.
    async fn pass(&mut self) -> Result<Option<Instant>> {
        self.lanes.update()?;
        if self.lanes.are_leaving() || self.taken.is_due() {
            self.remove_taken().await?;
        }
        self.lanes.release();
        if self.lanes.claim().await? {
            self.due.changed();
        }
        self.relay.shared.lock().lanes = self.lanes.numbers();
        self.count().await?;
        if let Some(reason) = self.look_at_others().await? {
            self.relay.shared.lock().error = Some(reason);
            return Ok(Some(Instant::now() + self.backoff.next()));
        }
        let due = self.publish_due().await?;
        match self.publish_next().await? {
            Pass::Away => Ok(Some(Instant::now() + self.backoff.next())),
            Pass::Progress => {
                self.recover();
                Ok(Some(Instant::now()))
            }
            Pass::Idle => {
                self.recover();
                let due = due.map(|due| self.instant_of(due));
                Ok(due.into_iter().chain(self.taken.due()).min())
            }
        }
    }

    /// Why nothing may be published now: others publish elsewhere, or what they did is not handled.
    async fn look_at_others(&mut self) -> Result<Option<String>> {
        let others = self.lanes.elsewhere();
        if others > 0 {
            self.is_free = false;
            return Ok(Some(format!(
                "relays of this outbox publish to another target ({others} of them): it waits until they have ended"
            )));
        }
        // Without a lane it may not know yet who else there is.
        if self.is_free || self.lanes.numbers().is_empty() {
            return Ok(None);
        }
        if let Some(drain) = &self.relay.after {
            let report = drain.report().await?;
            if !report.is_drained() {
                return Ok(Some(format!("it waits for another broker: {report}")));
            }
            tracing::info!(relay = %self.relay.name, "the other broker is drained: the relay publishes");
        }
        self.is_free = true;
        Ok(None)
    }

    /// Counts what waits, from time to time.
    async fn count(&mut self) -> Result<()> {
        let begun = Instant::now();
        if begun < self.next_count {
            return Ok(());
        }
        let counted = self.relay.outbox.depth().await;
        let pause = DEPTH_INTERVAL.max(begun.elapsed() * DEPTH_SHARE);
        self.next_count = Instant::now() + pause;
        let depth = match counted {
            Ok(depth) => depth,
            // Whoever cannot count may still be able to publish.
            Err(error) if error.is_retryable() => {
                tracing::warn!(relay = %self.relay.name, error = %error, "it is not known how much waits");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let name = self.relay.name.to_string();
        for lane in 0..OUTBOX_LANES {
            let waiting = depth.lanes.iter().find(|(found, _)| *found == lane);
            let waiting = waiting.map_or(0, |(_, messages)| *messages);
            gauge!(OUTBOX_MESSAGES, "relay" => name.clone(), "lane" => lane.to_string())
                .set(waiting as f64);
        }
        let date = self.relay.bus.clock().now();
        let age = depth
            .oldest
            .map_or(Duration::ZERO, |oldest| date.since(oldest));
        gauge!(OUTBOX_AGE, "relay" => name.clone()).set(age.as_secs_f64());
        gauge!(OUTBOX_HELD_BACK, "relay" => name)
            .set(depth.held_back.unwrap_or_default().as_secs_f64());
        self.relay.shared.lock().depth = depth;
        Ok(())
    }

    /// Notes that a store is away; returns when to ask it again.
    fn fail(&mut self, error: &Error) -> Instant {
        tracing::warn!(relay = %self.relay.name, error = %error, "the relay goes on later");
        self.relay.shared.lock().error = Some(error_chain(error));
        Instant::now() + self.backoff.next()
    }

    fn recover(&mut self) {
        self.backoff.reset();
        self.relay.shared.lock().error = None;
    }

    /// The instant of a date to come.
    fn instant_of(&self, date: Timestamp) -> Instant {
        let wait = date.since(self.relay.bus.clock().now());
        Instant::now() + wait.min(LOOK_INTERVAL)
    }
}

/// Hears of what is appended, also while a pass runs, so that nothing is missed.
struct Hint<'a> {
    outbox: &'a dyn OutboxStore,
    appended: BoxFuture<'a, ()>,
    came: bool,
}

impl<'a> Hint<'a> {
    fn new(outbox: &'a dyn OutboxStore) -> Self {
        Self {
            outbox,
            appended: outbox.appended(),
            came: false,
        }
    }

    /// Notes what is appended, for as long as it is polled.
    async fn listen(&mut self) -> Infallible {
        loop {
            (&mut self.appended).await;
            self.appended = self.outbox.appended();
            self.came = true;
        }
    }

    /// Whether something was appended since this was asked last.
    fn take(&mut self) -> bool {
        std::mem::take(&mut self.came)
    }

    /// Waits until something is appended.
    async fn heard(&mut self) {
        (&mut self.appended).await;
        self.appended = self.outbox.appended();
    }
}

/// Hears of decisions of operators that came after the store of held keys was asked last.
struct Decided<'a> {
    held: &'a dyn KeyStateStore,
    name: &'a Group,
    /// None before the store was asked, and when one was heard of.
    decided: Option<BoxFuture<'a, ()>>,
    /// Which asking it counts from.
    asking: u64,
    came: bool,
}

impl<'a> Decided<'a> {
    fn new(held: &'a dyn KeyStateStore, name: &'a Group) -> Self {
        Self {
            held,
            name,
            decided: None,
            asking: 0,
            came: false,
        }
    }

    /// Counts from when the store was asked last.
    fn listen_from(&mut self, due: &DueLook) {
        if due.askings() != self.asking {
            self.asking = due.askings();
            self.decided = Some(self.held.decided(self.name, due.decisions()));
        }
    }

    /// Notes that something was decided, for as long as it is polled.
    async fn listen(&mut self) -> Infallible {
        self.decision().await;
        std::future::pending().await
    }

    /// Whether something was decided since this was asked last.
    fn take(&mut self) -> bool {
        std::mem::take(&mut self.came)
    }

    /// Waits until something is decided.
    async fn heard(&mut self) {
        if !self.came {
            self.decision().await;
        }
    }

    async fn decision(&mut self) {
        match &mut self.decided {
            Some(decided) => decided.await,
            None => std::future::pending().await,
        }
        self.decided = None;
        self.came = true;
    }
}

/// What ends a relay.
struct Stop<'a, S> {
    signal: Pin<&'a mut S>,
    came: bool,
}

impl<S: Future<Output = ()>> Stop<'_, S> {
    async fn signal(&mut self) {
        if !self.came {
            self.signal.as_mut().await;
            self.came = true;
        }
    }

    /// Resolves some time after the signal: by then a batch has to be over.
    async fn grace(&mut self) {
        self.signal().await;
        sleep_until(Instant::now() + GRACE).await;
    }
}
