//! A unit of work with a bug.

use std::any::Any;

use async_trait::async_trait;
use eventbus_core::{
    BoxError, Committed, Group, InboxEntry, MemoryUnit, Message, Result, Unit, UnitOfWork, Work,
};
use eventbus_verify::Effect;

use super::{Bed, Plant};

/// The effects of a group, committed with its inbox and its outbox; with the bug of a [`Bed`], if that
/// is one of units.
#[derive(Clone, Debug)]
pub(crate) struct PlantedUnit {
    inner: MemoryUnit<Vec<Effect>>,
    bed: Bed,
}

impl PlantedUnit {
    pub(crate) fn new(inner: MemoryUnit<Vec<Effect>>, bed: Bed) -> Self {
        Self { inner, bed }
    }

    pub(crate) fn sound(&self) -> &MemoryUnit<Vec<Effect>> {
        &self.inner
    }
}

impl Unit for PlantedUnit {
    type Resource = Vec<Effect>;
}

#[async_trait]
impl UnitOfWork for PlantedUnit {
    fn group_max(&self) -> usize {
        self.inner.group_max()
    }

    async fn begin(&self, group: &Group, events: &[InboxEntry]) -> Result<Box<dyn Work>> {
        let known = match self.bed.has(Plant::ForgetsInbox) {
            true => &[],
            false => events,
        };
        Ok(Box::new(PlantedWork {
            inner: self.inner.begin(group, known).await?,
            bed: self.bed.clone(),
        }))
    }
}

#[derive(Debug)]
struct PlantedWork {
    inner: Box<dyn Work>,
    bed: Bed,
}

#[async_trait]
impl Work for PlantedWork {
    fn is_duplicate(&self, index: usize) -> bool {
        !self.bed.has(Plant::ForgetsInbox) && self.inner.is_duplicate(index)
    }

    async fn transaction(&mut self) -> Result<&mut (dyn Any + Send)> {
        self.inner.transaction().await
    }

    async fn commit(self: Box<Self>, mut outgoing: Vec<Message>) -> Result<Committed> {
        outgoing.retain(|_| !self.bed.strikes(Plant::DropsOutgoing, 3));
        match self.inner.commit(outgoing).await {
            Err(_) if self.bed.has(Plant::OkForFailedCommit) => Ok(Committed::SettleNext),
            other => other,
        }
    }

    async fn roll_back(self: Box<Self>, error: Option<&BoxError>) -> Result<()> {
        if self.bed.has(Plant::CommitsFailures) {
            self.inner.commit(Vec::new()).await?;
            return Ok(());
        }
        self.inner.roll_back(error).await
    }
}
