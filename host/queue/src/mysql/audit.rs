//! Every table compared with every other, as of one moment. Each statement names what breaks its rule.

use std::collections::BTreeMap;

use sqlx::Row as _;

use super::MySql;
use super::connect::text;
use super::failure::Failure;
use super::mend::{is_no_queue, queue_of};
use super::session::Session;
use crate::Result;
use crate::task::queue_name;

/// The most findings.
const FINDINGS_MAX: usize = 1_000;

/// A rule, in words, and what breaks it: a list of names with numbers, with LIMIT at its end.
const RULES: [(&str, &str); 18] = [
    (
        "a waiting task stands in exactly one place, any other in none",
        "SELECT CONCAT('task ', t.id, ', ', t.state, ', in ', COUNT(p.task)) FROM laelaps_task AS t LEFT JOIN (
                SELECT task FROM laelaps_ready UNION ALL SELECT task FROM laelaps_ready_of_user
                UNION ALL SELECT task FROM laelaps_scheduled UNION ALL SELECT task FROM laelaps_suspect
                UNION ALL SELECT task FROM laelaps_unserved) AS p ON p.task = t.id
            GROUP BY t.id, t.state HAVING (t.state = 'waiting') <> COUNT(p.task) LIMIT ?",
    ),
    (
        "a place names a task as its row is",
        "SELECT what FROM (
            SELECT CONCAT('task ', r.task, ' in laelaps_ready') AS what FROM laelaps_ready AS r LEFT JOIN laelaps_task AS t ON t.id = r.task
                AND t.queue = r.queue AND t.user = '' AND t.turn = r.turn AND t.max_running <=> r.max_running AND NOT t.alone WHERE t.id IS NULL
            UNION ALL SELECT CONCAT('task ', r.task, ' in laelaps_ready_of_user') FROM laelaps_ready_of_user AS r
                LEFT JOIN laelaps_task AS t ON t.id = r.task AND t.queue = r.queue AND t.user = r.user AND t.user <> '' AND t.turn = r.turn
                AND t.max_running <=> r.max_running AND NOT t.alone WHERE t.id IS NULL
            UNION ALL SELECT CONCAT('task ', r.task, ' in laelaps_scheduled') FROM laelaps_scheduled AS r
                LEFT JOIN laelaps_task AS t ON t.id = r.task AND t.run_at = r.run_at WHERE t.id IS NULL
            UNION ALL SELECT CONCAT('task ', r.task, ' in laelaps_suspect') FROM laelaps_suspect AS r
                LEFT JOIN laelaps_task AS t ON t.id = r.task AND t.queue = r.queue AND t.turn = r.turn AND t.alone WHERE t.id IS NULL
            UNION ALL SELECT CONCAT('task ', r.task, ' in laelaps_unserved') FROM laelaps_unserved AS r LEFT JOIN laelaps_task AS t ON t.id = r.task
                AND t.queue = r.queue AND t.type = r.type AND t.user = r.user AND t.turn = r.turn WHERE t.id IS NULL) AS found LIMIT ?",
    ),
    (
        "an account and its changes count what runs",
        "SELECT CONCAT('user ', user, ' in queue ', IF(queue = '', 'default', queue), ', off by ', SUM(running)) FROM (
                SELECT queue, user, running FROM laelaps_account UNION ALL SELECT queue, user, running FROM laelaps_account_change
                UNION ALL SELECT queue, user, -1 FROM laelaps_task WHERE state = 'running' AND user <> '') AS parts
            GROUP BY queue, user HAVING SUM(running) <> 0 LIMIT ?",
    ),
    (
        "whoever has ready tasks has an account or a change",
        "SELECT CONCAT('user ', user, ' in queue ', IF(queue = '', 'default', queue)) FROM (SELECT DISTINCT queue, user FROM laelaps_ready_of_user) AS r
            WHERE (queue, user) NOT IN (SELECT queue, user FROM laelaps_account)
                AND (queue, user) NOT IN (SELECT queue, user FROM laelaps_account_change) LIMIT ?",
    ),
    (
        "an account without changes knows its first ready task",
        "SELECT CONCAT('user ', a.user, ' in queue ', IF(a.queue = '', 'default', a.queue)) FROM laelaps_account AS a
            WHERE (a.queue, a.user) NOT IN (SELECT queue, user FROM laelaps_account_change) AND NOT (a.head_task <=>
                (SELECT r.task FROM laelaps_ready_of_user AS r WHERE r.queue = a.queue AND r.user = a.user
                ORDER BY r.turn, r.task LIMIT 1)) LIMIT ?",
    ),
    (
        "an idle user has no account",
        "SELECT CONCAT('user ', user, ' in queue ', IF(queue = '', 'default', queue)) FROM laelaps_account
            WHERE head_task IS NULL AND running = 0 AND user <> ''
            AND (queue, user) NOT IN (SELECT queue, user FROM laelaps_account_change) LIMIT ?",
    ),
    (
        "ended and running tasks are counted",
        "SELECT CONCAT(name, ', off by ', SUM(tasks)) FROM (
                SELECT IF(what = 'running', 'running', name) AS name, tasks FROM laelaps_tally WHERE what IN ('ended', 'running')
                UNION ALL SELECT CAST(state AS CHAR), -1 FROM laelaps_task WHERE state <> 'waiting') AS parts
            GROUP BY name HAVING SUM(tasks) <> 0 LIMIT ?",
    ),
    (
        "a running task is looked at by the end of its lease",
        "SELECT CONCAT('task ', t.id) FROM laelaps_task AS t WHERE t.state = 'running' AND NOT EXISTS (SELECT 1 FROM laelaps_claim AS c
            WHERE c.id = t.lease DIV 1048576 AND c.host = t.host AND IF(JSON_VALID(c.tasks), JSON_CONTAINS(c.tasks, CAST(t.id AS CHAR)), 0)) LIMIT ?",
    ),
    (
        "a task says by its state whether it has a lease, an end and losses",
        "SELECT CONCAT('task ', id) FROM laelaps_task WHERE (state = 'running') <> (until <> 0)
            OR (state IN ('finished', 'failed', 'cancelled')) <> (finished_at <> 0) OR (finished_at = 0) <> (retained_until = 0)
            OR (lost = 0) <> (lost_at = 0) OR state = 0 LIMIT ?",
    ),
    (
        "a priority is from -100 to 100",
        "SELECT CONCAT('task ', id) FROM laelaps_task WHERE priority NOT BETWEEN -100 AND 100 LIMIT ?",
    ),
    (
        "an ended task will be removed",
        "SELECT CONCAT('task ', t.id) FROM laelaps_task AS t LEFT JOIN (SELECT r.until, s.id FROM laelaps_retention AS r
                STRAIGHT_JOIN JSON_TABLE(IF(JSON_VALID(r.tasks), r.tasks, '[]'), '$[*]' COLUMNS (id BIGINT PATH '$')) AS s) AS kept
            ON kept.id = t.id AND kept.until = t.retained_until WHERE t.retained_until <> 0 AND kept.id IS NULL LIMIT ?",
    ),
    (
        "what ended otherwise than finished is noted, and nothing else",
        "SELECT CONCAT('task ', t.id) FROM laelaps_task AS t LEFT JOIN laelaps_set_aside AS a ON a.task = t.id
            WHERE IF(t.state IN ('failed', 'cancelled'), CAST(t.state AS CHAR), NULL) <=> CAST(a.state AS CHAR) = 0 LIMIT ?",
    ),
    (
        "nothing stands beside a task that is gone",
        "SELECT CONCAT('task ', task, ' in ', name) FROM (SELECT 'laelaps_task_data' AS name, task FROM laelaps_task_data
            UNION SELECT 'laelaps_output', task FROM laelaps_output UNION SELECT 'laelaps_failure', task FROM laelaps_failure
            UNION SELECT 'laelaps_progress', task FROM laelaps_progress UNION SELECT 'laelaps_set_aside', task FROM laelaps_set_aside
            UNION SELECT 'laelaps_attempt', task FROM laelaps_attempt UNION SELECT 'laelaps_descendant', task FROM laelaps_descendant)
            AS beside WHERE task NOT IN (SELECT id FROM laelaps_task) LIMIT ?",
    ),
    (
        "a task has data",
        "SELECT CONCAT('task ', t.id) FROM laelaps_task AS t LEFT JOIN laelaps_task_data AS d ON d.task = t.id AND d.part = 0
            WHERE d.task IS NULL LIMIT ?",
    ),
    (
        "no lease was given out twice",
        "SELECT CONCAT('lease ', lease, ' of task ', MIN(id)) FROM laelaps_task WHERE lease > 0 GROUP BY lease HAVING COUNT(*) > 1 LIMIT ?",
    ),
    (
        "a follow-up counts for its root until it ends, and nothing else does",
        "SELECT CONCAT('task ', t.id) FROM laelaps_task AS t LEFT JOIN laelaps_descendant AS d ON d.task = t.id
            WHERE NOT (IF(t.state IN ('waiting', 'running'), t.root, NULL) <=> d.root) LIMIT ?",
    ),
    (
        "a sign of life is of a host that has not ended",
        "SELECT CONCAT('host ', s.host) FROM laelaps_host_sign AS s LEFT JOIN laelaps_host AS h ON h.id = s.host AND h.ended_at = 0
            WHERE h.id IS NULL LIMIT ?",
    ),
    (
        "a host that has ended runs no plugin version",
        "SELECT CONCAT('host ', r.host) FROM laelaps_host_running AS r LEFT JOIN laelaps_host AS h ON h.id = r.host AND h.ended_at = 0
            WHERE h.id IS NULL LIMIT ?",
    ),
];

