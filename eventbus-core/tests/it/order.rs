//! The consumer runtime against a model: whatever handlers do and whatever happens to members, no
//! message is lost, the order of a key holds, and every limit is kept. The checker is tested too:
//! brokers with a planted fault have to be found out.

mod case;
mod checker;
mod drive;
mod planted;
mod recorder;

use proptest::prelude::{ProptestConfig, Strategy, prop_assert, proptest};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use case::{Case, any_case, calm_case, hand_over_case};
use drive::drive;
use planted::Plant;

/// Runs one case and says what of the model it broke.
fn check(case: &Case, plant: Plant) -> Result<(), String> {
    let (events, end) = drive(case, plant);
    checker::check_events(case, &events)?;
    end?;
    checker::check_end(case, &events)
}

/// Three hundred cases, or as many as `PROPTEST_CASES` says: the simulation goes through more.
fn config() -> ProptestConfig {
    let config = ProptestConfig {
        max_shrink_time: 120_000,
        ..ProptestConfig::default()
    };
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => config,
        None => ProptestConfig {
            cases: 300,
            ..config
        },
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn whatever_happens_nothing_is_lost_and_keys_keep_their_order(case in any_case()) {
        let broken = check(&case, Plant::Nothing);
        prop_assert!(broken.is_ok(), "{}", broken.unwrap_err());
    }

    #[test]
    fn without_faults_every_message_is_handled_once(case in calm_case()) {
        let broken = check(&case, Plant::Nothing);
        prop_assert!(broken.is_ok(), "{}", broken.unwrap_err());
    }

    #[test]
    fn members_that_come_and_go_in_time_handle_nothing_twice(case in hand_over_case()) {
        let broken = check(&case, Plant::Nothing);
        prop_assert!(broken.is_ok(), "{}", broken.unwrap_err());
    }
}

/// Runs cases against a broker with a fault until the checker finds it, and returns what it said.
fn caught(plant: Plant) -> String {
    let mut runner = TestRunner::deterministic();
    for _ in 0..50 {
        let case = any_case()
            .new_tree(&mut runner)
            .expect("nothing is filtered")
            .current();
        if let Err(broken) = check(&case, plant) {
            return broken;
        }
    }
    panic!("50 cases did not find {plant:?}");
}

#[test]
fn a_broker_that_swaps_two_messages_of_a_key_is_caught() {
    let broken = caught(Plant::Swap);
    assert!(broken.starts_with("order:"), "{broken}");
}

#[test]
fn a_broker_that_drops_a_message_is_caught() {
    let broken = caught(Plant::Drop);
    assert!(
        ["lost:", "order:", "settled:"]
            .iter()
            .any(|found| broken.starts_with(found)),
        "{broken}"
    );
}

#[test]
fn a_consumer_that_settles_one_too_many_is_caught() {
    let broken = caught(Plant::SettleOneMore);
    assert!(broken.starts_with("settled:"), "{broken}");
}
