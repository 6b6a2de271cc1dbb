//! Which tasks a claim takes: the first, or picked between users in the fair order. Nothing is changed here.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::accounts::json;
use super::aside::{self, Place};
use super::claim::count;
use super::failure::Failure;
use super::writer::Session;
use crate::fair::{self, Account, Candidate, Pick, Rest};
use crate::outcome::ms;
use crate::{Claim, HostId};

/// Tasks looked at for one that has to run alone and whose user has nothing running.
const SUSPECTS_MAX: i64 = 100;
/// How long a task that must run alone waits for the host that ends its work for it, before another may do the same.
const RESERVED: Duration = Duration::from_secs(300);
/// Rounds of choosing, where users' tasks differ so much in their max_running that the first did not fill the batch.
const ROUNDS_MAX: usize = 4;

/// A task that was chosen, and where it waited.
pub(super) struct Chosen {
    pub(super) task: i64,
    pub(super) turn: i64,
    pub(super) user: String,
    /// The number of its pick between users, if it was picked between users.
    pub(super) pick: Option<i64>,
}

impl Chosen {
    pub(super) fn place(&self) -> Place {
        Place { user: self.user.clone().into_bytes(), turn: self.turn, task: self.task }
    }
}

/// What was found when looking for tasks.
pub(super) enum Found {
    Tasks {
        chosen: Vec<Chosen>,
        alone: bool,
    },
    /// Users whose names are no text: what they have ready must be set aside first.
    Nameless(Vec<Vec<u8>>),
    /// Places that do not fit their tasks.
    Misplaced(Vec<Place>),
}

impl Found {
    fn in_company(chosen: Result<Vec<Chosen>, Vec<Vec<u8>>>) -> Self {
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
    if claim.alone && suspects > 0 {
        match suspect(session, claim.host).await? {
            Found::Tasks { chosen, .. } if chosen.is_empty() => {}
            found => return Ok(found),
        }
    }
    if claim.ignore_users {
        return Ok(Found::in_company(first(session, limit).await?));
    }
    let limited = claim.limited.and_then(|limited| usize::try_from(limited).ok()).filter(|limited| *limited < limit);
    Ok(Found::in_company(between_users(session, limit, limited, pick).await?))
}

/// Whether this host should end what it has, so as to run a task that must run alone and may run now. Each such task asks one host at a time.
pub(super) async fn is_wanted_alone(session: &mut Session, host: HostId) -> Result<bool, Failure> {
    const RESERVE: &str = "UPDATE suspect SET host = ?3, until = ?4 WHERE turn = ?1 AND task = ?2";
    let suspects = match suspects(session, host).await? {
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
        let reserve = sqlx::query(RESERVE).bind(suspect.turn).bind(suspect.task).bind(host.0).bind(now + reserved_ms);
        reserve.execute(session.db()).await?;
    }
    Ok(true)
}

pub(super) const SUSPECT: &str = "SELECT first.task, first.turn, CAST(task.user AS BLOB),
            task.id IS NOT NULL AND task.state = 'waiting' AND task.alone AND task.turn = first.turn,
            task.max_running IS NULL OR coalesce(account.running, 0) < max(task.max_running, 1),
            first.host <> ?2 AND first.until > ?3 AND host.id IS NOT NULL, CASE first.host WHEN ?2 THEN first.until END
        FROM (SELECT turn, task, host, until FROM suspect ORDER BY turn, task LIMIT ?1) AS first
        LEFT JOIN task ON task.id = first.task
        LEFT JOIN account ON account.user = task.user AND task.user <> ''
        LEFT JOIN host ON host.id = first.host AND host.left_at IS NULL AND host.ended_at IS NULL
        ORDER BY first.turn, first.task";

/// A task that must run alone.
struct Suspect {
    task: i64,
    turn: i64,
    user: Vec<u8>,
    /// Its user's limit allows it.
    may_run: bool,
    /// Another host ends what it has, to run it.
    is_reserved: bool,
    /// This host does, until then.
    until: Option<i64>,
}

/// The first tasks that must run alone, or the places that do not fit their tasks.
async fn suspects(session: &mut Session, host: HostId) -> Result<Result<Vec<Suspect>, Vec<Place>>, Failure> {
    let now = session.now;
    let rows = sqlx::query(SUSPECT).bind(SUSPECTS_MAX).bind(host.0).bind(now).fetch_all(session.db()).await?;
    let mut suspects = Vec::with_capacity(rows.len());
    let mut misplaced = Vec::new();
    for row in &rows {
        let (task, turn) = (row.try_get(0)?, row.try_get(1)?);
        let user = row.try_get::<Option<Vec<u8>>, _>(2)?.unwrap_or_default();
        if row.try_get::<bool, _>(3)? {
            let may_run = row.try_get::<Option<bool>, _>(4)?.unwrap_or(true);
            let is_reserved = row.try_get::<Option<bool>, _>(5)?.unwrap_or(false);
            suspects.push(Suspect { task, turn, user, may_run, is_reserved, until: row.try_get(6)? });
        } else {
            misplaced.push(Place { user, turn, task });
        }
    }
    Ok(if misplaced.is_empty() { Ok(suspects) } else { Err(misplaced) })
}

/// The first task that has to run alone and whose user's limit allows it, also if another host ends its work for it: this one has nothing to end.
async fn suspect(session: &mut Session, host: HostId) -> Result<Found, Failure> {
    let suspects = match suspects(session, host).await? {
        Ok(suspects) => suspects,
        Err(misplaced) => return Ok(Found::Misplaced(misplaced)),
    };
    let first = suspects.into_iter().find(|suspect| suspect.may_run);
    let chosen = first.map(|Suspect { task, turn, user, .. }| Chosen {
        task,
        turn,
        // A name that is no text is found out when the task is taken.
        user: String::from_utf8_lossy(&user).into_owned(),
        pick: None,
    });
    Ok(Found::Tasks { chosen: chosen.into_iter().collect(), alone: true })
}

pub(super) const FIRST: &str = "SELECT task, turn, user FROM (
            SELECT * FROM (SELECT task, turn, user FROM ready WHERE user = '' ORDER BY turn, task LIMIT ?1)
            UNION ALL
            SELECT * FROM (SELECT task, turn, user FROM ready INDEXED BY ready_in_turn WHERE user <> ''
                ORDER BY turn, task LIMIT ?1))
        ORDER BY turn, task LIMIT ?1";

