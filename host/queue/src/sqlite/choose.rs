//! Which tasks a claim takes: the first, or picked between users in the fair order. Nothing is changed here.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::accounts::{Owner, json};
use super::aside::{self, Place};
use super::by_time;
use super::claim::count;
use super::failure::Failure;
use super::rows::lossy;
use super::writer::Session;
use crate::Claim;
use crate::fair::{self, Account, Candidate, Pick, Rest};
use crate::outcome::ms;
use crate::task::stored_queue;

/// Tasks looked at for one that has to run alone and whose user has nothing running.
const SUSPECTS_MAX: i64 = 100;
/// How long a task that must run alone waits for the host that ends its work for it, before another may do the same.
const RESERVED: Duration = Duration::from_secs(300);
/// Queues whose users one claim looks at, of those that it asks for; each claim begins with another one.
const QUEUES_OF_USERS_MAX: usize = 32;
/// Rounds of choosing, where users' tasks differ so much in their max_running that the first did not fill the batch.
const ROUNDS_MAX: usize = 4;

/// A task that was chosen, and where it waited.
pub(super) struct Chosen {
    pub(super) task: i64,
    pub(super) turn: i64,
    pub(super) owner: Owner,
    /// The number of its pick between users, if it was picked between users.
    pub(super) pick: Option<i64>,
}

impl Chosen {
    pub(super) fn place(&self) -> Place {
        let Owner { queue, user } = self.owner.clone();
        Place { account: (queue.into_bytes(), user.into_bytes()), turn: self.turn, task: self.task }
    }
}

/// What was found when looking for tasks.
pub(super) enum Found {
    Tasks {
        chosen: Vec<Chosen>,
        alone: bool,
    },
    /// Accounts whose queue or user is no text: what they have ready must be set aside first.
    Nameless(Vec<aside::Account>),
    /// Places that do not fit their tasks.
    Misplaced(Vec<Place>),
}

impl Found {
    fn in_company(chosen: Result<Vec<Chosen>, Vec<aside::Account>>) -> Self {
        match chosen {
            Ok(chosen) => Self::Tasks { chosen, alone: false },
            Err(nameless) => Self::Nameless(nameless),
        }
    }
}

/// Choose the tasks of a claim.
pub(super) async fn choose(
    session: &mut Session,
    claim: &Claim,
    suspects: i64,
    limit: usize,
    pick: i64,
) -> Result<Found, Failure> {
    let queues = claim.queues.as_deref().map(Queues::of);
    let queues = queues.as_ref();
    if claim.alone && suspects > 0 {
        match suspect(session, claim).await? {
            Found::Tasks { chosen, .. } if chosen.is_empty() => {}
            found => return Ok(found),
        }
    }
    if claim.ignore_users {
        return Ok(Found::in_company(by_time::first(session, queues, limit).await?));
    }
    let limited = claim.limited.and_then(|limited| usize::try_from(limited).ok()).filter(|limited| *limited < limit);
    Ok(Found::in_company(between_users(session, queues, limit, limited, pick).await?))
}

/// Whether this host should end what it has, so as to run a task that must run alone and may run now. Each such task asks one host at a time.
pub(super) async fn is_wanted_alone(session: &mut Session, claim: &Claim) -> Result<bool, Failure> {
    const RESERVE: &str = "UPDATE suspect SET host = ?3, until = ?4 WHERE turn = ?1 AND task = ?2";
    let suspects = match suspects(session, claim).await? {
        Ok(suspects) => suspects,
        Err(misplaced) => {
            aside::drop_places(session, &misplaced).await?;
            return Ok(false);
        }
    };
    let Some(suspect) = suspects.into_iter().find(|suspect| suspect.may_run && !suspect.is_reserved) else { return Ok(false) };
    let now = session.now;
    let reserved_ms = ms(RESERVED);
    if suspect.until.is_none_or(|until| until < now + reserved_ms / 2) {
        let reserve = sqlx::query(RESERVE).bind(suspect.turn).bind(suspect.task).bind(claim.host.0).bind(now + reserved_ms);
        reserve.execute(session.db()).await?;
    }
    Ok(true)
}

