//! Rules about what stands in a file: how it opens, and what must not be left in it. Names are in `names`.
//!
//! The words that are forbidden are written in two halves here, or these files would break their own rules.

use super::Finding;
use crate::workspace::File;

/// Macros that mark work as not done, or a look that was not cleaned up.
const UNFINISHED: &[&str] = &[
    concat!("to", "do!"),
    concat!("unimpl", "emented!"),
    concat!("db", "g!"),
];

/// The word that is allowed only with the number of an issue behind it.
const LATER: &str = concat!("TO", "DO");

/// First folders of paths that exist on the machine of one person or one job.
const MACHINE_FOLDERS: &[&str] = &["work", "home", "root"];

/// Every source file says in its first line what lives there; a crate may show its README instead.
pub(super) fn opens_with_a_module_comment(file: &File) -> Vec<Finding> {
    // Fixtures of compile-fail tests show what a user writes, and their line numbers are part of the expectation.
    if !file.path.ends_with(".rs") || file.path.contains("tests/ui/") {
        return Vec::new();
    }
    let opens_well = file.text.starts_with("//! ")
        || (file.path.ends_with("src/lib.rs") && file.text.starts_with("#![doc = include_str!("));
    if opens_well {
        return Vec::new();
    }
    let message = "open the file with one `//!` sentence saying what lives here and what does not";
    vec![Finding::new(&file.path, message).at(0)]
}

/// Nothing unfinished is called.
pub(super) fn no_unfinished_macro(file: &File) -> Vec<Finding> {
    if !file.path.ends_with(".rs") {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        // A comment may speak of the macro. A `//` inside a string cuts the line short, which only hides a rare finding.
        let code = line.split("//").next().unwrap_or_default();
        for name in UNFINISHED.iter().filter(|name| has_word(code, name)) {
            let message = format!("finish this: {name} is not left in the tree");
            findings.push(Finding::new(&file.path, message).at(index));
        }
    }
    findings
}

/// A promise for later names the issue that keeps it. Prose may speak of the word.
pub(super) fn no_todo_without_issue(file: &File) -> Vec<Finding> {
    if file.path.ends_with(".md") {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        if words(line, LATER).any(|rest| !names_an_issue(rest)) {
            let message = format!("write {LATER}(#123) with the number of the issue, or do it now");
            findings.push(Finding::new(&file.path, message).at(index));
        }
    }
    findings
}

/// No file holds an absolute path that exists on one machine only.
pub(super) fn no_path_of_one_machine(file: &File) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        for folder in MACHINE_FOLDERS {
            let path = format!("/{folder}/");
            if words(line, &path).next().is_some() {
                let message = format!("{path} exists on one machine: use a relative path");
                findings.push(Finding::new(&file.path, message).at(index));
            }
        }
    }
    findings
}

/// Whether `(#123)` comes next.
fn names_an_issue(rest: &str) -> bool {
    let number = rest
        .strip_prefix("(#")
        .and_then(|rest| rest.split_once(')'));
    number.is_some_and(|(number, _)| {
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

fn has_word(line: &str, word: &str) -> bool {
    words(line, word).next().is_some()
}

/// What follows each place where `word` stands by itself, not at the end of a longer word or path.
fn words<'a>(line: &'a str, word: &str) -> impl Iterator<Item = &'a str> {
    line.match_indices(word)
        .filter(|(at, _)| !line[..*at].ends_with(is_part_of_a_word))
        .map(|(at, found)| &line[at + found.len()..])
}

fn is_part_of_a_word(character: char) -> bool {
    character.is_alphanumeric() || matches!(character, '_' | '-' | '.' | '}')
}

#[cfg(test)]
mod tests;
