//! Claims: a constant number of statements, whatever the size of the batch and of the backlog.
//!
//! A claim is entered as one row whose number makes the leases of its tasks. A look without locks comes first, so that a queue without work
//! is only read. Whoever takes something holds the host's row with it, so that whoever marks a host as one that has left waits for claims
//! under way, and claims that come later find it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;

use super::accounts::{AccountChange, Changes, Owner, write_accounts};
use super::choose::{Choice, Chosen, Limits, Ready, Starts, Way, choose};
use super::connect::text;
use super::due::move_due;
use super::failure::{self, Failure};
use super::mark::{Asked, Looks};
use super::mend::{Spot, is_no_queue, mend, queue_of, unreadable_names, user_of};
use super::rows::{Joined, count, ids, json, lockable, places, priority_in_range};
use super::session::{Session, Waiting as LockWait};
use super::{MySql, locked};
use crate::outcome::ms;
use crate::task::{queue_name, stored_queue};
use crate::{
    Attempt, Claim, Claimed, ClaimedTask, Descent, Event, HostId, Lease, LeaseRef, NewTask, Policy, Result, Settlement, TaskId,
    Timestamp, data,
};

/// The most tasks of one claim.
const CLAIMED_MAX: u32 = 1_000;
/// Numbers that a claim has for the leases of its tasks: it uses some in a row, from a random one on, so that a claim whose number comes again,
/// because a replica was promoted that had not got the first, has other leases.
pub(super) const LEASES_OF_CLAIM: i64 = 1 << 20;
/// Claims that there can be in the life of a database. At a million a second they last for three months, at a thousand for centuries.
const CLAIMS_EVER: i64 = i64::MAX / LEASES_OF_CLAIM;
/// A server that takes no writes is asked for again after this.
const PRIMARY_AGAIN: Duration = Duration::from_secs(10);
/// Rounds of claiming, where all that was claimed had to be set aside.
const ASIDE_ROUNDS_MAX: usize = 20;
/// A task that is due and cannot be moved yet, since somebody holds it, is looked at again after this.
const DUE_AGAIN: Duration = Duration::from_millis(100);
/// Batches of users' changes that a claim of some queues folds in if it finds nothing.
const FOLDS_OF_CLAIM: usize = 2;
/// A claim is looked at for the first time after this at the latest, to let go of what has ended by then.
const FIRST_LOOK: Duration = Duration::from_secs(10);

/// What a claim took out of the database, data as it is stored.
#[derive(Default)]
pub(super) struct Taken {
    pub(super) tasks: Vec<ClaimedTask>,
    alone_waiting: bool,
    pub(super) next_due_in: Option<Duration>,
}

/// A claimed task that nobody can read.
pub(super) struct Broken {
    pub(super) task: ClaimedTask,
    /// What is wrong: a short name, and in words.
    pub(super) code: &'static str,
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
                Err(problem) => {
                    let problem = format!("the stored data cannot be used: {problem}");
                    broken.push(Broken { task, code: "damaged-data", problem });
                }
            }
        }
        (Claimed { tasks, alone_waiting: self.alone_waiting, next_due_in: self.next_due_in }, broken)
    }
}

/// The queues that a claim names, as they stand in the tables.
fn asked(claim: &Claim) -> Asked {
    let named = claim.queues.as_deref()?;
    let mut queues: Vec<String> = named.iter().map(|queue| stored_queue(Some(queue)).to_owned()).collect();
    queues.sort_unstable();
    queues.dedup();
    Some(Arc::from(queues))
}

/// The most tasks of a claim.
pub(super) fn limit_of(claim: &Claim) -> usize {
    usize::try_from(claim.limit.clamp(1, CLAIMED_MAX)).unwrap_or(1)
}

impl MySql {
    /// Take waiting tasks under new leases, of the queues that are asked for. Runs on the task of the caller, which must not be dropped. Those whose names cannot be read are set
    /// aside, and others taken instead.
    pub(super) async fn take_tasks(&self, claim: &Claim) -> Result<Taken> {
        let (mut folded, mut went_on) = (false, false);
        for _ in 0..ASIDE_ROUNDS_MAX {
            let (taken, unreadable, unfolded) = self.take_some(claim).await?;
            // What is left to fold in may be what other queues' users have changed, and hide what changed in these.
            if unfolded && claim.queues.is_some() && !folded && taken.tasks.is_empty() && unreadable.is_empty() {
                self.fold_some_changes(FOLDS_OF_CLAIM).await?;
                folded = true;
                continue;
            }
            if unreadable.is_empty() && taken.tasks.is_empty() && !went_on && locked(&self.marks).goes_on(&asked(claim)) {
                went_on = true;
                continue;
            }
            if unreadable.is_empty() {
                return Ok(taken);
            }
            if let Err(error) = self.set_broken_aside(claim.host, unreadable).await {
                tracing::error!(%error, "unreadable tasks cannot be set aside yet");
                return Ok(taken);
            }
            if !taken.tasks.is_empty() {
                return Ok(taken);
            }
        }
        Ok(Taken::default())
    }

