//! Claims: a constant number of statements, whatever the size of the batch and of the backlog.
//!
//! Where no user has work there is one statement ([`CLAIM`]), which is its own transaction. It looks first: if something has become due, has
//! to run alone or belongs to users, it takes nothing and says so, and that is seen to.
//!
//! Whatever takes something holds the host's row with it, so that whoever marks a host as one that has left waits for claims under way, and
//! claims that come later find it. What a host may have is then seen by whoever takes it back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::failure::{self, Failure};
use super::mark::{From, Place};
use super::session::{Session, Shared};
use super::settle::Group;
use super::{accounts, between};
use crate::outcome::ms;
use crate::{
    Attempt, Claim, Claimed, ClaimedTask, Descent, Event, FailureKind, HostId, Lease, LeaseRef, NewTask, Policy, Result,
    Settlement, TaskId, Timestamp, data,
};

/// The most tasks of one claim.
const CLAIMED_MAX: u32 = 1_000;
/// Tasks whose time has come that one claim moves over.
const DUE_MAX: i64 = 1_000;

/// A claimed task's columns, after those of the look.
macro_rules! taken_columns {
    () => {
        "id, lease, key, type, user_name, attempts, max_attempts, coalesce(lost, 0) AS lost, coalesce(lost_alone, 0) AS lost_alone, alone,
            coalesce(releases, 0) AS releases, created_at, run_at, until, max_running, coalesce(root, id) AS root,
            coalesce(depth, 0) AS depth, coalesce(data, (SELECT data FROM laelaps.task_data WHERE task_data.task = task.id)) AS data"
    };
}
pub(super) use taken_columns;

/// Look, and take the oldest tasks without user if nothing else is to be done before. 67108864: the most data of one claim, unless one task
/// alone has more. The host is noted as seen after its row is held (hence the count), and not if another claim of it holds the row as well.
pub(super) const CLAIM: &str = concat!(
    "WITH look AS MATERIALIZED (
        SELECT clock.now, EXISTS (SELECT FROM laelaps.host WHERE id = $1 AND left_at IS NULL AND ended_at IS NULL) AS here,
            (SELECT run_at FROM laelaps.scheduled WHERE run_at >= $6 ORDER BY run_at, task LIMIT 1) AS next_due,
            (SELECT count(*) FROM (SELECT FROM laelaps.suspect LIMIT 2) AS first) AS suspects,
            CASE WHEN $8 THEN EXISTS (SELECT FROM laelaps.ready WHERE user_name <> '' AND (run_at, task) >= ($9, $10))
                ELSE EXISTS (SELECT FROM laelaps.account_change WHERE id >= $7) END AS changed,
            NOT $8 AND EXISTS (SELECT FROM laelaps.account WHERE open) AS open
        FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now) AS clock),
    locked AS MATERIALIZED (
        SELECT ctid AS place, run_at, task, bytes FROM laelaps.ready
        WHERE user_name = '' AND (run_at, task) >= ($3, $4) ORDER BY run_at, task
        LIMIT (SELECT CASE WHEN here AND NOT changed AND NOT open AND NOT ($11 AND coalesce(next_due <= now, false))
            AND NOT ($12 AND suspects > 0) THEN $2 ELSE 0 END FROM look)
        FOR UPDATE SKIP LOCKED),
    staying AS MATERIALIZED (
        SELECT id FROM laelaps.host WHERE id = $1 AND left_at IS NULL AND ended_at IS NULL
        LIMIT (SELECT CASE WHEN EXISTS (SELECT FROM locked) THEN 1 ELSE 0 END) FOR SHARE),
    seen AS (
        UPDATE laelaps.host SET seen_at = (SELECT now FROM look) WHERE id = ANY(ARRAY(
            SELECT id FROM laelaps.host WHERE id = $1 AND seen_at < (SELECT now FROM look) - 10000
            LIMIT (SELECT 1 + 0 * count(*) FROM staying) FOR NO KEY UPDATE SKIP LOCKED))),
    chosen AS MATERIALIZED (
        SELECT place, task FROM (SELECT place, task, bytes, sum(bytes) OVER (ORDER BY run_at, task) AS sum FROM locked) AS summed
        WHERE (sum <= 67108864 OR sum = bytes) AND EXISTS (SELECT FROM staying)),
    gone AS (DELETE FROM laelaps.ready WHERE ctid = ANY(ARRAY(SELECT place FROM chosen))),
    taken AS (
        UPDATE laelaps.task SET state = 'running', lease = nextval('laelaps.lease_number'), host = $1, until = (SELECT now FROM look) + $5
        WHERE id = ANY(ARRAY(SELECT task FROM chosen)) RETURNING ",
    taken_columns!(),
    "),
    together AS (
        INSERT INTO laelaps.claim (id, host, check_at, tasks)
        SELECT $13, $1, (SELECT now FROM look) + $5, array_agg(task) FROM chosen HAVING count(*) > 0)
    SELECT look.now, look.here AND (EXISTS (SELECT FROM staying) OR NOT EXISTS (SELECT FROM locked)) AS here,
        look.next_due, look.suspects, look.changed, look.open, taken.*
    FROM look LEFT JOIN taken ON true"
);