pub(super) const SUSPECT: &str = "SELECT first.task, first.turn, CAST(task.user AS BLOB), CAST(task.queue AS BLOB),
            task.id IS NOT NULL AND task.state = 'waiting' AND task.alone AND task.turn = first.turn,
            task.max_running IS NULL OR coalesce(account.running, 0) < max(task.max_running, 1),
            first.host <> ?2 AND first.until > ?3 AND host.id IS NOT NULL, CASE first.host WHEN ?2 THEN first.until END
        FROM (SELECT turn, task, host, until FROM suspect
            WHERE ?4 IS NULL OR (SELECT queue FROM task WHERE id = suspect.task) IN (SELECT value FROM json_each(?4))
            ORDER BY turn, task LIMIT ?1) AS first
        LEFT JOIN task ON task.id = first.task
        LEFT JOIN account ON account.queue = task.queue AND account.user = task.user AND task.user <> ''
        LEFT JOIN host ON host.id = first.host AND host.left_at IS NULL AND host.ended_at IS NULL
        ORDER BY first.turn, first.task";

/// A task that must run alone.
struct Suspect {
    task: i64,
    turn: i64,
    account: aside::Account,
    /// Its user's limit allows it.
    may_run: bool,
    /// Another host ends what it has, to run it.
    is_reserved: bool,
    /// This host does, until then.
    until: Option<i64>,
}

/// The first tasks that must run alone, or the places that do not fit their tasks.
async fn suspects(session: &mut Session, claim: &Claim) -> Result<Result<Vec<Suspect>, Vec<Place>>, Failure> {
    let now = session.now;
    let queues = claim.queues.as_deref().map(|queues| Queues::of(queues).json);
    let query = sqlx::query(SUSPECT).bind(SUSPECTS_MAX).bind(claim.host.0).bind(now).bind(queues);
    let rows = query.fetch_all(session.db()).await?;
    let mut suspects = Vec::with_capacity(rows.len());
    let mut misplaced = Vec::new();
    for row in &rows {
        let (task, turn) = (row.try_get(0)?, row.try_get(1)?);
        let name = |at| row.try_get::<Option<Vec<u8>>, _>(at).map(Option::unwrap_or_default);
        let account = (name(3)?, name(2)?);
        if row.try_get::<bool, _>(4)? {
            let may_run = row.try_get::<Option<bool>, _>(5)?.unwrap_or(true);
            let is_reserved = row.try_get::<Option<bool>, _>(6)?.unwrap_or(false);
            suspects.push(Suspect { task, turn, account, may_run, is_reserved, until: row.try_get(7)? });
        } else {
            misplaced.push(Place { account, turn, task });
        }
    }
    Ok(if misplaced.is_empty() { Ok(suspects) } else { Err(misplaced) })
}

/// The first task that has to run alone and whose user's limit allows it, also if another host ends its work for it: this one has nothing to end.
async fn suspect(session: &mut Session, claim: &Claim) -> Result<Found, Failure> {
    let suspects = match suspects(session, claim).await? {
        Ok(suspects) => suspects,
        Err(misplaced) => return Ok(Found::Misplaced(misplaced)),
    };
    let first = suspects.into_iter().find(|suspect| suspect.may_run);
    let chosen = first.map(|Suspect { task, turn, account: (queue, user), .. }| Chosen {
        task,
        turn,
        // A name that is no text is found out when the task is taken.
        owner: Owner { queue: lossy(&queue), user: lossy(&user) },
        pick: None,
    });
    Ok(Found::Tasks { chosen: chosen.into_iter().collect(), alone: true })
}

/// The queues that a claim asks for.
pub(super) struct Queues {
    /// Their names as the tables have them, each once.
    pub(super) json: String,
    /// The only one, if it is one.
    pub(super) only: Option<String>,
}