    async fn take_some(&self, claim: &Claim) -> Result<(Taken, Vec<Broken>, bool)> {
        let asked = asked(claim);
        let (mut starts, mut outlook) = self.look_out(claim, &asked).await?;
        if outlook.next_due.is_some_and(|due| due <= outlook.now) {
            self.move_due().await?;
            (starts, outlook) = self.look_out(claim, &asked).await?;
        }
        let next_due = outlook.next_due.filter(|due| *due < NewTask::HELD_AT.0);
        let next_due_in = next_due.map(|due| match Timestamp(due).since(Timestamp(outlook.now)) {
            Duration::ZERO => DUE_AGAIN,
            wait => wait,
        });
        let (ready, of_users) = (outlook.ready.begin(starts.ready), outlook.of_users.begin(starts.of_users));
        let has = (ready.is_some(), of_users.is_some());
        let (ready, of_users) = (ready.unwrap_or_default(), of_users.unwrap_or_default());
        let starts = Starts { ready, of_users, others: outlook.others_open, ..starts };
        let way = if claim.alone && outlook.suspects > 0 {
            Some(Way::Alone { ignore_users: claim.ignore_users })
        } else if claim.ignore_users {
            (has != (false, false)).then_some(Way::First)
        } else if outlook.users_changed || outlook.users_open || outlook.others_open {
            Some(Way::BetweenUsers)
        } else {
            has.0.then_some(Way::WithoutUser)
        };
        let (tasks, unreadable, unfolded) = match way {
            Some(way) => self.take_in(way, claim, starts).await?,
            None => Default::default(),
        };
        let others = outlook.suspects > i64::from(tasks.iter().any(|task| task.alone));
        let alone_waiting = match if others { self.is_wanted_alone(claim.host, &asked).await } else { Ok(false) } {
            // What was taken is this claim's in any case.
            Err(error) if !tasks.is_empty() || !unreadable.is_empty() => {
                tracing::debug!(%error, "whether a task has to run alone is looked at by the next claim");
                false
            }
            is_wanted => is_wanted?,
        };
        Ok((Taken { tasks, alone_waiting, next_due_in }, unreadable, unfolded))
    }

    /// Answers also whether changes of users' accounts are left to fold in.
    async fn take_in(&self, way: Way, claim: &Claim, starts: Starts) -> Result<(Vec<ClaimedTask>, Vec<Broken>, bool)> {
        let claim = claim.clone();
        let taken: Arc<Mutex<Took>> = Arc::default();
        let last_try = Arc::clone(&taken);
        self.runner
            .run_here(LockWait::Long, "claiming tasks", move |session| {
                let (claim, starts, taken) = (claim.clone(), starts.clone(), Arc::clone(&last_try));
                Box::pin(async move {
                    let one = first_lease(&locked(&taken)).filter(|_| session.repeated);
                    if let Some(one) = one
                        && is_leased(session, one).await?
                    {
                        return Ok(());
                    }
                    let done = take(session, way, &claim, &starts).await?;
                    *locked(&taken) = done;
                    Ok(())
                })
            })
            .await?;
        let (tasks, unreadable, looks) = std::mem::take(&mut *locked(&taken));
        locked(&self.marks).looked(&looks);
        if unreadable.is_empty() {
            locked(&self.claims).taken(&tasks);
        }
        Ok((tasks, unreadable, looks.unfolded))
    }

    /// Use other connections from now on, unless that was tried a moment ago.
    pub(super) fn look_for_a_primary(&self) {
        let mut looked = locked(&self.looked_for_primary);
        if looked.is_none_or(|looked| looked.elapsed() >= PRIMARY_AGAIN) {
            *looked = Some(Instant::now());
            self.access.forget_connections();
        }
    }

    /// Move what has become due to where it can be claimed.
    async fn move_due(&self) -> Result<()> {
        let start = locked(&self.marks).scheduled.start();
        let (took, last) = self
            .runner
            .run_here(LockWait::Long, "moving what is due", move |session| {
                Box::pin(async move { move_due(session, start).await })
            })
            .await?;
        locked(&self.marks).scheduled.looked(start, took, last);
        Ok(())
    }
}

