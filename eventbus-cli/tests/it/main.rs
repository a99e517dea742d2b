//! The program as a shell starts it.

mod operating;
mod usage;
