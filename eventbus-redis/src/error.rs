//! What Redis's errors mean to a caller. Nothing else in this crate reads them.

use eventbus_core::{Error, ErrorKind, Retry};
use redis::RedisError;

/// Turns an error of the client into one that says what to do.
pub(crate) fn into_error(operation: &'static str, native: RedisError) -> Error {
    let (kind, retry, message) = meaning(operation, first(&native).as_ref().unwrap_or(&native));
    Error::new(kind, operation, message)
        .with_retry(retry)
        .with_source(native)
}

/// Of commands that go together, the first that was refused, which says why.
fn first(native: &RedisError) -> Option<RedisError> {
    let refused = native.clone().into_server_errors()?;
    Some(RedisError::from(refused.first()?.1.clone()))
}

/// Whether the server's memory is full.
pub(crate) fn is_full(native: &RedisError) -> bool {
    first(native).as_ref().unwrap_or(native).code() == Some("OOM")
}

/// Whether the server refused a command, so that it did nothing. Otherwise nobody knows.
pub(crate) fn is_refused(native: &RedisError) -> bool {
    matches!(
        native.kind(),
        redis::ErrorKind::Server(_)
            | redis::ErrorKind::Extension
            // The connection was not made, so nothing was sent.
            | redis::ErrorKind::AuthenticationFailed
    )
}

/// Kind, whether to try again, and what to do.
fn meaning(operation: &str, native: &RedisError) -> (ErrorKind, Retry, &'static str) {
    use ErrorKind::{
        Codec, Internal, InvalidInput, RateLimited, Unauthorized, Unavailable, Unsupported,
    };
    // A transaction that was given up says only that, and why in the errors of its commands.
    let errors = native.clone().into_server_errors();
    let first = errors.as_ref().and_then(|errors| errors.first());
    let code = first.map_or(native.code(), |(_, error)| Some(error.code()));
    let code = code.unwrap_or_default();
    match (native.kind(), code) {
        (redis::ErrorKind::AuthenticationFailed, _) | (_, "WRONGPASS" | "NOAUTH") => (
            Unauthorized,
            Retry::Never,
            "the server refuses user or password: look at both in the url, redis://USER:PASSWORD@HOST, or redis://:PASSWORD@HOST for the default user",
        ),
        (_, "NOPERM") => (
            Unauthorized,
            Retry::Never,
            "the server does not let this user do that: give it the keys of its topics and `eventbus:*`, and the commands that docs/brokers/redis.md lists",
        ),
        (_, "OOM") => (
            RateLimited,
            Retry::Later,
            "the server's memory is full: raise its `maxmemory`, shorten the retention of topics, or see which group does not read",
        ),
        (_, "MISCONF") => (
            Unavailable,
            Retry::Later,
            "the server cannot write to its disk and takes nothing: look at its log and the room on its disk",
        ),
        (_, "LOADING") => (
            Unavailable,
            Retry::Later,
            "the server reads its data after a start: it is tried again",
        ),
        (_, "BUSY" | "TRYAGAIN" | "UNBLOCKED") => (
            Unavailable,
            Retry::Later,
            "the server is busy with something else, such as a script that runs long: it is tried again",
        ),
        (_, "READONLY" | "MASTERDOWN") => (
            Unavailable,
            Retry::Later,
            "the server is a replica, perhaps since a failover: name the primary in the url",
        ),
        (_, "MOVED" | "ASK" | "CLUSTERDOWN" | "CROSSSLOT") => (
            Unsupported,
            Retry::Never,
            "the server is part of a cluster, which this broker does not use: name one that is not",
        ),
        // The writer's own says nothing of a code.
        (redis::ErrorKind::Extension, "") | (_, "NOREPLICAS") => (
            Unavailable,
            Retry::Later,
            "fewer replicas have what was written than `replicas`, or `min-replicas-to-write` of the server, asks for: look at them",
        ),
        (_, "WRONGTYPE") => (
            InvalidInput,
            Retry::Never,
            "a key with a topic's name is no stream: remove it, or give the bus a prefix for its topics",
        ),
        (redis::ErrorKind::Parse, _) => (
            Unavailable,
            Retry::Later,
            "the answer is none of Redis's: something else answers at host and port, or TLS is expected there (rediss://)",
        ),
        (redis::ErrorKind::UnexpectedReturnType, _) => (
            Codec,
            Retry::Never,
            "a value is not what the broker wrote: somebody else wrote to the keys `eventbus:*`",
        ),
        (redis::ErrorKind::InvalidClientConfig, _) => (
            InvalidInput,
            Retry::Never,
            "the client cannot be set up so: the url is redis://USER:PASSWORD@HOST:PORT/DATABASE",
        ),
        _ if is_about_trust(native) => (
            Unauthorized,
            Retry::Never,
            "TLS is refused: look at `tls_ca`, by which the server is trusted, and at `tls_cert` and `tls_key`, by which it may trust this client",
        ),
        _ if native.is_connection_refusal() => (
            Unavailable,
            Retry::Later,
            "no server answers there: look at host and port, and whether it runs",
        ),
        _ if native.is_timeout() => (
            Unavailable,
            Retry::Later,
            "the server did not answer in time: look at its host, port and load, or raise `timeout`",
        ),
        // What it said of TLS may be lost with the connection.
        _ if native.is_connection_dropped() && operation == "connect" => (
            Unavailable,
            Retry::Later,
            "the server ended the connection while it was made: look at its log, and, where its port speaks TLS, at `tls_cert` and `tls_key`, which it may ask for",
        ),
        _ if native.is_io_error() => (
            Unavailable,
            Retry::Later,
            "the server cannot be reached or has closed the connection: look at its host, network and log",
        ),
        _ => (
            Internal,
            Retry::Never,
            "the server refused a command: its answer says why",
        ),
    }
}

