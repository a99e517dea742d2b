//! What all clients of a broker handle share: where their log goes, and why a broker does not answer.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use eventbus_core::{Error, ErrorKind, Result};
use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};

use crate::error::of_code;

/// How long a call may wait for an answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(8);

/// The last thing that clients complained of: calls that get no answer say it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Complaints(Arc<Mutex<Option<Complaint>>>);

#[derive(Clone, Debug)]
struct Complaint {
    code: Code,
    reason: String,
    at: Instant,
}

/// How long a complaint explains a silence.
const LASTS: Duration = Duration::from_secs(30);

impl Complaints {
    fn note(&self, code: Code, reason: &str) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = last.as_ref().is_some_and(|last| last.at.elapsed() < LASTS);
        // That none answers is said behind the reason of each; it says less.
        if code != Code::AllBrokersDown || !is_known {
            *last = Some(Complaint {
                code,
                reason: reason.to_owned(),
                at: Instant::now(),
            });
        }
    }

    fn last(&self) -> Option<Complaint> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.clone().filter(|last| last.at.elapsed() < LASTS)
    }

    /// Adds to an error that came of silence what clients have complained of.
    pub(crate) fn explain(&self, operation: &'static str, error: Error) -> Error {
        let is_silence = matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Unavailable);
        match self.last() {
            Some(last) if is_silence => of_code(operation, last.code).with("reason", last.reason),
            _ => error,
        }
    }

    /// What will not be better by waiting.
    pub(crate) fn hopeless(&self, operation: &'static str) -> Option<Error> {
        let Complaint { code, reason, .. } = self.last()?;
        let error = of_code(operation, code).with("reason", reason);
        (!error.is_retryable()).then_some(error)
    }

    pub(crate) fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The context of clients that only ask; others have it in theirs.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) complaints: Complaints,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if let Some(code) = error.rdkafka_error_code() {
            self.complaints.note(code, reason);
        }
        tracing::debug!(target: "librdkafka", %error, reason, "client error");
    }

    fn stats_raw(&self, _statistics: &[u8]) {}
}

fn log(level: RDKafkaLogLevel, facility: &str, message: &str) {
    // Of an option that another kind of client has: every client is given all that a user set.
    if facility == "CONFWARN" {
        return tracing::debug!(target: "librdkafka", facility, "{message}");
    }
    match level {
        RDKafkaLogLevel::Emerg
        | RDKafkaLogLevel::Alert
        | RDKafkaLogLevel::Critical
        | RDKafkaLogLevel::Error => tracing::error!(target: "librdkafka", facility, "{message}"),
        RDKafkaLogLevel::Warning => tracing::warn!(target: "librdkafka", facility, "{message}"),
        RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => {
            tracing::info!(target: "librdkafka", facility, "{message}");
        }
        RDKafkaLogLevel::Debug => tracing::debug!(target: "librdkafka", facility, "{message}"),
    }
}

/// Runs what blocks beside the runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        Error::new(
            ErrorKind::Internal,
            "call Kafka",
            "a call of the client panicked",
        )
        .with_source(error)
    })
}

/// Tries until it is done or is not worth trying any more; for what answers "try again" while the
/// brokers make up their minds.
pub(crate) fn patiently<T>(
    deadline: Instant,
    mut attempt: impl FnMut(Duration) -> Result<T>,
) -> Result<T> {
    let mut pause = Duration::from_millis(10);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match attempt(left.max(Duration::from_millis(10))) {
            Err(error) if error.is_retryable() && Instant::now() + pause < deadline => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(200));
            }
            result => return result,
        }
    }
}
