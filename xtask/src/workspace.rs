//! What the checks look at: the answer of `cargo metadata` and the text of the files git knows. No rule lives here.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The repository as the checks see it.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// The answer of `cargo metadata --no-deps`: the packages of the workspace and what they ask for.
    pub(crate) metadata: Value,
    /// Tracked files, and new ones that git would not ignore; files that are no text are left out.
    pub(crate) files: Vec<File>,
}

/// One text file of the repository.
#[derive(Debug)]
pub(crate) struct File {
    /// Relative to the root of the repository, with `/` between the parts.
    pub(crate) path: String,
    pub(crate) text: String,
}

impl Workspace {
    /// Reads the repository this program was built from.
    pub(crate) fn load() -> Result<Self> {
        let root = root()?;
        Ok(Self {
            metadata: metadata(&root)?,
            files: files(&root)?,
        })
    }

    /// Lists the features of one package of the workspace.
    pub(crate) fn features(&self, package: &str) -> Result<Vec<&str>> {
        let found = packages(&self.metadata)
            .find(|candidate| candidate["name"] == package)
            .with_context(|| format!("the workspace has no package {package}"))?;
        let features = found["features"]
            .as_object()
            .context("cargo metadata lists no features")?;
        Ok(features.keys().map(String::as_str).collect())
    }
}

/// The packages of a `cargo metadata` answer.
pub(crate) fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    metadata["packages"].as_array().into_iter().flatten()
}

/// Where the repository lies that this program was built from.
pub(crate) fn root() -> Result<PathBuf> {
    // Asked for at run time: a target folder shared between clones must not answer with the other clone.
    let package = env::var_os("CARGO_MANIFEST_DIR")
        .context("CARGO_MANIFEST_DIR is not set: run this through cargo")?;
    let root = Path::new(&package)
        .parent()
        .context("xtask lies at the root of a disk: there is no workspace above it")?;
    Ok(root.to_path_buf())
}

fn metadata(root: &Path) -> Result<Value> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = run(
        Command::new(cargo).args(["metadata", "--format-version", "1", "--no-deps"]),
        root,
    )?;
    serde_json::from_str(&output).context("cargo metadata answered something that is not JSON")
}

fn files(root: &Path) -> Result<Vec<File>> {
    let paths = if root.join(".git").exists() {
        tracked(root)?
    } else {
        unpacked(root)?
    };
    let mut files = Vec::new();
    for path in paths {
        let full = root.join(&path);
        // A file that was deleted but not yet committed is still listed.
        if !full.is_file() {
            continue;
        }
        let bytes = fs::read(&full).with_context(|| format!("reading {path}"))?;
        // What is not UTF-8 is no text (images, recorded bytes): no rule speaks of it.
        if let Ok(text) = String::from_utf8(bytes) {
            files.push(File { path, text });
        }
    }
    Ok(files)
}

/// Asks git, so that what it ignores is ignored here too.
fn tracked(root: &Path) -> Result<Vec<String>> {
    let listed = run(
        Command::new("git")
            // A container often owns the clone as another user. Cargo runs its code all the same, so listing it is safe.
            .args(["-c", "safe.directory=*"])
            .args(["ls-files", "-z", "--cached", "--others"])
            .arg("--exclude-standard"),
        root,
    )?;
    Ok(listed.split_terminator('\0').map(str::to_owned).collect())
}

/// Lists an unpacked archive, which has no git to ask, and nothing in it but the files and perhaps a build.
fn unpacked(root: &Path) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.extend((!path.ends_with("target")).then_some(path));
                continue;
            }
            let relative = path.strip_prefix(root)?.to_string_lossy();
            paths.push(relative.replace('\\', "/"));
        }
    }
    Ok(paths)
}

fn run(command: &mut Command, folder: &Path) -> Result<String> {
    let output = command
        .current_dir(folder)
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)
        .with_context(|| format!("the output of {command:?} is not UTF-8"))
}
