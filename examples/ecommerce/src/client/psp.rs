//! The payment provider: one call, which charges a card once per idempotency key.

use async_trait::async_trait;
use reqwest::{Client, StatusCode};
use serde::{Deserialize, Serialize};

use super::{IDEMPOTENCY_KEY, ProviderError, ask, provider_client};
use crate::events::{Cents, OrderId};

/// A request to take money.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charge {
    /// For which order.
    pub order_id: OrderId,
    /// How much.
    pub amount: Cents,
    /// From which card, as a token.
    pub card: String,
}

/// What the provider answers. A declined card is an answer, not an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum ChargeOutcome {
    /// The money was taken.
    Charged {
        /// What the provider calls the charge.
        charge_id: String,
    },
    /// The money was not taken, and will not be.
    Declined {
        /// Why.
        reason: String,
    },
}

/// Takes money from cards.
#[async_trait]
pub trait PaymentProvider: Send + Sync + 'static {
    /// Charges a card; the same key again gives the first answer and takes nothing.
    ///
    /// # Cancellation
    ///
    /// A dropped call may have charged: ask again with the same key.
    ///
    /// # Errors
    ///
    /// When there is no answer; [`ProviderError::Away`] is worth another try.
    async fn charge(&self, charge: &Charge, key: &str) -> Result<ChargeOutcome, ProviderError>;
}

/// The payment provider behind a URL.
#[derive(Clone, Debug)]
pub struct HttpPsp {
    client: Client,
    charges: String,
}

impl HttpPsp {
    /// The provider at `url`, such as `http://127.0.0.1:9001`. Connects at the first call.
    pub fn new(url: &str) -> reqwest::Result<Self> {
        Ok(Self {
            client: provider_client()?,
            charges: format!("{url}/charges"),
        })
    }
}

#[async_trait]
impl PaymentProvider for HttpPsp {
    async fn charge(&self, charge: &Charge, key: &str) -> Result<ChargeOutcome, ProviderError> {
        let request = self
            .client
            .post(&self.charges)
            .header(IDEMPOTENCY_KEY, key)
            .json(charge);
        let response = ask(
            request,
            &[StatusCode::CREATED, StatusCode::PAYMENT_REQUIRED],
        )
        .await?;
        let outcome = response.json().await;
        outcome.map_err(|error| ProviderError::Away(error.into()))
    }
}
