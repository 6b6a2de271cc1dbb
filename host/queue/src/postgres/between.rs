//! Claims where users have work: the order between them.
//!
//! The accounts of the users in question are locked first, in the order of users, so that neither a batch nor two hosts at once overshoot;
//! then their first tasks are read, picked by `fair.rs`, taken, and the accounts are brought up to date. Tasks without user stand in the
//! same order as one more user, whatever their queues, but have no account: hosts that take only those do not wait for each other. A user has an
//! account in each queue; these are in the order as if each were a user of its own.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::Ordering;

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::accounts::{self, Owner};
use super::asked::Asked;
use super::claim::{count, flush_later, hold_host, next_lease};
use super::failure::Failure;
use super::got::{Got, in_order, last_places, taken_columns};
use super::heads::{Heads, Place, Sort, TOGETHER};
use super::mark::From;
use super::open_accounts::{OPEN_ACCOUNTS, OPEN_ACCOUNTS_OF, Wanted, near};
use super::session::Session;
use super::{around, mend, several};
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
    owner: Owner,
    /// The number of its pick between users, if it was picked between users.
    pick: Option<i64>,
}

/// What is known of a ready task beside its place in the order.
struct Ready {
    place: String,
    bytes: i64,
    queue: String,
}

/// What was chosen.
#[derive(Default)]
struct Selection {
    chosen: Vec<Chosen>,
    /// There were open users that turned out not to be.
    others: bool,
    /// Where the queues go on, if they are several, and what was read of them.
    several: Option<(Heads, HashMap<i64, Stood>)>,
}

/// Where a task stood: in which queue and where in it.
type Stood = (String, Sort, Place);

/// Take tasks as the claim wants them: in the order between users, or by their turns alone.
pub(super) async fn claim(session: &mut Session, asked: &Asked, from: &From) -> Result<Got, Failure> {
    for _ in 0..TRIES_MAX {
        session.begin().await?;
        let mut selection = if asked.claim.ignore_users {
            first(session, asked.limit, from).await?
        } else {
            fairly(session, asked, from).await?
        };
        selection.chosen = fitting(selection.chosen);
        let (met, others) = (selection.chosen.len(), selection.others);
        let got = take(session, asked, selection, from).await?;
        session.commit().await?;
        // Of what was met nothing waited in truth, or others took it: there may be more.
        if !got.is_empty() || !(others || met > 0) {
            return Ok(got);
        }
    }
    Ok(Got::default())
}

pub(super) const CANDIDATES: &str = "SELECT asked.number, ready.turn, ready.task, ready.max_running, ready.place, ready.bytes
    FROM unnest($1::text[], $2::text[], $3::int8[], $4::int8[], $5::int8[]) WITH ORDINALITY AS asked (queue, user_name, turn, task, wanted, number)
    CROSS JOIN LATERAL (SELECT turn, task, max_running, ctid::text AS place, bytes::int8 AS bytes FROM laelaps.ready
        WHERE ready.queue = asked.queue AND ready.user_name = asked.user_name AND (ready.turn, ready.task) >= (asked.turn, asked.task)
        ORDER BY turn, task LIMIT asked.wanted FOR UPDATE SKIP LOCKED) AS ready";

/// The number of the next pick, and whether there are open accounts in the queues $1, or NULL for all.
pub(super) const PICKS: &str = "SELECT last_value + 1,
        CASE WHEN $1::text[] IS NULL OR '' = ANY($1)
            THEN coalesce((SELECT true FROM laelaps.account WHERE open AND queue = '' ORDER BY picked LIMIT 1), false) ELSE false END
        OR CASE WHEN $1 IS NULL
            THEN coalesce((SELECT true FROM laelaps.account WHERE open AND octet_length(queue) > 0 ORDER BY picked LIMIT 1), false)
            ELSE EXISTS (SELECT FROM unnest($1) AS asked (queue) CROSS JOIN LATERAL (SELECT FROM laelaps.account
                WHERE open AND account.queue <> '' AND account.queue = asked.queue ORDER BY picked LIMIT 1) AS first) END
    FROM laelaps.pick_number";

