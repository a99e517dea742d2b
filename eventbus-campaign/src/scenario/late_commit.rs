//! Transactions that append early and commit late, behind what others have committed meanwhile.

use eventbus_verify::Bounds;

use super::{Amount, RunsOn, Scenario};
use crate::plan::{Harm, Plan};
use crate::process::Role;
use crate::site::Ground;

pub const SCENARIO: Scenario = Scenario {
    name: "late-commit",
    about: "one transaction in five appends first and commits up to three seconds later, while relays publish what others commit",
    covers: &[44, 45, 50],
    runs_on: RunsOn::Postgres,
    share: 2,
    full: [Amount::Minutes(5); 5],
    plan,
};

fn plan(_: &Ground) -> Plan {
    let plan = Plan::new(&[1])
        .with(2, Role::Consume(1), &[])
        .with(2, Role::Relay, &[])
        .with(
            2,
            Role::Append,
            &[
                "--batch", "10", "--lanes", "8", "--linger", "5", "--keys", "20000",
            ],
        )
        .harmed_by(&[(Harm::Kill, 3), (Harm::CrashAtStep, 2), (Harm::Zombie, 1)]);
    Plan {
        messages: 50_000,
        has_outbox: true,
        bounds: Bounds::default()
            .with_in_flight_max(5000)
            .with_attempts_max(3),
        ..plan
    }
}
