//! What is tried: each scenario is a plan for its rounds, and says which failures it covers.

use crate::plan::Plan;
use crate::product::Product;
use crate::site::Ground;

mod backlog;
mod connections;
mod disk_full;
mod embedded;
mod endurance;
mod late_commit;
mod outbox;
mod poison;
mod shutdown;
mod slow;
mod zombie;

/// Something that is tried.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What happens, in a sentence.
    pub about: &'static str,
    /// The failures that it covers, by their numbers.
    pub covers: &'static [u32],
    /// What it can run on.
    pub runs_on: RunsOn,
    /// Its share of the time, where all are given one.
    pub share: u32,
    /// How much of it is tried where everything is, on SQLite, on PostgreSQL, and on Kafka, Redis and
    /// RabbitMQ.
    pub full: [Amount; 5],
    /// What its rounds are made of.
    pub plan: fn(&Ground) -> Plan,
}

/// How much of a scenario is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// So many messages, however long they take.
    Messages(u64),
    /// For so long.
    Minutes(u64),
}

/// What a scenario can run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunsOn {
    /// Everything.
    All,
    /// Servers: PostgreSQL, Kafka, Redis and `RabbitMQ`.
    Servers,
    /// PostgreSQL only.
    Postgres,
    /// SQLite, where a disk can be mounted.
    SqliteOnSmallDisk,
}

impl Scenario {
    /// How much of it is tried on this, where everything is.
    #[must_use]
    pub fn full_on(&self, base: &Ground) -> Amount {
        let [sqlite, postgres, kafka, redis, rabbitmq] = self.full;
        match (base, base.product()) {
            (Ground::Sqlite, _) => sqlite,
            (_, None) => postgres,
            (_, Some(Product::Kafka)) => kafka,
            (_, Some(Product::Redis)) => redis,
            (_, Some(Product::RabbitMq)) => rabbitmq,
        }
    }

    /// Whether it can run on this.
    #[must_use]
    pub fn can_run_on(&self, base: &Ground) -> bool {
        match self.runs_on {
            RunsOn::All => true,
            RunsOn::SqliteOnSmallDisk => *base == Ground::Sqlite,
            RunsOn::Servers => base.has_wire(),
            RunsOn::Postgres => matches!(base, Ground::Postgres(_)),
        }
    }
}

/// Every scenario there is.
pub const ALL: &[Scenario] = &[
    embedded::SCENARIO,
    outbox::SCENARIO,
    zombie::SCENARIO,
    poison::SCENARIO,
    slow::SCENARIO,
    shutdown::SCENARIO,
    late_commit::SCENARIO,
    connections::SCENARIO,
    disk_full::SCENARIO,
    backlog::SCENARIO,
    endurance::SCENARIO,
];
