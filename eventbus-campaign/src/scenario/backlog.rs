//! Everything is there before anybody handles it, and is handed out in large pieces that come back when a member is killed.

use std::time::Duration;

use eventbus_verify::{Bounds, Sample};

use super::{Amount, RunsOn, Scenario};
use crate::plan::{Harm, Plan};
use crate::process::Role;
use crate::site::Ground;

pub const SCENARIO: Scenario = Scenario {
    name: "backlog",
    about: "messages pile up while nobody handles; then members with thousands in flight are killed while they work it off",
    covers: &[31, 52],
    runs_on: RunsOn::All,
    share: 2,
    full: [Amount::Minutes(5); 5],
    plan,
};

fn plan(_: &Ground) -> Plan {
    let plan = Plan::new(&[1])
        .with(3, Role::Consume(1), &["--in-flight", "20000"])
        .with(
            2,
            Role::Produce,
            &["--lag-max", "100000000", "--batch", "500"],
        )
        .harmed_by(&[(Harm::Kill, 3), (Harm::Zombie, 1), (Harm::Terminate, 1)]);
    Plan {
        messages: 300_000,
        is_backlog: true,
        gap: 500..3000,
        // Whatever is asked waits behind all of it.
        recovery_max: Duration::from_secs(900),
        bounds: Bounds::default()
            .with_in_flight_max(60_000)
            .with_sample(Sample::ResidentBytes, 512 << 20)
            .with_attempts_max(3),
        ..plan
    }
}
