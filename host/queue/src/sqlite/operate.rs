//! What operators and producers do to tasks by hand, and the removal of what is over.

use std::time::Duration;

use sqlx::sqlite::SqlitePool;

use super::accounts::{Changes, Owner, Waiting, json};
use super::aside;
use super::claim::count;
use super::failure::Failure;
use super::rows::Columns;
use super::settle::{record_attempts, retain, state_of};
use super::submit::{descend, end_descent};
use super::writer::Session;
use crate::error;
use crate::outcome::ms;
use crate::{Error, NewTask, State, TaskId};

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
}

/// Which task an operation by hand is about.
#[derive(Clone, Debug)]
pub(super) enum Named {
    Key(String),
    Id(TaskId),
}

/// A task as an operation by hand needs it.
struct Found {
    task: i64,
    key: String,
    task_type: String,
    state: State,
    owner: Owner,
    max_running: Option<i64>,
    run_at: i64,
    priority: i64,
    /// Where it stands if it is ready or a suspect.
    turn: i64,
    lease: i64,
    host: Option<i64>,
    attempts: i64,
    alone: i64,
    /// Of a follow-up.
    root: Option<i64>,
    /// Its row cannot be read, or it was set aside.
    is_aside: bool,
    is_unreadable: bool,
}

impl Found {
    fn is_held(&self) -> bool {
        self.state == State::Waiting && self.run_at == NewTask::HELD_AT.0
    }
}

async fn find(session: &mut Session, named: Named) -> Result<Found, Failure> {
    let found = look_up(session, &named).await?;
    found.ok_or_else(|| {
        Failure::from(match named {
            Named::Key(key) => Error::NotFound(key),
            Named::Id(id) => Error::NoSuchId(id),
        })
    })
}

async fn look_up(session: &mut Session, named: &Named) -> Result<Option<Found>, Failure> {
    const FIND: &str = "SELECT id, key, type, state, user, max_running, run_at, lease, host, attempts, alone, root,
            (SELECT code FROM failure WHERE failure.task = task.id), max_attempts, releases, lost, lost_alone, depth, priority, turn, queue
        FROM task WHERE id = ?1";
    const BY_KEY: &str = "SELECT id FROM task WHERE key = ?1";
    let id = match named {
        Named::Id(id) => Some(id.0),
        Named::Key(key) => sqlx::query_scalar(BY_KEY).bind(key.clone()).fetch_optional(session.db()).await?,
    };
    let Some(row) = sqlx::query(FIND).bind(id).fetch_optional(session.db()).await? else { return Ok(None) };
    let mut columns = Columns::of(&row);
    let code = columns.maybe_text(12, "code");
    for (at, name) in [(9, "attempts"), (13, "max_attempts"), (14, "releases"), (15, "lost"), (16, "lost_alone"), (17, "depth")] {
        columns.maybe_count(at, name);
    }
    let state = state_of(&columns.text(3, "state"))?;
    let found = Found {
        task: columns.whole(0, "number"),
        key: columns.text(1, "key"),
        task_type: columns.text(2, "type"),
        state,
        owner: Owner { queue: columns.queue(20), user: columns.text(4, "user") },
        max_running: columns.maybe_count(5, "max_running").map(i64::from),
        run_at: columns.whole(6, "run_at"),
        priority: columns.whole(18, "priority"),
        turn: columns.whole(19, "turn"),
        lease: columns.whole(7, "lease"),
        host: columns.maybe_whole(8, "host"),
        attempts: columns.whole(9, "attempts"),
        alone: columns.whole(10, "alone"),
        root: columns.maybe_whole(11, "root"),
        is_aside: state == State::Failed && matches!(code.as_deref(), Some(aside::CODE | aside::DAMAGED)),
        is_unreadable: false,
    };
    Ok(Some(Found { is_unreadable: columns.problem().is_some(), ..found }))
}

