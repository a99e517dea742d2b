//! What an error says of an option of a URL: never what may be a password.

use eventbus_core::{Error, redacted_option};

/// Adds to an error which option is wrong. The value is shown only where the option is known: that of
/// another one, such as `password`, may be secret.
pub(crate) fn misread(error: Error, url: &str, option: (&str, &str), is_known: bool) -> Error {
    let (name, value) = option;
    let error = error.with("option", redacted_option(url, name));
    match is_known {
        true => error.with("value", redacted_option(url, value)),
        false => error,
    }
}
