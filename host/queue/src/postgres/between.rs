//! Claims where users have work: the order between them, and what has to run alone.
//!
//! The accounts of the users in question are locked first, in the order of users, so that neither a batch nor two hosts at once overshoot;
//! then their oldest tasks are read, picked by `fair.rs`, taken, and the accounts are brought up to date. Tasks without user stand in the
//! same order as one more user, but have no account: hosts that take only those do not wait for each other.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::accounts;
use super::claim::{Asked, count, hold_host, in_order, taken_columns};
use super::failure::Failure;
use super::mark::{From, Place};
use super::session::Session;
use crate::ClaimedTask;
use crate::fair::{self, Account, Candidate, Rest};

/// The most data of one claim, before compression, unless one task alone has more.
const CLAIMED_BYTES_MAX: i64 = 64 << 20;
/// Tasks looked at for one that has to run alone and whose user has nothing running.
const SUSPECTS_MAX: i64 = 100;
/// Rounds of choosing, where users' tasks differ so much in their max_running that the first did not fill the batch.
const ROUNDS_MAX: usize = 4;
/// Tries to find open users, where other hosts took the work of those that were found.
const TRIES_MAX: usize = 4;

/// A ready task that was chosen, and its place in the table, which is locked.
struct Chosen {
    task: i64,
    place: String,
    bytes: i64,
    user: String,
    /// The number of its pick between users, if it was picked between users.
    pick: Option<i64>,
}

/// What is known of a ready task beside its place in the order.
struct Ready {
    place: String,
    bytes: i64,
}

/// Take tasks as the claim wants them: in the order between users, or by time alone.
pub(super) async fn claim(session: &mut Session, asked: &Asked, from: From) -> Result<Vec<ClaimedTask>, Failure> {
    for _ in 0..TRIES_MAX {
        session.begin().await?;
        let (chosen, others) = if asked.claim.ignore_users {
            (oldest(session, asked.limit, from).await?, false)
        } else {
            fairly(session, asked, from).await?
        };
        let tasks = take(session, asked, fitting(chosen), from).await?;
        session.commit().await?;
        if !tasks.is_empty() || !others {
            return Ok(tasks);
        }
    }
    Ok(Vec::new())
}

/// The second look at `open` is worded so that no partial index is taken for it: that would hold all open users.
pub(super) const OPEN_ACCOUNTS: &str = "SELECT user_name, running, picked, head_at, head_task, head_max FROM laelaps.account
    WHERE CASE WHEN open THEN true END AND user_name = ANY(ARRAY(
        SELECT user_name FROM (SELECT user_name FROM laelaps.account WHERE open ORDER BY weight DESC, head_at, head_task LIMIT $1) AS heaviest
        UNION
        SELECT user_name FROM (SELECT user_name FROM laelaps.account WHERE open AND picked < $2 ORDER BY picked LIMIT $3) AS oldest))
    ORDER BY user_name FOR UPDATE";

pub(super) const CANDIDATES: &str =
    "SELECT asked.user_name, ready.run_at, ready.task, ready.max_running, ready.place, ready.bytes
    FROM unnest($1::text[], $2::int8[], $3::int8[], $4::int8[]) AS asked (user_name, run_at, task, wanted)
    CROSS JOIN LATERAL (SELECT run_at, task, max_running, ctid::text AS place, bytes::int8 AS bytes FROM laelaps.ready
        WHERE ready.user_name = asked.user_name AND (ready.run_at, ready.task) >= (asked.run_at, asked.task)
        ORDER BY run_at, task LIMIT asked.wanted FOR UPDATE SKIP LOCKED) AS ready";

