//! Runs of many seeds.

use eventbus_simulation::Case;

/// How many seeds, unless the environment says so.
fn seeds() -> u64 {
    let seeds = std::env::var("EVENTBUS_SIMULATION_SEEDS");
    seeds.map_or(1_000, |seeds| seeds.parse().expect("a number of seeds"))
}

#[test]
fn whatever_happens_the_promises_are_kept() {
    for seed in 0..seeds() {
        let case = Case::of_seed(seed);
        let verdict = case.run(None);
        if verdict.is_sound() {
            continue;
        }
        let smallest = case.shrink(|case| !case.run(None).is_sound());
        let verdict = smallest.run(None);
        panic!("seed {seed} broke a promise; the least that does: {smallest:#?}\n{verdict}");
    }
}
