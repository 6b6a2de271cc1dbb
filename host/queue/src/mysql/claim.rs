//! Claims: a constant number of statements, whatever the size of the batch and of the backlog.
//!
//! A claim is entered as one row whose number makes the leases of its tasks. A look without locks comes first, so that a queue without work
//! is only read. Whoever takes something holds the host's row with it, so that whoever marks a host as one that has left waits for claims
//! under way, and claims that come later find it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;

use super::accounts::{AccountChange, Changes, Waiting, write_accounts};
use super::choose::{Choice, Chosen, HEAD, Look, Ready, Starts, Way, choose};
use super::connect::text;
use super::failure::{self, Failure};
use super::mark::Mark;
use super::rows::{Joined, count, ids, json, places};
use super::session::{Session, now};
use super::{MySql, locked};
use crate::outcome::ms;
use crate::{
    Attempt, Claim, Claimed, ClaimedTask, Descent, Event, HostId, Lease, LeaseRef, NewTask, Policy, Result, Settlement, TaskId,
    Timestamp, data,
};

/// The most tasks of one claim.
const CLAIMED_MAX: u32 = 1_000;
/// Numbers that a claim has for the leases of its tasks.
const LEASES_OF_CLAIM: i64 = 1_024;
/// Tasks whose time has come that one claim moves over.
const DUE_MAX: i64 = 1_000;
/// A claim is looked at for the first time after this at the latest, to let go of what has ended by then.
const FIRST_LOOK: Duration = Duration::from_secs(10);

/// Where this process came to in the tables that claims take from.
#[derive(Debug)]
pub(super) struct Marks {
    ready: Mark<Ready>,
    of_users: Mark<Ready>,
    scheduled: Mark<Ready>,
    changes: Mark<i64>,
}

impl Default for Marks {
    fn default() -> Self {
        Self { ready: Mark::at(HEAD), of_users: Mark::at(HEAD), scheduled: Mark::at(HEAD), changes: Mark::at(0) }
    }
}

impl Marks {
    fn starts(&self) -> Starts {
        Starts { ready: self.ready.start(), of_users: self.of_users.start(), changes: self.changes.start() }
    }

    /// Something began to wait, perhaps behind the marks.
    pub(super) fn hint(&mut self) {
        self.ready.hint();
        self.of_users.hint();
    }

    /// Where to begin with users' changes.
    pub(super) fn changes_start(&self) -> i64 {
        self.changes.start()
    }

    /// Users' changes were looked at.
    pub(super) fn changes_looked(&mut self, start: i64, took: Duration, last: Option<i64>) {
        self.changes.looked(start, took, last);
    }

    fn looked(&mut self, choice: &Looks) {
        fn note<P: Copy + Ord>(mark: &mut Mark<P>, look: Look<P>) {
            if let Some((start, took, last)) = look {
                mark.looked(start, took, last);
            }
        }
        note(&mut self.ready, choice.ready);
        note(&mut self.of_users, choice.of_users);
        note(&mut self.changes, choice.changes);
    }
}

