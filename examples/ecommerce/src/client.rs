//! How services reach what is not theirs: the payment provider and the mail provider, over HTTP.
//!
//! Both are asked with an idempotency key, so that asking again after a lost answer does not
//! charge or mail again.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use eventbus::prelude::{OnError, RetryPolicy};
use reqwest::{Client, RequestBuilder, Response, StatusCode};

pub mod mailer;
pub mod psp;

/// How long a provider may take to answer before it is asked again.
const ANSWER_WITHIN: Duration = Duration::from_millis(300);

/// When is asked again about what the provider looks into: nobody at a fake one takes long.
const REVIEW_PAUSE: Duration = Duration::from_millis(500);

/// The header that names a call, so that a repeated call is recognised.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Why a provider gave no answer that means anything to the business.
#[derive(Debug)]
pub enum ProviderError {
    /// It is away, busy or slow: asking again with the same key helps.
    Away(Box<dyn StdError + Send + Sync>),
    /// Somebody at the provider looks into it first: asking again later helps.
    InReview,
    /// It refused the call itself: asking again does not help.
    Refused(String),
}

impl fmt::Display for ProviderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away(_) => f.write_str("the provider did not answer"),
            Self::InReview => f.write_str("the provider looks into it"),
            Self::Refused(answer) => write!(f, "the provider refused the call: {answer}"),
        }
    }
}

impl StdError for ProviderError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Away(cause) => Some(cause.as_ref()),
            Self::InReview | Self::Refused(_) => None,
        }
    }
}

/// A provider that is away is asked again for about a minute; what it looks into waits for it in
/// the store, and then for a person; a call it refused needs one at once.
pub fn provider_retries() -> RetryPolicy {
    RetryPolicy::exponential(12, Duration::from_millis(50), Duration::from_secs(10)).when(
        |error: &ProviderError| match error {
            ProviderError::Away(_) => OnError::Next,
            ProviderError::InReview => OnError::Delayed(REVIEW_PAUSE),
            ProviderError::Refused(_) => OnError::DeadLetter,
        },
    )
}

/// Providers are reached directly, never through a proxy: they are on this machine.
fn provider_client() -> reqwest::Result<Client> {
    Client::builder()
        .no_proxy()
        .timeout(ANSWER_WITHIN)
        .pool_max_idle_per_host(128)
        .build()
}

/// Sends a call and sorts out what is no answer; `answers` are the statuses that are one.
async fn ask(request: RequestBuilder, answers: &[StatusCode]) -> Result<Response, ProviderError> {
    let response = request
        .send()
        .await
        .map_err(|error| ProviderError::Away(error.into()))?;
    let status = response.status();
    if answers.contains(&status) {
        return Ok(response);
    }
    if status == StatusCode::LOCKED {
        return Err(ProviderError::InReview);
    }
    let text = response.text().await.unwrap_or_default();
    let answer = format!("{status} {text}");
    match status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        true => Err(ProviderError::Away(answer.into())),
        false => Err(ProviderError::Refused(answer)),
    }
}
