//! What a process takes, and whether that stays the same over time.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// How long must be watched before anything is said.
const WATCHED_MIN: Duration = Duration::from_secs(300);
/// What comes before is warming up.
const WARM_UP: Duration = Duration::from_secs(60);
/// What the last quarter may have more than the first: a share, and an amount that is noise.
const SHARE: f64 = 0.10;
const RESIDENT_NOISE: u64 = 8 << 20;
const COUNT_NOISE: u64 = 8;

/// What a process takes at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Bytes of memory that are resident.
    pub resident: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
    /// Tasks of its runtime, as it says.
    pub tasks: u64,
}

impl Taken {
    /// Looks at a process; none if it is gone.
    #[must_use]
    pub fn by(id: u32, tasks: u64) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
        let value = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        Some(Self {
            resident: value("VmRSS:")? * 1024,
            descriptors: fs::read_dir(format!("/proc/{id}/fd")).ok()?.count() as u64,
            threads: value("Threads:")?,
            tasks,
        })
    }
}

/// What processes took over time, by name.
#[derive(Clone, Debug)]
pub struct Meter {
    begun: Instant,
    /// Bytes that a process may hold because it is behind.
    read_ahead: u64,
    samples: BTreeMap<String, Vec<(Duration, Taken)>>,
}

impl Default for Meter {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            read_ahead: 0,
            samples: BTreeMap::new(),
        }
    }
}

/// What a process took in the first and the last quarter of the time, each as the median.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Drift {
    /// Its name.
    pub name: String,
    /// For how long it was watched.
    pub watched: Duration,
    /// In the first quarter, after it had warmed up.
    pub first: Taken,
    /// In the last quarter.
    pub last: Taken,
}

impl Meter {
    /// Of processes that read so many bytes ahead when they are behind.
    #[must_use]
    pub fn with_read_ahead(self, read_ahead: u64) -> Self {
        Self { read_ahead, ..self }
    }

    /// Notes what a process takes now.
    pub fn note(&mut self, name: &str, taken: Taken) {
        let samples = self.samples.entry(name.to_owned()).or_default();
        samples.push((self.begun.elapsed(), taken));
    }

    /// What each process took, if it was watched for long enough.
    #[must_use]
    pub fn drifts(&self) -> Vec<Drift> {
        let samples = self.samples.iter();
        samples
            .filter_map(|(name, samples)| drift(name, samples))
            .collect()
    }

    /// What grew, of all processes.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let drifts = self.drifts();
        let complaints = drifts.iter().map(|drift| drift.complaints(self.read_ahead));
        complaints.flatten().collect()
    }
}

fn drift(name: &str, samples: &[(Duration, Taken)]) -> Option<Drift> {
    let (first, last) = (samples.first()?.0, samples.last()?.0);
    let watched = last - first;
    if watched < WATCHED_MIN {
        return None;
    }
    let warm = first + WARM_UP;
    let quarter = (last - warm) / 4;
    let of = |from: Duration, until: Duration| {
        let within = samples
            .iter()
            .filter(|(at, _)| (from..=until).contains(at))
            .map(|(_, taken)| *taken);
        median(within.collect())
    };
    Some(Drift {
        name: name.to_owned(),
        watched,
        first: of(warm, warm + quarter)?,
        last: of(last - quarter, last)?,
    })
}

fn median(taken: Vec<Taken>) -> Option<Taken> {
    let middle = |value: fn(&Taken) -> u64| {
        let mut values: Vec<u64> = taken.iter().map(value).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied()
    };
    Some(Taken {
        resident: middle(|one| one.resident)?,
        descriptors: middle(|one| one.descriptors)?,
        threads: middle(|one| one.threads)?,
        tasks: middle(|one| one.tasks)?,
    })
}

impl Drift {
    /// What grew by more than a tenth, and by more than noise: 8 MiB and what is read
    /// ahead, or 8 of what is counted.
    fn complaints(&self, read_ahead: u64) -> Vec<String> {
        let mut complaints = Vec::new();
        let mut compare = |what: &str, first: u64, last: u64, noise: u64| {
            let allowed = first + noise.max((first as f64 * SHARE) as u64);
            if last > allowed {
                let name = &self.name;
                complaints.push(format!("{what} of {name} grew from {first} to {last}"));
            }
        };
        let (first, last) = (self.first, self.last);
        let noise = RESIDENT_NOISE + read_ahead;
        compare("memory", first.resident, last.resident, noise);
        compare(
            "descriptors",
            first.descriptors,
            last.descriptors,
            COUNT_NOISE,
        );
        compare("threads", first.threads, last.threads, COUNT_NOISE);
        compare("tasks", first.tasks, last.tasks, COUNT_NOISE);
        complaints
    }
}

#[cfg(test)]
mod tests {
    use super::{Meter, Taken, drift};
    use std::time::Duration;

    fn samples(resident: impl Fn(u64) -> u64) -> Vec<(Duration, Taken)> {
        (0..1200)
            .map(|second| {
                let taken = Taken {
                    resident: resident(second),
                    ..Taken::default()
                };
                (Duration::from_secs(second), taken)
            })
            .collect()
    }

    #[test]
    fn growth_is_told_and_noise_is_not() {
        let grows =
            drift("it", &samples(|second| (50 << 20) + second * 20_000)).expect("long enough");
        assert_eq!(grows.complaints(0).len(), 1, "{:?}", grows.complaints(0));
        let flat = drift("it", &samples(|second| (50 << 20) + second % 7 * 100_000));
        assert!(flat.expect("long enough").complaints(0).is_empty());
    }

    #[test]
    fn warming_up_is_no_growth() {
        let warms = samples(|second| (second.min(50) + 10) << 20);
        assert!(
            drift("it", &warms)
                .expect("long enough")
                .complaints(0)
                .is_empty()
        );
    }

    #[test]
    fn this_process_takes_something() {
        let taken = Taken::by(std::process::id(), 0).expect("it runs");
        assert!(taken.resident > 0 && taken.descriptors > 0 && taken.threads > 0);
        let mut meter = Meter::default();
        meter.note("it", taken);
        assert!(meter.drifts().is_empty(), "it was not watched for long");
    }
}
