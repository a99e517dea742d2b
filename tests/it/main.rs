//! System tests over the facade.

mod errors;
