#![doc = include_str!("../README.md")]
#![warn(clippy::unwrap_used, clippy::print_stdout)]

mod configuration;
mod dead_letters;
mod formats;
mod handling;
mod headers;
mod ledger;
mod message;
mod mutation;
mod payloads;
mod recorder;
mod sqlite;
mod texts;
mod urls;

pub use mutation::Mutation;

/// Something that reads bytes from outside, and what must hold of it for any bytes.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Target {
    /// Its name: of its folder in the corpus, and of the program that libFuzzer guides.
    pub name: &'static str,
    /// Reads these bytes, and panics where something does not hold.
    pub run: fn(&[u8]),
    /// Words that mean something to it.
    pub words: &'static [&'static str],
    /// How many inputs of the cheapest target one of this one takes the time of.
    pub cost: usize,
}

/// All targets, by name.
pub const TARGETS: &[Target] = &[
    configuration::TARGET,
    dead_letters::TARGET,
    formats::TARGET,
    handling::TARGET,
    headers::TARGET,
    ledger::TARGET,
    payloads::TARGET,
    recorder::TARGET,
    sqlite::FILE,
    sqlite::ROWS,
    texts::TARGET,
    urls::TARGET,
];

/// Runs one input of a target: what the programs of libFuzzer consist of.
///
/// # Panics
///
/// When there is no target of that name, or something does not hold of it.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    let target = target.expect("every program is named after a target");
    (target.run)(data);
}

/// A runtime of one thread, for targets that are asynchronous.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime of one thread can be made")
}
