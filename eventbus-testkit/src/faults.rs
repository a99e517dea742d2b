//! What a simulated broker does wrong, and when: a plan that a seed decides.

mod broker;

use std::fmt;
use std::time::Duration;

use fastrand::Rng;

pub use broker::FaultyBroker;

/// Most faults of a plan that a seed decides.
const FAULTS_MAX: usize = 8;
/// A fault meets at most the call of this number of its kind: a test of a service has a few dozen.
const NTH_MAX: u64 = 32;

/// Which calls of a broker go wrong, and how. Nothing else is decided by chance: the same plan does
/// the same to the same program, so that a failure is repeated by its seed, and its plan can shrink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultPlan {
    seed: u64,
    faults: Vec<PlannedFault>,
}

/// One fault, and the call that it meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlannedFault {
    /// Its place in the plan of its seed, by which [`FaultPlan::only`] names it.
    pub number: usize,
    /// What kind of call it meets.
    pub call: Call,
    /// The how manieth of these, from 1, over all clients.
    pub nth: u64,
    /// What happens.
    pub fault: Fault,
}

/// A kind of call that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Call {
    /// [`Publisher::publish`](eventbus_core::Publisher::publish), a batch.
    Publish,
    /// [`Deliveries::next`](eventbus_core::Deliveries::next) that has a signal to give.
    Next,
    /// [`Settlement::settle`](eventbus_core::Settlement::settle).
    Settle,
    /// [`Settlement::release`](eventbus_core::Settlement::release).
    Release,
}

/// What goes wrong with a call. All of it is what brokers do that keep their word: nothing is lost,
/// and nothing of a lane is handed out in another order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// It is not done, and the caller knows it.
    Refused,
    /// The answer is lost: the caller cannot know whether it was done.
    Unanswered {
        /// Whether it was.
        done: bool,
    },
    /// Of a batch that is published, some is taken and the rest refused.
    Partly,
    /// A batch that is published is on the broker twice.
    Twice,
    /// It is done so much later.
    Late(Duration),
    /// It is done at once, and answered so much later.
    AnsweredLate(Duration),
    /// From this call on every call of every client fails, for so long.
    Outage(Duration),
    /// After this signal the group's lanes are taken away from all members and shared out anew, as
    /// from members that stood still for too long; what they had not settled is handed out again.
    Lost,
    /// After this signal a stranger joins the group, takes its share of the lanes without handling
    /// anything, and is gone after so long.
    Stranger(Duration),
    /// The messages of this signal come lane by lane in another order, in order within each.
    Shuffled,
}

impl FaultPlan {
    /// Up to eight faults, and sometimes none, each at one of the first few dozen calls of its kind.
    #[must_use]
    pub fn of_seed(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let count = random.usize(0..=FAULTS_MAX);
        let faults = (0..count).map(|number| PlannedFault::draw(&mut random, number));
        Self {
            seed,
            faults: faults.collect(),
        }
    }

    /// No fault at all.
    #[must_use]
    pub fn none() -> Self {
        Self {
            seed: 0,
            faults: Vec::new(),
        }
    }

    /// With this fault at the `nth` call of a kind, from 1.
    #[must_use]
    pub fn with(mut self, call: Call, nth: u64, fault: Fault) -> Self {
        let number = self.faults.len();
        self.faults.push(PlannedFault {
            number,
            call,
            nth,
            fault,
        });
        self
    }

    /// Of the plan of this seed, the faults with these numbers.
    #[must_use]
    pub fn only(seed: u64, numbers: &[usize]) -> Self {
        let mut plan = Self::of_seed(seed);
        plan.faults
            .retain(|planned| numbers.contains(&planned.number));
        plan
    }

    /// The seed.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The faults, in the order of their numbers.
    #[must_use]
    pub fn faults(&self) -> &[PlannedFault] {
        &self.faults
    }

    /// The plan without one of its faults.
    fn without(&self, index: usize) -> Self {
        let mut plan = self.clone();
        plan.faults.remove(index);
        plan
    }

    /// Leaves out every fault without which the plan still fails.
    #[must_use]
    pub fn shrink(mut self, mut fails: impl FnMut(&Self) -> bool) -> Self {
        let mut index = self.faults.len();
        // From the end: what comes later is more often beside the point.
        while index > 0 {
            index -= 1;
            let smaller = self.without(index);
            if fails(&smaller) {
                self = smaller;
            }
        }
        self
    }

    fn meeting(&self, call: Call, nth: u64) -> Option<Fault> {
        let mut faults = self.faults.iter();
        let met = faults.find(|planned| planned.call == call && planned.nth == nth)?;
        Some(met.fault)
    }
}

impl PlannedFault {
    fn draw(random: &mut Rng, number: usize) -> Self {
        let call = match random.u32(0..10) {
            0..4 => Call::Publish,
            4..7 => Call::Next,
            7..9 => Call::Settle,
            _ => Call::Release,
        };
        // Half of them early, where every test comes by.
        let nth = match random.bool() {
            true => random.u64(1..=4),
            false => random.u64(1..=NTH_MAX),
        };
        Self {
            number,
            call,
            nth,
            fault: Fault::draw(random, call),
        }
    }
}

