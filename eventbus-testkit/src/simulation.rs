//! Runs a test of services with the faults of many seeds, one after the other, and shrinks those of one
//! that fails.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Once;

use crate::faults::FaultPlan;
use crate::test_bus::TestBus;

/// The environment variable that repeats one failure: a seed, or `seed:fault,fault…` as a failed
/// [`Simulation`] prints it.
pub const SEED_VARIABLE: &str = "EVENTBUS_SIMULATION";

/// A test of services that is run with other faults each time.
///
/// Each run has a runtime of one thread, virtual time and a [`TestBus`] of its own, so that it does
/// the same whenever it has the same faults, and takes milliseconds. When one panics, the faults
/// that do not matter are left out, one after the other, and the panic is repeated with those that
/// are left and with the line that repeats it.
///
/// # Examples
///
/// ```
/// # use std::sync::Arc;
/// # use std::sync::atomic::{AtomicU64, Ordering};
/// # use eventbus_core::{Context, Event, Json, Key, MemoryUnit, Result, Topic, unknown_version};
/// # #[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
/// # struct OrderCreated { order_id: u64, amount: u64 }
/// # impl Event for OrderCreated {
/// #     const TYPE: &'static str = "OrderCreated";
/// #     const TOPIC: Topic = Topic::from_static("order-events");
/// #     const VERSION: u32 = 1;
/// #     type Codec = Json;
/// #     fn key(&self) -> Option<Key> { Some(Key::display(self.order_id)) }
/// #     fn upcast(version: u32, _: &[u8]) -> Result<Self> { Err(unknown_version::<Self>(version)) }
/// # }
/// use eventbus_testkit::{Simulation, TestBus};
///
/// Simulation::new().seeds(0..50).run(async |test: TestBus| {
///     let balance = MemoryUnit::new(test.broker().clone(), 0);
///     let billing = test.consumer("billing").unit(balance.clone()).on(
///         async |order: OrderCreated, mut cx: Context<(), MemoryUnit<u64>>| {
///             *cx.transaction().await? += order.amount;
///             Ok(())
///         },
///     );
///     let _billing = test.spawn(billing).await;
///     for order_id in 0..10 {
///         test.publish_surely(OrderCreated { order_id, amount: 5 }).await;
///     }
///     test.heal().await;
///     assert_eq!(balance.state().await, 50);
/// });
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing runs until `.run(…)`"]
pub struct Simulation {
    plans: Vec<FaultPlan>,
}

impl Default for Simulation {
    fn default() -> Self {
        Self::new()
    }
}

impl Simulation {
    /// A hundred seeds, or what [`SEED_VARIABLE`] names.
    ///
    /// # Panics
    ///
    /// When the variable can't be read.
    pub fn new() -> Self {
        let plans = (0..100).map(FaultPlan::of_seed).collect();
        Self { plans }.or_from_environment()
    }

    /// These seeds, or what [`SEED_VARIABLE`] names.
    ///
    /// # Panics
    ///
    /// When the variable can't be read.
    pub fn seeds(self, seeds: impl IntoIterator<Item = u64>) -> Self {
        let plans = seeds.into_iter().map(FaultPlan::of_seed).collect();
        Self { plans }.or_from_environment()
    }

    fn or_from_environment(self) -> Self {
        match std::env::var(SEED_VARIABLE) {
            Ok(text) => match parse(&text) {
                Some(plan) => Self { plans: vec![plan] },
                None => panic!(
                    "{SEED_VARIABLE} is {text:?}: it has to be a seed such as 17, or one with the numbers of its faults, such as 17:0,3"
                ),
            },
            Err(_) => self,
        }
    }

    /// Runs the test with the faults of each seed.
    ///
    /// # Panics
    ///
    /// When the test does, with the faults that make it.
    pub fn run(self, test: impl AsyncFn(TestBus)) {
        for plan in &self.plans {
            let Err(panic) = run_once(&test, plan, Loud) else {
                continue;
            };
            let shrunk = plan
                .clone()
                .shrink(|smaller| run_once(&test, smaller, Silent).is_err());
            // Shown again, if it can be: what it says may be something else with fewer faults.
            let panic = run_once(&test, &shrunk, Loud).err().unwrap_or(panic);
            eprintln!(
                "Simulation: it fails with {shrunk}\nagain: {}",
                again(&shrunk)
            );
            resume_unwind(panic);
        }
    }
}

#[derive(Clone, Copy)]
enum Volume {
    Loud,
    Silent,
}
use Volume::{Loud, Silent};

type Panic = Box<dyn std::any::Any + Send>;

fn run_once(test: &impl AsyncFn(TestBus), plan: &FaultPlan, volume: Volume) -> Result<(), Panic> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without sockets can be built");
    let run = || runtime.block_on(async { test(TestBus::with_plan(plan.clone())).await });
    match volume {
        Loud => catch_unwind(AssertUnwindSafe(run)),
        Silent => silently(|| catch_unwind(AssertUnwindSafe(run))),
    }
}

thread_local! {
    static IS_SILENT: Cell<bool> = const { Cell::new(false) };
}

/// Whether panics of this thread are expected, and not worth a message.
pub(crate) fn is_silent() -> bool {
    IS_SILENT.get()
}

/// Runs something whose panics print nothing.
fn silently<T>(run: impl FnOnce() -> T) -> T {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !is_silent() {
                before(info);
            }
        }));
    });
    IS_SILENT.set(true);
    let result = run();
    IS_SILENT.set(false);
    result
}

/// What [`parse`] reads as this plan.
fn again(plan: &FaultPlan) -> String {
    let numbers = plan
        .faults()
        .iter()
        .map(|planned| planned.number.to_string());
    let numbers: Vec<_> = numbers.collect();
    format!("{SEED_VARIABLE}={}:{}", plan.seed(), numbers.join(","))
}

fn parse(text: &str) -> Option<FaultPlan> {
    let Some((seed, numbers)) = text.split_once(':') else {
        return Some(FaultPlan::of_seed(text.parse().ok()?));
    };
    let numbers = numbers.split(',').filter(|number| !number.is_empty());
    let numbers: Result<Vec<usize>, _> = numbers.map(str::parse).collect();
    Some(FaultPlan::only(seed.parse().ok()?, &numbers.ok()?))
}

#[cfg(test)]
mod tests {
    use super::{FaultPlan, again, parse};

    #[test]
    fn what_is_printed_repeats_the_plan() {
        for seed in 0..100 {
            let mut plan = FaultPlan::of_seed(seed);
            let mut keep = false;
            plan = plan.shrink(|_| {
                keep = !keep;
                keep
            });
            let line = again(&plan);
            let (_, text) = line.split_once('=').expect("it sets a variable");
            assert_eq!(parse(text), Some(plan));
        }
    }

    #[test]
    fn a_seed_alone_is_its_whole_plan() {
        assert_eq!(parse("17"), Some(FaultPlan::of_seed(17)));
        assert_eq!(parse("seventeen"), None);
        assert_eq!(parse("17:one"), None);
    }
}
