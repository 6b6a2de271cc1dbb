//! One instance of a component, seen from its host: what it holds, and what it may ask for.
//!
//! Everything here runs on a guest's thread. What needs the database is handed to the host's own runtime and waited for there, so that a
//! guest's thread never drives the host's connections, and a call that is dropped (the guest was stopped) is either wholly done or not.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use laelaps_queue::{NewTask, Progress, Timestamp};
use tokio::runtime::Handle;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use super::abi::latest::laelaps::worker::{context, log, types};
use super::capture::{Capture, Level};
use super::follow_ups::{FollowUps, Parent, Refused};
use super::grants::{Files, FilesView};
use super::limiter::MemoryLimiter;
use super::submission::{compression, moment};
use super::{Cancellation, Control, Limits, Services};

/// The longest time for which a handler may hold its lease with one heartbeat.
const ALIVE_TIME_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest note of a progress.
const NOTE_BYTES_MAX: usize = 1_024;

/// The host's side of one instance.
pub(super) struct Guest {
    pub(super) wasi: WasiCtx,
    pub(super) files: Files,
    pub(super) table: ResourceTable,
    pub(super) memory: MemoryLimiter,
    pub(super) capture: Capture,
    /// The attempt that it serves now.
    pub(super) attempt: Attempt,
}

/// What belongs to one attempt. An instance that serves several gets a new one for each.
pub(super) struct Attempt {
    pub(super) control: Arc<Control>,
    pub(super) services: Arc<dyn Services>,
    /// The runtime that asked for the attempt.
    pub(super) host: Handle,
    pub(super) limits: Limits,
    pub(super) settings: Arc<[(String, String)]>,
    pub(super) log_level: Level,
    pub(super) created_at: Timestamp,
    pub(super) max_attempts: Option<u32>,
    pub(super) queue: String,
    pub(super) stops_at: Option<Instant>,
    /// `stops_at` by the database's clock, once it was asked for: the same answer every time.
    pub(super) deadline: Option<Timestamp>,
    /// At most so large is the task's data as it is stored now.
    pub(super) data_bytes: usize,
    /// The facts that decide about follow-ups; None while a component is only started, when there is no task.
    pub(super) parent: Option<Parent>,
    pub(super) follow_up_grant: FollowUps,
    /// Follow-ups of the same root that have not ended, once that was asked for; `Some(None)`: the queue does not keep it.
    pub(super) relatives: Option<Option<u32>>,
    pub(super) follow_ups: Vec<NewTask>,
    pub(super) follow_up_bytes: u64,
}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl Guest {
    pub(super) fn files(&mut self) -> FilesView<'_> {
        FilesView { files: &self.files, table: &mut self.table }
    }
}

impl Attempt {
    pub(super) fn is_lease_lost(&self) -> bool {
        self.control.state() == Some(Cancellation::LeaseLost)
    }

    /// Ask the host something on its own runtime.
    pub(super) async fn ask<F, T>(&self, ask: impl FnOnce(Arc<dyn Services>) -> F) -> wasmtime::Result<T>
    where
        F: Future<Output = T> + Send + 'static,
        T: Send + 'static,
    {
        let answer = self.host.spawn(ask(self.services.clone())).await;
        answer.map_err(|_| wasmtime::Error::msg("the host failed inside a call of the handler's, or was ending"))
    }

    /// The follow-up as it is to be stored, or why it is refused. Nothing is asked of the database.
    pub(super) fn check_follow_up(&self, task: NewTask) -> Result<NewTask, context::Refusal> {
        refused(&task, self.services.check(&task))?;
        let Some(parent) = &self.parent else { return Err(lease_lost()) };
        let task = self.follow_up_grant.grant(parent, task, |task_type| self.services.leads_here(task_type))?;
        if self.follow_ups.len() as u64 >= u64::from(self.limits.follow_ups) {
            let message =
                format!("this attempt has submitted {} tasks already, as many as its route allows", self.limits.follow_ups);
            return Err(refusal("too-many", message));
        }
        let bytes = self.follow_up_bytes + task.data.len() as u64;
        if bytes > self.limits.follow_up_bytes {
            let message = format!(
                "the follow-up tasks of this attempt would carry {bytes} bytes of data, more than the {} its route allows",
                self.limits.follow_up_bytes
            );
            return Err(refusal("too-large", message));
        }
        Ok(task)
    }

