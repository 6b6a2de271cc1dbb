//! What operators and producers do to tasks by hand, and the removal of what is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::Row as _;

use super::MySql;
use super::accounts::{Changes, Owner, Waiting};
use super::connect::text;
use super::failure::{self, Failure};
use super::mend::{numbers, queue_of, tasks_retained_until, user_of};
use super::rows::{count, ids, json, lockable, priority_in_range};
use super::session::{Session, now};
use super::settle::{Record, record_attempts, retain, set_aside};
use super::submit::{descend, end_descent};
use crate::earlier::Earlier;
use crate::outcome::ms;
use crate::{Error, NewTask, Result, State, TaskId, error};

/// How a task is ended by hand.
#[derive(Clone, Copy, Debug)]
pub(super) enum ByHand {
    Finish,
    Cancel,
}

impl ByHand {
    fn state(self) -> State {
        match self {
            Self::Finish => State::Finished,
            Self::Cancel => State::Cancelled,
        }
    }

    fn event(self) -> &'static str {
        match self {
            Self::Finish => "force-finish",
            Self::Cancel => "cancel",
        }
    }

    fn doing(self) -> &'static str {
        match self {
            Self::Finish => "finishing a task by force",
            Self::Cancel => "cancelling a task",
        }
    }
}

/// How a task is named.
#[derive(Clone, Debug)]
pub(super) enum Name {
    Key(String),
    Id(TaskId),
}

impl Name {
    fn not_found(&self) -> Error {
        match self {
            Self::Key(key) => Error::NotFound(key.clone()),
            Self::Id(id) => Error::NoSuchId(*id),
        }
    }
}

/// The short names of failures with which tasks are set aside that cannot be read.
const UNREADABLE: [&str; 2] = ["unreadable", "damaged-data"];

/// A task as an operation by hand needs it.
struct Found {
    task: i64,
    key: String,
    task_type: String,
    state: State,
    queue: String,
    user: String,
    max_running: Option<u32>,
    run_at: i64,
    priority: i64,
    /// Where it stands if it is ready, a suspect, or apart.
    turn: i64,
    lease: i64,
    host: i64,
    attempts: u32,
    alone: bool,
    event: String,
    /// Of a follow-up.
    root: Option<i64>,
}

impl Found {
    fn owner(&self) -> Owner {
        Owner::of_task(&self.queue, &self.user)
    }

    fn is_held(&self) -> bool {
        self.state == State::Waiting && self.run_at == NewTask::HELD_AT.0
    }
}

macro_rules! find_by {
    ($condition:literal) => {
        concat!(
            "SELECT id, `key`, type, CAST(state AS CHAR), user, max_running, run_at, lease, host, attempts, alone,
                CAST(event AS CHAR), root, priority, turn, queue FROM laelaps_task WHERE ",
            $condition,
            " FOR UPDATE"
        )
    };
}

/// Find a task, and hold its row.
async fn look_up(session: &mut Session<'_>, name: &Name) -> Result<Option<Found>, Failure> {
    let query = match name {
        Name::Key(key) => sqlx::query(find_by!("`key` = ?")).bind(key.as_bytes().to_vec()),
        Name::Id(id) => sqlx::query(find_by!("id = ?")).bind(id.0),
    };
    let Some(row) = query.fetch_optional(session.db()).await? else { return Ok(None) };
    Ok(Some(Found {
        task: row.try_get(0)?,
        key: text(&row, 1)?,
        task_type: text(&row, 2)?,
        state: failure::state_or_failed(&text(&row, 3)?),
        user: user_of(&row, 4)?,
        max_running: row.try_get(5)?,
        run_at: row.try_get(6)?,
        lease: row.try_get(7)?,
        host: row.try_get(8)?,
        attempts: row.try_get(9)?,
        alone: row.try_get(10)?,
        event: text(&row, 11)?,
        root: row.try_get(12)?,
        priority: row.try_get(13)?,
        turn: row.try_get(14)?,
        queue: queue_of(&row, 15)?,
    }))
}

