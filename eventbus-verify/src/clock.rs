//! The clock that all processes of a machine share.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`: since the machine began, in every process alike, and never
/// set by anybody.
#[must_use]
pub fn monotonic_nanos() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    // Neither is ever negative on this clock, and a machine does not run for 584 years.
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