/// Take a waiting task from where it waits.
async fn unqueue(session: &mut Session, found: &Found, changes: &mut Changes) -> Result<(), Failure> {
    const READY: &str = "DELETE FROM ready WHERE queue = ?1 AND user = ?2 AND turn = ?3 AND task = ?4";
    const SCHEDULED: &str = "DELETE FROM scheduled WHERE run_at = ?1 AND task = ?2";
    const SUSPECT: &str = "DELETE FROM suspect WHERE turn = ?1 AND task = ?2";
    const UNSERVED: &str = "DELETE FROM unserved WHERE queue = ?1 AND type = ?2 AND user = ?3 AND turn = ?4 AND task = ?5";
    let ready =
        sqlx::query(READY).bind(found.owner.queue.clone()).bind(found.owner.user.clone()).bind(found.turn).bind(found.task);
    if ready.execute(session.db()).await?.rows_affected() == 1 {
        changes.unready(&found.owner);
        return Ok(());
    }
    for (sql, at) in [(SCHEDULED, found.run_at), (SUSPECT, found.turn)] {
        sqlx::query(sql).bind(at).bind(found.task).execute(session.db()).await?;
    }
    let Owner { queue, user } = found.owner.clone();
    let unserved = sqlx::query(UNSERVED).bind(queue).bind(found.task_type.clone()).bind(user);
    unserved.bind(found.turn).bind(found.task).execute(session.db()).await?;
    Ok(())
}

/// End a waiting or running task. A running attempt loses its lease.
pub(super) async fn end(session: &mut Session, named: Named, by: ByHand, retention: Duration) -> Result<(), Failure> {
    const END: &str = "UPDATE task SET state = ?2, until = NULL, event = ?3, finished_at = ?4, retained_until = ?5 WHERE id = ?1";
    let found = find(session, named.clone()).await?;
    // Nobody can name it but by its number, and nobody will want it back.
    if found.is_unreadable || (found.is_aside && matches!(named, Named::Id(_))) {
        return remove_unread(session, found.task).await;
    }
    let mut changes = Changes::default();
    match found.state {
        State::Waiting => unqueue(session, &found, &mut changes).await?,
        State::Running => {
            changes.stopped(&found.owner);
            let attempt = found.attempts.saturating_add(1);
            let record = (found.task, found.lease, attempt, found.host, None, by.event(), None, None, found.alone);
            record_attempts(session, &[record]).await?;
        }
        state => return Err(Failure::from(Error::AlreadyEnded { key: found.key, state })),
    }
    let now = session.now;
    let until = now.saturating_add(ms(retention));
    let query = sqlx::query(END).bind(found.task).bind(by.state().as_str()).bind(by.event()).bind(now).bind(until);
    query.execute(session.db()).await?;
    changes.ended(&found.owner.queue, &found.task_type, by.state());
    if found.root.is_some() {
        end_descent(session, &[found.task]).await?;
    }
    retain(session, vec![(until, found.task)]).await?;
    changes.write(session).await
}

/// Why a task that cannot be read is not run again.
const UNREADABLE: &str = "its row cannot be read; `laelaps show --id` says why, and `laelaps cancel --id` removes it";

/// Remove a task whose row cannot be read, whatever its state. A running attempt loses its lease.
async fn remove_unread(session: &mut Session, task: i64) -> Result<(), Failure> {
    const ENDED: &str = "UPDATE tally SET tasks = max(tasks - 1, 0)
        WHERE what = 'ended' AND name = (SELECT state FROM task WHERE id = ?1 AND finished_at IS NOT NULL)";
    const NONE_ENDED: &str = "DELETE FROM tally WHERE what = 'ended' AND tasks = 0";
    const REMOVE: &str = "DELETE FROM task WHERE id = ?1";
    aside::leave_queue(session, task).await?;
    sqlx::query(ENDED).bind(task).execute(session.db()).await?;
    sqlx::query(NONE_ENDED).execute(session.db()).await?;
    sqlx::query(REMOVE).bind(task).execute(session.db()).await?;
    remove_beside(session, &[task]).await
}

const DUE: &str = "UPDATE task SET run_at = ?2 WHERE id = ?1";

