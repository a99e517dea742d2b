//! Messages that no handler can handle: one group parks their keys, the other keeps dead letters.

use eventbus_verify::Bounds;

use super::{Amount, RunsOn, Scenario};
use crate::plan::{Harm, Plan};
use crate::process::Role;
use crate::site::Ground;

pub const SCENARIO: Scenario = Scenario {
    name: "poison",
    about: "handlers fail each time, panic, or fail once; dead letters cannot be stored for a while; processes are killed meanwhile",
    covers: &[28, 29, 30],
    runs_on: RunsOn::All,
    share: 2,
    full: [Amount::Minutes(5); 5],
    plan,
};

fn plan(_: &Ground) -> Plan {
    let plan = Plan::new(&[1, 2])
        .with(2, Role::Consume(1), &["--manner", "poison"])
        .with(
            2,
            Role::Consume(2),
            &["--manner", "poison", "--dead-letters"],
        )
        .with(1, Role::Produce, &["--lag-max", "1000"])
        .harmed_by(&[
            (Harm::RefuseLetters, 4),
            (Harm::Kill, 2),
            (Harm::CrashAtStep, 2),
            (Harm::Terminate, 1),
        ]);
    Plan {
        messages: 50_000,
        has_poison: true,
        bounds: Bounds::default().with_attempts_max(3),
        ..plan
    }
}
