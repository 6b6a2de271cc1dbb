//! What unit tests of a task's path need: a queue on SQLite with a host that claims.

use std::sync::Arc;
use std::time::{Duration, Instant};

use laelaps_queue::{Backend, Claim, ClaimedTask, Config, HostDescription, HostId, LeaseRef, NewTask, Queue};
use tempfile::TempDir;

use crate::excuses::Excuses;
use crate::leases::Leases;
use crate::plugin::Control;

/// A time that ends in no test.
pub(crate) const LONG: Duration = Duration::from_secs(86_400);

/// A queue that ends with the test.
pub(crate) struct Trial {
    pub(crate) queue: Queue,
    pub(crate) host: HostId,
    _folder: TempDir,
}

impl Trial {
    pub(crate) async fn open() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let queue = Queue::open(&Config::new(format!("sqlite:{}", folder.path().join("queue.db").display()))).await;
        let queue = queue.expect("the queue opens");
        queue.init().await.expect("the queue initialises");
        let description = HostDescription { name: "trial".to_owned(), process_id: std::process::id(), identity: None };
        let host = queue.backend().register_host(&description).await.expect("the host registers");
        Self { queue, host, _folder: folder }
    }

    pub(crate) fn backend(&self) -> Arc<dyn Backend> {
        Arc::clone(self.queue.backend())
    }

    /// So many new tasks, claimed.
    pub(crate) async fn claimed(&self, count: u32) -> Vec<ClaimedTask> {
        let tasks: Vec<_> = (0..count).map(|number| NewTask::new(format!("task-{number}"), "t", "{}")).collect();
        self.queue.backend().submit(&tasks).await.expect("the queue takes the tasks");
        let claim = Claim::new(self.host, count, LONG);
        self.queue.backend().claim(&claim).await.expect("the queue hands tasks out").tasks
    }

    /// Leases of which this one is held, with what tells of its loss. Renewed by themselves every so often.
    pub(crate) fn holding(&self, task: &ClaimedTask, alive_time: Duration, interval: Duration) -> (Leases, Arc<Control>) {
        let leases = Leases::start(self.backend(), interval, Excuses::default());
        let control = Arc::new(Control::new());
        leases.hold(task, Instant::now(), alive_time, Arc::clone(&control));
        (leases, control)
    }
}

/// The task's lease, and one that it never had.
pub(crate) fn stale(task: &ClaimedTask) -> LeaseRef {
    LeaseRef { lease: laelaps_queue::Lease(task.lease_ref.lease.0 + 1_000_000), ..task.lease_ref }
}