/// Whether this task was put under this lease: then its claim was committed, although nobody heard of it.
async fn is_leased(session: &mut Session<'_>, lease_ref: LeaseRef) -> Result<bool, Failure> {
    const LEASED: &str = "SELECT COUNT(*) FROM laelaps_task WHERE id = ? AND lease = ?";
    let LeaseRef { task, lease } = lease_ref;
    let found: i64 = sqlx::query_scalar(LEASED).bind(task.0).bind(lease.0).fetch_one(session.db()).await?;
    Ok(found == 1)
}

/// What one try took: tasks, those whose names cannot be read, and the looks that it cost.
type Took = (Vec<ClaimedTask>, Vec<Broken>, Looks);

/// One of the leases.
fn first_lease((tasks, unreadable, _): &Took) -> Option<LeaseRef> {
    tasks.iter().chain(unreadable.iter().map(|broken| &broken.task)).map(|task| task.lease_ref).next()
}

/// Choose tasks and put them under new leases. Those whose names cannot be read come second.
async fn take(session: &mut Session<'_>, way: Way, claim: &Claim, starts: &Starts) -> Result<Took, Failure> {
    const PICKED: &str = "UPDATE laelaps_counter SET pick = ? WHERE id = 1";
    let tasks = limit_of(claim);
    let limited = claim.limited.map_or(tasks, |limited| usize::try_from(limited).unwrap_or(tasks)).min(tasks);
    let mut choice = choose(session, way, Limits { tasks, limited }, starts).await?;
    let looks = looks(&mut choice, starts);
    let mut changes = Changes::default();
    mend(session, &choice.broken, &mut changes).await?;
    let overtaken = if session.conflicts > 0 { leave_out_overtaken(session, &mut choice).await? } else { Vec::new() };
    if choice.chosen.is_empty() {
        if let Some(pick) = choice.pick {
            write_accounts(session, pick, of_accounts(&overtaken, &[])).await?;
        }
        changes.write(session).await?;
        return Ok((Vec::new(), Vec::new(), looks));
    }
    hold_host(session, claim.host).await?;
    take_out(session, &choice).await?;
    let Leased { tasks, unreadable } = lease(session, claim, &choice).await?;
    let leased = tasks.iter().chain(unreadable.iter().map(|broken| &broken.task));
    // What is counted is what was leased, whatever was chosen.
    let owner = |task: &ClaimedTask| Owner::of_task(stored_queue(Some(&task.queue)), task.user.as_deref().unwrap_or_default());
    let owners: HashMap<i64, Owner> = leased.map(|task| (task.lease_ref.task.0, owner(task))).collect();
    changes.claimed(count(owners.len()));
    match choice.pick {
        Some(pick) => {
            let last = choice.chosen.iter().filter_map(|chosen| chosen.pick).max();
            let running: Vec<&Owner> = owners.values().collect();
            choice.chosen.extend(overtaken);
            write_accounts(session, pick, of_accounts(&choice.chosen, &running)).await?;
            if let Some(last) = last {
                sqlx::query(PICKED).bind(last).execute(session.db()).await?;
            }
        }
        None => owners.values().for_each(|owner| changes.started(owner)),
    }
    if owners.len() < choice.chosen.len() {
        let wrong = choice.chosen.iter().filter(|chosen| !owners.contains_key(&chosen.task));
        let wrong: Vec<Spot> = wrong.map(Chosen::spot).collect();
        mend(session, &wrong, &mut changes).await?;
    }
    changes.write(session).await?;
    Ok((tasks, unreadable, looks))
}

/// What a choice has seen of the tables.
fn looks(choice: &mut Choice, starts: &Starts) -> Looks {
    let of_nobody = choice.chosen.iter().filter(|chosen| chosen.user.is_empty());
    Looks {
        asked: starts.asked.clone(),
        picked: of_nobody.filter_map(|chosen| chosen.pick).max().or(choice.picked),
        ready: choice.ready.take(),
        of_users: choice.of_users.take(),
        changes: choice.changes,
        unfolded: choice.unfolded,
        entered: starts.entered,
    }
}

/// The rows of a set of places that name their queues.
macro_rules! places_in_queues {
    () => {
        "JSON_TABLE(?, '$[*]' COLUMNS (at BIGINT PATH '$[0]', task BIGINT PATH '$[1]', queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[2]')) AS s"
    };
}

