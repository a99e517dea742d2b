//! The mail provider: one call, which sends a mail once per idempotency key.

use async_trait::async_trait;
use reqwest::{Client, StatusCode};
use serde::{Deserialize, Serialize};

use super::{IDEMPOTENCY_KEY, ProviderError, ask, provider_client};
use crate::events::OrderId;

/// A mail to a customer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mail {
    /// The order it is about.
    pub order_id: OrderId,
    /// Who gets it.
    pub to: String,
    /// Its first line.
    pub subject: String,
    /// The rest.
    pub text: String,
}

/// Sends mails.
#[async_trait]
pub trait Mailer: Send + Sync + 'static {
    /// Sends a mail; the same key again sends nothing.
    ///
    /// # Cancellation
    ///
    /// A dropped call may have sent it: ask again with the same key.
    ///
    /// # Errors
    ///
    /// When there is no answer; [`ProviderError::Away`] is worth another try.
    async fn send(&self, mail: &Mail, key: &str) -> Result<(), ProviderError>;
}

/// The mail provider behind a URL.
#[derive(Clone, Debug)]
pub struct HttpMailer {
    client: Client,
    mails: String,
}

impl HttpMailer {
    /// The provider at `url`, such as `http://127.0.0.1:9002`. Connects at the first call.
    pub fn new(url: &str) -> reqwest::Result<Self> {
        Ok(Self {
            client: provider_client()?,
            mails: format!("{url}/mails"),
        })
    }
}

#[async_trait]
impl Mailer for HttpMailer {
    async fn send(&self, mail: &Mail, key: &str) -> Result<(), ProviderError> {
        let request = self
            .client
            .post(&self.mails)
            .header(IDEMPOTENCY_KEY, key)
            .json(mail);
        ask(request, &[StatusCode::ACCEPTED]).await?;
        Ok(())
    }
}
