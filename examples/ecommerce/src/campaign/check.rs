//! The checker: compares what clients were told with what every witness says.
//!
//! Nothing is lost: every order that was taken came to one end, and every service handled every
//! event that concerns it. Nothing happens twice: each service handled each event once, however often
//! that was published or delivered; one charge and one mail an order, stock and money balance.
//! Nothing overtakes: each service handled the events of an order, per topic, in the order
//! in which they were published. Nothing is made up: whatever was handled was published.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::time::{Duration, Instant};

use super::load::Told;
use super::witnesses::{Published, Witnesses};
use crate::demo::order_book::{End, OrderBook};
use crate::events::{CancelReason, Cents, OrderCreated, OrderId};
use crate::service::gateway::Status;
use crate::shop::SERVICES;

/// At most so many complaints of one kind are shown.
const SHOWN: usize = 5;

/// What became of a campaign.
#[derive(Debug)]
pub struct Verdict {
    /// Orders of which a client knows that they were taken.
    taken: Vec<Instant>,
    unknown: usize,
    orders: usize,
    shipped: usize,
    events: usize,
    events_again: usize,
    handled: usize,
    psp_repeats: u64,
    mailer_repeats: u64,
    /// Dead letters that were given to their service again.
    pub redriven: usize,
    /// How often the shop was crashed at each named step.
    pub crashes: BTreeMap<String, u32>,
    /// When processes were started again.
    pub restarts: Vec<Instant>,
    /// What does not add up.
    pub complaints: Vec<String>,
}

impl Verdict {
    /// Compares what everybody says.
    pub fn of(book: &OrderBook, told: &Told, witnesses: &Witnesses) -> Self {
        let mut complaints = told.surprises.clone();
        complaints.extend(witnesses.dead_letters.iter().take(SHOWN).cloned());
        some(&mut complaints, taken(book, told, witnesses));
        some(&mut complaints, ends(witnesses));
        some(&mut complaints, effects(witnesses));
        some(&mut complaints, automaton(witnesses));
        for (service, _) in SERVICES {
            some(&mut complaints, order_per_key(service, witnesses));
        }
        some(&mut complaints, twice(witnesses));
        let ids: HashSet<&str> = witnesses
            .wire
            .iter()
            .map(|event| event.id.as_str())
            .collect();
        Self {
            taken: told.taken.iter().map(|taken| taken.at).collect(),
            unknown: told.unknown,
            orders: witnesses.orders.len(),
            shipped: shipped(witnesses).count(),
            events: ids.len(),
            events_again: witnesses.wire.len() - ids.len(),
            handled: witnesses.journals.values().map(Vec::len).sum(),
            psp_repeats: witnesses.psp.repeats,
            mailer_repeats: witnesses.mailer.repeats,
            redriven: 0,
            crashes: BTreeMap::new(),
            restarts: Vec::new(),
            complaints,
        }
    }

    /// From each start to the first order taken after it, sorted. A process that was ended before
    /// it took one does not count.
    fn recoveries(&self) -> Vec<Duration> {
        let mut taken = self.taken.clone();
        taken.sort();
        let mut recoveries: Vec<Duration> = Vec::new();
        for (index, started) in self.restarts.iter().enumerate() {
            let first = taken.partition_point(|at| at < started);
            let next = self.restarts.get(index + 1);
            if let Some(at) = taken.get(first)
                && next.is_none_or(|next| at < next)
            {
                recoveries.push(*at - *started);
            }
        }
        recoveries.sort();
        recoveries
    }
}

/// Keeps the first few of a kind; a thousand more would hide the others.
fn some(complaints: &mut Vec<String>, found: Vec<String>) {
    let more = found.len().saturating_sub(SHOWN);
    complaints.extend(found.into_iter().take(SHOWN));
    if more > 0 {
        complaints.push(format!("… and {more} more of this kind"));
    }
}

/// Every order that a client knows to be taken was published as it was posted.
fn taken(book: &OrderBook, told: &Told, witnesses: &Witnesses) -> Vec<String> {
    let mut found = Vec::new();
    for taken in &told.taken {
        let post = &book.posts[taken.post];
        match witnesses.orders.get(&taken.order_id) {
            None => found.push(format!("{} was taken and is not there", taken.order_id)),
            Some(order) if order.lines != post.lines || order.total != post.total => {
                found.push(format!("{} is not what was ordered", taken.order_id));
            }
            Some(order) => {
                let declined = post.end == End::Declined;
                let view = witnesses.board.get(&order.order_id);
                let reason = view.and_then(|view| view.reason);
                if declined != (reason == Some(CancelReason::PaymentDeclined)) {
                    found.push(format!(
                        "{}: ended as {reason:?}, not {:?}",
                        order.order_id, post.end
                    ));
                }
            }
        }
    }
    found
}

