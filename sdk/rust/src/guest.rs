//! The component's side of the contract: imports become a [`Host`], the export becomes a call of the handler.

use std::time::Duration;

pub use bindings::export_plugin;
pub use bindings::exports::laelaps::worker::handler::Guest as Exports;
use bindings::laelaps::worker::{context as imports, log as imports_log, types};

use crate::host::{Host, SubmitRequest, milliseconds};
use crate::log::Level;
use crate::{Cancellation, Context, Error, FailureKind, Outcome, Progress, Result, Task};

/// Generated from wit/.
pub mod bindings {
    #![allow(missing_docs, unsafe_code, unreachable_pub, clippy::all, reason = "generated from the contract")]
    wit_bindgen::generate!({
        path: "../../wit",
        world: "plugin",
        pub_export_macro: true,
        export_macro_name: "export_plugin",
        default_bindings_module: "laelaps_plugin::__private::bindings",
    });
}

/// Runs the handler on a task of the host.
///
/// # Errors
/// The handler's, in the contract's words.
pub fn serve(
    task: types::Task,
    handler: impl FnOnce(&Context) -> Result<Outcome>,
) -> std::result::Result<types::Outcome, types::Failure> {
    let types::Task { key, kind, data, user, attempt } = task;
    let context = Context::new(Task { key, kind, data, user, attempt }, Box::new(Imports));
    handler(&context).map(outcome).map_err(failure)
}

struct Imports;

impl Host for Imports {
    fn heartbeat(&self, progress: Option<&Progress>, alive_time: Option<Duration>) -> bool {
        let progress = progress.map(|progress| imports::Progress {
            done: progress.done,
            total: progress.total,
            note: progress.note.clone(),
        });
        imports::heartbeat(progress.as_ref(), alive_time.map(milliseconds))
    }

    fn cancellation(&self) -> Option<Cancellation> {
        imports::is_cancelled().map(|reason| match reason {
            imports::Cancellation::Graceful => Cancellation::Graceful,
            imports::Cancellation::Immediate => Cancellation::Immediate,
            imports::Cancellation::LeaseLost => Cancellation::LeaseLost,
        })
    }

    fn update_data(&self, members: &[u8]) -> Result<()> {
        imports::update_data(members).map_err(refused)
    }

    fn submit(&self, request: SubmitRequest) -> Result<()> {
        let submission = imports::Submission::new(&request.key, &request.kind);
        if let Some(moment) = request.run_at_ms {
            submission.run_at(moment);
        }
        if let Some(user) = &request.user {
            submission.user(user);
        }
        if let Some(most) = request.max_running {
            submission.max_running(most);
        }
        if let Some(most) = request.max_attempts {
            submission.max_attempts(most);
        }
        if let Some(priority) = request.priority {
            submission.priority(priority);
        }
        if let Some(queue) = &request.queue {
            submission.queue(queue);
        }
        if request.gzip {
            submission.compression(imports::Compression::Gzip);
        }
        submission.submit(&request.data).map_err(refused)
    }

    fn deadline_ms(&self) -> Option<u64> {
        imports::deadline()
    }

    fn created_at_ms(&self) -> u64 {
        imports::created_at()
    }

    fn max_attempts(&self) -> Option<u32> {
        imports::max_attempts()
    }

    fn queue(&self) -> String {
        imports::queue()
    }

    fn setting(&self, name: &str) -> Option<String> {
        imports::setting(name)
    }

    fn settings(&self) -> Vec<(String, String)> {
        imports::settings()
    }
}

pub(crate) fn log_enabled(level: Level) -> bool {
    imports_log::enabled(log_level(level))
}

pub(crate) fn log_line(level: Level, message: &str) {
    imports_log::log(log_level(level), message);
}

fn log_level(level: Level) -> imports_log::Level {
    match level {
        Level::Trace => imports_log::Level::Trace,
        Level::Debug => imports_log::Level::Debug,
        Level::Info => imports_log::Level::Info,
        Level::Warn => imports_log::Level::Warn,
        Level::Error => imports_log::Level::Error,
    }
}

fn refused(refusal: imports::Refusal) -> Error {
    Error::refused(refusal.code, refusal.message)
}

fn outcome(outcome: Outcome) -> types::Outcome {
    match outcome {
        Outcome::Finish { output, retention } => {
            types::Outcome::Finish(types::Finished { output, retention: retention.map(milliseconds) })
        }
        Outcome::Retry(delay) => types::Outcome::Retry(delay.map(milliseconds)),
        Outcome::Release(delay) => types::Outcome::Release(delay.map(milliseconds)),
    }
}

fn failure(error: Error) -> types::Failure {
    let kind = match error.kind() {
        FailureKind::Retry => types::FailureKind::Retry,
        FailureKind::Reject => types::FailureKind::Reject,
    };
    types::Failure { kind, code: error.code().to_owned(), message: error.message().to_owned() }
}
