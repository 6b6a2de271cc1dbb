//! What readers see: one task, its attempts, counts.

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::failure::{self, Failure};
use super::operate::Name;
use super::session::Session;
use super::unreadable;
use crate::task::queue_name;
use crate::{AttemptRecord, HostId, Lease, NewTask, Progress, QueuedType, State, Stats, Task, TaskId, Timestamp, data};

/// The most tasks of a page.
pub(super) const PAGE_MAX: u32 = 10_000;

macro_rules! task_columns {
    () => {
        "task.id, task.key, task.type, task.state::text, task.user_name, task.max_running, task.attempts, task.max_attempts,
        coalesce(task.lost, 0), task.created_at, task.run_at, task.until, task.host, task.finished_at, task.retained_until,
        (SELECT digest FROM laelaps.plugin_version WHERE plugin_version.id = task.plugin) AS digest, failure.code, failure.message,
        progress.done, progress.total, progress.note, task.bytes, coalesce(task.releases, 0), coalesce(task.lost_alone, 0),
        coalesce(task.depth, 0), task.priority, task.queue"
    };
}
pub(super) use task_columns;

/// With OFFSET 0 each is looked up by its number, whatever the planner once believed about the size of these tables.
macro_rules! beside {
    () => {
        "LEFT JOIN LATERAL (SELECT code, message FROM laelaps.failure WHERE failure.task = task.id OFFSET 0) AS failure ON true
        LEFT JOIN LATERAL (SELECT done, total, note FROM laelaps.progress
            WHERE progress.task = task.id AND progress.lease = task.lease AND task.state = 'running' OFFSET 0) AS progress ON true"
    };
}
pub(super) use beside;

macro_rules! with_data {
    () => {
        ", coalesce(task.data, (SELECT data FROM laelaps.task_data WHERE task_data.task = task.id)),
        (SELECT output FROM laelaps.output WHERE output.task = task.id)"
    };
}
pub(super) use with_data;

/// The task of a row, without data. A row that cannot be read is shown as far as it can be, and says so.
pub(super) fn task(row: &PgRow) -> Result<Task, sqlx::Error> {
    let mut task = known(row)?;
    let number = |place: usize| row.try_get::<i32, _>(place).map(|number| Some(i64::from(number)));
    let numbers = [
        ("attempts", number(6)?, unreadable::COUNTER),
        ("lost", number(8)?, unreadable::COUNTER),
        ("lost_alone", number(23)?, unreadable::COUNTER),
        ("releases", number(22)?, unreadable::COUNTER),
        ("depth", number(24)?, unreadable::COUNTER),
        ("bytes", number(21)?, unreadable::BYTES),
        ("max_attempts", row.try_get(7)?, unreadable::MAX_ATTEMPTS),
        ("max_running", row.try_get(5)?, unreadable::MAX_RUNNING),
        ("created_at", row.try_get(9)?, unreadable::MOMENT),
        ("run_at", row.try_get(10)?, unreadable::MOMENT),
    ];
    let names = [("key", task.key.as_str()), ("type", &task.task_type), ("user", task.user.as_deref().unwrap_or_default())];
    let problem = unreadable::problem(names, &row.try_get::<String, _>(26)?, numbers);
    // What was set aside stays so, even if it can be read since.
    let aside = || task.error_message.clone().filter(|_| unreadable::is_aside(task.error_code.as_deref()));
    task.unreadable = problem.or_else(aside);
    Ok(task)
}

fn known(row: &PgRow) -> Result<Task, sqlx::Error> {
    let user: String = row.try_get(4)?;
    let state = failure::state(row.try_get(3)?)?;
    let running = state == State::Running;
    let limit = |place: usize| -> Result<Option<u32>, sqlx::Error> {
        Ok(row.try_get::<Option<i64>, _>(place)?.map(|number| u32::try_from(number).unwrap_or(u32::MAX)))
    };
    let done: Option<i64> = row.try_get(18)?;
    let total: Option<i64> = row.try_get(19)?;
    let note: Option<String> = row.try_get(20)?;
    Ok(Task {
        id: TaskId(row.try_get(0)?),
        key: row.try_get(1)?,
        task_type: row.try_get(2)?,
        state,
        queue: queue_name(row.try_get(26)?),
        user: Some(user).filter(|user| !user.is_empty()),
        priority: i32::from(row.try_get::<i16, _>(25)?),
        max_running: limit(5)?,
        attempts: row.try_get::<i32, _>(6)?.unsigned_abs(),
        max_attempts: limit(7)?,
        lost: row.try_get::<i32, _>(8)?.unsigned_abs(),
        created_at: Timestamp(row.try_get(9)?),
        run_at: Timestamp(row.try_get(10)?),
        until: row.try_get::<Option<i64>, _>(11)?.map(Timestamp),
        host: row.try_get::<Option<i64>, _>(12)?.filter(|_| running).map(HostId),
        progress: done.map(|done| Progress {
            done: done.unsigned_abs(),
            total: total.map(i64::unsigned_abs),
            note: note.unwrap_or_default(),
        }),
        finished_at: row.try_get::<Option<i64>, _>(13)?.map(Timestamp),
        retained_until: row.try_get::<Option<i64>, _>(14)?.map(Timestamp),
        plugin_digest: row.try_get(15)?,
        error_code: row.try_get(16)?,
        error_message: row.try_get(17)?,
        unreadable: None,
        data: None,
        output: None,
    })
}