/// Tasks picked between users.
async fn fairly(session: &mut Session, asked: &Asked, from: &From) -> Result<Selection, Failure> {
    let queues = asked.queues().as_deref();
    let (first_pick, any): (i64, bool) = sqlx::query_as(PICKS).bind(queues).fetch_one(session.db()?).await?;
    let limit = asked.limit;
    let aged = count(limit) / fair::AGED_EVERY + 1;
    let last_pick = first_pick + count(limit) - 1;
    let without_limit = if asked.limited < limit { count(limit) } else { 0 };
    let wanted = Wanted { heaviest: count(limit), picked_before: last_pick - fair::AGED_AFTER, oldest: aged, without_limit };
    let near = match queues {
        Some(queues) if queues.len() > TOGETHER => near(session, queues, &wanted).await?,
        _ => None,
    };
    let query = sqlx::query(if queues.is_some() { OPEN_ACCOUNTS_OF } else { OPEN_ACCOUNTS });
    let query = query.bind(wanted.heaviest).bind(wanted.picked_before).bind(wanted.oldest).bind(wanted.without_limit);
    let query = if queues.is_some() { query.bind(near.as_deref().or(queues)) } else { query };
    let rows = query.fetch_all(session.db()?).await?;
    let mut table = Table::default();
    for row in &rows {
        let (owner, account) = account(row)?;
        table.owners.push(owner);
        table.accounts.push(account);
    }
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
            let Some(Ready { place: row, bytes, queue }) = table.ready.remove(&pick.candidate.task) else { continue };
            let owner = Owner { queue, user: table.accounts[pick.account].user.clone() };
            if !owner.is_nobody() && pick.candidate.max_running.is_some() {
                let Some(rest) = limited.checked_sub(1) else { continue };
                limited = rest;
            }
            chosen.push(Chosen { task: pick.candidate.task, place: row, bytes, owner, pick: Some(number + count(place)) });
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
    let empty: Vec<Owner> = table.without_tasks().cloned().collect();
    accounts::look_again(session, &empty).await?;
    let several = table.several.map(|heads| (heads, table.stood));
    Ok(Selection { chosen, others: any && !found, several })
}

/// The users that could be picked, and what is known of their tasks.
#[derive(Default)]
struct Table {
    accounts: Vec<Account>,
    /// Whose they are.
    owners: Vec<Owner>,
    /// Ready tasks that were read, and are locked.
    ready: HashMap<i64, Ready>,
    /// How far each user's tasks were read.
    read: HashMap<Owner, Place>,
    /// Where tasks without user are read, if that is in several queues, and where those that were read stood.
    several: Option<Heads>,
    stood: HashMap<i64, Stood>,
}

/// An open account; of its tasks only the place of the first is known.
fn account(row: &PgRow) -> Result<(Owner, Account), sqlx::Error> {
    let owner = Owner { queue: row.try_get(0)?, user: row.try_get(1)? };
    let account = Account {
        user: owner.user.clone(),
        running: row.try_get(2)?,
        picked: row.try_get(3)?,
        candidates: [Candidate { turn: row.try_get(4)?, task: row.try_get(5)?, max_running: row.try_get(6)? }].into(),
        rest: Rest::Unknown,
    };
    Ok((owner, account))
}

impl Table {
    /// Leave out the users whose next task is one under a limit.
    fn leave_limited(&mut self) {
        let next = |account: &Account| account.candidates.front().is_some_and(|next| next.max_running.is_some());
        let stays = |account: &Account| account.user.is_empty() || !next(account);
        let mut staying = self.accounts.iter().map(stays).collect::<Vec<bool>>().into_iter();
        self.owners.retain(|_| staying.next().unwrap_or(true));
        self.accounts.retain(stays);
    }

