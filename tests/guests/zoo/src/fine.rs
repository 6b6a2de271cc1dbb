//! Handlers that keep to the contract.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::bindings::laelaps::worker::context::{self, Cancellation, Compression, Progress, Submission, SubmitOptions};
use crate::bindings::laelaps::worker::log;
use crate::bindings::laelaps::worker::types::{Failure, FailureKind, Finished, Outcome, Task};
use crate::{Answer, EDITION, finish, parameter, reject};

/// Calls that this instance has answered, this one included.
static CALLS: AtomicU32 = AtomicU32::new(0);

pub(crate) fn visit(task: &Task, data: &Value) -> Option<Answer> {
    let calls = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
    Some(match task.kind.as_str() {
        "echo" => Ok(Outcome::Finish(Finished { output: Some(task.data.clone()), retention: None })),
        "silent" => Ok(Outcome::Finish(Finished { output: None, retention: None })),
        "finish" => finish_as_told(data),
        "retry" => parameter(data, "delay_ms").map(Outcome::Retry),
        "release" => parameter(data, "delay_ms").map(Outcome::Release),
        "fail" => Err(failure(data)),
        "flaky" => flaky(task, data),
        "edition" => finish(&json!({ "edition": EDITION })),
        "calls" => finish(&json!({ "calls": calls })),
        "describe" => describe(task, data),
        "clocks" => clocks(),
        "random" => random(),
        "log" => log_lines(data),
        "heartbeat" => heartbeat(data),
        "wait-cancelled" => wait_until_cancelled(data),
        "update" => update(data).and_then(|()| finish(data)),
        "update-large" => update_large(data),
        "update-then-panic" => update(data).map(|()| panic!("on purpose, after update-data")),
        "submit" => submit(task, data),
        "compute" => compute(data),
        _ => return None,
    })
}

fn finish_as_told(data: &Value) -> Answer {
    let output = data.get("output").map(|output| output.to_string().into_bytes());
    Ok(Outcome::Finish(Finished { output, retention: parameter(data, "retention_ms")? }))
}

fn failure(data: &Value) -> Failure {
    let text = |name: &str, default: &str| data.get(name).and_then(Value::as_str).unwrap_or(default).to_owned();
    let kind = if data["kind"] == "reject" { FailureKind::Reject } else { FailureKind::Retry };
    Failure { kind, code: text("code", "on-purpose"), message: text("message", "the task asked for this failure") }
}

/// Fails in every attempt before `until`, then finishes.
fn flaky(task: &Task, data: &Value) -> Answer {
    let until: u32 = parameter(data, "until")?.unwrap_or(2);
    if task.attempt < until { Err(failure(data)) } else { finish(&json!({ "attempt": task.attempt })) }
}

/// Everything the host tells about the attempt.
fn describe(task: &Task, data: &Value) -> Answer {
    let settings: Map<String, Value> = context::settings().into_iter().map(|(name, value)| (name, Value::from(value))).collect();
    let asked: Option<String> = parameter(data, "setting")?;
    finish(&json!({
        "key": task.key, "kind": task.kind, "data": data, "user": task.user, "attempt": task.attempt,
        "created_at": context::created_at(), "deadline": context::deadline(), "max_attempts": context::max_attempts(),
        "queue": context::queue(),
        "settings": settings, "setting": asked.and_then(|name| context::setting(&name)), "edition": EDITION,
    }))
}

#[allow(clippy::disallowed_methods, reason = "the guest's own wall clock is what the test asks about")]
fn clocks() -> Answer {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1) {}
    finish(&json!({ "wall_ms": u64::try_from(wall).unwrap_or(u64::MAX), "monotonic_moves": true }))
}

/// Two hash seeds: random numbers of the host that must not repeat.
fn random() -> Answer {
    use std::hash::{BuildHasher, RandomState};
    finish(&json!({ "first": RandomState::new().hash_one(1).to_string(), "second": RandomState::new().hash_one(2).to_string() }))
}

/// One line to every place that a host captures.
fn log_lines(data: &Value) -> Answer {
    let text: String = parameter(data, "text")?.unwrap_or_else(|| "hello".to_owned());
    let levels = [
        (log::Level::Trace, "trace"),
        (log::Level::Debug, "debug"),
        (log::Level::Info, "info"),
        (log::Level::Warn, "warn"),
        (log::Level::Error, "error"),
    ];
    let mut enabled = Vec::new();
    for (level, name) in levels {
        log::log(level, &format!("{name} {text}"));
        if log::enabled(level) {
            enabled.push(name);
        }
    }
    println!("stdout {text}");
    eprintln!("stderr {text}");
    finish(&json!({ "enabled": enabled }))
}

/// `count` heartbeats with progress, `interval_ms` apart; says how many found the lease in force.
fn heartbeat(data: &Value) -> Answer {
    let count: u64 = parameter(data, "count")?.unwrap_or(3);
    let interval_ms: u64 = parameter(data, "interval_ms")?.unwrap_or(0);
    let alive_time: Option<u64> = parameter(data, "alive_time_ms")?;
    let mut held = 0;
    for done in 1..=count {
        let progress = Progress { done, total: Some(count), note: format!("step {done}") };
        held += u64::from(context::heartbeat(Some(&progress), alive_time));
        if interval_ms > 0 {
            sleep(interval_ms);
        }
    }
    finish(&json!({ "held": held }))
}

