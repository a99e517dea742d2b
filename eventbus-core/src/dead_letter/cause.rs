//! Why a message was not handled.

use std::fmt;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::error::{BoxError, Error, error_chain};

/// Why a message was not handled.
#[derive(Debug)]
pub(crate) enum Cause {
    Error(BoxError),
    Panic(String),
    Deadline(Duration),
    Undecodable(Error),
    NoHandler(String),
    HandOuts(u32),
    /// It was parked for this, and an operator released its key.
    Parked {
        cause: String,
        error: String,
    },
    /// An operator discarded its key.
    Discarded {
        by: String,
        because: String,
        /// What its key was parked for.
        error: String,
    },
}

impl Cause {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Error(_) => "error",
            Self::Panic(_) => "panic",
            Self::Deadline(_) => "deadline",
            Self::Undecodable(_) => "undecodable",
            Self::NoHandler(_) => "no_handler",
            Self::HandOuts(_) => "hand_outs",
            Self::Parked { cause, .. } => cause,
            Self::Discarded { .. } => "discarded",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Error(error) => f.write_str(&error_chain(error.as_ref())),
            Self::Panic(text) => write!(f, "the handler panicked: {text}"),
            Self::Deadline(deadline) => write!(
                f,
                "the handler did not end within {deadline:?}: raise `.deadline(…)` or make it faster"
            ),
            Self::Undecodable(error) => f.write_str(&error_chain(error)),
            Self::NoHandler(event_type) => write!(
                f,
                "no handler for {event_type:?}: add one with `.on(…)` in every member of the group, or pass over types that are not meant for it with `.skip_others()`"
            ),
            Self::HandOuts(times) => write!(
                f,
                "handed out {times} times without a verdict: its handling ends the process, or is always interrupted"
            ),
            Self::Parked { error, .. } => f.write_str(error),
            Self::Discarded { by, because, error } => {
                write!(f, "discarded by {by}")?;
                for said in [because, error].into_iter().filter(|said| !said.is_empty()) {
                    write!(f, ": {said}")?;
                }
                Ok(())
            }
        }
    }
}

/// A [`Cause`] and what led to it.
#[derive(Debug)]
pub(crate) struct Diagnosis {
    pub(crate) cause: Cause,
    pub(crate) attempts: u32,
    pub(crate) first_failed: Option<Timestamp>,
}