    /// The users of whom tasks were asked for, and none was there.
    fn without_tasks(&self) -> impl Iterator<Item = &Owner> {
        let without = |(_, account): &(&Owner, &Account)| account.rest == Rest::Nothing && account.candidates.is_empty();
        let owners = self.owners.iter().zip(&self.accounts).filter(without).map(|(owner, _)| owner);
        owners.filter(|owner| !owner.is_nobody() && !self.read.contains_key(*owner))
    }

    /// Add the tasks without user, if there are any.
    async fn add_nobody(&mut self, session: &mut Session, first_pick: i64, from: &From) -> Result<(), Failure> {
        let (owner, place) = match from.only() {
            Some(head) => (Owner { queue: head.queue.to_string(), user: String::new() }, head.nobodys.at),
            None => {
                self.several = Some(from.heads.clone());
                (Owner::default(), (0, 0))
            }
        };
        let found = self.read(session, vec![(owner, place, 1)]).await?;
        let Some((owner, candidate)) = found.into_iter().next() else { return Ok(()) };
        let picked = &session.shared.nobody_picked;
        // Until it was picked once, it counts as having come in now.
        let picked = picked.compare_exchange(0, first_pick, Ordering::Relaxed, Ordering::Relaxed).unwrap_or_else(|picked| picked);
        let picked = if picked == 0 { first_pick } else { picked };
        let candidates = [candidate].into();
        self.owners.push(owner);
        self.accounts.push(Account { user: String::new(), running: 0, picked, candidates, rest: Rest::Unknown });
        Ok(())
    }

    /// Know as many of each user's first tasks as are needed, and the first of each.
    async fn read_candidates(&mut self, session: &mut Session, needed: &[usize]) -> Result<(), Failure> {
        let mut wanted = Vec::new();
        for ((account, owner), needed) in self.accounts.iter_mut().zip(&self.owners).zip(needed) {
            let Some(first) = account.candidates.front() else { continue };
            if account.rest != Rest::Unknown {
                continue;
            }
            match self.read.get(owner) {
                // Only the place of its first is known.
                None => {
                    let from = (first.turn, first.task);
                    account.candidates.clear();
                    wanted.push((owner.clone(), from, (*needed).max(1)));
                }
                Some(&(turn, task)) if *needed > account.candidates.len() => {
                    wanted.push((owner.clone(), (turn, task + 1), needed - account.candidates.len()));
                }
                Some(_) => {}
            }
        }
        self.extend(session, wanted).await
    }

    /// Read the next task of each user of whom all known ones were picked. Answers whether there is one.
    async fn refill(&mut self, session: &mut Session) -> Result<bool, Failure> {
        let all = self.accounts.iter().zip(&self.owners);
        let empty = all.filter(|(account, _)| account.candidates.is_empty() && account.rest == Rest::Unknown);
        let place = |owner: &Owner| self.read.get(owner).map(|(turn, task)| (owner.clone(), (*turn, task + 1), 1));
        let wanted: Vec<_> = empty.filter_map(|(_, owner)| place(owner)).collect();
        if wanted.is_empty() {
            return Ok(false);
        }
        self.extend(session, wanted).await?;
        Ok(true)
    }

