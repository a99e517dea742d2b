//! What is tried in virtual time besides: many seeds of the simulation, and every planted bug.

use std::time::{Duration, Instant};

use eventbus_simulation::{Plant, Survey};
use indicatif::HumanCount;
use serde::{Deserialize, Serialize};

/// In so many seeds each planted bug has to be found.
const PLANT_SEEDS: u64 = 1_000;

/// What the simulation came to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Simulated {
    /// The first seed.
    pub from: u64,
    /// How many there were.
    pub seeds: u64,
    /// What they came to.
    pub messages: u64,
    /// Effects of handlers.
    pub effects: u64,
    /// Faults of the broker that happened.
    pub faults: u64,
    /// What else happened: members and relays that came, went and died, stores that were away.
    pub happenings: u64,
    /// How long that took.
    pub lasted: Duration,
    /// Bugs that were planted, and the first seed that finds each; none where no seed did.
    pub plants: Vec<(String, Option<u64>)>,
    /// What the first seeds broke.
    pub broken: Vec<String>,
}

impl Simulated {
    /// Runs so many seeds on all processors, and looks for every planted bug.
    #[must_use]
    pub fn run(from: u64, seeds: u64) -> Self {
        let begun = Instant::now();
        let mut broken = Vec::new();
        let survey = Survey::run(from, seeds, None, |case, verdict| {
            if !verdict.is_sound() {
                let seed = case.seed;
                let again = format!("eventbus-simulation --from {seed} --seeds 1");
                broken.push(format!("seed {seed}:\n{verdict}\nagain: {again}"));
            }
            true
        });
        let plants = Plant::ALL.iter();
        let plants = plants.map(|plant| (plant.what().to_owned(), plant.found_by(0..PLANT_SEEDS)));
        Self {
            from,
            seeds: survey.seeds,
            messages: survey.messages,
            effects: survey.effects,
            faults: survey.faults,
            happenings: survey.happenings,
            lasted: begun.elapsed(),
            plants: plants.collect(),
            broken,
        }
    }

    /// What it came to, in a line.
    #[must_use]
    pub fn line(&self) -> String {
        let outcome = match self.broken.len() {
            0 => "no promise was broken".to_owned(),
            seeds => format!("{seeds} SEEDS BROKE A PROMISE"),
        };
        let found = self
            .plants
            .iter()
            .filter(|(_, seed)| seed.is_some())
            .count();
        format!(
            "{} seeds from {} on, {} messages, {} effects, {} faults of the broker, {} other happenings: {outcome}; \
             {found} of {} planted bugs were found",
            HumanCount(self.seeds),
            self.from,
            HumanCount(self.messages),
            HumanCount(self.effects),
            HumanCount(self.faults),
            HumanCount(self.happenings),
            self.plants.len(),
        )
    }

    /// Whether no seed broke a promise, and every planted bug was found.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.broken.is_empty() && self.plants.iter().all(|(_, seed)| seed.is_some())
    }
}
