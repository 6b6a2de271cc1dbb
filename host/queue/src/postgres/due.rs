//! What has become due moves to where it can be claimed.

use super::failure::Failure;
use super::mark::From;
use super::mend;
use super::session::Session;

/// Tasks whose time has come that one claim moves over.
const DUE_MAX: i64 = 1_000;

/// Move tasks out of some places, which nobody else has locked, to where they can be claimed. A task's row is as its place says: whoever changes it
/// takes the place away first. If somebody did not, the row is right: the task goes where it belongs, and what does not wait goes nowhere.
macro_rules! move_out {
    ($places:literal, $scheduled:literal) => {
        concat!(
            "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    due AS (
        DELETE FROM laelaps.",
            $places,
            " RETURNING task),
    found AS MATERIALIZED (
        SELECT id, run_at, turn, bytes, max_running, user_name, queue, type, alone, run_at <= (SELECT now FROM clock) AS is_due
        FROM laelaps.task WHERE id = ANY(ARRAY(SELECT task FROM due)) AND state = 'waiting'),
    moved AS MATERIALIZED (SELECT * FROM found WHERE is_due),
    back AS (
        INSERT INTO laelaps.scheduled (run_at, task) SELECT run_at, id FROM found WHERE NOT is_due ON CONFLICT DO NOTHING RETURNING task),
    ready AS (
        INSERT INTO laelaps.ready (turn, task, bytes, max_running, user_name, queue)
        SELECT turn, id, bytes, max_running, user_name, queue FROM moved WHERE NOT alone ON CONFLICT DO NOTHING),
    suspect AS (INSERT INTO laelaps.suspect (turn, task, queue) SELECT turn, id, queue FROM moved WHERE alone ON CONFLICT DO NOTHING),
    changed AS (
        INSERT INTO laelaps.account_change (user_name, queue, turn, task, max_running)
        SELECT DISTINCT ON (queue, user_name) user_name, queue, turn, id, max_running FROM moved WHERE user_name <> '' AND NOT alone
        ORDER BY queue, user_name, turn, id),
    counted AS (INSERT INTO laelaps.tally (type, queue, scheduled) SELECT type, queue, ",
            $scheduled,
            " GROUP BY type, queue),
    firsts AS MATERIALIZED (SELECT DISTINCT ON (queue) queue, turn, id FROM moved ORDER BY queue, turn, id)
    SELECT (SELECT min(run_at) FROM moved), ARRAY(SELECT queue FROM firsts ORDER BY queue), ARRAY(SELECT turn FROM firsts ORDER BY queue),
        ARRAY(SELECT id FROM firsts ORDER BY queue), CASE WHEN (SELECT count(*) FROM due) <> (SELECT count(*) FROM found)
        THEN ARRAY(SELECT task FROM due WHERE task NOT IN (SELECT id FROM found)) END"
        )
    };
}
pub(super) use move_out;

/// What [`move_out`] answers: the first moment of what can be claimed now, the first of each queue of it, and what does not wait.
pub(super) type Moved = (Option<i64>, Vec<String>, Vec<i64>, Vec<i64>, Option<Vec<i64>>);

/// Move what has become due to where it can be claimed.
pub(super) const MOVE_DUE: &str = move_out!(
    "scheduled WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM laelaps.scheduled WHERE run_at >= $1 AND run_at <= (SELECT now FROM clock)
            ORDER BY run_at, task LIMIT $2 FOR UPDATE SKIP LOCKED))",
    "-count(*) FROM moved"
);

/// Move what is due; the claim begins where it has to now.
pub(super) async fn move_due(session: &mut Session, from: &mut From) -> Result<(), Failure> {
    let moved: Moved = sqlx::query_as(MOVE_DUE).bind(from.due).bind(DUE_MAX).fetch_one(session.db()?).await?;
    if let Some(run_at) = moved.0 {
        session.shared.marks.moved_due(from, run_at);
    }
    if entered(session, moved) {
        session.shared.marks.begin_anew(from);
    }
    Ok(())
}

/// Look from where tasks have entered, and tell of what does not wait. Answers whether any have entered.
pub(super) fn entered(session: &Session, (run_at, queues, turns, tasks, strangers): Moved) -> bool {
    mend::told(strangers.as_deref().unwrap_or_default());
    for (queue, place) in queues.iter().zip(turns.into_iter().zip(tasks)) {
        session.shared.marks.lower(queue, place);
    }
    run_at.is_some()
}
