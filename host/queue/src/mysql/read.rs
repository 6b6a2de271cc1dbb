//! What readers see: one task, its attempts, counts. None of it holds a row; what belongs together is read from one snapshot.

use std::collections::HashMap;

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;

use super::MySql;
use super::connect::text;
use super::failure::{self, Failure};
use super::fronts::{OF_USERS, QUEUES_MAX, READY, hex, names, names_of_suspects, queues};
use super::mend::{queue_of, unreadable_names};
use super::operate::Name;
use super::rows::{Joined, ids, json};
use super::session::Session;
use crate::task::queue_name;
use crate::{
    AttemptRecord, HostId, Lease, NewTask, Progress, QueuedType, Result, State, Stats, Task, TaskId, Timestamp, data, fair,
};

/// The most tasks of a page.
pub(super) const PAGE_MAX: u32 = 10_000;

macro_rules! task_columns {
    () => {
        "t.id, t.`key`, t.type, CAST(t.state AS CHAR), t.user, t.max_running, t.attempts, t.max_attempts, t.lost, t.created_at, t.run_at,
        t.until, t.host, t.finished_at, t.retained_until, v.digest, f.code, f.message, p.done, p.total, p.note, t.priority,
        t.queue"
    };
}
pub(super) use task_columns;

macro_rules! beside {
    () => {
        " LEFT JOIN laelaps_failure AS f ON f.task = t.id
        LEFT JOIN laelaps_progress AS p ON p.task = t.id AND p.lease = t.lease AND t.state = 'running'
        LEFT JOIN laelaps_plugin_version AS v ON v.id = t.plugin"
    };
}
pub(super) use beside;

/// A task's row, without data.
pub(super) fn task(row: &MySqlRow) -> Result<Task, sqlx::Error> {
    let user = text(row, 4)?;
    let word = text(row, 3)?;
    let state = failure::state_or_failed(&word);
    let names = unreadable_names(row, [("key", 1), ("type", 2), ("user", 4)], 22)?;
    let unreadable = if state.as_str() == word { names } else { Some(format!("the state {word:?} is none")) };
    let (priority, out_of_range) = priority(row.try_get(21)?);
    let moment =
        |place: usize| Ok::<_, sqlx::Error>(Some(row.try_get::<i64, _>(place)?).filter(|moment| *moment != 0).map(Timestamp));
    let done: Option<i64> = row.try_get(18)?;
    let total: Option<i64> = row.try_get(19)?;
    let note: Option<String> = row.try_get(20)?;
    let digest: Option<Vec<u8>> = row.try_get(15)?;
    Ok(Task {
        id: TaskId(row.try_get(0)?),
        key: text(row, 1)?,
        task_type: text(row, 2)?,
        state,
        queue: queue_name(text(row, 22)?),
        user: Some(user).filter(|user| !user.is_empty()),
        priority,
        max_running: row.try_get(5)?,
        attempts: row.try_get(6)?,
        max_attempts: row.try_get(7)?,
        lost: row.try_get(8)?,
        created_at: Timestamp(row.try_get(9)?),
        run_at: Timestamp(row.try_get(10)?),
        until: moment(11)?,
        host: Some(row.try_get::<i64, _>(12)?).filter(|_| state == State::Running).map(HostId),
        progress: done.map(|done| Progress {
            done: done.unsigned_abs(),
            total: total.map(i64::unsigned_abs),
            note: note.unwrap_or_default(),
        }),
        finished_at: moment(13)?,
        retained_until: moment(14)?,
        plugin_digest: digest.map(|digest| String::from_utf8_lossy(&digest).into_owned()),
        error_code: row.try_get(16)?,
        error_message: row.try_get(17)?,
        unreadable: unreadable.or(out_of_range),
        data: None,
        output: None,
    })
}

/// A priority as it counts, and what is wrong with it.
fn priority(found: i32) -> (i32, Option<String>) {
    let counts = found.clamp(*NewTask::PRIORITIES.start(), *NewTask::PRIORITIES.end());
    (counts, (counts != found).then(|| format!("the priority is {found}; -100 to 100 can be")))
}

