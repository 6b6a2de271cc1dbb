//! Tasks of users: which accounts could be picked, of which queues, and the tasks that they are picked for.

use std::collections::{HashMap, HashSet};

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;

use super::accounts::{Owner, readable};
use super::choose::{Choice, Chosen, Limits, Ready, Starts};
use super::failure::Failure;
use super::fronts::{ARMS, arms, hex, queues};
use super::mend::places_of_unreadable;
use super::rows::{count, json};
use super::session::Session;
use crate::fair::{self, Account, Candidate, Rest};

/// Rounds of choosing, where users' tasks differ so much in their max_running that the first did not fill the batch.
const ROUNDS_MAX: usize = 4;

/// Tasks picked between users, in the fair order.
pub(super) async fn between_users(
    session: &mut Session<'_>,
    limits: Limits,
    last_pick: i64,
    starts: &Starts,
    choice: &mut Choice,
) -> Result<Vec<Chosen>, Failure> {
    let limit = limits.tasks;
    let (mut owners, mut accounts) = open_accounts(session, limits, last_pick + 1, starts, choice).await?;
    let (queues, nobody) = without_user(session, limit, last_pick, starts, choice).await?;
    owners.extend(nobody.iter().map(|_| Owner::default()));
    accounts.extend(nobody);
    if accounts.is_empty() {
        return Ok(Vec::new());
    }
    let mut chosen: Vec<Chosen> = Vec::with_capacity(limit);
    let mut limited = limits.limited;
    for _ in 0..ROUNDS_MAX {
        let number = last_pick + 1 + count(chosen.len());
        let wanted = limit - chosen.len();
        if limited == 0 {
            let is_free = |account: &Account| !account.candidates.front().is_some_and(|first| is_limited(account, first));
            let free: Vec<(Owner, Account)> = owners.into_iter().zip(accounts).filter(|(_, account)| is_free(account)).collect();
            (owners, accounts) = free.into_iter().unzip();
        }
        let needed = fair::estimate(&accounts, wanted, number);
        candidates(session, &owners, &mut accounts, &needed).await?;
        let (picks, cut) = pick_limited(&mut accounts, wanted, number, &mut limited);
        let first = chosen.len();
        chosen.extend(picks.into_iter().enumerate().map(|(place, pick)| Chosen {
            task: pick.candidate.task,
            turn: pick.candidate.turn,
            queue: queues.get(&pick.candidate.task).unwrap_or(&owners[pick.account].queue).clone(),
            user: owners[pick.account].user.clone(),
            pick: Some(number + count(place)),
        }));
        let stopped_short = chosen.len() < limit && chosen.len() > first;
        let unknown = accounts.iter().any(|account| account.candidates.is_empty() && account.rest == Rest::Unknown);
        if !(stopped_short && (unknown || cut)) {
            break;
        }
        refill(session, &owners, &mut accounts, &chosen).await?;
    }
    Ok(chosen)
}

/// What is needed of an account, in [`open_accounts`]'s order.
macro_rules! account {
    () => {
        "SELECT queue, user, running, picked, head_turn, head_task, head_max, weight, free_weight FROM laelaps_account"
    };
}

