//! The lanes of one member: epochs, receipts, credit in messages and bytes, and the low-water mark.

use std::collections::VecDeque;

use crate::delivery::{Lane, Limits, Position, Receipt};

/// What every adapter counts per member, written once.
///
/// Not shared by itself: an adapter keeps it behind the lock that its two halves share.
///
/// # Examples
///
/// ```
/// use eventbus_core::{LaneTable, Limits, Position, Settled};
///
/// let mut lanes = LaneTable::new(Limits::default());
/// let lane = lanes.open();
/// let first = lanes.hand_out(lane, Position(10), 100);
/// let second = lanes.hand_out(lane, Position(11), 100);
/// // The second is done first: nothing may be recorded beyond the first.
/// assert_eq!(lanes.settle(second), Settled::Held);
/// assert_eq!(lanes.settle(first), Settled::LowWater(Position(11)));
/// ```
#[derive(Debug)]
pub struct LaneTable {
    limits: Limits,
    lanes: Vec<LaneState>,
    /// Numbers of closed lanes, used again with a higher epoch.
    free: Vec<u32>,
    /// Unsettled over all lanes.
    messages: usize,
    bytes: usize,
    stale: u64,
}

#[derive(Debug)]
struct LaneState {
    epoch: u32,
    open: bool,
    /// The tag of `entries`' first.
    base: u64,
    /// Handed out, from the low-water mark on.
    entries: VecDeque<Entry>,
    /// Entries that are not settled.
    unsettled: usize,
}

#[derive(Debug)]
struct Entry {
    position: Position,
    bytes: usize,
    settled: bool,
}

/// What settling a receipt changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Settled {
    /// Everything up to this position, itself included, is done: record it.
    LowWater(Position),
    /// Something older is not done yet.
    Held,
    /// The receipt is of an older epoch or was settled before: it is counted, and nothing changed.
    Stale,
}

