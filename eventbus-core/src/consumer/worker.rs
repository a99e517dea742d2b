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
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};
use tower::Service;

use super::Runtime;
use super::dispatch::Request;
use super::gate::{Admission, Probed};
use super::held::{Held, HeldDelivery};
use super::keys::{Keep, Keys, NodeId, NodeState, Stage};
use super::run::{Ended, Ending, Outcome, Run};
use super::scope::{Routed, Scope, Skip};
use super::settler::SettleItem;
use super::slots::{Caught, SlotSet, panic_text};
use super::{OnPoison, telemetry::Tally};
use crate::activity::Part;
use crate::clock::Timestamp;
use crate::coalescer::{Coalescer, Mailbox};
use crate::dead_letter::{Cause, Diagnosis};
use crate::delivery::{Delivery, Lane, Receipt, Verdict};
use crate::error::{BoxError, Error, ErrorKind};
use crate::key_state::{HeldMessage, HeldName, HoldEntry, KeyAction, Wait};
use crate::retry::{NextAttempt, OnError, with_jitter};

/// What a worker is told.
#[derive(Debug)]
pub(crate) enum Item {
    Deliveries(Vec<Delivery>),
    /// From the store of held keys.
    Held(Box<HeldDelivery>),
    Revoke(Arc<Revocation>),
    Stop(Arc<Stop>),
    /// The gate changed: look again.
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

/// Lanes being taken away, until no worker runs a handler of theirs.
#[derive(Debug)]
pub(crate) struct Revocation {
    lanes: Vec<Lane>,
    /// Revoked lanes are finished and settled until then; lost ones are dropped at once.
    finish_until: Option<Instant>,
    workers: AtomicUsize,
    settler: Coalescer<SettleItem>,
}

impl Revocation {
    pub(crate) fn new(
        lanes: Vec<Lane>,
        finish_until: Option<Instant>,
        workers: usize,
        settler: Coalescer<SettleItem>,
    ) -> Arc<Self> {
        Arc::new(Self {
            lanes,
            finish_until,
            workers: AtomicUsize::new(workers),
            settler,
        })
    }

    fn has(&self, lane: Lane) -> bool {
        self.lanes.contains(&lane)
    }

    /// One worker has nothing of these lanes any more. The last one passes them on, behind all
    /// verdicts that the workers gave before.
    fn cleared(&self) {
        if self.workers.fetch_sub(1, Ordering::AcqRel) == 1 && self.finish_until.is_some() {
            self.settler.add(SettleItem::Release(self.lanes.clone()));
        }
    }
}

/// The end of a consumer.
#[derive(Debug)]
pub(crate) struct Stop {
    /// Runs may go on until then.
    pub(crate) deadline: Instant,
    /// Whether what has not been started is handled, too: at the end of a replay.
    pub(crate) finish: bool,
}

/// How long a run waits that found its lane claimed by somebody else.
const RECLAIM: Duration = Duration::from_millis(100);

/// How many runs a worker starts before it looks anew.
const STARTS_MAX: usize = 64;

/// How often a worker looks anew within one turn before it lets other tasks run.
const PASSES_MAX: usize = 16;

/// Runs handlers; one task.
pub(crate) struct Worker<V: Service<Request>> {
    runtime: Arc<Runtime>,
    /// Its number at the gate.
    number: usize,
    inbox: Arc<Inbox>,
    part: Arc<Part>,
    settler: Coalescer<SettleItem>,
    slots: SlotSet<V>,
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
    revocations: Vec<Arc<Revocation>>,
    stop: Option<Arc<Stop>>,
    /// Verdicts of this turn.
    settled: Vec<(Receipt, Verdict)>,
    tally: Tally,
    received: Vec<Item>,
    ended: Vec<(usize, Caught<Ended>)>,
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

impl<V> Worker<V>
where
    V: Service<Request, Response = ()> + Clone + Send + 'static,
    V::Error: Into<BoxError>,
    V::Future: Send,
{
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
            inbox,
            part,
            settler,
            slots: SlotSet::new(slots, service),
            running: (0..slots).map(|_| None).collect(),
            incoming: VecDeque::new(),
            place: None,
            keys: Keys::default(),
            timers: BinaryHeap::new(),
            pool: Vec::new(),
            revocations: Vec::new(),
            stop: None,
            settled: Vec::new(),
            received: Vec::new(),
            ended: Vec::new(),
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
            let mut progress = self.receive(cx, now);
            progress |= self.fire_timers(now);
            progress |= self.start_ready();
            progress |= self.slots.poll(&mut self.ended);
            self.conclude();
            self.check_stop(now);
            progress |= self.check_revocations(now);
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
        self.count_first_attempts();
        self.runtime.telemetry.add(&mut self.tally);
    }

    fn count_first_attempts(&mut self) {
        let (seen, failed) = self.tally.take_first_attempts();
        if seen > 0 {
            self.runtime.gate.count(seen, failed);
        }
    }

    // ---- receiving

    fn receive(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        let mut received = std::mem::take(&mut self.received);
        let progress = self.inbox.0.poll_take(cx, &mut received).is_ready();
        for item in received.drain(..) {
            match item {
                Item::Deliveries(deliveries) => self.accept(deliveries),
                Item::Held(held) => self.accept_held(*held),
                Item::Revoke(revocation) => self.begin_revocation(revocation),
                Item::Stop(stop) => self.begin_stop(stop, now),
                Item::Wake => {}
            }
        }
        self.received = received;
        progress
    }

