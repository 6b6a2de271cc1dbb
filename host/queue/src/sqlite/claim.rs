//! Claims: a constant number of statements, whatever the size of the batch and of the backlog.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::Duration;

use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row as _};

use super::accounts::{Changes, Waiting, json, one_json};
use super::failure::{self, Failure};
use super::settle::Group;
use super::writer::{Job, Session, unasked};
use crate::fair::{self, Account, Candidate, Rest};
use crate::outcome::ms;
use crate::{
    Attempt, Claim, Claimed, ClaimedTask, Descent, Event, HostId, Lease, LeaseRef, NewTask, Policy, Settlement, TaskId,
    Timestamp, data,
};

/// The most tasks of one claim.
const CLAIMED_MAX: u32 = 1_000;
/// The most data of one claim, before compression, unless one task alone has more.
const CLAIMED_BYTES_MAX: i64 = 64 << 20;
/// Tasks whose time has come that one claim moves over.
const DUE_MAX: i64 = 1_000;
/// Tasks looked at for one that has to run alone and whose user has nothing running.
const SUSPECTS_MAX: i64 = 100;
/// Rounds of choosing, where users' tasks differ so much in their max_running that the first did not fill the batch.
const ROUNDS_MAX: usize = 4;

/// A task that was chosen, and where it waited.
struct Chosen {
    task: i64,
    run_at: i64,
    user: String,
    /// The number of its pick between users, if it was picked between users.
    pick: Option<i64>,
}

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

/// Take waiting tasks under new leases.
pub(super) async fn claim(session: &mut Session, claim: &Claim) -> Result<Taken, Failure> {
    const LOOK: &str = "SELECT (SELECT count(*) FROM host WHERE id = ?1 AND left_at IS NULL AND ended_at IS NULL),
        (SELECT min(run_at) FROM scheduled), (SELECT count(*) FROM (SELECT 1 FROM suspect LIMIT 2)), lease, pick FROM counter";
    let look = sqlx::query_as(LOOK).bind(claim.host.0).fetch_one(session.db()).await?;
    let (registered, mut next_due, mut suspects, lease, pick): (bool, Option<i64>, i64, i64, i64) = look;
    if !registered {
        return Err(failure::unknown_host(claim.host));
    }
    let now = session.now;
    let mut changes = Changes::default();
    if next_due.is_some_and(|due| due <= now) {
        (next_due, suspects) = move_due(session).await?;
    }
    let limit = usize::try_from(claim.limit.clamp(1, CLAIMED_MAX)).unwrap_or(1);
    let alone = if claim.alone && suspects > 0 { suspect(session).await? } else { None };
    let chosen = match alone {
        Some(chosen) => vec![chosen],
        None if claim.ignore_users => oldest(session, limit).await?,
        None => between_users(session, limit, pick).await?,
    };
    let chosen = fitting(session, chosen).await?;
    let tasks = take(session, claim, chosen, Counter { lease, pick }, &mut changes).await?;
    changes.write(session).await?;
    let alone_waiting = suspects > i64::from(tasks.iter().any(|task| task.alone));
    let next_due_in = next_due.filter(|due| *due < NewTask::HELD_AT.0).map(|due| Timestamp(due).since(Timestamp(now)));
    Ok(Taken { tasks, alone_waiting, next_due_in })
}

pub(super) const DUE: &str = "DELETE FROM scheduled WHERE (run_at, task) IN
            (SELECT run_at, task FROM scheduled WHERE run_at <= ?1 ORDER BY run_at, task LIMIT ?2)
        RETURNING task";

/// Move what has become due to where it can be claimed. Answers when the next is due, and how many tasks wait that have
/// to run alone, up to two.
async fn move_due(session: &mut Session) -> Result<(Option<i64>, i64), Failure> {
    const TASKS: &str = "SELECT id, run_at, user, max_running, alone FROM task WHERE id IN (SELECT value FROM json_each(?1))";
    const LOOK: &str = "SELECT (SELECT min(run_at) FROM scheduled), (SELECT count(*) FROM (SELECT 1 FROM suspect LIMIT 2))";
    let now = session.now;
    let due: Vec<i64> = sqlx::query_scalar(DUE).bind(now).bind(DUE_MAX).fetch_all(session.db()).await?;
    let mut waiting = Vec::with_capacity(due.len());
    for row in sqlx::query(TASKS).bind(json(due)).fetch_all(session.db()).await? {
        waiting.push(Waiting {
            task: row.try_get(0)?,
            run_at: row.try_get(1)?,
            user: row.try_get(2)?,
            max_running: row.try_get(3)?,
            alone: row.try_get(4)?,
        });
    }
    let mut changes = Changes::default();
    changes.enqueue(session, &waiting).await?;
    // Written at once: the choice between users that follows reads their accounts.
    changes.write(session).await?;
    Ok(sqlx::query_as(LOOK).fetch_one(session.db()).await?)
}