/// Add data and output. Data that cannot be decompressed is shown as it is stored.
pub(super) async fn with_data(session: &mut Session<'_>, tasks: &mut [Task]) -> Result<(), Failure> {
    const DATA: &str = concat!(
        "SELECT d.task, d.part, d.data FROM ",
        ids!(),
        " STRAIGHT_JOIN laelaps_task_data AS d FORCE INDEX (PRIMARY) ON d.task = s.id"
    );
    const OUTPUT: &str = concat!(
        "SELECT o.task, o.part, o.output FROM ",
        ids!(),
        " STRAIGHT_JOIN laelaps_output AS o FORCE INDEX (PRIMARY) ON o.task = s.id"
    );
    let ids = json(tasks.iter().map(|task| task.id));
    let mut stored = joined(session, DATA, ids.clone()).await?;
    let mut outputs = joined(session, OUTPUT, ids).await?;
    for task in tasks {
        let stored = stored.remove(&task.id).unwrap_or_default();
        task.data = Some(data::readable(stored));
        task.output = outputs.remove(&task.id);
    }
    Ok(())
}

async fn joined(session: &mut Session<'_>, sql: &'static str, ids: String) -> Result<HashMap<TaskId, Vec<u8>>, Failure> {
    let mut found: HashMap<TaskId, Joined> = HashMap::new();
    for row in sqlx::query(sql).bind(ids).fetch_all(session.db()).await? {
        found.entry(TaskId(row.try_get(0)?)).or_default().add(row.try_get(1)?, row.try_get(2)?);
    }
    Ok(found.into_iter().map(|(task, parts)| (task, parts.into_bytes())).collect())
}

/// The least bytes that are greater than all that start with `prefix`: text never has the greatest byte.
pub(super) fn successor(prefix: &str) -> Vec<u8> {
    let mut bytes = prefix.as_bytes().to_vec();
    match bytes.last_mut() {
        Some(last) => *last = last.saturating_add(1),
        None => bytes.push(u8::MAX),
    }
    bytes
}

pub(super) const HELD: &str =
    "SELECT t.`key` FROM laelaps_scheduled AS s STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.task
    WHERE s.run_at = ? AND t.`key` >= ? AND t.`key` < ? ORDER BY t.`key` LIMIT ?";

pub(super) const UNSETTLED: &str = "SELECT EXISTS (SELECT 1 FROM laelaps_task FORCE INDEX (by_key)
    WHERE `key` >= ? AND `key` < ? AND state IN ('waiting', 'running'))";

async fn attempts(session: &mut Session<'_>, key: Vec<u8>) -> Result<Vec<AttemptRecord>, Failure> {
    const ATTEMPTS: &str =
        "SELECT past.attempt, past.lease, h.name, h.process_id, v.digest, past.ended_at, past.event, past.code,
            past.message, past.host
        FROM (SELECT a.attempt, a.lease, a.host, a.plugin, a.ended_at, a.event, a.code, a.message
            FROM laelaps_task AS t STRAIGHT_JOIN laelaps_attempt AS a FORCE INDEX (PRIMARY) ON a.task = t.id WHERE t.`key` = ?
            UNION ALL
            SELECT attempts, lease, host, plugin, finished_at, CAST(event AS CHAR), NULL, NULL FROM laelaps_task
            WHERE `key` = ? AND event = 'finish') AS past
        LEFT JOIN laelaps_host AS h ON h.id = past.host LEFT JOIN laelaps_plugin_version AS v ON v.id = past.plugin
        ORDER BY past.lease";
    let rows = sqlx::query(ATTEMPTS).bind(key.clone()).bind(key).fetch_all(session.db()).await?;
    let record = |row: &MySqlRow| {
        let name: Option<String> = row.try_get(2)?;
        let process_id: Option<u32> = row.try_get(3)?;
        let host = match (name, process_id, row.try_get::<i64, _>(9)?) {
            (Some(name), Some(process_id), _) => format!("{name}, process {process_id}"),
            (_, _, 0) => "unknown".to_owned(),
            (_, _, id) => format!("host {id}, no longer known"),
        };
        let digest: Option<Vec<u8>> = row.try_get(4)?;
        Ok(AttemptRecord {
            attempt: row.try_get(0)?,
            lease: Lease(row.try_get(1)?),
            host,
            plugin_digest: digest.map(|digest| String::from_utf8_lossy(&digest).into_owned()),
            ended_at: Timestamp(row.try_get(5)?),
            event: text(row, 6)?,
            error_code: row.try_get(7)?,
            error_message: row.try_get(8)?,
        })
    };
    let mut records: Vec<AttemptRecord> = rows.iter().map(record).collect::<Result<_, sqlx::Error>>()?;
    let surplus = records.len().saturating_sub(AttemptRecord::KEPT);
    records.drain(..surplus);
    Ok(records)
}

