//! The directory in which everything lasting of a shop lies: the services' databases, the embedded
//! broker, and the ledgers of the fake providers.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tempfile::TempDir;

/// A data directory.
#[derive(Debug)]
pub enum DataDir {
    /// It stays.
    Kept(PathBuf),
    /// It goes with the process.
    Temporary(TempDir),
}

impl DataDir {
    /// The directory at `path`, which is made if it is missing.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn open(path: PathBuf) -> anyhow::Result<Self> {
        let made = std::fs::create_dir_all(&path);
        made.with_context(|| format!("make the data directory {}", path.display()))?;
        Ok(Self::Kept(path))
    }

    /// A fresh directory that goes with the process.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn temporary() -> anyhow::Result<Self> {
        let made = tempfile::Builder::new().prefix("ecommerce-").tempdir();
        Ok(Self::Temporary(made.context("make a temporary directory")?))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        match self {
            Self::Kept(path) => path,
            Self::Temporary(directory) => directory.path(),
        }
    }

    /// Lets a temporary directory stay, for somebody to look into.
    pub fn keep(self) -> PathBuf {
        match self {
            Self::Kept(path) => path,
            Self::Temporary(directory) => directory.keep(),
        }
    }
}