pub(super) const SUSPECT: &str = "SELECT oldest.task, oldest.run_at, task.user
        FROM (SELECT run_at, task FROM suspect ORDER BY run_at, task LIMIT ?1) AS oldest
        JOIN task ON task.id = oldest.task
        LEFT JOIN account ON account.user = task.user AND task.user <> ''
        WHERE task.max_running IS NULL OR coalesce(account.running, 0) < max(task.max_running, 1)
        ORDER BY oldest.run_at, oldest.task LIMIT 1";

/// The oldest task that has to run alone and whose user's limit allows it.
async fn suspect(session: &mut Session) -> Result<Option<Chosen>, Failure> {
    let Some(row) = sqlx::query(SUSPECT).bind(SUSPECTS_MAX).fetch_optional(session.db()).await? else { return Ok(None) };
    Ok(Some(Chosen { task: row.try_get(0)?, run_at: row.try_get(1)?, user: row.try_get(2)?, pick: None }))
}

pub(super) const OLDEST: &str = "SELECT task, run_at, user FROM (
            SELECT * FROM (SELECT task, run_at, user FROM ready WHERE user = '' ORDER BY run_at, task LIMIT ?1)
            UNION ALL
            SELECT * FROM (SELECT task, run_at, user FROM ready INDEXED BY ready_in_time WHERE user <> ''
                ORDER BY run_at, task LIMIT ?1))
        ORDER BY run_at, task LIMIT ?1";

/// The oldest ready tasks, whosever they are.
async fn oldest(session: &mut Session, limit: usize) -> Result<Vec<Chosen>, Failure> {
    let rows = sqlx::query(OLDEST).bind(count(limit)).fetch_all(session.db()).await?;
    let chosen =
        rows.iter().map(|row| Ok(Chosen { task: row.try_get(0)?, run_at: row.try_get(1)?, user: row.try_get(2)?, pick: None }));
    Ok(chosen.collect::<Result<_, sqlx::Error>>()?)
}

/// Tasks picked between users, in the fair order.
async fn between_users(session: &mut Session, limit: usize, last_pick: i64) -> Result<Vec<Chosen>, Failure> {
    let mut accounts = open_accounts(session, limit, last_pick + 1).await?;
    if accounts.is_empty() {
        return Ok(Vec::new());
    }
    let mut chosen: Vec<Chosen> = Vec::with_capacity(limit);
    for _ in 0..ROUNDS_MAX {
        let number = last_pick + 1 + count(chosen.len());
        let wanted = limit - chosen.len();
        let needed = fair::estimate(&accounts, wanted, number);
        candidates(session, &mut accounts, &needed).await?;
        let picks = fair::pick(&mut accounts, wanted, number);
        let first = chosen.len();
        chosen.extend(picks.into_iter().enumerate().map(|(place, pick)| Chosen {
            task: pick.candidate.task,
            run_at: pick.candidate.run_at,
            user: accounts[pick.account].user.clone(),
            pick: Some(number + count(place)),
        }));
        let stopped_short = chosen.len() < limit && chosen.len() > first;
        let unknown = accounts.iter().any(|account| account.candidates.is_empty() && account.rest == Rest::Unknown);
        if !(stopped_short && unknown) {
            break;
        }
        refill(session, &mut accounts, &chosen).await?;
    }
    Ok(chosen)
}

pub(super) const OPEN_ACCOUNTS: &str =
    "SELECT * FROM (SELECT user, running, picked, head_at, head_task, head_max FROM account INDEXED BY account_by_weight
            WHERE open ORDER BY weight DESC, head_at, head_task LIMIT ?1)
        UNION
        SELECT * FROM (SELECT user, running, picked, head_at, head_task, head_max FROM account INDEXED BY account_by_age
            WHERE open AND picked < ?2 ORDER BY picked LIMIT ?3)";

/// The users that could be picked: those of the greatest weight, and those passed over for long.
async fn open_accounts(session: &mut Session, limit: usize, first_pick: i64) -> Result<Vec<Account>, Failure> {
    let aged = count(limit) / fair::AGED_EVERY + 1;
    let last_pick = first_pick + count(limit) - 1;
    let rows = sqlx::query(OPEN_ACCOUNTS)
        .bind(count(limit))
        .bind(last_pick - fair::AGED_AFTER)
        .bind(aged)
        .fetch_all(session.db())
        .await?;
    let account = |row: &SqliteRow| {
        let head = Candidate { run_at: row.try_get(3)?, task: row.try_get(4)?, max_running: row.try_get(5)? };
        Ok(Account {
            user: row.try_get(0)?,
            running: row.try_get(1)?,
            picked: row.try_get(2)?,
            candidates: [head].into(),
            rest: Rest::Unknown,
        })
    };
    Ok(rows.iter().map(account).collect::<Result<_, sqlx::Error>>()?)
}

