//! What the campaign did and saw, line by line, to be read when something does not add up.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::Context as _;
use serde::Serialize;
use tracing::warn;

use crate::events::OrderId;

/// The campaign's own ledger: a file of JSON lines.
#[derive(Debug)]
pub struct Journal {
    begun: Instant,
    file: Mutex<File>,
}

/// One thing that happened.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Note<'a> {
    /// What comes next.
    Round(&'a str),
    /// A process was started.
    Started(&'a str),
    /// A process ended.
    Ended(&'a str),
    /// The operator decided about a parked key.
    Decided(&'a str),
    /// A client is about to post an order under this key.
    Posting(&'a str),
    /// It was taken.
    Taken { key: &'a str, order_id: OrderId },
    /// It is not known whether it was taken.
    Unknown { key: &'a str, why: String },
}

impl Journal {
    /// Begins a journal.
    ///
    /// # Errors
    ///
    /// When the file cannot be made.
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        let file = File::create(path);
        let file = file.with_context(|| format!("create the journal {}", path.display()))?;
        Ok(Self {
            begun: Instant::now(),
            file: Mutex::new(file),
        })
    }

    /// Writes a line.
    pub fn note(&self, note: Note<'_>) {
        #[derive(Serialize)]
        struct Line<'a> {
            at: f64,
            note: Note<'a>,
        }
        let at = self.begun.elapsed().as_secs_f64();
        let mut line = serde_json::to_vec(&Line { at, note }).expect("texts have a JSON form");
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = file.write_all(&line) {
            warn!(%error, "the campaign's journal cannot be written");
        }
    }
}