/// The task with data and output. Data that cannot be decompressed is shown as it is stored.
pub(super) fn task_with_data(row: &PgRow) -> Result<Task, sqlx::Error> {
    let stored: Option<Vec<u8>> = row.try_get(27)?;
    let stored = stored.unwrap_or_default();
    let plain = data::readable(stored);
    Ok(Task { data: Some(plain), output: row.try_get(28)?, ..task(row)? })
}

pub(super) async fn get(session: &mut Session, name: &Name) -> Result<Option<Task>, Failure> {
    const BY_KEY: &str =
        concat!("SELECT ", task_columns!(), with_data!(), " FROM laelaps.task ", beside!(), " WHERE task.key = $1");
    const BY_ID: &str =
        concat!("SELECT ", task_columns!(), with_data!(), " FROM laelaps.task ", beside!(), " WHERE task.id = $1");
    let row = match name.parts() {
        (Some(key), _) => sqlx::query(BY_KEY).bind(key).fetch_optional(session.db()?).await?,
        (_, Some(id)) => sqlx::query(BY_ID).bind(id).fetch_optional(session.db()?).await?,
        _ => None,
    };
    Ok(row.map(|row| task_with_data(&row)).transpose()?)
}

pub(super) async fn attempts(session: &mut Session, key: &str) -> Result<Vec<AttemptRecord>, Failure> {
    const ATTEMPTS: &str =
        "SELECT past.attempt, past.lease, host.name, host.process_id, plugin_version.digest, past.ended_at, past.event,
            past.code, past.message, past.host
        FROM (SELECT attempt.attempt, attempt.lease, attempt.host, attempt.plugin, attempt.ended_at, attempt.event, attempt.code,
                attempt.message
            FROM laelaps.task CROSS JOIN LATERAL (SELECT * FROM laelaps.attempt WHERE attempt.task = task.id OFFSET 0) AS attempt
            WHERE task.key = $1
            UNION ALL
            SELECT attempts, lease, host, plugin, finished_at, event, NULL, NULL FROM laelaps.task
            WHERE key = $1 AND event = 'finish' AND state = 'finished') AS past
        LEFT JOIN laelaps.host ON host.id = past.host LEFT JOIN laelaps.plugin_version ON plugin_version.id = past.plugin
        ORDER BY past.lease";
    if key.contains('\0') {
        return Ok(Vec::new());
    }
    let rows = sqlx::query(ATTEMPTS).bind(key).fetch_all(session.db()?).await?;
    let record = |row: &PgRow| {
        let name: Option<String> = row.try_get(2)?;
        let process_id: Option<i64> = row.try_get(3)?;
        let host = match (name, process_id, row.try_get::<Option<i64>, _>(9)?) {
            (Some(name), Some(process_id), _) => format!("{name}, process {process_id}"),
            (_, _, Some(id)) => format!("host {id}, no longer known"),
            _ => "unknown".to_owned(),
        };
        Ok(AttemptRecord {
            attempt: row.try_get::<i32, _>(0)?.unsigned_abs(),
            lease: Lease(row.try_get(1)?),
            host,
            plugin_digest: row.try_get(4)?,
            ended_at: Timestamp(row.try_get(5)?),
            event: row.try_get(6)?,
            error_code: row.try_get(7)?,
            error_message: row.try_get(8)?,
        })
    };
    let mut records: Vec<AttemptRecord> = rows.iter().map(record).collect::<Result<_, sqlx::Error>>()?;
    let surplus = records.len().saturating_sub(AttemptRecord::KEPT);
    records.drain(..surplus);
    Ok(records)
}

