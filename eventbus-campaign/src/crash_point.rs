//! Ends the process at a named step, as a power cut would: no destructor runs, nothing is flushed.
//!
//! The steps are `TRACE` events with the target `eventbus::step` and a field `step`, which the SDK,
//! its brokers and its stores emit. Nothing listens to them otherwise.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// A step, and at which of the times that it is reached the process ends: `settle.before:3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrashPoint {
    /// The step.
    pub step: String,
    /// From 1.
    pub time: u64,
}

impl CrashPoint {
    /// What ends the process there.
    pub fn layer<S>(self) -> impl Layer<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let left = AtomicU64::new(self.time);
        let crash = Crash { point: self, left };
        crash.with_filter(Targets::new().with_target("eventbus::step", Level::TRACE))
    }
}

struct Crash {
    point: CrashPoint,
    left: AtomicU64,
}

impl<S: Subscriber> Layer<S> for Crash {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut found = IsStep(&self.point.step, false);
        event.record(&mut found);
        if found.1 && self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            std::process::abort();
        }
    }
}

/// Whether an event's field `step` has this text.
struct IsStep<'a>(&'a str, bool);

impl Visit for IsStep<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.1 |= field.name() == "step" && value == self.0;
    }

    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}

impl fmt::Display for CrashPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.step, self.time)
    }
}

impl FromStr for CrashPoint {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (step, time) = text.split_once(':').context("write STEP:N")?;
        Ok(Self {
            step: step.to_owned(),
            time: time.parse().context("write STEP:N, N from 1")?,
        })
    }
}
