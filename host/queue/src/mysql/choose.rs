//! Which tasks a claim takes. Those without user are simply the first ones that no other claim has its hands on. Tasks of users are chosen
//! by [`crate::fair`], one claim after the other: the counter's row is held until the claim has committed, and with it all accounts.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;

use super::accounts::{FOLDED_BY_CLAIM, fold};
use super::failure::Failure;
use super::mend::places_of_unreadable;
use super::rows::{count, ids, json};
use super::session::Session;
use super::suspects::suspect;
use crate::fair::{self, Account, Candidate, Rest};

/// The most data of one claim, before compression, unless one task alone has more.
const CLAIMED_BYTES_MAX: i64 = 64 << 20;
/// Rounds of choosing, where users' tasks differ so much in their max_running that the first did not fill the batch.
const ROUNDS_MAX: usize = 4;

/// A place in the order of ready tasks: turn and task; of scheduled ones: time and task.
pub(super) type Ready = (i64, i64);
/// Before every place.
pub(super) const HEAD: Ready = (i64::MIN, 0);

/// A task that was chosen, and where it waited.
pub(super) struct Chosen {
    pub(super) task: i64,
    pub(super) turn: i64,
    pub(super) user: String,
    /// The number of its pick between users, if it was picked between users.
    pub(super) pick: Option<i64>,
}

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Tasks without user, in their order.
    WithoutUser,
    /// All tasks, in their order.
    First,
    /// Between users.
    BetweenUsers,
    /// One that has to run alone; if there is none that may, as otherwise.
    Alone {
        /// Otherwise is by turn, not between users.
        ignore_users: bool,
    },
}

/// Where looks begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Starts {
    pub(super) ready: Ready,
    pub(super) of_users: Ready,
    pub(super) changes: i64,
    /// How often something had entered by then, as far as this process knows.
    pub(super) entered: u64,
}

/// A look at the ready tasks: where it began, how long it took, where it came to.
pub(super) type Look<P> = Option<(P, Duration, Option<P>)>;

/// What was chosen.
#[derive(Default)]
pub(super) struct Choice {
    pub(super) chosen: Vec<Chosen>,
    /// It is one task that has to run alone.
    pub(super) alone: bool,
    /// The last pick between users before this claim, if it holds the accounts.
    pub(super) pick: Option<i64>,
    pub(super) ready: Look<Ready>,
    pub(super) of_users: Look<Ready>,
    pub(super) changes: Look<i64>,
    /// Places (turn and task) that contradict their tasks, to be mended.
    pub(super) broken: Vec<(i64, i64)>,
}

/// How many tasks to choose at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) tasks: usize,
    /// Of these, tasks of users that have a limit.
    pub(super) limited: usize,
}

/// Choose tasks.
pub(super) async fn choose(session: &mut Session<'_>, way: Way, limits: Limits, starts: Starts) -> Result<Choice, Failure> {
    const HOLD: &str = "SELECT pick FROM laelaps_counter WHERE id = 1 FOR UPDATE";
    let mut choice = Choice::default();
    let limit = limits.tasks;
    match way {
        Way::WithoutUser => {
            let found = first(session, FIRST, starts.ready, limit, &mut choice.ready, &mut choice.broken).await?;
            choice.chosen = found.into_iter().map(|found| found.chosen).collect();
        }
        Way::First => choice.chosen = first_of_all(session, limit, starts, &mut choice).await?,
        Way::BetweenUsers | Way::Alone { .. } => {
            let pick: i64 = sqlx::query_scalar(HOLD).fetch_one(session.db()).await?;
            choice.pick = Some(pick);
            let started = Instant::now();
            let folded = fold(session, pick, starts.changes, FOLDED_BY_CLAIM).await?;
            choice.changes = Some((starts.changes, started.elapsed(), folded.last));
            choice.broken.extend(folded.broken);
            let suspect = if way == Way::BetweenUsers { None } else { suspect(session).await? };
            choice.alone = suspect.is_some();
            choice.chosen = match suspect {
                Some(chosen) => vec![chosen],
                None if way == (Way::Alone { ignore_users: true }) => first_of_all(session, limit, starts, &mut choice).await?,
                None => between_users(session, limits, pick, starts, &mut choice).await?,
            };
        }
    }
    // A task that stands in two places is taken once.
    let mut seen = HashSet::with_capacity(choice.chosen.len());
    choice.chosen.retain(|chosen| seen.insert(chosen.task));
    choice.chosen = fitting(session, choice.chosen).await?;
    Ok(choice)
}