/// Every order that was published, known to a client or not, came to its end.
fn ends(witnesses: &Witnesses) -> Vec<String> {
    let views = witnesses
        .orders
        .keys()
        .map(|order| (order, witnesses.board.get(order)));
    let open = views.filter(|(_, view)| !view.is_some_and(|view| view.is_over()));
    open.map(|(order, view)| format!("{order} is not over: {view:?}"))
        .collect()
}

fn shipped(witnesses: &Witnesses) -> impl Iterator<Item = &OrderCreated> {
    let orders = witnesses.orders.values();
    orders.filter(|order| is_shipped(witnesses, order.order_id))
}

fn is_shipped(witnesses: &Witnesses, order_id: OrderId) -> bool {
    let view = witnesses.board.get(&order_id);
    view.is_some_and(|view| view.status == Status::Shipped)
}

/// One charge and one mail an order; stock and money balance.
fn effects(witnesses: &Witnesses) -> Vec<String> {
    let count = |wanted: CancelReason| {
        let views = witnesses.board.values();
        views.filter(|view| view.reason == Some(wanted)).count() as u64
    };
    let orders = witnesses.orders.len() as u64;
    let sold: Cents = shipped(witnesses).map(|order| order.total).sum();
    let rows = [
        (
            "orders charged under two keys",
            witnesses.psp.charges_twice,
            0,
        ),
        (
            "orders mailed under two keys",
            witnesses.mailer.mails_twice,
            0,
        ),
        ("mails", witnesses.mailer.mails, orders),
        (
            "keys at the payment provider",
            witnesses.psp.keys.len() as u64,
            orders - count(CancelReason::OutOfStock),
        ),
        (
            "charges declined",
            witnesses.psp.declined,
            count(CancelReason::PaymentDeclined),
        ),
        ("cents charged", witnesses.psp.charged_cents, sold.0),
    ];
    let rows = rows
        .into_iter()
        .filter(|(_, is, should_be)| is != should_be);
    let rows = rows.map(|(what, is, should_be)| format!("{what}: {is} instead of {should_be}"));
    rows.chain(stock(witnesses)).collect()
}

/// What there was is on the shelf or set aside, and what is set aside was shipped.
fn stock(witnesses: &Witnesses) -> Vec<String> {
    let mut parcels: BTreeMap<&str, u32> = BTreeMap::new();
    for line in shipped(witnesses).flat_map(|order| &order.lines) {
        *parcels.entry(&line.product).or_default() += line.quantity;
    }
    let pieces = |of: &BTreeMap<String, u32>, product| of.get(product).copied().unwrap_or(0);
    let mut found = Vec::new();
    for (product, was) in &witnesses.stock {
        let shelf = pieces(&witnesses.on_shelf, product);
        let aside = pieces(&witnesses.set_aside, product);
        let sent = parcels.get(product.as_str()).copied().unwrap_or(0);
        if *was != shelf + aside || aside != sent {
            found.push(format!(
                "{product}: {was} pieces became {shelf} on the shelf, {aside} set aside, {sent} sent"
            ));
        }
    }
    found
}

/// The events of each order in each topic, as far as they differ, in the order of the topic.
fn flows(wire: &[Published]) -> BTreeMap<(&str, &str), Vec<&Published>> {
    let mut seen = HashSet::new();
    let mut flows: BTreeMap<(&str, &str), Vec<&Published>> = BTreeMap::new();
    for event in wire.iter().filter(|event| seen.insert(&event.id)) {
        let flow = flows.entry((&event.topic, &event.key)).or_default();
        flow.push(event);
    }
    flows
}

