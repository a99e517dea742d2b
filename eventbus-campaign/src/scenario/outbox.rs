//! Business transactions with events, two relays, and members of two groups with an inbox.

use eventbus_verify::Bounds;

use super::{Amount, RunsOn, Scenario};
use crate::plan::{Harm, Plan};
use crate::process::Role;
use crate::site::Ground;

pub const SCENARIO: Scenario = Scenario {
    name: "outbox",
    about: "business transactions, a tenth of them rolled back, two relays and members with an inbox are killed at random and at named steps",
    covers: &[25, 41, 42, 43, 46, 50],
    runs_on: RunsOn::All,
    share: 4,
    full: [
        Amount::Messages(1_000_000),
        Amount::Messages(1_000_000),
        Amount::Messages(1_000_000),
        Amount::Messages(300_000),
        Amount::Messages(100_000),
    ],
    plan,
};

fn plan(base: &Ground) -> Plan {
    let plan = Plan::new(&[1])
        .with(2, Role::Consume(1), &[])
        .with(2, Role::Relay, &[])
        .with(2, Role::Append, &["--batch", "20", "--lanes", "4"])
        .harmed_by(&[
            (Harm::Kill, 8),
            (Harm::CrashAtStep, 8),
            (Harm::Pause, 3),
            (Harm::Zombie, 1),
            (Harm::Terminate, 3),
            (Harm::Join, 1),
            (Harm::Leave, 1),
        ])
        .on(base);
    Plan {
        messages: 200_000,
        has_outbox: true,
        // Four members with a thousand each, and what two relays may publish twice.
        bounds: Bounds::default()
            .with_in_flight_max(5000)
            .with_attempts_max(3),
        ..plan
    }
}
