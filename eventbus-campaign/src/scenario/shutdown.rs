//! Members that are told to stop with much in flight, twice, or while the broker is away.

use std::time::Duration;

use eventbus_verify::Bounds;

use super::{Amount, RunsOn, Scenario};
use crate::plan::{Harm, Plan};
use crate::process::Role;
use crate::site::Ground;

pub const SCENARIO: Scenario = Scenario {
    name: "shutdown",
    about: "members are told to stop with thousands of messages in flight, told twice, and told while nobody can reach the broker",
    covers: &[36, 49],
    runs_on: RunsOn::All,
    share: 2,
    full: [Amount::Minutes(5); 5],
    plan,
};

fn plan(base: &Ground) -> Plan {
    const MANY: &[&str] = &["--in-flight", "10000", "--shutdown", "5s"];
    let plan = Plan::new(&[1, 2])
        .with(2, Role::Consume(1), MANY)
        .with(2, Role::Consume(2), MANY)
        .with(2, Role::Produce, &["--lag-max", "15000"])
        .harmed_by(&[
            (Harm::Terminate, 4),
            (Harm::TerminateTwice, 3),
            (Harm::TerminateAway, 2),
            (Harm::Lock, 1),
        ]);
    Plan {
        messages: 200_000,
        // Probes wait behind what is in flight, which is handed out again after each fault.
        recovery_max: Duration::from_secs(300),
        has_wire: base.has_wire(),
        bounds: Bounds::default().with_attempts_max(3),
        ..plan
    }
}
