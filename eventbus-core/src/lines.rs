//! Several headers as one text, with a line `name: value` for each: for adapters of brokers whose
//! clients take memory for every header of a message.
//!
//! A line has nothing but its name, a colon, a space and its value, and every tool shows the lines as
//! the text that they are. What has no room on one, such as a value of several lines, ends the text
//! and is a header of its own.

use crate::message::{Headers, HeadersBuilder};

/// What the lines are called on a message.
pub const NAME: &str = "eb-headers";

/// What the names of the SDK's own headers begin with.
pub const OURS: &[u8] = b"eb-";

/// Writes the lines of the headers at the front whose names begin with `prefix`, and says how many
/// those are.
pub fn write(headers: &Headers, prefix: &[u8], lines: &mut Vec<u8>) -> usize {
    lines.clear();
    let mut count = 0;
    for (name, value) in headers.iter_bytes() {
        let fits = begins_with(name, prefix)
            && !name.iter().any(|byte| matches!(byte, b':' | b'\n'))
            && memchr::memchr(b'\n', value).is_none();
        if !fits {
            break;
        }
        lines.extend_from_slice(name);
        lines.extend_from_slice(b": ");
        lines.extend_from_slice(value);
        lines.push(b'\n');
        count += 1;
    }
    if std::str::from_utf8(lines).is_err() {
        // A value is no text, which no tool would show.
        lines.clear();
        return 0;
    }
    count
}

/// Reads lines into a set of headers; `None` where they are none of these, but a header of somebody
/// else.
pub fn read(lines: &[u8], prefix: &[u8], mut headers: HeadersBuilder) -> Option<HeadersBuilder> {
    // Looked at once: names are too short for that to be quick.
    let mut text = std::str::from_utf8(lines).ok()?;
    while !text.is_empty() {
        let colon = text.bytes().position(|byte| byte == b':')?;
        let (name, value) = text.split_at(colon);
        let value = value.strip_prefix(": ")?;
        if !begins_with(name.as_bytes(), prefix) || name.contains('\n') {
            return None;
        }
        let end = memchr::memchr(b'\n', value.as_bytes())?;
        headers.add(name, &value.as_bytes()[..end]).ok()?;
        text = &value[end + 1..];
    }
    Some(headers)
}

/// No prefix needs no look: comparing nothing at an address where nothing is takes a processor's
/// detour, which is a tenth of all that a message costs.
fn begins_with(name: &[u8], prefix: &[u8]) -> bool {
    prefix.is_empty() || name.starts_with(prefix)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(of: &[(&str, &[u8])]) -> Headers {
        let mut headers = Headers::builder();
        for (name, value) in of {
            headers = headers.push(name, value).expect("a good header");
        }
        headers.build()
    }

    fn lines(of: &Headers) -> (Vec<u8>, usize) {
        let mut lines = vec![7];
        let count = write(of, OURS, &mut lines);
        (lines, count)
    }

    #[test]
    fn ours_at_the_front_are_lines_of_text() {
        let all = headers(&[
            ("eb-id", b"17"),
            ("eb-source", b""),
            ("content-type", b"application/json"),
            ("eb-data", b"1-2"),
        ]);
        let (lines, count) = lines(&all);
        assert_eq!(lines, b"eb-id: 17\neb-source: \n");
        assert_eq!(count, 2, "the order of the rest is kept");
    }

    #[test]
    fn what_does_not_fit_on_a_line_has_a_header_of_its_own() {
        for (name, value) in [
            ("eb-a:b", "x"),
            ("eb-a\n", "x"),
            ("eb-dlq-cause", "one\ntwo"),
        ] {
            let all = headers(&[("eb-id", b"17"), (name, value.as_bytes())]);
            assert_eq!(lines(&all), (b"eb-id: 17\n".to_vec(), 1), "{name}");
        }
    }

    #[test]
    fn what_is_no_text_is_on_no_line() {
        let all = headers(&[("eb-id", b"17"), ("eb-bytes", b"\xff")]);
        assert_eq!(lines(&all), (Vec::new(), 0));
    }

    #[test]
    fn a_header_of_somebody_else_is_no_lines() {
        for text in [
            "x",
            "x: 17\n",
            "eb-id: 17",
            "eb-id:17\n",
            ": 17\n",
            "eb-id: 17\n\n",
            "eb-id: 17\n\neb-type: x\n",
        ] {
            let read = read(text.as_bytes(), OURS, Headers::builder());
            assert!(read.is_none(), "{text:?}");
        }
        let name: Vec<u8> = [b"eb-", &[b'n'; 256][..], b": 17\n"].concat();
        assert!(
            read(&name, OURS, Headers::builder()).is_none(),
            "too long a name"
        );
        assert!(read(b"\xff: 17\n", OURS, Headers::builder()).is_none());
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_was_written(
            all in proptest::collection::vec(("(eb-)?[a-z:\n]{1,9}", "[a-z:\n\u{e9}]{0,9}"), 0..9),
        ) {
            let all: Vec<_> = all.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
            let all = headers(&all);
            let (lines, count) = lines(&all);
            let read = read(&lines, OURS, Headers::builder()).expect("lines").build();
            let front: Vec<_> = all.iter().take(count).collect();
            prop_assert_eq!(read.iter().collect::<Vec<_>>(), front);
        }

        #[test]
        fn what_is_read_is_written_as_it_was(text in "(eb-[a-c:]{0,2}: [a-c:]{0,2}\n|[eb:\\- \n]){0,4}") {
            if let Some(read) = read(text.as_bytes(), OURS, Headers::builder()) {
                let (again, _) = lines(&read.build());
                prop_assert_eq!(again, text.into_bytes());
            }
        }
    }
}
