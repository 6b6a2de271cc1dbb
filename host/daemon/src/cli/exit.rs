//! How the program ends: exit codes, and errors told with their causes and a hint.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io;
use std::process::ExitCode;

use crate::dispatch::Broken;
use crate::{config, plugin};

/// What the exit code says. docs/cli.md has the same table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done,
    /// It failed for a reason that has no code of its own.
    Failed,
    /// The command was called in a wrong way, or with data that breaks a bound.
    Usage,
    /// The configuration is missing or refused.
    Configuration,
    /// The database cannot be used.
    Database,
    /// There is no such task, root, node or plugin version.
    NoSuchTask,
    /// The task or root exists, but not in a state that allows it; or what is to be made exists already.
    WrongState,
    /// A plugin is refused, or the handler did not finish its task.
    Plugin,
    /// ZooKeeper cannot be used.
    ZooKeeper,
    /// The answer is no: no item is left, the barrier stands, the timer is gone or late, the node is not there.
    No,
    /// More threads are stuck in handlers than a host can do without.
    Stuck,
    /// As the command exited that this program ran.
    Same(u8),
}

/// The exit codes as `--help` shows them.
pub(super) const TABLE: &str = "Exit codes:\n  \
    0  done\n  \
    1  failed for a reason that has no code of its own\n  \
    2  wrong usage, or data that breaks a bound\n  \
    3  the configuration is missing or refused\n  \
    4  the database cannot be used\n  \
    5  no such task, root, node or plugin version\n  \
    6  the task's or root's state does not allow it, or what is to be made exists already\n  \
    7  a plugin is refused, or a handler did not finish its task\n  \
    8  ZooKeeper cannot be used\n  \
    9  the answer is no, of `laelaps watchdog`: no item is left, the barrier stands, a timer is gone or expired\n  \
    10  too many threads are stuck in handlers, of `laelaps run`: its tasks are released, and a new process is needed";

/// Something that a command itself finds wrong.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Complaint {
    /// How the program ends for it.
    pub exit: Exit,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Complaint {
    /// A complaint with a hint.
    pub fn new(exit: Exit, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hint: Some(hint.into()) }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Configuration => 3,
            Exit::Database => 4,
            Exit::NoSuchTask => 5,
            Exit::WrongState => 6,
            Exit::Plugin => 7,
            Exit::ZooKeeper => 8,
            Exit::No => 9,
            Exit::Stuck => 10,
            Exit::Same(code) => code,
        })
    }
}

/// Tell an error of clap's, which includes `--help` and `--version`.
pub(super) fn usage(error: &clap::Error) -> ExitCode {
    // Nobody is there to be told if this fails.
    let _ = error.print();
    if error.use_stderr() { Exit::Usage.into() } else { Exit::Done.into() }
}

/// Tell an error on standard error, and answer the exit code that fits it.
pub(super) fn tell(error: &anyhow::Error) -> ExitCode {
    // Whoever read our output has seen enough, as in `laelaps list | head`.
    if find::<io::Error>(error).is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
        return Exit::Done.into();
    }
    tell_and_go_on(error).into()
}

/// Tell an error of which there may be several.
pub(super) fn tell_and_go_on(error: &anyhow::Error) -> Exit {
    anstream::eprint!("{}", in_words(error));
    exit(error)
}

/// Tell something odd that stops nobody.
pub(super) fn warn(warning: &str) {
    anstream::eprintln!("\u{1b}[1;33mwarning:\u{1b}[0m {warning}");
}

fn in_words(error: &anyhow::Error) -> String {
    let mut words = String::new();
    // Writing to a string cannot fail.
    let _ = match find::<config::Error>(error) {
        Some(refused) if !refused.problems().is_empty() => write_problems(&mut words, refused),
        _ => write_chain(&mut words, error),
    };
    words
}

fn write_problems(words: &mut String, refused: &config::Error) -> std::fmt::Result {
    for warning in refused.warnings() {
        writeln!(words, "\u{1b}[1;33mwarning:\u{1b}[0m {warning}")?;
    }
    for problem in refused.problems() {
        writeln!(words, "{ERROR} {problem}")?;
        if let Some(hint) = &problem.hint {
            writeln!(words, "{HINT} {hint}")?;
        }
    }
    Ok(())
}

const ERROR: &str = "\u{1b}[1;31merror:\u{1b}[0m";
const HINT: &str = "\u{1b}[1;36mhint:\u{1b}[0m";

fn write_chain(words: &mut String, error: &anyhow::Error) -> std::fmt::Result {
    writeln!(words, "{ERROR} {error}")?;
    let mut told = error.to_string();
    for cause in error.chain().skip(1) {
        let text = cause.to_string();
        // Some messages end with their cause already.
        if !told.ends_with(&text) {
            writeln!(words, "  caused by: {}", text.replace('\n', "\n             "))?;
        }
        told = text;
    }
    if let Some(hint) = hint(error) {
        writeln!(words, "{HINT} {hint}")?;
    }
    Ok(())
}

fn find<E: StdError + 'static>(error: &anyhow::Error) -> Option<&E> {
    error.chain().find_map(|cause| cause.downcast_ref())
}