    fn accept(&mut self, deliveries: Vec<Delivery>) {
        if self.stop.as_ref().is_some_and(|stop| !stop.finish) {
            // Never started: the next owner gets them.
            return;
        }
        self.place = None;
        match self.incoming.is_empty() {
            // As they are: a delivery is large to be moved one by one.
            true => self.incoming = deliveries.into(),
            false => self.incoming.extend(deliveries),
        }
        if self.runtime.has_groups() {
            // What is to be handled together is looked for in the queue.
            self.queue_incoming();
        }
    }

    /// Takes in the first message of a held name.
    fn accept_held(&mut self, item: HeldDelivery) {
        let HeldDelivery { delivery, held } = item;
        let lane = delivery.receipt.lane;
        let Some(partition) = self.runtime.lanes.partition(lane) else {
            return;
        };
        let is_leaving = self.revocations.iter().any(|leaving| leaving.has(lane));
        if self.stop.is_some() || is_leaving {
            // It stays in the store, for the next owner.
            return;
        }
        let key = self.runtime.key_hash(&delivery.message);
        let scope = self.held_scope(delivery, partition);
        let id = self.keys.push(scope, key);
        self.prepare_held(id, held);
    }

    fn held_scope(&mut self, delivery: Delivery, partition: u32) -> Arc<Scope> {
        let mut scope = Scope::new(Arc::clone(&self.runtime));
        scope.fill(Some(delivery), partition);
        Arc::new(scope)
    }

    /// Does with a held message what time or an operator has decided.
    fn prepare_held(&mut self, id: NodeId, held: Held) {
        let node = self.keys.get_mut(id);
        node.alone = true;
        node.failures = held.attempts;
        node.first_failed = held.first_failed;
        let cause = match &held.decision {
            None => None,
            Some(decision) => match decision.action {
                KeyAction::Retry => {
                    node.failures = 0;
                    node.first_failed = None;
                    None
                }
                KeyAction::Release => Some(Cause::Parked {
                    cause: held.cause.clone(),
                    error: held.error.clone(),
                }),
                KeyAction::Discard => Some(Cause::Discarded {
                    by: decision.by.clone(),
                    because: decision.because.clone(),
                }),
            },
        };
        node.stage = match cause {
            None => Stage::Handle,
            Some(cause) => Stage::DeadLetter(Arc::new(Diagnosis {
                cause,
                attempts: node.failures,
                first_failed: node.first_failed,
            })),
        };
        node.held = Some(Box::new(held));
    }

    /// Puts everything that has come into the queue.
    fn queue_incoming(&mut self) {
        while let Some(partition) = self.next_partition() {
            self.queue_next(partition);
        }
    }

    fn queue_next(&mut self, partition: u32) {
        let mut scope = self.take_scope();
        own(&mut scope).fill(self.incoming.pop_front(), partition);
        let key = self.runtime.key_hash(scope.message());
        self.keys.push(scope, key);
    }

    /// The partition of what has come next; none when there is nothing.
    #[inline]
    fn next_partition(&mut self) -> Option<u32> {
        while let Some(delivery) = self.incoming.front() {
            let lane = delivery.receipt.lane;
            // Looked up once for all that come in a row.
            let partition = match self.place {
                Some((known, partition)) if known == lane => partition,
                _ => {
                    let partition = self.runtime.lanes.partition(lane);
                    self.place = Some((lane, partition));
                    partition
                }
            };
            if partition.is_some() {
                return partition;
            }
            // What comes on a lane that is closed already is the next owner's.
            self.incoming.pop_front();
        }
        None
    }

    /// A scope to be filled.
    #[inline]
    fn take_scope(&mut self) -> Arc<Scope> {
        let spare = self.pool.pop();
        spare.unwrap_or_else(|| Arc::new(Scope::new(Arc::clone(&self.runtime))))
    }

    #[inline]
    fn recycle(&mut self, mut scope: Arc<Scope>) {
        // A context that outlived its handler keeps its scope; a new one is made for the next.
        match Arc::get_mut(&mut scope) {
            Some(inner) => {
                inner.clear();
                self.pool.push(scope);
            }
            // Also where the handler panicked or was dropped, and its run saw no end of it.
            None => scope.end(),
        }
    }

    // ---- starting

    fn fire_timers(&mut self, now: Instant) -> bool {
        let mut fired = false;
        while let Some(Reverse((due, id, sequence))) = self.timers.peek().copied()
            && due <= now
        {
            self.timers.pop();
            if self.keys.is_current(id, sequence) && self.keys.get(id).state == NodeState::Waiting {
                self.keys.push_ready(id);
                fired = true;
            }
        }
        fired
    }

    /// Starts what is ready: first what is in the queue, then what has just come.
    fn start_ready(&mut self) -> bool {
        let mut started = 0;
        self.held = false;
        self.probe_at = None;
        while started < STARTS_MAX && self.slots.has_room() {
            let step = match self.keys.pop_ready() {
                Some(id) => self.start_queued(id),
                None => self.start_incoming(),
            };
            match step {
                Step::Started => started += 1,
                Step::PassedOver => {}
                Step::Stopped => break,
            }
        }
        self.measure_ended_at_once();
        started > 0
    }

    fn start_queued(&mut self, mut id: NodeId) -> Step {
        if self.keys.get(id).state == NodeState::Dropped {
            let scope = self.keys.remove(id);
            self.recycle(scope);
            return Step::PassedOver;
        }
        if self.runtime.gate.holds_for_failures() {
            // Only a handler can show that handlers succeed again; dead letters wait till then.
            self.keys.push_ready_first(id);
            self.queue_incoming();
            let handler = self.keys.bring_handler_forward();
            let Some(handler) = handler.then(|| self.keys.pop_ready()).flatten() else {
                self.held = true;
                return Step::Stopped;
            };
            id = handler;
        }
        let probe = match self.runtime.gate.admit(self.number) {
            Admission::Yes => false,
            Admission::Probe => true,
            Admission::Wait(probe_at) => {
                self.keys.push_ready_first(id);
                self.held = true;
                self.probe_at = probe_at;
                return Step::Stopped;
            }
        };
        self.keys.get_mut(id).probe = probe;
        self.start_one(id);
        Step::Started
    }