impl Fault {
    fn draw(random: &mut Rng, call: Call) -> Self {
        let any = match random.u32(0..6) {
            0 => Self::Refused,
            1 => Self::Unanswered {
                done: random.bool(),
            },
            2 => Self::Late(duration(random)),
            3 => Self::AnsweredLate(duration(random)),
            _ => return Self::draw_own(random, call),
        };
        match (call, any) {
            // A signal has no answer that could be lost or late.
            (Call::Next, Self::Unanswered { .. }) => Self::Refused,
            (Call::Next, Self::AnsweredLate(late)) => Self::Late(late),
            (_, any) => any,
        }
    }

    /// One that only this kind of call has, where there is such.
    fn draw_own(random: &mut Rng, call: Call) -> Self {
        match (call, random.u32(0..6)) {
            (Call::Publish, 0..2) => Self::Partly,
            (Call::Publish, 2..4) => Self::Twice,
            (Call::Next, 0..2) => Self::Lost,
            (Call::Next, 2..4) => Self::Stranger(duration(random)),
            (Call::Next, 4) => Self::Shuffled,
            _ => Self::Outage(duration(random)),
        }
    }
}

/// From a millisecond to a quarter of a minute: shorter and longer than the limits that services set.
fn duration(random: &mut Rng) -> Duration {
    let exponent = random.u32(0..15);
    Duration::from_millis(random.u64(1..=1 << exponent))
}

impl fmt::Display for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the faults of seed {}:", self.seed)?;
        if self.faults.is_empty() {
            return f.write_str(" none");
        }
        for planned in &self.faults {
            write!(f, "\n  {planned}")?;
        }
        Ok(())
    }
}

impl fmt::Display for PlannedFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            number,
            call,
            nth,
            fault,
        } = self;
        write!(f, "{number}: {call} {nth} ")?;
        match fault {
            Fault::Refused => f.write_str("is refused"),
            Fault::Unanswered { done: true } => f.write_str("is done, and its answer lost"),
            Fault::Unanswered { done: false } => f.write_str("is not done, and its answer lost"),
            Fault::Partly => f.write_str("is done in part"),
            Fault::Twice => f.write_str("is done twice"),
            Fault::Late(by) => write!(f, "is {by:?} late"),
            Fault::AnsweredLate(by) => write!(f, "is answered {by:?} late"),
            Fault::Outage(time) => write!(f, "fails, and so does every call for {time:?}"),
            Fault::Lost => f.write_str("comes, and then all lanes are lost"),
            Fault::Stranger(time) => write!(f, "comes, and then a stranger for {time:?}"),
            Fault::Shuffled => f.write_str("comes with its lanes in another order"),
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Publish => "publish",
            Self::Next => "signal",
            Self::Settle => "settlement",
            Self::Release => "release",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Call, Fault, FaultPlan};

    #[test]
    fn a_seed_decides_the_same_plan_each_time() {
        for seed in 0..100 {
            assert_eq!(FaultPlan::of_seed(seed), FaultPlan::of_seed(seed));
        }
    }

    #[test]
    fn a_thousand_seeds_have_every_kind_of_fault() {
        let plans = (0..1_000).map(FaultPlan::of_seed);
        let mut kinds: Vec<_> = plans
            .flat_map(|plan| plan.faults().to_vec())
            .map(|planned| (planned.call, std::mem::discriminant(&planned.fault)))
            .collect();
        kinds.sort_by_key(|kind| format!("{kind:?}"));
        kinds.dedup();
        let of = |call| kinds.iter().filter(|(found, _)| *found == call).count();
        assert_eq!(of(Call::Publish), 7);
        assert_eq!(of(Call::Next), 6);
        assert_eq!(of(Call::Settle), 5);
        assert_eq!(of(Call::Release), 5);
    }

    #[test]
    fn a_plan_shrinks_to_the_faults_that_matter() {
        let plan = (0..)
            .map(FaultPlan::of_seed)
            .find(|plan| plan.faults().len() > 4)
            .expect("seeds never end");
        let needed = [plan.faults()[1], plan.faults()[3]];
        let shrunk = plan
            .clone()
            .shrink(|smaller| needed.iter().all(|one| smaller.faults().contains(one)));
        assert_eq!(shrunk.faults(), needed);
        assert_eq!(FaultPlan::only(plan.seed(), &[1, 3]), shrunk);
    }

    #[test]
    fn a_plan_says_in_words_what_happens() {
        let plan = (0..)
            .map(FaultPlan::of_seed)
            .find(|plan| plan.faults().iter().any(|one| one.fault == Fault::Lost))
            .expect("seeds never end");
        assert!(plan.to_string().contains("all lanes are lost"), "{plan}");
    }
}
