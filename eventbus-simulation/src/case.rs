//! What one run is made of: messages, what their handlers do, how the consumers are set up, and what
//! happens when. A seed decides all of it.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::time::Duration;

use eventbus_core::MemoryProfile;
use eventbus_testkit::FaultPlan;
use eventbus_testkit::faults::{Call, Fault, PlannedFault};
use eventbus_verify::Stamp;
use fastrand::Rng;

/// How long the longest pause of a producer is; events happen within a few seconds of each other.
const BUSY: Range<u64> = 0..4_000;
/// In this time everything is handled that has begun.
const AMPLE: Duration = Duration::from_secs(24 * 60 * 60);

/// One run. The same case is the same run, with every version of the SDK that does the same.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Case {
    /// What decided it.
    pub seed: u64,
    /// How everything is set up.
    pub setting: Setting,
    /// What is published, in this order by each producer.
    pub messages: Vec<Planned>,
    /// What goes wrong with calls of the broker.
    pub faults: FaultPlan,
    /// What happens when, in milliseconds, in order.
    pub happenings: Vec<(u64, Happening)>,
}

/// How everything is set up.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Setting {
    /// Like which broker.
    pub profile: MemoryProfile,
    /// Of each topic.
    pub partitions: u32,
    /// How many members there are at first.
    pub members: usize,
    /// How many relays there are at first.
    pub relays: usize,
    /// What keeps effects from happening twice.
    pub once: Once,
    /// Whether poison parks its key; otherwise it becomes a dead letter.
    pub parks: bool,
    /// Handlers at a time.
    pub concurrency: usize,
    /// Tasks that they share.
    pub workers: usize,
    /// Messages in one delivery.
    pub batch: usize,
    /// Messages in flight.
    pub in_flight: usize,
    /// Messages that a relay publishes at once.
    pub relay_batch: usize,
    /// How long handlers get when their lane is revoked.
    pub revoke_timeout: Duration,
    /// How long handlers get when their consumer stops.
    pub shutdown_timeout: Duration,
    /// Tries of a message.
    pub attempts_max: u32,
    /// Between them.
    pub retry_delay: Duration,
}

/// What keeps effects from happening twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Once {
    /// Nothing.
    Nothing,
    /// A duplicate window.
    Window,
    /// A unit of work whose commits hold so many events at most.
    Unit(usize),
}

/// One message, and what its handler does.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Planned {
    /// How it is published.
    pub source: Source,
    /// Its key among those of its source.
    pub key: u32,
    /// How long its producer waits before it.
    pub pause: u64,
    /// How many attempts fail; `u32::MAX` is poison, until it is healed.
    pub failures: u32,
    /// Whether a failing attempt panics.
    pub panics: bool,
    /// Whether a failing attempt has written its effect before.
    pub fails_late: bool,
    /// How long each attempt takes, in milliseconds.
    pub takes: u64,
    /// Whether its handler publishes an event of its own.
    pub follows: bool,
}

/// How a message is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Source {
    /// By a call of the bus, again until it is taken.
    Direct,
    /// By an outbox, in a transaction that is open for so many milliseconds after it.
    Outbox {
        /// Which of two writers; each has one transaction at a time.
        writer: u8,
        /// How long its transaction stays open.
        open: u64,
        /// Whether that is rolled back.
        rolled_back: bool,
    },
    /// For so many milliseconds later.
    Schedule(u64),
}

impl Source {
    /// The producer that its messages are of.
    #[must_use]
    pub fn producer(self) -> u16 {
        match self {
            Self::Direct => 1,
            Self::Outbox { writer, .. } => 2 + u16::from(writer),
            Self::Schedule(_) => 4,
        }
    }
}

/// What happens to those who take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Happening {
    /// A member joins.
    Join,
    /// A member is told to stop.
    Leave(usize),
    /// A member is told to stop, and dies so many milliseconds later.
    LeaveAndCrash(usize, u64),
    /// A member dies.
    Crash(usize),
    /// A relay begins.
    RelayJoin,
    /// A relay is told to stop.
    RelayLeave(usize),
    /// A relay dies.
    RelayCrash(usize),
    /// The stores of outbox, leases, held keys and schedule are away for so many milliseconds.
    StoresAway(u64),
    /// Every call of these stores is answered so late, for three seconds: beyond every lease.
    StoresLate(u64),
    /// So many calls of these stores are done, and their answers lost.
    StoresUnanswered(u32),
    /// So many transactions of units of work do not begin.
    UnitAway(u32),
    /// So many commits of units of work fail, before they applied or after.
    CommitFails(u32, bool),
}

