//! The orders of a demo, written before any is placed, so that it is known how they have to end.
//!
//! The same seed writes the same book. To know the ends whatever runs first, the limited product is
//! bought alone, one piece an order, and with good cards.

use std::collections::BTreeMap;

use fastrand::Rng;
use serde_json::{Value, json};

use crate::catalogue::{self, LIMITED, PRODUCTS};
use crate::events::{Cents, Line};
use crate::fake::psp::DECLINED;

/// Out of a thousand orders, about so many have a card that is declined.
const DECLINED_PER_MILLE: u32 = 40;
/// Out of a thousand orders, about so many ask for the limited product; half of them get it.
const LIMITED_PER_MILLE: u32 = 40;
/// Out of a thousand orders, about so many are posted twice.
const TWICE_PER_MILLE: u32 = 10;

const GIVEN_NAMES: [&str; 12] = [
    "Ada", "Grace", "Edsger", "Barbara", "Donald", "Frances", "Tony", "Radia", "Ken", "Margaret",
    "Leslie", "Hedy",
];
const FAMILY_NAMES: [&str; 12] = [
    "Moreau",
    "Okafor",
    "Lindqvist",
    "Tanaka",
    "Alvarez",
    "Novak",
    "Haddad",
    "Olsen",
    "Ferrari",
    "Kumar",
    "Schmidt",
    "Doyle",
];
const GOOD_CARDS: [&str; 4] = ["tok_4242", "tok_5556", "tok_8431", "tok_0005"];

/// All requests of a demo, and the stock they meet.
#[derive(Debug)]
pub struct OrderBook {
    /// In the order in which they are sent.
    pub posts: Vec<Post>,
    /// What is on the shelves in the beginning.
    pub stock: BTreeMap<String, u32>,
}

/// One `POST /orders`.
#[derive(Debug)]
pub struct Post {
    /// The idempotency key.
    pub key: String,
    /// The user id.
    pub user: String,
    /// The session id.
    pub session: String,
    /// The content type.
    pub content_type: &'static str,
    /// The body.
    pub body: String,
    /// It is sent a second time, as after a lost answer.
    pub twice: bool,
    /// What is ordered; nothing when it is to be refused.
    pub lines: Vec<Line>,
    /// What that costs.
    pub total: Cents,
    /// How it has to end.
    pub end: End,
}

/// How an order has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Shipped.
    Shipped,
    /// Shipped or out of stock: who comes first, is served first.
    Limited,
    /// Cancelled because the card is declined.
    Declined,
    /// Refused by the gateway with this status.
    Refused(u16),
}

/// How many orders have to end in which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Shipped.
    pub shipped: usize,
    /// Cancelled: out of stock.
    pub short: usize,
    /// Cancelled: declined.
    pub declined: usize,
    /// Refused.
    pub refused: usize,
}

impl OrderBook {
    /// Writes a book of so many orders and some to be refused; `run` names the idempotency keys.
    pub fn write(orders: u32, seed: u64, run: &str) -> Self {
        let mut random = Rng::with_seed(seed);
        let mut posts: Vec<Post> = (0..orders)
            .map(|number| good_post(&mut random, &format!("{run}-{number}")))
            .collect();
        let stock = stock_for(&posts);
        let refused = (orders / 100).max(BAD_ORDERS as u32);
        for number in 0..refused {
            let post = bad_post(number as usize, &format!("{run}-bad-{number}"));
            let place = random.usize(0..=posts.len());
            posts.insert(place, post);
        }
        Self { posts, stock }
    }

    /// How the orders have to end.
    pub fn ends(&self) -> Ends {
        let count = |wanted: fn(End) -> bool| {
            let ends = self.posts.iter().map(|post| post.end);
            ends.filter(|end| wanted(*end)).count()
        };
        let limited = count(|end| end == End::Limited);
        let served = limited.min(self.stock.get(LIMITED).map_or(0, |pieces| *pieces as usize));
        Ends {
            shipped: count(|end| end == End::Shipped) + served,
            short: limited - served,
            declined: count(|end| end == End::Declined),
            refused: count(|end| matches!(end, End::Refused(_))),
        }
    }
}

fn good_post(random: &mut Rng, key: &str) -> Post {
    let roll = random.u32(0..1000);
    let (end, lines) = if roll < LIMITED_PER_MILLE {
        (End::Limited, vec![line(LIMITED, 1)])
    } else if roll < LIMITED_PER_MILLE + DECLINED_PER_MILLE {
        (End::Declined, some_lines(random))
    } else {
        (End::Shipped, some_lines(random))
    };
    let card = match end {
        End::Declined => format!("tok_{DECLINED}"),
        _ => random
            .choice(GOOD_CARDS)
            .unwrap_or(GOOD_CARDS[0])
            .to_owned(),
    };
    let given = random.choice(GIVEN_NAMES).unwrap_or(GIVEN_NAMES[0]);
    let family = random.choice(FAMILY_NAMES).unwrap_or(FAMILY_NAMES[0]);
    let user = format!("{given}.{family}").to_lowercase();
    let body = json!({
        "customer": {
            "name": format!("{given} {family}"),
            "email": format!("{user}@example.com"),
        },
        "card": card,
        "items": lines,
    });
    Post {
        key: key.to_owned(),
        session: format!("session-{:08x}", random.u32(..)),
        user,
        content_type: "application/json",
        body: body.to_string(),
        twice: random.u32(0..1000) < TWICE_PER_MILLE,
        total: cost(&lines),
        lines,
        end,
    }
}

