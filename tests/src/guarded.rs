//! A server process of a test, which ends with the test process, however that ends.
//!
//! A shell between the two holds a pipe to the test and kills the server when the pipe closes; it then removes the server's folder as well,
//! since a value that lives in a static is never dropped.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// Starts the server, tells its process number, and kills it when standard input closes.
const GUARD: &str = r#"
exec 3<&0
folder=$1
shift
"$@" </dev/null >>"$folder/server.log" 2>&1 3<&- &
server=$!
echo $server
(
  said=$(cat <&3)
  kill -9 $server
  if [ "$said" != keep ]; then
    # Its other processes end by themselves, and may leave files until then: until the folder is gone, or a thousand tries.
    tries=0
    until rm -rf -- "$folder" || [ $tries -ge 1000 ]; do tries=$((tries + 1)); done
  fi
) >/dev/null 2>&1 &
exec 3<&-
wait $server
"#;

/// A running server.
#[derive(Debug)]
pub(crate) struct Guarded {
    /// Killing it, or dropping its standard input, ends the server.
    guard: Child,
    server: Pid,
}

impl Guarded {
    /// Starts `command`, which writes what it says to `server.log` in `folder`; as `user`, if that is given (then the folder is its own).
    ///
    /// # Panics
    /// If there is no shell.
    pub(crate) fn start(folder: &Path, command: &[&str], user: Option<u32>) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", GUARD, "server"]).arg(folder).args(command).current_dir(folder);
        // A group of its own: what ends the tests' group must not keep the shell from clearing away.
        shell.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        if let Some(user) = user {
            shell.uid(user).gid(user);
        }
        let mut guard = shell.spawn().expect("a shell");
        let mut line = String::new();
        BufReader::new(guard.stdout.take().expect("piped")).read_line(&mut line).expect("the server's process number");
        let server = line.trim().parse().ok().and_then(Pid::from_raw).expect("a process number");
        Self { guard, server }
    }

    /// Sends the server a signal.
    ///
    /// # Panics
    /// If it has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.server, signal).expect("the server is ours");
    }

    /// Whether the server has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        matches!(self.guard.try_wait(), Ok(Some(_)))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // What the server started dies with it: a database server's other processes would hold its memory for a moment.
        for process in children(self.server).into_iter().chain([self.server]) {
            // It may have ended by itself; the guard then ends as well.
            let _ = kill_process(process, Signal::KILL);
        }
        if let Some(mut pipe) = self.guard.stdin.take() {
            let _ = pipe.write_all(b"keep");
        }
        let _ = self.guard.wait();
    }
}

/// The processes that `parent` started.
fn children(parent: Pid) -> Vec<Pid> {
    let path = format!("/proc/{0}/task/{0}/children", parent.as_raw_nonzero());
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().filter_map(|number| Pid::from_raw(number.parse().ok()?)).collect()
}
