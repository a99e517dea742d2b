//! How answers are shown: tables and sentences for people, JSON for scripts, progress on a terminal.

use std::io::{self, IsTerminal, Write};

use anyhow::{Context, ensure};
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, ContentArrangement, Table};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Where answers go.
pub(crate) struct Output<'a> {
    json: bool,
    out: &'a mut (dyn Write + Send),
}

impl<'a> Output<'a> {
    pub(crate) fn new(json: bool, out: &'a mut (dyn Write + Send)) -> Self {
        Self { json, out }
    }

    /// Whether scripts read it.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Writes one line for people.
    pub(crate) fn line(&mut self, text: impl std::fmt::Display) -> io::Result<()> {
        writeln!(self.out, "{text}")
    }

    /// Writes one line for scripts: a document, or one of several.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        let line = serde_json::to_string(value)?;
        Ok(writeln!(self.out, "{line}")?)
    }

    /// Writes rows under a heading, or a sentence when there are none.
    pub(crate) fn table<const N: usize>(
        &mut self,
        heading: [&str; N],
        rows: impl IntoIterator<Item = [String; N]>,
        none: &str,
    ) -> io::Result<()> {
        let mut table = Table::new();
        table
            .load_preset(UTF8_HORIZONTAL_ONLY)
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_header(heading);
        if !io::stdout().is_terminal() {
            // Wide enough for what stands in a row; scripts and tests see no line breaks.
            table.set_content_arrangement(ContentArrangement::Disabled);
        }
        for row in rows {
            table.add_row(row);
        }
        if table.is_empty() {
            return self.line(none);
        }
        for (column, heading) in table.column_iter_mut().zip(heading) {
            if NUMBERS.contains(&heading) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        self.line(table)
    }
}

/// Headings of columns that hold numbers.
const NUMBERS: [&str; 5] = ["partitions", "partition", "lag", "attempts", "letters"];

/// Shows how far long work is: on a terminal only, and never in what scripts read.
pub(crate) fn progress(what: &'static str, total: Option<u64>) -> ProgressBar {
    let (bar, template) = match total {
        Some(total) => (
            ProgressBar::new(total),
            "{msg} {bar:30} {human_pos}/{human_len} ({per_sec}, {eta} left)",
        ),
        None => (
            ProgressBar::new_spinner(),
            "{spinner} {msg} {human_pos} ({per_sec})",
        ),
    };
    let style = ProgressStyle::with_template(template).expect("the template is a constant");
    bar.with_style(style).with_message(what)
}

/// Asks before something is done that cannot be undone.
///
/// # Errors
///
/// When the answer is no, or nobody is there to ask.
pub(crate) fn confirm(question: &str, yes: bool) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    ensure!(
        io::stdin().is_terminal(),
        "{question} Nobody is there to ask: add --yes if that is meant"
    );
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    io::stdin()
        .read_line(&mut answer)
        .context("read the answer")?;
    let agreed = matches!(answer.trim(), "y" | "Y" | "yes");
    ensure!(agreed, "nothing was done");
    Ok(())
}

/// A count with its noun.
pub(crate) fn counted(count: usize, one: &str, many: &str) -> String {
    match count {
        1 => format!("1 {one}"),
        count => format!("{count} {many}"),
    }
}