/// As the row names its type, readable or not.
pub(super) const OUT_OF_UNSERVED: &str =
    "DELETE r FROM laelaps_task AS t STRAIGHT_JOIN laelaps_unserved AS r FORCE INDEX (PRIMARY)
    ON r.queue = ? AND r.type = t.type AND r.user = ? AND r.turn = t.turn AND r.task = t.id WHERE t.id = ?";

/// Take a waiting task from where it waits.
async fn unqueue(session: &mut Session<'_>, found: &Found, changes: &mut Changes) -> Result<(), Failure> {
    const OF_USER: &str = "DELETE FROM laelaps_ready_of_user WHERE queue = ? AND user = ? AND turn = ? AND task = ?";
    const READY: &str = "DELETE FROM laelaps_ready WHERE queue = ? AND turn = ? AND task = ?";
    const SCHEDULED: &str = "DELETE FROM laelaps_scheduled WHERE run_at = ? AND task = ?";
    const SUSPECT: &str = "DELETE FROM laelaps_suspect WHERE turn = ? AND task = ?";
    let queue = found.queue.as_bytes().to_vec();
    if !found.user.is_empty() {
        let query = sqlx::query(OF_USER).bind(queue.clone()).bind(found.user.as_bytes().to_vec());
        if query.bind(found.turn).bind(found.task).execute(session.db()).await?.rows_affected() == 1 {
            changes.unready(&found.owner());
            return Ok(());
        }
    }
    let query = sqlx::query(READY).bind(queue).bind(found.turn).bind(found.task);
    if query.execute(session.db()).await?.rows_affected() == 1 {
        return Ok(());
    }
    for (sql, at) in [(SCHEDULED, found.run_at), (SUSPECT, found.turn)] {
        let query = sqlx::query(sql).bind(at).bind(found.task);
        if query.execute(session.db()).await?.rows_affected() == 1 {
            return Ok(());
        }
    }
    let query = sqlx::query(OUT_OF_UNSERVED).bind(found.queue.as_bytes().to_vec()).bind(found.user.as_bytes().to_vec());
    query.bind(found.task).execute(session.db()).await?;
    Ok(())
}

/// End a waiting or running task. A running attempt loses its lease. Of an earlier try that ended it nothing is known but that.
async fn end(
    session: &mut Session<'_>,
    name: &Name,
    by: ByHand,
    retention: Duration,
    earlier: &Earlier<()>,
) -> Result<(), Failure> {
    const END: &str = concat!(
        "UPDATE laelaps_task SET state = ?, until = 0, event = ?, finished_at = ?, retained_until = ?, ",
        priority_in_range!(),
        " WHERE id = ?"
    );
    let found = match look_up(session, name).await? {
        // It was set aside, and the earlier try has removed it; or its retention is over since.
        None if earlier.get().is_some() => return Ok(()),
        found => found.ok_or_else(|| Failure::from(name.not_found()))?,
    };
    let mut changes = Changes::default();
    match found.state {
        State::Waiting => unqueue(session, &found, &mut changes).await?,
        State::Running => {
            changes.stopped(&found.owner(), found.max_running);
            let record = Record {
                task: found.task,
                lease: found.lease,
                attempt: found.attempts.saturating_add(1),
                host: found.host,
                plugin: 0,
                event: by.event(),
                alone: found.alone,
                code: None,
                message: None,
            };
            record_attempts(session, &[record]).await?;
        }
        // The earlier try was committed after all.
        state if earlier.get().is_some() && state == by.state() && found.event == by.event() => return Ok(()),
        State::Failed if matches!((name, by), (Name::Id(_), ByHand::Cancel)) && is_set_aside(session, found.task).await? => {
            remove(session, &[found.task]).await?;
            changes.removed(State::Failed, 1);
            changes.write(session).await?;
            earlier.note(());
            return Ok(());
        }
        state => return Err(Failure::from(Error::AlreadyEnded { key: found.key, state })),
    }
    let now = session.now;
    let until = now.saturating_add(ms(retention));
    let query = sqlx::query(END).bind(by.state().as_str()).bind(by.event()).bind(now).bind(until).bind(found.task);
    query.execute(session.db()).await?;
    changes.ended(&found.queue, &found.task_type, by.state());
    if found.root.is_some() {
        end_descent(session, &[found.task]).await?;
    }
    if by.state() == State::Cancelled {
        set_aside(session, &[found.task], State::Cancelled).await?;
    }
    retain(session, vec![(until, found.task)]).await?;
    changes.write(session).await?;
    earlier.note(());
    Ok(())
}

