//! What PostgreSQL's error codes mean to a caller. Nothing else in this crate reads them.

use std::io;

use eventbus_core::{Error, ErrorKind, Retry};
use sqlx::postgres::{PgDatabaseError, PgSeverity};

/// Turns an error of the driver into one that says what to do.
pub(super) fn into_error(operation: &'static str, native: sqlx::Error) -> Error {
    let (kind, retry, message) = match code_of(&native) {
        Some(code) => meaning(&code),
        None => driver_meaning(&native),
    };
    Error::new(kind, operation, message)
        .with_retry(retry)
        .with_source(native)
}

/// Whether the connection is gone, so that what became of the statement is not known. What the
/// server refuses in the middle of a connection is not done.
pub(super) fn is_loss(native: &sqlx::Error) -> bool {
    let refused = match native {
        sqlx::Error::Database(error) => error.try_downcast_ref::<PgDatabaseError>(),
        sqlx::Error::Encode(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => {
            return false;
        }
        _ => None,
    };
    !refused.is_some_and(|refused| matches!(refused.severity(), PgSeverity::Error))
}

/// Whether the server could not write, whatever it was given: it has no room, its disk fails, or it is
/// read only.
pub(super) fn cannot_write(native: &sqlx::Error) -> bool {
    code_of(native).is_some_and(|code| {
        code == "25006" || matches!(code.get(..2).unwrap_or_default(), "53" | "58")
    })
}

/// PostgreSQL's code of an error that the server answered.
pub(super) fn code_of(native: &sqlx::Error) -> Option<String> {
    Some(native.as_database_error()?.code()?.into_owned())
}

fn driver_meaning(native: &sqlx::Error) -> (ErrorKind, Retry, &'static str) {
    use ErrorKind::{Closed, Codec, Internal, InvalidInput, Unavailable};
    match native {
        sqlx::Error::PoolClosed => (
            Closed,
            Retry::Never,
            "the database was closed: connect again",
        ),
        sqlx::Error::PoolTimedOut => (
            Unavailable,
            Retry::Later,
            "no connection could be had in time: the server is away, or all connections are busy; look at the server, or raise `connections`",
        ),
        sqlx::Error::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => (
            Unavailable,
            Retry::Later,
            "no server answers there: look at host and port, and whether it runs",
        ),
        _ if is_about_encryption(native) => (
            Unavailable,
            Retry::Never,
            "the connection cannot be encrypted as asked for: look at `sslmode` and `sslrootcert`, and at the server's certificate",
        ),
        sqlx::Error::Io(_) => (
            Unavailable,
            Retry::Later,
            "the server cannot be reached or has closed the connection: look at its host, network and log",
        ),
        sqlx::Error::Configuration(_) => (
            InvalidInput,
            Retry::Never,
            "the url cannot be used: it is postgres://USER:PASSWORD@HOST:PORT/DATABASE",
        ),
        sqlx::Error::Protocol(_) => (
            Unavailable,
            Retry::Later,
            "the answer breaks off or is none of PostgreSQL's: the server stopped in the middle of it, or something else answers at host and port",
        ),
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => (
            Codec,
            Retry::Never,
            "a row is not what the broker wrote: somebody else wrote to its tables; restore them from a copy",
        ),
        _ => (
            Internal,
            Retry::Never,
            "the driver answered what it should not",
        ),
    }
}

/// A certificate that is not trusted comes as data that cannot be read.
fn is_about_encryption(native: &sqlx::Error) -> bool {
    match native {
        sqlx::Error::Tls(_) => true,
        sqlx::Error::Io(error) => error.kind() == io::ErrorKind::InvalidData,
        _ => false,
    }
}

/// Kind, whether to try again, and what to do.
fn meaning(code: &str) -> (ErrorKind, Retry, &'static str) {
    use ErrorKind::{Codec, Internal, InvalidInput, NotFound, Unauthorized, Unavailable};
    match (code, code.get(..2).unwrap_or_default()) {
        (_, "28") => (
            Unauthorized,
            Retry::Never,
            "the server refuses user or password: look at both, and at the server's pg_hba.conf",
        ),
        ("3D000", _) => (
            NotFound,
            Retry::Never,
            "the server has no such database: create it, or name another one in the url",
        ),
        ("42501", _) => (
            Unauthorized,
            Retry::Never,
            "the role may not do that: give it usage of the schema and all rights on its tables, and let a role that may create tables run `PostgresBroker::migrations`",
        ),
        ("25006", _) => (
            Unavailable,
            Retry::Later,
            "the server takes no writes, it is a standby or set to read only: name the primary, or wait until it is one",
        ),
        ("53300", _) => (
            Unavailable,
            Retry::Later,
            "the server has no connection left: raise its max_connections, or lower `connections`",
        ),
        ("53100", _) => (
            Unavailable,
            Retry::Later,
            "the server's disk is full: free some space; what was refused can be published again",
        ),
        (_, "53" | "58") => (
            Unavailable,
            Retry::Later,
            "the server is out of memory or its disk fails: look at its log",
        ),
        ("57014" | "55P03", _) => (
            Unavailable,
            Retry::Later,
            "the statement took too long or was cancelled: look who holds locks on the broker's tables, or raise `timeout`",
        ),
        (_, "57" | "08") => (
            Unavailable,
            Retry::Later,
            "the server is stopping or starting, or the connection was ended: the next call opens another",
        ),
        ("25P03" | "25P04", _) => (
            Unavailable,
            Retry::Later,
            "the server ended a transaction in which nothing happened for too long: open it later, wait for nobody meanwhile, or raise `timeout`",
        ),
        ("25P02", _) => (
            InvalidInput,
            Retry::Never,
            "a statement of this transaction failed before, so all of it is undone: return the error of that statement, or have it run under a savepoint that was begun before it (`connection.begin()`)",
        ),
        ("22021", _) => (
            InvalidInput,
            Retry::Never,
            "a text has a NUL character, which PostgreSQL does not keep",
        ),
        (_, "40" | "55") => (
            Unavailable,
            Retry::Later,
            "another transaction was in the way: try again",
        ),
        ("3F000" | "42P01" | "42703", _) => (
            NotFound,
            Retry::Never,
            "the broker's tables are gone: connect again to create them, or restore them from a copy",
        ),
        (_, "XX") => (
            Codec,
            Retry::Never,
            "the server finds its data damaged: look at its log and restore it from a copy",
        ),
        _ => (
            Internal,
            Retry::Never,
            "the server refused a statement of the broker: its tables may have been changed by hand",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_says_what_to_do() {
        use ErrorKind::{Codec, Internal, InvalidInput, NotFound, Unauthorized, Unavailable};
        let cases = [
            ("28P01", Unauthorized, Retry::Never),
            ("28000", Unauthorized, Retry::Never),
            ("42501", Unauthorized, Retry::Never),
            ("3D000", NotFound, Retry::Never),
            ("42P01", NotFound, Retry::Never),
            ("25006", Unavailable, Retry::Later),
            ("25P02", InvalidInput, Retry::Never),
            ("25P03", Unavailable, Retry::Later),
            ("22021", InvalidInput, Retry::Never),
            ("53300", Unavailable, Retry::Later),
            ("53100", Unavailable, Retry::Later),
            ("53200", Unavailable, Retry::Later),
            ("58030", Unavailable, Retry::Later),
            ("57014", Unavailable, Retry::Later),
            ("55P03", Unavailable, Retry::Later),
            ("57P01", Unavailable, Retry::Later),
            ("57P03", Unavailable, Retry::Later),
            ("08006", Unavailable, Retry::Later),
            ("40001", Unavailable, Retry::Later),
            ("40P01", Unavailable, Retry::Later),
            ("XX001", Codec, Retry::Never),
            ("23505", Internal, Retry::Never),
            ("", Internal, Retry::Never),
        ];
        for (code, kind, retry) in cases {
            let (found, found_retry, message) = meaning(code);
            assert_eq!((found, found_retry), (kind, retry), "{code}");
            assert!(!message.is_empty());
        }
    }

    #[test]
    fn errors_of_the_driver_are_told_apart() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let cases = [
            (sqlx::Error::PoolClosed, ErrorKind::Closed, false),
            (sqlx::Error::PoolTimedOut, ErrorKind::Unavailable, false),
            (sqlx::Error::Io(refused), ErrorKind::Unavailable, true),
            (sqlx::Error::Tls("no".into()), ErrorKind::Unavailable, true),
            (sqlx::Error::Decode("odd".into()), ErrorKind::Codec, true),
            (
                sqlx::Error::Protocol("odd".into()),
                ErrorKind::Unavailable,
                true,
            ),
            (sqlx::Error::WorkerCrashed, ErrorKind::Internal, true),
        ];
        for (native, kind, loss) in cases {
            assert_eq!(is_loss(&native), loss, "{native}");
            assert_eq!(into_error("test", native).kind(), kind);
        }
    }
}
