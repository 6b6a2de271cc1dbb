//! Claims: a constant number of statements, whatever the size of the batch and of the backlog.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::Duration;

use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row as _};

use super::accounts::{Changes, Owner, json, one_json};
use super::aside::{self, Place};
use super::choose::{self, Chosen, Found};
use super::failure::{self, Failure};
use super::pieces::{data_bytes, whole_data};
use super::settle::Group;
use super::unserved;
use super::writer::{Job, Session, unasked};
use crate::outcome::ms;
use crate::task::{queue_name, stored_queue};
use crate::unserved::{ROUNDS_MAX, Sieve, Watch};
use crate::{
    Attempt, Claim, Claimed, ClaimedTask, Descent, Error, Event, HostId, Lease, LeaseRef, NewTask, Policy, Settlement, TaskId,
    Timestamp, check_queue, data,
};

/// The most tasks of one claim.
const CLAIMED_MAX: u32 = 1_000;
/// The most data of one claim, before compression, unless one task alone has more.
const CLAIMED_BYTES_MAX: i64 = 64 << 20;
/// Tasks whose time has come that one claim moves over.
const DUE_MAX: i64 = 1_000;
/// A number of picks that no queue comes to.
const PICKS_MAX: i64 = i64::MAX / 2;

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
    /// What hands the tasks back if nobody is there any more to take them.
    pub(super) fn give_back(self) -> Option<Box<dyn Job>> {
        let policy = Policy::default();
        let handed_back = |task: &ClaimedTask| {
            Settlement::of(task.lease_ref, Event::Stopped, Attempt::of(task), &policy, 0.0, None, Vec::new())
        };
        let settlements: Vec<Settlement> = self.tasks.iter().map(handed_back).collect();
        let group = Group::new(&settlements).ok().filter(|_| !settlements.is_empty())?;
        Some(unasked("handing back claimed tasks", move |session| Box::pin(async move { group.write(session).await.map(drop) })))
    }

    /// Decompress. Tasks whose data is damaged are set apart.
    pub(super) fn into_claimed(self) -> (Claimed, Vec<Broken>) {
        let mut tasks = Vec::with_capacity(self.tasks.len());
        let mut broken = Vec::new();
        for mut task in self.tasks {
            task.compression = data::compression(&task.data);
            let plain = data::decompress(std::mem::take(&mut task.data));
            match plain.and_then(|plain| data::check(&plain).map(|()| plain)) {
                Ok(plain) => tasks.push(ClaimedTask { data: plain, ..task }),
                Err(problem) => broken.push(Broken { task, problem }),
            }
        }
        (Claimed { tasks, alone_waiting: self.alone_waiting, next_due_in: self.next_due_in }, broken)
    }
}

/// Take waiting tasks under new leases. Those of types that the host does not serve are put apart.
pub(super) async fn claim(session: &mut Session, claim: &Claim, watch: &Watch) -> Result<Taken, Failure> {
    const LOOK: &str = "SELECT (SELECT count(*) FROM host WHERE id = ?1 AND left_at IS NULL AND ended_at IS NULL),
        (SELECT min(run_at) FROM scheduled), (SELECT count(*) FROM (SELECT 1 FROM suspect LIMIT 2)), lease, pick FROM counter";
    let limit = limit_of(claim);
    let look_again_in = unserved::take_back(session, watch, claim, limit).await?;
    let look = sqlx::query_as(LOOK).bind(claim.host.0).fetch_optional(session.db()).await?;
    let look: (bool, Option<i64>, i64, i64, i64) = match look {
        Some(look) => look,
        None => {
            aside::restore_counter(session).await?;
            sqlx::query_as(LOOK).bind(claim.host.0).fetch_one(session.db()).await?
        }
    };
    let (registered, mut next_due, mut suspects, lease, pick) = look;
    if !registered {
        return Err(failure::unknown_host(claim.host));
    }
    let now = session.now;
    if next_due.is_some_and(|due| due <= now) {
        (next_due, suspects) = move_due(session).await?;
    }
    let mut tasks = Vec::new();
    let mut counter = Counter { lease, pick: pick.clamp(0, PICKS_MAX) };
    let mut sieve = Sieve::new(claim);
    for round in 0..=ROUNDS_MAX {
        // The next claim goes on from here.
        let is_last = round == ROUNDS_MAX || sieve.is_enough();
        session.wake |= is_last;
        let asked = if tasks.is_empty() { sieve.asked() } else { Cow::Borrowed(claim) };
        let suspects = if tasks.is_empty() { suspects } else { 0 };
        match choose::choose(session, &asked, suspects, limit_of(&asked) - tasks.len(), counter.pick).await? {
            Found::Tasks { chosen, alone } => {
                let chosen = fitting(session, chosen).await?;
                let mended = take(session, claim, &chosen, alone, &mut counter, &mut tasks).await?;
                let all_served = put_apart(session, watch, &mut sieve, &mut tasks).await?;
                if (all_served && !mended) || tasks.len() == limit || (alone && !tasks.is_empty()) || is_last {
                    break;
                }
            }
            Found::Nameless(accounts) => {
                for account in accounts {
                    aside::of_account(session, &account).await?;
                }
            }
            Found::Misplaced(places) => aside::drop_places(session, &places).await?,
        }
    }
    let alone_waiting =
        suspects > i64::from(tasks.iter().any(|task| task.alone)) && choose::is_wanted_alone(session, claim).await?;
    let next_due_in = next_due.filter(|due| *due < NewTask::HELD_AT.0).map(|due| Timestamp(due).since(Timestamp(now)));
    let next_due_in = next_due_in.into_iter().chain(look_again_in).min();
    Ok(Taken { tasks, alone_waiting, next_due_in })
}

