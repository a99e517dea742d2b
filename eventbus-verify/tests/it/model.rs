//! A small bus that works as promised, with a seed: it publishes, relays, loses responses, is killed
//! and stopped, hands out again, keeps dead letters, loses old messages by retention, and tells all
//! of it. Order is kept per stream (a producer and a key), which is a partition of its own.

use std::collections::{BTreeMap, HashSet, VecDeque};

use eventbus_verify::{
    Bounds, Effect, Entry, Fault, Operation, Phase, Promises, Record, RunId, Sample, Stamp,
};
use fastrand::Rng;

pub(crate) const RUN: RunId = RunId(77);
pub(crate) const GROUPS: [u16; 2] = [1, 2];
const IN_FLIGHT_MAX: usize = 3;
const ATTEMPTS_MAX: u16 = 3;
const PUBLISHER: u32 = 1;
const HARNESS: u32 = 2;
/// Keys from this one on are published through the outbox.
const OUTBOX_FROM: u32 = 2;
const KEYS: u32 = 4;
const PRODUCERS: u16 = 2;

/// What happened, and what is in the tried system's table.
#[derive(Clone)]
pub(crate) struct Told {
    pub(crate) records: Vec<Record>,
    pub(crate) effects: Vec<Effect>,
}

pub(crate) fn promises() -> Promises {
    let bounds = Bounds::default()
        .with_in_flight_max(IN_FLIGHT_MAX as u64)
        .with_attempts_max(ATTEMPTS_MAX);
    Promises::to(GROUPS).with_bounds(bounds)
}

pub(crate) fn checksum(stamp: Stamp) -> u32 {
    stamp.key * 1000 + stamp.key_seq + 1
}

/// Runs the bus for so many steps, and to its end.
pub(crate) fn run(seed: u64, steps: usize) -> Told {
    let mut model = Model::new(seed);
    for _ in 0..steps {
        model.step();
    }
    model.finish();
    Told {
        records: model.records,
        effects: model.effects,
    }
}

struct Model {
    rng: Rng,
    now: u64,
    records: Vec<Record>,
    effects: Vec<Effect>,
    streams: Vec<Stream>,
    /// Committed and not relayed.
    outbox: VecDeque<Stamp>,
    /// Sent with an unknown outcome, and on its way.
    late: Vec<Stamp>,
    members: BTreeMap<u16, Member>,
    /// What stopped processes say when they go on.
    stopped: Vec<(u32, u32, Phase, Entry)>,
    processes: u32,
    transactions: u64,
    faults: u64,
}

struct Stream {
    producer: u16,
    key: u32,
    /// The number of the next message.
    next: u32,
    /// The last messages whose outcome is not ok.
    unsure: Vec<Stamp>,
    /// What the broker has, and whether the position was told with the ok.
    log: Vec<(Stamp, bool)>,
}

impl Stream {
    fn place(&self) -> u32 {
        u32::from(self.producer) * 100 + self.key
    }
}

/// The member of a group, in the process it has at present.
struct Member {
    process: u32,
    /// For each stream: what is settled, and what was handed out.
    lanes: Vec<(usize, usize)>,
    done: HashSet<Stamp>,
    letters: Vec<Stamp>,
}

impl Member {
    fn in_flight(&self) -> usize {
        self.lanes
            .iter()
            .map(|(settled, given)| given - settled)
            .sum()
    }
}

impl Model {
    fn new(seed: u64) -> Self {
        let streams = (0..PRODUCERS).flat_map(|producer| {
            (0..KEYS).map(move |key| Stream {
                producer,
                key,
                next: 0,
                unsure: Vec::new(),
                log: Vec::new(),
            })
        });
        let streams: Vec<Stream> = streams.collect();
        let member = |process| Member {
            process,
            lanes: vec![(0, 0); streams.len()],
            done: HashSet::new(),
            letters: Vec::new(),
        };
        Self {
            rng: Rng::with_seed(seed),
            now: 0,
            records: Vec::new(),
            effects: Vec::new(),
            members: GROUPS
                .iter()
                .map(|group| (*group, member(10 + u32::from(*group))))
                .collect(),
            streams,
            outbox: VecDeque::new(),
            late: Vec::new(),
            stopped: Vec::new(),
            processes: 20,
            transactions: 0,
            faults: 0,
        }
    }

    fn say(&mut self, process: u32, session: u32, phase: Phase, entry: Entry) {
        // Now and then two things happen at one time.
        self.now += self.rng.u64(0..3) * 1000;
        self.records
            .push(Record::new(self.now, process, session, phase, entry));
    }

