//! `eventbus-recorder LEDGER SOCKET RUN`: records until its standard input ends, so that it outlives
//! whoever is tried, and not who started it.

use std::error::Error;
use std::io::{Write, stdin, stdout};
use std::path::Path;
use std::process::ExitCode;

use eventbus_verify::{Recorder, RunId};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [ledger, socket, run] = &arguments[..] else {
        eprintln!("usage: eventbus-recorder LEDGER SOCKET RUN");
        return ExitCode::from(2);
    };
    match record(Path::new(ledger), Path::new(socket), run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("eventbus-recorder: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Says a line when clients may connect, and one at the end with how many records there are.
fn record(ledger: &Path, socket: &Path, run: &str) -> Result<(), Box<dyn Error>> {
    let recorder = Recorder::start(ledger, socket, RunId(run.parse()?))?;
    writeln!(stdout(), "recording")?;
    std::io::copy(&mut stdin(), &mut std::io::sink())?;
    let records = recorder.stop()?;
    writeln!(stdout(), "{records} records")?;
    Ok(())
}
