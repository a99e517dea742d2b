//! How settled receipts move a group's position, or do not.

use super::admin::to_u64;
use super::state::{State, ended};
use crate::delivery::Receipt;
use crate::error::Result;
use crate::lane_table::{LaneTable, Settled};

impl State {
    /// Records what a member has settled.
    pub(super) fn settle(&mut self, id: usize, settled: &[Receipt]) -> Result<()> {
        if self.member(id).ended {
            return Err(ended("settle"));
        }
        if let Some(group) = self.member(id).group {
            self.take_overdue(group);
        }
        let Self {
            members, topics, ..
        } = self;
        let member = members[id]
            .as_mut()
            .expect("a member is kept until both its halves are dropped");
        let stale_before = member.lanes.stale();
        let mut advanced = false;
        // Batches come lane by lane, so what belongs to a lane is looked up once for a run of it.
        for run in settled.chunk_by(|before, after| before.lane == after.lane) {
            let lane = run[0].lane;
            if let Some(low_water) = settle_up_to(&mut member.lanes, run) {
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
}

/// Settles a run of one lane and returns the last low-water mark that this reached.
fn settle_up_to(lanes: &mut LaneTable, run: &[Receipt]) -> Option<u64> {
    let mut low_water = None;
    for receipt in run {
        if let Settled::LowWater(position) = lanes.settle(*receipt) {
            low_water = Some(position);
        }
    }
    low_water.map(to_u64)
}
