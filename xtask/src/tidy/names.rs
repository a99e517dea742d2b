//! Rules about the names of files and types: a name says what the thing does. What files contain otherwise is in `text`.

use super::Finding;
use crate::workspace::File;

/// File names that say nothing about what lives in them.
const VAGUE_FILES: &[&str] = &["utils.rs", "common.rs", "types.rs"];

/// Endings that a type gets when nobody has decided what it does.
const VAGUE_ENDINGS: &[&str] = &["Manager", "Helper", "Util", "Processor", "Base", "Impl"];

/// `retry.rs` lies beside `retry/`: a list of open files then tells them apart.
pub(super) fn no_mod_rs(file: &File) -> Vec<Finding> {
    let Some(folder) = file.path.strip_suffix("/mod.rs") else {
        return Vec::new();
    };
    let name = file_name(folder);
    vec![Finding::new(
        &file.path,
        format!("put {name}.rs beside {name}/"),
    )]
}

/// A file is named after what lives in it.
pub(super) fn no_vague_file_name(file: &File) -> Vec<Finding> {
    if !VAGUE_FILES.contains(&file_name(&file.path)) {
        return Vec::new();
    }
    vec![Finding::new(
        &file.path,
        "name the file after what lives in it",
    )]
}

/// A type is named after what it does.
pub(super) fn no_vague_type_name(file: &File) -> Vec<Finding> {
    if !file.path.ends_with(".rs") {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        let Some(name) = declared_type(line) else {
            continue;
        };
        if let Some(ending) = VAGUE_ENDINGS.iter().find(|ending| name.ends_with(**ending)) {
            let message = format!("name {name} after what it does, without \"{ending}\"");
            findings.push(Finding::new(&file.path, message).at(index));
        }
    }
    findings
}

/// The name of the `pub` struct, enum or trait declared on this line.
fn declared_type(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix("pub")?;
    let rest = match rest.strip_prefix('(') {
        Some(restricted) => restricted.split_once(')')?.1,
        None => rest,
    };
    let mut words = rest.split_whitespace();
    if !matches!(words.next()?, "struct" | "enum" | "trait") {
        return None;
    }
    let name = words.next()?;
    let end = name.find(|character: char| !character.is_alphanumeric() && character != '_');
    Some(end.map_or(name, |end| &name[..end]))
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::super::tests::found;
    use super::{no_mod_rs, no_vague_file_name, no_vague_type_name};

    #[test]
    fn a_mod_rs_is_found() {
        assert_eq!(found(no_mod_rs, "src/retry/mod.rs", ""), [None]);
        assert!(found(no_mod_rs, "src/retry.rs", "").is_empty());
        assert!(found(no_mod_rs, "src/commod.rs", "").is_empty());
    }

    #[test]
    fn a_vague_file_name_is_found() {
        for path in ["src/utils.rs", "tests/it/common.rs", "types.rs"] {
            assert_eq!(found(no_vague_file_name, path, ""), [None], "{path}");
        }
        assert!(found(no_vague_file_name, "src/event_types.rs", "").is_empty());
    }

    #[test]
    fn a_vague_type_name_is_found() {
        for declaration in [
            "pub struct ConnectionManager;",
            "pub struct Helper<T>(T);",
            "pub enum EventUtil {",
            "    pub trait MessageProcessor: Send {",
            "pub(crate) struct AdapterBase {",
            "pub struct BrokerImpl<'a>",
        ] {
            let text = format!("//! Here.\n{declaration}\n");
            let lines = found(no_vague_type_name, "src/broker.rs", &text);
            assert_eq!(lines, [Some(2)], "{declaration}");
        }
    }

    #[test]
    fn a_plain_type_name_is_not() {
        for line in [
            "pub struct Database;",
            "pub struct Managers(u8);",
            "/// pub struct OldManager;",
            "pub use native::ConnectionManager;",
            "pub fn new(manager: ConnectionManager)",
            "struct BaseLine;",
        ] {
            assert!(
                found(no_vague_type_name, "src/broker.rs", line).is_empty(),
                "{line}"
            );
        }
    }
}
