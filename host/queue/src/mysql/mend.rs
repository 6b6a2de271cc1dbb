//! Rows that contradict each other, or that cannot be read. Nothing of ours leaves such; hands, other programs and faults of earlier versions
//! do. Whoever meets one puts it right and says so with its number, so that it stops nobody.

use std::collections::HashMap;

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;

use super::MySql;
use super::accounts::{Changes, Owner, Waiting};
use super::claim::Broken;
use super::due::Standing;
use super::failure::Failure;
use super::rows::{ids, json, lockable, places};
use super::session::Session;
use super::unserved::{Apart, OUT_OF_UNSERVED};
use crate::task::{check_queue, stored_queue};
use crate::{Attempt, Event, FailureKind, HostId, Policy, Result, Settlement};

/// Rows of one unreadable user that are looked at together.
const ROWS_OF_USER_MAX: i64 = 1_000;

/// Where a task stands, rightly or not.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Spot {
    /// As it is written there, readable or not; of no account where places have no queue.
    pub(super) queue: Vec<u8>,
    /// Its turn, or the time of what is scheduled.
    pub(super) at: i64,
    pub(super) task: i64,
}

impl Spot {
    pub(super) fn new(queue: &str, at: i64, task: i64) -> Self {
        Self { queue: queue.as_bytes().to_vec(), at, task }
    }

    /// Where places have no queue.
    pub(super) fn anywhere(at: i64, task: i64) -> Self {
        Self::new("", at, task)
    }