/// Tasks picked between users. Also answers whether there were open users that turned out not to be.
async fn fairly(session: &mut Session, asked: &Asked, from: From) -> Result<(Vec<Chosen>, bool), Failure> {
    const FIRST: &str = "SELECT last_value + 1, EXISTS (SELECT FROM laelaps.account WHERE open) FROM laelaps.pick_number";
    let (first_pick, any): (i64, bool) = sqlx::query_as(FIRST).fetch_one(session.db()?).await?;
    let limit = asked.limit;
    let aged = count(limit) / fair::AGED_EVERY + 1;
    let last_pick = first_pick + count(limit) - 1;
    let rows = sqlx::query(OPEN_ACCOUNTS)
        .bind(count(limit))
        .bind(last_pick - fair::AGED_AFTER)
        .bind(aged)
        .fetch_all(session.db()?)
        .await?;
    let mut table = Table { accounts: rows.iter().map(account).collect::<Result<_, _>>()?, ..Table::default() };
    let found = !table.accounts.is_empty();
    table.add_nobody(session, first_pick, from).await?;
    let mut chosen: Vec<Chosen> = Vec::with_capacity(limit);
    for _ in 0..ROUNDS_MAX {
        let number = first_pick + count(chosen.len());
        let wanted = limit - chosen.len();
        let needed = fair::estimate(&table.accounts, wanted, number);
        table.read_candidates(session, &needed).await?;
        let picks = fair::pick(&mut table.accounts, wanted, number);
        let picked = picks.len();
        for (place, pick) in picks.into_iter().enumerate() {
            let Some(Ready { place: row, bytes }) = table.ready.remove(&pick.candidate.task) else { continue };
            let user = table.accounts[pick.account].user.clone();
            chosen.push(Chosen { task: pick.candidate.task, place: row, bytes, user, pick: Some(number + count(place)) });
        }
        if picked == 0 || chosen.len() >= limit || !table.refill(session).await? {
            break;
        }
    }
    Ok((chosen, any && !found))
}

/// The users that could be picked, and what is known of their tasks.
#[derive(Default)]
struct Table {
    accounts: Vec<Account>,
    /// Ready tasks that were read, and are locked.
    ready: HashMap<i64, Ready>,
    /// How far each user's tasks were read.
    read: HashMap<String, Place>,
}

/// An open account; of its tasks only the place of the oldest is known.
fn account(row: &PgRow) -> Result<Account, sqlx::Error> {
    Ok(Account {
        user: row.try_get(0)?,
        running: row.try_get(1)?,
        picked: row.try_get(2)?,
        candidates: [Candidate { run_at: row.try_get(3)?, task: row.try_get(4)?, max_running: row.try_get(5)? }].into(),
        rest: Rest::Unknown,
    })
}

impl Table {
    /// Add the tasks without user, if there are any.
    async fn add_nobody(&mut self, session: &mut Session, first_pick: i64, from: From) -> Result<(), Failure> {
        let found = self.read(session, vec![(String::new(), from.ready, 1)]).await?;
        let Some((_, candidate)) = found.into_iter().next() else { return Ok(()) };
        let picked = &session.shared.nobody_picked;
        // Until it was picked once, it counts as having come in now.
        let picked = picked.compare_exchange(0, first_pick, Ordering::Relaxed, Ordering::Relaxed).unwrap_or_else(|picked| picked);
        let picked = if picked == 0 { first_pick } else { picked };
        let candidates = [candidate].into();
        self.accounts.push(Account { user: String::new(), running: 0, picked, candidates, rest: Rest::Unknown });
        Ok(())
    }

    /// Know as many of each user's oldest tasks as are needed, and the oldest of each.
    async fn read_candidates(&mut self, session: &mut Session, needed: &[usize]) -> Result<(), Failure> {
        let mut wanted = Vec::new();
        for (account, needed) in self.accounts.iter_mut().zip(needed) {
            let Some(first) = account.candidates.front() else { continue };
            if account.rest != Rest::Unknown {
                continue;
            }
            match self.read.get(&account.user) {
                // Only the place of its oldest is known.
                None => {
                    let from = (first.run_at, first.task);
                    account.candidates.clear();
                    wanted.push((account.user.clone(), from, (*needed).max(1)));
                }
                Some(&(run_at, task)) if *needed > account.candidates.len() => {
                    wanted.push((account.user.clone(), (run_at, task + 1), needed - account.candidates.len()));
                }
                Some(_) => {}
            }
        }
        self.extend(session, wanted).await
    }