/// $1 when held tasks run: never; $2 and $3 the keys' bounds.
pub(super) const HELD: &str = "SELECT task.key FROM laelaps.scheduled
    CROSS JOIN LATERAL (SELECT key FROM laelaps.task WHERE task.id = scheduled.task OFFSET 0) AS task
    WHERE scheduled.run_at = $1 AND task.key >= $2 AND task.key < $3 ORDER BY task.key LIMIT $4";

/// The keys of held tasks with this prefix.
pub(super) async fn held(session: &mut Session, prefix: &str) -> Result<Vec<String>, Failure> {
    if prefix.contains('\0') {
        return Ok(Vec::new());
    }
    let query = sqlx::query_scalar(HELD).bind(NewTask::HELD_AT.0).bind(prefix).bind(end_of(prefix)).bind(i64::from(PAGE_MAX));
    Ok(query.fetch_all(session.db()?).await?)
}

pub(super) const UNSETTLED: &str =
    "SELECT EXISTS (SELECT FROM laelaps.task WHERE key >= $1 AND key < $2 AND state IN ('waiting', 'running'))";

/// Whether a task with this prefix waits or runs.
pub(super) async fn has_unsettled(session: &mut Session, prefix: &str) -> Result<bool, Failure> {
    if prefix.contains('\0') {
        return Ok(false);
    }
    Ok(sqlx::query_scalar(UNSETTLED).bind(prefix).bind(end_of(prefix)).fetch_one(session.db()?).await?)
}

/// As [`successor`]; if there is none, a text that is greater than any key. A bound that may be missing is none for an index.
pub(super) fn end_of(prefix: &str) -> String {
    successor(prefix).unwrap_or_else(|| String::from(char::MAX).repeat(NewTask::NAME_BYTES_MAX / 4 + 1))
}