/// The first tasks, whosever they are.
async fn first_of_all(
    session: &mut Session<'_>,
    limit: usize,
    starts: Starts,
    choice: &mut Choice,
) -> Result<Vec<Chosen>, Failure> {
    let mut found = first(session, FIRST, starts.ready, limit, &mut choice.ready, &mut choice.broken).await?;
    let of_users = first(session, FIRST_OF_USERS, starts.of_users, limit, &mut choice.of_users, &mut choice.broken).await?;
    found.extend(of_users);
    found.sort_unstable_by_key(|found| (found.chosen.turn, found.chosen.task));
    found.truncate(limit);
    Ok(found.into_iter().map(|found| found.chosen).collect())
}

/// A ready task whose row is held.
struct Found {
    chosen: Chosen,
    max_running: Option<u32>,
}

pub(super) const FIRST: &str = "SELECT turn, task, max_running, '' FROM laelaps_ready
    WHERE (turn = ? AND task > ?) OR turn > ? ORDER BY turn, task LIMIT ? FOR UPDATE SKIP LOCKED";

pub(super) const FIRST_OF_USERS: &str = "SELECT turn, task, max_running, user FROM laelaps_ready_of_user FORCE INDEX (in_turn)
    WHERE (turn = ? AND task > ?) OR turn > ? ORDER BY turn, task LIMIT ? FOR UPDATE SKIP LOCKED";

/// Take hold of the first tasks behind a place that nobody else holds; of all, if there are none behind it.
async fn first(
    session: &mut Session<'_>,
    sql: &'static str,
    start: Ready,
    limit: usize,
    look: &mut Look<Ready>,
    broken: &mut Vec<(i64, i64)>,
) -> Result<Vec<Found>, Failure> {
    let mut start = start;
    loop {
        let started = Instant::now();
        let rows = sqlx::query(sql).bind(start.0).bind(start.1).bind(start.0).bind(count(limit)).fetch_all(session.db()).await?;
        let took = started.elapsed();
        let mut found = Vec::with_capacity(rows.len());
        let mut last = None;
        for row in &rows {
            let (turn, task) = (row.try_get(0)?, row.try_get(1)?);
            last = Some((turn, task));
            match String::from_utf8(row.try_get(3)?) {
                Ok(user) if !user.is_empty() || sql == FIRST => {
                    let chosen = Chosen { turn, task, user, pick: None };
                    found.push(Found { chosen, max_running: row.try_get(2)? });
                }
                _ => broken.push((turn, task)),
            }
        }
        *look = Some((start, took, last));
        if last.is_some() || start == HEAD {
            return Ok(found);
        }
        start = HEAD;
    }
}