pub(super) const CANDIDATES_OF_ONE: &str = "SELECT user, run_at, task, max_running FROM ready
        WHERE user = ?1 AND (run_at, task) > (?2, ?3) ORDER BY run_at, task LIMIT ?4";

/// A plus takes a column's affinity away, without which SQLite would look at the time alone and pass over all tasks of the same one.
pub(super) const CANDIDATES_OF_SEVERAL: &str = "WITH RECURSIVE walk (user, run_at, task, max_running, wanted, steps) AS (
            SELECT value ->> 0, value ->> 1, value ->> 2, NULL, value ->> 3, 0 FROM json_each(?1)
            UNION ALL
            SELECT next.user, next.run_at, next.task, next.max_running, walk.wanted - 1, walk.steps + 1
            FROM walk CROSS JOIN ready AS next ON next.user = walk.user
                AND (next.run_at, next.task) = (SELECT later.run_at, later.task FROM ready AS later
                    WHERE later.user = walk.user AND (later.run_at, later.task) > (+walk.run_at, +walk.task)
                    ORDER BY later.run_at, later.task LIMIT 1)
            WHERE walk.wanted > 0)
        SELECT user, run_at, task, max_running FROM walk WHERE steps > 0";

/// Fetch as many of each user's oldest tasks as are needed.
async fn candidates(session: &mut Session, accounts: &mut [Account], needed: &[usize]) -> Result<(), Failure> {
    let wanted: Vec<(&str, i64, i64, i64)> = accounts
        .iter()
        .zip(needed)
        .filter(|(account, needed)| account.rest == Rest::Unknown && **needed > account.candidates.len())
        .filter_map(|(account, needed)| {
            let last = account.candidates.back()?;
            Some((account.user.as_str(), last.run_at, last.task, count(*needed - account.candidates.len())))
        })
        .collect();
    let rows = match wanted.as_slice() {
        [] => return Ok(()),
        [(user, run_at, task, more)] => {
            sqlx::query(CANDIDATES_OF_ONE)
                .bind((*user).to_owned())
                .bind(*run_at)
                .bind(*task)
                .bind(*more)
                .fetch_all(session.db())
                .await?
        }
        several => sqlx::query(CANDIDATES_OF_SEVERAL).bind(json(several)).fetch_all(session.db()).await?,
    };
    let mut found: HashMap<String, Vec<Candidate>> = HashMap::with_capacity(wanted.len());
    for row in &rows {
        let candidate = Candidate { run_at: row.try_get(1)?, task: row.try_get(2)?, max_running: row.try_get(3)? };
        found.entry(row.try_get(0)?).or_default().push(candidate);
    }
    let asked: HashMap<String, i64> = wanted.iter().map(|(user, _, _, more)| ((*user).to_owned(), *more)).collect();
    for account in accounts.iter_mut() {
        let Some(asked) = asked.get(&account.user) else { continue };
        let mut more = found.remove(&account.user).unwrap_or_default();
        more.sort_unstable_by_key(|candidate| (candidate.run_at, candidate.task));
        if count(more.len()) < *asked {
            account.rest = Rest::Nothing;
        }
        account.candidates.extend(more);
    }
    Ok(())
}

/// Give each user that ran out of known tasks its next one.
async fn refill(session: &mut Session, accounts: &mut [Account], chosen: &[Chosen]) -> Result<(), Failure> {
    const NEXT: &str = "SELECT run_at, task, max_running FROM ready
        WHERE user = ?1 AND (run_at, task) > (?2, ?3) ORDER BY run_at, task LIMIT 1";
    for account in accounts.iter_mut().filter(|account| account.candidates.is_empty() && account.rest == Rest::Unknown) {
        let Some(last) = chosen.iter().rev().find(|chosen| chosen.user == account.user) else { continue };
        let next = sqlx::query(NEXT).bind(account.user.clone()).bind(last.run_at).bind(last.task);
        match next.fetch_optional(session.db()).await? {
            Some(row) => account.candidates.push_back(Candidate {
                run_at: row.try_get(0)?,
                task: row.try_get(1)?,
                max_running: row.try_get(2)?,
            }),
            None => account.rest = Rest::Nothing,
        }
    }
    Ok(())
}

