//! What errors of many events have in common: their text without what differs from event to event.

/// Most characters of a fingerprint; the beginning of an error says what happened.
const LENGTH_MAX: usize = 200;

/// From this length on a word of hexadecimal digits is an identifier.
const HEX_LENGTH_MIN: usize = 8;

/// From this length on a word with two digits is an identifier.
const MIXED_LENGTH_MIN: usize = 16;

/// The cause and the error's text with placeholders: `<n>` for numbers, `<id>` for identifiers,
/// `<text>` for what stands in quotes.
pub(super) fn fingerprint(cause: &str, error: &str) -> String {
    let mut found = format!("{cause}: ");
    let mut rest = error;
    while let Some(first) = rest.chars().next() {
        if found.chars().count() >= LENGTH_MAX {
            break;
        }
        let before = found.chars().next_back();
        let length = if let Some(length) = quoted(rest, before) {
            found.push_str("<text>");
            length
        } else if first.is_ascii_alphanumeric() {
            let length = word(rest);
            push_word(&mut found, &rest[..length]);
            length
        } else {
            match first.is_whitespace() {
                true if before == Some(' ') => {}
                true => found.push(' '),
                false => found.push(first),
            }
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    match found.char_indices().nth(LENGTH_MAX) {
        Some((end, _)) => found.truncate(end),
        None => found.truncate(found.trim_end().len()),
    }
    found
}

/// The length of a quoted part that `text` begins with; an apostrophe in a word begins none.
fn quoted(text: &str, before: Option<char>) -> Option<usize> {
    let quote = text
        .chars()
        .next()
        .filter(|first| "\"'`".contains(*first))?;
    if quote == '\'' && before.is_some_and(char::is_alphanumeric) {
        return None;
    }
    let mut closing = text
        .match_indices(quote)
        .skip(1)
        .map(|(index, _)| index + 1);
    closing.find(|end| {
        let behind = text[*end..].chars().next();
        quote != '\'' || !behind.is_some_and(char::is_alphanumeric)
    })
}

/// The length of the word that `text` begins with. `-` and `_` join words, a point joins digits.
fn word(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut end = 1;
    while let Some(byte) = bytes.get(end) {
        let next = bytes.get(end + 1);
        let joins = match byte {
            b'-' | b'_' => next.is_some_and(u8::is_ascii_alphanumeric),
            b'.' => bytes[end - 1].is_ascii_digit() && next.is_some_and(u8::is_ascii_digit),
            byte => byte.is_ascii_alphanumeric(),
        };
        if !joins {
            break;
        }
        end += 1;
    }
    end
}

fn push_word(found: &mut String, word: &str) {
    if is_id(word) {
        return found.push_str("<id>");
    }
    let mut in_number = false;
    for (index, char) in word.char_indices() {
        let is_point = in_number && char == '.' && word[index + 1..].starts_with(is_digit);
        let is_number = is_digit(char) || is_point;
        match (is_number, in_number) {
            (true, true) => {}
            (true, false) => found.push_str("<n>"),
            (false, _) => found.push(char),
        }
        in_number = is_number;
    }
}

fn is_digit(char: char) -> bool {
    char.is_ascii_digit()
}

fn is_id(word: &str) -> bool {
    let address = word.strip_prefix("0x").filter(|rest| !rest.is_empty());
    if address.is_some_and(|rest| rest.chars().all(|char| char.is_ascii_hexdigit())) {
        return true;
    }
    let digits = word.chars().filter(|char| is_digit(*char)).count();
    let letters = word.chars().filter(char::is_ascii_alphabetic).count();
    let hex = word.chars().filter(char::is_ascii_hexdigit).count();
    let is_hex = hex == digits + letters && hex >= HEX_LENGTH_MIN;
    letters > 0 && digits > 0 && (is_hex || (word.len() >= MIXED_LENGTH_MIN && digits >= 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(error: &str) -> String {
        let found = fingerprint("error", error);
        found["error:".len()..].trim_start().to_owned()
    }

    #[test]
    fn what_differs_from_event_to_event_has_a_placeholder() {
        for (error, expected) in [
            (
                "no label for parcel 17: out of paper",
                "no label for parcel <n>: out of paper",
            ),
            (
                "order 0192f1c4-0000-7000-8000-000000000000 is gone",
                "order <id> is gone",
            ),
            (
                "no user \"Ann O'Neill\", nor 'Bob'",
                "no user <text>, nor <text>",
            ),
            ("can't charge, won't ship", "can't charge, won't ship"),
            (
                "at 0x7ffd3a2b, code E42, commit 9fceb02a",
                "at <id>, code E<n>, commit <id>",
            ),
            (
                "took 1.5s of 12ms to 10.0.0.1:9092",
                "took <n>s of <n>ms to <n>:<n>",
            ),
            ("charge u-17\n  refused", "charge u-<n> refused"),
            ("key 01ARZ3NDEKTSV4RRFFQ69G5FAV", "key <id>"),
            ("an unclosed \"quote 7", "an unclosed \"quote <n>"),
            ("größe 3 überschritten", "größe <n> überschritten"),
            ("", ""),
        ] {
            assert_eq!(of(error), expected);
        }
    }

    #[test]
    fn it_is_bounded_and_stable() {
        let long = fingerprint("error", &"größe ".repeat(1000));
        assert_eq!(long.chars().count(), LENGTH_MAX);
        for error in ["order 7 of 'x' at 0x7ffd3a2b", "a  b\tc 1.2.3", "'"] {
            assert_eq!(of(&of(error)), of(error));
        }
    }
}
