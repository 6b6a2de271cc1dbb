//! What the log says about tasks: enough to find any task, never more lines than somebody can read.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use laelaps_queue::{ClaimedTask, Event, FailureKind, Quarantine, QueuedType, Reclaimed};

use crate::plugin::{Captured, Level, Version};

/// One line about the same version under quarantine in this time.
const QUARANTINED_INTERVAL: Duration = Duration::from_secs(60);
/// Versions remembered for that; beyond it the memory starts anew.
const QUARANTINED_MAX: usize = 1_000;

/// Tasks of this type were left to other workers of PerfectQueue's table, since the plugin of its route is not there.
pub(crate) fn left_to_others(task_type: &str, reason: &str) {
    tracing::warn!(task_type, reason, "tasks of this type wait for a plugin; they are left to other workers until it is loaded");
}

/// Tasks wait of a type that no live host serves; why this host does not.
pub(crate) fn served_by_nobody(queued: &QueuedType, reason: &str) {
    let QueuedType { queue, task_type, tasks } = queued;
    tracing::warn!(
        task_type,
        queue,
        tasks,
        reason,
        "no live host serves this type; its tasks wait for a plugin and begin as soon as a host has it"
    );
}

static QUARANTINED: LazyLock<Mutex<HashMap<String, Instant>>> = LazyLock::new(Mutex::default);

/// A task's plugin version is under quarantine. Said once a minute for each version; returns it in words.
pub(crate) fn quarantined(quarantine: &Quarantine) -> String {
    let Quarantine { version, deaths, .. } = quarantine;
    let message = format!(
        "version {} of plugin {:?} is under quarantine: {deaths} hosts died while it alone ran on them; `laelaps plugin release {}` lets it \
         run again",
        version.digest, version.name, version.digest
    );
    if is_worth_saying(&QUARANTINED, &version.digest) {
        tracing::error!(
            plugin = version.name,
            version = version.digest,
            deaths,
            hint = format!("laelaps plugin release {}", version.digest),
            "a plugin version is under quarantine: hosts died while it alone ran on them; its tasks wait until it is released or replaced"
        );
    }
    message
}

/// Whether it is long since this was said last, which it is about to be.
fn is_worth_saying(said: &Mutex<HashMap<String, Instant>>, what: &str) -> bool {
    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    if said.get(what).is_some_and(|last| now.duration_since(*last) < QUARANTINED_INTERVAL) {
        return false;
    }
    if said.len() >= QUARANTINED_MAX {
        said.clear();
    }
    said.insert(what.to_owned(), now);
    true
}

/// What was taken back from hosts and leases that are gone.
pub(crate) fn reclaimed(reclaimed: &Reclaimed) {
    for host in &reclaimed.dead_hosts {
        let (id, name, process_id) = (host.id.0, &host.name, host.process_id);
        tracing::warn!(host = id, name, process_id, "a host is dead; taking back its tasks");
    }
    for task in &reclaimed.tasks {
        tracing::warn!(task = task.key, host = task.host.0, failed = task.failed, "a task was lost with its host or lease");
    }
}

/// The level below which the log keeps nothing of what handlers write.
pub(crate) fn guest_level() -> Level {
    if tracing::enabled!(target: "guest", tracing::Level::TRACE) {
        Level::Trace
    } else if tracing::enabled!(target: "guest", tracing::Level::DEBUG) {
        Level::Debug
    } else if tracing::enabled!(target: "guest", tracing::Level::INFO) {
        Level::Info
    } else if tracing::enabled!(target: "guest", tracing::Level::WARN) {
        Level::Warn
    } else {
        Level::Error
    }
}

/// What a handler wrote to its log, standard output and standard error.
pub(crate) fn captured(task: &ClaimedTask, version: &Version, captured: &Captured) {
    let (key, plugin) = (task.key.as_str(), version.plugin());
    for line in &captured.lines {
        match line.level {
            Level::Trace => tracing::trace!(target: "guest", task = key, plugin, "{}", line.text),
            Level::Debug => tracing::debug!(target: "guest", task = key, plugin, "{}", line.text),
            Level::Info => tracing::info!(target: "guest", task = key, plugin, "{}", line.text),
            Level::Warn => tracing::warn!(target: "guest", task = key, plugin, "{}", line.text),
            Level::Error => tracing::error!(target: "guest", task = key, plugin, "{}", line.text),
        }
    }
    let (lines, bytes) = (captured.dropped_lines, captured.dropped_bytes);
    // Blank lines are dropped without a byte, and long ones cut without a line.
    if lines > 0 || bytes > 0 {
        tracing::warn!(target: "guest", task = key, plugin, lines, bytes, "the handler wrote more than its log limit; the rest was dropped");
    }
}

/// How an attempt ended.
pub(crate) fn ended(task: &ClaimedTask, version: &Version, event: &Event) {
    let (key, task_type, plugin, attempt) = (task.key.as_str(), task.task_type.as_str(), version.plugin(), task.attempt);
    let event_name = event.name();
    match event {
        Event::Finish { .. } | Event::Retry { .. } | Event::Release { .. } | Event::Stopped | Event::Lost | Event::Overdue => {
            tracing::debug!(task = key, task_type, plugin, digest = %version.digest().short(), attempt, event = event_name, "attempt ended");
        }
        Event::Failure { kind, code, message } => {
            let rejected = *kind == FailureKind::Reject;
            tracing::warn!(task = key, task_type, plugin, digest = %version.digest().short(), attempt, code, rejected, "attempt failed: {message}");
        }
        Event::Trap { .. }
        | Event::TimedOut { .. }
        | Event::OutOfMemory { .. }
        | Event::Malformed { .. }
        | Event::Unrouted { .. }
        | Event::Quarantined { .. } => {
            let message = event.error().map(|(_, message)| message).unwrap_or_default();
            tracing::warn!(task = key, task_type, plugin, digest = %version.digest().short(), attempt, event = event_name, "attempt failed: {message}");
        }
    }
}