/// The first ready tasks, whosever they are.
async fn first(session: &mut Session, limit: usize) -> Result<Result<Vec<Chosen>, Vec<Vec<u8>>>, Failure> {
    let rows = sqlx::query(FIRST).bind(count(limit)).fetch_all(session.db()).await?;
    let mut chosen = Vec::with_capacity(rows.len());
    let mut nameless = Vec::new();
    for row in &rows {
        match name(row, 2)? {
            Ok(user) => chosen.push(Chosen { task: row.try_get(0)?, turn: row.try_get(1)?, user, pick: None }),
            Err(bytes) => nameless.push(bytes),
        }
    }
    nameless.sort_unstable();
    nameless.dedup();
    Ok(if nameless.is_empty() { Ok(chosen) } else { Err(nameless) })
}

/// A user's name, or its bytes if they are no text.
fn name(row: &SqliteRow, at: usize) -> Result<Result<String, Vec<u8>>, sqlx::Error> {
    Ok(String::from_utf8(row.try_get_unchecked(at)?).map_err(std::string::FromUtf8Error::into_bytes))
}

/// Tasks picked between users, in the fair order.
async fn between_users(
    session: &mut Session,
    limit: usize,
    mut limited: Option<usize>,
    last_pick: i64,
) -> Result<Result<Vec<Chosen>, Vec<Vec<u8>>>, Failure> {
    let mut accounts = match open_accounts(session, limit, limited.is_some(), last_pick + 1).await? {
        Ok(accounts) if accounts.is_empty() => return Ok(Ok(Vec::new())),
        Ok(accounts) => accounts,
        Err(nameless) => return Ok(Err(nameless)),
    };
    let mut chosen: Vec<Chosen> = Vec::with_capacity(limit);
    for _ in 0..ROUNDS_MAX {
        let number = last_pick + 1 + count(chosen.len());
        let wanted = limit - chosen.len();
        let needed = fair::estimate(&accounts, wanted, number);
        candidates(session, &mut accounts, &needed).await?;
        let picks = pick_within(&mut accounts, wanted, &mut limited, number);
        let first = chosen.len();
        chosen.extend(picks.into_iter().enumerate().map(|(place, pick)| Chosen {
            task: pick.candidate.task,
            turn: pick.candidate.turn,
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
    "SELECT * FROM (SELECT user, running, picked, head_turn, head_task, head_max FROM account INDEXED BY account_by_weight
            WHERE open ORDER BY weight DESC, head_turn, head_task LIMIT ?1)
        UNION
        SELECT * FROM (SELECT user, running, picked, head_turn, head_task, head_max FROM account INDEXED BY account_by_age
            WHERE open AND picked < ?2 ORDER BY picked LIMIT ?3)
        UNION
        SELECT * FROM (SELECT user, running, picked, head_turn, head_task, head_max FROM account INDEXED BY account_without_limit
            WHERE open AND head_max IS NULL ORDER BY weight DESC, head_turn, head_task LIMIT ?4)";

/// The users that could be picked: those of the greatest weight, and those passed over for long. These may all have a limit: where only so many
/// tasks of such users are wanted, also those of the greatest weight that have none.
async fn open_accounts(
    session: &mut Session,
    limit: usize,
    has_limited: bool,
    first_pick: i64,
) -> Result<Result<Vec<Account>, Vec<Vec<u8>>>, Failure> {
    let aged = count(limit) / fair::AGED_EVERY + 1;
    let last_pick = first_pick + count(limit) - 1;
    let rows = sqlx::query(OPEN_ACCOUNTS)
        .bind(count(limit))
        .bind(last_pick - fair::AGED_AFTER)
        .bind(aged)
        .bind(if has_limited { count(limit) } else { 0 })
        .fetch_all(session.db())
        .await?;
    let mut accounts = Vec::with_capacity(rows.len());
    let mut nameless = Vec::new();
    for row in &rows {
        let head = Candidate { turn: row.try_get(3)?, task: row.try_get(4)?, max_running: row.try_get(5)? };
        match name(row, 0)? {
            Ok(user) => accounts.push(Account {
                user,
                // Held to what can be reckoned with, whatever somebody has written there.
                running: row.try_get::<i64, _>(1)?.clamp(0, i64::from(u32::MAX)),
                picked: row.try_get::<i64, _>(2)?.max(0),
                candidates: [head].into(),
                rest: Rest::Unknown,
            }),
            Err(bytes) => nameless.push(bytes),
        }
    }
    Ok(if nameless.is_empty() { Ok(accounts) } else { Err(nameless) })
}

pub(super) const CANDIDATES_OF_ONE: &str = "SELECT user, turn, task, max_running FROM ready
        WHERE user = ?1 AND (turn, task) > (?2, ?3) ORDER BY turn, task LIMIT ?4";

/// A plus takes a column's affinity away, without which SQLite would look at the time alone and pass over all tasks of the same one.
pub(super) const CANDIDATES_OF_SEVERAL: &str = "WITH RECURSIVE walk (user, turn, task, max_running, wanted, steps) AS (
            SELECT value ->> 0, value ->> 1, value ->> 2, NULL, value ->> 3, 0 FROM json_each(?1)
            UNION ALL
            SELECT next.user, next.turn, next.task, next.max_running, walk.wanted - 1, walk.steps + 1
            FROM walk CROSS JOIN ready AS next ON next.user = walk.user
                AND (next.turn, next.task) = (SELECT later.turn, later.task FROM ready AS later
                    WHERE later.user = walk.user AND (later.turn, later.task) > (+walk.turn, +walk.task)
                    ORDER BY later.turn, later.task LIMIT 1)
            WHERE walk.wanted > 0)
        SELECT user, turn, task, max_running FROM walk WHERE steps > 0";

/// Fetch as many of each user's first tasks as are needed.
async fn candidates(session: &mut Session, accounts: &mut [Account], needed: &[usize]) -> Result<(), Failure> {
    let wanted: Vec<(&str, i64, i64, i64)> = accounts
        .iter()
        .zip(needed)
        .filter(|(account, needed)| account.rest == Rest::Unknown && **needed > account.candidates.len())
        .filter_map(|(account, needed)| {
            let last = account.candidates.back()?;
            Some((account.user.as_str(), last.turn, last.task, count(*needed - account.candidates.len())))
        })
        .collect();
    let rows = match wanted.as_slice() {
        [] => return Ok(()),
        [(user, turn, task, more)] => {
            sqlx::query(CANDIDATES_OF_ONE)
                .bind((*user).to_owned())
                .bind(*turn)
                .bind(*task)
                .bind(*more)
                .fetch_all(session.db())
                .await?
        }
        several => sqlx::query(CANDIDATES_OF_SEVERAL).bind(json(several)).fetch_all(session.db()).await?,
    };
    let mut found: HashMap<String, Vec<Candidate>> = HashMap::with_capacity(wanted.len());
    let candidate =
        |row: &SqliteRow| Ok(Candidate { turn: row.try_get(1)?, task: row.try_get(2)?, max_running: row.try_get(3)? });
    if let [(user, ..)] = wanted.as_slice() {
        let all = rows.iter().map(candidate).collect::<Result<_, sqlx::Error>>()?;
        found.insert((*user).to_owned(), all);
    } else {
        for row in &rows {
            found.entry(row.try_get(0)?).or_default().push(candidate(row)?);
        }
    }
    let asked: HashMap<String, i64> = wanted.iter().map(|(user, _, _, more)| ((*user).to_owned(), *more)).collect();
    for account in accounts.iter_mut() {
        let Some(asked) = asked.get(&account.user) else { continue };
        let mut more = found.remove(&account.user).unwrap_or_default();
        more.sort_unstable_by_key(|candidate| (candidate.turn, candidate.task));
        if count(more.len()) < *asked {
            account.rest = Rest::Nothing;
        }
        account.candidates.extend(more);
    }
    Ok(())
}

/// Give each user that ran out of known tasks its next one.
async fn refill(session: &mut Session, accounts: &mut [Account], chosen: &[Chosen]) -> Result<(), Failure> {
    const NEXT: &str = "SELECT turn, task, max_running FROM ready
        WHERE user = ?1 AND (turn, task) > (?2, ?3) ORDER BY turn, task LIMIT 1";
    for account in accounts.iter_mut().filter(|account| account.candidates.is_empty() && account.rest == Rest::Unknown) {
        let Some(last) = chosen.iter().rev().find(|chosen| chosen.user == account.user) else { continue };
        let next = sqlx::query(NEXT).bind(account.user.clone()).bind(last.turn).bind(last.task);
        match next.fetch_optional(session.db()).await? {
            Some(row) => account.candidates.push_back(Candidate {
                turn: row.try_get(0)?,
                task: row.try_get(1)?,
                max_running: row.try_get(2)?,
            }),
            None => account.rest = Rest::Nothing,
        }
    }
    Ok(())
}
