//! What the runtime costs per message from publish to handler, counted instead of timed:
//! instructions and allocations under valgrind, and the ratio of processor time to a bare channel.
//!
//! `cargo bench -p eventbus --bench instructions` (needs valgrind)

#[path = "load/flow.rs"]
mod flow;

use std::process::Command;

use flow::{decode_only, encoded, runtime, through_bus, through_channel};

const GOAL_INSTRUCTIONS: f64 = 900.0;
/// "0 per message": what is left is per batch of 64.
const GOAL_ALLOCATIONS: f64 = 0.5;
const GOAL_CPU_RATIO: f64 = 1.4;

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if let [run, scenario, count] = arguments.as_slice()
        && run == "run"
    {
        let count = count.parse().expect("a number of messages");
        return run_scenario(scenario, count);
    }

    let instructions = |scenario| per_message("callgrind", "Collected : ", scenario);
    let allocations = |scenario| per_message("memcheck", "total heap usage: ", scenario);
    let (bus, channel, decode) = (
        instructions("bus"),
        instructions("channel"),
        instructions("decode"),
    );
    println!(
        "instructions per message: bus {bus:.0}, channel {channel:.0}, decoding alone {decode:.0}"
    );
    let runtime = bus - decode;
    println!("  of the runtime and the in-memory broker: {runtime:.0} (goal {GOAL_INSTRUCTIONS})");

    let (bus, decode) = (allocations("bus"), allocations("decode"));
    let allocated = bus - decode;
    println!("allocations per message: bus {bus:.3}, decoding alone {decode:.3}");
    println!("  of the runtime and the in-memory broker: {allocated:.3} (goal {GOAL_ALLOCATIONS})");

    let ratio = cpu_ratio();
    println!("processor time, bus / channel, median of pairs: {ratio:.2} (goal {GOAL_CPU_RATIO})");

    // Counts are the same on every run, so they may fail it; times never do.
    assert!(
        runtime <= GOAL_INSTRUCTIONS,
        "the runtime takes more instructions than its goal"
    );
    assert!(
        allocated <= GOAL_ALLOCATIONS,
        "the runtime allocates more than its goal"
    );
}

fn run_scenario(scenario: &str, count: usize) {
    let messages = runtime().block_on(encoded());
    match scenario {
        "bus" => runtime().block_on(through_bus(&messages, count)),
        "channel" => runtime().block_on(through_channel(&messages, count)),
        _ => decode_only(&messages, count),
    }
}

/// Runs a scenario with two counts under a valgrind tool; the difference is free of start-up.
fn per_message(tool: &str, marker: &str, scenario: &str) -> f64 {
    let (few, many) = (6_400, 19_200);
    let counted = |count: usize| {
        let output = Command::new("valgrind")
            .arg(format!("--tool={tool}"))
            .args((tool == "callgrind").then_some("--callgrind-out-file=/dev/null"))
            .arg(std::env::current_exe().expect("this program has a path"))
            .args(["run", scenario, &count.to_string()])
            .output()
            .expect("valgrind runs: install it with `apt-get install valgrind`");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success(),
            "{scenario} failed under valgrind:\n{text}"
        );
        let number = text
            .split_once(marker)
            .and_then(|(_, rest)| rest.split_whitespace().next())
            .expect("valgrind printed its count");
        number.replace(',', "").parse::<f64>().expect("a number")
    };
    (counted(many) - counted(few)) / (many - few) as f64
}

/// Pairs of runs in turn, each in this thread alone.
fn cpu_ratio() -> f64 {
    let messages = runtime().block_on(encoded());
    let count = 64_000;
    let mut ratios: Vec<f64> = (0..15)
        .map(|_| {
            let channel = cpu_time(|| runtime().block_on(through_channel(&messages, count)));
            let bus = cpu_time(|| runtime().block_on(through_bus(&messages, count)));
            bus / channel
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    ratios[ratios.len() / 2]
}

/// Nanoseconds this thread spent on a processor.
fn cpu_time(work: impl FnOnce()) -> f64 {
    let now = || {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells it");
        let nanos = text.split(' ').next().expect("its first field");
        nanos.parse::<f64>().expect("a number")
    };
    let begun = now();
    work();
    now() - begun
}