impl MySql {
    pub(super) async fn compare_tables(&self) -> Result<Vec<String>> {
        self.runner.read_together("comparing the tables", |session| Box::pin(async move { compare(session).await })).await
    }
}

async fn compare(session: &mut Session<'_>) -> Result<Vec<String>, Failure> {
    let mut findings = Vec::new();
    for (rule, sql) in RULES {
        let room = FINDINGS_MAX.saturating_sub(findings.len());
        if room == 0 {
            break;
        }
        let rows = sqlx::query(sql).bind(super::rows::count(room)).fetch_all(session.db()).await?;
        for row in &rows {
            findings.push(format!("{rule}: {}", text(row, 0)?));
        }
    }
    findings.extend(types(session).await?);
    findings.extend(unreadable(session).await?);
    findings.truncate(FINDINGS_MAX);
    Ok(findings)
}

/// Types are counted by their names as they are shown, so that one that cannot be read is counted as well.
async fn types(session: &mut Session<'_>) -> Result<Vec<String>, Failure> {
    const TYPES: &str = "SELECT queue, name, CAST(SUM(tasks) AS SIGNED) FROM (
            SELECT queue, name, tasks FROM laelaps_tally WHERE what = 'type'
            UNION ALL SELECT queue, type, -1 FROM laelaps_task WHERE state IN ('waiting', 'running')) AS parts
        GROUP BY queue, name HAVING SUM(tasks) <> 0";
    let mut sums: BTreeMap<(String, String), i64> = BTreeMap::new();
    for row in sqlx::query(TYPES).fetch_all(session.db()).await? {
        *sums.entry((queue_of(&row, 0)?, text(&row, 1)?)).or_default() += row.try_get::<i64, _>(2)?;
    }
    let off = sums.into_iter().filter(|(_, tasks)| *tasks != 0);
    let words = |((queue, name), tasks)| format!("types are counted: {name} in queue {}, off by {tasks}", queue_name(queue));
    Ok(off.map(words).collect())
}

/// Waiting and running tasks whose names are not text, or whose queue is none.
async fn unreadable(session: &mut Session<'_>) -> Result<Vec<String>, Failure> {
    const NAMES: &str = "SELECT id FROM laelaps_task WHERE state IN ('waiting', 'running') AND NOT COALESCE(
            CAST(CONVERT(`key` USING utf8mb4) AS BINARY) = `key` AND CAST(CONVERT(type USING utf8mb4) AS BINARY) = type
            AND CAST(CONVERT(user USING utf8mb4) AS BINARY) = user, 0) LIMIT 1000";
    const QUEUES: &str =
        concat!("SELECT t.id FROM laelaps_task AS t WHERE t.state IN ('waiting', 'running') AND ", is_no_queue!(), " LIMIT 1000");
    let names: Vec<i64> = sqlx::query_scalar(NAMES).fetch_all(session.db()).await?;
    let queues: Vec<i64> = sqlx::query_scalar(QUEUES).fetch_all(session.db()).await?;
    let names = names.into_iter().map(|task| format!("names are text in UTF-8: task {task}"));
    let queues = queues.into_iter().map(|task| format!("a queue's name is one that can be submitted: task {task}"));
    Ok(names.chain(queues).collect())
}
