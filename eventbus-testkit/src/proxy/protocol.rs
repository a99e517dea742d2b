//! What a proxy has to know of a protocol to harm single requests and responses.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::time::Duration;

use super::amqp::AmqpMethods;
use super::kafka::Requests;
use super::redis::RedisCommands;
use super::{WireFault, amqp, kafka, postgres, redis};

/// What passes over a wire.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub enum Protocol {
    /// Bytes of which nothing is known: what harms single requests or responses does nothing.
    #[default]
    Opaque,
    /// That of PostgreSQL, version 3, without encryption. These statements are harmed, by
    /// [`LoseResponse`](WireFault::LoseResponse) and [`DelayRequest`](WireFault::DelayRequest).
    Postgres(Statements),
    /// That of Kafka, without encryption, of a cluster with one broker: the proxy names itself where
    /// the broker names its address, so that clients stay with it. These requests are harmed, by
    /// [`LoseResponse`](WireFault::LoseResponse), [`DelayRequest`](WireFault::DelayRequest) and
    /// [`Misreport`](WireFault::Misreport).
    Kafka(Requests),
    /// That of Redis (RESP), without encryption. These commands are harmed, by
    /// [`LoseResponse`](WireFault::LoseResponse), [`DelayRequest`](WireFault::DelayRequest) and
    /// [`Misreport`](WireFault::Misreport), which here refuses them in truth: the server does not see them.
    Redis(RedisCommands),
    /// AMQP 0.9.1, without encryption. These methods are harmed, by
    /// [`LoseResponse`](WireFault::LoseResponse), [`DelayRequest`](WireFault::DelayRequest) and
    /// [`Misreport`](WireFault::Misreport), which here closes the channel in their place.
    Amqp(AmqpMethods),
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
    /// What follows one connection to a proxy at this address.
    pub(super) fn watch(self, address: SocketAddr) -> Box<dyn Watch> {
        match self {
            Self::Opaque => Box::new(Nothing),
            Self::Postgres(statements) => Box::new(postgres::Session::new(statements)),
            Self::Kafka(requests) => Box::new(kafka::Session::new(requests, address)),
            Self::Redis(commands) => Box::new(redis::Session::new(commands)),
            Self::Amqp(methods) => Box::new(amqp::Session::new(methods)),
        }
    }
}

/// Follows what passes on one connection; bytes come in pieces of any size.
pub(super) trait Watch: Send {
    /// Looks at what the client sends, before it is passed on.
    fn asks<'b>(&mut self, bytes: &'b [u8], fault: WireFault) -> Asked<'b>;

    /// Looks at what the server sends.
    fn answers<'b>(&mut self, bytes: &'b [u8]) -> Answered<'b>;
}

/// What is to be done with what the client sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked<'b> {
    /// What passes in its place.
    pub(super) bytes: Cow<'b, [u8]>,
    /// Whether the response to something in it, or to something before, is to be lost.
    pub(super) loses: bool,
    /// How much later it is to arrive.
    pub(super) late: Option<Duration>,
}

impl<'b> Asked<'b> {
    /// What passes as it is.
    pub(super) fn passing(bytes: &'b [u8]) -> Self {
        Self {
            bytes: Cow::Borrowed(bytes),
            loses: false,
            late: None,
        }
    }
}

/// What is to be done with what the server sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answered<'b> {
    /// What passes in its place.
    pub(super) bytes: Cow<'b, [u8]>,
    /// Whether the response that is lost has come to its end.
    pub(super) is_served: bool,
    /// How many responses in it say an error that is none.
    pub(super) misreported: u64,
}

struct Nothing;

impl Watch for Nothing {
    fn asks<'b>(&mut self, bytes: &'b [u8], _: WireFault) -> Asked<'b> {
        Asked::passing(bytes)
    }

    fn answers<'b>(&mut self, bytes: &'b [u8]) -> Answered<'b> {
        Answered {
            bytes: Cow::Borrowed(bytes),
            is_served: false,
            misreported: 0,
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