/// Make a waiting task due now, or give a failed or cancelled one a new life.
pub(super) async fn retry(session: &mut Session, named: Named) -> Result<(), Failure> {
    const REVIVE: &str =
        "UPDATE task SET state = 'waiting', run_at = ?2, attempts = 0, releases = 0, lost = 0, lost_alone = 0, lost_at = NULL,
        alone = 0, finished_at = NULL, retained_until = NULL WHERE id = ?1";
    const FORGET: &str = "DELETE FROM failure WHERE task = ?1";
    const ALONE: &str = "SELECT alone FROM task WHERE id = ?1";
    let found = find(session, named).await?;
    if found.is_unreadable {
        return Err(refused(found, UNREADABLE));
    }
    let mut changes = Changes::default();
    let now = session.now;
    // What is ready already keeps its place in the order.
    let run_at = if found.state == State::Waiting { found.run_at.min(now) } else { now };
    match found.state {
        State::Waiting if found.is_held() => return Err(refused(found, error::HELD)),
        State::Waiting => {
            unqueue(session, &found, &mut changes).await?;
            sqlx::query(DUE).bind(found.task).bind(run_at).execute(session.db()).await?;
        }
        State::Failed | State::Cancelled => {
            sqlx::query(REVIVE).bind(found.task).bind(run_at).execute(session.db()).await?;
            sqlx::query(FORGET).bind(found.task).execute(session.db()).await?;
            changes.revived(&found.owner.queue, &found.task_type, found.state);
            if let Some(root) = found.root {
                descend(session, &[(found.task, root)]).await?;
            }
        }
        State::Running => return Err(refused(found, "it has an attempt under way")),
        State::Finished => return Err(refused(found, "finished work is not done again; submit it under another key")),
    }
    let alone = sqlx::query_scalar(ALONE).bind(found.task).fetch_one(session.db()).await?;
    let waiting =
        Waiting { task: found.task, run_at, priority: found.priority, owner: found.owner, max_running: found.max_running, alone };
    changes.enqueue(session, &[waiting]).await?;
    changes.write(session).await
}

/// Make a held task due now. Answers whether there was one.
pub(super) async fn release_held(session: &mut Session, key: String) -> Result<bool, Failure> {
    let Some(found) = look_up(session, &Named::Key(key)).await?.filter(Found::is_held) else { return Ok(false) };
    if found.is_unreadable {
        return Err(refused(found, UNREADABLE));
    }
    let mut changes = Changes::default();
    let now = session.now;
    unqueue(session, &found, &mut changes).await?;
    sqlx::query(DUE).bind(found.task).bind(now).execute(session.db()).await?;
    let waiting = Waiting {
        task: found.task,
        run_at: now,
        priority: found.priority,
        owner: found.owner,
        max_running: found.max_running,
        alone: false,
    };
    changes.enqueue(session, &[waiting]).await?;
    changes.write(session).await?;
    Ok(true)
}

/// Remove a held task. Answers whether there was one.
pub(super) async fn drop_held(session: &mut Session, key: String) -> Result<bool, Failure> {
    const DROP: &str = "DELETE FROM task WHERE id = ?1";
    let Some(found) = look_up(session, &Named::Key(key)).await?.filter(Found::is_held) else { return Ok(false) };
    if found.is_unreadable {
        return remove_unread(session, found.task).await.map(|()| true);
    }
    let mut changes = Changes::default();
    unqueue(session, &found, &mut changes).await?;
    sqlx::query(DROP).bind(found.task).execute(session.db()).await?;
    remove_beside(session, &[found.task]).await?;
    changes.dropped(&found.owner.queue, &found.task_type);
    changes.write(session).await?;
    Ok(true)
}

fn refused(found: Found, problem: &'static str) -> Failure {
    Failure::from(Error::WrongState { key: found.key, state: found.state, problem })
}

/// Whether there is anything to remove: asked first, so that an idle queue does not write.
pub(super) async fn has_garbage(readers: &SqlitePool) -> Result<bool, sqlx::Error> {
    const LOOK: &str = "SELECT EXISTS (SELECT 1 FROM retention
        WHERE until <= (SELECT CAST(round(unixepoch('subsec') * 1000) AS INTEGER)))";
    sqlx::query_scalar(LOOK).fetch_one(readers).await
}

pub(super) const OVER: &str = "SELECT id, CAST(tasks AS BLOB) FROM retention WHERE until <= ?1 ORDER BY until LIMIT ?2";

pub(super) const REMOVE: &str = "DELETE FROM task WHERE id IN (SELECT value FROM json_each(?1))
        AND state IN ('finished', 'failed', 'cancelled') AND retained_until <= ?2 RETURNING id, state";

/// What is removed in one transaction, in data and outputs: to free it SQLite follows it page by page, 50 ms for so much where it was
/// measured, and nobody else writes meanwhile.
const REMOVED_BYTES_MAX: i64 = 16 << 20;