    /// Whether there is room for one more follow-up beside those that wait. The database is asked once for an attempt.
    pub(super) async fn check_waiting(&mut self) -> wasmtime::Result<Result<(), context::Refusal>> {
        let relatives = match self.relatives {
            Some(relatives) => relatives,
            None => {
                let limit = self.follow_up_grant.waiting;
                match self.ask(|services| async move { services.relatives(limit).await }).await? {
                    Ok(relatives) => *self.relatives.insert(relatives),
                    // The database's own words are for the operator, not for the handler.
                    Err(error) => return Ok(Err(refusal("unavailable", error.to_string()))),
                }
            }
        };
        let Some(relatives) = relatives else { return Ok(Ok(())) };
        let has_room = self.services.count_follow_up(self.follow_up_grant.room(relatives));
        Ok(if has_room { Ok(()) } else { Err(self.follow_up_grant.too_many_waiting().into()) })
    }
}

impl From<Refused> for context::Refusal {
    fn from(refused: Refused) -> Self {
        refusal(refused.code, refused.message)
    }
}

impl context::Host for Guest {
    async fn heartbeat(&mut self, progress: Option<context::Progress>, alive_time: Option<u64>) -> wasmtime::Result<bool> {
        if self.attempt.is_lease_lost() {
            return Ok(false);
        }
        let progress = progress.map(|progress| Progress {
            done: progress.done,
            total: progress.total,
            note: cut(progress.note, NOTE_BYTES_MAX),
        });
        let alive_time = alive_time.map(|time| Duration::from_millis(time).min(ALIVE_TIME_MAX));
        let known = if alive_time.is_none() { self.attempt.services.note_progress(progress.clone()) } else { None };
        let held = match known {
            Some(held) => held,
            None => self.attempt.ask(|services| async move { services.heartbeat(progress, alive_time).await }).await?,
        };
        if !held {
            self.attempt.control.cancel(Cancellation::LeaseLost);
        }
        Ok(held)
    }

    fn is_cancelled(&mut self) -> wasmtime::Result<Option<context::Cancellation>> {
        Ok(self.attempt.control.state().map(|cancellation| match cancellation {
            Cancellation::Graceful => context::Cancellation::Graceful,
            Cancellation::Immediate => context::Cancellation::Immediate,
            Cancellation::LeaseLost => context::Cancellation::LeaseLost,
        }))
    }

    async fn update_data(&mut self, members: Vec<u8>) -> wasmtime::Result<Result<(), context::Refusal>> {
        // Only what the contract's generated code asks for: guests are linked to `update::add_to_linker`.
        self.update(members, super::update::Share::default()).await
    }

    async fn submit(
        &mut self,
        key: String,
        kind: String,
        data: Vec<u8>,
        options: context::SubmitOptions,
    ) -> wasmtime::Result<Result<(), context::Refusal>> {
        self.take_follow_up(NewTask {
            run_at: options.run_at.map(moment),
            user: options.user,
            max_running: options.max_running,
            max_attempts: options.max_attempts,
            compression: compression(options.compression),
            ..NewTask::new(key, kind, data)
        })
        .await
    }

    async fn deadline(&mut self) -> wasmtime::Result<Option<u64>> {
        let Some(stops_at) = self.attempt.stops_at else { return Ok(None) };
        if self.attempt.deadline.is_none() {
            let now = self.attempt.ask(|services| async move { services.now().await }).await?;
            self.attempt.deadline = Some(now.plus(stops_at.saturating_duration_since(Instant::now())));
        }
        Ok(self.attempt.deadline.map(unix_ms))
    }

    fn created_at(&mut self) -> wasmtime::Result<u64> {
        Ok(unix_ms(self.attempt.created_at))
    }

