//! A request for tasks, and what answers it.

use std::fmt::Debug;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::{ClaimedTask, HostId};

/// A request for tasks.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Who claims.
    pub host: HostId,
    /// The most tasks to hand out: 1 to 1,000.
    pub limit: u32,
    /// Of these, the most tasks of users with a limit: as many as can begin at once. One that waits in the buffer of its host would keep
    /// back others of its user. None: `limit`.
    pub limited: Option<u32>,
    /// Only tasks of these queues: 1 to [`Claim::QUEUES_MAX`] names, each once. None: of all.
    pub queues: Option<Arc<[String]>>,
    /// How long the leases last unless renewed.
    pub alive_time: Duration,
    /// The caller runs nothing now and will run nothing else: a task that has to run alone may be handed out (then it is the only one).
    pub alone: bool,
    /// Hand out tasks without looking at users (PerfectQueue's `disable_resource_limit`).
    pub ignore_users: bool,
    /// Which types the claimer can run: it is given no others. They wait apart for hosts that can, and on PerfectQueue's own table for workers in
    /// Ruby. None: all.
    pub accepts: Option<Accepts>,
}

impl Claim {
    /// The most queues that one claim can name.
    pub const QUEUES_MAX: usize = 1_000;

    /// A claim of at most so many tasks, of all queues and types, in company, under leases of this length.
    #[must_use]
    pub fn new(host: HostId, limit: u32, alive_time: Duration) -> Self {
        Self { host, limit, limited: None, queues: None, alive_time, alone: false, ignore_users: false, accepts: None }
    }
}

/// Which types a claimer can run.
#[derive(Clone)]
pub struct Accepts(Arc<dyn Fn(&str) -> bool + Send + Sync>);

impl Accepts {
    /// Those for which `accepts` is true; asked once for each task that could be claimed. Make it once and clone it: what was learnt with one
    /// is forgotten with the next.
    pub fn new(accepts: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(accepts))
    }

    /// What tells it from others later, without keeping alive what it holds on to.
    pub(crate) fn mark(&self) -> AcceptsMark {
        AcceptsMark(Arc::downgrade(&self.0))
    }

    /// Whether a task of this type can be run.
    #[must_use]
    pub fn accepts(&self, task_type: &str) -> bool {
        (self.0)(task_type)
    }
}

/// Tells one [`Accepts`] from others.
#[derive(Clone)]
pub(crate) struct AcceptsMark(Weak<dyn Fn(&str) -> bool + Send + Sync>);

impl AcceptsMark {
    /// Whether this is the one, so that what was learnt with it still counts.
    pub(crate) fn is(&self, accepts: &Accepts) -> bool {
        self.0.ptr_eq(&Arc::downgrade(&accepts.0))
    }
}

impl Debug for AcceptsMark {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("AcceptsMark")
    }
}

impl Debug for Accepts {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Accepts")
    }
}

/// What a claim handed out.
#[derive(Clone, Debug, Default)]
pub struct Claimed {
    /// The tasks, each under a lease of the claiming host.
    pub tasks: Vec<ClaimedTask>,
    /// A task waits that has to run alone: come back with [`Claim::alone`] when nothing runs any more.
    pub alone_waiting: bool,
    /// How long until the next scheduled task becomes due, by the database's clock; None if none is scheduled.
    pub next_due_in: Option<Duration>,
}
