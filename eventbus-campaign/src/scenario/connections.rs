//! The wire to the server is harmed: late, cut, half open, deaf, cut within a message, and commits whose response is lost.

use eventbus_verify::Bounds;

use super::{Amount, RunsOn, Scenario};
use crate::plan::{Harm, Plan};
use crate::process::Role;
use crate::site::Ground;

pub const SCENARIO: Scenario = Scenario {
    name: "connections",
    about: "an outbox and a broker on a server whose wire delays, is cut, half open, loses one direction, truncates, and loses the responses of commits; of a message broker these come late, or say what is not so, too",
    covers: &[7, 8, 9, 11, 27, 43, 48],
    runs_on: RunsOn::Servers,
    share: 4,
    full: [Amount::Minutes(15); 5],
    plan,
};

fn plan(base: &Ground) -> Plan {
    let plan = Plan::new(&[1, 2])
        .with(2, Role::Consume(1), &[])
        .with(2, Role::Consume(2), &[])
        .with(2, Role::Relay, &[])
        .with(2, Role::Append, &["--batch", "20", "--lanes", "4"])
        .with(1, Role::Produce, &["--batch", "50"])
        .harmed_by(&[
            (Harm::LoseCommits, 6),
            (Harm::Cut, 4),
            (Harm::HalfOpen, 2),
            (Harm::LoseAnswers, 2),
            (Harm::LoseQuestions, 1),
            (Harm::Truncate, 3),
            (Harm::Delay, 2),
            (Harm::Kill, 1),
        ]);
    let plan = match base.product().is_some() {
        true => plan.harmed_besides_by(&[(Harm::LateCommits, 4), (Harm::Misreport, 4)]),
        false => plan,
    };
    Plan {
        messages: 100_000,
        has_outbox: true,
        has_wire: true,
        // A connection that hangs is given up after five seconds, of Kafka after ten, and then a lease may have to end.
        bounds: Bounds::default().with_attempts_max(3),
        ..plan
    }
}
