//! What readers see: one task, lists, counts. None of it takes the writer's lock.

use sqlx::Row as _;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::accounts::json;
use super::failure;
use super::rows::{Columns, lossy};
use crate::{AttemptRecord, Filter, HostId, Lease, NewTask, Page, Progress, State, Stats, Task, TaskId, Timestamp, data};

/// The most tasks of a page.
const PAGE_MAX: u32 = 10_000;
/// The most data and output of a page, unless one task alone has more.
const PAGE_BYTES_MAX: usize = 64 << 20;

macro_rules! task_columns {
    () => {
        "task.id, task.key, task.type, task.state, task.user, task.max_running, task.attempts, task.max_attempts, task.lost,
        task.created_at, task.run_at, task.until, task.host, task.finished_at, task.retained_until,
        (SELECT digest FROM plugin_version WHERE plugin_version.id = task.plugin) AS digest, failure.code, failure.message,
        progress.done, progress.total, progress.note, task.releases, task.lost_alone, task.depth"
    };
}

macro_rules! beside {
    () => {
        "LEFT JOIN failure ON failure.task = task.id
        LEFT JOIN progress ON progress.task = task.id AND progress.lease = task.lease AND task.state = 'running'"
    };
}

fn task(row: &SqliteRow) -> Task {
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
        user: Some(columns.text(4, "user")).filter(|user| !user.is_empty()),
        max_running: columns.maybe_count(5, "max_running"),
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

/// The task with data and output. Data that cannot be decompressed is shown as it is stored.
fn task_with_data(row: &SqliteRow) -> Task {
    let mut columns = Columns::of(row);
    let mut task = from_columns(&mut columns);
    if let bytes @ 17_825_793.. = columns.whole(26, "data's size") {
        columns.complain(format!("the data has {bytes} bytes, more than can be stored"));
    }
    let kind = columns.type_name(24);
    if !matches!(kind.as_str(), "TEXT" | "BLOB" | "NULL") {
        columns.complain(format!("the data is {kind}, not text"));
    }
    task.data = Some(data::readable(columns.bytes(24).unwrap_or_default()));
    task.output = columns.bytes(25);
    task.unreadable = columns.problem();
    task
}

/// Data that nobody could have submitted is not read.
macro_rules! data_and_output {
    () => {
        ", CASE WHEN octet_length(task_data.data) <= 17825792 THEN task_data.data END, output.output, octet_length(task_data.data)"
    };
}

macro_rules! data_beside {
    () => {
        " LEFT JOIN task_data ON task_data.task = task.id LEFT JOIN output ON output.task = task.id"
    };
}

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

macro_rules! list_of {
    ($source:expr, $keys:expr) => {
        concat!(
            "SELECT task.id FROM ",
            $source,
            " WHERE task.id > ?1 AND (?2 IS NULL OR task.type = ?2) AND (?3 IS NULL OR task.user = ?3)
            AND (?4 IS NULL OR task.state IN (SELECT value FROM json_each(?4))) ",
            $keys,
            " ORDER BY task.id LIMIT ?7"
        )
    };
}

/// All tasks by number: for all states, or for many finished ones.
const SCAN: &str = list_of!("task", "AND ?5 IS NULL AND ?6 IS NULL");
/// By the index of keys; any blob is greater than any text.
const BY_KEY: &str = list_of!("task INDEXED BY task_key", "AND task.key >= ?5 AND task.key < coalesce(?6, x'')");
/// Those next in line, as far as they are among so many tasks: the rest of a queue waits together, as a rule.
const NEAR: &str = list_of!(
    "(SELECT id FROM task WHERE id > ?1 ORDER BY id LIMIT 20000) AS near CROSS JOIN task ON task.id = near.id",
    "AND ?5 IS NULL AND ?6 IS NULL"
);
/// Few among many finished ones: from the places where they stand.
const FEW: &str = list_of!(
    "(SELECT task AS id FROM ready WHERE task > ?1 AND ?4 LIKE '%waiting%'
        UNION ALL SELECT task FROM scheduled WHERE task > ?1 AND ?4 LIKE '%waiting%'
        UNION ALL SELECT task FROM suspect WHERE task > ?1 AND ?4 LIKE '%waiting%'
        UNION ALL SELECT id FROM task INDEXED BY task_running WHERE state = 'running' AND id > ?1 AND ?4 LIKE '%running%'
        UNION ALL SELECT id FROM task INDEXED BY task_failed WHERE state = 'failed' AND id > ?1 AND ?4 LIKE '%failed%'
        UNION ALL SELECT id FROM task INDEXED BY task_cancelled WHERE state = 'cancelled' AND id > ?1 AND ?4 LIKE '%cancelled%') AS few
    CROSS JOIN task ON task.id = few.id",
    "AND ?5 IS NULL AND ?6 IS NULL"
);

