//! The target `headers`, guided by libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| eventbus_fuzz::run("headers", data));
