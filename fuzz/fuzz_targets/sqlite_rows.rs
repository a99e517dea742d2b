//! The target `sqlite_rows`, guided by libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| eventbus_fuzz::run("sqlite_rows", data));