/// Waits in small naps until it is asked to end, then does what `then` says: `release` (default), `finish` or `retry`.
fn wait_until_cancelled(data: &Value) -> Answer {
    let deaf = data["deaf"] == true;
    let begun = Instant::now();
    let reason = loop {
        match context::is_cancelled() {
            Some(reason) if !deaf => break reason,
            None if begun.elapsed() > PATIENCE => {
                return Err(reject("never-cancelled", &format!("nobody cancelled this attempt within {PATIENCE:?}")));
            }
            _ => sleep(5),
        }
    };
    let reason = match reason {
        Cancellation::Graceful => "graceful",
        Cancellation::Immediate => "immediate",
        Cancellation::LeaseLost => "lease-lost",
    };
    match data["then"].as_str() {
        Some("finish") => finish(&json!({ "cancelled": reason })),
        Some("retry") => Ok(Outcome::Retry(None)),
        _ => Ok(Outcome::Release(None)),
    }
}

/// Merges `members` into the task's data, or the text of `raw` as it is.
fn update(data: &Value) -> Result<(), Failure> {
    let raw: Option<String> = parameter(data, "raw")?;
    let members = raw.unwrap_or_else(|| data["members"].to_string());
    context::update_data(members.as_bytes()).map_err(|refusal| reject(&refusal.code, &refusal.message))
}

/// Merges `bytes` of small members into the task's data, `times` times, with other values each time.
fn update_large(data: &Value) -> Answer {
    let bytes: usize = parameter(data, "bytes")?.unwrap_or(15_000_000);
    let times: u32 = parameter(data, "times")?.unwrap_or(3);
    for time in 0..times {
        let mut members = String::with_capacity(bytes + 32);
        for number in 0.. {
            let separator = if number == 0 { '{' } else { ',' };
            members.push_str(&format!("{separator}\"{number:x}\":{time}"));
            if members.len() >= bytes {
                break;
            }
        }
        members.push('}');
        context::update_data(members.as_bytes()).map_err(|refusal| reject(&refusal.code, &refusal.message))?;
    }
    finish(&json!({ "updated": times }))
}

/// Submits `count` follow-up tasks, with nothing but their `priority` and `queue` if there is one of them, then does what `then` says: finish (default), retry, release, fail, panic.
fn submit(task: &Task, data: &Value) -> Answer {
    let count: u32 = parameter(data, "count")?.unwrap_or(1);
    let key: Option<String> = parameter(data, "key")?;
    let kind: String = parameter(data, "kind")?.unwrap_or_else(|| "silent".to_owned());
    let raw: Option<String> = parameter(data, "raw")?;
    let body = raw.unwrap_or_else(|| data.get("data").cloned().unwrap_or_else(|| json!({})).to_string());
    let options = SubmitOptions {
        run_at: parameter(data, "run_at_ms")?,
        user: parameter(data, "user")?,
        max_running: parameter(data, "max_running")?,
        max_attempts: parameter(data, "max_attempts")?,
        compression: if data["gzip"] == true { Compression::Gzip } else { Compression::None },
    };
    let priority: Option<i32> = parameter(data, "priority")?;
    let queue: Option<String> = parameter(data, "queue")?;
    let submit = |key: &str| {
        if priority.is_none() && queue.is_none() {
            return context::submit(key, &kind, body.as_bytes(), &options);
        }
        let submission = Submission::new(key, &kind);
        if let Some(priority) = priority {
            submission.priority(priority);
        }
        if let Some(queue) = &queue {
            submission.queue(queue);
        }
        submission.submit(body.as_bytes())
    };
    let mut refusals = Vec::new();
    for number in 0..count {
        let key = key.clone().unwrap_or_else(|| format!("{}-follow-up-{number}", task.key));
        if let Err(refusal) = submit(&key) {
            refusals.push(json!({ "number": number, "code": refusal.code, "message": refusal.message }));
        }
    }
    match data["then"].as_str() {
        // A follow-up was refused and the handler minds: its task fails.
        Some("strict") if !refusals.is_empty() => Err(reject("follow-up-refused", &refusals[0].to_string())),
        Some("retry") if task.attempt == 1 => Ok(Outcome::Retry(Some(0))),
        Some("release") if data["released"] != true => {
            update(&json!({ "members": { "released": true } }))?;
            Ok(Outcome::Release(None))
        }
        Some("fail") => Err(failure(data)),
        Some("panic") => panic!("on purpose, after submit"),
        Some("spin") => crate::nasty::spin(),
        _ => finish(&json!({ "submitted": usize::try_from(count).unwrap_or(0) - refusals.len(), "refusals": refusals })),
    }
}

/// Computes for `ms` milliseconds.
fn compute(data: &Value) -> Answer {
    let time = Duration::from_millis(parameter(data, "ms")?.unwrap_or(10));
    let begun = Instant::now();
    let mut rounds = 0u64;
    while begun.elapsed() < time {
        rounds = std::hint::black_box(rounds + 1);
    }
    finish(&json!({ "rounds": rounds }))
}

/// How long a task waits for what its test does: longer than any test takes, since the test has a patience of its own.
pub(crate) const PATIENCE: Duration = Duration::from_secs(7_200);

pub(crate) fn sleep(ms: u64) {
    if ms > 0 {
        std::thread::sleep(Duration::from_millis(ms));
    }
}
