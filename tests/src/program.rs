//! The `laelaps` program as a test runs it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use crate::Site;

/// A file of this repository.
#[must_use]
pub fn workspace_file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate stands in the workspace").join(path)
}

/// What a finished command answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its exit code; None if a signal ended it.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Answer {
    /// The same answer, which has to be a success.
    ///
    /// # Panics
    /// If the exit code is not 0.
    #[must_use]
    pub fn success(self) -> Self {
        assert_eq!(self.code, Some(0), "the command failed:\n{}{}", self.stdout, self.stderr);
        self
    }
}

impl Site {
    /// Runs `laelaps ARGUMENTS` in this site's folder, with its configuration, to its end.
    ///
    /// # Panics
    /// If the program is not built.
    pub async fn laelaps<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Answer {
        self.laelaps_with_input(arguments, "").await
    }

    /// The same with something on its standard input.
    ///
    /// # Panics
    /// If the program is not built.
    pub async fn laelaps_with_input<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>, input: &str) -> Answer {
        answer(self.command().args(arguments), input).await
    }

    /// The same as [`Site::laelaps`] with a fault to order (host/daemon/src/fault.rs).
    ///
    /// # Panics
    /// If the program is not built, or has no faults.
    pub async fn laelaps_with_fault<A: AsRef<OsStr>>(&self, fault: &str, arguments: impl IntoIterator<Item = A>) -> Answer {
        assert!(has_faults(), "the program has no faults; build it with `cargo build --features fault-injection`");
        answer(self.command().args(arguments).env("LAELAPS_FAULT", fault), "").await
    }

    /// A command that runs `laelaps` in this site, with nothing of the tests' own environment but `PATH`.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(laelaps());
        command.current_dir(self.folder()).env_clear().env("HOME", self.folder()).env("NO_COLOR", "1").kill_on_drop(true);
        if let Some(path) = path_variable() {
            command.env("PATH", path);
        }
        command
    }
}

/// Run a command to its end.
async fn answer(command: &mut Command, input: &str) -> Answer {
    use tokio::io::AsyncWriteExt;

    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("laelaps starts");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let feed = async {
        // A program that does not read its input closes it, which is its right.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
    };
    let ((), output) = tokio::join!(feed, child.wait_with_output());
    let output = output.expect("laelaps ends");
    Answer {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

#[expect(clippy::disallowed_methods, reason = "the only variable that children inherit")]
fn path_variable() -> Option<std::ffi::OsString> {
    std::env::var_os("PATH")
}

/// Whether the program has faults to order (host/daemon/src/fault.rs): the variable that orders them is named in it.
///
/// # Panics
/// If it is not built.
#[must_use]
pub fn has_faults() -> bool {
    const VARIABLE: &[u8] = b"LAELAPS_FAULT";
    let program = std::fs::read(laelaps()).expect("the program can be read");
    program.windows(VARIABLE.len()).any(|bytes| bytes == VARIABLE)
}

/// A folder for compiled plugins that all hosts of tests share: the guests are compiled once, and not at each of some hundred starts.
pub(crate) fn compiled() -> PathBuf {
    laelaps().with_file_name("compiled-for-tests")
}

/// The program that was built with the running test: `target/debug/laelaps` for `target/debug/deps/suite-...`.
///
/// # Panics
/// If it is not built.
#[must_use]
pub fn laelaps() -> PathBuf {
    let test = std::env::current_exe().expect("a process knows its program");
    let program = test.parent().and_then(Path::parent).expect("tests stand in target/PROFILE/deps").join("laelaps");
    assert!(program.exists(), "{} is missing; build it with `cargo build` (add --release for release tests)", program.display());
    program
}
