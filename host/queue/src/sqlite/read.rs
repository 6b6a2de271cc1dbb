//! What readers see: one task, its attempts, counts. None of it takes the writer's lock.

use sqlx::Row as _;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::failure;
use super::pieces::{data_bytes, whole_data};
use super::rows::{Columns, lossy};
use crate::task::queue_name;
use crate::{AttemptRecord, HostId, Lease, NewTask, Progress, QueuedType, State, Stats, Task, TaskId, Timestamp, data};

/// The most tasks of a page.
pub(super) const PAGE_MAX: u32 = 10_000;

macro_rules! task_columns {
    () => {
        "task.id, task.key, task.type, task.state, task.user, task.max_running, task.attempts, task.max_attempts, task.lost,
        task.created_at, task.run_at, task.until, task.host, task.finished_at, task.retained_until,
        (SELECT digest FROM plugin_version WHERE plugin_version.id = task.plugin) AS digest, failure.code, failure.message,
        progress.done, progress.total, progress.note, task.releases, task.lost_alone, task.depth, task.priority, task.queue"
    };
}
pub(super) use task_columns;

macro_rules! beside {
    () => {
        "LEFT JOIN failure ON failure.task = task.id
        LEFT JOIN progress ON progress.task = task.id AND progress.lease = task.lease AND task.state = 'running'"
    };
}
pub(super) use beside;

/// A task's row, without data.
pub(super) fn task(row: &SqliteRow) -> Task {
    let mut columns = Columns::of(row);
    let mut task = from_columns(&mut columns);
    task.unreadable = columns.problem();
    task
}

fn from_columns(columns: &mut Columns<'_>) -> Task {
    let word = columns.text(3, "state");
    // What is in no state known is nothing that still has to be done.
    let state = failure::state(&word).unwrap_or_else(|error| {
        columns.complain(error.to_string());
        State::Failed
    });
    let done = columns.maybe_whole(18, "progress");
    let total = columns.maybe_whole(19, "progress");
    let note = columns.maybe_text(20, "progress note");
    for (at, name) in [(21, "releases"), (22, "lost_alone"), (23, "depth")] {
        columns.maybe_count(at, name);
    }
    Task {
        id: TaskId(columns.whole(0, "number")),
        key: columns.text(1, "key"),
        task_type: columns.text(2, "type"),
        state,
        queue: queue_name(columns.queue(25)),
        user: Some(columns.text(4, "user")).filter(|user| !user.is_empty()),
        max_running: columns.maybe_count(5, "max_running"),
        priority: priority(columns, 24),
        attempts: columns.count(6, "attempts"),
        max_attempts: columns.maybe_count(7, "max_attempts"),
        lost: columns.count(8, "lost"),
        created_at: Timestamp(columns.whole(9, "created_at")),
        run_at: Timestamp(columns.whole(10, "run_at")),
        until: columns.maybe_whole(11, "until").map(Timestamp),
        host: columns.maybe_whole(12, "host").filter(|_| state == State::Running).map(HostId),
        progress: done.map(|done| Progress {
            done: done.unsigned_abs(),
            total: total.map(i64::unsigned_abs),
            note: note.unwrap_or_default(),
        }),
        finished_at: columns.maybe_whole(13, "finished_at").map(Timestamp),
        retained_until: columns.maybe_whole(14, "retained_until").map(Timestamp),
        plugin_digest: columns.maybe_text(15, "plugin digest"),
        error_code: columns.maybe_text(16, "failure's code"),
        error_message: columns.maybe_text(17, "failure's message"),
        unreadable: None,
        data: None,
        output: None,
    }
}

/// A priority, held to its range.
fn priority(columns: &mut Columns<'_>, at: usize) -> i32 {
    let found = columns.whole(at, "priority");
    let allowed = i32::try_from(found).ok().filter(|priority| NewTask::PRIORITIES.contains(priority));
    allowed.unwrap_or_else(|| {
        columns.complain(format!("the priority is {found}; -100 to 100 can be"));
        0
    })
}

