//! Planted files: each breach is found on its line, and what only looks like one is not.

use super::super::tests::found;
use super::{
    LATER, MACHINE_FOLDERS, UNFINISHED, no_path_of_one_machine, no_todo_without_issue,
    no_unfinished_macro, opens_with_a_module_comment,
};

#[test]
fn a_file_without_a_module_comment_is_found() {
    let rule = opens_with_a_module_comment;
    for text in ["use std::fmt;\n", "", "\n//! Late.\n", "// Plain.\n"] {
        assert_eq!(found(rule, "src/retry.rs", text), [Some(1)], "{text:?}");
    }
    assert!(found(rule, "src/retry.rs", "//! Retry.\n").is_empty());
    assert!(found(rule, "README.md", "# Retry\n").is_empty());
}

#[test]
fn a_compile_fail_fixture_needs_no_module_comment() {
    let path = "eventbus-macros/tests/ui/no_topic.rs";
    assert!(found(opens_with_a_module_comment, path, "use eventbus;").is_empty());
}

#[test]
fn only_a_crate_may_show_its_readme_instead() {
    let rule = opens_with_a_module_comment;
    let text = "#![doc = include_str!(\"../README.md\")]\n";
    assert!(found(rule, "eventbus-kafka/src/lib.rs", text).is_empty());
    assert_eq!(found(rule, "eventbus-kafka/src/broker.rs", text), [Some(1)]);
}

#[test]
fn an_unfinished_macro_is_found() {
    for name in UNFINISHED {
        let text = format!("//! Here.\nfn later() {{\n    {name}();\n}}\n");
        assert_eq!(found(no_unfinished_macro, "src/a.rs", &text), [Some(3)]);

        let qualified = format!("std::{name}(1);");
        assert_eq!(
            found(no_unfinished_macro, "src/a.rs", &qualified),
            [Some(1)]
        );

        let other = format!("// {name} is not used here\nmy_{name}(1);");
        assert!(found(no_unfinished_macro, "src/a.rs", &other).is_empty());
    }
}

#[test]
fn a_promise_without_an_issue_is_found() {
    for promise in ["", ": later", "(me)", "(#)", "(#1x)", "(#12"] {
        let text = format!("first\n// {LATER}{promise}\n");
        for path in ["src/a.rs", "dev/test", "Cargo.toml"] {
            let lines = found(no_todo_without_issue, path, &text);
            assert_eq!(lines, [Some(2)], "{promise:?} in {path}");
        }
    }
}

#[test]
fn a_promise_with_an_issue_is_not() {
    let text = format!("// {LATER}(#123): raise the bound\n");
    assert!(found(no_todo_without_issue, "src/a.rs", &text).is_empty());
    let prose = format!("No {LATER} without a number.\n");
    assert!(found(no_todo_without_issue, "CONTRIBUTING.md", &prose).is_empty());
}

#[test]
fn a_path_of_one_machine_is_found() {
    for folder in MACHINE_FOLDERS {
        for before in ["", "cd ", "\"", "file://", "(", "="] {
            let text = format!("first\n{before}/{folder}/main/src\n");
            let lines = found(no_path_of_one_machine, "docs/guide.md", &text);
            assert_eq!(lines, [Some(2)], "{before:?}");
        }
    }
}

#[test]
fn a_relative_path_is_not() {
    for folder in MACHINE_FOLDERS {
        for before in ["src", "..", "${BASE}", "a-b", "https://example.org"] {
            let text = format!("{before}/{folder}/main\n");
            let lines = found(no_path_of_one_machine, "docs/guide.md", &text);
            assert!(lines.is_empty(), "{text}");
        }
    }
}