/// The looks that a choice took.
#[derive(Default)]
struct Looks {
    ready: Look<Ready>,
    of_users: Look<Ready>,
    changes: Look<i64>,
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
    pub(super) fn give_back(&self) -> Vec<Settlement> {
        let policy = Policy::default();
        let handed_back = |task: &ClaimedTask| {
            Settlement::of(task.lease_ref, Event::Stopped, Attempt::of(task), &policy, 0.0, None, Vec::new())
        };
        self.tasks.iter().map(handed_back).collect()
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

/// What is seen without locks.
struct Outlook {
    now: i64,
    next_due: Option<i64>,
    suspects: i64,
    users_changed: bool,
    users_open: bool,
    ready: bool,
    of_users: bool,
}

impl MySql {
    /// Take waiting tasks under new leases. Runs on the task of the caller, which must not be dropped.
    pub(super) async fn take_tasks(&self, claim: &Claim) -> Result<Taken> {
        let mut outlook = self.look_out(claim.host).await?;
        if outlook.next_due.is_some_and(|due| due <= outlook.now) {
            self.move_due().await?;
            outlook = self.look_out(claim.host).await?;
        }
        let next_due_in =
            outlook.next_due.filter(|due| *due < NewTask::HELD_AT.0).map(|due| Timestamp(due).since(Timestamp(outlook.now)));
        let way = if claim.alone && outlook.suspects > 0 {
            Some(Way::Alone { ignore_users: claim.ignore_users })
        } else if claim.ignore_users {
            (outlook.of_users || outlook.ready).then_some(Way::Oldest)
        } else if outlook.users_changed || outlook.users_open {
            Some(Way::BetweenUsers)
        } else {
            outlook.ready.then_some(Way::WithoutUser)
        };
        let tasks = match way {
            Some(way) => self.take_in(way, claim).await?,
            None => Vec::new(),
        };
        let alone_waiting = outlook.suspects > i64::from(tasks.iter().any(|task| task.alone));
        Ok(Taken { tasks, alone_waiting, next_due_in })
    }

    async fn take_in(&self, way: Way, claim: &Claim) -> Result<Vec<ClaimedTask>> {
        let (starts, claim) = (locked(&self.marks).starts(), claim.clone());
        let taken: Arc<Mutex<(Vec<ClaimedTask>, Looks)>> = Arc::default();
        let last_try = Arc::clone(&taken);
        self.runner
            .run_here("claiming tasks", move |session| {
                let (claim, taken) = (claim.clone(), Arc::clone(&last_try));
                Box::pin(async move {
                    let one = locked(&taken).0.first().map(|task| task.lease_ref).filter(|_| session.repeated);
                    if let Some(one) = one
                        && is_leased(session, one).await?
                    {
                        return Ok(());
                    }
                    let done = take(session, way, &claim, starts).await?;
                    *locked(&taken) = done;
                    Ok(())
                })
            })
            .await?;
        let (tasks, looks) = std::mem::take(&mut *locked(&taken));
        locked(&self.marks).looked(&looks);
        Ok(tasks)
    }

    async fn look_out(&self, host: HostId) -> Result<Outlook> {
        const LOOK: &str = concat!(
            "SELECT ",
            now!(),
            ", (SELECT COUNT(*) FROM laelaps_host WHERE id = ? AND left_at = 0 AND ended_at = 0),
            (SELECT run_at FROM laelaps_scheduled WHERE run_at >= ? ORDER BY run_at, task LIMIT 1),
            (SELECT COUNT(*) FROM (SELECT 1 FROM laelaps_suspect LIMIT 2) AS few),
            EXISTS (SELECT 1 FROM laelaps_account_change WHERE id > ?),
            EXISTS (SELECT 1 FROM laelaps_account WHERE open = 1),
            EXISTS (SELECT 1 FROM laelaps_ready WHERE run_at >= ?),
            EXISTS (SELECT 1 FROM laelaps_ready_of_user WHERE run_at >= ?)"
        );
        let (starts, scheduled) = {
            let marks = locked(&self.marks);
            (marks.starts(), marks.scheduled.start())
        };
        let row = self
            .read("looking for work", move || {
                sqlx::query(LOOK).bind(host.0).bind(scheduled.0).bind(starts.changes).bind(starts.ready.0).bind(starts.of_users.0)
            })
            .await?;
        let read = |error: sqlx::Error| self.runner.place.worded(error, "looking for work");
        if row.try_get::<i64, _>(1).map_err(read)? == 0 {
            return Err(failure::unknown_host(host).into_error("claiming tasks", &self.runner.place));
        }
        let outlook = || {
            Ok(Outlook {
                now: row.try_get(0)?,
                next_due: row.try_get(2)?,
                suspects: row.try_get(3)?,
                users_changed: row.try_get(4)?,
                users_open: row.try_get(5)?,
                ready: row.try_get(6)?,
                of_users: row.try_get(7)?,
            })
        };
        outlook().map_err(read)
    }

    /// Move what has become due to where it can be claimed.
    async fn move_due(&self) -> Result<()> {
        let start = locked(&self.marks).scheduled.start();
        let (took, last) = self
            .runner
            .run_here("moving what is due", move |session| Box::pin(async move { move_due(session, start).await }))
            .await?;
        let mut marks = locked(&self.marks);
        marks.scheduled.looked(start, took, last);
        marks.hint();
        Ok(())
    }
}

async fn move_due(session: &mut Session<'_>, start: Ready) -> Result<(Duration, Option<Ready>), Failure> {
    const DUE: &str = "SELECT run_at, task FROM laelaps_scheduled WHERE run_at >= ? AND run_at <= ?
        ORDER BY run_at, task LIMIT ? FOR UPDATE SKIP LOCKED";
    const TASKS: &str = concat!(
        "SELECT t.id, t.run_at, t.user, t.max_running, t.alone FROM ",
        ids!(),
        " STRAIGHT_JOIN laelaps_task AS t ON t.id = s.id"
    );
    const OUT: &str =
        concat!("DELETE r FROM ", places!(), " STRAIGHT_JOIN laelaps_scheduled AS r ON r.run_at = s.run_at AND r.task = s.task");
    let now = session.now;
    let started = Instant::now();
    let due: Vec<(i64, i64)> = sqlx::query_as(DUE).bind(start.0).bind(now).bind(DUE_MAX).fetch_all(session.db()).await?;
    let took = started.elapsed();
    if due.is_empty() {
        return Ok((took, None));
    }
    sqlx::query(OUT).bind(json(&due)).execute(session.db()).await?;
    let mut waiting = Vec::with_capacity(due.len());
    for row in sqlx::query(TASKS).bind(json(due.iter().map(|(_, task)| task))).fetch_all(session.db()).await? {
        waiting.push(Waiting {
            task: row.try_get(0)?,
            run_at: row.try_get(1)?,
            user: text(&row, 2)?,
            max_running: row.try_get(3)?,
            alone: row.try_get(4)?,
        });
    }
    let mut changes = Changes::default();
    changes.enqueue(session, &waiting).await?;
    changes.write(session).await?;
    Ok((took, due.last().copied()))
}

/// Whether this task was put under this lease: then its claim was committed, although nobody heard of it.
async fn is_leased(session: &mut Session<'_>, lease_ref: LeaseRef) -> Result<bool, Failure> {
    const LEASED: &str = "SELECT COUNT(*) FROM laelaps_task WHERE id = ? AND lease = ?";
    let LeaseRef { task, lease } = lease_ref;
    let found: i64 = sqlx::query_scalar(LEASED).bind(task.0).bind(lease.0).fetch_one(session.db()).await?;
    Ok(found == 1)
}

/// Choose tasks and put them under new leases.
async fn take(session: &mut Session<'_>, way: Way, claim: &Claim, starts: Starts) -> Result<(Vec<ClaimedTask>, Looks), Failure> {
    const PICKED: &str = "UPDATE laelaps_counter SET pick = ? WHERE id = 1";
    let limit = usize::try_from(claim.limit.clamp(1, CLAIMED_MAX)).unwrap_or(1);
    let choice = choose(session, way, limit, starts).await?;
    let looks = Looks { ready: choice.ready, of_users: choice.of_users, changes: choice.changes };
    if choice.chosen.is_empty() {
        return Ok((Vec::new(), looks));
    }
    hold_host(session, claim.host).await?;
    take_out(session, &choice).await?;
    let tasks = lease(session, claim, &choice.chosen).await?;
    let mut changes = Changes::default();
    changes.claimed(count(tasks.len()));
    match choice.pick {
        Some(pick) => {
            let last = choice.chosen.iter().filter_map(|chosen| chosen.pick).max();
            write_accounts(session, pick, of_accounts(&choice.chosen)).await?;
            if let Some(last) = last {
                sqlx::query(PICKED).bind(last).execute(session.db()).await?;
            }
        }
        None => choice.chosen.iter().for_each(|chosen| changes.started(&chosen.user)),
    }
    changes.write(session).await?;
    Ok((tasks, looks))
}

/// Hold the row of a host that is about to be given tasks.
///
/// # Errors
/// [`crate::Error::UnknownHost`] if it is not there, or has left.
async fn hold_host(session: &mut Session<'_>, host: HostId) -> Result<(), Failure> {
    // MariaDB does not know FOR SHARE.
    const HOLD: &str = "SELECT id FROM laelaps_host WHERE id = ? AND left_at = 0 AND ended_at = 0 LOCK IN SHARE MODE";
    let held: Option<i64> = sqlx::query_scalar(HOLD).bind(host.0).fetch_optional(session.db()).await?;
    held.map(drop).ok_or_else(|| failure::unknown_host(host))
}

/// What the chosen mean for their users.
fn of_accounts(chosen: &[Chosen]) -> Vec<AccountChange> {
    let mut accounts: HashMap<&str, AccountChange> = HashMap::with_capacity(chosen.len());
    for chosen in chosen {
        let account = accounts.entry(chosen.user.as_str()).or_insert_with(|| AccountChange {
            user: chosen.user.clone(),
            running: 0,
            picked: None,
        });
        account.running += i64::from(!chosen.user.is_empty());
        account.picked = account.picked.max(chosen.pick);
    }
    let mut accounts: Vec<AccountChange> = accounts.into_values().collect();
    accounts.sort_unstable_by(|one, other| one.user.cmp(&other.user));
    accounts
}

/// Take the chosen from where they wait.
async fn take_out(session: &mut Session<'_>, choice: &Choice) -> Result<(), Failure> {
    const READY: &str =
        concat!("DELETE r FROM ", places!(), " STRAIGHT_JOIN laelaps_ready AS r ON r.run_at = s.run_at AND r.task = s.task");
    const SUSPECT: &str =
        concat!("DELETE r FROM ", places!(), " STRAIGHT_JOIN laelaps_suspect AS r ON r.run_at = s.run_at AND r.task = s.task");
    const READY_OF_USER: &str = "DELETE r FROM JSON_TABLE(?, '$[*]' COLUMNS (user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]',
            run_at BIGINT PATH '$[1]', task BIGINT PATH '$[2]')) AS s
        STRAIGHT_JOIN laelaps_ready_of_user AS r ON r.user = s.user AND r.run_at = s.run_at AND r.task = s.task";
    let (of_users, ready): (Vec<&Chosen>, Vec<&Chosen>) =
        choice.chosen.iter().partition(|chosen| !chosen.user.is_empty() && !choice.alone);
    let mut taken = 0;
    if !ready.is_empty() {
        let rows = json(ready.iter().map(|chosen| (chosen.run_at, chosen.task)));
        let sql = if choice.alone { SUSPECT } else { READY };
        taken += sqlx::query(sql).bind(rows).execute(session.db()).await?.rows_affected();
    }
    if !of_users.is_empty() {
        let rows = json(of_users.iter().map(|chosen| (&chosen.user, chosen.run_at, chosen.task)));
        taken += sqlx::query(READY_OF_USER).bind(rows).execute(session.db()).await?.rows_affected();
    }
    // Tasks of users are chosen without holding them: one may have been cancelled, or taken by who does not look at users.
    if taken == choice.chosen.len() as u64 { Ok(()) } else { Err(Failure::Overtaken) }
}