impl Case {
    /// The case of a seed.
    #[must_use]
    pub fn of_seed(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let setting = Setting::draw(&mut random);
        let keys = random.u32(1..8);
        let count = random.usize(1..48);
        let messages = (0..count).map(|_| Planned::draw(&mut random, keys, &setting));
        let messages = messages.collect();
        let mut case = Self {
            seed,
            setting,
            messages,
            faults: FaultPlan::none(),
            happenings: Vec::new(),
        };
        match random.u32(0..8) {
            // Nothing goes wrong: what happens twice then has no excuse.
            0 => {}
            // Members come and go in time, and at most the wire repeats: nothing is handled twice.
            1..3 => case.hand_over(&mut random),
            3 => case.faults = FaultPlan::of_seed(seed),
            _ => {
                case.faults = FaultPlan::of_seed(seed);
                case.happenings = happenings(&mut random);
            }
        }
        case
    }

    fn hand_over(&mut self, random: &mut Rng) {
        self.setting.revoke_timeout = AMPLE;
        self.setting.shutdown_timeout = AMPLE;
        self.happenings = happenings(random);
        let repeats = random.bool();
        self.happenings
            .retain(|(_, one)| one.is_hand_over() || (repeats && one.repeats()));
        if repeats {
            let plan = FaultPlan::of_seed(self.seed);
            let of_publishing = plan.faults().iter().filter(|one| is_of_publishing(one));
            let numbers: Vec<usize> = of_publishing.map(|one| one.number).collect();
            self.faults = FaultPlan::only(self.seed, &numbers);
        }
    }

    /// Which message each of them is, in their order.
    pub(crate) fn stamps(&self) -> Vec<Stamp> {
        let mut counts: HashMap<(u16, u32), u32> = HashMap::new();
        let messages = self.messages.iter().enumerate();
        messages
            .map(|(index, planned)| {
                let producer = planned.source.producer();
                let key = match planned.source {
                    // Two dates have no order that a key could keep.
                    Source::Schedule(_) => 1_000 + u32::try_from(index).unwrap_or(u32::MAX),
                    _ => planned.key,
                };
                let count = counts.entry((producer, key)).or_default();
                let stamp = Stamp::new(producer, key, *count);
                *count += 1;
                stamp
            })
            .collect()
    }

    /// What was planned for each of them.
    pub(crate) fn planned(&self) -> HashMap<Stamp, Planned> {
        let messages = self.messages.iter().copied();
        self.stamps().into_iter().zip(messages).collect()
    }

    /// Whether nothing goes wrong, so that nothing is handed out twice.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        self.happenings.is_empty() && self.faults.faults().is_empty()
    }

    /// Whether effects happen once: always in a unit of work; in a duplicate window where every
    /// handler that began may end, and what it published is taken before its lane moves; without
    /// either, where the wire does not repeat besides.
    #[must_use]
    pub fn is_once(&self) -> bool {
        let Setting {
            revoke_timeout,
            shutdown_timeout,
            ..
        } = self.setting;
        let mut happenings = self.happenings.iter().map(|(_, one)| one);
        let has_time = revoke_timeout.min(shutdown_timeout) >= AMPLE || self.happenings.is_empty();
        let mut faults = self.faults.faults().iter();
        match self.setting.once {
            Once::Unit(_) => true,
            Once::Window => {
                let stays = happenings.clone().all(|one| one.repeats());
                has_time
                    && happenings.all(|one| one.is_hand_over() || one.repeats())
                    && faults.all(|one| is_of_publishing(one) && (stays || is_taken(one)))
            }
            Once::Nothing => {
                has_time && happenings.all(|one| one.is_hand_over()) && faults.next().is_none()
            }
        }
    }

    /// The same with fewer things that go wrong, and fewer messages, as long as it fails.
    #[must_use]
    pub fn shrink(mut self, mut fails: impl FnMut(&Self) -> bool) -> Self {
        let faults = self.faults.clone().shrink(|faults| {
            let mut smaller = self.clone();
            smaller.faults = faults.clone();
            fails(&smaller)
        });
        self.faults = faults;
        for index in (0..self.happenings.len()).rev() {
            let mut smaller = self.clone();
            smaller.happenings.remove(index);
            if fails(&smaller) {
                self = smaller;
            }
        }
        for index in (0..self.messages.len()).rev() {
            let mut smaller = self.clone();
            smaller.messages.remove(index);
            if fails(&smaller) {
                self = smaller;
            }
        }
        self
    }
}

impl Happening {
    fn is_hand_over(self) -> bool {
        matches!(
            self,
            Self::Join | Self::Leave(_) | Self::RelayJoin | Self::RelayLeave(_)
        )
    }

    /// Whether it makes a relay publish again what it did not remove, and nothing else.
    fn repeats(self) -> bool {
        matches!(self, Self::RelayCrash(_))
    }