    /// Read the next task of each user of whom all known ones were picked. Answers whether there is one.
    async fn refill(&mut self, session: &mut Session) -> Result<bool, Failure> {
        let empty = self.accounts.iter().filter(|account| account.candidates.is_empty() && account.rest == Rest::Unknown);
        let place =
            |account: &Account| self.read.get(&account.user).map(|(run_at, task)| (account.user.clone(), (*run_at, task + 1), 1));
        let wanted: Vec<_> = empty.filter_map(place).collect();
        if wanted.is_empty() {
            return Ok(false);
        }
        self.extend(session, wanted).await?;
        Ok(true)
    }

    /// Read of each user so many tasks from a place on, behind those that are known.
    async fn extend(&mut self, session: &mut Session, wanted: Vec<(String, Place, usize)>) -> Result<(), Failure> {
        if wanted.is_empty() {
            return Ok(());
        }
        let asked: HashMap<String, usize> = wanted.iter().map(|(user, _, more)| (user.clone(), *more)).collect();
        let mut found: HashMap<String, Vec<Candidate>> = HashMap::with_capacity(wanted.len());
        for (user, candidate) in self.read(session, wanted).await? {
            found.entry(user).or_default().push(candidate);
        }
        for account in &mut self.accounts {
            let Some(asked) = asked.get(&account.user) else { continue };
            let mut more = found.remove(&account.user).unwrap_or_default();
            more.sort_unstable_by_key(|candidate| (candidate.run_at, candidate.task));
            account.rest = if more.len() < *asked { Rest::Nothing } else { Rest::Unknown };
            account.candidates.extend(more);
        }
        Ok(())
    }

    /// Read and lock tasks: of each user so many from a place on.
    async fn read(
        &mut self,
        session: &mut Session,
        wanted: Vec<(String, Place, usize)>,
    ) -> Result<Vec<(String, Candidate)>, Failure> {
        let rows = sqlx::query(CANDIDATES)
            .bind(wanted.iter().map(|(user, ..)| user.as_str()).collect::<Vec<&str>>())
            .bind(wanted.iter().map(|(_, (run_at, _), _)| *run_at).collect::<Vec<i64>>())
            .bind(wanted.iter().map(|(_, (_, task), _)| *task).collect::<Vec<i64>>())
            .bind(wanted.iter().map(|(.., more)| count(*more)).collect::<Vec<i64>>())
            .fetch_all(session.db()?)
            .await?;
        let mut found = Vec::with_capacity(rows.len());
        for row in &rows {
            let user: String = row.try_get(0)?;
            let candidate = Candidate { run_at: row.try_get(1)?, task: row.try_get(2)?, max_running: row.try_get(3)? };
            self.ready.insert(candidate.task, Ready { place: row.try_get(4)?, bytes: row.try_get(5)? });
            let place = (candidate.run_at, candidate.task);
            let read = self.read.entry(user.clone()).or_insert(place);
            *read = place.max(*read);
            found.push((user, candidate));
        }
        Ok(found)
    }
}

pub(super) const OLDEST: &str = "WITH nobodys AS MATERIALIZED (
        SELECT run_at, task, ctid::text AS place, bytes::int8 AS bytes, user_name FROM laelaps.ready
        WHERE user_name = '' AND (run_at, task) >= ($1, $2) ORDER BY run_at, task LIMIT $5 FOR UPDATE SKIP LOCKED),
    users AS MATERIALIZED (
        SELECT run_at, task, ctid::text AS place, bytes::int8 AS bytes, user_name FROM laelaps.ready
        WHERE user_name <> '' AND (run_at, task) >= ($3, $4) ORDER BY run_at, task LIMIT $5 FOR UPDATE SKIP LOCKED)
    SELECT * FROM nobodys UNION ALL SELECT * FROM users ORDER BY run_at, task LIMIT $5";

