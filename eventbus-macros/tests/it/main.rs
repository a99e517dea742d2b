//! What the derive accepts, and what the compiler says about everything else.

mod ui;
