//! The programs of `tests/ui`: those in `pass` run, those in `fail` give exactly the errors beside
//! them. `TRYBUILD=overwrite cargo test -p eventbus-macros` writes the errors anew.

#[test]
fn the_derive_accepts_events_and_explains_mistakes() {
    let cases = trybuild::TestCases::new();
    cases.pass("tests/ui/pass/*.rs");
    cases.compile_fail("tests/ui/fail/*.rs");
}
