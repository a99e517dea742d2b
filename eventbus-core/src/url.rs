//! URLs of brokers: as they may be shown, without what may be a password, and what stands in all of them
//! alike.

use std::time::Duration;

use percent_encoding::percent_decode_str;

/// A URL without its user, password and options.
///
/// Whatever stands before the last `@` counts as secret: a password in a URL may hold any character,
/// if somebody forgot to escape it, and this is for messages about URLs that are wrong.
///
/// # Examples
///
/// ```
/// use eventbus_core::redacted_url;
///
/// assert_eq!(redacted_url("kafka://ann:pa?ss@host:9092/?acks=all"), "kafka://***@host:9092/");
/// assert_eq!(redacted_url("sqlite://shop.db?lease=5s"), "sqlite://shop.db");
/// ```
#[must_use]
pub fn redacted_url(url: &str) -> String {
    let without_options = |text: &str| text.split('?').next().unwrap_or_default().to_owned();
    let Some((user, host)) = url.rsplit_once('@') else {
        return without_options(url);
    };
    let host = without_options(host);
    match user.split_once(':') {
        Some((scheme, _)) if is_scheme(scheme) => format!("{scheme}://***@{host}"),
        _ => format!("***@{host}"),
    }
}

/// The name of an option of `url`, for a message about it: hidden where it may be a part of a
/// password that has a `?`.
#[must_use]
pub fn redacted_option<'o>(url: &str, option: &'o str) -> &'o str {
    let is_behind = url
        .split_once('?')
        .is_some_and(|(_, behind)| behind.contains('@'));
    if is_behind { "***" } else { option }
}

/// Reads a time as an option of a URL names it: a whole number with one of the units `ms`, `s`, `m`,
/// `h` and `d`; `None` where it is none.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use eventbus_core::duration;
///
/// assert_eq!(duration("90s"), Some(Duration::from_secs(90)));
/// assert_eq!(duration("90"), None);
/// ```
#[must_use]
pub fn duration(text: &str) -> Option<Duration> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let number: u32 = number.parse().ok()?;
    let unit = match unit {
        "ms" => Duration::from_millis(1),
        "s" => Duration::from_secs(1),
        "m" => Duration::from_secs(60),
        "h" => Duration::from_secs(60 * 60),
        "d" => Duration::from_secs(24 * 60 * 60),
        _ => return None,
    };
    unit.checked_mul(number)
}

/// Reads `USER:PASSWORD` as it stands in a URL, with %-codes; `None` where it is not that.
#[must_use]
pub fn credentials(text: &str) -> Option<(String, String)> {
    let (user, password) = text.split_once(':')?;
    let decoded = |text| Some(percent_decode_str(text).decode_utf8().ok()?.into_owned());
    Some((decoded(user)?, decoded(password)?))
}

/// Reads `HOST` or `HOST:PORT`, where an IPv6 address stands in brackets, and gives it with a port;
/// `None` where it is neither.
///
/// # Examples
///
/// ```
/// use eventbus_core::host_and_port;
///
/// assert_eq!(host_and_port("[::1]", 9092).as_deref(), Some("[::1]:9092"));
/// assert_eq!(host_and_port("one:9", 9092).as_deref(), Some("one:9"));
/// assert_eq!(host_and_port(":9", 9092), None);
/// ```
#[must_use]
pub fn host_and_port(text: &str, port: u16) -> Option<String> {
    let is_v6 = text.starts_with('[');
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !is_v6 || host.ends_with(']') => (host, port.parse::<u16>().ok()?),
        _ => (text, port),
    };
    (!host.is_empty()).then(|| format!("{host}:{port}"))
}

fn is_scheme(text: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'.' | b'-');
    !text.is_empty() && text.bytes().all(is_letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_not_shown_whatever_characters_it_has() {
        for url in [
            "kafka://user:secret@broker:9092/?sasl.password=secret",
            "amqp://u:p@ss:secret@host/%2f",
            "redis://:secret@host:6379/0?password=secret",
            "kafka:user:secret@host",
            "kafka::/user:secret@host/",
            "kafka://user:se?secret@host",
            "kafka://user:1/secret?secret@host",
            "user secret@host",
        ] {
            assert!(!redacted_url(url).contains("secret"), "{url}");
        }
        assert_eq!(redacted_url("memory:?like=kafka"), "memory:");
        assert_eq!(redacted_url("kafka://host/"), "kafka://host/");
    }

    #[test]
    fn an_option_is_named_unless_it_may_be_a_part_of_a_password() {
        assert_eq!(redacted_option("kafka://host/?leese=5s", "leese"), "leese");
        assert_eq!(
            redacted_option("kafka://u:a?secret&b@host", "secret"),
            "***"
        );
    }
}
