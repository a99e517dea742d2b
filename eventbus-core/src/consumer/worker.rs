//! One worker: starts runs in key order, decides what follows from their outcome, and passes
//! verdicts to the settler.
//!
//! ```text
//!  inbox ─▶ queue by key ─▶ slot: run ─▶ done ───────────────────────────▶ settler
//!              ▲   ▲                 ├─▶ failed: ready again, or after a time ─┘ (holds its key)
//!              │   └── timers ◀──────┤
//!              └────── held ◀────────┼─▶ something is away: the gate holds, nothing is counted
//!                                    └─▶ last attempt failed ─▶ run: store dead letter ─▶ settler
//! ```

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use super::Runtime;
use super::departure::Departure;
use super::dispatch::Layers;
use super::held::HeldDelivery;
use super::keys::{Keys, NodeId};
use super::run::Ended;
use super::scope::Scope;
use super::settler::SettleItem;
use super::slots::{Caught, SlotSet};
use super::telemetry::Tally;
use crate::activity::Part;
use crate::coalescer::{Coalescer, Mailbox};
use crate::delivery::{Delivery, Lane, Receipt};

mod aside;
mod concluding;
mod deadlines;
mod leaving;
mod receiving;
mod starting;

/// What a worker is told.
#[derive(Debug)]
pub(crate) enum Item {
    Deliveries(Vec<Delivery>),
    /// From the store of held keys.
    Held(Box<HeldDelivery>),
    Leave(Arc<Departure>),
    /// No delivery comes after it: end when everything is done.
    Stop,
    /// The gate changed, or how much of what leaves is handled: look again.
    Wake,
}

/// Where a worker is told things.
#[derive(Debug)]
pub(crate) struct Inbox(Mailbox<Item>);

impl Inbox {
    pub(crate) fn new(part: Arc<Part>) -> Self {
        Self(Mailbox::new(Some(part)))
    }

    pub(crate) fn push(&self, item: Item) {
        self.0.put(|there| there.push(item));
    }

    /// Lets the worker look again; what it has not heard yet is not said twice.
    pub(crate) fn wake(&self) {
        self.0.put(|there| {
            if !matches!(there.last(), Some(Item::Wake)) {
                there.push(Item::Wake);
            }
        });
    }
}

/// An inbox while its worker lives. What comes later is dropped, so that no departure waits for a
/// worker that has ended.
struct OpenInbox(Arc<Inbox>);

impl OpenInbox {
    fn poll_take(&self, cx: &mut Context<'_>, into: &mut Vec<Item>) -> Poll<()> {
        self.0.0.poll_take(cx, into)
    }
}

impl Drop for OpenInbox {
    fn drop(&mut self) {
        self.0.0.close();
    }
}

/// How often a worker looks anew within one turn before it lets other tasks run.
const PASSES_MAX: usize = 16;

/// Runs handlers; one task.
pub(crate) struct Worker<V: Layers> {
    runtime: Arc<Runtime>,
    /// Its number at the gate.
    number: usize,
    part: Arc<Part>,
    settler: Coalescer<SettleItem>,
    /// Before all that holds departures: when lanes are passed on, their handlers are gone.
    slots: SlotSet<V>,
    inbox: OpenInbox,
    /// What runs in each slot.
    running: Vec<Option<Running>>,
    /// What has come and was not looked at yet, oldest first: behind everything in `keys`.
    incoming: VecDeque<Delivery>,
    /// The lane that was looked up last and its partition; none when it is closed.
    place: Option<(Lane, Option<u32>)>,
    keys: Keys,
    /// Retries by time.
    timers: BinaryHeap<Reverse<(Instant, NodeId, u64)>>,
    /// Scopes to be used again.
    pool: Vec<Arc<Scope>>,
    /// Lanes that leave, in the order in which all workers heard of it.
    departures: Vec<Arc<Departure>>,
    /// More of what leaves may have to be left than when it was looked at last.
    to_leave: bool,
    /// No delivery comes any more.
    stopping: bool,
    /// What was done in this turn.
    settled: Vec<Receipt>,
    tally: Tally,
    received: Vec<Item>,
    ended: Vec<(usize, Caught<Ended>)>,
    /// What has ended, while it is concluded.
    concluded: Vec<(Running, Caught<Ended>)>,
    alarm: Pin<Box<Sleep>>,
    /// When the alarm rings; later wishes do not move it.
    alarm_at: Option<Instant>,
    /// When to look for runs over their deadline; none while nothing runs.
    tick_at: Option<Instant>,
    /// When a held consumer may be probed.
    probe_at: Option<Instant>,
    /// Whether anything ready may not be started now.
    held: bool,
    random: u64,
    /// Handlers that ended when they were started, in this pass.
    ended_at_once: u64,
    begun: Instant,
    /// The present turn's time, in nanoseconds after `begun`.
    turn: u64,
}

