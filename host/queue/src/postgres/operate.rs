//! What operators and producers do to tasks by hand, and the removal of what is over.
//!
//! A waiting task is first taken from its place, which waits for a claim that is about to take it; then it is nobody else's. If it was not
//! there any more, it is looked up again.

use std::time::Duration;

use sqlx::Row as _;

use super::accounts::{self, Owner};
use super::failure::{self, Failure};
use super::pooled::Db;
use super::session::Session;
use super::{mend, tally, unreadable};
use crate::earlier::Earlier;
use crate::outcome::ms;
use crate::{Error, NewTask, State, TaskId, error};

/// How often a task is looked up that others keep moving.
const TRIES_MAX: usize = 100;
/// Batches of one removal of which nothing was left to remove.
const ROUNDS_MAX: usize = 20;
/// Differences of counts after which they are put together.
const TALLY_MIN: i64 = 200;
/// Changes of accounts after which they are entered, though nobody claims.
const CHANGES_MAX: i64 = 1_000;

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

/// A task as an operation by hand needs it.
struct Found {
    task: i64,
    key: String,
    state: State,
    owner: Owner,
    run_at: i64,
    /// Where it stands if it is due.
    turn: i64,
    /// And if it waits for a host that serves this.
    task_type: String,
    lease: i64,
}

/// Where a task waited.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waited {
    Ready,
    Scheduled,
    Suspect,
    Unserved,
}

/// How a task is named.
#[derive(Clone, Debug)]
pub(super) enum Name {
    Key(String),
    Id(TaskId),
}

impl Name {
    fn missing(&self) -> Failure {
        Failure::from(match self {
            Self::Key(key) => Error::NotFound(key.clone()),
            Self::Id(id) => Error::NoSuchId(*id),
        })
    }

    /// The key and the number to look for.
    pub(super) fn parts(&self) -> (Option<&str>, Option<i64>) {
        match self {
            // No text of the database has this character.
            Self::Key(key) => (Some(key.as_str()).filter(|key| !key.contains('\0')), None),
            Self::Id(id) => (None, Some(id.0)),
        }
    }
}

async fn find(session: &mut Session, name: &Name) -> Result<Option<Found>, Failure> {
    const FIND: &str = "SELECT id, key, state::text, user_name, run_at, turn, lease, queue, type FROM laelaps.task WHERE key = $1
        UNION ALL SELECT id, key, state::text, user_name, run_at, turn, lease, queue, type FROM laelaps.task WHERE id = $2";
    let (key, id) = name.parts();
    let row = sqlx::query(FIND).bind(key).bind(id).fetch_optional(session.db()?).await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(Found {
        task: row.try_get(0)?,
        key: row.try_get(1)?,
        state: failure::state(row.try_get(2)?)?,
        owner: Owner { queue: row.try_get(7)?, user: row.try_get(3)? },
        run_at: row.try_get(4)?,
        turn: row.try_get(5)?,
        lease: row.try_get(6)?,
        task_type: row.try_get(8)?,
    }))
}

