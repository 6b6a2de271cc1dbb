//! Claims where users have work: the order between them.
//!
//! The accounts of the users in question are locked first, in the order of users, so that neither a batch nor two hosts at once overshoot;
//! then their first tasks are read, picked by `fair.rs`, taken, and the accounts are brought up to date. Tasks without user stand in the
//! same order as one more user, but have no account: hosts that take only those do not wait for each other.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::Ordering;

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::accounts;
use super::claim::{Asked, Got, count, flush_later, hold_host, in_order, next_lease, taken_columns};
use super::failure::Failure;
use super::mark::{From, Place};
use super::mend;
use super::session::Session;
use crate::ClaimedTask;
use crate::fair::{self, Account, Candidate, Rest};

/// The most data of one claim, before compression, unless one task alone has more.
const CLAIMED_BYTES_MAX: i64 = 64 << 20;
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

/// Take tasks as the claim wants them: in the order between users, or by their turns alone.
pub(super) async fn claim(session: &mut Session, asked: &Asked, from: From) -> Result<Got, Failure> {
    for _ in 0..TRIES_MAX {
        session.begin().await?;
        let (chosen, others) = if asked.claim.ignore_users {
            (first(session, asked.limit, from).await?, false)
        } else {
            fairly(session, asked, from).await?
        };
        let chosen = fitting(chosen);
        let met = chosen.len();
        let got = take(session, asked, chosen, from).await?;
        session.commit().await?;
        // Of what was met nothing waited in truth, or others took it: there may be more.
        if !got.is_empty() || !(others || met > 0) {
            return Ok(got);
        }
    }
    Ok(Got::default())
}

/// Those of the greatest weight, and those passed over for long. They may all have a limit: where only so many tasks of such users are wanted, also
/// those of the greatest weight that have none. In one statement, so that all are locked in one order.
///
/// The second look at `open` is worded so that no partial index is taken for it: that would hold all open users.
pub(super) const OPEN_ACCOUNTS: &str = "SELECT user_name, running, picked, head_turn, head_task, head_max FROM laelaps.account
    WHERE CASE WHEN open THEN true END AND user_name = ANY(ARRAY(
        SELECT user_name FROM (SELECT user_name FROM laelaps.account WHERE open ORDER BY weight DESC, head_turn, head_task LIMIT $1) AS heaviest
        UNION
        SELECT user_name FROM (SELECT user_name FROM laelaps.account WHERE open AND picked < $2 ORDER BY picked LIMIT $3) AS oldest
        UNION
        SELECT user_name FROM (SELECT user_name FROM laelaps.account WHERE open AND head_max IS NULL
            ORDER BY weight DESC, head_turn, head_task LIMIT $4) AS without_limit))
    ORDER BY user_name FOR UPDATE";

pub(super) const CANDIDATES: &str = "SELECT asked.user_name, ready.turn, ready.task, ready.max_running, ready.place, ready.bytes
    FROM unnest($1::text[], $2::int8[], $3::int8[], $4::int8[]) AS asked (user_name, turn, task, wanted)
    CROSS JOIN LATERAL (SELECT turn, task, max_running, ctid::text AS place, bytes::int8 AS bytes FROM laelaps.ready
        WHERE ready.user_name = asked.user_name AND (ready.turn, ready.task) >= (asked.turn, asked.task)
        ORDER BY turn, task LIMIT asked.wanted FOR UPDATE SKIP LOCKED) AS ready";

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
        .bind(if asked.limited < limit { count(limit) } else { 0 })
        .fetch_all(session.db()?)
        .await?;
    let mut table = Table { accounts: rows.iter().map(account).collect::<Result<_, _>>()?, ..Table::default() };
    let found = !table.accounts.is_empty();
    table.add_nobody(session, first_pick, from).await?;
    let mut chosen: Vec<Chosen> = Vec::with_capacity(limit);
    let mut limited = asked.limited;
    if limited == 0 {
        table.leave_limited();
    }
    for _ in 0..ROUNDS_MAX {
        let number = first_pick + count(chosen.len());
        let wanted = limit - chosen.len();
        let needed = fair::estimate(&table.accounts, wanted, number);
        table.read_candidates(session, &needed).await?;
        let picks = fair::pick(&mut table.accounts, wanted, number);
        let (picked, before) = (picks.len(), chosen.len());
        for (place, pick) in picks.into_iter().enumerate() {
            let Some(Ready { place: row, bytes }) = table.ready.remove(&pick.candidate.task) else { continue };
            let user = table.accounts[pick.account].user.clone();
            if !user.is_empty() && pick.candidate.max_running.is_some() {
                let Some(rest) = limited.checked_sub(1) else { continue };
                limited = rest;
            }
            chosen.push(Chosen { task: pick.candidate.task, place: row, bytes, user, pick: Some(number + count(place)) });
        }
        // What cannot begin yet makes room for others.
        let skipped = chosen.len() - before < picked;
        if skipped {
            table.leave_limited();
        }
        if picked == 0 || chosen.len() >= limit || !(table.refill(session).await? || skipped) {
            break;
        }
    }
    // What is said to be open and has nothing would stand in the way of others for ever.
    let empty: Vec<String> = table.without_tasks().map(str::to_owned).collect();
    accounts::look_again(session, &empty).await?;
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