    fn draw(random: &mut Rng) -> Self {
        let which = random.usize(0..8);
        match random.u32(0..19) {
            0..3 => Self::Join,
            3..5 => Self::Leave(which),
            5..6 => Self::LeaveAndCrash(which, random.u64(0..500)),
            6..9 => Self::Crash(which),
            9..10 => Self::RelayJoin,
            10..11 => Self::RelayLeave(which),
            11..13 => Self::RelayCrash(which),
            13..14 => Self::StoresAway(random.u64(1..4_000)),
            14..15 => Self::StoresLate(random.u64(1..12_000)),
            15..16 => Self::StoresUnanswered(random.u32(1..6)),
            16..17 => Self::UnitAway(random.u32(1..4)),
            _ => Self::CommitFails(random.u32(1..4), random.bool()),
        }
    }
}

/// Whether it changes nothing but what is on the wire, and when.
fn is_of_publishing(planned: &PlannedFault) -> bool {
    planned.call == Call::Publish && !matches!(planned.fault, Fault::Outage(_))
}

/// Whether what is published is taken all the same, at the first try.
fn is_taken(planned: &PlannedFault) -> bool {
    matches!(
        planned.fault,
        Fault::Twice | Fault::Late(_) | Fault::AnsweredLate(_)
    )
}

fn happenings(random: &mut Rng) -> Vec<(u64, Happening)> {
    let count = random.usize(1..8);
    let mut happenings: Vec<_> = (0..count)
        .map(|_| (random.u64(BUSY), Happening::draw(random)))
        .collect();
    happenings.sort_by_key(|(at, _)| *at);
    happenings
}

impl Setting {
    fn draw(random: &mut Rng) -> Self {
        let small = |random: &mut Rng, max| match random.bool() {
            true => random.usize(1..6),
            false => random.usize(1..=max),
        };
        let milliseconds = |random: &mut Rng, max| match random.bool() {
            true => Duration::from_millis(random.u64(0..50)),
            false => Duration::from_millis(random.u64(0..max)),
        };
        Self {
            profile: match random.u32(0..8) {
                0..3 => MemoryProfile::Memory,
                3..5 => MemoryProfile::Kafka,
                5..6 => MemoryProfile::Redis,
                _ => MemoryProfile::RabbitMq,
            },
            partitions: random.u32(1..5),
            members: random.usize(1..4),
            relays: random.usize(1..3),
            once: match random.u32(0..6) {
                0 => Once::Nothing,
                1..3 => Once::Window,
                3..5 => Once::Unit(1),
                _ => Once::Unit(random.usize(2..10)),
            },
            parks: random.bool(),
            concurrency: small(random, 64),
            workers: random.usize(1..5),
            batch: small(random, 100),
            in_flight: small(random, 200),
            relay_batch: small(random, 100),
            revoke_timeout: milliseconds(random, 2_000),
            shutdown_timeout: milliseconds(random, 20_000),
            attempts_max: random.u32(1..5),
            retry_delay: Duration::from_millis(random.u64(0..800)),
        }
    }
}

impl Planned {
    fn draw(random: &mut Rng, keys: u32, setting: &Setting) -> Self {
        let source = match random.u32(0..10) {
            0..4 => Source::Direct,
            4..9 => Source::Outbox {
                writer: random.u8(0..2),
                open: if random.bool() {
                    0
                } else {
                    random.u64(0..1_500)
                },
                rolled_back: random.u32(0..8) == 0,
            },
            _ => Source::Schedule(random.u64(0..5_000)),
        };
        // Squared, so that some keys have many messages and most have few.
        let draw = random.u64(0..1_000);
        let failures = match random.u32(0..20) {
            0..16 => 0,
            16..19 => random.u32(1..=setting.attempts_max),
            _ => u32::MAX,
        };
        Self {
            source,
            key: (draw * draw * u64::from(keys) / 1_000_000) as u32,
            pause: if random.u32(0..3) == 0 {
                random.u64(0..400)
            } else {
                0
            },
            failures,
            panics: random.u32(0..4) == 0,
            fails_late: random.bool(),
            takes: if random.bool() { 0 } else { random.u64(0..500) },
            follows: random.u32(0..4) != 0,
        }
    }
}

/// One line a message, so that a failing case can be read.
impl fmt::Debug for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of key {}", self.source, self.key)?;
        if self.pause > 0 {
            write!(f, ", after {} ms", self.pause)?;
        }
        match (self.failures, self.panics) {
            (0, _) => {}
            (u32::MAX, _) => f.write_str(", poison")?,
            (failures, true) => write!(f, ", panics {failures} times")?,
            (failures, false) => write!(f, ", fails {failures} times")?,
        }
        if self.failures > 0 && self.fails_late {
            f.write_str(" after its write")?;
        }
        if self.takes > 0 {
            write!(f, ", takes {} ms", self.takes)?;
        }
        match self.follows {
            true => f.write_str(", publishes"),
            false => Ok(()),
        }
    }
}