/// Tasks picked between users, in the fair order.
async fn between_users(
    session: &mut Session<'_>,
    limits: Limits,
    last_pick: i64,
    starts: Starts,
    choice: &mut Choice,
) -> Result<Vec<Chosen>, Failure> {
    let limit = limits.tasks;
    let mut accounts = open_accounts(session, limits, last_pick + 1, &mut choice.broken).await?;
    accounts.extend(without_user(session, limit, starts, choice).await?);
    if accounts.is_empty() {
        return Ok(Vec::new());
    }
    let mut chosen: Vec<Chosen> = Vec::with_capacity(limit);
    let mut limited = limits.limited;
    for _ in 0..ROUNDS_MAX {
        let number = last_pick + 1 + count(chosen.len());
        let wanted = limit - chosen.len();
        if limited == 0 {
            accounts.retain(|account| !account.candidates.front().is_some_and(|first| is_limited(account, first)));
        }
        let needed = fair::estimate(&accounts, wanted, number);
        candidates(session, &mut accounts, &needed).await?;
        let (picks, cut) = pick_limited(&mut accounts, wanted, number, &mut limited);
        let first = chosen.len();
        chosen.extend(picks.into_iter().enumerate().map(|(place, pick)| Chosen {
            task: pick.candidate.task,
            turn: pick.candidate.turn,
            user: accounts[pick.account].user.clone(),
            pick: Some(number + count(place)),
        }));
        let stopped_short = chosen.len() < limit && chosen.len() > first;
        let unknown = accounts.iter().any(|account| account.candidates.is_empty() && account.rest == Rest::Unknown);
        if !(stopped_short && (unknown || cut)) {
            break;
        }
        refill(session, &mut accounts, &chosen).await?;
    }
    Ok(chosen)
}

pub(super) const OPEN_ACCOUNTS: &str =
    "(SELECT user, running, picked, head_turn, head_task, head_max FROM laelaps_account FORCE INDEX (by_weight)
        WHERE open = 1 ORDER BY weight, head_turn, head_task LIMIT ?)
    UNION
    (SELECT user, running, picked, head_turn, head_task, head_max FROM laelaps_account FORCE INDEX (by_age)
        WHERE open = 1 AND picked < ? ORDER BY picked LIMIT ?)";

/// The users that could be picked: those of the greatest weight, and those passed over for long.
async fn open_accounts(
    session: &mut Session<'_>,
    limits: Limits,
    first_pick: i64,
    broken: &mut Vec<(i64, i64)>,
) -> Result<Vec<Account>, Failure> {
    let limit = limits.tasks;
    let aged = count(limit) / fair::AGED_EVERY + 1;
    let last_pick = first_pick + count(limit) - 1;
    let mut rows = sqlx::query(OPEN_ACCOUNTS)
        .bind(count(limit))
        .bind(last_pick - fair::AGED_AFTER)
        .bind(aged)
        .fetch_all(session.db())
        .await?;
    // Those may all have a limit, and the others be behind them.
    if limits.limited < limit && rows.len() >= limit {
        rows.extend(sqlx::query(OPEN_WITHOUT_LIMIT).bind(count(limit)).fetch_all(session.db()).await?);
    }
    let mut accounts = Vec::with_capacity(rows.len());
    let mut seen: HashSet<Vec<u8>> = HashSet::with_capacity(rows.len());
    for row in &rows {
        let user: Vec<u8> = row.try_get(0)?;
        if !seen.insert(user.clone()) {
            continue;
        }
        let Ok(user) = String::from_utf8(user.clone()) else {
            broken.extend(places_of_unreadable(session, &user).await?);
            continue;
        };
        let head_turn: Option<i64> = row.try_get(3)?;
        let head = candidate(head_turn.unwrap_or(0), row.try_get(4)?, row.try_get(5)?);
        accounts.push(Account {
            user,
            running: row.try_get(1)?,
            picked: row.try_get(2)?,
            candidates: [head].into(),
            rest: Rest::Unknown,
        });
    }
    Ok(accounts)
}

pub(super) const OPEN_WITHOUT_LIMIT: &str = "SELECT user, running, picked, head_turn, head_task, head_max
    FROM laelaps_account FORCE INDEX (without_limit) WHERE free_weight IS NOT NULL ORDER BY free_weight, free_turn LIMIT ?";

/// Whether a task counts against its user's limit.
fn is_limited(account: &Account, candidate: &Candidate) -> bool {
    !account.user.is_empty() && candidate.max_running.is_some()
}

