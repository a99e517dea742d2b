//! Tests of eventbus-verify through its public API.

mod ledger;
mod recorder;