/// Take a waiting task from where it waits; None if it is not there any more.
async fn unqueue(session: &mut Session, found: &Found) -> Result<Option<Waited>, Failure> {
    const READY: &str = "DELETE FROM laelaps.ready WHERE queue = $4 AND user_name = $3 AND turn = $1 AND task = $2";
    const SCHEDULED: &str = "DELETE FROM laelaps.scheduled WHERE run_at = $1 AND task = $2";
    const SUSPECT: &str = "DELETE FROM laelaps.suspect WHERE turn = $1 AND task = $2 AND queue = $3";
    const UNSERVED: &str =
        "DELETE FROM laelaps.unserved WHERE queue = $4 AND type = $5 AND user_name = $3 AND turn = $1 AND task = $2";
    let ready = sqlx::query(READY).bind(found.turn).bind(found.task).bind(&found.owner.user).bind(&found.owner.queue);
    if ready.execute(session.db()?).await?.rows_affected() == 1 {
        if !found.owner.is_nobody() {
            accounts::lock(session, vec![found.owner.clone()]).await?;
            accounts::look_again(session, std::slice::from_ref(&found.owner)).await?;
        }
        return Ok(Some(Waited::Ready));
    }
    let scheduled = sqlx::query(SCHEDULED).bind(found.run_at).bind(found.task);
    if scheduled.execute(session.db()?).await?.rows_affected() == 1 {
        return Ok(Some(Waited::Scheduled));
    }
    let suspect = sqlx::query(SUSPECT).bind(found.turn).bind(found.task).bind(&found.owner.queue);
    if suspect.execute(session.db()?).await?.rows_affected() == 1 {
        return Ok(Some(Waited::Suspect));
    }
    let unserved = sqlx::query(UNSERVED).bind(found.turn).bind(found.task).bind(&found.owner.user).bind(&found.owner.queue);
    if unserved.bind(&found.task_type).execute(session.db()?).await?.rows_affected() == 1 {
        return Ok(Some(Waited::Unserved));
    }
    // It may stand somewhere else than its row says, or nowhere: somebody wrote into the tables.
    Ok(stray_place(session, found).await?.then_some(Waited::Ready))
}

/// Whether a waiting task is in none of the places that its row names, once nobody is moving it: its row, which is locked then, is enough to end it.
/// Wrong places of it are cleared away when a claim meets them.
async fn stray_place(session: &mut Session, found: &Found) -> Result<bool, Failure> {
    const STRAY: &str = "SELECT run_at = $2 AND NOT EXISTS (SELECT FROM laelaps.ready WHERE ready.queue = task.queue
                AND ready.user_name = task.user_name AND ready.turn = task.turn AND ready.task = task.id)
            AND NOT EXISTS (SELECT FROM laelaps.scheduled WHERE scheduled.run_at = task.run_at AND scheduled.task = task.id)
            AND NOT EXISTS (SELECT FROM laelaps.suspect WHERE suspect.queue = task.queue AND suspect.turn = task.turn
                AND suspect.task = task.id)
            AND NOT EXISTS (SELECT FROM laelaps.unserved WHERE unserved.queue = task.queue AND unserved.type = task.type
                AND unserved.user_name = task.user_name AND unserved.turn = task.turn AND unserved.task = task.id)
        FROM laelaps.task WHERE id = $1 AND state = 'waiting'";
    const LOCK: &str = "SELECT FROM laelaps.task WHERE id = $1 FOR UPDATE";
    sqlx::query(LOCK).bind(found.task).execute(session.db()?).await?;
    let stray: Option<bool> = sqlx::query_scalar(STRAY).bind(found.task).bind(found.run_at).fetch_optional(session.db()?).await?;
    Ok(stray.unwrap_or(false))
}

/// End a waiting or running task. A running attempt loses its lease.
///
/// By number also what was set aside as unreadable, which goes at once. Of an earlier try that ended it nothing is known but that.
pub(super) async fn end(
    session: &mut Session,
    name: &Name,
    by: ByHand,
    retention: Duration,
    earlier: &Earlier<()>,
) -> Result<(), Failure> {
    for _ in 0..TRIES_MAX {
        let found = match find(session, name).await? {
            // The earlier try has removed it, or its retention is over since.
            None if earlier.get().is_some() => return Ok(()),
            found => found.ok_or_else(|| name.missing())?,
        };
        session.begin().await?;
        if found.state == State::Failed
            && matches!((name, by), (Name::Id(_), ByHand::Cancel))
            && remove_unreadable(session, &found).await?
        {
            earlier.note(());
            return session.commit().await;
        }
        let ended = match found.state {
            State::Waiting => end_waiting(session, &found, by, retention).await?,
            State::Running => end_running(session, &found, by, retention).await?,
            // The earlier try has done it.
            state if earlier.get().is_some() && state == by.state() => true,
            state => return Err(Failure::from(Error::AlreadyEnded { key: found.key, state })),
        };
        if ended {
            earlier.note(());
            session.commit().await?;
            session.counts(1);
            return Ok(());
        }
        session.roll_back().await?;
    }
    Err(Failure::from(Error::Database { doing: "ending a task that others keep moving", source: sqlx::Error::RowNotFound }))
}

