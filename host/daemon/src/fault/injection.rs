//! The faults of a build for tests; the module above tells how they are ordered.

use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use laelaps_queue::SchemaStep;
use rustix::process::{Signal, getpid, kill_process};

/// What `laelaps --version` tells.
pub(crate) const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (fault injection)");

/// The name is in the program if and only if the faults are: a test looks for it.
const VARIABLE: &str = "LAELAPS_FAULT";
/// The file that lets blocked threads come back.
const UNBLOCK: &str = "unblock";
/// Between two looks for it.
const UNBLOCK_POLL: Duration = Duration::from_millis(10);

static ORDERED: OnceLock<Vec<Fault>> = OnceLock::new();
static LATER_STEPS: OnceLock<Vec<SchemaStep>> = OnceLock::new();

/// One fault, and how often its place was reached.
#[derive(Debug)]
struct Fault {
    kind: Kind,
    /// The step or the type of task.
    place: String,
    count: Option<u32>,
    reached: AtomicU32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    BlockThread,
    BlockFile,
    AbortAt,
    BlockAt,
    LaterBuild,
}

/// Read what is ordered. To be called once, before anything else.
pub(crate) fn arm() -> Result<(), String> {
    let ordered = crate::config::environment_variable(VARIABLE).unwrap_or_default();
    let faults = parse(&ordered).map_err(|problem| format!("{VARIABLE} holds {ordered:?}: {problem}"))?;
    if let Some(fault) = faults.iter().find(|fault| fault.kind == Kind::LaterBuild) {
        let steps = read_steps(Path::new(&fault.place)).map_err(|problem| format!("{}: {problem}", fault.place))?;
        let _ = LATER_STEPS.set(steps);
    }
    // A second call changes nothing.
    let _ = ORDERED.set(faults);
    Ok(())
}

fn read_steps(path: &Path) -> Result<Vec<SchemaStep>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let steps: Vec<(i64, i64, String)> = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let step = |(version, oldest_program, sql): (i64, i64, String)| SchemaStep { version, oldest_program, sql: sql.into() };
    Ok(steps.into_iter().map(step).collect())
}

/// Steps of the schema after those of this build.
pub(crate) fn later_steps() -> Vec<SchemaStep> {
    LATER_STEPS.get().cloned().unwrap_or_default()
}

/// This step is reached; a test may have ordered that the process ends here, or does not get any further.
pub(crate) fn reach(step: &str) {
    let is_due = |kind| reached(kind, step).filter(|(fault, times)| *times == fault.count.unwrap_or(1));
    if let Some((_, times)) = is_due(Kind::AbortAt) {
        tracing::warn!(step, times, "fault injection: this process is killed");
        // Nothing of this process runs on, not even a destructor.
        let _ = kill_process(getpid(), Signal::KILL);
        block_until(|| false);
    }
    if let Some((_, times)) = is_due(Kind::BlockAt) {
        tracing::warn!(step, times, "fault injection: this thread is blocked");
        block_until(|| Path::new(UNBLOCK).exists());
    }
}

/// A guest's thread begins an attempt on a task of this type; a test may have ordered that it does not come back.
pub(crate) fn block_thread(task_type: &str) {
    block_first(Kind::BlockThread, task_type);
}

/// A guest opens this path below a granted folder; a test may have ordered that this does not come back.
pub(crate) fn block_file(path: &Path) {
    block_first(Kind::BlockFile, &path.to_string_lossy());
}

fn block_first(kind: Kind, place: &str) {
    let Some((fault, times)) = reached(kind, place) else { return };
    if fault.count.is_none_or(|count| times <= count) {
        tracing::warn!(place, times, "fault injection: this thread is blocked");
        block_until(|| Path::new(UNBLOCK).exists());
    }
}

/// The fault that is ordered for this place, and how often the place was reached by now.
fn reached(kind: Kind, place: &str) -> Option<(&'static Fault, u32)> {
    let fault = ORDERED.get()?.iter().find(|fault| fault.kind == kind && fault.place == place)?;
    Some((fault, fault.reached.fetch_add(1, Ordering::SeqCst) + 1))
}

fn block_until(condition: impl Fn() -> bool) {
    while !condition() {
        thread::park_timeout(UNBLOCK_POLL);
    }
}

fn parse(ordered: &str) -> Result<Vec<Fault>, String> {
    ordered.split(',').filter(|fault| !fault.is_empty()).map(Fault::parse).collect()
}

impl Fault {
    fn parse(text: &str) -> Result<Self, String> {
        const EXPECTED: &str =
            "expected block-thread=TYPE[:N], block-file=PATH[:N], abort-at=STEP[:N], block-at=STEP[:N] or later-build=FILE";
        let (kind, place) = match text.split_once('=') {
            Some(("block-thread", place)) => (Kind::BlockThread, place),
            Some(("block-file", place)) => (Kind::BlockFile, place),
            Some(("abort-at", place)) => (Kind::AbortAt, place),
            Some(("block-at", place)) => (Kind::BlockAt, place),
            Some(("later-build", place)) => (Kind::LaterBuild, place),
            _ => return Err(format!("{text:?} is no fault, {EXPECTED}")),
        };
        let (place, count) = match place.rsplit_once(':') {
            Some((place, count)) => {
                let count = count.parse().ok().filter(|count| *count > 0);
                (place, Some(count.ok_or_else(|| format!("{text:?} ends in no number from 1 on, {EXPECTED}"))?))
            }
            None => (place, None),
        };
        Ok(Self { kind, place: place.to_owned(), count, reached: AtomicU32::new(0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_listed_with_their_places_and_counts() {
        let faults = parse("block-thread=mail.send:2,abort-at=claimed,block-at=claimed:3").expect("three faults");
        let told: Vec<_> = faults.iter().map(|fault| (fault.kind, fault.place.as_str(), fault.count)).collect();
        let expected =
            [(Kind::BlockThread, "mail.send", Some(2)), (Kind::AbortAt, "claimed", None), (Kind::BlockAt, "claimed", Some(3))];
        assert_eq!(told, expected);
        assert!(parse("").expect("no fault").is_empty());
    }

    #[test]
    fn what_is_no_fault_is_refused() {
        for wrong in ["block", "abort-at", "block-thread=a:0", "abort-at=a:b", "=", "abort-at=a,b"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