/// The task with data and output. Data that cannot be decompressed is shown as it is stored.
pub(super) fn task_with_data(row: &SqliteRow) -> Task {
    let mut columns = Columns::of(row);
    let mut task = from_columns(&mut columns);
    if let bytes @ 17_825_793.. = columns.whole(28, "data's size") {
        columns.complain(format!("the data has {bytes} bytes, more than can be stored"));
    }
    let kind = columns.type_name(26);
    match kind.as_str() {
        "TEXT" | "BLOB" => {}
        // Too much of it is not read.
        "NULL" if columns.maybe_whole(27, "data's size").is_some() => {}
        "NULL" => columns.complain("the data is missing".to_owned()),
        _ => columns.complain(format!("the data is {kind}, not text")),
    }
    task.data = Some(data::readable(columns.bytes(26).unwrap_or_default()));
    task.output = columns.bytes(27);
    task.unreadable = columns.problem();
    task
}

/// Data that nobody could have submitted is not read.
macro_rules! data_and_output {
    () => {
        concat!(", CASE WHEN ", data_bytes!(), " <= 17825792 THEN ", whole_data!(), " END, output.output, ", data_bytes!())
    };
}
pub(super) use data_and_output;

macro_rules! data_beside {
    () => {
        " LEFT JOIN task_data ON task_data.task = task.id LEFT JOIN output ON output.task = task.id"
    };
}
pub(super) use data_beside;

pub(super) async fn get(readers: &SqlitePool, key: &str) -> Result<Option<Task>, sqlx::Error> {
    const GET: &str =
        concat!("SELECT ", task_columns!(), data_and_output!(), " FROM task ", beside!(), data_beside!(), " WHERE task.key = ?1");
    let row = sqlx::query(GET).bind(key.to_owned()).fetch_optional(readers).await?;
    Ok(row.map(|row| task_with_data(&row)))
}

pub(super) async fn get_by_id(readers: &SqlitePool, id: TaskId) -> Result<Option<Task>, sqlx::Error> {
    const GET: &str =
        concat!("SELECT ", task_columns!(), data_and_output!(), " FROM task ", beside!(), data_beside!(), " WHERE task.id = ?1");
    let row = sqlx::query(GET).bind(id.0).fetch_optional(readers).await?;
    Ok(row.map(|row| task_with_data(&row)))
}

pub(super) async fn attempts(readers: &SqlitePool, key: &str) -> Result<Vec<AttemptRecord>, sqlx::Error> {
    const ATTEMPTS: &str = "SELECT past.attempt, past.lease, host.name, host.process_id, plugin_version.digest, past.ended_at, past.event,
            past.code, past.message, past.host
        FROM (SELECT attempt.attempt, attempt.lease, attempt.host, attempt.plugin, attempt.ended_at, attempt.event, attempt.code,
                attempt.message
            FROM task JOIN attempt ON attempt.task = task.id WHERE task.key = ?1
            UNION ALL
            SELECT attempts, lease, host, plugin, finished_at, event, NULL, NULL FROM task WHERE key = ?1 AND event = 'finish') AS past
        LEFT JOIN host ON host.id = past.host LEFT JOIN plugin_version ON plugin_version.id = past.plugin
        ORDER BY past.lease DESC LIMIT ?2";
    let kept = i64::try_from(AttemptRecord::KEPT).unwrap_or(i64::MAX);
    let rows = sqlx::query(ATTEMPTS).bind(key.to_owned()).bind(kept).fetch_all(readers).await?;
    let record = |row: &SqliteRow| {
        let mut columns = Columns::of(row);
        let host = match (columns.maybe_text(2, "host"), columns.maybe_whole(3, "process"), columns.maybe_whole(9, "host")) {
            (Some(name), Some(process_id), _) => format!("{name}, process {process_id}"),
            (_, _, Some(id)) => format!("host {id}, no longer known"),
            _ => "unknown".to_owned(),
        };
        AttemptRecord {
            attempt: columns.count(0, "attempt"),
            lease: Lease(columns.whole(1, "lease")),
            host,
            plugin_digest: columns.maybe_text(4, "digest"),
            ended_at: Timestamp(columns.whole(5, "ended_at")),
            event: columns.text(6, "event"),
            error_code: columns.maybe_text(7, "code"),
            error_message: columns.maybe_text(8, "message"),
        }
    };
    Ok(rows.iter().rev().map(record).collect())
}