/// $1 task, $2 state it has to be in, $3 lease, $4 state from now on, $5 event, $6 retention, $7 how many it is less in scheduled.
pub(super) const END: &str = "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    done AS (
        UPDATE laelaps.task SET state = $4::text::laelaps.state, until = NULL, event = $5, finished_at = (SELECT now FROM clock),
            retained_until = (SELECT now FROM clock) + $6
        WHERE id = $1 AND state = $2::text::laelaps.state AND lease = $3
        RETURNING id, type, queue, user_name, lease, host, attempts, retained_until, root),
    kept AS (INSERT INTO laelaps.retention (until, tasks) SELECT retained_until, ARRAY[id] FROM done),
    cancelled AS (INSERT INTO laelaps.cancelled (task) SELECT id FROM done WHERE $4 = 'cancelled' ON CONFLICT DO NOTHING),
    ended AS (DELETE FROM laelaps.descendant WHERE task = (SELECT id FROM done WHERE root IS NOT NULL)),
    counted AS (
        INSERT INTO laelaps.tally (type, queue, live, scheduled, finished, cancelled)
        SELECT type, queue, -1, -$7::int8, CASE $4 WHEN 'finished' THEN 1 ELSE 0 END, CASE $4 WHEN 'cancelled' THEN 1 ELSE 0 END FROM done),
    changed AS (
        INSERT INTO laelaps.account_change (user_name, queue, stopped)
        SELECT user_name, queue, 1 FROM done WHERE user_name <> '' AND $2 = 'running' RETURNING queue, user_name),
    attempts AS (
        INSERT INTO laelaps.attempt (task, lease, attempt, host, ended_at, event)
        SELECT id, lease, least(attempts::int8 + 1, 2147483647), host, (SELECT now FROM clock), $5 FROM done WHERE $2 = 'running'
        ON CONFLICT DO NOTHING),
    trimmed AS (
        DELETE FROM laelaps.attempt WHERE $2 = 'running' AND task = $1 AND lease <= (SELECT newer.lease FROM laelaps.attempt AS newer
            WHERE newer.task = $1 ORDER BY newer.lease DESC OFFSET 19 LIMIT 1))
    SELECT count(*), EXISTS (SELECT FROM changed CROSS JOIN LATERAL (SELECT FROM laelaps.account WHERE account.queue = changed.queue
        AND account.user_name = changed.user_name AND head_task IS NOT NULL AND NOT open OFFSET 0) AS closed) FROM done";

async fn end_as(session: &mut Session, found: &Found, by: ByHand, retention: Duration, scheduled: i64) -> Result<bool, Failure> {
    let (ended, opens): (i64, bool) = sqlx::query_as(END)
        .bind(found.task)
        .bind(found.state.as_str())
        .bind(found.lease)
        .bind(by.state().as_str())
        .bind(by.event())
        .bind(ms(retention))
        .bind(scheduled)
        .fetch_one(session.db()?)
        .await?;
    if opens {
        session.afterwards(super::session::Shared::wake);
    }
    Ok(ended == 1)
}

/// Remove a task that was set aside as unreadable, whatever its retention. Answers whether it was one.
async fn remove_unreadable(session: &mut Session, found: &Found) -> Result<bool, Failure> {
    const ASIDE: &str = "SELECT EXISTS (SELECT FROM laelaps.failure WHERE task = $1 AND code = ANY($2))";
    let aside = sqlx::query_scalar(ASIDE).bind(found.task).bind(&unreadable::CODES[..]).fetch_one(session.db()?).await?;
    Ok(aside && remove(session.db()?, &[found.task], i64::MAX).await? == 1)
}

async fn end_waiting(session: &mut Session, found: &Found, by: ByHand, retention: Duration) -> Result<bool, Failure> {
    let Some(waited) = unqueue(session, found).await? else { return Ok(false) };
    end_as(session, found, by, retention, i64::from(waited == Waited::Scheduled)).await
}

