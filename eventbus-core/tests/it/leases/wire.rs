//! A way to a store on which requests and replies are late, lost or refused.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use eventbus_core::{
    Error, ErrorKind, Group, LeaseReply, LeaseRequest, LeaseStore, MemberId, MemoryLeases,
    ProcessId, Result,
};
use tokio::time::{Instant, sleep};

/// What one member's way to the store is like.
#[derive(Clone, Debug, Default)]
pub(super) struct Fault {
    /// Nothing passes.
    pub(super) down: bool,
    /// Requests are served, their replies are lost.
    pub(super) mute: bool,
    /// Changes are not told.
    pub(super) deaf: bool,
    /// How long a request is on its way. It arrives, whether or not somebody waits for it.
    pub(super) request: Duration,
    /// How long its reply is on its way.
    pub(super) reply: Duration,
    /// Whose requests they seem to be.
    pub(super) process: Option<ProcessId>,
}

#[derive(Debug)]
pub(super) struct Wire {
    store: MemoryLeases,
    /// With when it ends.
    fault: Mutex<(Fault, Instant)>,
    after: Fault,
    exchanges: Mutex<u32>,
}

impl Wire {
    /// A way that is like `fault` for ever.
    pub(super) fn new(store: &MemoryLeases, fault: Fault) -> Self {
        Self {
            store: store.clone(),
            fault: Mutex::new((fault.clone(), Instant::now())),
            after: fault,
            exchanges: Mutex::new(0),
        }
    }

    /// Is like `fault` for a while.
    pub(super) fn fail(&self, fault: Fault, time: Duration) {
        *lock(&self.fault) = (fault, Instant::now() + time);
    }

    /// How many requests were made.
    pub(super) fn exchanges(&self) -> u32 {
        *lock(&self.exchanges)
    }

    fn fault(&self) -> Fault {
        let (fault, until) = &*lock(&self.fault);
        if Instant::now() < *until {
            return fault.clone();
        }
        self.after.clone()
    }

    fn check(&self) -> Result<Fault> {
        let fault = self.fault();
        if fault.down {
            return Err(Error::new(ErrorKind::Unavailable, "exchange", "cut off"));
        }
        Ok(fault)
    }
}

#[async_trait]
impl LeaseStore for Wire {
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply> {
        *lock(&self.exchanges) += 1;
        let fault = self.check()?;
        let mut request = request.clone();
        if let Some(process) = fault.process {
            request = request.with_process(process);
        }
        let store = self.store.clone();
        let served = tokio::spawn(async move {
            if !fault.request.is_zero() {
                sleep(fault.request).await;
            }
            store.exchange(&request).await
        });
        let reply = served.await.expect("it does not panic")?;
        if !fault.reply.is_zero() {
            sleep(fault.reply).await;
        }
        if fault.mute {
            return Err(Error::new(
                ErrorKind::Timeout,
                "exchange",
                "the reply is lost",
            ));
        }
        Ok(reply)
    }

    async fn leave(&self, group: &Group, member: MemberId) -> Result<()> {
        self.check()?;
        self.store.leave(group, member).await
    }

    async fn changed(&self, group: &Group) {
        if self.fault().deaf {
            std::future::pending().await
        }
        self.store.changed(group).await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