/// Whether a failed task cannot be read.
async fn is_set_aside(session: &mut Session<'_>, task: i64) -> Result<bool, Failure> {
    const CODE: &str = "SELECT COALESCE((SELECT code FROM laelaps_failure WHERE task = ?), '')";
    let code: String = sqlx::query_scalar(CODE).bind(task).fetch_one(session.db()).await?;
    Ok(UNREADABLE.contains(&code.as_str()))
}

const DUE: &str = concat!("UPDATE laelaps_task SET run_at = ?, ", priority_in_range!(), " WHERE id = ?");

/// Make a waiting task due now, or give a failed or cancelled one a new life.
///
/// `earlier` is how an earlier try found it, lease and state. If it is not like that any more, that try was committed, and whatever became of the
/// task since is left alone.
async fn retry(session: &mut Session<'_>, name: &Name, earlier: &Earlier<(i64, State)>) -> Result<(), Failure> {
    const REVIVE: &str = concat!(
        "UPDATE laelaps_task SET state = 'waiting', run_at = ?, attempts = 0, releases = 0, lost = 0, lost_alone = 0,
        lost_at = 0, alone = 0, finished_at = 0, retained_until = 0, ",
        priority_in_range!(),
        " WHERE id = ?"
    );
    const FORGET: [&str; 2] = ["DELETE FROM laelaps_failure WHERE task = ?", "DELETE FROM laelaps_set_aside WHERE task = ?"];
    let found = look_up(session, name).await?;
    let is_now = found.as_ref().map(|found| (found.lease, found.state));
    if earlier.get().is_some_and(|was| is_now != Some(was)) {
        session.wake = true;
        return Ok(());
    }
    let found = found.ok_or_else(|| Failure::from(name.not_found()))?;
    let was = (found.lease, found.state);
    let mut changes = Changes::default();
    let now = session.now;
    // What is ready already keeps its place in the order.
    let run_at = if found.state == State::Waiting { found.run_at.min(now) } else { now };
    let alone = match found.state {
        State::Waiting if found.is_held() => return Err(refused(found, error::HELD)),
        State::Waiting => {
            unqueue(session, &found, &mut changes).await?;
            sqlx::query(DUE).bind(run_at).bind(found.task).execute(session.db()).await?;
            found.alone
        }
        State::Failed | State::Cancelled => {
            sqlx::query(REVIVE).bind(run_at).bind(found.task).execute(session.db()).await?;
            for sql in FORGET {
                sqlx::query(sql).bind(found.task).execute(session.db()).await?;
            }
            changes.revived(&found.queue, &found.task_type, found.state);
            if let Some(root) = found.root {
                descend(session, &[(found.task, root)]).await?;
            }
            false
        }
        State::Running => return Err(refused(found, "it has an attempt under way")),
        State::Finished => return Err(refused(found, "finished work is not done again; submit it under another key")),
    };
    let Found { task, queue, priority, user, max_running, .. } = found;
    let waiting = Waiting { task, queue, run_at, priority, user, max_running, alone };
    changes.enqueue(session, &[waiting]).await?;
    changes.write(session).await?;
    earlier.note(was);
    Ok(())
}