/// The accounts of one queue: those of the greatest weight, and those passed over for long.
pub(super) const OPEN_ACCOUNTS: &str = concat!(
    "(",
    account!(),
    " FORCE INDEX (by_weight) WHERE queue = ? AND open = 1 ORDER BY weight, head_turn, head_task LIMIT ?)
    UNION
    (",
    account!(),
    " FORCE INDEX (by_age) WHERE queue = ? AND open = 1 AND picked < ? ORDER BY picked LIMIT ?)"
);

/// The same of all queues but the default one.
pub(super) const OPEN_OTHERS: &str = concat!(
    "(",
    account!(),
    " FORCE INDEX (other_by_weight) WHERE other_weight IS NOT NULL ORDER BY other_weight, other_turn LIMIT ?)
    UNION
    (",
    account!(),
    " FORCE INDEX (other_by_age) WHERE other_picked < ? ORDER BY other_picked LIMIT ?)"
);

/// The accounts of one queue whose candidates have no limit.
pub(super) const OPEN_WITHOUT_LIMIT: &str =
    concat!(account!(), " FORCE INDEX (without_limit) WHERE queue = ? AND free = 1 ORDER BY free_weight, free_turn LIMIT ?");

/// The same of all queues but the default one.
pub(super) const OTHERS_WITHOUT_LIMIT: &str = concat!(
    account!(),
    " FORCE INDEX (other_without_limit) WHERE other_free_weight IS NOT NULL ORDER BY other_free_weight, other_free_turn LIMIT ?"
);

/// Of several queues those accounts that have the greatest weight.
pub(super) const OPEN_OF_QUEUES: &str = concat!(
    "SELECT * FROM (",
    arms!(account!(), " FORCE INDEX (by_weight) WHERE queue = ? AND open = 1 ORDER BY weight, head_turn, head_task LIMIT ?"),
    ") AS best ORDER BY weight, head_turn, head_task LIMIT ?"
);

pub(super) const AGED_OF_QUEUES: &str = concat!(
    "SELECT * FROM (",
    arms!(account!(), " FORCE INDEX (by_age) WHERE queue = ? AND open = 1 ORDER BY picked LIMIT ?"),
    ") AS aged ORDER BY picked LIMIT ?"
);

pub(super) const WITHOUT_LIMIT_OF_QUEUES: &str = concat!(
    "SELECT * FROM (",
    arms!(account!(), " FORCE INDEX (without_limit) WHERE queue = ? AND free = 1 ORDER BY free_weight, free_turn LIMIT ?"),
    ") AS free ORDER BY free_weight, head_turn LIMIT ?"
);

/// Of each queue: the least weight, how long the one that was passed over longest was, and the least weight of those without limit.
pub(super) const OPEN_QUEUES: &str = concat!(
    "SELECT s.place, (SELECT CONCAT_WS(',', a.weight, a.head_turn) FROM laelaps_account AS a FORCE INDEX (by_weight)
            WHERE a.queue = UNHEX(s.queue) AND a.open = 1 ORDER BY a.weight, a.head_turn, a.head_task LIMIT 1),
        (SELECT a.picked FROM laelaps_account AS a FORCE INDEX (by_age)
            WHERE a.queue = UNHEX(s.queue) AND a.open = 1 ORDER BY a.picked LIMIT 1),
        (SELECT CONCAT_WS(',', a.free_weight, a.free_turn) FROM laelaps_account AS a FORCE INDEX (without_limit)
            WHERE a.queue = UNHEX(s.queue) AND a.free = 1 ORDER BY a.free_weight, a.free_turn LIMIT 1) FROM ",
    queues!()
);

/// The users that could be picked: those of the greatest weight, and those passed over for long.
async fn open_accounts(
    session: &mut Session<'_>,
    limits: Limits,
    first_pick: i64,
    starts: &Starts,
    choice: &mut Choice,
) -> Result<(Vec<Owner>, Vec<Account>), Failure> {
    let limit = limits.tasks;
    let open = Open {
        limit,
        aged: limit / usize::try_from(fair::AGED_EVERY).unwrap_or(1) + 1,
        picked_before: first_pick + count(limit) - 1 - fair::AGED_AFTER,
        // Those of the greatest weight may all have a limit, and the others be behind them.
        beyond_limited: limits.limited < limit,
    };
    let rows = match starts.asked.as_deref() {
        None => {
            let mut rows = open.of_queue(session, "").await?;
            if choice.others {
                rows.extend(open.of_others(session).await?);
            }
            rows
        }
        Some([queue]) => open.of_queue(session, queue).await?,
        Some(queues) => open.of_queues(session, queues).await?,
    };
    let (mut owners, mut accounts) = (Vec::with_capacity(rows.len()), Vec::with_capacity(rows.len()));
    let mut seen: HashSet<(Vec<u8>, Vec<u8>)> = HashSet::with_capacity(rows.len());
    for row in &rows {
        let (queue, user): (Vec<u8>, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
        if seen.contains(&(queue.clone(), user.clone())) {
            continue;
        }
        match readable(&queue, &user) {
            Some(owner) => {
                let head_turn: Option<i64> = row.try_get(4)?;
                let head = candidate(head_turn.unwrap_or(0), row.try_get(5)?, row.try_get(6)?);
                accounts.push(Account {
                    user: owner.user.clone(),
                    running: row.try_get(2)?,
                    picked: row.try_get(3)?,
                    candidates: [head].into(),
                    rest: Rest::Unknown,
                });
                owners.push(owner);
            }
            None => choice.broken.extend(places_of_unreadable(session, &queue, &user).await?),
        }
        seen.insert((queue, user));
    }
    Ok((owners, accounts))
}

/// What is asked of open accounts.
#[derive(Clone, Copy)]
struct Open {
    limit: usize,
    /// So many of those that were last picked longest ago, before this pick.
    aged: usize,
    picked_before: i64,
    /// As many that have no limit are looked for, where all of the limit may have one.
    beyond_limited: bool,
}

impl Open {
    async fn of_queue(self, session: &mut Session<'_>, queue: &str) -> Result<Vec<MySqlRow>, Failure> {
        let (queue, limit) = (queue.as_bytes().to_vec(), count(self.limit));
        let query = sqlx::query(OPEN_ACCOUNTS).bind(queue.clone()).bind(limit);
        let query = query.bind(queue.clone()).bind(self.picked_before).bind(count(self.aged));
        let mut rows = query.fetch_all(session.db()).await?;
        if self.beyond_limited && rows.len() >= self.limit {
            rows.extend(sqlx::query(OPEN_WITHOUT_LIMIT).bind(queue).bind(limit).fetch_all(session.db()).await?);
        }
        Ok(rows)
    }

    async fn of_others(self, session: &mut Session<'_>) -> Result<Vec<MySqlRow>, Failure> {
        let limit = count(self.limit);
        let query = sqlx::query(OPEN_OTHERS).bind(limit).bind(self.picked_before).bind(count(self.aged));
        let mut rows = query.fetch_all(session.db()).await?;
        if self.beyond_limited && rows.len() >= self.limit {
            rows.extend(sqlx::query(OTHERS_WITHOUT_LIMIT).bind(limit).fetch_all(session.db()).await?);
        }
        Ok(rows)
    }

    /// Of so many queues as accounts are asked for: the next of all queues is in one whose own next comes before that of the others.
    async fn of_queues(self, session: &mut Session<'_>, asked: &[String]) -> Result<Vec<MySqlRow>, Failure> {
        let (mut open, mut aged, mut free) = (Vec::new(), Vec::new(), Vec::new());
        let names = json(asked.iter().map(|queue| hex(queue.as_bytes())));
        for row in sqlx::query(OPEN_QUEUES).bind(names).fetch_all(session.db()).await? {
            let place: i64 = row.try_get(0)?;
            let Some(queue) = usize::try_from(place - 1).ok().and_then(|place| asked.get(place)) else { continue };
            let (weight, free_weight): (Option<String>, Option<String>) = (row.try_get(1)?, row.try_get(3)?);
            open.extend(weight.as_deref().and_then(first).map(|(weight, turn)| (weight, turn, queue.as_str())));
            free.extend(free_weight.as_deref().and_then(first).map(|(weight, turn)| (weight, turn, queue.as_str())));
            let picked: Option<i64> = row.try_get(2)?;
            let picked = picked.filter(|picked| *picked < self.picked_before);
            aged.extend(picked.map(|picked| (0.0, picked, queue.as_str())));
        }
        let mut rows = self.accounts_of(session, OPEN_OF_QUEUES, open, self.limit).await?;
        let beyond_limited = self.beyond_limited && rows.len() >= self.limit;
        rows.extend(self.accounts_of(session, AGED_OF_QUEUES, aged, self.aged).await?);
        if beyond_limited {
            rows.extend(self.accounts_of(session, WITHOUT_LIMIT_OF_QUEUES, free, self.limit).await?);
        }
        Ok(rows)
    }

    /// The first accounts of the first so many queues.
    async fn accounts_of(
        self,
        session: &mut Session<'_>,
        sql: &'static str,
        mut queues: Vec<(f64, i64, &str)>,
        most: usize,
    ) -> Result<Vec<MySqlRow>, Failure> {
        queues.sort_unstable_by(|one, other| one.0.total_cmp(&other.0).then_with(|| one.1.cmp(&other.1)));
        queues.truncate(most);
        let mut rows = Vec::new();
        for queues in queues.chunks(ARMS) {
            let mut query = sqlx::query(sql);
            for arm in 0..ARMS {
                let (queue, limit) = queues.get(arm).map_or(("", 0), |(_, _, queue)| (*queue, most));
                query = query.bind(queue.as_bytes().to_vec()).bind(count(limit));
            }
            rows.extend(query.bind(count(most)).fetch_all(session.db()).await?);
        }
        Ok(rows)
    }
}

/// A weight and a turn.
fn first(words: &str) -> Option<(f64, i64)> {
    let (weight, turn) = words.split_once(',')?;
    Some((weight.parse().ok()?, turn.parse().ok()?))
}

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

/// The tasks without user as one more user, as many as could be picked; and the queues of those.
///
/// Over all queues, their account says when it was last picked. Claims of some queues do not go by that, or the tasks of theirs could be passed over for
/// ever while those of other queues are picked: they go by their own last pick in this process.
async fn without_user(
    session: &mut Session<'_>,
    limit: usize,
    last_pick: i64,
    starts: &Starts,
    choice: &mut Choice,
) -> Result<(HashMap<i64, String>, Option<Account>), Failure> {
    const PICKED: &str = "SELECT picked FROM laelaps_account WHERE queue = '' AND user = ''";
    let found = choice.first(session, limit, starts).await?;
    if found.is_empty() {
        return Ok((HashMap::new(), None));
    }
    let picked = match starts.asked {
        Some(_) => starts.picked.unwrap_or(last_pick),
        None => sqlx::query_scalar(PICKED).fetch_optional(session.db()).await?.unwrap_or(0),
    };
    choice.picked = Some(picked);
    let rest = if found.len() < limit { Rest::Nothing } else { Rest::Unknown };
    let elsewhere = found.iter().filter(|found| !found.chosen.queue.is_empty());
    let queues = elsewhere.map(|found| (found.chosen.task, found.chosen.queue.clone())).collect();
    let candidates = found.into_iter().map(|found| candidate(found.chosen.turn, found.chosen.task, found.max_running)).collect();
    Ok((queues, Some(Account { user: String::new(), running: 0, picked, candidates, rest })))
}

fn candidate(turn: i64, task: i64, max_running: Option<u32>) -> Candidate {
    Candidate { turn, task, max_running: max_running.map(i64::from) }
}

pub(super) const CANDIDATES_OF_ONE: &str = "SELECT 0, turn, task, max_running FROM laelaps_ready_of_user
    WHERE queue = ? AND user = ? AND ((turn = ? AND task > ?) OR turn > ?) ORDER BY turn, task LIMIT ?";

/// Of several users, each step to the next task of one. The first column is the user's place among them.
pub(super) const CANDIDATES_OF_SEVERAL: &str =
    "WITH RECURSIVE walk (place, queue, user, turn, task, max_running, wanted, steps) AS (
        SELECT s.place, s.queue, s.user, s.turn, s.task, CAST(NULL AS UNSIGNED), s.wanted, 0 FROM JSON_TABLE(?, '$[*]' COLUMNS (
            place BIGINT PATH '$[0]', queue VARCHAR(64) CHARACTER SET utf8mb4 PATH '$[1]',
            user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[2]', turn BIGINT PATH '$[3]', task BIGINT PATH '$[4]',
            wanted BIGINT PATH '$[5]')) AS s
        UNION ALL
        SELECT walk.place, walk.queue, walk.user, t.turn, t.id, t.max_running, walk.wanted - 1, walk.steps + 1
        FROM walk STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = (SELECT later.task FROM laelaps_ready_of_user AS later
            WHERE later.queue = walk.queue AND later.user = walk.user AND later.turn >= walk.turn
                AND (later.turn > walk.turn OR later.task > walk.task)
            ORDER BY later.turn, later.task LIMIT 1)
        WHERE walk.wanted > 0)
    SELECT place, turn, task, max_running FROM walk WHERE steps > 0";

/// Fetch as many of each user's first tasks as are needed.
async fn candidates(
    session: &mut Session<'_>,
    owners: &[Owner],
    accounts: &mut [Account],
    needed: &[usize],
) -> Result<(), Failure> {
    let wanted: Vec<(usize, &str, &str, i64, i64, i64)> = accounts
        .iter()
        .zip(needed)
        .enumerate()
        .filter(|(place, (account, needed))| {
            account.rest == Rest::Unknown && **needed > account.candidates.len() && !owners[*place].is_nobody()
        })
        .filter_map(|(place, (account, needed))| {
            let (last, owner) = (account.candidates.back()?, &owners[place]);
            let more = count(*needed - account.candidates.len());
            Some((place, owner.queue.as_str(), owner.user.as_str(), last.turn, last.task, more))
        })
        .collect();
    let (rows, only) = match wanted.as_slice() {
        [] => return Ok(()),
        [(place, _, _, turn, task, more)] => (next_of(session, &owners[*place], (*turn, *task), *more).await?, Some(*place)),
        several => (sqlx::query(CANDIDATES_OF_SEVERAL).bind(json(several)).fetch_all(session.db()).await?, None),
    };
    let mut found: HashMap<usize, Vec<Candidate>> = HashMap::with_capacity(wanted.len());
    for row in &rows {
        let place: i64 = row.try_get(0)?;
        let place = only.or(usize::try_from(place).ok()).unwrap_or(usize::MAX);
        let max_running: Option<u64> = row.try_get(3)?;
        let max_running = max_running.and_then(|most| i64::try_from(most).ok());
        let candidate = Candidate { turn: row.try_get(1)?, task: row.try_get(2)?, max_running };
        found.entry(place).or_default().push(candidate);
    }
    let asked: Vec<(usize, i64)> = wanted.iter().map(|(place, .., more)| (*place, *more)).collect();
    for (place, asked) in asked {
        let account = &mut accounts[place];
        let mut more = found.remove(&place).unwrap_or_default();
        more.sort_unstable_by_key(|candidate| (candidate.turn, candidate.task));
        if count(more.len()) < asked {
            account.rest = Rest::Nothing;
        }
        account.candidates.extend(more);
    }
    Ok(())
}

async fn next_of(session: &mut Session<'_>, owner: &Owner, after: Ready, limit: i64) -> Result<Vec<MySqlRow>, sqlx::Error> {
    let (queue, user) = (owner.queue.as_bytes().to_vec(), owner.user.as_bytes().to_vec());
    let query = sqlx::query(CANDIDATES_OF_ONE).bind(queue).bind(user).bind(after.0).bind(after.1).bind(after.0);
    query.bind(limit).fetch_all(session.db()).await
}

/// Give each user that ran out of known tasks its next one.
async fn refill(session: &mut Session<'_>, owners: &[Owner], accounts: &mut [Account], chosen: &[Chosen]) -> Result<(), Failure> {
    for (owner, account) in owners.iter().zip(accounts) {
        if !account.candidates.is_empty() || account.rest != Rest::Unknown {
            continue;
        }
        let Some(last) = chosen.iter().rev().find(|chosen| chosen.owner() == *owner) else { continue };
        match next_of(session, owner, (last.turn, last.task), 1).await?.first() {
            Some(row) => account.candidates.push_back(candidate(row.try_get(1)?, row.try_get(2)?, row.try_get(3)?)),
            None => account.rest = Rest::Nothing,
        }
    }
    Ok(())
}