    /// Read of each user so many tasks from a place on, behind those that are known.
    async fn extend(&mut self, session: &mut Session, wanted: Vec<(Owner, Place, usize)>) -> Result<(), Failure> {
        if wanted.is_empty() {
            return Ok(());
        }
        let asked: HashMap<Owner, usize> = wanted.iter().map(|(owner, _, more)| (owner.clone(), *more)).collect();
        let mut found: HashMap<Owner, Vec<Candidate>> = HashMap::with_capacity(wanted.len());
        for (owner, candidate) in self.read(session, wanted).await? {
            found.entry(owner).or_default().push(candidate);
        }
        for (account, owner) in self.accounts.iter_mut().zip(&self.owners) {
            let Some(asked) = asked.get(owner) else { continue };
            let mut more = found.remove(owner).unwrap_or_default();
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
        wanted: Vec<(Owner, Place, usize)>,
    ) -> Result<Vec<(Owner, Candidate)>, Failure> {
        let mut found = Vec::with_capacity(wanted.len());
        let (nobodys, wanted): (Vec<_>, Vec<_>) =
            wanted.into_iter().partition(|(owner, ..)| owner.is_nobody() && self.several.is_some());
        if let (Some(heads), Some((owner, _, more))) = (&mut self.several, nobodys.into_iter().next()) {
            // They are read on where they were read last.
            for read in several::read(session, heads, &[Sort::Nobodys], more).await? {
                let (turn, task) = read.place;
                self.stood.insert(task, (read.queue.clone(), read.sort, read.place));
                let ready = Ready { place: read.row, bytes: read.bytes, queue: read.queue };
                found.push((owner.clone(), Candidate { turn, task, max_running: read.max_running }, ready));
            }
        }
        if !wanted.is_empty() {
            let owners: Vec<Owner> = wanted.iter().map(|(owner, ..)| owner.clone()).collect();
            let (queues, users) = accounts::columns(&owners);
            let rows = sqlx::query(CANDIDATES)
                .bind(queues)
                .bind(users)
                .bind(wanted.iter().map(|(_, (turn, _), _)| *turn).collect::<Vec<i64>>())
                .bind(wanted.iter().map(|(_, (_, task), _)| *task).collect::<Vec<i64>>())
                .bind(wanted.iter().map(|(.., more)| count(*more)).collect::<Vec<i64>>())
                .fetch_all(session.db()?)
                .await?;
            for row in &rows {
                let number: i64 = row.try_get(0)?;
                let owner = usize::try_from(number - 1).ok().and_then(|number| owners.get(number)).cloned().unwrap_or_default();
                let candidate = Candidate { turn: row.try_get(1)?, task: row.try_get(2)?, max_running: row.try_get(3)? };
                let ready = Ready { place: row.try_get(4)?, bytes: row.try_get(5)?, queue: owner.queue.clone() };
                found.push((owner, candidate, ready));
            }
        }
        let noted = found.into_iter().map(|(owner, candidate, ready)| {
            self.ready.insert(candidate.task, ready);
            let place = (candidate.turn, candidate.task);
            let read = self.read.entry(owner.clone()).or_insert(place);
            *read = place.max(*read);
            (owner, candidate)
        });
        Ok(noted.collect())
    }
}

/// $1 queue, $2 and $3 where tasks without user begin, $4 and $5 where those of users do, $6 how many.
pub(super) const FIRST: &str = "WITH nobodys AS MATERIALIZED (
        SELECT turn, task, ctid::text AS place, bytes::int8 AS bytes, user_name FROM laelaps.ready
        WHERE queue = $1 AND user_name = '' AND (turn, task) >= ($2, $3) ORDER BY turn, task LIMIT $6 FOR UPDATE SKIP LOCKED),
    users AS MATERIALIZED (
        SELECT turn, task, ctid::text AS place, bytes::int8 AS bytes, user_name FROM laelaps.ready
        WHERE queue = $1 AND user_name <> '' AND (turn, task) >= ($4, $5) ORDER BY turn, task LIMIT $6 FOR UPDATE SKIP LOCKED)
    SELECT * FROM nobodys UNION ALL SELECT * FROM users ORDER BY turn, task LIMIT $6";