/// As [`fair::pick`], with at most so many tasks of users that have a limit. If the next one would be one too many, the picks end before it:
/// what follows is picked among the others.
fn pick_limited(accounts: &mut Vec<Account>, wanted: usize, first_pick: i64, limited: &mut usize) -> (Vec<fair::Pick>, bool) {
    if *limited >= wanted {
        let picks = fair::pick(accounts, wanted, first_pick);
        *limited -= picks.iter().filter(|pick| is_limited(&accounts[pick.account], &pick.candidate)).count();
        return (picks, false);
    }
    let before = accounts.clone();
    let picks = fair::pick(accounts, wanted, first_pick);
    let mut room = *limited;
    let fitting = picks.iter().take_while(|pick| {
        let counts = usize::from(is_limited(&accounts[pick.account], &pick.candidate));
        let fits = counts <= room;
        room = room.saturating_sub(counts);
        fits
    });
    let fitting = fitting.count();
    if fitting == picks.len() {
        *limited = room;
        return (picks, false);
    }
    // The same picks again, up to there.
    *accounts = before;
    *limited = 0;
    (fair::pick(accounts, fitting, first_pick), true)
}

/// The tasks without user as one more user, as many as could be picked.
async fn without_user(
    session: &mut Session<'_>,
    limit: usize,
    starts: Starts,
    choice: &mut Choice,
) -> Result<Option<Account>, Failure> {
    const PICKED: &str = "SELECT picked FROM laelaps_account WHERE user = ''";
    let found = first(session, FIRST, starts.ready, limit, &mut choice.ready, &mut choice.broken).await?;
    if found.is_empty() {
        return Ok(None);
    }
    let picked: Option<i64> = sqlx::query_scalar(PICKED).fetch_optional(session.db()).await?;
    let rest = if found.len() < limit { Rest::Nothing } else { Rest::Unknown };
    let candidates = found.into_iter().map(|found| candidate(found.chosen.turn, found.chosen.task, found.max_running)).collect();
    Ok(Some(Account { user: String::new(), running: 0, picked: picked.unwrap_or(0), candidates, rest }))
}

fn candidate(turn: i64, task: i64, max_running: Option<u32>) -> Candidate {
    Candidate { turn, task, max_running: max_running.map(i64::from) }
}

pub(super) const CANDIDATES_OF_ONE: &str = "SELECT user, turn, task, max_running FROM laelaps_ready_of_user
    WHERE (user = ? AND turn = ? AND task > ?) OR (user = ? AND turn > ?) ORDER BY user, turn, task LIMIT ?";

/// Of several users, each step to the next task of one.
pub(super) const CANDIDATES_OF_SEVERAL: &str =
    "WITH RECURSIVE walk (user, turn, task, max_running, wanted, steps) AS (
        SELECT s.user, s.turn, s.task, CAST(NULL AS UNSIGNED), s.wanted, 0 FROM JSON_TABLE(?, '$[*]' COLUMNS (
            user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', turn BIGINT PATH '$[1]', task BIGINT PATH '$[2]',
            wanted BIGINT PATH '$[3]')) AS s
        UNION ALL
        SELECT walk.user, t.turn, t.id, t.max_running, walk.wanted - 1, walk.steps + 1
        FROM walk STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = (SELECT later.task FROM laelaps_ready_of_user AS later
            WHERE later.user = walk.user AND later.turn >= walk.turn AND (later.turn > walk.turn OR later.task > walk.task)
            ORDER BY later.turn, later.task LIMIT 1)
        WHERE walk.wanted > 0)
    SELECT user, turn, task, max_running FROM walk WHERE steps > 0";