impl Queues {
    fn of(names: &[String]) -> Self {
        let mut names: Vec<String> = names.iter().map(|name| stored_queue(Some(name)).to_owned()).collect();
        names.sort_unstable();
        names.dedup();
        let json = json(&names);
        Self { json, only: names.pop().filter(|_| names.is_empty()) }
    }

    /// At most so many of them, from another one on with each number, so that each has its turn.
    fn some(names: Vec<String>, most: usize, number: i64) -> Vec<String> {
        if names.len() <= most {
            return names;
        }
        let first = usize::try_from(number).unwrap_or_default() % names.len();
        names.iter().cycle().skip(first).take(most).cloned().collect()
    }
}

/// A task without user that is ready.
pub(super) struct Nobodys {
    pub(super) queue: String,
    pub(super) candidate: Candidate,
}

pub(super) const HEADS: &str = "SELECT CAST(queue AS BLOB), CAST(user AS BLOB), running, picked, head_turn, head_task, head_max
        FROM account INDEXED BY account_without_user WHERE user = '' AND head_task IS NOT NULL ORDER BY head_turn, head_task LIMIT ?1";

pub(super) const HEADS_OF_QUEUES: &str =
    "SELECT CAST(account.queue AS BLOB), CAST(account.user AS BLOB), running, picked, head_turn, head_task, head_max
        FROM json_each(?2) AS asked CROSS JOIN account ON account.queue = asked.value AND account.user = ''
        WHERE head_task IS NOT NULL ORDER BY head_turn, head_task LIMIT ?1";

/// The first task without user of each queue, of those whose tasks could be among the first `limit`; in the order of their turns.
pub(super) async fn heads(
    session: &mut Session,
    queues: Option<&Queues>,
    limit: usize,
) -> Result<Result<Vec<Nobodys>, Vec<aside::Account>>, Failure> {
    let query = match queues {
        None => sqlx::query(HEADS).bind(count(limit)),
        Some(queues) => sqlx::query(HEADS_OF_QUEUES).bind(count(limit)).bind(queues.json.clone()),
    };
    let rows = query.fetch_all(session.db()).await?;
    Ok(Table::of(&rows)?.map(|table| table.heads))
}

pub(super) const NOBODYS: &str = "SELECT turn, task, max_running FROM ready
        WHERE queue = ?1 AND user = '' AND (turn, task) >= (?2, ?3) ORDER BY turn, task LIMIT ?4";

/// The order in which rows are taken is that of the turns, so each step goes to the next one of the queue whose turn it is. A plus takes a
/// column's affinity away, without which SQLite would look at the time alone and pass over all tasks of the same one.
pub(super) const NOBODYS_OF_SEVERAL: &str = "WITH RECURSIVE walk (queue, turn, task, max_running) AS (
            SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3 FROM json_each(?1)
            UNION ALL
            SELECT next.queue, next.turn, next.task, next.max_running
            FROM walk CROSS JOIN ready AS next ON next.queue = walk.queue AND next.user = ''
                AND (next.turn, next.task) = (SELECT later.turn, later.task FROM ready AS later
                    WHERE later.queue = walk.queue AND later.user = '' AND (later.turn, later.task) > (+walk.turn, +walk.task)
                    ORDER BY later.turn, later.task LIMIT 1)
            ORDER BY 2, 3)
        SELECT turn, task, max_running, queue FROM walk LIMIT ?2";

/// The first tasks without user of the queues that begin with these.
pub(super) async fn nobodys(session: &mut Session, heads: &[Nobodys], limit: usize) -> Result<Vec<Nobodys>, Failure> {
    let rows = match heads {
        [] => return Ok(Vec::new()),
        [Nobodys { queue, candidate }] => {
            let query = sqlx::query(NOBODYS).bind(queue.clone()).bind(candidate.turn).bind(candidate.task);
            query.bind(count(limit)).fetch_all(session.db()).await?
        }
        several => {
            let first = several
                .iter()
                .map(|Nobodys { queue, candidate: Candidate { turn, task, max_running } }| (queue, turn, task, max_running));
            sqlx::query(NOBODYS_OF_SEVERAL).bind(json(first)).bind(count(limit)).fetch_all(session.db()).await?
        }
    };
    let nobodys = |row: &SqliteRow| {
        let queue = match heads {
            [only] => only.queue.clone(),
            _ => row.try_get(3)?,
        };
        Ok(Nobodys { queue, candidate: Candidate { turn: row.try_get(0)?, task: row.try_get(1)?, max_running: row.try_get(2)? } })
    };
    Ok(rows.iter().map(nobodys).collect::<Result<_, sqlx::Error>>()?)
}