    /// Starts what has come next, past the queue where nothing of its key is there.
    fn start_incoming(&mut self) -> Step {
        let Some(partition) = self.next_partition() else {
            return Step::Stopped;
        };
        if !self.runtime.gate.is_open() {
            self.queue_incoming();
            return Step::PassedOver;
        }
        if self.is_behind() {
            self.queue_next(partition);
            return Step::PassedOver;
        }
        self.start_next(partition);
        Step::Started
    }

    /// Whether anything is before what has come next: in the queue, or put aside.
    #[inline]
    fn is_behind(&self) -> bool {
        let Some(Delivery {
            message, receipt, ..
        }) = self.incoming.front()
        else {
            return false;
        };
        let held = self.runtime.held.as_ref();
        if held.is_some_and(|held| held.holds(receipt.lane, message.key.as_ref())) {
            return true;
        }
        // Mostly nothing is there, and no key has to be hashed.
        let key = || self.runtime.key_hash(message);
        !self.keys.is_empty() && key().is_some_and(|key| self.keys.has_key(key))
    }

    /// Starts what has come next. What is handled at once never gets into the queue.
    #[inline]
    fn start_next(&mut self, partition: u32) {
        let mut scope = self.take_scope();
        let inner = own(&mut scope);
        inner.fill(self.incoming.pop_front(), partition);
        if let Err(unhandled) = find_route(inner) {
            let id = self.queue_started(scope);
            return self.pass_over(id, unhandled);
        }
        let (slot, polled) = self.slots.start(Run::Handle(Arc::clone(&scope)));
        if let Poll::Ready(Ok(Ended::Done)) = polled {
            self.ended_at_once += 1;
            self.tally.handled(true);
            return self.settle_scope(scope);
        }
        let id = self.queue_started(scope);
        self.follow(Nodes::One(id), slot, polled, true);
    }

    /// Gives what was started a place in the queue.
    fn queue_started(&mut self, scope: Arc<Scope>) -> NodeId {
        let key = self.runtime.key_hash(scope.message());
        self.keys.insert(scope, key)
    }

    /// Those that ended at once share the time between them: reading the clock for each of them
    /// would cost more than most of them take.
    fn measure_ended_at_once(&mut self) {
        let count = std::mem::take(&mut self.ended_at_once);
        if count == 0 {
            return;
        }
        let spent = self.since_begun(Instant::now()).saturating_sub(self.turn);
        self.tally.ran(spent / count, count);
    }

    fn start_one(&mut self, id: NodeId) {
        if self.is_put_aside(id) {
            let node = self.keys.get_mut(id);
            let message = node.scope.message();
            if let (Stage::Handle, Some(key)) = (&node.stage, message.key.clone()) {
                let (message, position) = (message.clone(), node.scope.position());
                let entry = HoldEntry::new(HeldName::Key(key), message, position, Wait::nothing());
                node.stage = Stage::Keep(Arc::new(Keep::Hold(entry)));
                self.end_probe(id, Probed::Nothing);
            }
        }
        let node = self.keys.get_mut(id);
        if node.scope.route().is_none()
            && matches!(node.stage, Stage::Handle)
            && let Err(unhandled) = find_route(own(&mut node.scope))
        {
            return self.pass_over(id, unhandled);
        }
        let run = match std::mem::replace(&mut node.stage, Stage::Handle) {
            Stage::Handle => return self.start_handler(id),
            Stage::Publish(messages) => {
                node.stage = Stage::Publish(messages.clone());
                Run::Publish(Arc::clone(&node.scope), messages)
            }
            Stage::DeadLetter(cause) => {
                node.stage = Stage::DeadLetter(Arc::clone(&cause));
                Run::DeadLetter(Arc::clone(&node.scope), cause)
            }
            Stage::Keep(keep) => {
                node.stage = Stage::Keep(Arc::clone(&keep));
                Run::Keep(Arc::clone(&node.scope), keep)
            }
        };
        self.start_run(Nodes::One(id), run, false);
    }

    /// Whether a delivery from the broker waits behind held ones of its key.
    #[inline]
    fn is_put_aside(&self, id: NodeId) -> bool {
        let Some(held) = &self.runtime.held else {
            return false;
        };
        let node = self.keys.get(id);
        node.held.is_none() && held.holds(node.scope.lane(), node.scope.message().key.as_ref())
    }

    /// Deals with a delivery that no handler can handle.
    fn pass_over(&mut self, id: NodeId, unhandled: Unhandled) {
        self.end_probe(id, Probed::Nothing);
        match unhandled {
            Unhandled::Skip(skip) => {
                self.tally.skipped(skip);
                self.settle(id);
            }
            Unhandled::Poison(cause) => self.give_up(id, cause),
        }
    }

    fn start_handler(&mut self, id: NodeId) {
        let node = self.keys.get(id);
        let batch_max = match node.alone || node.probe {
            true => 1,
            false => self.runtime.batch_max(&node.scope),
        };
        if batch_max <= 1 && !self.runtime.is_batch(&node.scope) {
            self.begin_attempt(id);
            let scope = Arc::clone(&self.keys.get(id).scope);
            return self.start_run(Nodes::One(id), Run::Handle(scope), true);
        }
        let ids = self.gather(id, batch_max);
        for id in &ids {
            self.begin_attempt(*id);
        }
        let scopes = ids
            .iter()
            .map(|id| Arc::clone(&self.keys.get(*id).scope))
            .collect();
        self.start_run(Nodes::Group(ids), Run::Group(scopes), true);
    }

