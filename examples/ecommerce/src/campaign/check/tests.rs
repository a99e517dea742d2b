//! Whether the checker finds what it is there to find: a run that adds up, and one fault each.

use std::time::Instant;

use super::{Verdict, Witnesses};
use crate::campaign::load::{Taken, Told};
use crate::campaign::witnesses::Published;
use crate::database::Handled;
use crate::demo::order_book::{End, OrderBook};
use crate::events::{CancelReason, Customer, OrderCreated, OrderId};
use crate::fake::mailer::MailerCalls;
use crate::fake::psp::PspCalls;
use crate::service::gateway::{OrderView, Status};
use crate::service::sample::order_id;
use crate::shop::SERVICES;

/// A campaign without a crash: what there would be to see.
struct Run {
    book: OrderBook,
    told: Told,
    witnesses: Witnesses,
}

impl Run {
    fn good() -> Self {
        let mut book = OrderBook::write(60, 1, "run");
        book.posts
            .retain(|post| matches!(post.end, End::Shipped | End::Declined));
        let mut run = Self {
            told: Told::default(),
            witnesses: Witnesses {
                wire: Vec::new(),
                orders: Default::default(),
                journals: SERVICES
                    .iter()
                    .map(|(service, _)| (*service, Vec::new()))
                    .collect(),
                board: Default::default(),
                psp: PspCalls {
                    calls: 0,
                    repeats: 0,
                    charged_cents: 0,
                    refunded_cents: 0,
                    declined: 0,
                    charges_twice: 0,
                    keys: Default::default(),
                },
                mailer: MailerCalls {
                    calls: 0,
                    repeats: 0,
                    mails: 0,
                    mails_twice: 0,
                    keys: Default::default(),
                },
                stock: book.stock.clone(),
                on_shelf: book.stock.clone(),
                set_aside: Default::default(),
                dead_letters: Vec::new(),
            },
            book,
        };
        for post in 0..run.book.posts.len() {
            run.place(post);
        }
        run
    }

    fn place(&mut self, index: usize) {
        let post = &self.book.posts[index];
        let order_id = order_id(index as u128);
        let at = Instant::now();
        self.told.taken.push(Taken {
            post: index,
            order_id,
            at,
        });
        let customer = Customer {
            name: post.user.clone(),
            email: post.user.clone(),
        };
        let order = OrderCreated {
            order_id,
            customer,
            lines: post.lines.clone(),
            total: post.total,
            card: String::new(),
        };
        let mut view = OrderView::default();
        view.tell();
        let witnesses = &mut self.witnesses;
        witnesses.mailer.mails += 1;
        witnesses.psp.keys.insert(format!("payment/{index}"), 1);
        let types: &[(&str, &str)] = if post.end == End::Declined {
            view.fail(CancelReason::PaymentDeclined);
            view.reach(Status::Cancelled);
            view.release();
            witnesses.psp.declined += 1;
            &[
                ("order", "OrderCreated"),
                ("inventory", "InventoryReserved"),
                ("payment", "PaymentFailed"),
                ("inventory", "InventoryReleased"),
                ("order", "OrderCancelled"),
                ("notification", "NotificationSent"),
            ]
        } else {
            view.reach(Status::Shipped);
            witnesses.psp.charged_cents += post.total.0;
            for line in &post.lines {
                *witnesses.on_shelf.get_mut(&line.product).unwrap() -= line.quantity;
                let aside = witnesses.set_aside.entry(line.product.clone());
                *aside.or_default() += line.quantity;
            }
            &[
                ("order", "OrderCreated"),
                ("inventory", "InventoryReserved"),
                ("payment", "PaymentProcessed"),
                ("shipping", "ShippingCreated"),
                ("notification", "NotificationSent"),
                ("order", "OrderShipped"),
            ]
        };
        witnesses.board.insert(order_id, view);
        witnesses.orders.insert(order_id, order);
        for (topic, event_type) in types {
            self.publish(order_id, topic, event_type);
        }
    }

