//! Who is to be woken by what a database keeps beside its log: the schedule and the outbox.

use std::ops::Deref;

use eventbus_core::log;
use tokio::sync::watch;

/// Everything of one database that somebody may wait for.
#[derive(Debug, Default)]
pub(crate) struct Wakes {
    log: log::Wakes,
    /// The version of the schedule, for those who wait for what it holds.
    schedule: watch::Sender<i64>,
    /// The last position of the outbox that was seen, or how often it grew.
    outbox: watch::Sender<i64>,
}

impl Deref for Wakes {
    type Target = log::Wakes;

    fn deref(&self) -> &log::Wakes {
        &self.log
    }
}

impl Wakes {
    /// Hears of messages that are due earlier than all others.
    pub(crate) fn schedule(&self) -> watch::Receiver<i64> {
        self.schedule.subscribe()
    }

    #[cfg(feature = "sqlite")]
    pub(crate) fn schedule_is_heard(&self) -> bool {
        self.schedule.receiver_count() > 0
    }

    /// Takes note of the schedule's version.
    pub(crate) fn schedule_changed(&self, version: i64) {
        self.schedule
            .send_if_modified(|known| std::mem::replace(known, version.max(*known)) < version);
    }

    /// Hears of what is appended to the outbox.
    pub(crate) fn outbox(&self) -> watch::Receiver<i64> {
        self.outbox.subscribe()
    }

    #[cfg(feature = "sqlite")]
    pub(crate) fn outbox_is_heard(&self) -> bool {
        self.outbox.receiver_count() > 0
    }

    /// Takes note that something was appended to the outbox.
    #[cfg(feature = "postgres")]
    pub(crate) fn outbox_grew(&self) {
        self.outbox.send_modify(|times| *times += 1);
    }

    /// Takes note of how far the outbox goes.
    #[cfg(feature = "sqlite")]
    pub(crate) fn outbox_reaches(&self, position: i64) {
        self.outbox.send_if_modified(|known| {
            let newer = *known < position;
            *known = position.max(*known);
            newer
        });
    }
}
