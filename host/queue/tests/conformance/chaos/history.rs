//! What processes asked of a queue, and what they were told: written down before it is asked and after it is answered, so that a process may die
//! at any moment. What has no answer may or may not have happened.

use std::collections::{BTreeSet, HashMap};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use laelaps_queue::{ClaimedTask, State};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A moment by this machine's clock, in microseconds. All processes of a run are on one machine.
pub(super) type Moment = u64;

/// A task and a claim of it, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Held {
    pub(super) task: i64,
    pub(super) lease: i64,
}

impl Held {
    pub(super) fn of(task: &ClaimedTask) -> Self {
        Self { task: task.lease_ref.task.0, lease: task.lease_ref.lease.0 }
    }
}

/// How an attempt is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum End {
    Finish,
    Reject,
    /// It waits again.
    Again,
}

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Asked {
    /// Tasks of these keys.
    Submit(Vec<String>),
    Claim(i64),
    /// To renew these for so many milliseconds.
    Renew(Vec<Held>, i64),
    /// To settle these, and to store tasks of these keys with them.
    Settle(Vec<(Held, End, Vec<String>)>),
    Update(Held),
    Cancel(String),
    ForceFinish(String),
    Retry(String),
    /// Nothing: somebody wrote nonsense into its data.
    Damage(String),
    /// That the queue's clock is so many milliseconds ahead of ours.
    Clock(i64),
    /// Nothing: what was answered may be undone.
    Lose,
    /// Nothing: a server breaks down, or another takes its place, that may have heard nothing of claims and renewals which were answered last.
    Forget,
    /// Nothing: from now on this host may be taken for dead. In a file: every host of its process.
    Die(Option<i64>),
}

/// A task that was handed out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Taken {
    pub(super) held: Held,
    pub(super) key: String,
    pub(super) user: Option<String>,
    pub(super) max_running: Option<u32>,
    /// By the server's clock, in milliseconds.
    pub(super) claimed_at: i64,
    pub(super) until: i64,
}

impl Taken {
    pub(super) fn of(task: &ClaimedTask) -> Self {
        Self {
            held: Held::of(task),
            key: task.key.clone(),
            user: task.user.clone(),
            max_running: task.max_running,
            claimed_at: task.claimed_at.0,
            until: task.until.0,
        }
    }
}

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer {
    /// For each key whether it was new.
    Submitted(Vec<bool>),
    Claimed(Vec<Taken>),
    /// For each lease whether it held.
    Held(Vec<bool>),
    Done,
    /// It was refused, and changed nothing.
    Refused,
    /// It failed in a way that leaves open what it changed.
    Unknown,
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) begun: Moment,
    /// None if nobody heard an answer.
    pub(super) ended: Option<Moment>,
    pub(super) asked: Asked,
    pub(super) answer: Answer,
}

impl Operation {
    /// The host of a claim.
    fn host(&self) -> Option<i64> {
        match self.asked {
            Asked::Claim(host) => Some(host),
            _ => None,
        }
    }
}

/// What the queue holds in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) task: i64,
    pub(super) key: String,
    pub(super) state: State,
}

#[derive(Serialize, Deserialize)]
enum Line {
    Asked { number: u64, at: Moment, asked: Asked },
    Answered { number: u64, at: Moment, answer: Answer },
}

/// Writes down what one process does.
#[derive(Debug)]
pub(super) struct Recorder {
    file: File,
    next: AtomicU64,
}

/// An operation that is under way.
pub(super) struct Asking<'r> {
    recorder: &'r Recorder,
    number: u64,
}

impl Recorder {
    pub(super) fn new(path: &Path) -> Self {
        let file = OpenOptions::new().create(true).append(true).open(path).expect("a history can be written");
        Self { file, next: AtomicU64::new(0) }
    }

    /// Write about a process from outside it.
    pub(super) fn beside(path: &Path) -> Self {
        Self { next: AtomicU64::new(1 << 60), ..Self::new(path) }
    }

    pub(super) fn ask(&self, asked: Asked) -> Asking<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.write(&Line::Asked { number, at: now(), asked });
        Asking { recorder: self, number }
    }

    /// The hosts of this process may be taken for dead from now on.
    pub(super) fn dies(&self) {
        self.ask(Asked::Die(None)).answered(Answer::Done);
    }

    /// In one write, so that lines of several threads do not mix and a process that dies leaves whole ones.
    fn write(&self, line: &Line) {
        let mut text = serde_json::to_vec(line).expect("a line is JSON");
        text.push(b'\n');
        (&self.file).write_all(&text).expect("a history can be written");
    }
}

impl Asking<'_> {
    pub(super) fn answered(self, answer: Answer) {
        self.recorder.write(&Line::Answered { number: self.number, at: now(), answer });
    }
}

/// As the kernel says: a process whose clock steps must not date what it writes by that.
fn now() -> Moment {
    let since = clock_gettime(ClockId::Realtime);
    let since =
        Duration::new(u64::try_from(since.tv_sec).expect("after 1970"), u32::try_from(since.tv_nsec).expect("nanoseconds"));
    u64::try_from(since.as_micros()).expect("not that late")
}

/// The file of a process.
pub(super) fn history_of(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.jsonl"))
}

/// All that was written down in a folder, a file for each process.
pub(super) fn read(folder: &Path) -> Vec<Operation> {
    let mut operations = Vec::new();
    for entry in std::fs::read_dir(folder).expect("histories can be read") {
        let text = std::fs::read(entry.expect("a file").path()).expect("a history can be read");
        let first = operations.len();
        let mut places: HashMap<u64, usize> = HashMap::new();
        // What is torn at the end was not written in time.
        for line in text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()) {
            match line {
                Line::Asked { number, at, asked } => {
                    places.insert(number, operations.len());
                    operations.push(Operation { begun: at, ended: None, asked, answer: Answer::Unknown });
                }
                Line::Answered { number, at, answer } => {
                    let operation: &mut Operation = &mut operations[places[&number]];
                    (operation.ended, operation.answer) = (Some(at), answer);
                }
            }
        }
        let of_process = &operations[first..];
        let hosts: BTreeSet<i64> = of_process.iter().filter_map(|operation| operation.host()).collect();
        let death = of_process.iter().find(|operation| operation.asked == Asked::Die(None)).cloned();
        let deaths = hosts.into_iter().filter_map(|host| Some(Operation { asked: Asked::Die(Some(host)), ..death.clone()? }));
        operations.extend(deaths.collect::<Vec<_>>());
    }
    operations.sort_by_key(|operation| operation.begun);
    operations
}