/// The oldest ready tasks, whosever they are.
async fn oldest(session: &mut Session, limit: usize, from: From) -> Result<Vec<Chosen>, Failure> {
    let rows = sqlx::query(OLDEST)
        .bind(from.ready.0)
        .bind(from.ready.1)
        .bind(from.in_time.0)
        .bind(from.in_time.1)
        .bind(count(limit))
        .fetch_all(session.db()?)
        .await?;
    let mut chosen = Vec::with_capacity(rows.len());
    for row in &rows {
        let user = row.try_get(4)?;
        chosen.push(Chosen { task: row.try_get(1)?, place: row.try_get(2)?, bytes: row.try_get(3)?, user, pick: None });
    }
    accounts::lock(session, chosen.iter().map(|chosen| chosen.user.clone()).collect()).await?;
    Ok(chosen)
}

/// The first of the chosen whose data together keeps the bound.
fn fitting(mut chosen: Vec<Chosen>) -> Vec<Chosen> {
    let mut sum = 0_i64;
    let fitting = chosen.iter().take_while(|chosen| {
        sum += chosen.bytes;
        sum <= CLAIMED_BYTES_MAX
    });
    chosen.truncate(fitting.count().max(1));
    chosen
}

/// $1 host, $2 alive time, $3 number of the claim, $4 the tasks, $5 and $6 their places; $7 users, $8 their tasks taken, $9 their last picks,
/// $10 picks in all.
pub(super) const TAKE: &str = concat!(
    "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    unready AS (DELETE FROM laelaps.ready WHERE ctid = ANY($5::text[]::tid[])),
    unsuspect AS (DELETE FROM laelaps.suspect WHERE ctid = ANY($6::text[]::tid[])),
    counted AS (
        UPDATE laelaps.account SET running = running + ($8::int8[])[array_position($7::text[], user_name)],
            picked = coalesce(($9::int8[])[array_position($7::text[], user_name)], picked)
        WHERE user_name = ANY($7::text[])),
    taken AS (
        UPDATE laelaps.task SET state = 'running', lease = nextval('laelaps.lease_number'), host = $1, until = (SELECT now FROM clock) + $2
        WHERE id = ANY($4::int8[]) RETURNING ",
    taken_columns!(),
    "),
    together AS (
        INSERT INTO laelaps.claim (id, host, check_at, tasks) SELECT $3, $1, now + $2, $4::int8[] FROM clock),
    picks AS MATERIALIZED (SELECT count(nextval('laelaps.pick_number')) AS picks FROM generate_series(1, $10))
    SELECT clock.now, picks.picks, taken.* FROM taken, clock, picks"
);

/// Put the chosen under new leases, and bring their users' accounts up to date.
async fn take(session: &mut Session, asked: &Asked, chosen: Vec<Chosen>, from: From) -> Result<Vec<ClaimedTask>, Failure> {
    if chosen.is_empty() {
        return Ok(Vec::new());
    }
    let mut picked: HashMap<&str, i64> = HashMap::new();
    for chosen in &chosen {
        if let Some(pick) = chosen.pick {
            picked.insert(&chosen.user, pick);
        }
    }
    if let Some(pick) = picked.remove("") {
        session.shared.nobody_picked.store(pick, Ordering::Relaxed);
    }
    let places: Vec<&str> = chosen.iter().map(|chosen| chosen.place.as_str()).collect();
    let mut taken: HashMap<&str, i64> = HashMap::new();
    for chosen in chosen.iter().filter(|chosen| !chosen.user.is_empty()) {
        *taken.entry(&chosen.user).or_default() += 1;
    }
    let picks = chosen.iter().filter(|chosen| chosen.pick.is_some()).count();
    let tasks: Vec<i64> = chosen.iter().map(|chosen| chosen.task).collect();
    let order: HashMap<i64, usize> = tasks.iter().enumerate().map(|(place, task)| (*task, place)).collect();
    let mut tasks = take_tasks(session, asked, &tasks, &places, &[], &taken, &picked, picks).await?;
    tasks.sort_unstable_by_key(|(_, task)| order.get(&task.lease_ref.task.0).copied());
    let users: Vec<String> = taken.keys().map(|user| (*user).to_owned()).collect();
    accounts::look_again(session, &users).await?;
    note_places(session, asked, &chosen, &tasks, from);
    Ok(tasks.into_iter().map(|(_, task)| task).collect())
}

#[expect(clippy::too_many_arguments, reason = "they are the parameters of one statement")]
async fn take_tasks(
    session: &mut Session,
    asked: &Asked,
    tasks: &[i64],
    ready: &[&str],
    suspect: &[&str],
    taken: &HashMap<&str, i64>,
    picked: &HashMap<&str, i64>,
    picks: usize,
) -> Result<Vec<(Place, ClaimedTask)>, Failure> {
    hold_host(session, asked.claim.host).await?;
    let (users, running): (Vec<&str>, Vec<i64>) = taken.iter().map(|(user, taken)| (*user, *taken)).unzip();
    let rows = sqlx::query(TAKE)
        .bind(asked.claim.host.0)
        .bind(asked.alive_ms)
        .bind(asked.number)
        .bind(tasks)
        .bind(ready)
        .bind(suspect)
        .bind(&users)
        .bind(running)
        .bind(users.iter().map(|user| picked.get(user).copied()).collect::<Vec<Option<i64>>>())
        .bind(count(picks))
        .fetch_all(session.db()?)
        .await?;
    let Some(first) = rows.first() else { return Ok(Vec::new()) };
    let now = first.try_get(0)?;
    Ok(in_order(&rows, 2, now)?)
}

/// Note how far the claim came among the tasks without user, or among all.
fn note_places(session: &Session, asked: &Asked, chosen: &[Chosen], tasks: &[(Place, ClaimedTask)], from: From) {
    let marks = &session.shared.marks;
    let last = |of: fn(&ClaimedTask) -> bool| tasks.iter().filter(|(_, task)| of(task)).map(|(place, _)| *place).max();
    if let Some(place) = last(|task| task.user.is_none()) {
        marks.took_ready(from, place);
    }
    if asked.claim.ignore_users
        && chosen.len() == tasks.len()
        && let Some(place) = last(|task| task.user.is_some())
    {
        marks.took_in_time(from, place);
    }
}

pub(super) const SUSPECTS: &str = "SELECT suspect.task, suspect.place, task.user_name, task.max_running
    FROM (SELECT run_at, task, ctid::text AS place FROM laelaps.suspect ORDER BY run_at, task LIMIT $1 FOR UPDATE SKIP LOCKED) AS suspect
    CROSS JOIN LATERAL (SELECT user_name, max_running FROM laelaps.task WHERE task.id = suspect.task OFFSET 0) AS task
    ORDER BY suspect.run_at, suspect.task";

/// Take the oldest task that has to run alone and whose user's limit allows it.
pub(super) async fn suspect(session: &mut Session, asked: &Asked) -> Result<Vec<ClaimedTask>, Failure> {
    const RUNNING: &str = "SELECT user_name, running FROM laelaps.account WHERE user_name = ANY($1)";
    session.begin().await?;
    let rows: Vec<(i64, String, String, Option<i64>)> =
        sqlx::query_as(SUSPECTS).bind(SUSPECTS_MAX).fetch_all(session.db()?).await?;
    let users: Vec<String> = rows.iter().map(|(_, _, user, _)| user.clone()).collect();
    accounts::lock(session, users.clone()).await?;
    let running: Vec<(String, i64)> = sqlx::query_as(RUNNING).bind(&users).fetch_all(session.db()?).await?;
    let running: HashMap<String, i64> = running.into_iter().collect();
    let may_run = |(_, _, user, limit): &&(i64, String, String, Option<i64>)| {
        let running = running.get(user).copied().unwrap_or(0);
        user.is_empty() || limit.is_none_or(|limit| running < limit.max(1))
    };
    let mut tasks = Vec::new();
    if let Some((task, place, user, _)) = rows.iter().find(may_run) {
        let taken = if user.is_empty() { HashMap::new() } else { HashMap::from([(user.as_str(), 1)]) };
        tasks = take_tasks(session, asked, &[*task], &[], &[place.as_str()], &taken, &HashMap::new(), 0).await?;
    }
    accounts::look_again(session, &users).await?;
    session.commit().await?;
    Ok(tasks.into_iter().map(|(_, task)| task).collect())
}