/// The first turn of a queue from one on, and before another.
pub(super) const NEXT_TURN: [&str; 3] = [
    "SELECT turn FROM laelaps_ready FORCE INDEX (PRIMARY) WHERE queue = ? AND turn >= ? AND turn < ? ORDER BY turn LIMIT 1",
    "SELECT turn FROM laelaps_ready_of_user FORCE INDEX (in_turn) WHERE queue = ? AND turn >= ? AND turn < ? ORDER BY turn LIMIT 1",
    "SELECT turn FROM laelaps_suspect FORCE INDEX (in_queue) WHERE queue = ? AND turn >= ? AND turn < ? ORDER BY turn LIMIT 1",
];

/// The first and the last queue that have something, and of each queue its first and last turn.
const QUEUES: [[&str; 2]; 3] = [
    [
        "SELECT MIN(queue), MAX(queue) FROM laelaps_ready",
        concat!(
            "SELECT s.place, (SELECT r.turn FROM laelaps_ready AS r FORCE INDEX (PRIMARY)
                    WHERE r.queue = UNHEX(s.queue) ORDER BY r.turn LIMIT 1),
                (SELECT r.turn FROM laelaps_ready AS r FORCE INDEX (PRIMARY)
                    WHERE r.queue = UNHEX(s.queue) ORDER BY r.turn DESC LIMIT 1) FROM ",
            queues!()
        ),
    ],
    [
        "SELECT MIN(queue), MAX(queue) FROM laelaps_ready_of_user",
        concat!(
            "SELECT s.place, (SELECT r.turn FROM laelaps_ready_of_user AS r FORCE INDEX (in_turn)
                    WHERE r.queue = UNHEX(s.queue) ORDER BY r.turn LIMIT 1),
                (SELECT r.turn FROM laelaps_ready_of_user AS r FORCE INDEX (in_turn)
                    WHERE r.queue = UNHEX(s.queue) ORDER BY r.turn DESC LIMIT 1) FROM ",
            queues!()
        ),
    ],
    [
        "SELECT MIN(queue), MAX(queue) FROM laelaps_suspect",
        concat!(
            "SELECT s.place, (SELECT r.turn FROM laelaps_suspect AS r FORCE INDEX (in_queue)
                    WHERE r.queue = UNHEX(s.queue) ORDER BY r.turn LIMIT 1),
                (SELECT r.turn FROM laelaps_suspect AS r FORCE INDEX (in_queue)
                    WHERE r.queue = UNHEX(s.queue) ORDER BY r.turn DESC LIMIT 1) FROM ",
            queues!()
        ),
    ],
];

/// When the task became ready that has waited longest, whatever its queue and its priority.
async fn oldest_of(session: &mut Session<'_>, table: usize) -> Result<Option<i64>, Failure> {
    let [ends, turns] = QUEUES[table];
    let ends: (Option<Vec<u8>>, Option<Vec<u8>>) = sqlx::query_as(ends).fetch_one(session.db()).await?;
    let (Some(mut from), Some(end)) = ends else { return Ok(None) };
    let mut oldest: Option<i64> = None;
    loop {
        let queues = match table {
            _ if from == end => vec![end.clone()],
            0 => names(session, &READY, &from, QUEUES_MAX).await?,
            1 => names(session, &OF_USERS, &from, QUEUES_MAX).await?,
            _ => names_of_suspects(session, &from, QUEUES_MAX).await?,
        };
        let rows = json(queues.iter().map(|queue| hex(queue)));
        let turns: Vec<(i64, Option<i64>, Option<i64>)> = sqlx::query_as(turns).bind(rows).fetch_all(session.db()).await?;
        for (place, first, last) in turns {
            let (Some(first), Some(last)) = (first, last) else { continue };
            let found = if fair::is_usual(first) && fair::is_usual(last) {
                Some(first)
            } else {
                let queue = usize::try_from(place - 1).ok().and_then(|place| queues.get(place)).cloned().unwrap_or_default();
                oldest_in(session, NEXT_TURN[table], queue).await?
            };
            oldest = oldest.into_iter().chain(found).min();
        }
        match queues.last() {
            Some(last) if queues.len() == QUEUES_MAX => from.clone_from(last),
            _ => return Ok(oldest),
        }
    }
}