    fn max_attempts(&mut self) -> wasmtime::Result<Option<u32>> {
        Ok(self.attempt.max_attempts)
    }

    fn queue(&mut self) -> wasmtime::Result<String> {
        Ok(self.attempt.queue.clone())
    }

    fn setting(&mut self, name: String) -> wasmtime::Result<Option<String>> {
        Ok(self.attempt.settings.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone()))
    }

    fn settings(&mut self) -> wasmtime::Result<Vec<(String, String)>> {
        Ok(self.attempt.settings.to_vec())
    }
}

impl log::Host for Guest {
    fn log(&mut self, level: log::Level, message: String) -> wasmtime::Result<()> {
        let level = self::level(level);
        if level >= self.attempt.log_level {
            self.capture.log(level, message);
        }
        Ok(())
    }

    fn enabled(&mut self, level: log::Level) -> wasmtime::Result<bool> {
        Ok(self::level(level) >= self.attempt.log_level)
    }
}

impl types::Host for Guest {}

fn level(level: log::Level) -> Level {
    match level {
        log::Level::Trace => Level::Trace,
        log::Level::Debug => Level::Debug,
        log::Level::Info => Level::Info,
        log::Level::Warn => Level::Warn,
        log::Level::Error => Level::Error,
    }
}

fn unix_ms(moment: Timestamp) -> u64 {
    u64::try_from(moment.0).unwrap_or(0)
}

/// At most `bytes_max` bytes of a text, cut at a character.
pub(super) fn cut(mut text: String, bytes_max: usize) -> String {
    text.truncate(text.floor_char_boundary(bytes_max));
    text
}

pub(super) fn refusal(code: &str, message: impl Into<String>) -> context::Refusal {
    context::Refusal { code: code.into(), message: message.into() }
}

pub(super) fn lease_lost() -> context::Refusal {
    refusal("lease-lost", "the task is no longer this attempt's")
}

/// What the queue says of a task, so that what is taken here is never refused when the attempt is settled.
fn refused(task: &NewTask, checked: Result<(), laelaps_queue::Error>) -> Result<(), context::Refusal> {
    let problem = match checked {
        Ok(()) => return Ok(()),
        Err(laelaps_queue::Error::InvalidTask { problem, .. }) => problem,
        Err(error) => error.to_string(),
    };
    let is_key_bad = || NewTask::new(task.key.as_str(), "type", "").check().is_err();
    let code = if task.data.len() > NewTask::DATA_BYTES_MAX {
        "too-large"
    } else if is_key_bad() {
        "invalid-key"
    } else {
        "invalid-data"
    };
    Err(refusal(code, problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_at_a_character() {
        assert_eq!(cut("\u{20ac}\u{20ac}".into(), 4), "\u{20ac}");
        assert_eq!(cut("short".into(), 100), "short");
    }

    #[test]
    fn a_follow_up_is_refused_by_what_is_wrong_with_it() {
        let code = |task: NewTask| refused(&task, task.check()).expect_err("refused").code;
        let good = NewTask::new("k", "t", "{}");
        assert!(refused(&good, good.check()).is_ok());
        assert_eq!(code(NewTask { key: String::new(), ..good.clone() }), "invalid-key");
        assert_eq!(code(NewTask { key: "x".repeat(256), ..good.clone() }), "invalid-key");
        assert_eq!(code(NewTask { key: "a\nb".into(), ..good.clone() }), "invalid-key");
        assert_eq!(code(NewTask { task_type: String::new(), ..good.clone() }), "invalid-data");
        assert_eq!(code(NewTask { max_attempts: Some(0), ..good.clone() }), "invalid-data");
        assert_eq!(code(NewTask { queue: Some("two words".into()), ..good.clone() }), "invalid-data");
        assert_eq!(code(NewTask { run_at: Some(Timestamp(i64::MAX)), ..good.clone() }), "invalid-data");
        assert_eq!(code(NewTask { user: Some("x".repeat(256)), ..good }), "invalid-data");
    }
}
