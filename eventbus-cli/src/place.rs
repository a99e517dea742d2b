//! Places on a topic as they are written on the command line: `earliest`, `15m`, a date, a position.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use eventbus::prelude::{Start, Until};
use eventbus::{Position, Timestamp};

/// Reads where to begin.
pub(crate) fn start(text: &str) -> Result<Start, String> {
    match text {
        "earliest" => return Ok(Start::Earliest),
        "latest" => return Ok(Start::Latest),
        _ => {}
    }
    match text.parse() {
        Ok(position) => Ok(Start::Position(Position(position))),
        Err(_) => time(text).map(Start::Time).ok_or_else(|| {
            "say earliest, latest, how long ago (15m, 2h, 7d), a time (2026-11-21T07:00:00Z) or a position (17)".to_owned()
        }),
    }
}

/// Reads where to end.
pub(crate) fn until(text: &str) -> Result<Until, String> {
    if text == "now" {
        return Ok(Until::Now);
    }
    match text.parse() {
        Ok(position) => Ok(Until::Position(Position(position))),
        Err(_) => time(text).map(Until::Time).ok_or_else(|| {
            "say now, how long ago (15m, 2h, 7d), a time (2026-11-21T07:00:00Z) or a position (17)"
                .to_owned()
        }),
    }
}

fn time(text: &str) -> Option<SystemTime> {
    if let Ok(ago) = humantime::parse_duration(text) {
        return SystemTime::now().checked_sub(ago);
    }
    let micros = text.parse::<Timestamp>().ok()?.as_micros();
    UNIX_EPOCH.checked_add(Duration::from_micros(u64::try_from(micros).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert, proptest};

    proptest! {
        #[test]
        fn any_text_is_a_place_or_is_told_what_is(text in "([0-9]{1,40}[a-z]{0,4}|[-0-9TZ:.+]{0,40}|.*)") {
            for refused in [start(&text).err(), until(&text).err()].into_iter().flatten() {
                prop_assert!(refused.contains("15m"));
            }
        }
    }

    #[test]
    fn every_way_to_say_a_place_is_read() {
        assert_eq!(start("earliest"), Ok(Start::Earliest));
        assert_eq!(start("latest"), Ok(Start::Latest));
        assert_eq!(start("17"), Ok(Start::Position(Position(17))));
        assert_eq!(until("now"), Ok(Until::Now));
        let day = UNIX_EPOCH + Duration::from_secs(24 * 60 * 60);
        assert_eq!(start("1970-01-02T00:00:00Z"), Ok(Start::Time(day)));
        assert_eq!(until("1970-01-02T01:00:00+01:00"), Ok(Until::Time(day)));
        let Ok(Start::Time(then)) = start("15m") else {
            panic!("a time");
        };
        let ago = then.elapsed().expect("it has passed");
        assert!(ago >= Duration::from_secs(15 * 60) && ago < Duration::from_secs(16 * 60));
        assert!(start("yesterday").is_err_and(|text| text.contains("15m")));
        assert!(until("latest").is_err());
    }
}