fn hint(error: &anyhow::Error) -> Option<String> {
    let complaint = find::<Complaint>(error).and_then(|complaint| complaint.hint.clone());
    complaint
        .or_else(|| find::<config::Error>(error).and_then(config::Error::hint))
        .or_else(|| find::<laelaps_queue::Error>(error).and_then(|error| error.hint().map(str::to_owned)))
        .or_else(|| find::<plugin::Error>(error).and_then(|error| error.hint().map(str::to_owned)))
        .or_else(|| find::<laelaps_queue::Error>(error).and_then(queue_hint).map(str::to_owned))
        .or_else(|| find::<laelaps_watchdog::Error>(error).and_then(laelaps_watchdog::Error::hint).map(str::to_owned))
        .or_else(|| find::<io::Error>(error).and_then(io_hint).map(str::to_owned))
}

/// What the command line can advise where the queue alone cannot.
fn queue_hint(error: &laelaps_queue::Error) -> Option<&'static str> {
    match error {
        laelaps_queue::Error::InvalidTask { .. } => {
            Some("KEY and TYPE have 1 to 255 bytes, DATA is a JSON object; in a shell, put it in single quotes: '{\"id\": 1}'")
        }
        laelaps_queue::Error::AlreadyEnded { .. } => Some("`laelaps show KEY` tells how it ended"),
        laelaps_queue::Error::File { .. } => Some("`url:` in the configuration names the file"),
        _ => None,
    }
}

fn io_hint(error: &io::Error) -> Option<&'static str> {
    match error.kind() {
        io::ErrorKind::NotFound => Some("check the path: the file has to be there, or the folder for a new one"),
        io::ErrorKind::PermissionDenied => Some("let the user that runs laelaps use the path"),
        io::ErrorKind::IsADirectory => Some("name a file, not a folder"),
        io::ErrorKind::StorageFull => Some("make room on the disk"),
        _ => None,
    }
}

fn exit(error: &anyhow::Error) -> Exit {
    use laelaps_queue::Error as Queue;
    if let Some(complaint) = find::<Complaint>(error) {
        return complaint.exit;
    }
    if find::<config::Error>(error).is_some() {
        return Exit::Configuration;
    }
    if let Some(plugin) = find::<plugin::Error>(error) {
        return match plugin {
            plugin::Error::Folder { .. } | plugin::Error::Cache { .. } => Exit::Configuration,
            plugin::Error::Refused(_) => Exit::Plugin,
            _ => Exit::Failed,
        };
    }
    if let Some(watchdog) = find::<laelaps_watchdog::Error>(error) {
        return watchdog_exit(watchdog);
    }
    if let Some(Broken::TooManyStuck(_)) = find::<Broken>(error) {
        return Exit::Stuck;
    }
    match find::<Queue>(error) {
        Some(Queue::InvalidTask { .. }) => Exit::Usage,
        Some(Queue::Config { .. }) => Exit::Configuration,
        Some(Queue::NotFound(_) | Queue::NoSuchId(_)) => Exit::NoSuchTask,
        Some(Queue::AlreadyEnded { .. } | Queue::WrongState { .. }) => Exit::WrongState,
        Some(_) => Exit::Database,
        None => Exit::Failed,
    }
}

fn watchdog_exit(error: &laelaps_watchdog::Error) -> Exit {
    use laelaps_watchdog::Error as Watchdog;
    match error {
        Watchdog::Config { .. } => Exit::Usage,
        Watchdog::NoRoot(_) | Watchdog::NoNode(_) | Watchdog::NoParent { .. } => Exit::NoSuchTask,
        Watchdog::RootExists { .. }
        | Watchdog::HalfFilled(_)
        | Watchdog::FleetRoot(_)
        | Watchdog::MarkersRoot(_)
        | Watchdog::NotFleetRoot { .. }
        | Watchdog::NotEmpty(_) => Exit::WrongState,
        _ => Exit::ZooKeeper,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn a_cause_keeps_its_exit_code_and_hint_under_a_context() {
        let error = Err::<(), _>(laelaps_queue::Error::NotInitialised).context("cannot list").unwrap_err();
        assert_eq!(exit(&error), Exit::Database);
        let words = anstream::adapter::strip_str(&in_words(&error)).to_string();
        let lines: Vec<&str> = words.lines().collect();
        assert_eq!(lines[0], "error: cannot list");
        assert!(lines[1].starts_with("  caused by: the database has no"), "{words}");
        assert!(lines[2].starts_with("hint: ") && lines[2].contains("laelaps init"), "{words}");
    }

    #[test]
    fn help_and_documentation_tell_the_same_exit_codes() {
        let page = include_str!("../../../../docs/cli.md");
        for line in TABLE.lines().skip(1) {
            let (code, meaning) = line.trim().split_once("  ").expect("a code and its meaning");
            assert!(page.contains(&format!("| {code} | {meaning} |")), "{line}");
        }
    }

    #[test]
    fn a_cause_that_its_message_ends_with_is_not_told_twice() {
        let source = io::Error::new(io::ErrorKind::NotFound, "no such folder");
        let error = anyhow::Error::from(plugin::Error::Folder { folder: "plugins".into(), source });
        let words = anstream::adapter::strip_str(&in_words(&error)).to_string();
        assert_eq!(words.matches("no such folder").count(), 1, "{words}");
    }
}