    /// For JSON, which does not take what is no text.
    fn row(&self) -> (i64, i64, String) {
        (self.at, self.task, self.queue.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Where a task of this queue waits. One whose name no queue can have waits in the default queue until a claim sets its tasks aside.
pub(super) fn placed_queue(name: Vec<u8>) -> String {
    let name = String::from_utf8(name).unwrap_or_default();
    if check_queue(&name).is_ok() { stored_queue(Some(&name)).to_owned() } else { String::new() }
}

/// A row's queue, as [`placed_queue`].
pub(super) fn queue_of(row: &MySqlRow, place: usize) -> Result<String, sqlx::Error> {
    Ok(placed_queue(row.try_get(place)?))
}

/// Whether the name of a task's queue is none that a place can have: the counterpart of [`placed_queue`] in SQL. MySQL compares no bytes with a
/// pattern.
macro_rules! is_no_queue {
    () => {
        "(t.queue = 'default' OR CONVERT(t.queue USING latin1) REGEXP '[^A-Za-z0-9_.:/-]')"
    };
}
pub(super) use is_no_queue;

/// A task's user. One that is not text has no account: its tasks wait among those without user until a claim sets them aside.
pub(super) fn user_of(row: &MySqlRow, place: usize) -> Result<String, sqlx::Error> {
    let bytes: Vec<u8> = row.try_get(place)?;
    Ok(String::from_utf8(bytes).unwrap_or_default())
}

/// What is wrong with a name, in words that follow its kind; None if it can be read.
pub(super) fn unreadable(name: &[u8]) -> Option<String> {
    match std::str::from_utf8(name) {
        Ok(_) => None,
        Err(error) => Some(format!("is not text in UTF-8 from byte {} on", error.valid_up_to() + 1)),
    }
}

/// Take tasks out of the places where they stand wrongly, put those that wait where their own rows say, and tell their numbers.
pub(super) async fn mend(session: &mut Session<'_>, found: &[Spot], changes: &mut Changes) -> Result<(), Failure> {
    for Spot { task, .. } in found {
        tracing::error!(task, "a task stood where its own row does not say; it is put where it belongs");
    }
    place_anew(session, found, changes).await
}

/// Take tasks out of places, and put those that wait where their own rows say.
pub(super) async fn place_anew(session: &mut Session<'_>, found: &[Spot], changes: &mut Changes) -> Result<(), Failure> {
    const TASKS: &str = concat!(
        "SELECT t.id, t.state = 'waiting', t.run_at, t.user, t.max_running, t.alone, t.priority, t.turn, t.queue, t.type FROM ",
        lockable!(ids!()),
        " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id FOR UPDATE"
    );
    macro_rules! out_of {
        ($table:literal, $index:literal, $at:literal) => {
            concat!(
                "DELETE r FROM ",
                places!(),
                " STRAIGHT_JOIN ",
                $table,
                " AS r FORCE INDEX (",
                $index,
                ") ON r.",
                $at,
                " = s.at AND r.task = s.task"
            )
        };
        ($table:literal, $index:literal) => {
            concat!(
                "DELETE r FROM JSON_TABLE(?, '$[*]' COLUMNS (at BIGINT PATH '$[0]', task BIGINT PATH '$[1]',
                    queue VARCHAR(128) CHARACTER SET ascii PATH '$[2]')) AS s STRAIGHT_JOIN ",
                $table,
                " AS r FORCE INDEX (",
                $index,
                ") ON r.queue = UNHEX(s.queue) AND r.turn = s.at AND r.task = s.task"
            )
        };
    }
    const OUT: [&str; 4] = [
        out_of!("laelaps_ready", "PRIMARY"),
        out_of!("laelaps_ready_of_user", "in_turn"),
        out_of!("laelaps_scheduled", "PRIMARY", "run_at"),
        out_of!("laelaps_suspect", "PRIMARY", "turn"),
    ];
    if found.is_empty() {
        return Ok(());
    }
    let mut tasks: Vec<i64> = found.iter().map(|spot| spot.task).collect();
    tasks.sort_unstable();
    tasks.dedup();
    let mut places = found.to_vec();
    let mut waiting: HashMap<i64, Waiting> = HashMap::new();
    let mut apart: Vec<Apart> = Vec::new();
    for row in sqlx::query(TASKS).bind(json(&tasks)).fetch_all(session.db()).await? {
        let (task, run_at, turn): (i64, i64, i64) = (row.try_get(0)?, row.try_get(2)?, row.try_get(7)?);
        let (queue, user) = (queue_of(&row, 8)?, user_of(&row, 3)?);
        // Where it could stand by its row, as the row is written and as it counts.
        places.push(Spot { queue: row.try_get(8)?, at: turn, task });
        places.extend([run_at, turn].map(|at| Spot::new(&queue, at, task)));
        let task_type: Vec<u8> = row.try_get(9)?;
        for (queue, user) in [(row.try_get(8)?, row.try_get(3)?), (queue.as_bytes().to_vec(), user.as_bytes().to_vec())] {
            let turns = found.iter().filter(|spot| spot.task == task).map(|spot| spot.at).chain([turn]);
            let at = |turn| Apart { queue: queue.clone(), task_type: task_type.clone(), user: user.clone(), turn, task };
            apart.extend(turns.map(at));
        }
        if !user.is_empty() {
            changes.unready(&Owner::new(&queue, &user));
        }
        if row.try_get::<bool, _>(1)? {
            let (max_running, alone, priority) = (row.try_get(4)?, row.try_get(5)?, row.try_get(6)?);
            waiting.insert(task, Waiting { task, queue, run_at, priority, user, max_running, alone });
        }
    }
    for sql in OUT {
        for places in session.chunks(places.iter().map(Spot::row)) {
            sqlx::query(sql).bind(places).execute(session.db()).await?;
        }
    }
    for places in session.chunks(apart.iter().map(Standing::row)) {
        sqlx::query(OUT_OF_UNSERVED).bind(places).execute(session.db()).await?;
    }
    let waiting: Vec<Waiting> = waiting.into_values().collect();
    changes.enqueue(session, &waiting).await
}

/// Where tasks of a user stand whose name, or whose queue's name, cannot be read, at most a batch; its account goes.
pub(super) async fn places_of_unreadable(session: &mut Session<'_>, queue: &[u8], user: &[u8]) -> Result<Vec<Spot>, Failure> {
    const PLACES: &str = "SELECT turn, task FROM laelaps_ready_of_user WHERE queue = ? AND user = ? ORDER BY turn, task LIMIT ?";
    const ACCOUNT: &str = "DELETE FROM laelaps_account WHERE queue = ? AND user = ? AND user <> ''";
    const AGAIN: &str = "INSERT INTO laelaps_account_change (queue, user, running) VALUES (?, ?, 0)";
    let query = sqlx::query_as(PLACES).bind(queue.to_vec()).bind(user.to_vec()).bind(ROWS_OF_USER_MAX);
    let places: Vec<(i64, i64)> = query.fetch_all(session.db()).await?;
    sqlx::query(ACCOUNT).bind(queue.to_vec()).bind(user.to_vec()).execute(session.db()).await?;
    if places.len() as i64 == ROWS_OF_USER_MAX {
        sqlx::query(AGAIN).bind(queue.to_vec()).bind(user.to_vec()).execute(session.db()).await?;
    }
    Ok(places.into_iter().map(|(at, task)| Spot { queue: queue.to_vec(), at, task }).collect())
}

/// What is wrong with the names of a row (what each is, and where it stands in the row) and of its queue, in words; None if nothing is.
pub(super) fn unreadable_names(row: &MySqlRow, names: [(&str, usize); 3], queue: usize) -> Result<Option<String>, sqlx::Error> {
    let mut problems = Vec::new();
    for (what, place) in names {
        let name: Vec<u8> = row.try_get(place)?;
        problems.extend(unreadable(&name).map(|problem| format!("the {what} {problem} ({:?})", String::from_utf8_lossy(&name))));
    }
    let name: Vec<u8> = row.try_get(queue)?;
    match unreadable(&name) {
        Some(problem) => problems.push(format!("the queue {problem} ({:?})", String::from_utf8_lossy(&name))),
        None if name.is_empty() => {}
        None => problems.extend(check_queue(&String::from_utf8_lossy(&name)).err()),
    }
    Ok((!problems.is_empty()).then(|| problems.join("; ")))
}

/// The numbers of tasks in a list that was stored as JSON; None if somebody has damaged it.
pub(super) fn numbers(list: &str) -> Option<Vec<i64>> {
    serde_json::from_str(list).ok()
}

/// The tasks that run under leases of a claim whose list is damaged. Looks through all tasks.
pub(super) async fn tasks_of_claim(session: &mut Session<'_>, claim: i64) -> Result<Vec<i64>, Failure> {
    const RUNNING: &str = "SELECT id FROM laelaps_task WHERE state = 'running' AND lease DIV 1048576 = ?";
    tracing::error!(claim, "the list of a claim's tasks is damaged; it is made anew");
    Ok(sqlx::query_scalar(RUNNING).bind(claim).fetch_all(session.db()).await?)
}

/// The tasks whose retention ends at a moment, where their list is damaged. Looks through all tasks.
pub(super) async fn tasks_retained_until(session: &mut Session<'_>, until: i64) -> Result<Vec<i64>, Failure> {
    const ENDED: &str = "SELECT id FROM laelaps_task WHERE retained_until = ?";
    tracing::error!(until, "a list of tasks to be removed is damaged; it is made anew");
    Ok(sqlx::query_scalar(ENDED).bind(until).fetch_all(session.db()).await?)
}

impl MySql {
    /// Fail claimed tasks that nobody can read, so that they stop nobody.
    pub(super) async fn set_broken_aside(&self, host: HostId, broken: Vec<Broken>) -> Result<()> {
        let policy = Policy::default();
        let mut settlements = Vec::with_capacity(broken.len());
        for Broken { task, code, problem } in broken {
            let id = task.lease_ref.task.0;
            tracing::error!(
                task = id,
                key = task.key,
                host = host.0,
                problem,
                "a task cannot be read; it is set aside as failed"
            );
            let message = match code {
                "unreadable" => {
                    format!("{problem}; `laelaps show --id {id}` shows it, `laelaps cancel --id {id}` removes it")
                }
                _ => problem,
            };
            let event = Event::Failure { kind: FailureKind::Reject, code: code.to_owned(), message };
            settlements.push(Settlement::of(task.lease_ref, event, Attempt::of(&task), &policy, 0.0, None, Vec::new()));
        }
        self.settle_group(&settlements).await.map(drop)
    }
}