/// Tasks picked between users, in the fair order.
async fn between_users(
    session: &mut Session,
    queues: Option<&Queues>,
    limit: usize,
    mut limited: Option<usize>,
    last_pick: i64,
) -> Result<Result<Vec<Chosen>, Vec<aside::Account>>, Failure> {
    let Table { mut accounts, owners, heads } =
        match open_accounts(session, queues, limit, limited.is_some(), last_pick + 1).await? {
            Ok(table) if table.accounts.is_empty() => return Ok(Ok(Vec::new())),
            Ok(table) => table,
            Err(nameless) => return Ok(Err(nameless)),
        };
    // Tasks without user in several queues are read at once: one more than could be picked, so that a pick does not run into the unknown.
    let mut queue_of: HashMap<i64, String> = HashMap::new();
    if heads.len() > 1
        && let Some(nobody) = accounts.iter_mut().find(|account| account.user.is_empty())
    {
        let found = nobodys(session, &heads, limit + 1).await?;
        nobody.rest = if found.len() <= limit { Rest::Nothing } else { Rest::Unknown };
        nobody.candidates = found.iter().map(|found| found.candidate.clone()).collect();
        queue_of = found.into_iter().map(|Nobodys { queue, candidate }| (candidate.task, queue)).collect();
    }
    let mut chosen: Vec<Chosen> = Vec::with_capacity(limit);
    for _ in 0..ROUNDS_MAX {
        let number = last_pick + 1 + count(chosen.len());
        let wanted = limit - chosen.len();
        let needed = fair::estimate(&accounts, wanted, number);
        candidates(session, &mut accounts, &owners, &needed).await?;
        let picks = pick_within(&mut accounts, wanted, &mut limited, number);
        let first = chosen.len();
        chosen.extend(picks.into_iter().enumerate().map(|(place, pick)| {
            let queue = queue_of.remove(&pick.candidate.task).filter(|_| accounts[pick.account].user.is_empty());
            let owner = owners[pick.account].clone();
            Chosen {
                task: pick.candidate.task,
                turn: pick.candidate.turn,
                owner: match queue {
                    Some(queue) => Owner { queue, ..owner },
                    None => owner,
                },
                pick: Some(number + count(place)),
            }
        }));
        let stopped_short = chosen.len() < limit && chosen.len() > first;
        let unknown = accounts.iter().any(|account| account.candidates.is_empty() && account.rest == Rest::Unknown);
        if !(stopped_short && unknown) {
            break;
        }
        refill(session, &mut accounts, &owners, &chosen).await?;
    }
    Ok(Ok(chosen))
}

