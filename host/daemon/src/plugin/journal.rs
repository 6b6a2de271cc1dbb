//! What is being admitted, written down, so that a death in the middle of it leaves a trace.
//!
//! Admission is bounded in every way that is known, and still the one moment at which a new file meets the host. While it goes on, a file in
//! a private folder names the module. It is locked, and the lock goes with the process: what lies there unlocked was left by a process that
//! died, and the next one to start takes that module last.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::Digest;

const PREFIX: &str = "admitting-";
/// A note is no longer than this: a plugin's name, a path and some numbers.
const NOTE_BYTES_MAX: u64 = 16 << 10;
/// Notes that nobody asked for so long are removed.
const KEPT: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The notes of one plugin folder.
pub(super) struct Journal {
    /// None: there is no place for notes, and none are made.
    folder: Option<PathBuf>,
    plugins: PathBuf,
}

/// What a process was admitting when it died.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// The folder of the plugins, as the configuration names it, made absolute.
    plugins: PathBuf,
    /// The plugin.
    pub(super) plugin: String,
    /// Its digest in hexadecimal.
    pub(super) digest: String,
    /// The process that died.
    pub(super) process: u32,
}

/// An admission that goes on. Dropped at its end.
pub(super) struct Entry {
    path: PathBuf,
    /// The lock goes with the process, however that ends.
    _lock: File,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Journal {
    /// The notes about a folder of plugins. They lie in `cache`, or where there is none, in a private folder beside other temporary ones,
    /// which several processes of one user share.
    pub(super) fn open(cache: Option<&Path>, plugins: &Path) -> Self {
        let shared = || std::env::temp_dir().join(format!("laelaps-admissions-{}", rustix::process::geteuid().as_raw()));
        let folder = cache.map_or_else(shared, Path::to_owned);
        let usable = private(&folder);
        if let Err(error) = &usable {
            tracing::debug!(folder = %folder.display(), %error, "no notes are kept of what is being admitted");
        }
        let plugins = std::path::absolute(plugins).unwrap_or_else(|_| plugins.to_owned());
        Self { folder: usable.is_ok().then_some(folder), plugins }
    }

    /// Note that a module is being admitted, until the answer is dropped. None if that cannot be noted: the admission goes on without.
    pub(super) fn note(&self, plugin: &str, digest: Digest) -> Option<Entry> {
        let folder = self.folder.as_ref()?;
        let note = Note {
            plugins: self.plugins.clone(),
            plugin: plugin.to_owned(),
            digest: digest.to_string(),
            process: std::process::id(),
        };
        let noted = note.write(folder);
        noted.inspect_err(|error| tracing::debug!(folder = %folder.display(), %error, "an admission cannot be noted")).ok()
    }

    /// What processes were admitting from this folder of plugins when they died. Their notes are removed.
    pub(super) fn take(&self) -> Vec<Note> {
        let Some(folder) = &self.folder else { return Vec::new() };
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let notes = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX));
        notes.filter_map(|entry| self.take_one(&entry.path())).collect()
    }

    /// None if it belongs to a living process or another folder of plugins.
    fn take_one(&self, path: &Path) -> Option<Note> {
        let file = File::open(path).ok()?;
        file.try_lock().ok()?;
        let age = file.metadata().and_then(|metadata| metadata.modified()).ok().and_then(|at| SystemTime::elapsed(&at).ok());
        let note = Note::read(&file);
        let is_ours = note.as_ref().is_some_and(|note| note.plugins == self.plugins);
        if is_ours || age.is_none_or(|age| age > KEPT) {
            let _ = fs::remove_file(path);
        }
        note.filter(|_| is_ours)
    }
}

impl Note {
    fn write(&self, folder: &Path) -> io::Result<Entry> {
        // Locked before it has a name that anybody looks for.
        let mut file = tempfile::Builder::new().prefix(".noting-").tempfile_in(folder)?;
        file.as_file().lock()?;
        file.write_all(&serde_json::to_vec(self)?)?;
        let path = folder.join(format!("{PREFIX}{}-{:016x}", self.process, fastrand::u64(..)));
        let lock = file.persist_noclobber(&path).map_err(|error| error.error)?;
        Ok(Entry { path, _lock: lock })
    }

    fn read(file: &File) -> Option<Self> {
        serde_json::from_reader(io::Read::take(file, NOTE_BYTES_MAX)).ok()
    }
}

/// Make the folder if it is missing, and insist that it is this user's alone.
fn private(folder: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let metadata = fs::symlink_metadata(folder)?;
    let is_private = metadata.is_dir() && metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o077 == 0;
    if is_private { Ok(()) } else { Err(io::Error::other("it is not a folder that only this user can reach")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_process_was_admitting_is_told_once_and_only_for_its_own_folder() {
        let cache =
            tempfile::Builder::new().permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700)).tempdir().expect("folder");
        let journal = Journal::open(Some(cache.path()), Path::new("/plugins"));
        let other = Journal::open(Some(cache.path()), Path::new("/other"));
        let digest = Digest::of(b"module");
        let entry = journal.note("mail", digest).expect("noted");
        assert_eq!(journal.take(), [], "it goes on");
        // As the system does at a process's end: the lock goes, the file stays.
        let path = entry.path.clone();
        let left = fs::read(&path).expect("a note");
        drop(entry);
        assert_eq!(journal.take(), [], "it has ended well");
        fs::write(&path, left).expect("written");
        assert_eq!(other.take(), [], "not its folder");
        let notes = journal.take();
        assert_eq!((notes.len(), notes[0].plugin.as_str(), notes[0].digest.as_str()), (1, "mail", digest.to_string().as_str()));
        assert_eq!(journal.take(), [], "once");
    }

    #[test]
    fn a_folder_that_others_can_reach_gets_no_notes() {
        let cache =
            tempfile::Builder::new().permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).tempdir().expect("folder");
        assert!(Journal::open(Some(cache.path()), Path::new("/plugins")).note("x", Digest::of(b"")).is_none());
    }
}