    fn step(&mut self) {
        let group = GROUPS[self.rng.usize(0..GROUPS.len())];
        let stream = self.rng.usize(0..self.streams.len());
        match self.rng.u32(0..100) {
            0..30 => self.publish(stream),
            30..45 => self.append(),
            45..60 => self.relay(false),
            60..64 => self.arrive_late(),
            64..80 => self.hand_out(group, stream),
            80..94 => self.handle(group, stream, None),
            94..95 => self.retain(group, stream),
            95..96 => self.relay(true),
            96 => self.kill(group),
            97 => self.shut_down(group),
            98 => self.die_or_stop_within(group, stream),
            _ => self.go_on(),
        }
    }

    /// Publishes the next message of a stream, or one again that may not have been taken.
    fn publish(&mut self, at: usize) {
        if self.streams[at].key >= OUTBOX_FROM {
            return;
        }
        let again = self.rng.u32(0..4) == 0;
        let stream = &mut self.streams[at];
        let stamp = match stream.unsure.pop() {
            Some(stamp) if again => stamp,
            _ => {
                stream.next += 1;
                Stamp::new(stream.producer, stream.key, stream.next - 1)
            }
        };
        let session = u32::from(stamp.producer);
        let entry = Entry::of(Operation::Publish, stamp).with_checksum(checksum(stamp));
        let send = Entry::of(Operation::Send, stamp);
        self.say(PUBLISHER, session, Phase::Invoke, entry);
        self.say(PUBLISHER, session, Phase::Invoke, send);
        let outcome = match self.rng.u32(0..10) {
            0 => Phase::Fail,
            1..3 => Phase::Unknown,
            _ => Phase::Ok,
        };
        let mut told = entry;
        match outcome {
            Phase::Ok => {
                let position = self.take(at, stamp, true);
                told = entry.with_position(self.streams[at].place(), position);
            }
            Phase::Unknown => match self.rng.u32(0..3) {
                0 => drop(self.take(at, stamp, false)),
                1 => self.late.push(stamp),
                _ => {}
            },
            _ => {}
        }
        self.say(PUBLISHER, session, outcome, send);
        if outcome != Phase::Ok {
            self.streams[at].unsure.push(stamp);
        }
        // A publisher that is killed says nothing more; here only its session ends.
        if outcome != Phase::Unknown || self.rng.bool() {
            self.say(PUBLISHER, session, outcome, told);
        }
    }

    /// The broker takes a message.
    fn take(&mut self, at: usize, stamp: Stamp, is_told: bool) -> u64 {
        self.streams[at].log.push((stamp, is_told));
        self.streams[at].log.len() as u64 - 1
    }

    fn stream_of(&self, stamp: Stamp) -> usize {
        let is_it = |stream: &Stream| (stream.producer, stream.key) == (stamp.producer, stamp.key);
        self.streams.iter().position(is_it).unwrap()
    }

    fn append(&mut self) {
        self.transactions += 1;
        let transaction = self.transactions;
        let mut stamps = Vec::new();
        for _ in 0..self.rng.usize(1..4) {
            let producer = self.rng.u16(0..PRODUCERS);
            let stamp = Stamp::new(producer, self.rng.u32(OUTBOX_FROM..KEYS), 0);
            let at = self.stream_of(stamp);
            let stream = &mut self.streams[at];
            let stamp = Stamp::new(stamp.producer, stamp.key, stream.next);
            stream.next += 1;
            let entry = Entry::of(Operation::Append, stamp)
                .with_transaction(transaction)
                .with_checksum(checksum(stamp));
            self.say(PUBLISHER, 5, Phase::Invoke, entry);
            self.say(PUBLISHER, 5, Phase::Ok, entry);
            stamps.push(stamp);
        }
        let commit = Entry::new(Operation::Commit).with_transaction(transaction);
        if self.rng.u32(0..10) == 0 {
            return;
        }
        self.say(PUBLISHER, 5, Phase::Invoke, commit);
        let outcome = match self.rng.u32(0..6) {
            0 => Phase::Fail,
            1 => Phase::Unknown,
            _ => Phase::Ok,
        };
        if outcome == Phase::Ok || (outcome == Phase::Unknown && self.rng.bool()) {
            self.outbox.extend(stamps);
        }
        self.say(PUBLISHER, 5, outcome, commit);
    }

