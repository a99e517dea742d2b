//! What one run is made of: messages, how their handlers behave, limits, and faults by time.

use std::fmt;
use std::time::Duration;

use eventbus_core::MemoryProfile;
use proptest::prelude::{Just, Strategy, any};
use proptest::{collection::vec, option, prop_oneof};

/// One run.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) profile: MemoryProfile,
    pub(super) partitions: u32,
    pub(super) members: usize,
    pub(super) messages: Vec<Planned>,
    /// How many messages are published at once, and how long after those before.
    pub(super) batches: Vec<(usize, u64)>,
    pub(super) setting: Setting,
    /// What happens when, in milliseconds.
    pub(super) faults: Vec<(u64, Fault)>,
}

/// One message and what its handler does at each attempt.
#[derive(Clone)]
pub(super) struct Planned {
    pub(super) key: Option<u32>,
    pub(super) kind: Kind,
    /// One each attempt; those after the last succeed.
    pub(super) failures: Vec<Failing>,
    pub(super) success: Working,
    /// The handler publishes an event of its own.
    pub(super) publishes: bool,
}

/// Which type of event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Taken by the batch handler where there is one.
    Alpha,
    /// Always handled singly.
    Beta,
    /// Nobody has a handler for it.
    Unknown,
}

/// How a handler takes its time.
#[derive(Clone, Copy, Debug)]
pub(super) enum Working {
    Yields(u8),
    Sleeps(u64),
}

/// How an attempt goes wrong.
#[derive(Clone, Copy, Debug)]
pub(super) enum Failing {
    Error(Working),
    Panic(Working),
    /// Until its deadline.
    Hangs,
}

/// How consumers are set up.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    pub(super) concurrency: usize,
    pub(super) workers: usize,
    pub(super) batch: usize,
    pub(super) limit_messages: usize,
    pub(super) lane_messages: usize,
    pub(super) bytes: usize,
    pub(super) revoke_timeout: Duration,
    /// Of every other member; the rest has ten seconds at least.
    pub(super) shutdown_timeout: Duration,
    pub(super) attempts_max: u32,
    pub(super) retry_delay: Duration,
    pub(super) deadline: Duration,
    /// Keys are blocked instead of skipped; handlers stop failing at this time.
    pub(super) blocked_until: Option<Duration>,
    /// The most events the batch handler takes; without it they are handled singly.
    pub(super) batch_max: Option<usize>,
    /// A failing item fails the call of the batch handler.
    pub(super) batch_fails_whole: bool,
}

/// What happens to the group.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    Join,
    Leave(usize),
    /// The shutdown itself is dropped after so many milliseconds.
    LeaveAndCrash(usize, u64),
    Crash(usize),
    Lose,
    /// For so many milliseconds.
    Pause(usize, u64),
    /// What handlers publish and dead letters are refused for so many milliseconds.
    Outage(u64),
}

/// One line a message, so that a failing case can be read.
impl fmt::Debug for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {:?}", self.kind, self.key)?;
        write!(f, ": {:?} then {:?}", self.failures, self.success)?;
        match self.publishes {
            true => f.write_str(", publishes"),
            false => Ok(()),
        }
    }
}

impl Fault {
    fn is_outage(self) -> bool {
        matches!(self, Self::Pause(..) | Self::Outage(_))
    }

    fn is_hand_over(self) -> bool {
        matches!(self, Self::Join | Self::Leave(_))
    }
}

/// In this time everything is handled that has begun, and what stands before it.
const AMPLE: Duration = Duration::from_secs(24 * 60 * 60);

/// What an attempt is to do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
    Succeed(Working),
    Fail(Failing),
}

impl Case {
    /// What the handler of message `number` does at this attempt, `now` after the beginning.
    pub(super) fn act(&self, number: usize, attempt: u32, now: Duration) -> Act {
        let planned = &self.messages[number];
        let healed = self.setting.blocked_until.is_some_and(|until| now >= until);
        match planned.failures.get(attempt as usize - 1) {
            Some(failing) if !healed => Act::Fail(*failing),
            _ if self.exhausts(number) && !healed => Act::Fail(Failing::Error(Working::Yields(0))),
            _ => Act::Succeed(planned.success),
        }
    }

    /// Whether no attempt of the message succeeds, apart from healing.
    fn exhausts(&self, number: usize) -> bool {
        self.messages[number].failures.len() >= self.setting.attempts_max as usize
    }

    /// Whether the message has to become a dead letter.
    pub(super) fn is_poison(&self, number: usize) -> bool {
        self.setting.blocked_until.is_none()
            && (self.exhausts(number) || self.messages[number].kind == Kind::Unknown)
    }

    /// Whether every message has to be handled exactly once: nothing changes hands, or it does with
    /// ample time.
    pub(super) fn is_calm(&self) -> bool {
        let Setting {
            revoke_timeout,
            shutdown_timeout,
            ..
        } = self.setting;
        let has_time = revoke_timeout.min(shutdown_timeout) >= AMPLE;
        let mut faults = self.faults.iter().map(|(_, fault)| *fault);
        faults.clone().all(Fault::is_outage) || (has_time && faults.all(Fault::is_hand_over))
    }

    /// The message of the same key before `number`.
    pub(super) fn before(&self, number: usize) -> Option<usize> {
        let key = self.messages[number].key?;
        (0..number)
            .rev()
            .find(|earlier| self.messages[*earlier].key == Some(key))
    }
}

fn working() -> impl Strategy<Value = Working> {
    prop_oneof![
        6 => Just(Working::Yields(0)),
        3 => (1u8..5).prop_map(Working::Yields),
        3 => (0u64..500).prop_map(Working::Sleeps),
    ]
}