/// Pick, but no more tasks of users with a limit than are left of them; those that are too many leave their turns to others.
fn pick_within(accounts: &mut Vec<Account>, wanted: usize, limited: &mut Option<usize>, number: i64) -> Vec<Pick> {
    let Some(left) = limited.as_mut() else { return fair::pick(accounts, wanted, number) };
    let has_limit = |accounts: &[Account], account: usize, candidate: &Candidate| {
        candidate.max_running.is_some() && !accounts[account].user.is_empty()
    };
    if !accounts.iter().enumerate().any(|(place, account)| account.candidates.iter().any(|one| has_limit(accounts, place, one))) {
        return fair::pick(accounts, wanted, number);
    }
    let before = accounts.clone();
    let mut picks = fair::pick(accounts, wanted, number);
    let of_limited = |pick: &&Pick| has_limit(&before, pick.account, &pick.candidate);
    let Some(surplus) = picks.iter().enumerate().filter(|(_, pick)| of_limited(pick)).map(|(place, _)| place).nth(*left) else {
        *left -= picks.iter().filter(of_limited).count();
        return picks;
    };
    // The same picks once more, up to the first that is too many; then without those users.
    *accounts = before.clone();
    picks = fair::pick(accounts, surplus, number);
    *left = 0;
    for (place, account) in accounts.iter_mut().enumerate() {
        if let Some(first) = account.candidates.iter().position(|candidate| has_limit(&before, place, candidate)) {
            account.candidates.truncate(first);
            account.rest = Rest::Nothing;
        }
    }
    picks.extend(fair::pick(accounts, wanted - surplus, number + count(surplus)));
    picks
}

pub(super) const OPEN_ACCOUNTS: &str =
    "SELECT * FROM (SELECT CAST(queue AS BLOB), CAST(user AS BLOB), running, picked, head_turn, head_task, head_max
            FROM account INDEXED BY account_by_weight WHERE open ORDER BY weight DESC, head_turn, head_task LIMIT ?1)
        UNION
        SELECT * FROM (SELECT CAST(queue AS BLOB), CAST(user AS BLOB), running, picked, head_turn, head_task, head_max
            FROM account INDEXED BY account_by_age WHERE open AND picked < ?2 ORDER BY picked LIMIT ?3)
        UNION
        SELECT * FROM (SELECT CAST(queue AS BLOB), CAST(user AS BLOB), running, picked, head_turn, head_task, head_max
            FROM account INDEXED BY account_without_limit
            WHERE open AND head_max IS NULL ORDER BY weight DESC, head_turn, head_task LIMIT ?4)
        UNION
        SELECT * FROM (SELECT CAST(queue AS BLOB), CAST(user AS BLOB), running, picked, head_turn, head_task, head_max
            FROM account INDEXED BY account_without_user
            WHERE user = '' AND head_task IS NOT NULL ORDER BY head_turn, head_task LIMIT ?1)";

/// Which of the asked queues have users that could be picked.
pub(super) const OPEN_QUEUES: &str = "SELECT value FROM json_each(?1) AS asked
        WHERE EXISTS (SELECT 1 FROM account INDEXED BY account_of_queue_by_age WHERE queue = asked.value AND open)";

pub(super) const OPEN_ACCOUNTS_OF_QUEUE: &str =
    "SELECT * FROM (SELECT CAST(queue AS BLOB), CAST(user AS BLOB), running, picked, head_turn, head_task, head_max
            FROM account INDEXED BY account_of_queue_by_weight
            WHERE queue = ?5 AND open ORDER BY weight DESC, head_turn, head_task LIMIT ?1)
        UNION
        SELECT * FROM (SELECT CAST(queue AS BLOB), CAST(user AS BLOB), running, picked, head_turn, head_task, head_max
            FROM account INDEXED BY account_of_queue_by_age WHERE queue = ?5 AND open AND picked < ?2 ORDER BY picked LIMIT ?3)
        UNION
        SELECT * FROM (SELECT CAST(queue AS BLOB), CAST(user AS BLOB), running, picked, head_turn, head_task, head_max
            FROM account INDEXED BY account_of_queue_without_limit
            WHERE queue = ?5 AND open AND head_max IS NULL ORDER BY weight DESC, head_turn, head_task LIMIT ?4)";

/// Who could be picked.
struct Table {
    accounts: Vec<Account>,
    /// Whose account each is. That of the tasks without user, the last one, counts for the first of their queues.
    owners: Vec<Owner>,
    /// The first task without user of each queue, in the order of their turns.
    heads: Vec<Nobodys>,
}