/// Remove at most `limit` tasks whose retention has ended, oldest end first, and fewer if much stands beside them. Answers how many, and whether
/// it stopped at that.
pub(super) async fn clean_up(session: &mut Session, limit: u32) -> Result<(u64, bool), Failure> {
    const CUT: &str = "UPDATE retention SET tasks = ?2 WHERE id = ?1";
    const OUT: &str = "DELETE FROM retention WHERE id IN (SELECT value FROM json_each(?1))";
    let limit = usize::try_from(limit.clamp(1, 100_000)).unwrap_or(1);
    let now = session.now;
    let groups: Vec<(i64, Vec<u8>)> = sqlx::query_as(OVER).bind(now).bind(count(limit)).fetch_all(session.db()).await?;
    let groups: Vec<(i64, Vec<i64>)> = groups.into_iter().map(|(id, group)| (id, group_of(id, &group))).collect();
    let candidates: Vec<i64> = groups.iter().flat_map(|(_, group)| group).copied().take(limit).collect();
    let room = fitting(session, &candidates).await?;
    let mut tasks: Vec<i64> = Vec::new();
    let mut done = Vec::new();
    for (id, mut group) in groups {
        let rest = group.split_off(group.len().min(room - tasks.len()));
        if rest.is_empty() {
            done.push(id);
        } else if !group.is_empty() {
            sqlx::query(CUT).bind(id).bind(json(rest)).execute(session.db()).await?;
        }
        tasks.append(&mut group);
    }
    sqlx::query(OUT).bind(json(done)).execute(session.db()).await?;
    let mut changes = Changes::default();
    let removed = remove_over(session, &tasks, &mut changes).await?;
    changes.write(session).await?;
    Ok((removed.len() as u64, room < candidates.len()))
}

fn group_of(id: i64, tasks: &[u8]) -> Vec<i64> {
    serde_json::from_slice(tasks).unwrap_or_else(|error| {
        tracing::error!(row = id, %error, "a row of the table retention cannot be read; it is removed, and its tasks are kept");
        Vec::new()
    })
}

/// How many of the first tasks have not too much beside them for one transaction; one has never too much.
async fn fitting(session: &mut Session, tasks: &[i64]) -> Result<usize, Failure> {
    const BYTES: &str = "SELECT coalesce((SELECT coalesce(octet_length(data), bytes) FROM task_data WHERE task = value), 0)
            + coalesce((SELECT octet_length(output) FROM output WHERE task = value), 0) FROM json_each(?1) ORDER BY json_each.key";
    let bytes: Vec<i64> = sqlx::query_scalar(BYTES).bind(json(tasks)).fetch_all(session.db()).await?;
    let mut sum = 0_i64;
    let fitting = bytes.iter().take_while(|bytes| {
        sum = sum.saturating_add(**bytes);
        sum <= REMOVED_BYTES_MAX
    });
    Ok(fitting.count().max(1).min(tasks.len()))
}

/// Remove those of the tasks whose retention has ended. Answers which.
pub(super) async fn remove_over(session: &mut Session, tasks: &[i64], changes: &mut Changes) -> Result<Vec<i64>, Failure> {
    let now = session.now;
    let rows: Vec<(i64, String)> = sqlx::query_as(REMOVE).bind(json(tasks)).bind(now).fetch_all(session.db()).await?;
    let removed: Vec<i64> = rows.iter().map(|(task, _)| *task).collect();
    for (_, state) in &rows {
        changes.removed(state_of(state)?, 1);
    }
    remove_beside(session, &removed).await?;
    Ok(removed)
}

async fn remove_beside(session: &mut Session, tasks: &[i64]) -> Result<(), Failure> {
    const BESIDE: [&str; 7] = [
        "DELETE FROM task_data_piece WHERE task IN (SELECT value FROM json_each(?1))",
        "DELETE FROM task_data WHERE task IN (SELECT value FROM json_each(?1))",
        "DELETE FROM output WHERE task IN (SELECT value FROM json_each(?1))",
        "DELETE FROM failure WHERE task IN (SELECT value FROM json_each(?1))",
        "DELETE FROM progress WHERE task IN (SELECT value FROM json_each(?1))",
        "DELETE FROM attempt WHERE task IN (SELECT value FROM json_each(?1))",
        "DELETE FROM descendant WHERE task IN (SELECT value FROM json_each(?1))",
    ];
    let tasks = json(tasks);
    for sql in BESIDE {
        sqlx::query(sql).bind(tasks.clone()).execute(session.db()).await?;
    }
    Ok(())
}