pub(super) const LEASE: &str = concat!(
    "UPDATE ",
    ids!(),
    " STRAIGHT_JOIN laelaps_task AS t ON t.id = s.id
    SET t.state = 'running', t.lease = ? + s.place, t.host = ?, t.until = ? WHERE t.state = 'waiting'"
);

pub(super) const LEASED: &str = concat!(
    "SELECT t.id, t.lease, t.`key`, t.type, t.user, t.attempts, t.max_attempts, t.lost, t.lost_alone, t.alone, t.releases,
        t.created_at, d.part, d.data, t.max_running, t.root, t.depth
    FROM ",
    ids!(),
    " STRAIGHT_JOIN laelaps_task AS t ON t.id = s.id AND t.lease = ? + s.place LEFT JOIN laelaps_task_data AS d ON d.task = t.id"
);

/// Enter the claim, put the chosen under its leases, and read them.
async fn lease(session: &mut Session<'_>, claim: &Claim, chosen: &[Chosen]) -> Result<Vec<ClaimedTask>, Failure> {
    let tasks = json(chosen.iter().map(|chosen| chosen.task));
    let now = session.now;
    let alive_ms = ms(claim.alive_time);
    // A lease that is over at once is one that ends with this millisecond.
    let until = now.saturating_add(alive_ms);
    let entered = enter_claim(session, claim.host.0, until.min(now + ms(FIRST_LOOK)), tasks.clone()).await?;
    let first = entered.saturating_mul(LEASES_OF_CLAIM);
    let query = sqlx::query(LEASE).bind(tasks.clone()).bind(first).bind(claim.host.0).bind(until);
    query.execute(session.db()).await?;
    let rows = sqlx::query(LEASED).bind(tasks).bind(first).fetch_all(session.db()).await?;
    let mut claimed: Vec<(ClaimedTask, Joined)> = Vec::with_capacity(chosen.len());
    let mut places: HashMap<i64, usize> = HashMap::with_capacity(chosen.len());
    for row in &rows {
        let place = *places.entry(row.try_get(0)?).or_insert(claimed.len());
        if place == claimed.len() {
            claimed.push((leased(row, now, until)?, Joined::default()));
        }
        if let Some(part) = row.try_get::<Option<u16>, _>(12)? {
            claimed[place].1.add(part, row.try_get(13)?);
        }
    }
    if claimed.len() != chosen.len() {
        tracing::warn!(
            chosen = chosen.len(),
            claimed = claimed.len(),
            "tasks stood as ready that do not wait; they are left as they are"
        );
    }
    claimed.sort_unstable_by_key(|(task, _)| task.lease_ref.lease);
    Ok(claimed.into_iter().map(|(task, data)| ClaimedTask { data: data.into_bytes(), ..task }).collect())
}

