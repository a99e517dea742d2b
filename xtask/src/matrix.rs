//! The table of checks and brokers in `docs/brokers/README.md`: written from what the conformance suites noted, and checked to
//! have a row for every check that there is.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::tidy::Finding;
use crate::workspace::Workspace;

const PAGE: &str = "docs/brokers/README.md";
/// Where the suite lists its checks.
const SUITE: &str = "eventbus-testkit/src/broker.rs";
const BEGIN: &str =
    "<!-- matrix: written by `cargo xtask matrix`, from what the suites noted -->\n";
const END: &str = "<!-- end of the matrix -->\n";
/// Brokers by the names of their files, and as they are called.
const BROKERS: [(&str, &str); 6] = [
    ("memory", "in memory"),
    ("sqlite", "SQLite"),
    ("postgres", "PostgreSQL"),
    ("kafka", "Kafka"),
    ("redis", "Redis"),
    ("rabbitmq", "RabbitMQ"),
];

/// Writes the table, if every check was passed on every broker.
pub(crate) fn write(root: &Path, notes: &Path) -> Result<()> {
    let suite = fs::read_to_string(root.join(SUITE)).with_context(|| format!("reading {SUITE}"))?;
    let mut texts = Vec::new();
    for (file, _) in BROKERS {
        let path = notes.join(format!("{file}.txt"));
        let text = fs::read_to_string(&path);
        texts.push(text.with_context(|| format!("reading {}", path.display()))?);
    }
    let mut columns = Vec::new();
    for (text, (file, _)) in texts.iter().zip(BROKERS) {
        columns.push(noted(text).with_context(|| format!("in {file}.txt"))?);
    }
    let table = table(&checks(&suite), &columns)?;
    let page = root.join(PAGE);
    let text = fs::read_to_string(&page).with_context(|| format!("reading {PAGE}"))?;
    let (before, rest) = text.split_once(BEGIN).context("the page has no matrix")?;
    let (_, behind) = rest.split_once(END).context("the matrix has no end")?;
    fs::write(&page, format!("{before}{BEGIN}\n{table}\n{END}{behind}"))
        .with_context(|| format!("writing {PAGE}"))
}

/// The rows that the page lacks, and those of checks that there are no more.
pub(crate) fn lacks(workspace: &Workspace) -> Vec<Finding> {
    let text_of = |path: &str| {
        let mut files = workspace.files.iter();
        files.find(|file| file.path == path).map(|file| &file.text)
    };
    // Without the suite there is nothing to compare with.
    let Some(suite) = text_of(SUITE) else {
        return Vec::new();
    };
    let page = text_of(PAGE).map_or("", String::as_str);
    let known = checks(suite);
    let rows: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(check, _)| check)
        .collect();
    let again = "run the conformance suites of all brokers with EVENTBUS_CONFORMANCE_NOTES, and `cargo xtask matrix`";
    let lacking = known.iter().filter(|check| !rows.contains(check));
    let lacking = lacking.map(|check| format!("the matrix lacks the check {check}: {again}"));
    let gone = rows.iter().filter(|row| !known.contains(row));
    let gone = gone.map(|row| format!("the matrix has a check {row} that there is not: {again}"));
    lacking
        .chain(gone)
        .map(|message| Finding::new(PAGE, message))
        .collect()
}

/// The checks of the suite, in its order: the words behind the arm that lists them.
fn checks(suite: &str) -> Vec<&str> {
    const LIST: &str = "broker_conformance!(@checks $attributes $harness;\n";
    let listed = suite.split_once(LIST).map_or("", |(_, rest)| rest);
    let listed = listed.split_once(");").map_or("", |(listed, _)| listed);
    listed.split_whitespace().collect()
}

/// What a suite noted, by check.
fn noted(text: &str) -> Result<BTreeMap<&str, &str>> {
    let mut noted = BTreeMap::new();
    for line in text.lines() {
        let (check, word) = line.split_once(' ').context("a line has two words")?;
        ensure!(
            ["holds", "refused"].contains(&word),
            "{line}: what is that?"
        );
        if noted
            .insert(check, word)
            .is_some_and(|before| before != word)
        {
            bail!("{check} was noted as both");
        }
    }
    Ok(noted)
}

fn table(checks: &[&str], columns: &[BTreeMap<&str, &str>]) -> Result<String> {
    let names: Vec<&str> = BROKERS.iter().map(|(_, name)| *name).collect();
    let mut table = format!("| check | {} |\n", names.join(" | "));
    writeln!(table, "| --- |{}", " --- |".repeat(names.len()))?;
    for check in checks {
        write!(table, "| `{check}` |")?;
        for (column, name) in columns.iter().zip(&names) {
            let word = column.get(check);
            let word = word.with_context(|| format!("{check} was not passed on {name}"))?;
            let cell = if *word == "holds" {
                "holds"
            } else {
                "**refused**"
            };
            write!(table, " {cell} |")?;
        }
        table.push('\n');
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{BROKERS, PAGE, SUITE, checks, lacks, noted, table};
    use crate::workspace::{File, Workspace};

    const LISTED: &str =
        "    $crate::broker_conformance!(@checks $attributes $harness;\n  one\n  two\n  );";

    #[test]
    fn a_check_that_was_not_passed_somewhere_gives_no_table() {
        let column = noted("one holds\ntwo refused\none holds\n").expect("it is fine");
        let mut columns = vec![column; BROKERS.len()];
        let written = table(&checks(LISTED), &columns).expect("all were passed");
        assert!(written.contains("| `one` | holds |"), "{written}");
        assert!(written.contains("| `two` | **refused** |"), "{written}");
        columns[3] = BTreeMap::new();
        let error = table(&checks(LISTED), &columns).expect_err("Kafka passed none");
        assert!(error.to_string().contains("Kafka"), "{error}");
        assert!(noted("one holds\none refused\n").is_err());
    }

    #[test]
    fn a_page_without_a_row_for_a_check_is_found() {
        let file = |path: &str, text: &str| File {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        let mut workspace = Workspace {
            metadata: serde_json::json!({ "packages": [] }),
            files: vec![file(SUITE, LISTED), file(PAGE, "| `one` | holds |\n")],
        };
        assert_eq!(lacks(&workspace).len(), 1);
        workspace.files[1].text = "| `one` |\n| `two` |\n".to_owned();
        assert!(lacks(&workspace).is_empty());
        workspace.files[1].text.push_str("| `three` |\n");
        assert_eq!(lacks(&workspace).len(), 1);
    }
}
