//! What is hidden before anything is shown: the passwords of URLs, wherever they stand.

/// The text with the credentials and options of every URL in it replaced by `***`.
pub(crate) fn hidden(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(begin) = rest.find("://") {
        let (before, url) = rest.split_at(begin + "://".len());
        shown.push_str(before);
        let end = url.find(ends_url).unwrap_or(url.len());
        let (url, behind) = url.split_at(end);
        shown.push_str(&without_secrets(url));
        rest = behind;
    }
    shown.push_str(rest);
    shown
}

fn ends_url(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\'' | '"' | '`' | ')' | ',')
}

fn without_secrets(url: &str) -> String {
    // A password may hold any of these characters: what is behind the last `@` is the host.
    let (hidden, host) = match url.rsplit_once('@') {
        Some((_, host)) => ("***@", host),
        None => ("", url),
    };
    let (host, options) = host
        .split_once('?')
        .map_or((host, ""), |(host, _)| (host, "?***"));
    format!("{hidden}{host}{options}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert, proptest};

    use super::hidden;

    proptest! {
        #[test]
        fn no_text_shows_what_stands_in_a_url_before_its_host(
            before in ".*",
            user in "[a-z0-9:@?/%#&=]*",
            option in "[a-z]*",
        ) {
            let text = format!("{before} kafka://{user}:hunter2@host/?{option}=hunter2");
            prop_assert!(before.contains("hunter2") || !hidden(&text).contains("hunter2"));
            // Whatever it is, it has an end.
            drop(hidden(&before));
        }
    }

    #[test]
    fn credentials_and_options_are_hidden_and_the_rest_is_kept() {
        for (text, shown) in [
            ("nothing to hide", "nothing to hide"),
            (
                "no file at sqlite://shop.db: create it",
                "no file at sqlite://shop.db: create it",
            ),
            (
                "unexpected 'kafka://ann:pa@ss@host:9092/?sasl.password=secret' found",
                "unexpected 'kafka://***@host:9092/?***' found",
            ),
            (
                "a redis://:x@one and amqp://u:y@two",
                "a redis://***@one and amqp://***@two",
            ),
            (
                "open sqlite:///a/b.db?key=secret (why)",
                "open sqlite:///a/b.db?*** (why)",
            ),
        ] {
            assert_eq!(hidden(text), shown);
        }
    }
}
