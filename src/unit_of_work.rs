//! What a store implements so that handlers' writes, the duplicate check and what they publish
//! commit together.

pub use eventbus_core::{CommitFault, Committed, InboxEntry, NoUnit, Unit, UnitOfWork, Work};
