//! The SQLite broker as its users meet it.

mod child;
mod conformance;

mod files;
mod place;
mod processes;