fn limit_of(claim: &Claim) -> usize {
    usize::try_from(claim.limit.clamp(1, CLAIMED_MAX)).unwrap_or(1)
}

/// Put those apart that the host does not serve. Answers whether it serves all.
async fn put_apart(
    session: &mut Session,
    watch: &Watch,
    sieve: &mut Sieve<'_>,
    tasks: &mut Vec<ClaimedTask>,
) -> Result<bool, Failure> {
    let (served, others) = sieve.sift(std::mem::take(tasks));
    *tasks = served;
    if others.is_empty() {
        return Ok(true);
    }
    Group::new(&others)?.write(session).await?;
    watch.settled(&others);
    Ok(false)
}

pub(super) const DUE: &str = "DELETE FROM scheduled WHERE (run_at, task) IN
            (SELECT run_at, task FROM scheduled WHERE run_at <= ?1 ORDER BY run_at, task LIMIT ?2)
        RETURNING task";

/// Move what has become due to where it can be claimed. Answers when the next is due, and how many tasks wait that have
/// to run alone, up to two.
async fn move_due(session: &mut Session) -> Result<(Option<i64>, i64), Failure> {
    const LOOK: &str = "SELECT (SELECT min(run_at) FROM scheduled), (SELECT count(*) FROM (SELECT 1 FROM suspect LIMIT 2))";
    let now = session.now;
    let due: Vec<i64> = sqlx::query_scalar(DUE).bind(now).bind(DUE_MAX).fetch_all(session.db()).await?;
    move_in(session, due).await?;
    Ok(sqlx::query_as(LOOK).fetch_one(session.db()).await?)
}

/// Put tasks where their rows say, now that they stand no longer where they stood.
pub(super) async fn move_in(session: &mut Session, tasks: Vec<i64>) -> Result<(), Failure> {
    // Only of tasks that wait: whatever else stood there has left it now.
    const TASKS: &str = "SELECT id, run_at, user, max_running, alone, priority, queue FROM task
        WHERE id IN (SELECT value FROM json_each(?1)) AND state = 'waiting'";
    let asked = tasks.len();
    let rows = sqlx::query(TASKS).bind(json(tasks)).fetch_all(session.db()).await?;
    if rows.len() < asked {
        tracing::error!(places = asked - rows.len(), "places of tasks that stood there twice, or do not wait, were removed");
    }
    let (waiting, unreadable) = aside::waiting(rows.iter());
    let mut changes = Changes::default();
    changes.enqueue(session, &waiting).await?;
    // Written at once: the choice between users that follows reads their accounts.
    changes.write(session).await?;
    aside::set_aside(session, &unreadable).await
}

/// The first of the chosen whose data together keeps the bound.
async fn fitting(session: &mut Session, mut chosen: Vec<Chosen>) -> Result<Vec<Chosen>, Failure> {
    const SUM: &str =
        "SELECT coalesce(sum(min(max(bytes, 0), 16777216)), 0) FROM task_data WHERE task IN (SELECT value FROM json_each(?1))";
    if chosen.is_empty() {
        return Ok(chosen);
    }
    let tasks = json(chosen.iter().map(|chosen| chosen.task));
    let sum: i64 = sqlx::query_scalar(SUM).bind(tasks).fetch_one(session.db()).await?;
    if sum > CLAIMED_BYTES_MAX {
        cut_to_bound(session, &mut chosen).await?;
    }
    Ok(chosen)
}