/// The first of the chosen whose data together keeps the bound.
async fn fitting(session: &mut Session, mut chosen: Vec<Chosen>) -> Result<Vec<Chosen>, Failure> {
    const SUM: &str = "SELECT coalesce(sum(bytes), 0) FROM task_data WHERE task IN (SELECT value FROM json_each(?1))";
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
    const BYTES: &str = "SELECT task, bytes FROM task_data WHERE task IN (SELECT value FROM json_each(?1))";
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
pub(super) const TAKE_FROM_READY: &str = "DELETE FROM ready WHERE (user, run_at, task) IN
        (SELECT user, run_at, id FROM task WHERE id IN (SELECT value FROM json_each(?1, '$.tasks')))";

pub(super) const TAKE_FROM_SUSPECT: &str = "DELETE FROM suspect WHERE (run_at, task) IN
        (SELECT run_at, id FROM task WHERE alone AND id IN (SELECT value FROM json_each(?1, '$.tasks')))";

const COUNT_UP: &str = "UPDATE counter SET lease = ?1 ->> 'lease', pick = ?1 ->> 'pick'";

pub(super) const TAKE: &str =
    "UPDATE task SET state = 'running', lease = (?1 ->> 'first_lease') + chosen.key, host = ?1 ->> 'host',
            until = ?1 ->> 'until'
        FROM json_each(?1, '$.tasks') AS chosen WHERE task.id = chosen.value";

pub(super) const TAKEN: &str =
    "SELECT json_array(task.id, task.lease, task.key, task.type, task.user, task.attempts, task.max_attempts,
            task.lost, task.lost_alone, task.alone, task.releases, task.created_at, task.max_running, coalesce(task.root, task.id),
            coalesce(task.depth, 0)), task_data.data
        FROM json_each(?1, '$.tasks') AS chosen CROSS JOIN task ON task.id = chosen.value
        LEFT JOIN task_data ON task_data.task = task.id ORDER BY chosen.key";

/// In one go, since each has the same parameter, and each way to SQLite's thread and back has its price.
static TAKE_ALL: LazyLock<String> = LazyLock::new(|| [TAKE_FROM_READY, TAKE_FROM_SUSPECT, COUNT_UP, TAKE, TAKEN].join(";\n"));

/// The last numbers given out, as the transaction found them.
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
}

/// Put the chosen under new leases.
async fn take(
    session: &mut Session,
    claim: &Claim,
    chosen: Vec<Chosen>,
    counter: Counter,
    changes: &mut Changes,
) -> Result<Vec<ClaimedTask>, Failure> {
    if chosen.is_empty() {
        return Ok(Vec::new());
    }
    for chosen in &chosen {
        changes.claimed(&chosen.user, chosen.pick);
    }
    let now = session.now;
    let until = now.saturating_add(ms(claim.alive_time));
    let take = Take {
        first_lease: counter.lease + 1,
        lease: counter.lease + count(chosen.len()),
        pick: chosen.iter().filter_map(|chosen| chosen.pick).max().unwrap_or(counter.pick),
        host: claim.host,
        until,
        tasks: chosen.into_iter().map(|chosen| chosen.task).collect(),
    };
    let rows = sqlx::query(AssertSqlSafe(TAKE_ALL.as_str())).bind(one_json(&take)).fetch_all(session.db()).await?;
    let tasks: Vec<ClaimedTask> = rows.iter().map(|row| taken(row, now, until)).collect::<Result<_, _>>()?;
    for task in tasks.iter().filter(|task| !task.alone) {
        changes.unready(task.user.as_deref().unwrap_or_default());
    }
    Ok(tasks)
}

/// The columns of a claimed task: number, lease, key, type, user, attempts, most attempts, losses, losses alone, alone, releases, when it was
/// submitted, most running of its user, root, depth. Read as one text, since each column of a row has its price.
#[derive(serde::Deserialize)]
struct Columns(i64, i64, String, String, String, u32, Option<u32>, u32, u32, u8, u32, i64, Option<u32>, i64, u32);

fn taken(row: &SqliteRow, now: i64, until: i64) -> Result<ClaimedTask, sqlx::Error> {
    let columns: &str = row.try_get(0)?;
    let columns: Columns = serde_json::from_str(columns).map_err(|error| sqlx::Error::Decode(error.into()))?;
    let Columns(task, lease, key, task_type, user, attempts, max_attempts, lost, lost_alone, alone, releases, created_at, ..) =
        columns;
    let Columns(.., max_running, root, depth) = columns;
    Ok(ClaimedTask {
        lease_ref: LeaseRef { task: TaskId(task), lease: Lease(lease) },
        key,
        task_type,
        data: row.try_get::<Option<Vec<u8>>, _>(1)?.unwrap_or_default(),
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
    })
}

/// A number of tasks as the database counts.
pub(super) fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