/// An open account; of its tasks only the place of the first is known.
fn account(row: &PgRow) -> Result<Account, sqlx::Error> {
    Ok(Account {
        user: row.try_get(0)?,
        running: row.try_get(1)?,
        picked: row.try_get(2)?,
        candidates: [Candidate { turn: row.try_get(3)?, task: row.try_get(4)?, max_running: row.try_get(5)? }].into(),
        rest: Rest::Unknown,
    })
}

impl Table {
    /// Leave out the users whose next task is one under a limit.
    fn leave_limited(&mut self) {
        let next = |account: &Account| account.candidates.front().is_some_and(|next| next.max_running.is_some());
        self.accounts.retain(|account| account.user.is_empty() || !next(account));
    }

    /// The users of whom tasks were asked for, and none was there.
    fn without_tasks(&self) -> impl Iterator<Item = &str> {
        let without =
            |account: &&Account| !account.user.is_empty() && account.rest == Rest::Nothing && account.candidates.is_empty();
        let users = self.accounts.iter().filter(without).map(|account| account.user.as_str());
        users.filter(|user| !self.read.contains_key(*user))
    }

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

    /// Know as many of each user's first tasks as are needed, and the first of each.
    async fn read_candidates(&mut self, session: &mut Session, needed: &[usize]) -> Result<(), Failure> {
        let mut wanted = Vec::new();
        for (account, needed) in self.accounts.iter_mut().zip(needed) {
            let Some(first) = account.candidates.front() else { continue };
            if account.rest != Rest::Unknown {
                continue;
            }
            match self.read.get(&account.user) {
                // Only the place of its first is known.
                None => {
                    let from = (first.turn, first.task);
                    account.candidates.clear();
                    wanted.push((account.user.clone(), from, (*needed).max(1)));
                }
                Some(&(turn, task)) if *needed > account.candidates.len() => {
                    wanted.push((account.user.clone(), (turn, task + 1), needed - account.candidates.len()));
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
            |account: &Account| self.read.get(&account.user).map(|(turn, task)| (account.user.clone(), (*turn, task + 1), 1));
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
            more.sort_unstable_by_key(|candidate| (candidate.turn, candidate.task));
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
            .bind(wanted.iter().map(|(_, (turn, _), _)| *turn).collect::<Vec<i64>>())
            .bind(wanted.iter().map(|(_, (_, task), _)| *task).collect::<Vec<i64>>())
            .bind(wanted.iter().map(|(.., more)| count(*more)).collect::<Vec<i64>>())
            .fetch_all(session.db()?)
            .await?;
        let mut found = Vec::with_capacity(rows.len());
        for row in &rows {
            let user: String = row.try_get(0)?;
            let candidate = Candidate { turn: row.try_get(1)?, task: row.try_get(2)?, max_running: row.try_get(3)? };
            self.ready.insert(candidate.task, Ready { place: row.try_get(4)?, bytes: row.try_get(5)? });
            let place = (candidate.turn, candidate.task);
            let read = self.read.entry(user.clone()).or_insert(place);
            *read = place.max(*read);
            found.push((user, candidate));
        }
        Ok(found)
    }
}

pub(super) const FIRST: &str = "WITH nobodys AS MATERIALIZED (
        SELECT turn, task, ctid::text AS place, bytes::int8 AS bytes, user_name FROM laelaps.ready
        WHERE user_name = '' AND (turn, task) >= ($1, $2) ORDER BY turn, task LIMIT $5 FOR UPDATE SKIP LOCKED),
    users AS MATERIALIZED (
        SELECT turn, task, ctid::text AS place, bytes::int8 AS bytes, user_name FROM laelaps.ready
        WHERE user_name <> '' AND (turn, task) >= ($3, $4) ORDER BY turn, task LIMIT $5 FOR UPDATE SKIP LOCKED)
    SELECT * FROM nobodys UNION ALL SELECT * FROM users ORDER BY turn, task LIMIT $5";

/// The first ready tasks, whosever they are.
async fn first(session: &mut Session, limit: usize, from: From) -> Result<Vec<Chosen>, Failure> {
    let rows = sqlx::query(FIRST)
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

/// $1 host, $2 alive time, $3 number of the claim, $4 the tasks in ascending order, $5 their places in ready, $6 in suspect; $7 users, $8 their
/// last picks, $9 picks in all; $10 the users of the tasks, $11 whether they run alone. What is counted is what was taken.
pub(super) const TAKE: &str = concat!(
    "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now, ",
    flush_later!(),
    "),
    unready AS (DELETE FROM laelaps.ready WHERE ctid = ANY($5::text[]::tid[])),
    unsuspect AS (DELETE FROM laelaps.suspect WHERE ctid = ANY($6::text[]::tid[])),
    taken AS (
        UPDATE laelaps.task SET state = 'running', lease = ",
    next_lease!(),
    ", host = $1, until = (SELECT now FROM clock) + $2
        WHERE id = ANY($4::int8[]) AND state = 'waiting' AND alone = $11
            AND user_name = ($10::text[])[width_bucket(id, $4::int8[])] RETURNING ",
    taken_columns!(),
    "),
    took AS MATERIALIZED (SELECT user_name, count(*) AS tasks FROM taken WHERE user_name <> '' GROUP BY user_name),
    counted AS (
        UPDATE laelaps.account SET running = running + took.tasks,
            picked = coalesce(($8::int8[])[array_position($7::text[], account.user_name)], picked)
        FROM took WHERE account.user_name = took.user_name),
    together AS (
        INSERT INTO laelaps.claim (id, host, check_at, tasks)
        SELECT $3, $1, (SELECT now FROM clock) + $2, array_agg(id) FROM taken HAVING count(*) > 0),
    picks AS MATERIALIZED (SELECT count(nextval('laelaps.pick_number')) AS picks FROM generate_series(1, $9))
    SELECT clock.now, picks.picks, taken.* FROM taken, clock, picks"
);

/// Put the chosen under new leases, and bring their users' accounts up to date.
async fn take(session: &mut Session, asked: &Asked, chosen: Vec<Chosen>, from: From) -> Result<Got, Failure> {
    if chosen.is_empty() {
        return Ok(Got::default());
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
    let users: BTreeSet<&str> = chosen.iter().map(|chosen| chosen.user.as_str()).filter(|user| !user.is_empty()).collect();
    let users: Vec<String> = users.into_iter().map(str::to_owned).collect();
    let places: Vec<&str> = chosen.iter().map(|chosen| chosen.place.as_str()).collect();
    let picks = chosen.iter().filter(|chosen| chosen.pick.is_some()).count();
    let order: HashMap<i64, usize> = chosen.iter().enumerate().map(|(place, chosen)| (chosen.task, place)).collect();
    let taking = Taking { ready: &places, suspect: &[], users: &users, picked: &picked, picks, alone: false };
    let named = chosen.iter().map(|chosen| (chosen.task, chosen.user.as_str())).collect();
    let mut got = take_tasks(session, asked, named, &taking).await?;
    accounts::look_again(session, &users).await?;
    note_places(session, asked, &chosen, &got, from);
    got.placed.sort_unstable_by_key(|(_, task)| order.get(&task.lease_ref.task.0).copied());
    Ok(got)
}

/// What goes with the tasks that are taken.
pub(super) struct Taking<'t> {
    pub(super) ready: &'t [&'t str],
    pub(super) suspect: &'t [&'t str],
    /// Users whose accounts are locked, and those of them that were picked.
    pub(super) users: &'t [String],
    pub(super) picked: &'t HashMap<&'t str, i64>,
    pub(super) picks: usize,
    pub(super) alone: bool,
}

/// Take tasks that wait, each as its place says of which user. A place that says something else is mended.
pub(super) async fn take_tasks(
    session: &mut Session,
    asked: &Asked,
    mut named: Vec<(i64, &str)>,
    taking: &Taking<'_>,
) -> Result<Got, Failure> {
    hold_host(session, asked.claim.host).await?;
    named.sort_unstable();
    named.dedup_by_key(|(task, _)| *task);
    let tasks: Vec<i64> = named.iter().map(|(task, _)| *task).collect();
    let rows = sqlx::query(TAKE)
        .bind(asked.claim.host.0)
        .bind(asked.alive_ms)
        .bind(asked.number)
        .bind(&tasks)
        .bind(taking.ready)
        .bind(taking.suspect)
        .bind(taking.users)
        .bind(taking.users.iter().map(|user| taking.picked.get(user.as_str()).copied()).collect::<Vec<Option<i64>>>())
        .bind(count(taking.picks))
        .bind(named.iter().map(|(_, user)| *user).collect::<Vec<&str>>())
        .bind(taking.alone)
        .fetch_all(session.db()?)
        .await?;
    let got = match rows.first() {
        Some(first) => in_order(&rows, 2, first.try_get(0)?)?,
        None => Got::default(),
    };
    if rows.len() < tasks.len() {
        let taken: HashSet<i64> = rows.iter().map(|row| row.try_get(2)).collect::<Result<_, _>>()?;
        let strangers: Vec<i64> = tasks.into_iter().filter(|task| !taken.contains(task)).collect();
        mend::strangers(session, &strangers).await?;
    }
    Ok(got)
}

/// Note how far the claim came among the tasks without user, or among all.
fn note_places(session: &Session, asked: &Asked, chosen: &[Chosen], got: &Got, from: From) {
    let marks = &session.shared.marks;
    let last = |of: fn(&ClaimedTask) -> bool| got.placed.iter().filter(|(_, task)| of(task)).map(|(place, _)| *place).max();
    if let Some(place) = last(|task| task.user.is_none()) {
        marks.took_ready(from, place);
    }
    if asked.claim.ignore_users
        && chosen.len() == got.placed.len()
        && let Some(place) = last(|task| task.user.is_some())
    {
        marks.took_in_time(from, place);
    }
}
