//! What is scheduled and has become due is moved to where it is claimed.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sqlx::Row as _;

use super::accounts::{Changes, Waiting};
use super::choose::Ready;
use super::failure::Failure;
use super::mend::{Spot, mend, queue_of, user_of};
use super::rows::{ids, json, lockable, places};
use super::session::Session;

/// Tasks whose time has come that one claim moves over.
const DUE_MAX: i64 = 1_000;

pub(super) const DUE: &str =
    "SELECT run_at, task FROM laelaps_scheduled WHERE run_at >= ? AND run_at <= ? ORDER BY run_at, task LIMIT ?";

pub(super) const DUE_TASKS: &str = concat!(
    "SELECT t.id, t.state = 'waiting', t.run_at, t.user, t.max_running, t.alone, t.priority, t.queue FROM ",
    lockable!(ids!()),
    " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id FOR UPDATE SKIP LOCKED"
);

pub(super) const STILL_DUE: &str = concat!(
    "SELECT r.run_at, r.task FROM ",
    lockable!(places!()),
    " STRAIGHT_JOIN laelaps_scheduled AS r FORCE INDEX (PRIMARY) ON r.run_at = s.at AND r.task = s.task FOR UPDATE"
);

pub(super) const OUT_OF_SCHEDULED: &str = concat!(
    "DELETE r FROM ",
    places!(),
    " STRAIGHT_JOIN laelaps_scheduled AS r FORCE INDEX (PRIMARY) ON r.run_at = s.at AND r.task = s.task"
);

/// Whoever moves a task holds its row first, as everybody does who takes it from where it waits: else it could be moved to where another one
/// has looked for it before. What others hold is left to them.
pub(super) async fn move_due(session: &mut Session<'_>, start: Ready) -> Result<(Duration, Option<Ready>), Failure> {
    const GONE: &str =
        concat!("SELECT s.id FROM ", ids!(), " WHERE NOT EXISTS (SELECT 1 FROM laelaps_task AS t WHERE t.id = s.id)");
    let now = session.now;
    let started = Instant::now();
    let due: Vec<(i64, i64)> = sqlx::query_as(DUE).bind(start.0).bind(now).bind(DUE_MAX).fetch_all(session.db()).await?;
    let took = started.elapsed();
    let Some(last) = due.last().copied() else { return Ok((took, None)) };
    let mut tasks: Vec<i64> = due.iter().map(|(_, task)| *task).collect();
    tasks.sort_unstable();
    let mut found: HashMap<i64, (bool, Waiting)> = HashMap::with_capacity(due.len());
    for row in sqlx::query(DUE_TASKS).bind(json(tasks)).fetch_all(session.db()).await? {
        let waiting = Waiting {
            task: row.try_get(0)?,
            run_at: row.try_get(2)?,
            priority: row.try_get(6)?,
            queue: queue_of(&row, 7)?,
            user: user_of(&row, 3)?,
            max_running: row.try_get(4)?,
            alone: row.try_get(5)?,
        };
        found.insert(waiting.task, (row.try_get(1)?, waiting));
    }
    let missing = json(due.iter().map(|(_, task)| *task).filter(|task| !found.contains_key(task)));
    let gone: Vec<i64> =
        if missing == "[]" { Vec::new() } else { sqlx::query_scalar(GONE).bind(missing).fetch_all(session.db()).await? };
    let ours: Vec<(i64, i64)> = due.into_iter().filter(|(_, task)| found.contains_key(task) || gone.contains(task)).collect();
    if ours.is_empty() {
        return Ok((took, Some(last)));
    }
    let still: Vec<(i64, i64)> = sqlx::query_as(STILL_DUE).bind(json(&ours)).fetch_all(session.db()).await?;
    let (right, wrong): (Vec<Ready>, Vec<Ready>) = still
        .into_iter()
        .partition(|(run_at, task)| found.get(task).is_some_and(|(waits, task)| *waits && task.run_at == *run_at));
    sqlx::query(OUT_OF_SCHEDULED).bind(json(&right)).execute(session.db()).await?;
    let waiting: Vec<Waiting> = right.iter().filter_map(|(_, task)| found.remove(task)).map(|(_, waiting)| waiting).collect();
    let mut changes = Changes::default();
    changes.enqueue(session, &waiting).await?;
    let wrong: Vec<Spot> = wrong.into_iter().map(|(run_at, task)| Spot::anywhere(run_at, task)).collect();
    mend(session, &wrong, &mut changes).await?;
    changes.write(session).await?;
    Ok((took, Some(last)))
}