pub(super) async fn list(readers: &SqlitePool, filter: &Filter) -> Result<Page, sqlx::Error> {
    const PLAIN: &str = concat!(
        "SELECT ",
        task_columns!(),
        " FROM json_each(?1) AS page CROSS JOIN task ON task.id = page.value ",
        beside!(),
        " ORDER BY task.id"
    );
    const WITH_DATA: &str = concat!(
        "SELECT ",
        task_columns!(),
        data_and_output!(),
        " FROM json_each(?1) AS page CROSS JOIN task ON task.id = page.value ",
        beside!(),
        data_beside!(),
        " ORDER BY task.id"
    );
    const BYTES: &str = "SELECT page.value,
            max(min(max(coalesce(task_data.bytes, 0), 0), 16777216), min(coalesce(octet_length(task_data.data), 0), 17825792))
                + coalesce(octet_length(output.output), 0)
        FROM json_each(?1) AS page LEFT JOIN task_data ON task_data.task = page.value LEFT JOIN output ON output.task = page.value
        ORDER BY page.value";
    let limit = filter.limit.clamp(1, PAGE_MAX);
    // Page and tasks have to fit together.
    let mut reading = readers.begin().await?;
    let mut ids: Vec<i64> = matching(filter, limit, &mut reading).await?;
    let mut more = ids.len() > limit as usize;
    ids.truncate(limit as usize);
    if filter.with_data {
        let bytes: Vec<(i64, i64)> = sqlx::query_as(BYTES).bind(json(&ids)).fetch_all(&mut *reading).await?;
        let mut sum = 0_usize;
        let fitting = bytes.iter().take_while(|(_, bytes)| {
            sum += usize::try_from(*bytes).unwrap_or(usize::MAX / 2);
            sum <= PAGE_BYTES_MAX
        });
        let fitting = fitting.count().max(1);
        more |= fitting < ids.len();
        ids.truncate(fitting);
    }
    let sql = if filter.with_data { WITH_DATA } else { PLAIN };
    let read = if filter.with_data { task_with_data } else { task };
    let rows = sqlx::query(sql).bind(json(&ids)).fetch_all(&mut *reading).await?;
    let tasks: Vec<Task> = rows.iter().map(read).collect();
    let next = tasks.last().map(|task| task.id).filter(|_| more);
    Ok(Page { tasks, next })
}

/// The numbers of one more task than the page takes.
async fn matching(filter: &Filter, limit: u32, reading: &mut sqlx::sqlite::SqliteConnection) -> Result<Vec<i64>, sqlx::Error> {
    let states = (!filter.states.is_empty()).then(|| json(filter.states.iter().map(|state| state.as_str())));
    let prefix = filter.key_prefix.as_deref().filter(|prefix| !prefix.is_empty());
    let sql = match (prefix, &states) {
        (Some(_), _) => BY_KEY,
        (None, Some(_)) if !filter.states.contains(&State::Finished) => FEW,
        _ => SCAN,
    };
    if sql == FEW {
        let near = rows_of(NEAR, filter, limit, states.clone(), prefix, reading).await?;
        if near.len() > limit as usize {
            return Ok(near);
        }
    }
    rows_of(sql, filter, limit, states, prefix, reading).await
}

async fn rows_of(
    sql: &'static str,
    filter: &Filter,
    limit: u32,
    states: Option<String>,
    prefix: Option<&str>,
    reading: &mut sqlx::sqlite::SqliteConnection,
) -> Result<Vec<i64>, sqlx::Error> {
    let rows = sqlx::query(sql)
        .bind(filter.after.map_or(i64::MIN, |after| after.0))
        .bind(filter.task_type.clone())
        .bind(filter.user.clone())
        .bind(states)
        .bind(prefix.map(str::to_owned))
        .bind(prefix.and_then(successor))
        .bind(i64::from(limit) + 1)
        .fetch_all(reading)
        .await?;
    let mut tasks = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<i64>, _>>()?;
    // One that stands in two places is one task.
    tasks.dedup();
    Ok(tasks)
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

pub(super) async fn stats(readers: &SqlitePool) -> Result<Stats, sqlx::Error> {
    const COUNTS: &str = "SELECT (SELECT CAST(total(ready) AS INTEGER) FROM account), (SELECT count(*) FROM suspect),
        (SELECT count(*) FROM scheduled WHERE run_at > clock.now), (SELECT count(*) FROM scheduled WHERE run_at <= clock.now),
        (SELECT CAST(total(running) AS INTEGER) FROM account),
        (SELECT min(head_at) FROM account), (SELECT min(run_at) FROM suspect), (SELECT min(run_at) FROM scheduled), clock.now
        FROM (SELECT CAST(round(unixepoch('subsec') * 1000) AS INTEGER) AS now) AS clock";
    const ENDED: &str = "SELECT CAST(name AS BLOB), tasks FROM tally WHERE what = 'ended'";
    const TYPES: &str = "SELECT CAST(name AS BLOB), tasks FROM tally WHERE what = 'type' ORDER BY tasks DESC, name LIMIT 100";
    let mut reading = readers.begin().await?;
    let counts = sqlx::query(COUNTS).fetch_one(&mut *reading).await?;
    let ended: Vec<(Vec<u8>, i64)> = sqlx::query_as(ENDED).fetch_all(&mut *reading).await?;
    let types: Vec<(Vec<u8>, i64)> = sqlx::query_as(TYPES).fetch_all(&mut *reading).await?;
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
        types: types.into_iter().map(|(name, tasks)| (lossy(&name), tasks.unsigned_abs())).collect(),
    })
}

/// How many follow-ups of a root have not ended, other than one task; at most `limit`.
pub(super) async fn relatives(readers: &SqlitePool, root: TaskId, task: TaskId, limit: u32) -> Result<u32, sqlx::Error> {
    const RELATIVES: &str = "SELECT count(*) FROM (SELECT 1 FROM descendant WHERE root = ?1 AND task <> ?2 LIMIT ?3)";
    let counted: i64 = sqlx::query_scalar(RELATIVES).bind(root.0).bind(task.0).bind(i64::from(limit)).fetch_one(readers).await?;
    Ok(u32::try_from(counted).unwrap_or(limit))
}