async fn end_running(session: &mut Session, found: &Found, by: ByHand, retention: Duration) -> Result<bool, Failure> {
    end_as(session, found, by, retention, 0).await
}

/// Make a waiting task due now, or give a failed or cancelled one a new life.
///
/// `earlier` is how an earlier try found it, lease and state. If it is not like that any more, that try was committed, and whatever became of the
/// task since is left alone.
pub(super) async fn retry(session: &mut Session, name: &Name, earlier: &Earlier<(i64, State)>) -> Result<(), Failure> {
    for _ in 0..TRIES_MAX {
        let found = find(session, name).await?;
        let is_now = found.as_ref().map(|found| (found.lease, found.state));
        if earlier.get().is_some_and(|was| is_now != Some(was)) {
            session.afterwards(|shared| {
                shared.marks.hint();
                shared.wake();
            });
            return Ok(());
        }
        let found = found.ok_or_else(|| name.missing())?;
        session.begin().await?;
        let done = match found.state {
            State::Waiting if found.run_at == NewTask::HELD_AT.0 => return Err(refused(found, error::HELD)),
            State::Waiting => make_due(session, &found).await?,
            State::Failed | State::Cancelled => revive(session, &found).await?,
            State::Running => return Err(refused(found, "it has an attempt under way")),
            State::Finished => return Err(refused(found, "finished work is not done again; submit it under another key")),
        };
        if done {
            earlier.note((found.lease, found.state));
            session.commit().await?;
            session.afterwards(|shared| {
                shared.marks.hint();
                shared.wake();
            });
            return Ok(());
        }
        session.roll_back().await?;
    }
    Err(Failure::from(Error::Database { doing: "retrying a task that others keep moving", source: sqlx::Error::RowNotFound }))
}

/// $1 key, $2 when held tasks run: never. Of two that do this or [`DROP`] at once, the one that takes the task from its place does it.
pub(super) const RELEASE: &str = "WITH unscheduled AS (
        DELETE FROM laelaps.scheduled WHERE run_at = $2
            AND task = (SELECT id FROM laelaps.task WHERE key = $1 AND state = 'waiting' AND run_at = $2)
        RETURNING task),
    due AS (
        UPDATE laelaps.task SET run_at = (extract(epoch FROM clock_timestamp()) * 1000)::int8
        WHERE id = (SELECT task FROM unscheduled) RETURNING id, run_at, turn, bytes, max_running, user_name, queue, type),
    ready AS (
        INSERT INTO laelaps.ready (turn, task, bytes, max_running, user_name, queue)
        SELECT turn, id, bytes, max_running, user_name, queue FROM due ON CONFLICT DO NOTHING),
    changed AS (
        INSERT INTO laelaps.account_change (user_name, queue, turn, task, max_running)
        SELECT user_name, queue, turn, id, max_running FROM due WHERE user_name <> ''),
    counted AS (INSERT INTO laelaps.tally (type, queue, scheduled) SELECT type, queue, -1 FROM due)
    SELECT count(*) FROM due";

/// Make a held task due now. Answers whether there was one.
pub(super) async fn release_held(session: &mut Session, key: &str) -> Result<bool, Failure> {
    /// An earlier try whose answer was lost has released what became due since it began.
    const RELEASED: &str = "SELECT EXISTS (SELECT FROM laelaps.task WHERE key = $1 AND run_at <> $2
        AND run_at >= $3)";
    let mut released = take_held(session, RELEASE, key).await?;
    if !released && session.again && !key.contains('\0') {
        let began = session.began_at().await?;
        let query = sqlx::query_scalar(RELEASED).bind(key).bind(NewTask::HELD_AT.0).bind(began);
        released = query.fetch_one(session.db()?).await?;
    }
    if !released {
        return Ok(false);
    }
    session.afterwards(|shared| {
        shared.marks.hint();
        shared.wake();
    });
    Ok(true)
}