    fn publish(&mut self, order_id: OrderId, topic: &str, event_type: &str) {
        let key = order_id.to_string();
        let id = format!("{event_type}/{key}");
        for (service, journal) in &mut self.witnesses.journals {
            if super::concerns(service, event_type) {
                journal.push(Handled {
                    key: key.clone(),
                    event_type: event_type.to_owned(),
                    event_id: id.clone(),
                });
            }
        }
        self.witnesses.wire.push(Published {
            topic: topic.to_owned(),
            key,
            event_type: event_type.to_owned(),
            id,
        });
    }

    fn complaints(&self) -> Vec<String> {
        Verdict::of(&self.book, &self.told, &self.witnesses).complaints
    }

    /// The place of the first event of a type in a service's journal.
    fn handled(&self, service: &str, event_type: &str) -> usize {
        let mut journal = self.witnesses.journals[service].iter();
        let found = journal.position(|event| event.event_type == event_type);
        found.expect("it was handled")
    }

    fn journal(&mut self, service: &'static str) -> &mut Vec<Handled> {
        self.witnesses
            .journals
            .get_mut(service)
            .expect("it has one")
    }
}

#[test]
fn a_good_run_adds_up() {
    assert_eq!(Run::good().complaints(), Vec::<String>::new());
}

/// A fault, and how to make it.
struct Plant(&'static str, fn(&mut Run));

#[test]
fn every_planted_fault_is_found() {
    let plants = [
        Plant("an order is lost", |run| {
            let lost = run.told.taken[3].order_id;
            run.witnesses.orders.remove(&lost);
        }),
        Plant("an order never ends", |run| {
            let open = run.told.taken[3].order_id;
            run.witnesses.board.insert(open, OrderView::default());
        }),
        Plant("an order is taken for another", |run| {
            let order = run.witnesses.orders.values_mut().next().unwrap();
            order.total.0 += 1;
        }),
        Plant("an event is not handled", |run| {
            let at = run.handled("shipping", "PaymentProcessed");
            run.journal("shipping").remove(at);
        }),
        Plant("an event is handled that nobody published", |run| {
            run.journal("payment")[0].event_id = "made up".to_owned();
        }),
        Plant("an event overtakes", |run| {
            let at = run.handled("gateway", "OrderCreated");
            let key = run.journal("gateway")[at].key.clone();
            let last = run.journal("gateway").iter();
            let last = last.clone().rposition(|event| {
                event.key == key && matches!(&*event.event_type, "OrderShipped" | "OrderCancelled")
            });
            run.journal("gateway").swap(at, last.unwrap());
        }),
        Plant("an event is handled twice", |run| {
            let again = run.journal("inventory")[0].clone();
            run.journal("inventory").push(again);
        }),
        Plant(
            "an event that was published twice is handled twice",
            |run| {
                let again = run.journal("shipping")[0].clone();
                let mut wire = run.witnesses.wire.iter();
                let copy = wire.find(|event| event.id == again.event_id).cloned();
                run.witnesses.wire.extend(copy);
                run.journal("shipping").push(again);
            },
        ),
        Plant("an order ends twice", |run| {
            let order_id = run.told.taken[0].order_id;
            run.publish(order_id, "order", "OrderCancelled");
        }),
        Plant("an order is charged under two keys", |run| {
            run.witnesses.psp.charges_twice = 1;
        }),
        Plant("a charge is made for nothing", |run| {
            run.witnesses.psp.keys.insert("another".to_owned(), 1);
        }),
        Plant("a mail is not sent", |run| run.witnesses.mailer.mails -= 1),
        Plant("a mail is sent under two keys", |run| {
            run.witnesses.mailer.mails_twice = 1;
        }),
        Plant("money is missing", |run| {
            run.witnesses.psp.charged_cents -= 1
        }),
        Plant("a piece is missing from a shelf", |run| {
            *run.witnesses.on_shelf.values_mut().next().unwrap() -= 1;
        }),
        Plant("what is set aside was not sent", |run| {
            *run.witnesses.on_shelf.get_mut("teapot").unwrap() -= 1;
            *run.witnesses.set_aside.get_mut("teapot").unwrap() += 1;
        }),
        Plant("a dead letter is left", |run| {
            run.witnesses.dead_letters.push("payment".to_owned());
        }),
    ];
    for Plant(fault, plant) in plants {
        let mut run = Run::good();
        plant(&mut run);
        assert!(!run.complaints().is_empty(), "not found: {fault}");
    }
}
