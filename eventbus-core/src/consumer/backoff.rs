//! How long to wait before a broker that is away is asked again.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);

/// Doubles from 50 milliseconds to 2 seconds.
#[derive(Debug)]
pub(crate) struct Backoff(Duration);

impl Backoff {
    pub(crate) fn new() -> Self {
        Self(FIRST)
    }

    /// The next wait.
    pub(crate) fn next(&mut self) -> Duration {
        let delay = self.0;
        self.0 = (delay * 2).min(LONGEST);
        delay
    }

    /// Whether something was waited for since it began anew.
    pub(crate) fn is_running(&self) -> bool {
        self.0 > FIRST
    }

    /// Begins anew: the broker answered.
    pub(crate) fn reset(&mut self) {
        self.0 = FIRST;
    }
}