/// Enter tasks to be looked at when the time has come. Answers the number of the row.
pub(super) async fn enter_claim(session: &mut Session<'_>, host: i64, look_at: i64, tasks: String) -> Result<i64, Failure> {
    const ENTER: &str = "INSERT INTO laelaps_claim (host, look_at, tasks) VALUES (?, ?, ?)";
    let entered = sqlx::query(ENTER).bind(host).bind(look_at).bind(tasks).execute(session.db()).await?;
    Ok(i64::try_from(entered.last_insert_id()).unwrap_or(i64::MAX))
}

fn leased(row: &MySqlRow, now: i64, until: i64) -> Result<ClaimedTask, sqlx::Error> {
    let user = text(row, 4)?;
    let task: i64 = row.try_get(0)?;
    let root = row.try_get::<Option<i64>, _>(15)?.unwrap_or(task);
    Ok(ClaimedTask {
        lease_ref: LeaseRef { task: TaskId(task), lease: Lease(row.try_get(1)?) },
        key: text(row, 2)?,
        task_type: text(row, 3)?,
        data: Vec::new(),
        user: Some(user).filter(|user| !user.is_empty()),
        max_running: row.try_get(14)?,
        descent: Descent { root: TaskId(root), depth: row.try_get::<Option<u32>, _>(16)?.unwrap_or(0) },
        compression: crate::Compression::None,
        attempt: row.try_get::<u32, _>(5)?.saturating_add(1),
        max_attempts: row.try_get(6)?,
        lost: row.try_get(7)?,
        lost_alone: row.try_get(8)?,
        alone: row.try_get(9)?,
        releases: row.try_get(10)?,
        created_at: Timestamp(row.try_get(11)?),
        claimed_at: Timestamp(now),
        until: Timestamp(until),
    })
}