/// Fetch as many of each user's first tasks as are needed.
async fn candidates(session: &mut Session<'_>, accounts: &mut [Account], needed: &[usize]) -> Result<(), Failure> {
    let wanted: Vec<(&str, i64, i64, i64)> = accounts
        .iter()
        .zip(needed)
        .filter(|(account, needed)| {
            account.rest == Rest::Unknown && **needed > account.candidates.len() && !account.user.is_empty()
        })
        .filter_map(|(account, needed)| {
            let last = account.candidates.back()?;
            Some((account.user.as_str(), last.turn, last.task, count(*needed - account.candidates.len())))
        })
        .collect();
    let rows = match wanted.as_slice() {
        [] => return Ok(()),
        [(user, turn, task, more)] => next_of(session, user, (*turn, *task), *more).await?,
        several => sqlx::query(CANDIDATES_OF_SEVERAL).bind(json(several)).fetch_all(session.db()).await?,
    };
    let mut found: HashMap<String, Vec<Candidate>> = HashMap::with_capacity(wanted.len());
    for row in &rows {
        let user: Vec<u8> = row.try_get(0)?;
        let max_running: Option<u64> = row.try_get(3)?;
        let max_running = max_running.and_then(|most| i64::try_from(most).ok());
        let candidate = Candidate { turn: row.try_get(1)?, task: row.try_get(2)?, max_running };
        found.entry(String::from_utf8_lossy(&user).into_owned()).or_default().push(candidate);
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

async fn next_of(session: &mut Session<'_>, user: &str, after: Ready, limit: i64) -> Result<Vec<MySqlRow>, sqlx::Error> {
    let query = sqlx::query(CANDIDATES_OF_ONE).bind(user.as_bytes().to_vec()).bind(after.0).bind(after.1);
    query.bind(user.as_bytes().to_vec()).bind(after.0).bind(limit).fetch_all(session.db()).await
}

/// Give each user that ran out of known tasks its next one.
async fn refill(session: &mut Session<'_>, accounts: &mut [Account], chosen: &[Chosen]) -> Result<(), Failure> {
    let empty = |account: &&mut Account| account.candidates.is_empty() && account.rest == Rest::Unknown;
    for account in accounts.iter_mut().filter(empty) {
        let Some(last) = chosen.iter().rev().find(|chosen| chosen.user == account.user) else { continue };
        match next_of(session, &account.user, (last.turn, last.task), 1).await?.first() {
            Some(row) => account.candidates.push_back(candidate(row.try_get(1)?, row.try_get(2)?, row.try_get(3)?)),
            None => account.rest = Rest::Nothing,
        }
    }
    Ok(())
}

/// The first of the chosen whose data together keeps the bound.
async fn fitting(session: &mut Session<'_>, mut chosen: Vec<Chosen>) -> Result<Vec<Chosen>, Failure> {
    const SUM: &str = concat!(
        "SELECT CAST(COALESCE(SUM(d.bytes), 0) AS SIGNED) FROM ",
        ids!(),
        " STRAIGHT_JOIN laelaps_task_data AS d FORCE INDEX (PRIMARY) ON d.task = s.id AND d.part = 0"
    );
    const BYTES: &str = concat!(
        "SELECT s.id, CAST(d.bytes AS SIGNED) FROM ",
        ids!(),
        " STRAIGHT_JOIN laelaps_task_data AS d FORCE INDEX (PRIMARY) ON d.task = s.id AND d.part = 0"
    );
    if chosen.len() < 2 {
        return Ok(chosen);
    }
    let tasks = json(chosen.iter().map(|chosen| chosen.task));
    let sum: i64 = sqlx::query_scalar(SUM).bind(tasks.clone()).fetch_one(session.db()).await?;
    if sum > CLAIMED_BYTES_MAX {
        let bytes: Vec<(i64, i64)> = sqlx::query_as(BYTES).bind(tasks).fetch_all(session.db()).await?;
        let bytes: HashMap<i64, i64> = bytes.into_iter().collect();
        let mut sum = 0_i64;
        let fitting = chosen.iter().take_while(|chosen| {
            sum += bytes.get(&chosen.task).copied().unwrap_or(0);
            sum <= CLAIMED_BYTES_MAX
        });
        chosen.truncate(fitting.count().max(1));
    }
    Ok(chosen)
}