    fn begin_attempt(&mut self, id: NodeId) {
        let node = self.keys.get_mut(id);
        if Arc::strong_count(&node.scope) > 1 {
            node.scope = Arc::new(node.scope.renewed());
        }
        node.scope.begin_attempt(node.failures + 1);
    }

    /// Collects deliveries for one run: of the same key in their order, then other ready ones.
    fn gather(&mut self, first: NodeId, batch_max: usize) -> Vec<NodeId> {
        let mut ids = vec![first];
        let mut last = first;
        while ids.len() < batch_max {
            let successor = self
                .keys
                .successor(last)
                .filter(|id| self.keys.get(*id).state == NodeState::Behind);
            let candidate = match successor {
                Some(id) if self.may_join(id, first) => Some(id),
                _ => self
                    .keys
                    .peek_ready()
                    .filter(|id| self.keys.get(*id).state == NodeState::Ready)
                    .filter(|id| self.may_join(*id, first))
                    .inspect(|_| {
                        self.keys.pop_ready();
                    }),
            };
            let Some(id) = candidate else { break };
            // Its slot is set when the run starts; until then it only has to be out of the queues.
            self.keys.get_mut(id).state = NodeState::Running(usize::MAX);
            ids.push(id);
            last = id;
        }
        ids
    }

    fn may_join(&mut self, id: NodeId, first: NodeId) -> bool {
        if self.is_put_aside(id) {
            return false;
        }
        let node = self.keys.get_mut(id);
        if node.alone || !matches!(node.stage, Stage::Handle) || node.failures > 0 {
            return false;
        }
        if node.scope.route().is_none() {
            let Some(scope) = Arc::get_mut(&mut node.scope) else {
                return false;
            };
            if scope.delivery().handed_out.unwrap_or(0) > self.runtime.settings.hand_outs_max {
                return false;
            }
            let routed = catch_unwind(AssertUnwindSafe(|| scope.find_route()));
            if !matches!(routed, Ok(Routed::Handle)) {
                return false;
            }
        }
        let (scope, first) = (&self.keys.get(id).scope, &self.keys.get(first).scope);
        self.runtime.may_share_run(scope, first)
    }

    fn start_run(&mut self, nodes: Nodes, run: Run, is_handler: bool) {
        let (slot, polled) = self.slots.start(run);
        self.follow(nodes, slot, polled, is_handler);
    }

    /// Notes what runs in a slot, or concludes it when it has ended already.
    fn follow(&mut self, nodes: Nodes, slot: usize, polled: Poll<Caught<Ended>>, is_handler: bool) {
        for id in nodes.iter() {
            self.keys.get_mut(id).state = NodeState::Running(slot);
        }
        let running = Running {
            nodes,
            started: self.turn,
            is_handler,
        };
        match polled {
            Poll::Pending => self.running[slot] = Some(running),
            Poll::Ready(result) => {
                self.ended_at_once += u64::from(is_handler);
                self.conclude_run(running, result);
            }
        }
    }

    // ---- concluding

    fn conclude(&mut self) {
        if self.ended.is_empty() {
            return;
        }
        let now = self.since_begun(Instant::now());
        let mut ended = std::mem::take(&mut self.ended);
        for (slot, result) in ended.drain(..) {
            let Some(running) = self.running[slot].take() else {
                continue;
            };
            if running.is_handler {
                self.tally.ran(now.saturating_sub(running.started), 1);
            }
            self.conclude_run(running, result);
        }
        self.ended = ended;
    }

    fn conclude_run(&mut self, running: Running, result: Caught<Ended>) {
        match result {
            Ok(Ended::Done) => running.nodes.iter().for_each(|id| self.done(id)),
            Ok(Ended::Otherwise(ending)) => match (running.nodes, *ending) {
                (Nodes::One(id), Ending::One(outcome)) => self.conclude_one(id, outcome),
                (Nodes::Group(ids), Ending::Each(outcomes)) => self.conclude_each(&ids, outcomes),
                (nodes, _) => self.split(&nodes),
            },
            Err(panic) => {
                let text = panic_text(panic.as_ref()).to_owned();
                self.fail_run(running, || Cause::Panic(text.clone()));
            }
        }
    }

    /// Concludes a group. What stands behind a delivery of its key that is not done waits: it is
    /// handled once more if that one was not handled, because what came of it then is not kept.
    fn conclude_each(&mut self, ids: &[NodeId], outcomes: Vec<Outcome>) {
        let mut undone: Vec<NodeId> = Vec::new();
        for (id, outcome) in ids.iter().copied().zip(outcomes) {
            let older = undone
                .iter()
                .copied()
                .find(|older| self.keys.successor(*older) == Some(id));
            if let Some(older) = older {
                if matches!(self.keys.get(older).stage, Stage::Publish(_))
                    && let Outcome::Unsent(messages) = outcome
                {
                    self.keys.get_mut(id).stage = Stage::Publish(messages);
                }
                self.put_behind(id);
                undone.push(id);
                continue;
            }
            let sequence = self.keys.get(id).sequence;
            self.conclude_one(id, outcome);
            if self.keys.is_current(id, sequence) {
                undone.push(id);
            }
        }
    }

    /// Repeats the deliveries of a failed group one at a time; no attempt is counted.
    fn split(&mut self, nodes: &Nodes) {
        for id in nodes.iter() {
            self.keys.get_mut(id).alone = true;
        }
        self.unstart(nodes);
    }

