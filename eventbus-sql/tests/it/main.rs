//! The SQLite broker as its users meet it.

mod conformance;
mod place;
