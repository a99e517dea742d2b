//! Clients that place orders whatever happens to the shop, and keep what they were told.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use reqwest::{Client, StatusCode};
use serde::Deserialize;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{interval, sleep, timeout};

use super::journal::{Journal, Note};
use crate::demo::order_book::{OrderBook, Post};
use crate::events::OrderId;

/// How many orders are being posted at a time.
const CONCURRENCY: usize = 64;
/// How long a client waits for an answer, and then before it posts again.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);
/// One client in so many never posts again: it does not know what became of its order.
const GIVES_UP: usize = 10;
/// How long the last posts may take when the shop is well again.
const FINISH_WITHIN: Duration = Duration::from_secs(60);

/// Clients at work.
#[derive(Debug)]
pub struct Load {
    stop: watch::Sender<bool>,
    driver: JoinHandle<()>,
    told: Arc<Mutex<Told>>,
}

/// What the clients were told.
#[derive(Debug, Default)]
pub struct Told {
    /// Orders that were taken: a 202 was read.
    pub taken: Vec<Taken>,
    /// Posts whose outcome is unknown to their client.
    pub unknown: usize,
    /// Answers that no shop should give.
    pub surprises: Vec<String>,
}

/// An order that was taken.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// Which post of the book it was.
    pub post: usize,
    /// What the shop called it.
    pub order_id: OrderId,
    /// When.
    pub at: Instant,
}

struct Clients {
    http: Client,
    orders: String,
    book: Arc<OrderBook>,
    journal: Arc<Journal>,
    told: Arc<Mutex<Told>>,
}

/// What came of one post.
enum Answer {
    Taken(OrderId),
    Refused(StatusCode),
    None(String),
}

impl Load {
    /// Starts placing the orders of the book, so many a second.
    pub fn start(url: &str, book: Arc<OrderBook>, rate: u32, journal: Arc<Journal>) -> Self {
        let told = Arc::new(Mutex::new(Told::default()));
        let clients = Arc::new(Clients {
            http: client(),
            orders: format!("{url}/orders"),
            book,
            journal,
            told: Arc::clone(&told),
        });
        let (stop, stopped) = watch::channel(false);
        let driver = tokio::spawn(drive(clients, rate, stopped));
        Self { stop, driver, told }
    }

    /// Places no more orders, and waits until every client is done.
    ///
    /// # Errors
    ///
    /// When they do not get an answer from a shop that is well.
    pub async fn finish(self) -> anyhow::Result<Told> {
        self.stop.send_replace(true);
        let finished = timeout(FINISH_WITHIN, self.driver).await;
        finished.context("the shop is well, but clients get no answer")??;
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut told))
    }
}

async fn drive(clients: Arc<Clients>, rate: u32, mut stop: watch::Receiver<bool>) {
    let room = Arc::new(Semaphore::new(CONCURRENCY));
    let mut ticks = interval(Duration::from_secs(1) / rate);
    let mut posting = JoinSet::new();
    for index in 0..clients.book.posts.len() {
        tokio::select! {
            // A dropped sender stops the clients as well.
            _ = stop.wait_for(|stop| *stop) => break,
            _ = ticks.tick() => {}
        }
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            break;
        };
        while posting.try_join_next().is_some() {}
        let clients = Arc::clone(&clients);
        posting.spawn(async move {
            clients.place(index).await;
            drop(permit);
        });
    }
    posting.join_all().await;
}

impl Clients {
    /// Posts an order until it is taken, or once.
    async fn place(&self, index: usize) {
        let post = &self.book.posts[index];
        let key = post.key.as_str();
        self.journal.note(Note::Posting(key));
        loop {
            match self.post(post).await {
                Answer::Taken(order_id) => {
                    self.journal.note(Note::Taken { key, order_id });
                    let at = Instant::now();
                    let taken = Taken {
                        post: index,
                        order_id,
                        at,
                    };
                    return self.told().taken.push(taken);
                }
                Answer::Refused(status) => {
                    let surprise = format!("{key}: {status}");
                    return self.told().surprises.push(surprise);
                }
                Answer::None(why) => self.journal.note(Note::Unknown { key, why }),
            }
            if index.is_multiple_of(GIVES_UP) {
                self.told().unknown += 1;
                return;
            }
            sleep(PAUSE).await;
        }
    }

    async fn post(&self, post: &Post) -> Answer {
        #[derive(Deserialize)]
        struct Accepted {
            order_id: OrderId,
        }
        let request = self
            .http
            .post(&self.orders)
            .header("content-type", post.content_type)
            .header("idempotency-key", &post.key)
            .header("x-user-id", &post.user)
            .body(post.body.clone());
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) => return Answer::None(error.to_string()),
        };
        let status = response.status();
        if status.is_client_error() {
            return Answer::Refused(status);
        }
        match response.json::<Accepted>().await {
            Ok(accepted) if status == StatusCode::ACCEPTED => Answer::Taken(accepted.order_id),
            // What was not read to its end was not told.
            _ => Answer::None(status.to_string()),
        }
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn client() -> Client {
    let built = Client::builder().no_proxy().timeout(ANSWER_WITHIN).build();
    built.expect("a client without certificates needs nothing from the machine")
}
