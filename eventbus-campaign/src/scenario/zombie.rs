//! Processes that stand still for longer than their lease, and go on as if nothing had been.

use eventbus_verify::Bounds;

use super::{Amount, RunsOn, Scenario};
use crate::plan::{Harm, Plan};
use crate::process::Role;
use crate::site::Ground;

pub const SCENARIO: Scenario = Scenario {
    name: "zombie",
    about: "members and relays stand still for longer than their lease while others take over, and then go on",
    covers: &[26, 46],
    runs_on: RunsOn::All,
    share: 2,
    full: [Amount::Minutes(5); 5],
    plan,
};

fn plan(_: &Ground) -> Plan {
    let plan = Plan::new(&[1])
        .with(
            3,
            Role::Consume(1),
            &["--manner", "uneven", "--group-max", "1"],
        )
        .with(3, Role::Relay, &[])
        .with(1, Role::Append, &["--batch", "10", "--lag-max", "1000"])
        .harmed_by(&[(Harm::Zombie, 6), (Harm::Pause, 1), (Harm::Kill, 1)]);
    Plan {
        messages: 50_000,
        has_outbox: true,
        bounds: Bounds::default()
            .with_in_flight_max(5000)
            .with_attempts_max(3),
        ..plan
    }
}
