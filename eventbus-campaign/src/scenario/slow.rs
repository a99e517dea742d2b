//! Handlers that are slower than who publishes, and one key whose handler takes longer than a lease.

use eventbus_verify::Bounds;

use super::{Amount, RunsOn, Scenario};
use crate::plan::{Harm, Plan};
use crate::process::Role;
use crate::site::Ground;

pub const SCENARIO: Scenario = Scenario {
    name: "slow",
    about: "handlers take ten milliseconds, those of one key longer than a lease, and publishers are fast; members come and go",
    covers: &[23, 24, 32, 33, 34],
    runs_on: RunsOn::All,
    share: 2,
    full: [Amount::Minutes(5); 5],
    plan,
};

fn plan(_: &Ground) -> Plan {
    const SLOW: &[&str] = &["--manner", "slow", "--group-max", "1", "--in-flight", "500"];
    const UNEVEN: &[&str] = &[
        "--manner",
        "uneven",
        "--group-max",
        "1",
        "--in-flight",
        "500",
    ];
    let plan = Plan::new(&[1, 2])
        .with(2, Role::Consume(1), SLOW)
        .with(2, Role::Consume(2), UNEVEN)
        .with(
            1,
            Role::Produce,
            &["--keys", "200", "--batch", "50", "--lag-max", "1000"],
        )
        .harmed_by(&[
            (Harm::Join, 3),
            (Harm::Leave, 3),
            (Harm::Kill, 2),
            (Harm::Zombie, 1),
        ]);
    Plan {
        messages: 20_000,
        bounds: Bounds::default()
            .with_in_flight_max(2000)
            .with_attempts_max(3),
        ..plan
    }
}
