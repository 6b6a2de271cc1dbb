//! A private folder for as long as this process lives. What a killed process left behind, the next one removes.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use tempfile::TempDir;

const PREFIX: &str = "laelaps-code-";
/// Another process that starts at this very moment may take a folder that is not locked yet for a dead one's.
const TRIES: usize = 10;

/// A folder that nobody else may read, locked while its owner lives.
pub(super) struct Scratch {
    folder: TempDir,
    /// The lock goes with the process, however that ends.
    _lock: File,
}

impl Scratch {
    /// A new folder in `parent`, which is swept first.
    pub(super) fn new(parent: &Path) -> io::Result<Self> {
        sweep(parent);
        for _ in 0..TRIES {
            // Private from its first moment, whatever the umask.
            let private = fs::Permissions::from_mode(0o700);
            let folder = tempfile::Builder::new().prefix(PREFIX).permissions(private).tempdir_in(parent)?;
            let Ok(lock) = File::open(folder.path()) else { continue };
            if lock.try_lock().is_ok() && folder.path().exists() {
                return Ok(Self { folder, _lock: lock });
            }
        }
        Err(io::Error::other("other processes remove every folder that is made there"))
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Remove what dead processes of this user left.
fn sweep(parent: &Path) {
    let user = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().to_string_lossy().starts_with(PREFIX)
            && entry.metadata().is_ok_and(|data| data.is_dir() && data.uid() == user && data.mode() & 0o077 == 0);
        if is_ours && File::open(entry.path()).is_ok_and(|folder| folder.try_lock().is_ok()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_process_left_is_removed_and_what_a_living_one_uses_is_not() {
        let parent = TempDir::new().expect("a temporary folder");
        let living = Scratch::new(parent.path()).expect("a folder");
        let dead = parent.path().join("laelaps-code-dead");
        let foreign = parent.path().join("laelaps-code-foreign");
        for (folder, mode) in [(&dead, 0o700), (&foreign, 0o755)] {
            fs::create_dir(folder).expect("a new folder");
            fs::set_permissions(folder, fs::Permissions::from_mode(mode)).expect("our own folder");
        }
        fs::write(dead.join("code.cwasm"), "code").expect("our own folder");
        let next = Scratch::new(parent.path()).expect("a folder");
        assert!(!dead.exists());
        assert!(living.path().exists() && next.path().exists());
        assert!(foreign.exists(), "what others may read is nothing of ours");
    }
}
