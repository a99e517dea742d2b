//! The house rules a program can check: which they are and what a finding looks like. The rules are in the modules below.

mod arrows;
mod names;
mod text;

use std::fmt;

use crate::workspace::{File, Workspace};

/// One breach of one rule.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// The file, or the crate where the rule is about crates.
    place: String,
    line: Option<usize>,
    /// What is wrong and what to do instead.
    message: String,
}

impl Finding {
    pub(crate) fn new(place: &str, message: impl Into<String>) -> Self {
        Self {
            place: place.to_owned(),
            line: None,
            message: message.into(),
        }
    }

    /// Names the line, given its index from zero.
    fn at(mut self, index: usize) -> Self {
        self.line = Some(index + 1);
        self
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(formatter, "{}:{line}: {}", self.place, self.message),
            None => write!(formatter, "{}: {}", self.place, self.message),
        }
    }
}

/// The rules that look at one file at a time.
const FILE_RULES: &[fn(&File) -> Vec<Finding>] = &[
    names::no_mod_rs,
    names::no_vague_file_name,
    names::no_vague_type_name,
    text::opens_with_a_module_comment,
    text::no_unfinished_macro,
    text::no_todo_without_issue,
    text::no_path_of_one_machine,
];

/// Runs every rule over the whole workspace.
pub(crate) fn check(workspace: &Workspace) -> Vec<Finding> {
    let mut findings = arrows::point_one_way(&workspace.metadata);
    findings.extend(crate::matrix::lacks(workspace));
    for file in &workspace.files {
        findings.extend(FILE_RULES.iter().flat_map(|rule| rule(file)));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::{Finding, check};
    use crate::workspace::{File, Workspace};

    /// Runs one rule over one planted file and answers with the lines it found.
    pub(super) fn found(
        rule: fn(&File) -> Vec<Finding>,
        path: &str,
        text: &str,
    ) -> Vec<Option<usize>> {
        let file = File {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        rule(&file).iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn this_workspace_is_tidy() {
        let workspace = Workspace::load().unwrap();
        assert!(
            workspace
                .files
                .iter()
                .any(|file| file.path == "xtask/src/tidy.rs"),
            "the list of files lacks this one, so the rules looked at nothing"
        );
        let findings: Vec<String> = check(&workspace).iter().map(Finding::to_string).collect();
        assert!(findings.is_empty(), "\n{}\n", findings.join("\n"));
    }

    #[test]
    fn a_breach_in_any_file_reaches_the_answer() {
        let workspace = Workspace {
            metadata: serde_json::json!({ "packages": [] }),
            files: vec![File {
                path: "eventbus-core/src/retry/mod.rs".to_owned(),
                text: "//! Retry.\n".to_owned(),
            }],
        };
        let findings: Vec<String> = check(&workspace).iter().map(Finding::to_string).collect();
        assert_eq!(
            findings,
            ["eventbus-core/src/retry/mod.rs: put retry.rs beside retry/"]
        );
    }
}
