//! A clock that tests set, for processes that are started with it: libfaketime's.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::server;

/// A clock as far ahead of the machine's as a test says. Monotonic clocks, and how long a wait takes, are the machine's.
#[derive(Debug)]
pub struct Clock {
    folder: TempDir,
    library: PathBuf,
}

impl Clock {
    /// A clock that shows the time.
    ///
    /// # Panics
    /// If libfaketime is missing.
    #[must_use]
    pub fn right() -> Self {
        let clock = Self { folder: server::folder(), library: library().expect("libfaketime; tests/run --prepare installs it") };
        clock.set(0);
        clock
    }

    /// Steps to so many seconds ahead of the machine's clock, in every process that has this one. Each sees it when it next looks.
    ///
    /// # Panics
    /// If its file cannot be written.
    pub fn set(&self, ahead_seconds: i64) {
        let new = self.folder.path().join("new");
        std::fs::write(&new, format!("{ahead_seconds:+}\n")).expect("a clock can be set");
        // At once, so that nobody reads half of it.
        std::fs::rename(new, self.file()).expect("a clock can be set");
    }

    /// What a process needs in its environment to have this clock.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        [
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file().display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            // Times of files are nobody's business, and memory that is shared would outlive processes that are killed.
            ("NO_FAKE_STAT", "1".to_owned()),
            ("FAKETIME_DISABLE_SHM", "1".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("ahead")
    }
}

/// Debian keeps it apart, in a folder of the machine's architecture.
fn library() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.flatten();
    let mut paths = folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1"));
    paths.find(|path: &PathBuf| Path::exists(path))
}
