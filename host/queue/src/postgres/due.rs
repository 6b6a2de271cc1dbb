//! What has become due moves to where it can be claimed.

use super::failure::Failure;
use super::mark::From;
use super::mend;
use super::session::Session;

/// Tasks whose time has come that one claim moves over.
const DUE_MAX: i64 = 1_000;

/// Move what has become due to where it can be claimed. A task's row is as its place says: whoever changes it takes the place away first. If
/// somebody did not, the row is right: the task goes where it belongs, and what does not wait goes nowhere.
pub(super) const MOVE_DUE: &str = "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    due AS (
        DELETE FROM laelaps.scheduled WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM laelaps.scheduled WHERE run_at >= $1 AND run_at <= (SELECT now FROM clock)
            ORDER BY run_at, task LIMIT $2 FOR UPDATE SKIP LOCKED))
        RETURNING task),
    found AS MATERIALIZED (
        SELECT id, run_at, turn, bytes, max_running, user_name, queue, type, alone, run_at <= (SELECT now FROM clock) AS is_due
        FROM laelaps.task WHERE id = ANY(ARRAY(SELECT task FROM due)) AND state = 'waiting'),
    moved AS MATERIALIZED (SELECT * FROM found WHERE is_due),
    back AS (INSERT INTO laelaps.scheduled (run_at, task) SELECT run_at, id FROM found WHERE NOT is_due ON CONFLICT DO NOTHING),
    ready AS (
        INSERT INTO laelaps.ready (turn, task, bytes, max_running, user_name, queue)
        SELECT turn, id, bytes, max_running, user_name, queue FROM moved WHERE NOT alone ON CONFLICT DO NOTHING),
    suspect AS (INSERT INTO laelaps.suspect (turn, task, queue) SELECT turn, id, queue FROM moved WHERE alone ON CONFLICT DO NOTHING),
    changed AS (
        INSERT INTO laelaps.account_change (user_name, queue, turn, task, max_running)
        SELECT DISTINCT ON (queue, user_name) user_name, queue, turn, id, max_running FROM moved WHERE user_name <> '' AND NOT alone
        ORDER BY queue, user_name, turn, id),
    counted AS (INSERT INTO laelaps.tally (type, queue, scheduled) SELECT type, queue, -count(*) FROM moved GROUP BY type, queue),
    firsts AS MATERIALIZED (SELECT DISTINCT ON (queue) queue, turn, id FROM moved ORDER BY queue, turn, id)
    SELECT (SELECT min(run_at) FROM moved), ARRAY(SELECT queue FROM firsts ORDER BY queue), ARRAY(SELECT turn FROM firsts ORDER BY queue),
        ARRAY(SELECT id FROM firsts ORDER BY queue), CASE WHEN (SELECT count(*) FROM due) <> (SELECT count(*) FROM found)
        THEN ARRAY(SELECT task FROM due WHERE task NOT IN (SELECT id FROM found)) END";

/// Move what is due; the claim begins where it has to now.
pub(super) async fn move_due(session: &mut Session, from: &mut From) -> Result<(), Failure> {
    type Moved = (Option<i64>, Vec<String>, Vec<i64>, Vec<i64>, Option<Vec<i64>>);
    let moved: Moved = sqlx::query_as(MOVE_DUE).bind(from.due).bind(DUE_MAX).fetch_one(session.db()?).await?;
    let (run_at, queues, turns, tasks, strangers) = moved;
    mend::told(strangers.as_deref().unwrap_or_default());
    let Some(run_at) = run_at else { return Ok(()) };
    let marks = &session.shared.marks;
    marks.moved_due(from, run_at);
    for (queue, place) in queues.iter().zip(turns.into_iter().zip(tasks)) {
        marks.lower(queue, place);
    }
    marks.begin_anew(from);
    Ok(())
}
