//! What both servers have in common.

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::chown;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::geteuid;
use tempfile::TempDir;

/// Ports are taken and given back before the server takes them; another process may be quicker.
pub(crate) const PORT_TRIES: usize = 5;

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

/// A port that nobody used a moment ago.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("bound").port()
}

/// A name that no other database of this server has.
pub(crate) fn database_name() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    format!("test_{}", NUMBER.fetch_add(1, Ordering::Relaxed))
}