impl Table {
    /// The accounts of these rows: queue, user, running, last pick, and the first task's turn, number and most running. Those whose queue or
    /// user is no text are answered instead, if there are any.
    fn of(rows: &[SqliteRow]) -> Result<Result<Self, Vec<aside::Account>>, sqlx::Error> {
        let mut table =
            Self { accounts: Vec::with_capacity(rows.len()), owners: Vec::with_capacity(rows.len()), heads: Vec::new() };
        let mut nameless = Vec::new();
        let mut nobody_picked = 0;
        for row in rows {
            let head = Candidate { turn: row.try_get(4)?, task: row.try_get(5)?, max_running: row.try_get(6)? };
            let (queue, user) = match (String::from_utf8(row.try_get(0)?), String::from_utf8(row.try_get(1)?)) {
                (Ok(queue), Ok(user)) => (queue, user),
                _ => {
                    nameless.push((row.try_get(0)?, row.try_get(1)?));
                    continue;
                }
            };
            let picked = row.try_get::<i64, _>(3)?.max(0);
            if user.is_empty() {
                nobody_picked = picked.max(nobody_picked);
                table.heads.push(Nobodys { queue, candidate: head });
                continue;
            }
            table.accounts.push(Account {
                user: user.clone(),
                // Held to what can be reckoned with, whatever somebody has written there.
                running: row.try_get::<i64, _>(2)?.clamp(0, i64::from(u32::MAX)),
                picked,
                candidates: [head].into(),
                rest: Rest::Unknown,
            });
            table.owners.push(Owner { queue, user });
        }
        table.heads.sort_unstable_by_key(|head| (head.candidate.turn, head.candidate.task));
        if let Some(first) = table.heads.first() {
            let (user, candidates) = (String::new(), [first.candidate.clone()].into());
            table.owners.push(Owner { queue: first.queue.clone(), user: String::new() });
            table.accounts.push(Account { user, running: 0, picked: nobody_picked, candidates, rest: Rest::Unknown });
        }
        Ok(if nameless.is_empty() { Ok(table) } else { Err(nameless) })
    }
}

/// The users that could be picked: those of the greatest weight, and those passed over for long. These may all have a limit: where only so many
/// tasks of such users are wanted, also those of the greatest weight that have none. And the tasks without user, as one more.
async fn open_accounts(
    session: &mut Session,
    queues: Option<&Queues>,
    limit: usize,
    has_limited: bool,
    first_pick: i64,
) -> Result<Result<Table, Vec<aside::Account>>, Failure> {
    let aged = count(limit) / fair::AGED_EVERY + 1;
    let last_pick = first_pick + count(limit) - 1;
    let without_limit = if has_limited { count(limit) } else { 0 };
    let bound =
        |sql: &'static str| sqlx::query(sql).bind(count(limit)).bind(last_pick - fair::AGED_AFTER).bind(aged).bind(without_limit);
    let Some(queues) = queues else { return Ok(Table::of(&bound(OPEN_ACCOUNTS).fetch_all(session.db()).await?)?) };
    let heads = sqlx::query(HEADS_OF_QUEUES).bind(count(limit)).bind(queues.json.clone());
    let mut rows = heads.fetch_all(session.db()).await?;
    let open: Vec<String> = sqlx::query_scalar(OPEN_QUEUES).bind(queues.json.clone()).fetch_all(session.db()).await?;
    for queue in Queues::some(open, QUEUES_OF_USERS_MAX, first_pick) {
        rows.extend(bound(OPEN_ACCOUNTS_OF_QUEUE).bind(queue).fetch_all(session.db()).await?);
    }
    Ok(Table::of(&rows)?)
}

pub(super) const CANDIDATES_OF_ONE: &str = "SELECT turn, task, max_running FROM ready
        WHERE queue = ?1 AND user = ?2 AND (turn, task) > (?3, ?4) ORDER BY turn, task LIMIT ?5";

