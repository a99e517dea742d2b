//! The date. Time that passes is tokio's everywhere; a clock only says what the calendar shows.

use std::borrow::Cow;
use std::fmt::{self, Debug};
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::error::{Error, ErrorKind, Result};

/// Longest time that is waited: as good as never, and an instant that far ahead can still be said.
pub(crate) const FOREVER: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// Says what time it is, for timestamps, expiry and dead letters.
pub trait Clock: Debug + Send + Sync + 'static {
    /// The present time.
    fn now(&self) -> Timestamp;
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
#[allow(clippy::exhaustive_structs, reason = "it has nothing to add")]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::from(SystemTime::now())
    }
}

/// A date and time in microseconds since 1970, UTC; shown as RFC 3339.
///
/// # Examples
///
/// ```
/// use eventbus_core::Timestamp;
///
/// let time: Timestamp = "2026-11-21T07:00:00.5Z".parse()?;
/// assert_eq!(time.as_micros(), 1_795_244_400_500_000);
/// assert_eq!(time.to_string(), "2026-11-21T07:00:00.5Z");
/// # Ok::<(), eventbus_core::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

/// More than a date and a time with nine digits behind the second and an offset take.
pub(crate) const RFC_3339_MAX: usize = 40;

impl Timestamp {
    /// So many microseconds since 1970, UTC.
    #[must_use]
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since 1970, UTC.
    pub const fn as_micros(self) -> i64 {
        self.0
    }

    /// The time since `earlier`, zero when that is later.
    pub fn since(self, earlier: Timestamp) -> Duration {
        let micros = self.0.saturating_sub(earlier.0);
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    }

    /// This time and `duration` more.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        Self(self.0.saturating_add(micros))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(since) => Self(i64::try_from(since.as_micros()).unwrap_or(i64::MAX)),
            Err(before) => Self(
                i64::try_from(before.duration().as_micros()).map_or(i64::MIN, |micros| -micros),
            ),
        }
    }
}

impl Timestamp {
    /// As it is shown, written into `buffer`.
    pub(crate) fn text<'b>(&self, buffer: &'b mut [u8; RFC_3339_MAX]) -> Cow<'b, str> {
        let mut rest = buffer.as_mut_slice();
        let date = OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0) * 1000);
        let written = date.is_ok_and(|date| date.format_into(&mut rest, &Rfc3339).is_ok());
        // What it answers counts too little of a fraction (time 0.3).
        let length = RFC_3339_MAX - rest.len();
        let text = std::str::from_utf8(&buffer[..length]);
        match text.ok().filter(|_| written) {
            Some(text) => Cow::Borrowed(text),
            // Years beyond 9999 have no RFC 3339 form.
            None => Cow::Owned(format!("{}us", self.0)),
        }
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text(&mut [0; RFC_3339_MAX]))
    }
}

impl Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Timestamp {
    type Err = Error;

    /// Reads RFC 3339, and what `Display` writes for times that have no such form.
    fn from_str(text: &str) -> Result<Self> {
        if let Some(Ok(micros)) = text.strip_suffix("us").map(str::parse) {
            return Ok(Self(micros));
        }
        let date = OffsetDateTime::parse(text, &Rfc3339).map_err(|error| {
            Error::new(
                ErrorKind::Codec,
                "read time",
                "not a time as RFC 3339 writes it, such as 2026-01-01T00:00:00Z",
            )
            .with("time", format_args!("{text:?}"))
            .with_source(error)
        })?;
        Ok(Self((date.unix_timestamp_nanos() / 1000) as i64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_and_fractions_are_read() {
        let utc: Timestamp = "2026-11-21T07:00:00Z".parse().expect("a time");
        let offset: Timestamp = "2026-11-21T09:00:00+02:00".parse().expect("a time");
        assert_eq!(utc, offset);
        let micros: Timestamp = "2026-11-21T07:00:00.123456789Z".parse().expect("a time");
        assert_eq!(micros.to_string(), "2026-11-21T07:00:00.123456Z");
        assert!("yesterday".parse::<Timestamp>().is_err());
    }

    #[test]
    fn every_time_is_read_as_it_was_written() {
        for time in [i64::MIN, -1, 0, 1_795_244_400_500_000, i64::MAX].map(Timestamp) {
            assert_eq!(time.to_string().parse::<Timestamp>().expect("a time"), time);
        }
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(Timestamp(5).since(Timestamp(9)), Duration::ZERO);
        assert_eq!(
            Timestamp(i64::MAX).plus(Duration::MAX).as_micros(),
            i64::MAX
        );
    }
}
