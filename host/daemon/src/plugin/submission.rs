//! Follow-up tasks: `context.submit`, and `context.submission`, one in the making that the host holds until the guest drops it.
//!
//! What the host holds for one in the making is bounded: texts that are longer than any task may have are not kept, only what is wrong with them; data comes
//! with the call that submits. How many there are at once the bound on a guest's handles says.

use laelaps_queue::{Compression, NewTask, Timestamp, check_queue};
use wasmtime::component::Resource;

use super::abi::latest::laelaps::worker::context;
use super::guest::{Guest, lease_lost, refusal};

/// A follow-up task in the making.
#[expect(unreachable_pub, reason = "the contract's generated code hands it on")]
pub struct Submission {
    task: NewTask,
    /// What is wrong with it already.
    problem: Option<context::Refusal>,
}

impl Submission {
    fn new(key: String, kind: String) -> Self {
        let mut submission = Self { task: NewTask::new("", "", Vec::new()), problem: None };
        submission.task.key = submission.bounded("key", "invalid-key", key);
        submission.task.task_type = submission.bounded("kind", "invalid-data", kind);
        submission
    }

    /// The text, if it may be kept.
    fn bounded(&mut self, what: &str, code: &str, text: String) -> String {
        if text.len() <= NewTask::NAME_BYTES_MAX {
            return text;
        }
        let problem = format!("the {what} has {} bytes; at most {} are allowed", text.len(), NewTask::NAME_BYTES_MAX);
        self.problem.get_or_insert_with(|| refusal(code, problem));
        String::new()
    }
}

pub(super) fn moment(unix_ms: u64) -> Timestamp {
    Timestamp(i64::try_from(unix_ms).unwrap_or(i64::MAX))
}

pub(super) fn compression(compression: context::Compression) -> Compression {
    match compression {
        context::Compression::None => Compression::None,
        context::Compression::Gzip => Compression::Gzip,
    }
}

impl Guest {
    fn submission(&mut self, handle: &Resource<Submission>) -> wasmtime::Result<&mut Submission> {
        Ok(self.table.get_mut(handle)?)
    }

    /// Hold a follow-up task until the attempt's outcome, if it may be submitted.
    pub(super) async fn take_follow_up(&mut self, task: NewTask) -> wasmtime::Result<Result<(), context::Refusal>> {
        if self.attempt.is_lease_lost() {
            return Ok(Err(lease_lost()));
        }
        let task = match self.attempt.check_follow_up(task) {
            Ok(task) => task,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if let Err(refusal) = self.attempt.check_waiting().await? {
            return Ok(Err(refusal));
        }
        self.attempt.follow_up_bytes += task.data.len() as u64;
        self.attempt.follow_ups.push(task);
        Ok(Ok(()))
    }
}

impl context::HostSubmission for Guest {
    fn new(&mut self, key: String, kind: String) -> wasmtime::Result<Resource<Submission>> {
        Ok(self.table.push(Submission::new(key, kind))?)
    }

    fn run_at(&mut self, handle: Resource<Submission>, unix_ms: u64) -> wasmtime::Result<()> {
        self.submission(&handle)?.task.run_at = Some(moment(unix_ms));
        Ok(())
    }

    fn user(&mut self, handle: Resource<Submission>, user: String) -> wasmtime::Result<()> {
        let submission = self.submission(&handle)?;
        submission.task.user = Some(submission.bounded("user", "invalid-data", user));
        Ok(())
    }

    fn max_running(&mut self, handle: Resource<Submission>, most: u32) -> wasmtime::Result<()> {
        self.submission(&handle)?.task.max_running = Some(most);
        Ok(())
    }

    fn max_attempts(&mut self, handle: Resource<Submission>, most: u32) -> wasmtime::Result<()> {
        self.submission(&handle)?.task.max_attempts = Some(most);
        Ok(())
    }

    fn priority(&mut self, handle: Resource<Submission>, priority: i32) -> wasmtime::Result<()> {
        self.submission(&handle)?.task.priority = priority;
        Ok(())
    }

    fn queue(&mut self, handle: Resource<Submission>, queue: String) -> wasmtime::Result<()> {
        let submission = self.submission(&handle)?;
        match check_queue(&queue) {
            Ok(()) => submission.task.queue = Some(queue),
            Err(problem) => drop(submission.problem.get_or_insert_with(|| refusal("invalid-data", problem))),
        }
        Ok(())
    }

    fn compression(&mut self, handle: Resource<Submission>, how: context::Compression) -> wasmtime::Result<()> {
        self.submission(&handle)?.task.compression = compression(how);
        Ok(())
    }

    async fn submit(&mut self, handle: Resource<Submission>, data: Vec<u8>) -> wasmtime::Result<Result<(), context::Refusal>> {
        let submission = self.submission(&handle)?;
        if let Some(problem) = &submission.problem {
            return Ok(Err(problem.clone()));
        }
        let task = NewTask { data, ..submission.task.clone() };
        self.take_follow_up(task).await
    }

    fn drop(&mut self, handle: Resource<Submission>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}
