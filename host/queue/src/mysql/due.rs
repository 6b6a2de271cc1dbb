//! What is scheduled and has become due is moved to where it is claimed; and how tasks are moved there from other places.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;

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
    "SELECT t.id, t.state = 'waiting', t.run_at, t.user, t.max_running, t.alone, t.priority, t.queue, t.type FROM ",
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

/// A task as its row is, which is held.
pub(super) struct Held {
    waits: bool,
    /// Readable or not.
    pub(super) task_type: Vec<u8>,
    pub(super) waiting: Waiting,
}

/// Where a task stands before it is moved to where it is claimed.
pub(super) trait Standing: Sized + Send + Sync {
    /// Holds those that are there, of a set of [`Standing::row`]s.
    const STILL: &str;
    /// Takes out a set of them.
    const OUT: &str;

    fn read(row: &MySqlRow) -> Result<Self, sqlx::Error>;

    /// For JSON.
    fn row(&self) -> impl serde::Serialize;

    fn at(&self) -> i64;

    fn task(&self) -> i64;

    /// Whether a task that waits stands here.
    fn is_of(&self, held: &Held) -> bool;
}

impl Standing for Ready {
    const STILL: &str = STILL_DUE;
    const OUT: &str = OUT_OF_SCHEDULED;

    fn read(row: &MySqlRow) -> Result<Self, sqlx::Error> {
        Ok((row.try_get(0)?, row.try_get(1)?))
    }

    fn row(&self) -> impl serde::Serialize {
        *self
    }

    fn at(&self) -> i64 {
        self.0
    }

    fn task(&self) -> i64 {
        self.1
    }

    fn is_of(&self, held: &Held) -> bool {
        held.waiting.run_at == self.0
    }
}

pub(super) async fn move_due(session: &mut Session<'_>, start: Ready) -> Result<(Duration, Option<Ready>), Failure> {
    let now = session.now;
    let started = Instant::now();
    let due: Vec<Ready> = sqlx::query_as(DUE).bind(start.0).bind(now).bind(DUE_MAX).fetch_all(session.db()).await?;
    let took = started.elapsed();
    let last = due.last().copied();
    move_over(session, due).await?;
    Ok((took, last))
}

/// Move tasks from where they stand to where their rows say. Whoever moves a task holds its row first, as everybody does who takes it from where it
/// waits: else it could be moved to where another one has looked for it before. What others hold is left to them. Answers how many were moved.
pub(super) async fn move_over<S: Standing>(session: &mut Session<'_>, places: Vec<S>) -> Result<usize, Failure> {
    const GONE: &str =
        concat!("SELECT s.id FROM ", ids!(), " WHERE NOT EXISTS (SELECT 1 FROM laelaps_task AS t WHERE t.id = s.id)");
    let mut tasks: Vec<i64> = places.iter().map(Standing::task).collect();
    tasks.sort_unstable();
    tasks.dedup();
    let mut held = hold(session, &tasks).await?;
    let missing = json(tasks.iter().filter(|task| !held.contains_key(task)));
    let gone: Vec<i64> =
        if missing == "[]" { Vec::new() } else { sqlx::query_scalar(GONE).bind(missing).fetch_all(session.db()).await? };
    let ours = places.iter().filter(|place| held.contains_key(&place.task()) || gone.contains(&place.task()));
    let mut still: Vec<S> = Vec::new();
    for rows in session.chunks(ours.map(Standing::row)) {
        for row in sqlx::query(S::STILL).bind(rows).fetch_all(session.db()).await? {
            still.push(S::read(&row)?);
        }
    }
    for rows in session.chunks(still.iter().map(Standing::row)) {
        sqlx::query(S::OUT).bind(rows).execute(session.db()).await?;
    }
    let (right, wrong): (Vec<S>, Vec<S>) =
        still.into_iter().partition(|place| held.get(&place.task()).is_some_and(|held| held.waits && place.is_of(held)));
    let waiting: Vec<Waiting> = right.iter().filter_map(|place| held.remove(&place.task())).map(|held| held.waiting).collect();
    let mut changes = Changes::default();
    changes.enqueue(session, &waiting).await?;
    let wrong: Vec<Spot> = wrong.iter().map(|place| Spot::anywhere(place.at(), place.task())).collect();
    mend(session, &wrong, &mut changes).await?;
    changes.write(session).await?;
    Ok(waiting.len())
}

/// Take hold of tasks' rows, but for those that others hold.
async fn hold(session: &mut Session<'_>, tasks: &[i64]) -> Result<HashMap<i64, Held>, Failure> {
    let mut held = HashMap::with_capacity(tasks.len());
    for tasks in session.chunks(tasks) {
        for row in sqlx::query(DUE_TASKS).bind(tasks).fetch_all(session.db()).await? {
            let waiting = Waiting {
                task: row.try_get(0)?,
                run_at: row.try_get(2)?,
                priority: row.try_get(6)?,
                queue: queue_of(&row, 7)?,
                user: user_of(&row, 3)?,
                max_running: row.try_get(4)?,
                alone: row.try_get(5)?,
            };
            held.insert(waiting.task, Held { waits: row.try_get(1)?, task_type: row.try_get(8)?, waiting });
        }
    }
    Ok(held)
}