/// The least text that is greater than all that start with `prefix`; None if there is none.
fn successor(prefix: &str) -> Option<String> {
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

pub(super) async fn stats(session: &mut Session) -> Result<Stats, Failure> {
    const COUNTS: &str = "SELECT coalesce(sum(live), 0)::float8, coalesce(sum(scheduled), 0)::float8, coalesce(sum(finished), 0)::float8,
            coalesce(sum(failed), 0)::float8, coalesce(sum(cancelled), 0)::float8,
            (SELECT count(*) FROM laelaps.task WHERE state = 'running' AND id = ANY(ARRAY(SELECT unnest(tasks) FROM laelaps.claim)))
        FROM laelaps.tally";
    // The first task of each queue and priority: a turn and 100 steps, divided by a step, is the priority and 100, and the rest is a time.
    const HEADS: &str = "WITH RECURSIVE nobodys AS (
            (SELECT queue, user_name, turn FROM laelaps.ready ORDER BY queue, user_name, turn, task LIMIT 1)
            UNION ALL
            SELECT next.* FROM nobodys CROSS JOIN LATERAL (
                (SELECT ready.queue, ready.user_name, ready.turn FROM laelaps.ready WHERE nobodys.user_name = '' AND ready.queue = nobodys.queue
                    AND ready.user_name = '' AND ready.turn >= ((nobodys.turn + 100000000000000000) / 1000000000000000 - 99) * 1000000000000000
                    ORDER BY ready.turn LIMIT 1)
                UNION ALL
                (SELECT ready.queue, ready.user_name, ready.turn FROM laelaps.ready WHERE ready.queue > nobodys.queue
                    ORDER BY ready.queue, ready.user_name, ready.turn, ready.task LIMIT 1)
                LIMIT 1) AS next),
        users AS (
            (SELECT queue, turn FROM laelaps.ready WHERE user_name <> '' ORDER BY queue, turn, task LIMIT 1)
            UNION ALL
            SELECT next.* FROM users CROSS JOIN LATERAL (
                (SELECT ready.queue, ready.turn FROM laelaps.ready WHERE ready.user_name <> '' AND ready.queue = users.queue
                    AND ready.turn >= ((users.turn + 100000000000000000) / 1000000000000000 - 99) * 1000000000000000
                    ORDER BY ready.turn, ready.task LIMIT 1)
                UNION ALL
                (SELECT ready.queue, ready.turn FROM laelaps.ready WHERE ready.user_name <> '' AND ready.queue > users.queue
                    ORDER BY ready.queue, ready.turn, ready.task LIMIT 1)
                LIMIT 1) AS next)
        SELECT now, (SELECT count(*) FROM laelaps.scheduled WHERE run_at <= now),
            least((SELECT min((turn + 100000000000000000) % 1000000000000000) FROM (SELECT * FROM nobodys LIMIT 10000) AS first
                    WHERE user_name = ''),
                (SELECT min((turn + 100000000000000000) % 1000000000000000) FROM (SELECT * FROM users LIMIT 10000) AS first),
                (SELECT min(task.run_at) FROM laelaps.suspect JOIN laelaps.task ON task.id = suspect.task),
                (SELECT run_at FROM laelaps.scheduled ORDER BY run_at, task LIMIT 1))
        FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now) AS clock";
    const TYPES: &str = "SELECT type, sum(live)::float8 AS live FROM laelaps.tally GROUP BY type HAVING sum(live) > 0
        ORDER BY live DESC, type LIMIT 100";
    const QUEUES: &str =
        "SELECT coalesce(nullif(queue, ''), 'default') AS name, sum(live)::float8 AS live FROM laelaps.tally GROUP BY queue
        HAVING sum(live) > 0 ORDER BY live DESC, name LIMIT 100";
    session.begin_reading().await?;
    let counts: (f64, f64, f64, f64, f64, i64) = sqlx::query_as(COUNTS).fetch_one(session.db()?).await?;
    let (now, due, oldest): (i64, i64, Option<i64>) = sqlx::query_as(HEADS).fetch_one(session.db()?).await?;
    let types: Vec<(String, f64)> = sqlx::query_as(TYPES).fetch_all(session.db()?).await?;
    let queues: Vec<(String, f64)> = sqlx::query_as(QUEUES).fetch_all(session.db()?).await?;
    session.commit().await?;
    let [live, scheduled, finished, failed, cancelled] = [counts.0, counts.1, counts.2, counts.3, counts.4].map(saturated);
    let running = counts.5;
    let whole = |number: i64| u64::try_from(number).unwrap_or(0);
    let named = |counts: Vec<(String, f64)>| counts.into_iter().map(|(name, tasks)| (name, whole(saturated(tasks)))).collect();
    // What has become due and was not moved over yet may be claimed just the same.
    let oldest = oldest.map(Timestamp).filter(|moment| *moment <= Timestamp(now));
    Ok(Stats {
        ready: whole(live.saturating_sub(scheduled).saturating_sub(running).saturating_add(due)),
        scheduled: whole(scheduled.saturating_sub(due)),
        running: whole(running),
        finished: whole(finished),
        failed: whole(failed),
        cancelled: whole(cancelled),
        oldest_ready_ms: oldest.map(|moment| u64::try_from(Timestamp(now).since(moment).as_millis()).unwrap_or(u64::MAX)),
        types: named(types),
        queues: named(queues),
    })
}

pub(super) async fn types(session: &mut Session) -> Result<Vec<QueuedType>, Failure> {
    const TYPES: &str =
        "SELECT queue, type, sum(live)::float8 AS live FROM laelaps.tally GROUP BY queue, type HAVING sum(live) > 0
        ORDER BY live DESC, queue, type LIMIT $1";
    let counts = sqlx::query_as(TYPES).bind(i64::from(QueuedType::MOST)).fetch_all(session.db()?);
    let counts: Vec<(String, String, f64)> = counts.await?;
    let counted = |(queue, task_type, tasks): (String, String, f64)| QueuedType {
        queue: queue_name(queue),
        task_type,
        tasks: u64::try_from(saturated(tasks)).unwrap_or(0),
    };
    Ok(counts.into_iter().map(counted).collect())
}

/// A sum of counts, into which somebody may have written by hand.
#[allow(clippy::cast_possible_truncation, reason = "beyond the range it saturates")]
fn saturated(sum: f64) -> i64 {
    sum as i64
}

/// How many follow-ups of a root have not ended, other than one task; at most `limit`.
pub(super) async fn relatives(session: &mut Session, root: TaskId, task: TaskId, limit: u32) -> Result<u32, Failure> {
    let counted = sqlx::query_scalar(RELATIVES).bind(root.0).bind(task.0).bind(i64::from(limit)).fetch_one(session.db()?);
    let counted: i64 = counted.await?;
    Ok(u32::try_from(counted).unwrap_or(limit))
}

pub(super) const RELATIVES: &str =
    "SELECT count(*) FROM (SELECT FROM laelaps.descendant WHERE root = $1 AND task <> $2 LIMIT $3) AS first";
