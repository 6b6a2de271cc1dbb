//! What has to hold between the tables at any moment between two transactions: each table against each other, in one moment of the database.

use std::time::Duration;

use super::failure::Failure;
use super::session::Session;

/// How long all of it may take.
pub(super) const TIME_MAX: Duration = Duration::from_secs(1_800);
/// The most findings.
const FINDINGS_MAX: usize = 1_000;

/// Tables are read as a whole here, not a row at a time.
const SETTINGS: &str = "SET LOCAL statement_timeout = 0; SET LOCAL enable_seqscan = on; SET LOCAL enable_bitmapscan = on;
    SET LOCAL enable_hashjoin = on; SET LOCAL enable_mergejoin = on";

/// Compare all tables; answers what contradicts, in words, each with its row's number.
pub(super) async fn audit(session: &mut Session) -> Result<Vec<String>, Failure> {
    session.begin_reading().await?;
    sqlx::raw_sql(SETTINGS).execute(session.db()?).await?;
    let mut findings = Vec::new();
    for (rule, sql) in RULES {
        let most = FINDINGS_MAX - findings.len();
        if most == 0 {
            break;
        }
        let broken: Vec<Option<String>> =
            sqlx::query_scalar(sql).bind(i64::try_from(most).unwrap_or(i64::MAX)).fetch_all(session.db()?).await?;
        findings.extend(broken.into_iter().map(|row| format!("{}: {rule}", row.unwrap_or_default())));
    }
    session.commit().await?;
    Ok(findings)
}