    /// Puts back what was started: to the next owner where it is leaving, else to be started again,
    /// each behind the older ones of its key.
    fn unstart(&mut self, nodes: &Nodes) {
        let ids: Vec<_> = nodes.iter().collect();
        // From the last to the first, so that the first is first again.
        for id in ids.iter().copied().rev() {
            let is_behind = ids
                .iter()
                .any(|older| self.keys.successor(*older) == Some(id));
            match (is_behind, self.is_leaving(id)) {
                (true, _) => self.put_behind(id),
                (false, true) => self.drop_node(id),
                (false, false) => self.keys.push_ready_first(id),
            }
        }
    }

    /// Puts a delivery that was started together with an older one of its key behind that one again.
    fn put_behind(&mut self, id: NodeId) {
        if self.is_leaving(id) {
            self.forget(id);
            self.keys.get_mut(id).state = NodeState::Dropped;
        } else {
            self.keys.get_mut(id).state = NodeState::Behind;
        }
    }

    fn fail_run(&mut self, running: Running, cause: impl Fn() -> Cause) {
        match running.nodes {
            Nodes::Group(ids) if ids.len() > 1 => self.split(&Nodes::Group(ids)),
            nodes => {
                for id in nodes.iter() {
                    let outcome = match running.is_handler {
                        true => Outcome::Failed(cause()),
                        false => Outcome::Unavailable(cause().to_string().into()),
                    };
                    self.conclude_one(id, outcome);
                }
            }
        }
    }

    fn conclude_one(&mut self, id: NodeId, outcome: Outcome) {
        match outcome {
            Outcome::Done => self.done(id),
            Outcome::Settled => {
                self.handled(id);
                if self.keys.get(id).held.is_some() {
                    return self.settle(id);
                }
                let scope = self.remove(id);
                let receipt = scope.delivery().receipt;
                self.runtime.lanes.settled(&[(receipt, Verdict::Done)]);
                self.recycle(scope);
            }
            Outcome::Duplicate => {
                self.tally.duplicates += 1;
                self.end_probe(id, Probed::Reached);
                self.settle(id);
            }
            Outcome::DeadLettered => {
                self.tally.dead_lettered += 1;
                self.end_probe(id, Probed::Reached);
                self.settle(id);
            }
            Outcome::Failed(cause) => self.failed(id, cause),
            Outcome::Kept(first) => self.kept(id, first),
            Outcome::Fenced => self.again_after(id, RECLAIM),
            Outcome::Full(error) => {
                self.block(id, &error);
            }
            Outcome::Unavailable(error) => {
                self.hold(id, || crate::error::error_chain(error.as_ref()));
            }
            Outcome::Unpublished(messages, error) => {
                self.keys.get_mut(id).stage = Stage::Publish(messages);
                self.hold(id, || error.to_string());
            }
            Outcome::Unsent(messages) => {
                self.keys.get_mut(id).stage = Stage::Publish(messages);
                self.again(id);
            }
        }
    }

    #[inline]
    fn done(&mut self, id: NodeId) {
        self.handled(id);
        self.settle(id);
    }

    #[inline]
    fn handled(&mut self, id: NodeId) {
        self.tally.handled(self.keys.get(id).failures == 0);
        self.end_probe(id, Probed::Handled);
    }

    /// Something is away: the delivery goes back as it was, and the gate holds.
    fn hold(&mut self, id: NodeId, reason: impl FnOnce() -> String) {
        self.runtime.gate.hold(reason);
        self.end_probe(id, Probed::Away);
        self.again(id);
    }

    fn failed(&mut self, id: NodeId, cause: Cause) {
        let first_attempt = self.keys.get(id).failures == 0;
        self.keys.get_mut(id).stage = Stage::Handle;
        if let Cause::Undecodable(_) = cause {
            self.end_probe(id, Probed::Nothing);
            return self.give_up(id, cause);
        }
        let decision = match &cause {
            Cause::Error(error) => self.runtime.settings.retry.classify(error.as_ref()),
            _ => OnError::Next,
        };
        // A message that its policy rejects says nothing against the consumer.
        let rejected = decision == OnError::DeadLetter;
        self.end_probe(
            id,
            match rejected {
                true => Probed::Handled,
                false => Probed::HandlerFailed,
            },
        );
        if first_attempt && !rejected && self.runtime.gate.is_open() {
            // At once and not with the next flush: the attempt that makes it hold is the last.
            self.tally.first_failed();
            self.count_first_attempts();
        }
        if !rejected && self.runtime.gate.is_held() {
            // While the consumer holds, no attempt is counted.
            return self.again(id);
        }
        self.tally.failed_attempts += 1;
        let random = self.random();
        let now = self.runtime.bus.clock().now();
        let node = self.keys.get_mut(id);
        node.failures += 1;
        node.first_failed.get_or_insert(now);
        tracing::debug!(
            topic = node.scope.message().topic.as_str(),
            attempt = node.failures,
            cause = %cause,
            "attempt failed"
        );
        let attempt = node.failures;
        match self.runtime.settings.retry.next(attempt, decision, random) {
            Some(NextAttempt::InPlace(delay)) => self.again_after(id, delay),
            Some(NextAttempt::Delayed(delay)) => self.delay(id, delay, &cause),
            None => self.give_up(id, cause),
        }
    }

    /// Puts a delivery aside until its next attempt.
    fn delay(&mut self, id: NodeId, delay: Duration, cause: &Cause) {
        let is_held = self.keys.get(id).held.is_some();
        if self.runtime.settings.retry.is_out_of_order() && !is_held && !self.is_leaving(id) {
            self.keys.detach(id);
        } else if self.runtime.held.is_some() {
            let until = self.runtime.bus.clock().now().plus(delay);
            return self.put_aside(id, Some(until), cause);
        }
        self.again_after(id, delay);
    }

