//! What time alone brings: the alarm, and runs over their deadline.

use std::cmp::Reverse;
use std::task::Context;
use std::time::Duration;

use tokio::time::Instant;

use super::{Nodes, Running, Worker};
use crate::consumer::dispatch::Layers;
use crate::consumer::run::Outcome;
use crate::dead_letter::Cause;

impl<V: Layers> Worker<V> {
    /// When time alone gives this worker something to do, apart from deadlines.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let timer = self.timers.peek().map(|Reverse((due, ..))| *due);
        timer.into_iter().chain(self.probe_at).min()
    }

    pub(super) fn set_alarm(&mut self, cx: &mut Context<'_>) {
        let departures = self.departures.iter();
        let departures = departures.filter_map(|departure| departure.finish_until());
        let wanted = self
            .next_due()
            .into_iter()
            .chain(self.tick_at)
            .chain(departures)
            .min();
        let Some(wanted) = wanted else { return };
        let armed = self
            .alarm_at
            .is_some_and(|at| at <= wanted && !self.alarm.is_elapsed());
        if !armed {
            self.alarm.as_mut().reset(wanted);
            self.alarm_at = Some(wanted);
        }
        if self.alarm.as_mut().poll(cx).is_ready() {
            self.alarm_at = None;
            cx.waker().wake_by_ref();
        }
    }

    /// Drops runs over their deadline, says whether there were any, and notes when to look again:
    /// one coarse tick, not a timer a message.
    pub(super) fn expire_runs(&mut self, now: Instant) -> bool {
        self.tick_at = None;
        if self.slots.is_idle() {
            return false;
        }
        let deadline = self.runtime.settings.deadline;
        let mut oldest = now;
        let mut expired = false;
        for slot in 0..self.running.len() {
            let Some(running) = &self.running[slot] else {
                continue;
            };
            let started = self.begun + Duration::from_nanos(running.started);
            if started + deadline > now {
                oldest = oldest.min(started);
                continue;
            }
            if let Some(running) = self.running[slot].take() {
                expired = true;
                self.slots.cancel(slot);
                self.expire(running);
            }
        }
        let tick = (deadline / 8).clamp(Duration::from_millis(10), Duration::from_secs(1));
        let next = (oldest + deadline).min(now + tick);
        self.tick_at = Some(next.max(now + Duration::from_millis(1)));
        expired
    }

    /// What follows when a run is over its deadline: its handler failed, or what it waits for is away.
    fn expire(&mut self, running: Running) {
        self.to_leave = true;
        let deadline = self.runtime.settings.deadline;
        let awaits_others = running
            .nodes
            .iter()
            .any(|id| self.keys.get(id).scope.awaits_others());
        if running.is_handler && !awaits_others {
            return self.fail_run(running, || Cause::Deadline(deadline));
        }
        let late = || {
            let late = format!("neither broker nor unit of work answered within {deadline:?}");
            Outcome::Unavailable(late.into())
        };
        match running.nodes {
            Nodes::One(id) => self.conclude_one(id, late()),
            Nodes::Group(ids) => {
                let outcomes = ids.iter().map(|_| late()).collect();
                self.conclude_each(&ids, outcomes);
            }
        }
    }
}
