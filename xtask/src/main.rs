//! `cargo xtask …`: the checks of this repository that are programs; `dev/test` decides when they run.

mod demo;
mod matrix;
mod tidy;
mod workspace;

use std::env;
use std::io;
use std::process::ExitCode;

use anyhow::Result;

use workspace::Workspace;

const USAGE: &str = "usage: cargo xtask COMMAND
  tidy              check the arrows between the crates and the house rules a program can see
  features PACKAGE  list the features of a workspace package, one a line
  matrix DIRECTORY  write the table of checks and brokers into docs/brokers/README.md, from what the conformance suites
                    noted there: run them with EVENTBUS_CONFORMANCE_NOTES=DIRECTORY
  demo-summary      read the output of `ecommerce demo --json` and check that its last line adds up";

#[expect(clippy::print_stdout, reason = "a command line prints its answer")]
fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["tidy"] => Ok(report("tidy", &tidy::check(&Workspace::load()?))),
        ["features", package] => {
            for feature in Workspace::load()?.features(package)? {
                println!("{feature}");
            }
            Ok(ExitCode::SUCCESS)
        }
        ["matrix", notes] => {
            matrix::write(&workspace::root()?, notes.as_ref())?;
            Ok(ExitCode::SUCCESS)
        }
        ["demo-summary"] => {
            let output = io::read_to_string(io::stdin())?;
            Ok(report("demo summary", &demo::check(&output)?))
        }
        ["--help" | "-h" | "help"] => {
            println!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        _ => {
            eprintln!("{USAGE}");
            Ok(ExitCode::from(2))
        }
    }
}

/// Prints what was found and turns it into the exit code.
#[expect(clippy::print_stdout, reason = "a command line prints its answer")]
fn report(check: &str, findings: &[impl ToString]) -> ExitCode {
    for finding in findings {
        println!("{}", finding.to_string());
    }
    if findings.is_empty() {
        println!("{check}: nothing found");
        return ExitCode::SUCCESS;
    }
    println!("{check}: {} found", findings.len());
    ExitCode::FAILURE
}
