//! What members and readers of a partitioned log are where no broker shares it out: their leases and
//! lanes, what is read ahead, who is woken. For adapters of databases and of Redis; how such a log is
//! kept, read and written is theirs.

mod deliveries;
mod member;
mod members;
mod topics;
mod wake;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use tokio::sync::Notify;

use crate::{Lease, MemberId, Message, Position, Result, Timestamp};

pub use deliveries::MemberHandle;
pub use member::{Place, Wanted};
pub use members::{Joining, Members};
pub use topics::{TopicLanes, Topics, distinct};
pub use wake::{LaneEnd, Waiting, Wakes};

/// Most messages of a page.
pub const PAGE_ROWS: u64 = 512;

/// A share of an open database, as its members use it.
pub trait Log: Clone + Debug + Send + Sync + 'static {
    /// Most pages that one question reads.
    const PAGES_MAX: usize;

    /// Who waits for what.
    fn wakes(&self) -> &Wakes;

    /// Reads one page for each that is wanted, in this order.
    fn read_pages(&self, wanted: &[Wanted]) -> impl Future<Output = Result<Vec<Page>>> + Send;

    /// Waits until it is `time` by the broker's clock, and finds the first position of each lane
    /// that was taken then or later.
    fn ends_at(
        &self,
        lanes: &[u32],
        time: Timestamp,
    ) -> impl Future<Output = Result<Vec<Position>>> + Send;

    /// Where the group goes on at the places that were granted; one that was granted to somebody
    /// else since is left out.
    fn open_places(
        &self,
        group: i64,
        leases: &[Lease],
        notify: &Arc<Notify>,
    ) -> impl Future<Output = Result<Vec<Place>>> + Send;

    /// Records how far groups are.
    fn settle(&self, advances: Vec<Advance>) -> impl Future<Output = Result<()>> + Send;

    /// Takes note of settlements that were ignored.
    fn count_stale(&self, settlements: u64);

    /// Ends a member and frees what it holds.
    fn leave(&self, group: i64, member: MemberId) -> impl Future<Output = Result<()>> + Send;
}

/// A message out of the log.
#[derive(Clone, Debug)]
pub struct Unpacked {
    /// Where it is.
    pub position: Position,
    /// When it was taken, by the broker's clock.
    pub time: Timestamp,
    /// Bytes of key, headers and payload.
    pub size: usize,
    /// The message.
    pub message: Message,
}

/// What was found from a position on.
#[derive(Debug)]
#[allow(
    clippy::exhaustive_enums,
    reason = "a lane has messages, a gap, or begins anew"
)]
pub enum Page {
    /// These, without a gap between them. Reading goes on behind the last one.
    Messages(Vec<Unpacked>),
    /// None are there, and reading goes on at this position.
    Nothing {
        /// Where the lane ends.
        next: Position,
    },
    /// Everything before this position is gone.
    Gone {
        /// The first position that there is, or will be.
        base: Position,
    },
    /// The log has lost its end, as after a failover to a server that had not got all of it: numbers
    /// that were read are given to other messages. A reader goes back; a member gives its lease back,
    /// so that what it settles late is refused, and whoever opens the place next goes back.
    Restarted {
        /// Where reading goes on, at or before what may not have been read.
        at: Position,
        /// Where the lane ends.
        end: Position,
    },
}

/// A group's new place on a lane, as the holder of this epoch says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advance {
    /// The group, as the adapter numbers it.
    pub group: i64,
    /// The lane's row.
    pub lane: u32,
    /// Which grant of it.
    pub epoch: u64,
    /// The first position not settled.
    pub position: Position,
}

/// The furthest of several advances of each lease, by group and lane.
pub fn furthest<'a>(advances: impl IntoIterator<Item = &'a Advance>) -> Vec<Advance> {
    let mut furthest = BTreeMap::new();
    for advance in advances {
        let lease = (advance.group, advance.lane, advance.epoch);
        let position = furthest.entry(lease).or_insert(Position(0));
        *position = advance.position.max(*position);
    }
    let advance = |((group, lane, epoch), position)| Advance {
        group,
        lane,
        epoch,
        position,
    };
    furthest.into_iter().map(advance).collect()
}