/// The least text that is greater than all that start with `prefix`; None if there is none.
pub(super) fn successor(prefix: &str) -> Option<String> {
    let mut characters: Vec<char> = prefix.chars().collect();
    while let Some(last) = characters.pop() {
        let next = (u32::from(last) + 1..=u32::from(char::MAX)).find_map(char::from_u32);
        if let Some(next) = next {
            characters.push(next);
            return Some(characters.into_iter().collect());
        }
    }
    None
}

pub(super) const HELD: &str = "SELECT CAST(task.key AS BLOB) FROM scheduled CROSS JOIN task ON task.id = scheduled.task
    WHERE scheduled.run_at = ?1 AND task.key >= ?2 AND task.key < coalesce(?3, x'') ORDER BY task.key LIMIT ?4";

/// The keys of held tasks with this prefix.
pub(super) async fn held(readers: &SqlitePool, prefix: &str) -> Result<Vec<String>, sqlx::Error> {
    let query = sqlx::query_scalar::<_, Vec<u8>>(HELD)
        .bind(NewTask::HELD_AT.0)
        .bind(prefix.to_owned())
        .bind(successor(prefix))
        .bind(PAGE_MAX);
    let rows = query.fetch_all(readers).await?;
    Ok(rows.iter().map(|key| lossy(key)).collect())
}

pub(super) const UNSETTLED: &str = "SELECT EXISTS (SELECT 1 FROM task INDEXED BY task_key
    WHERE key >= ?1 AND key < coalesce(?2, x'') AND state IN ('waiting', 'running'))";

/// Whether a task with this prefix waits or runs.
pub(super) async fn has_unsettled(readers: &SqlitePool, prefix: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(UNSETTLED).bind(prefix.to_owned()).bind(successor(prefix)).fetch_one(readers).await
}

/// Counts as they are told.
fn named(rows: Vec<(Vec<u8>, i64)>) -> Vec<(String, u64)> {
    rows.into_iter().map(|(name, tasks)| (lossy(&name), tasks.unsigned_abs())).collect()
}

pub(super) async fn types(readers: &SqlitePool) -> Result<Vec<QueuedType>, sqlx::Error> {
    const TYPES: &str = "SELECT CAST(queue AS BLOB), CAST(name AS BLOB), tasks FROM tally WHERE what = 'type' AND tasks > 0
        ORDER BY tasks DESC, queue, name LIMIT ?1";
    let counts: Vec<(Vec<u8>, Vec<u8>, i64)> = sqlx::query_as(TYPES).bind(QueuedType::MOST).fetch_all(readers).await?;
    let counted = |(queue, name, tasks): (Vec<u8>, Vec<u8>, i64)| QueuedType {
        queue: queue_name(lossy(&queue)),
        task_type: lossy(&name),
        tasks: tasks.unsigned_abs(),
    };
    Ok(counts.into_iter().map(counted).collect())
}