fn failing() -> impl Strategy<Value = Failing> {
    prop_oneof![
        6 => working().prop_map(Failing::Error),
        2 => working().prop_map(Failing::Panic),
        1 => Just(Failing::Hangs),
    ]
}

fn planned() -> impl Strategy<Value = Planned> {
    let kind = prop_oneof![
        12 => Just(Kind::Alpha),
        5 => Just(Kind::Beta),
        1 => Just(Kind::Unknown),
    ];
    let failures = prop_oneof![
        8 => Just(Vec::new()),
        2 => vec(failing(), 1..6),
    ];
    (
        option::weighted(0.85, 0u32..1_000),
        kind,
        failures,
        working(),
        proptest::bool::weighted(0.15),
    )
        .prop_map(|(key, kind, failures, success, publishes)| Planned {
            key,
            kind,
            failures,
            success,
            publishes,
        })
}

fn milliseconds(range: std::ops::Range<u64>) -> impl Strategy<Value = Duration> {
    range.prop_map(Duration::from_millis)
}

fn setting() -> impl Strategy<Value = Setting> {
    let running = (
        prop_oneof![1usize..5, 1usize..65],
        1usize..5,
        option::weighted(0.4, 1usize..10),
        any::<bool>(),
    );
    let limits = (
        prop_oneof![1usize..6, 1usize..200],
        prop_oneof![1usize..6, 1usize..200],
        prop_oneof![1usize..6, 1usize..200],
        prop_oneof![1usize..400, 1usize..20_000],
        prop_oneof![milliseconds(0..50), milliseconds(0..2_000)],
    );
    let failing = (
        1u32..5,
        prop_oneof![Just(Duration::ZERO), milliseconds(1..800)],
        milliseconds(550..2_000),
        option::weighted(0.25, milliseconds(0..8_000)),
        prop_oneof![milliseconds(0..50), milliseconds(0..20_000)],
    );
    (running, limits, failing).prop_map(|(running, limits, failing)| {
        let (concurrency, workers, batch_max, batch_fails_whole) = running;
        let (batch, limit_messages, lane_messages, bytes, revoke_timeout) = limits;
        let (attempts_max, retry_delay, deadline, blocked_until, shutdown_timeout) = failing;
        Setting {
            concurrency,
            workers,
            batch,
            limit_messages,
            lane_messages,
            bytes,
            revoke_timeout,
            shutdown_timeout,
            attempts_max,
            retry_delay,
            deadline,
            blocked_until,
            batch_max,
            batch_fails_whole,
        }
    })
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        3 => Just(Fault::Join),
        2 => (0usize..8).prop_map(Fault::Leave),
        1 => (0usize..8, 0u64..500).prop_map(|(member, after)| Fault::LeaveAndCrash(member, after)),
        2 => (0usize..8).prop_map(Fault::Crash),
        2 => Just(Fault::Lose),
        2 => (0usize..8, 1u64..3_000).prop_map(|(member, time)| Fault::Pause(member, time)),
        1 => (1u64..4_000).prop_map(Fault::Outage),
    ]
}

fn with_faults(faults: impl Strategy<Value = Vec<(u64, Fault)>>) -> impl Strategy<Value = Case> {
    let profile = prop_oneof![
        3 => Just(MemoryProfile::Memory),
        2 => Just(MemoryProfile::Kafka),
        1 => Just(MemoryProfile::Redis),
        2 => Just(MemoryProfile::RabbitMq),
    ];
    let pause = prop_oneof![4 => 0u64..3, 2 => 0u64..300];
    (
        (profile, 1u32..5, 1usize..4, 1u64..13),
        vec(planned(), 1..121),
        vec((1usize..40, pause), 1..20),
        setting(),
        faults,
    )
        .prop_map(|(place, mut messages, batches, setting, mut faults)| {
            let (profile, partitions, members, keys) = place;
            for planned in &mut messages {
                // Without order, RabbitMQ's messages are its own to hand out again.
                if profile == MemoryProfile::RabbitMq {
                    planned.key.get_or_insert(0);
                }
                // Squared, so that some keys have many messages and most have few.
                planned.key = planned.key.map(|draw| {
                    let draw = u64::from(draw);
                    (draw * draw * keys / 1_000_000) as u32
                });
                // A key blocked by a missing handler does not heal.
                if setting.blocked_until.is_some() && planned.kind == Kind::Unknown {
                    planned.kind = Kind::Beta;
                }
            }
            faults.sort_by_key(|(at, _)| *at);
            Case {
                profile,
                partitions,
                members,
                messages,
                batches,
                setting,
                faults,
            }
        })
}

/// Any case.
pub(super) fn any_case() -> impl Strategy<Value = Case> {
    with_faults(vec((0u64..4_000, fault()), 0..7))
}

/// A case in which nothing may be handled twice.
pub(super) fn calm_case() -> impl Strategy<Value = Case> {
    let fault = prop_oneof![
        (0usize..8, 1u64..3_000).prop_map(|(member, time)| Fault::Pause(member, time)),
        (1u64..4_000).prop_map(Fault::Outage),
    ];
    with_faults(vec((0u64..4_000, fault), 0..3))
}

/// A case in which members come and go, with time enough that nothing may be handled twice.
pub(super) fn hand_over_case() -> impl Strategy<Value = Case> {
    let fault = prop_oneof![Just(Fault::Join), (0usize..8).prop_map(Fault::Leave)];
    with_faults(vec((0u64..4_000, fault), 1..9)).prop_map(|mut case| {
        case.setting.revoke_timeout = AMPLE;
        case.setting.shutdown_timeout = AMPLE;
        case.setting.blocked_until = None;
        case
    })
}
