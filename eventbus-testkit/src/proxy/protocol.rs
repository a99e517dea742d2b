//! What a proxy has to know of a protocol to lose the response to a request that was served.

use super::postgres::Session;

/// What passes over a wire.
///
/// Kafka, AMQP and RESP come with their adapters, as variants here and a `Watch` each.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub enum Protocol {
    /// Bytes of which nothing is known: [`LoseResponse`](super::WireFault::LoseResponse) does nothing.
    #[default]
    Opaque,
    /// That of PostgreSQL, version 3, without encryption. The responses to these statements are lost.
    Postgres(Statements),
}

/// Picks statements by their text.
#[derive(Clone, Copy, Debug)]
pub struct Statements(fn(&str) -> bool);

impl Statements {
    /// Those that a predicate is true of. It is given the first 512 bytes.
    #[must_use]
    pub fn matching(picks: fn(&str) -> bool) -> Self {
        Self(picks)
    }

    /// Those that commit: with a `COMMIT` anywhere.
    #[must_use]
    pub fn commits() -> Self {
        Self(|sql| {
            let words = sql.split(|one: char| !one.is_ascii_alphanumeric() && one != '_');
            words
                .into_iter()
                .any(|word| word.eq_ignore_ascii_case("commit"))
        })
    }

    pub(super) fn picks(self, sql: &str) -> bool {
        (self.0)(sql)
    }
}

impl Protocol {
    /// What follows one connection.
    pub(super) fn watch(self) -> Box<dyn Watch> {
        match self {
            Self::Opaque => Box::new(Nothing),
            Self::Postgres(statements) => Box::new(Session::new(statements)),
        }
    }
}

/// Follows what passes on one connection; bytes come in pieces of any size.
pub(super) trait Watch: Send {
    /// Looks at what the client sends, before it is passed on. While `is_armed`, says whether the
    /// response to something in it, or to something before, is to be lost.
    fn asks(&mut self, bytes: &[u8], is_armed: bool) -> bool;

    /// Looks at what the server sends.
    fn answers(&mut self, bytes: &[u8]) -> Answered;
}

/// What is to be done with what the server sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answered {
    /// How many bytes pass; what is behind them is lost.
    pub(super) passes: usize,
    /// Whether the response that is lost has come to its end.
    pub(super) is_served: bool,
}

struct Nothing;

impl Watch for Nothing {
    fn asks(&mut self, _: &[u8], _: bool) -> bool {
        false
    }

    fn answers(&mut self, bytes: &[u8]) -> Answered {
        Answered {
            passes: bytes.len(),
            is_served: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Statements;

    #[test]
    fn a_commit_is_found_wherever_it_stands() {
        for sql in ["COMMIT", "commit", "SELECT 1; COMMIT", "\n COMMIT;"] {
            assert!(Statements::commits().picks(sql), "{sql}");
        }
        for sql in [
            "BEGIN",
            "SELECT committed FROM orders",
            "UPDATE commit_log SET a = 1",
        ] {
            assert!(!Statements::commits().picks(sql), "{sql}");
        }
    }
}
