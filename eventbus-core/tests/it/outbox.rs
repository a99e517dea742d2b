//! The outbox in memory passes the suite of outboxes.

use std::sync::Arc;

use async_trait::async_trait;
use eventbus_core::{EventId, MemoryOutbox, Message, OutboxStore, Result};
use eventbus_testkit::{OutboxHarness, OutboxTransaction, outbox_conformance};

#[derive(Default)]
struct InMemory(MemoryOutbox);

struct Transaction(MemoryOutbox, Vec<(EventId, Message)>);

#[async_trait]
impl OutboxHarness for InMemory {
    async fn open(&self) -> Result<Arc<dyn OutboxStore>> {
        Ok(Arc::new(self.0.clone()))
    }

    async fn begin(&self) -> Result<Box<dyn OutboxTransaction>> {
        Ok(Box::new(Transaction(self.0.clone(), Vec::new())))
    }
}

#[async_trait]
impl OutboxTransaction for Transaction {
    async fn append(&mut self, messages: Vec<(EventId, Message)>) -> Result<()> {
        self.1.extend(messages);
        Ok(())
    }

    async fn commit(self: Box<Self>) -> Result<()> {
        self.0.append(self.1)
    }
}

outbox_conformance!(InMemory::default());
