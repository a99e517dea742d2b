//! A steady load for as long as there is time, with two processes of each kind of which one is never harmed.

use eventbus_verify::Bounds;

use super::{Amount, RunsOn, Scenario};
use crate::plan::{Harm, Plan};
use crate::process::Role;
use crate::site::Ground;

pub const SCENARIO: Scenario = Scenario {
    name: "endurance",
    about: "a steady load through kills and reconnects; what the processes take that live through it stays the same",
    covers: &[11],
    runs_on: RunsOn::All,
    share: 6,
    full: [Amount::Minutes(32); 5],
    plan,
};

fn plan(base: &Ground) -> Plan {
    let has_wire = base.has_wire();
    let plan = Plan::new(&[1])
        .with(2, Role::Consume(1), &[])
        .with(2, Role::Relay, &[])
        .with(
            2,
            Role::Append,
            &["--batch", "10", "--lanes", "1", "--rest", "20ms"],
        )
        .with(
            2,
            Role::Produce,
            &["--batch", "10", "--lanes", "1", "--rest", "20ms"],
        )
        .harmed_by(&[
            (Harm::Kill, 3),
            (Harm::Terminate, 1),
            (Harm::Pause, 1),
            (if has_wire { Harm::Cut } else { Harm::Lock }, 3),
        ]);
    Plan {
        messages: 2_000_000,
        has_outbox: true,
        has_wire,
        gap: 500..2000,
        bounds: Bounds::default().with_attempts_max(3),
        ..plan
    }
}