pub(super) async fn stats(readers: &SqlitePool) -> Result<Stats, sqlx::Error> {
    const COUNTS: &str = "SELECT (SELECT CAST(total(ready) AS INTEGER) FROM account), (SELECT count(*) FROM suspect) + (SELECT count(*) FROM unserved),
        (SELECT count(*) FROM scheduled WHERE run_at > clock.now), (SELECT count(*) FROM scheduled WHERE run_at <= clock.now),
        (SELECT CAST(total(running) AS INTEGER) FROM account),
        (WITH RECURSIVE band (queue, user, turn) AS (
                -- A user's first task of each priority that it has: a turn and 100 steps, divided by a step, is the priority and 100, and the rest is a time.
                SELECT queue, user, head_turn FROM account WHERE head_turn IS NOT NULL
                UNION ALL
                SELECT queue, user, (SELECT min(ready.turn) FROM ready WHERE ready.queue = band.queue AND ready.user = band.user
                    AND ready.turn >= ((band.turn + 100000000000000000) / 1000000000000000 - 99) * 1000000000000000)
                FROM band WHERE turn IS NOT NULL)
            SELECT min((turn + 100000000000000000) % 1000000000000000) FROM band),
        (SELECT min(task.run_at) FROM suspect JOIN task ON task.id = suspect.task), (SELECT min(run_at) FROM scheduled), clock.now
        FROM (SELECT CAST(round(unixepoch('subsec') * 1000) AS INTEGER) AS now) AS clock";
    const ENDED: &str = "SELECT CAST(name AS BLOB), tasks FROM tally WHERE what = 'ended'";
    const TYPES: &str = "SELECT CAST(name AS BLOB), sum(tasks) FROM tally WHERE what = 'type'
        GROUP BY name ORDER BY sum(tasks) DESC, name LIMIT 100";
    const QUEUES: &str =
        "SELECT CAST(CASE queue WHEN '' THEN 'default' ELSE queue END AS BLOB), sum(tasks) FROM tally WHERE what = 'type'
        GROUP BY 1 ORDER BY sum(tasks) DESC, 1 LIMIT 100";
    let mut reading = readers.begin().await?;
    let counts = sqlx::query(COUNTS).fetch_one(&mut *reading).await?;
    let ended: Vec<(Vec<u8>, i64)> = sqlx::query_as(ENDED).fetch_all(&mut *reading).await?;
    let types: Vec<(Vec<u8>, i64)> = sqlx::query_as(TYPES).fetch_all(&mut *reading).await?;
    let queues: Vec<(Vec<u8>, i64)> = sqlx::query_as(QUEUES).fetch_all(&mut *reading).await?;
    let number = |place: usize| counts.try_get::<i64, _>(place).map(i64::unsigned_abs);
    let of = |state: State| {
        ended.iter().find(|(name, _)| name == state.as_str().as_bytes()).map_or(0, |(_, tasks)| tasks.unsigned_abs())
    };
    let now = Timestamp(counts.try_get(8)?);
    // What has become due and was not moved over yet may be claimed just the same.
    let heads = [5, 6, 7].into_iter().map(|place| counts.try_get::<Option<i64>, _>(place)).collect::<Result<Vec<_>, _>>()?;
    let oldest = heads.into_iter().flatten().min().map(Timestamp).filter(|moment| *moment <= now);
    Ok(Stats {
        ready: number(0)?.saturating_add(number(1)?).saturating_add(number(3)?),
        scheduled: number(2)?,
        running: number(4)?,
        finished: of(State::Finished),
        failed: of(State::Failed),
        cancelled: of(State::Cancelled),
        oldest_ready_ms: oldest.map(|moment| u64::try_from(now.since(moment).as_millis()).unwrap_or(u64::MAX)),
        types: named(types),
        queues: named(queues),
    })
}

/// How many follow-ups of a root have not ended, other than one task; at most `limit`.
pub(super) async fn relatives(readers: &SqlitePool, root: TaskId, task: TaskId, limit: u32) -> Result<u32, sqlx::Error> {
    const RELATIVES: &str = "SELECT count(*) FROM (SELECT 1 FROM descendant WHERE root = ?1 AND task <> ?2 LIMIT ?3)";
    let counted: i64 = sqlx::query_scalar(RELATIVES).bind(root.0).bind(task.0).bind(i64::from(limit)).fetch_one(readers).await?;
    Ok(u32::try_from(counted).unwrap_or(limit))
}