/// Leave out what does not fit behind the first.
async fn cut_to_bound(session: &mut Session, chosen: &mut Vec<Chosen>) -> Result<(), Failure> {
    const BYTES: &str =
        "SELECT task, min(max(bytes, 0), 16777216) FROM task_data WHERE task IN (SELECT value FROM json_each(?1))";
    let tasks = json(chosen.iter().map(|chosen| chosen.task));
    let bytes: Vec<(i64, i64)> = sqlx::query_as(BYTES).bind(tasks).fetch_all(session.db()).await?;
    let bytes: HashMap<i64, i64> = bytes.into_iter().collect();
    let mut sum = 0_i64;
    let fitting = chosen.iter().take_while(|chosen| {
        sum += bytes.get(&chosen.task).copied().unwrap_or(0);
        sum <= CLAIMED_BYTES_MAX
    });
    chosen.truncate(fitting.count().max(1));
    Ok(())
}

/// The key is read from the task's row: SQLite looks a set of expressions up by the first column alone.
pub(super) const TAKE_FROM_READY: &str = "DELETE FROM ready WHERE (queue, user, turn, task) IN
        (SELECT queue, user, turn, id FROM task WHERE id IN (SELECT value FROM json_each(?1, '$.tasks')))";

pub(super) const TAKE_FROM_SUSPECT: &str = "DELETE FROM suspect WHERE (turn, task) IN
        (SELECT turn, id FROM task WHERE alone AND id IN (SELECT value FROM json_each(?1, '$.tasks')))";

const COUNT_UP: &str = "UPDATE counter SET lease = ?1 ->> 'lease', pick = ?1 ->> 'pick'";

pub(super) const TAKE: &str =
    "UPDATE task SET state = 'running', lease = (?1 ->> 'first_lease') + chosen.key, host = ?1 ->> 'host',
            until = ?1 ->> 'until'
        FROM json_each(?1, '$.tasks') AS chosen
        WHERE task.id = chosen.value AND task.state = 'waiting' AND (task.alone <> 0) = (?1 ->> 'alone')";

/// Data that nobody could have submitted is not read. Those that were not taken are not among them: their places did not fit them.
pub(super) const TAKEN: &str = concat!(
    "SELECT json_array(task.id, task.lease, task.key, task.type, task.user, task.attempts, task.max_attempts,
            task.lost, task.lost_alone, task.alone, task.releases, task.created_at, task.max_running, coalesce(task.root, task.id),
            coalesce(task.depth, 0), task.turn, task.queue),
            CASE WHEN ", data_bytes!(), " > 17825792 THEN ", data_bytes!(), " || ' bytes, more than can be stored'
                ELSE ", whole_data!(), " END,
            task.lease
        FROM json_each(?1, '$.tasks') AS chosen CROSS JOIN task ON task.id = chosen.value
        LEFT JOIN task_data ON task_data.task = task.id
        WHERE task.lease = (?1 ->> 'first_lease') + chosen.key AND task.state = 'running' ORDER BY chosen.key"
);

/// In one go, since each has the same parameter, and each way to SQLite's thread and back has its price.
static TAKE_ALL: LazyLock<String> = LazyLock::new(|| [TAKE_FROM_READY, TAKE_FROM_SUSPECT, COUNT_UP, TAKE, TAKEN].join(";\n"));

/// The last numbers given out.
struct Counter {
    lease: i64,
    pick: i64,
}

/// What the statements that take have to know.
#[derive(serde::Serialize)]
struct Take {
    tasks: Vec<i64>,
    first_lease: i64,
    lease: i64,
    pick: i64,
    host: HostId,
    until: i64,
    alone: u8,
}