/// What may happen to an order, topic by topic.
fn automaton(witnesses: &Witnesses) -> Vec<String> {
    let mut found = Vec::new();
    for ((topic, key), events) in flows(&witnesses.wire) {
        let types: Vec<&str> = events
            .iter()
            .map(|event| event.event_type.as_str())
            .collect();
        let allowed = matches!(
            types[..],
            ["OrderCreated", "OrderShipped" | "OrderCancelled"]
                | ["InventoryShort"]
                | ["InventoryReserved"]
                | ["InventoryReserved", "InventoryReleased"]
                | ["PaymentProcessed" | "PaymentFailed"]
                | ["ShippingCreated"]
                | ["NotificationSent"]
        );
        if !allowed {
            found.push(format!("{key} went through {types:?} in {topic}"));
        }
    }
    found
}

/// Whether a service handles events of this type.
fn concerns(service: &str, event_type: &str) -> bool {
    match service {
        "gateway" => true,
        "order" => matches!(
            event_type,
            "OrderCreated" | "InventoryShort" | "PaymentFailed" | "NotificationSent"
        ),
        "inventory" => matches!(event_type, "OrderCreated" | "PaymentFailed"),
        "payment" => event_type == "InventoryReserved",
        "shipping" => event_type == "PaymentProcessed",
        _ => matches!(event_type, "ShippingCreated" | "OrderCancelled"),
    }
}

/// A service handled what was published, all of it, each first time in the topic's order.
fn order_per_key(service: &str, witnesses: &Witnesses) -> Vec<String> {
    let topics: HashMap<&str, &str> = witnesses
        .wire
        .iter()
        .map(|event| (event.id.as_str(), event.topic.as_str()))
        .collect();
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    let mut first_times: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for event in &witnesses.journals[service] {
        let Some(topic) = topics.get(event.event_id.as_str()) else {
            let id = &event.event_id;
            found.push(format!("{service} handled {id}, which nobody published"));
            continue;
        };
        if seen.insert(&event.event_id) {
            let flow = first_times.entry((*topic, &event.key)).or_default();
            flow.push(&event.event_id);
        }
    }
    for ((topic, key), events) in flows(&witnesses.wire) {
        let concern = events
            .iter()
            .filter(|event| concerns(service, &event.event_type));
        let published: Vec<&str> = concern.map(|event| event.id.as_str()).collect();
        let handled = first_times
            .get(&(topic, key))
            .map_or(&[][..], Vec::as_slice);
        if published != handled {
            found.push(format!(
                "{service} handled {handled:?} of {key} in {topic}, where {published:?} is"
            ));
        }
    }
    found
}

/// No service handled an event twice, so that its effects happened once.
fn twice(witnesses: &Witnesses) -> Vec<String> {
    let mut found = Vec::new();
    for (service, journal) in &witnesses.journals {
        let mut seen = HashSet::new();
        for event in journal.iter().filter(|event| !seen.insert(&event.event_id)) {
            let (event_type, key) = (&event.event_type, &event.key);
            found.push(format!("{service} handled {event_type} of {key} twice"));
        }
    }
    found
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let recoveries = self.recoveries();
        let at = |percent: usize| {
            let rank = (recoveries.len() * percent).div_ceil(100).max(1);
            recoveries.get(rank - 1).map_or(0, Duration::as_millis)
        };
        let steps = self.crashes.values().filter(|times| **times > 0).count();
        let rows = [
            ("processes started again", self.restarts.len().to_string()),
            (
                "crashes at named steps",
                self.crashes.values().sum::<u32>().to_string(),
            ),
            ("  different steps", steps.to_string()),
            ("orders taken", self.taken.len().to_string()),
            ("  and unknown to their client", self.unknown.to_string()),
            ("orders there", self.orders.to_string()),
            ("  shipped", self.shipped.to_string()),
            ("events", self.events.to_string()),
            ("  published again", self.events_again.to_string()),
            ("events handled", self.handled.to_string()),
            ("dead or parked, handled then", self.redriven.to_string()),
            ("charges asked for again", self.psp_repeats.to_string()),
            ("mails asked for again", self.mailer_repeats.to_string()),
            ("start to next 202, median", format!("{} ms", at(50))),
            ("start to next 202, 99 of 100", format!("{} ms", at(99))),
        ];
        for (what, value) in rows {
            writeln!(f, "{what:<30} {value:>10}")?;
        }
        if self.complaints.is_empty() {
            return f.write_str("\nnothing lost, nothing twice, nothing overtaken");
        }
        f.write_str("\nIT DOES NOT ADD UP:")?;
        for complaint in &self.complaints {
            write!(f, "\n  {complaint}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
