//! What a handler may ask of its host.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::host::Host;
use crate::{Error, OrFail, Result, Submit, Task};

/// How far the work is, for whoever looks at the task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Units of work done.
    pub done: u64,
    /// Units of work in all, if known.
    pub total: Option<u64>,
    /// What is being done, for people. The host keeps 1,024 bytes.
    pub note: String,
}

/// Why the attempt should end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancellation {
    /// The host stops or replaces the plugin: come to an end soon, best with [`Outcome::release`](crate::Outcome::release).
    Graceful,
    /// The host is stopping the attempt now; the next calls will not return.
    Immediate,
    /// The task is no longer ours: nothing this attempt returns will count.
    LeaseLost,
}

/// One attempt of one task, and what its handler may ask of the host about it.
pub struct Context {
    task: Task,
    host: Box<dyn Host>,
}

impl Context {
    pub(crate) fn new(task: Task, host: Box<dyn Host>) -> Self {
        Self { task, host }
    }

    /// The task itself.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// The name under which the task was submitted; unique in its queue.
    pub fn key(&self) -> &str {
        &self.task.key
    }

    /// What sort of work this is. The producer calls it the task's type.
    pub fn kind(&self) -> &str {
        &self.task.kind
    }

    /// The user on whose account the task runs, if the producer named one.
    pub fn user(&self) -> Option<&str> {
        self.task.user.as_deref()
    }

    /// The number of this attempt: 1 on the first. Attempts that were released do not count.
    pub fn attempt(&self) -> u32 {
        self.task.attempt
    }

    /// The most attempts this task gets. None: no limit.
    pub fn max_attempts(&self) -> Option<u32> {
        self.host.max_attempts()
    }

    /// Whether a failure of this attempt would be the task's last.
    pub fn is_last_attempt(&self) -> bool {
        self.max_attempts().is_some_and(|most| self.attempt() >= most)
    }

    /// Whether the lease still holds: false means that the task is lost to this attempt, which should end.
    ///
    /// The host renews the lease by itself. A handler needs heartbeats only to show progress, to notice a lost lease, or to hold the task
    /// for longer than the queue's `alive_time`.
    pub fn heartbeat(&self) -> bool {
        self.host.heartbeat(None, None)
    }

    /// Shows how far the work is; the answer is that of [`Context::heartbeat`].
    pub fn progress(&self, done: u64, total: impl Into<Option<u64>>, note: impl Into<String>) -> bool {
        self.host.heartbeat(Some(&Progress { done, total: total.into(), note: note.into() }), None)
    }

    /// Renews the lease to now + this time (at most 24 hours) before it returns; the answer is that of [`Context::heartbeat`].
    pub fn hold_for(&self, alive_time: Duration) -> bool {
        self.host.heartbeat(None, Some(alive_time))
    }

    /// Whether this attempt should come to an end. Cheap: it asks no database.
    pub fn is_cancelled(&self) -> bool {
        self.cancellation().is_some()
    }

    /// Why this attempt should come to an end, if it should.
    pub fn cancellation(&self) -> Option<Cancellation> {
        self.host.cancellation()
    }

    /// Merges the members of `members`, which serialises to a JSON object, into the task's data.
    ///
    /// Durable when it returns, and kept even if the attempt then fails: the next attempt sees the merged data, this one does not.
    ///
    /// # Errors
    /// Codes `invalid-data` and `too-large`, rejecting; `lease-lost` and `unavailable`, to be tried again.
    pub fn update_data(&self, members: &impl Serialize) -> Result<()> {
        let members = serde_json::to_vec(members).or_reject("invalid-data")?;
        self.host.update_data(&members)
    }

    /// Begins a follow-up task of this key and type; [`Submit::send`] hands it in.
    pub fn submit(&self, key: impl Into<String>, kind: impl Into<String>) -> Submit<'_> {
        Submit::new(self.host.as_ref(), key.into(), kind.into())
    }

    /// When this attempt will be stopped, if its route has a time limit, by the database's clock.
    pub fn deadline(&self) -> Option<SystemTime> {
        self.host.deadline_ms().map(moment)
    }

    /// When the task was submitted, by the database's clock.
    pub fn created_at(&self) -> SystemTime {
        moment(self.host.created_at_ms())
    }

    /// The queue in which the task waited: `default` unless its producer named another.
    pub fn queue(&self) -> String {
        self.host.queue()
    }

    /// One setting of the route that led here: text as it is, anything else as JSON.
    pub fn setting(&self, name: &str) -> Option<String> {
        self.host.setting(name)
    }

    /// One setting of the route as a type of yours: a number, a list, a struct, or text.
    ///
    /// # Errors
    /// Code `bad-setting`, to be tried again, since the operator can mend it.
    pub fn setting_as<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.host.setting(name) else { return Ok(None) };
        let wrong = match serde_json::from_str(&text) {
            Ok(value) => return Ok(Some(value)),
            Err(error) => error,
        };
        // Text that is not JSON, or that looks like it (a password of digits), still is text.
        serde_json::from_value(text.clone().into())
            .map(Some)
            .map_err(|_| Error::retry("bad-setting", format_args!("the route's setting `{name}` is {text}: {wrong}")))
    }

    /// All settings of the route.
    pub fn settings(&self) -> BTreeMap<String, String> {
        self.host.settings().into_iter().collect()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Context").field("task", &self.task).finish_non_exhaustive()
    }
}

fn moment(unix_ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(unix_ms)
}
