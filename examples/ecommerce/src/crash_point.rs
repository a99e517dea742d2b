//! Ends the process at a named step, as a power cut would: for the crash campaign.
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

const TARGET: &str = "eventbus::step";

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
        crash.with_filter(Targets::new().with_target(TARGET, Level::TRACE))
    }
}

struct Crash {
    point: CrashPoint,
    left: AtomicU64,
}

impl<S: Subscriber> Layer<S> for Crash {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut step = StepOf::default();
        event.record(&mut step);
        if step.0 == self.point.step && self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            // No destructor runs, nothing is flushed.
            std::process::abort();
        }
    }
}

/// The text of an event's field `step`.
#[derive(Default)]
struct StepOf(String);

impl Visit for StepOf {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "step" {
            value.clone_into(&mut self.0);
        }
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