/// A plus takes a column's affinity away, without which SQLite would look at the time alone and pass over all tasks of the same one.
pub(super) const CANDIDATES_OF_SEVERAL: &str = "WITH RECURSIVE walk (account, queue, user, turn, task, max_running, wanted, steps) AS (
            SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, NULL, value ->> 5, 0 FROM json_each(?1)
            UNION ALL
            SELECT walk.account, walk.queue, walk.user, next.turn, next.task, next.max_running, walk.wanted - 1, walk.steps + 1
            FROM walk CROSS JOIN ready AS next ON next.queue = walk.queue AND next.user = walk.user
                AND (next.turn, next.task) = (SELECT later.turn, later.task FROM ready AS later
                    WHERE later.queue = walk.queue AND later.user = walk.user AND (later.turn, later.task) > (+walk.turn, +walk.task)
                    ORDER BY later.turn, later.task LIMIT 1)
            WHERE walk.wanted > 0)
        SELECT turn, task, max_running, account FROM walk WHERE steps > 0";

fn candidate(row: &SqliteRow) -> Result<Candidate, sqlx::Error> {
    Ok(Candidate { turn: row.try_get(0)?, task: row.try_get(1)?, max_running: row.try_get(2)? })
}

/// Fetch as many of each user's first tasks as are needed.
async fn candidates(session: &mut Session, accounts: &mut [Account], owners: &[Owner], needed: &[usize]) -> Result<(), Failure> {
    let wanted: Vec<(usize, &Owner, i64, i64, i64)> = accounts
        .iter()
        .zip(owners)
        .zip(needed)
        .enumerate()
        .filter(|(_, ((account, _), needed))| account.rest == Rest::Unknown && **needed > account.candidates.len())
        .filter_map(|(place, ((account, owner), needed))| {
            let last = account.candidates.back()?;
            Some((place, owner, last.turn, last.task, count(*needed - account.candidates.len())))
        })
        .collect();
    let mut found: HashMap<usize, Vec<Candidate>> = HashMap::with_capacity(wanted.len());
    match wanted.as_slice() {
        [] => return Ok(()),
        [(place, owner, turn, task, more)] => {
            let query = sqlx::query(CANDIDATES_OF_ONE).bind(owner.queue.clone()).bind(owner.user.clone()).bind(*turn).bind(*task);
            let rows = query.bind(*more).fetch_all(session.db()).await?;
            found.insert(*place, rows.iter().map(candidate).collect::<Result<_, sqlx::Error>>()?);
        }
        several => {
            let asked =
                several.iter().map(|(place, owner, turn, task, more)| (place, &owner.queue, &owner.user, turn, task, more));
            for row in &sqlx::query(CANDIDATES_OF_SEVERAL).bind(json(asked)).fetch_all(session.db()).await? {
                let place = usize::try_from(row.try_get::<i64, _>(3)?).unwrap_or_default();
                found.entry(place).or_default().push(candidate(row)?);
            }
        }
    }
    let asked: Vec<(usize, i64)> = wanted.iter().map(|(place, .., more)| (*place, *more)).collect();
    for (place, asked) in asked {
        let mut more = found.remove(&place).unwrap_or_default();
        more.sort_unstable_by_key(|candidate| (candidate.turn, candidate.task));
        if count(more.len()) < asked {
            accounts[place].rest = Rest::Nothing;
        }
        accounts[place].candidates.extend(more);
    }
    Ok(())
}

/// Give each user that ran out of known tasks its next one.
async fn refill(session: &mut Session, accounts: &mut [Account], owners: &[Owner], chosen: &[Chosen]) -> Result<(), Failure> {
    let empty = |(account, _): &(&mut Account, &Owner)| account.candidates.is_empty() && account.rest == Rest::Unknown;
    for (account, owner) in accounts.iter_mut().zip(owners).filter(empty) {
        let Some(last) = chosen.iter().rev().find(|chosen| chosen.owner == *owner) else { continue };
        let query =
            sqlx::query(CANDIDATES_OF_ONE).bind(owner.queue.clone()).bind(owner.user.clone()).bind(last.turn).bind(last.task);
        match query.bind(1_i64).fetch_optional(session.db()).await? {
            Some(row) => account.candidates.push_back(candidate(&row)?),
            None => account.rest = Rest::Nothing,
        }
    }
    Ok(())
}
