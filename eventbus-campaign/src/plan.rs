//! What a round of a scenario is made of: which processes, and what is done to them.

use std::ops::Range;
use std::time::Duration;

use eventbus_verify::Bounds;

use crate::process::{Role, Spec};
use crate::site::Ground;

/// What is done to the tried system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Harm {
    /// A process is killed at a random moment, and started again.
    Kill,
    /// A process is started so that it aborts at a named step.
    CrashAtStep,
    /// A process stands still for less than its lease.
    Pause,
    /// A process stands still for longer than its lease, and then goes on.
    Zombie,
    /// A process is told to stop, and started again.
    Terminate,
    /// A process is told to stop, and told again before it has.
    TerminateTwice,
    /// A process is told to stop while the broker is away.
    TerminateAway,
    /// One more member joins a group.
    Join,
    /// A member that joined leaves.
    Leave,
    /// Nobody can write to the broker's file for a while.
    Lock,
    /// There is no room on the disk for a while.
    FillDisk,
    /// No dead letter can be stored for a while.
    RefuseLetters,
    /// All connections are cut, and refused for a while.
    Cut,
    /// Nothing passes for a while, and no connection ends.
    HalfOpen,
    /// Everything is late for a while.
    Delay,
    /// What the server answers vanishes for a while.
    LoseAnswers,
    /// What clients ask vanishes for a while.
    LoseQuestions,
    /// Connections end within a message.
    Truncate,
    /// Commits are served, and their responses lost.
    LoseCommits,
    /// Commits arrive late: of Kafka by as much as a generation of a group lasts.
    LateCommits,
    /// Commits are served, and their responses say that they were not.
    Misreport,
    /// A member joins or leaves every two seconds, for a while.
    Churn,
    /// The broker is killed, and started again.
    BrokerKill,
    /// The broker is told to stop, and started again.
    BrokerTerminate,
    /// The broker stands still, for longer than a session now and then.
    BrokerPause,
}

/// What a round is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The groups that handle everything.
    pub groups: Vec<u16>,
    /// The processes.
    pub specs: Vec<Spec>,
    /// What is done to them, and how often.
    pub harms: Vec<(Harm, u32)>,
    /// Milliseconds between two of those.
    pub gap: Range<u64>,
    /// After how many messages the round is over.
    pub messages: u64,
    /// Whether messages come in through an outbox.
    pub has_outbox: bool,
    /// Whether the processes reach their server through a proxy.
    pub has_wire: bool,
    /// How large the disk is on which everything lies, where that is a small one of its own.
    pub small_disk: Option<&'static str>,
    /// Whether all messages come in before anybody handles one.
    pub is_backlog: bool,
    /// Whether poison is looked for in the end.
    pub has_poison: bool,
    /// How long it may take until messages pass again.
    pub recovery_max: Duration,
    /// What may not be exceeded.
    pub bounds: Bounds,
}

impl Plan {
    /// A round with these groups, and nobody in it yet.
    #[must_use]
    pub fn new(groups: &[u16]) -> Self {
        Self {
            groups: groups.to_vec(),
            specs: Vec::new(),
            harms: Vec::new(),
            gap: 50..500,
            messages: 500_000,
            has_outbox: false,
            has_wire: false,
            small_disk: None,
            is_backlog: false,
            has_poison: false,
            recovery_max: Duration::from_secs(30),
            bounds: Bounds::default(),
        }
    }

    /// With so many processes of a role. The first one lives through everything.
    #[must_use]
    pub fn with(mut self, count: usize, role: Role, args: &[&str]) -> Self {
        let group = match role {
            Role::Consume(group) => format!("-{group}"),
            _ => String::new(),
        };
        for index in 0..count {
            self.specs.push(Spec {
                role,
                name: format!("{}{group}-{index}", role.command()),
                args: args.iter().map(|arg| (*arg).to_owned()).collect(),
                is_kept: index == 0 && count > 1,
            });
        }
        self
    }

    /// With this done to them; a greater weight is more often.
    #[must_use]
    pub fn harmed_by(mut self, harms: &[(Harm, u32)]) -> Self {
        self.harms = harms.to_vec();
        self
    }

    /// With this done, too.
    #[must_use]
    pub fn harmed_besides_by(mut self, harms: &[(Harm, u32)]) -> Self {
        self.harms.extend(harms);
        self
    }

    /// With this done besides to what is on a message broker: its wire is cut, its groups are shared out
    /// again and again, and the broker is killed, stopped and continued where it is the campaign's own.
    #[must_use]
    pub fn on(mut self, base: &Ground) -> Self {
        if base.product().is_none() {
            return self;
        }
        self.has_wire = true;
        let plan = self.harmed_besides_by(&[(Harm::Cut, 2), (Harm::Churn, 1)]);
        match base {
            Ground::Own(_) => plan.harmed_besides_by(&[
                (Harm::BrokerKill, 2),
                (Harm::BrokerTerminate, 2),
                (Harm::BrokerPause, 2),
            ]),
            _ => plan,
        }
    }
}
