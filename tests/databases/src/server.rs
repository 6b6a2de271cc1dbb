//! What both servers have in common.

use std::os::unix::fs::chown;
use std::process::Command;

use rustix::process::geteuid;
use tempfile::TempDir;

use crate::{Certificates, Clock};

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

/// What a commit waits for besides, where there are two servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replication {
    /// The replica: nothing that was answered is lost with the primary.
    Synchronous,
    /// Nothing: the replica may never hear of it.
    Asynchronous,
}

/// How a primary makes way for its replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Going {
    /// It is killed.
    Dies,
    /// It is cut off from its replica, and goes on with the clients that it has.
    Lingers,
    /// Its operator has it make way.
    Leaves,
}

/// What a server is started with, besides what all of its kind are.
#[derive(Debug, Default)]
pub(crate) struct Extras {
    pub(crate) certificates: Option<Certificates>,
    pub(crate) settings: Vec<String>,
    /// NAME=VALUE each.
    pub(crate) environment: Vec<String>,
}

impl Extras {
    pub(crate) fn of_pair(settings: &[&str], clock: Option<&Clock>) -> Self {
        let environment = clock.map(Clock::environment).unwrap_or_default();
        Self {
            certificates: None,
            settings: settings.iter().map(|setting| (*setting).to_owned()).collect(),
            environment: environment.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
        }
    }

    /// The beginning of the server's command.
    pub(crate) fn command<'c>(&'c self, program: &'c str) -> Vec<&'c str> {
        let environment = self.environment.iter().map(String::as_str);
        ["env"].into_iter().chain(environment).chain([program]).collect()
    }
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
pub(crate) fn prepare(command: Command) {
    if let Err(problem) = try_to_prepare(command) {
        panic!("{problem}");
    }
}

/// As [`prepare`], and answers what the program said if it failed.
pub(crate) fn try_to_prepare(mut command: Command) -> Result<(), String> {
    use std::os::unix::process::CommandExt;
    if let Some(user) = user() {
        command.uid(user).gid(user);
    }
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().unwrap_or_else(|error| panic!("{program}: {error}; tests/run --prepare installs it"));
    if output.status.success() {
        return Ok(());
    }
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Err(format!("{program}: {said}{complained}"))
}

/// The port of a server that `tests/run` started for all test processes together, if it did.
#[expect(clippy::disallowed_methods, reason = "tests read what tests/run sets")]
pub(crate) fn shared_port(variable: &str) -> Option<u16> {
    let port = std::env::var_os(variable)?;
    Some(port.to_str().and_then(|port| port.parse().ok()).unwrap_or_else(|| panic!("{variable} is {port:?}, and no port")))
}