/// As [`RELEASE`]. Nobody ever had a held task: beside it there is at most its data and, of a follow-up, that it has not ended.
pub(super) const DROP: &str = "WITH unscheduled AS (
        DELETE FROM laelaps.scheduled WHERE run_at = $2
            AND task = (SELECT id FROM laelaps.task WHERE key = $1 AND state = 'waiting' AND run_at = $2)
        RETURNING task),
    gone AS (DELETE FROM laelaps.task WHERE id = (SELECT task FROM unscheduled) RETURNING id, type, queue),
    data AS (DELETE FROM laelaps.task_data WHERE task = (SELECT id FROM gone)),
    descendant AS (DELETE FROM laelaps.descendant WHERE task = (SELECT id FROM gone)),
    counted AS (INSERT INTO laelaps.tally (type, queue, live, scheduled) SELECT type, queue, -1, -1 FROM gone)
    SELECT count(*) FROM gone";

/// Remove a held task. Answers as [`release_held`]: what is gone when it is tried again was dropped by the earlier try, if that one had met it.
pub(super) async fn drop_held(session: &mut Session, key: &str, earlier: &Earlier<bool>) -> Result<bool, Failure> {
    session.begin().await?;
    let dropped = take_held(session, DROP, key).await? || earlier.get().unwrap_or(false);
    earlier.note(dropped);
    session.commit().await?;
    Ok(dropped)
}

async fn take_held(session: &mut Session, sql: &'static str, key: &str) -> Result<bool, Failure> {
    if key.contains('\0') {
        return Ok(false);
    }
    let taken: i64 = sqlx::query_scalar(sql).bind(key).bind(NewTask::HELD_AT.0).fetch_one(session.db()?).await?;
    Ok(taken == 1)
}

fn refused(found: Found, problem: &'static str) -> Failure {
    Failure::from(Error::WrongState { key: found.key, state: found.state, problem })
}

/// What is due already keeps its place in the order.
async fn make_due(session: &mut Session, found: &Found) -> Result<bool, Failure> {
    const WAITS: &str =
        "SELECT EXISTS (SELECT FROM laelaps.ready WHERE queue = $4 AND user_name = $3 AND turn = $1 AND task = $2)
        OR EXISTS (SELECT FROM laelaps.suspect WHERE queue = $4 AND turn = $1 AND task = $2)
        OR EXISTS (SELECT FROM laelaps.unserved WHERE queue = $4 AND type = $5 AND user_name = $3 AND turn = $1 AND task = $2)";
    const DUE: &str = "WITH unscheduled AS (DELETE FROM laelaps.scheduled WHERE run_at = $1 AND task = $2 RETURNING task),
        due AS (
            UPDATE laelaps.task SET run_at = least(run_at, (extract(epoch FROM clock_timestamp()) * 1000)::int8)
            WHERE id = (SELECT task FROM unscheduled) RETURNING id, run_at, turn, bytes, max_running, user_name, queue, type, alone),
        ready AS (
            INSERT INTO laelaps.ready (turn, task, bytes, max_running, user_name, queue)
            SELECT turn, id, bytes, max_running, user_name, queue FROM due WHERE NOT alone ON CONFLICT DO NOTHING),
        suspect AS (INSERT INTO laelaps.suspect (turn, task, queue) SELECT turn, id, queue FROM due WHERE alone ON CONFLICT DO NOTHING),
        changed AS (
            INSERT INTO laelaps.account_change (user_name, queue, turn, task, max_running)
            SELECT user_name, queue, turn, id, max_running FROM due WHERE user_name <> '' AND NOT alone),
        counted AS (INSERT INTO laelaps.tally (type, queue, scheduled) SELECT type, queue, -1 FROM due)
        SELECT count(*) FROM due";
    let due: i64 = sqlx::query_scalar(DUE).bind(found.run_at).bind(found.task).fetch_one(session.db()?).await?;
    if due == 1 {
        return Ok(true);
    }
    let waits = sqlx::query_scalar(WAITS).bind(found.turn).bind(found.task).bind(&found.owner.user).bind(&found.owner.queue);
    Ok(waits.bind(&found.task_type).fetch_one(session.db()?).await?)
}

