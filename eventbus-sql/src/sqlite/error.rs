//! What SQLite's result codes mean to a caller. Nothing else in this crate reads them.

use std::sync::Arc;

use eventbus_core::{Error, ErrorKind, Retry};

/// Turns an error of the driver into one that says what to do. Shared, where a commit that failed
/// was of several callers.
pub(super) fn into_error(operation: &'static str, native: impl Into<Arc<sqlx::Error>>) -> Error {
    let native = native.into();
    let Some(code) = code_of(&native) else {
        return driver_error(operation, native);
    };
    let (kind, retry, message) = meaning(code);
    Error::new(kind, operation, message)
        .with_retry(retry)
        .with_source(native)
}

/// Whether what was written breaks a constraint.
pub(super) fn is_constraint(native: &sqlx::Error) -> bool {
    code_of(native).is_some_and(|code| code & 0xff == 19)
}

/// Whether the file could not be written, whatever was to be: its disk is full, or fails.
pub(super) fn cannot_write(native: &sqlx::Error) -> bool {
    code_of(native).is_some_and(|code| matches!(code & 0xff, 10 | 13))
}

/// The extended result code.
fn code_of(native: &sqlx::Error) -> Option<i32> {
    native.as_database_error()?.code()?.parse().ok()
}

fn driver_error(operation: &'static str, native: Arc<sqlx::Error>) -> Error {
    let (kind, message) = match &*native {
        sqlx::Error::PoolClosed => (ErrorKind::Closed, "the database was closed: connect again"),
        sqlx::Error::PoolTimedOut => (
            ErrorKind::Unavailable,
            "all connections for reading are busy: read with fewer members, or try again",
        ),
        sqlx::Error::WorkerCrashed => (
            ErrorKind::Unavailable,
            "the connection's thread is gone: the next call opens another",
        ),
        sqlx::Error::Io(_) => (
            ErrorKind::Unavailable,
            "the file cannot be reached: look at its disk",
        ),
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => (
            ErrorKind::Codec,
            "a row is not what the broker wrote: the file is damaged, or somebody else wrote to its tables; restore it from a copy",
        ),
        _ => (
            ErrorKind::Internal,
            "the driver answered what it should not",
        ),
    };
    Error::new(kind, operation, message).with_source(native)
}

/// Kind, whether to try again, and what to do.
fn meaning(code: i32) -> (ErrorKind, Retry, &'static str) {
    use ErrorKind::{Codec, Internal, InvalidInput, NotFound, Unauthorized, Unavailable};
    const MOVED: i32 = 8 | (4 << 8);
    match (code, code & 0xff) {
        (MOVED, _) => (
            NotFound,
            Retry::Never,
            "the file was moved or deleted while it was open: put it back and start again",
        ),
        (_, 5 | 6 | 15) => (
            Unavailable,
            Retry::Later,
            "the database is locked: another process has been writing for longer than the busy timeout; end its transaction, or raise `busy_timeout`",
        ),
        (_, 13) => (
            Unavailable,
            Retry::Later,
            "the disk is full: free some space; what was refused can be published again",
        ),
        (_, 10) => (
            Unavailable,
            Retry::Later,
            "the disk answered with an error: look at its space, limits and health",
        ),
        (_, 7) => (Unavailable, Retry::Later, "SQLite ran out of memory"),
        (_, 9) => (Unavailable, Retry::Later, "the statement was interrupted"),
        (_, 3 | 8 | 14 | 23) => (
            Unauthorized,
            Retry::Never,
            "this process may not open the file for writing: look at the rights of the file and its directory, and whether it is a directory itself",
        ),
        (_, 11) => (
            Codec,
            Retry::Never,
            "the database file is damaged: stop all processes that use it, keep a copy, and restore it or run sqlite3's `.recover`",
        ),
        (_, 26) => (
            InvalidInput,
            Retry::Never,
            "the file is no SQLite database: name another one",
        ),
        (_, 18) => (
            InvalidInput,
            Retry::Never,
            "a value is larger than SQLite takes: publish less at once",
        ),
        _ => (
            Internal,
            Retry::Never,
            "SQLite refused a statement of the broker: its tables may have been changed by hand",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_result_code_says_what_to_do() {
        use ErrorKind::{Codec, Internal, InvalidInput, NotFound, Unauthorized, Unavailable};
        let cases = [
            (1, Internal, Retry::Never),
            (3, Unauthorized, Retry::Never),
            (5, Unavailable, Retry::Later),
            (6, Unavailable, Retry::Later),
            (7, Unavailable, Retry::Later),
            (8, Unauthorized, Retry::Never),
            (9, Unavailable, Retry::Later),
            (10, Unavailable, Retry::Later),
            (11, Codec, Retry::Never),
            (13, Unavailable, Retry::Later),
            (14, Unauthorized, Retry::Never),
            (15, Unavailable, Retry::Later),
            (18, InvalidInput, Retry::Never),
            (19, Internal, Retry::Never),
            (23, Unauthorized, Retry::Never),
            (26, InvalidInput, Retry::Never),
            // BUSY_SNAPSHOT, READONLY_DBMOVED, IOERR_SHMSIZE, CORRUPT_VTAB, CONSTRAINT_PRIMARYKEY.
            (517, Unavailable, Retry::Later),
            (1032, NotFound, Retry::Never),
            (4874, Unavailable, Retry::Later),
            (267, Codec, Retry::Never),
            (1555, Internal, Retry::Never),
        ];
        for (code, kind, retry) in cases {
            let (found, found_retry, message) = meaning(code);
            assert_eq!((found, found_retry), (kind, retry), "{code}");
            assert!(!message.is_empty());
        }
    }

    #[test]
    fn errors_of_the_driver_are_told_apart() {
        let cases = [
            (sqlx::Error::PoolClosed, ErrorKind::Closed),
            (sqlx::Error::PoolTimedOut, ErrorKind::Unavailable),
            (sqlx::Error::WorkerCrashed, ErrorKind::Unavailable),
            (
                sqlx::Error::Io(std::io::Error::other("gone")),
                ErrorKind::Unavailable,
            ),
            (sqlx::Error::Decode("odd".into()), ErrorKind::Codec),
            (sqlx::Error::RowNotFound, ErrorKind::Internal),
        ];
        for (native, kind) in cases {
            assert_eq!(into_error("test", native).kind(), kind);
        }
    }
}
