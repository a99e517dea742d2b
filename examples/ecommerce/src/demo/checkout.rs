//! Places the order book over HTTP, many at a time, and keeps what the gateway answered.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use indicatif::ProgressBar;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Client, StatusCode};
use serde::Deserialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::PATIENCE;
use super::order_book::{End, OrderBook, Post};
use crate::events::{CancelReason, OrderId};
use crate::service::gateway::{Board, OrderView, Status};

/// How many requests are under way at a time.
const CONCURRENCY: usize = 64;
/// How many orders may be on their way when the next is placed, so that what is measured is the
/// shop and not a queue in front of it.
const OPEN_MAX: usize = 63;

/// What became of the posts.
#[derive(Debug)]
pub struct Checkout {
    /// The orders that the gateway took.
    pub placed: Vec<Placed>,
    /// How many the gateway refused as it had to.
    pub refused: usize,
    /// What the gateway should not have answered.
    pub surprises: Vec<String>,
}

/// An order that the gateway took.
#[derive(Clone, Copy, Debug)]
pub struct Placed {
    /// Which post of the book it is.
    pub post: usize,
    /// What the gateway called it.
    pub order_id: OrderId,
    /// When it was posted, or had to be posted to keep the rate.
    pub posted_at: SystemTime,
}

/// What the gateway answered to one post.
enum Answer {
    Placed(Placed),
    Refused,
    Surprise(String),
}

impl Checkout {
    /// Posts the orders of the book: so many a second, or as earlier ones end.
    ///
    /// # Errors
    ///
    /// When the gateway cannot be reached.
    pub async fn place_all(
        url: &str,
        book: &Arc<OrderBook>,
        board: &Board,
        rate: Option<u32>,
        bar: &ProgressBar,
    ) -> anyhow::Result<Self> {
        let mut pace = Pace::new(rate, board);
        let gateway = GatewayClient {
            client: Client::builder()
                .no_proxy()
                .pool_max_idle_per_host(CONCURRENCY)
                .build()?,
            orders: format!("{url}/orders"),
        };
        let mut checkout = Self {
            placed: Vec::with_capacity(book.posts.len()),
            refused: 0,
            surprises: Vec::new(),
        };
        let mut answers = JoinSet::new();
        for index in 0..book.posts.len() {
            let Some(posted_at) = pace.next().await? else {
                let stopped = format!("placing stopped at {index}: no order ended for too long");
                checkout.surprises.push(stopped);
                break;
            };
            if answers.len() == CONCURRENCY
                && let Some(answer) = answers.join_next().await
            {
                checkout.note(answer??, bar);
            }
            let (gateway, book) = (gateway.clone(), Arc::clone(book));
            answers.spawn(async move {
                let post = &book.posts[index];
                gateway.place(index, post, posted_at).await
            });
        }
        while let Some(answer) = answers.join_next().await {
            checkout.note(answer??, bar);
        }
        Ok(checkout)
    }

    fn note(&mut self, answer: Answer, bar: &ProgressBar) {
        match answer {
            Answer::Placed(placed) => {
                bar.inc(1);
                self.placed.push(placed);
            }
            Answer::Refused => self.refused += 1,
            Answer::Surprise(surprise) => self.surprises.push(surprise),
        }
    }

    /// Where the gateway sees the orders that it took.
    ///
    /// # Errors
    ///
    /// When the board cannot be read.
    pub async fn look_up(&self, board: &Board) -> anyhow::Result<HashMap<OrderId, OrderView>> {
        let mut orders = HashMap::with_capacity(self.placed.len());
        for placed in &self.placed {
            if let Some(order) = board.find(placed.order_id).await? {
                orders.insert(placed.order_id, order);
            }
        }
        Ok(orders)
    }