/// The columns of the look.
const LOOK_COLUMNS: usize = 6;

/// What a claim took out of the database, data as it is stored.
#[derive(Default)]
pub(super) struct Taken {
    tasks: Vec<ClaimedTask>,
    alone_waiting: bool,
    next_due_in: Option<Duration>,
}

/// A claimed task that nobody can read.
pub(super) struct Broken {
    pub(super) task: ClaimedTask,
    pub(super) problem: String,
}

impl Taken {
    /// Hand the tasks back, since nobody is there any more to take them.
    pub(super) async fn give_back(self, shared: &Arc<Shared>) {
        let policy = Policy::default();
        let handed_back = |task: &ClaimedTask| {
            Settlement::of(task.lease_ref, Event::Stopped, Attempt::of(task), &policy, 0.0, None, Vec::new())
        };
        let settlements: Vec<Settlement> = self.tasks.iter().map(handed_back).collect();
        if let Ok(group) = Group::new(&settlements)
            && let Err(error) = group.write_within(shared, "handing back claimed tasks").await
        {
            tracing::warn!(%error, "claimed tasks that nobody waits for come back when their leases end");
        }
    }

    /// Decompress. Tasks whose data is damaged are taken out and answered.
    pub(super) fn open(&mut self) -> Vec<Broken> {
        let mut broken = Vec::new();
        for mut task in std::mem::take(&mut self.tasks) {
            task.compression = data::compression(&task.data);
            let plain = data::decompress(std::mem::take(&mut task.data));
            match plain.and_then(|plain| data::check(&plain).map(|()| plain)) {
                Ok(plain) => self.tasks.push(ClaimedTask { data: plain, ..task }),
                Err(problem) => broken.push(Broken { task, problem }),
            }
        }
        broken
    }

    pub(super) fn into_claimed(self) -> Claimed {
        Claimed { tasks: self.tasks, alone_waiting: self.alone_waiting, next_due_in: self.next_due_in }
    }
}

/// What a claim is about to do, and under which number.
pub(super) struct Asked {
    pub(super) claim: Claim,
    pub(super) limit: usize,
    pub(super) alive_ms: i64,
    /// Drawn by this program, so that what was taken can be found if the answer is lost.
    pub(super) number: i64,
}

impl Asked {
    pub(super) fn new(claim: Claim) -> Self {
        let limit = usize::try_from(claim.limit.clamp(1, CLAIMED_MAX)).unwrap_or(1);
        Self { limit, alive_ms: ms(claim.alive_time), number: fastrand::i64(1..), claim }
    }
}

/// The state of what a claim may have to see to.
pub(super) struct Look {
    pub(super) now: i64,
    next_due: Option<i64>,
    suspects: i64,
    changed: bool,
    open: bool,
}

/// What has been seen to, and need not be looked at again.
#[derive(Clone, Copy)]
struct Rounds {
    due: bool,
    suspects: bool,
}

/// Take waiting tasks under new leases.
pub(super) async fn claim(session: &mut Session, asked: &Asked) -> Result<Taken, Failure> {
    let shared = Arc::clone(&session.shared);
    if session.again
        && let Some(taken) = found_again(session, asked).await?
    {
        return Ok(taken);
    }
    let from = shared.marks.begin();
    let started = Instant::now();
    let mut taken = claim_from(session, asked, from).await?;
    shared.marks.looked(from, started.elapsed());
    if taken.tasks.is_empty()
        && let Some(from) = shared.marks.begin_again(from)
    {
        let started = Instant::now();
        taken = claim_from(session, asked, from).await?;
        shared.marks.looked(from, started.elapsed());
    }
    shared.held.claimed(asked.number, taken.tasks.iter().map(|task| task.lease_ref.lease));
    Ok(taken)
}