/// Make a held task due now. Answers whether there was one; `seen` is whether an earlier try, which may have been committed after all, has seen it.
async fn release_held(session: &mut Session<'_>, name: &Name, seen: &AtomicBool) -> Result<bool, Failure> {
    let Some(found) = look_up(session, name).await?.filter(Found::is_held) else {
        return Ok(session.repeated && seen.load(Ordering::Relaxed));
    };
    seen.store(true, Ordering::Relaxed);
    let mut changes = Changes::default();
    let now = session.now;
    unqueue(session, &found, &mut changes).await?;
    sqlx::query(DUE).bind(now).bind(found.task).execute(session.db()).await?;
    let Found { task, queue, priority, user, max_running, .. } = found;
    let waiting = Waiting { task, queue, run_at: now, priority, user, max_running, alone: false };
    changes.enqueue(session, &[waiting]).await?;
    changes.write(session).await?;
    Ok(true)
}

/// Remove a held task. Answers as [`release_held`].
async fn drop_held(session: &mut Session<'_>, name: &Name, seen: &AtomicBool) -> Result<bool, Failure> {
    let Some(found) = look_up(session, name).await?.filter(Found::is_held) else {
        return Ok(session.repeated && seen.load(Ordering::Relaxed));
    };
    seen.store(true, Ordering::Relaxed);
    let mut changes = Changes::default();
    unqueue(session, &found, &mut changes).await?;
    remove(session, &[found.task]).await?;
    changes.dropped(&found.queue, &found.task_type);
    changes.write(session).await?;
    Ok(true)
}

fn refused(found: Found, problem: &'static str) -> Failure {
    Failure::from(Error::WrongState { key: found.key, state: found.state, problem })
}

impl MySql {
    pub(super) async fn end_by_hand(&self, name: Name, by: ByHand, retention: Duration) -> Result<()> {
        let asked = Arc::new((name, Earlier::default()));
        self.run(by.doing(), move |session| {
            let asked = Arc::clone(&asked);
            Box::pin(async move { end(session, &asked.0, by, retention, &asked.1).await })
        })
        .await
    }

    pub(super) async fn retry_by_hand(&self, name: Name) -> Result<()> {
        let asked = Arc::new((name, Earlier::default()));
        self.run("retrying a task", move |session| {
            let asked = Arc::clone(&asked);
            Box::pin(async move { retry(session, &asked.0, &asked.1).await })
        })
        .await
    }

    pub(super) async fn release(&self, key: &str) -> Result<bool> {
        let asked = Arc::new((Name::Key(key.to_owned()), AtomicBool::new(false)));
        self.run("releasing a held task", move |session| {
            let asked = Arc::clone(&asked);
            Box::pin(async move { release_held(session, &asked.0, &asked.1).await })
        })
        .await
    }

    pub(super) async fn drop_from_hold(&self, key: &str) -> Result<bool> {
        let asked = Arc::new((Name::Key(key.to_owned()), AtomicBool::new(false)));
        self.run("dropping a held task", move |session| {
            let asked = Arc::clone(&asked);
            Box::pin(async move { drop_held(session, &asked.0, &asked.1).await })
        })
        .await
    }

    /// Remove at most `limit` tasks whose retention has ended, oldest end first.
    pub(super) async fn remove_old(&self, limit: u32) -> Result<u64> {
        const LOOK: &str = concat!("SELECT EXISTS (SELECT 1 FROM laelaps_retention WHERE until <= ", now!(), ")");
        self.repair_accounts().await?;
        let garbage = self.read("looking for ended retention", || sqlx::query(LOOK)).await?;
        let garbage: bool = garbage.try_get(0).map_err(|error| self.runner.place.worded(error, "looking for ended retention"))?;
        if !garbage {
            return Ok(0);
        }
        let earlier = Earlier::default();
        self.run("removing old tasks", move |session| {
            let earlier = earlier.clone();
            Box::pin(async move { clean_up(session, limit, &earlier).await })
        })
        .await
    }
}

