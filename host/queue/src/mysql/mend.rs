//! Rows that contradict each other, or that cannot be read. Nothing of ours leaves such; hands, other programs and faults of earlier versions
//! do. Whoever meets one puts it right and says so with its number, so that it stops nobody.

use std::collections::HashMap;

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;

use super::MySql;
use super::accounts::{Changes, Waiting};
use super::claim::Broken;
use super::failure::Failure;
use super::rows::{ids, json, lockable, places};
use super::session::Session;
use crate::{Attempt, Event, FailureKind, HostId, Policy, Result, Settlement};

/// Rows of one unreadable user that are looked at together.
const ROWS_OF_USER_MAX: i64 = 1_000;

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

/// Take tasks out of the places (turn or time, and task) where they stand wrongly, put those that wait where their own rows say, and tell their numbers.
pub(super) async fn mend(session: &mut Session<'_>, found: &[(i64, i64)], changes: &mut Changes) -> Result<(), Failure> {
    for (_, task) in found {
        tracing::error!(task, "a task stood where its own row does not say; it is put where it belongs");
    }
    place_anew(session, found, changes).await
}

/// Take tasks out of places (turn or time, and task), and put those that wait where their own rows say.
pub(super) async fn place_anew(session: &mut Session<'_>, found: &[(i64, i64)], changes: &mut Changes) -> Result<(), Failure> {
    const TASKS: &str = concat!(
        "SELECT t.id, t.state = 'waiting', t.run_at, t.user, t.max_running, t.alone, t.priority, t.turn FROM ",
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
    }
    const OUT: [&str; 4] = [
        out_of!("laelaps_ready", "PRIMARY", "turn"),
        out_of!("laelaps_ready_of_user", "in_turn", "turn"),
        out_of!("laelaps_scheduled", "PRIMARY", "run_at"),
        out_of!("laelaps_suspect", "PRIMARY", "turn"),
    ];
    if found.is_empty() {
        return Ok(());
    }
    let mut tasks: Vec<i64> = found.iter().map(|(_, task)| *task).collect();
    tasks.sort_unstable();
    tasks.dedup();
    let mut places = found.to_vec();
    let mut waiting: HashMap<i64, Waiting> = HashMap::new();
    for row in sqlx::query(TASKS).bind(json(&tasks)).fetch_all(session.db()).await? {
        let (task, run_at) = (row.try_get(0)?, row.try_get(2)?);
        places.extend([(run_at, task), (row.try_get(7)?, task)]);
        let user = user_of(&row, 3)?;
        if !user.is_empty() {
            changes.unready(&user);
        }
        if row.try_get::<bool, _>(1)? {
            let (max_running, alone, priority) = (row.try_get(4)?, row.try_get(5)?, row.try_get(6)?);
            waiting.insert(task, Waiting { task, run_at, priority, user, max_running, alone });
        }
    }
    for sql in OUT {
        for places in session.chunks(&places) {
            sqlx::query(sql).bind(places).execute(session.db()).await?;
        }
    }
    let waiting: Vec<Waiting> = waiting.into_values().collect();
    changes.enqueue(session, &waiting).await
}

/// Where tasks of a user stand whose name cannot be read, at most a batch; its account goes.
pub(super) async fn places_of_unreadable(session: &mut Session<'_>, user: &[u8]) -> Result<Vec<(i64, i64)>, Failure> {
    const PLACES: &str = "SELECT turn, task FROM laelaps_ready_of_user WHERE user = ? ORDER BY turn, task LIMIT ?";
    const ACCOUNT: &str = "DELETE FROM laelaps_account WHERE user = ? AND user <> ''";
    const AGAIN: &str = "INSERT INTO laelaps_account_change (user, running) VALUES (?, 0)";
    let query = sqlx::query_as(PLACES).bind(user.to_vec()).bind(ROWS_OF_USER_MAX);
    let places: Vec<(i64, i64)> = query.fetch_all(session.db()).await?;
    sqlx::query(ACCOUNT).bind(user.to_vec()).execute(session.db()).await?;
    if places.len() as i64 == ROWS_OF_USER_MAX {
        sqlx::query(AGAIN).bind(user.to_vec()).execute(session.db()).await?;
    }
    Ok(places)
}

/// The names of a row that cannot be read, in words; None if all can.
pub(super) fn unreadable_names(row: &MySqlRow, names: [(&str, usize); 3]) -> Result<Option<String>, sqlx::Error> {
    let mut problems = Vec::new();
    for (what, place) in names {
        let name: Vec<u8> = row.try_get(place)?;
        problems.extend(unreadable(&name).map(|problem| format!("the {what} {problem} ({:?})", String::from_utf8_lossy(&name))));
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