/// Each statement names what breaks its rule, at most $1.
const RULES: [(&str, &str); 23] = [
    (
        "a waiting task waits in exactly one place, any other in none",
        "SELECT 'task ' || id FROM laelaps.task LEFT JOIN (SELECT task, count(*) AS places FROM (SELECT task FROM laelaps.ready
                UNION ALL SELECT task FROM laelaps.scheduled UNION ALL SELECT task FROM laelaps.suspect
                UNION ALL SELECT task FROM laelaps.unserved) AS waits GROUP BY task) AS waits
            ON waits.task = task.id WHERE (state = 'waiting')::int <> coalesce(places, 0) LIMIT $1",
    ),
    (
        "a place names a task as it is",
        "SELECT 'ready ' || ready.task FROM laelaps.ready LEFT JOIN laelaps.task ON task.id = ready.task WHERE (task.queue = ready.queue AND task.user_name = ready.user_name
                AND task.turn = ready.turn AND task.max_running IS NOT DISTINCT FROM ready.max_running AND task.bytes = ready.bytes
                AND NOT task.alone) IS NOT TRUE
            UNION ALL SELECT 'scheduled ' || scheduled.task FROM laelaps.scheduled LEFT JOIN laelaps.task ON task.id = scheduled.task
                WHERE (task.run_at = scheduled.run_at) IS NOT TRUE
            UNION ALL SELECT 'suspect ' || suspect.task FROM laelaps.suspect LEFT JOIN laelaps.task ON task.id = suspect.task
                WHERE (task.turn = suspect.turn AND task.queue = suspect.queue AND task.alone) IS NOT TRUE
            UNION ALL SELECT 'unserved ' || unserved.task FROM laelaps.unserved LEFT JOIN laelaps.task ON task.id = unserved.task
                WHERE (task.queue = unserved.queue AND task.type = unserved.type AND task.user_name = unserved.user_name
                    AND task.turn = unserved.turn) IS NOT TRUE LIMIT $1",
    ),
    (
        "an account and its changes count what runs",
        "SELECT 'user ' || user_name || ' in queue ' || queue FROM (SELECT queue, user_name, running AS more FROM laelaps.account
                UNION ALL SELECT queue, user_name, -stopped FROM laelaps.account_change
                UNION ALL SELECT queue, user_name, -1 FROM laelaps.task WHERE state = 'running' AND user_name <> '') AS counted
            GROUP BY queue, user_name HAVING sum(more) <> 0 LIMIT $1",
    ),
    (
        "an account knows its first ready task, unless a change has still to be entered",
        "SELECT 'user ' || user_name || ' in queue ' || queue FROM (SELECT queue, user_name FROM laelaps.account
                UNION SELECT queue, user_name FROM laelaps.ready WHERE user_name <> '') AS users
            LEFT JOIN laelaps.account USING (queue, user_name)
            LEFT JOIN (SELECT DISTINCT ON (queue, user_name) queue, user_name, turn, task, max_running
                FROM laelaps.ready WHERE user_name <> '' ORDER BY queue, user_name, turn, task) AS first USING (queue, user_name)
            WHERE (head_turn, head_task, head_max) IS DISTINCT FROM (first.turn, first.task, first.max_running)
                AND NOT EXISTS (SELECT FROM laelaps.account_change AS change WHERE change.queue = users.queue
                    AND change.user_name = users.user_name AND task IS NOT NULL)
            LIMIT $1",
    ),
    (
        "an idle user has no account",
        "SELECT 'user ' || user_name || ' in queue ' || queue FROM laelaps.account WHERE running = 0 AND head_task IS NULL
            AND NOT EXISTS (SELECT FROM laelaps.account_change AS change WHERE change.queue = account.queue
                AND change.user_name = account.user_name) LIMIT $1",
    ),
    (
        "nobody has no account",
        "SELECT 'an account' FROM laelaps.account WHERE user_name = ''
            UNION ALL SELECT 'account_change ' || id FROM laelaps.account_change WHERE user_name = '' LIMIT $1",
    ),
    (
        "tasks are counted by type and queue",
        "SELECT 'type ' || type || ' in queue ' || queue FROM (SELECT type, queue, live, scheduled, finished, failed, cancelled FROM laelaps.tally
                UNION ALL SELECT type, queue, -(finished_at IS NULL)::int, 0, -(state = 'finished')::int, -(state = 'failed')::int,
                    -(state = 'cancelled')::int FROM laelaps.task
                UNION ALL SELECT type, task.queue, 0, -1, 0, 0, 0 FROM laelaps.scheduled JOIN laelaps.task ON task.id = scheduled.task) AS both_sides
            GROUP BY type, queue HAVING sum(live) <> 0 OR sum(scheduled) <> 0 OR sum(finished) <> 0 OR sum(failed) <> 0 OR sum(cancelled) <> 0 LIMIT $1",
    ),
    (
        "every ended task will be removed",
        "SELECT 'task ' || id FROM laelaps.task WHERE retained_until IS NOT NULL
            AND NOT EXISTS (SELECT FROM (SELECT unnest(tasks) AS id, until FROM laelaps.retention) AS kept
                WHERE kept.id = task.id AND kept.until = task.retained_until) LIMIT $1",
    ),
    (
        "a running task is in a claim of its host that is looked at when its lease ends",
        "SELECT 'task ' || task.id FROM laelaps.task LEFT JOIN (SELECT unnest(tasks) AS task, host, check_at FROM laelaps.claim) AS claimed
                ON claimed.task = task.id AND claimed.host = task.host AND claimed.check_at <= task.until
            WHERE state = 'running' AND claimed.task IS NULL LIMIT $1",
    ),
    (
        "nothing stands beside a task that is gone",
        "SELECT DISTINCT name || ' ' || task FROM (SELECT 'task_data' AS name, task FROM laelaps.task_data
            UNION ALL SELECT 'output', task FROM laelaps.output UNION ALL SELECT 'failure', task FROM laelaps.failure
            UNION ALL SELECT 'progress', task FROM laelaps.progress UNION ALL SELECT 'attempt', task FROM laelaps.attempt
            UNION ALL SELECT 'cancelled', task FROM laelaps.cancelled UNION ALL SELECT 'descendant', task FROM laelaps.descendant) AS beside
            WHERE NOT EXISTS (SELECT FROM laelaps.task WHERE task.id = beside.task) LIMIT $1",
    ),
    (
        "data stands in one place",
        "SELECT 'task ' || id FROM laelaps.task JOIN laelaps.task_data ON task_data.task = task.id WHERE task.data IS NOT NULL LIMIT $1",
    ),
    (
        "a task has data",
        "SELECT 'task ' || id FROM laelaps.task LEFT JOIN laelaps.task_data ON task_data.task = task.id
            WHERE task.data IS NULL AND task_data.task IS NULL AND state IN ('waiting', 'running') LIMIT $1",
    ),
    (
        "small data stands in the task",
        "SELECT 'task ' || task FROM laelaps.task_data WHERE octet_length(data) <= 256 LIMIT $1",
    ),
    (
        "a failed task tells why",
        "SELECT 'task ' || id FROM laelaps.task WHERE state = 'failed'
            AND NOT EXISTS (SELECT FROM laelaps.failure WHERE failure.task = task.id) LIMIT $1",
    ),
    (
        "cancelled tasks are listed, and no others",
        "SELECT 'task ' || id FROM laelaps.task LEFT JOIN laelaps.cancelled ON cancelled.task = task.id
            WHERE (state = 'cancelled') <> (cancelled.task IS NOT NULL) LIMIT $1",
    ),
    (
        "no lease is newer than the last one given out",
        "SELECT 'task ' || id FROM laelaps.task, laelaps.lease_number WHERE task.lease >> 20 > lease_number.last_value LIMIT $1",
    ),
    (
        "no lease was given out twice",
        "SELECT 'task ' || min(id) FROM laelaps.task WHERE lease > 0 GROUP BY lease HAVING count(*) > 1 LIMIT $1",
    ),
    (
        "a follow-up counts for its root until it ends, and nothing else does",
        "SELECT 'task ' || id FROM laelaps.task LEFT JOIN laelaps.descendant ON descendant.task = id
            WHERE CASE WHEN state IN ('waiting', 'running') THEN task.root END IS DISTINCT FROM descendant.root LIMIT $1",
    ),
    (
        "a first loss has a moment while there are losses",
        "SELECT 'task ' || id FROM laelaps.task WHERE (coalesce(lost, 0) > 0) <> (lost_at IS NOT NULL) LIMIT $1",
    ),
    (
        "a task runs alone only after losses",
        "SELECT 'task ' || id FROM laelaps.task WHERE state = 'waiting' AND alone AND coalesce(lost, 0) < 2 LIMIT $1",
    ),
    (
        "a host that runs something is here",
        "SELECT 'host ' || host FROM laelaps.host_running
            WHERE NOT EXISTS (SELECT FROM laelaps.host WHERE host.id = host_running.host AND ended_at IS NULL) LIMIT $1",
    ),
    (
        "a sign of life is of a host that has not ended",
        "SELECT 'host ' || host FROM laelaps.host_sign
            WHERE NOT EXISTS (SELECT FROM laelaps.host WHERE host.id = host_sign.host AND ended_at IS NULL) LIMIT $1",
    ),
    (
        "numbers are within their ranges",
        "SELECT 'task ' || id FROM laelaps.task WHERE attempts < 0 OR bytes NOT BETWEEN 0 AND 16777216 OR lost < 0 OR lost_alone < 0
            OR releases < 0 OR depth < 0 OR max_running NOT BETWEEN 0 AND 4294967295 OR max_attempts NOT BETWEEN 1 AND 4294967295
            OR octet_length(key) NOT BETWEEN 1 AND 255 OR octet_length(type) NOT BETWEEN 1 AND 255 OR octet_length(user_name) > 255
            OR queue = 'default' OR queue !~ '^[A-Za-z0-9_.:/-]{0,64}$' LIMIT $1",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The server looks through all that a `NOT IN (SELECT ...)` finds once for each row, as soon as it does not fit into `work_mem`: with a million
    /// tasks an audit took hours.
    #[test]
    fn no_rule_compares_every_row_with_every_other() {
        for (rule, sql) in RULES {
            assert!(!sql.contains("NOT IN (SELECT"), "{rule}: say NOT EXISTS");
        }
    }
}
