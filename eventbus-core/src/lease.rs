//! Leases: who may read which partition, for how long, where no broker decides it. The contract of
//! the stores that keep them; the mechanism over it is in `lease/leaseholder.rs`.
//!
//! ```text
//!  Leaseholder ──exchange: released, dead, wanted──▶ LeaseStore: members ─ until when
//!  (a member)  ◀──every member with its leases──────              leases ─ holder, epoch
//!       │                                               │
//!       └── Granted, Revoking, Lost ─▶ its owner        └─ changed ─▶ the other members
//! ```
//!
//! The store is simple: it keeps members and leases and gives what is asked for and free. What to
//! ask for, what to give up and who is dead is for the members to say.

mod book;
mod leaseholder;
mod process;
mod share;

use std::fmt::{self, Debug};
use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::message::{Group, Topic};
use crate::topic::TopicPartition;

pub use leaseholder::{HeldLeases, LeaseConfig, LeaseSignal, Leaseholder};
pub use process::ProcessId;

/// Keeps the leases of groups.
///
/// # Contract
///
/// - A lease MUST have at most one holder, and its epoch MUST rise each time it is granted, also
///   when the same member gets it again. Epochs MUST outlive holders, members and processes.
/// - A member's leases are its own until it releases them, leaves, is named dead, or its `ttl` is
///   over. The time is counted on the store's own clock from when it served the member's last
///   exchange, and never from earlier. That clock SHOULD NOT leap when somebody sets the date.
/// - After that they MUST be free: a member that comes too late holds nothing, unless it asks.
/// - Groups share nothing.
#[async_trait]
pub trait LeaseStore: Debug + Send + Sync + 'static {
    /// Renews all that the member holds, and does what it asks for, in this order, at once as seen
    /// by other members:
    ///
    /// 1. members whose time is over, and those in `dead`, end; what they held is free,
    /// 2. the asking member joins, or is counted anew for `ttl`,
    /// 3. the leases in `released` are free, if the member holds them in these epochs,
    /// 4. the places in `wanted` that nobody holds are its own, each with a raised epoch; a place
    ///    that somebody holds, the asking member included, stays as it is.
    ///
    /// # Contract
    ///
    /// - A request that is served twice, late, after a later one, or whose reply is lost, MUST do
    ///   no harm. With the rules above it does none: what it released had that epoch, and what was
    ///   granted stands in the next reply.
    /// - A request that comes after [`leave`](Self::leave) joins again until `ttl` is over.
    ///
    /// # Cancellation
    ///
    /// A dropped future leaves it unknown whether the request was served.
    ///
    /// # Errors
    ///
    /// A retryable error says that the store is away; the member asks again.
    async fn exchange(&self, request: &LeaseRequest) -> Result<LeaseReply>;

    /// Ends a member and frees what it holds; one that is not there is no error.
    async fn leave(&self, group: &Group, member: MemberId) -> Result<()>;

    /// Resolves when members or leases of the group may have changed since this future was first
    /// polled: a hint that makes hand-overs quick. Each one costs every member an exchange. It may
    /// come without a reason, and it may never come; then members find out when they renew.
    async fn changed(&self, group: &Group);
}

/// What a member tells and asks at once.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LeaseRequest {
    /// The group.
    pub group: Group,
    /// Who asks.
    pub member: MemberId,
    /// Its process.
    pub process: ProcessId,
    /// What it can read. The store keeps it for the other members.
    pub topics: Vec<LeaseTopic>,
    /// What it holds no more.
    pub released: Vec<Lease>,
    /// Members that are certainly dead: end them without waiting for their time.
    pub dead: Vec<MemberId>,
    /// What it would have, if it is free.
    pub wanted: Vec<TopicPartition>,
    /// For how long it is a member, and holder of its leases, without another exchange.
    pub ttl: Duration,
}

impl LeaseRequest {
    /// A request of this process that only renews.
    #[must_use]
    pub fn new(group: Group, member: MemberId, topics: Vec<LeaseTopic>, ttl: Duration) -> Self {
        Self {
            group,
            member,
            process: ProcessId::current(),
            topics,
            released: Vec::new(),
            dead: Vec::new(),
            wanted: Vec::new(),
            ttl,
        }
    }

    /// Sets whose process it is.
    #[must_use]
    pub fn with_process(mut self, process: ProcessId) -> Self {
        self.process = process;
        self
    }

    /// Sets what is held no more.
    #[must_use]
    pub fn with_released(mut self, released: Vec<Lease>) -> Self {
        self.released = released;
        self
    }

    /// Sets which members are dead.
    #[must_use]
    pub fn with_dead(mut self, dead: Vec<MemberId>) -> Self {
        self.dead = dead;
        self
    }

    /// Sets what is wanted.
    #[must_use]
    pub fn with_wanted(mut self, wanted: Vec<TopicPartition>) -> Self {
        self.wanted = wanted;
        self
    }
}