async fn claim_from(session: &mut Session, asked: &Asked, mut from: From) -> Result<Taken, Failure> {
    let mut rounds = Rounds { due: true, suspects: asked.claim.alone };
    let (mut entered, mut waited) = (false, false);
    loop {
        let (look, tasks) = look_and_take(session, asked, from, rounds).await?;
        if !tasks.is_empty() {
            return Ok(answer(&look, tasks));
        }
        if rounds.due && look.next_due.is_some_and(|due| due <= look.now) {
            from = move_due(session, from).await?;
            rounds.due = false;
            continue;
        }
        if !entered && look.changed {
            accounts::enter_changes(session, asked.limit, from, accounts::ENTER).await?;
            entered = true;
            continue;
        }
        if rounds.suspects && look.suspects > 0 {
            let tasks = between::suspect(session, asked).await?;
            if !tasks.is_empty() {
                return Ok(answer(&look, tasks));
            }
            rounds.suspects = false;
            continue;
        }
        let tasks = if look.open || look.changed { between::claim(session, asked, from).await? } else { tasks };
        if tasks.is_empty() && look.changed && !waited {
            // Others may be about to enter what this claim is looking for.
            accounts::enter_changes(session, asked.limit, from, accounts::ENTER_WAITING).await?;
            waited = true;
            continue;
        }
        return Ok(answer(&look, tasks));
    }
}

fn answer(look: &Look, tasks: Vec<ClaimedTask>) -> Taken {
    let next_due_in = look.next_due.filter(|due| *due < NewTask::HELD_AT.0).map(|due| Timestamp(due).since(Timestamp(look.now)));
    let alone_waiting = look.suspects > i64::from(tasks.iter().any(|task| task.alone));
    Taken { tasks, alone_waiting, next_due_in }
}

async fn look_and_take(
    session: &mut Session,
    asked: &Asked,
    from: From,
    rounds: Rounds,
) -> Result<(Look, Vec<ClaimedTask>), Failure> {
    let rows = sqlx::query(CLAIM)
        .bind(asked.claim.host.0)
        .bind(count(asked.limit))
        .bind(from.ready.0)
        .bind(from.ready.1)
        .bind(asked.alive_ms)
        .bind(from.due)
        .bind(from.change)
        .bind(asked.claim.ignore_users)
        .bind(from.in_time.0)
        .bind(from.in_time.1)
        .bind(rounds.due)
        .bind(rounds.suspects)
        .bind(asked.number)
        .fetch_all(session.db()?)
        .await?;
    let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    if !first.try_get::<bool, _>(1)? {
        return Err(failure::unknown_host(asked.claim.host));
    }
    let look = Look {
        now: first.try_get(0)?,
        next_due: first.try_get(2)?,
        suspects: first.try_get(3)?,
        changed: first.try_get(4)?,
        open: first.try_get(5)?,
    };
    if first.try_get::<Option<i64>, _>(LOOK_COLUMNS)?.is_none() {
        return Ok((look, Vec::new()));
    }
    let placed = in_order(&rows, LOOK_COLUMNS, look.now)?;
    if let Some((last, _)) = placed.last() {
        session.shared.marks.took_ready(from, *last);
    }
    Ok((look, placed.into_iter().map(|(_, task)| task).collect()))
}

/// The tasks of the rows with their places, in the order of claims.
pub(super) fn in_order(rows: &[PgRow], first: usize, now: i64) -> Result<Vec<(Place, ClaimedTask)>, sqlx::Error> {
    let mut placed: Vec<(Place, ClaimedTask)> = rows.iter().map(|row| taken(row, first, now)).collect::<Result<_, _>>()?;
    placed.sort_unstable_by_key(|(place, _)| *place);
    Ok(placed)
}

/// A claimed task and its place.
pub(super) fn taken(row: &PgRow, first: usize, now: i64) -> Result<(Place, ClaimedTask), sqlx::Error> {
    let number = |place: usize| row.try_get::<i32, _>(first + place).map(i32::unsigned_abs);
    let task: i64 = row.try_get(first)?;
    let user: &str = row.try_get(first + 4)?;
    let claimed = ClaimedTask {
        lease_ref: LeaseRef { task: TaskId(task), lease: Lease(row.try_get(first + 1)?) },
        key: row.try_get(first + 2)?,
        task_type: row.try_get(first + 3)?,
        data: row.try_get::<Option<Vec<u8>>, _>(first + 17)?.unwrap_or_default(),
        user: Some(user).filter(|user| !user.is_empty()).map(str::to_owned),
        max_running: row.try_get::<Option<i64>, _>(first + 14)?.map(|most| u32::try_from(most).unwrap_or(u32::MAX)),
        descent: Descent { root: TaskId(row.try_get(first + 15)?), depth: number(16)? },
        compression: crate::Compression::None,
        attempt: number(5)?.saturating_add(1),
        max_attempts: row.try_get::<Option<i64>, _>(first + 6)?.map(|most| u32::try_from(most).unwrap_or(u32::MAX)),
        lost: number(7)?,
        lost_alone: number(8)?,
        alone: row.try_get(first + 9)?,
        releases: number(10)?,
        created_at: Timestamp(row.try_get(first + 11)?),
        claimed_at: Timestamp(now),
        until: Timestamp(row.try_get(first + 13)?),
    };
    Ok(((row.try_get(first + 12)?, task), claimed))
}

