//! Every target on its corpus and on some inputs made of it, within bounds of memory and time.
//! A binary of its own, because it counts what the process allocates.
//!
//! `FUZZ_INPUTS` is how many inputs are made for the cheapest target, `FUZZ_SEED` what they are made
//! from; what went wrong says both, and leaves the input in a file.

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use eventbus_fuzz::{Mutation, TARGETS, Target};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

const INPUTS: u64 = 4000;

/// The most that one input, of at most 16 KiB, may take beyond what the process had.
const MEMORY_MAX: usize = 64 * 1024 * 1024;

/// How long one input may take on the slowest machine.
const TIME_MAX: Duration = Duration::from_secs(120);

/// What runs at present, for the watchdog.
static RUNNING: Mutex<Option<Running>> = Mutex::new(None);

/// The targets share the process that is measured.
static TURN: Mutex<()> = Mutex::new(());

struct Running {
    what: String,
    input: Vec<u8>,
    since: Instant,
    before: usize,
}

fn running() -> MutexGuard<'static, Option<Running>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the process when an input hangs, or takes memory without an end: no test could fail then.
fn watch() {
    loop {
        std::thread::sleep(Duration::from_millis(20));
        let running = running();
        let Some(running) = &*running else {
            continue;
        };
        let taken = ALLOCATED.current_usage().saturating_sub(running.before);
        if running.since.elapsed() > TIME_MAX || taken > 4 * MEMORY_MAX {
            let kept = keep(&running.what, &running.input);
            eprintln!(
                "{} does not end, or has {taken} bytes: {kept}",
                running.what
            );
            std::process::abort();
        }
    }
}

/// Leaves an input in a file, and says where and what it is.
fn keep(what: &str, input: &[u8]) -> String {
    let target = what.split_whitespace().next().unwrap_or("input");
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}.input"));
    let mut text = match std::fs::write(&path, input) {
        Ok(()) => format!("the input is in {}: b\"", path.display()),
        Err(error) => format!("the input can't be kept ({error}): b\""),
    };
    let begin = &input[..input.len().min(2000)];
    write!(text, "{}\"", begin.escape_ascii()).expect("a text takes more text");
    text
}

fn try_one(target: Target, what: String, input: &[u8]) {
    let before = ALLOCATED.current_usage();
    ALLOCATED.reset_peak_usage();
    *running() = Some(Running {
        what: what.clone(),
        input: input.to_vec(),
        since: Instant::now(),
        before,
    });
    let ran = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    *running() = None;
    let taken = ALLOCATED.peak_usage().saturating_sub(before);
    if ran.is_err() {
        panic!("{what} failed; {}", keep(&what, input));
    }
    let kept = || keep(&what, input);
    assert!(taken <= MEMORY_MAX, "{what} took {taken} bytes; {}", kept());
}

fn corpus(target: Target) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    let files = std::fs::read_dir(&folder).expect("every target has a corpus");
    let mut inputs: Vec<_> = files
        .map(|file| file.expect("the folder can be read").path())
        .map(|path| {
            (
                path.clone(),
                std::fs::read(path).expect("a file can be read"),
            )
        })
        .collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{} is empty", folder.display());
    inputs
}

fn number_of(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")),
    )
}

fn try_target(name: &str) {
    static WATCHDOG: std::sync::Once = std::sync::Once::new();
    WATCHDOG.call_once(|| drop(std::thread::spawn(watch)));
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let target = *TARGETS
        .iter()
        .find(|target| target.name == name)
        .expect("a target");
    let files = corpus(target);
    for (path, input) in &files {
        try_one(target, format!("{name} on {}", path.display()), input);
    }
    let inputs: Vec<Vec<u8>> = files.into_iter().map(|(_, input)| input).collect();
    let seed = number_of("FUZZ_SEED").unwrap_or_else(|| fastrand::u64(..));
    let inputs_max = number_of("FUZZ_INPUTS").unwrap_or(INPUTS);
    let count = inputs_max.div_ceil(target.cost as u64);
    let mut mutation = Mutation::new(seed, &inputs, target.words);
    for number in 0..count {
        let what = format!("{name} on input {number} of FUZZ_SEED={seed} FUZZ_INPUTS={inputs_max}");
        try_one(target, what, &mutation.next_input());
    }
    println!(
        "{name}: {} files and {count} inputs of FUZZ_SEED={seed}",
        inputs.len()
    );
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                try_target(stringify!($name));
            }
        )*

        #[test]
        fn every_target_is_tried() {
            let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
        }
    };
}

targets! {
    configuration
    dead_letters
    formats
    handling
    headers
    ledger
    payloads
    recorder
    sqlite_file
    sqlite_rows
    texts
    urls
}
