//! Follow-up tasks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::host::{Host, SubmitRequest, milliseconds};
use crate::{OrFail, Result};

/// A follow-up task in the making: [`Context::submit`](crate::Context::submit) begins it, [`Submit::send`] hands it in.
///
/// The host stores it in the same transaction as this attempt's outcome, with all other follow-ups or none of them: with finish, retry and
/// release. It is dropped if the attempt fails, traps, is stopped or loses its lease. A key that the queue already has counts as submitted.
#[must_use = "a follow-up task is handed in by `send`"]
pub struct Submit<'a> {
    host: &'a dyn Host,
    request: SubmitRequest,
    data: Result<()>,
}

impl<'a> Submit<'a> {
    pub(crate) fn new(host: &'a dyn Host, key: String, kind: String) -> Self {
        let request = SubmitRequest {
            key,
            kind,
            data: b"{}".to_vec(),
            run_at_ms: None,
            user: None,
            max_running: None,
            max_attempts: None,
            priority: None,
            queue: None,
            gzip: false,
        };
        Self { host, request, data: Ok(()) }
    }

    /// Its data, which has to serialise to a JSON object. Without this: `{}`.
    pub fn data(mut self, data: &impl Serialize) -> Self {
        match serde_json::to_vec(data).or_reject("invalid-data") {
            Ok(data) => self.request.data = data,
            Err(error) => self.data = Err(error),
        }
        self
    }

    /// Not before this moment, by the database's clock.
    pub fn run_at(mut self, moment: SystemTime) -> Self {
        self.request.run_at_ms = Some(milliseconds(moment.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO)));
        self
    }

    /// The user on whose account it runs. At most 255 bytes. Without this: the task's own, unless the route grants any user; then none.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.request.user = Some(user.into());
        self
    }

    /// The most tasks of its user that run at once, as this task sees it. Without this: as for the task itself, unless the route grants any
    /// user; then no limit.
    pub fn max_running(mut self, most: u32) -> Self {
        self.request.max_running = Some(most);
        self
    }

    /// The most attempts before it ends as failed.
    pub fn max_attempts(mut self, most: u32) -> Self {
        self.request.max_attempts = Some(most);
        self
    }

    /// From -100 to 100: of a user's tasks, and of those without user, the smaller runs first. Without this: 0.
    pub fn priority(mut self, priority: i32) -> Self {
        self.request.priority = Some(priority);
        self
    }

    /// The queue in which it waits. Without this: the task's own. The route's grants say which others there may be.
    pub fn queue(mut self, queue: impl Into<String>) -> Self {
        self.request.queue = Some(queue.into());
        self
    }

    /// Store its data compressed.
    pub fn gzip(mut self) -> Self {
        self.request.gzip = true;
        self
    }

    /// Hands it in.
    ///
    /// # Errors
    /// Codes `invalid-key`, `invalid-data`, `too-large` and `too-many`, rejecting: with `?` the task ends as failed. So do `not-granted` (its
    /// type, key, user or queue: the route's grants say which, by default those of the plugin itself) and `too-deep` (too many generations of
    /// follow-ups that do not wait a minute). `too-many-waiting` (so many that come from the same task have not ended) may pass: with `?` the
    /// task is tried again.
    pub fn send(self) -> Result<()> {
        self.data?;
        self.host.submit(self.request)
    }
}
