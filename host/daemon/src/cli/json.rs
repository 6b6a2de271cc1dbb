//! Tasks as the command line writes them for programs. The members are part of the command line's contract: docs/cli.md lists them.

use laelaps_queue::{AttemptRecord, Progress, Task};
use serde::Serialize;
use serde_json::value::RawValue;

use super::output::exact_moment;

/// A task. Members that do not apply are null.
#[derive(Debug, Serialize)]
pub(super) struct TaskJson<'a> {
    id: i64,
    key: &'a str,
    #[serde(rename = "type")]
    task_type: &'a str,
    state: &'static str,
    queue: &'a str,
    user: Option<&'a str>,
    priority: i32,
    max_running: Option<u32>,
    attempts: u32,
    max_attempts: Option<u32>,
    lost: u32,
    created_at: String,
    run_at: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    held: bool,
    until: Option<String>,
    host: Option<i64>,
    progress: Option<&'a Progress>,
    finished_at: Option<String>,
    retained_until: Option<String>,
    plugin_digest: Option<&'a str>,
    error_code: Option<&'a str>,
    error_message: Option<&'a str>,
    /// What of its row cannot be read.
    unreadable: Option<&'a str>,
    /// The producer's bytes, untouched. They are a JSON object in one line or several.
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Box<RawValue>>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    output: Option<OutputJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    history: Option<Vec<AttemptJson<'a>>>,
}

/// What a handler returned.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum OutputJson {
    Text { output: String },
    Bytes { output_hex: String },
}

/// A past attempt.
#[derive(Debug, Serialize)]
struct AttemptJson<'a> {
    attempt: u32,
    host: &'a str,
    plugin_digest: Option<&'a str>,
    ended_at: String,
    event: &'a str,
    error_code: Option<&'a str>,
    error_message: Option<&'a str>,
}

impl<'a> TaskJson<'a> {
    pub(super) fn new(task: &'a Task) -> Self {
        Self {
            id: task.id.0,
            key: &task.key,
            task_type: &task.task_type,
            state: task.state.as_str(),
            queue: &task.queue,
            user: task.user.as_deref(),
            priority: task.priority,
            max_running: task.max_running,
            attempts: task.attempts,
            max_attempts: task.max_attempts,
            lost: task.lost,
            created_at: exact_moment(task.created_at),
            run_at: (!task.is_held()).then(|| exact_moment(task.run_at)),
            held: task.is_held(),
            until: task.until.map(exact_moment),
            host: task.host.map(|host| host.0),
            progress: task.progress.as_ref(),
            finished_at: task.finished_at.map(exact_moment),
            retained_until: task.retained_until.map(exact_moment),
            plugin_digest: task.plugin_digest.as_deref(),
            error_code: task.error_code.as_deref(),
            error_message: task.error_message.as_deref(),
            unreadable: task.unreadable.as_deref(),
            data: task.data.as_deref().and_then(raw),
            output: task.output.as_deref().map(OutputJson::new),
            history: None,
        }
    }

    /// With its past attempts.
    pub(super) fn with_history(mut self, attempts: &'a [AttemptRecord]) -> Self {
        let history = attempts.iter().map(|attempt| AttemptJson {
            attempt: attempt.attempt,
            host: &attempt.host,
            plugin_digest: attempt.plugin_digest.as_deref(),
            ended_at: exact_moment(attempt.ended_at),
            event: &attempt.event,
            error_code: attempt.error_code.as_deref(),
            error_message: attempt.error_message.as_deref(),
        });
        self.history = Some(history.collect());
        self
    }
}

impl OutputJson {
    fn new(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::Text { output: text.to_owned() },
            Err(_) => Self::Bytes { output_hex: bytes.iter().map(|byte| format!("{byte:02x}")).collect() },
        }
    }
}

/// The bytes as JSON in one line; None if they are not JSON, which a queue does not accept.
fn raw(bytes: &[u8]) -> Option<Box<RawValue>> {
    let text = std::str::from_utf8(bytes).ok()?;
    // A line end within JSON can only stand between its tokens, so a blank says the same, and JSON Lines stay lines.
    RawValue::from_string(text.replace(['\n', '\r'], " ")).ok()
}
