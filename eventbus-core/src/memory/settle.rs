//! How verdicts move a group's position, or do not.

use tokio::time::Instant;

use super::admin::to_u64;
use super::member::MemberState;
use super::state::{State, TopicState, ended};
use crate::clock::FOREVER;
use crate::delivery::{Receipt, Verdict};
use crate::error::{Error, ErrorKind, Result};
use crate::lane_table::{LaneTable, Settled};

impl State {
    /// Records verdicts of a member.
    pub(super) fn settle(&mut self, id: usize, settled: &[(Receipt, Verdict)]) -> Result<()> {
        if self.member(id).ended {
            return Err(ended("settle"));
        }
        if let Some(group) = self.member(id).group {
            self.take_overdue(group);
        }
        if settled
            .iter()
            .any(|(_, verdict)| matches!(verdict, Verdict::Retry { .. }))
        {
            self.check_retries(id, settled)?;
        }
        let selective = self.capabilities.selective_settlement;
        let Self {
            members, topics, ..
        } = self;
        let member = members[id]
            .as_mut()
            .expect("a member is kept until both its halves are dropped");
        let stale_before = member.lanes.stale();
        let mut advanced = false;
        // Batches come lane by lane, so what belongs to a lane is looked up once for a run of it.
        for run in settled.chunk_by(|(before, _), (after, _)| before.lane == after.lane) {
            let lane = run[0].0.lane;
            if selective {
                advanced |= settle_each(member, topics, run);
            } else if let Some(low_water) = settle_up_to(&mut member.lanes, run) {
                let slot = &member.slots[lane.id as usize];
                let partition = &mut topics[slot.topic].partitions[slot.partition];
                if let Some(cursor) = slot.cursor {
                    partition.cursors[cursor].settle_up_to(low_water + 1);
                    advanced = true;
                }
            }
            if member.lanes.is_open(lane) {
                member.queue_if_more(lane.id, topics);
            }
        }
        if !member.ready.is_empty() {
            member.wake();
        }
        self.stale += member.lanes.stale() - stale_before;
        if advanced {
            self.announce_space();
        }
        Ok(())
    }

    /// Refuses retries that this broker does not declare, and retries of keyed messages.
    fn check_retries(&self, id: usize, settled: &[(Receipt, Verdict)]) -> Result<()> {
        if !self.capabilities.redelivery {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "settle",
                "this broker does not declare `redelivery`: retry in place and settle `Done`",
            ));
        }
        let member = self.member(id);
        if member.group.is_none() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "settle",
                "a reader is handed nothing again: subscribe with a group",
            ));
        }
        for (receipt, verdict) in settled {
            let Some(position) = member.lanes.position(*receipt) else {
                continue;
            };
            let slot = &member.slots[receipt.lane.id as usize];
            let log = &self.topics[slot.topic].partitions[slot.partition].log;
            let keyed = log
                .get(to_u64(position))
                .is_some_and(|stored| stored.message.key.is_some());
            if keyed && matches!(verdict, Verdict::Retry { .. }) {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "settle",
                    "a message with a key is not handed out again later, that would break its order: retry in place",
                )
                .with("topic", &self.topics[slot.topic].name)
                .with("position", position));
            }
        }
        Ok(())
    }
}

/// Settles a run of one lane and returns the last low-water mark that this reached.
fn settle_up_to(lanes: &mut LaneTable, run: &[(Receipt, Verdict)]) -> Option<u64> {
    let mut low_water = None;
    for (receipt, _) in run {
        if let Settled::LowWater(position) = lanes.settle(*receipt) {
            low_water = Some(position);
        }
    }
    low_water.map(to_u64)
}

/// Settles a run of one lane message by message, or plans to hand it out again; true when the
/// group's marks changed.
fn settle_each(
    member: &mut MemberState,
    topics: &mut [TopicState],
    run: &[(Receipt, Verdict)],
) -> bool {
    let mut advanced = false;
    for (receipt, verdict) in run {
        let position = member.lanes.position(*receipt).map(to_u64);
        if member.lanes.settle(*receipt) == Settled::Stale {
            continue;
        }
        let slot = &member.slots[receipt.lane.id as usize];
        let partition = &mut topics[slot.topic].partitions[slot.partition];
        let base = partition.log.base();
        let (Some(cursor), Some(position)) = (slot.cursor, position) else {
            continue;
        };
        match verdict {
            Verdict::Done => {
                partition.cursors[cursor].settle_one(position, base);
                advanced = true;
            }
            Verdict::Retry { after } => {
                let due = Instant::now() + FOREVER.min(*after);
                partition.cursors[cursor].retry(position, due);
                // `next` has to learn of the new date.
                member.wake();
            }
        }
    }
    advanced
}