    /// Puts a delivery aside, with its key, until a time or until an operator decides.
    fn put_aside(&mut self, id: NodeId, until: Option<Timestamp>, cause: &Cause) {
        if self.is_leaving(id) {
            return self.drop_node(id);
        }
        let node = self.keys.get_mut(id);
        let wait = Wait {
            until,
            attempts: node.failures,
            first_failed: node.first_failed,
            cause: cause.name().to_owned(),
            error: cause.to_string(),
        };
        let keep = match &node.held {
            Some(held) => Keep::Wait {
                name: held.name.clone(),
                wait,
                carried_out: held.decision.is_some(),
            },
            None => {
                let message = node.scope.message().clone();
                let name = match &message.key {
                    Some(key) => HeldName::Key(key.clone()),
                    None => HeldName::Message(node.scope.id().clone()),
                };
                Keep::Hold(HoldEntry::new(name, message, node.scope.position(), wait))
            }
        };
        node.stage = Stage::Keep(Arc::new(keep));
        self.keys.push_ready_first(id);
    }

    /// The store of held keys has done what it was to do.
    fn kept(&mut self, id: NodeId, first: Option<HeldMessage>) {
        let node = self.keys.get_mut(id);
        let lane = node.scope.lane();
        let stage = std::mem::replace(&mut node.stage, Stage::Handle);
        let (Stage::Keep(keep), Some(held)) = (stage, &self.runtime.held) else {
            return self.again(id);
        };
        match (&*keep, first) {
            (Keep::Hold(entry), _) => {
                held.rest(lane, &entry.name);
                self.tally.held += 1;
                if entry.wait.is_parked() {
                    log_parked(&self.keys.get(id).scope, &entry.wait);
                }
                self.settle(id);
            }
            (Keep::Wait { name, wait, .. }, _) => {
                held.rest(lane, name);
                if wait.is_parked() {
                    log_parked(&self.keys.get(id).scope, wait);
                }
                self.drop_settled(id);
            }
            (Keep::Advance { name, .. }, None) => {
                held.free(lane, name);
                self.drop_settled(id);
            }
            (Keep::Advance { name, .. }, Some(first)) => {
                let next = HeldDelivery::new(lane, name.clone(), first);
                self.go_on_with(id, next);
            }
        }
    }

    /// Goes on with the next message of a held name, in the place of the one before.
    fn go_on_with(&mut self, id: NodeId, next: HeldDelivery) {
        let HeldDelivery { delivery, mut held } = next;
        let partition = self.keys.get(id).scope.partition();
        let scope = self.held_scope(delivery, partition);
        let node = self.keys.get_mut(id);
        let done = std::mem::replace(&mut node.scope, scope);
        let decision = node.held.take().and_then(|held| held.decision);
        // What was to be discarded is so to its end; the other decisions were about the first.
        held.decision = decision.filter(|decision| decision.action == KeyAction::Discard);
        self.recycle(done);
        self.prepare_held(id, held);
        self.again(id);
    }

    /// No attempt is left: dead letter, block, or the end of a replay.
    fn give_up(&mut self, id: NodeId, cause: Cause) {
        if self.is_leaving(id) {
            return self.drop_node(id);
        }
        if self.runtime.replay.is_some() {
            let scope = &self.keys.get(id).scope;
            self.runtime.fail_replay(scope, &cause);
            // It holds its key until the replay has ended: nothing behind it is handled.
            self.keys.get_mut(id).state = NodeState::Waiting;
            return;
        }
        let has_key = self.keys.get(id).scope.message().key.is_some();
        let on_poison = match self.runtime.on_poison {
            OnPoison::ParkKey if !has_key => OnPoison::SkipKey,
            on_poison => on_poison,
        };
        match on_poison {
            OnPoison::ParkKey => self.put_aside(id, None, &cause),
            OnPoison::SkipKey => {
                let node = self.keys.get_mut(id);
                node.stage = Stage::DeadLetter(Arc::new(Diagnosis {
                    cause,
                    attempts: node.failures,
                    first_failed: node.first_failed,
                }));
                self.keys.push_ready_first(id);
            }
            OnPoison::BlockKey => self.block(id, &cause),
        }
    }

    /// Lets a delivery hold its key on the broker, and tries again at the longest time there is.
    fn block(&mut self, id: NodeId, cause: &dyn std::fmt::Display) {
        let node = self.keys.get_mut(id);
        if !std::mem::replace(&mut node.blocked, true) {
            self.tally.blocked += 1;
            tracing::error!(
                topic = node.scope.message().topic.as_str(),
                partition = node.scope.partition(),
                key = node.scope.message().key.as_ref().map(tracing::field::display),
                cause = %cause,
                "key blocked"
            );
        }
        let longest = self.runtime.settings.retry.longest();
        let random = self.random();
        self.again_after(id, with_jitter(longest.max(Duration::from_secs(1)), random));
    }

    fn again(&mut self, id: NodeId) {
        match self.is_leaving(id) {
            true => self.drop_node(id),
            false => self.keys.push_ready(id),
        }
    }

    fn again_after(&mut self, id: NodeId, delay: Duration) {
        if self.is_leaving(id) {
            return self.drop_node(id);
        }
        if delay.is_zero() {
            return self.keys.push_ready(id);
        }
        let node = self.keys.get_mut(id);
        node.state = NodeState::Waiting;
        let sequence = node.sequence;
        self.timers
            .push(Reverse((Instant::now() + delay, id, sequence)));
    }

    #[inline]
    fn end_probe(&mut self, id: NodeId, probed: Probed) {
        if std::mem::take(&mut self.keys.get_mut(id).probe) {
            self.runtime.gate.probed(probed);
        }
    }