/// The first ready tasks, whosever they are.
async fn first(session: &mut Session, limit: usize, from: &From) -> Result<Selection, Failure> {
    let mut selection = Selection::default();
    if let Some(head) = from.only() {
        let rows = sqlx::query(FIRST)
            .bind(&*head.queue)
            .bind(head.nobodys.at.0)
            .bind(head.nobodys.at.1)
            .bind(head.users.at.0)
            .bind(head.users.at.1)
            .bind(count(limit))
            .fetch_all(session.db()?)
            .await?;
        for row in &rows {
            let owner = Owner { queue: head.queue.to_string(), user: row.try_get(4)? };
            let (task, place, bytes) = (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
            selection.chosen.push(Chosen { task, place, bytes, owner, pick: None });
        }
    } else {
        let sorts = [Sort::Nobodys, Sort::Users];
        let (mut heads, mut stood) = (from.heads.clone(), HashMap::with_capacity(limit));
        let mut read = several::read(session, &mut heads, &sorts, limit).await?;
        let mut around = from.clone();
        for _ in 0..around::LOOKS_MAX {
            // Nothing may be taken behind where other queues are thought to begin, and that is older than what was taken of them between users, or by
            // another host.
            if !read.is_empty() || heads.rest.is_none() {
                break;
            }
            around::look(session, &mut around).await?;
            heads = around.heads.clone();
            read = several::read(session, &mut heads, &sorts, limit).await?;
        }
        for read in read {
            stood.insert(read.place.1, (read.queue.clone(), read.sort, read.place));
            let owner = Owner { queue: read.queue, user: read.user };
            selection.chosen.push(Chosen { task: read.place.1, place: read.row, bytes: read.bytes, owner, pick: None });
        }
        selection.several = Some((heads, stood));
    }
    accounts::lock(session, selection.chosen.iter().map(|chosen| chosen.owner.clone()).collect()).await?;
    Ok(selection)
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

/// $1 host, $2 alive time, $3 number of the claim, $4 the tasks in ascending order, $5 their places in ready, $6 in suspect; $7 the tasks' queues,
/// $8 the numbers of their picks, $9 picks in all; $10 the users of the tasks, $11 whether they run alone. What is counted is what was taken.
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
            AND queue = ($7::text[])[width_bucket(id, $4::int8[])]
            AND user_name = ($10::text[])[width_bucket(id, $4::int8[])] RETURNING ",
    taken_columns!(),
    "),
    took AS MATERIALIZED (
        SELECT queue, user_name, count(*) AS tasks, max(($8::int8[])[width_bucket(id, $4::int8[])]) AS pick
        FROM taken WHERE user_name <> '' GROUP BY queue, user_name),
    counted AS (
        UPDATE laelaps.account SET running = running + took.tasks, picked = coalesce(took.pick, picked)
        FROM took WHERE account.queue = took.queue AND account.user_name = took.user_name),
    together AS (
        INSERT INTO laelaps.claim (id, host, check_at, tasks)
        SELECT $3, $1, (SELECT now FROM clock) + $2, array_agg(id) FROM taken HAVING count(*) > 0),
    picks AS MATERIALIZED (SELECT count(nextval('laelaps.pick_number')) AS picks FROM generate_series(1, $9))
    SELECT clock.now, picks.picks, taken.* FROM taken, clock, picks"
);

/// Put the chosen under new leases, and bring their users' accounts up to date.
async fn take(session: &mut Session, asked: &Asked, selection: Selection, from: &From) -> Result<Got, Failure> {
    let Selection { chosen, several, .. } = selection;
    if chosen.is_empty() {
        return Ok(Got::default());
    }
    if let Some(pick) = chosen.iter().filter(|chosen| chosen.owner.is_nobody()).filter_map(|chosen| chosen.pick).max() {
        session.shared.nobody_picked.store(pick, Ordering::Relaxed);
    }
    let owners: BTreeSet<&Owner> = chosen.iter().map(|chosen| &chosen.owner).filter(|owner| !owner.is_nobody()).collect();
    let owners: Vec<Owner> = owners.into_iter().cloned().collect();
    let places: Vec<&str> = chosen.iter().map(|chosen| chosen.place.as_str()).collect();
    let picks = chosen.iter().filter(|chosen| chosen.pick.is_some()).count();
    let order: HashMap<i64, usize> = chosen.iter().enumerate().map(|(place, chosen)| (chosen.task, place)).collect();
    let taking = Taking { ready: &places, suspect: &[], picks, alone: false };
    let named = chosen.iter().map(|chosen| Named { task: chosen.task, owner: &chosen.owner, pick: chosen.pick }).collect();
    let mut got = take_tasks(session, asked, named, &taking).await?;
    accounts::look_again(session, &owners).await?;
    match several {
        None => note_places(session, asked, &chosen, &got, from),
        Some((heads, stood)) => note_heads(session, from, heads, stood, &got),
    }
    got.placed.sort_unstable_by_key(|(_, task)| order.get(&task.lease_ref.task.0).copied());
    Ok(got)
}

/// A task that is taken, as its place names it.
pub(super) struct Named<'t> {
    pub(super) task: i64,
    pub(super) owner: &'t Owner,
    /// The number of its pick between users.
    pub(super) pick: Option<i64>,
}

