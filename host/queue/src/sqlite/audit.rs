//! Every table compared with every other, in one moment of the database.

use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::pieces::data_bytes;
use super::rows::{Columns, lossy};

/// The most findings, and the most of one rule.
const FINDINGS_MAX: usize = 1_000;

/// What has to hold between the tables at any moment between two transactions: in words, and a statement that names what breaks it.
const RULES: [(&str, &str); 22] = [
    ("the file is damaged", "SELECT integrity_check FROM pragma_integrity_check WHERE integrity_check <> 'ok'"),
    (
        "a waiting task must wait in exactly one place, any other in none",
        "WITH place (task, places) AS (SELECT task, count(*) FROM (SELECT task FROM ready UNION ALL SELECT task FROM scheduled
                UNION ALL SELECT task FROM suspect UNION ALL SELECT task FROM unserved) GROUP BY task)
            SELECT 'task ' || id || ' is ' || state || ' and stands in ' || coalesce(places, 0) FROM task LEFT JOIN place ON place.task = id
            WHERE coalesce(places, 0) <> (state = 'waiting')",
    ),
    (
        "ready does not fit its task",
        "SELECT 'task ' || ready.task FROM ready LEFT JOIN task ON task.id = ready.task AND task.queue = ready.queue AND task.user = ready.user
                AND task.turn = ready.turn AND task.max_running IS ready.max_running AND NOT task.alone WHERE task.id IS NULL",
    ),
    (
        "scheduled does not fit its task",
        "SELECT 'task ' || scheduled.task FROM scheduled LEFT JOIN task ON task.id = scheduled.task AND task.run_at = scheduled.run_at
            WHERE task.id IS NULL",
    ),
    (
        "suspect does not fit its task",
        "SELECT 'task ' || suspect.task FROM suspect LEFT JOIN task ON task.id = suspect.task AND task.turn = suspect.turn AND task.alone
            WHERE task.id IS NULL",
    ),
    (
        "unserved does not fit its task",
        "SELECT 'task ' || unserved.task FROM unserved LEFT JOIN task ON task.id = unserved.task AND task.queue = unserved.queue
                AND task.type = unserved.type AND task.user = unserved.user AND task.turn = unserved.turn WHERE task.id IS NULL",
    ),
    (
        "the account does not count what is ready and what runs",
        "WITH counted (queue, user, ready, running) AS (SELECT queue, user, sum(ready), sum(running) FROM (
                SELECT queue, user, count(*) AS ready, 0 AS running FROM ready GROUP BY queue, user
                UNION ALL SELECT queue, user, 0, count(*) FROM task WHERE state = 'running' GROUP BY queue, user) GROUP BY queue, user)
            SELECT 'user ' || account.user || CASE account.queue WHEN '' THEN '' ELSE ' in queue ' || account.queue END || ': ' || account.ready || ' ready and ' || account.running || ' running, '
                    || coalesce(counted.ready, 0) || ' and ' || coalesce(counted.running, 0) || ' found'
                FROM account LEFT JOIN counted ON counted.queue = account.queue AND counted.user = account.user
                WHERE account.ready <> coalesce(counted.ready, 0) OR account.running <> coalesce(counted.running, 0)
            UNION ALL SELECT 'user ' || user || CASE queue WHEN '' THEN '' ELSE ' in queue ' || queue END || ' has none' FROM counted
                WHERE (queue, user) NOT IN (SELECT queue, user FROM account)",
    ),
    (
        "the account does not know its first ready task",
        "SELECT 'user ' || user || CASE queue WHEN '' THEN '' ELSE ' in queue ' || queue END FROM account WHERE head_task IS NOT
            (SELECT task FROM ready WHERE ready.queue = account.queue AND ready.user = account.user ORDER BY turn, task LIMIT 1)
            OR head_turn IS NOT (SELECT turn FROM ready WHERE ready.queue = account.queue AND ready.user = account.user ORDER BY turn, task LIMIT 1)
            OR head_max IS NOT
            (SELECT max_running FROM ready WHERE ready.queue = account.queue AND ready.user = account.user ORDER BY turn, task LIMIT 1)",
    ),
    ("an idle user has an account", "SELECT 'user ' || user || CASE queue WHEN '' THEN '' ELSE ' in queue ' || queue END FROM account WHERE ready = 0 AND running = 0 AND (queue <> '' OR user <> '')"),
    (
        "types are counted wrongly",
        "SELECT 'type ' || type || CASE queue WHEN '' THEN '' ELSE ' in queue ' || queue END
                FROM (SELECT queue, type, count(*) AS tasks FROM task WHERE state IN ('waiting', 'running') GROUP BY queue, type) AS counted
            WHERE tasks IS NOT (SELECT tasks FROM tally WHERE what = 'type' AND tally.queue = counted.queue AND name = counted.type)
            UNION ALL SELECT 'type ' || name || CASE queue WHEN '' THEN '' ELSE ' in queue ' || queue END FROM tally WHERE what = 'type' AND (queue, name) NOT IN
                (SELECT queue, type FROM task WHERE state IN ('waiting', 'running'))",
    ),
    (
        "ended tasks are counted wrongly",
        "SELECT state FROM (SELECT state, count(*) AS tasks FROM task WHERE finished_at IS NOT NULL GROUP BY state) AS counted
            WHERE tasks IS NOT (SELECT tasks FROM tally WHERE what = 'ended' AND name = counted.state)
            UNION ALL SELECT name FROM tally WHERE what = 'ended' AND name NOT IN (SELECT state FROM task WHERE finished_at IS NOT NULL)",
    ),
    (
        "nothing will remove the ended task",
        "SELECT 'task ' || id FROM task WHERE retained_until IS NOT NULL AND (retained_until, id) NOT IN
            (SELECT retention.until, json_each.value FROM retention,
                json_each(CASE WHEN json_valid(retention.tasks) THEN retention.tasks ELSE '[]' END))",
    ),
    ("a row of retention cannot be read", "SELECT 'row ' || id FROM retention WHERE NOT json_valid(tasks)"),
    (
        "something stands beside a task that is gone",
        "SELECT DISTINCT name || ' of task ' || task FROM (SELECT 'task_data' AS name, task FROM task_data
            UNION ALL SELECT 'task_data_piece', task FROM task_data_piece
            UNION ALL SELECT 'output', task FROM output UNION ALL SELECT 'failure', task FROM failure
            UNION ALL SELECT 'progress', task FROM progress UNION ALL SELECT 'attempt', task FROM attempt
            UNION ALL SELECT 'descendant', task FROM descendant) WHERE task NOT IN (SELECT id FROM task)",
    ),
    ("a task has no data", "SELECT 'task ' || id FROM task WHERE state IN ('waiting', 'running') AND id NOT IN (SELECT task FROM task_data)"),
    (
        "the data is not as it is stored",
        concat!(
            "SELECT 'task ' || task FROM task_data JOIN task ON task.id = task_data.task WHERE state IN ('waiting', 'running')
            AND (typeof(data) NOT IN ('text', 'blob', 'null') OR bytes NOT BETWEEN 0 AND 16777216
                OR ",
            data_bytes!(),
            " IS NULL OR ",
            data_bytes!(),
            " > 17825792 OR (typeof(data) = 'text' AND octet_length(data) <> bytes))"
        ),
    ),
    (
        "a lease is newer than the last one given out, or was given out twice",
        "SELECT 'task ' || task.id FROM task, counter WHERE task.lease > counter.lease
            UNION ALL SELECT 'lease ' || lease FROM task WHERE lease > 0 GROUP BY lease HAVING count(*) > 1",
    ),
    ("no lease can be given out", "SELECT 'counter is empty' WHERE NOT EXISTS (SELECT 1 FROM counter)"),
    (
        "a count is out of its range",
        "SELECT 'task ' || id FROM task WHERE attempts NOT BETWEEN 0 AND 4294967295 OR releases NOT BETWEEN 0 AND 4294967295
            OR lost NOT BETWEEN 0 AND 4294967295 OR lost_alone NOT BETWEEN 0 AND 4294967295 OR depth NOT BETWEEN 0 AND 4294967295
            OR max_running NOT BETWEEN 0 AND 4294967295 OR max_attempts NOT BETWEEN 1 AND 4294967295 OR alone NOT IN (0, 1)
            OR (lost > 0) <> (lost_at IS NOT NULL) OR priority NOT BETWEEN -100 AND 100",
    ),
    (
        "a follow-up counts for its root until it ends, and nothing else does",
        "SELECT 'task ' || id FROM task LEFT JOIN descendant ON descendant.task = id
            WHERE CASE WHEN state IN ('waiting', 'running') THEN task.root END IS NOT descendant.root",
    ),
    (
        "something names a plugin version that is not known",
        "SELECT DISTINCT name || ' names version ' || plugin FROM (SELECT 'host_running' AS name, plugin FROM host_running
            UNION ALL SELECT 'plugin_death', plugin FROM plugin_death UNION ALL SELECT 'host_plugin', plugin FROM host_plugin)
            WHERE plugin NOT IN (SELECT id FROM plugin_version)",
    ),
    (
        "a host runs something although it is gone",
        "SELECT DISTINCT 'host ' || host FROM (SELECT host FROM host_running UNION ALL SELECT host FROM task WHERE state = 'running')
            WHERE coalesce(host, 0) NOT IN (SELECT id FROM host WHERE ended_at IS NULL)",
    ),
];