/// Put the chosen under new leases, and what cannot be taken away. Answers whether there was such.
async fn take(
    session: &mut Session,
    claim: &Claim,
    chosen: &[Chosen],
    alone: bool,
    counter: &mut Counter,
    tasks: &mut Vec<ClaimedTask>,
) -> Result<bool, Failure> {
    if chosen.is_empty() {
        return Ok(false);
    }
    let now = session.now;
    let until = now.saturating_add(ms(claim.alive_time));
    let (first_lease, lease) = leases(counter.lease, chosen.len())?;
    let take = Take {
        first_lease,
        lease,
        pick: chosen.iter().filter_map(|chosen| chosen.pick).max().unwrap_or(counter.pick),
        host: claim.host,
        until,
        tasks: chosen.iter().map(|chosen| chosen.task).collect(),
        alone: u8::from(alone),
    };
    let rows = sqlx::query(AssertSqlSafe(TAKE_ALL.as_str())).bind(one_json(&take)).fetch_all(session.db()).await?;
    *counter = Counter { lease: take.lease, pick: take.pick };
    // A list that grows to its size moves all of it several times.
    tasks.reserve(rows.len());
    let mut changes = Changes::default();
    let mut unreadable = Vec::new();
    let mut misplaced: Vec<Place> = Vec::new();
    let mut places = chosen.iter().enumerate();
    for row in &rows {
        let lease: i64 = row.try_get(2)?;
        // Rows come in the order of the chosen; those between were not taken.
        let place = places.by_ref().find(|(at, place)| {
            let taken = first_lease + count(*at) == lease;
            if !taken {
                misplaced.push(place.place());
            }
            taken
        });
        let Some((_, place)) = place else { break };
        changes.claimed(&place.owner, place.pick);
        if !alone {
            changes.unready(&place.owner);
        }
        match taken(row, now, until) {
            Some((task, turn)) if owner(&task) == place.owner && turn == place.turn => tasks.push(task),
            Some((task, _)) => {
                // It was taken from a place that is not its own. What belongs to it is gone as well; both accounts are counted anew.
                changes.uncounted(&place.owner);
                changes.uncounted(&owner(&task));
                misplaced.push(place.place());
                tasks.push(task);
            }
            None => {
                changes.uncounted(&place.owner);
                unreadable.push(place.task);
            }
        }
    }
    misplaced.extend(places.map(|(_, place)| place.place()));
    changes.write(session).await?;
    aside::set_aside(session, &unreadable).await?;
    if !misplaced.is_empty() {
        aside::drop_places(session, &misplaced).await?;
    }
    Ok(!unreadable.is_empty() || !misplaced.is_empty())
}

/// The first and the last of so many new lease numbers.
fn leases(last: i64, chosen: usize) -> Result<(i64, i64), Failure> {
    let used_up = || Error::Corrupt { path: "counter".into(), problem: format!("no lease number follows {last}") };
    let new_last = last.checked_add(count(chosen)).ok_or_else(used_up)?;
    Ok((last + 1, new_last))
}

/// The columns of a claimed task: number, lease, key, type, user, attempts, most attempts, losses, losses alone, alone, releases, when it was
/// submitted, most running of its user, root, depth, turn, queue. Read as one text, since each column of a row has its price.
#[derive(serde::Deserialize)]
struct Columns(i64, i64, String, String, String, u32, Option<u32>, u32, u32, i64, u32, i64, Option<u32>, i64, u32, i64, String);

/// Whose account a task counts in.
fn owner(task: &ClaimedTask) -> Owner {
    Owner { queue: stored_queue(Some(&task.queue)).to_owned(), user: task.user.clone().unwrap_or_default() }
}

/// The task, and its turn; None if its row cannot be read.
fn taken(row: &SqliteRow, now: i64, until: i64) -> Option<(ClaimedTask, i64)> {
    let columns: Columns = serde_json::from_str(row.try_get::<&str, _>(0).ok()?).ok()?;
    let Columns(task, lease, key, task_type, user, attempts, max_attempts, lost, lost_alone, alone, releases, created_at, ..) =
        columns;
    let Columns(.., max_running, root, depth, turn, queue) = columns;
    if !queue.is_empty() && (check_queue(&queue).is_err() || queue == NewTask::DEFAULT_QUEUE) {
        return None;
    }
    let stored: Option<Vec<u8>> = row.try_get_unchecked(1).ok()?;
    let task = ClaimedTask {
        lease_ref: LeaseRef { task: TaskId(task), lease: Lease(lease) },
        key,
        task_type,
        queue: queue_name(queue),
        data: stored.unwrap_or_default(),
        user: Some(user).filter(|user| !user.is_empty()),
        max_running,
        descent: Descent { root: TaskId(root), depth },
        compression: crate::Compression::None,
        attempt: attempts.saturating_add(1),
        max_attempts,
        lost,
        lost_alone,
        alone: alone != 0,
        releases,
        created_at: Timestamp(created_at),
        claimed_at: Timestamp(now),
        until: Timestamp(until),
    };
    Some((task, turn))
}

/// A number of tasks as the database counts.
pub(super) fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
