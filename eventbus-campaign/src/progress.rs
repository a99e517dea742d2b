//! How far a scenario is: a line that changes on a terminal, a line a minute elsewhere.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressStyle};

/// How often a log gets a line.
const LINE_EVERY: Duration = Duration::from_secs(60);

/// Tells it on standard error.
#[derive(Debug)]
pub struct Progress {
    what: String,
    bar: ProgressBar,
    begun: Instant,
    told: Mutex<Instant>,
}

impl Progress {
    /// Of what is named.
    #[must_use]
    pub fn new(what: String) -> Self {
        let bar = ProgressBar::new_spinner().with_prefix(what.clone());
        let bar = match ProgressStyle::with_template("{spinner} {prefix}: {msg}, {elapsed}") {
            Ok(style) => bar.with_style(style),
            // The bar is decoration: its default style will do.
            Err(_) => bar,
        };
        let begun = Instant::now();
        Self {
            what,
            bar,
            begun,
            told: Mutex::new(begun),
        }
    }

    /// So many messages and faults by now.
    pub fn tell(&self, messages: u64, faults: u64) {
        let (messages, faults) = (HumanCount(messages), HumanCount(faults));
        if !self.bar.is_hidden() {
            self.bar
                .set_message(format!("{messages} messages, {faults} faults"));
            self.bar.tick();
            return;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.elapsed() >= LINE_EVERY {
            *told = Instant::now();
            let (what, time) = (&self.what, HumanDuration(self.begun.elapsed()));
            eprintln!("{what}: {messages} messages, {faults} faults, {time}");
        }
    }

    /// Takes the changing line away.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}
