//! What can go wrong with a ledger and its recorder. What is wrong with a payload is in `payload.rs`.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a ledger can't be written or read.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused something.
    Io {
        /// What was tried.
        operation: &'static str,
        /// With which file or socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The recorder is gone or refused: from here on nothing is recorded, so the run is worth nothing.
    RecorderGone {
        /// What was noticed.
        what: String,
    },
    /// The file is no ledger, or one of another version.
    NotALedger {
        /// Which file.
        path: PathBuf,
        /// What is wrong with its header.
        what: String,
    },
    /// A record before the end of the ledger is not what was written.
    Damaged {
        /// Where the record begins, in bytes from the start of the file.
        offset: u64,
        /// What is wrong with it.
        what: String,
    },
}

impl Error {
    pub(crate) fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn gone(what: impl Into<String>) -> Self {
        Self::RecorderGone { what: what.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io {
                operation, path, ..
            } => write!(formatter, "{operation} {}", path.display()),
            Self::RecorderGone { what } => write!(formatter, "the recorder is gone: {what}"),
            Self::NotALedger { path, what } => {
                write!(formatter, "{} is no ledger: {what}", path.display())
            }
            Self::Damaged { offset, what } => {
                write!(formatter, "the ledger is damaged at byte {offset}: {what}")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
