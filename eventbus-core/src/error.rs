//! The one error of the SDK: what happened, whether trying again helps, on what, and why.

use std::error::Error as StdError;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Any error a handler or a layer may return.
pub type BoxError = Box<dyn StdError + Send + Sync + 'static>;

/// A result whose error is [`Error`] unless said otherwise.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The call itself is wrong: change the argument.
    InvalidInput,
    /// The named thing does not exist.
    NotFound,
    /// The named thing exists already, with other properties.
    AlreadyExists,
    /// Somebody else changed it first.
    Conflict,
    /// This broker or store cannot do it: see its capabilities.
    Unsupported,
    /// The credentials are missing, wrong or not sufficient.
    Unauthorized,
    /// A limit was reached: slow down and try again.
    RateLimited,
    /// No answer came in time; what was asked for may have happened.
    Timeout,
    /// The other side is away.
    Unavailable,
    /// The handle was closed or shut down.
    Closed,
    /// Bytes could not be read as what they claim to be, or a value not be written.
    Codec,
    /// A bug of this SDK or of a driver: report it.
    Internal,
}

/// Whether the same call may succeed later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Retry {
    /// It will fail again.
    Never,
    /// It may succeed later.
    Later,
    /// It was retried and went on failing.
    Exhausted,
}

/// The error of every fallible call of the SDK, one word wide.
///
/// Callers branch on [`kind`](Error::kind) and [`is_retryable`](Error::is_retryable), never on the
/// text. `Display` prints operation, message and context; the cause is in
/// [`source`](StdError::source) and not repeated.
///
/// # Examples
///
/// ```
/// use eventbus_core::{Error, ErrorKind};
///
/// let error = Error::new(ErrorKind::NotFound, "read topic", "the topic does not exist: create it with `apply_topics`")
///     .with("topic", "order-events");
/// assert_eq!(error.kind(), ErrorKind::NotFound);
/// assert!(!error.is_retryable());
/// assert_eq!(
///     error.to_string(),
///     "read topic: the topic does not exist: create it with `apply_topics` (topic: order-events)"
/// );
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    retry: Retry,
    operation: &'static str,
    message: String,
    context: Vec<(&'static str, String)>,
    source: Option<BoxError>,
}

impl Error {
    /// Creates an error of `kind`; timeouts, limits and absences are retryable unless changed.
    pub fn new(kind: ErrorKind, operation: &'static str, message: impl Into<String>) -> Self {
        let retry = match kind {
            ErrorKind::RateLimited | ErrorKind::Timeout | ErrorKind::Unavailable => Retry::Later,
            _ => Retry::Never,
        };
        Self(Box::new(Inner {
            kind,
            retry,
            operation,
            message: message.into(),
            context: Vec::new(),
            source: None,
        }))
    }

    /// Adds a name and a value that say on what the operation was tried.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.0.context.push((name, value.to_string()));
        self
    }

    /// Sets the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Overrides whether trying again helps.
    #[must_use]
    pub fn with_retry(mut self, retry: Retry) -> Self {
        self.0.retry = retry;
        self
    }

    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the same call may succeed later.
    pub fn retry(&self) -> Retry {
        self.0.retry
    }

    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        self.0.retry == Retry::Later
    }

    /// What was attempted, such as `publish`.
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// On what it was attempted, in the order it was added.
    pub fn context(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0
            .context
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.operation, self.0.message)?;
        for (index, (name, value)) in self.0.context.iter().enumerate() {
            let separator = if index == 0 { " (" } else { ", " };
            write!(f, "{separator}{name}: {value}")?;
        }
        if !self.0.context.is_empty() {
            f.write_str(")")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    /// Prints the whole chain of causes, one a line, because `fn main() -> Result<()>` shows this.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        let mut cause = self.source();
        while let Some(error) = cause {
            write!(f, "\n  caused by: {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

/// Joins an error and its causes into one line, as dead letters and logs keep it. An error that
/// panics while it is written is named instead: it is not to keep its own dead letter from being
/// stored.
pub fn error_chain(error: &(dyn StdError + 'static)) -> String {
    let join = || {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    };
    catch_unwind(AssertUnwindSafe(join))
        .unwrap_or_else(|_| "an error whose text panics while it is written".to_owned())
}

/// The first error of one type among an error and its causes.
pub fn find_cause<'e, E: StdError + 'static>(error: &'e (dyn StdError + 'static)) -> Option<&'e E> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        cause = below(error);
    }
    None
}

/// The error that `error` wraps. An I/O error made from another one skips that in its `source`.
fn below<'e>(error: &'e (dyn StdError + 'static)) -> Option<&'e (dyn StdError + 'static)> {
    match error.downcast_ref::<std::io::Error>() {
        Some(error) => error.get_ref().map(|inner| inner as _),
        None => error.source(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_is_printed_once_and_only_in_the_chain() {
        let inner = Error::new(ErrorKind::Unavailable, "connect", "connection refused");
        let outer = Error::new(ErrorKind::Unavailable, "publish", "the broker is away")
            .with("topic", "orders")
            .with("partition", 3)
            .with_source(inner);
        assert_eq!(
            outer.to_string(),
            "publish: the broker is away (topic: orders, partition: 3)"
        );
        assert_eq!(
            error_chain(&outer),
            "publish: the broker is away (topic: orders, partition: 3): connect: connection refused"
        );
        assert!(format!("{outer:?}").ends_with("caused by: connect: connection refused"));
    }

    #[test]
    fn an_error_is_one_word_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }
}
