//! The summary of a demo: counts from several independent witnesses, which must add up.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::ser::{Serialize, SerializeMap as _, Serializer};

use super::checkout::Checkout;
use super::history::History;
use super::order_book::{Ends, OrderBook};
use crate::events::{self, CancelReason, Cents, OrderId};
use crate::fake::mailer::MailerCalls;
use crate::fake::psp::PspCalls;
use crate::service::gateway::{OrderView, Status};

/// What the witnesses say.
#[derive(Debug)]
pub struct Findings {
    /// The payment provider's books.
    pub psp: PspCalls,
    /// The mail provider's books.
    pub mailer: MailerCalls,
    /// Orders whose end did not come in time.
    pub unfinished: usize,
    /// What the services could not handle.
    pub dead_letters: Vec<String>,
    /// Where the gateway sees each order.
    pub orders: HashMap<OrderId, OrderView>,
    /// What the inventory has on its shelves.
    pub on_shelf: BTreeMap<String, u32>,
    /// What the inventory has set aside.
    pub set_aside: BTreeMap<String, u32>,
}

/// What is to be seen at the end.
#[derive(Debug)]
pub struct Summary {
    placed: usize,
    ended: Ends,
    unfinished: usize,
    charges_twice: u64,
    mails_twice: u64,
    psp_repeats: u64,
    charged: Cents,
    refunded: Cents,
    sold: Cents,
    stock_conserved: bool,
    money_conserved: bool,
    p50_ms: f64,
    p99_ms: f64,
    events: usize,
    events_again: usize,
    dead_letters: usize,
    /// What does not add up, in words; nothing when all is well.
    pub complaints: Vec<String>,
}

impl Summary {
    /// Compares what the witnesses say with what the book demands.
    pub fn of(
        book: &OrderBook,
        checkout: &Checkout,
        history: &History,
        findings: &Findings,
    ) -> Self {
        let mut ended = Ends {
            shipped: 0,
            short: 0,
            declined: 0,
            refused: checkout.refused,
        };
        let mut latencies = Vec::with_capacity(checkout.placed.len());
        let mut sold = Vec::new();
        let mut parcels: BTreeMap<String, u32> = BTreeMap::new();
        for placed in &checkout.placed {
            let post = &book.posts[placed.post];
            let Some(order) = findings.orders.get(&placed.order_id) else {
                continue;
            };
            match (order.status, order.reason) {
                (Status::Shipped, _) => {
                    ended.shipped += 1;
                    sold.push(post.total);
                    add(&mut parcels, &post.lines);
                }
                (Status::Cancelled, Some(CancelReason::PaymentDeclined)) => ended.declined += 1,
                (Status::Cancelled, _) => ended.short += 1,
                _ => {}
            }
            if let Some(ended_at) = order.ended_at {
                let latency = ended_at
                    .duration_since(placed.posted_at)
                    .unwrap_or_default();
                latencies.push(latency.as_secs_f64() * 1000.0);
            }
        }
        latencies.sort_by(f64::total_cmp);
        let placed = checkout.placed.iter();
        let orders = placed.map(|placed| placed.order_id.to_string()).collect();
        let (events, events_again) = history.count(&orders);
        let (charged, refunded) = (findings.psp.charged_cents, findings.psp.refunded_cents);
        let sold: Cents = sold.into_iter().sum();
        let mut summary = Self {
            placed: checkout.placed.len(),
            ended,
            unfinished: findings.unfinished,
            charges_twice: findings.psp.charges_twice,
            mails_twice: findings.mailer.mails_twice,
            psp_repeats: findings.psp.repeats,
            charged: Cents(charged),
            refunded: Cents(refunded),
            sold,
            stock_conserved: is_conserved(&book.stock, &parcels, findings),
            money_conserved: charged == sold.0 + refunded,
            p50_ms: percentile(&latencies, 50),
            p99_ms: percentile(&latencies, 99),
            events,
            events_again,
            dead_letters: findings.dead_letters.len(),
            complaints: checkout.surprises.clone(),
        };
        summary.compare(book, findings);
        summary
    }

    /// Says in words what does not add up.
    fn compare(&mut self, book: &OrderBook, findings: &Findings) {
        let expected = book.ends();
        let ended = self.ended;
        let over = ended.shipped + ended.short + ended.declined;
        let rows = [
            (
                "placed",
                self.placed,
                expected.shipped + expected.short + expected.declined,
            ),
            ("shipped + cancelled", over, self.placed),
            ("unfinished", self.unfinished, 0),
            ("shipped", ended.shipped, expected.shipped),
            ("cancelled, out of stock", ended.short, expected.short),
            ("cancelled, declined", ended.declined, expected.declined),
            ("refused", ended.refused, expected.refused),
            ("charged twice", self.charges_twice as usize, 0),
            ("mailed twice", self.mails_twice as usize, 0),
            ("mails", findings.mailer.mails as usize, self.placed),
            (
                "declined by the provider",
                findings.psp.declined as usize,
                expected.declined,
            ),
        ];
        for (what, is, should_be) in rows {
            if is != should_be {
                self.complaints
                    .push(format!("{what}: {is} instead of {should_be}"));
            }
        }
        // The first few say what is wrong; a thousand more would hide it.
        let letters = findings.dead_letters.iter().take(5).cloned();
        self.complaints.extend(letters);
        if !self.stock_conserved {
            let stock = "stock: what there was is not what is left, set aside and in parcels";
            self.complaints.push(stock.to_owned());
        }
        if !self.money_conserved {
            let (charged, sold) = (self.charged, self.sold);
            self.complaints
                .push(format!("money: {charged} charged, {sold} sold"));
        }
    }