    fn settle(&mut self, id: NodeId) {
        if self.keys.get(id).held.is_some() {
            return self.advance(id);
        }
        let scope = self.remove(id);
        self.settle_scope(scope);
    }

    /// Takes a held message that is done out of its store.
    #[cold]
    fn advance(&mut self, id: NodeId) {
        let node = self.keys.get_mut(id);
        let Some(held) = &node.held else { return };
        let (name, number) = (held.name.clone(), held.number);
        node.stage = Stage::Keep(Arc::new(Keep::Advance { name, number }));
        // At once, also where its lane is leaving: it is done, and the next owner is not to do it again.
        match self.slots.has_room() {
            true => self.start_one(id),
            false => self.keys.push_ready_first(id),
        }
    }

    #[inline]
    fn settle_scope(&mut self, scope: Arc<Scope>) {
        let receipt = scope.delivery().receipt;
        self.settled.push((receipt, Verdict::Done));
        self.recycle(scope);
    }

    fn drop_settled(&mut self, id: NodeId) {
        let scope = self.remove(id);
        self.recycle(scope);
    }

    /// Takes out of the queue what is done.
    fn remove(&mut self, id: NodeId) -> Arc<Scope> {
        if self.keys.get(id).blocked {
            self.tally.blocked -= 1;
        }
        self.keys.remove(id)
    }

    // ---- lanes and the end

    fn is_leaving(&self, id: NodeId) -> bool {
        if self.stop.as_ref().is_some_and(|stop| !stop.finish) {
            return true;
        }
        let lane = self.keys.get(id).scope.lane();
        self.revocations
            .iter()
            .any(|revocation| revocation.lanes.contains(&lane))
    }

    /// Leaves a delivery to the next owner.
    fn drop_node(&mut self, id: NodeId) {
        self.forget(id);
        let state = self.keys.get(id).state;
        // Behind and ready ones are passed over where they stand; others have to stand somewhere.
        if matches!(state, NodeState::Waiting | NodeState::Running(_)) {
            self.keys.push_ready_first(id);
        }
        self.keys.get_mut(id).state = NodeState::Dropped;
    }

    /// Undoes what a delivery that leaves has said of itself.
    fn forget(&mut self, id: NodeId) {
        self.end_probe(id, Probed::Nothing);
        if std::mem::take(&mut self.keys.get_mut(id).blocked) {
            self.tally.blocked -= 1;
        }
    }

    fn begin_revocation(&mut self, revocation: Arc<Revocation>) {
        self.place = None;
        self.incoming
            .retain(|delivery| !revocation.lanes.contains(&delivery.receipt.lane));
        let of_lanes: Vec<_> = self
            .keys
            .ids()
            .filter(|id| revocation.lanes.contains(&self.keys.get(*id).scope.lane()))
            .collect();
        for id in of_lanes {
            if !matches!(
                self.keys.get(id).state,
                NodeState::Running(_) | NodeState::Dropped
            ) {
                self.drop_node(id);
            }
        }
        self.revocations.push(Arc::clone(&revocation));
        if revocation.finish_until.is_none() {
            self.cancel_runs(&revocation.lanes);
            self.settled
                .retain(|(receipt, _)| !revocation.lanes.contains(&receipt.lane));
        }
    }

    /// Forgets what was left to the next owner: while nothing may be started, or an older delivery
    /// of a key waits, lanes that come and go would leave more and more.
    fn sweep(&mut self) {
        for scope in self.keys.sweep() {
            self.recycle(scope);
        }
        let keys = &self.keys;
        self.timers
            .retain(|Reverse((_, id, sequence))| keys.is_current(*id, *sequence));
    }

    /// Passes on the lanes that nothing runs on any more; says whether handlers had to be dropped.
    fn check_revocations(&mut self, now: Instant) -> bool {
        let mut dropped = false;
        let mut index = 0;
        // Each stays in the list until it is done: what shares a run with it may be leaving, too.
        while let Some(revocation) = self.revocations.get(index).map(Arc::clone) {
            if revocation.finish_until.is_some_and(|until| until <= now) {
                dropped |= self.cancel_runs(&revocation.lanes);
            }
            if self.runs_any(&revocation.lanes) {
                index += 1;
                continue;
            }
            // Verdicts first, so that they stand before the release.
            self.flush();
            self.sweep();
            self.revocations.remove(index);
            revocation.cleared();
        }
        dropped
    }

    fn runs_any(&self, lanes: &[Lane]) -> bool {
        self.running.iter().flatten().any(|running| {
            running
                .nodes
                .iter()
                .any(|id| lanes.contains(&self.keys.get(id).scope.lane()))
        })
    }

    /// Drops the handlers of these lanes; a group that holds others, too, is repeated for those.
    fn cancel_runs(&mut self, lanes: &[Lane]) -> bool {
        let mut cancelled = false;
        for slot in 0..self.running.len() {
            let Some(running) = &self.running[slot] else {
                continue;
            };
            let of_lanes = |id: NodeId| lanes.contains(&self.keys.get(id).scope.lane());
            if !running.nodes.iter().any(of_lanes) {
                continue;
            }
            if let Some(running) = self.running[slot].take() {
                cancelled = true;
                self.slots.cancel(slot);
                self.unstart(&running.nodes);
            }
        }
        cancelled
    }

    fn begin_stop(&mut self, stop: Arc<Stop>, now: Instant) {
        if !stop.finish {
            self.incoming.clear();
            let idle: Vec<_> = self
                .keys
                .ids()
                .filter(|id| {
                    !matches!(
                        self.keys.get(*id).state,
                        NodeState::Running(_) | NodeState::Dropped
                    )
                })
                .collect();
            for id in idle {
                self.drop_node(id);
            }
        }
        self.stop = Some(stop);
        self.check_stop(now);
    }