/// The same in one queue: of each priority that is there, the first one is looked at.
async fn oldest_in(session: &mut Session<'_>, next: &'static str, queue: Vec<u8>) -> Result<Option<i64>, Failure> {
    let step = fair::PRIORITY_STEP;
    // Turns that no task can have are left out, so that there are as many looks as priorities at most.
    let end = (i64::from(*NewTask::PRIORITIES.end()) + 1) * step;
    let mut from = i64::from(*NewTask::PRIORITIES.start()) * step;
    let mut oldest: Option<i64> = None;
    loop {
        let query = sqlx::query_scalar::<_, i64>(next).bind(queue.clone()).bind(from).bind(end);
        let Some(turn) = query.fetch_optional(session.db()).await? else { return Ok(oldest) };
        let run_at = turn.rem_euclid(step);
        oldest = Some(oldest.map_or(run_at, |oldest| oldest.min(run_at)));
        from = turn - run_at + step;
    }
}

/// Counts by name, of what there is something: most first, then by name.
fn most_first(sums: HashMap<String, i64>) -> Vec<(String, u64)> {
    let counts = sums.into_iter().filter_map(|(name, tasks)| Some((name, u64::try_from(tasks).ok().filter(|tasks| *tasks > 0)?)));
    let mut counts: Vec<(String, u64)> = counts.collect();
    counts.sort_unstable_by(|one, other| other.1.cmp(&one.1).then_with(|| one.0.cmp(&other.0)));
    counts
}

async fn stats(session: &mut Session<'_>) -> Result<Stats, Failure> {
    const TALLY: &str =
        "SELECT CAST(what AS CHAR), name, CAST(SUM(tasks) AS SIGNED), queue FROM laelaps_tally GROUP BY what, queue, name";
    const SCHEDULED: &str = "SELECT COUNT(*) FROM laelaps_scheduled WHERE run_at > ?";
    const DUE: &str = "SELECT MIN(run_at) FROM laelaps_scheduled";
    let now = session.now;
    let (mut running, mut ended) = (0, HashMap::new());
    // By their names as they are shown: those that cannot be read may be written in several ways.
    let (mut types, mut queues) = (HashMap::new(), HashMap::new());
    for row in sqlx::query(TALLY).fetch_all(session.db()).await? {
        let (name, tasks): (String, i64) = (text(&row, 1)?, row.try_get(2)?);
        let counted = u64::try_from(tasks).unwrap_or(0);
        match text(&row, 0)?.as_str() {
            "running" => running = counted,
            "ended" => drop(ended.insert(name, counted)),
            _ => {
                *types.entry(name).or_default() += tasks;
                *queues.entry(queue_name(queue_of(&row, 3)?)).or_default() += tasks;
            }
        }
    }
    let (mut types, mut queues) = (most_first(types), most_first(queues));
    let scheduled: i64 = sqlx::query_scalar(SCHEDULED).bind(now).fetch_one(session.db()).await?;
    let scheduled = scheduled.unsigned_abs();
    // What has become due and was not moved over yet may be claimed just the same.
    let mut oldest: Option<i64> = sqlx::query_scalar(DUE).fetch_one(session.db()).await?;
    for table in 0..QUEUES.len() {
        oldest = oldest.into_iter().chain(oldest_of(session, table).await?).min();
    }
    let oldest = oldest.map(Timestamp).filter(|moment| *moment <= Timestamp(now));
    // Every task that waits or runs is of a type.
    let open: u64 = types.iter().map(|(_, tasks)| tasks).sum();
    types.truncate(100);
    queues.truncate(100);
    let of = |state: State| ended.get(state.as_str()).copied().unwrap_or(0);
    Ok(Stats {
        ready: open.saturating_sub(running + scheduled),
        scheduled,
        running,
        finished: of(State::Finished),
        failed: of(State::Failed),
        cancelled: of(State::Cancelled),
        oldest_ready_ms: oldest.map(|moment| u64::try_from(Timestamp(now).since(moment).as_millis()).unwrap_or(u64::MAX)),
        types,
        queues,
    })
}