struct Running {
    nodes: Nodes,
    /// Nanoseconds after `Worker::begun`: cheaper to compare than an instant.
    started: u64,
    /// The deadline of handlers applies.
    is_handler: bool,
}

enum Nodes {
    One(NodeId),
    Group(Vec<NodeId>),
}

impl Nodes {
    #[inline]
    fn iter(&self) -> impl Iterator<Item = NodeId> + '_ {
        match self {
            Self::One(id) => std::slice::from_ref(id).iter().copied(),
            Self::Group(ids) => ids.iter().copied(),
        }
    }
}

impl<V: Layers> Worker<V> {
    pub(crate) fn new(
        runtime: Arc<Runtime>,
        inbox: Arc<Inbox>,
        part: Arc<Part>,
        settler: Coalescer<SettleItem>,
        (number, slots): (usize, usize),
        service: &V,
    ) -> Self {
        let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), slots) | 1;
        Self {
            tally: Tally::default(),
            runtime,
            number,
            part,
            settler,
            slots: SlotSet::new(slots, service),
            inbox: OpenInbox(inbox),
            running: (0..slots).map(|_| None).collect(),
            incoming: VecDeque::new(),
            place: None,
            keys: Keys::default(),
            timers: BinaryHeap::new(),
            pool: Vec::new(),
            departures: Vec::new(),
            to_leave: false,
            stopping: false,
            settled: Vec::new(),
            received: Vec::new(),
            ended: Vec::new(),
            concluded: Vec::new(),
            alarm: Box::pin(tokio::time::sleep(Duration::ZERO)),
            alarm_at: None,
            tick_at: None,
            probe_at: None,
            held: false,
            random,
            ended_at_once: 0,
            begun: Instant::now(),
            turn: 0,
        }
    }

    /// Works until it is stopped and has nothing left.
    pub(crate) async fn run(mut self) {
        std::future::poll_fn(|cx| self.poll(cx)).await;
        self.part.set_due(None);
        self.part.lower();
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.part.raise();
        self.slots.register(cx);
        let mut passes = 0;
        loop {
            let now = Instant::now();
            self.turn = self.since_begun(now);
            let mut progress = self.receive(cx);
            progress |= self.fire_timers(now);
            if !self.departures.is_empty() {
                self.leave();
            }
            progress |= self.start_ready();
            progress |= self.slots.poll(&mut self.ended);
            self.conclude();
            progress |= !self.departures.is_empty() && self.check_departures(now);
            // Looked at last, once a turn: what a dropped run leaves is started in the next pass.
            if !progress && !self.expire_runs(now) {
                break;
            }
            passes += 1;
            if passes == PASSES_MAX {
                // Also a worker that never rests has deadlines.
                self.expire_runs(now);
                self.flush();
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        self.flush();
        if self.is_finished() {
            return Poll::Ready(());
        }
        self.set_alarm(cx);
        if self.slots.is_idle() && (self.held || !self.keys.has_ready()) {
            self.part.set_due(self.next_due());
            self.part.lower();
        }
        Poll::Pending
    }

    fn flush(&mut self) {
        if !self.settled.is_empty() {
            self.runtime.lanes.settled(&self.settled);
            let next = Vec::with_capacity(self.settled.len());
            let settled = std::mem::replace(&mut self.settled, next);
            self.settler.add(SettleItem::Settled(settled));
        }
        self.count_first_attempts(None);
        self.runtime.telemetry.add(&mut self.tally);
    }

    fn count_first_attempts(&mut self, last: Option<&dyn fmt::Display>) {
        let (seen, failed) = self.tally.take_first_attempts();
        if seen > 0 {
            self.runtime.gate.count(seen, failed, last);
        }
    }

    fn since_begun(&self, now: Instant) -> u64 {
        // Nanoseconds of centuries fit.
        now.saturating_duration_since(self.begun).as_nanos() as u64
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}
