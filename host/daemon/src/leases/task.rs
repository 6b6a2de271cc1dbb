//! What a handler may do to its task while it runs: bound to one lease.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use laelaps_queue::{Backend, LeaseAnswer, LeaseRef, NewTask, Progress, TaskId, Timestamp};

use super::Leases;
use crate::config::Routes;
use crate::plugin::Services;
use crate::unstored::Share;
use crate::updates::Updates;
use crate::versions::Running;

/// The services of one attempt. A guest that is stuck keeps them for as long as it is.
pub(crate) struct LeasedTask {
    /// The leases of this host.
    pub leases: Leases,
    /// The queue.
    pub backend: Arc<dyn Backend>,
    /// The way of new members of tasks' data to it.
    pub updates: Updates,
    /// The lease of this attempt.
    pub lease_ref: LeaseRef,
    /// A moment by the database's clock ...
    pub database_time: Timestamp,
    /// ... and when that was, by this machine's monotonic clock.
    pub at: Instant,
    /// The producer's task from which its own comes.
    pub root: TaskId,
    /// The host's routes, and nothing else of the host whose end it waits for.
    pub routes: Arc<Routes>,
    /// The plugin of this attempt.
    pub plugin: Arc<str>,
    /// What it has submitted.
    pub share: Arc<Share>,
    /// Its plugin version runs on this host, as long as the guest is there: also one that is stuck may end the host.
    pub _running: Running,
}

#[async_trait]
impl Services for LeasedTask {
    fn note_progress(&self, progress: Option<Progress>) -> Option<bool> {
        self.leases.note_progress(self.lease_ref, progress)
    }

    async fn heartbeat(&self, progress: Option<Progress>, alive_time: Option<Duration>) -> bool {
        self.leases.beat(self.lease_ref, progress, alive_time).await
    }

    async fn update_data(&self, members: Vec<u8>) -> Result<LeaseAnswer, laelaps_queue::Error> {
        self.updates.update(self.lease_ref, members).await
    }

    async fn now(&self) -> Timestamp {
        self.database_time.plus(self.at.elapsed())
    }

    async fn relatives(&self, limit: u32) -> Result<Option<u32>, laelaps_queue::Error> {
        self.backend.relatives(self.root, self.lease_ref.task, limit).await
    }

    fn count_follow_up(&self, most: u32) -> bool {
        self.share.count(most)
    }

    fn leads_here(&self, task_type: &str) -> bool {
        self.routes.route(task_type).is_some_and(|route| *route.plugin == *self.plugin)
    }

    fn check(&self, task: &NewTask) -> Result<(), laelaps_queue::Error> {
        self.backend.check(task)
    }
}