/// Names that have to be looked at: all but those of ASCII, and of queues those that cannot be.
const NAMES: &str = "SELECT id, key, type, user, queue FROM task
    WHERE id > ?1 AND (key GLOB '*[^ -~]*' OR type GLOB '*[^ -~]*' OR user GLOB '*[^ -~]*'
        OR queue GLOB '*[^-A-Za-z0-9_.:/]*' OR octet_length(queue) > 64 OR queue = 'default') ORDER BY id LIMIT ?2";
/// So many are read at once.
const NAMES_MAX: i64 = 10_000;

/// Each contradiction in words.
pub(super) async fn audit(readers: &SqlitePool) -> Result<Vec<String>, sqlx::Error> {
    let mut findings = Vec::new();
    let mut reading = readers.begin().await?;
    for (rule, sql) in RULES {
        let sql = format!("WITH finding (words) AS ({sql}) SELECT CAST(words AS BLOB) FROM finding LIMIT {FINDINGS_MAX}");
        let found: Vec<Option<Vec<u8>>> = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_all(&mut *reading).await?;
        findings.extend(found.iter().map(|found| format!("{rule}: {}", lossy(found.as_deref().unwrap_or(b"somewhere")))));
    }
    let mut after = i64::MIN;
    loop {
        let rows = sqlx::query(NAMES).bind(after).bind(NAMES_MAX).fetch_all(&mut *reading).await?;
        let Some(last) = rows.last() else { break };
        after = Columns::of(last).whole(0, "number");
        findings.extend(rows.iter().filter_map(unreadable));
        if findings.len() >= FINDINGS_MAX {
            break;
        }
    }
    findings.truncate(FINDINGS_MAX);
    Ok(findings)
}

fn unreadable(row: &SqliteRow) -> Option<String> {
    let mut columns = Columns::of(row);
    let task = columns.whole(0, "number");
    for (at, name) in [(1, "key"), (2, "type"), (3, "user")] {
        columns.text(at, name);
    }
    columns.queue(4);
    columns.problem().map(|problem| format!("a row cannot be read: task {task}, {problem}"))
}
