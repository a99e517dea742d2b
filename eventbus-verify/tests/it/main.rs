//! Tests of eventbus-verify through its public API.

mod bounds;
mod drain;
mod effect_once;
mod honesty;
mod key_order;
mod large;
mod ledger;
mod liveness;
mod model;
mod mutations;
mod no_loss;
mod no_phantom;
mod random;
mod recorder;
mod report;
mod story;