async fn types(session: &mut Session<'_>) -> Result<Vec<QueuedType>, Failure> {
    const TYPES: &str = "SELECT name, CAST(SUM(tasks) AS SIGNED) AS live, queue FROM laelaps_tally WHERE what = 'type'
        GROUP BY queue, name HAVING live > 0 ORDER BY live DESC, queue, name LIMIT ?";
    let rows = sqlx::query(TYPES).bind(QueuedType::MOST).fetch_all(session.db()).await?;
    let counted = |row: &MySqlRow| {
        Ok(QueuedType {
            queue: queue_name(queue_of(row, 2)?),
            task_type: text(row, 0)?,
            tasks: row.try_get::<i64, _>(1)?.unsigned_abs(),
        })
    };
    rows.iter().map(counted).collect()
}

impl MySql {
    pub(super) async fn task_of(&self, name: Name) -> Result<Option<Task>> {
        const GET: &str = concat!("SELECT ", task_columns!(), " FROM laelaps_task AS t", beside!(), " WHERE t.`key` = ?");
        const BY_ID: &str = concat!("SELECT ", task_columns!(), " FROM laelaps_task AS t", beside!(), " WHERE t.id = ?");
        self.runner
            .read_together("reading a task", move |session| {
                let query = match &name {
                    Name::Key(key) => sqlx::query(GET).bind(key.as_bytes().to_vec()),
                    Name::Id(id) => sqlx::query(BY_ID).bind(id.0),
                };
                Box::pin(async move {
                    let row = query.fetch_optional(session.db()).await?;
                    let mut found: Vec<Task> = row.iter().map(task).collect::<Result<_, _>>()?;
                    if !found.is_empty() {
                        with_data(session, &mut found).await?;
                    }
                    Ok(found.pop())
                })
            })
            .await
    }

    pub(super) async fn attempts_of(&self, key: &str) -> Result<Vec<AttemptRecord>> {
        let key = key.as_bytes().to_vec();
        self.runner
            .read_together("reading attempts", move |session| {
                let key = key.clone();
                Box::pin(async move { attempts(session, key).await })
            })
            .await
    }

    /// The keys of held tasks with this prefix.
    pub(super) async fn held_keys(&self, prefix: &str) -> Result<Vec<String>> {
        let prefix = prefix.to_owned();
        self.runner
            .read_together("reading held tasks", move |session| {
                let (first, end) = (prefix.as_bytes().to_vec(), successor(&prefix));
                Box::pin(async move {
                    let query = sqlx::query(HELD).bind(NewTask::HELD_AT.0).bind(first).bind(end).bind(PAGE_MAX);
                    let rows = query.fetch_all(session.db()).await?;
                    Ok(rows.iter().map(|row| text(row, 0)).collect::<Result<_, sqlx::Error>>()?)
                })
            })
            .await
    }

    /// Whether a task with this prefix waits or runs.
    pub(super) async fn any_unsettled(&self, prefix: &str) -> Result<bool> {
        let doing = "looking for tasks that are not settled";
        let query = || sqlx::query(UNSETTLED).bind(prefix.as_bytes().to_vec()).bind(successor(prefix));
        let found = self.read(doing, query).await?;
        found.try_get(0).map_err(|error| self.runner.place.worded(error, doing))
    }

    pub(super) async fn count_types(&self) -> Result<Vec<QueuedType>> {
        self.runner.read_together("counting tasks by type", |session| Box::pin(async move { types(session).await })).await
    }

    pub(super) async fn count_all(&self) -> Result<Stats> {
        self.runner.read_together("counting tasks", |session| Box::pin(async move { stats(session).await })).await
    }
}

impl MySql {
    /// How many follow-ups of a root have not ended, other than one task; at most `limit`.
    pub(super) async fn count_relatives(&self, root: TaskId, task: TaskId, limit: u32) -> Result<u32> {
        const RELATIVES: &str =
            "SELECT COUNT(*) FROM (SELECT 1 FROM laelaps_descendant WHERE root = ? AND task <> ? LIMIT ?) AS first";
        let doing = "counting follow-ups";
        let row = self.read(doing, || sqlx::query(RELATIVES).bind(root.0).bind(task.0).bind(limit)).await?;
        let counted: i64 = row.try_get(0).map_err(|error| self.runner.place.worded(error, doing))?;
        Ok(u32::try_from(counted).unwrap_or(limit))
    }
}