/// Move what has become due to where it can be claimed. A task's row is as its place says: whoever changes it takes the place away first.
pub(super) const MOVE_DUE: &str = "WITH due AS (
        DELETE FROM laelaps.scheduled WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM laelaps.scheduled
            WHERE run_at >= $1 AND run_at <= (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8)
            ORDER BY run_at, task LIMIT $2 FOR UPDATE SKIP LOCKED))
        RETURNING task),
    moved AS MATERIALIZED (
        SELECT id, run_at, bytes, max_running, user_name, type, alone FROM laelaps.task WHERE id = ANY(ARRAY(SELECT task FROM due))),
    ready AS (
        INSERT INTO laelaps.ready (run_at, task, bytes, max_running, user_name)
        SELECT run_at, id, bytes, max_running, user_name FROM moved WHERE NOT alone),
    suspect AS (INSERT INTO laelaps.suspect (run_at, task) SELECT run_at, id FROM moved WHERE alone),
    changed AS (
        INSERT INTO laelaps.account_change (user_name, run_at, task, max_running)
        SELECT DISTINCT ON (user_name) user_name, run_at, id, max_running FROM moved WHERE user_name <> '' AND NOT alone
        ORDER BY user_name, run_at, id),
    counted AS (INSERT INTO laelaps.tally (type, scheduled) SELECT type, -count(*) FROM moved GROUP BY type)
    SELECT count(*), min(run_at), (array_agg(id ORDER BY run_at, id))[1] FROM moved";

/// Move what is due; answers where the claim has to begin now.
async fn move_due(session: &mut Session, from: From) -> Result<From, Failure> {
    let moved: (i64, Option<i64>, Option<i64>) =
        sqlx::query_as(MOVE_DUE).bind(from.due).bind(DUE_MAX).fetch_one(session.db()?).await?;
    let shared = &session.shared;
    let (_, Some(run_at), Some(task)) = moved else { return Ok(from) };
    shared.marks.moved_due(from, run_at);
    shared.marks.lower((run_at, task));
    Ok(from.lowered((run_at, task)))
}

/// Hold the row of a host that is about to be given tasks.
///
/// # Errors
/// [`crate::Error::UnknownHost`] if it is not there, or has left.
pub(super) async fn hold_host(session: &mut Session, host: HostId) -> Result<(), Failure> {
    const HOLD: &str = "SELECT id FROM laelaps.host WHERE id = $1 AND left_at IS NULL AND ended_at IS NULL FOR SHARE";
    let held: Option<i64> = sqlx::query_scalar(HOLD).bind(host.0).fetch_optional(session.db()?).await?;
    held.map(drop).ok_or_else(|| failure::unknown_host(host))
}

/// What an earlier try of this claim took, if it took anything.
async fn found_again(session: &mut Session, asked: &Asked) -> Result<Option<Taken>, Failure> {
    const FOUND: &str = concat!(
        "SELECT ",
        taken_columns!(),
        ", (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now FROM laelaps.task
        WHERE id = ANY(ARRAY(SELECT unnest(tasks) FROM laelaps.claim WHERE claim.id = $1)) AND state = 'running' AND host = $2"
    );
    let rows = sqlx::query(FOUND).bind(asked.number).bind(asked.claim.host.0).fetch_all(session.db()?).await?;
    let Some(first) = rows.first() else { return Ok(None) };
    let now = first.try_get(18)?;
    let tasks: Vec<ClaimedTask> = in_order(&rows, 0, now)?.into_iter().map(|(_, task)| task).collect();
    session.shared.held.claimed(asked.number, tasks.iter().map(|task| task.lease_ref.lease));
    Ok(Some(Taken { tasks, alone_waiting: false, next_due_in: None }))
}

/// Fail claimed tasks that nobody can read, so that they stop nobody.
pub(super) async fn set_aside(shared: &Arc<Shared>, broken: Vec<Broken>) -> Result<()> {
    let policy = Policy::default();
    let mut settlements = Vec::with_capacity(broken.len());
    for Broken { task, problem } in broken {
        tracing::error!(task = task.key, problem, "the data of a task is damaged; it is set aside as failed");
        let event = Event::Failure {
            kind: FailureKind::Reject,
            code: "damaged-data".to_owned(),
            message: format!("the stored data cannot be used: {problem}"),
        };
        settlements.push(Settlement::of(task.lease_ref, event, Attempt::of(&task), &policy, 0.0, None, Vec::new()));
    }
    Group::new(&settlements)?.write(shared, "setting aside damaged tasks").await.map(drop)
}

/// A number of tasks as the database counts.
pub(super) fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