/// The group after an exchange.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LeaseReply {
    /// All its members, the asking one included, in any order.
    pub members: Vec<LeaseMember>,
}

impl LeaseReply {
    /// A group of these members.
    #[must_use]
    pub fn new(members: Vec<LeaseMember>) -> Self {
        Self { members }
    }

    /// What `member` holds.
    #[must_use]
    pub fn leases_of(&self, member: MemberId) -> &[Lease] {
        let found = self.members.iter().find(|found| found.id == member);
        found.map_or(&[], |found| &found.leases)
    }
}

/// A member as the store knows it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LeaseMember {
    /// Who it is.
    pub id: MemberId,
    /// Its process.
    pub process: ProcessId,
    /// What it can read.
    pub topics: Vec<LeaseTopic>,
    /// What it holds.
    pub leases: Vec<Lease>,
}

impl LeaseMember {
    /// A member that holds nothing.
    #[must_use]
    pub fn new(id: MemberId, process: ProcessId, topics: Vec<LeaseTopic>) -> Self {
        Self {
            id,
            process,
            topics,
            leases: Vec::new(),
        }
    }

    /// Sets what it holds.
    #[must_use]
    pub fn with_leases(mut self, leases: Vec<Lease>) -> Self {
        self.leases = leases;
        self
    }
}

/// A place as one member holds it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(clippy::exhaustive_structs, reason = "a plain pair that stores create")]
pub struct Lease {
    /// What is held.
    pub place: TopicPartition,
    /// The fencing epoch: higher than that of every earlier holder, so that whoever writes can be
    /// refused when it holds the place no more.
    pub epoch: u64,
}

/// A topic that a member reads, and how many partitions it has. Where members name different
/// counts, the greatest is shared out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(
    clippy::exhaustive_structs,
    reason = "a plain pair that adapters create"
)]
pub struct LeaseTopic {
    /// Its name.
    pub name: Topic,
    /// How many partitions.
    pub partitions: u32,
}

/// Most partitions of one topic that are shared out: each member makes a list of all of them.
pub const LEASE_PARTITIONS_MAX: u32 = 65_536;

impl LeaseTopic {
    /// Checks that members can share it out; a store does, before it keeps what a member reads.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when it has more than [`LEASE_PARTITIONS_MAX`].
    pub fn check(&self) -> Result<()> {
        if self.partitions <= LEASE_PARTITIONS_MAX {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::InvalidInput,
            "renew leases",
            format!("a topic with leases has at most {LEASE_PARTITIONS_MAX} partitions"),
        )
        .with("topic", &self.name)
        .with("partitions", self.partitions))
    }
}

/// As stores keep it: name and count with a space between them.
impl fmt::Display for LeaseTopic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.partitions)
    }
}

impl FromStr for LeaseTopic {
    type Err = Error;

    /// Reads what `Display` writes, and refuses what [`check`](Self::check) does.
    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (name, partitions) = text.split_once(' ')?;
            let topic = Self {
                name: Topic::new(name).ok()?,
                partitions: partitions.parse().ok()?,
            };
            topic.check().ok().map(|()| topic)
        };
        parse().ok_or_else(|| {
            Error::new(
                ErrorKind::Codec,
                "read lease topic",
                "it is no topic with a count of partitions that can be shared out",
            )
            .with("topic", format_args!("{text:?}"))
        })
    }
}

/// One life of a member: a member that comes back is another one. Later ones sort later.
///
/// # Examples
///
/// ```
/// use eventbus_core::MemberId;
///
/// let member = MemberId::random();
/// assert_eq!(member.to_string().parse::<MemberId>()?, member);
/// # Ok::<(), eventbus_core::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberId(Uuid);

impl MemberId {
    /// A new one: a UUID of version 7.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Debug for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MemberId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Uuid::try_parse(text).map(Self).map_err(|error| {
            Error::new(ErrorKind::Codec, "read member id", "it is not a UUID")
                .with("id", format_args!("{text:?}"))
                .with_source(error)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_that_nobody_can_list_is_neither_kept_nor_read() {
        let most = LeaseTopic {
            name: Topic::from_static("orders"),
            partitions: LEASE_PARTITIONS_MAX,
        };
        most.check().expect("so many are shared out");
        assert_eq!(
            most.to_string().parse::<LeaseTopic>().ok(),
            Some(most.clone())
        );
        let more = LeaseTopic {
            partitions: u32::MAX,
            ..most
        };
        let error = more.check().expect_err("too many");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        for text in [
            &more.to_string(),
            "orders",
            "orders -1",
            "or ders 1",
            " 1",
            "",
        ] {
            let error = text.parse::<LeaseTopic>().expect_err(text);
            assert_eq!(error.kind(), ErrorKind::Codec, "{text}");
        }
    }
}
