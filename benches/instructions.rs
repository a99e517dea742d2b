//! What the runtime costs per message from publish to handler, counted instead of timed:
//! instructions and allocations under valgrind, and the ratio of processor time to a bare channel.
//!
//! `cargo bench -p eventbus --bench instructions` (needs valgrind)

#[path = "load/flow.rs"]
mod flow;

use std::process::Command;
use std::time::Duration;

use flow::{
    batches_only, decode_only, encoded, runtime, through_broker, through_bus, through_channel,
};
use tower::layer::util::Identity;
use tower::timeout::TimeoutLayer;

const GOAL_INSTRUCTIONS: f64 = 900.0;
/// "0 per message": what is left is per batch of 64.
const GOAL_ALLOCATIONS: f64 = 0.5;
const GOAL_CPU_RATIO: f64 = 1.4;
/// What two builds of the same flow may differ by: where inlining and hash seeds fall.
const NOISE: f64 = 0.01;

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if let [run, scenario, count] = arguments.as_slice()
        && run == "run"
    {
        let count = count.parse().expect("a number of messages");
        return run_scenario(scenario, count);
    }

    let runtime = instructions();
    let allocated = allocations();
    processor_time();

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
    let runtime = runtime();
    let messages = runtime.block_on(encoded());
    let minute = Duration::from_secs(60);
    match scenario {
        "bus" => {
            runtime.block_on(through_bus(&messages, count, async |builder| {
                builder.spawn().await
            }));
        }
        "empty layer" => {
            runtime.block_on(through_bus(&messages, count, async |builder| {
                builder.layer(Identity::new()).spawn().await
            }));
        }
        "timeout" => {
            runtime.block_on(through_bus(&messages, count, async |builder| {
                builder.layer(TimeoutLayer::new(minute)).spawn().await
            }));
        }
        "channel" => runtime.block_on(through_channel(&messages, count)),
        "broker" => runtime.block_on(through_broker(&messages, count)),
        "decode" => decode_only(&messages, count),
        _ => batches_only(&messages, count),
    }
}

/// Prints instructions per message and returns those of the runtime.
fn instructions() -> f64 {
    let count = |scenario| per_message("callgrind", "Collected : ", scenario);
    let (bus, channel) = (count("bus"), count("channel"));
    // Every scenario makes the batches: they are taken off the parts.
    let batches = count("batches");
    let (decode, broker) = (count("decode") - batches, count("broker") - batches);
    let runtime = bus - decode - broker - batches;
    println!("instructions per message: bus {bus:.0}, channel {channel:.0}");
    println!("  batches {batches:.0}, decoding {decode:.0}, in-memory broker {broker:.0}");
    println!("  what is left, the runtime: {runtime:.0} (goal {GOAL_INSTRUCTIONS})");

    let (empty, timeout) = (count("empty layer") - bus, count("timeout") - bus);
    println!("  a layer that does nothing {empty:+.0}, tower's timeout {timeout:+.0}");
    assert!(
        empty.abs() <= bus * NOISE,
        "a layer that does nothing costs something"
    );
    runtime
}

/// Prints allocations per message and returns those of runtime and broker.
fn allocations() -> f64 {
    let count = |scenario| per_message("memcheck", "total heap usage: ", scenario);
    let (bus, decode, broker) = (count("bus"), count("decode"), count("broker"));
    println!(
        "allocations per message: bus {bus:.3}, decoding alone {decode:.3}, broker alone {broker:.3}"
    );
    let allocated = bus - decode;
    println!("  of the runtime and the in-memory broker: {allocated:.3} (goal {GOAL_ALLOCATIONS})");
    allocated
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

/// How many pairs of runs the ratio of times is the median of.
const PAIRS: usize = 21;

/// Prints the ratio of processor times, and how far two runs of the same arm differ.
fn processor_time() {
    let messages = runtime().block_on(encoded());
    // Long against the scheduler's tick, by which some kernels count a thread's time.
    let count = 640_000;
    let channel = || cpu_time(|| runtime().block_on(through_channel(&messages, count)));
    let bus = || {
        cpu_time(|| {
            runtime().block_on(through_bus(&messages, count, async |builder| {
                builder.spawn().await
            }));
        })
    };
    // Once unmeasured: caches and allocator are warm then.
    channel();
    bus();
    let (low, median, high) = ratios(bus, channel);
    println!(
        "processor time, bus / channel: median {median:.2} of {PAIRS} pairs, quartiles {low:.2} to {high:.2} (goal {GOAL_CPU_RATIO})"
    );
    let (low, median, high) = ratios(bus, bus);
    println!(
        "  bus / bus, the noise of this machine: {median:.2}, quartiles {low:.2} to {high:.2}"
    );
}

/// Quartiles of `a / b` over pairs, each arm first in every other pair.
fn ratios(a: impl Fn() -> f64, b: impl Fn() -> f64) -> (f64, f64, f64) {
    let mut ratios: Vec<f64> = (0..PAIRS)
        .map(|pair| match pair % 2 {
            0 => a() / b(),
            _ => {
                let b = b();
                a() / b
            }
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    (ratios[PAIRS / 4], ratios[PAIRS / 2], ratios[PAIRS * 3 / 4])
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
