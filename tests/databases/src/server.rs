//! What both servers have in common.

use std::os::unix::fs::chown;
use std::process::Command;

use rustix::process::geteuid;
use tempfile::TempDir;

/// Whose name a server runs under if the tests run as root, under which none of them would: nobody's.
const NOBODY: u32 = 65_534;

/// What a commit waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The operating system: safe against the death of the server, which is all that tests can bring about.
    Process,
    /// The disk, as the server has it by default: for benches.
    Disk,
}

/// The user that servers run as, if it is not the one that runs the tests.
pub(crate) fn user() -> Option<u32> {
    geteuid().is_root().then_some(NOBODY)
}

/// An empty folder that belongs to [`user`].
pub(crate) fn folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("laelaps-server-").tempdir().expect("a folder for a server");
    if let Some(user) = user() {
        chown(folder.path(), Some(user), Some(user)).expect("root may give a folder away");
    }
    folder
}

/// A program that prepares a folder; runs as [`user`].
pub(crate) fn prepare(mut command: Command) {
    use std::os::unix::process::CommandExt;
    if let Some(user) = user() {
        command.uid(user).gid(user);
    }
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().unwrap_or_else(|error| panic!("{program}: {error}; tests/run --prepare installs it"));
    assert!(
        output.status.success(),
        "{program}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The port of a server that `tests/run` started for all test processes together, if it did.
#[expect(clippy::disallowed_methods, reason = "tests read what tests/run sets")]
pub(crate) fn shared_port(variable: &str) -> Option<u16> {
    let port = std::env::var_os(variable)?;
    Some(port.to_str().and_then(|port| port.parse().ok()).unwrap_or_else(|| panic!("{variable} is {port:?}, and no port")))
}