    /// An order that was shipped and one that was declined, as far as there are any.
    pub fn one_of_each_end(
        &self,
        book: &OrderBook,
        board: &HashMap<OrderId, OrderView>,
    ) -> Vec<(&'static str, OrderId)> {
        let find = |status, reason: Option<CancelReason>| {
            let mut orders: Vec<&Placed> = self.placed.iter().collect();
            orders.sort_by_key(|placed| placed.post);
            let once = orders
                .into_iter()
                .filter(|placed| !book.posts[placed.post].twice);
            once.map(|placed| placed.order_id).find(|order_id| {
                board
                    .get(order_id)
                    .is_some_and(|order| order.status == status && order.reason == reason)
            })
        };
        let shipped = find(Status::Shipped, None);
        let declined = find(Status::Cancelled, Some(CancelReason::PaymentDeclined));
        let shipped = shipped.map(|order_id| ("An order that was shipped", order_id));
        let declined = declined.map(|order_id| ("An order whose card was declined", order_id));
        shipped.into_iter().chain(declined).collect()
    }
}

/// When the next order is to be posted.
enum Pace<'a> {
    /// When few enough are on their way.
    AsOrdersEnd(&'a Board),
    /// At its time, however the shop keeps up: whoever waits for it waits from then on.
    AtRate { due: Instant, between: Duration },
}

impl<'a> Pace<'a> {
    fn new(rate: Option<u32>, board: &'a Board) -> Self {
        match rate {
            None => Self::AsOrdersEnd(board),
            Some(rate) => Self::AtRate {
                due: Instant::now(),
                between: Duration::from_secs(1) / rate,
            },
        }
    }

    /// Waits for the time of the next order; none when no order ended for too long.
    async fn next(&mut self) -> anyhow::Result<Option<SystemTime>> {
        match self {
            Self::AsOrdersEnd(board) => {
                let open = board.wait_until_open(OPEN_MAX, PATIENCE).await?;
                Ok((open <= OPEN_MAX).then(SystemTime::now))
            }
            Self::AtRate { due, between } => {
                sleep_until(*due).await;
                let posted_at = SystemTime::now() - due.elapsed();
                *due += *between;
                Ok(Some(posted_at))
            }
        }
    }
}

/// The gateway as its clients reach it.
#[derive(Clone, Debug)]
struct GatewayClient {
    client: Client,
    orders: String,
}

impl GatewayClient {
    /// Posts one order, and again where the book says so.
    async fn place(
        &self,
        index: usize,
        post: &Post,
        posted_at: SystemTime,
    ) -> anyhow::Result<Answer> {
        let (status, first) = self.send(post).await?;
        if let End::Refused(expected) = post.end {
            return Ok(match status.as_u16() == expected {
                true => Answer::Refused,
                false => Answer::Surprise(format!("{}: {status}, not {expected}", post.key)),
            });
        }
        let Some(order_id) = first.filter(|_| status == StatusCode::ACCEPTED) else {
            return Ok(Answer::Surprise(format!("{}: {status}, not 202", post.key)));
        };
        if post.twice {
            let (_, again) = self.send(post).await?;
            if again != Some(order_id) {
                let surprise = format!("{}: posted twice, it became another order", post.key);
                return Ok(Answer::Surprise(surprise));
            }
        }
        Ok(Answer::Placed(Placed {
            post: index,
            order_id,
            posted_at,
        }))
    }

    async fn send(&self, post: &Post) -> anyhow::Result<(StatusCode, Option<OrderId>)> {
        #[derive(Deserialize)]
        struct Accepted {
            order_id: OrderId,
        }
        let response = self
            .client
            .post(&self.orders)
            .header(CONTENT_TYPE, post.content_type)
            .header("idempotency-key", &post.key)
            .header("x-user-id", &post.user)
            .header("x-session-id", &post.session)
            .body(post.body.clone())
            .send()
            .await
            .with_context(|| format!("post order {}", post.key))?;
        let status = response.status();
        // Reading to the end lets the connection be used again.
        let body = response.bytes().await?;
        let accepted: Option<Accepted> = match status.is_success() {
            true => Some(serde_json::from_slice(&body)?),
            false => None,
        };
        Ok((status, accepted.map(|accepted| accepted.order_id)))
    }
}