    /// Publishes the first of the outbox; a relay that dies does it again.
    fn relay(&mut self, dies: bool) {
        let Some(stamp) = self.outbox.front().copied() else {
            return;
        };
        let at = self.stream_of(stamp);
        self.take(at, stamp, false);
        match dies {
            true => self.fault(Fault::Kill),
            false => drop(self.outbox.pop_front()),
        }
    }

    fn arrive_late(&mut self) {
        if self.late.is_empty() {
            return;
        }
        let stamp = self.late.swap_remove(self.rng.usize(0..self.late.len()));
        let at = self.stream_of(stamp);
        self.take(at, stamp, false);
    }

    fn hand_out(&mut self, group: u16, at: usize) {
        let member = self.members.get_mut(&group).unwrap();
        let (_, given) = member.lanes[at];
        let stream = &self.streams[at];
        if member.in_flight() == IN_FLIGHT_MAX || given == stream.log.len() {
            return;
        }
        member.lanes[at].1 += 1;
        let (stamp, _) = stream.log[given];
        let entry = Entry::of(Operation::Deliver, stamp)
            .with_group(group)
            .with_checksum(checksum(stamp))
            .with_position(stream.place(), given as u64);
        let process = member.process;
        self.say(process, at as u32, Phase::Ok, entry);
    }

    /// Handles the first that was handed out of a stream; the process may die or stop at a step.
    fn handle(&mut self, group: u16, at: usize, ends_at: Option<u32>) {
        let member = &self.members[&group];
        let (process, (settled, given)) = (member.process, member.lanes[at]);
        if settled == given {
            return;
        }
        let (stamp, _) = self.streams[at].log[settled];
        let session = at as u32;
        let of = |operation| Entry::of(operation, stamp).with_group(group);
        let is_done = member.done.contains(&stamp);
        let ends = |step| ends_at == Some(step);
        if !is_done && is_poison(stamp) {
            for attempt in 1..=ATTEMPTS_MAX {
                let handle = of(Operation::Handle).with_attempt(attempt);
                self.say(process, session, Phase::Invoke, handle);
                self.say(process, session, Phase::Fail, handle);
            }
            let kept = match stamp.key_seq % 2 {
                0 => Operation::DeadLetter,
                _ => Operation::Park,
            };
            self.say(process, session, Phase::Invoke, of(kept));
            if !ends(0) {
                self.say(process, session, Phase::Ok, of(kept));
            }
            self.members.get_mut(&group).unwrap().letters.push(stamp);
        } else if !is_done {
            let handle = of(Operation::Handle).with_attempt(1);
            self.say(process, session, Phase::Invoke, handle);
            if ends(0) {
                return;
            }
            self.effect(group, stamp);
            if ends(1) {
                self.stopped.push((process, session, Phase::Ok, handle));
                return;
            }
            self.say(process, session, Phase::Ok, handle);
        }
        if ends_at.is_some_and(|step| step < 2) {
            return;
        }
        self.say(process, session, Phase::Invoke, of(Operation::Settle));
        if ends(2) {
            return;
        }
        self.say(process, session, Phase::Ok, of(Operation::Settle));
        self.members.get_mut(&group).unwrap().lanes[at].0 += 1;
    }

    fn effect(&mut self, group: u16, stamp: Stamp) {
        self.members.get_mut(&group).unwrap().done.insert(stamp);
        self.effects.push(Effect {
            group,
            id: stamp.id(RUN),
            key: stamp.key,
            key_seq: stamp.key_seq,
            attempt: 1,
            order: self.effects.len() as u64,
        });
    }

    /// The broker removes the next message of a group before it is read, and says so.
    fn retain(&mut self, group: u16, at: usize) {
        let member = self.members.get_mut(&group).unwrap();
        let (settled, given) = member.lanes[at];
        let stream = &self.streams[at];
        let is_known = stream.log.get(given).is_some_and(|(_, is_told)| *is_told);
        if settled != given || !is_known {
            return;
        }
        member.lanes[at] = (settled + 1, given + 1);
        let gap = Entry::gap(group, stream.place(), given as u64, 1);
        let process = member.process;
        self.say(process, at as u32, Phase::Ok, gap);
    }

    fn fault(&mut self, fault: Fault) {
        self.faults += 1;
        let number = self.faults;
        self.say(
            HARNESS,
            1,
            Phase::Ok,
            Entry::fault(Operation::FaultBegin, fault, number),
        );
        self.say(
            HARNESS,
            1,
            Phase::Ok,
            Entry::fault(Operation::FaultEnd, fault, number),
        );
        let probe = Entry::new(Operation::Probe);
        for outcome in [Phase::Unknown, Phase::Ok] {
            self.say(HARNESS, 1, Phase::Invoke, probe);
            self.say(HARNESS, 1, outcome, probe);
        }
    }