/// Whether one side does not trust the other's certificate: the client has no kind for it.
fn is_about_trust(native: &RedisError) -> bool {
    let text = native.to_string();
    native.is_io_error() && (text.contains("certificate") || text.contains("fatal alert"))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn server(text: &str) -> RedisError {
        let reply = redis::parse_redis_value(format!("-{text}\r\n").as_bytes());
        let value = reply.expect("a reply");
        value.extract_error().expect_err("an error")
    }

    #[test]
    fn an_error_says_what_to_do() {
        use ErrorKind::{
            Internal, InvalidInput, RateLimited, Unauthorized, Unavailable, Unsupported,
        };
        let cases = [
            (
                "WRONGPASS invalid username-password pair or user is disabled.",
                Unauthorized,
                false,
                "user or password",
            ),
            (
                "NOAUTH Authentication required.",
                Unauthorized,
                false,
                "user or password",
            ),
            (
                "NOPERM this user has no permissions",
                Unauthorized,
                false,
                "eventbus:*",
            ),
            (
                "OOM command not allowed when used memory > 'maxmemory'.",
                RateLimited,
                true,
                "memory is full",
            ),
            (
                "MISCONF Redis is configured to save RDB snapshots",
                Unavailable,
                true,
                "disk",
            ),
            (
                "LOADING Redis is loading the dataset in memory",
                Unavailable,
                true,
                "after a start",
            ),
            (
                "READONLY You can't write against a read only replica.",
                Unavailable,
                true,
                "replica",
            ),
            ("MOVED 1 127.0.0.1:1", Unsupported, false, "cluster"),
            (
                "WRONGTYPE Operation against a key holding the wrong kind of value",
                InvalidInput,
                false,
                "no stream",
            ),
            (
                "BUSY Redis is busy running a script.",
                Unavailable,
                true,
                "busy",
            ),
            ("ERR unknown command", Internal, false, "says why"),
        ];
        for (text, kind, retryable, advice) in cases {
            let native = server(text);
            assert!(is_refused(&native), "{text}");
            let error = into_error("publish", native);
            assert_eq!(
                (error.kind(), error.is_retryable()),
                (kind, retryable),
                "{text}"
            );
            assert!(error.to_string().contains(advice), "{error}");
        }
    }

    #[test]
    fn a_server_that_is_away_is_asked_again() {
        for kind in [
            io::ErrorKind::ConnectionRefused,
            io::ErrorKind::BrokenPipe,
            io::ErrorKind::TimedOut,
        ] {
            let native = RedisError::from(io::Error::from(kind));
            assert!(!is_refused(&native), "{kind}");
            let error = into_error("publish", native);
            assert_eq!(
                (error.kind(), error.is_retryable()),
                (ErrorKind::Unavailable, true),
                "{kind}"
            );
        }
    }
}
