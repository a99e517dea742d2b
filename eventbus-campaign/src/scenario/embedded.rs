//! The broker by itself: producers and members of two groups on one broker, killed and stopped.

use eventbus_verify::Bounds;

use super::{Amount, RunsOn, Scenario};
use crate::plan::{Harm, Plan};
use crate::process::Role;
use crate::site::Ground;

pub const SCENARIO: Scenario = Scenario {
    name: "embedded",
    about: "producers and members of two groups on one broker are killed, stopped and continued, join and leave; a message broker is, too, and its wire is cut",
    covers: &[23, 25, 26],
    runs_on: RunsOn::All,
    share: 4,
    full: [
        Amount::Messages(20_000_000),
        Amount::Minutes(10),
        Amount::Messages(2_000_000),
        Amount::Messages(1_000_000),
        Amount::Messages(300_000),
    ],
    plan,
};

fn plan(base: &Ground) -> Plan {
    let plan = Plan::new(&[1, 2])
        .with(2, Role::Consume(1), &[])
        .with(2, Role::Consume(2), &[])
        .with(2, Role::Produce, &[])
        .harmed_by(&[
            (Harm::Kill, 8),
            (Harm::CrashAtStep, 4),
            (Harm::Pause, 3),
            (Harm::Zombie, 1),
            (Harm::Terminate, 3),
            (Harm::Join, 3),
            (Harm::Leave, 2),
        ])
        .on(base);
    Plan {
        // At most four members of a group, each with a thousand.
        bounds: Bounds::default()
            .with_in_flight_max(4000)
            .with_attempts_max(3),
        ..plan
    }
}