async fn revive(session: &mut Session, found: &Found) -> Result<bool, Failure> {
    const REVIVE: &str = "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
        revived AS (
            UPDATE laelaps.task SET state = 'waiting', run_at = (SELECT now FROM clock), attempts = 0, releases = NULL, lost = NULL,
                lost_alone = NULL, lost_at = NULL, alone = false, finished_at = NULL, retained_until = NULL
            WHERE id = $1 AND state = $2::text::laelaps.state AND lease = $3
            RETURNING id, run_at, turn, bytes, max_running, user_name, queue, type, root),
        descended AS (
            INSERT INTO laelaps.descendant (task, root) SELECT id, root FROM revived WHERE root IS NOT NULL ON CONFLICT DO NOTHING),
        failure AS (DELETE FROM laelaps.failure WHERE task = (SELECT id FROM revived)),
        cancelled AS (DELETE FROM laelaps.cancelled WHERE task = (SELECT id FROM revived)),
        ready AS (
            INSERT INTO laelaps.ready (turn, task, bytes, max_running, user_name, queue)
            SELECT turn, id, bytes, max_running, user_name, queue FROM revived ON CONFLICT DO NOTHING),
        changed AS (
            INSERT INTO laelaps.account_change (user_name, queue, turn, task, max_running)
            SELECT user_name, queue, turn, id, max_running FROM revived WHERE user_name <> ''),
        counted AS (
            INSERT INTO laelaps.tally (type, queue, live, failed, cancelled)
            SELECT type, queue, 1, CASE $2 WHEN 'failed' THEN -1 ELSE 0 END, CASE $2 WHEN 'cancelled' THEN -1 ELSE 0 END FROM revived)
        SELECT count(*) FROM revived";
    let query = sqlx::query_scalar(REVIVE).bind(found.task).bind(found.state.as_str()).bind(found.lease);
    let revived: i64 = query.fetch_one(session.db()?).await?;
    Ok(revived == 1)
}

/// What is over at a moment, $2, up to so many tasks and one group more.
pub(super) const OVER: &str = "WITH over AS MATERIALIZED (
        SELECT id, until, tasks FROM laelaps.retention WHERE until <= $2 ORDER BY until, id LIMIT $1 FOR UPDATE SKIP LOCKED)
    SELECT id, tasks FROM (SELECT id, tasks, sum(cardinality(tasks)) OVER (ORDER BY until, id) - cardinality(tasks) AS before
        FROM over) AS summed WHERE before < $1 ORDER BY before";

/// Of these tasks, what has ended and need not be retained at a moment, $2, with all that stands beside it.
pub(super) const REMOVE: &str = "WITH gone AS (
        DELETE FROM laelaps.task WHERE id = ANY($1) AND state IN ('finished', 'failed', 'cancelled')
            AND retained_until <= $2
        RETURNING id, state, type, queue),
    data AS (DELETE FROM laelaps.task_data WHERE task = ANY(ARRAY(SELECT id FROM gone))),
    outputs AS (DELETE FROM laelaps.output WHERE task = ANY(ARRAY(SELECT id FROM gone))),
    failures AS (DELETE FROM laelaps.failure WHERE task = ANY(ARRAY(SELECT id FROM gone))),
    cancelled AS (DELETE FROM laelaps.cancelled WHERE task = ANY(ARRAY(SELECT id FROM gone))),
    progress AS (DELETE FROM laelaps.progress WHERE task = ANY(ARRAY(SELECT id FROM gone))),
    attempts AS (DELETE FROM laelaps.attempt WHERE task = ANY(ARRAY(SELECT id FROM gone))),
    descendants AS (DELETE FROM laelaps.descendant WHERE task = ANY(ARRAY(SELECT id FROM gone))),
    counted AS (
        INSERT INTO laelaps.tally (type, queue, finished, failed, cancelled)
        SELECT type, queue, -count(*) FILTER (WHERE state = 'finished'), -count(*) FILTER (WHERE state = 'failed'),
            -count(*) FILTER (WHERE state = 'cancelled')
        FROM gone GROUP BY type, queue)
    SELECT count(*) FROM gone";

