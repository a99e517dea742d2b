//! Everything lies on a small disk that is full for a while, again and again.

use eventbus_verify::Bounds;

use super::{Amount, RunsOn, Scenario};
use crate::plan::{Harm, Plan};
use crate::process::Role;
use crate::site::Ground;

pub const SCENARIO: Scenario = Scenario {
    name: "disk-full",
    about: "broker, outbox and effects lie on a small disk that is full now and then, while processes are killed",
    covers: &[49],
    runs_on: RunsOn::SqliteOnSmallDisk,
    share: 2,
    full: [Amount::Minutes(5); 5],
    plan,
};

fn plan(_: &Ground) -> Plan {
    let plan = Plan::new(&[1])
        .with(2, Role::Consume(1), &[])
        .with(1, Role::Relay, &[])
        .with(1, Role::Append, &["--batch", "20", "--lanes", "4"])
        .harmed_by(&[(Harm::FillDisk, 4), (Harm::Kill, 1)]);
    Plan {
        messages: 30_000,
        has_outbox: true,
        small_disk: Some("200m"),
        bounds: Bounds::default().with_attempts_max(3),
        ..plan
    }
}