    fn check_stop(&mut self, now: Instant) {
        if self.stop.as_ref().is_none_or(|stop| stop.deadline > now) {
            return;
        }
        self.incoming.clear();
        for slot in 0..self.running.len() {
            if let Some(running) = self.running[slot].take() {
                self.slots.cancel(slot);
                self.unstart(&running.nodes);
            }
        }
        let left: Vec<_> = self.keys.ids().collect();
        for id in left {
            if self.keys.get(id).state != NodeState::Dropped {
                self.drop_node(id);
            }
        }
        while let Some(id) = self.keys.pop_ready() {
            let scope = self.keys.remove(id);
            self.recycle(scope);
        }
    }

    fn is_finished(&self) -> bool {
        self.stop.is_some() && self.keys.is_empty() && self.incoming.is_empty()
    }

    // ---- time

    /// When time alone gives this worker something to do, apart from deadlines.
    fn next_due(&self) -> Option<Instant> {
        let timer = self.timers.peek().map(|Reverse((due, ..))| *due);
        timer.into_iter().chain(self.probe_at).min()
    }

    fn set_alarm(&mut self, cx: &mut Context<'_>) {
        let revocation = self
            .revocations
            .iter()
            .filter_map(|revocation| revocation.finish_until)
            .min();
        let stop = self.stop.as_ref().map(|stop| stop.deadline);
        let wanted = self
            .next_due()
            .into_iter()
            .chain(self.tick_at)
            .chain(revocation)
            .chain(stop)
            .min();
        let Some(wanted) = wanted else { return };
        let armed = self
            .alarm_at
            .is_some_and(|at| at <= wanted && !self.alarm.is_elapsed());
        if !armed {
            self.alarm.as_mut().reset(wanted);
            self.alarm_at = Some(wanted);
        }
        if self.alarm.as_mut().poll(cx).is_ready() {
            self.alarm_at = None;
            cx.waker().wake_by_ref();
        }
    }

    /// Drops runs over their deadline, says whether there were any, and notes when to look again:
    /// one coarse tick, not a timer a message.
    fn expire_runs(&mut self, now: Instant) -> bool {
        self.tick_at = None;
        if self.slots.is_idle() {
            return false;
        }
        let deadline = self.runtime.settings.deadline;
        let mut oldest = now;
        let mut expired = false;
        for slot in 0..self.running.len() {
            let Some(running) = &self.running[slot] else {
                continue;
            };
            let started = self.begun + Duration::from_nanos(running.started);
            if started + deadline > now {
                oldest = oldest.min(started);
                continue;
            }
            if let Some(running) = self.running[slot].take() {
                expired = true;
                self.slots.cancel(slot);
                self.expire(running);
            }
        }
        let tick = (deadline / 8).clamp(Duration::from_millis(10), Duration::from_secs(1));
        let next = (oldest + deadline).min(now + tick);
        self.tick_at = Some(next.max(now + Duration::from_millis(1)));
        expired
    }

    /// What follows when a run is over its deadline: its handler failed, or what it waits for is away.
    fn expire(&mut self, running: Running) {
        let deadline = self.runtime.settings.deadline;
        let awaits_others = running
            .nodes
            .iter()
            .any(|id| self.keys.get(id).scope.awaits_others());
        if running.is_handler && !awaits_others {
            return self.fail_run(running, || Cause::Deadline(deadline));
        }
        let late = || {
            let late = format!("neither broker nor unit of work answered within {deadline:?}");
            Outcome::Unavailable(late.into())
        };
        match running.nodes {
            Nodes::One(id) => self.conclude_one(id, late()),
            Nodes::Group(ids) => {
                let outcomes = ids.iter().map(|_| late()).collect();
                self.conclude_each(&ids, outcomes);
            }
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

fn log_parked(scope: &Scope, wait: &Wait) {
    tracing::error!(
        topic = scope.message().topic.as_str(),
        partition = scope.partition(),
        key = scope.message().key.as_ref().map(tracing::field::display),
        cause = wait.error,
        "key parked"
    );
}

/// What starting the next delivery came to.
enum Step {
    Started,
    /// It was queued, skipped or dropped: the next one may be started.
    PassedOver,
    /// Nothing may be started now, or nothing is there.
    Stopped,
}

/// Why no handler gets a delivery.
enum Unhandled {
    Skip(Skip),
    Poison(Cause),
}

/// The scope of a delivery that was never started.
#[inline]
fn own(scope: &mut Arc<Scope>) -> &mut Scope {
    Arc::get_mut(scope).expect("before a delivery is started its scope is nobody else's")
}

/// Finds the handler of a delivery that was never started.
#[inline(always)]
fn find_route(scope: &mut Scope) -> Result<(), Unhandled> {
    let routed = catch_unwind(AssertUnwindSafe(|| scope.find_route())).unwrap_or_else(|panic| {
        let panic = panic_text(panic.as_ref());
        let error = Error::new(ErrorKind::Internal, "read message", "the format panicked");
        Routed::Undecodable(error.with("panic", panic))
    });
    let handed_out = scope.delivery().handed_out.unwrap_or(0);
    Err(match routed {
        Routed::Handle if handed_out <= scope.runtime().settings.hand_outs_max => return Ok(()),
        Routed::Handle => Unhandled::Poison(Cause::HandOuts(handed_out)),
        Routed::Skip(skip) => Unhandled::Skip(skip),
        Routed::NoHandler(event_type) => Unhandled::Poison(Cause::NoHandler(event_type)),
        Routed::Undecodable(error) => Unhandled::Poison(Cause::Undecodable(error)),
    })
}