/// Remove those of the tasks whose retention has ended at a moment; answers how many.
pub(super) async fn remove(db: Db<'_>, tasks: &[i64], now: i64) -> Result<u64, Failure> {
    let removed: i64 = sqlx::query_scalar(REMOVE).bind(tasks).bind(now).fetch_one(db).await?;
    Ok(removed.unsigned_abs())
}

/// Remove at most `limit` tasks whose retention has ended, oldest end first. Put differences of counts together, and once nothing is to be
/// removed any more, see to accounts. One moment counts for all of it: the server's clock may be set back meanwhile. `earlier` is what an earlier try was
/// about to remove, and how many of it were there.
pub(super) async fn clean_up(session: &mut Session, limit: u32, earlier: &Earlier<(Vec<i64>, u64)>) -> Result<u64, Failure> {
    const LOOK: &str = "SELECT now, EXISTS (SELECT FROM laelaps.retention WHERE until <= now),
            (SELECT count(*) FROM (SELECT FROM laelaps.tally LIMIT $1) AS first) >= $1,
            (SELECT count(*) FROM (SELECT FROM laelaps.account_change LIMIT $2) AS first) >= $2
        FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now) AS clock";
    const LEFT: &str =
        "SELECT EXISTS (SELECT FROM laelaps.task WHERE id = ANY($1) AND state IN ('finished', 'failed', 'cancelled')
        AND retained_until <= (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8))";
    if let Some((tasks, removed)) = earlier.get().filter(|(_, removed)| *removed > 0)
        && !sqlx::query_scalar::<_, bool>(LEFT).bind(tasks).fetch_one(session.db()?).await?
    {
        return Ok(removed);
    }
    let look = sqlx::query_as(LOOK).bind(TALLY_MIN).bind(CHANGES_MAX).fetch_one(session.db()?);
    let (now, garbage, counts, changes): (i64, bool, bool, bool) = look.await?;
    if counts {
        tally::put_together(session).await?;
    }
    if changes {
        session.afterwards(super::session::Shared::enter_changes);
    }
    if !garbage {
        mend::accounts(session).await?;
        return Ok(0);
    }
    for _ in 0..ROUNDS_MAX {
        // What a submit has taken the place of is gone already.
        let (removed, groups) = remove_over(session, limit, now, earlier).await?;
        if removed > 0 || groups == 0 {
            return Ok(removed);
        }
    }
    Ok(0)
}

/// Answers how many were removed, and of how many groups.
async fn remove_over(
    session: &mut Session,
    limit: u32,
    now: i64,
    earlier: &Earlier<(Vec<i64>, u64)>,
) -> Result<(u64, usize), Failure> {
    const CUT: &str = "UPDATE laelaps.retention SET tasks = $2 WHERE id = $1";
    const OUT: &str = "DELETE FROM laelaps.retention WHERE id = ANY($1)";
    let limit = usize::try_from(limit.clamp(1, 100_000)).unwrap_or(1);
    session.begin().await?;
    let groups: Vec<(i64, Vec<i64>)> =
        sqlx::query_as(OVER).bind(super::claim::count(limit)).bind(now).fetch_all(session.db()?).await?;
    let met = groups.len();
    let mut tasks: Vec<i64> = Vec::new();
    let mut done = Vec::new();
    for (id, mut group) in groups {
        let room = limit - tasks.len();
        if group.len() <= room {
            done.push(id);
        } else {
            let rest = group.split_off(room);
            sqlx::query(CUT).bind(id).bind(rest).execute(session.db()?).await?;
        }
        tasks.append(&mut group);
    }
    sqlx::query(OUT).bind(done).execute(session.db()?).await?;
    let removed = remove(session.db()?, &tasks, now).await?;
    earlier.note((tasks, removed));
    session.commit().await?;
    Ok((removed, met))
}
