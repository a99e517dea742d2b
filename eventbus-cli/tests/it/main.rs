//! The program as a shell starts it.

mod usage;