    /// The group's process is gone, and another one begins at what is settled.
    fn replace(&mut self, group: u16) {
        self.processes += 1;
        let process = self.processes;
        let member = self.members.get_mut(&group).unwrap();
        member.process = process;
        for (settled, given) in &mut member.lanes {
            *given = *settled;
        }
    }

    fn kill(&mut self, group: u16) {
        self.fault(Fault::Kill);
        self.replace(group);
    }

    fn shut_down(&mut self, group: u16) {
        self.fault(Fault::Terminate);
        let process = self.members[&group].process;
        let drain = Entry::new(Operation::Drain).with_group(group);
        self.say(process, 0, Phase::Invoke, drain);
        let stream = self.rng.usize(0..self.streams.len());
        self.handle(group, stream, None);
        self.say(process, 0, Phase::Ok, drain);
        self.replace(group);
    }

    fn die_or_stop_within(&mut self, group: u16, at: usize) {
        let process = self.members[&group].process;
        let step = self.rng.u32(0..3);
        self.handle(group, at, Some(step));
        if self.rng.bool() {
            // Killed: it never goes on.
            self.stopped.retain(|(stopped, ..)| *stopped != process);
        }
        self.kill(group);
    }

    /// A process that was stopped finds out how far it was.
    fn go_on(&mut self) {
        if let Some((process, session, phase, entry)) = self.stopped.pop() {
            self.say(process, session, phase, entry);
        }
    }

    fn finish(&mut self) {
        while !self.late.is_empty() {
            self.arrive_late();
        }
        while !self.outbox.is_empty() {
            self.relay(false);
        }
        for group in GROUPS {
            for at in 0..self.streams.len() {
                self.drain_lane(group, at);
            }
            self.bring_back(group);
            let lag = Entry::sample(Sample::Lag, 0).with_group(group);
            self.say(HARNESS, 1, Phase::Ok, lag);
        }
        self.reread();
        self.fault(Fault::Other);
        self.say(HARNESS, 1, Phase::Ok, Entry::new(Operation::Close));
    }

    fn drain_lane(&mut self, group: u16, at: usize) {
        while self.members[&group].lanes[at].0 < self.streams[at].log.len() {
            let member = &self.members[&group];
            if member.in_flight() == IN_FLIGHT_MAX && member.lanes[at].0 == member.lanes[at].1 {
                for other in 0..self.streams.len() {
                    self.handle(group, other, None);
                }
            }
            self.hand_out(group, at);
            self.handle(group, at, None);
        }
    }

    /// Operators read what is kept, and hand some of it to its group again.
    fn bring_back(&mut self, group: u16) {
        let mut letters = std::mem::take(&mut self.members.get_mut(&group).unwrap().letters);
        letters.sort_unstable();
        letters.dedup();
        for stamp in letters {
            let of = |operation| Entry::of(operation, stamp).with_group(group);
            self.say(HARNESS, 1, Phase::Ok, of(Operation::DeadLetter));
            if self.rng.bool() {
                continue;
            }
            let process = self.members[&group].process;
            self.say(process, 90, Phase::Ok, of(Operation::Deliver));
            self.say(process, 90, Phase::Invoke, of(Operation::Handle));
            self.effect(group, stamp);
            self.say(process, 90, Phase::Ok, of(Operation::Handle));
            self.say(process, 90, Phase::Invoke, of(Operation::Settle));
            self.say(process, 90, Phase::Ok, of(Operation::Settle));
        }
    }

    fn reread(&mut self) {
        let reread = Entry::new(Operation::Reread);
        self.say(HARNESS, 1, Phase::Invoke, reread);
        let mut found = Vec::new();
        for stream in &self.streams {
            for (position, (stamp, _)) in stream.log.iter().enumerate() {
                let entry = Entry::of(Operation::Stored, *stamp)
                    .with_checksum(checksum(*stamp))
                    .with_position(stream.place(), position as u64);
                found.push(entry);
            }
        }
        for entry in found {
            self.say(HARNESS, 1, Phase::Ok, entry);
        }
        self.say(HARNESS, 1, Phase::Ok, reread);
    }
}

/// Whether no handler can handle it.
fn is_poison(stamp: Stamp) -> bool {
    (stamp.key_seq + stamp.key) % 11 == 5
}
