//! What the rounds of a scenario come to together.

use std::collections::BTreeMap;
use std::time::Duration;

use eventbus_verify::{Fault, Messages};
use serde::{Deserialize, Serialize};

use crate::meter::Drift;
use crate::round::{Outcome, shown};

/// How many violations are kept as text.
const SHOWN: usize = 20;

/// What the rounds of a scenario on one broker come to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    /// The scenario.
    pub scenario: String,
    /// On what it ran.
    pub base: String,
    /// The seeds of its rounds.
    pub seeds: Vec<u64>,
    /// Messages by what became of the tries to bring them in.
    #[serde(with = "crate::results::messages")]
    pub messages: Messages,
    /// How many effects there were.
    pub effects: u64,
    /// How many deliveries.
    pub deliveries: u64,
    /// How many of these were of a message that the group had been handed before.
    pub duplicates: u64,
    /// Records of dead letters and of what was parked.
    pub kept: u64,
    /// Faults by kind.
    #[serde(with = "crate::results::faults")]
    pub faults: BTreeMap<Fault, u64>,
    /// At which named steps processes were ended.
    pub steps: BTreeMap<String, u64>,
    /// How long it took each time until messages passed again, not sorted.
    pub recoveries: Vec<Duration>,
    /// How often the next fault came before.
    pub interrupted: u64,
    /// How long a message needed where nothing was wrong, at each round's begin.
    pub passing: Vec<Duration>,
    /// How long messages came in.
    pub lasted: Duration,
    /// How long it took until everything was settled, over all rounds.
    pub drained: Duration,
    /// How many violations there are.
    pub violations: u64,
    /// The first of them, and whatever else went wrong, each as a text.
    pub shown: Vec<String>,
    /// How many things went wrong that are no violation.
    pub complaints: u64,
    /// What processes took in the first and the last quarter of a long round.
    pub drifts: Vec<Drift>,
    /// Why it did not run, if it did not.
    pub missing: Option<String>,
}

impl Tally {
    /// A scenario of which nothing is known yet.
    #[must_use]
    pub fn new(scenario: &str, base: &str) -> Self {
        Self {
            scenario: scenario.to_owned(),
            base: base.to_owned(),
            ..Self::default()
        }
    }

    /// Whether it ran, and nothing went wrong.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.missing.is_none()
            && !self.seeds.is_empty()
            && self.violations == 0
            && self.complaints == 0
    }

    /// How many faults there were.
    #[must_use]
    pub fn faults_total(&self) -> u64 {
        self.faults.values().sum()
    }

    /// Adds a round.
    pub fn add(&mut self, seed: u64, outcome: &Outcome) {
        let report = &outcome.report;
        self.seeds.push(seed);
        self.messages.ok += report.messages.ok;
        self.messages.failed += report.messages.failed;
        self.messages.unknown += report.messages.unknown;
        self.messages.untried += report.messages.untried;
        self.effects += report.effects as u64;
        self.deliveries += report.deliveries;
        self.duplicates += report.duplicates.values().sum::<u64>();
        self.kept += report.kept.dead_letters + report.kept.parked;
        for (fault, count) in &report.faults {
            *self.faults.entry(*fault).or_default() += count;
        }
        for (step, count) in &outcome.steps {
            *self.steps.entry(step.clone()).or_default() += count;
        }
        self.recoveries.extend(&report.recoveries.times);
        self.interrupted += report.recoveries.interrupted;
        self.passing.extend(outcome.passing);
        self.lasted += outcome.lasted;
        self.drained += outcome.drained;
        self.violations += report.violations_total();
        self.complain(outcome);
        self.drifts.extend(outcome.meter.drifts());
    }

    /// Notes a round that came to no end, so that nothing is said of the tried system.
    pub fn fail(&mut self, seed: u64, error: &anyhow::Error) {
        self.seeds.push(seed);
        self.complaints += 1;
        self.shown.push(format!("{error:#}"));
    }

    fn complain(&mut self, outcome: &Outcome) {
        let report = &outcome.report;
        let mut found: Vec<String> = outcome.complaints.clone();
        if !report.is_complete {
            found.push("the ledger lacks its end".to_owned());
        }
        if report.messages.total() == 0 {
            found.push("no message was checked".to_owned());
        }
        found.extend(outcome.meter.complaints());
        self.complaints += found.len() as u64;
        found.extend(shown(report).iter().map(ToString::to_string));
        let room = SHOWN.saturating_sub(self.shown.len());
        self.shown.extend(found.into_iter().take(room));
    }
}

/// The smallest time that so many of a hundred do not exceed; none where there is no time.
#[must_use]
pub fn percentile(times: &[Duration], percent: usize) -> Option<Duration> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}