pub(super) const STILL_OF_USER: &str = concat!(
    "SELECT r.turn, r.task FROM ",
    lockable!(places_in_queues!()),
    " STRAIGHT_JOIN laelaps_ready_of_user AS r FORCE INDEX (in_turn) ON r.queue = s.queue AND r.turn = s.at AND r.task = s.task FOR UPDATE"
);

/// Leave out tasks of users that are not where they were seen: another one has taken them, or the account was wrong about them. Answers those.
async fn leave_out_overtaken(session: &mut Session<'_>, choice: &mut Choice) -> Result<Vec<Chosen>, Failure> {
    if choice.alone {
        return Ok(Vec::new());
    }
    let of_users = choice.chosen.iter().filter(|chosen| !chosen.user.is_empty());
    let places = json(of_users.map(|chosen| (chosen.turn, chosen.task, &chosen.queue)));
    if places == "[]" {
        return Ok(Vec::new());
    }
    let still: HashSet<Ready> = sqlx::query_as(STILL_OF_USER).bind(places).fetch_all(session.db()).await?.into_iter().collect();
    let chosen = std::mem::take(&mut choice.chosen);
    let (there, overtaken) =
        chosen.into_iter().partition(|chosen| chosen.user.is_empty() || still.contains(&(chosen.turn, chosen.task)));
    choice.chosen = there;
    Ok(overtaken)
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

/// What the chosen, and the owners whose tasks run now, mean for accounts.
fn of_accounts(chosen: &[Chosen], running: &[&Owner]) -> Vec<AccountChange> {
    let mut accounts: HashMap<Owner, AccountChange> = HashMap::with_capacity(chosen.len());
    let account = |owner: &Owner| AccountChange { owner: owner.clone(), running: 0, picked: None };
    for chosen in chosen {
        let owner = chosen.owner();
        let account = accounts.entry(owner).or_insert_with_key(account);
        account.picked = account.picked.max(chosen.pick);
    }
    for owner in running.iter().copied().filter(|owner| !owner.is_nobody()) {
        accounts.entry(owner.clone()).or_insert_with_key(account).running += 1;
    }
    let mut accounts: Vec<AccountChange> = accounts.into_values().collect();
    accounts.sort_unstable_by(|one, other| one.owner.cmp(&other.owner));
    accounts
}

pub(super) const READY: &str = concat!(
    "DELETE r FROM ",
    places_in_queues!(),
    " STRAIGHT_JOIN laelaps_ready AS r FORCE INDEX (PRIMARY) ON r.queue = s.queue AND r.turn = s.at AND r.task = s.task"
);

pub(super) const SUSPECT_OUT: &str = concat!(
    "DELETE r FROM ",
    places!(),
    " STRAIGHT_JOIN laelaps_suspect AS r FORCE INDEX (PRIMARY) ON r.turn = s.at AND r.task = s.task"
);

pub(super) const READY_OF_USER: &str =
    "DELETE r FROM JSON_TABLE(?, '$[*]' COLUMNS (user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]',
            turn BIGINT PATH '$[1]', task BIGINT PATH '$[2]', queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[3]')) AS s
        STRAIGHT_JOIN laelaps_ready_of_user AS r FORCE INDEX (PRIMARY)
            ON r.queue = s.queue AND r.user = s.user AND r.turn = s.turn AND r.task = s.task";

/// Take the chosen from where they wait.
async fn take_out(session: &mut Session<'_>, choice: &Choice) -> Result<(), Failure> {
    let (of_users, ready): (Vec<&Chosen>, Vec<&Chosen>) =
        choice.chosen.iter().partition(|chosen| !chosen.user.is_empty() && !choice.alone);
    let mut taken = 0;
    if !ready.is_empty() {
        let rows = json(ready.iter().map(|chosen| (chosen.turn, chosen.task, &chosen.queue)));
        let sql = if choice.alone { SUSPECT_OUT } else { READY };
        taken += sqlx::query(sql).bind(rows).execute(session.db()).await?.rows_affected();
    }
    if !of_users.is_empty() {
        for rows in session.chunks(of_users.iter().map(|chosen| (&chosen.user, chosen.turn, chosen.task, &chosen.queue))) {
            taken += sqlx::query(READY_OF_USER).bind(rows).execute(session.db()).await?.rows_affected();
        }
    }
    // Tasks of users are chosen without holding them: one may have been cancelled, or taken by who does not look at users.
    if taken == choice.chosen.len() as u64 { Ok(()) } else { Err(Failure::Overtaken) }
}

/// A place that its task's row does not know gives nothing.
pub(super) const LEASE: &str = concat!(
    "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (place FOR ORDINALITY, turn BIGINT PATH '$[0]', id BIGINT PATH '$[1]',
        queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[2]')) AS s
    STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id
    SET t.state = 'running', t.lease = ? + s.place, t.host = ?, t.until = ?, t.finished_at = 0, t.retained_until = 0, ",
    priority_in_range!(),
    " WHERE t.state = 'waiting' AND t.turn = s.turn AND t.alone = ? AND (t.queue = s.queue OR (s.queue = '' AND ",
    is_no_queue!(),
    "))"
);

pub(super) const LEASED: &str = concat!(
    "SELECT t.id, t.lease, t.`key`, t.type, t.user, t.attempts, t.max_attempts, t.lost, t.lost_alone, t.alone, t.releases,
        t.created_at, d.part, d.data, t.max_running, t.root, t.depth, t.queue
    FROM ",
    ids!(),
    " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id AND t.lease = ? + s.place
    LEFT JOIN laelaps_task_data AS d ON d.task = t.id"
);

/// What was put under leases.
struct Leased {
    tasks: Vec<ClaimedTask>,
    unreadable: Vec<Broken>,
}

/// Enter the claim, put the chosen under its leases, and read them.
async fn lease(session: &mut Session<'_>, claim: &Claim, choice: &Choice) -> Result<Leased, Failure> {
    let tasks = json(choice.chosen.iter().map(|chosen| chosen.task));
    let places = json(choice.chosen.iter().map(|chosen| (chosen.turn, chosen.task, &chosen.queue)));
    let now = session.now;
    let alive_ms = ms(claim.alive_time);
    // A lease that is over at once is one that ends with this millisecond.
    let until = now.saturating_add(alive_ms);
    let entered = enter_claim(session, claim.host.0, until.min(now + ms(FIRST_LOOK)), tasks.clone()).await?;
    if entered >= CLAIMS_EVER {
        let words = "the numbers for leases are used up; make the tables anew in another database";
        return Err(Failure::from(sqlx::Error::Decode(words.into())));
    }
    let first = entered * LEASES_OF_CLAIM + fastrand::i64(0..LEASES_OF_CLAIM - i64::from(CLAIMED_MAX) - 1);
    let query = sqlx::query(LEASE).bind(places).bind(first).bind(claim.host.0).bind(until).bind(choice.alone);
    query.execute(session.db()).await?;
    let rows = sqlx::query(LEASED).bind(tasks).bind(first).fetch_all(session.db()).await?;
    let mut claimed: Vec<(ClaimedTask, Option<String>, Joined)> = Vec::with_capacity(choice.chosen.len());
    let mut places: HashMap<i64, usize> = HashMap::with_capacity(choice.chosen.len());
    for row in &rows {
        let place = *places.entry(row.try_get(0)?).or_insert(claimed.len());
        if place == claimed.len() {
            let problem = unreadable_names(row, [("key", 2), ("type", 3), ("user", 4)], 17)?;
            claimed.push((leased(row, now, until)?, problem, Joined::default()));
        }
        if let Some(part) = row.try_get::<Option<u16>, _>(12)? {
            claimed[place].2.add(part, row.try_get(13)?);
        }
    }
    claimed.sort_unstable_by_key(|(task, _, _)| task.lease_ref.lease);
    let mut leased = Leased { tasks: Vec::with_capacity(claimed.len()), unreadable: Vec::new() };
    for (task, problem, data) in claimed {
        let task = ClaimedTask { data: data.into_bytes(), ..task };
        match problem {
            None => leased.tasks.push(task),
            Some(problem) => leased.unreadable.push(Broken { task, code: "unreadable", problem }),
        }
    }
    Ok(leased)
}

/// Enter tasks to be looked at when the time has come. Answers the number of the row.
pub(super) async fn enter_claim(session: &mut Session<'_>, host: i64, look_at: i64, tasks: String) -> Result<i64, Failure> {
    const ENTER: &str = "INSERT INTO laelaps_claim (host, look_at, tasks) VALUES (?, ?, ?)";
    let entered = sqlx::query(ENTER).bind(host).bind(look_at).bind(tasks).execute(session.db()).await?;
    Ok(i64::try_from(entered.last_insert_id()).unwrap_or(i64::MAX))
}

fn leased(row: &MySqlRow, now: i64, until: i64) -> Result<ClaimedTask, sqlx::Error> {
    let user = user_of(row, 4)?;
    let task: i64 = row.try_get(0)?;
    let root = row.try_get::<Option<i64>, _>(15)?.unwrap_or(task);
    Ok(ClaimedTask {
        queue: queue_name(queue_of(row, 17)?),
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
