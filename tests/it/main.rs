//! System tests over the facade.

mod errors;
mod store;
