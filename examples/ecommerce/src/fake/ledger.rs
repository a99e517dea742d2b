//! What a fake was asked and what it answered, by idempotency key.

use std::collections::{BTreeMap, HashMap};

use crate::events::OrderId;

/// Remembers the first answer to each key, and counts calls and orders.
#[derive(Debug)]
pub struct Ledger<A> {
    calls: BTreeMap<String, u64>,
    answers: HashMap<String, A>,
    /// How many keys an order was served under: more than one is a mistake of the caller.
    served: HashMap<OrderId, u64>,
}

impl<A> Default for Ledger<A> {
    fn default() -> Self {
        Self {
            calls: BTreeMap::new(),
            answers: HashMap::new(),
            served: HashMap::new(),
        }
    }
}

impl<A: Clone> Ledger<A> {
    /// Counts a call and says whether it is the first with this key.
    pub fn called(&mut self, key: &str) -> bool {
        if let Some(calls) = self.calls.get_mut(key) {
            *calls += 1;
            return false;
        }
        self.calls.insert(key.to_owned(), 1);
        true
    }

    /// What was answered to this key before.
    pub fn answer(&self, key: &str) -> Option<A> {
        self.answers.get(key).cloned()
    }

    /// Keeps the answer to this key.
    pub fn answered(&mut self, key: &str, answer: A) {
        self.answers.insert(key.to_owned(), answer);
    }

    /// Counts that an order was served under one more key.
    pub fn served(&mut self, order_id: OrderId) {
        *self.served.entry(order_id).or_default() += 1;
    }

    /// Orders served under more than one key.
    pub fn served_twice(&self) -> u64 {
        self.served.values().filter(|keys| **keys > 1).count() as u64
    }

    /// Calls per key.
    pub fn calls(&self) -> &BTreeMap<String, u64> {
        &self.calls
    }

    /// All calls, and those among them that repeated a key.
    pub fn totals(&self) -> (u64, u64) {
        let calls: u64 = self.calls.values().sum();
        (calls, calls - self.calls.len() as u64)
    }
}