/// One to four products other than the limited one, one to three pieces of each.
fn some_lines(random: &mut Rng) -> Vec<Line> {
    let products = PRODUCTS.iter().filter(|product| product.id != LIMITED);
    let amount = random.usize(1..=4);
    let chosen = random.choose_multiple(products, amount);
    let mut lines: Vec<Line> = Vec::with_capacity(amount);
    for product in chosen {
        lines.push(line(product.id, random.u32(1..=3)));
    }
    lines
}

fn line(product: &str, quantity: u32) -> Line {
    Line {
        product: product.to_owned(),
        quantity,
    }
}

fn cost(lines: &[Line]) -> Cents {
    let price = |line: &Line| catalogue::find(&line.product).map_or(0, |product| product.price.0);
    let costs = lines
        .iter()
        .map(|line| Cents(price(line) * u64::from(line.quantity)));
    costs.sum()
}

/// A tenth more than is ordered, but only half of the limited product.
fn stock_for(posts: &[Post]) -> BTreeMap<String, u32> {
    let mut stock: BTreeMap<String, u32> = PRODUCTS
        .iter()
        .map(|product| (product.id.to_owned(), 0))
        .collect();
    for line in posts.iter().flat_map(|post| &post.lines) {
        *stock.entry(line.product.clone()).or_default() += line.quantity;
    }
    for (product, pieces) in &mut stock {
        *pieces = match product == LIMITED {
            true => *pieces / 2,
            false => *pieces + *pieces / 10,
        };
    }
    stock
}

const BAD_ORDERS: usize = 7;

/// An order that the gateway has to refuse, one of several kinds.
fn bad_post(number: usize, key: &str) -> Post {
    let order = |items: Value| {
        json!({
            "customer": { "name": "Mallory", "email": "mallory@example.com" },
            "card": "tok_4242",
            "items": items,
        })
        .to_string()
    };
    let json = "application/json";
    let (content_type, body, status) = match number % BAD_ORDERS {
        0 => (
            json,
            order(json!([{ "product": "unicorn", "quantity": 1 }])),
            422,
        ),
        1 => (
            json,
            order(json!([{ "product": "teapot", "quantity": 0 }])),
            422,
        ),
        2 => (
            json,
            order(json!([{ "product": "teapot", "quantity": 1_000_000 }])),
            422,
        ),
        3 => (json, order(json!([])), 422),
        4 => (json, r#"{"customer": "#.to_owned(), 400),
        5 => (
            "text/plain",
            order(json!([{ "product": "teapot", "quantity": 1 }])),
            415,
        ),
        _ => (json, " ".repeat(200 * 1024), 413),
    };
    Post {
        key: key.to_owned(),
        user: "mallory".to_owned(),
        session: "session-bad".to_owned(),
        content_type,
        body,
        twice: false,
        lines: Vec::new(),
        total: Cents::default(),
        end: End::Refused(status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_writes_the_same_book() {
        let bodies = |seed| -> Vec<String> {
            let book = OrderBook::write(200, seed, "run");
            book.posts.into_iter().map(|post| post.body).collect()
        };
        assert_eq!(bodies(7), bodies(7));
        assert_ne!(bodies(7), bodies(8));
    }

    #[test]
    fn every_end_is_in_a_book_of_the_usual_size() {
        let ends = OrderBook::write(1000, 1, "run").ends();
        assert_eq!(ends.shipped + ends.short + ends.declined, 1000);
        assert!(ends.short > 5 && ends.declined > 20, "{ends:?}");
        assert_eq!(ends.refused, 10);
    }

    #[test]
    fn there_is_enough_of_everything_but_the_limited_product() {
        let book = OrderBook::write(500, 3, "run");
        let mut ordered: BTreeMap<&str, u32> = BTreeMap::new();
        for line in book.posts.iter().flat_map(|post| &post.lines) {
            *ordered.entry(&line.product).or_default() += line.quantity;
        }
        for (product, pieces) in ordered {
            assert_eq!(
                book.stock[product] < pieces,
                product == LIMITED,
                "{product}"
            );
        }
    }

    #[test]
    fn a_book_of_one_order_is_possible() {
        let ends = OrderBook::write(1, 1, "run").ends();
        assert_eq!(ends.shipped + ends.short + ends.declined, 1);
    }
}