impl LaneTable {
    /// A table without lanes.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            lanes: Vec::new(),
            free: Vec::new(),
            messages: 0,
            bytes: 0,
            stale: 0,
        }
    }

    /// Opens a lane, with an epoch that no earlier lane of the same number had.
    pub fn open(&mut self) -> Lane {
        if let Some(id) = self.free.pop() {
            let state = &mut self.lanes[id as usize];
            state.epoch += 1;
            state.open = true;
            state.base = 0;
            let epoch = state.epoch;
            return Lane { id, epoch };
        }
        // A member holds far fewer than 2^32 partitions.
        let id = self.lanes.len() as u32;
        self.lanes.push(LaneState {
            epoch: 1,
            open: true,
            base: 0,
            entries: VecDeque::new(),
            unsettled: 0,
        });
        Lane { id, epoch: 1 }
    }

    /// Closes a lane and gives back its credit; what is settled on it from now on is stale.
    pub fn close(&mut self, lane: Lane) {
        let Some(state) = self.lanes.get_mut(lane.id as usize) else {
            return;
        };
        if !state.open || state.epoch != lane.epoch {
            return;
        }
        state.open = false;
        for entry in state.entries.drain(..).filter(|entry| !entry.settled) {
            self.messages -= 1;
            self.bytes -= entry.bytes;
        }
        state.unsettled = 0;
        self.free.push(lane.id);
    }

    /// Whether `lane` is open and of the present epoch.
    pub fn is_open(&self, lane: Lane) -> bool {
        self.state(lane).is_some()
    }

    /// How many more messages may be handed out on `lane` now.
    ///
    /// A single message may exceed the bytes when nothing else is unsettled, so that a message
    /// larger than the limit still arrives.
    pub fn credit(&self, lane: Lane) -> usize {
        let Some(state) = self.state(lane) else {
            return 0;
        };
        if self.bytes >= self.limits.bytes && self.messages > 0 {
            return 0;
        }
        // A settled message keeps its place until everything older is settled, so a lane's window
        // counts it too: one that is held for long cannot let the window grow without bound.
        let window = self
            .limits
            .lane_messages
            .saturating_sub(state.entries.len());
        let total = self.limits.messages.saturating_sub(self.messages);
        window.min(total).min(self.limits.batch)
    }

    /// Whether the credit over all lanes is used up, whatever a single lane still has.
    pub fn is_full(&self) -> bool {
        self.messages >= self.limits.messages
            || (self.bytes >= self.limits.bytes && self.messages > 0)
    }

    /// Whether a message of `bytes` fits the bytes left.
    pub fn fits(&self, bytes: usize) -> bool {
        self.messages == 0 || self.bytes + bytes <= self.limits.bytes
    }

    /// Hands out one message and returns its receipt. Positions of a lane only rise.
    ///
    /// # Panics
    ///
    /// When the lane is closed: the caller checked [`credit`](Self::credit).
    pub fn hand_out(&mut self, lane: Lane, position: Position, bytes: usize) -> Receipt {
        let state = &mut self.lanes[lane.id as usize];
        assert!(
            state.open && state.epoch == lane.epoch,
            "a closed lane hands out nothing"
        );
        let tag = state.base + state.entries.len() as u64;
        state.entries.push_back(Entry {
            position,
            bytes,
            settled: false,
        });
        state.unsettled += 1;
        self.messages += 1;
        self.bytes += bytes;
        Receipt { lane, tag }
    }

    /// Marks one message done.
    pub fn settle(&mut self, receipt: Receipt) -> Settled {
        let Some(state) = self
            .lanes
            .get_mut(receipt.lane.id as usize)
            .filter(|state| state.open && state.epoch == receipt.lane.epoch)
        else {
            self.stale += 1;
            return Settled::Stale;
        };
        let entry = receipt
            .tag
            .checked_sub(state.base)
            .and_then(|index| state.entries.get_mut(usize::try_from(index).ok()?))
            .filter(|entry| !entry.settled);
        let Some(entry) = entry else {
            self.stale += 1;
            return Settled::Stale;
        };
        entry.settled = true;
        state.unsettled -= 1;
        self.messages -= 1;
        self.bytes -= entry.bytes;
        let mut low_water = None;
        while let Some(front) = state.entries.front()
            && front.settled
        {
            low_water = Some(front.position);
            state.entries.pop_front();
            state.base += 1;
        }
        low_water.map_or(Settled::Held, Settled::LowWater)
    }

    /// Messages handed out and not settled, over all lanes.
    pub fn unsettled(&self) -> usize {
        self.messages
    }

    /// Messages handed out on `lane` and not settled.
    pub fn lane_unsettled(&self, lane: Lane) -> usize {
        self.state(lane).map_or(0, |state| state.unsettled)
    }

    /// How many receipts were ignored because they were of an older epoch or settled before.
    pub fn stale(&self) -> u64 {
        self.stale
    }

    fn state(&self, lane: Lane) -> Option<&LaneState> {
        self.lanes
            .get(lane.id as usize)
            .filter(|state| state.open && state.epoch == lane.epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(messages: usize, bytes: usize) -> (LaneTable, Lane) {
        let limits = Limits::default()
            .with_messages(messages)
            .with_lane_messages(messages)
            .with_bytes(bytes);
        let mut table = LaneTable::new(limits);
        let lane = table.open();
        (table, lane)
    }

    #[test]
    fn the_low_water_mark_never_passes_an_unsettled_message() {
        let (mut lanes, lane) = table(100, 1000);
        let receipts: Vec<_> = (0..5)
            .map(|number| lanes.hand_out(lane, Position(number), 1))
            .collect();
        assert_eq!(lanes.settle(receipts[4]), Settled::Held);
        assert_eq!(lanes.settle(receipts[1]), Settled::Held);
        assert_eq!(lanes.settle(receipts[0]), Settled::LowWater(Position(1)));
        assert_eq!(lanes.settle(receipts[2]), Settled::LowWater(Position(2)));
        assert_eq!(lanes.settle(receipts[3]), Settled::LowWater(Position(4)));
        assert_eq!(lanes.unsettled(), 0);
    }

    #[test]
    fn receipts_of_an_older_epoch_are_stale() {
        let (mut lanes, old) = table(100, 1000);
        let receipt = lanes.hand_out(old, Position(7), 10);
        lanes.close(old);
        let new = lanes.open();
        assert_eq!(new.id, old.id);
        assert!(new.epoch > old.epoch);
        let fresh = lanes.hand_out(new, Position(7), 10);
        assert_eq!(lanes.settle(receipt), Settled::Stale);
        assert_eq!(lanes.settle(fresh), Settled::LowWater(Position(7)));
        assert_eq!(lanes.settle(fresh), Settled::Stale);
        assert_eq!(lanes.stale(), 2);
    }

    #[test]
    fn credit_is_bounded_in_messages_and_bytes() {
        let (mut lanes, lane) = table(2, 100);
        assert_eq!(lanes.credit(lane), 2);
        let large = lanes.hand_out(lane, Position(0), 500);
        assert_eq!(lanes.credit(lane), 0, "the bytes are used up");
        assert!(lanes.is_full());
        lanes.settle(large);
        assert!(!lanes.is_full());
        assert!(lanes.fits(500), "alone, a large message passes");
        let first = lanes.hand_out(lane, Position(1), 40);
        assert!(lanes.fits(60) && !lanes.fits(61));
        lanes.hand_out(lane, Position(2), 40);
        assert_eq!(lanes.credit(lane), 0, "the messages are used up");
        lanes.settle(first);
        assert_eq!(lanes.credit(lane), 1);
    }

    #[test]
    fn a_held_message_bounds_the_window_of_its_lane() {
        let (mut lanes, lane) = table(3, 1000);
        let held = lanes.hand_out(lane, Position(0), 1);
        for number in 1..3 {
            let receipt = lanes.hand_out(lane, Position(number), 1);
            lanes.settle(receipt);
        }
        assert_eq!(lanes.credit(lane), 0);
        lanes.settle(held);
        assert_eq!(lanes.credit(lane), 3);
    }

    #[test]
    fn a_closed_lane_gives_its_credit_back() {
        let (mut lanes, lane) = table(2, 100);
        lanes.hand_out(lane, Position(0), 60);
        lanes.close(lane);
        lanes.close(lane);
        assert_eq!(lanes.unsettled(), 0);
        let next = lanes.open();
        assert_eq!(lanes.credit(next), 2);
    }
}