/// `earlier` is what an earlier try has removed, if it was committed.
async fn clean_up(session: &mut Session<'_>, limit: u32, earlier: &Earlier<Vec<i64>>) -> Result<u64, Failure> {
    const OVER: &str =
        "SELECT id, tasks, until FROM laelaps_retention WHERE until <= ? ORDER BY until LIMIT ? FOR UPDATE SKIP LOCKED";
    const CUT: &str = "UPDATE laelaps_retention SET tasks = ? WHERE id = ?";
    const OUT: &str =
        concat!("DELETE r FROM ", ids!(), " STRAIGHT_JOIN laelaps_retention AS r FORCE INDEX (PRIMARY) ON r.id = s.id");
    const ENDED: &str = concat!(
        "SELECT t.id, CAST(t.state AS CHAR) FROM ",
        lockable!(ids!()),
        " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id
        WHERE t.retained_until <> 0 AND t.retained_until <= ? FOR UPDATE"
    );
    if let Some(removed) = earlier.get().filter(|removed| !removed.is_empty())
        && !is_any_left(session, &removed).await?
    {
        return Ok(removed.len() as u64);
    }
    let limit = usize::try_from(limit.clamp(1, 100_000)).unwrap_or(1);
    let now = session.now;
    let groups: Vec<(i64, String, i64)> = sqlx::query_as(OVER).bind(now).bind(count(limit)).fetch_all(session.db()).await?;
    let mut tasks: Vec<i64> = Vec::new();
    let mut done = Vec::new();
    for (id, group, until) in groups {
        let mut group = match numbers(&group) {
            Some(group) => group,
            None => tasks_retained_until(session, until).await?,
        };
        let room = limit - tasks.len();
        if group.len() <= room {
            done.push(id);
            tasks.append(&mut group);
        } else if room > 0 {
            let rest = group.split_off(room);
            tasks.append(&mut group);
            sqlx::query(CUT).bind(json(rest)).bind(id).execute(session.db()).await?;
        }
        if tasks.len() == limit {
            break;
        }
    }
    for done in session.chunks(done) {
        sqlx::query(OUT).bind(done).execute(session.db()).await?;
    }
    tasks.sort_unstable();
    let mut changes = Changes::default();
    let mut removed: Vec<i64> = Vec::with_capacity(tasks.len());
    for tasks in session.chunks(tasks) {
        for row in sqlx::query(ENDED).bind(tasks).bind(now).fetch_all(session.db()).await? {
            removed.push(row.try_get(0)?);
            changes.removed(failure::state_or_failed(&text(&row, 1)?), 1);
        }
    }
    remove(session, &removed).await?;
    changes.write(session).await?;
    let count = removed.len() as u64;
    earlier.note(removed);
    Ok(count)
}

/// Whether one of these tasks is still there.
async fn is_any_left(session: &mut Session<'_>, tasks: &[i64]) -> Result<bool, Failure> {
    const LEFT: &str =
        concat!("SELECT COUNT(*) FROM ", ids!(), " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id");
    for tasks in session.chunks(tasks) {
        let left: i64 = sqlx::query_scalar(LEFT).bind(tasks).fetch_one(session.db()).await?;
        if left > 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Remove tasks with all that stands beside them. The caller holds their rows.
pub(super) async fn remove(session: &mut Session<'_>, tasks: &[i64]) -> Result<(), Failure> {
    macro_rules! remove_from {
        ($table:literal, $column:literal) => {
            concat!("DELETE r FROM ", ids!(), " STRAIGHT_JOIN ", $table, " AS r FORCE INDEX (PRIMARY) ON r.", $column, " = s.id")
        };
    }
    const REMOVE: [&str; 8] = [
        remove_from!("laelaps_task", "id"),
        remove_from!("laelaps_task_data", "task"),
        remove_from!("laelaps_output", "task"),
        remove_from!("laelaps_failure", "task"),
        remove_from!("laelaps_progress", "task"),
        remove_from!("laelaps_attempt", "task"),
        remove_from!("laelaps_set_aside", "task"),
        remove_from!("laelaps_descendant", "task"),
    ];
    if tasks.is_empty() {
        return Ok(());
    }
    for tasks in session.chunks(tasks) {
        for sql in REMOVE {
            sqlx::query(sql).bind(tasks.clone()).execute(session.db()).await?;
        }
    }
    Ok(())
}