/// What goes with the tasks that are taken, whose users' accounts are locked.
pub(super) struct Taking<'t> {
    pub(super) ready: &'t [&'t str],
    pub(super) suspect: &'t [&'t str],
    pub(super) picks: usize,
    pub(super) alone: bool,
}

/// Take tasks that wait, each as its place says of which queue and user. A place that says something else is mended.
pub(super) async fn take_tasks(
    session: &mut Session,
    asked: &Asked,
    mut named: Vec<Named<'_>>,
    taking: &Taking<'_>,
) -> Result<Got, Failure> {
    hold_host(session, asked.claim.host).await?;
    named.sort_unstable_by_key(|named| (named.task, named.owner));
    named.dedup_by_key(|named| named.task);
    let tasks: Vec<i64> = named.iter().map(|named| named.task).collect();
    let rows = sqlx::query(TAKE)
        .bind(asked.claim.host.0)
        .bind(asked.alive_ms)
        .bind(asked.number)
        .bind(&tasks)
        .bind(taking.ready)
        .bind(taking.suspect)
        .bind(named.iter().map(|named| named.owner.queue.as_str()).collect::<Vec<&str>>())
        .bind(named.iter().map(|named| named.pick).collect::<Vec<Option<i64>>>())
        .bind(count(taking.picks))
        .bind(named.iter().map(|named| named.owner.user.as_str()).collect::<Vec<&str>>())
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

/// Note how far the claim came among the tasks without user, or among all, of its only queue.
fn note_places(session: &Session, asked: &Asked, chosen: &[Chosen], got: &Got, from: &From) {
    let Some(head) = from.only() else { return };
    let marks = &session.shared.marks;
    let last = |of: fn(&ClaimedTask) -> bool| got.placed.iter().filter(|(_, task)| of(task)).map(|(place, _)| *place).max();
    if let Some(place) = last(|task| task.user.is_none()) {
        marks.took(from, &head.queue, Sort::Nobodys, place);
    }
    if asked.claim.ignore_users
        && chosen.len() == got.placed.len()
        && let Some(place) = last(|task| task.user.is_some())
    {
        marks.took(from, &head.queue, Sort::Users, place);
    }
}

/// Note how far the claim came in its queues: what was read and not taken is still there.
fn note_heads(session: &Session, from: &From, mut heads: Heads, mut stood: HashMap<i64, Stood>, got: &Got) {
    for (_, task) in &got.placed {
        stood.remove(&task.lease_ref.task.0);
    }
    let mut left: HashMap<(&str, Sort), Place> = HashMap::new();
    for (queue, sort, place) in stood.values() {
        let first = left.entry((queue.as_str(), *sort)).or_insert(*place);
        *first = (*first).min(*place);
    }
    heads.put_back(&left);
    let sorts = from.way.sorts();
    let took = last_places(got).into_iter().filter(|((_, sort), _)| sorts.contains(sort)).collect();
    session.shared.marks.learnt(from, &heads, &took);
}