    /// The line that programs read.
    pub fn line(&self) -> Line<'_> {
        Line(self)
    }
}

/// A summary as one JSON object.
#[derive(Debug)]
pub struct Line<'a>(&'a Summary);

impl Serialize for Line<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let summary = self.0;
        let mut line = serializer.serialize_map(None)?;
        line.serialize_entry("placed", &summary.placed)?;
        line.serialize_entry("shipped", &summary.ended.shipped)?;
        line.serialize_entry("cancelled", &(summary.ended.short + summary.ended.declined))?;
        line.serialize_entry("unfinished", &summary.unfinished)?;
        line.serialize_entry("charges_twice", &summary.charges_twice)?;
        line.serialize_entry("mails_twice", &summary.mails_twice)?;
        line.serialize_entry("stock_conserved", &summary.stock_conserved)?;
        line.serialize_entry("money_conserved", &summary.money_conserved)?;
        line.serialize_entry("p50_ms", &summary.p50_ms)?;
        line.serialize_entry("p99_ms", &summary.p99_ms)?;
        line.serialize_entry("events", &summary.events)?;
        line.end()
    }
}

/// What there was is on the shelves or set aside, and what is set aside is what was shipped.
fn is_conserved(
    stock: &BTreeMap<String, u32>,
    parcels: &BTreeMap<String, u32>,
    findings: &Findings,
) -> bool {
    let pieces = |of: &BTreeMap<String, u32>, product| of.get(product).copied().unwrap_or(0);
    stock.iter().all(|(product, was)| {
        let set_aside = pieces(&findings.set_aside, product);
        *was == pieces(&findings.on_shelf, product) + set_aside
            && set_aside == pieces(parcels, product)
    })
}

fn add(pieces: &mut BTreeMap<String, u32>, lines: &[events::Line]) {
    for line in lines {
        *pieces.entry(line.product.clone()).or_default() += line.quantity;
    }
}

/// The value that `percent` of the sorted values do not exceed, to a tenth.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    let value = sorted.get(rank - 1).copied().unwrap_or(0.0);
    (value * 10.0).round() / 10.0
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes = |conserved| {
            if conserved {
                "conserved"
            } else {
                "NOT CONSERVED"
            }
        };
        let ended = self.ended;
        writeln!(f, "{:<28} {:>12}", "orders placed", self.placed)?;
        writeln!(f, "{:<28} {:>12}", "  shipped", ended.shipped)?;
        writeln!(f, "{:<28} {:>12}", "  cancelled, out of stock", ended.short)?;
        writeln!(
            f,
            "{:<28} {:>12}",
            "  cancelled, card declined", ended.declined
        )?;
        writeln!(f, "{:<28} {:>12}", "  unfinished", self.unfinished)?;
        writeln!(f, "{:<28} {:>12}", "bad orders refused", ended.refused)?;
        writeln!(f, "{:<28} {:>12}", "charged", self.charged)?;
        writeln!(f, "{:<28} {:>12}", "  refunded", self.refunded)?;
        writeln!(
            f,
            "{:<28} {:>12}",
            "  orders charged twice", self.charges_twice
        )?;
        writeln!(f, "{:<28} {:>12}", "  calls repeated", self.psp_repeats)?;
        writeln!(f, "{:<28} {:>12}", "orders mailed twice", self.mails_twice)?;
        writeln!(f, "{:<28} {:>12}", "stock", yes(self.stock_conserved))?;
        writeln!(f, "{:<28} {:>12}", "money", yes(self.money_conserved))?;
        writeln!(f, "{:<28} {:>9} ms", "POST to end, median", self.p50_ms)?;
        writeln!(f, "{:<28} {:>9} ms", "POST to end, 99 of 100", self.p99_ms)?;
        writeln!(f, "{:<28} {:>12}", "events", self.events)?;
        writeln!(f, "{:<28} {:>12}", "  published again", self.events_again)?;
        writeln!(f, "{:<28} {:>12}", "  dead letters", self.dead_letters)?;
        if self.complaints.is_empty() {
            return f.write_str("\neverything adds up");
        }
        f.write_str("\nIT DOES NOT ADD UP:")?;
        for complaint in &self.complaints {
            write!(f, "\n  {complaint}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(
            (percentile(&hundred, 50), percentile(&hundred, 99)),
            (50.0, 99.0)
        );
        assert_eq!(percentile(&[7.0], 99), 7.0);
        assert_eq!(percentile(&[], 50), 0.0);
    }
}
